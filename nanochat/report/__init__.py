"""The report of a run: every stage logs a section, `generate` puts them together with a summary table.

    python -m nanochat.report reset          start a new report: forgets the sections, notes machine and time
    python -m nanochat.report generate       write <base dir>/report/report.md and .html, and a copy to ./report.md
    python -m nanochat.report compare A B    two base dirs side by side: tables here, curves in ./compare.html

A section is stored twice in `<base dir>/report/`: `<name>.json` is what `generate` reads, `<name>.md` is for people.
Logging a section again replaces it. Missing stages are named, never an error.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import tyro

from nanochat.common import autodetect_device_type, autodetect_dtype
from nanochat.config import run_script
from nanochat.env import get_base_dir, get_dist_info, git_state
from nanochat.files import write_json, write_text
from nanochat.hardware import cpu_name
from nanochat.progress import format_seconds
from nanochat.report.run_data import Run, cost_line, read_json, read_run

# The pipeline in order: section, and the column of the summary table that its metrics belong to.
SECTIONS: dict[str, str | None] = {
    "Tokenizer training": None,
    "Tokenizer evaluation": None,
    "Base model training": "BASE",
    "Base model loss": "BASE",
    "Base model evaluation": "BASE",
    "Midtraining": "MID",
    "Chat evaluation mid": "MID",
    "SFT": "SFT",
    "Chat evaluation sft": "SFT",
    "RL": "RL",
    "Chat evaluation rl": "RL",
}
COLUMNS = ("BASE", "MID", "SFT", "RL")
# Rows of the summary table that come first and last; the chat tasks stand between in the order they were logged.
FIRST_ROWS = ("train bpb", "val bpb", "val loss", "CORE", "CORE (partial)")
LAST_ROWS = ("ChatCORE", "ChatCORE (partial)")
HEADER = "_header"  # no section is stored under this name: see slugify
MAX_TEXT_CHARACTERS = 20_000


class Logger(Protocol):
    """What a script needs of a report."""

    def log(self, section: str, data: Any, metrics: Mapping[str, float] | None = None) -> Path | None:
        """Store a section; see Report.log."""

    def section_for(self, section: str, part: str, metrics: Iterable[str]) -> str:
        """Where a part of an evaluation belongs; see Report.section_for."""


class Report:
    """Reads and writes the sections in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, section: str, data: Any, metrics: Mapping[str, float] | None = None) -> Path:
        """Store a section, replacing an older one of that name.

        Args:
            section: its title, such as "Base model training".
            data: what to say: a mapping (a list of `key: value`), a text (markdown, as it is), a dataclass, or a list
                of these. None is left out.
            metrics: numbers for the summary table by row name, e.g. {"ARC-Easy": 0.41, "ChatCORE": 0.2}.

        Returns:
            The path of the markdown file.
        """
        record = {
            "section": section,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "data": to_plain(data if isinstance(data, (list, tuple)) else [data]),
            "metrics": {str(key): to_plain(value) for key, value in (metrics or {}).items()},
        }
        path = self.folder / f"{slugify(section)}.md"
        write_json(path.with_suffix(".json"), record)
        write_text(path, render_section(record))
        return path

    def section_for(self, section: str, part: str, metrics: Iterable[str]) -> str:
        """The title under which a part of an evaluation loses nothing: `section`, or one of its own beside it.

        Args:
            section: the title of the whole evaluation.
            part: which part it is.
            metrics: the names that it gives values to; the stored section may have others.
        """
        stored = read_json(self.folder / f"{slugify(section)}.json").get("metrics", {})
        return f"{section}: {part}" if set(stored) - set(metrics) else section

    def reset(self) -> None:
        """Forget every section and note machine, code and time: the wall clock starts now."""
        for kind in ("json", "md", "html"):
            for path in self.folder.glob(f"*.{kind}"):
                path.unlink(missing_ok=True)
        header = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), "environment": environment()}
        write_json(self.folder / f"{HEADER}.json", header)

    def sections(self) -> list[dict[str, Any]]:
        """The stored sections: those of the pipeline in its order, then any others by time."""
        records = [read_json(path) for path in self.folder.glob("*.json") if path.stem != HEADER]
        names = list(SECTIONS)

        def rank(record: dict[str, Any]) -> tuple[int, str]:
            known = record["section"] in SECTIONS
            return (names.index(record["section"]) if known else len(names), record["time"])

        return sorted((r for r in records if r.get("section") and r.get("time")), key=rank)

    def run(self) -> Run:
        """All that is known of the run: the sections, and what else the base dir holds."""
        header = read_json(self.folder / f"{HEADER}.json")
        records = self.sections()
        if "time" not in header:  # never reset: the start is the first section's
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            header["time"] = min((record["time"] for record in records), default=now)
        return read_run(self.folder.parent, header, records)

    def generate(self, copy_to: Path | None = None, price: float | None = None) -> Path:
        """Write report.md and report.html from what there is, and a copy of the first to `copy_to`.

        Args:
            copy_to: where the copy goes; None: nowhere.
            price: US dollars an hour of the machine; None: by the price table.

        Returns:
            The path of report.md; report.html is beside it.
        """
        from nanochat.report.html import render_html

        if not (self.folder / f"{HEADER}.json").is_file():
            write_json(self.folder / f"{HEADER}.json", {**self.run().header, "environment": environment()})
        run = self.run()
        text = render_report(run.header, run.sections, cost_line(run, price))
        path = self.folder / "report.md"
        write_text(path, text)
        if copy_to is not None and copy_to.resolve() != path.resolve():
            write_text(copy_to, text)
        page = render_html(run, summary_table(run.sections), missing_sections(run.sections), price)
        write_text(path.with_suffix(".html"), page)
        return path


