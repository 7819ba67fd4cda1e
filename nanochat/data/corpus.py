"""A corpus: parquet shards with a column of text in a fixed order, split into training and validation.

If the folder has a manifest, it lists the validation shards and those still to come (a reader waits for them). Without
one the last shard by name is validation; of a single shard it is the last tenth (whole row groups, or rows if there is
only one row group). Validation documents are never trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.shards import (
    DEMO_STAMP,
    Entry,
    Manifest,
    demo_entries,
    find_damage,
    first_entries,
    load_manifest,
    record_first_use,
    remedy,
    wait_for_shard,
)
from nanochat.env import is_system_error, print0

TEXT_COLUMN = "text"
SHARD_NAME = re.compile(r"shard_\d+\.parquet")  # nanochat's layout: shuffled, the last one is validation
BESIDE = re.compile(r"\.|readme|license|manifest|.*\.(log|lock|sha256|crc)$", re.IGNORECASE)
IN_PLACE_BYTES = (
    4_000_000_000  # of parquet: more is not copied to be shuffled by documents, but read shuffled by row groups
)
SPREAD_CHUNKS, SPREAD_SHARE = 40, 100  # from so many row groups on, one in a hundred of them validates
BLOCK_ROWS = 1024  # documents decoded at a time, however large the row group; the order inside a block is reshuffled


class BadShardError(ValueError):
    """A shard that is damaged, cut off, or has vanished."""


@contextlib.contextmanager
def open_parquet(path: Path, part: str = "") -> Iterator[pq.ParquetFile]:
    """A parquet file to read from.

    Raises:
        BadShardError: it is none, or damaged where it is read; names it, with `part` ("row group 0 of ") before it.
    """
    try:
        # Pages that were written with a checksum, as ours are, are compared with it where they are read.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if is_system_error(error):
            raise
        raise BadShardError(
            f"{part}{path} is not a readable parquet file ({error}): replace it, or delete it and fetch it again"
        ) from error


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of one row group of one shard: what epochs shuffle, and what can be read alone."""

    shard: Path
    row_group: int
    start: int
    stop: int
    num_bytes: int
    """About how many bytes of text it holds, by the file's metadata."""
    column: str = TEXT_COLUMN
    first_row: int = 0
    """Rows of the shard before this row group."""

    def read(self, start: int | None = None) -> Iterator[tuple[int, pa.Array]]:
        """Yield (first row, texts) block by block from the block that holds row `start` on.

        Block b is the rows from BLOCK_ROWS · b on, without those that are not the chunk's own.

        Raises:
            BadShardError: the shard is damaged or has vanished; names it.
        """
        start = max(self.start, start or 0)
        # Blocks are counted from the row group's first row, not from `start`: wherever reading begins, the same rows
        # are together in a block, and later epochs shuffle inside blocks.
        row = 0  # first row of the block in hand
        with open_parquet(self.shard, f"row group {self.row_group} of ") as file:
            batches = file.iter_batches(BLOCK_ROWS, row_groups=[self.row_group], columns=[self.column])
            for texts in _blocks(batches):
                first, last = max(row, self.start), min(row + len(texts), self.stop)
                if first < last and start < last:
                    yield first, texts.slice(first - row, last - first)
                row += len(texts)
                if row >= self.stop:
                    return
        raise BadShardError(
            f"can't read row group {self.row_group} of {self.shard}: it has {row} rows, but had {self.stop} before; "
            "the file was replaced by another one"
        )


def _blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Array]:
    """The batches' column in blocks of exactly BLOCK_ROWS but for the last one, however small the batches are."""
    held: list[pa.Array] = []
    num_rows = 0
    for batch in batches:
        texts = batch.column(0)
        held.append(texts if pa.types.is_string(texts.type) else texts.cast(pa.large_string()))
        num_rows += len(texts)
        while num_rows >= BLOCK_ROWS:
            whole = held[0] if len(held) == 1 else pa.concat_arrays(held)
            yield whole.slice(0, BLOCK_ROWS)
            num_rows -= BLOCK_ROWS
            held = [whole.slice(BLOCK_ROWS)] if num_rows else []
    if num_rows:
        yield held[0] if len(held) == 1 else pa.concat_arrays(held)


