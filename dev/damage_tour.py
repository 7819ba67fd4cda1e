"""Damage each file of a finished run in turn, and ask the first stage that would use it what it makes of that.

    PROFILE=tiny NANOCHAT_BASE_DIR=/tmp/tiny python -m nanochat.pipeline
    python -m dev.damage_tour --base_dir=/tmp/tiny

Flips random bytes, deletes every file, and swaps each with its nearest neighbour. Three outcomes are right: the stage
refuses in a sentence that says what to do; it warns by name and leaves the damaged record out; or everything that it
reads is what it was. A figure that differs without a word is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.config import run_script
from nanochat.data.corpus import open_corpus
from nanochat.env import error_text
from nanochat.files import SEAL, _tell_damage
from nanochat.interop.foreign import one_line
from nanochat.report import Report
from nanochat.tokenizer import get_token_bytes, get_tokenizer

REMEDIES = ("run ", "delete", "train ", "again", "put ", "take ", "no checkpoint")
FOR_PEOPLE = {".log", ".md", ".html", ".lock", ".png"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the tour."""

    base_dir: Path
    """A finished run; it is copied, nothing in it is changed."""
    flips: int = 200
    """Bytes to change, spread over the files."""
    seed: int = 0
    """Of the changes."""


# --- what reads which file --------------------------------------------------------------------------------------------


def read_corpus(base: Path, path: Path) -> Any:
    """Every text of both splits, as base training and the tokenizer read them."""
    corpus = open_corpus(path.parent)
    return {
        split: hashlib.sha256("\0".join(corpus.documents(split)).encode()).hexdigest() for split in ("train", "val")
    }


def read_tokenizer(base: Path, path: Path) -> Any:
    """The tokenizer and the lengths of its tokens."""
    return get_tokenizer().hash, get_token_bytes().tolist()


def read_checkpoint(base: Path, path: Path) -> Any:
    """Weights and record, as whatever continues or uses the model reads them."""
    checkpoint = load_checkpoint(path.parent.parent)
    return checkpoint.meta, {name: value.double().sum().item() for name, value in checkpoint.model.items()}


def read_report(base: Path, path: Path) -> Any:
    """All that the report knows of the run."""
    return asdict(Report(base / "report").run())


def reader_of(base: Path, path: Path) -> Callable[[Path, Path], Any] | None:
    """The first stage that uses a file; None: what is written for people, and read by nothing."""
    place = path.relative_to(base).parts
    if path.suffix in FOR_PEOPLE or path.name.startswith("."):
        return None
    if place[0] == "base_data":
        return read_corpus
    if place[0] == "tokenizer":
        return read_tokenizer
    if place[0].endswith("_checkpoints") and path.parent.name.startswith("step_"):
        return read_checkpoint
    return read_report


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """All single values in a nested one, by their place."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        yield place, value
    else:
        for key, inner in items:
            yield from leaves(inner, f"{place}/{key}")


# --- the tour ---------------------------------------------------------------------------------------------------------


@dataclass
class Tour:
    """Reads a copy of a run, whole and damaged."""

    base: Path
    whole: dict[str, tuple[Any, set[str]]]

    @classmethod
    def of(cls, base: Path) -> Tour:
        """Read everything while it is whole."""
        tour = cls(base, {})
        for path in tour.files():
            read = reader_of(base, path)
            assert read is not None
            value = read(base, path)
            tour.whole[str(path)] = value, {repr(leaf) for _, leaf in leaves(value)}
        return tour

    def files(self) -> list[Path]:
        """What some stage reads."""
        found = [path for path in sorted(self.base.rglob("*")) if path.is_file()]
        return [path for path in found if reader_of(self.base, path) is not None]

    def outcome(self, path: Path, change: str) -> str:
        """How the first stage that uses `path` ends. Raises AssertionError if it takes the damage for good."""
        read, said = reader_of(self.base, path), io.StringIO()
        assert read is not None
        _tell_damage.cache_clear()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                value = read(self.base, path)
        except (ValueError, RuntimeError, OSError) as error:
            text = error_text(error)
            if "\n" in text or not any(remedy in text for remedy in REMEDIES):
                raise AssertionError(f"no sentence with a remedy: {one_line(error)}") from error
            return "refused"
        whole, known = self.whole[str(path)]
        if value == whole:
            return "nothing changed"
        if path.name in said.getvalue():
            return "left out with a warning"
        if read is not read_report:
            raise AssertionError("taken for good")
        # A seal whose own name was hit is one more entry of the record, and changes none.
        found = [(place, leaf) for place, leaf in leaves(value) if len(place.rpartition("/")[2]) != len(SEAL)]
        new = [f"{place}: {leaf!r}" for place, leaf in found if repr(leaf) not in known]
        if new or change == "swap":
            raise AssertionError(f"taken for good: {'; '.join(new)[:300]}")
        return "left out"  # a report names the stages that it lacks


def neighbour(path: Path, files: list[Path]) -> Path | None:
    """The file to swap with: of the same kind, in this folder or another stage's, whose content differs."""
    data = path.read_bytes()
    like = [other for other in files if other != path and other.suffix == path.suffix and other.read_bytes() != data]
    same_name = [other for other in like if other.name == path.name]
    same_folder = [other for other in like if other.parent == path.parent]
    return next(iter([*same_name, *same_folder]), None)


@contextlib.contextmanager
def kept(*paths: Path) -> Iterator[None]:
    """Put files back afterwards."""
    data = {path: path.read_bytes() for path in paths}
    try:
        yield
    finally:
        for path, content in data.items():
            path.write_bytes(content)


def damage(base: Path, flips: int, seed: int) -> tuple[Counter[str], list[str]]:
    """(how often it ended how, what was taken for good) of all changes of a run, which is changed and put back."""
    rng, counts, missed = random.Random(seed), Counter[str](), []
    tour = Tour.of(base)
    files = tour.files()

    def look(path: Path, change: str) -> None:
        try:
            counts[f"{change}: {tour.outcome(path, change)}"] += 1
        except Exception as error:
            missed.append(f"{change} {path.relative_to(base)}: {one_line(error)}")

    for number in range(flips):
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        if data:
            with kept(path):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                path.write_bytes(data)
                look(path, "flip")
    for path in files:
        with kept(path):
            path.unlink()
            look(path, "delete")
        other = neighbour(path, files)
        if other is not None:
            with kept(path, other):
                mine, others = path.read_bytes(), other.read_bytes()
                path.write_bytes(others)
                other.write_bytes(mine)
                look(path, "swap")
    return counts, missed


def main(cfg: Config) -> None:
    """Copy, damage, tell."""
    with tempfile.TemporaryDirectory() as tmp:
        base = Path(tmp) / "base"
        shutil.copytree(cfg.base_dir, base)
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
        counts, missed = damage(base, cfg.flips, cfg.seed)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    print(f"taken for good: {len(missed)}")
    print("".join(f"    {line}\n" for line in missed), end="")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Config)
