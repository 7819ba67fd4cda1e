"""Run a command so that its output is both shown as it comes and kept in a log file.

On a terminal the command gets a terminal of its own, so that it draws its progress bars; the log keeps what would be
left on the screen: the last state of every line, without colours.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

READ_BYTES = 1 << 16
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class LineLog:
    """Writes finished lines to a log file; what a carriage return overwrote is left out."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Take more output."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self._write(line)
        self.rest = self.rest[self.rest.rstrip(b"\r").rfind(b"\r") + 1 :]  # what was drawn over is never needed
        self.file.flush()

    def _write(self, line: bytes) -> None:
        shown = line.rstrip(b"\r").rsplit(b"\r", 1)[-1]
        self.file.write(_CONTROL.sub(b"", shown).rstrip() + b"\n")

    def __enter__(self) -> LineLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.rest:
            self._write(self.rest)
        self.file.close()


def _open_channel(terminal: bool) -> tuple[int, int]:
    """(end to read, end to write): a pseudo-terminal of this terminal's size, or a pipe."""
    if not terminal:
        return os.pipe()
    import fcntl
    import pty
    import struct
    import termios

    reader, writer = pty.openpty()
    columns, rows = shutil.get_terminal_size()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return reader, writer


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that what must be cleaned up is."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_logged(command: Sequence[str], log_path: Path, env: Mapping[str, str]) -> int:
    """Run `command`, show its output, append it to `log_path`; returns its exit code (−n when killed by signal n).

    Ctrl-C reaches the command too; its last words are read before KeyboardInterrupt goes on. SIGTERM is passed on.
    """
    reader, writer = _open_channel(sys.stdout.isatty())
    interrupted = False
    with LineLog(log_path) as log, _exit_on_sigterm():
        log.feed(f"$ {' '.join(command)}   ({time.strftime('%Y-%m-%d %H:%M:%S')})\n".encode())
        process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=dict(env))
        os.close(writer)
        try:
            while True:
                try:
                    data = os.read(reader, READ_BYTES)
                except OSError:  # how a pseudo-terminal says that its other end is closed
                    break
                except KeyboardInterrupt:
                    if interrupted:
                        raise
                    interrupted = True
                    continue
                if not data:
                    break
                with contextlib.suppress(BrokenPipeError):  # nobody reads us any more: the log still counts
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                log.feed(data)
            code = process.wait()
        finally:
            os.close(reader)
            if process.poll() is None:
                process.terminate()
                process.wait()
    if interrupted:
        raise KeyboardInterrupt
    return code
