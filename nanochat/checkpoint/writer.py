"""Write checkpoints in a background thread, each rank its own part, and remove those that are not kept.

Training stands still only while the state is copied to host memory (`Snapshot`). Every rank then writes its part into
one hidden folder; rank 0 waits for the others' parts, adds meta.json and SHA256SUMS, syncs and renames the folder. The
ranks meet in the file system, not by collectives: those belong to the training thread. So the ranks need a common file
system; several machines without one are not supported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint.format import (
    META_FILE,
    MODEL_FILE,
    SUMS_FILE,
    format_sums,
    optimizer_file,
    step_folder,
)
from nanochat.checkpoint.keep import Keep, prune
from nanochat.env import check_disk_space
from nanochat.files import fsync_folder, sha256_file, write_json, write_text

SLACK_BYTES = 4 << 20  # for meta.json, the loss log and the folder itself
PARTS_TIMEOUT_SECONDS = 600.0
BLOCK_BYTES = 1 << 22
# Of the format: https://huggingface.co/docs/safetensors/index#format
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Snapshot:
    """The state a rank has to write, in host memory that nothing else uses.

    Attributes:
        step: optimizer steps done.
        model: weights by name; on rank 0.
        optimizer: this rank's part of the optimizer state and its generators; None for a finished model.
        meta: JSON-ready record; on rank 0.
        attempt: a number that all ranks share and that no other snapshot of this run has.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] | None
    meta: dict[str, Any]
    rank: int = 0
    world_size: int = 1
    attempt: int = 0


def host_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, where training can't change them while they are written."""
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}


# --- one file --------------------------------------------------------------------------------------------------------


def size_in_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the size of these tensors on the disk, without the header."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def write_safetensors(path: str | Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors (on the CPU) by name, fsync the file; returns its SHA-256 in hex.

    The hash is of what should be on the disk, not of what can be read back, so a torn write is found when the file is
    loaded. Unlike the safetensors package this reads nothing again and reports a full disk as the OSError it is.

    Raises:
        OSError: the disk is full, read-only, or gone.
    """
    # The widest types first: then every tensor begins at a multiple of its element's size.
    items = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, at = {}, 0
    for name, t in items:
        end = at + t.numel() * t.element_size()
        header[name] = {"dtype": SAFETENSORS_DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to begin at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as f:

        def write(data: memoryview) -> None:
            digest.update(data)
            while data:
                data = data[f.write(data) :]

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for _, t in items:
            data = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), BLOCK_BYTES):  # large calls leave Python's lock to the training thread
                write(data[start : start + BLOCK_BYTES])
        os.fsync(f.fileno())  # before the rename that publishes it, or a power cut leaves a name without its bytes
    return digest.hexdigest()


# --- one checkpoint --------------------------------------------------------------------------------------------------


def write_snapshot(folder: Path, snapshot: Snapshot, keep: Keep, abandon: threading.Event | None = None) -> None:
    """Write this rank's part; on rank 0 also put the checkpoint together and drop old ones.

    Raises:
        OSError, RuntimeError: it could not be written; nothing is left of it.
    """
    tmp = folder / f".step_{snapshot.step:06d}.{snapshot.attempt}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if snapshot.rank == 0:
            make_room(folder, snapshot, keep)
        tmp.mkdir(exist_ok=True)
        sums = {}
        if snapshot.optimizer is not None:
            name = optimizer_file(snapshot.rank)
            sums[name] = write_safetensors(tmp / name, snapshot.optimizer)
        if snapshot.rank > 0:
            write_json(tmp / f"rank{snapshot.rank}.json", sums)
            return
        sums[MODEL_FILE] = write_safetensors(tmp / MODEL_FILE, snapshot.model)
        if snapshot.optimizer is not None:
            for rank in range(1, snapshot.world_size):
                sums |= _part_of(tmp / f"rank{rank}.json", abandon or threading.Event())
        write_json(tmp / META_FILE, {"step": snapshot.step, **snapshot.meta})
        sums[META_FILE] = sha256_file(tmp / META_FILE)
        # The rename comes last: until then a hidden name keeps the half-written folder from being read as a checkpoint.
        write_text(tmp / SUMS_FILE, format_sums(sums))
        _publish(tmp, step_folder(folder, snapshot.step))
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    prune(folder, keep)


def _part_of(path: Path, abandon: threading.Event) -> dict[str, str]:
    """Wait for another rank's part; returns its hashes."""
    deadline = time.monotonic() + PARTS_TIMEOUT_SECONDS
    while not path.exists():
        # A rank that fails takes the folder away.
        if abandon.wait(0.02) or time.monotonic() > deadline or not path.parent.exists():
            raise RuntimeError(f"{path.stem} has not written its part")
    sums: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return sums


def _publish(tmp: Path, target: Path) -> None:
    """Give a finished folder its name."""
    # The files are synced already; a folder is a file too: unsynced, a power cut may lose the names in it.
    fsync_folder(tmp)
    old = tmp.with_suffix(".old")
    if target.exists():  # the same step, saved before: a folder can't be replaced in one operation
        os.replace(target, old)
    os.replace(tmp, target)
    fsync_folder(target.parent)  # now the rename itself survives a power cut
    shutil.rmtree(old, ignore_errors=True)


def clean_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written; call it while no rank writes. Never raises."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".step_*.*.old"):  # killed between the two renames of `_publish`
            target = folder / path.name[1:].split(".")[0]
            if not target.exists():
                os.replace(path, target)
        for path in folder.glob(".step_*.*"):
            shutil.rmtree(path, ignore_errors=True)


# --- room on the disk ------------------------------------------------------------------------------------------------


def make_room(folder: Path, snapshot: Snapshot, keep: Keep) -> None:
    """Check that the snapshot fits on the disk; if it does not, remove all but the newest checkpoint first.

    Raises:
        RuntimeError: it does not fit; says how much is missing.
    """
    parts = size_in_bytes(snapshot.optimizer or {}) * snapshot.world_size
    needed = size_in_bytes(snapshot.model) + parts + SLACK_BYTES
    if shutil.disk_usage(folder).free < needed and keep.last is not None:
        prune(folder, Keep(1, keep.every, keep.best))
    check_disk_space(folder, needed, f"the checkpoint of step {snapshot.step}")


# --- in the background -----------------------------------------------------------------------------------------------


@dataclass
class CheckpointWriter:
    """Writes one snapshot at a time in a thread."""

    folder: Path
    keep: Keep = field(default_factory=Keep)
    error: Exception | None = None
    """The reason why the last one could not be written; None if it was, or is being."""

    def __post_init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._abandon = threading.Event()

    @property
    def busy(self) -> bool:
        """True while a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write; not while `busy`."""
        self.error = None
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self, snapshot: Snapshot) -> None:
        try:
            write_snapshot(self.folder, snapshot, self.keep, self._abandon)
        except Exception as error:
            self.error = error

    def wait(self, timeout_seconds: float | None = None) -> None:
        """Wait until it is written (see `error`)."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def abandon(self) -> None:
        """Stop waiting for the other ranks' parts, because one of them has failed."""
        self._abandon.set()
        self.wait()
        self._abandon.clear()
