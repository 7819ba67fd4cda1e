"""Make a public corpus: a data set from the hub, shuffled, as shards that nanochat downloads.

    python dev/repackage_data_reference.py --dataset=HuggingFaceFW/fineweb-edu --subset=sample-100BT --out=shards
    python dev/repackage_data_reference.py --dataset=json --data_files=texts.jsonl --out=shards

This is a reference for data sets that are too large for `python -m nanochat.dataset --import`: the `datasets` library
keeps them on disk as Arrow files, the shuffle is a permutation of row numbers, and little memory is needed. The data
set, its Arrow copy and the shards need disk space. The last shard is the validation text. Then upload the folder:

    hf upload-large-folder OWNER/NAME shards --repo-type=dataset
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanochat.config import run_script
from nanochat.data.shards import ShardWriter, name_shards
from nanochat.files import atomic_folder
from nanochat.progress import progress

ROWS_PER_READ = 1024


@dataclass(frozen=True, kw_only=True)
class Config:
    """Repackage a data set."""

    dataset: str
    """A data set on the hub, or a kind of file (json, csv, parquet, text) with --data_files."""
    out: str
    """Folder for the shards; must not exist."""
    subset: str | None = None
    """Configuration (subset) of the data set."""
    split: str = "train"
    """Its split."""
    data_files: str | None = None
    """Local files (a glob), if --dataset is a kind of file."""
    text_column: str = "text"
    """Column with the text."""
    seed: int = 42
    """Seed of the shuffle."""
    max_documents: int | None = None
    """Take only this many documents, after the shuffle."""


def texts_of(rows: Any, column: str) -> Iterator[str]:
    """The documents of a `datasets.Dataset` in order, without blank ones."""
    with progress(len(rows), "repackaging") as bar:
        for table in rows.with_format("arrow").iter(ROWS_PER_READ):
            for text in table[column].cast(pa.large_string()).to_pylist():
                if text and text.strip():
                    yield text
            bar.advance(len(table))


def main(cfg: Config) -> None:
    """Load, shuffle, write.

    Raises:
        ValueError: the folder exists, there is no such column, or there are not enough texts for two shards.
    """
    import datasets

    out = Path(cfg.out).expanduser()
    if out.exists():
        raise ValueError(f"--out={out} exists: delete it, or give another folder")
    rows = datasets.load_dataset(cfg.dataset, cfg.subset, split=cfg.split, data_files=cfg.data_files)
    if cfg.text_column not in rows.column_names:
        raise ValueError(f"no column {cfg.text_column!r}; there are {', '.join(rows.column_names)}: use --text_column")
    rows = rows.shuffle(seed=cfg.seed)
    if cfg.max_documents is not None:
        rows = rows.select(range(min(cfg.max_documents, len(rows))))
    with atomic_folder(out) as tmp:
        writer = ShardWriter(tmp, "shard")
        for text in texts_of(rows, cfg.text_column):
            writer.add(text)
        shards = writer.close()
        if len(shards) < 2:
            raise ValueError(f"{cfg.dataset} fills only {len(shards)} shard: use `python -m nanochat.dataset --import`")
        facts = {"seed": cfg.seed, "dataset": cfg.dataset, "subset": cfg.subset, "split": cfg.split}
        name_shards(tmp, "repackaged", shards[:-1], shards[-1:], facts)
    print(f"{len(shards)} shards in {out}, the last one for validation")


if __name__ == "__main__":
    run_script(main, Config)
