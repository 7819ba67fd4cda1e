"""What a run has left in its base dir, read for the report: sections, loss logs, checkpoints, answers, and its price.

Everything may be missing or broken: what can't be read is left out, and the report says so.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeGuard

from nanochat.cards import find_card
from nanochat.env import print0
from nanochat.files import place_of, read_json, unseal
from nanochat.progress import format_seconds
from nanochat.report.metrics_log import is_as_saved, read_metrics
from nanochat.stages import PLAN_FILE, TRAINED

METRICS_FILE, META_FILE = "metrics.jsonl", "meta.json"
ANSWERS_PER_TASK, MAX_ANSWERS = 2, 24
PRICES = Path(__file__).with_name("prices.json")


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of training."""

    source: str
    title: str
    section: Mapping[str, Any]
    """Its section of the report; empty if it has not finished."""
    steps: Sequence[Mapping[str, Any]]
    """The records of optimizer steps."""
    evaluations: Sequence[Mapping[str, Any]]
    """The records of evaluations in between."""
    meta: Mapping[str, Any]
    """meta.json of the newest checkpoint."""

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged and is finite."""
        records = self.steps if any(key in record for record in self.steps[-1:]) else (*self.steps, *self.evaluations)
        points = [(record["step"], record[key]) for record in records if is_number(record.get(key))]
        return [float(x) for x, _ in points], [float(y) for _, y in points]

    @property
    def best(self) -> BestEvaluation | None:
        """The best evaluation; None before the first."""
        return best_evaluation(self.evaluations)

    @property
    def facts(self) -> dict[str, Any]:
        """What its section says besides the settings."""
        items = [item for item in self.section.get("data", []) if isinstance(item, dict)]
        return dict(items[1]) if len(items) > 1 else {}

    @property
    def settings(self) -> dict[str, Any]:
        """The flags it was started with."""
        items = [item for item in self.section.get("data", []) if isinstance(item, dict)]
        found = items[0] if items else self.meta.get("config", {})
        return dict(found) if isinstance(found, Mapping) else {}


Verdict = Literal["right", "by another way", "wrong"]


@dataclass(frozen=True)
class Answer:
    """A question of an evaluation, and what the models of two stages or more said."""

    question: str
    expected: str
    said: Mapping[str, tuple[str, Verdict]]
    """By source: the answer, and what became of it."""


@dataclass(frozen=True)
class Run:
    """All that is known of a run."""

    folder: Path
    header: Mapping[str, Any]
    sections: Sequence[Mapping[str, Any]]
    stages: Mapping[str, StageRun] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long each stage of the pipeline took, by its name."""
    answers: Sequence[Answer] = ()
    planned: Sequence[str] = ()
    """The stages that the pipeline was to run, by name; none where the stages were started by hand."""

    def section(self, name: str) -> Mapping[str, Any]:
        """A section of the report; empty if there is none."""
        return next((record for record in self.sections if record["section"] == name), {})

    @property
    def wall_seconds(self) -> float:
        """From the start of the report to its last section, pauses included."""
        times = [datetime.fromisoformat(record["time"]) for record in (self.header, *self.sections) if "time" in record]
        return (max(times) - min(times)).total_seconds() if times else 0.0


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


@dataclass(frozen=True)
class BestEvaluation:
    """The lowest validation bits per byte of a run."""

    step: int
    bpb: float
    epoch: float | None
    """None: an older log, which does not say."""

    def __str__(self) -> str:
        return f"{self.bpb:.4g} at step {self.step:,}" + ("" if self.epoch is None else f", epoch {self.epoch:.1f}")


def best_evaluation(records: Sequence[Mapping[str, Any]]) -> BestEvaluation | None:
    """The best of the evaluations among `records`; None if there is none."""
    found = [record for record in records if is_number(record.get("val_bpb"))]
    if not found:
        return None
    best = min(found, key=lambda record: record["val_bpb"])
    return BestEvaluation(best["step"], best["val_bpb"], best["epoch"] if is_number(best.get("epoch")) else None)


def read_run(folder: Path, header: Mapping[str, Any], sections: Sequence[Mapping[str, Any]]) -> Run:
    """Gather what the base dir `folder` holds; header and sections are the report's own."""
    stages = {}
    by_name = {record["section"]: record for record in sections}
    for source, names in TRAINED.items():
        stage = _read_stage(source, names.title, by_name.get(names.section, {}), folder / names.folder)
        if stage is not None:
            stages[source] = stage
    seconds = {}
    for path in sorted((folder / "pipeline").glob("*.json"), key=lambda path: path.stat().st_mtime):
        mark = read_json(path)
        if mark.get("state") == "done" and is_number(mark.get("seconds")):
            seconds[path.stem] = float(mark["seconds"])
    plan = read_json(folder / "pipeline" / PLAN_FILE).get("seconds")
    planned = tuple(plan) if isinstance(plan, Mapping) else ()
    return Run(folder, header, sections, stages, seconds, read_answers(folder / "chat_eval"), planned)


def _read_stage(source: str, title: str, section: Mapping[str, Any], folder: Path) -> StageRun | None:
    logs = {path.parent.name: path for path in folder.glob(f"[!.]*/{METRICS_FILE}")}
    settings = next((item for item in section.get("data", []) if isinstance(item, dict)), {})
    tag = settings.get("model_tag") or (f"d{settings['depth']}" if "depth" in settings else None)
    if tag not in logs and logs:
        tag = max(logs, key=lambda name: logs[name].stat().st_mtime)
    if not section and not logs:
        return None
    saved = sorted((folder / str(tag)).glob(f"step_*/{META_FILE}"))
    meta = read_json(saved[-1]) if saved else {}
    log = logs.get(str(tag))
    data = b"" if log is None else log.read_bytes()
    if data and not is_as_saved(data, meta.get("state")):
        print0(f"warning: {log} is not what the run wrote: the report has no curves of {title}")
        data = b""
    records = read_metrics(data)
    return StageRun(
        source=source,
        title=title,
        section=section,
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "loss" not in record],
        meta=meta,
    )


