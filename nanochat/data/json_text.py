"""Documents out of JSON: one value per line, or one value for the whole file, however long its lines are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from nanochat.data.inventory import NotReadError
from nanochat.data.json_stream import LONGEST_VALUE, Broken, Placed, json_records, rows_of_lists, rows_of_table

SAMPLE_RECORDS = 100  # looked at before the field is chosen
TRIED = 1000  # records without text: if half of all are such, the others are not even read
MISSING = object()
# Fields that hold the text, by name, in this order.
TEXT_NAMES = (
    *("text", "content", "body", "document", "article", "story", "passage", "raw_content", "page_content", "markdown"),
    *("full_text", "plain_text", "message", "paragraph", "sentence", "abstract", "review", "tweet", "post", "lyrics"),
)
# A record with one of these sets of fields is a conversation, and no text: who speaks would not be learned.
CHAT_NAMES = (
    *(
        {"messages"},
        {"conversations"},
        {"conversation"},
        {"dialog"},
        {"dialogue"},
        {"role", "content"},
        {"from", "value"},
    ),
    *({"instruction", "output"}, {"instruction", "response"}, {"prompt", "completion"}, {"prompt", "response"}),
    *({"prompt", "chosen"}, {"chosen", "rejected"}, {"question", "answer"}, {"instruction", "generation"}),
    *({"mapping", "current_node"}, {"chat_messages"}, {"internal", "visible"}, {"mes", "is_user"}),
    *({"versions", "currentlySelected"}, {"patterns", "responses"}, {"author", "candidates"}),
)
CHATS = "conversations, not texts (give them as CHAT_DATA)"
LONGEST_NOTE = 200  # characters beside the records of a file, such as a status or a date
LEAST_SHARE = 0.2  # of a record must be the text, where its name does not say that it is
CLEARLY_LONGER = 3  # times the next longest field: then it is the one with the text


def choose_name(names: Sequence[str], lengths: Mapping[str, float], wanted: str | None) -> str | None:
    """The field or column with the text: `wanted`, one that is named so, the only one, or by far the longest; or None.

    Args:
        names: the fields that hold text, in their order.
        lengths: their mean number of characters, where known.
        wanted: what the user said.
    """
    if wanted is not None:
        return wanted if wanted in names else None
    lower = {name.strip().lower(): name for name in reversed(names)}
    if named := next((lower[name] for name in TEXT_NAMES if name in lower), None):
        return named
    if len(names) == 1:
        return names[0]
    longest = sorted(names, key=lambda name: -lengths.get(name, 0.0))
    if len(names) > 1 and lengths.get(longest[0], 0.0) > CLEARLY_LONGER * max(1.0, lengths.get(longest[1], 0.0)):
        return longest[0]
    return None


Found = Callable[[str], None]
Lacking = Callable[[str, int, str], None]


def read_json_lines(
    file: Path | str, lines: TextIO, wanted: str | None, found: Found, lacking: Lacking
) -> Iterator[str]:
    """A document per line: a string, or an object with the text in a field.

    Args:
        file: its name for messages.
        lines: its characters.
        wanted: the field, if the user named one.
        found: told the field that was chosen.
        lacking: told what records without text in it are left out, how many, and where the first is.

    Raises:
        ValueError: a line is no JSON, or half of them have no text; names the first.
    """
    return _texts_of(file, _lines(file, lines), wanted, found, lacking)


def read_json_file(
    file: Path | str, lines: TextIO, wanted: str | None, found: Found, lacking: Lacking
) -> Iterator[str]:
    """The documents of a .json file: an array or an object with texts in it, or JSON lines under another name.

    Raises:
        ValueError: it is not JSON, or half of its records have no text; names the place.
        NotReadError: it holds no text, or conversations.
    """
    values = _values(file, lines)
    first = list(itertools.islice(values, 2))
    try:
        inner = records_within(first[0][1], wanted) if len(first) == 1 and isinstance(first[0][1], dict) else []
    except RecursionError:
        raise NotReadError("nested too deeply") from None
    if inner:
        return _texts_of(
            file, ((f"item {i}", record) for i, record in enumerate(inner, 1)), wanted, found, lacking, strict=False
        )
    return _texts_of(file, itertools.chain(first, values), wanted, found, lacking, strict=False)


def _lines(file: Path | str, lines: TextIO) -> Iterator[Placed]:
    number = 0
    while line := lines.readline(LONGEST_VALUE):
        number += 1
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error}; mend or remove it)") from None


def _values(file: Path | str, lines: TextIO) -> Iterator[Placed]:
    """(place, value) of each item of an array, or of each value where several follow each other."""
    try:
        for place, value in json_records(lines, lambda value: False, frozenset()):
            if isinstance(value, Broken):
                raise ValueError(f"{place}: {value.reason}")
            yield place, value
    except ValueError as error:
        raise ValueError(f"{file}, {error}") from None


def _texts_of(
    file: Path | str,
    records: Iterator[tuple[str, Any]],
    wanted: str | None,
    found: Found,
    lacking: Lacking,
    strict: bool = True,
) -> Iterator[str]:
    head = list(itertools.islice(records, SAMPLE_RECORDS))
    inside = [r[0] for _, r in head if isinstance(r, list) and r and isinstance(r[0], dict)]
    if inside and all(map(is_chat, inside)):
        raise NotReadError(CHATS)
    name = _choose_field(file, [record for _, record in head if isinstance(record, dict)], wanted, strict)
    if name is not None:
        found(name)
    lacks, number, first = 0, 0, ("", "")  # records without text, all, and the first of them
    for number, (place, record) in enumerate(itertools.chain(head, records), 1):
        text = record.get(name, MISSING) if isinstance(record, dict) and name is not None else record
        if text is MISSING and name is not None and name == wanted and (deep := list(_within(record, name))):
            yield from deep
            continue
        if isinstance(text, list) and text and all(isinstance(part, str) for part in text):
            text = "\n\n".join(text)  # paragraphs
        if text is None:
            yield ""  # counts as blank, as a null in parquet does
        elif isinstance(text, str):
            yield text
        else:
            lacks, first = lacks + 1, (first if lacks else (place, _expected(name, record)))
            if (strict or name is not None) and lacks >= TRIED and 2 * lacks >= number:
                break
    # In a folder a .json file with a few such records, or without any text, stops nothing: it may be no text at all.
    if lacks and 2 * lacks >= number and (strict or (name is not None and lacks >= TRIED)):
        others = f"; {lacks:,} of {number:,} records have none" if lacks > 1 else ""
        raise ValueError(f"{file}, {first[0]}: {first[1]}{others}")
    if lacks:
        lacking(f"records without text{f' in {name!r}' if name else ''}, left out", lacks, first[0])


def records_within(record: dict[str, Any], wanted: str | None) -> list[Any]:
    """The records that an object is about: the only list of objects or table in it, however deep, if no text is beside.

    Empty if there is none, or more than one.
    """
    if rows := rows_of_lists(record):
        return rows
    if is_chat(record) or any(isinstance(record.get(name), str) for name in (*TEXT_NAMES, wanted) if name):
        return []
    if wanted in record:
        return []
    values = record.values()
    tables = [v for v in values if isinstance(v, list) and v and all(isinstance(i, dict) for i in v)]
    # What is said beside an object may be the text, and what is in the object only about it.
    lists = [part for v in values if isinstance(v, list) for part in v if isinstance(part, str)]
    beside = sum(len(text) for text in (*lists, *(v for v in values if isinstance(v, str))))
    objects = [v for v in values if isinstance(v, dict) and v and beside <= LONGEST_NOTE]
    tables += [rows for v in objects if (rows := rows_of_table(v) or records_within(v, wanted))]
    return tables[0] if len(tables) == 1 else []


def _within(value: Any, name: str) -> Iterator[str]:
    """Every text in a field of that name, at any depth of a record."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key == name and isinstance(inner, str):
            yield inner
        elif isinstance(inner, (dict, list)):
            yield from _within(inner, name)


