"""Bytes of any encoding as UTF-8, as they are read: marks, UTF-16 and UTF-32 without one, declared, else detected.

A stream is taken for UTF-8 until the first byte that is none. If all before it was ASCII the encoding is guessed from
what follows (charset-normalizer) and the rest is read in it. If there was real UTF-8 before, the file is damaged: what
is no UTF-8 becomes U+FFFD and is counted.
"""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from collections.abc import Callable
from typing import IO

from nanochat.data.charset_guess import LARGER, detect, fits
from nanochat.data.inventory import NotReadError

WINDOW_BYTES = 1 << 18  # looked at when an encoding must be guessed
BLOCK_BYTES = 1 << 18
REPAIR = "nanochat_repair"  # the name of the codec error handler
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
UNKNOWN = "encoding not recognised (ENCODING=cp1251, or its right name, says which)"
BINARY = "no text (binary content)"
# A character beyond U+FFFF as Java and old databases write it in UTF-8 (CESU-8): the two halves that UTF-16 has.
_HALVES = re.compile(b"\xed[\xa0-\xaf][\x80-\xbf]\xed[\xb0-\xbf][\x80-\xbf]")
_CUT_HALVES = re.compile(b"\xed(?:[\xa0-\xaf](?:[\x80-\xbf](?:\xed[\xb0-\xbf]?)?)?)?\\Z")
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16: its mark begins like this one
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
CONTROL_SHARE = 0.001  # of the bytes: more control characters than in any text, so it may be UTF-16
BINARY_SHARE = 0.05  # of bytes that are no UTF-16 either: then it is no text
MANY_WORDS = 3  # of UTF-7: fewer are a formula
MOST_SCRIPTS = 4  # of one text
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")


class Repairs:
    """Counts the characters that had to be replaced, from when it was made."""

    def __init__(self) -> None:
        self.characters = 0
        self.nul = 0
        """NUL characters, which are left out."""
        codecs.register_error(REPAIR, self._replace)

    def _replace(self, error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeDecodeError):
            raise error
        if error.encoding == "utf-8" and (halves := _HALVES.match(error.object, error.start)):
            text = halves[0].decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass").decode("utf-16")
            return text, halves.end()
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


def known_encoding(name: str) -> str:
    """Python's name of an encoding, of the larger set where a name is used for that.

    Raises:
        ValueError: there is no such encoding.
    """
    try:
        info = codecs.lookup(name)
    except LookupError:
        info = None
    if info is None or not getattr(info, "_is_text_encoding", True):
        raise ValueError(f"ENCODING={name}: there is no such encoding; examples: cp1251, gb18030, shift_jis, utf-16-le")
    return LARGER.get(info.name, info.name)


