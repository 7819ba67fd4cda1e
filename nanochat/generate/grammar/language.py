"""Sets of byte strings, and what remains of one after its first byte: the machine behind constrained answers.

A language is an expression: bytes, one after the other, either of several, repeated, both at once, anything but. Its
derivative by a byte b is the language of what may follow b. Derivatives are expressions again, and equal ones are one
object: so the expressions that are met on the way are the states of an automaton, made as far as it is walked.

Source: Brzozowski, "Derivatives of Regular Expressions" (1964); Owens et al., "Regular-expression derivatives
re-examined" (2009), for taking all bytes with the same derivative together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Kind = Literal["bytes", "set", "then", "either", "repeat", "both", "not", "multiple"]

ALL_BYTES = (1 << 256) - 1
NEVER = 1 << 30  # the length of the shortest string of a language without any
MAX_SEARCHED = 5_000  # states looked at to find the shortest string of one language
MAX_PARTS = 400_000  # of all expressions of one automaton together


class TooComplex(ValueError):
    """Raised when an automaton would get too large."""

    def __init__(self) -> None:
        super().__init__("the asked form is too complex: make its patterns, bounds or alternatives simpler")


class Language:
    """A set of byte strings. Made by `Languages` only, which makes equal ones once."""

    __slots__ = ("_edges", "_least", "index", "kind", "nullable", "parts", "space")

    def __init__(self, space: Languages, kind: Kind, parts: tuple[Any, ...], nullable: bool, index: int) -> None:
        self.space, self.kind, self.parts, self.nullable, self.index = space, kind, parts, nullable, index
        self._edges: list[tuple[int, Language]] | None = None
        self._least: int | None = None

    @property
    def edges(self) -> list[tuple[int, Language]]:
        """(set of first bytes, what may follow any of them) pairs; the sets, as 256-bit numbers, are disjoint."""
        if self._edges is None:
            self._edges = [(mask, rest) for mask, rest in self.space.derive(self) if rest is not self.space.nothing]
        return self._edges

    @property
    def least(self) -> int:
        """The length of a short string of it, NEVER if there is none: one byte of it is as much nearer to the end.

        It is the shortest, except between states that `Languages.search` has met already.
        """
        if self._least is None:
            self.space.measure(self)
            assert self._least is not None
        return self._least


class Languages:
    """Makes languages, and knows those it has made: the states of one automaton."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Language] = {}
        self.states: list[Language] = []  # by their index
        self._parts = 0
        self.nothing = self._make("either", (), False)  # no string at all
        self.empty = self._make("bytes", (b"",), True)  # the empty string
        self.everything = self._make("not", (self.nothing,), True)

    def _make(self, kind: Kind, parts: tuple[Any, ...], nullable: bool) -> Language:
        # Parts are languages (told apart by identity, as equal ones are one) or plain values.
        key = (kind, *parts)
        found = self._made.get(key)
        if found is None:
            self._parts += 1 + len(parts)
            if self._parts > MAX_PARTS:
                raise TooComplex
            found = self._made[key] = Language(self, kind, parts, nullable, len(self.states))
            self.states.append(found)
        return found

    # --- making them --------------------------------------------------------------------------------------------------

    def text(self, data: bytes) -> Language:
        """Exactly these bytes."""
        return self._make("bytes", (data,), not data)

    def one_of(self, mask: int) -> Language:
        """One byte of a set, a 256-bit number."""
        return self._make("set", (mask,), False) if mask else self.nothing

    def then(self, *parts: Language) -> Language:
        """One after the other."""
        result = self.empty
        for part in reversed(parts):
            result = self._then(part, result)
        return result

    def _then(self, first: Language, rest: Language) -> Language:
        if first is self.nothing or rest is self.nothing:
            return self.nothing
        if first is self.empty:
            return rest
        if rest is self.empty:
            return first
        if first.kind == "bytes" and rest.kind == "bytes":
            return self.text(first.parts[0] + rest.parts[0])
        if first.kind == "then":  # to the right, so that what is left to do is shared; no recursion: it may be long
            chain = [first.parts[0]]
            while (first := first.parts[1]).kind == "then":
                chain.append(first.parts[0])
            return self.then(*chain, first, rest)
        return self._make("then", (first, rest), first.nullable and rest.nullable)

    def either(self, options: Iterable[Language]) -> Language:
        """Any of several."""
        flat: dict[int, Language] = {}
        for option in options:
            for part in option.parts if option.kind == "either" else (option,):
                flat[part.index] = part
        if self.everything.index in flat:
            return self.everything
        parts = tuple(flat[index] for index in sorted(flat))
        return parts[0] if len(parts) == 1 else self._make("either", parts, any(p.nullable for p in parts))

    def optional(self, part: Language) -> Language:
        """This or nothing."""
        return self.either((part, self.empty))

    def repeat(self, part: Language, least: int = 0, most: int | None = None) -> Language:
        """`least` to `most` times the part; None: any number of times."""
        if most is not None and most < least:
            return self.nothing
        if part is self.nothing:
            return self.empty if least == 0 else part
        if most == 0 or part is self.empty:
            return self.empty
        if least == most == 1:
            return part
        if part.nullable:
            least = 0
        return self._make("repeat", (part, least, most), least == 0)

    def both(self, parts: Iterable[Language]) -> Language:
        """What is in all of these."""
        kept = {part.index: part for part in parts if part is not self.everything}
        if self.nothing.index in kept:
            return self.nothing
        if not kept:
            return self.everything
        flat = tuple(kept[index] for index in sorted(kept))
        return flat[0] if len(flat) == 1 else self._make("both", flat, all(p.nullable for p in flat))

    def anything_but(self, part: Language) -> Language:
        """Every byte string that is not in it."""
        return part.parts[0] if part.kind == "not" else self._make("not", (part,), not part.nullable)

    def texts(self, options: Iterable[bytes]) -> Language:
        """Any of these texts. What they begin with in common is written once, so that many cost no more than few."""
        groups: dict[int, list[bytes]] = {}
        ended = False
        for option in dict.fromkeys(options):
            if option:
                groups.setdefault(option[0], []).append(option)
            else:
                ended = True
        parts = [self.empty] if ended else []
        for group in groups.values():
            common = _common_beginning(group)
            rest = self.texts(text[common:] for text in group) if len(group) > 1 else self.text(group[0][common:])
            parts.append(self.then(self.text(group[0][:common]), rest))
        return self.either(parts)

    def multiple(self, of: int, remainder: int = 0) -> Language:
        """Decimal digits of which `remainder` times a power of ten, plus their number, is a multiple of `of`."""
        return self._make("multiple", (of, remainder), remainder == 0)

    # --- walking them -------------------------------------------------------------------------------------------------

    def derive(self, language: Language) -> list[tuple[int, Language]]:
        """The edges of a language (see `Language.edges`), computed."""
        kind, parts = language.kind, language.parts
        if kind == "bytes":
            data = parts[0]
            return [(1 << data[0], self.text(data[1:]))] if data else []
        if kind == "set":
            return [(parts[0], self.empty)]
        if kind == "then":
            first, rest = parts
            edges = [(mask, self._then(after, rest)) for mask, after in first.edges]
            return self._join([*edges, *rest.edges]) if first.nullable else self._join(edges)
        if kind == "either":
            return self._join([edge for part in parts for edge in part.edges])
        if kind == "repeat":
            part, least, most = parts
            again = self.repeat(part, max(0, least - 1), None if most is None else most - 1)
            return self._join([(mask, self._then(after, again)) for mask, after in part.edges])
        if kind == "both":
            return self._meet(parts)
        if kind == "not":
            edges = [(mask, self.anything_but(after)) for mask, after in parts[0].edges]
            others = ALL_BYTES & ~sum(mask for mask, _ in edges)
            return [*edges, (others, self.everything)] if others else edges
        of, remainder = parts
        return [(1 << 48 + digit, self.multiple(of, (10 * remainder + digit) % of)) for digit in range(10)]

    def _join(self, edges: Sequence[tuple[int, Language]]) -> list[tuple[int, Language]]:
        """Edges whose sets may overlap as edges whose sets don't: a byte of several leads to either."""
        classes: list[tuple[int, tuple[Language, ...]]] = []
        for mask, rest in edges:
            split = []
            for known, rests in classes:
                if common := known & mask:
                    split.append((common, (*rests, rest)))
                if left := known & ~mask:
                    split.append((left, rests))
                mask &= ~common
            if mask:
                split.append((mask, (rest,)))
            classes = split
        return _by_target((mask, self.either(rests)) for mask, rests in classes)

    def _meet(self, parts: Sequence[Language]) -> list[tuple[int, Language]]:
        edges: list[tuple[int, tuple[Language, ...]]] = [(ALL_BYTES, ())]
        for part in parts:
            edges = [(m & mask, (*rests, rest)) for m, rests in edges for mask, rest in part.edges if m & mask]
        return _by_target((mask, self.both(rests)) for mask, rests in edges)

    # --- their shortest strings ---------------------------------------------------------------------------------------

    def measure(self, language: Language) -> None:
        """Set `least`.

        Raises:
            TooComplex: it would take too long to find out.
        """
        kind, parts = language.kind, language.parts
        if kind in ("both", "not", "multiple"):
            self.search(language)
            return
        if kind == "bytes":
            least = len(parts[0])
        elif kind == "set":
            least = 1
        elif kind == "either":
            least = min((part.least for part in parts), default=NEVER)
        elif kind == "repeat":
            least = parts[0].least * parts[1] if parts[1] else 0
        else:
            least, rest = 0, language
            while rest.kind == "then" and rest._least is None:  # no recursion: a chain may be long
                least += rest.parts[0].least
                rest = rest.parts[1]
            least += rest.least
        language._least = min(least, NEVER)

    def search(self, start: Language) -> None:
        """Set `least` of a language and of those on the way to the nearest end, breadth first.

        A state whose `least` is known counts as an end: so states beside a path that was found cost little. What they
        get may be more than the shortest, but following it always leads to the end.
        """
        before: dict[Language, Language | None] = {start: None}
        waiting = deque([start])
        while waiting:
            state = waiting.popleft()
            if state.nullable or (state._least is not None and state._least < NEVER):
                least = 0 if state.nullable else state._least or 0
                step: Language | None = state
                while step is not None:
                    step._least = least
                    least, step = least + 1, before[step]
                return
            if len(before) > MAX_SEARCHED:
                raise TooComplex
            for _, rest in state.edges:
                if rest not in before and rest._least != NEVER:
                    before[rest] = state
                    waiting.append(rest)
        for state in before:  # none of these ever ends
            state._least = NEVER

    def shortest(self, language: Language) -> bytes:
        """A string of `least` bytes that is in a language; of several, readable ones."""
        written = bytearray()
        while language.least:
            mask, rest = min(language.edges, key=lambda edge: (edge[1].least, -edge[0]))
            readable = mask & _READABLE or mask
            written.append((readable & -readable).bit_length() - 1)
            language = rest
        return bytes(written)


def byte_mask(values: Iterable[int]) -> int:
    """A set of bytes as a 256-bit number."""
    mask = 0
    for value in values:
        mask |= 1 << value
    return mask


_READABLE = byte_mask(b"0123456789abcdefghijklmnopqrstuvwxyz")


def _by_target(edges: Iterable[tuple[int, Language]]) -> list[tuple[int, Language]]:
    joined: dict[Language, int] = {}
    for mask, rest in edges:
        joined[rest] = joined.get(rest, 0) | mask
    return [(mask, rest) for rest, mask in joined.items()]


def _common_beginning(texts: Sequence[bytes]) -> int:
    first, last = min(texts), max(texts)
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
