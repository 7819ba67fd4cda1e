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
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO

from nanochat.files import naming
from nanochat.pipeline.stage_server import StageCopy, StageServer, end_with_parent
from nanochat.signals import Stopped, handled

READ_BYTES = 1 << 16
_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class LineLog:
    """Writes finished lines to a log file; what a carriage return overwrote is left out."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file: BinaryIO = open(path, "ab")  # noqa: SIM115 - closed by __exit__
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Take more output."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        with naming(self.path):
            for line in lines:
                self._write(line)
            self.file.flush()
        self.rest = self.rest[self.rest.rstrip(b"\r").rfind(b"\r") + 1 :]  # what was drawn over is never needed

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
    import termios

    reader, writer = pty.openpty()
    columns, rows = shutil.get_terminal_size()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    return reader, writer


class _PassOn:
    """Passes signals that ask to stop on to `process`, which decides when it ends."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | StageCopy | None = None
        self.asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        # Ctrl-C reaches every process of the terminal by itself.
        if self.process is not None and number != signal.SIGINT:
            self.process.terminate()


def run_logged(
    command: Sequence[str], log_path: Path, env: Mapping[str, str], server: StageServer | None = None
) -> int:
    """Run `command`, show its output, append it to `log_path`; returns its exit code (−n when killed by signal n).

    A `server` starts it, where it can. SIGTERM, SIGUSR1 and Ctrl-C reach the command too; its last words are read until
    it has ended.

    Raises:
        Stopped: one of these signals came.
    """
    reader, writer = _open_channel(sys.stdout.isatty())
    signals = _PassOn()
    with LineLog(log_path) as log, handled(signals.handle):
        log.feed(f"$ {' '.join(command)}   ({time.strftime('%Y-%m-%d %H:%M:%S')})\n".encode())
        copy = server.start(command, env, writer) if server is not None else None
        process = copy or subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            env=dict(env),
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
        signals.process = process
        if signals.asked:  # it came before there was anybody to pass it on to
            process.terminate()
        os.close(writer)
        try:
            # A pseudo-terminal says by an OSError that its other end is closed.
            while data := _read(reader):
                with contextlib.suppress(BrokenPipeError):  # nobody reads us any more: the log still counts
                    sys.stdout.buffer.write(data)
                    sys.stdout.buffer.flush()
                log.feed(data)
            code = process.wait()
        finally:
            os.close(reader)
            if process.returncode is None:
                process.terminate()
                process.wait()
    if signals.asked:
        raise Stopped
    return code


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, READ_BYTES)
    except OSError:
        return b""
