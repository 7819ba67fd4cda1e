"""Long texts into documents, cut at headings, blank lines, days of a chat, ends of lines or of sentences."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

DOCUMENT_CHARS = 8_000  # a document of a long text, about
LIMIT_CHARS = 10_000  # where no blank line comes, it is cut before here: a tokenizer reads that much of a document
SECTION_CHARS = 2_000  # of Markdown before a heading may begin a new document; of a chat before a new day may
LONGEST_CHARS = 64_000  # code blocks, and rows of tables, are left whole up to here
MIN_SPLIT_CHARS = 100  # of a single document, so that a part of it can validate
END_OF_TEXT = "<|endoftext|>"
_HEADING = re.compile(r"#{1,2} \S")
# How a line of an exported chat begins: "05/03/2025, 10:48 - ", "[5.3.25, 10:48:01] ", "2025-03-05 10:48 ".
_DAY = re.compile(r"\u200e?\[?(\d{1,4}[./-]\d{1,2}[./-]\d{2,4}),? \d{1,2}[:.]\d{2}")
# A line of the settings before a text in Markdown, as those for Jekyll, Hugo and Obsidian have.
_SETTING = re.compile(r"[\w -]{1,40}:(\s.*)?$|[ \t]+\S.*$|- \S.*$|#.*$|\s*$")
MOST_SETTINGS = 200  # lines
_SENTENCE = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+|[。！？｡]+[」』”’）]*\s*|[।؟۔]\s*")


def split_text(lines: io.TextIOBase, markdown: bool = False) -> Iterator[str]:
    """Documents of a text; together they are the text, but for the lines that only separate documents."""
    document, in_code, day = "", False, ""
    pending: list[str] = []  # lines of the document that are not in the string yet: adding each would copy it again
    num_chars = num_documents = 0
    while line := lines.readline(LIMIT_CHARS):  # a "line" may be gigabytes: the limit bounds memory
        starts_new = False
        if markdown:
            if line.lstrip().startswith(("```", "~~~")):
                in_code = not in_code
            starts_new = not in_code and bool(_HEADING.match(line))
        elif line[:1].isdigit() or line[:1] in "[\u200e":
            found = _DAY.match(line)
            starts_new = found is not None and bool(day) and found[1] != day
            day = found[1] if found else day
        separator = line.strip() == END_OF_TEXT
        if separator or (starts_new and num_chars >= SECTION_CHARS):
            yield document + "".join(pending)
            document, pending, num_chars, num_documents = "", [], 0, num_documents + 1
        if separator:
            continue
        pending.append(line)
        num_chars += len(line)
        if num_chars >= DOCUMENT_CHARS and not in_code and not line.strip():
            yield document + "".join(pending)
            document, pending, num_chars, num_documents = "", [], 0, num_documents + 1
        while num_chars >= (LONGEST_CHARS if in_code else LIMIT_CHARS):
            document += "".join(pending)
            cut = best_cut(document, DOCUMENT_CHARS, LIMIT_CHARS)
            yield document[:cut]
            document, pending, num_chars, num_documents = document[cut:], [], num_chars - cut, num_documents + 1
    if num_chars or not num_documents:  # nothing behind the last cut is no blank document
        yield document + "".join(pending)


class AfterSettings(io.TextIOBase):
    """A text in Markdown without the settings ("title: ...") between "---" before it, if it has any (`found`)."""

    def __init__(self, lines: io.TextIOBase) -> None:
        self._lines, self._head, self.found = lines, [lines.readline(LIMIT_CHARS)], False
        while self._head[0].strip() == "---" and len(self._head) < MOST_SETTINGS:
            self._head.append(lines.readline(LIMIT_CHARS))
            if len(self._head) > 2 and self._head[-1].strip() in ("---", "..."):
                self._head, self.found = [], True
                break
            if not self._head[-1] or not _SETTING.match(self._head[-1]):
                break

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        """The next line."""
        return self._head.pop(0) if self._head else self._lines.readline(-1 if size is None else size)


def split_long(text: str) -> Iterator[str]:
    """A document as it is; one longer than LONGEST_CHARS (a book in a row of a table) as the documents it makes."""
    if len(text) <= LONGEST_CHARS:
        yield text
    else:
        yield from split_text(io.StringIO(text))


def best_cut(text: str, wanted: int, limit: int) -> int:
    """Where to cut `text` before `limit`: at the last blank line, end of a line, end of a sentence, or space before it.

    None of these is taken before the middle of what is wanted. A text without any is cut at `wanted`.
    """
    first, part = wanted // 2, text[:limit]
    for border in ("\n\n", "\n"):
        at = part.rfind(border, first)
        if at >= 0:
            return at + len(border)
    ends = [found.end() for found in _SENTENCE.finditer(part, first)]
    if ends:
        return ends[-1]
    at = part.rfind(" ", first)
    return at + 1 if at >= 0 else min(wanted, len(text))
