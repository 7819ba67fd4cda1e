"""Download files so that each appears under its name whole and right, or not at all.

The bytes go into a hidden file beside the target. When a connection breaks, the next attempt (or the next run, if the
content is pinned by a hash or an ETag) asks for the rest only. A finished file is compared with the size and hash that
its source states; only then it gets its name. Attempts that brought nothing new are counted and spaced by backoff with
jitter; a server's Retry-After is respected.

huggingface_hub's own download is not used: it compares sizes but no hashes, and not every source is the hub.

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
from typing import Any, TypeVar

import httpx
from filelock import FileLock

from nanochat.env import check_disk_space, get_base_dir, is_system_error, print0
from nanochat.files import fsync_folder, matches, naming
from nanochat.progress import Bar, format_seconds, progress

RETRIED = {408, 425, 429, 500, 502, 503, 504}  # statuses that may be different the next time
LONGEST_BACKOFF, LONGEST_RETRY_AFTER = 30.0, 300.0  # seconds
Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """A file to download."""

    url: str
    path: Path
    """The file it becomes."""
    size: int | None = None
    """Bytes, if the source states them."""
    digest: str | None = None
    """"sha256:<hex>" or "git:<hex>" (git's id of the content), if the source states it."""
    etag: str | None = None
    """Strong ETag, if known: it makes a partial file worth keeping where there is no digest."""
    headers: Mapping[str, str] = field(default_factory=dict)


class StoppedError(RuntimeError):
    """Another download failed for good or the user interrupted."""


def setting(name: str, default: float) -> float:
    """A number from the environment.

    Raises:
        ValueError: it is no number.
    """
    try:
        return float(os.environ.get(name) or default)
    except ValueError:
        raise ValueError(f"{name}={os.environ[name]} is not a number") from None


# --- trying again -----------------------------------------------------------------------------------------------------


def retry(
    attempt: Callable[[], Result],
    is_temporary: Callable[[Exception], bool],
    have: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> Result:
    """The result of `attempt`, called until it succeeds; its last error if it fails for good or too often in a row.

    Args:
        attempt: what to do.
        is_temporary: says of an error whether another attempt may help.
        have: how much is there already; a failure after which it is more than ever before does not count.
        stop: ends a pause when set.
    """
    attempts, first = setting("NANOCHAT_DOWNLOAD_ATTEMPTS", 5), setting("NANOCHAT_DOWNLOAD_BACKOFF", 1)
    failures, most = 0, have()
    while True:
        try:
            return attempt()
        except Exception as error:
            # A bad line that breaks every minute still brings a large file, as long as each attempt brings some of it.
            failures = 0 if have() > most else failures + 1
            most = max(most, have())
            if failures >= attempts or not is_temporary(error):
                raise
            # With jitter, or many clients of a server that was down would all come back in the same second.
            pause = min(LONGEST_BACKOFF, first * 2 ** max(0, failures - 1)) + random.uniform(0, first)
            (stop or threading.Event()).wait(max(pause, retry_after(error)))


def is_temporary(error: Exception) -> bool:
    """True if another attempt may bring what this one did not."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in RETRIED
    if isinstance(error, httpx.TransportError):
        return not isinstance(error, httpx.UnsupportedProtocol)
    # An OSError with a number is one of this machine's disk, unless it is a connection's.
    return isinstance(error, (ConnectionError, TimeoutError)) or (isinstance(error, OSError) and error.errno is None)


def retry_after(error: Exception) -> float:
    """Seconds that the server asked to wait (0 if it did not say).

    By `Retry-After`, in seconds or as a date (RFC 9110), or the hub's `RateLimit: "name";r=0;t=seconds`.
    """
    response = getattr(error, "response", None)
    if response is None:
        return 0.0
    headers, seconds = response.headers, 0.0
    value = headers.get("retry-after", "").strip()
    if value.isdigit():
        seconds = float(value)
    elif value:
        with contextlib.suppress(ValueError, TypeError):
            seconds = (parsedate_to_datetime(value) - datetime.now(timezone.utc)).total_seconds()
    elif response.status_code == 429 and (limit := re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))):
        seconds = float(limit[1])
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


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
        # The name of the partial file holds what it is a part of: bytes of two versions never meet in one file. Without
        # a hash or an ETag nothing says that a later run would ask for the same content; then the name is random.
        self.pinned = bool(file.digest or file.etag)
        version = f"{file.digest or file.url} {file.etag}" if self.pinned else os.urandom(8).hex()
        key = hashlib.sha256(version.encode()).hexdigest()[:8]
        self.part = file.path.with_name(f".{file.path.name}.{key}.part")

    def run(self) -> Path:
        """Download, check, give the file its name.

        Raises:
            httpx.HTTPError, OSError, ValueError: it can't be downloaded or is not what it should be.
            StoppedError: `stop` was set.
        """
        self.file.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            retry(self._attempt, is_temporary, self.have, self.stop)
        finally:
            if not self.pinned:
                self.part.unlink(missing_ok=True)
        return self.file.path

    def have(self) -> int:
        """Bytes that are there already."""
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> None:
        if self.file.size is None or self.have() != self.file.size:
            self._transfer()
        if not matches(self.part, self.file.size, self.file.digest):
            self._throw_away()
            raise OSError("the bytes that came are not those of the source (size or hash differ)")
        try:
            self.check(self.part)
        except ValueError:
            self._throw_away()
            raise
        with open(self.part, "rb+") as f:  # on the disk before it has its name, or a power cut could leave a hole
            os.fsync(f.fileno())
        os.replace(self.part, self.file.path)
        fsync_folder(self.file.path.parent)
        for other in self.file.path.parent.glob(f".{glob.escape(self.file.path.name)}.*.part"):
            other.unlink(missing_ok=True)  # parts of other versions

    def _throw_away(self) -> None:
        self.on_bytes(-self.have())
        self.part.unlink(missing_ok=True)

    def _transfer(self) -> None:
        """Get the bytes that are missing."""
        if self.stop.is_set():
            raise StoppedError("stopped")
        have = self.have()
        if (have and not (self.file.digest or self.etag)) or have > (self.file.size or have):
            self._throw_away()  # nothing says that the rest would belong to the same content
            have = 0
        headers = {**self.file.headers, "Accept-Encoding": "identity"}  # packed bytes could not be continued
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.etag and not self.file.digest:  # the whole file comes if it is another one by now
                headers["If-Range"] = self.etag
        timeout = setting("NANOCHAT_DOWNLOAD_TIMEOUT", 60)
        with httpx.stream("GET", self.file.url, headers=headers, follow_redirects=True, timeout=timeout) as response:
            if response.status_code == 416:  # the server's file is shorter than what is here
                self._throw_away()
                raise OSError("the partial file does not fit the server's")
            response.raise_for_status()
            continues = response.headers.get("content-range", "").startswith(f"bytes {have}-")
            if have and (response.status_code != 206 or not continues):
                self._throw_away()
                have = 0
                if response.status_code == 206:
                    raise OSError("the server sent another range than was asked for")
            self.etag = _strong_etag(response)
            self._write(response, have)

    def _write(self, response: httpx.Response, have: int) -> None:
        length = response.headers.get("content-length")
        total = have + int(length) if length and "content-encoding" not in response.headers else None
        if total is not None and self.file.size is not None and total != self.file.size:
            raise OSError(f"the server's file has {total} bytes, but {self.file.size} are stated")
        with naming(self.file.path), open(self.part, "ab" if have else "wb") as f:
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


def _strong_etag(response: httpx.Response) -> str | None:
    etag = response.headers.get("etag", "")
    return etag if etag and not etag.startswith("W/") else None  # a weak one allows other bytes of the same meaning


def probe(url: str) -> tuple[int | None, str | None]:
    """(size, strong ETag) of what is behind a URL, None where the server does not say."""
    try:
        timeout = setting("NANOCHAT_DOWNLOAD_TIMEOUT", 60)
        response = httpx.head(url, headers={"Accept-Encoding": "identity"}, follow_redirects=True, timeout=timeout)
        response.raise_for_status()
    except httpx.HTTPError:
        return None, None  # the download itself will say what is wrong
    length = response.headers.get("content-length")
    return int(length) if length else None, _strong_etag(response)


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
    stop = threading.Event()
    downloads = [Download(file, check=check, stop=stop) for file in files]
    total, partial = sum(file.size or 0 for file in files), sum(download.have() for download in downloads)
    folder = files[0].path.parent
    folder.mkdir(parents=True, exist_ok=True)
    check_disk_space(folder, total - partial, f"downloading {len(files)} files")
    failed: dict[str, Exception] = {}
    with progress(total or len(files), label) as bar, ThreadPoolExecutor(workers) as pool:
        meter = _Meter(bar, len(files), partial, counts_bytes=total > 0)
        for download in downloads:
            download.on_bytes = meter.add
        jobs = {pool.submit(download.run): download.file for download in downloads}
        try:
            for job in as_completed(jobs):
                error = job.exception()
                if error is None:
                    arrived(jobs[job])
                elif isinstance(error, Exception):
                    failed[jobs[job].path.name] = error
                meter.add(num_files=1)
        except BaseException:  # Ctrl-C too: the threads end at their next block, and keep what they have
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return failed


class _Meter:
    """Adds up what all threads bring and shows it, with speed."""

    def __init__(self, bar: Bar, total_files: int, num_bytes: int, counts_bytes: bool) -> None:
        self.bar, self.total_files, self.counts_bytes = bar, total_files, counts_bytes
        self.num_bytes, self.num_files, self.came = num_bytes, 0, 0
        self.start, self.lock = time.monotonic(), threading.Lock()

    def add(self, num_bytes: int = 0, num_files: int = 0) -> None:
        with self.lock:
            self.num_bytes += num_bytes
            self.num_files += num_files
            self.came += max(0, num_bytes)
            speed = self.came / max(time.monotonic() - self.start, 1e-9) / 1e6
            note = f"{self.num_files}/{self.total_files} files, {self.num_bytes / 1e6:,.0f} MB, {speed:,.1f} MB/s"
            self.bar.set(self.num_bytes if self.counts_bytes else self.num_files, note)


def download_file_with_lock(
    url: str, filename: str | Path, postprocess_fn: Callable[[Path], Any] | None = None
) -> Path:
    """Download `url` to `<base dir>/<filename>` once, however many processes ask; the file appears whole.

    Args:
        url: where it is.
        filename: its name under the base dir (or an absolute path).
        postprocess_fn: called with the path after a fresh download (to unpack it, say), under the same lock.

    Raises:
        RuntimeError: it can't be downloaded; names the URL and where to put the file by hand.
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
                Download(RemoteFile(url, path)).run()
            except (httpx.HTTPError, OSError, ValueError) as error:
                if is_system_error(error):  # the network is not to blame
                    raise
                raise RuntimeError(
                    f"could not download {url} ({error or type(error).__name__}). "
                    f"Check the network, or put the file at {path} yourself"
                ) from error
            seconds = format_seconds(time.monotonic() - start)
            print0(f"downloaded {path.stat().st_size / 1e6:,.1f} MB in {seconds}")
            if postprocess_fn is not None:
                postprocess_fn(path)
    return path
