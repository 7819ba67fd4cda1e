"""Conversations that stand in a file message by message: chats of people, trees of answers, tables with a row each.

People's chats (Telegram, Discord, Slack, Messenger, Instagram, Teams; texts in chat_people.py) have no assistant: `me`
says whose messages the model is to write. A silence of SILENCE hours begins a new conversation.
"""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.data.chat_templates import ROLE_OF, read_template
from nanochat.data.markup import visible_text
from nanochat.messages import Message

SILENCE = 6.0  # hours
NOTHING_SAID = "a line of the system, or a photo, sticker or file without words, left out"
NO_TIME = "a message without a time that can be read"


# What Messenger and Instagram write in the name of people.
_OF_MESSENGER = re.compile(
    r"(Liked a message|Reacted .{1,12} to your message ?|(?P<who>.{1,60}?) (sent an attachment|unsent a message|"
    r"sent a (photo|sticker|video|link|voice message|GIF)|shared a (story|post|reel)|"
    r"missed (a|your) (video )?(call|chat)|"
    r"started an? (audio|video) (call|chat)|ended the (video )?(call|chat)|"
    r"changed the (theme|chat theme|quick reaction).*)\.?)",
    re.IGNORECASE,
)


class LogEntry(NamedTuple):
    """One message of a chat between people."""

    who: str
    text: str
    """Empty: a photo, or what the program says itself."""
    hours: float | None
    """Since some fixed time; None where it is not known."""
    chat: str = ""
    """Which of several chats in one file it is of."""
    ident: str = ""
    """Its own name, where the export has one."""
    edits: str = ""
    """The `ident` of the entry in whose place this one was written later."""


# Lines of Signal's export that hold no message.
_SIGNAL_LINES = frozenset(("chat", "stickerPack", "adHocCall", "notificationProfile", "chatFolder"))


# Lines of Mattermost's export that hold no post.
_MATTERMOST_LINES = frozenset(("team", "channel", "user", "bot", "emoji", "role", "scheme", "direct_channel"))


class UnknownPersonError(ValueError):
    """Nobody said whose messages are the assistant's, or there are none of that name."""


def conversations_of_log(entries: Iterable[LogEntry], me: str | None, notes: Counter[str]) -> Iterator[list[Message]]:
    """The conversations of a chat of people, in the order of time; `me` becomes the assistant, all others the user.

    With several others, the name of each stands before what they say.

    Raises:
        UnknownPersonError: `me` is not set or nobody there; names the people.
    """
    entries = list(entries)
    idents = {entry.ident for entry in entries} - {""}
    edits = sorted((entry for entry in entries if entry.edits in idents), key=lambda entry: entry.hours or 0.0)
    edited = {entry.edits: entry.text for entry in edits}  # of several the last
    kept = [e._replace(text=edited.get(e.ident, e.text)) for e in entries if e.edits not in idents]
    said = [entry for entry in kept if entry.text.strip() or _skip(notes)]
    people = Counter(entry.who for entry in said)
    mine = {name for name in people if me is not None and name.strip().casefold() == me.strip().casefold()}
    if not mine:
        names = ", ".join(f"{name} ({count:,})" for name, count in people.most_common(8))
        what = "is not set" if me is None else f"{me!r} has no messages there"
        raise UnknownPersonError(
            f"a chat of people: CHAT_ME, whose messages the model learns to write, {what}; "
            f"there are {names or 'no messages with text'}"
        )
    chats: dict[str, list[LogEntry]] = {}
    for entry in said:
        chats.setdefault(entry.chat, []).append(entry)
    for chat in chats.values():
        yield from _of_one_chat(chat, mine)


def _of_one_chat(said: list[LogEntry], mine: set[str]) -> Iterator[list[Message]]:
    if all(entry.hours is not None for entry in said):
        if (said[0].hours or 0.0) > (said[-1].hours or 0.0):
            said.reverse()  # some programs write the newest first
        said.sort(key=lambda entry: entry.hours or 0.0)
    in_group = len({entry.who for entry in said} - mine) > 1
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


