"""Check that `base_train --hours` takes as long as it says: trains three depths on a small corpus of the demo world,
one after the other, kills one of them with SIGKILL halfway and resumes it, and says pass or fail.

    python dev/check_hours.py                    six minutes for each of depths 1, 2 and 4
    python dev/check_hours.py --hours 0.03

The time is measured from outside, from the start of the process to its end, without the time Python needs to start
and import; both parts of the killed run count. A run passes if it is within 3 % of --hours and its last learning rate
is zero.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanochat.config import run_script  # noqa: E402

ALLOWED = 0.03
VOCAB, CHARS = 1024, 3_000_000
FLAGS = ("--max_seq_len=256", "--total_batch_size=4096", "--dataset=demo", "--recipe=classic", "--device_type=cpu")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the check."""

    hours: float = 0.1
    """The time that is asked for."""
    depths: tuple[int, ...] = (1, 2, 4)
    """Depths of the models; the middle one is killed and resumed."""
    folder: str | None = None
    """Working folder; default: a temporary one, removed at the end."""

    def __post_init__(self) -> None:
        if self.hours <= 0 or not self.depths:
            raise ValueError(f"--hours must be positive and --depths not empty, got {self.hours} and {self.depths}")


def command(*arguments: str) -> list[str]:
    """The command that runs a module of this project with this Python."""
    return [sys.executable, "-m", *arguments]


def prepare(environment: dict[str, str]) -> None:
    """Make text and tokenizer."""
    for arguments in (
        ("tasks.demo", f"--chars={CHARS}"),
        ("scripts.tok_train", "--dataset=demo", f"--vocab_size={VOCAB}"),
    ):
        subprocess.run(command(*arguments), cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def train(cfg: Config, depth: int, environment: dict[str, str], log: Path, kill_at: float | None) -> float | None:
    """Launch once; returns the seconds from the first line of output to the end, or to the kill."""
    flags = (f"--depth={depth}", f"--hours={cfg.hours}", *FLAGS)
    with (
        open(log, "ab") as f,
        subprocess.Popen(
            command("scripts.base_train", *flags), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=f
        ) as run,
    ):
        assert run.stdout is not None
        start = None
        for line in run.stdout:
            f.write(line)
            start = start or time.monotonic()
            if kill_at is not None and time.monotonic() - start > kill_at:
                run.send_signal(signal.SIGKILL)
                run.stdout.close()
                break
        run.wait()
    used = time.monotonic() - (start or time.monotonic())
    if run.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the training of depth {depth} failed with code {run.returncode}: see {log}")
    return used


def check(cfg: Config, depth: int, environment: dict[str, str], folder: Path, kill: bool) -> bool:
    """Train one depth and judge it."""
    log, wanted = folder / f"d{depth}.log", 3600 * cfg.hours
    used = 0.0
    if kill:
        used += train(cfg, depth, environment, log, wanted / 2) or 0.0
    used += train(cfg, depth, environment, log, None) or 0.0
    lines = (folder / "base_checkpoints" / f"d{depth}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    rate = steps[-1]["lr_multiplier"]
    said = re.findall(r"used .* s of .*", log.read_text(encoding="utf-8"))
    good = abs(used / wanted - 1) <= ALLOWED and rate == 0.0
    print(
        f"{'PASS' if good else 'FAIL'} d{depth}{' (killed and resumed)' if kill else ''}: {used:.1f} s of "
        f"{wanted:.1f} s ({used / wanted - 1:+.1%}), {len(steps)} steps, last learning rate × {rate:g}; the run says: "
        f"{said[-1] if said else 'nothing'}",
        flush=True,
    )
    return good


def main(cfg: Config) -> None:
    """Prepare, train, judge."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "NANOCHAT_BASE_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
        prepare(environment)
        killed = cfg.depths[len(cfg.depths) // 2]
        results = [check(cfg, depth, environment, folder, depth == killed) for depth in cfg.depths]
    print("all passed" if all(results) else "FAILED")
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main, Config)
