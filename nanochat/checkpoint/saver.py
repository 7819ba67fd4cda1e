"""Decides when a run saves, and what happens when the disk can't take it: the policy above checkpoint/writer.py.

A fresh start over an older run trains beside it, in the folder `.<tag>.new`. With its first checkpoint it takes the
tag's folder, and the older run moves to `<tag>.old`: until then the tag is the older model's, whatever happens.

All ranks decide the same, by `Compute.any_rank`. A checkpoint that can't be written does not stop the training: it is
tried again later, and a finished model waits for room.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint.format import saved_steps
from nanochat.checkpoint.keep import Keep
from nanochat.checkpoint.writer import CheckpointWriter, Snapshot, clean_leftovers
from nanochat.common import Compute
from nanochat.env import error_text, print0
from nanochat.files import fsync_folder
from nanochat.signals import Stopped
from nanochat.stages import pending_name

RETRY_SECONDS = 30.0  # after a checkpoint that could not be written
WORTH_SAVING = 60.0  # seconds of training that a checkpoint before the last evaluation is worth
SAVES_PER_RUN = 20  # a short run is saved at least this often: a kill must not cost much of it


@dataclass(frozen=True, kw_only=True)
class SaveSettings:
    """How often a run is saved, and which checkpoints are kept."""

    save_every: int | None = None
    """Steps."""
    save_every_minutes: float = 10.0
    keep_last: int = 2
    keep_every: int | None = None
    final_retry_minutes: float = 30.0
    """Time for which the finished model waits for room on the disk."""


def pending_folder(folder: Path) -> Path:
    """Where a fresh start trains while an older run has the tag's `folder`."""
    return folder.with_name(pending_name(folder.name))


def take_over(pending: Path, folder: Path) -> None:
    """Make `pending` the tag's `folder`; the run that was there moves to `<tag>.old`, and what was there is removed."""
    old = folder.with_name(f"{folder.name}.old")
    if folder.exists():  # not after a kill between the last two renames
        trash = folder.with_name(f".{folder.name}.trash")
        shutil.rmtree(trash, ignore_errors=True)
        if old.exists():
            os.replace(old, trash)
        os.replace(folder, old)
        shutil.rmtree(trash, ignore_errors=True)
    os.replace(pending, folder)
    fsync_folder(folder.parent)
    print0(f"{folder.name}: this run has the tag now, the one before is {old.name}")


