"""Conversations that stand in a file message by message: chats of people, trees of answers, tables with a row each.

People's chats (WhatsApp, Telegram, Discord, Slack, Messenger, Instagram) have no assistant: `me` says whose messages
the model is to write. A silence of SILENCE hours begins a new conversation.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.data.chat_templates import ROLE_OF
from nanochat.messages import Message

SILENCE = 6.0  # hours
NOTHING_SAID = "a line of the system, or a photo, sticker or file without words, left out"
NO_TIME = "a message without a time that can be read"


class LogEntry(NamedTuple):
    """One message of a chat between people."""

    who: str
    text: str
    """Empty: a photo, or what the program says itself."""
    hours: float | None
    """Since some fixed time; None where it is not known."""


class UnknownPersonError(ValueError):
    """Nobody said whose messages are the assistant's, or there are none of that name."""


def conversations_of_log(entries: Iterable[LogEntry], me: str | None, notes: Counter[str]) -> Iterator[list[Message]]:
    """The conversations of a chat of people, in the order of time; `me` becomes the assistant, all others the user.

    With several others, the name of each stands before what they say.

    Raises:
        UnknownPersonError: `me` is not set or nobody there; names the people.
    """
    said = [entry for entry in entries if entry.text.strip() or _skip(notes)]
    people = Counter(entry.who for entry in said)
    mine = {name for name in people if me is not None and name.strip().casefold() == me.strip().casefold()}
    if not mine:
        names = ", ".join(f"{name} ({count:,})" for name, count in people.most_common(8))
        what = "is not set" if me is None else f"{me!r} has no messages there"
        raise UnknownPersonError(
            f"a chat of people: CHAT_ME, whose messages the model learns to write, {what}; "
            f"there are {names or 'no messages with text'}"
        )
    if all(entry.hours is not None for entry in said):
        if (said[0].hours or 0.0) > (said[-1].hours or 0.0):
            said.reverse()  # some programs write the newest first
        said.sort(key=lambda entry: entry.hours or 0.0)
    in_group = len(people) > 1 + len(mine)
    messages: list[Message] = []
    last: LogEntry | None = None
    for entry in said:
        if messages and last is not None and _hours_between(last, entry) > SILENCE:
            yield messages
            messages, last = [], None
        role = "assistant" if entry.who in mine else "user"
        text = f"{entry.who}: {entry.text}" if in_group and role == "user" else entry.text
        if last is not None and last.who == entry.who:
            text = entry.text  # goes on; that it was sent in several pieces is no mistake to be told
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + text
        else:
            messages.append({"role": role, "content": text})
        last = entry
    if messages:
        yield messages


def _hours_between(first: LogEntry, second: LogEntry) -> float:
    return 0.0 if first.hours is None or second.hours is None else second.hours - first.hours


def _skip(notes: Counter[str]) -> bool:
    notes[NOTHING_SAID] += 1
    return False


# --- records that are one message of a chat ---------------------------------------------------------------------------


def read_entry(record: Any) -> tuple[str, LogEntry] | None:
    """(name of the program, entry) of a record of an export, None if it is none."""
    if not isinstance(record, dict):
        return None
    if "date" in record and "type" in record and ("from" in record or "actor" in record) and "text" in record:
        text = record["text"] if record["type"] == "message" and not record.get("forwarded_from") else ""
        return "telegram", LogEntry(_name(record.get("from")), _plain(text), _iso_hours(record["date"]))
    if "timestamp" in record and isinstance(record.get("author"), dict) and "content" in record:
        author = record["author"]
        text = record["content"] if record.get("type", "Default") in ("Default", "Reply", 0, 19) else ""
        name = author.get("nickname") or author.get("global_name") or author.get("name") or author.get("username")
        return "discord", LogEntry(_name(name), _plain(text), _iso_hours(record["timestamp"]))
    if "sender_name" in record and "timestamp_ms" in record:
        text = "" if record.get("is_unsent") else _mended(record.get("content") or "")
        return "messenger", LogEntry(
            _mended(_name(record["sender_name"])), text, _number(record["timestamp_ms"], 3.6e6)
        )
    if "ts" in record and record.get("type") == "message":
        profile = record.get("user_profile") or {}
        name = profile.get("real_name") or record.get("username") or record.get("user")
        text = "" if "subtype" in record else re.sub(r"<(?:[^|>]*\|)?([^>]*)>", r"\1", _plain(record.get("text")))
        return "slack", LogEntry(_name(name), text, _number(record["ts"], 3600.0))
    return None


