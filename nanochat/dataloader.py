"""The token stream of pretraining: documents of a corpus, each as bos + its tokens, one after the other, in rows of T.

    B  rows per batch and rank     T  tokens per row     W  world size (ranks)

Number the tokens of the whole stream s[0], s[1], ...; row g is x = s[gT : gT+T] with targets y = s[gT+1 : gT+T+1].
Batch n is the rows from nWB on, and rank r gets B of them from rB on. So the order is the same for every world size,
and no token is lost between rows. Every rank reads and tokenizes the whole stream (that is cheap) and takes its rows.

Training goes on for ever: epoch 0 reads the corpus in file order, each later epoch has its own order of row groups.
Validation is one pass; its last batch is filled up with targets of -1, so every token counts whatever B and T are.

The state is the place in the corpus where the next batch begins (shard, row group, row, token), not a count of batches:
restoring it continues the very same stream, with another batch size or number of ranks too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanochat.background import Prefetch, to_device
from nanochat.common import print0
from nanochat.dataset import Chunk, Corpus
from nanochat.tokenizer import RustBPETokenizer

Tokens = npt.NDArray[Any]  # (n,) uint16 or uint32


@dataclass(frozen=True)
class Position:
    """A place in the stream: `token` tokens after the beginning of document `row`; `index` is the chunk's number."""

    epoch: int = 0
    index: int = 0
    row: int = 0
    token: int = 0


class Piece(NamedTuple):
    """Some consecutive tokens of the stream and where they begin."""

    tokens: Tokens
    position: Position


def chunk_order(num_chunks: int, epoch: int) -> list[int]:
    """The order of chunks in an epoch: file order at first, then shuffled by the number of the epoch."""
    order = list(range(num_chunks))
    if epoch > 0:
        random.Random(epoch).shuffle(order)
    return order


def insert_bos(ids: Tokens, offsets: npt.NDArray[np.int64], bos: int) -> Tokens:
    """Documents (text i is ids[offsets[i]:offsets[i+1]]) as one stream, bos before each; empty ones are left out."""
    starts = offsets[:-1][np.diff(offsets) > 0]
    out = np.empty(len(ids) + len(starts), dtype=ids.dtype)
    is_bos = np.zeros(len(out), dtype=bool)
    is_bos[starts + np.arange(len(starts))] = True
    out[is_bos] = bos
    out[~is_bos] = ids
    return out


class TokenStream:
    """Iterates over the pieces of the stream from a position on; endless for "train", one pass for "val"."""

    def __init__(self, corpus: Corpus, tokenizer: RustBPETokenizer, split: str, num_threads: int = 1) -> None:
        self.chunks: list[Chunk] = corpus.chunks(split)
        self.name = f"{corpus.name} ({split})"
        self.tokenizer, self.split, self.num_threads = tokenizer, split, num_threads

    def pieces(self, start: Position) -> Iterator[Piece]:
        """The pieces from `start` on.

        Raises:
            ValueError: a whole epoch has no text, or a shard can't be read.
        """
        epoch, first_index, skip = start.epoch, start.index, start.token
        while True:
            found = False
            order = chunk_order(len(self.chunks), epoch)
            for index in range(first_index, len(order)):
                chunk = self.chunks[order[index]]
                resumed = (epoch, index) == (start.epoch, start.index)
                for row, texts in chunk.read(start.row if resumed else None):
                    ids, offsets = self.tokenizer.encode_arrow(texts, self.num_threads)
                    tokens = insert_bos(ids, offsets, self.tokenizer.get_bos_token_id())
                    dropped, skip = min(skip, len(tokens)), max(0, skip - len(tokens))
                    found = found or len(tokens) > 0
                    if dropped < len(tokens):
                        yield Piece(tokens[dropped:], Position(epoch, index, row, dropped))
            if self.split == "val":
                return
            if not found and first_index == 0:
                raise ValueError(f"{self.name}: all documents are empty")
            epoch, first_index = epoch + 1, 0


class Window:
    """A queue of tokens that remembers where in the stream each one came from."""

    def __init__(self, pieces: Iterator[Piece], start: Position) -> None:
        self._source, self._pieces = pieces, deque[Piece]()
        self._num_tokens = 0
        self.position = start

    def fill(self, n: int) -> int:
        """Hold at least `n` tokens if the stream has them; returns how many are held."""
        while self._num_tokens < n and (piece := next(self._source, None)) is not None:
            self._pieces.append(piece)
            self._num_tokens += len(piece.tokens)
        return self._num_tokens

    def peek(self, start: int, stop: int) -> Tokens:
        """The held tokens from `start` to `stop` (counted from the front), as one array."""
        parts, at = [], 0
        for piece in self._pieces:
            parts.append(piece.tokens[max(0, start - at) : max(0, stop - at)])
            at += len(piece.tokens)
            if at >= stop:
                break
        return np.concatenate(parts)

    def drop(self, n: int) -> None:
        """Take `n` tokens off the front."""
        self._num_tokens -= n
        while n > 0:
            piece = self._pieces[0]
            taken = min(n, len(piece.tokens))
            n -= taken
            self.position = replace(piece.position, token=piece.position.token + taken)
            if taken == len(piece.tokens):
                self._pieces.popleft()
            else:
                self._pieces[0] = Piece(piece.tokens[taken:], self.position)
        if self._pieces:
            self.position = self._pieces[0].position


