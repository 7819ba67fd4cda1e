"""The report as one page that opens anywhere: no script, no address of another machine, plots and style inside.

Texts that models wrote are hostile by assumption: jinja escapes everything, markdown is read without HTML, links and
pictures, and a content security policy forbids the rest.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markdown_it import MarkdownIt
from markupsafe import Markup

from nanochat.progress import format_seconds
from nanochat.report.plots import LOSS_UNIT, Line, Plotter, is_flat
from nanochat.report.run_data import Answer, Run, StageRun, cost_line, model_flops_utilization
from nanochat.report.sections import COLUMNS, missing_sections, summary_table
from nanochat.report.text import format_value

TEMPLATES = Path(__file__).with_name("templates")
SHORT = {"base": "Base", "mid": "Mid", "sft": "SFT", "rl": "RL"}


@dataclass(frozen=True)
class Curve:
    """How a metric of the loss log is drawn."""

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0
    zero: bool = False
    log: bool = False
    raw: str | None = None
    """The metric of which this is the smooth form, drawn pale behind it."""
    training: str | None = None
    """The same of the training text, drawn beside it; then the best value is marked."""


CURVES = (
    Curve("smooth_loss", "Loss", LOSS_UNIT, raw="loss"),
    Curve("val_bpb", "Validation bits per byte", training="train_bpb"),
    Curve("val_loss", "Validation loss", LOSS_UNIT),
    Curve("lr_multiplier", "Learning rate", "share of the highest", zero=True),
    Curve("grad_norm", "Gradient norm", "before clipping", zero=True),
    Curve("scale", "Loss scale", log=True),
    Curve("skipped", "Skipped steps", "so far", zero=True),
    Curve("tokens_per_second", "Tokens per second", zero=True),
    Curve("share_of_matmul_speed", "MFU", "% of the matmul speed measured before training", 100, zero=True),
    Curve("peak_memory_gb", "Peak memory", "GB", zero=True),
    Curve("data_wait_share", "Waiting for data", "% of each step", 100, zero=True),
)
# Rows of the table of scores that are no shares.
NO_SHARES = {"train bpb", "val bpb", "val loss"}
# Logged with every step, but no curve of its own.
NO_CURVE = {
    "step",
    "seconds",
    "clock",
    "tokens",
    "progress",
    "loss",
    "train_bpb",
    "epoch",
    "own_val_bpb",
    "mean_val_bpb",
}


def render_html(run: Run, price: float | None = None) -> str:
    """The page of a run; `price`: US dollars an hour of the machine."""
    plotter, summary = Plotter(), drop_empty_columns(summary_table(run.sections))
    answers = [answer for answer in run.answers if answer.question]
    return template("report.html").render(
        run=run,
        title=model_name(run),
        started=datetime.fromisoformat(run.header["time"]).strftime("%d %B %Y, %H:%M"),
        tiles=tiles(run, summary, price),
        missing=missing_sections(run.sections, run.planned),
        summary=summary,
        score_bars=score_bars(summary),
        timeline=timeline(run),
        stages=[stage_view(plotter, run, stage) for stage in run.stages.values()],
        samples=base_samples(run),
        answers=answers,
        opening=opening_answer(answers),
        first_curve=first_curve(plotter, run),
        answer_sources=[s for s in SHORT if any(s in answer.said for answer in run.answers)],
        data_sections=[run.section(name) for name in ("Tokenizer training", "Tokenizer evaluation")],
        data_facts=data_facts(run),
        cost=cost_line(run, price),
        code=code_states(run),
        short=SHORT,
        stage_colors={name: i + 1 for i, name in enumerate(COLUMNS)},
    )


@cache
def _templates() -> Environment:
    """Templates with the project's filters; everything that is put into one is escaped."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["value"] = format_value
    env.filters["duration"] = format_seconds
    env.filters["markdown"] = markdown
    return env


def template(name: str) -> Template:
    """A template by its file name."""
    return _templates().get_template(name)


