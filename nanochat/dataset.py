"""The text a base model learns from: a folder of parquet shards with a string column `text`.

Which documents are validation is fixed by the files alone, so it never depends on what else has been downloaded yet:
the last shard by name; with one shard its last tenth (whole row groups, or rows if there is only one row group).
Validation documents are never trained on. A public source always downloads its last shard first.

    python -m nanochat.dataset -n 8 -w 4 --source climbmix

Text that comes in other forms (.jsonl, .txt) is streamed into shards once by `nanochat.text_import`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import check_disk_space, download_file_with_lock, get_base_dir, print0
from nanochat.config import run_script, short
from nanochat.progress import progress

TEXT_COLUMN = "text"
ROWS_PER_READ = 1024  # documents decoded at a time, however large the row group
HUB = "https://huggingface.co"


# --- a corpus: shards, and who of them is validation ------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Rows `start` to `stop` of one row group of one shard: the unit of order and of resuming."""

    shard: Path
    row_group: int
    start: int
    stop: int
    num_bytes: int
    """About how many bytes of text it holds (from the file's metadata, nothing is read)."""

    def read(self, start: int | None = None) -> Iterator[tuple[int, pa.Array]]:
        """Yield (first row, texts), at most ROWS_PER_READ documents at a time, beginning at row `start`.

        Raises:
            ValueError: the shard is damaged or has vanished; names it.
        """
        start = max(self.start, start or 0)
        row = 0  # first row of the batch in hand
        try:
            with pq.ParquetFile(self.shard) as file:
                for batch in file.iter_batches(ROWS_PER_READ, row_groups=[self.row_group], columns=[TEXT_COLUMN]):
                    first, last = max(row, start), min(row + len(batch), self.stop)
                    if first < last:
                        texts = batch.column(0).slice(first - row, last - first)
                        yield first, texts if pa.types.is_string(texts.type) else texts.cast(pa.large_string())
                    row += len(batch)
                    if row >= self.stop:
                        return
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"can't read row group {self.row_group} of {self.shard} ({error}): delete the file and fetch it again"
            ) from error


@dataclass(frozen=True)
class Corpus:
    """Shards and their split; `train` and `val` are in reading order."""

    name: str
    train: list[Chunk]
    val: list[Chunk]

    def chunks(self, split: str) -> list[Chunk]:
        """The chunks of "train" or "val".

        Raises:
            ValueError: the split is unknown or has no documents.
        """
        if split not in ("train", "val"):
            raise ValueError(f"split is {split!r}, but must be train or val")
        chunks = self.train if split == "train" else self.val
        if not chunks:
            raise ValueError(
                f"{self.name} has no documents for {split}: it needs at least two documents, one of them for validation"
            )
        return chunks

    def arrays(self, split: str) -> Iterator[pa.Array]:
        """The documents as Arrow arrays of strings, some at a time."""
        for chunk in self.chunks(split):
            for _, texts in chunk.read():
                yield texts

    def documents(self, split: str) -> Iterator[str]:
        """The documents one by one (a null counts as an empty one)."""
        for texts in self.arrays(split):
            for text in texts:
                yield text.as_py() or ""

    def num_bytes(self, split: str) -> int:
        """About how many bytes of text the split has, from metadata alone."""
        return sum(chunk.num_bytes for chunk in self.chunks(split))

    def num_documents(self, split: str) -> int:
        """How many documents the split has."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks(split))

    @property
    def fingerprint(self) -> str:
        """Changes when shards are added, removed or get another number of documents."""
        lines = [f"{c.shard.name}/{c.row_group}/{c.start}/{c.stop}" for c in [*self.train, *self.val]]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def list_shards(folder: str | Path) -> list[Path]:
    """The parquet files of a folder by name (or the one file given). Unfinished downloads have other names."""
    folder = Path(folder)
    if folder.is_file():
        return [folder] if folder.suffix == ".parquet" else []
    return sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))


def open_corpus(folder: str | Path) -> Corpus:
    """Look at the metadata of every shard of `folder` (or at one parquet file) and split it.

    Raises:
        FileNotFoundError: no such folder, or no shard in it.
        ValueError: a shard is unreadable, has no `text` column, or there is no document at all.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no data at {folder}: give another --data_dir, or a --dataset to download")
    shards = list_shards(folder)
    if not shards:
        raise FileNotFoundError(f"no .parquet file in {folder}: give another --data_dir, or a --dataset to download")
    per_shard = [chunks for chunks in (_shard_chunks(shard) for shard in shards) if chunks]
    if not per_shard:
        raise ValueError(f"the shards in {folder} hold no documents")
    train, val = _split(per_shard)
    return Corpus(str(folder), train, val)


