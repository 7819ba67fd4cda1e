"""Documents out of files of text, streamed: txt, md, html, jsonl, csv and parquet; all but parquet also .gz and .zst.

- txt: a short file is one document; a longer one is cut at blank lines into documents of about DOCUMENT_CHARS
  characters. A line "<|endoftext|>" always ends a document.
- md: the same, but a heading of the first or second level begins a new document when the one before is long enough,
  and code blocks are not cut.
- html: the visible text, one document unless it is long.
- jsonl: a line is one document, {"text": "..."} or a JSON string.
- csv, tsv, parquet: a row is one document; the column is `text`, the one that is named, or the only column of text.

Bytes that are no UTF-8 become U+FFFD and are counted.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from nanochat.data.corpus import BLOCK_ROWS, TEXT_COLUMN, is_text, open_parquet

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
KINDS = {
    ".txt": "txt",
    ".md": "md",
    ".markdown": "md",
    ".html": "html",
    ".htm": "html",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
DOCUMENT_CHARS = 8_000
SECTION_CHARS = 2_000  # of Markdown before a heading may begin a new document
LONGEST_CHARS = 64_000  # where no blank line comes, cut here
LONGEST_LINE = 256_000_000  # a JSON line or CSV field beyond this is surely no document
END_OF_TEXT = "<|endoftext|>"
REPAIR = "nanochat_repair"  # the name of the codec error handler


def kind_of(file: Path) -> str | None:
    """The form of a file by its name, None if it is none that can be read."""
    suffix = Path(file.stem).suffix if file.suffix in COMPRESSIONS else file.suffix
    kind = KINDS.get(suffix.lower())
    return None if kind == "parquet" and file.suffix in COMPRESSIONS else kind


def find_texts(path: Path) -> list[Path]:
    """The readable files of a folder and of the folders in it, by path, or the one file given; no hidden ones."""
    if path.is_file():
        return [path] if kind_of(path) else []
    files = [file for file in path.rglob("*") if file.is_file() and kind_of(file)]
    return sorted(f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts))


class Repairs:
    """Counts the characters that had to be replaced, from when it was made."""

    def __init__(self) -> None:
        self.characters = 0
        codecs.register_error(REPAIR, self._replace)

    def _replace(self, error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        self.characters += 1
        return "\ufffd", error.end

    def surrogates(self, text: str) -> str:
        """`text` as valid Unicode: paired surrogates joined, lone ones replaced by U+FFFD (JSON may hold such text)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            self.characters += joined.count("\ufffd") - text.count("\ufffd")
            return joined
        return text


def read_documents(file: Path, repairs: Repairs, column: str | None = None) -> Iterator[tuple[int, str]]:
    """(bytes of the file read so far, text) of each document.

    Raises:
        ValueError: the file is malformed; names the place.
    """
    kind = kind_of(file) or "txt"
    if kind == "parquet":
        yield from _read_parquet(file, repairs, column)
        return
    try:
        with open(file, "rb") as raw, _decoded(file, raw, newline="" if kind == "csv" else None) as lines:
            for document in READERS[kind](file, lines, column):
                yield raw.tell(), repairs.surrogates(document)
    except pa.ArrowException as error:
        raise ValueError(f"{file} can't be unpacked ({error})") from error
    except OSError as error:
        if error.errno is None and file.suffix in COMPRESSIONS:  # how Arrow says that the stream is cut off
            raise ValueError(f"{file} can't be unpacked ({error})") from error
        raise


@contextlib.contextmanager
def _decoded(file: Path, raw: BinaryIO, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The characters of a file, unpacked and decoded; UTF-16 only with its mark, else UTF-8 with repairs."""
    compression = COMPRESSIONS.get(file.suffix)
    stream = raw if compression is None else pa.CompressedInputStream(raw, compression)
    utf16 = False
    if compression is None:
        utf16 = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raw.seek(0)
    with io.TextIOWrapper(stream, "utf-16" if utf16 else "utf-8-sig", errors=REPAIR, newline=newline) as lines:
        yield lines


def _read_jsonl(file: Path, lines: io.TextIOWrapper, column: str | None) -> Iterator[str]:
    name = column or TEXT_COLUMN
    number = 0
    while line := lines.readline(LONGEST_LINE):
        number += 1
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error})") from None
        text = record.get(name) if isinstance(record, dict) else record
        if text is None and isinstance(record, dict) and name in record:
            text = ""  # counts as blank, as a null in parquet does
        if not isinstance(text, str):
            found = f"an object with {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
            if isinstance(record, dict) and name in record:
                found = f"a {type(text).__name__} in {name!r}"
            raise ValueError(
                f'{file}, line {number}: expected {{"{name}": "..."}} or a string, found {found:.200} '
                "(--text_column names another field)"
            )
        yield text


def _read_csv(file: Path, lines: io.TextIOWrapper, column: str | None) -> Iterator[str]:
    csv.field_size_limit(LONGEST_LINE)
    first = lines.readline(LONGEST_LINE)
    rows = csv.reader(itertools.chain([first], lines), delimiter=_delimiter(file, first))
    try:
        header = next(rows, None) if first else None
        if header is None:
            return
        at = header.index(choose_column(file, header, header, column))
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{file}, line {rows.line_num}: {len(row)} fields, but the first line has {len(header)}"
                )
            yield row[at]
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: not CSV ({error})") from None


def _delimiter(file: Path, header: str) -> str:
    """The character between a table's fields; where Excel writes decimals with a comma, "csv" has semicolons."""
    if ".tsv" in (suffix.lower() for suffix in file.suffixes):
        return "\t"
    return "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")


