"""Count what a reader has to know: code lines and files of the package, comments in its core.

    python -m dev.house
    python -m dev.house --files      and every file

A code line is one that is not blank, comment or docstring. The rules of the layout are in tests/test_house.py.
"""

from __future__ import annotations

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import run_script

ROOT = Path(__file__).resolve().parent.parent
# The files that explain themselves line by line: at least a tenth of their lines should carry a comment.
CORE = (
    *(f"nanochat/{name}.py" for name in ("gpt", "engine", "dataloader", "tokenizer", "optim", "muon", "precision")),
    *(f"nanochat/{name}.py" for name in ("recipe", "ops/loss", "train/trainer", "generate/scheduler")),
)
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of this tool."""

    files: bool = False
    """Print every file too."""


@dataclass(frozen=True)
class Lines:
    """Line counts of a file, or of several."""

    total: int = 0
    code: int = 0
    docstring: int = 0
    comment: int = 0
    """Lines with a `#` comment that is meant for people."""

    def __add__(self, other: Lines) -> Lines:
        return Lines(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def __str__(self) -> str:
        share = 100 * self.comment / max(1, self.total)
        return f"{self.total:6} lines: {self.code:6} code, {self.docstring:5} docstring, {share:4.1f} % with a comment"


def count(path: Path) -> Lines:
    """The line counts of a Python file."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        # Strings that stand alone are docstrings, those under a field included.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    comments: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if not any(mark in token.string for mark in ("type:", "noqa", "lazy:")):
                comments.add(token.start[0])
        elif token.type not in LAYOUT:
            code.update(range(token.start[0], token.end[0] + 1))
    return Lines(source.count("\n"), len(code - docstrings), len(docstrings), len(comments))


def main(cfg: Config) -> None:
    """Print the counts."""
    found = [f for folder in ("nanochat", "scripts") for f in sorted((ROOT / folder).rglob("*.py"))]
    files = {f.relative_to(ROOT).as_posix(): count(f) for f in found}
    folders: dict[str, list[str]] = {}
    for name in files:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    for folder, names in sorted(folders.items()):
        print(f"{folder + '/':28}{len(names):4} files{sum((files[n] for n in names), Lines())}")
        for name in names if cfg.files else ():
            print(f"  {name:36}{files[name]}")
    print(f"{'all':28}{len(files):4} files{sum(files.values(), Lines())}")
    for name in CORE:
        print(f"{name:36}{files[name]}")
    print(f"{'the core':36}{sum((files[n] for n in CORE), Lines())}")


if __name__ == "__main__":
    run_script(main, Config)
