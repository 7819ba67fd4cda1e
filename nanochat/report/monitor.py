"""What a pipeline is doing right now, read from its files alone.

A `Watcher` looks at marks, logs and loss logs in a base dir and says in a `Frame` which stage is running, how far it is
and how the loss goes. It changes nothing and holds nothing open, so it may start and stop at any time, and a run
without the pipeline (`python -m scripts.base_train`) is seen as well.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanochat.hardware import describe_cards
from nanochat.progress import format_seconds
from nanochat.report.metrics_log import read_metrics
from nanochat.report.plots import thin
from nanochat.report.run_data import METRICS_FILE, is_number, read_json
from nanochat.stages import STAGES

LOG_LINES, LOG_BYTES = 4, 8192
QUIET_SECONDS = 120.0  # after which a stage that writes nothing is worth a word
CURVE_POINTS = 200


class MetricsTail:
    """Follows a loss log: reads what was appended, and starts again where a resume has cut it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._position = 0
        self._last = b""

    def poll(self) -> list[dict[str, Any]]:
        """All records so far; a line that is still being written waits for its end."""
        try:
            with open(self.path, "rb") as f:
                # A log that was cut holds something else where the last line that we read ended.
                f.seek(max(0, self._position - len(self._last)))
                if f.read(len(self._last)) != self._last:
                    self.records, self._position, self._last = [], 0, b""
                f.seek(self._position)
                data = f.read()
        except OSError:
            return self.records
        data = data[: data.rfind(b"\n") + 1]
        if data:
            self.records += read_metrics(data)
            self._position += len(data)
            self._last = data[-256:]
        return self.records


@dataclass(frozen=True, kw_only=True)
class Training:
    """The newest figures of a stage that trains; None is what is not known."""

    step: int
    seconds: float
    progress: float | None
    eta_seconds: float | None
    loss: float | None
    lr_multiplier: float | None
    tokens_per_second: float | None
    matmul_share: float | None
    peak_memory_gb: float | None
    skipped: int
    scale: float | None
    evaluations: Mapping[str, float]
    """The last value of each evaluation."""
    curve: tuple[Sequence[float], Sequence[float]]
    """Steps and smooth losses, thinned."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One look at a run."""

    base_dir: Path
    stages: Sequence[tuple[str, str]]
    """(stage, "done", "now" or "waiting"); what the pipeline has passed without running it is left out."""
    current: str | None
    """The running stage; None before the first and after the last."""
    finished: bool
    quiet_seconds: float
    """Since anything was written."""
    training: Training | None
    progress: float | None
    """0 to 1."""
    eta: str | None
    log: Sequence[str]
    cards: Sequence[str]
    load: str
    clock: str = field(default_factory=lambda: time.strftime("%H:%M:%S"))

    @property
    def is_quiet(self) -> bool:
        """Whether the running stage has written nothing for long: stopped, or at something long."""
        return self.current is not None and self.quiet_seconds > QUIET_SECONDS


