r"""Regular expressions as languages: the part that Python's re and JavaScript's read alike.

Characters, escapes (\d \w \s \D \W \S \n \t \r \f \v \xHH \uHHHH and punctuation), classes, groups, alternatives,
quantifiers, `.`, and ^ and $ at the ends. Where the two disagree (is é a \w? is U+2028 a \s?) the characters in
question are never written, so that a text is right for both. Anything else is refused by name.
"""

from __future__ import annotations

import string
from collections.abc import Callable

from nanochat.generate.grammar.characters import ANY, LAST, CharacterWriter, Ranges, ranges_of, without
from nanochat.generate.grammar.language import Language, Languages

MOST_REPEATS = 2000
DIGITS: Ranges = ((48, 57),)
WORD: Ranges = ranges_of([(48, 57), (65, 90), (97, 122), (95, 95)])
SPACE: Ranges = ranges_of([(9, 13), (32, 32)])
ASCII: Ranges = ((0, 127),)
# Of the characters beyond ASCII, only some belong to these classes, and not the same ones everywhere.
CLASSES = {"d": DIGITS, "w": WORD, "s": SPACE}
CLASSES |= {name.upper(): without(ASCII, ranges) for name, ranges in CLASSES.items()}
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
LINE_ENDS: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))


class PatternError(ValueError):
    """Raised when a regular expression is wrong or not supported."""


def pattern_language(space: Languages, pattern: str, write: CharacterWriter, whole: bool = False) -> Language:
    """The texts that a regular expression finds something in; `whole`: that it matches from end to end.

    Raises:
        PatternError: it is wrong, or has something that is not supported.
    """
    return _Parser(space, pattern, write, whole).parse()


