"""Whole conversations into rows of a fixed number of tokens, best fit, in an order that a resume can find again.

An epoch is a shuffled pass over the dataset in windows of WINDOW conversations; each window is packed by itself,
longest first, and its rows are shuffled. So a place in the sequence of rows is three numbers: epoch, window, row.

A conversation longer than a row is cut after the last assistant turn that fits; if not even one fits it is left out.
"""

from __future__ import annotations

import bisect
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from nanochat.data.loader import Counts, TrainingSequence
from nanochat.messages import Conversation
from nanochat.tokenizer import RustBPETokenizer

WINDOW = 1024  # conversations packed together: more pack tighter, fewer start and resume faster
CACHE_BYTES = 512_000_000  # renders kept for the next epoch
FORECAST_WINDOWS = 4  # read to foretell the rows of an epoch

Supervise = Literal["all", "assistant"]


# --- one conversation -------------------------------------------------------------------------------------------------


class Rendered(NamedTuple):
    """A conversation that fits a row: ids (n,) and which of them are to be predicted (n,)."""

    ids: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_]
    truncated: bool


class Renderer:
    """Turns conversation i into tokens, remembering results while they fit into memory."""

    def __init__(
        self, dataset: Sequence[Conversation], tokenizer: RustBPETokenizer, capacity: int, supervise: Supervise
    ) -> None:
        self.dataset, self.tokenizer, self.capacity, self.supervise = dataset, tokenizer, capacity, supervise
        self._cache: dict[int, Rendered | None] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()  # the forecast and the background thread may ask at the same time

    def get(self, i: int) -> Rendered | None:
        """Conversation i, cut to fit a row at a turn's end; None if no assistant turn fits."""
        with self._lock:
            if i in self._cache:
                return self._cache[i]
            try:
                rendered = self._render(self.dataset[i])
            except ValueError as error:
                raise ValueError(f"conversation {i}: {error}") from None
            size = 400  # about what Python needs for the objects themselves
            size += 0 if rendered is None else rendered.ids.nbytes + rendered.mask.nbytes
            if self._cached_bytes + size <= CACHE_BYTES:
                self._cache[i] = rendered
                self._cached_bytes += size
            return rendered

    def _render(self, conversation: Conversation) -> Rendered | None:
        ids: list[int] = []
        mask: list[int] = []
        end_of_fitting = 0  # tokens up to the last assistant turn that fits
        for turn_ids, turn_mask in self.tokenizer.render_turns(conversation):
            ids += turn_ids
            mask += turn_mask
            if any(turn_mask) and len(ids) <= self.capacity:
                end_of_fitting = len(ids)
        truncated = len(ids) > self.capacity
        keep = end_of_fitting if truncated else len(ids)
        supervised = np.array(mask[:keep], dtype=np.bool_)
        if self.supervise == "all":
            supervised[1:] = True  # bos stays out: nothing before it foretells it
        if not supervised.any():
            return None
        return Rendered(np.array(ids[:keep], dtype=self.tokenizer.dtype), supervised, truncated)


# --- packing ----------------------------------------------------------------------------------------------------------


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins of `capacity`, longest first, each into the fullest bin where it fits; lists of indices.

    Raises:
        ValueError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > capacity:
            raise ValueError(f"item {i} has length {lengths[i]}, more than the capacity {capacity}")
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at < len(room):
            free, number = room.pop(at)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        bisect.insort(room, (free - lengths[i], number))
    return bins


@dataclass
class PackingStats(Counts):
    """What packing did to the conversations, over all ranks."""

    rows: int = 0
    conversations: int = 0
    """Packed into those rows."""
    truncated: int = 0
    """Of these, cut at a turn's end because they were longer than a row."""
    dropped: int = 0
    """Left out because not even their first assistant turn fits a row, or they have none."""
    tokens: int = 0
    """In the rows, without padding."""
    supervised: int = 0
    """Of these, to be predicted."""
    padding: int = 0
    """Places left empty."""

    @property
    def padding_share(self) -> float:
        """Padding as a share of all places."""
        return self.padding / max(1, self.padding + self.tokens)

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations in {self.rows:,} rows, {100 * self.padding_share:.1f}% padding, "
            f"{100 * self.supervised / max(1, self.tokens):.0f}% of tokens supervised, {self.truncated:,} truncated, "
            f"{self.dropped:,} dropped as too long"
        )