def slack_people(file: Path) -> dict[str, str]:
    """The names of Slack's people by their id, from the users.json beside the channels; empty without one."""
    try:
        people = json.loads(file.read_bytes()) if file.is_file() else []
        return {p["id"]: (p.get("profile") or {}).get("real_name") or p.get("real_name") or p["name"] for p in people}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def named(entry: LogEntry, people: Mapping[str, str]) -> LogEntry:
    """The entry with names for the ids of people."""
    text = re.sub(r"@([UW][A-Z0-9]+)", lambda match: "@" + people.get(match[1], match[1]), entry.text)
    return entry._replace(who=people.get(entry.who, entry.who), text=text)


def _name(value: Any) -> str:
    return str(value) if value else "(deleted account)"


def _plain(text: Any) -> str:
    """The characters of a text, which Telegram may have as a list of pieces."""
    if isinstance(text, list):
        return "".join(piece if isinstance(piece, str) else str(piece.get("text", "")) for piece in text)
    return str(text or "")


def _mended(text: str) -> str:
    """Messenger writes the bytes of UTF-8 as if each were a character."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _iso_hours(value: Any) -> float | None:
    try:
        time = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp() / 3600


def _number(value: Any, unit: float) -> float | None:
    try:
        return float(value) / unit
    except (TypeError, ValueError):
        return None


# --- WhatsApp ---------------------------------------------------------------------------------------------------------

_INVISIBLE = dict.fromkeys(map(ord, "\u200e\u200f\u202a\u202c\ufeff"))
_LINE = re.compile(
    r"\[?(?P<date>\d{1,4}[./-]\d{1,2}[./-]\d{1,4}),?\s+(?P<time>\d{1,2}[:.]\d{2}(?:[:.]\d{2})?)"
    r"(?P<half>\s?[^\W\d]{1,2}\.?\s?[^\W\d]?\.?)?(?:\]|\s[-–])\s(?P<rest>.*)",
    re.DOTALL,
)
_WHO = re.compile(r"(?P<who>[^:\n\"“”«»]{1,50}):\s?(?P<text>.*)", re.DOTALL)
_EDITED = re.compile(r"\s*<[^<>]*(edited|bearbeitet|editad[oa]|modifi)[^<>]*>\s*$")
# What WhatsApp writes in place of a photo, a call or a message that was deleted.
_NO_WORDS = re.compile(
    r"<[^<>\n]{3,60}>|null|\S.{0,80}\.\w{3,4} \([^()]{4,40}\)"
    r"|.{1,40} (omitted|weggelassen|omitid[oa]|absente?|omess[oa])"
    r"|(This message was deleted|You deleted this message|Diese Nachricht wurde gelöscht|Missed (voice|video) call)\.?"
    r"|(IMG|VID|PTT|AUD|STK|DOC)-\d{8}-WA\d+\.\w+.*",
    re.IGNORECASE | re.DOTALL,
)


def looks_like_whatsapp(text: str) -> bool:
    """True if the first lines of a text are of a chat that WhatsApp has exported."""
    lines = [line for line in text.translate(_INVISIBLE).splitlines()[:20] if line.strip()]
    return sum(_LINE.match(line) is not None for line in lines) >= max(1, len(lines) // 3)


def read_whatsapp(lines: Iterable[str]) -> Iterator[LogEntry]:
    """The entries of WhatsApp's export: what somebody wrote on several lines is one, lines of the program are empty."""
    found: list[tuple[re.Match[str], list[str], bool]] = []
    for line in lines:
        clean = line.rstrip("\r\n").translate(_INVISIBLE).replace("\u202f", " ").replace("\xa0", " ")
        if match := _LINE.match(clean):
            found.append((match, [match["rest"]], ": \u200e" in line))  # iPhones mark their own words so
        elif found:
            found[-1][1].append(clean)
    day_first = _day_first([match["date"] for match, _, _ in found])
    for match, texts, by_program in found:
        who = _WHO.match("\n".join(texts).strip())
        hours = _hours(match, day_first)
        if who is None:
            yield LogEntry("", "", hours)
            continue
        text = _EDITED.sub("", who["text"]).strip()
        yield LogEntry(who["who"].strip(), "" if by_program or _NO_WORDS.fullmatch(text) else text, hours)


