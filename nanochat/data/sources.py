"""The public sources of text for a base model, and the list of shards that each has.

A source is "climbmix" or "fineweb_edu", "hf:owner/name[/folder]", "urls:LIST", or the URL of a .parquet file.
The hub is asked through huggingface_hub, so $HF_ENDPOINT (a mirror) and $HF_TOKEN (private and gated data sets) count.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nanochat.data.download import RETRIED, retry, setting
from nanochat.data.shards import SHARD_CHARS, Entry, Manifest
from nanochat.env import get_base_dir

HUB = "https://huggingface.co"
# A shard of the public corpora holds SHARD_CHARS characters and takes about 100 MB on the disk. Source: nanochat.
SHARD_BYTES = 100e6
# Characters per token of a vocabulary of 65536 on English web text: about 4.8 in nanochat, rounded up.
CHARS_PER_TOKEN = 4.9


@dataclass(frozen=True)
class Source:
    """A public corpus on the Hugging Face hub: shards 0 to `last_shard`, the last one for validation."""

    repo: str
    last_shard: int

    @property
    def val_name(self) -> str:
        """The validation file."""
        return f"shard_{self.last_shard:05d}.parquet"


# Both are already shuffled (seed 42).
SOURCES = {
    "climbmix": Source("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb_edu": Source("karpathy/fineweb-edu-100b-shuffle", 1822),
}


def count_shards(tokens: float) -> int:
    """Shards of a public corpus that hold this many tokens."""
    return max(1, math.ceil(tokens * CHARS_PER_TOKEN / SHARD_CHARS))


def is_remote(source: str) -> bool:
    """True if a source is downloaded."""
    return source in SOURCES or source.startswith(("hf:", "urls:", "http://", "https://"))


def source_folder(source: str) -> Path:
    """The folder for the shards of a source."""
    if source in SOURCES or source == "demo":
        name = source
    elif source.startswith("hf:"):
        name = "hf--" + local_name(source[3:].strip("/"))
    else:
        name = f"urls-{hashlib.sha256(source.encode()).hexdigest()[:12]}"
    return get_base_dir() / "base_data" / name


def plan_source(source: str, revision: str | None, column: str) -> Manifest:
    """The manifest of everything a source has: asks the hub, or reads the list of URLs.

    Raises:
        ValueError: the source can't be understood or has no parquet file.
        RuntimeError: it can't be reached.
    """
    if source.startswith(("urls:", "http://", "https://")):
        entries = [
            Entry(f"{i:05d}-{url.split('?')[0].rsplit('/', 1)[-1]}", None, digest, url)
            for i, (url, digest) in enumerate(read_urls(source))
        ]
        train, validation = (entries[:-1], entries[-1:]) if len(entries) > 1 else (entries, [])
        return Manifest(source, train, validation, column=column)
    if source in SOURCES:
        known = SOURCES[source]
        commit, entries = list_parquet(known.repo, revision=revision)
        validation = [entry for entry in entries if entry.name == known.val_name]
        if not validation:
            raise ValueError(f"{known.repo} has no {known.val_name}, the validation shard: has it been reorganized?")
        train = [entry for entry in entries if entry.name < known.val_name]
        return Manifest(source, train, validation, commit, column)
    repo, folder = split_repo(source)
    commit, entries = list_parquet(repo, folder, revision)
    if not entries:
        where = f"folder {folder} of " if folder else ""
        raise ValueError(f"{where}the data set {repo} has no .parquet file; name another one, or export it to parquet")
    return Manifest(source, *choose_shards(entries), commit, column)


def split_repo(source: str) -> tuple[str, str]:
    """("owner/name", folder) of "hf:owner/name" or "hf:owner/name/folder"."""
    parts = source.removeprefix("hf:").strip("/").split("/")
    if not source.startswith("hf:") or len(parts) < 2 or not all(parts):
        raise ValueError(
            f"unknown source {source!r}: choose {', '.join([*SOURCES, 'demo'])}, hf:owner/name, urls:LIST, the URL of "
            "a .parquet file, or a path"
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def read_urls(source: str) -> list[tuple[str, str | None]]:
    """(URL, digest or None) of "https://…/x.parquet", or of the lines "URL [SHA-256]" of "urls:FILE" or "urls:URL".

    Raises:
        ValueError: a line is no URL of a parquet file; names it.
        RuntimeError: the list can't be downloaded.
    """
    if not source.startswith("urls:"):
        lines, where = [source], "the source"
    else:
        where = source[5:]
        lines = _read_text(where).splitlines()
    urls: list[tuple[str, str | None]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split() if source.startswith("urls:") else [line]
        if not words:
            continue
        url, digest = words[0], words[1].lower() if len(words) > 1 else None
        if not url.startswith(("http://", "https://")) or not url.split("?")[0].endswith(".parquet"):
            raise ValueError(f"{where}, line {number}: expected the URL of a .parquet file, found {url!r}")
        if digest is not None and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise ValueError(f"{where}, line {number}: expected a SHA-256 in hex behind the URL, found {digest!r}")
        urls.append((url, f"sha256:{digest}" if digest else None))
    if not urls:
        raise ValueError(f"{where} lists no URL")
    return urls


def _read_text(place: str) -> str:
    if not place.startswith(("http://", "https://")):
        path = Path(place).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"--source=urls:{place}: there is no such file")
        return path.read_text(encoding="utf-8")
    try:
        return httpx.get(place, follow_redirects=True, timeout=60).raise_for_status().text
    except httpx.HTTPError as error:
        raise RuntimeError(f"can't read the list {place}: {error or type(error).__name__}") from error


# --- the Hugging Face hub ---------------------------------------------------------------------------------------------


def endpoint() -> str:
    """The hub, or the mirror in $HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def list_parquet(repo: str, folder: str = "", revision: str | None = None) -> tuple[str, list[Entry]]:
    """(commit, parquet files in the order of their paths) of a data set, or of one folder of it.

    Args:
        repo: "owner/name".
        folder: a path in it, for data sets with several parts.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        RuntimeError: it can't be listed; says what to check.
    """
    try:
        commit, files = retry(lambda: _list(repo, folder, revision), _is_temporary)
    except Exception as error:  # the client raises many kinds: no network, offline mode, no such repo, gated
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "check the network, or set HF_ENDPOINT to a mirror"
        if _status(error) in (401, 403, 404):
            hint = "check its name; for a private or gated data set log in with HF_TOKEN"
        elif os.environ.get("HF_HUB_OFFLINE"):
            hint = "HF_HUB_OFFLINE is set"
        raise RuntimeError(f"can't list the data set {repo} at {endpoint()}: {reason} ({hint})") from error
    entries = [Entry(local_name(f.path), f.size, _digest(f), f.path) for f in files if f.path.endswith(".parquet")]
    return commit, sorted(entries, key=lambda entry: entry.path or "")


