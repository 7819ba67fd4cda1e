"""The kernel's fences hold against native code, with namespaces and without; right solutions pass.

Runs on the standard library and pytest alone, so that it can be tried as any user and with any Python:
python -m pytest --noconftest -c /dev/null tests/test_sandbox.py
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat import execution
from nanochat.execution import Isolation, check_function, execute_code, isolation, require_isolation
from tasks.humaneval import build_solution

SECRET = "the-users-own-words"
X86 = platform.machine() == "x86_64"
fenced = pytest.mark.skipif(not {"files", "calls"} <= set(isolation().fences), reason="no Landlock or seccomp here")


@pytest.fixture(params=["namespaces", "no namespaces"])
def level(request, monkeypatch):
    """Both levels of isolation, as far as this machine has them."""
    if request.param == "no namespaces":
        monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "for the test"))
    elif not isolation().strong:
        pytest.skip("the kernel offers no namespaces here")
    return request.param


@pytest.fixture
def victim():
    """A folder with a secret and a server, both checked afterwards."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(folder, 0o755)
        file = Path(folder) / "secret.txt"
        file.write_text(SECRET)
        file.chmod(0o666)
        before = file.stat()
        server.settimeout(0)
        abstract = socket.socket(socket.AF_UNIX)
        if sys.platform == "linux":
            abstract.bind(f"\0{folder}")
            abstract.listen()
            abstract.settimeout(0)
        facts = {"folder": folder, "file": file, "pid": os.getpid(), "port": server.getsockname()[1]}
        yield {name: str(value) for name, value in facts.items()}
        for listening in (server, abstract) if sys.platform == "linux" else (server,):
            with pytest.raises(BlockingIOError):
                listening.accept()
        abstract.close()
        assert file.read_text() == SECRET
        after = file.stat()
        assert (before.st_mode, before.st_nlink, before.st_mtime_ns) == (
            after.st_mode,
            after.st_nlink,
            after.st_mtime_ns,
        )
        assert [path.name for path in Path(folder).iterdir()] == [file.name]


