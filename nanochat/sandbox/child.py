"""Runs inside the processes that `nanochat.execution` starts: shut itself off, then play one of three parts.

- probe: try the isolation and tell what holds.
- worker: run a program, then call the function it defines with the arguments that the judge sends.
- judge: run tests against a function that only exists in the worker, and report "passed" as the last act. What is
  tested never enters the judge: values cross as JSON, which becomes plain numbers, texts and containers there.

Started as `python -I -S child.py SETTINGS_FD`. Imports the standard library only.
"""

from __future__ import annotations

import _thread
import builtins
import collections
import contextlib
import itertools
import json
import os
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from os import _exit, read, write  # so that a program which replaces them in `os` harms only itself
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
MAX_ERROR_CHARS = 1000
MAX_ITEMS = 100_000  # of an iterator that a function returns
THREAD_STACK_BYTES = 2 << 20  # not 8 MB, of which few fit into the memory that a program may have
AF_UNIX = 1

# Beginnings of the audit events (docs.python.org/3/library/audit_events.html) that no tested program has an honest use
# for: other processes and signals, the network, raw memory, and the means to read or move the harness's own frames.
FORBIDDEN_EVENTS = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.setpgid", "subprocess.", "pty."),
    *("signal.pthread_kill", "socket.__new__", "socket.connect", "socket.bind", "socket.get", "resource.", "syslog."),
    *("ftplib.", "http.client.", "smtplib.", "urllib.", "ctypes.", "code.__new__", "gc.get_", "sys.addaudithook"),
    "sys._current_",
)
TRACING_EVENTS = ("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback")  # could jump to a program's end
# Modules that run native code of the program's choice, open files or sockets without an event, or start interpreters
# in which no hook is set.
FORBIDDEN_MODULES = {
    *("ctypes", "_ctypes", "_xxsubinterpreters", "_interpreters", "_testcapi", "_testinternalcapi", "_testlimitedcapi"),
    *("_ssl", "_sqlite3", "_dbm", "_gdbm", "readline", "_curses", "_tkinter", "nis", "_posixshmem", "_multiprocessing"),
}
READING_EVENTS = {"open", "os.listdir", "os.scandir", "os.chdir", "glob.glob", "os.getxattr"}
WRITING_EVENTS = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("os.utime", "os.chflags", "os.lockf", "os.setxattr", "os.listxattr", "os.removexattr"),
    *("shutil.rmtree", "shutil.copyfile", "shutil.move"),
}


def forbid(folder: str, readable: tuple[str, ...] | None, tracing: bool) -> None:
    """Make forbidden audit events raise an error in this interpreter, for good.

    Not a wall (native code raises no events), but it holds where the kernel's isolation is missing, and it keeps a
    program from the harness in its own process.

    Args:
        folder: the only one to write in.
        readable: files and folders that may be read besides; None: the kernel sees to files.
        tracing: allow debuggers and profilers.
    """
    # Everything the hook needs is bound here: a program can replace what modules hold, but not a closure's variables.
    forbidden = FORBIDDEN_EVENTS if tracing else FORBIDDEN_EVENTS + TRACING_EVENTS
    reading, paths = frozenset(READING_EVENTS), READING_EVENTS | WRITING_EVENTS
    forbidden_modules, caller, coroutine = frozenset(FORBIDDEN_MODULES), sys._getframe, types.coroutine.__code__
    real_path, decode, write_flags = os.path.realpath, os.fsdecode, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    text_like = (str, bytes, os.PathLike)

    def check_path(event: str, args: tuple[Any, ...]) -> None:
        opened_to_write = event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & write_flags
        writes = event not in reading or opened_to_write
        for value in args[: 2 if writes else 1]:
            if isinstance(value, text_like):
                path = real_path(decode(value))
                roots = (folder,) if writes else (folder, *(readable or ()))
                if path != "/dev/null" and not any(path == root or path.startswith(root + "/") for root in roots):
                    raise PermissionError(f"{event} of {path!r} is not allowed here")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "import":
            # (name, file of native code or None, …); such a file starts with the function PyInit_<name>.
            name, file = args[:2]
            if name.rpartition(".")[2] in forbidden_modules or (file and real_path(file).startswith(folder + "/")):
                raise ImportError(f"{name} is not available here")
        elif event == "socket.__new__" and args[1] == AF_UNIX:
            return  # half of a pair, which asyncio wakes itself with; to connect it is refused below
        elif event == "code.__new__" and caller(1).f_code is coroutine:
            return  # it sets a flag, as asyncio needs it
        elif event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed here")
        elif readable is not None and event in paths:
            check_path(event, args)

    def create_builtin(spec: Any) -> types.ModuleType:
        raise ImportError(f"{spec.name} is not available here")

    # Modules inside the interpreter's own file come without an event: now, or never.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are deprecated
        for name in sys.builtin_module_names:
            if name not in forbidden_modules:
                __import__(name)
    sys.modules["_imp"].create_builtin = create_builtin  # type: ignore[attr-defined]
    sys.addaudithook(hook)