def markdown(text: str) -> Markup:
    """Markdown of a section as HTML: paragraphs, lists, tables and code; HTML in it, links and pictures stay text."""
    reader = (
        MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink", "reference"])
    )
    html = reader.render(text).replace("<table>", '<div class="scroll" tabindex="0"><table>')
    return Markup(html.replace("</table>", "</table></div>").replace("<pre>", '<pre tabindex="0">'))


# --- what stands in the page -----------------------------------------------------------------------------------------


def opening_answer(answers: Sequence[Answer]) -> tuple[Answer, str] | None:
    """(an answer of the newest stage, its source) for the top of the page: the first right one of those below."""
    newest = next((source for source in reversed(SHORT) if any(source in answer.said for answer in answers)), None)
    of_it = [answer for answer in answers if newest in answer.said]
    if newest is None or not of_it:
        return None
    return next((answer for answer in of_it if answer.said[newest][1] == "right"), of_it[0]), newest


def first_curve(plotter: Plotter, run: Run) -> str | None:
    """The picture of what the base model has learned; None without its loss log."""
    x, y = run.stages["base"].curve("smooth_loss") if "base" in run.stages else ([], [])
    return plotter.lines("Loss of the base model", [Line("Loss", x, y)], unit=LOSS_UNIT) if y else None


def model_name(run: Run) -> str:
    """Such as "d4, 5.2M parameters"."""
    base = run.stages.get("base")
    if base is None:
        return "nanochat"
    depth = base.settings.get("depth")
    params = base.facts.get("parameters")
    parts = [f"d{depth}" if depth else "", f"{human(params)} parameters" if params else ""]
    return ", ".join(part for part in parts if part) or "nanochat"


def human(number: float) -> str:
    """5242880 -> 5.2M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def short_number(value: float) -> str:
    """Four digits: 21283.4 -> 21,283; 0.97678 -> 0.9768."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def tiles(run: Run, summary: Sequence[Sequence[str]], price: float | None) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the figures a reader looks for first."""
    base = run.stages.get("base")
    facts = base.facts if base else {}
    last = {row[0]: next((cell for cell in reversed(row[1:]) if cell != "-"), "-") for row in summary[1:]}
    first = {row[0]: row[1] for row in summary[1:]}
    training = sum(seconds[-1] for stage in run.stages.values() if (seconds := stage.curve("seconds")[1]))
    found = []
    if "ChatCORE" in last:
        found.append(("ChatCORE", last["ChatCORE"], "mean of the chat tasks, 0 is guessing"))
    if first.get("CORE", "-") != "-":
        found.append(("CORE", first["CORE"], "of the base model, 0 is guessing"))
    if first.get("val bpb", "-") != "-":
        found.append(("Validation bpb", first["val bpb"], "bits per byte of unseen text"))
    if "parameters" in facts:
        found.append(("Parameters", human(facts["parameters"]), f"{facts['parameters']:,}"))
    if "tokens" in facts:
        found.append(("Tokens read", human(facts["tokens"]), "in base training"))
    if training:
        found.append(("Training", format_seconds(training), f"of {format_seconds(run.wall_seconds)} from start to end"))
    cost = re.match(r"(?:about )?(\$[\d.]+)", cost_line(run, price))
    if cost:
        found.append(("Cost", cost.group(1), "to rent the machine, see below"))
    return found


def drop_empty_columns(summary: Sequence[Sequence[str]]) -> list[list[str]]:
    """The table without the stages that have no score."""
    keep = [i for i in range(len(summary[0])) if i == 0 or any(row[i] != "-" for row in summary[1:])]
    return [[row[i] for i in keep] for row in summary]


def score_bars(summary: Sequence[Sequence[str]]) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """(task, [(stage, score, percent)]) of what goes from 0 to 1: bits per byte and losses don't."""
    rows = []
    for name, *cells in summary[1:]:
        scores = [(stage, cell, float(cell)) for stage, cell in zip(summary[0][1:], cells, strict=True) if cell != "-"]
        if name not in NO_SHARES and all(0 <= score <= 1 for *_, score in scores):
            rows.append((name, [(stage, cell, 100 * score) for stage, cell, score in scores]))
    return rows


