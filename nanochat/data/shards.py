"""A folder of shards: its manifest, its lock, and the writer of shards.

The manifest (`manifest.json`, written before the first shard arrives) pins the split (every run validates on the same
shards), the order of the training shards, and the size and hash of every file; rows are filled in as shards arrive. It
tells a reader a shard that is still on its way from one that is gone: a process that writes shards holds the folder's
lock, so a listed shard that is missing while the lock is free will not come.

A shard that is written here is a parquet file of about 250 million characters with one column of strings, `text`, in
row groups of 1024 documents (fewer if they are long), packed with zstd. The files are numbered; the last one is
validation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from nanochat.env import get_base_dir, get_dist_info, print0
from nanochat.files import matches, seal, sha256_file, unseal, write_json

MANIFEST = "manifest.json"
LOCK = ".download.lock"
DEMO_STAMP = "corpus.json"  # the demo corpus has this instead of a manifest
VERIFIED = ".verified_shards.json"  # in the base folder: shards whose hash was compared, as they were then
FIRST_USE = ".first_use"  # in the base folder: what was in folders without a list of hashes when they were first opened
VERSION = 1  # of the manifest
SECONDS_BETWEEN_LOOKS = 0.2
LARGE_BYTES = 2_000_000_000  # hashing more is announced: it takes seconds

ROW_GROUP_DOCUMENTS = 1024
ROW_GROUP_CHARS = 16_000_000
SHARD_CHARS = 250_000_000
SCHEMA = pa.schema([("text", pa.string())])


@dataclass(frozen=True)
class Entry:
    """One shard."""

    name: str
    """Its file in the folder."""
    size: int | None = None
    """Bytes of the file, if known."""
    digest: str | None = None
    """"sha256:<hex>" or "git:<hex>" (the id git gives to its content), if known."""
    path: str | None = None
    """Its place at the source: a path in the repository, or a URL."""
    rows: int | None = None
    """Documents, known once it has arrived."""


@dataclass
class Manifest:
    """The shards of a folder in reading order."""

    source: str
    """As it was given on the command line."""
    train: list[Entry]
    validation: list[Entry]
    """Empty: the last tenth of the training shard is validation (only with one shard)."""
    revision: str | None = None
    """The commit of the source."""
    column: str = "text"
    """The column with the text."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More to keep: counts of an import."""

    @property
    def entries(self) -> list[Entry]:
        """Every shard, validation first."""
        return [*self.validation, *self.train]

    def identity(self) -> str:
        """Text that stands for the list of shards and their content, whether they have arrived or not."""
        lines = [[[e.name, e.size, e.digest] for e in entries] for entries in (self.train, self.validation)]
        return json.dumps([lines, self.column])

    def with_rows(self, rows: dict[str, int]) -> Manifest:
        """The same with these row counts filled in."""

        def fill(entries: list[Entry]) -> list[Entry]:
            return [replace(e, rows=rows.get(e.name, e.rows)) for e in entries]

        return replace(self, train=fill(self.train), validation=fill(self.validation))

    def save(self, folder: Path) -> None:
        """Write it into `folder`; it appears whole."""
        write_json(folder / MANIFEST, seal({"version": VERSION, **asdict(self)}, MANIFEST))