def _shard_chunks(shard: Path) -> list[Chunk]:
    """One chunk per row group that has rows."""
    try:
        with pq.ParquetFile(shard) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard} is not a readable parquet file ({error}): delete it and fetch it again") from error
    if TEXT_COLUMN not in schema.names:
        raise ValueError(f"{shard} has no column {TEXT_COLUMN!r} (it has: {', '.join(schema.names)}): rename yours")
    kind = schema.field(TEXT_COLUMN).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()):
        raise ValueError(f"{shard}: column {TEXT_COLUMN!r} holds {kind}, but must hold strings")
    column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(TEXT_COLUMN)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [
        Chunk(shard, i, 0, group.num_rows, group.column(column).total_uncompressed_size)
        for i, group in enumerate(groups)
        if group.num_rows
    ]


def _split(per_shard: list[list[Chunk]]) -> tuple[list[Chunk], list[Chunk]]:
    """(train, val): the last shard is validation; a single shard gives its last tenth."""
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
    return (
        [Chunk(whole.shard, whole.row_group, 0, border, whole.num_bytes - val_bytes)],
        [Chunk(whole.shard, whole.row_group, border, whole.stop, val_bytes)],
    )


# --- public sources ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A public corpus on the Hugging Face hub: shards 0 to `last_shard`, the last one for validation."""

    repo: str
    last_shard: int
    shard_bytes: int = 100_000_000  # about

    @property
    def val_name(self) -> str:
        """The file that is validation, for everybody."""
        return f"shard_{self.last_shard:05d}.parquet"


# Both are already shuffled (seed 42); a shard holds about 250 million characters.
SOURCES = {
    "climbmix": Source("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb_edu": Source("karpathy/fineweb-edu-100b-shuffle", 1822),
}


def _fetch_shard(url: str, path: Path) -> None:
    """Download one shard and check that it is a parquet file with text; a wrong one is removed again."""

    def check(downloaded: Path) -> None:
        try:
            _shard_chunks(downloaded)
        except ValueError:
            downloaded.unlink()
            raise

    download_file_with_lock(url, path, postprocess_fn=check)


def download_shards(source_name: str, num_shards: int | None, workers: int = 4, folder: Path | None = None) -> Path:
    """Download the validation shard and the first `num_shards` training shards (None: all); finished ones are kept.

    The hub is $HF_ENDPOINT if set (a mirror). Returns the folder of the shards.

    Raises:
        RuntimeError: some shards could not be had after several attempts; names them all.
    """
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"number of shards is {num_shards}, but must be at least 1")
    source = SOURCES[source_name]
    folder = folder or get_base_dir() / "base_data" / source_name
    folder.mkdir(parents=True, exist_ok=True)
    wanted = source.last_shard if num_shards is None else min(num_shards, source.last_shard)
    names = [source.val_name, *(f"shard_{i:05d}.parquet" for i in range(wanted))]
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return folder
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    failed: dict[str, Exception] = {}
    check_disk_space(folder, len(missing) * source.shard_bytes, f"downloading {len(missing)} shards")
    print0(f"downloading {len(missing)} of {len(names)} shards of {source.repo} from {endpoint}")
    with ThreadPoolExecutor(workers) as pool, progress(len(missing), f"downloading {source_name}") as bar:
        jobs = {
            pool.submit(_fetch_shard, f"{endpoint}/datasets/{source.repo}/resolve/main/{name}", folder / name): name
            for name in missing
        }
        for job in as_completed(jobs):
            error = job.exception()
            if isinstance(error, Exception):
                failed[jobs[job]] = error
            bar.advance(1)
    if failed:
        first = failed[min(failed)]
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} shards failed: {', '.join(sorted(failed))}. First error: {first} "
            "(run the same command again: finished shards are kept)"
        )
    return folder


