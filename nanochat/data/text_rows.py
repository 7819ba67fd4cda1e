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
from dataclasses import dataclass, replace

import numpy as np

from nanochat.data.loader import Counts, TrainingSequence
from nanochat.data.token_stream import Block, TextCursor, Tokens, TokenStream

WINDOW_ROWS = 128  # more pack tighter, fewer resume faster


@dataclass(frozen=True)
class TextCounts(Counts):
    """What has become of the tokens of the sequences so far, over all ranks."""

    rows: int = 0
    """Sequences."""
    tokens: int = 0
    """In the sequences (a token that ends one and begins the next one is counted once)."""
    cropped: int = 0
    """Thrown away with the ends of cropped documents."""
    padding: int = 0
    """Positions left empty."""

    @property
    def cropped_share(self) -> float:
        """Cropped tokens as a share of all that were read."""
        return self.cropped / max(1, self.tokens + self.cropped)


TextSequences = Iterator[TrainingSequence[TextCounts, TextCursor]]


def skipped(block: Block, start: TextCursor) -> int:
    """How many tokens of the block lie before `start`."""
    return start.token if block.cursor == replace(start, token=0, rows=0) else 0


# --- stream -----------------------------------------------------------------------------------------------------------


class TokenQueue:
    """A queue of tokens that remembers where in the stream each one came from."""

    def __init__(self, blocks: Iterator[Block], start: TextCursor) -> None:
        self._blocks = blocks
        self._held = deque[tuple[Tokens, TextCursor]]()
        self._num_tokens = 0
        self._start = self.cursor = start

    def fill(self, n: int) -> int:
        """Hold at least `n` tokens if the stream has them; returns how many are held."""
        while self._num_tokens < n and (block := next(self._blocks, None)) is not None:
            skip = skipped(block, self._start)
            if skip < len(block.tokens):
                self._held.append((block.tokens[skip:], replace(block.cursor, token=skip)))
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
            tokens, cursor = self._held.popleft()
            taken = min(n, len(tokens))
            n -= taken
            self.cursor = replace(cursor, token=cursor.token + taken)
            if taken < len(tokens):
                self._held.appendleft((tokens[taken:], self.cursor))
        if self._held:
            self.cursor = self._held[0][1]


def stream_rows(stream: TokenStream, start: TextCursor, sequence_len: int) -> TextSequences:
    """The sequences of the classic stream; at the end of validation a shorter one."""
    queue = TokenQueue(stream.blocks(start), start)
    while (held := queue.fill(sequence_len + 1)) >= 2:  # one more than T: the target of the last token
        tokens = queue.peek(min(held, sequence_len + 1))
        learned = len(tokens) - 1
        queue.drop(min(held, sequence_len))  # T, not T+1: the last target is the next sequence's first token
        yield TrainingSequence(tokens, TextCounts(1, learned, 0, sequence_len - learned), queue.cursor)


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

    def __init__(self, blocks: Iterator[Block], start: TextCursor) -> None:
        self._blocks, self._block, self._next = blocks, next(blocks, None), 0
        self.cursor = start
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
            if block is None or (epoch is not None and block.cursor.epoch != epoch):
                break
            epoch = block.cursor.epoch
            first, last = block.bounds[self._next], block.bounds[self._next + 1]
            taken.append(block.tokens[first:last])
            num_tokens -= int(last - first)
            self._next += 1
            self.cursor = replace(block.cursor, token=int(last))
        if self._block is not None and epoch is not None and self._block.cursor.epoch != epoch:
            self.cursor = self._block.cursor  # the next window begins with the next epoch
        return taken


def bestfit_rows(stream: TokenStream, start: TextCursor, sequence_len: int) -> TextSequences:
    """Sequences that begin at a document (see above); `rows` of their cursor counts from where the window begins."""
    capacity, skip = sequence_len + 1, start.rows
    documents = _Documents(stream.blocks(start), start)
    cursor = replace(start, rows=0)
    while window := documents.take(WINDOW_ROWS * capacity):
        packed = pack_window([len(tokens) for tokens in window], capacity)
        # The seed is the place: a resume in the middle of a window packs and shuffles it the same way again.
        random.Random(f"{cursor.epoch}/{cursor.index}/{cursor.row}/{cursor.token}").shuffle(packed)
        for number, row in enumerate(packed, start=1):
            if number > skip:
                tokens = np.concatenate([window[i][:taken] for i, taken in row])
                cropped = sum(len(window[i]) - taken for i, taken in row)
                after = documents.cursor if number == len(packed) else replace(cursor, rows=number)
                yield TrainingSequence(tokens, TextCounts(1, len(tokens), cropped, capacity - len(tokens)), after)
        cursor, skip = documents.cursor, 0


ROWS = {"stream": stream_rows, "bestfit": bestfit_rows}
