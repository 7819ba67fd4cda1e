"""Records out of whatever holds them: JSON of any layout, tables, parquet, Arrow, text; packed, in folders, on the hub.

What a file is, is seen from its first bytes; its name is asked only where these say nothing (a table, or a text).
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, TextIO, cast

import pyarrow as pa
import yaml

from nanochat.data.charset import Repairs, Utf8Stream
from nanochat.data.chat_forms import (
    ANSWER_KEYS,
    ASKED_KEYS,
    SYSTEM_KEYS,
    NotAConversation,
    is_message,
    read_chat_record,
)
from nanochat.data.chat_logs import read_entries
from nanochat.data.corpus import open_parquet
from nanochat.data.inventory import Inventory, NotReadError
from nanochat.data.json_stream import Broken, Placed, json_records, rows_of_lists, with_names
from nanochat.data.json_text import is_chat, records_within
from nanochat.data.packed import LINK_INSIDE, damage_named, is_archive, members, unpacked, what_it_is
from nanochat.data.tables import LONGEST_FIELD, SAMPLE_LINES, detect_dialect
from nanochat.data.text_walk import CODE, CONVERT, NO_TEXT, UNFINISHED, files_below, left_out_below

if sys.version_info >= (3, 11):
    import tomllib

PARSED = frozenset((".yaml", ".yml", ".toml"))
MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ\x00": ".xz", b"BZh": ".bz2"}
TABLES = (".csv", ".tsv", ".tab", ".psv")
ARROW_STREAM = b"\xff\xff\xff\xff"
# Parts of a data set that are kept for measuring: not learned where there are others.
KEPT_BACK = re.compile(r"(test|val|valid|validation|eval|dev)([-_.].*)?", re.IGNORECASE)
KEPT_BACK_REASON = "kept for measuring, by its name (give the file itself to learn it)"
PAGES = (".html", ".htm", ".pdf")
NO_CHATS = (NO_TEXT | CODE | UNFINISHED | {*PAGES, ".md"}) - {".yaml", ".yml", ".toml"}
AS_PAGE = " that can be read (export the chat as JSON or text)"
# A conversation is an object or an array of messages; "[05.01.24, 21:03:11] Ann: hi" is a line of a chat's export.
JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{|\[\s*(?:[\[{"\]]|\Z))')
MALFORMED = (AttributeError, TypeError, KeyError, IndexError, RecursionError)  # a record that breaks its form's rules
HUB = "hf:"  # hf:owner/name, hf:owner/name@split, hf:owner/name:config@split
CHATS_VERSION = 6  # raise it when the same files would give other conversations: what was learned of them is outdated
BATCH = 256  # rows of parquet or Arrow in memory

Content = tuple[str, IO[bytes], Path | None]  # (name for people, bytes, where it lies if it is a plain file)


def open_contents(path: Path, inventory: Inventory) -> Iterator[Content]:
    """The files that may hold conversations: the file itself, those of an archive, or those of a folder, one by one.

    What is in a folder or archive and can't be such a file is noted in the inventory.

    Raises:
        ValueError: a packed file is damaged; names it.
    """
    if (path / "dataset_dict.json").is_file():  # what `datasets` saves: a folder for each split
        names = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        for name in _learned(names, inventory, "split"):
            yield from open_contents(path / name, inventory)
    elif (path / "state.json").is_file():
        for file in sorted(path.glob("data-*.arrow")):
            yield from _open_file(file, file.name, inventory)
    elif path.is_dir():
        files = {file.shown: file.path for file in files_below(path, inventory, unread=is_unread)}
        for name in _learned(list(files), inventory, "file"):
            yield from _open_file(Path(files[name]), name, inventory)
    else:
        yield from _open_file(path, str(path), inventory)


def is_unread(path: str) -> bool:
    """True of a file in a folder from which nothing may be learned, by its name: no conversation, or kept apart."""
    return _is_no_chat(path) or KEPT_BACK.fullmatch(PurePosixPath(path).name) is not None


def _is_no_chat(name: str) -> bool:
    """True of a file that can't be a conversation, by its name; chat.md is an export of Signal."""
    file = PurePosixPath(name.lower())
    return file.suffix in NO_CHATS and file.name != "chat.md"


