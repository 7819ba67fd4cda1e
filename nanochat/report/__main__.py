"""The command line of the report; see nanochat/report/__init__.py."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from nanochat.config import run_script
from nanochat.env import get_base_dir
from nanochat.files import write_text
from nanochat.report import HEADER, Report
from nanochat.report.run_comparison import difference_table, render_comparison, score_table
from nanochat.report.run_data import Run
from nanochat.report.sections import render_summary
from nanochat.report.text import to_markdown


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
    a, b = (open_run(folder) for folder in folders)
    lines = [f"A: {folders[0]}", f"B: {folders[1]}", "", *to_markdown(score_table(a, b))]
    lines += ["", *to_markdown(difference_table(a, b)), ""]
    sys.stdout.write("\n".join(lines))
    write_text(output, render_comparison(a, b, [str(folder) for folder in folders]))
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
    copied = [copy] if copy.is_file() and copy.read_bytes() == path.read_bytes() else []
    print("wrote " + ", ".join(map(str, [path, path.with_suffix(".html"), *copied])))


if __name__ == "__main__":
    run_script(main, Config)