def _list(repo: str, folder: str, revision: str | None) -> tuple[str, list[Any]]:
    from huggingface_hub import HfApi  # lazy: its import takes as long as all others of a start
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint())
    timeout = setting("NANOCHAT_DOWNLOAD_TIMEOUT", 60)
    commit = api.dataset_info(repo, revision=revision, timeout=timeout).sha or revision or "main"
    tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
    return commit, [item for item in tree if isinstance(item, RepoFile)]


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_temporary(error: Exception) -> bool:
    return _status(error) in RETRIED or (_status(error) is None and "Offline" not in type(error).__name__)


def _digest(file: Any) -> str:
    return f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"


def local_name(path: str) -> str:
    """The name of a repository's file in a flat folder: its path, "/" written as "--"."""
    return path.replace("/", "--")


def choose_shards(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """(train, validation) of a data set, by the names of its files.

    Files named train… are trained on, and those named validation…, valid… or val… validate; without any, the last one
    of train does. Files with other names are left out if there are train files. If nothing is named train, all files
    belong together and the last one is validation; a single one is split (see corpus.py).
    """

    def named(*words: str) -> list[Entry]:
        pattern = re.compile(rf"(?:^|/)(?:{'|'.join(words)})(?![a-z])[^/]*(?:/[^/]*)*$")
        return [entry for entry in entries if pattern.search(entry.path or entry.name)]

    train, validation = named("train"), named("validation", "valid", "val")
    if not train:
        train, validation = entries, []
    train = [entry for entry in train if entry not in validation]
    if not validation and len(train) > 1:
        train, validation = train[:-1], train[-1:]
    return train, validation


def file_request(repo: str, path: str, revision: str) -> tuple[str, dict[str, str]]:
    """(URL, headers) that get one file of a data set; the headers hold the user's token, if there is one."""
    from huggingface_hub import hf_hub_url  # lazy: as above
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=endpoint())
    return url, dict(build_hf_headers())
