"""A run in a machine that is lent by the hour (Kaggle, Colab): keep what was made, stop in time, go on next time.

Used by notebooks/nanochat_free_gpu.ipynb, whose kernel has nothing of the project installed: standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STOPPED = 75
"""Exit code of a run that was asked to stop, and has saved (signals.py; not imported, it needs no torch either way)."""
PART = ".part"
# The last minutes of a session are for saving.
RESERVE_SECONDS = 600.0


def _files(folder: Path) -> dict[Path, os.stat_result]:
    """The files below `folder` that are worth keeping, by relative path; locks and unfinished ones are not."""
    found = {}
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix in (PART, ".lock"):
            continue
        with contextlib.suppress(FileNotFoundError):  # a run may be writing meanwhile
            if path.is_file():
                found[path.relative_to(folder)] = path.stat()
    return found


def sync(source: Path, target: Path) -> int:
    """Make `target` a copy of `source`: copy what is new or changed, then drop what is gone; returns files copied.

    A checkpoint's files are copied before older ones are dropped, so a cut in the middle leaves one that is whole.
    """
    if not source.is_dir() or source.resolve() == target.resolve():
        return 0
    wanted, there = _files(source), _files(target)
    copied = 0
    # meta.json marks a checkpoint as usable: it comes after the rest of its folder.
    for path in sorted(wanted, key=lambda path: (path.name == "meta.json", str(path))):
        stat, old = wanted[path], there.get(path)
        # Some network drives stamp a copy with the time of copying.
        if old is not None and old.st_size == stat.st_size and int(old.st_mtime) >= int(stat.st_mtime):
            continue
        part = target / path.parent / (path.name + PART)
        part.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(source / path, part)
            os.replace(part, target / path)
            copied += 1
    for path in there.keys() - wanted.keys():
        (target / path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # until a folder is not empty
            for folder in (target / path).parents:
                folder.rmdir()
    return copied


def run_until(
    command: Sequence[str],
    deadline: float,
    env: Mapping[str, str],
    save: Callable[[], Any],
    every_seconds: float = 1200.0,
) -> int:
    """Run `command`, show its output, call `save` now and then; ask it to stop in time. Returns its exit code.

    Args:
        command: ends by itself some time after SIGTERM, when it has saved.
        deadline: when the session is over, by `time.monotonic()`; it is asked RESERVE_SECONDS before.
        env: added to this process's environment.
        save: keeps what is there; called also after the end, however that comes.
        every_seconds: between two calls of `save`.
    """
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # the notebook's stop button reaches it only through us
    )
    reader = threading.Thread(target=_show, args=(process,), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            left = deadline - RESERVE_SECONDS - time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, min(every_seconds, left)))
            if process.poll() is None and time.monotonic() >= deadline - RESERVE_SECONDS:
                print("the session is nearly over: asking the run to save and stop", flush=True)
                break
            save()
    finally:  # the deadline, the stop button, or the end
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        reader.join(timeout=60.0)
        save()
    return code


def _show(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            sys.stdout.write(line)


class Chat:
    """A conversation with the model of a base dir: starts chat_web, asks it, remembers what was said."""

    def __init__(self, python: str, folder: Path, env: Mapping[str, str], source: str = "sft") -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.messages: list[dict[str, str]] = []
        command = [python, "-m", "scripts.chat_web", f"--source={source}", f"--port={port}"]
        # A session of its own: the notebook's stop button interrupts the kernel's whole group.
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        atexit.register(self.close)
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.said.extend(lines)

    def wait(self, seconds: float = 300.0) -> Chat:
        """Return when the model is loaded.

        Raises:
            RuntimeError: the server has ended, or is not there in time; with its last words.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return self
            time.sleep(0.5)
        self.close()
        raise RuntimeError(f"the chat did not start: {''.join(self.said[-5:]).strip() or 'it said nothing'}")

    def say(self, text: str, **settings: Any) -> str:
        """The answer to `text`; `settings` such as temperature=0 or max_tokens=100 are OpenAI's."""
        question = {"role": "user", "content": text}
        body = json.dumps({"messages": [*self.messages, question], "truncation": "auto", **settings}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request) as answer:
                message = json.load(answer)["choices"][0]["message"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"no answer: {error.read().decode(errors='replace')}") from None
        self.messages += [question, {"role": "assistant", "content": message["content"]}]
        return str(message["content"])

    def close(self) -> None:
        """End the server."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
