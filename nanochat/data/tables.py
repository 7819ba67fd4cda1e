"""Documents out of tables: csv, tsv and their like, whose dialect is detected, and parquet and Arrow files.

A table that can't be read surely is refused with the line: one stray quotation mark can make a single document of a
thousand rows, and nobody would see it.
"""

from __future__ import annotations

import csv
import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

import pyarrow as pa

from nanochat.data.corpus import BLOCK_ROWS, is_text, open_parquet
from nanochat.data.inventory import NotReadError
from nanochat.data.json_text import CHATS, TEXT_NAMES, choose_name, is_chat

LONGEST_FIELD = 256_000_000  # characters
SAMPLE_LINES = 500  # the dialect is chosen by these
MOST_SAMPLE_CHARS = 2_000_000
DELIMITERS = ",;\t|"
ONE_COLUMN = "\x1f"  # no text has this character: all of a line is one field
INNER_LINES = 3  # so many lines in one field, all with the right number of delimiters, are rows that it swallowed
_NUMBER = re.compile(r"\s*[-+]?\d[\d.,:/T -]*\s*")


class Dialect:
    """How a table is written: the character between its fields, and what its quotation marks mean."""

    def __init__(self, delimiter: str, quoted: bool, escaped: bool = False) -> None:
        self.delimiter, self.quoted, self.escaped = delimiter, quoted, escaped

    def rows(self, lines: Iterator[str]) -> Iterator[list[str]]:
        """The rows, strictly: csv.Error where a quotation mark stands where none may."""
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        escape = "\\" if self.escaped else None
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quoting=quoting,
            escapechar=escape,
            doublequote=not self.escaped,
            strict=True,
        )

    def __str__(self) -> str:
        names = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}
        name = names.get(self.delimiter, repr(self.delimiter))
        return f"{name} between fields" + ("" if self.quoted else ", quotation marks are text")


def read_csv(
    file: Path | str, lines: TextIO, wanted: str | None, found: Callable[[str], None], tabs: bool = False
) -> Iterator[str]:
    """The field with the text of each row; a table of one column without a header is text, line by line.

    Args:
        file: its name for messages.
        lines: its characters, with their line ends as they are.
        wanted: the column, by its name or number from 1, if the user named one.
        found: told what was found out: column, dialect.
        tabs: whether the name says that fields are between tabs.

    Raises:
        ValueError: a row has too few or too many fields, or has swallowed others; names the line.
    """
    csv.field_size_limit(LONGEST_FIELD)
    head, whole = _head(lines)
    if not head:
        return
    dialect = detect_dialect(head, "\t" if tabs else None, whole)
    # Excel's way to say what is between the fields
    skipped = int(head[0].lower().startswith("sep=") and len(head[0].rstrip("\r\n")) == 5)
    all_lines = itertools.chain(head[skipped:], iter(lambda: lines.readline(LONGEST_FIELD), ""))
    counter = _LineCounter(all_lines, skipped)
    rows = dialect.rows(counter)
    start = 1 + skipped
    try:
        sample = []
        for row in itertools.islice(rows, SAMPLE_LINES):
            sample.append((start, row))
            start = counter.number + 1
        header, at = _choose(file, [row for _, row in sample if row], wanted)
        found(f"column {header[at]!r}" if header else f"column {at + 1}, no header line")
        if dialect.delimiter in ";|" or (dialect.delimiter != ONE_COLUMN and not dialect.quoted):
            found(str(dialect))
        width = len(header) if header else max(len(row) for _, row in sample)
        body = [pair for pair in sample if pair[1]]
        check = _Swallowed(file, dialect, width, at, [row for _, row in body[bool(header) :]])
        for number, row in body[bool(header) :]:
            yield check(number, row)
        for row in rows:
            if row:
                yield check(start, row)
            start = counter.number + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}, line {start}: not a table that can be read surely ({error}; a quotation mark that is not closed, "
            "or not doubled inside a field, would join rows)"
        ) from None


class _LineCounter:
    """Passes lines on and counts them."""

    def __init__(self, lines: Iterator[str], skipped: int) -> None:
        self.lines, self.number = lines, skipped

    def __iter__(self) -> _LineCounter:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number += 1
        return line


def _head(lines: TextIO) -> tuple[list[str], bool]:
    """The first lines, enough to choose the dialect by, and whether they are all."""
    head: list[str] = []
    num_chars = 0
    while len(head) < SAMPLE_LINES and num_chars < MOST_SAMPLE_CHARS:
        line = lines.readline(LONGEST_FIELD)
        if not line:
            return head, True
        head.append(line)
        num_chars += len(line)
    return head, False


