"""How a checkpoint is written, named and proved whole; door: nanochat.checkpoint_manager."""
