"""JSON numbers between bounds, as languages of their digits.

Bounds are compared exactly. A validator reads a number as a float, which rounds it: so numbers have at most 15 digits
in all, where different ones stay different, and a bound that a number must not reach is kept away from by a whole step
of its last digit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from fractions import Fraction

from nanochat.generate.grammar.language import Language, Languages, byte_mask

MOST_DIGITS = 15  # a float tells all decimals of so many digits apart
DECIMALS = 6  # after the point, where the bounds leave room for them
MOST_MULTIPLE = 1000
MOST_BOUND = 10**50
LARGEST = 10**MOST_DIGITS - 1


class Bounds:
    """What a schema says of a number: lower and upper bounds, each included or not.

    Args:
        minimum: the largest of all `minimum`s.
        maximum: the smallest of all `maximum`s.
        above: the largest of all `exclusiveMinimum`s.
        below: the smallest of all `exclusiveMaximum`s.
    """

    def __init__(
        self,
        minimum: float | None = None,
        maximum: float | None = None,
        above: float | None = None,
        below: float | None = None,
    ) -> None:
        self.minimum, self.maximum, self.above, self.below = minimum, maximum, above, below

    @property
    def any(self) -> bool:
        """True if there is a bound."""
        return any(bound is not None for bound in (self.minimum, self.maximum, self.above, self.below))

    def steps(self, decimals: int) -> tuple[int | None, int | None]:
        """(least, most) numbers within them, in units of the last of so many decimals; None: no bound."""
        unit = 10**decimals

        def exact(bound: float) -> Fraction:
            # Decimals are read as floats, as the bound was: the order of both as they were written is the order of what
            # they are read as. Integers are read exactly, and compared with what the bound's float really is.
            return (Fraction(repr(bound)) if decimals else Fraction(bound)) * unit

        lows = [math.ceil(exact(self.minimum))] if self.minimum is not None else []
        if self.above is not None:
            lows.append(self._next(math.floor(exact(self.above)) + 1, unit, self.above, 1))
        highs = [math.floor(exact(self.maximum))] if self.maximum is not None else []
        if self.below is not None:
            highs.append(self._next(math.ceil(exact(self.below)) - 1, unit, self.below, -1))
        return max(lows, default=None), min(highs, default=None)

    @staticmethod
    def _next(step: int, unit: int, bound: float, direction: int) -> int:
        """The first step that is also beyond the bound once it is read as a float."""
        if isinstance(bound, float) and float(Fraction(step, unit)) == bound:
            return step + direction
        return step


def integers(space: Languages, bounds: Bounds, multiple_of: int = 1) -> Language:
    """Integers within bounds, multiples of a number up to MOST_MULTIPLE."""
    least, most = bounds.steps(0)
    # An open or very far side ends where floats no longer tell integers apart, or well beyond the other bound.
    high = max(LARGEST, (least or 0) * 10 + 10**6)
    low = min(-LARGEST, (most or 0) * 10 - 10**6)
    low, high = low if least is None else max(low, least), high if most is None else min(high, most)
    body = _signed(space, low, high, functools.partial(_whole, space))
    if multiple_of == 1:
        return body
    digits = space.multiple(multiple_of)
    return space.both((body, space.either((digits, space.then(space.text(b"-"), digits)))))


def decimals(space: Languages, bounds: Bounds) -> Language:
    """Numbers within bounds; without any, also with an exponent."""
    digit = space.one_of(_digits(0, 9))
    if not bounds.any:
        whole = space.either((space.text(b"0"), _first_digit_then(space, digit)))
        fraction = space.then(space.text(b"."), space.repeat(digit, 1, MOST_DIGITS))
        exponent = space.then(
            space.one_of(byte_mask(b"eE")), space.optional(space.one_of(byte_mask(b"+-"))), space.repeat(digit, 1, 2)
        )
        parts = (space.text(b"-"), whole, fraction, exponent)
        return space.then(space.optional(parts[0]), whole, *(space.optional(part) for part in parts[2:]))
    for places in range(DECIMALS, MOST_DIGITS + 1):  # more of them only where fewer find nothing between the bounds
        limit = 10**MOST_DIGITS - 1
        least, most = bounds.steps(places)
        low, high = max(-limit, least if least is not None else -limit), min(limit, most if most is not None else limit)
        if low <= high:
            return _signed(space, low, high, functools.partial(_with_point, space, places))
    return integers(space, bounds)  # beyond 15 digits


def _first_digit_then(space: Languages, digit: Language) -> Language:
    return space.then(space.one_of(_digits(1, 9)), space.repeat(digit, 0, MOST_DIGITS - 1))


def _signed(space: Languages, low: int, high: int, unsigned: functools.partial[Language]) -> Language:
    """The numbers from low to high, by the language of those of at least 0. Zero has no sign."""
    options = []
    if high >= 0 and low <= high:
        options.append(unsigned(max(low, 0), high))
    if low < 0 and low <= high:
        options.append(space.then(space.text(b"-"), unsigned(max(1, -high), -low)))
    return space.either(options)


def _whole(space: Languages, low: int, high: int) -> Language:
    """Integers from low to high, at least 0, without leading zeros."""
    if low > high:
        return space.nothing
    options = [space.text(b"0")] if low == 0 else []
    for length in range(len(str(max(low, 1))), len(str(high)) + 1):
        first, last = max(low, 10 ** (length - 1)), min(high, 10**length - 1)
        if first <= last:
            options.append(_padded(space, first, last, length))
    return space.either(options)


def _padded(space: Languages, low: int, high: int, length: int) -> Language:
    """Exactly `length` digits, from low to high."""
    if length == 0:
        return space.empty
    return space.either(
        space.then(space.one_of(_digits(*digits)), _padded(space, *rest, length - 1))
        for digits, rest in _split(low, high, length)
    )


def _with_point(space: Languages, places: int, low: int, high: int) -> Language:
    """Numbers from low to high units of 10**-places, at least 0."""
    unit = 10**places
    (first, first_rest), (last, last_rest) = divmod(low, unit), divmod(high, unit)
    if first == last:
        return space.then(space.text(b"%d" % first), _fraction(space, first_rest, last_rest, places))
    options = [space.then(space.text(b"%d" % first), _fraction(space, first_rest, unit - 1, places))]
    options.append(space.then(space.text(b"%d" % last), _fraction(space, 0, last_rest, places)))
    options.append(space.then(_whole(space, first + 1, last - 1), _fraction(space, 0, unit - 1, places)))
    return space.either(options)


def _fraction(space: Languages, low: int, high: int, places: int) -> Language:
    """A point and up to `places` digits that, with zeros behind them, are a number from low to high; also nothing."""
    body = space.then(space.text(b"."), _unpadded(space, low, high, places))
    return space.optional(body) if low == 0 else body


def _unpadded(space: Languages, low: int, high: int, places: int) -> Language:
    options = []
    for digits, (rest_low, rest_high) in _split(low, high, places):
        tails = [space.empty] if rest_low == 0 else []
        if places > 1:
            tails.append(_unpadded(space, rest_low, rest_high, places - 1))
        options.append(space.then(space.one_of(_digits(*digits)), space.either(tails)))
    return space.either(options)


def _split(low: int, high: int, length: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The first of `length` digits of the numbers from low to high: (digits from … to, what the others may be)."""
    unit = 10 ** (length - 1)
    (first, low_rest), (last, high_rest) = divmod(low, unit), divmod(high, unit)
    if first == last:
        yield (first, first), (low_rest, high_rest)
        return
    if low_rest:
        yield (first, first), (low_rest, unit - 1)
        first += 1
    full = high_rest == unit - 1
    if first <= last - (not full):
        yield (first, last - (not full)), (0, unit - 1)
    if not full:
        yield (last, last), (0, high_rest)


def _digits(first: int, last: int) -> int:
    """The bytes of the digits from first to last."""
    return byte_mask(range(48 + first, 48 + last + 1))
