"""JSON values out of a file one after the other, whatever its layout; memory holds one value, not the file.

Read are JSON lines, an array of records, an object that has its records in an array ({"data": [...]}), and
pretty-printed values one after the other. An array or object that is itself one record stays whole.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

BLOCK = 1 << 20
LONGEST_FIRST_LINE = 16 << 20  # a file whose first line is longer is one value in one line
LONGEST_VALUE = 256 << 20  # characters; what is longer is no record
NEAR_END = 16  # characters: an error this close to the end of what was read may only be a value that goes on
# Keys of an object under which files keep their records.
RECORD_KEYS = frozenset(
    (
        *("data", "rows", "records", "items", "examples", "samples", "instances", "train", "conversations", "dialogs"),
        *("dialogues", "chats", "threads", "messages", "list"),
    )
)
SPLITS = frozenset(("test", "validation", "valid", "val", "dev", "eval"))  # beside records: kept for judging
# Where tables keep the names of their columns: pandas, ClickHouse (as "meta"), spreadsheets.
COLUMN_KEYS = ("columns", "column_names", "headers", "header", "fields", "meta")
NAMES_OF_TABLES = ("id", "name", "title", "description")
UNDECODED = re.compile("[\udc80-\udcff]")  # what is left of bytes that are not in the file's encoding
COMMENT = re.compile(r"//[^\n]*(?:\n|\Z)|/\*.*?\*/", re.DOTALL)  # no JSON, but people write them between the records
NOT_UTF8 = "not UTF-8: save the file as UTF-8"


class Broken(NamedTuple):
    """Stands for a record that can't be read, or for some that are not to be, which does not matter."""

    reason: str
    matters: bool = True


Placed = tuple[str, Any]  # (place in the file such as "line 3", record or Broken)


def json_records(text: TextIO, is_part: Callable[[Any], bool], keys: frozenset[str] = RECORD_KEYS) -> Iterator[Placed]:
    """The records of a JSON file of any layout, with their places.

    Args:
        text: its characters, bytes that could not be decoded as lone surrogates ("surrogateescape").
        is_part: true of a value that is a part of a record (one message of a conversation): an array of such is one
            record.
        keys: an array under one of these is taken for the records of an object.

    Raises:
        ValueError: an array or object is malformed; names the place. (A bad line of JSON lines becomes a Broken.)
    """
    for place, value in _values(_Values(text, keys), is_part):
        rows = rows_of_table(value)
        if not rows:
            yield place, value
        for number, row in enumerate(rows, 1):
            yield f"{place}, row {number}", row


