"""Resuming: finding the unfinished run of the same settings, and the lock that keeps a second run out of its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout

from nanochat.checkpoint.format import DAMAGED, read_meta, saved_steps, step_folder, weights_hash
from nanochat.checkpoint.saver import pending_folder, take_over
from nanochat.checkpoint.writer import clean_leftovers
from nanochat.checkpoint_manager import Checkpoint, load_checkpoint
from nanochat.env import get_dist_info, is_system_error, print0

# Settings that change how a run is watched and saved, but not what it computes: a resumed run may have others.
MAY_CHANGE = {
    *("run", "tracker", "resume", "force", "dry_run", "eval_every", "sample_every"),
    *("save_every", "save_every_minutes", "keep_last", "keep_every"),
    *("device_type", "compile", "deterministic", "activation_checkpointing", "skip_bad_shards", "token_cache"),
    "device_batch_size",  # the total batch is another setting, and sequences come in the same order
}
LOCK_SECONDS = 5.0  # a process that was killed a moment ago may hold the lock a little longer


@contextlib.contextmanager
def run_lock(folder: Path, needed: bool = True) -> Iterator[None]:
    """Hold the lock of a tag's folder, on rank 0; the system drops it when the process dies in whatever way.

    Raises:
        RuntimeError: another process trains in that folder.
    """
    if not needed or get_dist_info()[1] != 0:
        if needed:
            _barrier()
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Beside the folder, not in it: a fresh start moves the folder away.
        lock = FileLock(str(folder.with_name(f".{folder.name}.lock")), timeout=LOCK_SECONDS)
        lock.acquire()
    except Timeout:
        raise RuntimeError(
            f"another run is training in {folder}: wait for it, or choose another --model_tag or NANOCHAT_BASE_DIR"
        ) from None
    try:
        _settle(folder)
        clean_leftovers(folder)
        _barrier()
        yield
    finally:
        _settle(folder)
        lock.release()


def _settle(folder: Path) -> None:
    """Finish what a fresh start has left beside the tag's folder: its checkpoint takes the tag, or nothing is left."""
    pending = pending_folder(folder)
    with contextlib.suppress(OSError):
        if saved_steps(pending):  # killed between its first checkpoint and the next step
            clean_leftovers(pending)
            take_over(pending, folder)
        elif pending.exists():
            shutil.rmtree(pending)


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those of nested groups (`runtime`) among them, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value) if isinstance(value, Mapping) else {name: value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any], ignore: set[str] = MAY_CHANGE) -> list[str]:
    """The settings that differ, one line each."""
    before, now = flatten(before), flatten(now)
    names = sorted((set(before) | set(now)) - ignore)
    return [f"{n}: {before.get(n)} -> {now.get(n)}" for n in names if before.get(n) != now.get(n)]


def model_hash(checkpoint: Checkpoint) -> str:
    """Names a checkpoint's weights: step and SHA-256."""
    return f"step {checkpoint.meta['step']}, {weights_hash(checkpoint.folder)[:16]}"


def saved_dtype(folder: Path, resume: str) -> str | None:
    """The dtype of the unfinished run in `folder`, so that a resume can't flip it; None if there is none."""
    meta = saved_meta(folder, resume)
    return None if meta is None or meta.get("complete") else meta.get("dtype")


def saved_meta(folder: Path, resume: str) -> dict[str, Any] | None:
    """The record of the run in `folder` that `resume` would continue, finished or not; None if there is none."""
    if effective_resume(resume) == "auto":
        for step in reversed(saved_steps(folder)):
            try:
                return read_meta(step_folder(folder, step))
            except DAMAGED as error:
                if is_system_error(error):
                    raise
    return None


def effective_resume(resume: str) -> str:
    """`resume`, but when torchrun has restarted the ranks of this very run: then it always resumes."""
    return "auto" if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 else resume


def find_resume(
    folder: Path,
    config: dict[str, Any],
    resume: str,
    ignore: set[str] = MAY_CHANGE,
    *,
    inputs: dict[str, Any] | None = None,
    force: bool = False,
) -> Checkpoint | None:
    """The checkpoint to continue in `folder`, or None for a fresh start.

    A finished run of the same settings and inputs is given back too: there is nothing left to train. Any other stays
    where it is: the new one takes its place with its first checkpoint (see `Saver`), when all that can refuse has.

    Args:
        folder: the tag's checkpoint folder.
        config: this run's settings, JSON-ready.
        resume: "auto" or "never".
        ignore: settings that may differ.
        inputs: what the run was made from: hashes by name. "tokenizer" among them can't be forced.
        force: resume with other settings.

    Raises:
        ValueError: an unfinished run with other settings or inputs is there; names each difference and the remedy.
    """
    if not saved_steps(folder):
        return None
    if effective_resume(resume) == "auto":
        checkpoint = load_checkpoint(folder, with_optimizer=True)
        if resume == "never" and checkpoint.meta.get("launch", launch_id()) != launch_id():
            return None  # torchrun has restarted the ranks before the first checkpoint: this one is of an older run
        changed = differences(checkpoint.meta["config"], config, ignore)
        changed += differences(checkpoint.meta.get("inputs", {}), inputs or {}, set())
        if not changed:
            return checkpoint
        if not checkpoint.meta["complete"]:
            lines = "".join(f"\n  {line}" for line in changed)
            other_tokenizer = any(line.startswith("tokenizer:") for line in changed)
            if force and not other_tokenizer:
                print0(f"warning: resuming with other settings, as --force asks:{lines}")
                return checkpoint
            remedy = "" if other_tokenizer else ", --force to resume with the new ones"
            raise ValueError(
                f"an unfinished run with other settings is in {folder}:{lines}\n"
                f"use its settings, another --model_tag{remedy}, or --resume=never to start over"
            )
    return None


def launch_id() -> str | None:
    """The name of the torchrun command that has started this process, the same when it restarts it; None without."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