def _learned(names: list[str], inventory: Inventory, kind: str) -> list[str]:
    """Without what is hidden, can't be a conversation, or is kept for measuring."""
    wanted = []
    for name in names:
        if reason := left_out_below(name):
            inventory.leave_out(reason, kind, name, matters=False)
        elif _is_no_chat(name):
            suffix = PurePosixPath(name).suffix.lower()
            reason = f"no conversations{AS_PAGE if suffix in PAGES else ''}"
            unfinished = suffix in UNFINISHED
            inventory.leave_out(CONVERT[suffix] if unfinished else reason, suffix, name, matters=unfinished)
        else:
            wanted.append(name)
    kept = [name for name in wanted if KEPT_BACK.fullmatch(PurePosixPath(name).name)]
    for name in kept if len(kept) < len(wanted) else ():
        inventory.leave_out(KEPT_BACK_REASON, kind, name, matters=False)
    return [name for name in wanted if name not in kept] or wanted


def _open_file(path: Path, shown: str, inventory: Inventory) -> Iterator[Content]:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        inventory.leave_out((error.strerror or str(error)).lower(), "file", shown)
        return
    with file:
        if not is_archive(path.name):
            yield shown, file, path
            return
    found = [(name, content is None) for name, _, content in members(path)]
    for name in (name for name, is_link in found if is_link):
        inventory.leave_out(LINK_INSIDE, "file", name, matters=False)
    wanted = set(_learned([name for name, is_link in found if not is_link], inventory, "file"))
    for name, _, content in members(path):
        if content is not None and name in wanted:
            yield f"{shown}/{name}", content, None


def file_records(
    content: Content,
    encoding: str | None,
    repairs: Repairs,
    note: Callable[[str], None],
    columns: tuple[str, str] | None = None,
) -> Iterator[Placed]:
    """The records of a file with their places; of a text, one record {"text": ..., "name": ...}.

    Args:
        content: the file.
        encoding: what it is in, if the user said so.
        repairs: counts the characters that are replaced.
        note: told what was found out about it.
        columns: of question and answer, if the user said so; by number, then a text may be a table without a header.

    Raises:
        NotReadError: it is of no kind that can be read.
        ValueError: it is damaged; names the file and the place.
    """
    name, raw, path = content
    with damage_named(name):
        stream, packed = _unpacked(raw)
        head = stream.peek(64)[:64]
        if PurePosixPath(name.lower()).suffix in PAGES:
            raise NotReadError(f"a page, no conversations{AS_PAGE}")
        if not head.startswith(b"PAR1") and (other := what_it_is(head)):
            raise NotReadError(f"{other} by its content (save it as JSON or CSV, or unpack it)")
        if head.startswith(b"PAR1") or name.lower().endswith(".parquet"):
            yield from _parquet_rows(path if path is not None and not packed else io.BytesIO(stream.read()))
        elif head.startswith((b"ARROW1", ARROW_STREAM)):
            yield from _arrow_rows(stream, is_file=head.startswith(b"ARROW1"))
        else:

            def found(code: str, guessed: bool) -> None:
                note(f"{name}: read as {code}" + (", guessed (ENCODING=... says another)" if guessed else ""))

            utf8 = io.BufferedReader(Utf8Stream(stream, repairs, encoding, found=found))
            try:
                yield from _text_records(name, cast("io.BufferedReader", utf8), note, columns)
            except NotReadError:
                raise
            except ValueError as error:
                raise ValueError(f"{name}, {error}") from None


def _unpacked(raw: IO[bytes]) -> tuple[io.BufferedReader, bool]:
    """(the bytes of a file without its packing, whether it had one)."""
    stream = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast("Any", raw))
    packed = False
    while suffix := next((s for magic, s in MAGIC.items() if stream.peek(8).startswith(magic)), None):
        stream, packed = io.BufferedReader(cast("Any", unpacked(stream, suffix))), True
    return stream, packed


