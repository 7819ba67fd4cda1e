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
from collections.abc import Callable, Iterator
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
UNDECODED = re.compile("[\udc80-\udcff]")  # what is left of bytes that are not in the file's encoding
COMMENT = re.compile(r"//[^\n]*(?:\n|\Z)|/\*.*?\*/", re.DOTALL)  # no JSON, but people write them between the records
NOT_UTF8 = "not UTF-8: save the file as UTF-8"


class Broken(NamedTuple):
    """Stands for a record that can't be read."""

    reason: str


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
    values = _Values(text, keys)
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
        found = False
        while self.peek() != "}":
            if self.peek() != '"':
                raise ValueError(f"expected a key, found {self.peek() or 'the end'!r}")
            key = self.value()
            self.expect(":")
            if key in self.keys and self.peek() == "[":
                self.at += 1
                if self.peek() in "{[" and not is_part(self.value(keep=True)):
                    found = True
                    yield from _with_names(whole.get("columns"), self.elements())
                else:
                    whole[key] = list(self.elements())
            else:
                whole[key] = self.value()
            if self.peek() != "}":
                self.expect(",")
        self.at += 1
        if not found:
            yield whole


def _with_names(columns: Any, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows of a table whose columns' names stand before it, with them; others as they are."""
    for row in rows:
        is_row = isinstance(columns, list) and isinstance(row, list) and len(row) == len(columns)
        yield dict(zip(map(str, columns), row, strict=True)) if is_row else row


def rows_of_table(record: Any) -> list[dict[str, Any]]:
    """The rows of a table that is one object, as pandas' to_json writes it; empty if it is none.

    By columns ({"text": {"0": "a", "1": "b"}}), by index ({"0": {"text": "a"}, "1": {"text": "b"}}), or split
    ({"columns": ["text"], "data": [["a"], ["b"]]}).
    """
    if not isinstance(record, dict) or not record:
        return []
    if isinstance(record.get("columns"), list) and isinstance(record.get("data"), list):
        rows = list(_with_names(record["columns"], iter(record["data"])))
        return rows if all(isinstance(row, dict) for row in rows) else []
    values = list(record.values())
    if not all(isinstance(value, dict) and value for value in values):
        return []
    if all(key.isdecimal() for key in record):
        return values
    if all(key.isdecimal() for key in values[0]) and all(value.keys() == values[0].keys() for value in values):
        return [{name: column[number] for name, column in record.items()} for number in values[0]]
    return []


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
