"""Download files so that each appears under its name whole and right, or not at all.

The bytes go into a hidden file beside the target. When a connection breaks, the next attempt (or the next run, if the
content is pinned by a hash or an ETag) asks for the rest only. A finished file is compared with the size and hash that
its source states; only then it gets its name. Attempts that brought nothing new are counted and spaced by backoff with
jitter; a server's Retry-After is respected.

Environment: NANOCHAT_DOWNLOAD_ATTEMPTS (in a row without a new byte), NANOCHAT_DOWNLOAD_TIMEOUT (seconds to wait for a
connection or for the next bytes), NANOCHAT_DOWNLOAD_BACKOFF (seconds before the second attempt).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock
from tenacity import RetryCallState, Retrying, sleep_using_event

from nanochat.env import check_disk_space, get_base_dir, print0
from nanochat.files import fsync_folder
from nanochat.progress import format_seconds, progress

RETRIED = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be different the next time
LONGEST_BACKOFF, LONGEST_RETRY_AFTER = 30.0, 300.0  # seconds
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file to download."""

    url: str
    path: Path
    """Where it goes."""
    size: int | None = None
    """Bytes, if the source states them."""
    digest: str | None = None
    """"sha256:<hex>" or "git:<hex>" (git's id of the content), if the source states it."""
    etag: str | None = None
    """Strong ETag, if known: it makes a partial file worth keeping where there is no digest."""
    headers: Mapping[str, str] = field(default_factory=dict)


class StoppedError(RuntimeError):
    """Another download failed for good or the user interrupted."""


def file_digest(path: Path, kind: str) -> str:
    """The "sha256" or the "git" digest of a file, in hex."""
    if kind == "sha256":
        digest = hashlib.sha256()
    elif kind == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        raise ValueError(f"unknown kind of digest {kind!r}")
    with open(path, "rb") as f:
        while block := f.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def matches(path: Path, size: int | None, digest: str | None) -> bool:
    """Whether a file has the size and digest that are stated (None: anything)."""
    if size is not None and path.stat().st_size != size:
        return False
    kind, _, expected = (digest or "").partition(":")
    return not digest or file_digest(path, kind) == expected


def setting(name: str, default: float) -> float:
    """A number from the environment.

    Raises:
        ValueError: it is no number.
    """
    try:
        return float(os.environ.get(name) or default)
    except ValueError:
        raise ValueError(f"{name}={os.environ[name]} is not a number") from None


# --- one file ---------------------------------------------------------------------------------------------------------