def read_entries(record: Any) -> tuple[str, list[LogEntry]] | None:
    """(name of the program, entries) of a record of an export, None if it is none; several are a post and replies."""
    if not isinstance(record, dict):
        return None
    if isinstance(kind := record.get("type"), str):
        if kind in ("post", "direct_post") and isinstance(record.get(kind), dict):
            return "mattermost", _mattermost_posts(record[kind])
        is_line = kind in _MATTERMOST_LINES and isinstance(record.get(kind), dict) and len(record) == 2
        is_head = isinstance(record.get("version"), int) and record.keys() <= {"type", "version", "info"}
        if is_line or (is_head and kind == "version"):
            return "mattermost", [LogEntry("", "", 0.0)]
    found = _read_entry(record)
    return found and (found[0], [found[1]])


def _mattermost_posts(post: dict[str, Any]) -> list[LogEntry]:
    """A post of Mattermost's export and what was replied to it."""
    members = post.get("channel_members")
    chat = ", ".join(map(str, members)) if isinstance(members, list) else f"{post.get('team')}/{post.get('channel')}"
    return [
        LogEntry(_name(one.get("user")), str(one.get("message") or ""), _number(one.get("create_at"), 3.6e6), chat)
        for one in (post, *(reply for reply in post.get("replies") or [] if isinstance(reply, dict)))
    ]


def _read_entry(record: dict[str, Any]) -> tuple[str, LogEntry] | None:
    if "date" in record and "type" in record and ("from" in record or "actor" in record) and "text" in record:
        text = record["text"] if record["type"] == "message" and not record.get("forwarded_from") else ""
        return "telegram", LogEntry(_name(record.get("from")), _plain(text), _iso_hours(record["date"]))
    if "timestamp" in record and isinstance(record.get("author"), dict) and "content" in record:
        author = record["author"]
        text = record["content"] if record.get("type", "Default") in ("Default", "Reply", 0, 19) else ""
        name = author.get("nickname") or author.get("global_name") or author.get("name") or author.get("username")
        return "discord", LogEntry(_name(name), _plain(text), _iso_hours(record["timestamp"]))
    if "sender_name" in record and "timestamp_ms" in record:
        text = "" if record.get("is_unsent") else _mended(str(record.get("content") or ""))
        name = _mended(_name(record["sender_name"]))
        by_program = _OF_MESSENGER.fullmatch(text)  # "I sent a photo." is a person's
        if by_program and by_program["who"] in (None, "You", name, name.partition(" ")[0]):
            text = ""
        return "messenger", LogEntry(name, text, _number(record["timestamp_ms"], 3.6e6))
    if "ts" in record and record.get("type") == "message":
        profile = record.get("user_profile") or {}
        name = profile.get("real_name") or record.get("username") or record.get("user")
        text = "" if "subtype" in record else re.sub(r"<(?:[^|>]*\|)?([^>]*)>", r"\1", _plain(record.get("text")))
        return "slack", LogEntry(_name(name), html.unescape(text), _number(record["ts"], 3600.0))
    if "originalarrivaltime" in record and "messagetype" in record:
        spoken = str(record["messagetype"]) in ("Text", "RichText", "RichText/Html")
        text = visible_text(str(record.get("content") or "")) if spoken else ""
        name = record.get("displayName") or str(record.get("from") or "").rpartition(":")[2]
        return "skype or teams", LogEntry(_name(name), text, _iso_hours(record["originalarrivaltime"]))
    if str(record.get("type", "")).startswith("m.") and "sender" in record and isinstance(record.get("content"), dict):
        said = record["content"] if record["type"] == "m.room.message" else {}
        relation = r if isinstance(r := said.get("m.relates_to"), dict) else {}
        edits = str(relation.get("event_id") or "") if relation.get("rel_type") == "m.replace" else ""
        said = new if edits and isinstance(new := said.get("m.new_content"), dict) else said
        text = str(said.get("body") or "") if said.get("msgtype") in ("m.text", "m.emote", "m.notice") else ""
        if "m.in_reply_to" in relation:  # what it replies to stands before it, for programs that know no replies
            text = re.sub(r"\A> (?:\* )?<[^\n]*\n(?:>[^\n]*\n)*\n?", "", text)
        hours, ident = _number(record.get("origin_server_ts"), 3.6e6), str(record.get("event_id") or "")
        return "matrix", LogEntry(str(record["sender"]).removeprefix("@"), text, hours, ident=ident, edits=edits)
    is_google = isinstance(record.get("creator"), dict) and "created_date" in record
    if is_google and ("text" in record or "message_id" in record) and _NO_LOG.isdisjoint(record):
        return "google chat", LogEntry(
            _name(record["creator"].get("name")), str(record.get("text") or ""), _written_hours(record["created_date"])
        )
    return _read_any(record)


