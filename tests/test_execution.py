"""Programs that reach their end pass; everything else fails, within its time and size, and harms nothing outside."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from nanochat import execution
from nanochat.execution import (
    MAX_OUTPUT_BYTES,
    Isolation,
    IsolationError,
    check_function,
    execute_code,
    isolation,
    require_isolation,
)

needs_namespaces = pytest.mark.skipif(not isolation().strong, reason="the kernel offers no namespaces here")


def children_of_this_process() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


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
    "frames": """
import sys
frame = sys._getframe()
while frame:
    print(frame.f_locals, frame.f_globals)
    frame = frame.f_back
assert False
""",
    "jump to the end": """
import sys
def trace(frame, event, arg):
    return trace
sys.settrace(trace)
assert False
""",
    "collector": "import gc\nprint([o for o in gc.get_objects() if isinstance(o, (map, dict, tuple))])\nassert False",
    "read and repeat": """
import os
for source in range(64):
    try:
        os.set_blocking(source, False)
        text = os.read(source, 1000)
    except OSError:
        continue
    for fd in range(64):
        try:
            os.write(fd, b"passed " + text)
        except OSError:
            pass
os._exit(0)
""",
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
        "import signal, time\nfor s in (1, 2, 15, 24): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
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
    assert execute_code("x = bytearray(10**8)", timeout=60).success
    assert not execute_code("x = bytearray(10**8)", memory_limit_bytes=90 * 2**20).success
    assert execute_code("x = bytearray(3 * 10**8)", memory_limit_bytes=None, timeout=60).success


def test_endless_output_is_cut():
    result = execute_code("while True: print('x' * 1000)", timeout=1.0)
    assert result.timeout
    assert len(result.stdout) == MAX_OUTPUT_BYTES
    result = execute_code("print('y' * 10**6)")
    assert result.success
    assert result.stdout == "y" * MAX_OUTPUT_BYTES


@pytest.mark.parametrize("strong", [True, False])
def test_no_processes_and_no_threads(strong, monkeypatch):
    if not strong:
        monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "for the test"))
    for code in ("import os\nos.fork()", "import threading\nthreading.Thread(target=print).start()"):
        if "Thread" in code and not strong and os.getuid() == 0:
            continue  # root may start threads where it can't become nobody
        result = execute_code(code)
        assert not result.success
        assert not result.timeout


@needs_namespaces
def test_processes_left_behind_are_killed(monkeypatch):
    """Even where the limit of processes were no limit: whatever is in the namespace goes with it."""
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
"""
    before = children_of_this_process()
    result = execute_code(code, timeout=2.0, audit=False)
    assert not result.timeout  # it does not wait for what was left behind
    assert children_of_this_process() == before


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


def test_its_folder_is_gone_afterwards(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for strong in {isolation().strong, False}:
        monkeypatch.setattr(execution, "isolation", lambda strong=strong: Isolation(strong))
        assert execute_code("import os\nopen('big', 'w').write('x' * 1000)\nos.mkdir('d')\nprint(os.getcwd())").success
        assert list(tmp_path.iterdir()) == []


def test_the_next_run_removes_what_a_killed_one_left(monkeypatch, tmp_path):
    def folders():
        return {path.name for path in tmp_path.glob("nanochat-run-*")}

    run = "import os; from nanochat.execution import execute_code; execute_code('while True: pass', timeout=300)"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    alive, dead = (subprocess.Popen([sys.executable, "-c", run], env=environment) for _ in range(2))
    try:
        while len(folders()) < 4:  # of a worker and a judge each
            assert alive.poll() is None
            assert dead.poll() is None
            time.sleep(0.05)
        dead.kill()
        dead.wait()
        (tmp_path / "nanochat-run-file").touch()
        assert len(folders()) == 5
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        # The dead one's children, which hold its folders, end a moment after it.
        deadline = time.monotonic() + 20
        while execute_code("pass").success and len(folders()) > 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(folders()) == 3  # those of the living one, and what is no folder
    finally:
        alive.kill()
        dead.kill()
        alive.wait()


def test_a_program_whose_starter_has_gone_does_not_begin(monkeypatch):
    """Killed before the child can ask for its own death, it would leave a loop behind that nobody ends."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    start = time.monotonic()
    assert not execute_code("while True: pass", timeout=60).success
    assert time.monotonic() - start < 30


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


# --- functions judged from another process ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "-7",
        "2.5",
        "10**300",
        "float('inf')",
        "'naïve'",
        "b'x'",
        "(1, (2, 'a'))",
        "[[], {}]",
        "{1, 2}",
        "{'a': [1], 2: (3,), (4, 5): None}",
        "frozenset({1})",
        "1 + 2j",
        "{'tuple': [1]}",
    ],
)
def test_plain_values_cross_unchanged(value):
    tests = f"v = {value}\nr = same(v)\nassert r == v and type(r) is type(v), r\nassert same(x=v) == v"
    result = check_function("def same(x): return x", "same", tests, allow_weak_isolation=True)
    assert result.success, result


def test_subclasses_of_plain_values_cross_as_these():
    solution = "import collections, enum\nclass E(enum.IntEnum): A = 3\ndef f(x): return collections.Counter(x), E.A"
    assert check_function(solution, "f", "assert f('aab') == ({'a': 2, 'b': 1}, 3)", allow_weak_isolation=True).success


def test_errors_of_the_function_reach_the_tests():
    tests = "try:\n    f(0)\nexcept ZeroDivisionError as e:\n    assert 'zero' in str(e)\nelse:\n    assert False"
    assert check_function("def f(x): return 1 / x", "f", tests, allow_weak_isolation=True).success
    result = check_function("def f(x): return 1 / x", "f", "f(0)", allow_weak_isolation=True)
    assert result.error == "ZeroDivisionError: division by zero"


def test_state_and_helpers_work():
    solution = "calls = []\ndef helper(): return len(calls)\n"
    solution += "def f():\n    print('hi')\n    calls.append(1)\n    return helper()"
    result = check_function(solution, "f", "f()\nassert f() == two()", "def two(): return 2", allow_weak_isolation=True)
    assert result.success
    assert result.stdout == "hi\nhi\n"


def test_time_is_limited_on_both_sides():
    for solution, tests in (("def f():\n while 1: pass", "f()"), ("def f(): pass", "f()\nwhile 1: pass")):
        result = check_function(solution, "f", tests, timeout=0.7, allow_weak_isolation=True)
        assert result.timeout
        assert not result.success


def test_weak_isolation_must_be_allowed(monkeypatch):
    monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "unshare: Operation not permitted"))
    with pytest.raises(IsolationError, match=r"Operation not permitted.*--allow_weak_isolation"):
        check_function("def f(): pass", "f", "f()")
    assert "weak" in str(require_isolation(allow_weak=True))
    assert check_function("def f(): pass", "f", "f()", allow_weak_isolation=True).success


@needs_namespaces
def test_strong_isolation_says_what_it_is():
    assert "no network, no files of yours" in str(isolation())
    code = "import os\nprint(os.getpid() < 10, os.listdir('/tmp'), os.path.exists('/proc/1'), os.path.exists('/etc'))"
    assert execute_code(code).stdout == "True [] False False\n"
