"""A stage that is a copy of a process behaves as one that was started anew: output, log, exit code, signals, result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.checkpoint.format import checkpoint_folder, saved_steps, step_folder, weights_hash
from nanochat.pipeline.stage_server import StageServer
from nanochat.signals import EXIT_STOPPED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="copies are made on Linux only")

# Runs the module `stage` once with each of its arguments, as a copy and as a new process; prints the exit codes.
RUNNER = """
import json, os, sys
from pathlib import Path
from nanochat.pipeline.process import run_logged
from nanochat.pipeline.stage_server import StageServer

folder, env, *kinds = sys.argv[1:]
with StageServer() as server:
    codes = {
        f"{kind} {way}": run_logged(
            [sys.executable, "-m", "stage", kind], Path(folder, f"{kind} {way}"), {**os.environ, **json.loads(env)}, by
        )
        for kind in kinds
        for way, by in (("copy", server), ("new", None))
    }
print(json.dumps(codes))
"""
STAGE = """
import atexit, os, signal, sys, time
from pathlib import Path

def save(number, frame):
    Path("saved").write_text(str(number))
    print("saved", number, flush=True)
    sys.exit(75)

def wait():
    signal.signal(signal.SIGTERM, save)
    Path("pid").write_text(str(os.getpid()))
    while True:
        time.sleep(0.02)

print("stage", __name__, sys.argv[1:], repr(sys.stdin.read()), [os.isatty(i) for i in range(3)])
print("as a", "copy" if "nanochat.pipeline.process" in sys.modules else "process", os.environ.get("NANOCHAT_TOLD"))
print("to err", file=sys.stderr)
atexit.register(print, "last words")
{
    "ends": int,
    "three": lambda: sys.exit(3),
    "words": lambda: sys.exit("gone wrong"),
    "raises": lambda: 1 / 0,
    "killed": lambda: os.kill(os.getpid(), 9),
    "stopped": lambda: os.kill(os.getpid(), 15),
    "interrupted": lambda: os.kill(os.getpid(), 2),
    "waits": wait,
}[sys.argv[1]]()
"""


def start(folder: Path, *kinds: str, told: dict[str, str] | None = None, **more) -> subprocess.Popen[str]:
    (folder / "stage.py").write_text(STAGE)
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", RUNNER, str(folder), json.dumps(told or {}), *kinds]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=env, **more)


def logged(folder: Path, kind: str, way: str) -> list[str]:
    return (folder / f"{kind} {way}").read_text().splitlines()[1:]


def test_a_copy_ends_as_a_new_process_does_and_says_the_same(tmp_path):
    expected = {"ends": 0, "three": 3, "words": 1, "raises": 1, "killed": -9, "stopped": -15}
    expected["interrupted"] = -2
    shown, _ = start(tmp_path, *expected, told={"NANOCHAT_TOLD": "yes"}).communicate(timeout=300)
    assert json.loads(shown.splitlines()[-1]) == {
        f"{k} {way}": c for k, c in expected.items() for way in ("copy", "new")
    }
    for kind in expected:
        copy, new = logged(tmp_path, kind, "copy"), logged(tmp_path, kind, "new")
        if kind in ("ends", "three", "words"):
            assert f"stage __main__ ['{kind}'] '' [False, False, False]" in copy
            assert "as a copy yes" in copy
            assert "last words" in copy
            # Of outputs that no terminal shows, one is written line by line and the other at the end.
            assert sorted(copy) == sorted(line.replace("process", "copy") for line in new)
        error = {"raises": "ZeroDivisionError: division by zero", "interrupted": "KeyboardInterrupt"}.get(kind)
        if error:
            assert {"last words", "to err", error} <= set(copy) & set(new)
    assert all(line in shown for line in logged(tmp_path, "ends", "copy"))


def test_what_libraries_read_when_they_load_needs_a_new_process(tmp_path):
    shown, _ = start(tmp_path, "ends", told={"OMP_NUM_THREADS": "77", "NANOCHAT_TOLD": "no"}).communicate(timeout=300)
    assert "as a process no" in logged(tmp_path, "ends", "copy")
    assert json.loads(shown.splitlines()[-1]) == {"ends copy": 0, "ends new": 0}


def test_on_a_terminal_a_copy_gets_one_too(tmp_path):
    import pty

    reader, writer = pty.openpty()
    (tmp_path / "stage.py").write_text(STAGE)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", RUNNER, str(tmp_path), "{}", "ends"]
    process = subprocess.Popen(command, stdout=writer, stderr=writer, cwd=tmp_path, env=env)
    os.close(writer)
    assert process.wait(timeout=300) == 0
    os.close(reader)
    assert "stage __main__ ['ends'] '' [False, True, True]" in logged(tmp_path, "ends", "copy")


def test_other_systems_and_a_full_table_of_processes_start_new_ones(tmp_path, monkeypatch):
    def refuse() -> int:
        raise BlockingIOError

    command = [sys.executable, "-m", "stage", "ends"]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with StageServer() as server:
            assert server.start(command, os.environ, 1) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", refuse)
        with StageServer() as server:
            assert server.start(command, os.environ, 1) is None
    with StageServer() as server:
        assert server.start(["sh", "-c", "true"], os.environ, 1) is None
        assert server.start(command, {**os.environ, "NANOCHAT_LONG": "x" * (1 << 20)}, 1) is None


def wait_for(path: Path) -> str:
    for _ in range(6000):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"no {path}")


def alive(pid: int) -> bool:
    """Whether it runs: it may stay as a zombie where nobody waits for the children of others."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def waiting(tmp_path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A runner in a group of its own, and the process number of its stage, a copy that waits."""
    process = start(tmp_path, "waits", start_new_session=True)
    pid = int(wait_for(tmp_path / "pid"))
    yield process, pid
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_for_the_pipeline_lets_a_copy_save(tmp_path, waiting, number):
    process, _ = waiting
    process.send_signal(number)
    assert process.wait(timeout=60) == EXIT_STOPPED
    assert f"saved {signal.SIGTERM.value}" in logged(tmp_path, "waits", "copy")