def _values(values: _Values, is_part: Callable[[Any], bool]) -> Iterator[Placed]:
    if values.is_lines(is_part):
        yield from values.lines()
        return
    number = 0
    try:
        for value in values.records(is_part):
            number += 1
            yield f"item {number}", value
    except RecursionError:
        raise ValueError(f"item {number + 1}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"item {number + 1}: not valid JSON ({error}); is the file cut off?") from None


class _Values:
    """A window that moves over the characters of a file."""

    def __init__(self, text: TextIO, keys: frozenset[str]) -> None:
        self.keys = keys
        self.text, self.window, self.at, self.ended = text, "", 0, False
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on, by as much as there is already, so that a long value costs twice its length at most."""
        if not self.ended:
            block = self.text.read(max(BLOCK, len(self.window) - self.at))
            self.window, self.at, self.ended = self.window[self.at :] + block, 0, not block
        return not self.ended

    def peek(self) -> str:
        """The next character that is neither white space nor in a comment, "" at the end."""
        while True:
            while self.at < len(self.window):
                found = self.window[self.at]
                if found == "/" and self.window[self.at : self.at + 2] in ("/", "//", "/*"):
                    comment = COMMENT.match(self.window, self.at)
                    whole = comment is not None and comment.end() < len(self.window)
                    if not whole and not self.ended and len(self.window) - self.at < LONGEST_VALUE:
                        self.more()  # the comment may go on
                    elif comment is None:
                        return found
                    else:
                        self.at = comment.end()
                elif not found.isspace() and found != "\ufeff":
                    return found
                else:
                    self.at += 1
            if not self.more():
                return ""

    def expect(self, allowed: str) -> str:
        """Take the next character, which must be one of these."""
        found = self.peek()
        if not found or found not in allowed:
            raise ValueError(f"expected {' or '.join(allowed)}, found {found or 'the end'!r}")
        self.at += 1
        return found

    def value(self, keep: bool = False) -> Any:
        """Take the next value, or only look at it."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.window, self.at)
                if end < len(self.window) or not self.more():  # a number may go on
                    break
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self.window) - NEAR_END
                if not unfinished or len(self.window) - self.at > LONGEST_VALUE or not self.more():
                    raise ValueError(error.msg) from None
        if UNDECODED.search(self.window, self.at, end):
            raise ValueError(NOT_UTF8)
        if not keep:
            self.at = end
        return value

    def is_lines(self, is_part: Callable[[Any], bool]) -> bool:
        """True if every line is a value, as far as the first line and what follows it can tell."""
        start = self.peek()
        while "\n" not in self.window and len(self.window) < LONGEST_FIRST_LINE and self.more():
            pass
        line, _, rest = self.window[self.at :].partition("\n")
        if start == "[" and self._first_element_is_record(is_part):
            return False
        try:
            json.loads(line)
        except RecursionError:
            return True
        except json.JSONDecodeError as error:
            after = line[error.pos :].strip()
            if error.msg == "Extra data" and (after == "," or after[0] in "{["):
                return False  # values one after the other, however they are laid out
            # A value that goes on in the next line; any other error is only that of one line.
            goes_on = error.msg.startswith("Unterminated") or error.pos >= len(line.rstrip()) - 1
            return not (goes_on and start in "[{" and (rest.strip() or not self.ended))
        return bool(rest.strip()) or start != "{"

    def _first_element_is_record(self, is_part: Callable[[Any], bool]) -> bool:
        self.at += 1
        try:
            return self.peek() not in ("", "]") and not is_part(self.value(keep=True))
        except (ValueError, RecursionError):
            return False
        finally:
            self.window, self.at = "[" + self.window[self.at :], 0  # `more` may have dropped the bracket

    def lines(self) -> Iterator[Placed]:
        """The value of each line."""
        number = self.window.count("\n", 0, self.at)
        *whole, last = self.window[self.at :].split("\n")
        self.window, self.at = "", 0
        started = [*whole, last + self.text.readline(LONGEST_VALUE)]
        for line in itertools.chain(started, iter(lambda: self.text.readline(LONGEST_VALUE), "")):
            number += 1
            if not line.isspace() and line:
                yield f"line {number}", _parse(line)

    def records(self, is_part: Callable[[Any], bool]) -> Iterator[Any]:
        """The records of every value to the end of the file."""
        while start := self.peek():
            if start == ",":  # lines that somebody cut out of an array
                self.at += 1
            elif start == "[":
                self.at += 1
                if self.peek() != "]" and is_part(self.value(keep=True)):
                    yield list(self.elements())
                else:
                    yield from self.elements()
            elif start == "{":
                yield from self.members(is_part)
            else:
                yield self.value()

    def elements(self) -> Iterator[Any]:
        """The elements of the array whose bracket was taken."""
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.expect(",]") == "]":
                return
            if self.peek() == "]":  # a comma too many
                self.at += 1
                return

    def members(self, is_part: Callable[[Any], bool]) -> Iterator[Any]:
        """The records in the next object: those in an array of it, else the object."""
        self.expect("{")
        whole: dict[str, Any] = {}
        nameless: list[Any] = []  # rows of a table whose columns may be named behind them
        found = False
        while self.peek() != "}":
            if self.peek() != '"':
                raise ValueError(f"expected a key, found {self.peek() or 'the end'!r}")
            key = self.value()
            self.expect(":")
            if key in self.keys and self.peek() == "[":
                self.at += 1
                if self.peek() in "{[" and not is_part(first := self.value(keep=True)):
                    found = True
                    if isinstance(first, list) and not _columns_of(whole) and not all(map(_is_object, first)):
                        nameless += self.elements()
                    else:
                        yield from with_names(_columns_of(whole), self.elements())
                else:
                    whole[key] = list(self.elements())
            else:
                whole[key] = self.value()
            if self.peek() != "}":
                self.expect(",")
        self.at += 1
        yield from with_names(_columns_of(whole), nameless)
        if not found:
            yield whole
            return
        rest = {key: len(v) for key, v in sorted(whole.items()) if key in SPLITS and _has_records(v)}
        if rest:
            names = ", ".join(map(repr, rest))
            yield Broken(f"{sum(rest.values()):,} records under {names}", matters=False)


