"""Programs that reach their end pass; everything else fails, within its time and size, and harms nothing outside."""

import os
import threading
import time
from pathlib import Path

import pytest

from nanochat.execution import MAX_OUTPUT_BYTES, execute_code


def test_a_program_that_ends_passes():
    result = execute_code("import math\nprint('hi', math.pi > 3)\nassert 1 + 1 == 2")
    assert result.success
    assert result.stdout == "hi True\n"
    assert (result.stderr, result.error, result.timeout, result.memory_exceeded) == ("", None, False, False)


def test_ordinary_programs_work():
    code = """
import dataclasses, json, pathlib, pickle, sys, tempfile, typing

@dataclasses.dataclass
class Point:
    x: "int"
    y: typing.Optional[int] = None

Pair = typing.NamedTuple("Pair", [("a", int)])
assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
if __name__ == "__main__":
    pathlib.Path("note.txt").write_text("ünï")
    with tempfile.TemporaryFile() as f:
        f.write(b"x")
    print(json.dumps({"ok": pathlib.Path("note.txt").exists()}), "naïve 👍", sys.stdin.read())
"""
    result = execute_code(code)
    assert result.success, result
    assert result.stdout == '{"ok": true} naïve 👍 \n'


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert 1 == 2", "AssertionError: "),
        ("1/0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: "),
        ("raise KeyError('x')", "KeyError: 'x'"),
        ("def f(): f()\nf()", "RecursionError: "),
        ("import no_such_module", "ModuleNotFoundError: "),
        ("class E(Exception):\n def __str__(self): return 'x' * 10**6\nraise E", "E: xxx"),
        ("\x00", ""),
    ],
)
def test_errors_are_named(code, error):
    result = execute_code(code)
    assert not result.success
    assert result.error.startswith(error)
    assert len(result.error) < 2000
    assert not result.timeout


CHEATS = {
    "exit 0": "import sys\nsys.exit(0)\nassert False",
    "exit": "exit()",
    "hard exit": "import os\nos._exit(0)",
    "kill itself": "import os\nos.kill(os.getpid(), 9)",
    "print the words": "print('passed')\nimport sys\nsys.stderr.write('passed')\nassert False",
    "write to every descriptor": """
import os
for fd in range(1, 64):
    try:
        os.write(fd, b"passed " + b"0" * 32)
    except OSError:
        pass
os._exit(0)
""",
    "at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\nraise ValueError",
    "swallowing hook": "import sys\nsys.excepthook = lambda *a: None\nassert False",
    "patched os": "import os\nos.write = os._exit = lambda *a: 0\nassert False",
    "patched builtins": "import builtins\nbuiltins.issubclass = builtins.type = lambda *a: True\nassert False",
    "a fork that passes": "import os\nif os.fork():\n    os._exit(0)",
    "replaced process": "import os\nos.execv('/bin/true', ['true'])",
    "closed report": "import os\nos.closerange(3, 64)",
}


@pytest.mark.parametrize("code", CHEATS.values(), ids=CHEATS)
def test_cheats_do_not_pass(code):
    result = execute_code(code)
    assert not result.success
    assert result.error
    assert not result.timeout


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "import signal, time\nfor s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "import os, sys\nfor fd in range(64):\n  try: os.close(fd)\n  except OSError: pass\nwhile True: pass",
    ],
)
def test_the_time_is_limited(code):
    start = time.monotonic()
    result = execute_code(code, timeout=0.5)
    assert time.monotonic() - start < 20
    assert result.timeout
    assert not result.success
    assert result.error == "not finished after 0.5 seconds"


def test_the_memory_is_limited():
    result = execute_code("x = bytearray(10**10)")
    assert not result.success
    assert result.memory_exceeded
    assert execute_code("x = bytearray(10**8)").success
    assert not execute_code("x = bytearray(10**8)", memory_limit_bytes=90 * 2**20).success
    assert execute_code("x = bytearray(3 * 10**8)", memory_limit_bytes=None).success


def test_endless_output_is_cut():
    result = execute_code("while True: print('x' * 1000)", timeout=1.0)
    assert result.timeout
    assert len(result.stdout) == MAX_OUTPUT_BYTES
    result = execute_code("print('y' * 10**6)")
    assert result.success
    assert result.stdout == "y" * MAX_OUTPUT_BYTES


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may fork under the process limit")
@pytest.mark.parametrize("end", ["", "while True: pass"])
def test_processes_left_behind_are_killed(end):
    code = f"""
import os, sys, time
pid = os.fork()
if pid == 0:
    time.sleep(60)
print(pid)
sys.stdout.flush()
{end}
"""
    start = time.monotonic()
    result = execute_code(code, timeout=1.0)
    assert time.monotonic() - start < 20
    assert result.success == (end == "")
    pid = int(result.stdout)
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still alive")


def test_the_environment_is_not_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET_KEY", "s3cret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "json.py").write_text("raise RuntimeError('planted')")
    monkeypatch.chdir(tmp_path)
    code = "import json, os, pathlib\nprint(json.dumps(dict(os.environ)), pathlib.Path.home(), os.getcwd())"
    result = execute_code(code)
    assert result.success, result
    assert "s3cret" not in result.stdout
    assert str(tmp_path) not in result.stdout
    assert str(Path.home()) not in result.stdout.split()[-2:]


def test_its_folder_is_gone_afterwards():
    result = execute_code("import os\nopen('big', 'w').write('x' * 1000)\nos.mkdir('d')\nprint(os.getcwd())")
    assert result.success
    assert not Path(result.stdout.strip()).exists()


def test_files_are_limited_in_size():
    assert not execute_code("with open('big', 'wb') as f: f.write(b'x' * (20 << 20))").success


def test_works_from_several_threads_and_leaks_no_descriptor():
    execute_code("pass")
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    results = [None] * 4

    def run(i):
        results[i] = execute_code(f"print({i})").stdout

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["0\n", "1\n", "2\n", "3\n"]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("limits", [{"timeout": 0}, {"timeout": -1.0}, {"memory_limit_bytes": 0}])
def test_limits_must_be_positive(limits):
    with pytest.raises(ValueError, match="positive"):
        execute_code("pass", **limits)