def test_a_signal_for_the_whole_group_lets_a_copy_save(tmp_path, waiting):
    process, _ = waiting
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_STOPPED
    assert f"saved {signal.SIGTERM.value}" in logged(tmp_path, "waits", "copy")


def test_a_copy_is_asked_to_stop_when_the_pipeline_is_killed(tmp_path, waiting):
    process, pid = waiting
    server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    process.kill()
    assert wait_for(tmp_path / "saved") == str(signal.SIGTERM.value)
    deadline = time.monotonic() + 60
    while alive(pid) or alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_copy_is_found_by_its_command(waiting):
    _, pid = waiting
    assert Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0") == [b"stage", b"waits"]


def test_a_copy_trains_the_same_bits(tmp_path, base_dir, tiny_tokenizer):
    tiny_tokenizer.save(base_dir / "tokenizer")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("The sky is blue, and so is the sea. " * 400)
    code = (
        "import os, sys; from pathlib import Path; import torch\n"
        "from nanochat.pipeline.process import run_logged\n"
        "from nanochat.pipeline.stage_server import StageServer\n"
        "with StageServer() as server:\n"
        "    for tag, by in (('copy', server), ('new', None)):\n"
        "        command = [sys.executable, '-m', 'scripts.base_train', f'--model_tag={tag}', *sys.argv[1:]]\n"
        "        if code := run_logged(command, Path(os.environ['NANOCHAT_BASE_DIR'], tag), os.environ, by):\n"
        "            sys.exit(code)\n"
    )
    flags = ["--depth=1", "--max_seq_len=32", "--device_batch_size=4", "--total_batch_size=256", "--num_iterations=4"]
    flags += [f"--data_dir={tmp_path / 'texts'}", "--eval_tokens=64", "--sample_every=0", "--resume=never"]
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    folders = [checkpoint_folder("base", tag) for tag in ("copy", "new")]
    assert len({weights_hash(step_folder(folder, saved_steps(folder)[-1])) for folder in folders}) == 1
    metrics = [
        [json.loads(line).get("loss") for line in (f / "metrics.jsonl").read_text().splitlines()] for f in folders
    ]
    assert metrics[0] == metrics[1] != []
