"""Models of other programs: Hugging Face folders and nanochat's own checkpoints."""
