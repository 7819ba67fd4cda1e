"""The sections of a report: their order, their markdown, and the table of metrics against stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from nanochat.progress import format_seconds
from nanochat.report.text import format_value, to_markdown
from nanochat.stages import STAGES, TRAINED

# In order: section, and the column of the summary table that its metrics belong to.
SECTIONS = {s.section: s.source.upper() if s.source else None for s in STAGES.values() if s.section}
COLUMNS = [source.upper() for source in TRAINED]
# Rows of the summary table that come first and last; the chat tasks stand between in the order they were logged.
FIRST_ROWS = ("train bpb", "val bpb", "val loss", "CORE", "CORE (partial)")
LAST_ROWS = ("ChatCORE", "ChatCORE (partial)")
MAX_TEXT_CHARACTERS = 20_000


def render_section(record: Mapping[str, Any]) -> str:
    """The markdown of one section."""
    lines = [f"## {record['section']}", "", f"*{record['time'].replace('T', ' ')}*", ""]
    for item in record["data"]:
        if item is None or item == "" or item == {}:
            continue
        if isinstance(item, dict):
            lines += [f"- {format_value(str(key))}: {format_value(value)}" for key, value in item.items()]
        elif isinstance(item, str):
            lines.append(item[:MAX_TEXT_CHARACTERS].strip("\n"))
        else:
            lines.append(f"- {format_value(item)}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def missing_sections(records: Sequence[Mapping[str, Any]], planned: Sequence[str] = ()) -> list[str]:
    """The sections that have not been logged: of the planned stages; without a plan, of those up to the newest model.

    Without a plan the models after the newest are not missed, since a run may end with the base model, and optional
    stages never are.
    """
    there = {record["section"] for record in records}
    if planned:
        sections = [stage.section for stage in STAGES.values() if stage.name in planned]
        return [section for section in sections if section and section not in there]
    stages = [stage for stage in STAGES.values() if stage.section]
    models = list(dict.fromkeys(stage.source for stage in stages))  # in their order, first "" for the tokenizer
    newest = max([1, *(models.index(stage.source) for stage in stages if stage.section in there)])  # 1: the base model
    wanted = [s for s in stages if not s.optional and models.index(s.source) <= newest]
    return [stage.section for stage in wanted if stage.section not in there]


def render_report(
    header: Mapping[str, Any], records: Sequence[Mapping[str, Any]], cost: str, planned: Sequence[str] = ()
) -> str:
    """The whole report as markdown; `planned`: the names of the stages that were to run, where that is known."""
    started = datetime.fromisoformat(header["time"])
    finished = max((datetime.fromisoformat(record["time"]) for record in records), default=started)
    missing = missing_sections(records, planned)
    lines = ["# nanochat training report", ""]
    lines += [f"- {key}: {format_value(value)}" for key, value in header.get("environment", {}).items()]
    lines += [
        f"- Started: {started:%Y-%m-%d %H:%M:%S}",
        f"- Total wall clock time: {format_seconds((finished - started).total_seconds())} "
        "(from the start to the last section, pauses included)",
        f"- Cost: {cost}",
    ]
    if missing:
        lines.append(f"- Stages without a section: {', '.join(missing)}")
    lines += ["", "## Summary", "", *render_summary(records), ""]
    return "\n".join([*lines, *(render_section(record) for record in records)]).rstrip() + "\n"


def summary_table(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table of metrics against stages; the first row names the stages. Without a metric it is the only row."""
    cells: dict[tuple[str, str], float] = {}
    rows: list[str] = []
    for record in records:
        column = SECTIONS.get(record["section"])
        for name, value in record.get("metrics", {}).items():
            if column is None or isinstance(value, (bool, str)) or value is None:
                continue  # a number that is not finite was stored as text: it is no score
            cells[name, column] = value
            if name not in rows:
                rows.append(name)
    middle = [row for row in rows if row not in FIRST_ROWS + LAST_ROWS]
    table = [["Metric", *COLUMNS]]
    for row in [r for r in FIRST_ROWS if r in rows] + middle + [r for r in LAST_ROWS if r in rows]:
        table.append([row, *(f"{cells[row, c]:.4f}" if (row, c) in cells else "-" for c in COLUMNS)])
    return table


def render_summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of the table of metrics against stages."""
    table = summary_table(records)
    return to_markdown(table) if len(table) > 1 else ["No stage has logged a metric yet."]