def prepare_corpus(
    dataset: str | None = None, data_dir: str | Path | None = None, num_shards: int | None = None
) -> Path:
    """Make sure the data is there as parquet shards; returns their folder (or the one parquet file) for `open_corpus`.

    Args:
        dataset: "climbmix" or "fineweb_edu" (downloaded), or "demo" (written by `python -m tasks.demo`).
        data_dir: a folder with .parquet (used in place), .jsonl or .txt files, or one such file.
        num_shards: how many training shards of a public dataset to download; None takes what is there.

    Raises:
        ValueError: both were given, or the dataset is unknown.
        FileNotFoundError: there is no data; names the remedy.
    """
    if dataset and data_dir:
        raise ValueError("give --dataset or --data_dir, not both")
    base_data = get_base_dir() / "base_data"
    if data_dir:
        return _prepare_own(Path(data_dir).expanduser())
    if dataset == "demo":
        if not list_shards(base_data / "demo"):
            raise FileNotFoundError(f"no demo corpus in {base_data / 'demo'}: write it with `python -m tasks.demo`")
        return base_data / "demo"
    if dataset in SOURCES:
        if num_shards is not None:
            return download_shards(dataset, num_shards)
        shards = [shard.name for shard in list_shards(base_data / dataset)]
        if len(shards) > 1 and shards[-1] == SOURCES[dataset].val_name:
            return base_data / dataset
        raise FileNotFoundError(
            f"{base_data / dataset} lacks shards: download some with "
            f"`python -m nanochat.dataset -n 8 --source {dataset}`"
        )
    if dataset:
        raise ValueError(f"unknown dataset {dataset!r}: choose {', '.join([*SOURCES, 'demo'])}, or use --data_dir")
    if list_shards(base_data):
        return base_data
    raise FileNotFoundError(
        f"no shards in {base_data}: give --data_dir=/your/texts, or --dataset={'|'.join([*SOURCES, 'demo'])}"
    )


def _prepare_own(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"--data_dir={path}: there is no such file or folder")
    if list_shards(path):
        return path
    from nanochat.text_import import find_texts, import_texts

    files = find_texts(path)
    if not files:
        raise FileNotFoundError(f"--data_dir={path}: no .parquet, .jsonl or .txt file there")
    return import_texts(files, get_base_dir() / "base_data")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Download shards of a public corpus into <base dir>/base_data/<source>."""

    num_files: Annotated[int, short("-n")] = -1
    """Training shards to download (the validation shard comes on top); -1: all of them."""
    num_workers: Annotated[int, short("-w")] = 4
    """Parallel downloads."""
    source: Literal["climbmix", "fineweb_edu"] = "climbmix"
    """Which corpus."""

    def __post_init__(self) -> None:
        if (self.num_files < 1 and self.num_files != -1) or self.num_workers < 1:
            raise ValueError("-n must be at least 1, or -1 for all shards; -w must be at least 1")


def main(cfg: Config) -> None:
    """Download, then say what is there."""
    folder = download_shards(cfg.source, None if cfg.num_files == -1 else cfg.num_files, cfg.num_workers)
    shards: list[Any] = list_shards(folder)
    print0(f"{len(shards)} shards ({sum(s.stat().st_size for s in shards) / 1e9:.2f} GB) in {folder}")


if __name__ == "__main__":
    run_script(main, Config)