class Batch(NamedTuple):
    """What the background thread makes: (B, T) int64 arrays and the position after them."""

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    after: Position


class PretrainLoader:
    """Iterator of (x, y), both int64 (B, T) on `device`.

    Args:
        corpus: where the documents are.
        tokenizer: turns them into tokens.
        batch_size: rows per batch on this rank (B).
        sequence_len: tokens per row (T).
        split: "train" (endless) or "val" (one pass, targets of -1 fill the last batch).
        device: where the batches go.
        rank: which of the `world_size` processes this is.
        world_size: how many processes share the batches.
        state: `state_dict()` of an earlier loader, to go on where it stopped.
        num_threads: threads of the tokenizer.

    Raises:
        ValueError: the split is empty, or `state` belongs to another tokenizer or to shards that are gone.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: RustBPETokenizer,
        batch_size: int,
        sequence_len: int,
        split: str = "train",
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        num_threads: int = 1,
    ) -> None:
        if batch_size < 1 or sequence_len < 1:
            raise ValueError(f"batch size and sequence length must be positive, got {batch_size} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        self.device = torch.device(device)
        self.tokens_seen = 0
        """Tokens handed out to all ranks together, since the very first batch."""
        self._corpus, self._tokenizer, self._split = corpus, tokenizer, split
        self._global_tokens = world_size * batch_size * sequence_len
        stream = TokenStream(corpus, tokenizer, split, num_threads)
        self._chunks = stream.chunks
        self._position = Position() if state is None else self._restore(state)
        start, shape = self._position, (batch_size, sequence_len)
        self._batches = Prefetch(lambda: _batches(stream, start, shape, rank, world_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self._batches)
        self._position = batch.after
        self.tokens_seen += self._global_tokens
        return to_device(batch.x, self.device), to_device(batch.y, self.device)

    @property
    def epoch(self) -> int:
        """How often the whole corpus has been read before the place where the next batch begins."""
        return self._position.epoch

    @property
    def wait_seconds(self) -> float:
        """How long `next` had to wait for data in all."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop the background thread (it also stops by itself when the loader is gone)."""
        self._batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch, not yet handed out, begins; for JSON. The same on every rank."""
        chunk = self._chunk_at(self._position)
        return {
            **asdict(self._position),
            "split": self._split,
            "shard": chunk.shard.name,
            "row_group": chunk.row_group,
            "tokens_seen": self.tokens_seen,
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._tokenizer.hash,
        }

    def _chunk_at(self, position: Position) -> Chunk:
        return self._chunks[chunk_order(len(self._chunks), position.epoch)[position.index]]

    def _restore(self, state: dict[str, Any]) -> Position:
        if state["tokenizer"] != self._tokenizer.hash:
            raise ValueError(
                "the saved place in the data belongs to another tokenizer: restore that one, or start anew"
            )
        if state["split"] != self._split:
            raise ValueError(f"the saved place is in the {state['split']} split, not in {self._split}")
        self.tokens_seen = state["tokens_seen"]
        position = Position(state["epoch"], state["index"], state["row"], state["token"])
        if state["corpus"] == self._corpus.fingerprint:
            return position
        # Shards were added or removed since: go on in the same row group, wherever it is now.
        for index, number in enumerate(chunk_order(len(self._chunks), position.epoch)):
            chunk = self._chunks[number]
            if (chunk.shard.name, chunk.row_group) == (state["shard"], state["row_group"]):
                print0(f"warning: the shards in {self._corpus.name} changed; going on in {chunk.shard.name}")
                return replace(position, index=index)
        raise ValueError(
            f"{self._corpus.name} no longer has row group {state['row_group']} of {state['shard']} for {self._split}, "
            "where training stopped: put the shard back"
        )


def _batches(
    stream: TokenStream, start: Position, shape: tuple[int, int], rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's batches from `start` on. A module function: the thread that runs it must not hold the loader."""
    per_rank = shape[0] * shape[1]
    per_batch = per_rank * world_size
    window = Window(stream.pieces(start), start)
    while True:
        held = window.fill(per_batch + 1)  # one more: the target of the last token
        if held < 2:  # nothing left to predict; only validation ends
            return
        tokens = window.peek(min(rank * per_rank, held), min((rank + 1) * per_rank + 1, held)).astype(np.int64)
        x = np.full(per_rank, stream.tokenizer.get_bos_token_id(), dtype=np.int64)
        y = np.full(per_rank, -1, dtype=np.int64)
        n_targets = max(0, len(tokens) - 1)
        x[: min(per_rank, len(tokens))] = tokens[:per_rank]
        y[:n_targets] = tokens[1:]
        window.drop(min(per_batch, held))
        yield Batch(x.reshape(shape), y.reshape(shape), window.position)
