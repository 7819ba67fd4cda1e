"""Write documents in the standard form of a corpus, and give the finished files their names and manifest.

A shard is a parquet file of about 250 million characters with one column of strings, `text`, in row groups of 1024
documents (less if they are long), packed with zstd. The files are numbered; the last one is validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.shards import Entry, Manifest
from nanochat.files import sha256_file

ROW_GROUP_DOCUMENTS = 1024
ROW_GROUP_CHARS = 16_000_000
SHARD_CHARS = 250_000_000
SCHEMA = pa.schema([("text", pa.string())])


class ShardWriter:
    """Writes documents into parquet files of about SHARD_CHARS characters, or all into one.

    Args:
        folder: where the files go, `<name>-0.tmp`, `<name>-1.tmp`, ...
        name: the beginning of their names.
        one: never begin a second file.
    """

    def __init__(self, folder: Path, name: str, one: bool = False) -> None:
        self.folder, self.name, self.one = folder, name, one
        self.entries: list[Entry] = []
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[str] = []
        self._pending_chars = self._rows = self._chars = 0

    def add(self, document: str) -> None:
        """Add one document."""
        self._pending.append(document)
        self._pending_chars += len(document)
        if len(self._pending) == ROW_GROUP_DOCUMENTS or self._pending_chars >= ROW_GROUP_CHARS:
            self._flush()
        if not self.one and self._chars + self._pending_chars >= SHARD_CHARS:
            self._finish()

    def _flush(self) -> None:
        if not self._pending:
            return
        if self._writer is None:
            path = self.folder / f"{self.name}-{len(self.entries)}.tmp"
            self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=3)
        self._writer.write_table(pa.table([self._pending], schema=SCHEMA))
        self._rows += len(self._pending)
        self._chars += self._pending_chars
        self._pending, self._pending_chars = [], 0

    def _finish(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self.entries.append(Entry(f"{self.name}-{len(self.entries)}.tmp", rows=self._rows))
        self._writer, self._rows, self._chars = None, 0, 0

    def close(self) -> list[Entry]:
        """Finish; what was written."""
        self._finish()
        return self.entries


def name_shards(folder: Path, source: str, train: list[Entry], validation: list[Entry], facts: dict[str, Any]) -> None:
    """Number the finished files, validation last, and write the manifest with their sizes and hashes."""
    entries = []
    for number, entry in enumerate([*train, *validation]):
        path = folder / f"shard_{number:05d}.parquet"
        (folder / entry.name).rename(path)
        entries.append(Entry(path.name, path.stat().st_size, f"sha256:{sha256_file(path)}", rows=entry.rows))
    Manifest(source, entries[: len(train)], entries[len(train) :], facts=facts).save(folder)