class SilentReport:
    """The report of every rank but the first: says nothing."""

    def log(self, section: str, data: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Ignore the section."""

    def section_for(self, section: str, part: str, metrics: Iterable[str]) -> str:
        """It will be ignored anyway."""
        return section


def get_report() -> Logger:
    """The report in the base dir; on ranks other than 0 one that ignores what it is told."""
    return Report(get_base_dir() / "report") if get_dist_info()[1] == 0 else SilentReport()


def slugify(text: str) -> str:
    """A file name: "Chat evaluation sft" -> "chat-evaluation-sft"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


# --- values ----------------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays of one number become the number, dataclasses dicts, anything else text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if callable(getattr(value, "item", None)):  # torch and numpy scalars
        try:
            return to_plain(value.item())
        except (ValueError, RuntimeError, TypeError):
            pass
    return str(value)


def format_value(value: Any) -> str:
    """One line for a value: 1234567 -> 1,234,567; 0.123456 -> 0.1235; text without line breaks."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, (list, dict)):
        items = [f"{k}: {format_value(v)}" for k, v in value.items()] if isinstance(value, dict) else value
        return ", ".join(format_value(item) for item in items)
    return " ".join(str(value).split())


# --- markdown --------------------------------------------------------------------------------------------------------


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


def missing_sections(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sections of the pipeline that are not there."""
    there = {record["section"] for record in records}
    return [name for name in SECTIONS if name not in there]


def render_report(header: Mapping[str, Any], records: Sequence[Mapping[str, Any]], cost: str) -> str:
    """The whole report as markdown."""
    started = datetime.fromisoformat(header["time"])
    finished = max((datetime.fromisoformat(record["time"]) for record in records), default=started)
    missing = missing_sections(records)
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
    if len(table) == 1:
        return ["No stage has logged a metric yet."]
    rows = [[row[0].replace("|", "/"), *row[1:]] for row in table]
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|---|" + "---:|" * len(COLUMNS), *rest]


# --- where it ran ----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Code, machine and software, for the top of the report."""
    import torch

    device_type = autodetect_device_type()
    return {
        "Commit": git_state(),
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {_memory()}",
        "CPU": cpu_name(),
        "GPU": _gpu_names() if device_type == "cuda" else "none" if device_type == "cpu" else device_type,
        "Python": platform.python_version(),
        "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"),
        "dtype chosen by auto": str(autodetect_dtype(device_type)).removeprefix("torch."),
    }


def _memory() -> str:
    import psutil

    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB of memory"


def _gpu_names() -> str:
    import torch

    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.major}.{card.minor}" for card in cards)


# --- command line ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Start a new report, write the one of the stages that have run, or compare two runs."""

    command: tyro.conf.Positional[Literal["reset", "generate", "compare"]] = "generate"
    """reset: forget all sections, start the clock. generate: write report.md and report.html. compare: two runs."""
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """For compare: two base dirs, or the folders of their reports."""
    price: float | None = None
    """What an hour of the machine costs in US dollars; default: by the price table (nanochat/report/prices.json)."""
    output: Path = Path("compare.html")
    """Where compare writes its page."""

    def __post_init__(self) -> None:
        if (self.command == "compare") != (len(self.runs) == 2) or (self.command != "compare" and self.runs):
            raise ValueError(
                f"{self.command} takes {'two runs' if self.command == 'compare' else 'no runs'}, got {len(self.runs)}: "
                "python -m nanochat.report compare A B"
            )
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ValueError(f"--price must be dollars an hour, 0 or more, got {self.price}")


def open_run(folder: Path) -> Run:
    """The run in a base dir, or in the report folder of one.

    Raises:
        FileNotFoundError: there is no report.
    """
    for candidate in (folder / "report", folder):
        report = Report(candidate)
        if report.sections() or (candidate / f"{HEADER}.json").is_file():
            return report.run()
    raise FileNotFoundError(f"no report in {folder}: name the base dir of a run (its stages write <base dir>/report)")


def compare_runs(folders: Sequence[Path], output: Path) -> None:
    """Print the scores and settings of two runs that differ, and write a page with their curves."""
    from nanochat.report.compare import difference_table, render_comparison, score_table, to_markdown

    runs = [open_run(folder) for folder in folders]
    summaries = [summary_table(run.sections) for run in runs]
    names = [str(folder) for folder in folders]
    missing = {name: missing_sections(run.sections) for name, run in zip(names, runs, strict=True)}
    lines = [f"A: {names[0]}", f"B: {names[1]}", "", *to_markdown(score_table(summaries[0], summaries[1]))]
    lines += ["", *to_markdown(difference_table(runs[0], runs[1])), ""]
    sys.stdout.write("\n".join(lines))
    write_text(output, render_comparison(names, runs, summaries, missing))
    print(f"wrote {output}")


def main(cfg: Config) -> None:
    """Run the command on the report in the base dir."""
    if cfg.command == "compare":
        compare_runs(cfg.runs, cfg.output)
        return
    report = Report(get_base_dir() / "report")
    if cfg.command == "reset":
        report.reset()
        print(f"new report in {report.folder}")
        return
    copy = Path.cwd() / "report.md"
    path = report.generate(copy, cfg.price)
    sys.stdout.write("\n".join(render_summary(report.sections())) + "\n")
    print(f"wrote {path}, {path.with_suffix('.html')} and {copy}")


if __name__ == "__main__":
    run_script(main, Config)
