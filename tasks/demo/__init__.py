"""The demo world: a few hundred everyday topics that a tiny model can learn on a CPU in minutes.

`world/*.txt` are tables that people edit. `corpus` turns them into plain English for pretraining, `chat` into
conversations for mid-training, SFT and evaluation. To teach your own world, copy the folder, edit it, check it with
`python -m tasks.demo --check --world DIR` and point NANOCHAT_WORLD_DIR at it.
"""
