"""The conversations that a user gives: found, recognised, brought into one shape, and counted; nothing silently lost.

`look_at_chats` reads everything and says what it found, before anything is trained; `load_chats` does the same and
keeps the conversations, on disk where they are many.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from nanochat.data.charset import Repairs
from nanochat.data.chat_exports import read_mes, unwrapped
from nanochat.data.chat_files import HUB, MALFORMED, Content, file_records, hub_records, open_contents
from nanochat.data.chat_forms import THINKING, UNUSED_KEY, AboutImages, Marked, NotAConversation, read_chat_record
from nanochat.data.chat_logs import (
    NO_TIME,
    NOTHING_SAID,
    LogEntry,
    SignalBackup,
    UnknownPersonError,
    conversations_of_log,
    grow_trees,
    is_tree,
    is_tree_row,
    local_names,
    named,
    read_entries,
    read_row,
    slack_people,
    threads,
)
from nanochat.data.chat_media import is_about_images
from nanochat.data.chat_parts import UnfinishedAnswer
from nanochat.data.chat_people import read_log
from nanochat.data.chat_store import Chats, digest_of
from nanochat.data.chat_templates import questions_apart, read_template, texts_of
from nanochat.data.inventory import Inventory, NotReadError, UnusableInputError, shortened
from nanochat.data.json_stream import Broken, Placed
from nanochat.data.mojibake import mended
from nanochat.data.text_look import SAMPLE_CHARS, SAMPLE_TEXTS, escape_warnings
from nanochat.messages import Conversation, Message, normalise

EMPTY_ANSWER = "an empty answer, which is not learned"
NO_QUESTION = "an empty message of the user: the answer to it is learned"
NO_ANSWER = "without an answer to learn"
ENCODED_TWICE = "a letter that was encoded twice, mended"
PERHAPS_TWICE = "a letter that looks encoded twice (as CafÃ© for Café), among others that do not: left as it is"
MARKED = "marked as not to be learned"
NOBODY_ELSE = "in which nobody else writes"
NO_PICTURES = "about an image, a sound or a file, which the model does not get"
WITHOUT_ID = (
    "a message in a row that names no conversation: such rows are joined into one, until a system message begins the "
    "next (a column conversation_id keeps them apart)"
)
UNREADABLE = "a message in a chat of people that can't be read, left out"
MOST_KEYS = 5  # that are not used are listed one by one
UNUSABLE = "can't be used"
BYTES_PER_TOKEN = 4.0  # about, of English with a vocabulary of some ten thousand
TRIED = 1000  # records; if most of so many are unusable, the others are not even read
SAMPLES = 20
HOW = (
    'give each as {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, or say '
    "which two fields are question and answer with CHAT_COLUMNS=question,answer (CHAT_COLUMNS=1,2 in a table without a "
    "header)"
)
WORDS = ("demo", "nanochat", "none")  # what CHAT_DATA may be beside a source


def is_own_chats(chat_data: str | None) -> TypeGuard[str]:
    """True if a value of CHAT_DATA names conversations of the user."""
    return chat_data is not None and chat_data not in WORDS


@dataclass(frozen=True)
class ChatSource:
    """Where conversations are, and what the user says about them."""

    path: str
    """A file or folder, or hf:owner/name."""
    me: str | None = None
    """In chats between people: whose messages the model learns to write."""
    columns: tuple[str, str] | None = None
    """The fields of question and answer, where their names don't say it."""
    encoding: str | None = None
    """Of every file; None: it is found out."""

    @classmethod
    def from_env(cls, path: str, env: Mapping[str, str] = os.environ) -> ChatSource:
        """With CHAT_ME, CHAT_COLUMNS and ENCODING.

        Raises:
            ValueError: CHAT_COLUMNS does not have two names.
        """
        columns = tuple(name.strip() for name in env.get("CHAT_COLUMNS", "").split(",") if name.strip())
        if columns and len(columns) != 2:
            raise ValueError(
                f"CHAT_COLUMNS={env['CHAT_COLUMNS']}: must be two names, or numbers, of question and answer: q,a"
            )
        return cls(path, env.get("CHAT_ME") or None, columns or None, env.get("ENCODING") or None)  # type: ignore[arg-type]

    def key(self) -> list[Any]:
        """What of it decides about what is learned, beside the files."""
        return [self.me, self.columns, self.encoding]


def load_chats(source: ChatSource) -> tuple[Chats, Inventory]:
    """All conversations of a source, and what was found.

    Raises:
        FileNotFoundError: there is no such file.
        UnusableInputError: they can't be learned from; names the place, what is there and the remedy.
    """
    reader = _Reader(source)
    chats = Chats(reader.conversations())
    reader.finish()
    if reader.inventory.stop:
        raise UnusableInputError(reader.inventory.stop)
    return chats, reader.inventory


