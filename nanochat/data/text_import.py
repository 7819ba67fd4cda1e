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
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from nanochat.data.inventory import Inventory, check_inventories, shortened
from nanochat.data.packed import compression_of
from nanochat.data.shards import MANIFEST, ShardWriter, load_manifest, name_shards
from nanochat.data.split import MIN_SPLIT_CHARS, best_cut
from nanochat.data.text_files import TextReader, file_of
from nanochat.data.text_look import Tally, stop_if_too_little
from nanochat.data.text_walk import ReadOptions, TextFile, find_texts, fingerprint_of
from nanochat.env import check_disk_space, get_base_dir, print0
from nanochat.files import atomic_folder
from nanochat.progress import Bar, progress

VERSION = 12  # part of the folder's name: raise it when the same files would give other shards
VAL_SHARE = 1 / 20
VAL_SHARE_IF_LARGE = 1 / 200
LARGE_CHARS = 200_000_000
BUCKET_BYTES = 32_000_000  # of text, about
PENDING_BYTES = 64_000_000  # held in memory before buckets are written
UNPACKED_TIMES = 4  # how many times as large a compressed file is taken to be unpacked
SAMPLES = 3
PACKED_KINDS = ("parquet", "arrow", "archive", "epub", "docx", "odt")
BUCKET_SCHEMA = pa.schema([("hash", pa.binary(16)), ("text", pa.string())])


