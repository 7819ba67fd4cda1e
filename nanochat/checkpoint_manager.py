"""Checkpoints: one folder per step that becomes visible whole, safetensors and JSON, verified when loaded.

<base dir>/<source>_checkpoints/<tag>/step_000123/
    model.safetensors        weights, float32
    optim_rank0.safetensors  optimizer and random generators of that rank (in an unfinished run)
    meta.json                step, model config, training config, loader position, hashes of the files
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat.common import check_disk_space, get_base_dir
from nanochat.files import atomic_folder, sha256_file, write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

# Where each stage keeps its checkpoints, and the command that makes them.
FOLDERS = {
    "base": ("base_checkpoints", "python -m scripts.base_train"),
    "mid": ("mid_checkpoints", "python -m scripts.mid_train"),
    "sft": ("chatsft_checkpoints", "python -m scripts.chat_sft"),
    "rl": ("chatrl_checkpoints", "python -m scripts.chat_rl"),
}
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; `optimizer` is empty unless it was asked for."""

    folder: Path
    meta: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def checkpoint_folder(source: str, tag: str) -> Path:
    """The folder of a stage's checkpoints under `tag`."""
    if source not in FOLDERS:
        raise ValueError(f"unknown model source {source!r}: choose one of {', '.join(FOLDERS)}")
    return get_base_dir() / FOLDERS[source][0] / tag


def saved_steps(folder: Path) -> list[int]:
    """The steps saved in `folder`, ascending; strays and half-written folders are ignored."""
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(p.name), p) for p in folder.iterdir())
    return sorted(int(m.group(1)) for m, p in matches if m and (p / "meta.json").is_file())


def save_checkpoint(
    folder: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor] | None,
    meta: dict[str, Any],
    keep: int | None = 2,
) -> Path:
    """Write one checkpoint atomically and drop all but the newest `keep`; call it on rank 0.

    Args:
        folder: the tag's folder.
        step: optimizer steps done.
        model: weights by name.
        optimizer: everything a resume needs besides `meta`, as tensors by name; None for a finished model.
        meta: JSON-ready record; the files' hashes are added.
        keep: how many checkpoints stay; None keeps all.
    """
    tensors = {"model.safetensors": model, "optim_rank0.safetensors": optimizer or {}}
    size = sum(t.numel() * t.element_size() for part in tensors.values() for t in part.values())
    folder.mkdir(parents=True, exist_ok=True)
    check_disk_space(folder, size + (16 << 20), f"the checkpoint of step {step}")
    target = folder / f"step_{step:06d}"
    with atomic_folder(target) as tmp:
        hashes = {}
        for name, part in tensors.items():
            if part:
                save_file({k: v.detach().cpu().contiguous() for k, v in part.items()}, tmp / name)
                hashes[name] = sha256_file(tmp / name)
        write_json(tmp / "meta.json", {"step": step, **meta, "files": hashes})
    if keep is not None:
        for old in saved_steps(folder)[:-keep]:
            _remove(folder / f"step_{old:06d}")
    return target


def _remove(folder: Path) -> None:
    import shutil

    # meta.json goes first: a folder without it is no checkpoint, so a kill half-way leaves nothing that looks whole.
    (folder / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(folder: Path, step: int | None = None, with_optimizer: bool = False) -> Checkpoint:
    """Load `step`, or the newest that is undamaged, to the CPU.

    Raises:
        FileNotFoundError: there is no checkpoint.
        RuntimeError: the asked step is damaged, or all are; names the file.
    """
    steps = saved_steps(folder)
    if step is not None and step not in steps:
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none"
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}: {have}")
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    problems = []
    for candidate in [step] if step is not None else reversed(steps):
        path = folder / f"step_{candidate:06d}"
        try:
            return _read(path, with_optimizer)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: {error}")
            print(f"warning: damaged checkpoint skipped: {problems[-1]}", flush=True)
    raise RuntimeError("damaged checkpoint: " + "; ".join(problems))


def _read(path: Path, with_optimizer: bool) -> Checkpoint:
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, expected in meta["files"].items():
        if name.startswith("optim") and not with_optimizer:
            continue
        if sha256_file(path / name) != expected:
            raise ValueError(f"{name} does not match its SHA-256")
        parts[name] = load_file(path / name)
    return Checkpoint(path, meta, parts["model.safetensors"], parts.get("optim_rank0.safetensors", {}))


def find_tag(source: str, model_tag: str | None = None) -> Path:
    """The folder of `model_tag`, else of the deepest model, else of the one saved last.

    Raises:
        FileNotFoundError: there is none; says which command makes one.
    """
    root = checkpoint_folder(source, "x").parent
    command = FOLDERS[source][1]
    if model_tag is not None:
        if not saved_steps(root / model_tag):
            raise FileNotFoundError(
                f"no {source} checkpoint with tag {model_tag!r} in {root}: train it with `{command}`"
            )
        return root / model_tag
    tags = [p for p in root.iterdir() if saved_steps(p)] if root.is_dir() else []
    if not tags:
        raise FileNotFoundError(
            f"no {source} checkpoint in {root}: train one with `{command}` (or everything: `bash speedrun_p100.sh`)"
        )

    def rank(tag: Path) -> tuple[int, float]:
        match = re.fullmatch(r"d(\d+)", tag.name)
        return int(match.group(1)) if match else -1, tag.stat().st_mtime

    return max(tags, key=rank)


def build_model(checkpoint: Checkpoint, device: torch.device, phase: str) -> GPT:
    """The model of a checkpoint on `device`, in "train" or "eval" mode."""
    model = GPT(GPTConfig.from_dict(checkpoint.meta["model_config"]))
    model.load_state_dict(checkpoint.model)
    model.to(device)
    return model.train(phase == "train")


def load_model(
    source: str, device: torch.device, phase: str = "eval", model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """(model, tokenizer, meta) of a stage: base, mid, sft or rl.

    Raises:
        FileNotFoundError: no such checkpoint; the message names the command that makes it.
        RuntimeError: the checkpoint is damaged, or belongs to another tokenizer.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, got {phase!r}")
    checkpoint = load_checkpoint(find_tag(source, model_tag), step)
    tokenizer = get_tokenizer()
    wanted = checkpoint.meta.get("tokenizer_hash")
    if wanted is not None and wanted != tokenizer.hash:
        raise RuntimeError(
            f"{checkpoint.folder} was trained with another tokenizer ({wanted[:8]}…) than the one in "
            f"{get_base_dir() / 'tokenizer'} ({tokenizer.hash[:8]}…): put that tokenizer back or train again"
        )
    return build_model(checkpoint, device, phase), tokenizer, checkpoint.meta


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of every random number generator, as tensors for a checkpoint."""
    _, keys, pos, has_gauss, cached = np.random.get_state()
    state = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "rng.numpy_position": torch.tensor([pos, has_gauss], dtype=torch.int64),
        "rng.numpy_cached": torch.tensor([cached], dtype=torch.float64),
        "rng.python": torch.tensor(random.getstate()[1], dtype=torch.int64),
    }
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["rng.torch"])
    pos, has_gauss = state["rng.numpy_position"].tolist()
    keys = state["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, pos, has_gauss, float(state["rng.numpy_cached"])))
    random.setstate((3, tuple(state["rng.python"].tolist()), None))
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
