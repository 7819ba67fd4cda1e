"""The text that a browser would show of an HTML page, and its declared encoding."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser

HIDDEN = frozenset(
    {
        "script",
        "style",
        "template",
        "noscript",
        "head",
        "title",
        "select",
        "datalist",
        "button",
        "svg",
        "iframe",
        "canvas",
    }
)
# Around the text of a page; a header within an article is its title.
AROUND_TEXT = frozenset({"nav", "header", "footer", "aside", "dialog"})
TEXT_PARTS = frozenset({"main", "article"})
KEEPS_LINES = frozenset({"pre", "textarea", "listing", "xmp"})
BLOCKS = re.compile(
    r"address|article|aside|blockquote|d[dlt]|div|fig(caption|ure)|footer|form|h[1-6r]|header|li|main|nav|ol|p|pre|"
    r"section|table|tr|ul"
)
# Containers that say by an attribute that they are around the text, as most pages do that have no nav or aside.
CONTAINERS = frozenset({"div", "ul", "ol", "section", "table", "form", "span", "dl", "sup"})
AROUND_ROLES = frozenset(
    {"navigation", "banner", "contentinfo", "dialog", "alertdialog", "complementary", "search", "menu", "menubar"}
)
_AROUND_NAME = re.compile(
    r"(?:(?:site|main|top|page|global|primary|secondary|left|right|bottom|mobile|wp)[-_]?)*"
    r"(?:nav|navbar|navigation|menu|menubar|sidebar|breadcrumbs?|footer|masthead|topbar|toolbar|share|sharing|social|"
    r"newsletter|advert|advertisement|ads|popup|modal|skip-?link|related-?posts|toc(?!.*\d))"  # toc1 is a chapter
    r"(?:[-_]?(?:bar|menu|container|wrapper|wrap|inner|list|box|area|links|left|right|main|top|bottom|\d))*"
    r"|(?:.*[-_])?cookies?(?:[-_]?(?:banner|bar|consent|notice|popup|overlay|law|info|message|dialog|policy))+.*"
    r"|(?:onetrust|didomi|usercentrics|qc-cmp|cky|cmplz|gdpr|consent)(?:[-_].*)?",
    re.IGNORECASE,
)
# What a wiki's page is not printed with; the licence and the page numbers of Project Gutenberg: within the text too.
_UNPRINTED_NAME = re.compile(
    r"noprint|printfooter|catlinks|sitenotice|mw-(?:editsection|navigation|jump-link)|pg-boilerplate|pagenum",
    re.IGNORECASE,
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
    """(the text of a page, how many characters of menus, headers, footers, banners and asides were left out of it).

    What only its class or name calls a menu stays where that would be most of the page; a page that has nothing else is
    taken as it is.
    """
    page = _read_page(html, HIDDEN | AROUND_TEXT, by_name=True)
    if page.left_out > len(page.text()):
        page = _read_page(html, HIDDEN | AROUND_TEXT)
    text = page.text()
    return (text, page.left_out) if text or not page.left_out else (visible_text(html), 0)


def _read_page(html: str, hidden: frozenset[str], by_name: bool = False) -> _Page:
    page = _Page(hidden, by_name)
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

    def __init__(self, hidden: frozenset[str], by_name: bool) -> None:
        super().__init__(convert_charrefs=True)
        self.hidden, self.by_name, self.left_out = hidden, by_name, 0
        self._inside = 0  # open parts of the page that hold its text
        self.parts: list[tuple[bool, str]] = []  # (whether its lines are kept, text)
        # (tag, where its text begins, line ends due then). Its text is dropped where it ends, else shown.
        self._hidden: list[tuple[str, int, int]] = []
        self._same = 0  # open tags like the container that is hidden by its attributes, in it
        self._kept = 0  # open tags that keep their lines
        self._break = 0  # line ends that are due before the next text
        self._in_row = False  # a cell of this row has begun

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, *_ in self._hidden]
        if tag == "body" or (BLOCKS.fullmatch(tag) and names == ["head"]):
            self._drop(0)  # a head that was never closed: HTML allows to omit its end, and body
        elif tag in names:
            if tag in CONTAINERS:
                self._same += 1
            else:
                self._hidden = self._hidden[: names.index(tag)]  # none stands in itself: the one before was left open
        self._inside += tag in TEXT_PARTS
        if tag in self.hidden and not (tag == "header" and self._inside):
            self._hidden.append((tag, len(self.parts), self._break))
        elif tag in CONTAINERS and not CONTAINERS.intersection(names) and self._is_around(tag, dict(attrs)):
            self._hidden.append((tag, len(self.parts), self._break))
            self._same = 0
        self._kept += tag in KEEPS_LINES
        self._ends_line(tag)
        if tag == "tr":
            self._in_row = False
        elif tag in ("td", "th"):
            if self._in_row and not self._break:
                self._add("\t")
            self._in_row = True

    def handle_endtag(self, tag: str) -> None:
        names = [name for name, *_ in self._hidden]
        if tag in names:
            if tag in CONTAINERS and self._same:
                self._same -= 1
            else:
                self._drop(names.index(tag))
        self._kept = max(0, self._kept - (tag in KEEPS_LINES))
        self._inside = max(0, self._inside - (tag in TEXT_PARTS))
        if tag != "br":
            self._ends_line(tag)

    def _is_around(self, tag: str, attrs: dict[str, str | None]) -> bool:
        """True of the attributes of a container that is not shown, or is around the text."""
        if "hidden" in attrs or re.search(r"display\s*:\s*none", attrs.get("style") or "", re.IGNORECASE):
            return True
        if AROUND_TEXT.isdisjoint(self.hidden):
            return False
        words = f"{attrs.get('class') or ''} {attrs.get('id') or ''}".split()
        if tag == "sup":
            return "reference" in words  # [1] of a wiki, whose footnotes are a list at the end
        if self.by_name and any(map(_UNPRINTED_NAME.fullmatch, words)):
            return True
        if self._inside:
            return False
        return attrs.get("role") in AROUND_ROLES or (self.by_name and any(map(_AROUND_NAME.fullmatch, words)))

    def _ends_line(self, tag: str) -> None:
        if tag == "br":
            if self._kept:
                self._add("\n")
            else:
                self._break = min(2, self._break + 1)
        elif BLOCKS.fullmatch(tag):
            if not self._kept:
                self._break = max(self._break, 2 if PARAGRAPHS.fullmatch(tag) else 1)
            elif self.parts and self.parts[-1][0] and not self.parts[-1][1].endswith("\n"):
                self._add("\n")

    def handle_data(self, data: str) -> None:
        if self._kept:
            self._add(data)
            return
        data = re.sub(r"\s+", " ", data)
        if self._break and not data.strip():
            return
        self._add("\n" * self._break + data)
        self._break = 0

    def _add(self, text: str) -> None:
        self.parts.append((self._kept > 0, text))

    def _drop(self, first: int) -> None:
        if first < len(self._hidden):
            if self._hidden[first][0] in AROUND_TEXT | CONTAINERS:
                dropped = "".join(text for _, text in self.parts[self._hidden[first][1] :])
                self.left_out += len("".join(dropped.split()))
            tag, begin, due = self._hidden[first]
            del self.parts[begin:]
            del self._hidden[first:]
            self._break, self._same = due if tag in ("sup", "span") else max(self._break, 1), 0

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
