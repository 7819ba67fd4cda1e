"""Attack the sandbox of nanochat/execution.py: read what was planted, reach a socket, pass without being right, stay.

    python -m dev.attacks                     all levels of isolation that this machine and user have
    python -m dev.attacks --no_namespaces     the kernel refuses namespaces, as in many containers

Run it as root and as a user, with each Python there is. Planted are: a file that everybody may read, an attribute of
it, a variable of the environment, a key, two kinds of shared memory, an inherited descriptor, words in another
process's command line and memory, and servers for TCP, UDP and local sockets. Each attack runs with all fences, and
with the kernel's alone (no audit hooks), with namespaces and without. Exit code 1 if one got anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from nanochat import execution
from nanochat.config import run_script
from nanochat.execution import MAX_OUTPUT_BYTES, Isolation, check_function, execute_code, isolation

SECRET = "the-users-own-words"
X86 = platform.machine() == "x86_64"

# name | expression. Got is what is true and no refusal; text only if the secret is in it. Numbers: x86_64, others.
ATTEMPTS = r"""
read: FileIO | io.FileIO('{file}').read()
read: open_code | io.open_code('{file}').read()
read: a map of the file | mmap.mmap(os.open('{file}', 0), 0, prot=1)[:]
read: pread | os.pread(os.open('{file}', 0), 99, 0)
read: readv | readv(os.open('{file}', 0))
read: sendfile | os.sendfile(os.open('own', 65), os.open('{file}', 0), 0, 99)
read: copy_file_range | os.copy_file_range(os.open('{file}', 0), os.open('own', 65), 99)
read: by an open folder | os.read(os.open('{name}', 0, dir_fd=os.open('{folder}', 0)), 99)
read: openat2 | call(437, 437, -100, b'{file}', buffer, 24) >= 0
read: fopen | libc.fopen(b'{file}', b'r')
read: a handle | call(304, 265, -100, buffer, 0) >= 0
read: codecs | codecs.open('{file}').read()
read: linecache | linecache.getlines('{file}')
read: a configuration | traced(lambda: __import__('configparser').ConfigParser().read('{file}'))
read: a program | traced(lambda: runpy.run_path('{file}'))
read: a module's data | importlib.machinery.SourceFileLoader('x', '{file}').get_data('{file}')
read: a library of its own | libc_of('{file}')
read: a database | sqlite('file:{file}?mode=ro')
read: an attached database | sqlite(':memory:', "attach '{file}' as a")
read: history | history('{file}')
read: dbm | __import__('dbm.gnu').gnu.open('{file}')
read: certificates | __import__('ssl').create_default_context(cafile='{file}')
read: an attribute | os.getxattr('{file}', 'user.words')
read: an attribute, native | libc.getxattr(b'{file}', b'user.words', buffer, 99) > 0 and buffer.value
read: the shared folder | open('/dev/shm/{shared}').read()
read: shared memory | bytes(__import__('multiprocessing.shared_memory').shared_memory.SharedMemory('{shared}').buf)
read: System V memory | attach({segment})
read: the newest System V memory | libc.shmctl(0, 15, buffer) >= 0
read: a queue | libc.mq_open(b'/{shared}', 0) >= 0
read: the key | key(call(250, 219, 10, -3, b'user', b'nanochat-attack', 0))
read: the user's key | key(call(250, 219, 10, -4, b'user', b'nanochat-attack', 0))
read: a requested key | key(call(249, 218, b'user', b'nanochat-attack', None, 0))
read: the list of keys | bool(open('/proc/keys').read(9))
read: persistent keys | call(250, 219, 22, -1, -3) > 0
read: the environment | str(dict(os.environ))
read: the first environment | open('/proc/self/environ').read()
read: the C library's environment | environ()
read: the parent's environment | open('/proc/{pid}/environ').read()
read: another's command line | open('/proc/{other}/cmdline').read()
read: another's command line, by another way | open('/proc/1/root/proc/{other}/cmdline').read()
read: through another's root | open('/proc/{pid}/root{file}').read()
read: through the first's root | open('/proc/1/root{file}').read()
read: through one's own root | open('/proc/self/root{file}').read()
read: another's descriptors | [open(f'/proc/{pid}/fd/{n}').read() for n in os.listdir('/proc/{pid}/fd')]
read: one's own descriptors | [open(f'/proc/self/fd/{n}').read(99) for n in os.listdir('/proc/self/fd') if int(n) > 2]
read: inherited descriptors | inherited()
read: what others sent | [socket.socket(fileno=n).recv(99, 64) for n in range(3, 64)]
read: another's memory | libc.process_vm_readv({other}, iov, 1, iov, 1, 0) > 0
read: another's memory file | open('/proc/{other}/mem', 'rb') is not None
read: attach to another | libc.ptrace(16, {other}, 0, 0) == 0
read: seize another | libc.ptrace(0x4206, {other}, 0, 0) == 0
read: another's descriptor | call(438, 438, call(434, 434, {pid}, 0), 3, 0) >= 0
read: another's pages | call(279, 239, {other}, 1, buffer, None, buffer, 0) >= 0
read: the machine's memory | bool(open('/proc/kcore', 'rb').read(9))
read: the users | bool(open('/etc/passwd').read(9))
read: passwords | bool(__import__('pwd').getpwuid(0).pw_dir)
read: mounts | bool(open('/proc/self/mountinfo').read(9))
read: a ring | call(425, 425, 8, buffer) >= 0
read: a watched file system | call(300, 262, 0, 0) >= 0
read: a perf event | call(298, 241, buffer, 0, -1, -1, 0) >= 0
read: a name space of another | libc.setns(os.open('/proc/{pid}/ns/mnt', 0), 0) == 0
read: a copy of the tree | call(428, 428, -100, b'/', 0x1) >= 0
read: a file system's context | call(430, 430, b'proc', 0) >= 0
read: the kernel's log | libc.klogctl(10, None, 0) >= 0
socket: TCP | socket.create_connection(('127.0.0.1', {port}), 1)
socket: UDP | socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port}))
socket: local | socket.socket(1, 1).connect('{local}') is None
socket: abstract | socket.socket(1, 1).connect('\0{shared}') is None
socket: half of a pair, connected | socket.socketpair()[0].connect('{local}') is None
socket: half of a pair of datagrams | socket.socketpair(1, 2)[0].sendto(b'x', '\0{shared}d')
socket: a message from half of a pair | socket.socketpair(1, 2)[0].sendmsg([b'x'], [], 0, '\0{shared}d')
socket: a descriptor handed over | socket.send_fds(socket.socketpair()[0], [b'x'], [0])
socket: asyncio | asyncio.run(asyncio.open_connection('127.0.0.1', {port}))
socket: asyncio's datagrams | asyncio.run(datagram({port}))
socket: TLS | __import__('ssl').get_server_certificate(('127.0.0.1', {port}), timeout=1)
socket: a name | socket.getaddrinfo('example.com', 80)[0] is not None
socket: an old name | socket.gethostbyname('example.com')
socket: HTTP | __import__('http.client').client.HTTPConnection('127.0.0.1', {port}, timeout=1).connect() is None
socket: mail | __import__('smtplib').SMTP('127.0.0.1', {port}, timeout=1)
socket: XML | __import__('xmlrpc.client').client.ServerProxy('http://127.0.0.1:{port}').x()
socket: a log | __import__('logging.handlers').handlers.SysLogHandler(('127.0.0.1', {port})).emit
socket: multiprocessing | __import__('multiprocessing.connection').connection.Client('{local}')
socket: netlink | socket.socket(16, 3, 0)
socket: a virtual machine's | socket.socket(40, 1)
socket: packets | socket.socket(17, 3)
socket: raw | socket.socket(2, 3, 1)
socket: Bluetooth | libc.socket(31, 3, 0) >= 0
socket: a cipher's | libc.socket(38, 5, 0) >= 0
socket: express data path | libc.socket(44, 3, 0) >= 0
socket: multipath TCP | libc.socket(2, 1, 262) >= 0
socket: listen | socket.create_server(('127.0.0.1', 0))
socket: a pair of another family | call(53, 199, 2, 1, 0, buffer) == 0
stay: a file in memory | os.memfd_create('x') >= 0
stay: secret memory | call(447, 447, 0) >= 0
stay: a shared file | open('/dev/shm/{mark}', 'w')
stay: a semaphore | __import__('multiprocessing').Semaphore()
stay: a temporary file elsewhere | open('/var/tmp/{mark}', 'w')
stay: a file in the home | open('{folder}/.bashrc', 'w')
stay: TLS's log of keys | keylog('{folder}/new')
stay: a history file | __import__('readline').write_history_file('{folder}/new') is None
stay: a trace of memory | __import__('tracemalloc').take_snapshot().dump('{folder}/new') is None
stay: faults | __import__('faulthandler').enable(open('{folder}/new', 'w')) is None
stay: a link | os.link('{file}', 'mine') is None
stay: a special file | os.mkfifo('pipe') is None
stay: a device | os.mknod('device', 0o20600, 0x103) is None
stay: a program for its owner | os.chmod('own', 0o4777) is None and os.stat('own').st_mode & 0o4000 and WEAK
stay: an owner | os.chown('own', 0, 0) is None and os.getuid() != 0
stay: another's times | os.utime('{file}') is None
stay: a lock | __import__('fcntl').lockf(os.open('{file}', os.O_RDWR), 2) is None
stay: space | os.posix_fallocate(os.open('own', 66), 0, 1 << 40) is None
stay: a larger pipe | __import__('fcntl').fcntl(os.pipe()[0], 1031, 1 << 20) > 0
stay: a new session | os.setsid() >= 0
stay: a process | os.fork() >= 0
stay: a process of its own kind | call(435, 435, buffer, 88) >= 0
stay: a process, quickly | os.posix_spawn('/bin/true', ['true'], {})
stay: a shell | subprocess.run(['true']).returncode == 0
stay: a pool | __import__('multiprocessing').Process(target=print).start() is None
stay: real time | os.sched_setscheduler(0, 1, os.sched_param(1)) is None
stay: more than its share | os.nice(-5) or True
stay: another's share | os.setpriority(0, {pid}, 19) is None
stay: all memory | __import__('resource').setrlimit(9, (-1, -1)) is None
stay: locked memory | libc.mlockall(1) == 0
stay: another interpreter | interpreter()
stay: a timer that outlives | libc.timer_create(0, None, buffer) == 0
"""
HELPERS = f"""
import codecs, importlib.machinery, io, linecache, os, runpy, signal, sys
for name in 'asyncio ctypes mmap socket subprocess'.split():
    try:
        globals()[name] = __import__(name)
    except ImportError:
        pass  # refused by an audit hook: what needs it fails
