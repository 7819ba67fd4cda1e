"""Shuts the calling process off from the machine: runs first inside a process that `nanochat.execution` starts.

Two levels, of which the parent tries the first once and takes the second where the kernel refuses:

- `enter_namespaces`: process, network, mount, System V and (unless root starts it) user namespaces of its own. The
  process sees a root folder in memory with the interpreter and the system's libraries (read-only) and an empty /tmp,
  no /proc, no network interface.
- `drop_privileges`: none of that. Root becomes the user `nobody` if that user can read the interpreter; else it stays
  root, without capabilities.

Both are followed by the kernel's unprivileged fences (fence.py) and by `set_limits`: no new processes, bounded memory,
time and file size. Linux only; elsewhere a limit that the system doesn't have is left out. Standard library only.
Sources: man pages namespaces(7), user_namespaces(7), pivot_root(2), capabilities(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import sys

NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
ALL_BUT_USER = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_NOATIME, MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 1024, 2048, 4096, 16384, 1 << 18, 1 << 21
DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
LAST_CAPABILITY = 63
CAPABILITY_VERSION_3 = 0x20080522
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}

NOBODY = 65534
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
DEVICES = ("null", "zero", "full", "random", "urandom")
# All files of a program together; in namespaces they are memory.
FOLDER_BYTES, FOLDER_ENTRIES = 32 << 20, 4096
MAX_THREADS = 64
MAX_FILE_BYTES = 16 << 20
MAX_OPEN_FILES = 64
# Without namespaces, where files lie on the machine's disk: those that were deleted while they are open are in no
# folder whose size could be looked at, but there are only so many of them.
MAX_FILE_BYTES_ON_DISK = FOLDER_BYTES // MAX_OPEN_FILES
INSIDE = "/tmp"


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def _prctl(option: int, value: int) -> None:
    _libc().prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def hide_memory() -> None:
    """Keep other processes of this user from reading this one's memory, tracing it or opening its descriptors."""
    with contextlib.suppress(OSError, AttributeError):
        _prctl(PR_SET_DUMPABLE, 0)


def die_with_parent(parent: int | None = None) -> None:
    """Be killed when the parent is; end now if it has gone already, which the kernel tells nobody later."""
    with contextlib.suppress(OSError, AttributeError):
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


# --- namespaces ------------------------------------------------------------------------------------------------------


def enter_namespaces(folder: str, parent: int) -> None:
    """Move this process into namespaces of its own; returns in a grandchild, without privileges, in INSIDE.

    The grandchild's parent is process 1 of the namespace: when it goes, the kernel kills all that is left inside.

    Args:
        folder: an existing empty folder, to become the new root's mount point (seen from inside only).
        parent: the process without which this one ends.

    Raises:
        OSError: the kernel or its configuration refuses; this process is then of no further use.
    """
    libc = _libc()
    # Root needs no user namespace, and in one of `nobody` could not show an interpreter that lies under /root.
    as_root = os.getuid() == 0 and libc.unshare(ALL_BUT_USER) == 0
    if not as_root:
        if os.getuid() == 0:
            _become_nobody()
            die_with_parent(parent)  # changing the user has undone it
            _prctl(PR_SET_DUMPABLE, 1)  # else the maps below belong to root
        uid, gid = os.getuid(), os.getgid()
        _check(libc.unshare(ALL_BUT_USER | NEW_USER), "new namespaces")
        for name, value in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as f:
                f.write(value)
        with contextlib.suppress(OSError), open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as f:
            f.write("0")  # no further user namespaces, which would widen what the kernel lets the program try
    libc.sethostname(b"sandbox", ctypes.c_size_t(7))  # its own copy of the name, which may tell who the user is
    _build_root(libc, folder)
    _fork_and_wait()  # the child is process 1 of the new namespace
    die_with_parent()
    _fork_and_wait()  # an ordinary process: signals work as usual, orphans go to process 1
    if as_root:
        _become_nobody()
    _drop_capabilities(libc)


def _fork_and_wait() -> None:
    """Fork; the parent waits and ends as the child did, the child returns."""
    child = os.fork()
    if child == 0:
        return
    hide_memory()
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)  # as shells do for signals