# --- values on their way between worker and judge --------------------------------------------------------------------


class Opaque:
    """Stands in the judge for a result that is no plain value: equal to nothing but itself."""


# What JSON lacks crosses as an object of one key, its kind. By kind: the type or the module that has it, how a value is
# taken apart, how it is put together again. The pieces are packed in turn.
KINDS: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "dict": (dict, lambda v: [*map(list, v.items())], dict),
    "complex": (complex, lambda v: [v.real, v.imag], lambda parts: complex(*parts)),
    "bytes": ((bytes, bytearray), lambda v: bytes(v).hex(), bytes.fromhex),
    "range": (range, lambda v: [v.start, v.stop, v.step], lambda parts: range(*parts)),
    "deque": (collections.deque, list, collections.deque),
    "keys": (type({}.keys()), list, lambda parts: dict.fromkeys(parts).keys()),
    "values": (type({}.values()), list, lambda parts: dict(enumerate(parts)).values()),
    "items": (type({}.items()), lambda v: [*map(list, v)], lambda parts: dict(parts).items()),
    "Fraction": ("fractions", lambda v: [v.numerator, v.denominator], lambda c: __import__("fractions").Fraction(*c)),
    "Decimal": ("decimal", str, lambda text: __import__("decimal").Decimal(text)),
    "iterator": (Iterator, lambda v: list(itertools.islice(v, MAX_ITEMS)), iter),
}


def pack(value: Any) -> Any:
    """Return a value as JSON."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, list):
        return [pack(item) for item in value]
    for kind, (place, take, _) in KINDS.items():
        # A module that was never imported has no values here.
        types_ = getattr(sys.modules.get(place), kind, ()) if isinstance(place, str) else place
        if isinstance(value, types_):
            return {kind: pack(take(value))}
    return {"opaque": type(value).__name__}


def unpack(value: Any) -> Any:
    """Return the value that `pack` made JSON of, in plain types: no method or operator of the sender comes along."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return Opaque() if kind == "opaque" else KINDS[kind][2](unpack(content))


class Channel:
    """Messages of one line of JSON each way."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd, self.rest = read_fd, write_fd, b""

    def send(self, message: dict[str, Any]) -> None:
        """Write one message.

        Raises:
            ValueError: it is too large.
        """
        data = json.dumps(message).encode() + b"\n"
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a value is too large to be handed over: {len(data)} bytes")
        while data:
            data = data[write(self.write_fd, data) :]

    def receive(self) -> dict[str, Any]:
        """Read one message.

        Raises:
            EOFError: the other side has ended.
            ValueError: what came is too large, or no message.
        """
        while b"\n" not in self.rest:
            block = read(self.read_fd, 65536)
            if not block:
                raise EOFError("the program ended")
            self.rest += block
            if len(self.rest) > MAX_MESSAGE_BYTES:
                raise ValueError("a value is too large to be handed over")
        line, _, self.rest = self.rest.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a message")
        return message


# --- the parts -------------------------------------------------------------------------------------------------------


def error_line(error: BaseException) -> str:
    """One line about an error, for the parent; "memory" when there was too little of it."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, SystemExit):
        return f"error the program exited before its end ({error.code})"[:MAX_ERROR_CHARS]
    text = ""
    with contextlib.suppress(BaseException):  # a program's own error may raise another when it is printed
        text = str(error)
    return f"error {type(error).__name__}: {text}"[:MAX_ERROR_CHARS]


