"""The demo world: a few hundred everyday topics that a tiny model can learn on a CPU in minutes.

`world/*.txt` are the tables a person edits. `corpus` turns them into plain English for pretraining, `chat` into
conversations for midtraining, SFT and evaluation. To teach your own world, copy the folder, edit it, check it with
`python -m tasks.demo --check --world DIR` and point NANOCHAT_WORLD_DIR at it.
"""