class Saver:
    """Keeps the checkpoints of one run in `folder`."""

    def __init__(
        self,
        label: str,
        folder: Path,
        compute: Compute,
        settings: SaveSettings,
        snapshot: Callable[[bool, int], Snapshot],
        run_seconds: float | None,
        moved: Callable[[Path], None],
        replaces: Path | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            label: the run's name in messages.
            folder: of the checkpoints.
            compute: the ranks that decide together.
            settings: how often, and what stays.
            snapshot: a copy of the run's state, given whether the run is complete and the number of the attempt.
            run_seconds: how long the run is to be, where that is known.
            moved: called on every rank with the folder's new place.
            replaces: the folder of an older run, whose place `folder` takes with the first checkpoint.
        """
        self.replaces, self._moved = replaces, moved
        self.label, self.folder, self.compute, self.settings = label, folder, compute, settings
        self._snapshot = snapshot
        self.writer = CheckpointWriter(folder, Keep(settings.keep_last, settings.keep_every))
        self._between = min(60 * settings.save_every_minutes, (run_seconds or math.inf) / SAVES_PER_RUN)
        self._last_save = time.monotonic()
        self._retry_at: float | None = None
        self._owed = False  # a checkpoint was due while the one before was still being written
        self._saves = 0

    def after_step(self, step: int, stop_requested: bool) -> None:
        """Save if it is time, stop if that was asked for, retry a save that has failed.

        Raises:
            Stopped: it was asked for, and the run is saved (or the message says that it could not be).
        """
        now = time.monotonic()
        # Clocks and disks differ between ranks; all must take the same branch, or one waits in a collective for ever.
        due = now - self._last_save >= self._between or (self._retry_at is not None and now >= self._retry_at)
        first = self.compute.rank == 0
        written = first and self.replaces is not None and self._saves > 0 and bool(saved_steps(self.folder))
        stopping, due, busy, failed, written = self.compute.any_rank(
            stop_requested, due and first, self.writer.busy, self.writer.error is not None, written
        )
        due = due or self._owed or bool(self.settings.save_every and step % self.settings.save_every == 0)
        if failed:
            self._has_failed()
        if written and not busy:
            self._take_over()
        if stopping:
            saved = self.save(complete=False)
            print0(f"{self.label}: stopped at step {step}" + (", saved" if saved else ", NOT saved"))
            print0("the same command resumes from here")
            raise Stopped
        if due:
            self._owed = busy and not failed
            if not self._owed:
                self.save(complete=False, wait=False)

    def save(self, complete: bool, wait: bool = True) -> bool:
        """Write a checkpoint; all ranks take part. A complete one carries no optimizer state.

        Args:
            complete: the run is over.
            wait: until it is on the disk; else training continues while it is written.

        Returns:
            Whether it is there (with `wait`; else True).
        """
        self.writer.wait()
        self.writer.error = None
        self._last_save, self._retry_at = time.monotonic(), None
        self._saves += 1
        if not complete or self.compute.rank == 0:
            self.writer.start(self._snapshot(complete, self._saves))
        if not wait:
            return True
        self.writer.wait()
        (failed,) = self.compute.any_rank(self.writer.error is not None)
        if failed:
            self._has_failed()
        elif self.replaces is not None:
            self._take_over()
        return not failed

    def _take_over(self) -> None:
        """Take the older run's place; no rank is writing."""
        assert self.replaces is not None
        if self.compute.rank == 0:
            take_over(self.folder, self.replaces)
        self.folder, self.replaces = self.replaces, None
        self.writer.folder = self.folder
        self._moved(self.folder)
        self.compute.any_rank(False)  # a barrier: no rank writes before the folder is there

    def before_the_end(self) -> None:
        """Begin to save before the last evaluation, so that its failure costs no training."""
        (due,) = self.compute.any_rank(time.monotonic() - self._last_save > WORTH_SAVING)
        if due:
            self.save(complete=False, wait=False)

    def save_finished(self) -> None:
        """Save the last checkpoint, and wait for room on the disk if there is none.

        Raises:
            RuntimeError: it could not be written within `final_retry_minutes`.
        """
        minutes = self.settings.final_retry_minutes
        give_up = time.monotonic() + 60 * minutes
        while not self.save(complete=True):
            (over,) = self.compute.any_rank(time.monotonic() > give_up)
            if over:
                raise RuntimeError(
                    f"the finished model could not be written to {self.folder}: make room there and start the same "
                    "command again, it resumes from the newest checkpoint"
                )
            time.sleep(min(RETRY_SECONDS, 6 * minutes))

    def close(self) -> None:
        """Wait for the checkpoint that is being written."""
        # With several ranks not for ever: it may be waiting for the part of a rank that is gone.
        self.writer.wait(5.0 if self.compute.ddp else None)

    def _has_failed(self) -> None:
        """Print what is wrong, and plan another try."""
        if self.writer.error is None:
            self.writer.abandon()  # another rank has failed
        error, self.writer.error = self.writer.error, None
        self._retry_at = time.monotonic() + min(RETRY_SECONDS, 60 * self.settings.save_every_minutes)
        if error is not None:
            steps = saved_steps(self.folder)
            newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            print(
                f"\nWARNING: {self.label}: no checkpoint could be written to {self.folder} ({error_text(error)}). "
                f"Training continues and will try again; until then {newest}",
                file=sys.stderr,
                flush=True,
            )
        self.compute.any_rank(False)  # a barrier: after it no rank writes any more, and the leftovers can be removed
        if self.compute.rank == 0:
            clean_leftovers(self.folder)