def is_chat(record: dict[str, Any]) -> bool:
    """True if an object is a conversation, or a message of one."""
    return any(names <= record.keys() for names in CHAT_NAMES)


def _choose_field(file: Path | str, records: list[dict[str, Any]], wanted: str | None, strict: bool) -> str | None:
    if not records:
        return None
    lengths: dict[str, float] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
                lengths[key] = lengths.get(key, 0.0) + len("".join(map(str, value)))
    name = choose_name(list(lengths), {key: total / len(records) for key, total in lengths.items()}, wanted)
    if wanted is None and all(map(is_chat, records)) and not any("text" in record for record in records):
        raise NotReadError(CHATS)
    if name is not None and wanted is None and name.strip().lower() not in TEXT_NAMES:
        # A word beside data, such as "type" or "status", is no text only because it is the only one.
        whole = sum(len(json.dumps(record, ensure_ascii=False, default=str)) for record in records)
        name = name if lengths[name] >= LEAST_SHARE * whole else None
    if name is None and wanted is not None and any(wanted in r or any(_within(r, wanted)) for r in records):
        return wanted
    if name is None and not strict:
        raise NotReadError("no field that is surely the text (TEXT_COLUMN names it)")
    if name is None:
        raise ValueError(f"{file}, line 1: {_expected(wanted, records[0])}")
    return name


def _expected(name: str | None, record: Any) -> str:
    name = name or "text"
    found = type(record).__name__
    if isinstance(record, dict):
        found = f"an object with {', '.join(map(str, record))}"
        if name in record:
            found = f"a {type(record[name]).__name__} in {name!r}"
    wanted = f'{{"{name}": "..."}}'
    return f"expected {wanted} or a string, found {found:.200} (TEXT_COLUMN or --text_column names the field)"
