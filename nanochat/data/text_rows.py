"""Two ways to cut the token stream into rows of T+1 tokens: `stream`, the classic one, and `bestfit`.

stream: all tokens one after the other; row g is the tokens from gT to gT + T, so the last token of a row is the first
    of the next one, every token is learned once and none is lost. Rows begin anywhere.
bestfit: every row begins at a document. A row takes the longest document that still fits, again and again; when none
    fits, the shortest one left is cropped to fill the gap and the rest of it is thrown away (counted as `cropped`). So
    no token ever sees a context that began in the middle of a document. Documents are taken in windows of WINDOW_ROWS
    rows' worth of tokens, each window packed by itself and its rows shuffled: a place in the sequence of rows is the
    place where the window begins and a number of rows. What is left at a window's end makes one padded row.
"""

from __future__ import annotations

import bisect
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from nanochat.data.token_stream import Block, Position, Tokens, TokenStream

WINDOW_ROWS = 128  # more pack tighter, fewer resume faster


@dataclass(frozen=True)
class Counts:
    """What has become of the tokens of the rows so far, over all ranks."""

    rows: int = 0
    tokens: int = 0
    """In the rows (a token that ends one row and begins the next one is counted once)."""
    cropped: int = 0
    """Thrown away with the ends of cropped documents."""
    padding: int = 0
    """Places left empty."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def cropped_share(self) -> float:
        """Cropped tokens as a share of all that were read."""
        return self.cropped / max(1, self.tokens + self.cropped)


@dataclass(frozen=True)
class Place:
    """Where the next row comes from: a position, and how many rows of the window that begins there are done."""

    position: Position = field(default_factory=Position)
    rows: int = 0


class Row(NamedTuple):
    """At most T+1 tokens, what they add to the counts, and the place after them."""

    tokens: Tokens
    counts: Counts
    after: Place


def skipped(block: Block, start: Position) -> int:
    """How many tokens of the block lie before `start`."""
    return start.token if block.position == replace(start, token=0) else 0


# --- stream -----------------------------------------------------------------------------------------------------------


class Window:
    """A queue of tokens that remembers where in the stream each one came from."""

    def __init__(self, blocks: Iterator[Block], start: Position) -> None:
        self._blocks = blocks
        self._held = deque[tuple[Tokens, Position]]()
        self._num_tokens = 0
        self._start = self.position = start

    def fill(self, n: int) -> int:
        """Hold at least `n` tokens if the stream has them; returns how many are held."""
        while self._num_tokens < n and (block := next(self._blocks, None)) is not None:
            skip = skipped(block, self._start)
            if skip < len(block.tokens):
                self._held.append((block.tokens[skip:], replace(block.position, token=skip)))
                self._num_tokens += len(block.tokens) - skip
        return self._num_tokens

    def peek(self, stop: int) -> Tokens:
        """The first `stop` tokens held, as one array."""
        parts, at = [], 0
        for tokens, _ in self._held:
            parts.append(tokens[: stop - at])
            at += len(parts[-1])
            if at >= stop:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def drop(self, n: int) -> None:
        """Take `n` tokens off the front."""
        self._num_tokens -= n
        while n > 0:
            tokens, position = self._held.popleft()
            taken = min(n, len(tokens))
            n -= taken
            self.position = replace(position, token=position.token + taken)
            if taken < len(tokens):
                self._held.appendleft((tokens[taken:], self.position))
        if self._held:
            self.position = self._held[0][1]


def stream_rows(stream: TokenStream, start: Place, sequence_len: int) -> Iterator[Row]:
    """The rows of the classic stream; at the end of validation a shorter one."""
    window = Window(stream.blocks(start.position), start.position)
    while (held := window.fill(sequence_len + 1)) >= 2:  # one more than T: the target of the last token
        tokens = window.peek(min(held, sequence_len + 1))
        learned = len(tokens) - 1
        window.drop(min(held, sequence_len))
        yield Row(tokens, Counts(1, learned, 0, sequence_len - learned), Place(window.position))


# --- bestfit ----------------------------------------------------------------------------------------------------------


def pack_window(lengths: list[int], capacity: int) -> list[list[tuple[int, int]]]:
    """Rows of (document, tokens taken from its beginning) that use every document once."""
    left = sorted((length, i) for i, length in enumerate(lengths))  # shortest first
    rows: list[list[tuple[int, int]]] = []
    while left:
        row: list[tuple[int, int]] = []
        room = capacity
        while room and left:
            at = bisect.bisect_right(left, (room, len(lengths)))  # documents before `at` fit
            if at:
                length, i = left.pop(at - 1)
            else:
                length, i = room, left.pop(0)[1]
            row.append((i, length))
            room -= length
        rows.append(row)
    return rows


class _Documents:
    """The documents of a stream one by one, from a position on."""

    def __init__(self, blocks: Iterator[Block], start: Position) -> None:
        self._blocks, self._block, self._next = blocks, next(blocks, None), 0
        self.position = start
        if self._block is not None:
            self._next = int(np.searchsorted(self._block.bounds, skipped(self._block, start)))

    def take(self, num_tokens: int) -> list[Tokens]:
        """Documents until they hold `num_tokens`, or to the end of the epoch; empty at the end of the stream."""
        taken: list[Tokens] = []
        epoch = None
        while num_tokens > 0:
            if self._block is not None and self._next == len(self._block.bounds) - 1:
                self._block, self._next = next(self._blocks, None), 0
            block = self._block
            if block is None or (epoch is not None and block.position.epoch != epoch):
                break
            epoch = block.position.epoch
            first, last = block.bounds[self._next], block.bounds[self._next + 1]
            taken.append(block.tokens[first:last])
            num_tokens -= int(last - first)
            self._next += 1
            self.position = replace(block.position, token=int(last))
        if self._block is not None and epoch is not None and self._block.position.epoch != epoch:
            self.position = self._block.position  # the next window begins with the next epoch
        return taken


def bestfit_rows(stream: TokenStream, start: Place, sequence_len: int) -> Iterator[Row]:
    """Rows that begin at a document (see above); in `after`, rows count from where their window begins."""
    capacity, skip = sequence_len + 1, start.rows
    documents = _Documents(stream.blocks(start.position), start.position)
    position = start.position
    while window := documents.take(WINDOW_ROWS * capacity):
        packed = pack_window([len(tokens) for tokens in window], capacity)
        random.Random(f"{position.epoch}/{position.index}/{position.row}/{position.token}").shuffle(packed)
        after_window = Place(documents.position)
        for number, row in enumerate(packed, start=1):
            if number > skip:
                tokens = np.concatenate([window[i][:taken] for i, taken in row])
                cropped = sum(len(window[i]) - taken for i, taken in row)
                after = after_window if number == len(packed) else Place(position, number)
                yield Row(tokens, Counts(1, len(tokens), cropped, capacity - len(tokens)), after)
        position, skip = documents.position, 0


ROWS = {"stream": stream_rows, "bestfit": bestfit_rows}
