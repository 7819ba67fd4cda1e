"""Two ways to cut the token stream into sequences of T+1 tokens: `stream`, the classic one, and `bestfit`.

stream: all tokens one after the other; sequence g is the tokens from gT to gT + T, so its last token is the first of
    the next one, every token is learned once and none is lost. Sequences begin anywhere.
bestfit: every sequence begins at a document. It takes the longest document that still fits, again and again; when none
    fits, the shortest one left is cropped to fill the gap and the rest of it is thrown away (counted as `cropped`). So
    no token ever sees a context that began in the middle of a document. Documents are taken in windows of WINDOW_ROWS
    sequences' worth of tokens, each window packed by itself and its sequences shuffled: the cursor is where the window
    begins and how many of its sequences are done. What is left at a window's end makes one padded sequence.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from nanochat.data.loader import Counts, TrainingSequence
from nanochat.data.token_stream import TextCursor, TokenStream, skipped
from nanochat.tokenizer import Tokens

WINDOW_ROWS = 128  # more pack tighter, fewer resume faster: a resume packs its window again


@dataclass(frozen=True)
class TextCounts(Counts):
    """Counts of the sequences so far, over all ranks."""

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


def stream_rows(stream: TokenStream, start: TextCursor, sequence_len: int) -> TextSequences:
    """The sequences of the classic stream; at the end of validation a shorter one."""
    rest, after = stream.nothing, start  # tokens of the blocks before that filled no sequence
    for block in stream.blocks(start):
        skip = skipped(block, start)
        tokens = np.concatenate([rest, block.tokens[skip:]])
        at = 0
        while len(tokens) - at > sequence_len:  # T+1 are left: the last one is the target of the one before it
            at += sequence_len  # T, not T+1: the last target is the next sequence's first token
            # `rest` has at most T tokens, so the next sequence begins in this block.
            after = replace(block.cursor, token=block.cursor.token + skip + at - len(rest))
            yield TrainingSequence(tokens[at - sequence_len : at + 1], TextCounts(1, sequence_len), after)
        rest, after = tokens[at:], replace(block.cursor, token=block.cursor.token + len(block.tokens))
    if len(rest) >= 2:
        yield TrainingSequence(rest, TextCounts(1, len(rest) - 1, 0, sequence_len + 1 - len(rest)), after)


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


def _windows(
    stream: TokenStream, start: TextCursor, num_tokens: int
) -> Iterator[tuple[list[Tokens], TextCursor, TextCursor]]:
    """(documents, cursor of the first, cursor after the last) for every `num_tokens` of the stream."""
    window: list[Tokens] = []
    held, begin, end = 0, start, start
    for block in stream.blocks(start):
        if window and block.cursor.epoch != end.epoch:  # no window is of two epochs: each has an order of its own
            yield window, begin, block.cursor
            window, held, begin = [], 0, block.cursor
        first = int(np.searchsorted(block.bounds, skipped(block, start)))
        for a, b in pairwise(block.bounds[first:].tolist()):
            window.append(block.tokens[a:b])
            held, end = held + b - a, replace(block.cursor, token=block.cursor.token + b)
            if held >= num_tokens:
                yield window, begin, end
                window, held, begin = [], 0, end
    if window:
        yield window, begin, end


def bestfit_rows(stream: TokenStream, start: TextCursor, sequence_len: int) -> TextSequences:
    """Sequences that begin at a document (see above); `rows` of their cursor counts from where the window begins."""
    capacity, skip = sequence_len + 1, start.rows
    for window, begin, end in _windows(stream, replace(start, rows=0), WINDOW_ROWS * capacity):
        packed = pack_window([len(tokens) for tokens in window], capacity)
        # The seed is the position: a resume in the middle of a window packs and shuffles it the same way again.
        random.Random(f"{begin.epoch}/{begin.index}/{begin.row}/{begin.token}").shuffle(packed)
        for number, row in enumerate(packed[skip:], start=skip + 1):
            tokens = np.concatenate([window[i][:taken] for i, taken in row])
            cropped = sum(len(window[i]) - taken for i, taken in row)
            after = end if number == len(packed) else replace(begin, rows=number)
            yield TrainingSequence(tokens, TextCounts(1, len(tokens), cropped, capacity - len(tokens)), after)
        skip = 0


ROWS = {"stream": stream_rows, "bestfit": bestfit_rows}