if 'ctypes' in globals():
    libc, buffer = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(4096)
    iov = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
def call(x86, other, *args):
    number = x86 if {X86} else other
    return libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
def readv(fd):
    data = bytearray(99)
    os.readv(fd, [data])
    return data
def traced(run):
    import traceback
    try:
        run()
    except BaseException:
        return traceback.format_exc()
def libc_of(path):
    return str(ctypes.CDLL(path))
def sqlite(path, command='select * from sqlite_master'):
    import sqlite3
    return sqlite3.connect(path, uri=path.startswith('file:')).execute(command) is not None
def history(path):
    import readline
    readline.read_history_file(path)
    return readline.get_history_item(1)
def attach(segment):
    libc.shmat.restype = ctypes.c_void_p
    at = libc.shmat(segment, None, 0o10000)
    return at not in (None, ctypes.c_void_p(-1).value) and ctypes.string_at(at, 99)
def key(number):
    return number > 0 and call(250, 219, 11, number, buffer, 99) > 0 and buffer.value
def environ():
    values, found = ctypes.POINTER(ctypes.c_char_p).in_dll(libc, 'environ'), []
    while values[len(found)]:
        found.append(values[len(found)])
    return found
def inherited():
    found = []
    for fd in range(3, 1024):
        try:
            os.set_blocking(fd, False)
            found.append(os.pread(fd, 99, 0))
        except OSError:
            pass
    return found