def look_at_chats(source: ChatSource) -> Inventory:
    """What is in a source, read to its end; `stop` says why it can't be learned from.

    Raises:
        FileNotFoundError: there is no such file.
    """
    reader = _Reader(source)
    seen: set[int] = set()
    repeated = 0
    try:
        for conversation in reader.conversations():
            number = digest_of(json.dumps(conversation).encode())
            repeated += number in seen
            seen.add(number)
            if len(reader.inventory.samples) < SAMPLES:
                reader.inventory.samples.append(show_learned(conversation))
        if repeated:
            reader.inventory.facts["repeated"] = repeated
        reader.finish()
    except ValueError as error:
        reader.inventory.stop = f"{error}"
    return reader.inventory


def show_learned(conversation: Conversation) -> str:
    """A conversation for people, with « » around what the model learns to write."""
    lines = []
    for message in conversation["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        learned = message["role"] == "assistant" and message.get("weight") != 0
        texts = [f"«{p['text']}»" if learned and p["type"] != "python_output" else f"[{p['text']}]" for p in parts]
        lines.append(f"{message['role']}: " + ("".join(texts) if message["role"] == "assistant" else str(content)))
    return "\n".join(lines)


class _Reader:
    """Reads a source once and fills its inventory."""

    def __init__(self, source: ChatSource) -> None:
        self.source = source
        self.inventory = Inventory(f"conversations in {source.path}", noun="conversation")
        self.notes: Counter[str] = Counter()
        self.turns = self.characters = self.learned = 0
        self.unusable = 0
        self.rejected: list[str] = []
        """Of the file that is read: where, and why."""
        self.first_reason = ""
        self.repairs = Repairs()
        self.beginnings: list[str] = []
        """How the first conversations begin."""
        self.name = ""  # of the file that is read
        self.people: dict[str, str] = {}
        """Names by id, where an export has them in a file of their own."""

    # --- from files to conversations ---------------------------------------------------------------------------------

    def conversations(self) -> Iterator[Conversation]:
        """Each that can be learned from, in the order of the files."""
        if self.source.path.startswith(HUB):
            yield from self._of_records(hub_records(self.source.path), self.source.path)
            self._file_ends(before=0)
            return
        path = Path(self.source.path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no conversations at {path}: there is no such file or folder; {HOW}")
        if not path.is_dir() and not path.is_file():
            raise UnusableInputError(f"CHAT_DATA={path} is no ordinary file; {HOW}")
        self.people = slack_people(path)
        for content in open_contents(path, self.inventory):
            self.name = content[0] if content[0] != str(path) else ""
            before, self.rejected = self.inventory.num_read, []
            try:
                yield from self._of_file(content)
            except NotReadError as error:
                self.rejected.append(str(error))
            self._file_ends(before)

    def _file_ends(self, before: int) -> None:
        """Count what could not be used of a file; `before` it, so many conversations were read."""
        if self.name and self.rejected and self.inventory.num_read == before:
            # A file of something else among others, such as the settings in an export: it is no damage.
            why = self.rejected[0].removeprefix(f"{self.name}, ")  # one reason for all: there may be thousands of files
            self.inventory.leave_out("no conversations in it", "file", f"{self.name}: {why}")
        else:
            self.unusable += len(self.rejected)
            for reason in self.rejected:
                self.inventory.leave_out(UNUSABLE, "record", reason)
        self.first_reason = self.first_reason or next(iter(self.rejected), "")

    def _of_file(self, content: Content) -> Iterator[Conversation]:
        records = file_records(content, self.source.encoding, self.repairs, self._note, self.source.columns)
        yield from self._of_records(records, content[0])

    def _of_records(self, records: Iterable[Placed], name: str) -> Iterator[Conversation]:
        entries: list[LogEntry] = []
        program = ""
        tree_rows: list[dict[str, Any]] = []
        tavern: list[Message] = []
        thread: tuple[str, list[Message], str] | None = None
        signal = SignalBackup()
        for place, record in records:
            where = f"{self.name}, {place}" if self.name else place
            if isinstance(record, Broken):
                self._reject(where, record.reason)
                continue
            try:
                row = read_row(record)
                if thread is not None and (
                    row is None or row[0] != thread[0] or (not row[0] and row[1]["role"] == "system")
                ):
                    yield from self._finish("rows of messages", thread[1], thread[2])
                    thread = None
                if row is not None:
                    thread = thread or (row[0], [], where)
                    thread[1].append(row[1])
                    self.notes[WITHOUT_ID] += not row[0]
                elif signal.takes(record):
                    program, entries = "signal", signal.entries
                elif (found := read_entries(record)) is not None:
                    program = found[0]
                    entries += [named(e, self.people) for e in found[1]] if program == "slack" else found[1]
                elif is_tree_row(record):
                    tree_rows.append(record)
                elif isinstance(record, dict) and (line := read_mes(record, self.notes)) is not None:
                    tavern.append(line)
                    self.notes[NOTHING_SAID] += not line["content"].strip()
                elif isinstance(record, dict) and {"user_name", "character_name"} <= record.keys():
                    continue  # the head of SillyTavern's chats
                else:
                    yield from self._of_record(where, record)
            except MALFORMED as error:  # an export by whose rules something should be there that is not
                self._reject(where, f"malformed ({type(error).__name__}: {error})")
        if thread is not None:
            yield from self._finish("rows of messages", thread[1], thread[2])
        if tavern:
            yield from self._finish("sillytavern", [line for line in tavern if line["content"].strip()], name)
        if entries:
            yield from self._of_log(program, entries, name)
        for root in grow_trees(tree_rows):
            yield from self._of_tree(root, name)

    def _of_record(self, where: str, record: Any) -> Iterator[Conversation]:
        if isinstance(record, dict) and record.keys() == {"text", "name"} and where.endswith("the text"):
            yield from self._of_text(record["text"], where)
            return
        if is_tree(record):
            yield from self._of_tree(record["prompt"], where)
            return
        inner = record.get("messages", record.get("MessageList")) if isinstance(record, dict) else None
        if isinstance(inner, list) and any(map(read_entries, inner[:5])):
            found = [entries for entries in map(read_entries, inner) if entries is not None]
            self.notes[UNREADABLE] += len(inner) - len(found)
            yield from self._of_log(found[0][0], [entry for _, some in found for entry in some], where)
            return
        inner = record.get("chats") if isinstance(record, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get("list"), list):  # all chats of Telegram
            for chat in inner["list"]:
                yield from self._of_record(where, chat)
            return
        try:
            form, messages, notes = read_chat_record(record, self.source.columns)
        except Marked as error:
            self.inventory.leave_out(MARKED, "conversation", f"{where}: {error}", matters=False)
        except UnfinishedAnswer as error:
            self.inventory.leave_out(str(error), "conversation", where, matters=False)
        except AboutImages:
            self.inventory.leave_out(NO_PICTURES, "conversation", where, matters=False)
        except NotAConversation as error:
            parts = list(unwrapped(record, self.notes))
            if not parts:
                self.inventory.leave_out(NO_ANSWER, "conversation", where, matters=False)
            elif any(part is not record for part in parts):
                for part in parts:
                    yield from self._of_record(where, part)
            elif not isinstance(record, list) or record or not self.name:  # an empty file among others says nothing
                self._reject(where, str(error))
        else:
            yield from self._finish(form, messages, where, notes)

    def _of_text(self, text: str, where: str) -> Iterator[Conversation]:
        if (log := read_log(text)) is not None:
            yield from self._of_log(*log, where)
            return
        pieces = texts_of(text)
        for number, piece in enumerate(pieces, 1):
            place = f"{where}, conversation {number}" if len(pieces) > 1 else where
            found = read_template(piece, notes=self.notes)
            if found is None:
                yield from self._of_record(where, {"text": piece})
                continue
            for messages in questions_apart(piece, found[1]):
                yield from self._finish(found[0], messages, place)

    def _of_log(self, program: str, entries: Sequence[LogEntry], where: str) -> Iterator[Conversation]:
        entries = local_names(entries) if program == "matrix" else entries
        untimed = sum(entry.hours is None for entry in entries)
        if untimed:
            self.notes[NO_TIME] += untimed
        try:
            for messages in conversations_of_log(entries, self.source.me, self.notes):
                if all(message["role"] == "assistant" for message in messages):
                    self.inventory.leave_out(NOBODY_ELSE, "conversation", where, matters=False)
                else:
                    yield from self._finish(program, messages, where)
        except UnknownPersonError as error:
            if not self.name:
                raise UnusableInputError(f"CHAT_DATA={self.source.path}: {program}, {error}") from None
            self.rejected.append(f"{program}, {error}")

    def _of_tree(self, root: dict[str, Any], where: str) -> Iterator[Conversation]:
        for messages in threads(root):
            yield from self._finish("oasst", messages, where)

    # --- from messages to one shape ----------------------------------------------------------------------------------

    def _finish(
        self, form: str, messages: list[Message], where: str, found: Mapping[str, int] | None = None
    ) -> Iterator[Conversation]:
        """The conversation of these messages, if there is something to learn in it; then `found` is noted too."""
        if any(m.get("role") == "user" and m.get("content") in (None, []) for m in messages):
            self._reject(where, "a message of the user without text")
            return
        if is_about_images(messages):
            self.inventory.leave_out(NO_PICTURES, "conversation", where, matters=False)
            return
        try:
            turns, notes = normalise(messages)
        except ValueError as error:
            self._reject(where, str(error))
            return
        self.notes.update(Counter(found) + Counter(notes))
        self.notes[THINKING] += sum("</think>" in str(turn["content"]) for turn in turns)
        self.notes[NO_QUESTION] += sum(turn["role"] == "user" and not str(turn["content"]).strip() for turn in turns)
        for turn in turns:
            if isinstance(turn["content"], str) and not turn["content"].isascii():
                turn["content"], count, left = mended(turn["content"])
                self.notes[ENCODED_TWICE] += count
                self.notes[PERHAPS_TWICE] += left
            if turn["role"] == "assistant" and not _says_something(turn["content"]):
                turn["weight"] = 0
                self.notes[EMPTY_ANSWER] += 1
        if turns[-1].get("weight") == 0 and not _says_something(turns[-1]["content"]):
            turns.pop()
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        learned = [turn for turn in answers if turn.get("weight") != 0]
        if not learned:
            marked = any(_says_something(turn["content"]) for turn in answers)
            self.inventory.leave_out(MARKED if marked else NO_ANSWER, "conversation", where, matters=False)
            return
        self.inventory.count(form)
        if len(self.beginnings) < SAMPLE_TEXTS:
            said = "\n".join(turn["content"] for turn in turns if isinstance(turn["content"], str))
            self.beginnings.append(said[:SAMPLE_CHARS])
        self.turns += len(turns)
        self.learned += len(learned)
        self.characters += sum(_length(turn["content"]) for turn in turns)
        yield {"messages": turns}

    def _reject(self, where: str, reason: str) -> None:
        """Count a record that can't be used.

        Raises:
            UnusableInputError: most of the first TRIED records are such.
        """
        self.rejected.append(f"{where}: {reason}")
        if len(self.rejected) >= TRIED and len(self.rejected) > self.inventory.num_read and not self.name:
            self.unusable, self.first_reason = len(self.rejected), self.rejected[0]
            raise UnusableInputError(self._why_not())

    def _note(self, text: str) -> None:
        if text not in self.inventory.notes:
            self.inventory.notes.append(text)

    # --- what became of it -------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Complete the inventory when everything has been read."""
        inventory, good = self.inventory, self.inventory.num_read
        inventory.facts = {
            "turns": self.turns,
            "answers learned": self.learned,
            "characters": self.characters,
            "tokens (about)": round(self.characters / BYTES_PER_TOKEN),
            **inventory.facts,
        }
        keys = [note for note, count in self.notes.items() if count and note.startswith(UNUSED_KEY)]
        if len(keys) > MOST_KEYS:  # a table of a hundred columns
            names = shortened([key.removeprefix(UNUSED_KEY).partition(", which")[0] for key in keys], MOST_KEYS)
            inventory.notes.append(f"{len(keys)} keys are not used: {names}")
            self.notes -= Counter({key: self.notes[key] for key in keys})
        inventory.notes += [f"{count:,} × {note}" for note, count in self.notes.most_common() if count]
        inventory.warnings += escape_warnings(self.beginnings, "conversations")
        if self.repairs.characters:
            inventory.warnings.append(f"{self.repairs.characters:,} characters were no text and are replaced by U+FFFD")
        if good == 0 or self.unusable >= good:
            inventory.stop = self._why_not()
        elif good < 2:
            inventory.warnings.append("there is only one conversation: it is learned and validated as well")

    def _why_not(self) -> str:
        good = self.inventory.num_read
        left_out = self.inventory.left_out_line()
        if self.unusable:
            counted = f"{self.unusable:,} of {self.unusable + good:,} conversations can't be used"
            why = f"{self.first_reason} ({counted})"
        else:
            first = f"; the first: {self.first_reason}" if self.first_reason else ""
            why = f"no conversation with an answer to learn ({left_out or 'nothing is in it'}{first})"
        return f"CHAT_DATA={self.source.path}{', ' if self.unusable else ': '}{why}; {HOW}"


def _says_something(content: Any) -> bool:
    """True if a content has text or a call."""
    return bool(content.strip()) if isinstance(content, str) else any(part["text"].strip() for part in content)


def _length(content: Any) -> int:
    return len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