# What native code may try; each is true (or a descriptor, or an address) when the kernel lets it.
ATTEMPTS = r"""
read a file | libc.open(b'{file}', 0) >= 0
write a file | libc.open(b'{file}', 1) >= 0
make a file | libc.open(b'{folder}/new', 0o102, 0o600) >= 0
list a folder | bool(os.listdir('{folder}'))
list the root of the processes | bool(os.listdir('/proc'))
read the parent's memory | libc.open(b'/proc/{pid}/mem', 0) >= 0
read the parent's environment | libc.open(b'/proc/{pid}/environ', 0) >= 0
read the users | libc.open(b'/etc/passwd', 0) >= 0
remove a file | libc.unlink(b'{file}') == 0
rename a file | libc.rename(b'{file}', b'{folder}/other') == 0
bring a file in | libc.rename(b'{file}', b'mine') == 0
link a file | libc.link(b'{file}', b'mine') == 0
read by a link | libc.symlink(b'{file}', b'link') == 0 and libc.open(b'link', 0) >= 0
cut a file | libc.truncate(b'{file}', 0) == 0
change a mode | libc.chmod(b'{file}', 0) == 0
change an owner | libc.chown(b'{file}', 1, 1) == 0
change times | libc.utimensat(-100, b'{file}', None, 0) == 0
set an attribute | libc.setxattr(b'{file}', b'user.x', b'x', 1, 0) == 0
a handle of a file | libc.name_to_handle_at(-100, b'{file}', ctypes.byref(ctypes.c_int(128)), buffer, 0) == 0
a pipe with a name | libc.mkfifo(b'pipe', 0o600) == 0
a device | libc.mknod(b'device', 0o020600, 0x103) == 0
a database elsewhere | sqlite('{folder}/new.db')
a file in memory | libc.memfd_create(b'x', 0) >= 0
shared memory | libc.shmget(0, 1 << 20, 0o1600) >= 0
named shared memory | libc.shm_open(b'/nanochat-x', 0o102, 0o600) >= 0
a message queue | libc.msgget(0, 0o1600) >= 0
a named queue | libc.mq_open(b'/nanochat-x', 0o102, 0o600, None) >= 0
semaphores | libc.semget(0, 1, 0o1600) >= 0
space for a file | libc.fallocate(os.open('own', os.O_RDWR | os.O_CREAT), 1, 0, 1 << 40) == 0
an internet socket | libc.socket(2, 1, 0) >= 0
an IPv6 socket | libc.socket(10, 2, 0) >= 0
a raw socket | libc.socket(2, 3, 1) >= 0
a netlink socket | libc.socket(16, 3, 0) >= 0
a local socket | libc.socket(1, 1, 0) >= 0
a packet socket | libc.socket(17, 3, 768) >= 0
a virtual machine's socket | libc.socket(40, 1, 0) >= 0
a cipher's socket | libc.socket(38, 5, 0) >= 0
connect half of a pair | libc.connect(pair(), b'\1\0\0' + b'{folder}', 3 + len(b'{folder}')) == 0
send from half of a pair | libc.sendto(pair(), b'x', 1, 0, b'\1\0\0' + b'{folder}', 3 + len(b'{folder}')) == 1
fork | libc.fork() >= 0
a copied process | call(56, 220, 17, 0, 0, 0, 0) >= 0
a process that shares memory | call(56, 220, 0x100 | 17, 0, 0, 0, 0) >= 0
the new call for processes | call(435, 435, buffer, 88) >= 0
a program | libc.execv(b'/bin/true', (ctypes.c_char_p * 2)(b'true', None)) == 0
a program without an event | fork_exec() > 0
a thread (of a whole program) | libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, libc.pause, None) == 0
signal the parent | libc.kill({pid}, 0) == 0
signal everybody | libc.kill(-1, 0) == 0
signal a thread | call(234, 131, {pid}, {pid}, 0) == 0
signal by a descriptor | libc.fcntl(os.pipe()[0], 8, {pid}) == 0
a larger pipe | libc.fcntl(os.pipe()[0], 1031, 1 << 20) >= 0
a handle of a process | call(434, 434, {pid}, 0) >= 0
trace the parent | libc.ptrace(16, {pid}, 0, 0) == 0
read another's memory | libc.process_vm_readv({pid}, iov, 1, iov, 1, 0) > 0
limits of the parent | libc.prlimit({pid}, 7, None, buffer) == 0 and {pid} != os.getpid()
higher limits | libc.setrlimit(7, b'\xff' * 16) == 0
a namespace for users | libc.unshare(0x10000000) == 0
a namespace for mounts | libc.unshare(0x20000) == 0
another's namespace | libc.setns(os.open('/', os.O_RDONLY | os.O_DIRECTORY), 0) == 0
a mount | libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0
the new call for mounts | call(430, 430, b'tmpfs', 0) >= 0
another root | libc.chroot(b'.') == 0
another user | libc.setresuid(1, 1, 1) == 0
become root | os.getuid() != 0 and libc.setuid(0) == 0
another group | libc.setresgid(1, 1, 1) == 0
the session's keys | call(250, 219, 6, -3, buffer, 100) > 0
the user's keys | call(250, 219, 6, -4, buffer, 100) > 0
a key | call(248, 217, b'user', b'x', b'x', 1, -4) > 0
a program in the kernel | call(321, 280, 0, buffer, 48) >= 0
an event counter | call(298, 241, buffer, 0, -1, -1, 0) >= 0
faults to handle | call(323, 282, 0) >= 0
a ring of calls | call(425, 425, 8, buffer) >= 0
watch a folder | libc.inotify_init1(0) >= 0
the kernel's log | libc.klogctl(10, None, 0) >= 0
a personality | libc.personality(0x0400000) >= 0
another name of the machine | libc.sethostname(b'x', 1) == 0
type into the terminal | libc.ioctl(0, 0x5412, b'x') == 0
be dumped | libc.prctl(4, 1, 0, 0, 0) == 0 and libc.prctl(3, 0, 0, 0, 0) == 1
another filter | libc.prctl(22, 2, buffer, 0, 0) == 0
a priority | libc.setpriority(0, 0, 19) == 0
what runs where | libc.sched_setaffinity(0, 8, b'\1' + bytes(7)) == 0
the machine's memory stays | libc.mlockall(1) == 0
a swap file | libc.swapon(b'own', 0) == 0
accounting | libc.acct(b'own') == 0
a quota | libc.quotactl(0, None, 0, buffer) == 0
"""
PROGRAM = f"""
import ctypes, os, sys
libc, buffer, arm = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(4096), {not X86}
iov = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
def call(x86, other, *args):
    return libc.syscall(other if arm else x86, *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
def pair():
    ends = (ctypes.c_int * 2)()
    assert libc.socketpair(1, 2, 0, ends) == 0
    return ends[0]
def sqlite(path):
    import sqlite3
    return sqlite3.connect(path).execute('create table t(x)') is not None
def fork_exec():
    import subprocess
    return subprocess.Popen(['/bin/true']).pid
for line in sys.argv[1:] or ATTEMPTS.strip().splitlines():
    name, _, expression = line.partition(' | ')
    try:
        if eval(expression):
            print('GOT', name, flush=True)
    except (OSError, AttributeError, ImportError):
        pass  # refused, or this system's C library does not have it
    except Exception as error:
        if 'unable to open' not in str(error):
            raise
print('end')
"""


