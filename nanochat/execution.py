"""Runs programs that a model wrote, shut off from the machine, and says whether they did what they should.

The tested code runs in one process, the worker; the tests and their verdict live in another, the judge, and only plain
values (numbers, texts, containers of them) cross between the two. No exit code, printed word, patched built-in or
clever `__eq__` on the tested side can pass a test; it can only give the right answers.

Every program gets a fresh isolated interpreter in its own session, an empty environment, a temporary folder, no
standard input, no further processes or threads, limits on time, memory, files and output, and no privileges. Where the
kernel allows (`isolation()` tries it once), also namespaces of its own: no network, none of the user's files, no sight
of other processes (nanochat/sandbox/isolation.py). Where it does not, Python's audit hooks still refuse files outside
its folder, sockets, signals and native code; that stops programs, not attackers, and is called weak: HumanEval asks.

What remains: the kernel itself can be attacked (no system call filter), the interpreter and the system's libraries can
be read, and a program that corrupts its own interpreter could find what `execute_code` waits to hear.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("sandbox") / "child.py"
MAX_OUTPUT_BYTES = 64 << 10  # of each stream; what follows is read and thrown away
POLL_SECONDS = 0.02
PROBE_SECONDS = 20.0
MEMORY_BYTES = 256 << 20


class IsolationError(RuntimeError):
    """Programs can't be shut off from this machine, and nobody has agreed to run them nevertheless."""


@dataclass(frozen=True)
class Isolation:
    """What shuts programs off on this machine."""

    strong: bool
    """Namespaces: the kernel hides files, processes and the network."""
    reason: str = ""
    """Why it is not strong."""

    def __str__(self) -> str:
        common = "own interpreter and session, no privileges, limited time, memory, files, output, no new processes"
        if self.strong:
            return f"strong: own user, process, network and mount namespaces (no network, no files of yours); {common}"
        return (
            f"weak: no namespaces ({self.reason}), so only Python's audit hooks keep programs from your files and the "
            f"network; {common}"
        )


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
    if sys.platform != "linux":
        return Isolation(False, f"{sys.platform} has none")
    with _Session(PROBE_SECONDS) as session:
        session.start("probe", {}, namespaces=True, memory_bytes=None, reports=True)
        session.collect()
        if session.text("report") == "isolated":
            return Isolation(True)
        lines = session.text("probe stderr").strip().splitlines()
        return Isolation(False, lines[-1] if lines else "the kernel gave no answer")


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
    worker = {"source": code, "name": "__main__", "end": f"def {name}(): return {answer!r}", "audit": audit}
    judge = {"setup": "", "tests": f"assert {name}() == {answer!r}"}
    return _judged(name, worker, judge, timeout, memory_limit_bytes, allow_weak_isolation)


def check_function(
    solution: str,
    entry_point: str,
    tests: str,
    setup: str = "",
    timeout: float = 10.0,
    memory_limit_bytes: int | None = MEMORY_BYTES,
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
        memory_limit_bytes: of each process's address space; None: no limit.
        allow_weak_isolation: run it also where the kernel offers no namespaces.

    Raises:
        ValueError: a limit is not positive.
        IsolationError: isolation is weak and that is not allowed.
    """
    worker = {"source": solution, "name": "__main__", "end": "", "audit": True}
    judge = {"setup": setup, "tests": tests}
    return _judged(entry_point, worker, judge, timeout, memory_limit_bytes, allow_weak_isolation)


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
    namespaces = require_isolation(allow_weak).strong
    # A lone surrogate can't be sent.
    worker["source"] = worker["source"].encode("utf-8", errors="replace").decode("utf-8")
    with _Session(timeout) as session:
        calls_read, calls_write = session.pipe()
        answers_read, answers_write = session.pipe()
        worker |= {"entry_point": entry_point, "read_fd": calls_read, "write_fd": answers_write}
        judge |= {"entry_point": entry_point, "read_fd": answers_read, "write_fd": calls_write}
        session.start("worker", worker, namespaces=namespaces, memory_bytes=memory_bytes)
        session.start("judge", judge, namespaces=namespaces, memory_bytes=memory_bytes, reports=True)
        session.collect()
        return session.result()


@dataclass
class _Session:
    """The processes of one run: started, read from, and killed together. The last one started decides the end."""

    timeout: float
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    output: dict[str, bytearray] = field(default_factory=dict)
    timed_out: bool = False

    def __enter__(self) -> _Session:
        self.deadline = time.monotonic() + self.timeout
        self._cleanup = contextlib.ExitStack()
        self._own: dict[str, int] = {}  # descriptors to read, by the name of what they say
        self._for_children: list[int] = []
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            # The group outlives its leader when the program left processes behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for fd in [*self._own.values(), *self._for_children]:
            os.close(fd)
        self._cleanup.close()

    def pipe(self) -> tuple[int, int]:
        """(read end, write end) of a pipe between children."""
        ends = os.pipe()
        self._for_children += ends
        return ends

    def start(
        self,
        part: str,
        settings: dict[str, Any],
        *,
        namespaces: bool,
        memory_bytes: int | None,
        reports: bool = False,
    ) -> None:
        """Start a process that plays `part`, with only the descriptors it is told of."""
        folder = tempfile.TemporaryDirectory(prefix="nanochat-run-", ignore_cleanup_errors=True)
        home = self._cleanup.enter_context(folder)
        if not namespaces:
            os.chmod(home, 0o777)  # the process may not be of this user
        limits = [memory_bytes or -1, math.ceil(self.timeout) + 1]
        settings = {"audit": False} | settings | {"part": part, "namespaces": namespaces, "limits": limits}
        given = [value for name, value in settings.items() if name.endswith("_fd")]
        if reports:
            settings["report_fd"], read_end = self._output("report")
            self._own["report"] = read_end
            given.append(settings["report_fd"])
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
            self._own[f"{part} {name}"] = os.dup(stream.fileno())
            stream.close()
        for fd in given:  # else the end of a process would not end its pipes
            os.close(fd)
            self._for_children.remove(fd)

    def _output(self, name: str) -> tuple[int, int]:
        read_end, write_end = os.pipe()
        self._for_children.append(write_end)
        return write_end, read_end

    def collect(self) -> None:
        """Read until the deciding process ends or the time is up; keep the first MAX_OUTPUT_BYTES of each stream."""
        decides = list(self.processes.values())[-1]
        self.output = {name: bytearray() for name in self._own}
        with selectors.DefaultSelector() as selector:
            for name, fd in self._own.items():
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
                if time.monotonic() > self.deadline:
                    self.timed_out = not ended
                    return
                if ended and not events:
                    return
                ended = ended or decides.poll() is not None

    def text(self, name: str) -> str:
        """What was read from a stream."""
        return self.output[name].decode("utf-8", errors="replace")

    def result(self) -> ExecutionResult:
        """What the worker printed, and success when the judge reported it in time."""
        report = self.text("report")
        success = not self.timed_out and report == "passed"
        memory_exceeded = report == "memory"
        error = None
        if self.timed_out:
            error = f"not finished after {self.timeout:g} seconds"
        elif memory_exceeded:
            error = "MemoryError: the program needs more memory than it may have"
        elif not success:
            code = self.processes["worker"].poll()
            ended = f"the process ended before its end (exit code {code})"
            error = (report.removeprefix("error ") if report.startswith("error ") else "") or ended
        return ExecutionResult(
            success, self.text("worker stdout"), self.text("worker stderr"), error, self.timed_out, memory_exceeded
        )


def _environment(folder: str) -> dict[str, str]:
    """The whole environment of a program: nothing of the user's."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
