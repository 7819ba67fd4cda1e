"""The demo world: a few hundred everyday topics that a tiny model can learn on a CPU in minutes.

`world/` holds tables that people edit; its README.md shows how to write a world of your own. `corpus` turns them into
plain English for pretraining, `chat` into conversations for mid-training, SFT and evaluation.
"""
