"""Checkpoints: load, save and choose them. One folder per step that becomes visible whole and is verified when loaded.

A kill at any moment leaves the checkpoints that were there: a new one is written under a hidden name, synced to the
disk, and renamed. The files: nanochat/checkpoint/format.py; writing in the background and what is kept: writer.py.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nanochat.checkpoint.format import (
    DAMAGED,
    META_FILE,
    MODEL_FILE,
    check_saved,
    checkpoint_folder,
    choose_tag,
    find_tag,  # noqa: F401 - a part of it for programs outside
    optimizer_file,
    read_meta,
    read_sums,
    saved_steps,
    step_folder,
)
from nanochat.checkpoint.keep import Keep
from nanochat.checkpoint.writer import Snapshot, host_copy, write_snapshot
from nanochat.env import get_base_dir, get_dist_info, is_system_error, print0
from nanochat.files import sha256_file, write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.stages import TRAINED
from nanochat.tokenizer import TOKENIZER_FOLDER, RustBPETokenizer, get_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; `optimizer` (with the generators, "rng.…") is empty unless it was asked for."""

    folder: Path
    meta: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @property
    def unfinished(self) -> str:
        """Behind the checkpoint's name: that its run has not come to its end, if so."""
        return "" if self.meta.get("complete", True) else ", of an unfinished run"

    def release(self) -> None:
        """Drop the tensors once they are copied: a merged optimizer alone is twice the model, for the whole run."""
        self.model.clear()
        self.optimizer.clear()


# --- loading ---------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path, step: int | None = None, with_optimizer: bool = False) -> Checkpoint:
    """Load `step`, or the newest that is undamaged, to the CPU.

    Raises:
        FileNotFoundError: there is no checkpoint.
        RuntimeError: the asked step is damaged, or all are; names the file.
    """
    steps = saved_steps(folder)
    check_saved(folder, step)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    problems = []
    for candidate in [step] if step is not None else reversed(steps):
        path = step_folder(folder, candidate)
        # A damaged one costs the steps since the one before it, not the run.
        try:
            return _read(path, with_optimizer)
        except DAMAGED as error:
            if is_system_error(error):  # it may be whole: an older one in its place would lose steps without need
                raise
            problems.append(f"{path}: {error}")
            print0(f"warning: damaged checkpoint skipped: {problems[-1]}")
    raise RuntimeError(
        f"damaged checkpoint: {'; '.join(problems)}: put it back from a copy, or delete {folder} and train it again"
    )


def _read(path: Path, with_optimizer: bool) -> Checkpoint:
    meta = read_meta(path)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, expected in read_sums(path).items():
        if name == META_FILE or (name.startswith("optim") and not with_optimizer):
            continue
        # Checked at every load: a flipped bit in a weight raises no error, it only makes the model worse.
        if sha256_file(path / name) != expected:
            raise ValueError(f"{name} does not match its SHA-256")
        parts[name] = load_file(path / name)
    ranks = sum(name.startswith("optim") for name in parts)
    shards = [parts[optimizer_file(rank)] for rank in range(ranks)]
    return Checkpoint(path, meta, parts[MODEL_FILE], merge_shards(shards, get_dist_info()[1]))


