"""The state of a running pipeline, read from its files alone.

A `Watcher` looks at marks, logs and loss logs in a base dir and says in a `Frame` which stage is running, how far it is
and how the loss goes. It changes nothing and holds nothing open, so it may start and stop at any time, and a run
without the pipeline (`python -m scripts.base_train`) is seen as well.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nanochat.files import read_json
from nanochat.hardware import describe_cards
from nanochat.progress import format_seconds
from nanochat.report.metrics_log import read_metrics
from nanochat.report.plots import LOSS_UNIT, thin
from nanochat.report.run_data import METRICS_FILE, best_evaluation, is_number
from nanochat.stages import PLAN_FILE, STAGES, pending_name

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
class StageCurve:
    """The loss of a stage that trains, or has trained."""

    stage: str
    title: str
    """For people: "Base training"."""
    unit: str = f"loss, {LOSS_UNIT}"
    steps: Sequence[float]
    losses: Sequence[float]
    """Smooth, in the unit; thinned."""
    new_text: tuple[Sequence[float], Sequence[float]] | None = None
    """Steps and losses of text that is not trained on, where the unit is one for both."""
    seconds: float
    """How long it has trained."""

    @property
    def summary(self) -> str:
        """One line for where there is no room for a picture."""
        span = f"{self.unit.split(',')[0]} {self.losses[0]:.4g} to {self.losses[-1]:.4g}"
        return f"{self.title}: {span} in {self.steps[-1]:,.0f} steps, {format_seconds(self.seconds)}"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One look at a run."""

    base_dir: Path
    stages: Sequence[tuple[str, str]]
    """(stage, "done", "now", "stopped" or "waiting"); what the pipeline has passed without running it is left out."""
    current: str | None
    """The stage that runs, or that has not come to its end; None before the first and after the last."""
    finished: bool
    running: bool | None
    """True if a process holds the run's lock, False if none does; None where there is no lock that says so."""
    copied_from: str | None
    """Where the run was made, if that is not here."""
    quiet_seconds: float
    """Since anything was written."""
    progress: float | None
    """0 to 1."""
    eta: str | None
    """Of the current stage."""
    total_left: str | None
    """Of all stages that are left, as far as their times are known."""
    facts: Sequence[tuple[str, str]]
    """(name, value) of the newest figures, if the running stage trains."""
    curves: Sequence[StageCurve]
    """Of the stages that have trained, in their order; the current one's is the last."""
    machine: Sequence[tuple[str, str]]
    """(name, value) of each card and of the machine."""
    log: Sequence[str]
    report: Path | None
    """The finished report."""
    chat: str | None
    """The command that talks to the finished model."""
    clock: str = field(default_factory=lambda: time.strftime("%H:%M:%S"))

    @property
    def is_quiet(self) -> bool:
        """True if nothing was written for long by a stage of which no lock says whether it still runs."""
        return self.current is not None and self.running is None and self.quiet_seconds > QUIET_SECONDS

    @property
    def headline(self) -> str:
        """One line that says what is going on."""
        if self.finished:
            return "all stages are finished"
        if self.current is None:
            return "between two stages" if self.running else "nothing has run here yet"
        if self.running is False and self.copied_from:
            return f"{self.current} is not finished; nothing runs here: this is a copy of {self.copied_from}"
        if self.running is False:
            return f"{self.current} has ended before it was finished: the same command goes on from here"
        silence = f": nothing written for {format_seconds(self.quiet_seconds)}: stopped, or at a long step"
        return self.current + (silence if self.is_quiet else "")


def is_locked(path: Path) -> bool | None:
    """True if a process holds the lock file; None where nobody can say. A dead process holds none, nor does a copy."""
    try:
        import fcntl  # lazy: Windows has none

        with open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return None
    return False


