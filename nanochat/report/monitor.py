"""The state of a running pipeline, read from its files alone.

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
from nanochat.stages import STAGES, pending_name

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
    progress: float | None
    """0 to 1."""
    eta: str | None
    facts: Sequence[tuple[str, str]]
    """(name, value) of the newest figures, if the running stage trains."""
    curve: tuple[Sequence[float], Sequence[float]]
    """Steps and smooth losses, thinned."""
    machine: Sequence[tuple[str, str]]
    """(name, value) of each card and of the machine."""
    log: Sequence[str]
    clock: str = field(default_factory=lambda: time.strftime("%H:%M:%S"))

    @property
    def is_quiet(self) -> bool:
        """True if the running stage has written nothing for long: it has stopped, or does something long."""
        return self.current is not None and self.quiet_seconds > QUIET_SECONDS

    @property
    def headline(self) -> str:
        """One line that says what is going on."""
        if self.finished:
            return "all stages are finished"
        if self.current is None:
            return "nothing has run here yet"
        silence = f": nothing written for {format_seconds(self.quiet_seconds)}: stopped, or at a long step"
        return self.current + (silence if self.is_quiet else "")


class Watcher:
    """Looks at the run in a base dir."""

    def __init__(self, base_dir: Path) -> None:
        self.base_dir = base_dir
        self.folder = base_dir / "pipeline"
        self._tails: dict[Path, MetricsTail] = {}

    def look(self) -> Frame:
        """The state of the run now."""
        marks = {name: read_json(self._mark_path(name)) for name in STAGES}
        written = {name: self._written(name, marks[name]) for name in STAGES}
        newest = max(STAGES, key=lambda name: (written[name], list(STAGES).index(name)))
        alive = written[newest] > 0
        finished = alive and marks[newest].get("state") == "done" and newest == "answer"
        current = newest if alive and not finished else None
        records = self._records(current, marks[current]) if current else []
        last: dict[str, Any] = next((record for record in reversed(records) if "loss" in record), {})
        progress, eta = self._progress(last, current)
        smooth = [(r["step"], r["smooth_loss"]) for r in records if is_number(r.get("smooth_loss"))]
        return Frame(
            base_dir=self.base_dir,
            stages=_states(marks, current),
            current=current,
            finished=finished,
            quiet_seconds=max(0.0, time.time() - written[newest]) if alive else 0.0,
            progress=progress,
            eta=eta,
            facts=training_facts(last, records) if last else (),
            curve=thin([x for x, _ in smooth], [y for _, y in smooth], CURVE_POINTS),
            machine=machine_facts(),
            log=self._log_lines(current or newest),
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
            pending = self.base_dir / folder / pending_name(tags[-1]) / METRICS_FILE
            return pending if pending.exists() else self.base_dir / folder / tags[-1] / METRICS_FILE
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

    def _records(self, stage: str, mark: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The loss log of the running stage."""
        path = self._metrics_path(stage, mark)
        if path is None or (mark.get("state") == "started" and _modified(path) < _modified(self._mark_path(stage))):
            return []  # what is there is from a run before
        return self._tails.setdefault(path, MetricsTail(path)).poll()

    def _progress(self, last: Mapping[str, Any], stage: str | None) -> tuple[float | None, str | None]:
        """(0 to 1, time left) of the running stage: by its loss log, else by the file of its progress bar."""
        if last:
            share = last.get("progress")
            eta = last.get("seconds", 0.0) / share * (1 - share) if share else None
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


def training_facts(last: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, value) of the last step, and of the last evaluation of each kind among all records."""

    def show(key: str, form: str) -> str:
        value = last.get(key)
        return format(value, form) if is_number(value) else "-"

    evaluations = {
        key.replace("_", " "): f"{value:.4f}"
        for record in records
        if "loss" not in record
        for key, value in record.items()
        if key not in ("step", "seconds") and is_number(value)
    }
    return [
        ("step", show("step", ",")),
        ("trained", format_seconds(last.get("seconds", 0.0))),
        ("loss", show("smooth_loss", ".4f")),
        ("learning rate", "×" + show("lr_multiplier", ".2f")),
        ("tokens/s", show("tokens_per_second", ",.0f")),
        ("of matmul speed", show("share_of_matmul_speed", ".0%")),
        ("peak memory", show("peak_memory_gb", ".2f") + " GB"),
        ("skipped steps", str(last.get("skipped", 0))),
        ("loss scale", show("scale", "g")),
        *evaluations.items(),
    ]


def machine_facts() -> list[tuple[str, str]]:
    """(name, value) of each card and of the machine."""
    memory, load = psutil.virtual_memory(), psutil.getloadavg()[0]
    used, total = (memory.total - memory.available) / 2**30, memory.total / 2**30
    cards = [(f"card {i}", card) for i, card in enumerate(describe_cards())]
    machine = f"load {load:.1f} on {psutil.cpu_count()} cores, memory {used:.1f} of {total:.1f} GiB"
    return [*(cards or [("card", "no card")]), ("machine", machine)]