@dataclass
class Corpus:
    """Shards and their split. `train` and `val` are in reading order and grow while shards arrive."""

    name: str
    train: list[Chunk]
    val: list[Chunk]
    pending: dict[str, deque[Entry]] = field(default_factory=dict)
    """The shards of each split that are listed but were not there yet, in order."""
    folder: Path = Path()
    column: str = TEXT_COLUMN
    identity: str = ""
    skip_bad_shards: bool = False
    """Leave out a shard that can't be read, with a warning, instead of stopping."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def chunks(self, split: str) -> list[Chunk]:
        """The chunks of "train" or "val" that are there; waits for the first shard.

        Raises:
            ValueError: the split is unknown or has no documents.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split is {split!r}, but must be train or val")
        chunks = self.train if split == "train" else self.val
        while not chunks and self.grow(split, len(chunks)):
            pass
        if not chunks:
            raise ValueError(
                f"{self.name} has no documents for {split}: it needs at least two documents, one of them for validation"
            )
        return chunks

    def grow(self, split: str, known: int, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Wait until the split has more than `known` chunks; False if no shard is to come (or `stopped` says so).

        Raises:
            FileNotFoundError: a shard will not come.
            BadShardError: a shard that came is not readable.
        """
        chunks, pending = (self.train if split == "train" else self.val), self.pending.get(split, deque())
        while len(chunks) <= known and pending:
            path = self.folder / pending[0].name
            if not wait_for_shard(path, stopped):
                return False
            with self._lock:
                if pending and self.folder / pending[0].name == path:  # another loader's thread may have taken it
                    chunks += _usable_chunks(path, self.column, pending[0], self.skip_bad_shards, self.folder)
                    pending.popleft()
        return len(chunks) > known

    def wait_for_all(self, split: str) -> None:
        """Wait until every shard of the split is there."""
        while self.grow(split, len(self.chunks(split))):
            pass

    def arrays(self, split: str) -> Iterator[pa.Array]:
        """The documents as Arrow arrays of strings, some at a time."""
        chunks, i = self.chunks(split), 0
        while i < len(chunks) or self.grow(split, i):
            for _, texts in chunks[i].read():
                yield texts
            i += 1

    def documents(self, split: str) -> Iterator[str]:
        """The documents one by one (a null counts as an empty one)."""
        for texts in self.arrays(split):
            for text in texts:
                yield text.as_py() or ""

    def num_bytes(self, split: str) -> int:
        """About how many bytes of text the split has, from metadata alone; shards still to come are like the others."""
        chunks = self.chunks(split)
        known = sum(chunk.num_bytes for chunk in chunks)
        num_shards = len({chunk.shard for chunk in chunks})
        return known + known * len(self.pending.get(split, ())) // num_shards

    def num_documents(self, split: str) -> int:
        """Documents of the split, in the shards that are there."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks(split))

    @property
    def fingerprint(self) -> str:
        """A hash of the list of shards; the same before and after one that the manifest lists has arrived."""
        lines = [f"{c.shard.name}/{c.row_group}/{c.start}/{c.stop}" for c in [*self.train, *self.val]]
        return hashlib.sha256((self.identity or "\n".join(lines)).encode()).hexdigest()[:16]


# --- opening one ------------------------------------------------------------------------------------------------------


def list_shards(folder: str | Path) -> list[Path]:
    """The parquet files of a folder by name (or the one file given). Unfinished downloads have other names."""
    folder = Path(folder)
    if folder.is_file():
        return [folder] if folder.suffix == ".parquet" else []
    return sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))


def is_prepared(path: Path) -> bool:
    """True if `path` holds nothing but shards in this project's layout, or parquet too large to copy: used in place.

    Other parquet files are imported like all texts: that shuffles them, and leaves out duplicates.
    """
    shards = list_shards(path)
    if not shards or load_manifest(path) is not None:
        return bool(shards)
    beside = [] if path.is_file() else [p for p in path.iterdir() if p not in shards and not BESIDE.match(p.name)]
    if beside:
        return False
    layout = all(SHARD_NAME.fullmatch(shard.name) for shard in shards)
    return layout or sum(shard.stat().st_size for shard in shards) > IN_PLACE_BYTES


