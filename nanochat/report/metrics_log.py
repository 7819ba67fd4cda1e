"""The loss log of a run: JSON lines that survive a full disk, and that a resume cuts back to its checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat.env import error_text
from nanochat.files import write_bytes


class MetricsLog:
    """Appends records to a file. What can't be written is kept in memory and tried again with the next record.

    Attributes:
        position: bytes of all records so far; put into a checkpoint, given to `cut` by a resume.
        crc: the CRC-32 of these bytes; put into a checkpoint, by which `is_as_saved` finds a later change.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = self.crc = 0
        self._pending = b""
        self._failing = False

    def append(self, record: dict[str, Any]) -> None:
        """Write one record."""
        line = (json.dumps(record) + "\n").encode()
        self.position += len(line)
        self.crc = zlib.crc32(line, self.crc)
        self._pending += line
        size = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as f:
                size = f.seek(0, os.SEEK_END)
                written = f.write(self._pending)
                if written != len(self._pending):
                    raise OSError("the disk took only a part of the record")
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)
            if not self._failing:
                print(
                    f"WARNING: {self.path} can't be written ({error_text(error)}); training goes on, it is "
                    "tried again every step",
                    file=sys.stderr,
                    flush=True,
                )
            self._failing = True
            return
        self._pending, self._failing = b"", False

    def state(self) -> dict[str, int]:
        """What a checkpoint has to know of it."""
        return {"metrics_bytes": self.position, "metrics_crc": self.crc}

    def cut(self, position: int, step: int) -> None:
        """Forget all that came after `position`, where `step` steps were done: they will be made again."""
        self._pending = b""
        if self.path.is_file():
            if self.path.stat().st_size >= position:
                os.truncate(self.path, position)
            else:  # it lost something: the folder had vanished, or a power cut took the end
                lines = self.path.read_bytes().splitlines(keepends=True)
                write_bytes(self.path, b"".join(line for line in lines if _step_of(line) <= step))
        data = self.path.read_bytes() if self.path.is_file() else b""
        self.position, self.crc = len(data), zlib.crc32(data)


def is_as_saved(data: bytes, state: Mapping[str, Any] | None) -> bool:
    """False if the bytes of a loss log don't begin with those that a checkpoint's state knows of."""
    if not isinstance(state, Mapping) or "metrics_crc" not in state:  # none yet, or an older one
        return True
    return zlib.crc32(data[: state["metrics_bytes"]]) == state["metrics_crc"]


def read_metrics(data: bytes) -> list[dict[str, Any]]:
    """The records in the bytes of a loss log; lines that a kill or a full disk has torn are left out."""
    records = []
    for line in data.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def last_value(path: Path, name: str) -> float:
    """The value of `name` in the last record that has one; 0 without such a record."""
    if path.is_file():
        for line in reversed(path.read_bytes().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a kill, or of an evaluation
                return float(json.loads(line)[name])
    return 0.0


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # torn by a kill
        return float("inf")