def attempts(victim: dict[str, str]) -> str:
    text = ATTEMPTS
    for name, value in victim.items():
        text = text.replace(f"{{{name}}}", value)
    return f"ATTEMPTS = {text!r}\n{PROGRAM}"


@fenced
def test_the_kernel_refuses_native_code_all_but_computing(level, victim):
    result = execute_code(attempts(victim), timeout=30, audit=False)
    assert result.success, result
    # In a namespace its own /tmp is a file system where this harms nobody.
    assert [line for line in result.stdout.splitlines() if line.startswith("GOT")] == []
    assert SECRET not in result.stdout + result.stderr


@fenced
def test_a_new_process_is_refused_to_functions_too(level):
    """They may start threads, so the filter lets some clones through."""
    solution = "import os\ndef f(kind): return getattr(os, kind)()"
    for kind in ("fork", "forkpty"):
        result = check_function(solution, "f", f"f({kind!r})", allow_weak_isolation=True)
        assert not result.success
        assert "PermissionError" in result.error


def test_threads_of_a_function_are_bounded(level):
    solution = """
import threading
def f():
    threading.stack_size(1 << 16)
    started = 0
    stop = threading.Event()
    try:
        while started < 2000:
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    except RuntimeError:
        pass
    stop.set()
    return started
"""
    result = check_function(solution, "f", "assert f() < 1500, f()", timeout=30, allow_weak_isolation=True)
    assert result.success or os.getuid() == 0, result


# --- execute_code's verdict ------------------------------------------------------------------------------------------

FORGERIES = {
    "a subinterpreter without hooks": """
import _xxsubinterpreters as s
s.run_string(s.create(), "import ctypes, os\\nos._exit(0)")
assert 1 == 2
""",
    "its later name": "import _interpreters as s\ns.run_string(s.create(), 'import os; os._exit(0)')\nassert 1 == 2",
    "made past the import": """
import _imp, importlib.machinery
s = None
for name in ("_xxsubinterpreters", "_interpreters", "_ctypes"):
    try:
        s = _imp.create_builtin(importlib.machinery.ModuleSpec(name, None)) or s
    except ImportError:
        pass
if s:
    import os
    os._exit(0)
assert 1 == 2
""",
    "native code": "import ctypes\nctypes.CDLL(None)._exit(0)\nassert 1 == 2",
    "native code that was there": "import sys\nsys.modules['ctypes'].CDLL(None)._exit(0)\nassert 1 == 2",
    "native code of the harness": """
import sys
frame = sys._getframe()
while frame:
    for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
        getattr(value, "ctypes", None) and value.ctypes.CDLL(None)._exit(0)
    frame = frame.f_back
assert 1 == 2
""",
    "a module of its own": """
import importlib.machinery, importlib.util, shutil, sysconfig, glob
for path in glob.glob(sysconfig.get_path("platstdlib") + "/lib-dynload/_ctypes.*"):
    shutil.copyfile(path, "other.so")
    spec = importlib.util.spec_from_file_location("_ctypes", "other.so")
    importlib.util.module_from_spec(spec)
    import os
    os._exit(0)
assert 1 == 2
""",
    "what the judge asks for": "def reached_the_end(): return ''\nassert 1 == 2",
    "the worker's answers": """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'{"ready": true}\\n{"value": true}\\n{"value": null}\\n')
    except OSError:
        pass
assert 1 == 2
""",
    "the end without the middle": """
import sys
frame = sys._getframe()
while frame:
    for value in frame.f_locals.values():
        if isinstance(value, str) and "reached_the_end" in value:
            exec(value, globals())
            import time
            time.sleep(60)
    frame = frame.f_back
assert 1 == 2
""",
    "an early exit": "import os\nos._exit(0)\nassert 1 == 2",
}