def _text_records(
    name: str, utf8: io.BufferedReader, note: Callable[[str], None], columns: tuple[str, str] | None
) -> Iterator[Placed]:
    is_json = JSON_START.match(utf8.peek(1 << 10)) is not None
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    by_number = columns is not None and all(column.isdecimal() for column in columns)
    is_table = any(suffix in TABLES for suffix in suffixes) or (
        not is_json and (by_number or _has_header(utf8.peek(1 << 10)))
    )
    text = io.TextIOWrapper(utf8, "utf-8-sig", errors="replace", newline="" if is_table else None)
    if is_table:
        yield from _table_rows(text, lambda what: note(f"{name}: {what}"), by_number)
    elif PARSED.intersection(suffixes):
        values = _parsed(text, suffixes)
        for number, value in enumerate(values, 1):
            for place, record in _json_rows(io.StringIO(json.dumps(value, default=str)), name, note):
                yield f"document {number}, {place}" if len(values) > 1 else place, record
    elif is_json or ".json" in suffixes or ".jsonl" in suffixes:
        yield from _json_rows(text, name, note)
    else:
        yield "the text", {"text": text.read(), "name": name}


def _json_rows(text: TextIO, name: str, note: Callable[[str], None]) -> Iterator[Placed]:
    """The records of a JSON file; what of it is not meant to be learned is noted."""
    for place, record in _with_header(json_records(text, _is_turn)):
        if isinstance(record, Broken) and not record.matters:
            note(f"{name}: {record.reason}, not read")
        else:
            yield place, record


def _with_header(records: Iterator[Placed]) -> Iterator[Placed]:
    """Rows that are arrays, with the names in the first if it names question and answer; other records as they are.

    A file that is one object gives the rows of its lists, or the conversations somewhere in it.
    """
    names: list[str] = []
    start = list(itertools.islice(records, 2))
    if len(start) == 1 and isinstance(whole := start[0][1], dict) and "intents" not in whole:
        rows = rows_of_lists(whole) if _names_question_and_answer(list(whole)) else _conversations_within(whole)
        if rows and all(is_chat(row) and not is_message(row) for row in rows):
            start = [(f"row {i}", row) for i, row in enumerate(rows, 1)]
    for number, (place, record) in enumerate(itertools.chain(start, records)):
        is_row = number == 0 and isinstance(record, list) and all(isinstance(name, str) for name in record)
        if is_row and _names_question_and_answer(record):
            names = record
        else:
            yield from ((place, row) for row in with_names(names, [record]))


def _conversations_within(whole: dict[str, Any]) -> list[Any]:
    """The records somewhere in an object that is itself none, and says nothing to all of them."""
    if whole.keys() & set(SYSTEM_KEYS):
        return []
    with contextlib.suppress(ValueError, RecursionError):
        try:
            read_chat_record(whole, None)
        except NotAConversation:
            return records_within(whole, None)
    return []


def _is_turn(value: Any) -> bool:
    """True of a message of a conversation with a model: an array of them is one record. Those of people are many."""
    try:
        return is_message(value) and read_entries(value) is None
    except MALFORMED:
        return True  # whoever reads the array says what is wrong, and where


def _parsed(text: TextIO, suffixes: list[str]) -> list[Any]:
    """What a file of YAML or TOML holds; in YAML "---" may stand between several values, and after the last."""
    try:
        if ".toml" not in suffixes:
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            rules = {
                first: [(tag, pattern) for tag, pattern in found if tag.endswith((":null", ":merge"))]
                for first, found in loader.yaml_implicit_resolvers.items()
            }  # "no", 12:30 and 01234 stay as they are written
            values = yaml.load_all(text, type("AsWritten", (loader,), {"yaml_implicit_resolvers": rules}))
            return [value for value in values if value is not None]
        if sys.version_info >= (3, 11):
            return [tomllib.loads(text.read())]
        raise NotReadError("TOML (save it as JSON or YAML; Python 3.11 reads TOML)")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, NotReadError):
            raise
        raise ValueError(
            f"not valid {'TOML' if '.toml' in suffixes else 'YAML'} ({' '.join(str(error).split())})"
        ) from None