def load_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder, None if it has none.

    Raises:
        ValueError: it is there but can't be understood.
    """
    path = Path(folder) / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not unseal(record, MANIFEST):
            raise ValueError("it was changed or is damaged")
        if record.pop("version") != VERSION:
            raise ValueError("it has another version")
        for split in ("train", "validation"):
            record[split] = [Entry(**entry) for entry in record[split]]
        return Manifest(**record)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be understood ({error}): delete it and run the download again") from error


# --- is it still the file that was listed? ----------------------------------------------------------------------------


def demo_entries(folder: Path) -> dict[str, Entry]:
    """The shards that the demo corpus's stamp lists, by name, with their hashes; empty if the folder has none.

    Raises:
        ValueError: the stamp can't be understood.
    """
    path = folder / DEMO_STAMP
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        return {name: Entry(str(name), digest=f"sha256:{digest}") for name, digest in sums.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} can't be understood ({error}): run `python -m tasks.demo` again") from error


def find_damage(shard: Path, entry: Entry) -> str | None:
    """What of a shard is not as it was listed, None if all is; a content that was compared once is not read again.

    Size and times stand for the content: the change time too, which no program can set back.
    """
    stat = shard.stat()
    if entry.size is not None and stat.st_size != entry.size:
        return f"{shard} has {stat.st_size} bytes, but is listed with {entry.size}"
    if entry.digest is None or _verified().get(str(shard.absolute())) == _state(shard, entry):
        return None
    if not matches(shard, entry.size, entry.digest):
        return f"{shard} is not the file that was listed, its hash is another"
    _note([(shard, entry)])
    return None


def remedy(folder: Path) -> str:
    """What brings back the shards of a folder that are missing or not as they were listed."""
    if (folder / DEMO_STAMP).exists():
        return "run `python -m tasks.demo` again"
    manifest = load_manifest(folder) if folder.is_dir() else None
    if manifest is not None and "import" in manifest.facts:
        return f"delete the folder {folder}, then import its texts again"
    if manifest is None and (record := first_use(folder)).exists():
        return f"put it back as it was, or delete {record} if you have changed it on purpose"
    return "delete the file if it is there, then run the `python -m nanochat.dataset` command of this folder again"


def first_use(folder: Path) -> Path:
    """The record of what a folder without a list of hashes held when it was first opened (or of one file)."""
    name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:12]
    return get_base_dir() / FIRST_USE / f"{folder.name}-{name}.json"


def first_entries(folder: Path) -> dict[str, Entry]:
    """The shards that a folder without a list of hashes held when it was opened before, by name; empty the first time.

    A record that can't be read is told and made anew.
    """
    path = first_use(folder)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not unseal(record, path.name):
            raise ValueError("it was changed or is damaged")
        return {name: Entry(name, size, digest) for name, (size, digest) in record["shards"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print0(f"warning: {path} can't be read ({error}): whether {folder} was changed before can't be known")
        return {}


def record_first_use(folder: Path, known: dict[str, Entry], shards: Iterable[Path]) -> None:
    """Add the hashes of `shards` to the record of `folder`, unless they are there; one process does."""
    new = [shard for shard in shards if shard.name not in known]
    if not new or get_dist_info()[1] != 0:
        return
    if (size := sum(shard.stat().st_size for shard in new)) > LARGE_BYTES:
        print0(f"hashing {size / 1e9:.1f} GB of {folder} once, so that a later change is found")
    entries = [Entry(shard.name, shard.stat().st_size, f"sha256:{sha256_file(shard)}") for shard in new]
    path, rows = first_use(folder), {e.name: [e.size, e.digest] for e in [*known.values(), *entries]}
    try:
        write_json(path, seal({"folder": str(folder.absolute()), "shards": rows}, path.name))
    except OSError as error:
        print0(f"warning: {path} can't be written ({error}): if {folder} is changed later, that can't be known")
    _note(list(zip(new, entries, strict=True)))


def _state(shard: Path, entry: Entry) -> list[Any]:
    stat = shard.stat()
    return [entry.digest, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _note(compared: list[tuple[Path, Entry]]) -> None:
    """Remember that these shards are as listed."""
    with contextlib.suppress(OSError):  # a base folder that can't be written to costs time, nothing else
        there = {path: seen for path, seen in _verified().items() if Path(path).exists()}
        now = {str(shard.absolute()): _state(shard, entry) for shard, entry in compared}
        write_json(get_base_dir() / VERIFIED, there | now)


def _verified() -> dict[str, Any]:
    try:
        known = json.loads((get_base_dir() / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


# --- the lock, and waiting for a shard --------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while shards are written; waits for another writer."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print0(f"another download into {folder} is running: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_written(folder: Path) -> bool:
    """True if some process is writing shards into `folder`."""
    if not (folder / LOCK).exists():  # don't make one: the folder may be read-only
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def wait_for_shard(path: Path, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Wait for a shard that is still to come; False if `stopped` becomes true first.

    Raises:
        FileNotFoundError: no process is writing into its folder, so it will not come.
    """
    announced = False
    while not path.exists():
        if stopped():
            return False
        if not is_written(path.parent) and not path.exists():  # it may have come between the two looks
            raise FileNotFoundError(
                f"{path} is listed in {MANIFEST} but is not there, and no download is running: {remedy(path.parent)}"
            )
        if not announced:
            print0(f"waiting for {path.name}, which is still on its way")
            announced = True
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return True


# --- writing them -----------------------------------------------------------------------------------------------------


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
            self._writer = pq.ParquetWriter(
                path, SCHEMA, compression="zstd", compression_level=3, write_page_checksum=True
            )
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
        """Finish; returns the entries of what was written."""
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
