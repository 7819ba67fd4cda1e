"""JSON strings as languages: any, of some lengths, of a pattern, of a format."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.generate.grammar.characters import ANY, json_character
from nanochat.generate.grammar.language import Language, Languages
from nanochat.generate.grammar.patterns import pattern_language, writer

DATE = (
    "(?:19|20)[0-9]{2}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"  # never the 29th of February: it depends on the year
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = f"{_CLOCK}:[0-5][0-9](?:\\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_NAME = "[a-z0-9]{1,20}(?:-[a-z0-9]{1,20}){0,2}"
HOST = f"{_NAME}(?:\\.{_NAME}){{0,3}}"
# Each is a part of what the format allows: the part that every reader takes.
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": "P(?:[0-9]{1,4}[YMWD]|T[0-9]{1,4}[HMS])",
    "email": f"[a-z0-9]{{1,20}}(?:[._+-][a-z0-9]{{1,20}}){{0,2}}@{_NAME}(?:\\.{_NAME}){{0,2}}\\.[a-z]{{2,6}}",
    "hostname": HOST,
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
    "ipv6": "[0-9a-f]{1,4}(?::[0-9a-f]{1,4}){7}",
    "uri": f"https?://{HOST}(?:/[A-Za-z0-9._~-]*){{0,10}}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[1-5][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}


class JsonStrings:
    """Makes the strings of one space."""

    def __init__(self, space: Languages) -> None:
        self._space = space
        self._write = writer(space, json_character)
        self._quote = space.text(b'"')
        # Keys that a schema doesn't name: without escapes, so that one key is written in one way only.
        self._plain = self._write(
            tuple((low, high) for low, high in ((32, 33), (35, 91), (93, 0xD7FF), (0xE000, ANY[-1][1])))
        )

    def string(
        self, least: int = 0, most: int | None = None, patterns: Sequence[str] = (), format_: str | None = None
    ) -> Language:
        """Strings of `least` to `most` characters in which every pattern is found.

        Raises:
            PatternError: a pattern is wrong or not supported.
        """
        body = self._space.repeat(self._write(ANY), least, most)
        if not patterns and format_ is None:
            return self._quoted(body)
        parts = [pattern_language(self._space, pattern, self._write) for pattern in patterns]
        if format_ is not None:
            parts.append(pattern_language(self._space, FORMATS[format_], self._write, whole=True))
        if least or most is not None:
            parts.append(body)
        return self._quoted(self._space.both(parts))

    def key_but(self, names: Sequence[bytes], first: int | None = None, apart_from: int = 0) -> Language:
        """Keys that are none of the `names` (written, without quotes).

        Args:
            names: the keys that a schema gives a meaning of their own.
            first: the byte that the key begins with; None: any.
            apart_from: the key begins with none of this many letters from a on.
        """
        space = self._space
        rest = space.repeat(self._plain)
        if first is not None:
            start = space.one_of(1 << first)
        elif apart_from:
            letters = space.texts(bytes([97 + i]) for i in range(apart_from))
            start = space.both((self._plain, space.anything_but(letters)))
        else:
            start = self._plain
        key = space.then(start, rest)
        return self._quoted(space.both((key, space.anything_but(space.texts(names)))) if names else key)

    def _quoted(self, body: Language) -> Language:
        return self._space.then(self._quote, body, self._quote)
