"""Watch a running pipeline: which stage, how far, how long still, the loss, the cards.

python -m scripts.monitor                 in the terminal, also over SSH; Ctrl-C ends it, the run goes on
python -m scripts.monitor --once          one look, for a pipe
python -m scripts.monitor --web           a page at http://127.0.0.1:8010
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import uvicorn
from rich.console import Console
from rich.live import Live

from nanochat.config import run_script, short
from nanochat.env import get_base_dir, print0
from nanochat.report.monitor import Watcher
from nanochat.report.monitor_terminal import render
from nanochat.report.monitor_web import monitor_app


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the monitor; it only reads files."""

    base_dir: Path | None = None
    """Where the run writes; default: $NANOCHAT_BASE_DIR or ~/.cache/nanochat."""
    once: bool = False
    """Print one look and end."""
    web: bool = False
    """Serve a page to this machine's browser instead (over SSH: `ssh -L 8010:127.0.0.1:8010 HOST`)."""
    port: Annotated[int, short("-p")] = 8010
    """Where the page is served."""
    interval: float = 2.0
    """Seconds between two looks."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.interval <= 3600:
            raise ValueError(f"--interval must be from 0.1 to 3600 seconds, got {self.interval}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be between 0 (any free one) and 65535, got {self.port}")


def main(cfg: Config) -> None:
    """Look once, or again and again."""
    folder = cfg.base_dir or get_base_dir()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name the base dir of a run by --base_dir")
    watcher = Watcher(folder)
    if cfg.web:
        serve(watcher, cfg)
    else:
        show(watcher, cfg)


def show(watcher: Watcher, cfg: Config) -> None:
    """Draw in the terminal."""
    console = Console()
    if cfg.once:
        console.print(render(watcher.look(), console.width))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(watcher.look(), console.width), refresh=True)
            time.sleep(cfg.interval)


def serve(watcher: Watcher, cfg: Config) -> None:
    """Serve the page until Ctrl-C."""
    print0(f"the monitor is at http://127.0.0.1:{cfg.port} (Ctrl-C ends it, the run goes on)")
    uvicorn.run(monitor_app(watcher, cfg.interval), host="127.0.0.1", port=cfg.port, log_level="warning", ws="none")


if __name__ == "__main__":
    run_script(main, Config)