def _has_header(head: bytes) -> bool:
    """True if the first line names a question and an answer: then a text is a table, as spreadsheets save one."""
    line = head.splitlines()[0].decode("utf-8", "replace") if head else ""
    separator = max("\t;,|", key=line.count)
    return _names_question_and_answer(line.split(separator))


def _names_question_and_answer(header: list[str]) -> bool:
    names = {name.strip(' "\ufeff').lower() for name in header}
    return len(names) > 1 and not names.isdisjoint(ASKED_KEYS) and not names.isdisjoint(ANSWER_KEYS)


_ANKI_SETTING = re.compile(r"#(separator|html|tags|columns|notetype|deck|guid)\b.*:")


def _table_rows(text: io.TextIOWrapper, note: Callable[[str], None], by_number: bool) -> Iterator[Placed]:
    csv.field_size_limit(LONGEST_FIELD)
    head = list(itertools.islice(text, SAMPLE_LINES))
    skipped = 0
    while by_number and head and _ANKI_SETTING.match(head[0]):
        del head[0]
        skipped += 1
    if not head:
        return
    dialect = detect_dialect(head, None, len(head) < SAMPLE_LINES)
    if head[0].lower().startswith("sep="):  # Excel's way to say what is between the fields
        del head[0]
        skipped += 1
    rows: Any = dialect.rows(itertools.chain(head, text))
    first: list[str] = next(rows, [])
    header = [str(i) for i in range(1, len(first) + 1)] if by_number else [name.strip() for name in first]
    if by_number:
        yield f"line {skipped + 1}", dict(zip(header, first, strict=True))
    is_index = header[:1] == [""]  # as pandas and R write one
    if is_index:
        note("the first column has no name: taken for an index, not learned")
    try:
        for row in rows:
            if len(row) == len(header):
                fields = zip(header[is_index:], row[is_index:], strict=True)
                yield f"line {skipped + rows.line_num}", dict(fields)
            elif row:
                where = f"line {skipped + rows.line_num}"
                yield where, Broken(f"{len(row)} fields, but the first line has {len(header)}")
    except csv.Error as error:
        raise ValueError(f"line {skipped + rows.line_num}: not a table that can be read surely ({error})") from None


def _parquet_rows(source: Any) -> Iterator[Placed]:
    with open_parquet(source) as file:
        names = [name for name in file.schema_arrow.names if not pa.types.is_binary(file.schema_arrow.field(name).type)]
        yield from _number(file.iter_batches(BATCH, columns=names))


def _arrow_rows(stream: io.BufferedReader, is_file: bool) -> Iterator[Placed]:
    if is_file:
        reader = pa.ipc.open_file(stream if stream.seekable() else io.BytesIO(stream.read()))
        yield from _number(reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from _number(pa.ipc.open_stream(stream))


def hub_records(name: str) -> Iterator[Placed]:
    """The rows of a data set of the Hugging Face hub, "hf:owner/name"; of its training split, unless the name says one.

    Raises:
        ValueError: it can't be had; says why and what to do.
    """
    import datasets  # lazy: slow to import

    repository, _, split = name.removeprefix(HUB).partition("@")
    repository, _, config = repository.partition(":")
    try:
        splits = datasets.get_dataset_split_names(repository, config or None)
        chosen = split or next((s for s in ("train", *splits) if s in splits and s.startswith("train")), splits[0])
        rows = datasets.load_dataset(repository, config or None, split=chosen)
    except Exception as error:  # the hub client raises many kinds: no network, no such data set, gated, no such split
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} can't be loaded from the Hugging Face hub ({reason:.300}): check the name and the network, or "
            "download it and give the folder"
        ) from error
    for number, row in enumerate(rows):
        yield f"row {number}", row


def _number(batches: Iterable[pa.RecordBatch]) -> Iterator[Placed]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            for record in batch.slice(start, BATCH).to_pylist():
                yield f"row {row}", record
                row += 1
