"""For every module: base folder, ranks, printing on rank 0, disk space, the commit of this code.

Imports neither torch nor anything of the project, so that any module may import it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any


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
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def get_dist_info() -> tuple[bool, int, int, int]:
    """(ddp, rank, local_rank, world_size) as torchrun sets them; (False, 0, 0, 1) in a single process."""
    if "RANK" not in os.environ:
        return False, 0, 0, 1
    return True, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])


def print0(text: str = "", **kwargs: Any) -> None:
    """Print on rank 0 only."""
    if get_dist_info()[1] == 0:
        print(text, flush=True, **kwargs)


def check_disk_space(folder: str | Path, needed_bytes: int, what: str) -> None:
    """Raise RuntimeError, before any work is lost, if the disk of `folder` has too little space for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RuntimeError(
            f"{what} needs {needed_bytes / 1e9:.2f} GB, but the disk of {folder} has {free / 1e9:.2f} GB free: "
            "free some space or set NANOCHAT_BASE_DIR to another disk"
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
