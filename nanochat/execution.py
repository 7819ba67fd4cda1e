"""Runs a program that a model wrote, in a process of its own with limits, and says whether it came to its end.

The process is a fresh isolated interpreter (`python -I`) in its own session, with an empty environment, a temporary
folder as home, no standard input, and limits on time, memory, file size and output. Success is a secret that only
nanochat.execution_child writes, after the program's last line: `sys.exit(0)` is a failure.

This is a fence against mistakes and simple tricks, not a prison: the program runs as the same user, can read what that
user can read, can open sockets, and by searching the interpreter's memory could find the secret.
"""

from __future__ import annotations

import contextlib
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

CHILD = Path(__file__).with_name("execution_child.py")
MAX_OUTPUT_BYTES = 64 << 10  # of each stream; what follows is read and thrown away
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended."""

    success: bool
    """It ran to its last line."""
    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    """Why it failed; None on success."""
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(
    code: str, timeout: float = 5.0, memory_limit_bytes: int | None = 256 * 1024 * 1024
) -> ExecutionResult:
    """Run `code` as a program and say whether it reached its end without an error.

    Args:
        code: Python source.
        timeout: seconds of wall-clock time; then it is killed with all processes it has started.
        memory_limit_bytes: of address space, interpreter included; None: no limit.

    Raises:
        ValueError: a limit is not positive.
    """
    if not timeout > 0 or (memory_limit_bytes is not None and memory_limit_bytes <= 0):
        raise ValueError(f"limits must be positive, got timeout {timeout} and memory {memory_limit_bytes}")
    secret = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="nanochat-run-", ignore_cleanup_errors=True) as folder:
        program = Path(folder) / "program.py"
        program.write_bytes(code.encode("utf-8", errors="replace"))
        streams, exit_code, timed_out = _run(folder, program, secret, timeout, memory_limit_bytes)
    stdout, stderr, report = streams["stdout"], streams["stderr"], streams["report"]
    success = not timed_out and report == b"passed " + secret
    memory_exceeded = report == b"memory"
    error = None
    if timed_out:
        error = f"not finished after {timeout:g} seconds"
    elif memory_exceeded:
        error = "MemoryError: the program needs more memory than it may have"
    elif not success:
        message = report.removeprefix(b"error ").decode("utf-8", errors="replace")
        error = message if report.startswith(b"error ") else f"the process ended before its end (exit code {exit_code})"
    return ExecutionResult(
        success,
        stdout.decode("utf-8", errors="replace"),
        stderr.decode("utf-8", errors="replace"),
        error,
        timed_out,
        memory_exceeded,
    )


def _run(
    folder: str, program: Path, secret: bytes, timeout: float, memory_bytes: int | None
) -> tuple[dict[str, bytes], int | None, bool]:
    """Start the process, collect its output until it ends or the time is up, kill what is left of its group."""
    request_read, request_write = os.pipe()
    report_read, report_write = os.pipe()
    deadline = time.monotonic() + timeout
    limits = [str(memory_bytes or -1), str(math.ceil(timeout) + 1)]
    try:
        os.write(request_write, secret)
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(program), str(request_read), str(report_write), *limits],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(request_read, report_write),
            start_new_session=True,
        )
    except BaseException:
        os.close(report_read)
        raise
    finally:
        for fd in (request_read, request_write, report_write):
            os.close(fd)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr, os.fdopen(report_read, "rb") as report:
        try:
            files = {"stdout": process.stdout, "stderr": process.stderr, "report": report}
            streams, timed_out = _collect(process, {n: f.fileno() for n, f in files.items()}, deadline)
        finally:
            # The group outlives its leader when the program left processes behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return streams, process.returncode, timed_out


def _collect(process: subprocess.Popen[bytes], fds: dict[str, int], deadline: float) -> tuple[dict[str, bytes], bool]:
    """Read the pipes until the process ends or the deadline passes; keep the first MAX_OUTPUT_BYTES of each."""
    output = {name: bytearray() for name in fds}
    with selectors.DefaultSelector() as selector:
        for name, fd in fds.items():
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ, name)
        ended = False
        while True:
            # A process left behind may hold the pipes open, so the end of the process counts, not the end of the pipes.
            events = selector.select(0 if ended else POLL_SECONDS) if selector.get_map() else []
            if not selector.get_map() and not ended:
                time.sleep(POLL_SECONDS / 10)
            for key, _ in events:
                block = os.read(key.fd, 65536)
                if not block:
                    selector.unregister(key.fd)
                kept = output[key.data]
                kept += block[: MAX_OUTPUT_BYTES - len(kept)]
            if time.monotonic() > deadline:
                return {name: bytes(kept) for name, kept in output.items()}, not ended
            if ended and not events:
                return {name: bytes(kept) for name, kept in output.items()}, False
            ended = ended or process.poll() is not None


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
