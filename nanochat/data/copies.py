"""Where a user's texts and chats were copied to, so that they can be looked at and deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.data.inventory import format_bytes, plural
from nanochat.data.shards import load_manifest

REPORT_TITLE = "# nanochat training report"


@dataclass(frozen=True)
class Copy:
    """One place."""

    path: Path
    what: str
    """What of the texts is there, for people."""
    is_model: bool = False
    """Part of a model: `forget` leaves it."""

    @property
    def num_bytes(self) -> int:
        """Size of all its files."""
        files = [self.path] if self.path.is_file() else self.path.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())


def find_copies(base: Path, work_folder: Path) -> list[Copy]:
    """All places below the base folder, and the report's copy in `work_folder`, that hold some of a user's data."""
    return [copy for copy in _places(base, work_folder) if copy.path.exists()]


def _places(base: Path, work_folder: Path) -> Iterator[Copy]:
    for folder in sorted((base / "base_data").glob("*")):
        if folder.name.startswith("import-") and folder.is_dir():
            yield Copy(folder, f"all texts of {_source(folder)}, imported")
        elif folder.name.startswith(".import-"):
            yield Copy(folder, "texts of an import that was broken off")
    for name, what in (("token_cache", "texts as tokens"), ("chat_eval", "questions and answers of evaluations")):
        yield Copy(base / name, what)
    for log in sorted((base / "pipeline").glob("*.log")):
        yield Copy(log, "what a stage printed: samples of texts, and the model's continuations")
    for file in sorted((base / "report").glob("*")):
        if file.name != "_header.json":  # the folder and its header stay: without them all stages would run again
            yield Copy(file, "a report: the inventory, and samples")
    yield Copy(base / "chat_history", "what was typed into the terminal chat")
    if _is_report(work_folder / "report.md"):
        yield Copy(work_folder / "report.md", "a copy of the report")
    yield Copy(base / "tokenizer", "a tokenizer: the frequent words of the texts", is_model=True)
    for folder in sorted(base.glob("*_checkpoints")):
        yield Copy(folder, "models, with the paths of the data in their meta.json", is_model=True)


def _source(folder: Path) -> str:
    try:
        manifest = load_manifest(folder)
    except ValueError:
        manifest = None
    return str((manifest.facts.get("source") if manifest else "") or "a file or folder")


def _is_report(file: Path) -> bool:
    if not file.is_file():
        return False
    with open(file, encoding="utf-8", errors="replace") as lines:
        return lines.readline().strip() == REPORT_TITLE


def copies_lines(copies: list[Copy]) -> list[str]:
    """The list for people."""
    lines = [f"{copy.path} ({format_bytes(copy.num_bytes)}): {copy.what}" for copy in copies]
    return lines or ["no copies of your data were found"]


def forget(copies: list[Copy]) -> list[str]:
    """Delete every copy that is not part of a model; returns what was done, for people."""
    gone = [copy for copy in copies if not copy.is_model]
    size = sum(copy.num_bytes for copy in gone)
    for copy in gone:
        if copy.path.is_dir() and not copy.path.is_symlink():
            shutil.rmtree(copy.path)
        else:
            copy.path.unlink()
        Path(f"{copy.path}.lock").unlink(missing_ok=True)
    lines = [f"deleted {copy.path}" for copy in gone]
    lines.append(f"deleted {plural(len(gone), 'place')}, {format_bytes(size)}; your own files are untouched")
    kept = [str(copy.path) for copy in copies if copy.is_model]
    if kept:
        lines.append(f"kept, because they are models: {', '.join(kept)} (what a model has learned can't be taken out)")
    return lines
