"""Attacks on the sandbox: each must fail its tests, learn nothing of the user's, change nothing, and hurt nobody.

Every attack runs with all fences, with the kernel's alone (no audit hooks) and with Python's alone (no namespaces).
"""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from nanochat import execution
from nanochat.execution import MAX_OUTPUT_BYTES, Isolation, check_function, execute_code, isolation

SECRET = "the-users-own-words"
TESTS = "assert double(2) == 4\nassert double([1]) == [1, 1]\nassert double('ab') == 'abab'\n"
HONEST = "def double(x):\n    return x * 2\n"

# Attacks on the verdict: a function that computes nothing and still wants to pass.
FORGERIES = {
    "sys.exit at import": "import sys\nsys.exit(0)",
    "sys.exit in the call": "import sys\ndef double(x): sys.exit(0)",
    "os._exit at import": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef double(x): os._exit(0)",
    "quit": "quit()",
    "raise SystemExit": "def double(x): raise SystemExit(0)",
    "kill itself": "import os\ndef double(x): os.kill(os.getpid(), 9)",
    "print the verdict": "def double(x): print('passed', flush=True)",
    "print to stderr": "import sys\ndef double(x): sys.stderr.write('passed')",
    "write the verdict to every descriptor": """
import os
def double(x):
    for fd in range(256):
        try: os.write(fd, b"passed")
        except OSError: pass
""",
    "answer before the question": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"value": true}\\n' * 50)
    except OSError: pass
def double(x): return None
""",
    "a message of its own": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"ready": true}\\n{"report": "passed"}\\n{"value": {"opaque": "x"}}\\n')
    except OSError: pass
os._exit(0)
""",
    "read every descriptor": """
import os
def double(x):
    for fd in range(3, 64):
        try:
            os.set_blocking(fd, False)
            os.write(fd, os.read(fd, 10000))
        except OSError: pass
""",
    "an object equal to everything": """
class Yes:
    def __eq__(self, other): return True
    def __getattr__(self, name): return self
    def __bool__(self): return True
def double(x): return Yes()
""",
    "an int equal to everything": """
class Yes(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def double(x): return Yes(7)
""",
    "a str and list equal to everything": """
class S(str):
    def __eq__(self, other): return True
class L(list):
    def __eq__(self, other): return True
def double(x): return S("no") if isinstance(x, str) else L() if isinstance(x, list) else 4
""",
    "not a number": "def double(x): return float('nan')",
    "patched builtins": """
import builtins
builtins.len = builtins.isinstance = builtins.all = lambda *a: True
builtins.AssertionError = ValueError
def double(x): return None
""",
    "patched json": "import json\njson.dumps = lambda *a, **k: '{\"value\": 4}'\ndef double(x): return 4",
    "patched os": "import os\nos.write = os._exit = os.read = lambda *a: 0\ndef double(x): return None",
    "replaced check": "def check(candidate): pass\ndef double(x): return None",
    "harness frames": """
import sys
def double(x):
    frame = sys._getframe()
    while frame:
        for scope in (frame.f_locals, frame.f_globals):
            for name in list(scope):
                if name in ("channel", "tests", "settings", "pack", "unpack"):
                    scope[name] = None
        frame = frame.f_back
""",
    "patched channel": """
import sys
sys._getframe(1).f_globals["pack"] = lambda value: True
def double(x): return None
""",
    "garbage collector": """
import gc
def double(x):
    for o in gc.get_objects():
        if type(o).__name__ == "Channel": o.send({"value": 4})
""",
    "at exit": "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\ndef double(x): raise ValueError",
    "swallowed errors": "import sys\nsys.excepthook = lambda *a: None\ndef double(x): raise AssertionError",
    "a generator": "def double(x): yield x",
    "a name that is no function": "double = 4",
    "no definition": "def treble(x): return x * 3",
    "syntax error": "def double(x:",
    "stack overflow": "def double(x): return double(x)",
    "closed descriptors": "import os\nos.closerange(0, 256)\ndef double(x): return x * 2",
    "junk": "import os\nfor fd in range(3, 64):\n  try: os.write(fd, b'\\xff{[' * 9 + b'\\n')\n  except OSError: pass",
    "deep nesting": "def double(x):\n  for i in range(10**5): x = [x]\n  return x",
    "an enormous answer": "def double(x): return 'x' * (5 << 20)",
    "an enormous number": "def double(x): return 10 ** (3 * 10**4)",
}

