"""Checkpoints on the disk: their files, and writing them in the background; door: nanochat.checkpoint_manager."""
