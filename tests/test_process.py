"""Output of a command: shown, and kept in a log as a person would see it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from nanochat.pipeline.process import LineLog, run_logged
from nanochat.signals import EXIT_STOPPED


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def runner(child: str, log: Path) -> list[str]:
    """A command that runs Python code `child` by run_logged and exits with its exit code."""
    code = (
        "import os, sys; from pathlib import Path; from nanochat.pipeline.process import run_logged; "
        f"sys.exit(run_logged([sys.executable, '-c', {child!r}], Path({str(log)!r}), os.environ))"
    )
    return python(code)


def test_output_and_errors_are_shown_and_logged(tmp_path):
    child = "import sys; print('to out', flush=True); print('to err', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "logs" / "a.log"
    shown = subprocess.run(runner(child, log), capture_output=True, text=True, check=False)
    assert (shown.stdout, shown.stderr, shown.returncode) == ("to out\nto err\n", "", 3)
    assert log.read_text().splitlines()[1:] == ["to out", "to err"]


def test_a_second_run_is_appended(tmp_path):
    for word in ("one", "two"):
        run_logged(["echo", word], tmp_path / "a.log", os.environ)
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert [lines[1], lines[3]] == ["one", "two"]


def test_a_killed_command_is_told_from_a_failed_one(tmp_path):
    assert run_logged(["sh", "-c", "exit 3"], tmp_path / "a.log", os.environ) == 3
    assert run_logged(["sh", "-c", "kill -9 $$"], tmp_path / "a.log", os.environ) == -9


def test_a_progress_bar_leaves_its_last_state(tmp_path):
    with LineLog(tmp_path / "a.log") as log:
        for share in range(0, 101, 10):
            log.feed(f"\r\x1b[2K\x1b[32m{share}%\x1b[0m".encode())
        log.feed(b"\r\ndone\r\nlast words")
    assert (tmp_path / "a.log").read_text() == "100%\ndone\nlast words\n"


@given(st.binary(max_size=200).filter(lambda b: b"\r" not in b and b"\x1b" not in b), st.integers(1, 7))
def test_the_log_does_not_depend_on_how_output_is_cut_up(data, size):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.log"
        with LineLog(path) as log:
            for start in range(0, len(data), size):
                log.feed(data[start : start + size])
        logged = path.read_bytes()
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    assert logged == b"".join(line.rstrip() + b"\n" for line in lines)


def test_on_a_terminal_the_command_gets_one_too(tmp_path):
    import pty

    child = "import sys; print(sys.stdout.isatty(), sys.stderr.isatty())"
    reader, writer = pty.openpty()
    process = subprocess.Popen(runner(child, tmp_path / "a.log"), stdout=writer, stderr=writer)
    os.close(writer)
    assert process.wait(timeout=120) == 0
    os.close(reader)
    assert "True True" in (tmp_path / "a.log").read_text()


def test_stopping_the_runner_stops_the_command(tmp_path):
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    process = subprocess.Popen(runner(child, tmp_path / "a.log"))
    while not (pid_file.exists() and pid_file.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_STOPPED
    for _ in range(200):
        try:
            os.kill(int(pid_file.read_text()), 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the command outlived its runner")
