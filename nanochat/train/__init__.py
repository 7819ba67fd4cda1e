"""The training loop and the stages: pretraining, finetuning, reinforcement learning."""
