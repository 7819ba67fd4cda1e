"""The part that both loaders share: training sequences into batches, in one order for every number of ranks.

    B  sequences per batch and rank     T  tokens per sequence     W  world size (ranks)

`nanochat/dataloader.py` cuts documents into sequences, `chat_loader.py` packs conversations into them. Either way there
is one order of sequences; batch n is the W·B sequences from n·W·B on, and rank r gets the B of them from r·B on. Every
rank reads and tokenizes everything (that is cheap) and keeps its own, so no rank has to tell another where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanochat.data.prefetch import DeviceFeed, Prefetch


class Batch(NamedTuple):
    """One micro-batch of a training step, each field (B, T) on the device; a loader may leave out the last ones."""

    x: Tensor
    y: Tensor
    """The next tokens; -1 is not supervised."""
    segments: Tensor | None = None
    """Of each token the number of its conversation in the sequence; None: a sequence is one text."""
    extras: dict[str, Tensor] | None = None
    """Inputs of an `objective` of its own, by name."""
    found: Tensor | None = None
    """(B, T, …) what the model would find in the text it carries, see nanochat/ops/recall.py; None: it looks itself."""

    def pieces(self, rows: int) -> Iterator[Batch]:
        """The same sequences in their order, at most `rows` at a time."""
        for i in range(0, len(self.x), rows):
            part = slice(i, i + rows)
            yield Batch(
                self.x[part],
                self.y[part],
                None if self.segments is None else self.segments[part],
                None if self.extras is None else {name: value[part] for name, value in self.extras.items()},
                None if self.found is None else self.found[part],
            )

    def shorter_rows(self, split: int) -> Batch:
        """The same tokens in `split` times as many sequences: (B, T) -> (split·B, T / split)."""
        rows = split * len(self.x)
        segments = None if self.segments is None else self.segments.reshape(rows, -1)
        found = None if self.found is None else self.found.reshape(rows, -1, self.found.size(2))
        return self._replace(x=self.x.reshape(rows, -1), y=self.y.reshape(rows, -1), segments=segments, found=found)


# --- sequences --------------------------------------------------------------------------------------------------------

SomeCounts = TypeVar("SomeCounts", bound="Counts")
SomeCursor = TypeVar("SomeCursor")


class Counts:
    """Base of dataclasses of numbers that are added up, field by field."""

    def __add__(self: SomeCounts, other: SomeCounts) -> SomeCounts:
        return type(self)(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class TrainingSequence(Generic[SomeCounts, SomeCursor]):
    """At most T+1 tokens: x is the first T of them, y the last T."""

    tokens: npt.NDArray[Any]
    """(n,), or (n, 1 + F) with F more numbers for each token as it is read."""
    counts: SomeCounts
    """Added to the loader's counts."""
    after: SomeCursor
    """The position of the next sequence."""
    learned: npt.NDArray[np.bool_] | None = None
    """True for tokens that are targets; None: all are."""
    lengths: list[int] | None = None
    """Tokens of each conversation in it, for segments."""

    def write(self, out: npt.NDArray[np.int64]) -> None:
        """Write x and y into `out` (2 + more, T), which holds padding; behind them the segments, or F more numbers."""
        n, sequence_len = len(self.tokens), out.shape[1]
        tokens = self.tokens if self.tokens.ndim == 1 else self.tokens[:, 0]
        out[0, :n] = tokens[:sequence_len]  # x
        out[1, : n - 1] = tokens[1:]  # y: at each position the token that comes next
        if self.tokens.ndim == 2:
            out[2:, :n] = self.tokens[:sequence_len, 1:].T
        if self.learned is not None:
            out[1, : n - 1][~self.learned[1:]] = -1  # what is only read, such as the user's turns
        if len(out) == 3 and self.lengths is not None:
            # The padding is a segment of its own, the last one: the model reads it as if it were alone.
            lengths = [*self.lengths, sequence_len + 1 - n]
            out[2] = np.repeat(np.arange(len(lengths)), lengths)[:sequence_len]


