"""Two runs side by side: scores, the settings that differ, and their curves in one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.report.html import CURVES, template
from nanochat.report.plots import Line, Plotter
from nanochat.report.run_data import Run
from nanochat.report.sections import missing_sections, summary_table
from nanochat.report.text import format_value
from nanochat.stages import TRAINED

# Facts of where and when, not of what was chosen.
IGNORED = ("wandb", "run", "resume", "force")
Table = list[list[str]]


def score_table(a: Run, b: Run) -> Table:
    """Every score of both runs: metric and stage, A, B, and B − A."""
    cells = [
        {
            (row[0], stage): cell
            for row in rows[1:]
            for stage, cell in zip(rows[0][1:], row[1:], strict=True)
            if cell != "-"
        }
        for rows in (summary_table(run.sections) for run in (a, b))
    ]
    table = [["Score", "A", "B", "B − A"]]
    for name, stage in dict.fromkeys([*cells[0], *cells[1]]):
        values = [of_run.get((name, stage), "-") for of_run in cells]
        change = f"{float(values[1]) - float(values[0]):+.4f}" if "-" not in values else "-"
        table.append([f"{name} ({stage})", *values, change])
    return table


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"runtime": {"seed": 1}} -> {"runtime.seed": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def difference_table(a: Run, b: Run) -> Table:
    """The settings, results and surroundings that are not the same: name, A, B."""
    table = [["", "A", "B"]]
    sides = [
        {"machine": dict(run.header.get("environment", {}))}
        | {record["section"]: _settings(record) for record in run.sections}
        for run in (a, b)
    ]
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        flat = [_flatten(side[name]) if name in side else None for side in sides]
        if flat[0] is None or flat[1] is None:
            table.append([name, *("there" if found is not None else "not there" for found in flat)])
            continue
        for key in dict.fromkeys([*flat[0], *flat[1]]):
            values = [found.get(key) for found in flat if found is not None]
            if values[0] != values[1] and key not in IGNORED:
                table.append([f"{name}: {key}", *(format_value(value) for value in values)])
    return table


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    items = [item for item in record.get("data", []) if isinstance(item, Mapping)]
    return dict(items[0]) if items else {}


def curves(a: Run, b: Run) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """For each stage of training (title, plots), a plot being (title, "", SVG)."""
    plotter, found = Plotter(), []
    for source, names in TRAINED.items():
        plots = []
        for curve in CURVES:
            lines = []
            for i, run in enumerate((a, b)):
                x, y = run.stages[source].curve(curve.key) if source in run.stages else ([], [])
                if y:
                    lines.append(Line("AB"[i], x, [value * curve.factor for value in y], color=i))
            if lines:
                svg = plotter.lines(curve.title, lines, unit=curve.unit, zero=curve.zero, log=curve.log)
                plots.append((curve.title, "", svg))
        if plots:
            found.append((names.title, plots))
    return found


def render_comparison(a: Run, b: Run, names: Sequence[str]) -> str:
    """The page with both runs; `names` are those of A and B."""
    return template("compare.html").render(
        names=names,
        missing={name: missing_sections(run.sections, run.planned) for name, run in zip(names, (a, b), strict=True)},
        scores=score_table(a, b),
        settings=difference_table(a, b),
        curves=curves(a, b),
    )
