"""The parquet files of a data set on the Hugging Face hub, with sizes and hashes, and how to ask for them.

Asked through huggingface_hub, so $HF_ENDPOINT (a mirror) and $HF_TOKEN (private and gated data sets) count.
"""

from __future__ import annotations

import os
import re
from typing import Any

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from nanochat.data.download import LONGEST_BACKOFF, RETRIED, setting
from nanochat.data.shards import Entry

HUB = "https://huggingface.co"


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
        commit, files = _retrying()(_list, repo, folder, revision)
    except Exception as error:  # the client raises many kinds: no network, offline mode, no such repo, gated
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "check the network, or set HF_ENDPOINT to a mirror"
        if status in (401, 403, 404):
            hint = "check its name; for a private or gated data set log in with HF_TOKEN"
        elif os.environ.get("HF_HUB_OFFLINE"):
            hint = "HF_HUB_OFFLINE is set"
        raise RuntimeError(f"can't list the data set {repo} at {endpoint()}: {reason} ({hint})") from error
    entries = [Entry(local_name(f.path), f.size, _digest(f), f.path) for f in files if f.path.endswith(".parquet")]
    return commit, sorted(entries, key=lambda entry: entry.path or "")


def _list(repo: str, folder: str, revision: str | None) -> tuple[str, list[Any]]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=endpoint())
    timeout = setting("NANOCHAT_DOWNLOAD_TIMEOUT", 60)
    commit = api.dataset_info(repo, revision=revision, timeout=timeout).sha or revision or "main"
    tree = api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type="dataset")
    return commit, [item for item in tree if isinstance(item, RepoFile)]


def _retrying() -> Retrying:
    def temporary(error: BaseException) -> bool:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return status in RETRIED or (status is None and "Offline" not in type(error).__name__)

    first = setting("NANOCHAT_DOWNLOAD_BACKOFF", 1)
    return Retrying(
        stop=stop_after_attempt(int(setting("NANOCHAT_DOWNLOAD_ATTEMPTS", 5))),
        wait=wait_exponential(multiplier=first, max=LONGEST_BACKOFF) + wait_random(0, first),
        retry=retry_if_exception(temporary),
        reraise=True,
    )


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


def file_url(repo: str, path: str, revision: str) -> str:
    """Where one file of a data set is."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=endpoint())


def request_headers() -> dict[str, str]:
    """The headers of a request to the hub: the user's token, if there is one."""
    from huggingface_hub.utils import build_hf_headers

    return dict(build_hf_headers())