# The names of these in exports of all kinds, as "Date,Author,Content" of a table.
WHO = ("sendername", "sender", "author", "from", "displayname", "nickname", "username", "user", "speaker", "name")
WHEN = ("timestamp", "date", "time", "datetime", "sent_at", "created_at", "createdat", "sent", "timestamp_ms")
SAID = ("content", "text", "body", "message", "contents", "msg")
# Which chat of several.
WHERE = (
    "conversationid",
    "conversation_id",
    "conversation",
    "channelid",
    "channel",
    "chatid",
    "chat_id",
    "chat",
    "room",
)
_NO_LOG = frozenset(
    (
        *("role", "question", "answer", "prompt", "response", "instruction", "input", "output", "title", "assistant"),
        *("bot", "completion", "chosen", "messages", "conversations", "isCreatedByUser"),
    )
)


def _read_any(record: dict[str, Any]) -> tuple[str, LogEntry] | None:
    """The entry of a record that says who wrote what and when; the writer is no user or assistant."""
    if len(record) < 3 or not _NO_LOG.isdisjoint(record):  # asked of every message: most are none at a glance
        return None
    low = {str(key).strip().lower().replace(" ", ""): value for key, value in record.items()}
    who, when, said = (next((key for key in keys if low.get(key) is not None), None) for keys in (WHO, WHEN, SAID))
    if said is None:  # a photo
        said = next((key for key in SAID if key in low), None)
    if who is None or when is None or said is None or not _NO_LOG.isdisjoint(low):
        return None
    name, text = low[who], low[said]
    if not isinstance(name, str) or name.strip().lower() in ROLE_OF or not isinstance(text, str | None):
        return None
    if text and ("<|" in text or "\n" in text) and read_template(text):
        return None  # a conversation as one text, and who collected it
    if low.get("isunsent") or (low.get("type") or "text") == "system":
        text = ""
    chat = next((str(low[key]) for key in WHERE if isinstance(low.get(key), str | int)), "")
    return "chat of people", LogEntry(name.strip() or _name(None), (text or "").strip(), _any_hours(low[when]), chat)


def _any_hours(value: Any) -> float | None:
    """The hours of a time in any form: seconds, milliseconds, ISO 8601."""
    number = _number(value, 1.0)
    if number is None:
        return _iso_hours(re.sub(r"(\.\d{6})\d+", r"\1", str(value)))  # .NET writes seven digits
    return number / (3.6e6 if number > 1e11 else 3600.0)