class HostBatch(NamedTuple):
    """A batch before it is copied: x, y (and segments) as one int64 array, what they count, the cursor after it."""

    data: npt.NDArray[np.int64]
    counts: Any
    after: Any


def rank_batches(
    sequences: Iterator[TrainingSequence[SomeCounts, SomeCursor]],
    shape: tuple[int, int, int],
    pad_id: int,
    rank: int,
    world_size: int,
) -> Iterator[HostBatch]:
    """One rank's batches out of the order of all sequences; the last one is filled up with padding.

    Args:
        sequences: of all ranks together.
        shape: of `HostBatch.data`: 2 (x, y) + 1 for segments or F for more numbers, B, T.
        pad_id: stands in x where no token is.
        rank: which of the `world_size` ranks this is.
        world_size: how many share the sequences.
    """
    batch_size = shape[1]
    while True:
        data = np.full(shape, -1, dtype=np.int64)  # (2 or 3, B, T); -1 in y is not supervised
        data[0], data[2:] = pad_id, 0  # the model computes something there, and no loss looks at it
        counts = after = None
        for i in range(batch_size * world_size):
            sequence = next(sequences, None)
            if sequence is None:
                break
            # Counts and cursor are those of all ranks: a resume may have another number of them.
            counts = sequence.counts if counts is None else counts + sequence.counts
            after = sequence.after
            if i // batch_size == rank:
                sequence.write(data[:, i % batch_size])
        if counts is None:  # a pass is over exactly at the end of a batch
            return
        yield HostBatch(data, counts, after)


# --- the loader -------------------------------------------------------------------------------------------------------


SomeLoader = TypeVar("SomeLoader", bound="BatchLoader[Any, Any]")


class BatchLoader(Generic[SomeCounts, SomeCursor]):
    """Base of the loaders: an iterator of (x, y) or (x, y, segments), each int64 (B, T) on `device`.

    A subclass sets `counts` and `_cursor`, to zero or to those of a state, and calls `_start`. Batches are made ahead
    in a thread, but `_cursor` is that of the last batch handed out: a checkpoint must not skip what was only prepared.

    Raises:
        ValueError: the shape or the rank makes no sense.
    """

    counts: SomeCounts
    """Of the sequences handed out, over all ranks, since the very first batch."""
    _cursor: SomeCursor

    def __init__(
        self, batch_size: int, sequence_len: int, device: torch.device | str, rank: int, world_size: int
    ) -> None:
        if batch_size < 1 or sequence_len < 1:
            raise ValueError(f"batch size and sequence length must be positive, got {batch_size} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        self.device = torch.device(device)
        self.batch_size, self.sequence_len, self.rank, self.world_size = batch_size, sequence_len, rank, world_size

    def _start(
        self,
        sequences: Callable[[], Iterator[TrainingSequence[SomeCounts, SomeCursor]]],
        pad_id: int,
        more: int = 0,
    ) -> None:
        """Make batches of what `sequences` yields, in a thread. `sequences` must not hold the loader (see Prefetch).

        `more` numbers are there for each token besides x and y, such as its segment.
        """
        shape, rank, world_size = (2 + more, self.batch_size, self.sequence_len), self.rank, self.world_size
        self._batches = Prefetch(lambda: rank_batches(sequences(), shape, pad_id, rank, world_size))
        self._feed = DeviceFeed(self._batches, attrgetter("data"), self.device)

    def __iter__(self: SomeLoader) -> SomeLoader:
        return self

    def __next__(self) -> tuple[Any, ...]:
        batch, data = next(self._feed)  # data: (2 + more, B, T)
        # Not before: batches that are made but not handed out must come again after a resume.
        self._cursor = batch.after
        self.counts += batch.counts
        return data.unbind()

    def close(self) -> None:
        """Stop the background thread (it also stops by itself when the loader is gone)."""
        self._batches.close()
