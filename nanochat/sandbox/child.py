"""What runs inside the processes that `nanochat.execution` starts: shut itself off, then play one of three parts.

- probe: try the isolation and say "isolated".
- worker: run a program, then call the function it defines with the arguments that the judge sends.
- judge: run tests against a function that only exists in the worker, and report "passed" as the last act. What is
  tested never enters the judge: values cross as JSON, which becomes plain numbers, texts and containers there.

Started as `python -I -S child.py SETTINGS_FD`. Imports the standard library only.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import importlib.util
import json
import os
import sys
import traceback
import types
from collections.abc import Callable
from os import _exit, read, write  # so that a program which replaces them in `os` harms only itself
from typing import Any

MAX_MESSAGE_BYTES = 1 << 20
MAX_ERROR_CHARS = 1000

# Beginnings of the audit events (docs.python.org/3/library/audit_events.html) that no tested program has an honest use
# for: other processes and signals, the network, raw memory, and the means to read or move the harness's own frames.
FORBIDDEN_EVENTS = (
    *("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "os.setpgid", "subprocess.", "pty."),
    *("signal.pthread_kill", "socket.__new__", "socket.connect", "socket.bind", "socket.get", "resource.", "syslog."),
    *("ftplib.", "http.client.", "smtplib.", "urllib.", "ctypes.", "code.__new__", "gc.get_", "sys.addaudithook"),
    *("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback", "sys._current_"),
)
READING_EVENTS = {"open", "os.listdir", "os.scandir", "os.chdir", "glob.glob", "os.getxattr"}
WRITING_EVENTS = {
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("os.utime", "os.chflags", "os.lockf", "os.setxattr", "os.listxattr", "os.removexattr"),
    *("shutil.rmtree", "shutil.copyfile", "shutil.move"),
}


def forbid(path_roots: tuple[str, ...] | None) -> None:
    """Make forbidden audit events raise PermissionError in this interpreter, for good.

    Not a wall (native code raises no events), but it holds where the kernel's isolation is missing, and it keeps a
    program from the harness in its own process.

    Args:
        path_roots: the only folders that may be touched, the first of them the only one to write in; None: any.
    """
    # Everything the hook needs is bound here: a program can replace what modules hold, but not a closure's variables.
    forbidden, reading, paths = FORBIDDEN_EVENTS, frozenset(READING_EVENTS), READING_EVENTS | WRITING_EVENTS
    real_path, decode, write_flags = os.path.realpath, os.fsdecode, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    text_like = (str, bytes, os.PathLike)

    def check_path(event: str, args: tuple[Any, ...], roots: tuple[str, ...]) -> None:
        opened_to_write = event == "open" and len(args) > 2 and isinstance(args[2], int) and args[2] & write_flags
        writes = event not in reading or opened_to_write
        for value in args[: 2 if writes else 1]:
            if isinstance(value, text_like):
                path = real_path(decode(value))
                allowed = roots[:1] if writes else roots
                if path != "/dev/null" and not any(path == root or path.startswith(root + "/") for root in allowed):
                    raise PermissionError(f"{event} of {path!r} is not allowed here")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(forbidden):
            raise PermissionError(f"{event} is not allowed here")
        if path_roots is not None and event in paths:
            check_path(event, args, path_roots)

    sys.addaudithook(hook)


# --- values on their way between worker and judge --------------------------------------------------------------------


class Opaque:
    """Stands in the judge for a result that is no plain value: equal to nothing but itself."""


def pack(value: Any) -> Any:
    """A value as JSON: what JSON lacks is an object of one key, its kind."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, (tuple, set, frozenset)):
        kind = "tuple" if isinstance(value, tuple) else "set" if isinstance(value, set) else "frozenset"
        return {kind: [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    return {"opaque": type(value).__name__}


def unpack(value: Any) -> Any:
    """The value that `pack` made JSON of, in plain types."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    makers: dict[str, Callable[[Any], Any]] = {
        "tuple": lambda c: tuple(map(unpack, c)),
        "set": lambda c: set(map(unpack, c)),
        "frozenset": lambda c: frozenset(map(unpack, c)),
        "dict": lambda c: {unpack(key): unpack(item) for key, item in c},
        "complex": lambda c: complex(float(c[0]), float(c[1])),
        "bytes": bytes.fromhex,
        "opaque": lambda c: Opaque(),
    }
    return makers[kind](content)


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


def load_isolation() -> types.ModuleType:
    """The module beside this one; -I and -S keep everything else out of sys.path."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "isolation.py")
    spec = importlib.util.spec_from_file_location("isolation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Read the settings, go into isolation, play the part."""
    with os.fdopen(int(sys.argv[1]), "rb") as f:
        settings: dict[str, Any] = json.load(f)
    isolation = load_isolation()
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    isolation.die_with_parent()
    if settings["namespaces"]:
        isolation.enter_namespaces(os.getcwd())
        roots = None
        os.environ["HOME"] = os.environ["TMPDIR"] = isolation.INSIDE
    else:
        isolation.limit_only()
        library = os.path.dirname(os.path.realpath(os.__file__))
        roots = (os.path.realpath(os.getcwd()), library, "/usr/lib", "/usr/share/zoneinfo", "/etc/localtime")
    part, limits, audit = settings["part"], settings["limits"], settings["audit"]
    if part == "judge":
        isolation.hide_memory()

    def restrict() -> None:
        isolation.set_limits(*limits)
        if audit:
            forbid(roots)

    if part == "probe":
        write(settings["report_fd"], b"isolated")
        return
    {"worker": be_worker, "judge": be_judge}[part](settings, restrict)


if __name__ == "__main__":
    main()
