"""The report of a run: every stage logs a section, `generate` puts them together with a summary table.

    python -m nanochat.report reset          start a new report: forgets the sections, notes machine and time
    python -m nanochat.report generate       write <base dir>/report/report.md and .html, and a copy to ./report.md
    python -m nanochat.report compare A B    two base dirs side by side: tables here, curves in ./compare.html

A section is stored twice in `<base dir>/report/`: `<name>.json` is what `generate` reads, `<name>.md` is for people.
Logging a section again replaces it. Missing stages are named, never an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shutil
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from nanochat.env import cpu_name, get_base_dir, get_dist_info, git_state, print0
from nanochat.files import read_json, write_record, write_text
from nanochat.report.run_data import Run, cost_line, read_run
from nanochat.report.sections import SECTIONS, render_report, render_section
from nanochat.report.text import slugify, to_plain

HEADER = "_header"  # no section is stored under this name: see slugify


class Report:
    """Reads and writes the sections in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, section: str, data: Any, metrics: Mapping[str, float] | None = None) -> Path:
        """Store a section, replacing an older one of that name; ranks other than 0 store nothing.

        Args:
            section: its title, such as "Base model training".
            data: what to say: a mapping (a list of `key: value`), a text (markdown, as it is), a dataclass, or a list
                of these. None is left out.
            metrics: numbers for the summary table by row name, e.g. {"ARC-Easy": 0.41, "ChatCORE": 0.2}.

        Returns:
            The path of the markdown file.
        """
        path = self.folder / f"{slugify(section)}.md"
        if get_dist_info()[1] != 0:
            return path
        record = {
            "section": section,
            "time": _now(),
            "data": to_plain(data if isinstance(data, (list, tuple)) else [data]),
            "metrics": {str(key): to_plain(value) for key, value in (metrics or {}).items()},
        }
        write_record(path.with_suffix(".json"), record)
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
        """Begin without sections and note machine, code and time: the wall clock starts now.

        The report that was there moves to `<folder>.old`, in place of an older one.
        """
        if self.sections():
            old = self.folder.with_name(f"{self.folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.folder, old)
        for path in self.folder.glob("*.*"):  # what is no section: a header, a page
            if path.suffix in (".json", ".md", ".html"):
                path.unlink(missing_ok=True)
        write_record(self.folder / f"{HEADER}.json", {"time": _now(), "environment": environment()})

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
            header["time"] = min((record["time"] for record in records), default=_now())
        return read_run(self.folder.parent, header, records)

    def generate(self, copy_to: Path | None = None, price: float | None = None) -> Path:
        """Write report.md and report.html from what there is, and a copy of the first to `copy_to`.

        Args:
            copy_to: where the copy goes; None: nowhere. One that can't be written is left out with a message.
            price: US dollars an hour of the machine; None: by the price table.

        Returns:
            The path of report.md; report.html is beside it.
        """
        from nanochat.report.html import render_html  # lazy: a stage that logs needs no jinja2

        if not (self.folder / f"{HEADER}.json").is_file():
            write_record(self.folder / f"{HEADER}.json", {**self.run().header, "environment": environment()})
        run = self.run()
        text = render_report(run.header, run.sections, cost_line(run, price), run.planned)
        path = self.folder / "report.md"
        write_text(path, text)
        if copy_to is not None and copy_to.resolve() != path.resolve():
            try:
                write_text(copy_to, text)
            except OSError as error:  # the working folder may be read-only
                print0(f"no copy of the report: {error}")
        write_text(path.with_suffix(".html"), render_html(run, price))
        return path


def get_report() -> Report:
    """The report in the base dir."""
    return Report(get_base_dir() / "report")


def environment() -> dict[str, str]:
    """Code, machine and software, for the top of the report."""
    (gpu, version, dtype), memory = _torch_facts(), psutil.virtual_memory().total / 2**30
    return {
        "Commit": git_state(),
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {memory:.1f} GiB of memory",
        "CPU": cpu_name(),
        "GPU": gpu,
        "Python": platform.python_version(),
        "torch": version,
        "dtype chosen by auto": dtype,
    }


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _torch_facts() -> tuple[str, str, str]:
    """Cards, version of torch, dtype."""
    spec = importlib.util.find_spec("torch")
    build = runpy.run_path(str(Path(str(spec and spec.origin)).with_name("version.py")))
    if sys.platform != "darwin" and not any(build.get(kind) for kind in ("cuda", "hip")):
        # Such a build finds no card. The dtype is what `precision.candidate_dtypes` says of a CPU.
        return "none", f"{build['__version__']}, CPU build", "float32"
    import torch  # lazy: two seconds, which a machine without a card can do without

    from nanochat.common import autodetect_device_type, autodetect_dtype  # lazy: as torch

    kind = autodetect_device_type()
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() if kind == "cuda" else 0)]
    names = [f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {card.major}.{card.minor}" for card in cards]
    return (
        "; ".join(names) if kind == "cuda" else "none" if kind == "cpu" else kind,
        torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", CPU build"),
        str(autodetect_dtype(kind)).removeprefix("torch."),
    )