async def datagram(port):
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(asyncio.DatagramProtocol, remote_addr=('127.0.0.1', port))
    transport.sendto(b'x')
    return True
def keylog(path):
    import ssl
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = path
    return True
def interpreter():
    try:
        import _interpreters as s
    except ImportError:
        import _xxsubinterpreters as s
    return WEAK is None or s.create() is None
def late(*_):
    raise TimeoutError
open('own', 'w').close()
signal.signal(signal.SIGALRM, late)
for line in ATTEMPTS.strip().splitlines():
    name, _, expression = line.partition(' | ')
    signal.alarm(3)
    try:
        found = eval(expression)
        text = found if isinstance(found, (str, bytes, bytearray)) else str(found) if isinstance(found, list) else ''
        if isinstance(text, (bytes, bytearray)):
            text = text.decode(errors='replace')
        if (PLANTED[::-1] in text) or (found and not text and not isinstance(found, (list, str, bytes, bytearray))):
            print('GOT', name, repr(found)[:99], flush=True)
    except BaseException:
        pass  # refused, or this system does not have it
    finally:
        signal.alarm(0)
print('end')
"""

# Programs that hold for themselves: they may not pass, and must be gone in time.
PROGRAMS = {
    "calls of 32 bits": """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')  # getpid by int 0x80, whose numbers no filter for 64 bits knows