# --- what the models answered ----------------------------------------------------------------------------------------


def read_answers(folder: Path) -> list[Answer]:
    """The first problems of each written task, as the newest model of each stage answered them."""
    said: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for source in TRAINED:
        found = sorted(folder.glob(f"{source}_*"), key=lambda path: path.stat().st_mtime)
        for path in sorted(found[-1].glob("*.jsonl")) if found else []:
            for record in _first_records(path):
                said.setdefault((path.stem, record["index"]), {})[source] = record
    answers = []
    for records in said.values():
        first = next(iter(records.values()))
        texts = {source: (readable(r["completions"][0]), verdict(r)) for source, r in records.items()}
        answers.append(Answer(str(first.get("question", "")), readable(first.get("answer", "")), texts))
    return answers[:MAX_ANSWERS]


def verdict(record: Mapping[str, Any]) -> Verdict:
    """What a task's judge says of an answer, "right" only if it has also calculated what the reference calculates.

    A judge of numbers alone lets pass what is right by chance: the letters of another word, say.
    """
    if not record.get("passed"):
        return "wrong"
    wanted, made = (_calls(_with_marks(text)) for text in (record.get("answer", ""), record["completions"][0]))
    return "right" if wanted <= made else "by another way"


def _calls(answer: str) -> set[str]:
    """What an answer asks the calculator, however it is written: '"a".count( "b")' is "'a'.count('b')"."""
    found = re.findall(r"<\|python_start\|>(.*?)<\|python_end\|>", answer, re.DOTALL)
    return {re.sub(r"\s+", "", call).replace('"', "'") for call in found}


def _with_marks(answer: Any) -> str:
    """An answer as the model writes it, also one that is stored as parts: texts, Python, and what it printed."""
    if not isinstance(answer, list):
        return str(answer)
    marks = {
        "python": ("<|python_start|>", "<|python_end|>"),
        "python_output": ("<|output_start|>", "<|output_end|>"),
    }
    parts = [(marks.get(str(part.get("type")), ("", "")), part.get("text", "")) for part in answer]
    return "".join(f"{before}{text}{after}" for (before, after), text in parts)


def readable(answer: Any) -> str:
    """An answer as people read it: a use of the calculator or of Python as ⟨7*6 → 42⟩, a result after ⇒."""
    text = re.sub(r"<\|python_end\|>\s*<\|output_start\|>", " → ", _with_marks(answer))
    text = re.sub(r"\s*####\s*(?=[-+$€£]?\d)", " ⇒ ", text)
    text = re.sub(
        r"<\|python_start\|>|<\|(?:python|output)_end\|>", lambda m: "⟨" if "start" in m.group() else "⟩", text
    )
    return re.sub(r"⟩(?=\w)", "⟩ ", text)  # what it says begins there


def _first_records(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(OSError), open(path, "rb") as f:
        for line in itertools.islice(f, ANSWERS_PER_TASK):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not unseal(record, place_of(path)):
                print0(f"warning: {path} is damaged, an answer is left out: run the evaluation again")
            elif record.get("completions") and isinstance(record.get("index"), int):
                yield record


# --- cost and speed --------------------------------------------------------------------------------------------------


def card_names(run: Run) -> list[str]:
    """The cards the report was made on, as torch calls them."""
    gpu = str(run.header.get("environment", {}).get("GPU", "none"))
    return [] if gpu in ("none", "mps") else [part.split(",")[0].strip() for part in gpu.split(";")]


def cost_line(run: Run, price: float | None = None) -> str:
    """What the hours of the run cost: by `price` (US dollars an hour of the whole machine), else by the price table."""
    hours = run.wall_seconds / 3600
    length = f"{format_seconds(run.wall_seconds)} from start to end"
    if price is not None:
        return f"${hours * price:.2f}: {length} at ${price:g} an hour (--price)"
    names = card_names(run)
    card = find_card(names[0]) if names else None
    rows = [row for row in read_json(PRICES).get("prices", []) if card is not None and row["card"] == card.name]
    if not rows:
        machine = names[0] if names else "a machine without a card"
        return f"unknown: there is no price of {machine} in the table (--price says what an hour costs)"
    row = rows[0]
    cards = f"{len(names)} cards" if len(names) > 1 else "one card"
    each = row["usd_per_hour"]
    return (
        f"about ${hours * len(names) * each:.2f}: {length}, {cards} at ${each:.2f} an hour "
        f"to rent ({row['what']}; {row['source']}, {row['date']}; --price overrides it)"
    )


def model_flops_utilization(run: Run, stage: StageRun) -> float | None:
    """Share of the data sheet's peak that training reached; None where card or FLOPs are not known."""
    base = run.stages.get("base")
    flops = base.facts.get("FLOPs per token") if base else None
    speed = stage.curve("tokens_per_second")[1]
    names = card_names(run)
    card = find_card(names[0]) if names else None
    if flops is None or not speed or card is None:
        return None
    try:
        peak = card.peak_tflops(str(stage.meta.get("dtype", stage.facts.get("dtype"))))
    except ValueError:
        return None
    mean = sum(speed) / len(speed) / int(stage.meta.get("world_size", 1))
    return mean * flops / (peak * 1e12) if peak else None