def import_path(
    path: Path,
    out: str | Path | None = None,
    text_column: str | None = None,
    options: ReadOptions | None = None,
    show: bool = True,
) -> Path:
    """Import a file or folder; returns the folder of the shards (`out`, or one in the base folder).

    Args:
        path: what to read.
        out: the folder of the shards.
        text_column: the column or field with the text, before that of the options.
        options: what else the user said; default: by the environment.
        show: print the inventory.

    Raises:
        FileNotFoundError: nothing to read is there.
        UnusableInputError: more is left out than read.
        ValueError: `out` holds something else, or a file is malformed.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    options = options or ReadOptions.from_env(text_column)
    inventory = Inventory(f"texts in {path}")
    files = find_texts(path, options, inventory)
    for file in files:
        inventory.count(file.label, 1, file.size)
    if all(file.kind != "archive" for file in files):  # what is in an archive is known when it is read
        stop_if_too_little(inventory)
    if not files:
        raise FileNotFoundError(inventory.stop)
    check_inventories([inventory])
    return import_texts(
        files, get_base_dir() / "base_data", options, Path(out).expanduser() if out else None, inventory, path, show
    )


def import_texts(
    files: Sequence[Path | TextFile],
    parent: Path,
    options: ReadOptions | None = None,
    folder: Path | None = None,
    inventory: Inventory | None = None,
    source: Path | None = None,
    show: bool = True,
) -> Path:
    """Write the documents of `files` as shards into `folder`, default `parent/import-<hash>`; returns it.

    Args:
        files: what to read.
        parent: where the folder goes by default; older imports of the same source are removed there.
        options: what the user said about the texts.
        folder: where the shards go.
        inventory: what is known of the files; is kept in the manifest.
        source: what the user gave.
        show: print the inventory.

    Raises:
        ValueError: a file is malformed (names the place), there is no text at all, or `folder` holds something else.
        RuntimeError: the disk is too small.
    """
    options = options or ReadOptions()
    texts = [file if isinstance(file, TextFile) else file_of(file) for file in files]
    key = hashlib.sha256(f"{VERSION} {source} {fingerprint_of(texts, options)}".encode()).hexdigest()[:12]
    target = folder or parent / f"import-{key}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):  # of several processes one imports, the others find it done
        if target.exists():
            if folder is not None and key not in _key_of(target):
                raise ValueError(f"{target} exists and holds something else: delete it, or give another --out")
            return target
        sizes = [
            file.size * (UNPACKED_TIMES if compression_of(file.path.name) or file.kind in PACKED_KINDS else 1)
            for file in texts
        ]
        check_disk_space(target.parent, int(1.5 * sum(sizes)), f"importing {len(files)} files")
        if inventory is None:
            inventory = Inventory("texts")
            for file in texts:
                inventory.count(file.label, 1, file.size)
        with atomic_folder(target) as tmp:
            _Import(tmp, texts, sizes, options, inventory, {"import": key, "source": str(source or "")}).run()
    for line in inventory.lines(SAMPLES) if show else ():
        print0(line)
    print0(f"shards are in {target}")
    if folder is None and source is not None:
        _remove_older(target, str(source))
    return target


def _key_of(folder: Path) -> str:
    manifest = folder / MANIFEST
    return manifest.read_text(encoding="utf-8") if manifest.exists() else ""


def _remove_older(target: Path, source: str) -> None:
    """Remove the imports of the same source as it was before: else every change would leave a copy of all texts."""
    for folder in target.parent.glob("import-*"):
        if folder == target or not folder.is_dir():
            continue
        try:
            manifest = load_manifest(folder)
        except ValueError:
            continue
        if manifest is not None and manifest.facts.get("source") == source:
            shutil.rmtree(folder, ignore_errors=True)
            Path(f"{folder}.lock").unlink(missing_ok=True)
            print0(f"removed {folder}, an import of the same texts as they were before")


def inventory_of(folder: Path) -> Inventory | None:
    """What an import found, None if the folder is no import."""
    manifest = load_manifest(folder)
    record = manifest.facts.get("inventory") if manifest else None
    return Inventory.from_record(record) if record else None


class _Import:
    """One import into the empty folder `tmp`."""

    def __init__(
        self,
        tmp: Path,
        files: Sequence[TextFile],
        sizes: list[int],
        options: ReadOptions,
        inventory: Inventory,
        facts: dict[str, str],
    ) -> None:
        self.tmp, self.files, self.sizes, self.inventory, self.facts = tmp, files, sizes, inventory, facts
        self.reader, self.tally = TextReader(options, inventory), Tally()

    def run(self) -> None:
        """Both passes; the inventory gets what was met."""
        buckets = Buckets(self.tmp / "buckets", 1 + sum(self.sizes) // BUCKET_BYTES)
        with progress(2.0, "importing") as bar:
            self._read(buckets, bar)
            stop_if_too_little(self.inventory)  # reading may have found files that are no text
            if buckets.num_chars == 0 and not self.inventory.stop:
                raise ValueError(f"no text in {shortened([str(file.path) for file in self.files])}")
            self.tally.characters = buckets.num_chars
            self.tally.check_broken(self.inventory, self.reader)
            check_inventories([self.inventory])  # before the disk is filled
            self._write(buckets, bar)
        shutil.rmtree(buckets.folder)

    def _read(self, buckets: Buckets, bar: Bar) -> None:
        total, before = max(1, sum(file.size for file in self.files)), 0
        repairs = self.reader.repairs
        for file in self.files:
            broken = repairs.characters + repairs.nul
            for done, document in self.reader.read(file):
                if document.strip():
                    buckets.add(document)
                else:
                    self.tally.blank += 1
                bar.set((before + done) / total, f"reading {file.path.name}")
            before += file.size
            if repairs.characters + repairs.nul > broken:
                self.tally.broken[file.name] = repairs.characters + repairs.nul - broken
        buckets.flush()

    def _write(self, buckets: Buckets, bar: Bar) -> None:
        val, train = ShardWriter(self.tmp, "validation", one=True), ShardWriter(self.tmp, "shard")
        tally = self.tally
        tally.characters = 0
        documents = self._documents(buckets, bar)
        first = list(itertools.islice(documents, 2))
        if len(first) == 1 and len(first[0][2]) >= MIN_SPLIT_CHARS:  # one text alone: its end validates
            text = first[0][2]
            cut = best_cut(text, int(0.9 * len(text)), int(0.95 * len(text)))
            first = [(b"\xff" * 16, False, text[:cut]), (b"", True, text[cut:])]
        for digest, validates, text in itertools.chain(first, documents):
            (val if validates else train).add(text)
            tally.documents += 1
            tally.characters += len(text)
            if not validates:
                tally.sample(digest, text)
        tally.duplicates = max(0, buckets.num_documents - tally.documents)
        train_entries, val_entries = train.close(), val.close()
        if not train_entries:  # too few documents: they go into one shard, which is split where it is read
            train_entries, val_entries = val_entries, []
        tally.into(self.inventory, self.reader)
        counts = {"documents": tally.documents, "characters": tally.characters, "duplicates": tally.duplicates}
        facts = {**self.facts, "files": len(self.files), **counts, "blank": tally.blank}
        name_shards(self.tmp, "import", train_entries, val_entries, {**facts, "inventory": self.inventory.record()})

    def _documents(self, buckets: Buckets, bar: Bar) -> Iterator[tuple[bytes, bool, str]]:
        """(hash, whether it validates, text) of every document once, in the order of the hashes."""
        share = VAL_SHARE if buckets.num_chars < LARGE_CHARS else VAL_SHARE_IF_LARGE
        border = np.uint64(int(share * 2**64))  # hashes are uniform: so large a share of them lies below
        num_documents = 0
        for number, (hashes, texts) in enumerate(buckets.read()):
            num_val = int(np.searchsorted(hashes, border))
            if not num_documents and len(hashes):
                num_val = max(1, num_val)  # at least one document validates, however few there are
            for i, text in enumerate(texts.to_pylist()):
                yield int(hashes[i]).to_bytes(8, "big"), i < num_val, text
            num_documents += len(texts)
            self.tally.num_bytes += pc.sum(pc.binary_length(texts)).as_py() or 0
            bar.set(1 + (number + 1) / buckets.count, "writing")


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
