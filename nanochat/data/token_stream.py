"""The documents of a corpus as tokens, in the order in which they are read: epoch after epoch, block after block.

Epoch 0 reads the corpus as it lies in the files. Each later epoch has its own order, drawn from its number alone: the
row groups are shuffled, and the documents inside each block of a row group are shuffled too. So an epoch is the same on
every machine, for every number of ranks, and can be entered anywhere without reading what comes before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nanochat.data.corpus import BadShardError, Chunk, Corpus
from nanochat.data.token_cache import TokenCache
from nanochat.env import print0
from nanochat.tokenizer import Bounds, RustBPETokenizer, Tokens

PIECE_TOKENS = 1 << 16  # that are looked up at a time


@dataclass(frozen=True)
class TextCursor:
    """A position in the stream: `token` tokens into the block that begins at `row` of an epoch's chunk `index`."""

    epoch: int = 0
    index: int = 0
    """Of the chunk in this epoch's order of chunks."""
    row: int = 0
    """Of the parquet row group: the first one of a block."""
    token: int = 0
    rows: int = 0
    """In `bestfit` only: the training sequences of the window that begins here that are done already."""


class TokenBlock(NamedTuple):
    """Some documents with their tokens: document i is tokens[bounds[i]:bounds[i+1]] and begins with bos."""

    tokens: Tokens
    bounds: Bounds
    cursor: TextCursor
    """Of its beginning. Its `token` is 0, but for later pieces of a block that is looked up piece by piece."""


def chunk_order(num_chunks: int, epoch: int) -> list[int]:
    """The order of chunks in an epoch: file order at first, then shuffled by the number of the epoch."""
    order = list(range(num_chunks))
    # The public corpora are shuffled already, and in file order training can begin while later shards are downloaded.
    if epoch > 0:
        random.Random(epoch).shuffle(order)
    return order


def document_order(num_documents: int, epoch: int, chunk: Chunk, row: int) -> list[int]:
    """The order of the documents inside the block of `chunk` that begins at `row`: as in the file, later shuffled."""
    order = list(range(num_documents))
    # Only inside the block: shuffling a whole row group would need all of it in memory, and to resume in its middle one
    # would have to tokenize what comes before.
    if epoch > 0:
        random.Random(f"{epoch}/{chunk.shard.name}/{chunk.row_group}/{row}").shuffle(order)
    return order


def insert_bos(ids: Tokens, offsets: Bounds, bos: int) -> tuple[Tokens, Bounds]:
    """Documents (text i is ids[offsets[i]:offsets[i+1]]) with bos before each; empty ones are left out."""
    starts = offsets[:-1][np.diff(offsets) > 0]
    tokens = np.insert(ids, starts, bos)
    return tokens, np.append(starts + np.arange(len(starts)), len(tokens))  # each bos moves what follows by one


def reorder(tokens: Tokens, bounds: Bounds, order: list[int]) -> tuple[Tokens, Bounds]:
    """The documents in another order."""
    if not order:
        return tokens, bounds
    out = np.concatenate([tokens[bounds[i] : bounds[i + 1]] for i in order])
    return out, np.concatenate([[0], np.cumsum(np.diff(bounds)[order])])


def skipped(block: TokenBlock, start: TextCursor) -> int:
    """Tokens of the block that lie before `start`."""
    if replace(block.cursor, token=0) != replace(start, token=0, rows=0):
        return 0
    return min(max(0, start.token - block.cursor.token), len(block.tokens))


LookUp = Callable[[npt.NDArray[np.int32], npt.NDArray[np.int32]], npt.NDArray[np.int32]]


