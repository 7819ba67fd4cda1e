"""The text that a browser would show of an HTML page, and its declared encoding."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

HIDDEN = frozenset({"script", "style", "template", "noscript", "head", "title"})
# Around the text of a page; a header within an article is its title.
AROUND_TEXT = frozenset({"nav", "header", "footer", "aside", "dialog"})
TEXT_PARTS = frozenset({"main", "article"})
KEEPS_LINES = frozenset({"pre", "textarea", "listing", "xmp"})
BLOCKS = re.compile(
    r"address|article|aside|blockquote|br|d[dlt]|div|fig(caption|ure)|footer|form|h[1-6r]|header|li|main|nav|ol|p|pre|"
    r"section|table|t[dhr]|ul"
)
PARAGRAPHS = re.compile(r"article|div|h[1-6]|p|section")
DECLARED = re.compile(rb"""(?:charset\s*=|<\?xml[^>]*encoding\s*=)\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.IGNORECASE)


def declared_charset(head: bytes) -> str | None:
    """The encoding that a page says it has, by its first bytes."""
    found = DECLARED.search(head[:4096])
    return found[1].decode("ascii") if found else None


def visible_text(html: str) -> str:
    """The text of a page: paragraphs apart, lines of <pre> as they are, no scripts, styles and heads."""
    return _read_page(html, HIDDEN).text()


def page_text(html: str) -> tuple[str, int]:
    """(the text of a page, how many characters of menus, headers, footers and asides were left out of it).

    A page that has nothing else is taken as it is.
    """
    page = _read_page(html, HIDDEN | AROUND_TEXT)
    text = page.text()
    return (text, page.left_out) if text or not page.left_out else (visible_text(html), 0)


def _read_page(html: str, hidden: frozenset[str]) -> _Page:
    page = _Page(hidden)
    page.feed(_without_open_ends(html))
    page.close()
    return page


def _without_open_ends(html: str) -> str:
    """`html` without the tags of scripts and styles that are never closed: a parser takes all that follows for code."""
    lower = html.lower()
    for tag in ("script", "style"):
        end = lower.rfind(f"</{tag}") + 1
        if lower.find(f"<{tag}", end) >= 0:
            html = html[:end] + re.sub(rf"<{tag}\b[^>]*>[^<]*", "", html[end:], flags=re.IGNORECASE)
            lower = html.lower()
    return html


class _Page(HTMLParser):
    """Collects what a browser would show."""

    def __init__(self, hidden: frozenset[str]) -> None:
        super().__init__(convert_charrefs=True)
        self.hidden, self.left_out = hidden, 0
        self._inside = 0  # open parts of the page that hold its text
        self.parts: list[tuple[bool, str]] = []  # (whether its lines are kept, text)
        # (tag, where its text begins). Its text is dropped when it ends; of a tag that never ends, it is shown.
        self._hidden: list[tuple[str, int]] = []
        self._kept = 0  # open tags that keep their lines

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in self._hidden]
        if tag == "body" or (BLOCKS.fullmatch(tag) and names == ["head"]):
            self._drop(0)  # a head that was never closed: HTML allows to omit its end, and body
        elif tag in names:
            self._hidden = self._hidden[: names.index(tag)]  # none stands in itself: the one before was never closed
        self._inside += tag in TEXT_PARTS
        if tag in self.hidden and not (tag == "header" and self._inside):
            self._hidden.append((tag, len(self.parts)))
        self._kept += tag in KEEPS_LINES
        if BLOCKS.fullmatch(tag):
            self._add("\n\n" if PARAGRAPHS.fullmatch(tag) and not self._kept else "\n")

    def handle_endtag(self, tag: str) -> None:
        names = [name for name, _ in self._hidden]
        if tag in names:
            self._drop(names.index(tag))
        self._kept = max(0, self._kept - (tag in KEEPS_LINES))
        self._inside = max(0, self._inside - (tag in TEXT_PARTS))
        if BLOCKS.fullmatch(tag):
            self._add("\n")

    def handle_data(self, data: str) -> None:
        self._add(data if self._kept else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        self.parts.append((self._kept > 0, text))

    def _drop(self, first: int) -> None:
        if first < len(self._hidden):
            if self._hidden[first][0] in AROUND_TEXT:
                dropped = "".join(text for _, text in self.parts[self._hidden[first][1] :])
                self.left_out += len("".join(dropped.split()))
            del self.parts[self._hidden[first][1] :]
            del self._hidden[first:]

    def text(self) -> str:
        """All that was collected, with at most one blank line between paragraphs."""
        blocks = []
        for kept, parts in itertools.groupby(self.parts, key=lambda part: part[0]):
            text = "".join(part for _, part in parts)
            if kept:
                blocks.append(text.strip("\n").rstrip())
            else:
                blocks.append(re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\n[ \t]*", "\n", text)).strip())
        return "\n\n".join(block for block in blocks if block)