@pytest.mark.parametrize("code", FORGERIES.values(), ids=FORGERIES)
def test_a_program_cannot_say_that_it_reached_its_end(code, level):
    result = execute_code(code, timeout=10)
    assert not result.success
    assert not result.timeout
    assert result.error


# --- what is left behind ---------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


DEEP = """
import os
for i in range(3000):
    os.mkdir("{name}")
    os.chdir("{name}")
"""


@pytest.mark.parametrize("name", ["d", "d" * 250])
def test_a_deep_folder_is_removed(name, level, scratch):
    execute_code(DEEP.replace("{name}", name), timeout=20)
    assert list(scratch.iterdir()) == []


def test_a_folder_without_permissions_is_removed(level, scratch):
    execute_code("import os\nos.mkdir('a')\nos.mkdir('a/b')\nopen('a/b/c', 'w').close()\nos.mkdir('x', 0)")
    assert list(scratch.iterdir()) == []


def test_all_files_together_are_limited(level, scratch):
    code = "for i in range(4000):\n  with open(str(i), 'wb') as f: f.write(bytes(1 << 19))"
    most = [0]
    done = threading.Event()

    def watch():
        while not done.wait(0.01):
            with contextlib.suppress(OSError):
                most[0] = max(most[0], sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = execute_code(code, timeout=20)
    done.set()
    watcher.join()
    assert not result.success
    assert not result.timeout
    assert most[0] < 300 << 20
    assert list(scratch.iterdir()) == []
    if level == "no namespaces":
        assert "wrote more than 32 MB" in result.error


DELETED = """
import os
kept = []
for i in range(60):
    try:
        kept.append(open(f'f{i}', 'wb', buffering=0))
        os.unlink(f'f{i}')
        while True: kept[-1].write(bytes(1 << 16))
    except OSError: pass
size = sum(os.fstat(f.fileno()).st_size for f in kept)
assert 0 < size <= 32 << 20, size
"""


def test_files_that_are_deleted_while_open_are_limited_too(level, scratch):
    result = execute_code(DELETED, timeout=20)
    assert result.success, result.stderr
    assert list(scratch.iterdir()) == []


def test_files_that_cannot_be_seen_are_limited_too(monkeypatch, scratch):
    """A folder that may be entered and not listed hides what is in it."""
    monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "for the test"))
    code = "import os, time\nos.mkdir('a', 0o300)\nopen('a/b', 'w').close()\ntime.sleep(30)"
    result = execute_code(code, timeout=10)
    assert not result.timeout or os.getuid() == 0
    assert list(scratch.iterdir()) == []


def test_the_callers_keys_are_not_the_programs(level):
    if sys.platform != "linux":
        pytest.skip("no keyrings")
    libc, number = ctypes.CDLL(None, use_errno=True), (248 if X86 else 217)
    if libc.syscall(number, b"user", b"nanochat-test", SECRET.encode(), len(SECRET), -3) < 0:
        pytest.skip("this session can hold no key")
    find = f"""
import ctypes
libc, buffer = ctypes.CDLL(None), ctypes.create_string_buffer(100)
key = libc.syscall({250 if X86 else 219}, 10, -3, b"user", b"nanochat-test", 0)
libc.syscall({250 if X86 else 219}, 11, key, buffer, 100)
print(key > 0, buffer.raw)
"""
    result = execute_code(find, audit=False)
    assert result.success, result
    assert result.stdout.startswith("False")
    assert SECRET not in result.stdout


# --- what isolation says ---------------------------------------------------------------------------------------------


