"""Runs programs that a model wrote, shut off from the machine, and says whether they did what they should.

The tested code runs in one process, the worker; the tests and their verdict live in another, the judge, and only plain
values (numbers, texts, containers of them) cross between the two. No exit code, printed word, patched built-in or
clever `__eq__` on the tested side can pass a test; it can only give the right answers.

Every program gets a fresh isolated interpreter in its own session, an empty environment and keyring, a temporary
folder, no standard input, limits on time, memory, files and output, and no privileges. What holds it:

- Namespaces (nanochat/sandbox/isolation.py): no network, none of the user's files, no sight of other processes.
- Landlock and a system call filter (nanochat/sandbox/fence.py), which need no privileges: no file but its folder and
  the interpreter's, no sockets, no new processes, no signals, no keys. A tested function may start threads.
- Python's audit hooks: a fence for where the kernel offers less, and between a program and its harness.

With the first two isolation is called strong; else it is weak, and a model's code runs only if that is allowed.
`isolation()` tries them once and tells which ones hold.

What remains: the kernel itself can be attacked through the system calls that are left, the interpreter and the system's
libraries can be read, without namespaces also names, sizes and times of files. A program that corrupts its own
interpreter could find what `execute_code` waits to hear; what `check_function` waits for it would have to compute.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.sandbox.isolation import FOLDER_BYTES, FOLDER_ENTRIES

CHILD = Path(__file__).with_name("sandbox") / "child.py"
MAX_OUTPUT_BYTES = 64 << 10  # of each stream; what follows is read and thrown away
POLL_SECONDS = 0.02
PROBE_SECONDS = 20.0
MEMORY_BYTES = 256 << 20


class IsolationError(RuntimeError):
    """Programs can't be shut off from this machine, and it was not agreed to run them nevertheless."""


@dataclass(frozen=True)
class Isolation:
    """What shuts programs off on this machine."""

    strong: bool
    """Namespaces and a system call filter: the kernel hides files, processes and the network."""
    reason: str = ""
    """Why it is not strong."""
    fences: tuple[str, ...] = ()
    """Of nanochat/sandbox/fence.py those that were tried and hold: "files" (Landlock) and "calls" (seccomp)."""
    user: str = ""
    """The user that programs run as."""

    def __str__(self) -> str:
        walls = "process, network and mount namespaces of its own (no network, no files of yours)"
        files = "Landlock opens only the program's own folder and the interpreter's files"
        calls = "a system call filter refuses sockets, processes, signals, keys and shared memory"
        else_ = "" if self.strong else ", where only Python's audit hooks hold programs back"
        parts = [
            f"strong: {walls}" if self.strong else f"weak: no namespaces ({self.reason})",
            files if "files" in self.fences else f"no Landlock for files{else_}",
            calls if "calls" in self.fences else f"no filter for network and processes{else_}",
            f"programs run as {self.user or 'the same user'} without privileges",
            "time, memory, files and output are limited",
        ]
        return "; ".join(parts)


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended."""

    success: bool
    """It ran to its last line, or its function passed the tests."""
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    """Why it failed; None on success."""
    timeout: bool = False
    memory_exceeded: bool = False


@functools.cache
def isolation() -> Isolation:
    """Try out what this machine's kernel allows (once per process)."""
    reason = f"{sys.platform} has none"
    for namespaces in (True, False) if sys.platform == "linux" else (False,):
        with _Session(PROBE_SECONDS, namespaces) as session:
            session.start("probe", {})
            session.collect()
            if report := session.text("report"):
                facts = json.loads(report)
                fences, user = tuple(facts["fences"]), facts["user"]
                if not namespaces or "calls" in fences:
                    return Isolation(namespaces, "" if namespaces else reason, fences, _user_name(user))
                reason = "the kernel has no system call filter"
            else:
                lines = session.text("probe stderr").strip().splitlines()
                reason = lines[-1] if lines else "the kernel gave no answer"
    return Isolation(False, reason)


def _user_name(user: int) -> str:
    try:
        import pwd  # lazy: Unix only

        name = pwd.getpwuid(user).pw_name
    except (ImportError, KeyError):
        name = f"user {user}"
    return f"{name} of this machine, since no other user could read this Python," if user == 0 else name


def require_isolation(allow_weak: bool) -> Isolation:
    """What isolation there is. Raises IsolationError when it is weak and that is not allowed."""
    found = isolation()
    if not found.strong and not allow_weak:
        raise IsolationError(
            f"running a model's code is not safe on this machine, isolation is {found}. "
            "Allow it with --allow_weak_isolation, best in a container or a user account of its own"
        )
    return found


