"""Own texts to parquet shards: streamed in bounded memory, without exact duplicates, shuffled; once per state of files.

Every document gets a 128-bit hash of its content, and the shards hold the documents in the order of their hashes. So
equal documents meet (all but one are dropped), the order is a shuffle that depends on nothing but the content, and
importing the same texts again, from files in another order too, gives the same shards byte for byte. Validation is the
documents with the smallest hashes: whether a document is one does not change when others are added.

It works in two passes: documents are written into buckets by the first bits of their hash, each small enough for
memory; then bucket after bucket is sorted and written out.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock

from nanochat.data.shards import ShardWriter, name_shards
from nanochat.data.text_files import COMPRESSIONS, Repairs, find_texts, read_documents
from nanochat.env import check_disk_space, get_base_dir, print0
from nanochat.files import atomic_folder
from nanochat.progress import Bar, progress

VERSION = 2  # part of the folder's name: raise it when the same files would give other shards
VAL_SHARE = 1 / 20
VAL_SHARE_IF_LARGE = 1 / 200
LARGE_CHARS = 200_000_000
BUCKET_BYTES = 32_000_000  # of text, about
PENDING_BYTES = 64_000_000  # held in memory before buckets are written
UNPACKED_TIMES = 4  # how many times as large a compressed file is taken to be unpacked
SAMPLES, SAMPLE_CHARS = 3, 200
BUCKET_SCHEMA = pa.schema([("hash", pa.binary(16)), ("text", pa.string())])


@dataclass
class ImportCounts:
    """Counts of an import."""

    files: int = 0
    documents: int = 0
    """Written, without the duplicates."""
    characters: int = 0
    """Of these."""
    duplicates: int = 0
    blank: int = 0
    """Documents of white space only, left out."""
    repaired: dict[str, int] = field(default_factory=dict)
    """Characters that were no valid UTF-8, by file."""

    def lines(self) -> list[str]:
        """The counts as sentences."""
        lines = [
            f"imported {self.documents:,} documents ({self.characters:,} characters) of {self.files} files; left out "
            f"{self.duplicates:,} exact duplicates and {self.blank:,} blank ones"
        ]
        if self.repaired:
            worst = sorted(self.repaired.items(), key=lambda item: -item[1])
            names = ", ".join(f"{name} ({count:,})" for name, count in worst[:5])
            more = f" and {len(worst) - 5} more files" if len(worst) > 5 else ""
            count = sum(self.repaired.values())
            lines.append(f"warning: {count:,} characters were no valid UTF-8 and became U+FFFD: {names}{more}")
        return lines


def import_path(path: Path, out: str | Path | None = None, text_column: str | None = None) -> Path:
    """Import a file or folder; returns the folder of the shards (`out`, or one in the base folder).

    Raises:
        FileNotFoundError: nothing to read is there.
        ValueError: `out` holds something else, or a file is malformed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    files = find_texts(path)
    if not files:
        raise FileNotFoundError(f"{path} holds no .parquet, .jsonl, .txt, .md, .csv or .html file")
    return import_texts(files, get_base_dir() / "base_data", text_column, Path(out).expanduser() if out else None)


