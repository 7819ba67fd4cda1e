"""The parts of generation: scheduler, key/value cache, decoding, sampling, calculator; door: nanochat.engine."""
