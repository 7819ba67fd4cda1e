"""The rule of which checkpoints of a run stay, and the removal of the others."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat.checkpoint.format import DAMAGED, read_meta, saved_steps, step_folder
from nanochat.env import is_system_error

Goal = Literal["lowest", "highest"]
"""The better of two validation values: of a loss the lower one, of a share of problems solved the higher one."""


@dataclass(frozen=True)
class Keep:
    """The checkpoints to keep: the `last` so many, the one with the best validation value, and every `every` steps.

    None as `last` keeps all. The value of an unfinished checkpoint is the last one measured before it; its record says
    which values are better (`goal_of`).
    """

    last: int | None = 2
    every: int | None = None
    best: bool = True


def goal_of(meta: Mapping[str, Any]) -> Goal:
    """Whether the lowest or the highest validation value is the best, by a checkpoint's record."""
    # Checkpoints of reinforcement learning had no such entry at first; what they were measured by is there.
    goal: Goal = meta.get("val_goal") or ("highest" if "pass@1" in meta else "lowest")
    return goal


def dropped_steps(folder: Path, keep: Keep) -> list[int]:
    """Return the saved steps that `keep` does not keep, ascending. Of its last ones a finished run keeps one."""
    steps = saved_steps(folder)
    if keep.last is None or not steps:
        return []
    badness, complete = {}, False
    for step in steps:
        try:
            meta = read_meta(step_folder(folder, step))
        except DAMAGED as error:
            if is_system_error(error):  # nothing is known of its value: it may be the best
                return []
            continue
        complete = bool(meta.get("complete"))
        value = (meta.get("state") or {}).get("val")
        if value is not None and math.isfinite(value):
            badness[step] = -value if goal_of(meta) == "highest" else value
    kept = set(steps[-1:] if complete else steps[-keep.last :])
    if keep.best and badness:
        kept.add(min(badness, key=lambda step: (badness[step], -step)))  # of equals the newest
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
