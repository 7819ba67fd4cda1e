"""For every module: base folder, ranks, printing on rank 0, disk space, the commit of this code.

Imports neither torch nor anything of the project, so that any module may import it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# What can move the cursor, change colours or reorder what stands behind it, and halves of characters, which can't be
# printed: a file's name may hold any of them. Line breaks and tabs stay.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more: it is full, the user's share of it is, or its files can't be so large."""
_SYSTEM = {*_FORBIDDEN, *FULL, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # an OSError as packages written in Rust tell it
# A write that was cut short, as NumPy, PyTorch's two writers and SQLite tell it: they don't say why.
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written|unexpected pos \d+ vs \d+|file write failed|disk is full")


def missing_packages() -> str:
    """Says what to do if this Python lacks the packages of nanochat, as the system's own does; "" if it has them."""
    if importlib.util.find_spec("tyro") is not None:
        return ""
    return (
        f"{sys.executable} lacks the packages of nanochat: run `source .venv/bin/activate` first "
        "(`bash setup_env.sh` makes .venv)"
    )


def require_wandb_login() -> None:
    """Refuse a run for Weights & Biases that nobody has logged in for, before it does any work.

    Raises:
        RuntimeError: no key and no offline mode; says what to do instead.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return
    try:
        import wandb  # lazy: a second to start, and most runs do without
    except ImportError:
        return  # whoever starts the tracker says so
    api = getattr(wandb, "api", None)
    if api is not None and not api.api_key:
        raise RuntimeError(
            "Weights & Biases is not logged in here: set WANDB_MODE=offline, run `wandb login`, or take "
            "--tracker=tensorboard"
        )


def get_base_dir() -> Path:
    """The folder of everything that a run writes: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created if missing."""
    folder = _base_path()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_base_dir(path: Path) -> bool:
    """True if `path` is in the base folder, or is it; creates nothing."""
    return path.absolute().is_relative_to(_base_path().absolute())


def _base_path() -> Path:
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()


def system_errno(error: BaseException) -> int | None:
    """The number of an error of the system, in whatever form a library told it; None if it is another error."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in _SYSTEM else None
    text = str(error)
    if told := _RUST_ERROR.search(text):
        return int(told[1]) if int(told[1]) in _SYSTEM else None
    if _CUT_SHORT.search(text):
        return errno.ENOSPC
    return next((number for number in sorted(_SYSTEM) if text.endswith(f" {os.strerror(number)}")), None)


def is_system_error(error: BaseException) -> bool:
    """True for an error that says nothing about a file's content: memory, open files, permissions, a full disk."""
    return system_errno(error) is not None


def error_text(error: BaseException) -> str:
    """The sentence for an error that a user can cause; for one of the system also what to do."""
    text, number = str(error) or type(error).__name__, system_errno(error)
    if isinstance(error, MemoryError):
        return f"this machine's memory is used up ({text}): close other programs, or take a smaller model or batch"
    if number is None:
        return text
    name = getattr(error, "filename", None)
    path = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else None
    if number in _FORBIDDEN:
        return f"{text}: give yourself the right to it, or {_elsewhere(path, 'a folder that you may write to')}"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"{text}: close other programs, or raise the limit (ulimit -n 65536)"
    if number == errno.ENOMEM:
        return f"{text}: close other programs, or take a smaller model or batch"
    if number in FULL:
        return f"{text}{_room(path, number)}: free some space, or {_elsewhere(path, 'another disk')}"
    return text


def _elsewhere(path: Path | None, what: str) -> str:
    if path is None or in_base_dir(path):
        return f"set NANOCHAT_BASE_DIR to {what}"
    return "name another place"


def _room(path: Path | None, number: int) -> str:
    """How much of a full disk is free, which was not enough."""
    if path is None or number != errno.ENOSPC:
        return ""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return f", it needs more than the {shutil.disk_usage(folder).free / 1e6:.1f} MB that are free there"


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size) as torchrun sets them; (False, 0, 0, 1) in a single process."""
    if "RANK" not in os.environ:
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def usable_cores(cgroups: str | Path = "/sys/fs/cgroup", own: str | Path = "/proc/self/cgroup") -> int:
    """Cores that this process may use: those it is bound to, at most its container's share of CPU time, rounded up."""
    # os.cpu_count() is the machine's: in a container or under taskset most of its cores belong to others.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [float(cores)]
    with contextlib.suppress(OSError):
        for line in Path(own).read_text(encoding="utf-8").splitlines():
            _, kinds, path = line.split(":", 2)  # "0::/user.slice" of cgroup v2, "4:cpu,cpuacct:/docker/…" of v1
            if kinds and "cpu" not in kinds.split(","):
                continue
            root = Path(cgroups) / kinds  # v2 has no kinds
            here = root / path.strip("/")  # a container sees its own group as the root: the path may not be there
            # A group's limit holds for all groups in it.
            quotas += [_cpu_quota(folder) for folder in (here, *here.parents) if folder.is_relative_to(root)]
    return max(1, min(cores, math.ceil(min(quotas))))


def _cpu_quota(folder: Path) -> float:
    """The cores' worth of CPU time that a cgroup may use; infinite without a limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # v2: "150000 100000" or "max 100000"
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            return float(quota) / float(period) if float(quota) > 0 else math.inf  # v1: −1 is no limit
    return math.inf


def cpuinfo(*keys: str) -> str:
    """The value of the first of these keys in /proc/cpuinfo; "" where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(keys):
                return line.partition(":")[2].strip()
    return ""


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    return cpuinfo("model name") or platform.processor() or "unknown"


def printable(text: str) -> str:
    """`text` with what would act on a terminal, such as an ESC in a file's name, as an escape; line breaks stay."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def print0(text: str = "", **kwargs: Any) -> None:
    """Print on rank 0 only, control characters as escapes."""
    if get_dist_info()[1] == 0:
        print(printable(str(text)), flush=True, **kwargs)


def check_disk_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Raise RuntimeError, before any work is lost, if the disk of `folder` has too little space for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RuntimeError(
            f"{what} needs {needed_bytes / 1e9:.3f} GB, but the disk of {folder} has {free / 1e9:.3f} GB free: "
            f"free some space, or {_elsewhere(Path(folder), 'another disk')}"
        )


def git_state() -> str:
    """Commit and branch of this code, and a note if files were changed since; "unknown" outside git."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        commit, branch = git("rev-parse", "--short", "HEAD"), git("rev-parse", "--abbrev-ref", "HEAD")
        changed = " with uncommitted changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.SubprocessError):
        return "unknown (not a git checkout)"
    return f"{commit} on {branch}{changed}"