class SignalBackup:
    """Signal's export of all chats: lines that name people and chats, and lines of messages that refer to them."""

    def __init__(self) -> None:
        self.entries: list[LogEntry] = []
        self._people: dict[str, str] = {}
        self._own_name, self._begun = "Me", False

    def takes(self, record: Any) -> bool:
        """True if a record is a line of it; the messages go into `entries`."""
        if not isinstance(record, dict):
            return False
        item = record.get("chatItem")
        if isinstance(item, dict):
            said = item.get("standardMessage")
            text = ((said.get("text") or {}).get("body") if isinstance(said, dict) else None) or ""
            who = self._people.get(str(item.get("authorId")), f"person {item.get('authorId')}")
            self.entries.append(LogEntry(who, str(text), _any_hours(item.get("dateSent")), str(item.get("chatId"))))
        elif isinstance(account := record.get("account"), dict) and len(record) == 1:
            self._own_name = str(account.get("givenName") or self._own_name)
        elif isinstance(person := record.get("recipient"), dict) and len(record) == 1:
            known = person.get("contact") or {}
            names = (known.get(key) for key in ("profileGivenName", "profileFamilyName"))
            name = " ".join(n for n in names if n) or known.get("systemGivenName") or str(known.get("e164") or "")
            if name or "self" in person:
                self._people[str(person.get("id"))] = self._own_name if "self" in person else name
        else:
            self._begun = self._begun or "backupTimeMs" in record
            return "backupTimeMs" in record or (
                self._begun and len(record) == 1 and not _SIGNAL_LINES.isdisjoint(record)
            )
        return True


def slack_people(path: Path) -> dict[str, str]:
    """The names of Slack's people by their id, from the users.json beside the channels in a folder or archive."""
    people: list[Any] = []
    try:
        if (path / "users.json").is_file():
            people = json.loads((path / "users.json").read_bytes())
        elif path.is_file() and path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as archive:
                name = next((name for name in archive.namelist() if name.rpartition("/")[2] == "users.json"), None)
                people = json.loads(archive.read(name)) if name else []
        return {p["id"]: (p.get("profile") or {}).get("real_name") or p.get("real_name") or p["name"] for p in people}
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError, zipfile.BadZipFile):
        return {}


def local_names(entries: Iterable[LogEntry]) -> list[LogEntry]:
    """Matrix's people without their server, where no other server has one of that name."""
    entries = list(entries)
    times = Counter(who.partition(":")[0] for who in {entry.who for entry in entries})
    names = {entry.who: entry.who.partition(":")[0] for entry in entries}
    return [e._replace(who=names[e.who]) if times[names[e.who]] == 1 else e for e in entries]


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


def _written_hours(value: Any) -> float | None:
    """The hours of "Monday, January 1, 2024 at 10:00:00 AM UTC"."""
    try:
        time = datetime.strptime(" ".join(str(value).split()), "%A, %B %d, %Y at %I:%M:%S %p UTC")
    except ValueError:
        return None
    return time.replace(tzinfo=timezone.utc).timestamp() / 3600


def _number(value: Any, unit: float) -> float | None:
    try:
        return float(value) / unit
    except (TypeError, ValueError):
        return None


# --- a row for each message, and trees --------------------------------------------------------------------------------

THREAD_KEYS = (
    *("conversation_id", "conversationid", "conv_id", "dialogue_id", "dialog_id", "chat_id", "session_id", "thread_id"),
    *("conversation", "dialogue", "dialog", "ticket_id", "conversation_hash"),
)


def read_row(record: Any) -> tuple[str, Message] | None:
    """(which conversation, message) of a record that is one message of a conversation, None if it is none.

    Where nothing says which, a system message begins a new one.
    """
    if not isinstance(record, dict) or isinstance(record.get("messages"), list):
        return None
    low = {str(key).strip().lower(): value for key, value in record.items()}
    thread = next((key for key in THREAD_KEYS if isinstance(low.get(key), str | int)), None)
    who = next(
        (low[key] for key in ("role", "from", "speaker", "author", "sender") if isinstance(low.get(key), str)), ""
    )
    text = next((low[key] for key in ("content", "text", "value", "message") if isinstance(low.get(key), str)), None)
    if text is None and isinstance(parts := low.get("content"), list):  # OpenAI's assistants, Jan
        inside = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), dict)]
        text = "".join(str(part.get("value") or "") for part in inside) if len(inside) == len(parts) > 0 else None
    role = ROLE_OF.get(who.strip().lower())
    if role is None or text is None or role == "call" or (thread is None and not {"role", "content"} <= low.keys()):
        return None
    return str(low[thread]) if thread else "", {"role": role, "content": text}


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