def execute_code(
    code: str,
    timeout: float = 5.0,
    memory_limit_bytes: int | None = MEMORY_BYTES,
    *,
    allow_weak_isolation: bool = True,
    audit: bool = True,
) -> ExecutionResult:
    """Run `code` as a program and say whether it reached its end without an error.

    Behind its last line a function is defined, by code that the program does not see; the judge in another process
    calls it and knows what it must return. A program that leaves early, in whatever way, has nothing to return.

    Args:
        code: Python source; it may import the standard library only.
        timeout: seconds of wall-clock time; then it is killed with all processes it has started.
        memory_limit_bytes: of address space, interpreter included; None: no limit.
        allow_weak_isolation: run it also where the kernel offers no namespaces.
        audit: also refuse by Python's audit hooks; off to test that the kernel's walls hold alone.

    Raises:
        ValueError: a limit is not positive.
        IsolationError: isolation is weak and that is not allowed.
    """
    name, answer = "reached_the_end", secrets.token_hex(16)
    end = f"def {name}(): return {answer!r}"
    worker = {"source": code, "name": "__main__", "end": end, "is_function": False, "audit": audit}
    judge = {"setup": "", "tests": f"assert {name}() == {answer!r}"}
    return _judged(name, worker, judge, timeout, memory_limit_bytes, allow_weak_isolation)


def check_function(
    solution: str,
    entry_point: str,
    tests: str,
    setup: str = "",
    timeout: float = 10.0,
    *,
    allow_weak_isolation: bool = False,
) -> ExecutionResult:
    """Run `tests` against the function `entry_point` that `solution` defines; the two never share a process.

    Args:
        solution: untrusted source that defines the function.
        entry_point: the function's name. The tests call it by this name; arguments and results are copies.
        tests: trusted source; passed when it reaches its end without an error.
        setup: trusted source run before the tests, such as helper functions.
        timeout: seconds of wall-clock time for all of it.
        allow_weak_isolation: run it also where the kernel offers no namespaces.

    Raises:
        ValueError: the timeout is not positive.
        IsolationError: isolation is weak and that is not allowed.
    """
    # Not __main__: what a solution does when it is run as a script is not what is asked for.
    worker = {"source": solution, "name": "solution", "end": "", "is_function": True, "audit": True}
    judge = {"setup": setup, "tests": tests}
    return _judged(entry_point, worker, judge, timeout, MEMORY_BYTES, allow_weak_isolation)


def _judged(
    entry_point: str,
    worker: dict[str, Any],
    judge: dict[str, Any],
    timeout: float,
    memory_bytes: int | None,
    allow_weak: bool,
) -> ExecutionResult:
    """Let the judge's process test what the worker's process defines; only the judge reports."""
    if not timeout > 0 or (memory_bytes is not None and memory_bytes <= 0):
        raise ValueError(f"limits must be positive, got timeout {timeout} and memory {memory_bytes}")
    # A lone surrogate can't be sent.
    worker["source"] = worker["source"].encode("utf-8", errors="replace").decode("utf-8")
    with _Session(timeout, require_isolation(allow_weak).strong, memory_bytes) as session:
        calls_read, calls_write = session.pipe()
        answers_read, answers_write = session.pipe()
        session.start("worker", worker | {"entry_point": entry_point, "read_fd": calls_read, "write_fd": answers_write})
        session.start("judge", judge | {"entry_point": entry_point, "read_fd": answers_read, "write_fd": calls_write})
        session.collect()
        return session.result()


