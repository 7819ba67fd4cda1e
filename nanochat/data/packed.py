"""Packed files, unpacked as they are read: one stream (.gz .zst .xz .bz2), or an archive of files (.zip .tar)."""

from __future__ import annotations

import contextlib
import io
import lzma
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", *(f".tar{suffix}" for suffix in COMPRESSIONS))
_ALIASES = {".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz"}
# `zstd --long=31` makes a window of 2 GiB, 2^31 bytes: what unpacks it must be told that it may be so large.
WINDOW_LOG_MAX = 31
LINK_INSIDE = (
    "a link in an archive, not followed (what it leads to is read if it lies in the archive under its own name)"
)
MOST_NESTED = 4  # archives in archives
IN_MEMORY_BYTES = 64_000_000  # of an archive in an archive; a larger one is copied into a file
DAMAGED = (
    *(pa.ArrowException, zlib.error, lzma.LZMAError, zstd.ZstdError, EOFError),
    *(zipfile.BadZipFile, tarfile.TarError, NotImplementedError),
)


# The first bytes of files that are no text, whatever their names say.
CONTENTS = {
    b"%PDF-": "a PDF",
    b"PK\x03\x04": "a .docx, .epub, .odt, .xlsx or .zip",
    b"\x1f\x8b\x08": "a .gz",
    b"\x28\xb5\x2f\xfd": "a .zst",
    b"\xfd7zXZ": "an .xz",
    b"BZh91AY": "a .bz2",
    b"Rar!": "a .rar",
    b"7z\xbc\xaf": "a .7z",
    b"PAR1": "a .parquet",
    b"\xd0\xcf\x11\xe0": "an old .doc or .xls, which must be saved as .docx or .csv,",
    b"{\\rtf": "an .rtf",
}


class PackedFileError(ValueError):
    """A packed file that is damaged, cut off, or protected by a password; the message names it."""


def what_it_is(head: bytes) -> str:
    """What a file is by its first bytes, where it is a document, an archive or a table and no text; else empty."""
    return next((what for mark, what in CONTENTS.items() if head.startswith(mark)), "")


def compression_of(name: str) -> str:
    """The suffix that says how a file is packed, in lower case; empty if it is not, or if it is an archive."""
    lower = name.lower()
    return next((s for s in COMPRESSIONS if lower.endswith(s)), "") if not is_archive(name) else ""


def is_archive(name: str) -> bool:
    """True if a name says that the file holds other files."""
    return name.lower().endswith(ARCHIVES)


class Unseekable(io.RawIOBase):
    """A stream that is only read forwards, as one for io.BufferedReader."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` as far as one read of the stream goes; returns the number of bytes, 0 at the end."""
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def unpacked(raw: IO[bytes], suffix: str) -> IO[bytes]:
    """The content of a stream that is packed as `suffix` says ("" for not at all)."""
    kind: Any = _ALIASES.get(suffix, suffix)
    if kind == ".zst":
        options = {int(zstd.DecompressionParameter.window_log_max): WINDOW_LOG_MAX}
        return zstd.ZstdFile(raw, options=options)  # type: ignore[return-value]
    if kind == ".xz":
        return lzma.LZMAFile(raw)
    if kind in (".gz", ".bz2"):  # Arrow is several times as fast as gzip in Python
        return pa.CompressedInputStream(raw, "gzip" if kind == ".gz" else "bz2")
    return raw


@contextlib.contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Turn the errors of unpacking into one that names the file.

    Raises:
        PackedFileError: it is damaged, cut off or protected.
    """
    try:
        yield
    except DAMAGED as error:
        raise PackedFileError(f"{path} can't be unpacked ({error}): it is damaged or cut off, get it again") from error
    except OSError as error:
        if error.errno is not None:  # without a number it is how Arrow says that the stream is cut off
            raise
        raise PackedFileError(f"{path} can't be unpacked ({error}): it is damaged or cut off, get it again") from error
    except RuntimeError as error:
        if "password" not in str(error):
            raise
        raise PackedFileError(f"{path} is protected by a password: unpack it yourself") from error


def members(path: str | Path) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    """(name, bytes, content) of each file of an archive, in its order, and of the archives in it ("inner.zip/a.txt").

    Read a content before you take the next one; a link has none. Archives more than MOST_NESTED deep count as files.
    """
    with damage_named(path), open(path, "rb") as raw:
        yield from _members(str(path), raw, MOST_NESTED)


def _members(name: str, raw: IO[bytes], deeper: int) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    for inner, size, content in _flat_members(name, raw):
        if content is None or not is_archive(inner) or not deeper:
            yield inner, size, content
            continue
        with tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES) as copy, damage_named(f"{name}, {inner}"):
            shutil.copyfileobj(content, copy)  # whose end a .zip must find
            copy.seek(0)
            for below, bytes_below, content_below in _members(inner, copy, deeper - 1):
                yield f"{inner}/{below}", bytes_below, content_below


def _flat_members(name: str, raw: IO[bytes]) -> Iterator[tuple[str, int, IO[bytes] | None]]:
    lower = name.lower()
    if lower.endswith(".zip"):
        with zipfile.ZipFile(raw) as archive:
            for info in archive.infolist():
                if stat.S_ISLNK(info.external_attr >> 16):
                    yield info.filename, info.file_size, None
                elif not info.is_dir():
                    with archive.open(info) as content:
                        yield info.filename, info.file_size, content
        return
    suffix = next((s for s in (*_ALIASES, *COMPRESSIONS) if lower.endswith(s)), "")
    if raw.read(512)[257:262] == b"ustar":  # a browser may have unpacked it, and left its name
        suffix = ""
    raw.seek(0)
    with tarfile.open(fileobj=unpacked(raw, suffix), mode="r|") as tar:
        for member in tar:
            extracted = tar.extractfile(member) if member.isfile() else None
            if member.issym() or member.islnk():
                yield member.name, 0, None
            elif extracted is not None:
                # Its own stream says that it can go back, and fails where it does.
                yield member.name, member.size, io.BufferedReader(Unseekable(extracted))