def test_isolation_names_what_holds(monkeypatch):
    text = str(isolation())
    assert ("Landlock opens only" in text) == ("files" in isolation().fences)
    assert ("a system call filter refuses" in text) == ("calls" in isolation().fences)
    assert isolation().user.split()[0] in text
    bare = str(Isolation(False, "unshare: no"))
    assert "no Landlock for files, where only Python's audit hooks hold programs back" in bare
    monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "no", (), "root of this machine"))
    with pytest.raises(execution.IsolationError, match="run as root of this machine"):
        require_isolation(allow_weak=False)


def test_an_unprivileged_user_runs_programs_of_root():
    if os.getuid() != 0:
        pytest.skip("this is not root")
    code = "import os\nprint(os.getuid(), os.getgid(), os.getgroups())"
    if isolation().strong:
        assert execute_code(code).stdout == "65534 65534 []\n"
    assert ("root of this machine" in isolation().user) == (execute_code(code).stdout[0] == "0")


# --- right solutions -------------------------------------------------------------------------------------------------

PROMPT = 'def f(x: int) -> int:\n    """ Return x + 1. """\n'
TESTS = "def check(c):\n    assert c(1) == 2\n    assert c(5) == 6\ncheck(f)\n"
SOLUTIONS = """
## guard with input
def f(x):
    return x + 1

if __name__ == "__main__":
    print(f(int(input())))
## guard with exit
import sys
def f(x):
    return x + 1

def main():
    print(f(3))
    return 0

if __name__ == "__main__":
    sys.exit(main())
## guard with unittest
import unittest
def f(x): return x + 1
class T(unittest.TestCase):
    def test(self): self.assertEqual(f(1), 2)
if __name__ == "__main__":
    unittest.main()
## guard with doctest
def f(x):
    return x + 1
if __name__ == "__main__":
    import doctest
    doctest.testmod()
## doctest without a guard
def f(x):
    '''
    >>> f(1)
    2
    '''
    return x + 1
import doctest
doctest.testmod()
## threads
import threading
def f(x):
    results = []
    thread = threading.Thread(target=lambda: results.append(x + 1))
    thread.start()
    thread.join()
    return results[0]
## a pool of threads
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(lambda i: x + 1, range(40)))[-1]
## asyncio
import asyncio
async def g(x):
    await asyncio.sleep(0)
    return x + 1
def f(x):
    return asyncio.run(g(x))
## a timer
import threading
def f(x):
    done = threading.Event()
    threading.Timer(0.01, done.set).start()
    done.wait()
    return x + 1
## a large stack
import sys, threading
sys.setrecursionlimit(10**5)
threading.stack_size(1 << 26)
def f(x):
    results = []
    def g(n): return 0 if n == 0 else 1 + g(n - 1)
    thread = threading.Thread(target=lambda: results.append(g(5000) - 4999 + x))
    thread.start()
    thread.join()
    return results[0]
## Fraction
from fractions import Fraction
def f(x): return Fraction(x + 1)
## Decimal
from decimal import Decimal
def f(x): return Decimal(x) + 1
## a package that is not there
try:
    import numpy
except ImportError:
    pass
def f(x): return x + 1
## modules that open sockets when they are used
import http.client, urllib.request, socket, asyncio, subprocess, multiprocessing
def f(x): return x + 1
## pickle
import pickle
class A: pass
def f(x):
    pickle.loads(pickle.dumps(A()))
    return x + 1
## dataclass
from dataclasses import dataclass
@dataclass
class A:
    v: "int"
def f(x): return A(x).v + 1
## a class
class F:
    def __call__(self, x): return x + 1
f = F()
## own files
import os, tempfile
def f(x):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a")
        with open(path, "w") as file: file.write(str(x + 1))
        with open(path) as file: return int(file.read())
## a profile
import cProfile
def f(x):
    with cProfile.Profile(): return x + 1
"""
RIGHT = dict(section.split("\n", 1) for section in SOLUTIONS.split("## ")[1:])


def judged(answer: str, tests: str = TESTS, prompt: str = PROMPT):
    return check_function(build_solution(prompt, "f", answer), "f", tests, prompt, allow_weak_isolation=True)


