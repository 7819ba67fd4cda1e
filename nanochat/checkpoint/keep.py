"""The rule of which checkpoints of a run stay, and the removal of the others."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint.format import DAMAGED, read_meta, saved_steps, step_folder


@dataclass(frozen=True)
class Keep:
    """The checkpoints to keep: the `last` so many, the one of the lowest validation loss, and every `every` steps.

    None as `last` keeps all. The validation loss of an unfinished checkpoint is the last one measured before it.
    """

    last: int | None = 2
    every: int | None = None
    best: bool = True


def dropped_steps(folder: Path, keep: Keep) -> list[int]:
    """Return the saved steps that `keep` does not keep, ascending. Of its last ones a finished run keeps one."""
    steps = saved_steps(folder)
    if keep.last is None or not steps:
        return []
    losses, complete = {}, False
    for step in steps:
        try:
            meta = read_meta(step_folder(folder, step))
        except DAMAGED:
            continue
        complete = bool(meta.get("complete"))
        loss = (meta.get("state") or {}).get("val")
        if loss is not None:
            losses[step] = loss
    kept = set(steps[-1:] if complete else steps[-keep.last :])
    if keep.best and losses:
        kept.add(min(losses, key=lambda step: (losses[step], -step)))
    return [step for step in steps if step not in kept and not (keep.every and step % keep.every == 0)]


def prune(folder: Path, keep: Keep) -> None:
    """Remove the checkpoints that are not kept. Never raises: too many is better than none."""
    with contextlib.suppress(OSError):
        for step in dropped_steps(folder, keep):
            _remove(folder, step)


def _remove(folder: Path, step: int) -> None:
    # Renamed first: a kill half-way leaves nothing that looks like a checkpoint.
    path = step_folder(folder, step)
    hidden = folder / f".{path.name}.dropped"
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
