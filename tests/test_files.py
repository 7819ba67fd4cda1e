"""Files appear whole or not at all."""

import contextlib
import errno
import signal
import sqlite3
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanochat.env import error_text, system_errno
from nanochat.files import ResumeLog, atomic_folder, atomic_path, sha256_file, write_json, write_text
from nanochat.pipeline.process import LineLog


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail():
        with atomic_path(target) as tmp:
            tmp.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "step"
    for content in ("one", "two"):
        with atomic_folder(target) as tmp:
            (tmp / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "step"
    with atomic_folder(target) as tmp:
        (tmp / "good").write_text("good")

    def fail():
        with atomic_folder(target) as tmp:
            (tmp / "bad").write_text("bad")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (target / "good").exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_hash_is_sha256(tmp_path):
    write_json(tmp_path / "x.json", {"ü": 1})
    write_text(tmp_path / "empty", "")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# --- a disk that takes no more ----------------------------------------------------------------------------------------


def raising(error):
    raise error


FULL_DISKS = {
    "Python's": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "Arrow's": OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device"),
    "safetensors'": Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    "tokenizers'": Exception("No space left on device (os error 28)"),
    "NumPy's": OSError("1048576 requested and 131072 written"),
    "PyTorch's": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "PyTorch's older": RuntimeError("write(): fd 3 failed with No space left on device"),
    "PyTorch's writer": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    "SQLite's": sqlite3.OperationalError("database or disk is full"),
    "a copy's": OSError(errno.ENOSPC, "No space left on device", "source.bin", None, "copy.bin"),
}


@pytest.mark.parametrize("error", FULL_DISKS.values(), ids=FULL_DISKS)
@pytest.mark.parametrize("write", [atomic_path, atomic_folder])
def test_a_full_disk_names_the_file_the_room_and_the_remedy_whoever_tells_it(tmp_path, error, write):
    with pytest.raises(OSError, match="model") as raised, write(tmp_path / "model"):
        raising(error)
    text = error_text(raised.value)
    assert str(tmp_path / "model'") in text
    assert text.endswith(": free some space, or name another place")
    assert ("it needs more than the" in text) == (raised.value.errno == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file system"
            ),
            30,
        ),
        (Exception("Error while serializing: I/O error: Permission denied (os error 13)"), 13),
        (OSError(errno.EMFILE, "Too many open files"), errno.EMFILE),
        (MemoryError(), errno.ENOMEM),
        (OSError(errno.EIO, "Input/output error"), None),
        (ValueError("its 3 rows differ"), None),
        (Exception("header too large (os error 9999)"), None),
    ],
)
def test_errors_of_the_system_are_told_from_damage(error, number):
    assert system_errno(error) == number


def test_too_little_room_is_refused_before_anything_is_written(tmp_path):
    for write in (atomic_path, atomic_folder):
        with (
            pytest.raises(RuntimeError, match=r"writing .*model needs 1000000000\.000 GB"),
            write(tmp_path / "model", 10**18),
        ):
            raise AssertionError("never comes here")
    with (
        pytest.raises(RuntimeError, match=f"writing {tmp_path}/page/model needs .* disk of {tmp_path} has"),
        atomic_folder(tmp_path / "page") as tmp,
        atomic_path(tmp / "model", 10**18),
    ):
        raise AssertionError("never comes here")
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(OSError, match="read-me") as raised, atomic_path(tmp_path / "model"):
        raise PermissionError(errno.EACCES, "Permission denied", "read-me")
    assert raised.value.filename == "read-me"


def test_lines_that_are_appended_name_their_file_too():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for write in (lambda log: log.add([{"a": 1}]), lambda log: LineLog.feed(log, b"a\n")):
        log = SimpleNamespace(path=Path("/dev/full"), rest=b"", file=open("/dev/full", "wb"))  # noqa: SIM115
        log.add, log._write = partial(ResumeLog.add, log), partial(LineLog._write, log)
        with pytest.raises(OSError, match="/dev/full") as raised:
            write(log)
        assert "free some space" in error_text(raised.value)
        with contextlib.suppress(OSError):
            log.file.close()


# --- what killed writers leave ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import nanochat.files as files
target, at = Path(sys.argv[1]), sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if at == "between the renames":
    replace = files.os.replace
    files.os.replace = lambda a, b: kill() if Path(b) == target else replace(a, b)
with files.atomic_folder(target) as tmp:
    (tmp / "new").write_text("new")
    if at == "while it writes":
        kill()
"""


def kill_writer(target, at):
    code = subprocess.run([sys.executable, "-c", KILLED, str(target), at], check=False).returncode
    assert code == -signal.SIGKILL


@pytest.mark.parametrize("at", ["while it writes", "between the renames"])
def test_a_killed_writer_costs_neither_the_old_folder_nor_room(tmp_path, at):
    target = tmp_path / "model"
    with atomic_folder(target) as tmp:
        (tmp / "old").write_text("old")
    kill_writer(target, at)
    assert len(list(tmp_path.iterdir())) == 2

    with pytest.raises(ValueError, match="no"), atomic_folder(target):  # it fails, too: the first is still there
        raise ValueError("no")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["model", "model/old"]


def test_leftovers_of_others_stay_outside_the_base_folder_and_go_within(tmp_path, monkeypatch):
    for name in (".model.0123abcd.tmp", ".import-1.0123abcd.tmp", ".import-2.0123abcd.old", ".other.tmp"):
        (tmp_path / name).mkdir()
    write_text(tmp_path / "model", "")
    there = [".import-1.0123abcd.tmp", ".import-2.0123abcd.old", ".other.tmp", "model"]
    assert sorted(p.name for p in tmp_path.iterdir()) == there
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    write_text(tmp_path / "model", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.tmp", "import-2", "model"]


def test_a_writer_at_work_keeps_its_temporary_files(tmp_path):
    with atomic_folder(tmp_path / "model") as tmp:
        (tmp / "a").write_text("a")
        subprocess.run(
            [sys.executable, "-c", f"from nanochat.files import write_text as w; w({str(tmp_path / 'model')!r}, '')"],
            check=False,
            stderr=subprocess.DEVNULL,
        )
        write_text(tmp_path / "other", "")
        assert (tmp / "a").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "other"]