@fenced
@pytest.mark.parametrize("code", RIGHT.values(), ids=RIGHT)
def test_a_right_solution_passes(code, level):
    result = judged(f"```python\n{code}\n```")
    assert result.success, result


@pytest.mark.parametrize(
    ("value", "tests"),
    [
        ("range(3)", "assert f(0) == range(3) and list(f(0)) == [0, 1, 2]"),
        ("(i for i in range(3))", "assert tuple(f(0)) == (0, 1, 2)"),
        ("map(str, [1, 2])", "assert list(f(0)) == ['1', '2']"),
        ("itertools.count()", "import itertools\nassert list(itertools.islice(f(0), 2)) == [0, 1]"),
        ("{1: 2}.keys()", "assert f(0) == {1} and f(0) & {1, 3} == {1}"),
        ("{1: 2}.values()", "assert sorted(f(0)) == [2]"),
        ("{1: 2}.items()", "assert f(0) == {(1, 2)}"),
        ("collections.deque([1, 2])", "import collections\nassert f(0) == collections.deque([1, 2])"),
        ("fractions.Fraction(1, 3)", "assert f(0) * 3 == 1"),
        ("[decimal.Decimal('0.1')]", "assert f(0)[0] * 10 == 1"),
        ("{'a': (1, fractions.Fraction(2))}", "assert f(0) == {'a': (1, 2)}"),
    ],
)
def test_a_result_of_the_standard_library_is_itself_in_the_tests(value, tests):
    code = f"import collections, decimal, fractions, itertools\ndef f(x): return {value}"
    result = check_function(code, "f", tests, allow_weak_isolation=True)
    assert result.success, result


EQUAL = "  def __eq__(self, other): return True\n  __hash__ = None\n"


@pytest.mark.parametrize(
    "code",
    [
        f"class F(fractions.Fraction):\n{EQUAL}def f(x): return F(9)",
        f"class D(decimal.Decimal):\n{EQUAL}def f(x): return D(9)",
        f"class Q(collections.deque):\n{EQUAL}def f(x): return Q()",
        f"class I:\n{EQUAL}  def __iter__(self): return self\n  def __next__(self): return 2\ndef f(x): return I()",
        "class G(list):\n  def __iter__(self): return iter([2])\ndef f(x): return G()",
        "fractions.Fraction.__eq__ = lambda a, b: True\ndef f(x): return fractions.Fraction(9)",
        "import sys, types\nsys.modules['fractions'] = types.SimpleNamespace(Fraction=object)\ndef f(x): return object",
    ],
)
def test_a_value_that_says_it_is_equal_is_not(code):
    code = "import collections, decimal, fractions\n" + code
    assert not check_function(code, "f", TESTS, allow_weak_isolation=True).success


ANSWERS = {
    "an example first": "For example:\n```\n>>> f(1)\n2\n```\nSo:\n```python\ndef f(x):\n    return x + 1\n```",
    "sentences around": "Sure!\n\nimport math\n\ndef f(x):\n    return x + 1\n\nThis function adds one.",
    "a sentence in a text": "def f(x):\n    '''\nAdds one.\n    '''\n    return x + 1",
    "only the body": "    return x + 1\n",
    "a body further left": "```python\nreturn x + 1\n```",
    "a longer body further left": "```python\nif x:\n    return x + 1\nreturn 1\n```",
    "a first line further left": "y = x\n    return y + 1",
    "a first block further left": "if x:\n        return x + 1\n    return 1",
    "a lambda": "f = lambda x: x + 1",
    "an annotated name": "from typing import Callable\nf: Callable = lambda x: x + 1",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_code_is_found_in_an_answer(answer):
    result = judged(answer)
    assert result.success, (result, build_solution(PROMPT, "f", answer))


@pytest.mark.parametrize(
    "answer", ["", "I can't.", "```python\nreturn x\n```", "def g(x):\n    return x + 1", "def f(x): return x"]
)
def test_a_wrong_answer_stays_wrong(answer):
    assert not judged(answer).success


def test_the_time_of_a_sleeping_thread_is_not_waited_for():
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef f(x): return x + 1"
    start = time.monotonic()
    assert judged(f"```python\n{code}\n```").success
    assert time.monotonic() - start < 20
