"""Get the text that a base model learns from: download shards of a public corpus, or import your own texts.

    python -m nanochat.dataset -n 8 -w 4 --source climbmix
    python -m nanochat.dataset -n 8 --source hf:owner/name --text_column content
    python -m nanochat.dataset --source urls:list.txt
    python -m nanochat.dataset --import my_texts/

Downloads go to <base dir>/base_data/<source>, with a manifest (data/shards.py) that pins the order of the shards, their
hashes, and the validation shard, which is fetched first. Scripts then read them with --dataset=<source>. With --ready=4
the command returns when the first four shards are there and continues in the background: training starts on them and
waits for a later shard only if it is faster than the network.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanochat.env import get_base_dir, get_dist_info, missing_packages, print0

if __name__ == "__main__" and missing_packages():  # before an import that fails without them
    sys.exit(missing_packages())

import tyro

from nanochat.config import run_script, short
from nanochat.data.corpus import Corpus, is_prepared, list_shards, open_corpus, shard_chunks
from nanochat.data.download import RemoteFile, download_all, probe
from nanochat.data.shards import MANIFEST, Entry, Manifest, is_written, load_manifest, writing
from nanochat.data.sources import SOURCES, file_request, is_remote, plan_source, source_folder, split_repo
from nanochat.data.text_import import import_path
from nanochat.files import matches

__all__ = ["Corpus", "download_shards", "open_corpus", "prepare_corpus"]

ROOT = Path(__file__).resolve().parent.parent
SECONDS_BETWEEN_SAVES = 5.0  # of the manifest while shards arrive
BACKGROUND_LOG = "download.log"
BACKGROUND_START_SECONDS = 60.0


# --- downloading ------------------------------------------------------------------------------------------------------


def download_shards(
    source: str,
    num_shards: int | None,
    workers: int = 4,
    *,
    text_column: str = "text",
    revision: str | None = None,
    ready: int | None = None,
    verify: bool = False,
) -> Path:
    """Download the validation shard and the first `num_shards` training shards (None: all); finished ones are kept.

    Args:
        source: "climbmix", "fineweb_edu", "hf:owner/name[/folder]", "urls:LIST" or the URL of a parquet file.
        num_shards: training shards that the folder should have.
        workers: parallel downloads.
        text_column: the column with the text.
        revision: commit, tag or branch of a data set on the hub.
        ready: download only this many training shards now; the others stay listed in the manifest.
        verify: compare the hashes of all files that are there already, not only their sizes.

    Returns:
        The folder, `source_folder(source)`.

    Raises:
        RuntimeError: some shards can't be downloaded; names them all.
    """
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"number of shards is {num_shards}, but must be at least 1")
    folder = source_folder(source)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder):
        old = load_manifest(folder)
        if old is not None and (old.source != source or (revision and revision != old.revision)):
            raise ValueError(
                f"{folder} holds {old.source} at revision {old.revision}, not {source} at {revision}: "
                "delete the folder, or use another NANOCHAT_BASE_DIR"
            )
        manifest = _extended(old, source, num_shards, revision, text_column, folder)
        manifest.save(folder)
        # Validation first: whatever is interrupted, what can be trained on can be evaluated.
        now = [*manifest.validation, *manifest.train[:ready]]
        _remove_wrong(folder, now, hashes=verify or old is None)
        missing = [entry for entry in now if not (folder / entry.name).exists()]
        if missing:
            _fetch(folder, manifest, missing, workers)
    return folder


def _extended(
    old: Manifest | None, source: str, num_shards: int | None, revision: str | None, column: str, folder: Path
) -> Manifest:
    """The manifest of `num_shards` training shards; the source is only asked if the old one lists fewer."""
    if old is not None and num_shards is not None and len(old.train) >= num_shards:
        there = [i for i, entry in enumerate(old.train) if (folder / entry.name).exists()]
        del old.train[max(num_shards, *(i + 1 for i in there), 0) :]  # listed by an earlier, larger -n
        return old
    if old is not None and num_shards is None and old.facts.get("complete"):
        return old
    manifest = plan_source(source, revision or (old.revision if old else None), old.column if old else column)
    if old is not None and old.validation:  # the source may have grown: what validated once is never trained on
        pinned = {entry.name for entry in old.validation}
        manifest.train = [entry for entry in [*manifest.train, *manifest.validation] if entry.name not in pinned]
        manifest.validation = old.validation
    complete = num_shards is None or num_shards >= len(manifest.train)
    manifest.train = manifest.train[:num_shards]
    manifest.facts["complete"] = complete
    return manifest.with_rows({entry.name: entry.rows for entry in old.entries if entry.rows} if old else {})


def _remove_wrong(folder: Path, entries: list[Entry], hashes: bool) -> None:
    """Remove files that are not what the manifest says, so that they are downloaded again."""
    for entry in entries:
        path = folder / entry.name
        if path.exists() and not matches(path, entry.size, entry.digest if hashes else None):
            print0(f"warning: {path} is not the source's file (size or hash differ): downloading it again")
            path.unlink()


def _fetch(folder: Path, manifest: Manifest, missing: list[Entry], workers: int) -> None:
    """Download these shards; their row counts go into the manifest.

    Raises:
        RuntimeError: some can't be downloaded; names them all.
    """
    files = [_remote_file(folder, manifest, entry) for entry in missing]
    where = f"{manifest.source} (commit {manifest.revision[:12]})" if manifest.revision else manifest.source
    print0(f"downloading {len(missing)} of {len(manifest.entries)} shards of {where}")
    rows: dict[str, int] = {}
    last_save = time.monotonic()

    def arrived(file: RemoteFile) -> None:
        nonlocal last_save
        rows[file.path.name] = sum(chunk.stop for chunk in shard_chunks(file.path, manifest.column))
        if time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
            last_save = time.monotonic()
            manifest.with_rows(rows).save(folder)

    def check(path: Path) -> None:
        shard_chunks(path, manifest.column)

    try:
        failed = download_all(files, "downloading", workers, check, arrived)
    finally:
        manifest.with_rows(rows).save(folder)
    if failed:
        first = min(failed)
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} shards failed: {', '.join(sorted(failed))}. First error ({first}): "
            f"{failed[first] or type(failed[first]).__name__} (run the same command again: finished shards are kept)"
        )


def _remote_file(folder: Path, manifest: Manifest, entry: Entry) -> RemoteFile:
    path, origin = folder / entry.name, entry.path or entry.name
    if origin.startswith(("http://", "https://")):
        size, etag = (entry.size, None) if entry.digest else probe(origin)
        return RemoteFile(origin, path, size, entry.digest, etag)
    repo = SOURCES[manifest.source].repo if manifest.source in SOURCES else split_repo(manifest.source)[0]
    url, headers = file_request(repo, origin, manifest.revision or "main")
    return RemoteFile(url, path, entry.size, entry.digest, headers=headers)


def missing_shards(folder: Path) -> list[str]:
    """The shards that the folder's manifest lists but that are not there."""
    manifest = load_manifest(folder)
    return [entry.name for entry in manifest.entries if not (folder / entry.name).exists()] if manifest else []


