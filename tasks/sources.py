"""Load the rows of public data sets, from files on this machine or from the Hugging Face hub.

If NANOCHAT_TASK_DIR is set, rows are read from files in that folder, with one JSON object per line and the columns of
the hub's data set. Otherwise the `datasets` library gets them from its cache or from the hub. Either way `load_rows`
shuffles with the same seed, so the same rows come in one fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nanochat.files import read_jsonl
from tasks.common import shuffled_indices

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows in a fixed order: `rows[i]` is the `order[i]`-th of the source."""

    source: Sequence[Row]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Row:
        return self.source[self.order[index]]


def task_dir() -> Path | None:
    """The folder with local task files (NANOCHAT_TASK_DIR), or None to use the hub."""
    folder = os.environ.get("NANOCHAT_TASK_DIR")
    return Path(folder).expanduser() if folder else None


def load_rows(repo: str, subset: str | None, split: str, local_file: str, columns: Sequence[str]) -> Rows:
    """All rows of one split of data set `repo` on the hub, or of `local_file` under NANOCHAT_TASK_DIR.

    Raises:
        FileNotFoundError: neither is available; says which data set and what to do.
        ValueError: a row lacks one of `columns`.
    """
    folder = task_dir()
    rows = _load_hub(repo, subset, split, local_file) if folder is None else _load_local(folder, local_file, repo)
    if len(rows) == 0:
        raise ValueError(f"data set {repo} ({split}) has no rows")
    missing = [column for column in columns if column not in rows[0]]
    if missing:
        raise ValueError(f"data set {repo} ({split}) lacks the columns {missing}; it has {sorted(rows[0])}")
    return Rows(rows, shuffled_indices(len(rows)))


def _load_local(folder: Path, local_file: str, repo: str) -> Sequence[Row]:
    for path in (folder / local_file, folder / (local_file + ".gz")):
        if path.is_file():
            return read_jsonl(path)
    raise FileNotFoundError(
        f"data set {repo}: no file {folder / local_file}. Put it there (one JSON object per line, with the hub's "
        f"columns), or unset NANOCHAT_TASK_DIR to load it from the Hugging Face hub."
    )


@cache
def _work_offline_if_unreachable() -> None:
    """Contact the hub once. If it is unreachable, tell its client, which would retry for half a minute per data set."""
    import httpx  # lazy: not needed with local files

    try:
        httpx.head(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=10)
    except httpx.HTTPError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported, which only happens here


def _load_hub(repo: str, subset: str | None, split: str, local_file: str) -> Sequence[Row]:
    _work_offline_if_unreachable()
    try:
        import datasets  # lazy: slow to import, and not needed with local files
    except ImportError as error:
        raise FileNotFoundError(
            f"data set {repo} comes from the Hugging Face hub through the `datasets` package, which is not installed: "
            f"run `pip install datasets`, or set NANOCHAT_TASK_DIR to a folder that holds {local_file}."
        ) from error
    try:
        return datasets.load_dataset(repo, subset, split=split)
    except Exception as error:  # the hub client raises many kinds: no network, no such split, gated, broken cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"data set {repo} ({split}) can't be loaded from the Hugging Face hub: {reason}. Check the network, or set "
            f"NANOCHAT_TASK_DIR to a folder that holds {local_file}."
        ) from error
