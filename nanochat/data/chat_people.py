"""Chats of people as text: WhatsApp, LINE, KakaoTalk, iMessage, Discord, Teams, Signal, Telegram, IRC, Zoom.

An entry begins with its time, in the order and language of the phone that wrote it. Who wrote it stands behind the
time, or in the same line alone, with what was written below; lines without a time go on with the entry before.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone

from nanochat.data.chat_logs import LogEntry

HEAD_LINES = 40  # not blank, that tell what a text is
DATE_CHARS = 40  # of a line, among which its date and time are
_INVISIBLE = dict.fromkeys(map(ord, "\u200e\u200f\u202a\u202c\ufeff"))
_DATE = r"(?P<date>\d{1,4}(?:[./-]\s?|年|년\s?)\d{1,2}(?:[./-]\s?|月|월\s?)\d{1,4}[.日일]?)"
_CLOCK = r"(?P<time>\d{1,2}[:.]\d{2}(?:[:.]\d{2})?)"
_LINE = re.compile(
    rf"\[?{_DATE}[,،]?\s+(?:(?:à|um|at)\s+)?(?P<before>[^\W\d]{{2}}\s?)?{_CLOCK}"
    r"(?P<half>\s?[^\W\d]{1,2}\.?\s?[^\W\d]?\.?)?(?:\]|\s[-–]|,)\s(?P<rest>.*)",
    re.DOTALL,
)
_WHO = re.compile(r"(?P<who>[^:\n\"“”«»]{1,50}):\s?(?P<text>.*)", re.DOTALL)
_EDITED = re.compile(r"\s*<[^<>]*(edited|bearbeitet|editad[oa]|modifi)[^<>]*>\s*$")
# What programs write in place of a photo, a call or a message that was deleted.
_DELETED = (
    "This message was deleted",
    "You deleted this message",
    "Diese Nachricht wurde gelöscht",
    "Du hast diese Nachricht gelöscht",
    "Se eliminó este mensaje",
    "Eliminaste este mensaje",
    "Este mensaje fue eliminado",
    "Ce message a été supprimé",
    "Vous avez supprimé ce message",
    "Mensagem apagada",
    "Essa mensagem foi apagada",
    "Você apagou esta mensagem",
    "Questo messaggio è stato eliminato",
    "Hai eliminato questo messaggio",
    "Dit bericht is verwijderd",
    "Je hebt dit bericht verwijderd",
    "Данное сообщение удалено",
    "Вы удалили данное сообщение",
    "Bu mesaj silindi",
    "Bu mesajı sildiniz",
    "Wiadomość została usunięta",
    "Pesan ini telah dihapus",
    "Anda menghapus pesan ini",
    "यह संदेश मिटा दिया गया था",
    "تم حذف هذه الرسالة",
    "このメッセージは削除されました",
    "此消息已删除",
    "您已删除此消息",
    "삭제된 메시지입니다",
)
_NO_WORDS = re.compile(
    r"<[^<>\n]{3,60}>|null|\S.{0,80}\.\w{3,4} \([^()]{4,40}\)"
    r"|.{1,40} (omitted|weggelassen|omitid[oa]|absente?|omess[oa])"
    rf"|({'|'.join(_DELETED)}|Missed (voice|video) call)[.。]?"
    r"|(IMG|VID|PTT|AUD|STK|DOC)-\d{8}-WA\d+\.\w+.*"
    r"|\[(Sticker|Photo|Video|Voice message|File|スタンプ|写真|動画|貼圖|照片)\]|사진|이모티콘|동영상",
    re.IGNORECASE | re.DOTALL,
)
# What Discord's exporter adds below a message, and below all of them.
_ADDED = re.compile(r"\n\{(?:Attachments|Embed|Reactions|Stickers|Forwarded Message)\}.*", re.DOTALL)
_FOOTER = re.compile(r"\n={20,}\s*\nExported [^\n]*(?:\n={20,})?\s*\Z")
_MORNING, _EVENING = ("a", "上午", "오전", "午前", "凌晨", "早上"), ("p", "下午", "오후", "午後", "晚上", "م")

Log = tuple[str, list[LogEntry]]


def read_log(text: str) -> Log | None:
    """(name of the program, entries) of a chat that was exported as text; None if the text is none."""
    lines = text.translate(_INVISIBLE).replace("\u202f", " ").replace("\xa0", " ").splitlines()
    head = [line for line in lines if line.strip()][:HEAD_LINES]
    for name, is_line, read in _FORMS:
        count = sum(is_line(line) for line in head)
        if count and (count >= max(2, len(head) // 4) or count == len(head)):
            return name, list(read(text.splitlines()))
    return None


# --- a time before every entry ----------------------------------------------------------------------------------------


def _is_timed(line: str) -> bool:
    return _LINE.match(_plain(line)) is not None


def _plain(line: str) -> str:
    """A line without invisible marks and with its first digits as 0 to 9: those of Arabic and Hindi are others."""
    clean = line.rstrip("\r\n").translate(_INVISIBLE).replace("\u202f", " ").replace("\xa0", " ")
    if clean[:2].isascii():
        return clean
    head = "".join(str(unicodedata.digit(c)) if c.isdecimal() else c for c in clean[:DATE_CHARS])
    return head + clean[DATE_CHARS:]


def _read_timed(lines: Iterable[str]) -> Iterator[LogEntry]:
    """The entries: what somebody wrote on several lines is one, lines of the program are empty."""
    found: list[tuple[re.Match[str], list[str], bool]] = []
    for line in lines:
        clean = _plain(line)
        if match := _LINE.match(clean):
            found.append((match, [match["rest"]], ": \u200e" in line))  # iPhones mark their own words so
        elif found:
            found[-1][1].append(clean)
    day_first = _day_first([match["date"] for match, _, _ in found])
    for match, texts, by_program in found:
        hours = _hours(match, day_first)
        said = _WHO.match("\n".join(texts).strip())
        if said is None:
            yield LogEntry("", "", hours)
            continue
        text = _EDITED.sub("", said["text"]).strip()
        yield LogEntry(said["who"].strip(" ~"), "" if by_program or _NO_WORDS.fullmatch(text) else text, hours)


def _numbers(date: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", date)]


def _day_first(dates: list[str]) -> bool:
    """Whether the day stands before the month, by the first date that can only be read one way."""
    for date in dates:
        first, second = _numbers(date)[:2]
        if first > 12 or second > 12:
            return first > 12
    return not dates or "/" not in dates[0]


def _day(date: str, day_first: bool) -> tuple[int, int, int]:
    """(year, month, day)."""
    a, b, c = _numbers(date)
    return (a, b, c) if a > 31 else (c, b, a) if day_first else (c, a, b)


def _hours(match: re.Match[str], day_first: bool) -> float | None:
    return _moment(*_day(match["date"], day_first), match["time"], match["half"] or match["before"] or "")


def _moment(year: int, month: int, day: int, clock: str, half: str) -> float | None:
    """Hours since some fixed time, None if there is no such time; `half` is "pm", "오후" and the like."""
    hour, minute = (int(n) for n in re.split(r"[:.]", clock)[:2])
    half = half.strip().lower()
    if half.startswith(_EVENING):
        hour = hour % 12 + 12
    elif half.startswith(_MORNING) or half == "ص":
        hour %= 12
    try:
        moment = datetime(year + 2000 if year < 100 else year, month, day, hour, minute, tzinfo=timezone.utc)
    except ValueError:
        return None
    return moment.timestamp() / 3600


# --- a line with time and name, and below it what was written: Discord, Teams, iMessage -------------------------------

_NAMED = re.compile(rf"\[{_DATE},?\s+{_CLOCK}(?P<half>\s?[AP]M)?\] (?P<who>[^:]+?)(?: \(pinned\))?\s*")


def _read_named(lines: Sequence[str]) -> Iterator[LogEntry]:
    starts = [(i, match) for i, line in enumerate(lines) if (match := _NAMED.fullmatch(_plain(line)))]
    day_first = _day_first([match["date"] for _, match in starts])
    ends = [i for i, _ in starts[1:]] + [len(lines)]
    for (start, match), end in zip(starts, ends, strict=True):
        below = "\n" + "\n".join(lines[start + 1 : end])
        text = _ADDED.sub("", _FOOTER.sub("", below) if end == len(lines) else below).strip()
        yield LogEntry(
            match["who"].strip(), text, _moment(*_day(match["date"], day_first), match["time"], match["half"] or "")
        )


# --- a line with the day before the entries of that day ---------------------------------------------------------------

_DAY = re.compile(
    r"[-\s]*(?P<year>\d{4})[./년年-]\s?(?P<month>\d{1,2})[./월月-]\s?(?P<day>\d{1,2})(?:[.일日\s(（].{0,14})?[-\s]*"
)
_LINE_ENTRY = re.compile(rf"(?P<half>[^\W\d]{{2}}\s?)?{_CLOCK}(?:\s?(?P<after>[AP]M))?\t(?P<who>[^\t]*)\t(?P<text>.*)")
_KAKAO_ENTRY = re.compile(
    rf"\[(?P<who>[^\]]+)\] \[(?P<half>[^\W\d]{{2}}\s)?{_CLOCK}(?:\s?(?P<after>[AP]M))?\] (?P<text>.*)"
)


def _read_daily(entry: re.Pattern[str]) -> Callable[[Sequence[str]], Iterator[LogEntry]]:
    """How to read the entries of such a form, which begin as `entry` says."""

    def read(lines: Sequence[str]) -> Iterator[LogEntry]:
        day: tuple[int, int, int] | None = None
        who, texts, hours = "", list[str](), None
        for line in lines:
            date, match = _DAY.fullmatch(line), entry.match(line)
            if match is None and date is None:
                texts.append(line)
                continue
            if who and texts:
                yield LogEntry(who, _unquoted(texts), hours)
            who, texts = "", []
            if date is not None:
                day = (int(date["year"]), int(date["month"]), int(date["day"]))
            elif match is not None:
                who, texts = match["who"].strip(), [match["text"]]
                half = match["half"] or match["after"] or ""
                hours = _moment(*day, match["time"], half) if day else None
        if who and texts:
            yield LogEntry(who, _unquoted(texts), hours)

    return read


def _unquoted(texts: list[str]) -> str:
    """What was written on these lines; LINE writes quotation marks around several."""
    text = "\n".join(texts).strip()
    if "\n" in text and text[0] == text[-1] == '"':
        text = text[1:-1]
    return "" if _NO_WORDS.fullmatch(text) else text


_IMESSAGE = re.compile(r"(?P<when>[A-Z][a-z]{2} \d{1,2}, \d{4} +\d{1,2}:\d{2}:\d{2} [AP]M)(?: \(.*\))?\s*")


def _read_imessage(lines: Sequence[str]) -> Iterator[LogEntry]:
    starts = [i for i, line in enumerate(lines) if _IMESSAGE.fullmatch(line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        match = _IMESSAGE.fullmatch(lines[start])
        when = datetime.strptime(" ".join(match["when"].split()), "%b %d, %Y %I:%M:%S %p") if match else None
        hours = when.replace(tzinfo=timezone.utc).timestamp() / 3600 if when else None
        if start + 1 < end:
            yield LogEntry(lines[start + 1].strip(), "\n".join(lines[start + 2 : end]).strip(), hours)


# --- a clock before every entry, perhaps no day: IRC's logs, and the chat beside a meeting of Zoom --------------------

# Who came and went.
_IRC_NEWS = re.compile(  # a bare clock may also begin a line of somebody's text
    r"---|\[(?:\d{4}-\d\d-\d\d[ T])?\d{1,2}:\d\d(?::\d\d)?\]|\d{4}-\d\d-\d\d[ T]\d{1,2}:\d\d"
    r"|\d{1,2}:\d\d(?::\d\d)?\s+[*<=-]"
)
_IRC = re.compile(
    rf"\[?(?P<day>\d{{4}}-\d\d-\d\d)?[ T]?{_CLOCK}\]?(?:\s+<[ @+%~&]?|\t[@+%~&]?)"
    r"(?P<who>[\w\[\]\\^{}|`][^<>\s]{0,40})(?:>\s|\t)(?P<text>.*)"
)
_ZOOM = re.compile(  # lengths are limited: a line that is none must not take seconds
    rf"(?P<day>\d{{4}}-\d\d-\d\d)?\s?{_CLOCK}\s+From\s{{1,4}}(?P<who>.{{1,80}}?)(?:\s+to\s+[^:]{{1,1000}})?"
    r"\s{0,4}:\s*(?P<text>.*)"
)


def _read_clocked(
    entry: re.Pattern[str], news: re.Pattern[str] | None = None
) -> Callable[[Sequence[str]], Iterator[LogEntry]]:
    """How to read such a log, with its own `news`; an earlier clock than the one before is of the next day."""

    def read(lines: Sequence[str]) -> Iterator[LogEntry]:
        found: list[tuple[str, list[str], float]] = []
        midnight = hours = 0.0
        for line in lines:
            match = entry.match(line)
            if match is not None:
                hour, minute = (int(n) for n in re.split(r"[:.]", match["time"])[:2])
                if match["day"]:
                    with contextlib.suppress(ValueError):  # no such day
                        midnight = datetime.fromisoformat(f"{match['day']}T00:00:00+00:00").timestamp() / 3600
                elif midnight + hour + minute / 60 < hours:
                    midnight += 24
                hours = midnight + hour + minute / 60
                found.append((match["who"].strip(), [match["text"]], hours))
            elif news is not None and news.match(line):
                midnight += 24 * line.startswith("--- Day changed")
                found.append(("", [], hours))
            elif found:
                found[-1][1].append(line.removeprefix("\t").rstrip())
        for who, texts, when in found:
            yield LogEntry(who, "\n".join(texts).strip("\n").rstrip() if who else "", when)

    return read


_FORMS: tuple[tuple[str, Callable[[str], bool], Callable[[Sequence[str]], Iterator[LogEntry]]], ...] = (
    ("line", lambda line: _LINE_ENTRY.match(line) is not None, _read_daily(_LINE_ENTRY)),
    ("kakaotalk", lambda line: _KAKAO_ENTRY.match(line) is not None, _read_daily(_KAKAO_ENTRY)),
    ("imessage", lambda line: _IMESSAGE.fullmatch(line) is not None, _read_imessage),
    ("irc", lambda line: _IRC.match(line) is not None, _read_clocked(_IRC, _IRC_NEWS)),
    ("zoom", lambda line: _ZOOM.match(line) is not None, _read_clocked(_ZOOM)),
    ("discord or teams", lambda line: _NAMED.fullmatch(_plain(line)) is not None, _read_named),
    ("whatsapp", _is_timed, _read_timed),
)