class Utf8Stream(io.RawIOBase):
    """A stream of bytes in any encoding as UTF-8.

    Args:
        stream: the bytes.
        repairs: counts what is replaced.
        encoding: what it is in, if the user said so; nothing is detected then.
        declared: what the file itself says, if it does.
        found: told the name of an encoding that is not UTF-8, and whether it was guessed.

    Raises:
        NotReadError: (while reading) it is no text, or its encoding can't be told.
    """

    def __init__(
        self,
        stream: IO[bytes],
        repairs: Repairs,
        encoding: str | None = None,
        declared: str | None = None,
        found: Callable[[str, bool], None] = lambda name, guessed: None,
    ) -> None:
        self.stream, self.repairs, self.declared, self.found = stream, repairs, declared, found
        self.ended = self._handed_out = False
        self._out, self._at = b"", 0
        self._held = b""  # bytes that are read but not decoded: the beginning of a character
        self._letters = 0  # valid ones beyond ASCII so far
        self._decoder: codecs.IncrementalDecoder | None = None  # None: UTF-8 as long as it lasts
        self._start(encoding)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill the buffer."""
        while self._at >= len(self._out) and not self.ended:
            self._out, self._at = self._next(), 0
        part = self._out[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        self._handed_out = self._handed_out or bool(part)
        return len(part)

    def _read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        parts, left = [], size
        while left and (part := self.stream.read(left)):
            parts.append(part)
            left -= len(part)
        self.ended = self.ended or left > 0
        return b"".join(parts)

    def _start(self, forced: str | None) -> None:
        self._held = self._read(WINDOW_BYTES)
        mark = next((mark for mark in MARKS if self._held.startswith(mark)), b"")
        guess = None
        if forced is not None:
            self._use(forced, guessed=False)
        elif mark:
            self._held = self._held[len(mark) :]
            self._use(MARKS[mark], guessed=False)
        elif b"\x1b$" in self._held:
            guess = _escaped(self._held)
        else:
            share = control_share(self._held)
            guess = wide_encoding(self._held) if share > CONTROL_SHARE else None
            if guess is None and share > BINARY_SHARE:
                raise NotReadError(BINARY)
            # Only then: the bytes of UTF-16 may be ASCII too, with "+" among them.
            if guess is None and self._held.isascii() and (b"~{" in self._held or b"+" in self._held):
                guess = _in_ascii(self._held)
        if guess is not None:
            self._use(guess, guessed=True)
        self._out = self._decoded(self._held)

    def _use(self, name: str, guessed: bool) -> None:
        if name != "utf-8":
            self._decoder = codecs.getincrementaldecoder(name)(REPAIR)
            self.found(name, guessed)

    def _next(self) -> bytes:
        return self._decoded(self._held + self._read(BLOCK_BYTES))

    def _decoded(self, data: bytes) -> bytes:
        """`data` as UTF-8; what may be the beginning of a character is held back."""
        self._held = b""
        if self._decoder is not None:
            # The decoder itself would take the first half of such a pair for damage. No other encoding minds the delay.
            if not self.ended and (cut := _CUT_HALVES.search(data[-5:])):
                data, self._held = data[: -len(cut[0])], cut[0]
            return self._clean(self._decoder.decode(data, self.ended))
        if data.isascii():
            return self._clean_bytes(data)
        try:
            text, used = codecs.utf_8_decode(data, "strict", self.ended)
        except UnicodeDecodeError as error:
            return self._not_utf8(data, error.start)
        self._letters += used - len(text)  # each letter beyond ASCII has more bytes than characters
        self._held = data[used:]
        return self._clean_bytes(data[:used])

    def _not_utf8(self, data: bytes, first: int) -> bytes:
        """The first byte that is no UTF-8 is met: decide what it is."""
        if not self.ended and len(data) - first < WINDOW_BYTES // 2:
            data += self._read(WINDOW_BYTES)
        if data.count(b"@") > data.count(b" ") + len(data) // 20 and b"\n" not in data[:WINDOW_BYTES]:
            raise NotReadError(UNKNOWN)  # EBCDIC, where "@" is the space
        # Words of another encoding hardly ever are valid UTF-8 as a whole, though parts of them may be.
        words = _BEYOND_ASCII.findall(data.decode("utf-8", "replace"))
        broken = sum("\ufffd" in word for word in words)
        halves = _HALVES.match(data, first) is not None
        if halves:
            self.found("CESU-8", True)
        if self._letters > 0 or len(words) >= 2 * broken or halves:
            name: str | None = "utf-8"
        else:
            name = self.declared if self.declared and fits(data, self.declared) else detect(data)
        if name is None and self._handed_out:
            name = "utf-8"  # too late to leave the file out: what is replaced is counted
        if name is None:
            raise NotReadError(UNKNOWN)
        if name == "utf-8":
            self._decoder = codecs.getincrementaldecoder("utf-8")(REPAIR)
        else:
            self._use(name, guessed=name != self.declared)
        return self._decoded(data)

    def _clean(self, text: str) -> bytes:
        return self._clean_bytes(text.encode("utf-8", "surrogatepass"))

    def _clean_bytes(self, data: bytes) -> bytes:
        """Without NUL characters."""
        if b"\0" in data:
            self.repairs.nul += data.count(b"\0")
            return data.replace(b"\0", b"")
        return data


# --- telling an encoding ----------------------------------------------------------------------------------------------


def control_share(data: bytes) -> float:
    """The share of bytes that are control characters which no text has: in UTF-16 and UTF-32 they are halves."""
    return sum(map(data.count, map(bytes, ([i] for i in (*range(9), *range(14, 27), *range(28, 32)))))) / max(
        1, len(data)
    )


def wide_encoding(data: bytes) -> str | None:
    """UTF-32 or UTF-16 without a mark, None if the bytes are neither."""
    best, best_score = None, 0.9
    letters = data.replace(b"\0", b"")
    # Two letters of ASCII make one of UTF-16 that looks Chinese.
    beyond = len(letters.translate(None, bytes(range(9, 127))))
    looks_ascii = beyond < 0.05 * len(letters) and not any(map(_are_upper, (data[::2], data[1::2])))
    for name in WIDE:
        width = 4 if "32" in name else 2
        part = data[: len(data) // width * width]
        text = codecs.getincrementaldecoder(name)("replace").decode(part[: 1 << 16])
        if not text or len(data) < width:
            continue
        score = sum(1 for letter in text if _is_usual(letter) and (letter < "\u0100" or not looks_ascii)) / len(text)
        if score > best_score:
            best, best_score = name, score
    return best


def _are_upper(half: bytes) -> bool:
    """True if every other byte is the upper one of a script whose lower ones look like ASCII.

    Those of Devanagari are tabs, of Thai 14, and NUL where a space is. A table in ASCII has no NULs; one in UTF-16 has
    its tabs among the letters.
    """
    small, script = (len(half) - len(half.translate(None, bytes(range(first, 32)))) for first in (0, 9))
    return 0 in half and small > 0.9 * len(half) and script > 0.05 * len(half)


def _is_usual(letter: str) -> bool:
    """True for characters that texts consist of."""
    code = ord(letter)
    if code < 0x20:
        return letter in "\t\n\r\f"
    # Latin to Mongolian, punctuation, kana, CJK, Hangul, full-width forms, emoji.
    return (
        *(code < 0x7F or 0xA0 <= code < 0x1AB0 or 0x1E00 <= code < 0x2070 or 0x20A0 <= code < 0x20C0,),
        *(0x2100 <= code < 0x2200, 0x3000 <= code < 0x3130, 0x4E00 <= code < 0xA000, 0xAC00 <= code < 0xD7A4),
        *(0xFF00 <= code < 0xFFF0, 0x1F300 <= code < 0x1FB00),
    ).count(True) > 0


def _escaped(data: bytes) -> str | None:
    """ISO-2022-JP or -KR, whose letters stand between escape sequences."""
    for name in ("iso2022_jp_2", "iso2022_kr"):
        if fits(data, name):
            return name
    return None


_UTF7_WORD = re.compile(rb"\+[A-Za-z0-9+/]{2,}-?")


def _in_ascii(data: bytes) -> str | None:
    """HZ or UTF-7, which write other letters in ASCII; None if it is ASCII itself, where + and ~ are what they are."""
    for name, first in (("hz", b"~{"), ("utf_7", b"+")):
        words = data.count(first) if name == "hz" else len(_UTF7_WORD.findall(data))
        if not words or (name == "utf_7" and words < MANY_WORDS):
            continue
        try:
            text = codecs.getincrementaldecoder(name)("strict").decode(data)
        except UnicodeDecodeError:
            continue
        beyond = [letter for letter in text if letter > "\x7f"]
        # Base64 and sums between "+" would be letters of all scripts, most of them of none.
        if (
            beyond
            and all(map(_is_usual, beyond))
            and len({unicodedata.name(c, "?")[:3] for c in beyond}) <= MOST_SCRIPTS
        ):
            return name
    return None
