"""Own texts (.jsonl, .txt) to parquet shards, streamed in bounded memory; done once per state of the files.

- .jsonl: a line is one document, {"text": "..."} or a JSON string.
- .txt: a file is one document if it is short; a longer one is cut at blank lines into documents of about
  TXT_DOCUMENT_CHARS characters. A line "<|endoftext|>" always ends a document.

Every VAL_EVERY-th document goes to the last shard, which is validation; so validation covers all files evenly.
Bytes that are no UTF-8 are replaced by U+FFFD and counted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat.common import check_disk_space, print0
from nanochat.files import atomic_folder
from nanochat.progress import progress

VERSION = 1  # part of the folder's name: raise it when the same files would give other shards
SUFFIXES = (".jsonl", ".txt")
TXT_DOCUMENT_CHARS = 8_000
TXT_LONGEST_CHARS = 64_000  # where no blank line comes, cut here
VAL_EVERY = 20
VAL_EVERY_IF_LARGE = 200
LARGE_BYTES = 200_000_000
ROW_GROUP_DOCUMENTS = 1024
ROW_GROUP_CHARS = 16_000_000
SHARD_CHARS = 250_000_000
SCHEMA = pa.schema([("text", pa.string())])


def find_texts(path: Path) -> list[Path]:
    """The .jsonl and .txt files of a folder by name, or the one file given."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    return [file for file in files if file.suffix in SUFFIXES and file.is_file() and not file.name.startswith(".")]


def import_texts(files: list[Path], parent: Path) -> Path:
    """Write the documents of `files` as shards into `parent/import-<hash>`; returns that folder.

    Raises:
        ValueError: a line is malformed (names file and line), or there is no text at all.
        RuntimeError: the disk is too small.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([VERSION, stats]).encode()).hexdigest()[:12]
    folder = parent / f"import-{key}"
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):  # of several processes one imports, the others find it done
        if not folder.exists():
            total_bytes = sum(size for _, size, _ in stats)
            check_disk_space(parent, total_bytes, f"importing {len(files)} files")
            with atomic_folder(folder) as tmp, progress(total_bytes, "importing text") as bar:
                writer = _ShardWriter(tmp, VAL_EVERY if total_bytes < LARGE_BYTES else VAL_EVERY_IF_LARGE)
                for file, (_, size, _) in zip(files, stats, strict=True):
                    before = bar.done
                    for done, document in read_documents(file):
                        writer.add(document)
                        bar.set(before + done)
                    bar.set(before + size)
                writer.close()
                if writer.num_documents == 0:
                    raise ValueError(f"no text in {', '.join(map(str, files))}")
            print0(f"imported {writer.num_documents:,} documents, {writer.num_chars:,} characters into {folder}")
            if writer.num_replaced:
                print0(f"warning: {writer.num_replaced:,} characters were no valid UTF-8 and became U+FFFD")
    return folder


def read_documents(file: Path) -> Iterator[tuple[int, str]]:
    """(bytes read so far, text) of each document of a .jsonl or .txt file."""
    with open(file, "rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace") as lines:
        documents = _read_jsonl(file, lines) if file.suffix == ".jsonl" else _read_txt(lines)
        for document in documents:
            yield raw.tell(), document


def _read_jsonl(file: Path, lines: io.TextIOWrapper) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            found = f"an object with {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
            raise ValueError(f'{file}, line {number}: expected {{"text": "..."}} or a string, found {found:.200}')
        yield text


def _read_txt(lines: io.TextIOWrapper) -> Iterator[str]:
    document: list[str] = []
    num_chars = 0
    while line := lines.readline(TXT_LONGEST_CHARS):  # a "line" may be gigabytes: the limit bounds memory
        separator = line.strip() == "<|endoftext|>"
        if not separator:
            document.append(line)
            num_chars += len(line)
        at_gap = not line.strip() and num_chars >= TXT_DOCUMENT_CHARS
        if separator or at_gap or num_chars >= TXT_LONGEST_CHARS:
            yield "".join(document)
            document, num_chars = [], 0
    yield "".join(document)


def replace_surrogates(text: str) -> str:
    """`text` as valid Unicode: paired surrogates joined, lone ones replaced by U+FFFD (JSON may hold such text)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class _ShardWriter:
    """Writes documents into train shards and one validation shard, which gets the last name at the end."""

    def __init__(self, folder: Path, val_every: int) -> None:
        self.folder, self.val_every = folder, val_every
        self.num_documents = self.num_chars = self.num_replaced = 0
        self._num_shards = 0
        self._train = _Shard(self._next_path())
        self._val = _Shard(folder / "validation.parquet")

    def _next_path(self) -> Path:
        path = self.folder / f"shard_{self._num_shards:05d}.parquet"
        self._num_shards += 1
        return path

    def add(self, document: str) -> None:
        """Add one document; blank ones are left out."""
        document = replace_surrogates(document)
        if not document.strip():
            return
        self.num_documents += 1
        self.num_chars += len(document)
        self.num_replaced += document.count("\ufffd")
        if self.num_documents % self.val_every == 0:
            self._val.add(document)
            return
        self._train.add(document)
        if self._train.num_chars >= SHARD_CHARS:
            self._train.close()
            self._train = _Shard(self._next_path())

    def close(self) -> None:
        """Finish all files."""
        self._train.close()
        self._val.close()
        if self._val.num_chars:
            self._val.path.rename(self._next_path())
        else:
            self._val.path.unlink()


class _Shard:
    """One parquet file, written row group by row group."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_chars = 0
        self._pending: list[str] = []
        self._pending_chars = 0
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=3)

    def add(self, document: str) -> None:
        self.num_chars += len(document)
        self._pending_chars += len(document)
        self._pending.append(document)
        if len(self._pending) == ROW_GROUP_DOCUMENTS or self._pending_chars >= ROW_GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(pa.table({"text": pa.array(self._pending, pa.string())}, schema=SCHEMA))
        self._pending, self._pending_chars = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()
