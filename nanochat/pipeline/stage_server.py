"""Stages as copies of a process that has imported torch: alone, each of a dozen would compute for seconds to start.

A `StageServer` is a copy of the pipeline from before it has done anything: it holds no lock, no file and no thread of a
library, which would be missing in a copy. For each stage it copies itself again, and that process runs the stage's
module as `python -m` does. Only Linux ends copies with the process that they came from; elsewhere there are none.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from nanochat.signals import ASKING

MOST_BYTES = 1 << 17  # of a request: a module, its flags, and what is new in its environment


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Let this process get the signal when the one that started it is gone, even by SIGKILL (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


class StageCopy:
    """A stage that runs: what run_logged uses of a Popen."""

    def __init__(self, pid: int, answers: socket.socket) -> None:
        self.pid, self._answers = pid, answers
        self.returncode: int | None = None

    def terminate(self) -> None:
        """Send SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code; −n when killed by signal n."""
        if self.returncode is None:  # without an answer the server was killed, and its stage with it
            self.returncode = int(self._answers.recv(MOST_BYTES) or -signal.SIGKILL)
        return self.returncode


class StageServer:
    """Within `with`, starts stages that run in one process and compute on a CPU; made before anything is computed."""

    def __init__(self) -> None:
        self._env = dict(os.environ)
        self._pid = 0
        self._here: socket.socket | None = None
        if sys.platform != "linux":
            return
        print(end="", flush=True)
        with contextlib.suppress(OSError), warnings.catch_warnings():
            # Python warns of other threads. Here NumPy and Arrow have some, which they end or renew at a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._here, there = socket.socketpair(type=socket.SOCK_SEQPACKET)
            with there:
                self._pid = os.fork()
                if self._pid == 0:
                    self._here.close()
                    _serve(there)

    def start(self, command: Sequence[str], env: Mapping[str, str], output: int) -> StageCopy | None:
        """Start `python -m MODULE FLAGS` with its output in a file descriptor; None where only a new process will do.

        Libraries have read their part of the environment when they were loaded: another one needs a new process.
        """
        changed = {name: value for name, value in env.items() if self._env.get(name) != value}
        known = self._env.keys() <= env.keys() and all(name.startswith("NANOCHAT_") for name in changed)
        if self._here is None or not (known and list(command[:2]) == [sys.executable, "-m"]):
            return None
        with contextlib.suppress(OSError):  # the request is too long, or the server gone: it could not fork
            socket.send_fds(self._here, [json.dumps([command[2:], changed]).encode()], [output])
            if pid := self._here.recv(MOST_BYTES):
                return StageCopy(int(pid), self._here)
        return None

    def __enter__(self) -> StageServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._here is not None:
            self._here.close()
        if self._pid:
            os.waitpid(self._pid, 0)


# --- in the copies ----------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> NoReturn:
    """Start stages one after the other until the pipeline has closed its end."""
    try:
        end_with_parent(signal.SIGKILL)
        # Signals that ask to stop, which a terminal or a scheduler sends to every process, are for the stage alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        fork = multiprocessing.get_context("fork")
        while True:
            message, outputs, _, _ = socket.recv_fds(requests, MOST_BYTES, 1)
            if not message:
                break
            argv, env = json.loads(message)
            stage = fork.Process(target=_run, args=(requests, outputs[0], argv, env), name=argv[0])
            stage.start()
            os.close(outputs[0])
            requests.send(str(stage.pid).encode())
            stage.join()
            requests.send(str(stage.exitcode).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _run(requests: socket.socket, output: int, argv: list[str], env: dict[str, str]) -> None:
    """Run a module with its flags. How a process ends, by whatever error, is up to multiprocessing."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    requests.close()
    for number in (1, 2):
        os.dup2(output, number)
    if output > 2:
        os.close(output)
    os.environ.update(env)
    sys.argv[:] = argv
    sys.modules.pop(argv[0], None)  # runpy warns of a module that the pipeline has imported too
    _show(argv)
    try:
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # Python ends by the signal itself, after all that is to be done
        traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        atexit._run_exitfuncs()


def _show(command: Sequence[str]) -> None:
    """Let `ps` show this command for the process, as far as there is room where its own arguments lie."""
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5), 0 where they are secret
    if start:
        words = b"\0".join(map(os.fsencode, command))
        ctypes.memmove(start, words[: end - start - 1].ljust(end - start, b"\0"), end - start)