class Watcher:
    """Looks at the run in a base dir."""

    def __init__(self, base_dir: Path) -> None:
        self.base_dir = base_dir
        self.folder = base_dir / "pipeline"
        self._tails: dict[Path, MetricsTail] = {}

    def look(self) -> Frame:
        """The state of the run now."""
        marks = {name: read_json(self._mark_path(name)) for name in STAGES}
        plan = read_json(self.folder / PLAN_FILE)
        planned = plan.get("seconds")
        expected = {name: planned[name] for name in STAGES if name in planned} if isinstance(planned, dict) else {}
        current, running = self._current(marks, expected)
        finished = current is None and not running and marks["answer"].get("state") == "done"
        written = max((self._written(name, marks[name]) for name in STAGES), default=0.0)
        known = {name: self._records(name, marks[name]) for name in STAGES if self._belongs(name, current, marks)}
        records = known.get(current or "", [])
        last: dict[str, Any] = next((record for record in reversed(records) if "loss" in record), {})
        progress, eta = self._progress(last, current)
        alive = running is not False and current is not None
        left = self._total_left(marks, expected, current, eta) if alive else None
        folder = plan.get("folder")
        report = self.base_dir / "report" / "report.html"
        return Frame(
            base_dir=self.base_dir,
            stages=_states(marks, expected, current, "stopped" if running is False else "now"),
            current=current,
            finished=finished,
            running=running,
            copied_from=folder if folder and folder != str(self.base_dir.absolute()) else None,
            quiet_seconds=max(0.0, time.time() - written) if written else 0.0,
            progress=progress,
            eta=format_seconds(eta) if alive and eta is not None else None,
            total_left=left,
            facts=training_facts(last, records) if last else (),
            curves=[curve for name, found in known.items() for curve in _curves(name, found)],
            machine=machine_facts(),
            log=self._log_lines(current or "answer"),
            report=report if finished and report.is_file() else None,
            chat=self._chat_command(marks) if finished else None,
        )

    def _current(
        self, marks: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any]
    ) -> tuple[str | None, bool | None]:
        """(the stage that runs or was stopped, whether anything runs), by marks and locks: a copy has other times."""
        trains = [name for name in STAGES if STAGES[name].folder]
        locks = {name: (self.base_dir / STAGES[name].folder).glob(".*.lock") for name in trains}
        held = {name: [is_locked(lock) for lock in locks[name]] for name in trains}
        running = is_locked(self.folder / ".lock")
        for name in trains:
            if True in held[name]:  # by the pipeline, or by hand
                return name, True
        begun = [name for name in STAGES if marks[name].get("state") == "started"]
        if begun:
            return max(begun, key=lambda name: _when(marks[name], self._mark_path(name))), running
        if running:
            waiting = (name for name in expected if marks[name].get("state") != "done")
            return next(waiting, None), True
        by_hand = [name for name in trains if not marks[name] and self._unfinished(name)]
        if by_hand:
            newest = max(by_hand, key=lambda name: self._written(name, {}))
            return newest, False if False in held[newest] else None
        return None, running

    def _unfinished(self, stage: str) -> bool:
        """True if a stage that nobody has marked has trained, but not to its end."""
        optional = STAGES[stage].optional
        if not optional and any(self.folder.glob("*.json")):
            return False  # a pipeline has yet to come to it: what is there is from a run before
        shares = [r.get("progress") for r in self._records(stage, {}) if "loss" in r]
        return bool(shares) and is_number(shares[-1]) and shares[-1] < 1

    def _belongs(self, stage: str, current: str | None, marks: Mapping[str, Mapping[str, Any]]) -> bool:
        """True if a stage's loss log is of this run."""
        if not STAGES[stage].folder:
            return False
        by_hand = STAGES[stage].optional or not any(marks.values())
        return stage == current or marks[stage].get("state") == "done" or by_hand

    def _mark_path(self, stage: str) -> Path:
        return self.folder / f"{stage}.json"

    def _metrics_path(self, stage: str, mark: Mapping[str, Any]) -> Path | None:
        """The loss log of a stage: that of the model the pipeline trains, else the newest."""
        folder = self.base_dir / STAGES[stage].folder
        if not STAGES[stage].folder:
            return None
        tag = _tag_of(mark)
        if mark.get("state") == "started" and tag:
            pending = folder / pending_name(tag) / METRICS_FILE
            return pending if pending.exists() else folder / tag / METRICS_FILE
        if tag and (folder / tag / METRICS_FILE).exists():
            return folder / tag / METRICS_FILE
        return max(folder.glob(f"*/{METRICS_FILE}"), key=_modified, default=None)

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
        """The loss log of a stage."""
        path = self._metrics_path(stage, mark)
        begun = _when(mark, self._mark_path(stage)) if mark.get("state") == "started" else 0.0
        if path is None or _modified(path) < begun:
            return []  # what is there is from a run before
        return self._tails.setdefault(path, MetricsTail(path)).poll()

    def _progress(self, last: Mapping[str, Any], stage: str | None) -> tuple[float | None, float | None]:
        """(0 to 1, seconds left) of the current stage: by its loss log, else by the file of its progress bar."""
        if last:
            share = last.get("progress")
            eta = None
            if is_number(share) and share > 0 and is_number(last.get("seconds")):
                eta = last["seconds"] / share * (1 - share)
        else:
            record = read_json(self.folder / f"{stage}.progress.json")
            share, eta = record.get("share"), record.get("eta_seconds")
        return (min(share, 1.0) if is_number(share) else None), (eta if is_number(eta) else None)

    def _total_left(
        self,
        marks: Mapping[str, Mapping[str, Any]],
        expected: Mapping[str, Any],
        current: str | None,
        eta: float | None,
    ) -> str | None:
        """The time of all stages to come: as the pipeline expects them, by the speed of those that are done."""
        done = {name: marks[name].get("seconds") for name in expected if marks[name].get("state") == "done"}
        both = [(seconds, expected[name]) for name, seconds in done.items() if is_number(expected[name])]
        planned = sum(plan for seconds, plan in both if is_number(seconds))
        slower = sum(seconds for seconds, _ in both if is_number(seconds)) / planned if planned else 1.0
        left = {name: expected[name] for name in expected if name not in done}
        known = {name: slower * seconds for name, seconds in left.items() if is_number(seconds)}
        if current in left and eta is not None:
            known[current] = eta
        elif current in known:
            mark = self._mark_path(current)
            known[current] = max(0.0, known[current] - (time.time() - _when(marks[current], mark)))
        if not known:
            return None
        unknown = len(left) - len(known)
        more = f", {unknown} of which the time is not known" if unknown else ""
        return f"{format_seconds(sum(known.values()))} for {len(left)} stages{more}"

    def _chat_command(self, marks: Mapping[str, Mapping[str, Any]]) -> str:
        trained = [name for name in STAGES if STAGES[name].folder and marks[name].get("state") == "done"]
        newest = STAGES[trained[-1]].source if trained else "sft"
        tag = _tag_of(marks[trained[-1]]) if trained else None
        return (
            f"NANOCHAT_BASE_DIR={shlex.quote(str(self.base_dir.absolute()))} python -m scripts.chat_web -i {newest}"
            f"{f' -g {shlex.quote(tag)}' if tag else ''}"
        )