print('GOT', ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
assert 0
""",
    "calls of x32": """
import ctypes
if ctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0) >= 0: print('GOT')
assert 0
""",
    "signals ignored": """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "signals blocked": "import signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
    "a regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "a large power": "x = 9 ** (9 ** 9)",
    "shared pages": """
import mmap
pages = []
while True:
    pages.append(mmap.mmap(-1, 1 << 24))
    pages[-1].write(bytes(1 << 24))
""",
    "full pipes": """
import os
ends = []
for _ in range(1000):
    end = os.pipe(); os.set_blocking(end[1], False); ends.append(end)
    try: os.write(end[1], bytes(1 << 16))
    except BlockingIOError: pass
""",
    "a sparse file": "f = open('x', 'wb')\nf.truncate(1 << 40)",
    "links everywhere": """
import os
for i in range(3000): os.symlink('{folder}', f'l{i}')
os.symlink('.', 'round')
assert 0
""",
    "a deep tree of links": """
import os
for i in range(200):
    os.mkdir('d'); os.symlink('{folder}', 'l'); os.chdir('d')
assert 0
""",
    "locked folders": "import os\nos.makedirs('a/b/c')\nfor p in ('a/b/c', 'a/b', 'a'): os.chmod(p, 0)\nassert 0",
    "names that are no text": "import os\nopen(b'\\xff\\n\\x1b[2J', 'w').close()\nos.mkdir(b'\\xfe')\nassert 0",
    "much to say": "import os\ntry:\n  while True: os.write(1, b'\\0' * 65536)\nfinally: pass",
    "an error too long": "raise ValueError('x' * (1 << 27))",
    "an error that never ends": "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E",
    "a thread at the end": """
import threading
threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()
assert 0
""",
    "work at the end": "import atexit\natexit.register(lambda: [0 for _ in iter(int, 1)])\nassert 0",
    "closed output": "import os\nos.close(1); os.close(2)\nassert 0",
    "the end, deleted": "def reached_the_end(): return 1\nimport builtins\nbuiltins.exec = print\nassert 0",
}

