"""The text of documents that are no plain text: books, office files, PDF, RTF, notebooks, subtitles, mails."""

from __future__ import annotations

import email
import email.policy
import functools
import html
import importlib.util
import json
import logging
import posixpath
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from email.message import EmailMessage
from typing import IO, TextIO
from urllib.parse import unquote
from xml.etree import ElementTree

from nanochat.data.inventory import NotReadError, format_bytes
from nanochat.data.markup import visible_text

try:
    from striprtf import striprtf
except ImportError:
    striprtf = None  # type: ignore[assignment]

DOCUMENTS_EXTRA = "pip install 'nanochat-p100[documents]'"
MAX_PART_BYTES = 256_000_000  # of one part of a book, unpacked
_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
# Text boxes, which are read apart, settings, and what a tracked change has removed.
_GONE = ("txbxContent", "Fallback", "pPr", "del", "moveFrom")
_AROUND = ("sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag")  # what rows and cells may stand in
DELETED = "tracked deletions left out"
JOINED = "words hyphenated at a line's end, joined"
_OPEN = "{urn:oasis:names:tc:opendocument:xmlns:text:1.0}"


# --- books and office files: zipped XML -------------------------------------------------------------------------------


def read_epub(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """The chapters of a book in reading order.

    Raises:
        NotReadError: it is protected, or no book.
    """
    with _zipped(data) as book:
        names = set(book.namelist())
        if "META-INF/encryption.xml" in names and _protects_text(_part(book, "META-INF/encryption.xml")):
            raise NotReadError("protected by DRM")
        if not names.isdisjoint(("META-INF/rights.xml", "META-INF/license.lcpl", "META-INF/sinf.xml")):
            raise NotReadError("protected by DRM")
        container = _xml(book, "META-INF/container.xml")
        package = next((e.get("full-path") for e in container.iter() if e.tag.endswith("}rootfile")), None)
        if package is None or package not in names:
            raise NotReadError("damaged (it names no contents)")
        root, folder = _xml(book, package), posixpath.dirname(package)
        items = [e for e in root.iter() if e.tag.endswith("}item")]
        files = {e.get("id"): e.get("href", "") for e in items if "nav" not in (e.get("properties") or "").split()}
        spine = [e.get("idref") for e in root.iter() if e.tag.endswith("}itemref")]
        chapters = 0
        # A book without an order is read in that of its list of files.
        for reference in spine or [e.get("id") for e in items if "html" in (e.get("media-type") or "")]:
            name = posixpath.normpath(posixpath.join(folder, unquote(files.get(reference, ""))))
            if name in names:
                page = _part(book, name)
                declared = re.search(rb"""encoding=["']([\w-]+)""", page[:200])
                text = visible_text(page.decode(declared[1].decode() if declared else "utf-8", "replace"))
                chapters += bool(text)
                yield text
        if not chapters:
            raise NotReadError("a book without text (its pages may be images)")


def _protects_text(listed: bytes) -> bool:
    """True if more than the fonts of a book are encrypted, by its list of what is, or by the names in a damaged one."""
    try:
        encryption = ElementTree.fromstring(listed)
    except ElementTree.ParseError:
        return re.search(rb"EncryptedKey|\.(?:x?html?|opf)[\"']", listed) is not None
    if any(e.tag.endswith("}EncryptedKey") for e in encryption.iter()):
        return True
    places = [e.get("URI", "") for e in encryption.iter() if e.tag.endswith("}CipherReference")]
    return any(posixpath.splitext(place)[1].lower() in (".html", ".xhtml", ".htm", ".xml", ".opf") for place in places)


def read_docx(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """The paragraphs and tables of a Word file, tracked changes accepted, then its footnotes, one document.

    `found` counts the deletions among the changes.

    Raises:
        NotReadError: it is protected, or no such file.
    """
    with _zipped(data) as file:
        names = set(file.namelist())
        notes = [f"word/{part}.xml" for part in ("footnotes", "endnotes")]
        parts = ["word/document.xml", *(name for name in notes if name in names)]
        roots = [_xml(file, name) for name in parts]
    found[DELETED] += sum(
        child.find(f".//{_WORD}delText") is not None for root in roots for child in root.iter(f"{_WORD}del")
    )
    yield "\n\n".join(text for root in roots for text in _paragraphs(root) if text.strip())


def _paragraphs(node: ElementTree.Element) -> Iterator[str]:
    """The paragraphs in a node, and the rows of its tables, with tabs between their cells."""
    for child in node:
        name = child.tag.rpartition("}")[2]
        if name == "p":
            yield "".join(_runs(child))
            yield from _boxes(child)
        elif name == "tbl":
            cells = [[" ".join(_paragraphs(cell)) for cell in _parts(row, "tc")] for row in _parts(child, "tr")]
            yield "\n".join("\t".join(row) for row in cells)
        elif name not in _GONE:
            yield from _paragraphs(child)


def _parts(node: ElementTree.Element, wanted: str) -> Iterator[ElementTree.Element]:
    """The rows of a table, or the cells of a row, also those inside content controls and tracked insertions."""
    for child in node:
        name = child.tag.rpartition("}")[2]
        if name == wanted:
            yield child
        elif name in _AROUND:
            yield from _parts(child, wanted)


def _boxes(node: ElementTree.Element) -> Iterator[str]:
    """The paragraphs of the text boxes in a paragraph; of each there is a second form for old programs."""
    for child in node:
        name = child.tag.rpartition("}")[2]
        if name == "txbxContent":
            yield from _paragraphs(child)
        elif name != "Fallback":
            yield from _boxes(child)


def _runs(node: ElementTree.Element) -> Iterator[str]:
    """The pieces of text in a paragraph; text boxes in it have paragraphs of their own."""
    for child in node:
        name = child.tag.rpartition("}")[2]
        if name == "t":
            yield child.text or ""
        elif name in ("tab", "br", "cr"):
            yield "\t" if name == "tab" else "\n"
        elif name == "noBreakHyphen":
            yield "-"
        elif name not in _GONE:
            yield from _runs(child)


def read_odt(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """The paragraphs of an OpenDocument text, one document. `found` counts tracked deletions.

    Raises:
        NotReadError: it is no such file.
    """
    with _zipped(data) as file:
        body = _xml(file, "content.xml")
    found[DELETED] += sum(1 for _ in body.iter(f"{_OPEN}deletion"))

    def text_of(node: ElementTree.Element) -> str:
        own = {f"{_OPEN}s": " " * int(node.get(f"{_OPEN}c", "1")), f"{_OPEN}tab": "\t", f"{_OPEN}line-break": "\n"}
        inside = "".join(
            ("" if child.tag.endswith(("}annotation", "}note", "}text-box")) else text_of(child)) + (child.tail or "")
            for child in node
        )
        return own.get(node.tag, "") + (node.text or "") + inside

    def paragraphs(node: ElementTree.Element) -> Iterator[str]:
        if node.tag.endswith(("}tracked-changes", "}annotation")):
            return  # what was deleted
        if node.tag.endswith("}table-row"):
            yield "\t".join(" ".join(paragraphs(cell)) for cell in node if cell.tag.endswith("}table-cell"))
            return
        if node.tag in (f"{_OPEN}p", f"{_OPEN}h"):
            yield text_of(node)
        for child in node:  # in a paragraph only footnotes and text boxes have some
            yield from paragraphs(child)

    yield "\n\n".join(text for text in paragraphs(body) if text.strip())


def _zipped(data: IO[bytes]) -> zipfile.ZipFile:
    head = data.read(8)
    data.seek(0)
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise NotReadError("protected by a password, or in the old .doc form (save it as .docx)")
    try:
        return zipfile.ZipFile(data)
    except zipfile.BadZipFile:
        raise NotReadError("damaged (get it again)") from None


def _part(file: zipfile.ZipFile, name: str) -> bytes:
    try:
        with file.open(name) as part:
            content = part.read(MAX_PART_BYTES + 1)
    except (KeyError, zipfile.BadZipFile):
        raise NotReadError("damaged (get it again)") from None
    except RuntimeError:
        raise NotReadError("protected by a password") from None
    if len(content) > MAX_PART_BYTES:
        raise NotReadError(f"more than {format_bytes(MAX_PART_BYTES)} in one part (save as .txt)")
    return content


def _xml(file: zipfile.ZipFile, name: str) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(_part(file, name))
    except ElementTree.ParseError:
        raise NotReadError("damaged (get it again)") from None


# --- PDF --------------------------------------------------------------------------------------------------------------


@functools.cache
def missing_library(kind: str) -> str:
    """The library that a kind of file needs and that is not installed; empty if there is none."""
    name = {"pdf": "pypdf", "rtf": "striprtf"}.get(kind, "")
    return name if name and importlib.util.find_spec(name) is None else ""


def read_rtf(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """The text of an RTF file, one document; bytes that are no letters as lone surrogates ("surrogateescape").

    Raises:
        NotReadError: it is damaged, or longer than MAX_PART_BYTES.
    """
    if striprtf is None:
        raise NotReadError(f"needs striprtf ({DOCUMENTS_EXTRA})")
    content = data.read(MAX_PART_BYTES + 1)
    if len(content) > MAX_PART_BYTES:
        raise NotReadError(f"RTF of more than {format_bytes(MAX_PART_BYTES)} (save as .docx or .txt)")
    try:
        yield striprtf.rtf_to_text(content.decode("latin-1"), errors="surrogateescape")
    except Exception as error:  # whatever a file that is not by the rules makes a parser do
        raise NotReadError(f"damaged ({type(error).__name__}; save as .docx or .txt)") from None


def read_pdf(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """The text layer of a PDF file, one document; ligatures become letters, words that the line has cut whole again.

    `found` counts these words.

    Raises:
        NotReadError: it has none (a scan), is protected or damaged.
    """
    try:
        import pypdf  # lazy: an optional package, of which most corpora need nothing
    except ImportError:
        raise NotReadError(f"needs pypdf ({DOCUMENTS_EXTRA})") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every page that is not quite by the rules
    try:
        reader = pypdf.PdfReader(data)
        if reader.is_encrypted and not reader.decrypt(""):
            raise NotReadError("protected by a password")
        pages = [page.extract_text() for page in reader.pages]
    except NotReadError:
        raise
    except Exception as error:  # whatever a file that is not by the rules makes a parser do
        raise NotReadError(f"damaged ({type(error).__name__}; get it again)") from None
    if sum(len(page.split()) for page in pages) < len(pages):
        raise NotReadError("a scan without text (run OCR on it, for example ocrmypdf)")
    text = "\n\n".join(page.strip() for page in pages)
    found[JOINED] += sum("\n" in cut for cut in _HYPHEN.findall(text))
    yield whole_words(text)


def whole_words(text: str) -> str:
    """The text of a page with letters for ligatures, and without the hyphens at which lines cut words."""
    return _HYPHEN.sub("", _LIGATURES.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text))


_LIGATURES = re.compile("[\ufb00-\ufb06]")
# Of a word that the line cut; in "Nord- und Südsee", "pre- and postwar" the hyphen stands for the rest of a word.
_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})(?:-[ ]?|\u00ad)\n(?!(?:und|oder|bzw|and|or)\b)(?=[a-zß-ÿа-я]{2})|\u00ad")


# --- plain forms with marks in between --------------------------------------------------------------------------------


def read_notebook(lines: TextIO) -> Iterator[str]:
    """A Jupyter notebook as Markdown: its text, and its code in fences; no outputs.

    Raises:
        NotReadError: it is no notebook.
    """
    try:
        notebook = json.load(lines)
        language = notebook.get("metadata", {}).get("language_info", {}).get("name", "python")
        cells = notebook["cells"] if "cells" in notebook else notebook["worksheets"][0]["cells"]
        texts = []
        for cell in cells:
            source = cell.get("source", cell.get("input", ""))
            text = (source if isinstance(source, str) else "".join(source)).strip()
            if text:
                texts.append(f"```{language}\n{text}\n```" if cell.get("cell_type") == "code" else text)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise NotReadError("damaged (no notebook that can be read)") from None
    yield "\n\n".join(texts) + "\n"


_TIMES = re.compile(r"\s*(\d+:)?\d{1,2}:\d{2}[.,]\d{1,3}\s*(-->.*|,\s*(\d+:)?\d{1,2}:\d{2}[.,]\d{1,3}\s*)")
# A heading of an .ass file; what stands before a line of an .lrc file, times or who sings what.
_SECTION = re.compile(r"\ufeff?\[(Script Info|V4\+? Styles|Events|Fonts|Graphics|Aegisub .*)\]\s*", re.IGNORECASE)
_LYRICS = re.compile(r"\ufeff?\s*(\[\d+:\d{2}([.:]\d+)*\]|\[[a-z#]{2,6}:[^\]]*\])+", re.IGNORECASE)
# Tags and times within a line; "5 < 6 and 7 > 3" has none.
_MARKS = re.compile(r"</?[A-Za-z][^<>]{0,80}>|<\d[\d:.]*>|\{\\[^{}]{0,80}\}")


def _spoken(row: str) -> str:
    """What a line of an .ass file says; nothing where it draws or is about something else."""
    text = row.split(",", 9)[-1] if row.startswith("Dialogue:") else ""
    return "" if re.search(r"\{[^}]*\\p[1-9]", text) else re.sub(r"\\[Nn]", "\n", re.sub(r"\{[^}]*\}|\\h", " ", text))


def read_subtitles(lines: TextIO) -> Iterator[str]:
    """What is said in a .srt, .vtt, .sbv, .ass or .lrc file, line by line: no numbers, times and marks.

    A line that repeats the one before is left out.
    """
    said: list[str] = []
    text = lines.read()
    rows = text.splitlines()
    if any(map(_SECTION.fullmatch, rows)):
        text = "\n".join(filter(None, map(_spoken, rows)))
    elif not any(map(_TIMES.fullmatch, rows)):
        text = "\n".join(_LYRICS.sub("", row) for row in rows)
    blocks = re.split(r"\n[ \t]*\n", text)
    for block in blocks:
        rows = block.splitlines()
        at = next((i for i, row in enumerate(rows) if _TIMES.fullmatch(row)), None)
        if at is None:
            if rows and rows[0].lstrip("\ufeff").split(" ")[0] in ("WEBVTT", "NOTE", "STYLE", "REGION"):
                continue
            at = -1
        for row in rows[at + 1 :]:
            if _TIMES.fullmatch(row) or (row.strip().isdecimal() and _TIMES.fullmatch(_after(rows, row))):
                continue
            text = html.unescape(_MARKS.sub("", row)).strip()
            if text and (not said or said[-1] != text):  # live captions repeat the line before
                said.append(text)
    yield "\n".join(said) + "\n"


def _after(rows: list[str], row: str) -> str:
    at = rows.index(row) + 1
    return rows[at] if at < len(rows) else ""


def read_mail(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """A mail: its subject and its text.

    Raises:
        NotReadError: it has no text.
    """
    text = _mail_text(email.message_from_binary_file(data, policy=email.policy.default))
    if not text:
        raise NotReadError("a mail without text, or in an encoding that is not known")
    yield text


def read_mailbox(data: IO[bytes], found: Counter[str]) -> Iterator[str]:
    """The mails of a mailbox (mbox), one by one; of one without text an empty document."""
    lines: list[bytes] = []
    blank = True
    for line in data:
        if blank and line.startswith(b"From ") and lines:
            yield _mail_text(email.message_from_bytes(b"".join(lines), policy=email.policy.default))
            lines = []
        elif not (blank and line.startswith(b"From ")):
            # A line of the text that begins with From was marked by whoever wrote the mailbox.
            lines.append(line[1:] if line.startswith(b">From ") else line)
        blank = not line.strip()
    yield _mail_text(email.message_from_bytes(b"".join(lines), policy=email.policy.default))


def _mail_text(message: EmailMessage) -> str:
    """Subject and text of a mail; empty if there is none that can be read."""
    body = message.get_body(("plain", "html"))
    try:
        text = body.get_content() if body is not None else ""
    except (LookupError, ValueError):
        return ""
    if not isinstance(text, str) or not text.strip():
        return ""
    if body is not None and body.get_content_type() == "text/html":
        text = visible_text(text)
    subject = message.get("subject")
    return (f"{subject}\n\n" if subject else "") + text