def _build_root(libc: ctypes.CDLL, root: str) -> None:
    """Make `root` a small read-only file system with the interpreter, and make it the only one."""
    _mount(libc, None, "/", None, MS_REC | MS_PRIVATE)
    _mount(libc, "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for source in sorted({*SYSTEM_FOLDERS, *_interpreter_folders()}):
        _show(libc, source, root)
    os.mkdir(f"{root}/dev")
    for name in DEVICES:
        with contextlib.suppress(OSError):
            with open(f"{root}/dev/{name}", "w", encoding="ascii"):
                pass
            _mount(libc, f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.makedirs(f"{root}{INSIDE}", exist_ok=True)
    options = f"size={FOLDER_BYTES},nr_inodes={FOLDER_ENTRIES},mode=1777"
    _mount(libc, "tmpfs", f"{root}{INSIDE}", "tmpfs", MS_NOSUID | MS_NODEV, options)
    # Read-only comes last: until here mount points had to be made in it.
    _mount(libc, None, root, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    number = PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(f"no system call number of pivot_root for {os.uname().machine}")
    _check(libc.syscall(number, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", DETACH), "unmount the old root")
    os.chdir(INSIDE)


def _interpreter_folders() -> set[str]:
    """Folders of the interpreter and its standard library, links resolved and not."""
    folders = {f"{prefix}/{name}" for prefix in (sys.base_prefix, sys.base_exec_prefix) for name in ("lib", "lib64")}
    return folders | {os.path.realpath(folder) for folder in folders}


def _show(libc: ctypes.CDLL, source: str, root: str) -> None:
    """Let the folder `source` be seen read-only at the same place under `root`; a link is made again."""
    target = root + source
    if os.path.islink(source):
        if not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(os.readlink(source), target)
    elif os.path.isdir(source) and not os.path.lexists(target):
        os.makedirs(target)
        _mount(libc, source, target, None, MS_BIND | MS_REC)
        # A remount must keep what the file system already forbids.
        flags, forbidden = os.statvfs(target).f_flag, MS_NOSUID | MS_NODEV
        for seen, wanted in ((8, MS_NOEXEC), (1024, MS_NOATIME), (2048, MS_NODIRATIME), (4096, MS_RELATIME)):
            forbidden |= wanted if flags & seen else 0
        _mount(libc, None, target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | forbidden)


def _mount(
    libc: ctypes.CDLL, source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    def text(value: str | None) -> bytes | None:
        return None if value is None else os.fsencode(value)

    _check(
        libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(options)), f"mount at {target}"
    )


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up every privilege for good."""
    for capability in range(LAST_CAPABILITY + 1):
        libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), *[ctypes.c_ulong(0)] * 3)
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(libc.capset(header, none), "drop capabilities")
    _prctl(PR_SET_NO_NEW_PRIVS, 1)  # no set-user-ID program gives one back; also what the fences ask for


# --- without namespaces ----------------------------------------------------------------------------------------------


def drop_privileges(parent: int) -> None:
    """Become the user `nobody` if this is root and that user can read the interpreter; give up all capabilities."""
    if os.name != "posix":
        return
    if os.getuid() == 0 and _nobody_can_read():
        with contextlib.suppress(OSError):
            _become_nobody()
    with contextlib.suppress(OSError, AttributeError):
        _drop_capabilities(_libc())
    die_with_parent(parent)  # changing the user has undone it


def _nobody_can_read() -> bool:
    path, bits = os.path.realpath(os.__file__), stat.S_IROTH
    while True:  # the standard library must be readable, every folder on the way to it passable
        if not os.stat(path).st_mode & bits:
            return False
        parent = os.path.dirname(path)
        if parent == path:
            return True
        path, bits = parent, stat.S_IXOTH


# --- in both cases ---------------------------------------------------------------------------------------------------


def readable_paths() -> list[str]:
    """Return what a running interpreter may have to read: its library, the system's, time zones, devices."""
    system = [f"{top}/{name}" for top in ("", "/usr") for name in ("lib", "lib32", "lib64")]
    files = ["/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache", *(f"/dev/{name}" for name in DEVICES)]
    return [*system, *_interpreter_folders(), *files]


def count_tasks() -> int:
    """Return how many processes and threads there are of the user that a program will run as."""
    user, tasks = os.getuid() or NOBODY, 0
    for process in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError):  # no process, or it is gone
            if process.isdigit() and os.stat(f"/proc/{process}").st_uid == user:
                tasks += len(os.listdir(f"/proc/{process}/task"))
    return tasks


def set_limits(memory_bytes: int, cpu_seconds: int, file_bytes: int, tasks: int) -> None:
    """Limit this process. A limit this system doesn't have is left out; memory_bytes −1 is none.

    Args:
        memory_bytes: of address space.
        cpu_seconds: of computing.
        file_bytes: of each file that it writes.
        tasks: processes and threads that its user may have, all together.
    """
    try:
        import resource
    except ImportError:  # not a POSIX system
        return
    wanted = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_FSIZE": file_bytes,
        "RLIMIT_NOFILE": MAX_OPEN_FILES,
        "RLIMIT_NPROC": tasks,  # root is exempt
        "RLIMIT_CORE": 0,
    }
    for name, value in wanted.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))