class ChatCursor(NamedTuple):
    """Where the next sequence comes from."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    """Sequences of the window that are done."""


ChatSequence = TrainingSequence[PackingStats, ChatCursor]


class Packer:
    """The endless sequence of rows."""

    def __init__(self, renderer: Renderer, seed: int) -> None:
        self.renderer, self.seed = renderer, seed
        self.num_windows = -(-len(renderer.dataset) // WINDOW)

    def window(self, epoch: int, window: int, order: Sequence[int]) -> tuple[list[list[Rendered]], int]:
        """(rows, how many conversations were dropped) of one window."""
        rendered = [self.renderer.get(i) for i in order[window * WINDOW : (window + 1) * WINDOW]]
        kept = [r for r in rendered if r is not None]
        rows = pack_best_fit([len(r.ids) for r in kept], self.renderer.capacity)
        shuffler = random.Random(f"{self.seed}/{epoch}/{window}")
        shuffler.shuffle(rows)
        for row in rows:  # else the longest would always stand first
            shuffler.shuffle(row)
        return [[kept[i] for i in row] for row in rows], len(rendered) - len(kept)

    def order(self, epoch: int) -> list[int]:
        """The conversations of an epoch in their order."""
        order = list(range(len(self.renderer.dataset)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def stats_of(self, row: list[Rendered]) -> PackingStats:
        """The statistics of one sequence."""
        tokens = sum(len(r.ids) for r in row)
        return PackingStats(
            rows=1,
            conversations=len(row),
            truncated=sum(r.truncated for r in row),
            tokens=tokens,
            supervised=sum(int(r.mask.sum()) for r in row),
            padding=self.renderer.capacity - tokens,
        )

    def _join(self, row: list[Rendered], cursor: ChatCursor) -> ChatSequence:
        ids, mask = (np.concatenate(parts) for parts in ([r.ids for r in row], [r.mask for r in row]))
        return TrainingSequence(ids, self.stats_of(row), cursor, mask, [len(r.ids) for r in row])

    def sequences(self, start: ChatCursor) -> Iterator[ChatSequence]:
        """All sequences from `start` on, without end.

        Raises:
            ValueError: a whole epoch has no sequence.
        """
        epoch, first_window, first_row = start
        while True:
            order = self.order(epoch)
            pending: ChatSequence | None = None  # held back until the cursor of the next sequence is known
            dropped = 0
            for number in range(first_window, self.num_windows):
                rows, newly_dropped = self.window(epoch, number, order)
                if pending is not None and not rows:
                    pending.counts.dropped += newly_dropped  # a resume will begin behind this window
                elif first_row == 0:
                    dropped += newly_dropped
                for i in range(first_row, len(rows)):
                    cursor = ChatCursor(epoch, number, i)
                    if pending is not None:
                        pending.after = cursor
                        yield pending
                    pending = self._join(rows[i], cursor)
                    pending.counts.dropped, dropped = dropped, 0
                first_row = 0
            if pending is None:
                raise ValueError(
                    f"none of the {len(order)} conversations has an assistant's turn that fits into "
                    f"{self.renderer.capacity} tokens: raise --max_seq_len or use shorter ones"
                )
            epoch, first_window = epoch + 1, 0
            pending.after = ChatCursor(epoch)
            yield pending

    def forecast(self) -> PackingStats:
        """The statistics of the first epoch, from its first windows."""
        seen, total = min(FORECAST_WINDOWS, self.num_windows), PackingStats()
        order = self.order(0)
        for number in range(seen):
            rows, dropped = self.window(0, number, order)
            total.dropped += dropped
            for row in rows:
                total += self.stats_of(row)
        scale = len(order) / min(len(order), seen * WINDOW)
        return PackingStats(**{name: round(value * scale) for name, value in asdict(total).items()})