class _Parser:
    """Recursive descent. An alternative is (language, begins with ^, ends with $)."""

    def __init__(self, space: Languages, pattern: str, write: CharacterWriter, whole: bool) -> None:
        self.space, self.pattern, self.write, self.whole = space, pattern, write, whole
        self.at, self.depth = 0, 0

    def parse(self) -> Language:
        """The whole pattern; what stands before and behind a match may be anything, unless it is anchored."""
        options = self._alternatives(anchors=True)
        if self.at < len(self.pattern):
            raise self._error("a ) without its (")
        rest = self.space.repeat(self.write(ANY))
        around = [
            self.space.then(
                self.space.empty if self.whole or first else rest,
                body,
                self.space.empty if self.whole or last else rest,
            )
            for body, first, last in options
        ]
        return self.space.either(around)

    def _error(self, what: str) -> PatternError:
        return PatternError(f"the pattern {self.pattern!r} has {what} at character {self.at}")

    def _peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def _take(self, text: str) -> bool:
        found = self._peek(text)
        self.at += len(text) if found else 0
        return found

    def _next(self) -> str:
        if self.at >= len(self.pattern):
            raise self._error("an end too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def _alternatives(self, anchors: bool) -> list[tuple[Language, bool, bool]]:
        options = [self._sequence(anchors)]
        while self._take("|"):
            options.append(self._sequence(anchors))
        return options

    def _sequence(self, anchors: bool) -> tuple[Language, bool, bool]:
        parts: list[Language] = []
        first = last = False
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            if self._peek("^") or self._peek("\\A"):
                if not anchors or parts:
                    raise self._error("an ^ that is not at the beginning, which is not supported,")
                self.at += 1 if self._peek("^") else 2
                first = True
            elif self._peek("$") or self._peek("\\Z"):
                self.at += 1 if self._peek("$") else 2
                last = True
                if not anchors or self.pattern[self.at : self.at + 1] not in ("", "|", "$"):
                    raise self._error("a $ that is not at the end, which is not supported,")
            else:
                parts.append(self._quantified(self._atom()))
        return self.space.then(*parts), first, last

    def _atom(self) -> Language:
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            return self.write(self._class())
        if c == ".":
            return self.write(without(ANY, LINE_ENDS))
        if c == "\\":
            return self.write(self._escape())
        self.at -= 1
        if c in "*+?" or self._bounds() is not None:
            raise self._error(f"a {c} with nothing to repeat")
        self.at += 1
        return self.write(((ord(c), ord(c)),))

    def _group(self) -> Language:
        if self._take("?"):
            if self._take("P<") or (self._peek("<") and not self._peek("<=") and not self._peek("<!")):
                name_end = self.pattern.find(">", self.at)
                if name_end < 0:
                    raise self._error("a group name without its end")
                self.at = name_end + 1
            elif not self._take(":"):
                raise self._error(f"(?{self.pattern[self.at : self.at + 1]}, which is not supported,")
        self.depth += 1
        if self.depth > 50:
            raise self._error("groups nested too deeply")
        options = self._alternatives(anchors=False)
        if not self._take(")"):
            raise self._error("a ( without its )")
        self.depth -= 1
        return self.space.either(body for body, _, _ in options)

    def _quantified(self, part: Language) -> Language:
        if self._take("*"):
            least, most = 0, None
        elif self._take("+"):
            least, most = 1, None
        elif self._take("?"):
            least, most = 0, 1
        else:
            bounds = self._bounds()
            if bounds is None:
                return part
            least, most = bounds
        self._take("?")  # lazy: the same texts
        if any(map(self._peek, "+*?")):
            raise self._error("a quantifier after a quantifier")
        if most is not None and most < least:
            raise self._error(f"the bounds {least} and {most} the wrong way round")
        if max(least, most or 0) > MOST_REPEATS:
            raise self._error(f"more than {MOST_REPEATS} repetitions, which is not supported,")
        return self.space.repeat(part, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        """{m}, {m,} or {m,n}, taken; None if something else comes, as in `{x`."""
        end = self.pattern.find("}", self.at)
        if not self._peek("{") or end < 0:
            return None
        least, comma, most = self.pattern[self.at + 1 : end].partition(",")
        if not all(set(number) <= set(string.digits) for number in (least, most)) or not least:
            return None
        self.at = end + 1
        return int(least), int(most) if most else (None if comma else int(least))

    def _class(self) -> Ranges:
        negated = self._take("^")
        found: list[tuple[int, int]] = []
        whole_classes = False
        first = True
        while first or not self._take("]"):
            if first and self._peek("]"):  # Python: the character itself; JavaScript: an empty class
                raise self._error("a ] right after [, which is read in two ways: write \\]")
            first = False
            low, is_class = self._member()
            whole_classes |= is_class
            if is_class or not (self._peek("-") and not self._peek("-]")):
                found += low
                continue
            self.at += 1
            high, is_class = self._member()
            if is_class or high[0][0] < low[0][0]:
                raise self._error("a range that is none")
            found.append((low[0][0], high[0][0]))
        ranges = ranges_of(found)
        # Not a digit, not a space ...: beyond ASCII that depends on whose digits are meant.
        return without(ASCII if whole_classes else ANY, ranges) if negated else ranges

    def _member(self) -> tuple[Ranges, bool]:
        c = self._next()
        if c == "\\":
            name = self.pattern[self.at : self.at + 1]
            if name == "b":
                self.at += 1
                return ((8, 8),), False
            return self._escape(), name in CLASSES
        if c == "[" or (c in "&-~|" and self._peek(c)):  # Python warns of these, JavaScript's v flag means them
            if c == "[":
                return ((91, 91),), False
            raise self._error(f"{c}{c} in a class, which is not supported,")
        return ((ord(c), ord(c)),), False

    def _escape(self) -> Ranges:
        c = self._next()
        if c in CLASSES:
            return CLASSES[c]
        if c in CONTROLS and not (c == "0" and self.pattern[self.at : self.at + 1].isdigit()):
            return ((ord(CONTROLS[c]), ord(CONTROLS[c])),)
        if c in "xu":
            length = 2 if c == "x" else 4
            digits = self.pattern[self.at : self.at + length]
            if len(digits) == length and set(digits) <= set(string.hexdigits):
                self.at += length
                code = int(digits, 16)
                if code <= LAST:
                    return ((code, code),)
            raise self._error(f"an \\{c} without its {length} digits")
        if c.isalnum():
            raise self._error(f"\\{c}, which is not supported,")
        return ((ord(c), ord(c)),)


def writer(space: Languages, write: Callable[[Languages, Ranges], Language]) -> CharacterWriter:
    """`write` for one space, remembering what it has made."""
    made: dict[Ranges, Language] = {}

    def remember(ranges: Ranges) -> Language:
        if ranges not in made:
            made[ranges] = write(space, ranges)
        return made[ranges]

    return remember