def merge_shards(shards: list[dict[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """The whole optimizer state from every rank's part, with the random generators of `rank` (if it was there).

    So a run resumes with any number of ranks: the optimizer divides the whole again.
    """
    merged: dict[str, list[Tensor]] = {}
    for number, shard in enumerate(shards):
        for name, value in shard.items():
            if not name.startswith("rng.") or number == rank:
                merged.setdefault(name, []).append(value)
    # In rank order, because each part is a run of one flat tensor; MuonAdamW.load_flat_state gives it its shape.
    return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in merged.items()}


def save_checkpoint(
    folder: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor] | None,
    meta: dict[str, Any],
    keep: int | None = 2,
) -> Path:
    """Write one checkpoint here and now, by one process, and drop all but the newest `keep`; returns its folder.

    Args:
        folder: the tag's folder.
        step: optimizer steps done.
        model: weights by name.
        optimizer: everything a resume needs besides `meta`, as tensors by name; None for a finished model.
        meta: JSON-ready record.
        keep: how many checkpoints stay; None keeps all.
    """
    snapshot = Snapshot(step, host_copy(model), None if optimizer is None else host_copy(optimizer), meta)
    write_snapshot(folder, snapshot, Keep(keep))
    return step_folder(folder, step)


# --- choosing a model ------------------------------------------------------------------------------------------------


def tokenizer_of(checkpoint: Checkpoint, folder: Path | None = None) -> RustBPETokenizer:
    """The tokenizer that a checkpoint was trained with: that of `folder` (the base folder's), else one kept there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a tokenizer file is damaged.
        RuntimeError: another is there, with which the checkpoint's token ids would mean other text.
    """
    folder = folder or get_base_dir() / TOKENIZER_FOLDER
    wanted, tokenizer = checkpoint.meta.get("tokenizer_hash"), RustBPETokenizer.from_directory(folder)
    if wanted is None or wanted == tokenizer.hash:
        return tokenizer
    file = _kept_tokenizer(folder, wanted)
    if file.is_file():
        kept = RustBPETokenizer.from_directory(folder, file.name)
        if kept.hash == wanted:
            print0(f"{checkpoint.folder} takes the tokenizer that it was trained with, {file}: tokenizer.json is newer")
            return kept
    raise RuntimeError(
        f"{checkpoint.folder} was trained with another tokenizer ({wanted[:8]}…) than the one in {folder} "
        f"({tokenizer.hash[:8]}…): put that tokenizer back or train again"
    )


def keep_replaced_tokenizer(tokenizer: RustBPETokenizer) -> None:
    """Keep the base folder's tokenizer beside `tokenizer`, which is to replace it, if models need it; says so."""
    try:
        before = get_tokenizer()
    except (FileNotFoundError, ValueError):  # none, or one that no model can be used with any more
        return
    needed_by = [] if before.hash == tokenizer.hash else _models_of(before.hash)
    if needed_by:
        kept = _kept_tokenizer(get_base_dir() / TOKENIZER_FOLDER, before.hash)
        write_json(kept, before.to_dict())
        print0(
            f"warning: {', '.join(needed_by)} need the tokenizer that was there, of {before.get_vocab_size():,} "
            f"tokens. It is kept as {kept}, where they find it; a new base model takes the new one"
        )


def _kept_tokenizer(folder: Path, tokenizer_hash: str) -> Path:
    return folder / f"{tokenizer_hash[:8]}.json"


def _models_of(tokenizer_hash: str) -> list[str]:
    """The models that were trained with a tokenizer, as "stage tag"."""
    found = []
    for source in TRAINED:
        root = checkpoint_folder(source, "x").parent
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            with contextlib.suppress(*DAMAGED, IndexError):
                if read_meta(step_folder(folder, saved_steps(folder)[-1])).get("tokenizer_hash") == tokenizer_hash:
                    found.append(f"{source} {folder.name}")
    return found


def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into `model`.

    Raises:
        ValueError: it is a model of another shape; names the settings that differ.
    """
    before, now = GPTConfig.from_dict(checkpoint.meta["model_config"]).to_dict(), model.config.to_dict()
    if before != now:
        names = sorted(n for n in {*before, *now} if before.get(n) != now.get(n))
        changed = [f"{n} {before.get(n)} -> {now.get(n)}" for n in names]
        raise ValueError(
            f"{checkpoint.folder} holds a model of another shape ({', '.join(changed)}): choose another --model_tag, "
            "or --resume=never to start over"
        )
    model.load_state_dict(checkpoint.model)


def build_model(checkpoint: Checkpoint, device: torch.device, phase: str) -> GPT:
    """Build the model of a checkpoint on `device`, in "train" or "eval" mode."""
    model = GPT(GPTConfig.from_dict(checkpoint.meta["model_config"]))
    model.load_state_dict(checkpoint.model)
    model.to(device)
    return model.train(phase == "train")


def load_model(
    source: str, device: torch.device, phase: str = "eval", model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """Return (model, tokenizer, meta) of a stage: base, mid, sft or rl; prints which checkpoint it took and why.

    Raises:
        FileNotFoundError: no such checkpoint; the message names the command that makes it.
        RuntimeError: the checkpoint is damaged, or belongs to another tokenizer.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase must be train or eval, got {phase!r}")
    folder, why = choose_tag(source, model_tag)
    checkpoint = load_checkpoint(folder, step)
    newest = saved_steps(folder)[-1]
    taken = checkpoint.meta["step"]
    which = "asked for" if step is not None else "the newest" if taken == newest else "the newest that is undamaged"
    print0(f"checkpoint {checkpoint.folder}: tag {folder.name} ({why}), step {taken} ({which}{checkpoint.unfinished})")
    return build_model(checkpoint, device, phase), tokenizer_of(checkpoint), checkpoint.meta


# --- random generators -----------------------------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of every random number generator, as tensors for a checkpoint."""
    _, keys, pos, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "rng.numpy_position": torch.tensor([pos, has_gauss], dtype=torch.int64),
        "rng.numpy_cached": torch.tensor([cached], dtype=torch.float64),
        "rng.python": torch.tensor([version, *internal], dtype=torch.int64),
        "rng.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["rng.mps"] = torch.mps.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what `rng_state` returned; a rank without one (there were fewer ranks before) keeps its seed."""
    if "rng.torch" not in state:
        return
    torch.set_rng_state(state["rng.torch"])
    pos, has_gauss = state["rng.numpy_position"].tolist()
    keys = state["rng.numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, pos, has_gauss, float(state["rng.numpy_cached"])))
    version, *internal = state["rng.python"].tolist()
    gauss = state["rng.python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
    if device.type == "mps" and "rng.mps" in state:
        torch.mps.set_rng_state(state["rng.mps"])
