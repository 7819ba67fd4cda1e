"""Read the checkpoints of nanochat itself: `model_000123.pt` and `meta_000123.json`. They are never written.

Only weights are taken (torch.load with weights_only, which runs no code of the file). Optimizer state is left out: the
original keeps it by position, in shards of its own layout.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint.format import checkpoint_folder, saved_steps
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.env import is_system_error
from nanochat.gpt import GPTConfig
from nanochat.interop.foreign import (
    MALFORMED,
    check_config,
    check_finite,
    check_shapes,
    check_text,
    in_float32,
    one_line,
)
from nanochat.interop.hf_format import has_a_row_per_token
from nanochat.stages import TRAINED
from nanochat.tokenizer import RustBPETokenizer

_MODEL = re.compile(r"model_(\d+)\.pt")
_COMPILED = "_orig_mod."


def classic_steps(folder: Path) -> list[int]:
    """The steps of the classic checkpoints in `folder`, ascending; those without a meta file don't count."""
    matches = (_MODEL.fullmatch(path.name) for path in folder.glob("model_*.pt"))
    steps = (int(m.group(1)) for m in matches if m)
    return sorted(step for step in steps if (folder / f"meta_{step:06d}.json").is_file())


def read_classic(folder: Path, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(float32 weights by name, meta) of a classic checkpoint; default: the last step.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the files can't be read, or hold a model that this code does not have; names what differs.
    """
    steps = classic_steps(folder)
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"no model_*.pt with its meta_*.json{f' of step {step}' if step else ''} in {folder}")
    step = steps[-1] if step is None else step
    path = folder / f"model_{step:06d}.pt"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        meta = json.loads((folder / f"meta_{step:06d}.json").read_text(encoding="utf-8"))
        weights = {name.removeprefix(_COMPILED): value for name, value in weights.items()}
        config = GPTConfig.from_nanochat(meta["model_config"], weights)
        check_config(config, weights, str(path))
    except (pickle.UnpicklingError, EOFError, OSError, ValueError, *MALFORMED) as error:
        if is_system_error(error):
            raise
        raise ValueError(f"{path} is no checkpoint of nanochat ({one_line(error)})") from None
    for name in sorted(set(weights)):
        if has_a_row_per_token(name) and len(weights[name]) > config.padded_vocab_size:
            weights[name] = weights[name][: config.padded_vocab_size]  # the original may pad its vocabulary
    check_shapes(weights, config, str(path))
    # Only now: a tensor may claim to be larger than its file, and a copy would be.
    weights = {name: value.contiguous() for name, value in in_float32(weights).items()}
    check_finite(weights, str(path))
    check_text(weights, config, str(path))
    return weights, {**meta, "step": step, "model_config": config.to_dict()}


def import_classic(
    folder: Path, source: str, tag: str, tokenizer: RustBPETokenizer, step: int | None = None, dtype: str = "bfloat16"
) -> Path:
    """Write a classic checkpoint in our format as the `source` model `tag`; returns its folder.

    Args:
        folder: where the .pt file is.
        source: base, mid, sft or rl.
        tag: the name it gets.
        tokenizer: the one it was trained with (the original does not record which).
        step: default: the last.
        dtype: what later stages compute in; the original trains in bfloat16.

    Raises:
        FileNotFoundError, ValueError: see `read_classic`; also if the vocabulary differs or the tag exists.
    """
    weights, meta = read_classic(folder, step)
    if meta["model_config"]["vocab_size"] != tokenizer.get_vocab_size():
        raise ValueError(
            f"the model in {folder} has {meta['model_config']['vocab_size']} tokens, the tokenizer in use "
            f"{tokenizer.get_vocab_size()}: import the tokenizer that it was trained with first"
        )
    target = checkpoint_folder(source, tag)
    if saved_steps(target):
        raise ValueError(f"{target} holds checkpoints already: choose another --model_tag")
    record = {
        "complete": True,
        "config": meta.get("user_config", {}),
        "dtype": dtype,
        "model_config": meta["model_config"],
        "tokenizer_hash": tokenizer.hash,
        "val_bpb": meta.get("val_bpb"),
        "imported_from": f"{TRAINED[source].folder} of nanochat, {folder.name}/model_{meta['step']:06d}.pt",
    }
    return save_checkpoint(target, meta["step"], weights, None, record, keep=None)
