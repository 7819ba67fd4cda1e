"""Characters as bytes: sets of code points in UTF-8, plain or as JSON writes them within a string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nanochat.generate.grammar.language import Language, Languages, byte_mask

Ranges = tuple[tuple[int, int], ...]  # code points from … to, both included, in order
CharacterWriter = Callable[[Ranges], Language]  # how a character of a set is written

LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)  # halves of characters, which UTF-8 can't hold
# Within a JSON string these must be escaped; other control characters are never written (as \u0000 they would cost six
# bytes, and no model means them).
ESCAPES = {'"': '"', "\\": "\\", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}


def ranges_of(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges in order, without overlaps."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)


def without(ranges: Ranges, gone: Ranges) -> Ranges:
    """The code points of `ranges` that are not in `gone`."""
    left = []
    for low, high in ranges:
        for start, stop in gone:
            if start > high:
                break
            if stop >= low:
                left.append((low, start - 1))
                low = stop + 1
        left.append((low, high))
    return tuple((low, high) for low, high in left if low <= high)


ANY: Ranges = without(((0, LAST),), (SURROGATES,))


def plain_character(space: Languages, ranges: Ranges) -> Language:
    """One character of a set, in UTF-8."""
    return space.either(
        space.then(*(space.one_of(byte_mask(range(low, high + 1))) for low, high in bytes_))
        for start, stop in without(ranges, (SURROGATES,))
        for bytes_ in _utf8(start, stop)
    )


def json_character(space: Languages, ranges: Ranges) -> Language:
    """One character of a set, as it stands in a JSON string."""
    written = without(ranges, ((0, 31), (34, 34), (92, 92)))  # control characters, " and \
    escaped = [name for c, name in ESCAPES.items() if any(low <= ord(c) <= high for low, high in ranges)]
    escapes = space.then(space.text(b"\\"), space.one_of(byte_mask(map(ord, escaped))))
    return space.either((plain_character(space, written), escapes))


def _utf8(start: int, stop: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Sequences of byte ranges that together are the UTF-8 of the code points from start to stop."""
    for length, last in ((1, 0x7F), (2, 0x7FF), (3, 0xFFFF), (4, LAST)):
        if start <= last:
            yield from _same_length(start, min(stop, last), length)
            start = last + 1
        if start > stop:
            return


def _same_length(start: int, stop: int, length: int) -> Iterator[tuple[tuple[int, int], ...]]:
    first, last = chr(start).encode(), chr(stop).encode()
    if length == 1:
        yield ((first[0], last[0]),)
        return
    # All but the last bytes of both alike: the last one is a range. Otherwise cut at the borders, where the bytes that
    # follow begin anew (0x80) or end (0xBF), so that in between each byte is a range of its own.
    for i in range(1, length):
        size = 1 << 6 * i
        if start // size != stop // size:
            if start % size:
                middle = start - start % size + size - 1
                yield from _same_length(start, middle, length)
                yield from _same_length(middle + 1, stop, length)
                return
            if (stop + 1) % size:
                middle = stop - stop % size - 1
                yield from _same_length(start, middle, length)
                yield from _same_length(middle + 1, stop, length)
                return
    yield tuple(zip(first, last, strict=True))