def _read_parquet(file: Path, repairs: Repairs, column: str | None) -> Iterator[tuple[int, str]]:
    with open_parquet(file) as parquet:
        schema = parquet.schema_arrow
        texts = [name for name in schema.names if is_text(schema.field(name).type)]
        name = choose_column(file, schema.names, texts, column)
        done, size, total = 0, file.stat().st_size, max(1, parquet.metadata.num_rows)
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=[name]):
            values = batch.column(0)
            if pa.types.is_dictionary(values.type):
                values = values.cast(pa.large_string())
            for value in values.cast(pa.large_binary()).to_pylist():  # Arrow does not check that it is UTF-8
                done += 1
                yield size * done // total, (value or b"").decode("utf-8", REPAIR)


def choose_column(file: Path, names: list[str], texts: list[str], wanted: str | None) -> str:
    """The column with the documents: `wanted`, else `text`, else the only one of `texts`.

    Raises:
        ValueError: there is none, or several; names them.
    """
    if wanted is not None and wanted not in texts:
        raise ValueError(f"{file} has no column of text {wanted!r} (it has: {', '.join(names)})")
    if wanted is not None or TEXT_COLUMN in texts:
        return wanted or TEXT_COLUMN
    if len(texts) == 1:
        return texts[0]
    raise ValueError(
        f"{file} has no column {TEXT_COLUMN!r} (it has: {', '.join(names)}): say which one with --text_column"
    )


# --- long texts -------------------------------------------------------------------------------------------------------

_HEADING = re.compile(r"#{1,2} \S")


def split_text(lines: io.TextIOBase, markdown: bool) -> Iterator[str]:
    """Documents of a text; together they are the text, but for the lines that only separate documents."""
    document: list[str] = []
    num_chars, in_code = 0, False
    while line := lines.readline(LONGEST_CHARS):  # a "line" may be gigabytes: the limit bounds memory
        if markdown:
            if line.lstrip().startswith("```"):
                in_code = not in_code
            if not in_code and num_chars >= SECTION_CHARS and _HEADING.match(line):
                yield "".join(document)
                document, num_chars = [], 0
        separator = line.strip() == END_OF_TEXT
        if not separator:
            document.append(line)
            num_chars += len(line)
        at_gap = not line.strip() and num_chars >= DOCUMENT_CHARS and not in_code
        if separator or at_gap or num_chars >= LONGEST_CHARS:
            yield "".join(document)
            document, num_chars = [], 0
    yield "".join(document)


class _Text(HTMLParser):
    """Collects what a browser would show."""

    HIDDEN = frozenset({"script", "style", "template", "noscript", "head", "title"})
    BLOCKS = re.compile(
        r"address|article|aside|blockquote|br|d[dlt]|div|fig(caption|ure)|footer|form|h[1-6r]|header|li|main|nav|ol|p|pre|"
        r"section|table|t[dhr]|ul"
    )
    PARAGRAPHS = re.compile(r"article|div|h[1-6]|p|section")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self._hidden.append(tag)
        elif tag == "body" or (self.BLOCKS.fullmatch(tag) and self._hidden == ["head"]):
            self._hidden.clear()  # a head that was never closed: HTML allows to omit its end, and body
        if self.BLOCKS.fullmatch(tag):
            self.parts.append("\n\n" if self.PARAGRAPHS.fullmatch(tag) else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif self.BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data))


def _visible_text(lines: io.TextIOWrapper) -> str:
    parser = _Text()
    while block := lines.read(1 << 16):
        parser.feed(block)
    parser.close()
    text = re.sub(r" *\n *", "\n", "".join(parser.parts))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


# How the characters of a file become documents, by its kind: (file, characters, column) -> documents. A new form of
# text is an entry here and its suffixes in KINDS. (Parquet holds its characters in another way.)
READERS: dict[str, Callable[[Path, io.TextIOWrapper, str | None], Iterator[str]]] = {
    "txt": lambda file, lines, column: split_text(lines, markdown=False),
    "md": lambda file, lines, column: split_text(lines, markdown=True),
    "html": lambda file, lines, column: split_text(io.StringIO(_visible_text(lines)), markdown=False),
    "jsonl": _read_jsonl,
    "csv": _read_csv,
}