def import_texts(
    files: Sequence[Path], parent: Path, text_column: str | None = None, folder: Path | None = None
) -> Path:
    """Write the documents of `files` as shards into `folder`, default `parent/import-<hash>`; returns it.

    Raises:
        ValueError: a file is malformed (names the place), there is no text at all, or `folder` holds something else.
        RuntimeError: the disk is too small.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([VERSION, text_column, stats]).encode()).hexdigest()[:12]
    target = folder or parent / f"import-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):  # of several processes one imports, the others find it done
        if target.exists():
            if folder is not None and key not in _key_of(target):
                raise ValueError(f"{target} exists and holds something else: delete it, or give another --out")
            return target
        for old in target.parent.glob(f".{target.name}.*.tmp"):  # of an import that was killed
            shutil.rmtree(old, ignore_errors=True)
        sizes = [
            size * (UNPACKED_TIMES if f.suffix in (*COMPRESSIONS, ".parquet") else 1)
            for f, (_, size, _) in zip(files, stats, strict=True)
        ]
        check_disk_space(target.parent, int(1.5 * sum(sizes)), f"importing {len(files)} files")
        with atomic_folder(target) as tmp:
            counts, samples = _Import(tmp, files, sizes, text_column, key).run()
    for line in [*counts.lines(), "a sample:", *(f"  {text!r}" for text in samples), f"shards are in {target}"]:
        print0(line)
    return target


def _key_of(folder: Path) -> str:
    manifest = folder / "manifest.json"
    return manifest.read_text(encoding="utf-8") if manifest.exists() else ""


class _Import:
    """One import into the empty folder `tmp`."""

    def __init__(self, tmp: Path, files: Sequence[Path], sizes: list[int], text_column: str | None, key: str) -> None:
        self.tmp, self.files, self.sizes, self.column, self.key = tmp, files, sizes, text_column, key
        self.counts, self.samples = ImportCounts(files=len(files)), list[str]()

    def run(self) -> tuple[ImportCounts, list[str]]:
        """Both passes; returns what was met, and some documents."""
        buckets = Buckets(self.tmp / "buckets", 1 + sum(self.sizes) // BUCKET_BYTES)
        with progress(2.0, "importing") as bar:
            self._read(buckets, bar)
            if buckets.num_chars == 0:
                raise ValueError(f"no text in {', '.join(map(str, self.files[:5]))}")
            self._write(buckets, bar)
        shutil.rmtree(buckets.folder)
        return self.counts, self.samples

    def _read(self, buckets: Buckets, bar: Bar) -> None:
        total, before = max(1, sum(f.stat().st_size for f in self.files)), 0
        repairs = Repairs()
        for file in self.files:
            repaired = repairs.characters
            for done, document in read_documents(file, repairs, self.column):
                if document.strip():
                    buckets.add(document)
                else:
                    self.counts.blank += 1
                bar.set((before + done) / total, f"reading {file.name}")
            before += file.stat().st_size
            if repairs.characters > repaired:
                self.counts.repaired[file.name] = repairs.characters - repaired
        buckets.flush()

    def _write(self, buckets: Buckets, bar: Bar) -> None:
        share = VAL_SHARE if buckets.num_chars < LARGE_CHARS else VAL_SHARE_IF_LARGE
        border = np.uint64(int(share * 2**64))  # hashes are uniform: so large a share of them lies below
        val, train = ShardWriter(self.tmp, "validation", one=True), ShardWriter(self.tmp, "shard")
        for number, (hashes, texts) in enumerate(buckets.read()):
            num_val = int(np.searchsorted(hashes, border))
            if not self.counts.documents and len(hashes):
                num_val = max(1, num_val)  # at least one document validates, however few there are
            for i, text in enumerate(texts.to_pylist()):
                (val if i < num_val else train).add(text)
                self.counts.characters += len(text)
                if i >= num_val and len(self.samples) < SAMPLES:
                    self.samples.append(text[:SAMPLE_CHARS])
            self.counts.documents += len(texts)
            bar.set(1 + (number + 1) / buckets.count, "writing")
        self.counts.duplicates = buckets.num_documents - self.counts.documents
        train_entries, val_entries = train.close(), val.close()
        if not train_entries:  # too few documents: they go into one shard, which is split where it is read
            train_entries, val_entries, self.samples = val_entries, [], [texts[0].as_py()[:SAMPLE_CHARS]]
        name_shards(self.tmp, "import", train_entries, val_entries, {"import": self.key, **vars(self.counts)})


class Buckets:
    """Documents on disk, divided by the first bits of their hash."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.num_documents = self.num_chars = 0
        self._pending: list[list[tuple[bytes, str]]] = [[] for _ in range(count)]
        self._pending_bytes = 0
        folder.mkdir()

    def add(self, text: str) -> None:
        """Put a document into its bucket."""
        content = text.encode()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        # By the leading bits, so that bucket after bucket, each sorted, is the order of all hashes.
        self._pending[int.from_bytes(digest[:8], "big") * self.count >> 64].append((digest, text))
        self._pending_bytes += len(content)
        self.num_documents += 1
        self.num_chars += len(text)
        if self._pending_bytes >= PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Append what is in memory to the buckets' files: each time one more Arrow stream."""
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        for i, documents in enumerate(self._pending):
            if documents:
                table = pa.table([*map(list, zip(*documents, strict=True))], schema=BUCKET_SCHEMA)
                with open(self._path(i), "ab") as f, pa.ipc.new_stream(f, BUCKET_SCHEMA, options=options) as out:
                    out.write_table(table)
                documents.clear()
        self._pending_bytes = 0

    def _path(self, i: int) -> Path:
        return self.folder / f"{i:06d}.arrows"

    def read(self) -> Iterator[tuple[npt.NDArray[np.uint64], pa.Array]]:
        """(first 64 bits of the hashes, texts) of each bucket, sorted by hash, equal documents once."""
        for i in range(self.count):
            if self._path(i).exists():
                tables = []
                with pa.OSFile(str(self._path(i))) as f:
                    while f.tell() < f.size():
                        with pa.ipc.open_stream(f) as stream:
                            tables.append(stream.read_all())
                table = pa.concat_tables(tables).combine_chunks()
                digests = b"".join(table["hash"].to_pylist())
                hashes = np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)
                order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # by the last key first: the leading 64 bits decide
                hashes = hashes[order]
                first = np.ones(len(order), dtype=bool)
                first[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)  # equal documents lie side by side
                yield hashes[first, 0], table["text"].combine_chunks().take(pa.array(order[first]))
                self._path(i).unlink()