def _day_first(dates: list[str]) -> bool:
    """Whether the day stands before the month, by the first date that can only be read one way."""
    for date in dates:
        first, second = (int(n) for n in re.split(r"[./-]", date)[:2])
        if first > 12 or second > 12:
            return first > 12
    return not dates or "/" not in dates[0]


def _hours(match: re.Match[str], day_first: bool) -> float | None:
    a, b, c = (int(n) for n in re.split(r"[./-]", match["date"]))
    year, month, day = (a, b, c) if a > 31 else (c, b, a) if day_first else (c, a, b)
    hour, minute = (int(n) for n in re.split(r"[:.]", match["time"])[:2])
    half = (match["half"] or "").strip().lower()
    if half.startswith(("p", "p.")):
        hour = hour % 12 + 12
    elif half.startswith("a"):
        hour %= 12
    try:
        moment = datetime(year + 2000 if year < 100 else year, month, day, hour, minute, tzinfo=timezone.utc)
    except ValueError:
        return None
    return moment.timestamp() / 3600


# --- a row for each message, and trees --------------------------------------------------------------------------------

THREAD_KEYS = (
    *("conversation_id", "conversationid", "conv_id", "dialogue_id", "dialog_id", "chat_id", "session_id", "thread_id"),
    *("conversation", "dialogue", "dialog", "ticket_id", "conversation_hash"),
)


def read_row(record: Any) -> tuple[str, Message] | None:
    """(which conversation, message) of a record that is one message of a conversation, None if it is none."""
    if not isinstance(record, dict):
        return None
    low = {str(key).strip().lower(): value for key, value in record.items()}
    thread = next((key for key in THREAD_KEYS if isinstance(low.get(key), str | int)), None)
    who = next(
        (low[key] for key in ("role", "from", "speaker", "author", "sender") if isinstance(low.get(key), str)), ""
    )
    text = next((low[key] for key in ("content", "text", "value", "message") if isinstance(low.get(key), str)), None)
    role = ROLE_OF.get(who.strip().lower())
    if thread is None or role is None or text is None or role == "call":
        return None
    return str(low[thread]), {"role": role, "content": text}


def is_tree_row(record: Any) -> bool:
    """True of a message of a tree, as OpenAssistant has them: {"message_id", "parent_id", "role", "text"}."""
    return isinstance(record, dict) and {"message_id", "parent_id", "role", "text"} <= record.keys()


def is_tree(record: Any) -> bool:
    """True of a whole tree: {"prompt": {"text", "role", "replies": [...]}}."""
    return isinstance(record, dict) and isinstance(record.get("prompt"), dict) and "replies" in record["prompt"]


def grow_trees(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The roots of trees from their messages, in any order."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    roots: list[dict[str, Any]] = []
    for node in nodes.values():
        parent = nodes.get(node["parent_id"])
        (roots if parent is None else parent["replies"]).append(node)
    yield from roots


def threads(root: dict[str, Any]) -> Iterator[list[Message]]:
    """Every way from the root of a tree to a leaf; an answer that was in an earlier one is not learned again."""
    waiting: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [(root, [])]
    learned: set[int] = set()
    while waiting:
        node, before = waiting.pop()
        path = [*before, node]
        replies = [r for r in node.get("replies") or [] if not r.get("deleted")]
        waiting += [(reply, path) for reply in sorted(replies, key=_rank, reverse=True)]
        if replies:
            continue
        messages = []
        for step in path:
            message = {"role": ROLE_OF.get(step.get("role", ""), "user"), "content": step.get("text")}
            if message["role"] == "assistant" and id(step) in learned:
                message["weight"] = 0
            learned.add(id(step))
            messages.append(message)
        yield messages


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return 1e9 if rank is None else float(rank)