class _Session:
    """The processes of one run: started, read from, and killed together."""

    def __init__(self, timeout: float, namespaces: bool, memory_bytes: int | None = None) -> None:
        self.timeout, self.namespaces, self.memory_bytes = timeout, namespaces, memory_bytes
        self.deadline = time.monotonic() + timeout
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.output: dict[str, bytearray] = {}
        self.timed_out = self.overfull = False
        self._readable: dict[str, int] = {}  # descriptors by the name of what they say
        self._for_children: list[int] = []
        self._homes: dict[str, int | None] = {}  # with the descriptor that holds the folder's lock

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            # The group outlives its leader when the program left processes behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for fd in [*self._readable.values(), *self._for_children]:
            os.close(fd)
        for home, lock in self._homes.items():
            _remove_tree(home)
            if lock is not None:
                os.close(lock)

    def pipe(self) -> tuple[int, int]:
        """Return (read end, write end) of a pipe between children."""
        ends = os.pipe()
        self._for_children += ends
        return ends

    def start(self, part: str, settings: dict[str, Any]) -> None:
        """Start a process that plays `part`, with only the descriptors it is told of."""
        _sweep(tempfile.gettempdir())
        made = tempfile.mkdtemp(prefix=".nanochat-new-")
        lock = _lock(made)
        home = os.path.join(os.path.dirname(made), os.path.basename(made).replace(".nanochat-new-", "nanochat-run-"))
        os.rename(made, home)  # a folder with this name and without a lock is nobody's
        self._homes[home] = lock
        if not self.namespaces:
            os.chmod(home, 0o777)  # the process may not be of this user
        settings = settings | {"part": part, "namespaces": self.namespaces, "parent": os.getpid()}
        settings["limits"] = [self.memory_bytes or -1, math.ceil(self.timeout) + 1]
        if part != "worker":  # what is tested has no word in the verdict
            self._readable["report"], settings["report_fd"] = self.pipe()
            self._for_children.remove(self._readable["report"])
        given = [value for name, value in settings.items() if name.endswith("_fd")]
        with tempfile.TemporaryFile() as f:
            f.write(json.dumps(settings).encode())
            f.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(CHILD), str(f.fileno())],
                cwd=home,
                env=_environment(home),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(*given, f.fileno()),
                start_new_session=True,
            )
        self.processes[part] = process
        assert process.stdout is not None
        assert process.stderr is not None
        for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
            self._readable[f"{part} {name}"] = os.dup(stream.fileno())
            stream.close()
        for fd in given:  # else the end of a process would not end its pipes
            os.close(fd)
            self._for_children.remove(fd)

    def collect(self) -> None:
        """Read until all processes end or a limit is reached; keep the first MAX_OUTPUT_BYTES of each stream."""
        self.output = {name: bytearray() for name in self._readable}
        with selectors.DefaultSelector() as selector:
            for name, fd in self._readable.items():
                os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ, name)
            ended = False
            while True:
                # A process left behind may hold the pipes open: the end of the process counts, not that of the pipes.
                events = selector.select(0 if ended else POLL_SECONDS) if selector.get_map() else []
                if not selector.get_map() and not ended:
                    time.sleep(POLL_SECONDS / 10)
                for key, _ in events:
                    block = os.read(key.fd, 65536)
                    if not block:
                        selector.unregister(key.fd)
                    kept = self.output[key.data]
                    kept += block[: MAX_OUTPUT_BYTES - len(kept)]
                late = not ended and time.monotonic() > self.deadline
                # In namespaces the kernel limits a folder's size.
                self.overfull = not self.namespaces and any(map(_is_overfull, self._homes))
                if late or self.overfull or (ended and not events):
                    self.timed_out = late and self.text("report") != "passed"
                    return
                ended = all(process.poll() is not None for process in self.processes.values())

    def text(self, name: str) -> str:
        """Return what was read from a stream."""
        return self.output[name].decode("utf-8", errors="replace")

    def result(self) -> ExecutionResult:
        """Return what the worker printed, and success when the judge reported it in time."""
        report, error = self.text("report"), None
        if self.timed_out:
            error = f"not finished after {self.timeout:g} seconds"
        elif self.overfull:
            error = f"the program wrote more than {FOLDER_BYTES >> 20} MB or {FOLDER_ENTRIES} files"
        elif report == "memory":
            error = "MemoryError: the program needs more memory than it may have"
        elif report != "passed":
            ended = f"the process ended before its end (exit code {self.processes['worker'].poll()})"
            error = (report.removeprefix("error ") if report.startswith("error ") else "") or ended
        return ExecutionResult(
            error is None,
            self.text("worker stdout"),
            self.text("worker stderr"),
            error,
            self.timed_out,
            report == "memory" and not self.timed_out,
        )


def _lock(folder: str) -> int | None:
    """A descriptor that holds the lock of a folder while this process lives; None if another has it."""
    with contextlib.suppress(ImportError):
        import fcntl  # lazy: Unix only

        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
        else:
            return fd
    return None


@functools.cache
def _sweep(folder: str) -> None:
    """Remove the folders of programs that killed processes of this user left (once per process)."""
    for home in (*Path(folder).glob("nanochat-run-*"), *Path(folder).glob(".nanochat-new-*")):
        with contextlib.suppress(OSError):  # gone in the meantime, another user's, or no folder
            if home.name.startswith(".") and time.time() - home.lstat().st_mtime < 3600:
                continue  # another process may be about to lock it
            if (lock := _lock(str(home))) is not None:
                if home.lstat().st_uid == os.getuid():
                    _remove_tree(str(home))
                os.close(lock)


def _is_overfull(home: str) -> bool:
    """Tell if a folder holds more than a program may write, or is nested too deeply to look."""
    size, entries, waiting = 0, 0, [home]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    size += 512 * entry.stat(follow_symlinks=False).st_blocks
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if size > FOLDER_BYTES or entries > FOLDER_ENTRIES:
                        return True
        except OSError as error:
            if error.errno != errno.ENOENT:  # gone in the meantime; else it can't be looked into
                return True
    return False


def _remove_tree(home: str) -> None:
    """Remove a folder however deep it is: no recursion, and no path that grows too long. Never raises."""
    moved = 0
    with contextlib.suppress(OSError):
        while entries := list(os.scandir(home)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                for inner in list(os.scandir(entry.path)):  # one level up, where the next round finds it
                    if inner.is_dir(follow_symlinks=False):
                        os.chmod(inner.path, 0o700)  # a folder that is moved must be writable
                    moved += 1
                    os.rename(inner.path, f"{home}/.{os.path.basename(home)}.{moved}")
                os.rmdir(entry.path)
        os.rmdir(home)


def _environment(folder: str) -> dict[str, str]:
    """The whole environment of a program: nothing of the user's."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "MALLOC_ARENA_MAX": "1",  # each thread's own would take 64 MB of address space
    }
