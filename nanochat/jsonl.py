"""JSON lines: one object a line, plain or gzipped; and a log of results that survives a kill."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanochat.env import get_dist_info
from nanochat.files import write_text


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file; blank lines are skipped. Raises ValueError naming file and line."""
    path = Path(path)
    rows: list[dict[str, Any]] = []
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
            rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line; the file appears whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ResumeLog:
    """What an interrupted run has already worked out, in a folder.

    Every rank appends to a file of its own and reads those of all, so the number of ranks may change in between.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` must belong to one set of settings: its records are taken for this run's."""
        folder.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        """Of earlier runs."""
        for path in sorted(folder.glob("rank*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a line may be torn
                    self.records.append(json.loads(line))
        self.path = folder / f"rank{get_dist_info()[1]}.jsonl"

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep more records."""
        with open(self.path, "a", encoding="utf-8") as f:
            # The newline comes first: it ends a line that a kill has torn. ASCII, so that no letter can be torn.
            f.write("".join("\n" + json.dumps(record) for record in records))
