"""Pretraining that goes on from a model (--init_from): which one, and what follows from it for the settings."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nanochat.checkpoint.format import checkpoint_folder
from nanochat.checkpoint_manager import Checkpoint, find_tag, load_checkpoint
from nanochat.gpt import GPTConfig
from nanochat.recipe import recipe_of
from nanochat.train.pretrain_config import PretrainConfig

# Of the recipe's learning rates, where a run goes on from a model. Source: dev/LOG.md, "going on from a model".
LR_SCALE_GOING_ON = 0.3


def load_start(name: str) -> Checkpoint:
    """The checkpoint that --init_from names: the tag of a base model, or a folder.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: it is damaged.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if len(folder.parts) != 1 or name.startswith("."):  # no tag
            raise FileNotFoundError(f"--init_from={name}: there is no such folder")
        folder = find_tag("base", name)
    return load_checkpoint(folder)


def settle(cfg: PretrainConfig, start: Checkpoint | None) -> PretrainConfig:
    """The settings with all that follows from the model to go on from.

    Its shape goes before the settings' defaults, and so does its recipe, which names the optimizer; but not classic,
    which has one batch for every horizon.

    Raises:
        ValueError: a setting contradicts the model; names it.
    """
    if start is None:
        return replace(cfg, lr_scale=1.0 if cfg.lr_scale is None else cfg.lr_scale)
    config = GPTConfig.from_dict(start.meta["model_config"])
    default = {f.name: f.default for f in fields(PretrainConfig)}
    fixed = {"depth": config.n_layer, "vocab_size": config.vocab_size, "head_size": config.head_dim}
    given = {name: getattr(cfg, name) for name in (*fixed, "aspect_ratio")}
    wrong = [name for name in given if given[name] not in (default[name], fixed.get(name))]
    switched = replace(config, **cfg.architecture.given())
    wrong += [name for name in cfg.architecture.given() if getattr(switched, name) != getattr(config, name)]
    if cfg.separate_documents not in (None, config.document_start >= 0):
        wrong.append("separate_documents")
    if wrong:
        raise ValueError(
            f"--{wrong[0]} contradicts --init_from={cfg.init_from}, whose model has {config.n_layer} layers, "
            f"{config.n_embd} channels, a vocabulary of {config.vocab_size} and its switches: leave it out"
        )
    length = config.sequence_len if cfg.max_seq_len == default["max_seq_len"] else cfg.max_seq_len
    if length > config.sequence_len:
        raise ValueError(
            f"--max_seq_len={length}: the model of --init_from={cfg.init_from} has a context of {config.sequence_len}"
        )
    name = start.folder.parent.name
    tag = cfg.model_tag or f"{name}-more"
    if checkpoint_folder("base", tag).resolve() == start.folder.parent.resolve():
        raise ValueError(f"--model_tag={tag} is the model to go on from: choose another name for the new one")
    recipe: Any = recipe_of(start.meta)
    return replace(
        cfg,
        depth=config.n_layer,
        vocab_size=None,
        max_seq_len=length,
        model_tag=tag,
        recipe=cfg.recipe if recipe == "classic" or cfg.recipe != default["recipe"] else recipe,
        lr_scale=LR_SCALE_GOING_ON if cfg.lr_scale is None else cfg.lr_scale,
    )