def _has_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, (dict, list)) for item in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _columns_of(table: dict[str, Any]) -> list[str]:
    """The names of the columns of a table whose rows are arrays; none if they stand nowhere."""
    columns: list[Any] = next((table[key] for key in COLUMN_KEYS if isinstance(table.get(key), list)), [])
    return [str(column.get("name", column) if isinstance(column, dict) else column) for column in columns]


def with_names(names: Sequence[str], rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of a table with the names of its columns; as they are if it has none, or they are objects."""
    for row in rows:
        if not names or not isinstance(row, list):
            yield row
        elif len(row) == len(names):
            yield dict(zip(names, row, strict=True))
        else:
            yield Broken(f"{len(row)} values, but the table has {len(names)} columns")


def rows_of_table(record: Any) -> list[Any]:
    """The rows of a table that is one object, as pandas' to_json writes it; empty if it is none.

    By columns ({"text": {"0": "a", "1": "b"}}), by index ({"0": {"text": "a"}, "1": {"text": "b"}}), or split
    ({"columns": ["text"], "data": [["a"], ["b"]]}). A row with too few or too many values is a Broken.
    """
    if not isinstance(record, dict) or not record:
        return []
    rows, columns = record.get("data", record.get("rows")), _columns_of(record)
    # A table that a question stands beside is what the question is about.
    alone = not any(isinstance(value, str) and key not in NAMES_OF_TABLES for key, value in record.items())
    if columns and alone and isinstance(rows, list) and all(isinstance(row, list) for row in rows):
        return list(with_names(columns, rows))
    values = list(record.values())
    if not all(map(_is_object, values)):
        return []
    if all(key.isdecimal() for key in record):
        return values
    if all(key.isdecimal() for key in values[0]) and all(value.keys() == values[0].keys() for value in values):
        return [{name: column[number] for name, column in record.items()} for number in values[0]]
    return []


def rows_of_lists(record: dict[str, Any]) -> list[Any]:
    """The rows of a table that is an object of lists ({"text": ["a", "b"], "label": [0, 1]}); empty if it is none."""
    columns = list(record.values())
    plain = all(isinstance(c, list) and not any(isinstance(v, (dict, list)) for v in c) for c in columns)
    # One list alone may be the paragraphs of one text, or the turns of a conversation.
    if len(columns) < 2 or not plain or len({len(c) for c in columns}) > 1:
        return []
    return [dict(zip(record, row, strict=True)) for row in zip(*columns, strict=True)]


def _parse(line: str) -> Any:
    if UNDECODED.search(line):
        return Broken(NOT_UTF8)
    line = line.removeprefix("\ufeff")
    try:
        return json.loads(line)
    except RecursionError:
        return Broken("nested too deeply")
    except ValueError as error:
        if line.startswith(("{'", "[{'")):  # how Python prints a dict
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return ast.literal_eval(line.strip())
        return Broken(f"not valid JSON ({error})")