class Watcher:
    """Looks at the run in a base dir."""

    def __init__(self, base_dir: Path) -> None:
        self.base_dir = base_dir
        self.folder = base_dir / "pipeline"
        self._tails: dict[Path, MetricsTail] = {}

    def look(self) -> Frame:
        """What can be seen now."""
        marks = {name: read_json(self._mark_path(name)) for name in STAGES}
        written = {name: self._written(name, marks[name]) for name in STAGES}
        newest = max(STAGES, key=lambda name: (written[name], list(STAGES).index(name)))
        alive = written[newest] > 0
        finished = alive and marks[newest].get("state") == "done" and newest == "answer"
        current = newest if alive and not finished else None
        training = self._training(current, marks[current]) if current else None
        log = self._log_lines(current or newest)
        progress, eta = self._progress(training, current)
        return Frame(
            base_dir=self.base_dir,
            stages=_states(marks, current),
            current=current,
            finished=finished,
            quiet_seconds=max(0.0, time.time() - written[newest]) if alive else 0.0,
            training=training,
            progress=progress,
            eta=eta,
            log=log,
            cards=describe_cards(),
            load=machine_load(),
        )

    def _mark_path(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"

    def _metrics_path(self, stage: str, mark: Mapping[str, Any]) -> Path | None:
        """The loss log of a stage: that of the model the pipeline trains, else the newest."""
        folder = STAGES[stage].folder
        if not folder:
            return None
        found = list((self.base_dir / folder).glob(f"*/{METRICS_FILE}"))
        tags = [flag.partition("=")[2] for flag in mark.get("flags", []) if str(flag).startswith("--model_tag=")]
        if mark.get("state") == "started" and tags:
            return self.base_dir / folder / tags[-1] / METRICS_FILE
        return max(found, key=_modified, default=None)

    def _written(self, stage: str, mark: Mapping[str, Any]) -> float:
        """When a stage last wrote something; 0: never."""
        metrics = self._metrics_path(stage, mark)
        paths = [self._mark_path(stage), *([metrics] if metrics else [])]
        if mark.get("state") == "started":
            paths += [self.folder / f"{stage}.log", self.folder / f"{stage}.progress.json"]
        return max(_modified(path) for path in paths)

    def _log_lines(self, stage: str) -> list[str]:
        try:
            with open(self.folder / f"{stage}.log", "rb") as f:
                f.seek(max(0, f.seek(0, 2) - LOG_BYTES))
                text = f.read().decode("utf-8", errors="replace")
        except OSError:
            return []
        lines = ["".join(c for c in line if c.isprintable()) for line in text.splitlines()]
        return [line for line in lines if line.strip()][-LOG_LINES:]

    def _training(self, stage: str, mark: Mapping[str, Any]) -> Training | None:
        path = self._metrics_path(stage, mark)
        if path is None or (mark.get("state") == "started" and _modified(path) < _modified(self._mark_path(stage))):
            return None  # what is there is from a run before
        records = self._tails.setdefault(path, MetricsTail(path)).poll()
        steps = [record for record in records if "loss" in record]
        if not steps:
            return None
        last = steps[-1]
        progress, seconds = last.get("progress"), last.get("seconds", 0.0)
        evaluations = {
            key: value
            for record in records
            if "loss" not in record
            for key, value in record.items()
            if key not in ("step", "seconds") and is_number(value)
        }
        smooth = [(r["step"], r["smooth_loss"]) for r in steps if is_number(r.get("smooth_loss"))]
        return Training(
            step=last["step"],
            seconds=seconds,
            progress=progress,
            eta_seconds=seconds / progress * (1 - progress) if progress else None,
            loss=last.get("smooth_loss"),
            lr_multiplier=last.get("lr_multiplier"),
            tokens_per_second=last.get("tokens_per_second"),
            matmul_share=last.get("share_of_matmul_speed"),
            peak_memory_gb=last.get("peak_memory_gb"),
            skipped=int(last.get("skipped", 0)),
            scale=last.get("scale"),
            evaluations=evaluations,
            curve=thin([x for x, _ in smooth], [y for _, y in smooth], CURVE_POINTS),
        )

    def _progress(self, training: Training | None, stage: str | None) -> tuple[float | None, str | None]:
        """(0 to 1, time left) of the running stage: by its loss log, else by the file of its progress bar."""
        if training is not None:
            share, eta = training.progress, training.eta_seconds
        else:
            record = read_json(self.folder / f"{stage}.progress.json")
            share, eta = record.get("share"), record.get("eta_seconds")
        return (min(share, 1.0) if is_number(share) else None), (format_seconds(eta) if is_number(eta) else None)


def _states(marks: Mapping[str, Mapping[str, Any]], current: str | None) -> list[tuple[str, str]]:
    names = list(STAGES)
    last = max((i for i, name in enumerate(names) if marks[name]), default=len(names))
    states = []
    for i, name in enumerate(names):
        if name == current:
            states.append((name, "now"))
        elif marks[name].get("state") == "done":
            states.append((name, "done"))
        elif not STAGES[name].optional and (i > last or marks[name]):
            states.append((name, "waiting"))
    return states


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def machine_load() -> str:
    """Such as "load 1.9 on 2 cores, memory 5.1 of 23.5 GiB"."""
    memory = psutil.virtual_memory()
    used, total = (memory.total - memory.available) / 2**30, memory.total / 2**30
    return f"load {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} cores, memory {used:.1f} of {total:.1f} GiB"