# Attacks on the machine; a harmless one that does not reach its goal may not pass either.
HARM = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "thread bomb": "import _thread, time\nwhile True: _thread.start_new_thread(time.sleep, (60,))",
    "daemon": "import os\nif os.fork() == 0:\n  os.setsid()\n  os.fork()\n  while True: pass\nos._exit(0)",
    "spawned shell": "import subprocess\nprint(subprocess.check_output(['sh', '-c', 'cat {file}']))\nassert 0",
    "os.system": "import os\nassert os.system('cat {file}') == 0\nassert 0",
    "exec": "import os\nos.execv('/bin/cat', ['cat', '{file}'])",
    "10 GB": "x = bytearray(10**10)",
    "10 GB in pieces": "x = []\nwhile True: x.append(bytearray(10**7))",
    "10 GB on disk": "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "many files": "for i in range(10**6): open(str(i), 'w').close()",
    "open descriptors": "f = []\nwhile True: f.append(open('x', 'w'))",
    "endless output": "import os\nwhile True: os.write(1, b'x' * 4096)",
    "endless errors": "import os\nwhile True: os.write(2, b'x' * 4096)",
    "endless loop": "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "sleep": "import time\ntime.sleep(1000)",
    "kill the parent": "import os\nos.kill(os.getppid(), 9)\nassert 0",
    "kill this process": "import os\nos.kill({pid}, 9)\nassert 0",
    "kill the group": "import os\nos.killpg(0, 9)\nassert 0",
    "kill everybody": "import os\nos.kill(-1, 9)\nassert 0",
    "read a file": "print(open('{file}').read())\nassert 0",
    "read by descriptor": "import os\nprint(os.read(os.open('{file}', os.O_RDONLY), 1000))\nassert 0",
    "read by a link": "import os\nos.symlink('{file}', 'link')\nprint(open('link').read())\nassert 0",
    "read through a parent folder": "print(open('../../../../../../..{file}').read())\nassert 0",
    "list the folder": "import os\nprint(os.listdir('{folder}'))\nassert 0",
    "walk": "import os\nprint(list(os.scandir('{folder}')))\nassert 0",
    "read the home": "import pathlib\nprint([p.name for p in pathlib.Path('{home}').iterdir()])\nassert 0",
    "write outside": "open('{file}', 'w').write('gone')\nassert 0",
    "append outside": "open('{file}', 'a').write('gone')\nassert 0",
    "new file outside": "open('{folder}/new', 'w').write('new')\nassert 0",
    "remove": "import os\nos.remove('{file}')\nassert 0",
    "remove a tree": "import shutil\nshutil.rmtree('{folder}')\nassert 0",
    "rename": "import os\nos.rename('{file}', '{file}2')\nassert 0",
    "truncate": "import os\nos.truncate('{file}', 0)\nassert 0",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).send(b'x')\nassert 0",
    "connect low": "import _socket\n_socket.socket().connect(('127.0.0.1', {port}))\nassert 0",
    "fetch": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)\nassert 0",
    "listen": "import socket\nsocket.create_server(('0.0.0.0', 0))\nraise SystemExit",
    "native code": "import ctypes\nctypes.CDLL(None).kill({pid}, 9)\nassert 0",
    "crash": "import ctypes\nctypes.string_at(0)",
    "environment": "import os\nprint(dict(os.environ))\nassert 0",
    "parent's environment": "print(open('/proc/{pid}/environ').read())\nassert 0",
    "parent's memory": "print(open('/proc/{pid}/mem', 'rb').read(10))\nassert 0",
    "own memory": "print(open('/proc/self/mem', 'rb').seek(10))\nassert 0",
    "lift the limits": "import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (9999, 9999))\nassert 0",
    "become root": "import os\nos.setuid(0)\nos.seteuid(0)\nprint(open('{file}').read())\nassert 0",
    "leave the root": "import os\nos.chroot('/')\nassert 0",
    "bytecode": "f = (lambda: 0)\nf.__code__ = f.__code__.replace(co_code=b'\\x00' * 100)\nf()\nassert 0",
}

# These run until the time is up, which is tried once.
ENDLESS = {"endless output", "endless errors", "endless loop", "sleep", "10 GB on disk", "thread bomb", "many files"}
FINITE_HARM = {name: code for name, code in HARM.items() if name not in ENDLESS}


@pytest.fixture
def weak(monkeypatch):
    monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "for the test"))


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """What attacks are after: a file, a folder, an environment variable, a server; checked afterwards."""
    monkeypatch.setenv("MY_SECRET", SECRET)
    folder = tmp_path / "home"
    folder.mkdir()
    file = folder / f"{SECRET}.txt"
    file.write_text(SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        facts = {"file": file, "folder": folder, "home": folder, "pid": os.getpid(), "port": server.getsockname()[1]}
        yield {f"{{{name}}}": str(value) for name, value in facts.items()}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert file.read_text() == SECRET


def assert_nothing_gained(code: str, victim: dict[str, str], **options: bool) -> None:
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    for placeholder, value in victim.items():
        code = code.replace(placeholder, value)
    result = execute_code(code, timeout=0.8, **options)
    assert not result.success
    assert result.error
    # An error may name the path that was asked for, which the attack knew; it may not show what is in there.
    output = (result.stdout + result.stderr + (result.error or "")).replace(victim["{file}"], "")
    assert SECRET not in output
    assert max(len(result.stdout), len(result.stderr)) <= MAX_OUTPUT_BYTES
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= children


def test_an_honest_function_passes():
    assert check_function(HONEST, "double", TESTS, allow_weak_isolation=True).success


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_forgeries_fail(code):
    result = check_function(code, "double", TESTS, timeout=3, allow_weak_isolation=True)
    assert not result.success
    assert result.error


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_forgeries_fail_without_namespaces(code, weak):
    assert not check_function(code, "double", TESTS, timeout=3, allow_weak_isolation=True).success


@pytest.mark.parametrize("code", HARM.values(), ids=HARM)
def test_harm_is_prevented(code, victim):
    assert_nothing_gained(code, victim)


@pytest.mark.skipif(not isolation().strong, reason="the kernel offers no namespaces here")
@pytest.mark.parametrize("code", FINITE_HARM.values(), ids=FINITE_HARM)
def test_the_kernels_walls_hold_alone(code, victim):
    if code in (HARM["listen"], HARM["lift the limits"]):
        code += "\nassert 0"
    assert_nothing_gained(code, victim, audit=False)


@pytest.mark.parametrize("code", FINITE_HARM.values(), ids=FINITE_HARM)
def test_pythons_fences_hold_without_namespaces(code, victim, weak):
    assert_nothing_gained(code, victim)


def test_the_parent_stays_small(victim):
    before = psutil.Process().memory_info().rss
    for name in ("endless output", "10 GB in pieces", "many files"):
        assert_nothing_gained(HARM[name], victim)
    check_function(FORGERIES["an enormous answer"], "double", TESTS, allow_weak_isolation=True)
    assert psutil.Process().memory_info().rss - before < 64 << 20