HONEST = "def double(x):\n    return x * 2\n"
TESTS = "assert double(2) == 4\nassert double([1]) == [1, 1]\nassert double('ab') == 'abab'\n"
# Functions that double nothing.
FORGERIES = {
    "the class of the channel": """
for c in object.__subclasses__():
    if c.__name__ == 'Channel': c.send = lambda self, m: None
def double(x): return 4
""",
    "answers ahead": """
import os
def double(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"value": [1, 1]}\\n{"value": "abab"}\\n')
        except OSError: pass
    return 4 if x == 2 else None
""",
    "an answer that is no value": """
import os
def double(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"value": {"Decimal": "sNaN"}}\\n')
        except OSError: pass
""",
    "an answer of no kind": """
import os
def double(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"value": {"__class__": 1, "b": 2}}\\n{"value": {"exec": "1"}}\\n')
        except OSError: pass
""",
    "an error that is none": """
import os
def double(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"error": "passed", "kind": "exit"}\\n{"error": "x", "kind": "eval"}\\n')
        except OSError: pass
""",
    "nested without end": """
import os
def double(x):
    for fd in range(3, 64):
        try: os.write(fd, b'{"value": ' + b'[' * 500000 + b']' * 500000 + b'}\\n')
        except OSError: pass
""",
    "a number equal to all": """
class N(float):
    def __eq__(s, o): return True
    __hash__ = None
def double(x): return N(0)
""",
    "a metaclass": """
class M(type):
    def __eq__(s, o): return True
    def __instancecheck__(s, o): return True
    __hash__ = None
class double(metaclass=M):
    def __init__(self, x): pass
""",
    "the tests, redefined": "def double(x): return x\ndef check(f): return True\nassert_ = lambda *a: True",
    "other interpreters": """
try:
    import _interpreters as s
except ImportError:
    import _xxsubinterpreters as s
s.run_string(s.create(), "import os; os._exit(0)")
def double(x): return 0
""",
    "a thread that answers": """
import os, threading
def shout():
    while True:
        for fd in range(3, 16):
            try: os.write(fd, b'{"value": true}\\n')
            except OSError: pass
threading.Thread(target=shout, daemon=True).start()
def double(x): return True
""",
    "a thread that leaves": """
import os, threading
threading.Timer(0.2, os._exit, (0,)).start()
def double(x):
    import time; time.sleep(9)
""",
    "an exit in a handler": """
import os, signal
signal.signal(14, lambda *a: os._exit(0))
signal.setitimer(0, .1)
while 1: 0
""",
    "everything patched": """
import builtins, json, sys, unittest
for module in (json, unittest, sys.modules['__main__']):
    for name in list(vars(module)):
        if callable(getattr(module, name)):
            try: setattr(module, name, lambda *a, **k: True)
            except Exception: pass
builtins.repr = builtins.str = lambda *a: '4'
def double(x): return None
""",
    "an iterator for a list": "def double(x): return iter([1, 1])",
    "code changed in place": """
import sys
f = sys._getframe()
while f:
    for v in [*f.f_locals.values(), *f.f_globals.values()]:
        c = getattr(v, '__code__', None)
        if c and v.__name__ in ('pack', 'unpack', 'error_line'): v.__code__ = (lambda value: True).__code__
    f = f.f_back
def double(x): return None
""",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the attacks."""

    no_namespaces: bool = False
    """Let the kernel refuse namespaces first, as many containers do."""


# --- what is planted --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted() -> Iterator[dict[str, str]]:
    """Plant the secret everywhere; yields what attacks are told. Raises AssertionError if anything was touched."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        file = folder / "words.txt"
        file.write_text(SECRET)
        with contextlib.suppress(OSError):
            os.setxattr(file, "user.words", SECRET.encode())
        stack.enter_context(patch.dict(os.environ, {"MY_WORDS": SECRET}))
        number = 248 if X86 else 217  # add_key
        libc.syscall(number, b"user", b"nanochat-attack", SECRET.encode(), len(SECRET), -3)
        segment = libc.shmget(0, 4096, 0o1666)
        libc.shmat.restype = ctypes.c_void_p
        if segment >= 0:
            ctypes.memmove(libc.shmat(segment, None, 0), SECRET.encode(), len(SECRET))
            stack.callback(libc.shmctl, segment, 0, None)
        shared = Path(f"/dev/shm/nanochat-attack-{os.getpid()}")
        shared.write_text(SECRET)
        shared.chmod(0o666)
        stack.callback(shared.unlink)
        inherited = os.open(file, os.O_RDONLY)
        os.set_inheritable(inherited, True)
        stack.callback(os.close, inherited)
        other = subprocess.Popen([SECRET, "1000"], executable="/bin/sleep", start_new_session=True)
        stack.callback(other.wait)
        stack.callback(other.kill)
        listening = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "local")),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0{shared.name}"),
            (socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{shared.name}d"),
        ):
            server = stack.enter_context(socket.socket(family, kind))
            server.bind(address)
            server.setblocking(False)
            if kind == socket.SOCK_STREAM:
                server.listen()
            listening.append(server)
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(listening[0].getsockname())
        udp.setblocking(False)
        (folder / "local").chmod(0o777)
        before, stat = set(folder.iterdir()), file.stat()
        told = {"file": file, "name": file.name, "folder": folder, "shared": shared.name, "segment": segment}
        told["mark"] = mark = f"nanochat-new-{os.getpid()}"
        told |= {"pid": os.getpid(), "other": other.pid, "port": udp.getsockname()[1], "local": folder / "local"}
        yield {name: str(value) for name, value in told.items()}
        for server in (*listening, udp):
            with contextlib.suppress(BlockingIOError):
                server.recv(1) if server.type == socket.SOCK_DGRAM else server.accept()
                raise AssertionError(f"{server} was reached")
        assert file.read_text() == SECRET, "the file was changed"
        after = file.stat()
        for field in ("st_mode", "st_nlink", "st_uid", "st_mtime_ns", "st_ctime_ns"):
            assert getattr(after, field) == getattr(stat, field), f"{field} of the file was changed"
        # Other programs come and go in the shared folders: only what an attack would have made counts there.
        left = set(folder.iterdir()) - before
        left |= {path for place in ("/dev/shm", "/var/tmp") if (path := Path(place, mark)).exists()}
        assert not left, f"{left} is left"
        assert other.poll() is None, "another process was ended"


def fill(code: str, told: dict[str, str]) -> str:
    """Put in what is told."""
    for name, value in told.items():
        code = code.replace(f"{{{name}}}", value)
    return code


def attempts(told: dict[str, str], weak: bool) -> str:
    """The program that tries all attempts."""
    # Backwards: the program's own text must not count as found.
    head = f"ATTEMPTS, PLANTED, WEAK = {fill(ATTEMPTS, told)!r}, {SECRET[::-1]!r}, {weak}\n"
    return head + HELPERS


