"""Text that was encoded twice, "StraÃŸe": its UTF-8 was taken for Windows-1252. Mended where that is sure."""

from __future__ import annotations

import re

# The bytes that Windows-1252 leaves undefined are the control characters of the same number.
_UNDEFINED = {byte: chr(byte) for byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
_LETTER = {byte: _UNDEFINED.get(byte) or bytes([byte]).decode("cp1252") for byte in range(0x80, 0x100)}
_BYTE = {letter: byte for byte, letter in _LETTER.items()} | {chr(byte): byte for byte in range(0x80, 0x100)}
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_CONTROLS = re.compile("[\x80-\x9f]")
# In UTF-8: a letter that is the first byte of one, and one that is a further byte. Bytes are searched several times as
# fast as letters, and nearly every text has none.
_SIGN = re.compile(b"\xc3[\x82-\xb4][\xc2\xc5\xc6\xcb\xe2]")
MOST_TIMES = 3
USUAL_FIRST = "ÂÃâ"  # of Latin letters and of punctuation
MANY_SIGNS = 3  # fewer may be a word about it


def mended(text: str) -> tuple[str, int, int]:
    """(text, letters that were mended, signs of it that were left: of a whole file MANY_SIGNS are worth a word).

    It is mended only if all its letters beyond ASCII are such, so that none is a guess.
    """
    better, count, left = _mended(text)
    if count and _CONTROLS.search(better):  # nobody writes these: the letters were what they look like
        return text, 0, count
    return better, count, left


def _mended(text: str) -> tuple[str, int, int]:
    count = 0
    for _ in range(MOST_TIMES):
        runs = _BEYOND_ASCII.findall(text) if _SIGN.search(text.encode("utf-8", "surrogatepass")) else []
        decoded = [_decoded(run) for run in runs]
        if not runs or None in decoded:
            usual = sum(d is not None and run[0] in USUAL_FIRST for run, d in zip(runs, decoded, strict=True))
            signs = sum(run is not None for run in decoded)
            return text, count, signs if signs >= MANY_SIGNS else usual
        letters = sum(len(run or "") for run in decoded)
        if letters < MANY_SIGNS and any(run[0] not in USUAL_FIRST for run in runs):
            return text, count, 0  # a word such as CAFÉ™
        count = letters
        text = _BEYOND_ASCII.sub(lambda match: _decoded(match[0]) or "", text)
    return text, count, 0


def _decoded(run: str) -> str | None:
    """What was meant by letters beyond ASCII; None if they are what they look like."""
    try:
        return bytes(_BYTE[letter] for letter in run).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None