class Download:
    """One file on its way.

    Args:
        file: what and where to.
        on_bytes: told how many bytes came (negative: how many were thrown away, of an earlier run's too).
        check: called with the finished but still hidden file; may raise ValueError.
        stop: ends the download when set.
    """

    def __init__(
        self,
        file: RemoteFile,
        on_bytes: Callable[[int], None] = lambda n: None,
        check: Callable[[Path], None] = lambda path: None,
        stop: threading.Event | None = None,
    ) -> None:
        self.file, self.on_bytes, self.check = file, on_bytes, check
        self.stop = stop or threading.Event()
        self.etag = file.etag
        self.pinned = bool(file.digest or file.etag)  # a later run may go on with the partial file
        version = f"{file.digest or file.url} {file.etag}" if self.pinned else os.urandom(8).hex()
        key = hashlib.sha256(version.encode()).hexdigest()[:8]
        self.part = file.path.with_name(f".{file.path.name}.{key}.part")
        self.most = self._have()
        self.failures = 0  # attempts in a row after which not more was there than ever before

    def run(self) -> Path:
        """Download, check, give the file its name.

        Raises:
            httpx.HTTPError, OSError, ValueError: it could not be had or is not what it should be.
            StoppedError: `stop` was set.
        """
        self.file.path.parent.mkdir(parents=True, exist_ok=True)
        attempts = setting("NANOCHAT_DOWNLOAD_ATTEMPTS", 5)
        retrying = Retrying(
            stop=lambda _: self.failures >= attempts,
            wait=self._pause,
            retry=lambda state: state.outcome is not None and is_temporary(state.outcome.exception()),
            sleep=sleep_using_event(self.stop),
            reraise=True,
        )
        try:
            retrying(self._attempt)
        finally:
            if not self.pinned:
                self.part.unlink(missing_ok=True)
        return self.file.path

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _pause(self, state: RetryCallState) -> float:
        first = setting("NANOCHAT_DOWNLOAD_BACKOFF", 1)
        backoff = min(LONGEST_BACKOFF, first * 2 ** max(0, self.failures - 1)) + random.uniform(0, first)
        return max(backoff, retry_after(state.outcome.exception() if state.outcome else None))

    def _attempt(self) -> None:
        try:
            if self.file.size is None or self._have() != self.file.size:
                self._transfer()
            if not matches(self.part, self.file.size, self.file.digest):
                self._throw_away()
                raise OSError("the bytes that came are not those of the source (size or hash differ)")
        except BaseException:
            self.failures = 0 if self._have() > self.most else self.failures + 1
            self.most = max(self.most, self._have())
            raise
        try:
            self.check(self.part)
        except ValueError:
            self._throw_away()
            raise
        with open(self.part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(self.part, self.file.path)
        fsync_folder(self.file.path.parent)
        for other in self.file.path.parent.glob(f".{glob.escape(self.file.path.name)}.*.part"):
            other.unlink(missing_ok=True)  # parts of other versions

    def _throw_away(self) -> None:
        self.on_bytes(-self._have())
        self.part.unlink(missing_ok=True)

    def _transfer(self) -> None:
        """Get the bytes that are missing."""
        if self.stop.is_set():
            raise StoppedError("stopped")
        have = self._have()
        if (have and not (self.file.digest or self.etag)) or have > (self.file.size or have):
            self._throw_away()  # nothing says that the rest would belong to the same content
            have = 0
        headers = {**self.file.headers, "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.etag and not self.file.digest:
                headers["If-Range"] = self.etag
        timeout = setting("NANOCHAT_DOWNLOAD_TIMEOUT", 60)
        with httpx.stream("GET", self.file.url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            if response.status_code == 416:  # the server's file is shorter than what is here
                self._throw_away()
                raise OSError("the partial file does not fit the server's")
            response.raise_for_status()
            if have and (response.status_code != 206 or not _continues(response, have)):
                self._throw_away()
                have = 0
                if response.status_code == 206:
                    raise OSError("the server sent another range than was asked for")
            etag = response.headers.get("etag", "")
            self.etag = etag if etag and not etag.startswith("W/") else None
            self._write(response, have)

    def _write(self, response: httpx.Response, have: int) -> None:
        length = response.headers.get("content-length")
        total = have + int(length) if length and "content-encoding" not in response.headers else None
        if total is not None and self.file.size is not None and total != self.file.size:
            raise OSError(f"the server's file has {total} bytes, but {self.file.size} are stated")
        with open(self.part, "ab" if have else "wb") as f:
            for block in response.iter_bytes():
                f.write(block)
                have += len(block)
                self.on_bytes(len(block))
                if self.stop.is_set():
                    raise StoppedError("stopped")
                if have > (self.file.size or have):
                    raise OSError(f"the server sends more than the {self.file.size} bytes that are stated")
        if total is not None and have != total:
            raise OSError(f"got {have} of {total} bytes")


def _continues(response: httpx.Response, have: int) -> bool:
    return bool(response.headers.get("content-range", "").startswith(f"bytes {have}-"))


def is_temporary(error: BaseException | None) -> bool:
    """Whether another attempt may bring what this one did not."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in RETRIED
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, (ConnectionError, TimeoutError))
    ):
        return False  # of this machine's disk
    if isinstance(error, httpx.UnsupportedProtocol):
        return False
    return isinstance(error, (httpx.TransportError, OSError))


def retry_after(error: BaseException | None) -> float:
    """Seconds that the server asked to wait (0 if it did not say).

    By `Retry-After`, in seconds or as a date (RFC 9110), or the hub's `RateLimit: "name";r=0;t=seconds`.
    """
    if not isinstance(error, httpx.HTTPStatusError):
        return 0.0
    headers, seconds = error.response.headers, 0.0
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        seconds = float(value)
    elif value:
        with contextlib.suppress(ValueError, TypeError):
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
    elif error.response.status_code == 429 and (limit := re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))):
        seconds = float(limit[1])
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


# --- many files, or one by several processes --------------------------------------------------------------------------


def download_all(
    files: Sequence[RemoteFile],
    label: str,
    workers: int = 4,
    check: Callable[[Path], None] = lambda path: None,
    arrived: Callable[[RemoteFile], None] = lambda file: None,
) -> dict[str, Exception]:
    """Download files in this order, `workers` at a time, with one progress bar; returns the failures by file name.

    Raises:
        RuntimeError: the disk is too small.
    """
    if not files:
        return {}
    total = sum(file.size or 0 for file in files)
    partial = sum(download.part.stat().st_size for download in map(Download, files) if download.part.exists())
    folder = files[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    check_disk_space(folder, total - partial, f"downloading {len(files)} files")
    failed: dict[str, Exception] = {}
    stop, lock = threading.Event(), threading.Lock()
    with progress(total or len(files), label) as bar, ThreadPoolExecutor(workers) as pool:
        meter = _Meter(bar.set, len(files), partial, counts_bytes=total > 0, lock=lock)
        jobs = {pool.submit(Download(file, meter.add, check, stop).run): file for file in files}
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if error is None:
                    arrived(jobs[job])
                elif isinstance(error, Exception):
                    failed[jobs[job].path.name] = error
                meter.finish()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


class _Meter:
    """Adds up what all threads bring and shows it, with speed."""

    def __init__(
        self,
        show: Callable[[float, str], None],
        num_files: int,
        num_bytes: int,
        counts_bytes: bool,
        lock: threading.Lock,
    ) -> None:
        self.show, self.num_files, self.counts_bytes, self.lock = show, num_files, counts_bytes, lock
        self.num_bytes, self.finished, self.came = num_bytes, 0, 0
        self.start = time.monotonic()

    def add(self, num_bytes: int) -> None:
        with self.lock:
            self.num_bytes += num_bytes
            self.came += max(0, num_bytes)
            self._show()

    def finish(self) -> None:
        with self.lock:
            self.finished += 1
            self._show()

    def _show(self) -> None:
        speed = self.came / max(time.monotonic() - self.start, 1e-9) / 1e6
        note = f"{self.finished}/{self.num_files} files, {self.num_bytes / 1e6:,.0f} MB, {speed:,.1f} MB/s"
        self.show(self.num_bytes if self.counts_bytes else self.finished, note)


def failures_text(failed: Mapping[str, Exception]) -> str:
    """ "a.parquet, b.parquet. First error: ..." """
    first = min(failed)
    return f"{', '.join(sorted(failed))}. First error ({first}): {failed[first] or type(failed[first]).__name__}"


def probe(url: str, headers: Mapping[str, str] | None = None) -> tuple[int | None, str | None]:
    """(size, strong ETag) of what is behind a URL, None where the server does not say."""
    try:
        asked = {**(headers or {}), "Accept-Encoding": "identity"}
        timeout = setting("NANOCHAT_DOWNLOAD_TIMEOUT", 60)
        response = httpx.head(url, headers=asked, follow_redirects=True, timeout=timeout)
        response.raise_for_status()
    except httpx.HTTPError:
        return None, None  # the download itself will say what is wrong
    length, etag = response.headers.get("content-length"), response.headers.get("etag", "")
    return int(length) if length else None, etag if etag and not etag.startswith("W/") else None


def download_file_with_lock(
    url: str, filename: str | Path, postprocess_fn: Callable[[Path], Any] | None = None, digest: str | None = None
) -> Path:
    """Download `url` to `<base dir>/<filename>` once, however many processes ask; the file appears whole.

    Args:
        url: where it is.
        filename: its name under the base dir (or an absolute path).
        postprocess_fn: called with the path after a fresh download (to unpack it, say), under the same lock.
        digest: "sha256:<hex>" that the content must have.

    Raises:
        RuntimeError: the file could not be had; the message names the URL and where to put the file by hand.
    """
    path = get_base_dir() / filename
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(path) + ".lock"):
        if not path.exists():
            print0(f"downloading {url}")
            start = time.monotonic()
            try:
                Download(RemoteFile(url, path, digest=digest)).run()
            except (httpx.HTTPError, OSError, ValueError) as error:
                raise RuntimeError(
                    f"could not download {url} ({error or type(error).__name__}). "
                    f"Check the network, or put the file at {path} yourself"
                ) from error
            seconds = format_seconds(time.monotonic() - start)
            print0(f"downloaded {path.stat().st_size / 1e6:,.1f} MB in {seconds}")
            if postprocess_fn is not None:
                postprocess_fn(path)
    return path