_background: list[subprocess.Popen[bytes]] = []  # held, or Python warns that they are still running


def download_in_background(folder: Path) -> None:
    """Download what the folder's manifest lists and is missing, in a process of its own that outlives this one.

    Raises:
        RuntimeError: it ended at once.
    """
    manifest = load_manifest(folder)
    if manifest is None or is_written(folder):
        return
    command = [sys.executable, "-m", "nanochat.dataset", "-n", str(len(manifest.train)), f"--source={manifest.source}"]
    log = folder / BACKGROUND_LOG
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env["NANOCHAT_BASE_DIR"] = str(get_base_dir().absolute())  # the process runs in another folder
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    _background.append(process)
    # Until it holds the lock: a reader that finds a shard missing and the lock free takes it for lost.
    deadline = time.monotonic() + BACKGROUND_START_SECONDS
    while not is_written(folder) and time.monotonic() < deadline:
        if process.poll():
            raise RuntimeError(f"the background download ended with exit code {process.returncode}: see {log}")
        if process.returncode == 0:
            return
        time.sleep(0.05)
    print0(f"the other shards are downloaded in the background (process {process.pid}, log in {log})")


# --- what the scripts read --------------------------------------------------------------------------------------------


def prepare_corpus(
    dataset: str | None = None, data_dir: str | Path | None = None, text_column: str | None = None
) -> Path:
    """Make sure the data is there as parquet shards; returns their folder (or the one parquet file) for `open_corpus`.

    Args:
        dataset: a source that was downloaded ("climbmix", "hf:owner/name", ...), or "demo" (`python -m tasks.demo`).
        data_dir: a folder of prepared shards, or of texts of any kind (imported once), or one such file.
        text_column: the column or field with the text; default $TEXT_COLUMN, else found by itself.

    Raises:
        ValueError: both were given, or the dataset is unknown.
        FileNotFoundError: there is no data; names the remedy.
    """
    if dataset and data_dir:
        raise ValueError("give --dataset or --data_dir, not both")
    base_data = get_base_dir() / "base_data"
    if data_dir:
        return prepare_own(Path(data_dir).expanduser(), text_column)
    if dataset == "demo":
        if not list_shards(base_data / "demo"):
            raise FileNotFoundError(f"no demo corpus in {base_data / 'demo'}: write it with `python -m tasks.demo`")
        return base_data / "demo"
    if dataset and is_remote(dataset):
        return _prepare_remote(dataset)
    if dataset:
        raise ValueError(
            f"unknown dataset {dataset!r}: choose {', '.join([*SOURCES, 'demo'])}, hf:owner/name, or use --data_dir"
        )
    if list_shards(base_data):
        return base_data
    raise FileNotFoundError(
        f"no shards in {base_data}: give --data_dir=/your/texts, or --dataset={'|'.join([*SOURCES, 'demo'])}"
    )