# --- the attacks ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def level(namespaces: bool) -> Iterator[None]:
    """With namespaces if there are any, or without."""
    if namespaces:
        yield
    else:
        with patch.object(execution, "isolation", lambda: Isolation(False, "not asked for")):
            yield


def levels() -> list[tuple[str, bool, bool]]:
    """(name, with namespaces, with audit hooks) of what this machine has."""
    fenced = {"files", "calls"} <= set(isolation().fences)
    found = [("namespaces and all fences", True, True), ("namespaces, kernel only", True, False)]
    found = found if isolation().strong else []
    return [*found, ("no namespaces", False, True), *([("no namespaces, kernel only", False, False)] if fenced else [])]


def attack(namespaces: bool, audit: bool, programs: dict[str, str], forgeries: dict[str, str]) -> list[str]:
    """What got through; a sentence each."""
    got: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, level(namespaces), planted() as told:
        Path(scratch).chmod(0o755)
        with patch.object(tempfile, "tempdir", scratch):
            result = execute_code(attempts(told, not namespaces), timeout=120, audit=audit)
            got += [line for line in result.stdout.splitlines() if line.startswith("GOT")]
            if SECRET in result.stdout + result.stderr or not result.stdout.endswith("end\n"):
                got.append(f"the attempts did not come to their end: {result.error} {result.stdout[-300:]}")
            for name, code in programs.items():
                start = time.monotonic()
                result = execute_code(fill(code, told), timeout=4, audit=audit)
                said = result.stdout + result.stderr
                if (result.success and name != "a sparse file") or SECRET in said or "GOT" in result.stdout:
                    got.append(f"{name}: {result.error}, {said[:200]}")
                if len(said) > 3 * MAX_OUTPUT_BYTES or len(result.error or "") > 3000:
                    got.append(f"{name}: said too much")
                if time.monotonic() - start > 60:
                    got.append(f"{name}: took {time.monotonic() - start:.0f} s")
            for name, code in forgeries.items() if audit else ():
                if check_function(code, "double", TESTS, timeout=6, allow_weak_isolation=True).success:
                    got.append(f"forgery passed: {name}")
            if audit and not check_function(HONEST, "double", TESTS, timeout=60, allow_weak_isolation=True).success:
                got.append("the honest function failed")
        got += [f"{path} is left" for path in Path(scratch).iterdir()]
        got += [f"process {pid} is left" for pid in leftovers()]
    return got


def leftovers() -> set[int]:
    """Processes of the sandbox that outlived it: those still there after a while, others are about to end."""
    found = orphans()
    until = time.monotonic() + 5
    while found and time.monotonic() < until:
        time.sleep(0.1)
        found &= orphans()
    return found


def orphans() -> set[int]:
    """Processes of the sandbox that this program or none waits for."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            command = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if os.fsencode(execution.CHILD) in command and parent in (1, os.getpid()):
                found.add(int(entry.name))
    return found


def refuse_namespaces() -> None:
    """Let the kernel answer EPERM to whoever asks for a namespace, here and in all children."""
    rules = [(0x20, 0, 0, 0)]
    for number in (272, 308) if X86 else (97, 268):  # unshare, setns
        rules += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | 1)]
    rules.append((0x06, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    libc, zero = ctypes.CDLL(None), ctypes.c_ulong(0)
    libc.prctl(38, ctypes.c_ulong(1), zero, zero, zero)
    filter_ = struct.pack("@HP", len(rules), ctypes.addressof(code))
    if libc.prctl(22, ctypes.c_ulong(2), filter_, zero, zero) != 0:
        raise RuntimeError("this kernel has no system call filter")


def main(cfg: Config) -> None:
    """Attack at every level, and say what got through."""
    if cfg.no_namespaces:
        refuse_namespaces()
    print(f"Python {platform.python_version()}, user {os.getuid()}; isolation is {isolation()}", flush=True)
    count, failed = len(ATTEMPTS.strip().splitlines()) + len(PROGRAMS) + len(FORGERIES), False
    for name, namespaces, audit in levels():
        start = time.monotonic()
        got = attack(namespaces, audit, PROGRAMS, FORGERIES)
        failed = failed or bool(got)
        print(f"{name}: {count} attacks, {len(got)} got through, {time.monotonic() - start:.0f} s", flush=True)
        print("".join(f"    {line}\n" for line in got), end="", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Config)