def open_corpus(folder: str | Path, skip_bad_shards: bool = False) -> Corpus:
    """A corpus from the metadata of the shards in `folder` (or of one parquet file).

    Args:
        folder: where the shards are; with a manifest, shards it lists may still be on their way.
        skip_bad_shards: leave out a shard that can't be read, with a warning.

    Raises:
        FileNotFoundError: no such folder, or no shard in it.
        BadShardError: a shard is unreadable; names it.
        ValueError: a shard has no column of text, or there is no document at all.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no data at {folder}: give another --data_dir, or a --dataset to download")
    manifest = load_manifest(folder)
    if manifest is not None:
        return _open_listed(folder, manifest, skip_bad_shards)
    shards = list_shards(folder)
    if not shards:
        raise FileNotFoundError(f"no .parquet file in {folder}: give another --data_dir, or a --dataset to download")
    demo = demo_entries(folder)
    listed = demo or first_entries(folder)
    if missing := sorted(set(listed) - {shard.name for shard in shards}):
        listing = DEMO_STAMP if demo else f"the record of what {folder} held"
        said = f"{folder / missing[0]} is in {listing} but is not there: {remedy(folder)}"
        if not skip_bad_shards:
            raise FileNotFoundError(said)
        print0(f"warning: going on without {len(missing)} of {len(listed)} shards: {said}")
    per_shard = [
        _usable_chunks(shard, TEXT_COLUMN, listed.get(shard.name), skip_bad_shards, folder) for shard in shards
    ]
    if not demo:
        record_first_use(folder, listed, [shard for shard, chunks in zip(shards, per_shard, strict=True) if chunks])
    split = _split if all(SHARD_NAME.fullmatch(shard.name) for shard in shards) else _spread
    train, val = split([chunks for chunks in per_shard if chunks])
    if not train:
        raise ValueError(f"the shards in {folder} hold no documents")
    return Corpus(str(folder), train, val, folder=folder, skip_bad_shards=skip_bad_shards)


def _open_listed(folder: Path, manifest: Manifest, skip_bad_shards: bool) -> Corpus:
    # Known are only the chunks before the first gap: else a shard that arrives late would move those behind it.
    if not manifest.validation:  # one shard, part of it is validation: which part is known when it is there
        for entry in manifest.train:
            wait_for_shard(folder / entry.name)
    chunks: dict[str, list[Chunk]] = {}
    pending: dict[str, deque[Entry]] = {}
    for split, entries in (("train", manifest.train), ("val", manifest.validation)):
        there = next((i for i, entry in enumerate(entries) if not (folder / entry.name).exists()), len(entries))
        chunks[split] = [
            chunk
            for entry in entries[:there]
            for chunk in _usable_chunks(folder / entry.name, manifest.column, entry, skip_bad_shards, folder)
        ]
        pending[split] = deque(entries[there:])
    if not manifest.validation:
        chunks["train"], chunks["val"] = _split([chunks["train"]] if chunks["train"] else [])
    if not chunks["train"] and not pending["train"]:
        raise ValueError(f"the shards in {folder} hold no documents")
    identity = manifest.identity()
    return Corpus(
        str(folder), chunks["train"], chunks["val"], pending, folder, manifest.column, identity, skip_bad_shards
    )


def _usable_chunks(shard: Path, column: str, entry: Entry | None, skip_bad: bool, corpus: Path) -> list[Chunk]:
    """The chunks of a shard; none, and a warning, if it is bad and bad ones are to be skipped."""
    try:
        if entry is not None and (damage := find_damage(shard, entry)):
            raise BadShardError(f"{damage}: {remedy(corpus)}")
        return shard_chunks(shard, column)
    except BadShardError as error:
        if not skip_bad:
            raise
        print0(f"warning: skipping {shard.name}: {error}")
        return []


def shard_chunks(shard: Path, column: str = TEXT_COLUMN) -> list[Chunk]:
    """One chunk per row group that has rows.

    Raises:
        BadShardError: it is not a readable parquet file.
        ValueError: it has no such column, or one that does not hold text.
    """
    with open_parquet(shard) as file:
        metadata, schema = file.metadata, file.schema_arrow
    if column not in schema.names:
        raise ValueError(
            f"{shard} has no column {column!r} (it has: {', '.join(schema.names)}): bring it into this form with "
            "`python -m nanochat.dataset --import PATH --text_column NAME`"
        )
    if not is_text(kind := schema.field(column).type):
        raise ValueError(f"{shard}: column {column!r} holds {kind}, but must hold strings")
    number = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(column)
    chunks, first_row = [], 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        if group.num_rows:
            size = group.column(number).total_uncompressed_size
            chunks.append(Chunk(shard, i, 0, group.num_rows, size, column, first_row))
        first_row += group.num_rows
    return chunks


def is_text(kind: pa.DataType) -> bool:
    """True if an Arrow type is some kind of string."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view())


def _split(per_shard: list[list[Chunk]]) -> tuple[list[Chunk], list[Chunk]]:
    """(train, val): the last shard is validation; a single shard gives its last tenth."""
    if not per_shard:
        return [], []
    if len(per_shard) > 1:
        return [chunk for chunks in per_shard[:-1] for chunk in chunks], per_shard[-1]
    (chunks,) = per_shard
    if len(chunks) > 1:
        n_val = max(1, len(chunks) // 10)
        return chunks[:-n_val], chunks[-n_val:]
    (whole,) = chunks
    if whole.stop == 1:  # one document: it can be trained on, but nothing is left to validate with
        return [whole], []
    n_val = max(1, whole.stop // 10)
    border = whole.stop - n_val
    val_bytes = whole.num_bytes * n_val // whole.stop
    train = replace(whole, stop=border, num_bytes=whole.num_bytes - val_bytes)
    return [train], [replace(whole, start=border, num_bytes=val_bytes)]


def _spread(per_shard: list[list[Chunk]]) -> tuple[list[Chunk], list[Chunk]]:
    """(train, val) of files in an order that may mean something: row groups shuffled, validation from all over them."""
    chunks = [chunk for chunks in per_shard for chunk in chunks]
    if len(chunks) < SPREAD_CHUNKS:
        return _split(per_shard)
    random.Random(len(chunks)).shuffle(chunks)  # the same each time the folder is opened
    n_val = max(1, len(chunks) // SPREAD_SHARE)
    return chunks[n_val:], chunks[:n_val]
