"""Batches of pretraining: rows of T tokens from the documents of a corpus, each document as bos + its tokens.

    B  rows per batch and rank     T  tokens per row     W  world size (ranks)

How tokens become rows is token_rows.py's business: `stream`, the classic one, or `bestfit`, whose rows begin at a
document. Either way there is one sequence of rows; batch n is the rows from nWB on, and rank r gets B of them from rB
on. So the order is the same for every world size. Every rank reads and tokenizes everything (that is cheap) and takes
its rows.

Training goes on for ever, each epoch in an order of its own (token_stream.py). Validation is one pass; its last batch
is filled up with targets of -1, so in `stream` mode every token counts whatever B and T are.

The state is the place in the corpus where the next batch begins (shard, row group, row, token), not a count of batches:
restoring it continues the very same rows, with another batch size or number of ranks too.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanochat.data.corpus import Chunk, Corpus
from nanochat.data.prefetch import DeviceFeed, Prefetch
from nanochat.data.text_rows import ROWS, Counts, Place, Row
from nanochat.data.token_stream import Cache, Position, TokenStream, chunk_order
from nanochat.env import print0
from nanochat.tokenizer import RustBPETokenizer

Mode = Literal["stream", "bestfit"]
STATE_VERSION = 2
MOST_THREADS = 4


class Batch(NamedTuple):
    """What the background thread makes: x and y as one (2, B, T) int64 array, what its rows count, the place after."""

    data: npt.NDArray[np.int64]
    counts: Counts
    after: Place


def default_threads(world_size: int) -> int:
    """Threads of the tokenizer: the cores that are this process's share, at most MOST_THREADS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // world_size))


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
        num_threads: threads of the tokenizer; None takes this process's share of the cores.
        mode: "stream" or "bestfit".
        skip_bad_shards: pass over what can't be read, with a warning, instead of stopping.
        cache: documents that have been tokenized before.
        max_rows: end after so many rows, whatever the batch size and the number of ranks.

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
        num_threads: int | None = None,
        mode: Mode = "stream",
        skip_bad_shards: bool = False,
        cache: Cache | None = None,
        max_rows: int | None = None,
    ) -> None:
        if batch_size < 1 or sequence_len < 1:
            raise ValueError(f"batch size and sequence length must be positive, got {batch_size} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        if mode not in ROWS:
            raise ValueError(f"mode is {mode!r}, but must be {' or '.join(ROWS)}")
        self.device = torch.device(device)
        self.tokens_seen = 0
        """Tokens handed out to all ranks together, since the very first batch."""
        self.counts = Counts()
        """What has become of the tokens, over all ranks, since the very first batch."""
        self._corpus, self._tokenizer, self._split, self._mode = corpus, tokenizer, split, mode
        self._sequence_len, self._global_tokens = sequence_len, world_size * batch_size * sequence_len
        stop = threading.Event()
        self._stop = weakref.finalize(self, stop.set)  # also ends a thread that waits for a shard
        threads = default_threads(world_size) if num_threads is None else num_threads
        stream = TokenStream(corpus, tokenizer, split, threads, skip_bad_shards, cache, stop.is_set)
        self._chunks = stream.chunks
        self._place = Place() if state is None else self._restore(state)
        start, bos, make_rows = self._place, tokenizer.get_bos_token_id(), ROWS[mode]
        self._batches = Prefetch(
            lambda: _batches(
                islice(make_rows(stream, start, sequence_len), max_rows),
                (batch_size, sequence_len),
                rank,
                world_size,
                bos,
            )
        )
        self._feed = DeviceFeed(self._batches, _data_of, self.device)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch, tensor = next(self._feed)
        if self._split == "train" and batch.after.position.epoch > self.epoch:
            print0(
                f"{self._corpus.name}: epoch {batch.after.position.epoch} begins (counted from 0), "
                f"its {len(self._chunks):,} row groups and their documents in a new order"
            )
        self._place = batch.after
        self.counts += batch.counts
        self.tokens_seen += self._global_tokens
        return tensor[0], tensor[1]

    @property
    def epoch(self) -> int:
        """How often the whole corpus has been read before the place where the next batch begins."""
        return self._place.position.epoch

    @property
    def wait_seconds(self) -> float:
        """How long `next` had to wait for data in all."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop the background thread (it also stops by itself when the loader is gone)."""
        self._stop()
        self._batches.close()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch, not yet handed out, begins; for JSON. The same on every rank."""
        chunk = self._chunk_at(self._place.position)
        return {
            "version": STATE_VERSION,
            "mode": self._mode,
            "sequence_len": self._sequence_len,
            **asdict(self._place.position),
            "rows": self._place.rows,
            "split": self._split,
            "shard": chunk.shard.name,
            "row_group": chunk.row_group,
            "tokens_seen": self.tokens_seen,
            "counts": asdict(self.counts),
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._tokenizer.hash,
        }

    def _chunk_at(self, position: Position) -> Chunk:
        return self._chunks[chunk_order(len(self._chunks), position.epoch)[position.index]]

    def _restore(self, state: dict[str, Any]) -> Place:
        if state.get("version") != STATE_VERSION:
            raise ValueError("the saved place in the data is of another version of this program: start anew")
        if state["tokenizer"] != self._tokenizer.hash:
            raise ValueError(
                "the saved place in the data belongs to another tokenizer: restore that one, or start anew"
            )
        for name, value in (("split", self._split), ("mode", self._mode)):
            if state[name] != value:
                raise ValueError(f"the saved place is in the {state[name]} {name}, not in {value}")
        if self._mode == "bestfit" and state["sequence_len"] != self._sequence_len:
            raise ValueError(
                f"the saved place counts rows of {state['sequence_len']} tokens, not of {self._sequence_len}: "
                "rows that begin at documents can't be continued with another length"
            )
        self.tokens_seen, self.counts = state["tokens_seen"], Counts(**state["counts"])
        position = Position(state["epoch"], state["index"], state["row"], state["token"])
        return Place(self._find(position, state), state["rows"])

    def _find(self, position: Position, state: dict[str, Any]) -> Position:
        """The position in the corpus as it is now: shards may have been added since."""
        if position.epoch > 0:
            self._corpus.wait_for_all(self._split)
        if state["corpus"] == self._corpus.fingerprint:
            self._corpus.grow(self._split, position.index)
            return position
        for index, number in enumerate(chunk_order(len(self._chunks), position.epoch)):
            chunk = self._chunks[number]
            if (chunk.shard.name, chunk.row_group) == (state["shard"], state["row_group"]):
                print0(f"warning: the shards in {self._corpus.name} changed; going on in {chunk.shard.name}")
                return replace(position, index=index)
        raise ValueError(
            f"{self._corpus.name} no longer has row group {state['row_group']} of {state['shard']} for {self._split}, "
            "where training stopped: put the shard back"
        )


def _data_of(batch: Batch) -> npt.NDArray[np.int64]:
    return batch.data


def _batches(rows: Iterator[Row], shape: tuple[int, int], rank: int, world_size: int, bos: int) -> Iterator[Batch]:
    """This rank's batches. A module function: the thread that runs it must not hold the loader."""
    batch_size, sequence_len = shape
    while True:
        data = np.full((2, *shape), -1, dtype=np.int64)  # x, y
        data[0] = bos
        counts, after = Counts(), None
        for i in range(batch_size * world_size):
            row = next(rows, None)
            if row is None:
                break
            counts, after = counts + row.counts, row.after
            if i // batch_size == rank:
                x, y = data[:, i % batch_size]
                x[: len(row.tokens)] = row.tokens[:sequence_len]
                y[: len(row.tokens) - 1] = row.tokens[1:]
        if after is None:  # validation is over, or max_rows have come
            return
        yield Batch(data, counts, after)
