"""Documents out of files of text of every form that people have, streamed.

- txt (also rst, tex, org, log, source code, files without a suffix): a short file is one document; a longer one is cut
  at blank lines, ends of lines or of sentences into documents of about 8,000 characters. A line "<|endoftext|>" always
  ends a document.
- md: the same, but a heading of the first or second level begins a new document when the one before is long enough,
  and code blocks are not cut. Notebooks (ipynb) are read as this.
- html: the visible text. epub, docx, odt, pdf, rtf, eml, subtitles and lyrics (srt, vtt, sbv, ass, lrc): their text.
- jsonl: a line is one document, {"text": "..."} or a JSON string; json: a list of these, or one.
- csv, tsv, parquet, arrow: a row is one document.

All but parquet and arrow may be packed (.gz .zst .xz .bz2); archives (.zip .tar) are read like folders. The encoding is
told by charset.py. In tables and JSON the text is the column that is named by TEXT_COLUMN, else the one called `text`
or like it, the only one, or by far the longest.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from nanochat.data.charset import REPAIR, Repairs, Utf8Stream, known_encoding
from nanochat.data.charset_guess import fits
from nanochat.data.documents import (
    read_docx,
    read_epub,
    read_mail,
    read_mailbox,
    read_notebook,
    read_odt,
    read_pdf,
    read_rtf,
    read_subtitles,
)
from nanochat.data.inventory import Inventory, NotReadError, format_bytes
from nanochat.data.json_text import TEXT_NAMES, is_chat, read_json_file, read_json_lines
from nanochat.data.markup import declared_charset, page_text
from nanochat.data.mojibake import MANY_SIGNS, mended
from nanochat.data.packed import (
    LINK_INSIDE,
    Unseekable,
    compression_of,
    damage_named,
    is_archive,
    members,
    unpacked,
    what_it_is,
)
from nanochat.data.split import AfterSettings, split_long, split_text
from nanochat.data.tables import read_arrow, read_csv, read_parquet
from nanochat.data.text_walk import (
    SNIFF_BYTES,
    FoundFile,
    ReadOptions,
    TextFile,
    kind_of,
    kind_to_read,
    label_of,
    left_out_below,
)
from nanochat.env import printable

BUFFER_BYTES = 1 << 18
MAX_BINARY_BYTES = 1_000_000_000  # of a packed book or PDF, which is held in memory
BINARY_FORMS = {
    "epub": read_epub,
    "docx": read_docx,
    "odt": read_odt,
    "pdf": read_pdf,
    "rtf": read_rtf,
    "eml": read_mail,
    "mbox": read_mailbox,
}


_PAGE_START = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html)\b", re.I | re.S
)


def kind_of_content(head: bytes) -> str | None:
    """ "html" or "jsonl" if a text is one by its first bytes, else None."""
    if _PAGE_START.match(head):
        return "html"
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:-1][:3]
    try:
        records = [json.loads(line) for line in lines] if head[:5].lstrip(b"\xef\xbb\xbf ").startswith(b'{"') else []
    except (ValueError, RecursionError):
        return None
    same = len(records) > 1 and all(isinstance(r, dict) and r.keys() == records[0].keys() for r in records)
    return "jsonl" if same and (is_chat(records[0]) or not records[0].keys().isdisjoint(TEXT_NAMES)) else None


def _is_one_value(head: bytes) -> bool:
    """True if the first line of JSON lines is the beginning of an array or object that goes on below."""
    line, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    return bool(end) and (line.strip() == b"{" or (line[:1] == b"[" and line.strip()[-1:] in b"[{,"))


class TextReader:
    """Reads files and keeps count of what was found out on the way.

    Args:
        options: what the user said about the texts.
        inventory: gets the files that turn out not to be readable.

    Raises:
        ValueError: there is no such encoding.
    """

    def __init__(self, options: ReadOptions, inventory: Inventory) -> None:
        self.options, self.inventory, self.repairs = options, inventory, Repairs()
        self.encoding = known_encoding(options.encoding) if options.encoding else None
        self.found: dict[str, list[str]] = {}
        """What was found out, and the files where."""

    def note(self, what: str, name: str) -> None:
        """Note something that was found out about a file."""
        self.found.setdefault(what, []).append(name)

    def read(self, file: TextFile) -> Iterator[tuple[int, str]]:
        """(bytes of the file read so far, text) of each document; a file that is no text goes into the inventory.

        Raises:
            ValueError: the file is malformed; names the place.
        """
        twice = left = 0
        try:
            for done, document in self._read(file):
                if not document.isascii():
                    document, count, doubtful = mended(document)
                    twice, left = twice + count, left + doubtful
                yield done, document
        except NotReadError as error:
            self.inventory.leave_out(str(error), "file", file.name, file.size)
            self.inventory.count(file.label, -1, -file.size)
        except PermissionError:
            self.inventory.leave_out("permission denied", "file", file.name, file.size)
            self.inventory.count(file.label, -1, -file.size)
        if twice:
            self.note("letters that were encoded twice, mended", f"{file.name} ({twice:,})")
        if left >= MANY_SIGNS:
            self.note(
                "looks encoded twice (as StraÃŸe for Straße), not all of it: left as it is", f"{file.name} ({left:,})"
            )

    def _read(self, file: TextFile) -> Iterator[tuple[int, str]]:
        if file.kind in ("parquet", "arrow"):
            rows = (read_parquet if file.kind == "parquet" else read_arrow)(
                file.path, self.options.column, lambda what: self._column(what, file.name), self._repaired
            )
            for share, text in rows:
                for document in split_long(text):
                    yield int(file.size * share), document
        elif file.kind == "archive":
            yield from self._archive(file)
        else:
            with open(file.path, "rb") as raw, damage_named(file.path):
                stream = self._unpacked(raw, file.path.name, file.name)
                for document in self._documents(file.kind, file.path, file.name, stream):
                    yield raw.tell(), document

    def _archive(self, file: TextFile) -> Iterator[tuple[int, str]]:
        done = 0
        for path, size, content in members(file.path):
            with damage_named(f"{file.path}, {path}"):
                for document in self._member(file, path, size, content):
                    yield done, document
            done = min(file.size, done + size)
        self.inventory.count(file.label, -1, -file.size)  # its files count, each by itself

    def _member(self, file: TextFile, path: str, size: int, content: IO[bytes] | None) -> Iterator[str]:
        """The documents of a file in an archive, by the rules for files in folders."""
        name = path.replace("\\", "/").rpartition("/")[2]
        shown = printable(f"{file.name}/{path}").replace("\n", "\\n")
        if content is None:
            self.inventory.leave_out(LINK_INSIDE, "file", shown, matters=False)
            return
        head = functools.partial(cast("io.BufferedReader", content).peek, SNIFF_BYTES)
        if reason := left_out_below(path):
            self.inventory.leave_out(reason, "file", shown, matters=False)
        elif kind_of(name) in ("archive", "parquet", "arrow"):
            self.inventory.leave_out("in an archive (unpack it)", "file", shown, size)
        elif kind := kind_to_read(FoundFile(path, name, shown), size, head, self.options, self.inventory):
            try:
                stream = self._unpacked(cast("io.BufferedReader", content), name, shown)
                yield from self._documents(kind, Path(shown), shown, stream)
            except NotReadError as error:
                self.inventory.leave_out(str(error), "file", shown, size)
            else:
                self.inventory.count(f"{label_of(name).lstrip('.') or 'no suffix'} in {file.label}", 1, size)

    def _unpacked(self, stream: io.BufferedReader, name: str, shown: str) -> IO[bytes]:
        """The content of a file that is packed as its name says, or, as browsers save some downloads, not any more."""
        packed = compression_of(name)
        head = stream.peek(SNIFF_BYTES) if packed else b""
        if other := what_it_is(head):
            return unpacked(stream, packed) if other.endswith(packed) else stream  # whoever reads it says what it is
        if packed and fits(head, "utf-8") and b"\0" not in head:
            self.note(f"not packed, in spite of {packed} in its name", shown)
            return stream
        return unpacked(stream, packed)

    def _documents(self, kind: str, path: Path, name: str, stream: IO[bytes]) -> Iterator[str]:
        """The documents of a stream of bytes; `path` is for messages, `name` for the inventory."""
        stream = (
            stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(Unseekable(stream), BUFFER_BYTES)
        )
        if kind in BINARY_FORMS:
            # A mailbox is read forwards. The readers of the others jump back and forth, which is slow in packed data.
            data = stream if kind == "mbox" or stream.seekable() else _in_memory(stream)
            found = Counter[str]()
            for text in BINARY_FORMS[kind](data, found):
                yield from split_text(io.StringIO(self.repairs.surrogates(text))) if text.strip() else ("",)
            for what, count in found.items():
                if count:
                    self.note(what, f"{name} ({count:,})")
            return
        head = stream.peek(SNIFF_BYTES)[:SNIFF_BYTES]
        if other := what_it_is(head):
            raise NotReadError(f"{other} by its content (rename it, or unpack it)")
        if kind in ("txt", "md") and (kind_inside := kind_of_content(head)):
            self.note(f"{kind_inside} under another name", name)
            kind = kind_inside
        if kind == "jsonl" and _is_one_value(head):
            self.note("one JSON value over many lines, not one a line", name)
            kind = "json"
        declared = self._declared(head) if kind == "html" else None
        utf8 = Utf8Stream(
            stream, self.repairs, self.encoding, declared, lambda what, sure: self._charset(what, sure, name)
        )
        newline = "" if kind in ("csv", "tsv") else None
        buffer = io.BufferedReader(utf8, BUFFER_BYTES)
        with io.TextIOWrapper(buffer, "utf-8", errors=REPAIR, newline=newline) as lines:
            for document in self._texts(kind, path, name, lines):
                yield self.repairs.surrogates(document)

    def _texts(self, kind: str, path: Path, name: str, lines: io.TextIOWrapper) -> Iterator[str]:
        column = self.options.column

        def found(what: str) -> None:
            self._column(what, name)

        def lacking(what: str, count: int, place: str) -> None:
            self.note(what, f"{name} ({count:,}, the first at {place})")

        if kind == "md":
            after = AfterSettings(lines)
            if after.found:
                self.note("settings before the text (front matter) left out", name)
            yield from split_text(after, markdown=True)
            return
        if kind == "txt":
            yield from split_text(lines)
            return
        rows: Iterator[str]
        if kind == "html":
            page, left_out = page_text(lines.read())
            if left_out:
                self.note("menus, headers, footers, banners and asides left out", f"{name} ({left_out:,} characters)")
            rows = iter((page,))
        elif kind == "jsonl":
            rows = read_json_lines(path, lines, column, lambda field: found(f"field {field!r}"), lacking)
        elif kind == "json":
            rows = read_json_file(path, lines, column, lambda field: found(f"field {field!r}"), lacking)
        elif kind in ("csv", "tsv"):
            rows = read_csv(path, lines, column, found, tabs=kind == "tsv")
        elif kind == "ipynb":
            yield from split_text(io.StringIO(next(read_notebook(lines))), markdown=True)
            return
        else:
            rows = read_subtitles(lines)
        whole = kind in ("html", "subtitles")
        for text in rows:
            yield from split_text(io.StringIO(text)) if whole else split_long(text)

    def _declared(self, head: bytes) -> str | None:
        name = declared_charset(head)
        try:
            return known_encoding(name) if name else None
        except ValueError:
            return None

    def _charset(self, encoding: str, guessed: bool, name: str) -> None:
        self.note(f"read as {encoding}{' (guessed; ENCODING= says otherwise)' if guessed else ''}", name)

    def _column(self, what: str, name: str) -> None:
        if what not in ("column 'text'", "field 'text'"):
            self.note(what, name)

    def _repaired(self, value: bytes) -> str:
        text = value.decode("utf-8", REPAIR)
        if "\0" in text:
            self.repairs.nul += text.count("\0")
            text = text.replace("\0", "")
        return text


def _in_memory(stream: IO[bytes]) -> IO[bytes]:
    data = stream.read(MAX_BINARY_BYTES + 1)
    if len(data) > MAX_BINARY_BYTES:
        raise NotReadError(f"more than {format_bytes(MAX_BINARY_BYTES)} when unpacked (unpack it)")
    return io.BytesIO(data)


def file_of(path: Path) -> TextFile:
    """A file that is read whatever its name says."""
    stat = path.stat()
    kind = "archive" if is_archive(path.name) else kind_of(path.name) or "txt"
    return TextFile(path, kind, stat.st_size, stat.st_mtime_ns, path.name, kind)