def _tag_of(mark: Mapping[str, Any]) -> str | None:
    flags = mark.get("flags")
    named = map(str, flags) if isinstance(flags, list) else ()
    tags = [flag.partition("=")[2] for flag in named if flag.startswith("--model_tag=")]
    return tags[-1] if tags else None


def _when(mark: Mapping[str, Any], path: Path) -> float:
    """When a mark was made; those of older versions do not say so themselves."""
    said = mark.get("time")
    return said if is_number(said) else _modified(path)


def _curves(stage: str, records: Sequence[Mapping[str, Any]]) -> list[StageCurve]:
    """The loss of every step; and, where text is evaluated, the bits per byte of learned and of new text."""

    def points(key: str) -> tuple[list[float], list[float]]:
        found = [(r["step"], r[key]) for r in records if is_number(r.get(key))]
        return thin([x for x, _ in found], [y for _, y in found], CURVE_POINTS)

    smooth, trained, new_text = points("smooth_loss"), points("train_bpb"), points("val_bpb")
    seconds = next((r["seconds"] for r in reversed(records) if is_number(r.get("seconds"))), 0.0)
    common: dict[str, Any] = {"stage": stage, "title": STAGES[stage].title, "seconds": seconds}
    curves = [StageCurve(**common, steps=smooth[0], losses=smooth[1])] if smooth[1] else []
    if len(trained[1]) > 1:
        unit = "bits per byte of training text and of new text"
        curves.append(StageCurve(**common, unit=unit, steps=trained[0], losses=trained[1], new_text=new_text))
    return curves


def _states(
    marks: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Any], current: str | None, state: str
) -> list[tuple[str, str]]:
    names = list(STAGES)
    last = max((i for i, name in enumerate(names) if marks[name]), default=len(names))
    states = []
    for i, name in enumerate(names):
        if name == current:
            states.append((name, state))
        elif marks[name].get("state") == "done":
            states.append((name, "done"))
        elif name in expected or (not expected and not STAGES[name].optional and (i > last or marks[name])):
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
    best = best_evaluation(records)
    return [
        ("step", show("step", ",")),
        ("trained", format_seconds(last["seconds"]) if is_number(last.get("seconds")) else "-"),
        ("loss", show("smooth_loss", ".4f")),
        ("learning rate", "×" + show("lr_multiplier", ".2f")),
        ("tokens/s", show("tokens_per_second", ",.0f")),
        ("of matmul speed", show("share_of_matmul_speed", ".0%")),
        ("peak memory", show("peak_memory_gb", ".2f") + " GB"),
        ("skipped steps", show("skipped", ".0f")),
        ("loss scale", show("scale", "g")),
        *evaluations.items(),
        *([("best val bpb", str(best))] if best is not None else []),
    ]


def machine_facts() -> list[tuple[str, str]]:
    """(name, value) of each card and of the machine."""
    memory, load = psutil.virtual_memory(), psutil.getloadavg()[0]
    used, total = (memory.total - memory.available) / 2**30, memory.total / 2**30
    cards = [(f"card {i}", card) for i, card in enumerate(describe_cards())]
    machine = f"load {load:.1f} on {psutil.cpu_count()} cores, memory {used:.1f} of {total:.1f} GiB"
    return [*(cards or [("card", "no card")]), ("machine", machine)]
