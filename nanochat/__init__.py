"""nanochat for the GPUs people actually have: tokenizer, model, training, evaluation, chat."""
