"""Files that appear whole or not at all (write beside the target, fsync, rename, fsync the folder), and JSON lines."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanochat.env import FULL, check_disk_space, get_dist_info, in_base_dir, print0, system_errno

SEAL = "crc"  # of a record: the key of its checksum
_TEMPORARY = re.compile(r"\.([^/]+)\.[0-9a-f]{8}\.tmp(?=/)")
_LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(tmp|old)", re.DOTALL)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. Does nothing where folders can't be opened, as on Windows."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _fsync_file(path: Path) -> None:
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def atomic_path(path: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path in the same folder. On a clean exit it becomes `path`; on an error it is removed.

    What killed writers left is removed first, as in `atomic_folder`.

    Args:
        path: the file to write.
        needed_bytes: refuse before anything is written if the disk has less.

    Raises:
        OSError: of the system, in whatever form a library told it; names `path`.
        RuntimeError: the disk has less than `needed_bytes`.
    """
    path = Path(path)
    with _writing(path, needed_bytes):
        tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            yield tmp
            _fsync_file(tmp)  # the content first: after a power cut the name must not point to an empty file
            os.replace(tmp, path)
            fsync_folder(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`. On a clean exit its files are synced and it takes that name.

    An existing folder of the name is replaced: it is moved aside first, so that one of the two always exists. What
    killed writers left beside `folder` is removed first, and a folder whose replacement was cut short is put back.

    Args:
        folder: the folder to write.
        needed_bytes: refuse before anything is written if the disk has less.

    Raises:
        OSError: of the system, in whatever form a library told it; names `folder`.
        RuntimeError: the disk has less than `needed_bytes`.
    """
    folder = Path(folder)
    with _writing(folder, needed_bytes):
        tmp = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
        old = tmp.with_suffix(".old")
        tmp.mkdir()
        try:
            yield tmp
            for file in tmp.rglob("*"):
                if file.is_file():
                    _fsync_file(file)
            fsync_folder(tmp)
            if folder.exists():
                os.replace(folder, old)
            os.replace(tmp, folder)
            fsync_folder(folder.parent)
        finally:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            _remove(tmp)
            _remove(old)


@contextlib.contextmanager
def _writing(target: Path, needed_bytes: int) -> Iterator[None]:
    """Hold the lock of the folder that `target` is in, as one writer of many; the system's errors name `target`.

    Whoever gets that lock alone knows that all temporary names in the folder are those of killed writers. It is the
    folder itself that is locked: no file is left behind, and a killed process lets go.
    """
    with naming(target), contextlib.ExitStack() as stack:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError, ImportError):  # a system without such locks: nothing is removed either
            import fcntl  # lazy: Unix only

            fd = os.open(target.parent, os.O_RDONLY)
            stack.callback(os.close, fd)
            with contextlib.suppress(BlockingIOError):  # another writer is at work
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_leftovers(target)
            fcntl.flock(fd, fcntl.LOCK_SH)
        if needed_bytes:
            shown = Path(_TEMPORARY.sub(r"\1", str(target)))  # in a folder that has no name yet
            check_disk_space(next(p for p in shown.parents if p.exists()), needed_bytes, f"writing {shown}")
        yield


@contextlib.contextmanager
def naming(target: Path) -> Iterator[None]:
    """Let the system's errors name the file that is written, in whatever form a library told them."""
    try:
        yield
    except Exception as error:
        number = system_errno(error)
        if number is None or isinstance(error, MemoryError):
            raise
        named = getattr(error, "filename", None)
        if number not in FULL and named is not None and f".{target.name}." not in str(named):
            raise  # another file is meant, such as one that was read
        raise OSError(number, os.strerror(number), str(target)) from error


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of `target` left; in the base folder what those of its neighbours left, too."""
    ours = in_base_dir(target.parent)
    for path in list(target.parent.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or not (ours or found[1] == target.name):
            continue
        place = path.with_name(found[1])
        if found[2] == "old" and not place.exists():  # killed between the two renames
            os.replace(path, place)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as tmp:
        tmp.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8 with the newlines it has."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` to `path` atomically, as indented JSON."""
    write_text(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, sealed: `read_json` finds a later change."""
    write_json(path, seal(record, place_of(Path(path))))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its seal; empty when there is none, or it is broken or not as it was sealed.

    For what is never worth a crash. That a file was changed is said once.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None if path.is_file() else {}
    if not isinstance(value, dict) or not unseal(value, place_of(path)):
        _tell_damage(path)
        return {}
    return value


@functools.cache
def _tell_damage(path: Path) -> None:
    print0(f"warning: {path} is damaged or was edited, it is left out: run the stage that wrote it again")


def place_of(path: Path) -> str:
    """A file's name with its folder's, by which a record knows its place; a folder that was moved aside is the same."""
    return f"{path.parent.name.removesuffix('.old')}/{path.name}"


def seal(record: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The record and a checksum of its content and place, such as its file's name.

    It shows a change of a digit, which is no broken JSON, and files that have changed places.
    """
    return {**record, SEAL: _checksum(record, place)}


def unseal(record: dict[str, Any], place: str = "") -> bool:
    """Take the seal off; false if content or place are not what was sealed. A record without a seal is an older one."""
    found = record.pop(SEAL, None)
    return found is None or found == _checksum(record, place)


def _checksum(record: Mapping[str, Any], place: str) -> str:
    plain = json.loads(json.dumps(record))  # keys as they are read: a number has become a text
    return f"{zlib.crc32(json.dumps([place, plain], sort_keys=True).encode()):08x}"


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def matches(path: Path, size: int | None, digest: str | None) -> bool:
    """True if a file has the size, and the digest "sha256:<hex>" or "git:<hex>", that are stated (None: anything)."""
    if size is not None and path.stat().st_size != size:
        return False
    kind, _, expected = (digest or "").partition(":")
    if kind == "git":  # what git hashes is the content behind a header
        found = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    elif kind in ("sha256", ""):
        found = hashlib.sha256()
    else:
        raise ValueError(f"unknown kind of digest {kind!r}")
    with open(path, "rb") as f:
        while digest and (block := f.read(1 << 20)):
            found.update(block)
    return not digest or found.hexdigest() == expected


def json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line of a .jsonl or .jsonl.gz file that is not blank.

    Raises:
        ValueError: a line is not JSON, or not UTF-8; names file and line.
    """
    path = Path(path)
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error}): save the file as UTF-8") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
            yield number, value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file; ValueError names file and line of what is none."""
    rows: list[dict[str, Any]] = []
    for number, row in json_lines(path):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class ResumeLog:
    """A folder with the results that an interrupted run has already computed.

    Every rank appends to a file of its own and reads those of all, so the number of ranks may change in between.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` must belong to these settings: its records are taken for results of this run."""
        folder.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        """Results of earlier runs."""
        for path in sorted(folder.glob("rank*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):  # a kill may have cut a line short
                    record = json.loads(line)
                    if isinstance(record, dict) and unseal(record):  # else it is computed again
                        self.records.append(record)
        self.path = folder / f"rank{get_dist_info()[1]}.jsonl"

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append results."""
        with naming(self.path), open(self.path, "a", encoding="utf-8") as f:
            # The newline comes first: it ends a line that a kill has cut short. ASCII, so that no letter can be cut.
            f.write("".join("\n" + json.dumps(seal(record)) for record in records))
