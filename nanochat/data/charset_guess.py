"""The encoding of bytes that are no UTF-8: by what letters the text would have, else by charset-normalizer.

The letters decide where the detector is weak: short texts of East Asia, and Latin letters, where nearly every byte is
valid in nearly every encoding.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from charset_normalizer import from_bytes

# The name in a file often means the larger set that Windows made of it (as browsers take it).
LARGER = {
    **dict.fromkeys(("ascii", "iso8859-1", "latin-1"), "cp1252"),
    **dict.fromkeys(("gb2312", "gbk", "cp936"), "gb18030"),
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
}
# Tried by the detector; others are either contained in one of these or so rare that they are named by hand.
GUESSES = (
    *(
        "utf_8",
        "cp1252",
        "cp1250",
        "cp1251",
        "cp1253",
        "cp1254",
        "cp1255",
        "cp1256",
        "cp1257",
        "cp1258",
        "koi8_r",
        "koi8_u",
    ),
    *(
        "cp866",
        "cp874",
        "gb18030",
        "big5",
        "big5hkscs",
        "shift_jis",
        "cp932",
        "euc_jp",
        "cp949",
        "euc_kr",
        "mac_cyrillic",
    ),
    *("mac_roman", "iso8859_2", "iso8859_5", "iso8859_7", "iso8859_8", "iso8859_6", "cp862", "cp437", "cp850", "cp852"),
)
SAMPLE_BYTES = 1 << 16
KEPT_ASCII = 200
LAST_OF_CP862 = 0x9A
_LONG_ASCII = re.compile(rb"[\x00-\x7f]{1000,}")
ENOUGH = 0.8  # of the letters must be usual ones
ALL_HANGUL = 0.95  # of the letters of a Korean text are; of a Chinese one read as Korean it would be two thirds
# Letters beyond ASCII of languages in Latin letters, each group one language; an encoding fits as well as its best one.
WEST = ["àâæçéèêëîïôœùûüÿ", "äöüß", "áéíñóúü¿¡ºª", "àáâãçéêíóôõú", "àèéìíîòóùú", "åäöéæøü", "áéëèïóöüí", "áðéíóúýþæö"]
EAST = ["ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíľĺňóôŕšťúýž", "áéíóöőúüű", "ăâîşţșț", "čćđšž"]
LATIN = {
    "cp1252": WEST,
    "cp1250": EAST,
    "iso8859_2": EAST,
    "cp1254": ["çğıöşüâî"],
    "cp1257": ["āčēģīķļņšūž", "ąčęėįšųūž", "äõöüšž"],
    "mac_roman": WEST,
    "cp850": WEST,
    "cp852": EAST,
}
PUNCTUATION = frozenset("“”„‘’‚–—…«»‹›€§°·•©®™\u00a0\u00ad²³½£")


def fits(data: bytes, name: str) -> bool:
    """True if the bytes are valid in an encoding, but for a cut character at the end."""
    return _strict(data, name) is not None


def _strict(data: bytes, name: str) -> str | None:
    try:
        return codecs.getincrementaldecoder(name)("strict").decode(data)
    except (UnicodeDecodeError, LookupError):
        return None


def detect(data: bytes) -> str | None:
    """The encoding of bytes that are no UTF-8, None if it can't be told surely."""
    lines = [line for line in data.splitlines(keepends=True) if not line.isascii()]  # the others say nothing
    # Nor does most of a line as long as a book.
    data = _LONG_ASCII.sub(lambda run: run[0][:KEPT_ASCII] + run[0][-KEPT_ASCII:], b"".join(lines))[:SAMPLE_BYTES]
    if (east := _east_asian(data)) is not None:
        return east
    best = from_bytes(data, cp_isolation=list(GUESSES)).best()
    name = None if best is None or best.encoding == "utf_8" else LARGER.get(best.encoding, best.encoding)
    # In capitals only, without Э, Ю and Я, and with more Д and Й than И and О: it is Hebrew of DOS (he, yod; tet, mem).
    if (
        name == "cp866"
        and max(data) <= LAST_OF_CP862
        and data.count(0x84) + data.count(0x89) > data.count(0x88) + data.count(0x8E)
    ):
        return "cp862"
    if name is None or name in LATIN or name in ("cp437", "cp1258"):
        return _latin(data) or name
    return name


def _latin(data: bytes) -> str | None:
    """The encoding in which the letters beyond ASCII are those of one language; None if there is none."""
    best, best_share = None, ENOUGH
    for name, alphabets in LATIN.items():
        text = _strict(data, name)
        if text is None:
            continue
        beyond = Counter(letter.lower() for letter in text if letter > "\x7f" and letter not in PUNCTUATION)
        known = max(sum(beyond[letter] for letter in alphabet) for alphabet in alphabets)
        share = known / beyond.total() if beyond else 1.0
        if share > best_share:
            best, best_share = name, share
    return best


def _in_set(name: str, first: int, last: int) -> Callable[[str], bool]:
    """Whether a character is among the frequent ones of a set, which these first bytes have."""

    def usual(letter: str) -> bool:
        try:
            code = letter.encode(name)
        except UnicodeEncodeError:
            return False
        return len(code) == 2 and first <= code[0] <= last

    return usual


def _east_asian(data: bytes) -> str | None:
    """The encoding of Chinese, Japanese or Korean in which nearly all characters are frequent ones; None if none."""
    # The frequent characters have places of their own in these sets: level 1 of GB 2312 and Big5, Hangul of KS X 1001.
    tests: dict[str, Callable[[str], bool]] = {
        "cp949": _in_set("euc_kr", 0xB0, 0xC8),
        "gb18030": _in_set("gb2312", 0xB0, 0xD7),
        "big5hkscs": _in_set("big5", 0xA4, 0xC6),
        "cp932": _is_kana,
        "euc_jp": _is_kana,
    }
    best, best_share = None, ENOUGH
    for name, usual in tests.items():
        text = _strict(data, name)
        letters = Counter(c for c in text if unicodedata.category(c) == "Lo") if text is not None else Counter[str]()
        if letters.total() < 4:
            continue
        share = sum(count for letter, count in letters.items() if usual(letter)) / letters.total()
        if usual is _is_kana:  # Japanese mixes kana with Chinese characters: a third of kana is much
            share = min(1.0, 2.5 * share) if 3 * share >= 1 else 0.0
        if name == "cp949" and share > ALL_HANGUL:  # where Hangul is, GB 2312 has frequent characters too
            return name
        if share > best_share and name != "cp949":
            best, best_share = name, share
    return best


def _is_kana(letter: str) -> bool:
    return "\u3041" <= letter <= "\u30fe"  # half-width kana do not count: many bytes look like them
