"""Read the documents as data: code blocks, generated tables, links, figures and anchors, for tests/test_docs.py.

    python -m dev.docs              regenerate the generated blocks
    python -m dev.docs --anchors    print the current lines of the places that docs/tour.md names
    python -m dev.docs --words      print each document's words and longest sentences

A generated block is everything between `<!-- generated: COMMAND -->` and `<!-- end -->`, and is what COMMAND prints. A
code block that not every machine can run has a comment in the line above it: `<!-- needs a GPU -->`, `<!-- needs
internet -->`, `<!-- needs Docker -->` or `<!-- takes long -->`, with an explanation after a colon if needed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import parse_config, run_script
from nanochat.files import atomic_path

LONG_SENTENCE = 30  # words; README_P100 has no longer one
ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "dev" / "LOG.md"
# report.md is the result of a run.
DOCUMENTS = [p for folder in (ROOT, ROOT / "docs") for p in sorted(folder.glob("*.md")) if p.name != "report.md"]

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
GENERATED = re.compile(r"<!-- generated: (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)
MARK = re.compile(r"<!-- (needs a GPU|needs internet|needs Docker|takes long)\b[^\n]*-->\n *$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A figure of speed, time, memory or ratio. Settings and shapes are in code spans, which are ignored.
FIGURE = re.compile(
    r"\d[\d.,]*[ -]?(?:thousand |million |billion )?"
    r"(?:tok(?:ens)?/s|tokens per second|[TG]FLOP/s|[GM]B/s|[GM]i?B\b|hours?\b|minutes?\b|min\b|ms\b|s\b|%|×|times\b)"
)
# What counts as its source: an entry of the lab book, another page, a data sheet, the arithmetic, or a command.
SOURCE = re.compile(
    r"dev/LOG\.md#|\]\(https?://|data sheet|\d[^|=]*\s=\s[^|=]*\d|`(?:\.venv/bin/)?(?:python|bash|wc) [^`]+`"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of this tool."""

    anchors: bool = False
    """Only print the lines of the places that the tour names."""
    words: bool = False
    """Only print how many words each document has, and its longest sentences."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str
    mark: str | None

    @property
    def name(self) -> str:
        """Its document and line."""
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its shell commands, with continued lines joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        commands = [" ".join(shlex.split(line, comments=True)) and line.strip() for line in lines]
        return [command for command in commands if command]


def name_of(path: Path) -> str:
    """A document's path from the root of the project."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a document."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        mark = MARK.search(before)
        language = match[2] or "text"
        found.append(Block(name_of(path), before.count("\n") + 1, language, match[3], mark[1] if mark else None))
    return found


def generate(command: str) -> str:
    """The output of a generated block's command: a module of this project, run in this process."""
    words = shlex.split(command)
    if words[:2] != ["python", "-m"]:
        raise ValueError(f"`{command}`: the command of a generated block must be `python -m MODULE`")
    module = importlib.import_module(words[2])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        module.main(parse_config(module.Config, words[3:]))
    return said.getvalue().strip() + "\n"


def generated(path: Path) -> list[tuple[str, str]]:
    """Command and text of every generated block of a document."""
    return [(command, text.strip() + "\n") for command, text in GENERATED.findall(path.read_text(encoding="utf-8"))]


def write_generated(path: Path) -> bool:
    """Regenerate the blocks of a document; True if it changed."""
    before = path.read_text(encoding="utf-8")

    def block(match: re.Match[str]) -> str:
        return f"<!-- generated: {match[1]} -->\n\n{generate(match[1])}\n<!-- end -->"

    after = GENERATED.sub(block, before)
    if after != before:
        with atomic_path(path) as tmp:
            tmp.write_text(after, encoding="utf-8")
    return after != before


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        result.add(f"{slug}-{number}" if number else slug)
    return result


def links(path: Path) -> list[str]:
    """The targets of a document's links."""
    return LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8")))


def broken_links(path: Path) -> list[str]:
    """Links to missing files or headings, and external ones that are not https addresses."""
    problems = []
    for link in links(path):
        if re.match(r"[a-z]+:", link):
            if not re.fullmatch(r"https://[\w.-]+(?:/[^\s]*)?", link):
                problems.append(link)
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in slugs(target)):
            problems.append(link)
    return problems


