"""What runs inside the process that `nanochat.execution` starts: set limits, run the program, report its end.

Started as `python -I execution_child.py PROGRAM REQUEST_FD REPORT_FD MEMORY_BYTES CPU_SECONDS`. It reads a secret from
REQUEST_FD and writes it to REPORT_FD after the program's last line: exit codes, printed words and at-exit handlers
can't stand in for that. Everything it needs afterwards is taken before the program can replace it.
"""

import contextlib
import os
import sys
import traceback
import types

MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64


def set_limits(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit this process and its children. A limit this system doesn't have is left out."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    wanted = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_FSIZE": MAX_FILE_BYTES,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_NPROC": 0,  # no new processes or threads (root is exempt)
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def main() -> None:
    """Run the program; the last act is to report "passed" with the secret, or the error without it."""
    path, request_fd, report_fd, memory_bytes, cpu_seconds = sys.argv[1], *map(int, sys.argv[2:6])
    secret = os.read(request_fd, 64)
    os.close(request_fd)
    with open(path, encoding="utf-8") as f:
        source = f.read()
    process, write, leave, get_pid = os.getpid(), os.write, os._exit, os.getpid
    out, err, format_error = sys.stdout, sys.stderr, traceback.format_exception
    program = types.ModuleType("__main__")
    sys.modules["__main__"] = program
    sys.argv = [path]
    set_limits(memory_bytes, cpu_seconds)
    try:
        exec(compile(source, "<program>", "exec"), program.__dict__)
        report = b"passed " + secret
    except BaseException as error:
        if isinstance(error, MemoryError):
            report = b"memory"
        elif isinstance(error, SystemExit):
            report = f"error the program exited before its end ({error.code})".encode(errors="replace")[:1000]
        else:
            report = f"error {type(error).__name__}: {error}".encode(errors="replace")[:1000]
            with contextlib.suppress(BaseException):
                err.write("".join(format_error(type(error), error, error.__traceback__)))
    if get_pid() != process:  # a forked child that reached the end is not the program
        leave(1)
    for stream in (out, err):
        with contextlib.suppress(BaseException):
            stream.flush()
    write(report_fd, report)
    leave(0)


if __name__ == "__main__":
    main()