def timeline(run: Run) -> list[tuple[str, str, float]]:
    """(stage, time, percent of the longest) of the pipeline's stages."""
    longest = max(run.seconds.values(), default=1.0) or 1.0
    return [(name, format_seconds(s), max(0.4, 100 * s / longest)) for name, s in run.seconds.items()]


def stage_view(plotter: Plotter, run: Run, stage: StageRun) -> dict[str, Any]:
    """What the page says of one stage of training: facts, plots, and curves that are a straight line."""
    plots: list[tuple[str, str, str]] = []
    flat: list[str] = []
    once: list[str] = []
    color = list(SHORT).index(stage.source)
    for curve in (*CURVES, *_other_curves(stage)):
        x, y = stage.curve(curve.key)
        if not y:
            continue
        if is_flat(y):
            name = curve.title if curve.title.isupper() else curve.title.lower()
            (once if len(y) == 1 else flat).append(f"{name} {short_number(y[0] * curve.factor)}")
            continue
        lines = [Line(curve.title, x, [value * curve.factor for value in y], color)]
        if curve.raw:
            raw_x, raw_y = stage.curve(curve.raw)
            lines.insert(0, Line(curve.raw, raw_x, raw_y, color, faint=True))
        mark, value = None, f"last: {short_number(y[-1] * curve.factor)}"
        if curve.training and (best := stage.best) is not None:
            mark, value = (best.step, best.bpb), f"{value}, best: {best}"
            train_x, train_y = stage.curve(curve.training)
            if train_y:
                lines = [replace(lines[0], label="new text"), Line("training text", train_x, train_y, color + 1)]
        svg = plotter.lines(curve.title, lines, unit=curve.unit, zero=curve.zero, log=curve.log, mark=mark)
        plots.append((curve.title, value, svg))
    mfu = model_flops_utilization(run, stage)
    facts = stage.facts | ({"MFU, share of the data sheet's peak": f"{mfu:.1%}"} if mfu is not None else {})
    unfinished = not stage.section and bool(stage.steps)
    return {"stage": stage, "plots": plots, "flat": flat, "once": once, "facts": facts, "unfinished": unfinished}


def _other_curves(stage: StageRun) -> list[Curve]:
    """Metrics that are only logged by some stages, such as RL's reward."""
    known = NO_CURVE | {curve.key for curve in CURVES}
    keys = {key: None for records in (stage.steps[-1:], stage.evaluations[-1:]) for record in records for key in record}
    return [Curve(key, key.replace("_", " ").capitalize()) for key in keys if key not in known]


def base_samples(run: Run) -> list[str]:
    """What the base model wrote, one text per prompt."""
    texts = []
    for item in run.section("Base model loss").get("data", []):
        if isinstance(item, str) and item.startswith("```"):
            for line in item.strip("`\n").splitlines():
                try:
                    texts.append(str(ast.literal_eval(line)))
                except (ValueError, SyntaxError):
                    texts.append(line)
    return texts


def data_facts(run: Run) -> dict[str, Any]:
    """What the stages learned from."""
    facts: dict[str, Any] = {}
    base = run.stages.get("base")
    if base is not None:
        loader = base.meta.get("loader", {})
        facts |= {"text": base.settings.get("dataset") or base.settings.get("data_dir")}
        facts |= {"vocabulary": base.meta.get("model_config", {}).get("vocab_size")}
        facts |= {"tokens read": loader.get("tokens_seen"), "epochs begun": base.facts.get("epochs begun")}
        facts |= {
            "tokenizer hash": str(base.meta.get("tokenizer_hash", ""))[:16] or None,
            "corpus": loader.get("corpus"),
        }
    for source in ("mid", "sft"):
        if source in run.stages:
            facts[f"{SHORT[source]}: conversations"] = run.stages[source].facts.get("packing")
    return {key: value for key, value in facts.items() if value is not None}


def code_states(run: Run) -> dict[str, str]:
    """The commit that each stage ran with."""
    return {SHORT[s.source]: str(s.meta["code"]) for s in run.stages.values() if "code" in s.meta}