def paragraphs(path: Path) -> list[tuple[int, str]]:
    """Line and text of each paragraph or list item, and of each table row with the paragraph before the table; without
    code blocks, generated blocks and headings.
    """
    text = path.read_text(encoding="utf-8")
    for pattern in (FENCE, GENERATED):
        text = pattern.sub(lambda match: "\n" * match[0].count("\n"), text)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    found: list[tuple[int, str]] = []
    line = 1
    for part in re.split(r"(\n\s*\n|\n(?= *(?:[-*]|\d+\.) ))", text):
        if part.strip():
            if part.lstrip().startswith("|"):
                before = found[-1][1] if found else ""
                rows = part.strip("\n").splitlines()
                found += [
                    (line + i, f"{before}\n{row}" if SOURCE.search(before) else row) for i, row in enumerate(rows)
                ]
            else:
                found.append((line, part))
        line += part.count("\n")
    return found


def sentences(path: Path) -> list[tuple[int, str]]:
    """Line and text of each sentence of a document, links by their text; tables are not sentences."""
    found = []
    for line, text in paragraphs(path):
        if "|" in text.lstrip()[:1] or "\n|" in text:
            continue
        plain = re.sub(r"<!--.*?-->", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text), flags=re.DOTALL)
        # A full stop or colon ends one if white space and a capital, a quote or code follow.
        for sentence in re.split(r"(?<=[.!?:])[*\"]*\s+(?=[A-Z0-9`*\"\[(])|\n\s*\n", " ".join(plain.split())):
            if sentence.strip():
                found.append((line, sentence.strip()))
    return found


def print_words() -> None:
    """Words of each document, and its sentences of more than LONG_SENTENCE words, the longest first."""
    for path in DOCUMENTS:
        words = len(re.findall(r"\S+", GENERATED.sub("", path.read_text(encoding="utf-8"))))
        long = sorted(((len(text.split()), line, text) for line, text in sentences(path)), reverse=True)
        long = [item for item in long if item[0] > LONG_SENTENCE]
        print(f"{name_of(path)}: {words:,} words, {len(long)} sentences of more than {LONG_SENTENCE}")
        for count, line, text in long[:5]:
            print(f"  line {line}, {count} words: {text[:90]} ...")


def unsourced(path: Path) -> list[str]:
    """Paragraphs and rows of tables that have a figure but no source for it."""
    problems = []
    for line, text in paragraphs(path):
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)
        figure = FIGURE.search(prose)
        if figure and not SOURCE.search(text):
            problems.append(f"{name_of(path)}:{line}: {figure[0]}")
    return problems


def sums(path: Path) -> list[tuple[str, float, float]]:
    """The arithmetic in a document: expression, its value, and the number after the equals sign."""
    text = FENCE.sub("", GENERATED.sub("", path.read_text(encoding="utf-8")))
    number = r"\d+(?:\.\d+)?(?:e\d+)?"
    term = rf"(?:{number}|\({number}(?:\s*[×/+]\s*{number})*\))"
    found = re.findall(rf"({term}(?:\s*[×/+]\s*{term})+)\s+=\s+({number})", text)
    return [(left, eval(" ".join(left.replace("×", "*").split()), {}), float(right)) for left, right in found]


def symbol_line(anchor: str) -> int:
    """The line of `path:Name` or `path:Class.method`.

    Raises:
        ValueError: there is no such file or name.
    """
    file, _, dotted = anchor.partition(":")
    path = ROOT / file
    if not path.is_file():
        raise ValueError(f"{anchor}: there is no file {file}")
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for name in dotted.split("."):
        found = [child for child in ast.iter_child_nodes(node) if name in _names(child)]
        if not found:
            raise ValueError(f"{anchor}: there is no {name}")
        node = found[0]
    return node.lineno


def _names(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def anchors(path: Path) -> list[str]:
    """The places in the code that a document names as `path:Name`."""
    return re.findall(r"`([\w./-]+\.py:[A-Za-z_][\w.]*)`", path.read_text(encoding="utf-8"))


def main(cfg: Config) -> None:
    """Regenerate the blocks, or print anchors or words."""
    if cfg.words:
        print_words()
        return
    if cfg.anchors:
        for anchor in dict.fromkeys(anchors(ROOT / "docs" / "tour.md")):
            file, _, name = anchor.partition(":")
            print(f"{file}:{symbol_line(anchor)} {name}")
        return
    for path in DOCUMENTS:
        if write_generated(path):
            print(f"{name_of(path)}: written")


if __name__ == "__main__":
    run_script(main, Config)