def _prepare_remote(dataset: str) -> Path:
    folder = source_folder(dataset)
    if load_manifest(folder) is None:
        shards = [shard.name for shard in list_shards(folder)]  # of a version that wrote no manifest
        if len(shards) > 1 and dataset in SOURCES and shards[-1] == SOURCES[dataset].val_name:
            return folder
        raise FileNotFoundError(
            f"{folder} lacks shards: download some with `python -m nanochat.dataset -n 8 --source {dataset}`"
        )
    missing = missing_shards(folder)
    if missing and not is_written(folder):
        print0(f"{len(missing)} shards of {dataset} have not arrived yet")
        if get_dist_info()[1] == 0:
            download_in_background(folder)
        deadline = time.monotonic() + BACKGROUND_START_SECONDS  # other ranks: until rank 0 has started it
        while missing_shards(folder) and not is_written(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
    return folder


def prepare_own(path: Path, text_column: str | None = None, show: bool = True) -> Path:
    """The folder of shards for what a user gave: prepared shards are used in place, all else is imported.

    Raises:
        FileNotFoundError: nothing to read is there.
        ValueError: it can't be learned from as it is; names the remedy.
    """
    if is_prepared(path):
        return path
    return import_path(path, text_column=text_column, show=show)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Download shards of a corpus into <base dir>/base_data/<source>, or import texts."""

    num_files: Annotated[int, short("-n")] = -1
    """Training shards to download (the validation shard comes on top); -1: all of them, hundreds of GB."""
    num_workers: Annotated[int, short("-w")] = 4
    """Parallel downloads."""
    source: str = "climbmix"
    """climbmix, fineweb_edu, demo, hf:owner/name[/folder], urls:FILE_OR_URL (lines "URL [SHA-256]"), the URL of a
    .parquet file, or a local folder or file."""
    import_path: Annotated[str | None, tyro.conf.arg(name="import")] = None
    """File or folder of texts to import (docs/own_data.md lists the forms)."""
    out: str | None = None
    """Folder for the imported shards; default base_data/import-<hash> in the base folder."""
    text_column: str | None = None
    """Column or field with the text; default: "text" in a download, in texts here $TEXT_COLUMN, else found."""
    revision: str | None = None
    """Commit, tag or branch of a data set on the hub; default its main branch when first asked."""
    ready: int | None = None
    """Return when this many training shards are there; the others arrive in the background."""
    verify: bool = False
    """Compare the hashes of the shards that are there already; wrong ones are downloaded again."""

    def __post_init__(self) -> None:
        if (self.num_files < 1 and self.num_files != -1) or self.num_workers < 1:
            raise ValueError("-n must be at least 1, or -1 for all shards; -w must be at least 1")
        if self.ready is not None and self.ready < 1:
            raise ValueError(f"--ready must be at least 1, got {self.ready}")


def main(cfg: Config) -> None:
    """Download or import, then print what is there."""
    if cfg.import_path is not None:
        folder = import_path(Path(cfg.import_path).expanduser(), cfg.out, cfg.text_column)
    elif cfg.source == "demo":
        if subprocess.run([sys.executable, "-m", "tasks.demo"], cwd=ROOT, check=False).returncode:
            raise RuntimeError("the demo corpus could not be written: see the error above")
        folder = source_folder("demo")
    elif is_remote(cfg.source):
        num_shards = None if cfg.num_files == -1 else cfg.num_files
        folder = download_shards(
            cfg.source,
            num_shards,
            cfg.num_workers,
            text_column=cfg.text_column or "text",
            revision=cfg.revision,
            ready=cfg.ready,
            verify=cfg.verify,
        )
        if missing_shards(folder):
            download_in_background(folder)
    else:
        path = Path(cfg.source).expanduser()
        if not path.exists():
            split_repo(cfg.source)  # says which sources there are
        folder = prepare_own(path, cfg.text_column)
    print_summary(folder, f"--dataset={cfg.source}" if cfg.import_path is None and is_remote(cfg.source) else None)


def print_summary(folder: Path, flag: str | None = None) -> None:
    """Print what a folder holds and how scripts read it."""
    corpus = open_corpus(folder)
    shards = list_shards(folder)
    size = sum(shard.stat().st_size for shard in shards) / 1e9
    listed = f", {len(missing_shards(folder))} more to come" if missing_shards(folder) else ""
    counts = f"{corpus.num_documents('train'):,} documents to train on"
    counts += f", {corpus.num_documents('val'):,} for validation" if corpus.val else ", none for validation"
    manifest = f", pinned by {MANIFEST}" if load_manifest(folder) else ""
    print0(f"{len(shards)} shards ({size:.2f} GB) in {folder}{listed}: {counts}{manifest}")
    print0(f"train on it: python -m scripts.base_train {flag or f'--data_dir={folder}'}")


if __name__ == "__main__":
    run_script(main, Config)