def detect_dialect(head: Sequence[str], delimiter: str | None = None, whole: bool = True) -> Dialect:
    """The dialect in which the first lines of a table make rows of one width, the most columns first.

    Args:
        head: the lines.
        delimiter: the one that the file's name says it has.
        whole: whether these are all lines; else the last row may be cut.
    """
    if head[0].lower().startswith("sep=") and len(head[0].strip()) == 5:  # how Excel is told
        delimiter = head[0][4]
    fits: list[tuple[int, int, Dialect]] = []
    for mark in delimiter or DELIMITERS:
        for preference, (quoted, escaped) in enumerate(((True, False), (True, True), (False, False))):
            if escaped and not any('\\"' in line for line in head):
                continue
            dialect = Dialect(mark, quoted, escaped)
            width = _width(dialect, head, whole)
            if width > 1:
                fits.append((-width if delimiter is None else 0, preference, dialect))
    if not fits:
        mark = delimiter if delimiter and any(delimiter in line for line in head) else ""
        if mark or any(delimiter is None and head[0].count(m) for m in DELIMITERS):
            # No dialect fits: read it as what the first line looks like, and name the first line that is wrong.
            return Dialect(mark or max(DELIMITERS, key=head[0].count), True)
        single = Dialect(ONE_COLUMN, True)
        return single if _width(single, head, whole) == 1 and _single_is_quoted(head) else Dialect(ONE_COLUMN, False)
    best = min(fits, key=lambda fit: (fit[1], fit[0]))
    return best[2]


def _single_is_quoted(head: Sequence[str]) -> bool:
    return any(line.startswith('"') for line in head)


def _width(dialect: Dialect, head: Sequence[str], whole: bool) -> int:
    """The number of fields of every row, 0 if they differ or a quotation mark is wrong.

    Where the lines are not the whole table, the last row may be cut.
    """
    widths = []
    try:
        for row in dialect.rows(iter(head)):
            if row:
                widths.append(len(row))
                if any("\n" in field and _looks_swallowed(dialect, field, len(row)) for field in row):
                    return 0
    except csv.Error as error:
        if "unexpected end" not in str(error) or whole:
            return 0
    return widths[0] if widths and len(set(widths)) == 1 else 0


def _looks_swallowed(dialect: Dialect, field: str, width: int) -> bool:
    """True if the lines inside a field are rows of the table: each with the right number of delimiters."""
    inner = field.splitlines()[1:]
    enough = INNER_LINES if dialect.delimiter == "," and width == 2 else 1
    return width > 1 and len(inner) >= enough and all(line.count(dialect.delimiter) == width - 1 for line in inner)


class _Swallowed:
    """Checks rows, and gives the field with the text of each."""

    def __init__(self, file: Path | str, dialect: Dialect, width: int, at: int, sample: Sequence[list[str]]) -> None:
        self.file, self.dialect, self.width, self.at = file, dialect, width, at
        # Columns of numbers, such as ids: a line inside a field that has numbers in the same places is a row.
        whole = [row for row in sample if len(row) == width]
        columns = [i for i in range(width) if i != at and whole and all(_NUMBER.fullmatch(row[i]) for row in whole)]
        self.numbers = columns if len(whole) >= 2 else []

    def __call__(self, number: int, row: list[str]) -> str:
        if len(row) != self.width:
            raise ValueError(
                f"{self.file}, line {number}: {len(row)} fields, but the first line has {self.width} "
                f"({self.dialect}): is a quotation mark or a delimiter inside a text not quoted?"
            )
        text = row[self.at]
        if "\n" in text and (_looks_swallowed(self.dialect, text, self.width) or self._has_rows(text)):
            raise ValueError(
                f"{self.file}, line {number}: one field holds {text.count(chr(10)) + 1} lines that look like rows "
                "of the table: a quotation mark is not closed, close or double it"
            )
        return text

    def _has_rows(self, text: str) -> bool:
        for line in text.splitlines()[1:]:
            fields = line.split(self.dialect.delimiter)
            if self.numbers and len(fields) == self.width and all(_NUMBER.fullmatch(fields[i]) for i in self.numbers):
                return True
        return False