def flush() -> None:
    """Let the parent have what was printed; the program may have closed or replaced its streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BaseException):
            stream.flush()


def compile_module(source: str, name: str) -> tuple[types.CodeType, dict[str, Any]]:
    """Compile `source` and make the module it is to run in."""
    module = types.ModuleType(name)
    # Under its own name for pickle and dataclasses; as __main__ it hides the harness.
    sys.modules[name] = sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    return compile(source, "<program>", "exec"), module.__dict__


def be_worker(settings: dict[str, Any], restrict: Callable[[], None]) -> None:
    """Define the function and answer calls until the judge is done."""
    channel = Channel(settings["read_fd"], settings["write_fd"])
    _thread.stack_size(THREAD_STACK_BYTES)
    restrict()
    try:
        code, namespace = compile_module(settings["source"], settings["name"])
        # The code for the end is held by `map` alone: no frame, variable or module leads the program to it.
        collections.deque(map(exec, (code, compile(settings.pop("end"), "<end>", "exec")), (namespace, namespace)), 0)
        function = namespace[settings["entry_point"]]
        channel.send({"ready": True})
    except BaseException as error:
        if not isinstance(error, (SystemExit, MemoryError)):
            with contextlib.suppress(BaseException):
                traceback.print_exc()
        flush()
        channel.send({"error": error_line(error)})
        _exit(1)
    while True:
        try:
            call = channel.receive()
        except EOFError:
            _exit(0)
        try:
            value = function(*unpack(call["args"]), **unpack(call["kwargs"]))
            flush()  # the judge's end is this process's end, too
            channel.send({"value": pack(value)})
        except BaseException as error:
            flush()
            channel.send({"error": error_line(error), "kind": type(error).__name__})


class WorkerError(Exception):
    """The tested function raised, or its process ended."""


def be_judge(settings: dict[str, Any], restrict: Callable[[], None]) -> None:
    """Run the tests; the last act is to report."""
    channel = Channel(settings["read_fd"], settings["write_fd"])
    restrict()

    def candidate(*args: Any, **kwargs: Any) -> Any:
        channel.send({"args": pack(list(args)), "kwargs": pack(kwargs)})
        message = channel.receive()
        if "error" not in message:
            return unpack(message.get("value"))
        kind, text = getattr(builtins, str(message.get("kind")), None), str(message["error"]).removeprefix("error ")
        if text == "memory":
            raise MemoryError
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(text.partition(": ")[2])
        raise WorkerError(text)

    try:
        report = str(channel.receive().get("error") or "passed")  # of the definition itself
        if report == "passed":
            tests, namespace = compile_module(settings["tests"], "__main__")
            setup, _ = compile_module(settings["setup"], "__main__")
            exec(setup, namespace)
            namespace[settings["entry_point"]] = candidate  # the set-up may define it too, as a stub
            exec(tests, namespace)
    except EOFError:
        report = "error the program exited before its end"
    except BaseException as error:
        report = error_line(error)
    write(settings["report_fd"], report.encode(errors="replace"))
    _exit(0)


def be_probe(settings: dict[str, Any], restrict: Callable[[], None]) -> None:
    """Report the user and the fences that were tried and hold."""
    import _socket  # lazy: only the probe needs it

    restrict()
    held = []
    for name, attempt in (("files", lambda: os.listdir("/dev")), ("calls", _socket.socket)):
        try:
            attempt()
        except PermissionError:
            held.append(name)
    write(settings["report_fd"], json.dumps({"user": os.getuid(), "fences": held}).encode())


def load(name: str) -> types.ModuleType:
    """Return a module from beside this one, which -I keeps off sys.path; a program shall not find it in sys.modules."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    try:
        return __import__(name)
    finally:
        del sys.path[0], sys.modules[name]


def main() -> None:
    """Read the settings, go into isolation, play the part."""
    with os.fdopen(int(sys.argv[1]), "rb") as f:
        settings: dict[str, Any] = json.load(f)
    part, namespaces = settings["part"], settings["namespaces"]
    isolation, fence = load("isolation"), load("fence")
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    isolation.die_with_parent(settings["parent"])
    threads = isolation.count_tasks() + isolation.MAX_THREADS if settings.get("is_function") else 0
    fence.leave_keyring()
    if namespaces:
        isolation.enter_namespaces(os.getcwd(), settings["parent"])
        os.environ["HOME"] = os.environ["TMPDIR"] = isolation.INSIDE
    else:
        isolation.drop_privileges(settings["parent"])
    if part == "judge":
        isolation.hide_memory()
    folder, readable = os.path.realpath(os.getcwd()), isolation.readable_paths()

    limits = [*settings["limits"], isolation.MAX_FILE_BYTES if namespaces else isolation.MAX_FILE_BYTES_ON_DISK]

    def restrict() -> None:
        isolation.set_limits(*limits, threads)
        fence.close_files(readable)
        if not fence.filter_calls(threads=bool(threads), change_files=namespaces):
            isolation.set_limits(*limits, 0)  # without a filter a thread can't be told from a process
        if settings.get("audit"):
            forbid(
                folder,
                readable=None if namespaces else tuple(map(os.path.realpath, readable)),
                tracing=settings["is_function"],
            )
            # Native code raises no audit events, so nothing that could call it stays within reach.
            for module in (isolation, fence, *(sys.modules.pop(n) for n in list(sys.modules) if "ctypes" in n)):
                vars(module).clear()

    {"probe": be_probe, "worker": be_worker, "judge": be_judge}[part](settings, restrict)


if __name__ == "__main__":
    main()