class TokenStream:
    """The blocks of the stream, from a cursor on; endless for "train", one pass for "val".

    Args:
        corpus: where the documents are.
        tokenizer: turns them into tokens.
        split: "train" or "val".
        num_threads: threads of the tokenizer.
        skip_bad_shards: pass over the rest of a shard that can't be read, with a warning, instead of stopping.
        cache: tokens of before, used where it has them.
        stopped: asked while waiting for a shard; True ends the stream.
        look_up: F more numbers for each token, (n, F), from tokens (n,) and bounds; blocks are (n, 1 + F) then, and are
            pieces of some documents each, since these numbers take more memory than their tokens.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: RustBPETokenizer,
        split: str,
        num_threads: int = 1,
        skip_bad_shards: bool = False,
        cache: TokenCache | None = None,
        stopped: Callable[[], bool] = lambda: False,
        look_up: LookUp | None = None,
    ) -> None:
        self.look_up, self.nothing = look_up, np.empty(0, tokenizer.dtype)
        if look_up is not None:
            self.nothing = np.empty((0, 1 + look_up(np.empty(0, np.int32), np.zeros(1, np.int32)).shape[1]), np.int32)
        self.corpus, self.tokenizer, self.split, self.num_threads = corpus, tokenizer, split, num_threads
        self.skip_bad_shards, self.cache, self.stopped = skip_bad_shards, cache, stopped
        self.chunks: list[Chunk] = corpus.chunks(split)  # grows while shards arrive

    def blocks(self, start: TextCursor) -> Iterator[TokenBlock]:
        """The blocks that have tokens, from the one that `start` is in.

        Raises:
            ValueError: a whole epoch has no text, or a shard can't be read.
        """
        epoch, first_index = start.epoch, start.index
        while True:
            found = False
            for index, chunk in self._epoch(epoch, first_index):
                for block in self._chunk_blocks(chunk, TextCursor(epoch, index), start):
                    if len(block.tokens):
                        found = True
                        yield block
            if self.split == "val" or self.stopped():
                return
            if not found and first_index == 0:  # else this would loop without end; a resume may begin near the end
                raise ValueError(f"{self.corpus.name} ({self.split}): all documents are empty")
            epoch, first_index = epoch + 1, 0

    def _epoch(self, epoch: int, first: int) -> Iterator[tuple[int, Chunk]]:
        """(index, chunk) of one epoch; the first epoch waits for shards that are still to come."""
        if epoch == 0:
            index = first
            while index < len(self.chunks) or self.corpus.grow(self.split, index, self.stopped):
                yield index, self.chunks[index]
                index += 1
            return
        self.corpus.wait_for_all(self.split)
        order = chunk_order(len(self.chunks), epoch)
        for index in range(first, len(order)):
            yield index, self.chunks[order[index]]

    def _pieces(self, block: TokenBlock, start: TextCursor) -> Iterator[TokenBlock]:
        """The block, in pieces with what is found; what lies before `start` is not looked up."""
        if self.look_up is None:
            yield block
            return
        tokens, bounds = np.ascontiguousarray(block.tokens, np.int32), block.bounds
        first = 0
        while first < len(bounds) - 1:
            last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + PIECE_TOKENS)))
            last = min(last, len(bounds) - 1)
            a, b = int(bounds[first]), int(bounds[last])
            cursor, piece = replace(block.cursor, token=a), bounds[first : last + 1] - a
            rows = np.zeros((b - a, self.nothing.shape[1]), np.int32)
            rows[:, 0] = tokens[a:b]
            if skipped(TokenBlock(tokens[a:b], piece, cursor), start) < b - a:
                rows[:, 1:] = self.look_up(tokens[a:b], piece.astype(np.int32))
            yield TokenBlock(rows, piece, cursor)
            first = last

    def _chunk_blocks(self, chunk: Chunk, at: TextCursor, start: TextCursor) -> Iterator[TokenBlock]:
        first_row = start.row if (at.epoch, at.index) == (start.epoch, start.index) else None
        try:
            for row, texts in chunk.read(first_row):  # some documents at a time, however large the row group
                encoded = self.cache.get(chunk, row, len(texts)) if self.cache is not None else None
                ids, offsets = encoded or self.tokenizer.encode_arrow(texts, self.num_threads)
                # bos first: what precedes it belongs to another document, and at inference it starts every text.
                tokens, bounds = insert_bos(ids, offsets, self.tokenizer.get_bos_token_id())
                if at.epoch > 0:
                    tokens, bounds = reorder(tokens, bounds, document_order(len(bounds) - 1, at.epoch, chunk, row))
                yield from self._pieces(TokenBlock(tokens, bounds, TextCursor(at.epoch, at.index, row)), start)
        except BadShardError as error:
            if not self.skip_bad_shards:
                raise
            print0(f"warning: skipping the rest of row group {chunk.row_group} of {chunk.shard.name}: {error}")