def _choose(file: Path | str, rows: Sequence[list[str]], wanted: str | None) -> tuple[list[str], int]:
    """(header, or empty if there is none; number of the column with the text)."""
    if not rows:
        raise ValueError(f"{file} has no rows")
    first, rest = rows[0], rows[1:]
    width = len(first)
    if width == 1:
        return (first, 0) if _is_header(first, rest) or wanted == first[0] else ([], 0)
    means = {
        i: statistics.fmean(len(row[i]) for row in rest if len(row) == width)
        if any(len(r) == width for r in rest)
        else 0.0
        for i in range(width)
    }
    numeric = {
        i for i in means if rest and all(_NUMBER.fullmatch(row[i]) or not row[i] for row in rest if len(row) == width)
    }
    # A line that names nothing above numbers is what pandas writes, whatever the other columns are called.
    is_index = not first[0] and bool(rest) and all(_NUMBER.fullmatch(row[0]) for row in rest)
    header = first if wanted in first or is_index or all(map(_is_name, first)) else []
    if wanted is not None and wanted not in header:
        if wanted.isdecimal() and 1 <= int(wanted) <= width:
            return header, int(wanted) - 1
        raise ValueError(f"{file} has no column of text {wanted!r} (it has: {', '.join(first)})")
    names = header or [str(i + 1) for i in range(width)]
    texts = [name for i, name in enumerate(names) if i not in numeric] or list(names)
    name = choose_column(file, names, texts, wanted, {name: means[i] for i, name in enumerate(names)})
    return header, names.index(name)


def _is_name(cell: str) -> bool:
    """True if a field may be the name of a column: no number, no sentence."""
    return len(cell) <= 60 and not _NUMBER.fullmatch(cell) and not cell.rstrip().endswith((".", "!", "?", "。"))


def _is_header(first: list[str], rest: Sequence[list[str]]) -> bool:
    """True if the first line of a table of one column is its name: a word, where the others are longer texts."""
    name = first[0].strip().lower()
    if name in TEXT_NAMES:
        return True
    longer = statistics.median(len(row[0]) for row in rest if row) if any(rest) else 0
    return bool(re.fullmatch(r"[^\W\d][\w-]{0,30}", name)) and longer > 3 * len(name)


def choose_column(
    file: Path | str, names: Sequence[str], texts: Sequence[str], wanted: str | None, lengths: dict[str, float]
) -> str:
    """The column with the documents: see `choose_name`.

    Raises:
        NotReadError: the columns are those of conversations.
        ValueError: there is none, or it is not clear which; names them.
    """
    low = [name.strip().lower() for name in names]
    if wanted is None and is_chat(dict.fromkeys([*names, *low])) and "text" not in low:
        raise NotReadError(CHATS)  # of these only the questions, or the answers, would be learned
    name = choose_name(texts, lengths, wanted)
    if name is not None:
        return name
    if wanted is not None:
        raise ValueError(f"{file} has no column of text {wanted!r} (it has: {', '.join(names)})")
    if not texts:
        raise ValueError(f"{file} has no column of text, only others ({', '.join(names)}): save the texts as strings")
    raise ValueError(
        f"{file} has no column 'text' (it has: {', '.join(names)}): say which one with TEXT_COLUMN or --text_column"
    )


def read_parquet(
    file: Path, wanted: str | None, found: Callable[[str], None], decode: Callable[[bytes], str]
) -> Iterator[tuple[float, str]]:
    """(share of the file that is read, text) of each row of a parquet file.

    Args:
        file: where it is.
        wanted: the column, if the user named one.
        found: told the column that was chosen.
        decode: bytes to text; Arrow does not check that a text is UTF-8.
    """
    with open_parquet(file) as parquet:
        schema, done, total = parquet.schema_arrow, 0, max(1, parquet.metadata.num_rows)
        texts = [name for name in schema.names if is_text(schema.field(name).type)]
        lengths: dict[str, float] = {}
        if len(texts) > 1:
            for head in itertools.islice(parquet.iter_batches(BLOCK_ROWS, columns=texts), 1):
                lengths = {name: float(sum(len(v or b"") for v in as_binary(head.column(name)))) for name in texts}
        name = choose_column(file, schema.names, texts, wanted, lengths)
        found(f"column {name!r}")
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=[name]):
            for value in as_binary(batch.column(0)):
                done += 1
                yield done / total, decode(value or b"")


def read_arrow(
    file: Path, wanted: str | None, found: Callable[[str], None], decode: Callable[[bytes], str]
) -> Iterator[tuple[float, str]]:
    """The same of an Arrow or Feather file, such as those that `datasets` saves."""
    with pa.memory_map(str(file)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:  # the streaming form, which `datasets` writes
            source.seek(0)
            try:
                reader = batches = pa.ipc.open_stream(source)
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{file} is damaged or cut off ({error}): get it again") from None
        schema = reader.schema
        texts = [name for name in schema.names if is_text(schema.field(name).type)]
        name = choose_column(file, schema.names, texts, wanted, {})
        found(f"column {name!r}")
        try:
            for batch in batches:
                for value in as_binary(batch.column(batch.schema.names.index(name))):
                    yield 0.0, decode(value or b"")
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file} is damaged or cut off ({error}): get it again") from None


def as_binary(values: pa.Array) -> list[bytes | None]:
    """The strings of an array as bytes."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(pa.large_string())
    return values.cast(pa.large_binary()).to_pylist()
