"""Whole conversations into sequences of a fixed number of tokens, in an order that a resume can find again.

An epoch is a shuffled pass over the dataset in windows of WINDOW conversations; each window is packed by itself,
longest first, and its sequences are shuffled. So a position in the order of sequences is three numbers: epoch, window,
and sequence of the window. A resume renders one window, whatever came before it.

A conversation longer than a sequence is cut after the last assistant turn that fits; if not even one fits it is left
out. Nothing is continued in another sequence: an answer must not be learned without its question.
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
CACHE_BYTES = 512_000_000  # rendered conversations kept for the next epoch
FORECAST_WINDOWS = 4  # read to predict how many sequences an epoch has

CUT_SHARE = 0.05  # of the conversations may be too long before that is a warning

Supervise = Literal["all", "assistant"]


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins of `capacity`, longest first, each into the fullest bin where it fits; lists of indices.

    Raises:
        ValueError: an item is longer than a bin.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free space, bin), sorted
    # Longest first: what is left for the end is short and fits into the gaps (best-fit decreasing).
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > capacity:
            raise ValueError(f"item {i} has length {lengths[i]}, more than the capacity {capacity}")
        at = bisect.bisect_left(room, (lengths[i], -1))  # the smallest gap that is large enough
        if at < len(room):
            free, number = room.pop(at)
        else:
            free, number = capacity, len(bins)
            bins.append([])
        bins[number].append(i)
        bisect.insort(room, (free - lengths[i], number))
    return bins


def has_fitting_answer(conversation: Conversation, tokenizer: RustBPETokenizer, capacity: int) -> bool:
    """True if a first answer that is learned ends within `capacity` tokens of the conversation."""
    length = 0
    for ids, mask in tokenizer.render_turns(conversation):
        length += len(ids)
        if length > capacity or any(mask):
            return length <= capacity
    return False


@dataclass
class PackingStats(Counts):
    """Counts of what was packed, over all ranks."""

    rows: int = 0
    """Sequences."""
    conversations: int = 0
    """Packed into them."""
    truncated: int = 0
    """Of these, cut at a turn's end because they were longer than a sequence."""
    dropped: int = 0
    """Left out because not even their first assistant turn fits into a sequence."""
    tokens: int = 0
    """In the sequences, without padding."""
    supervised: int = 0
    """Of these, to be predicted."""
    padding: int = 0
    """Positions left empty."""

    @property
    def padding_share(self) -> float:
        """Padding as a share of all positions."""
        return self.padding / max(1, self.padding + self.tokens)

    @property
    def cut_warning(self) -> str:
        """What to do where many conversations are longer than a sequence; empty where few are."""
        cut, all_of_them = self.truncated + self.dropped, self.conversations + self.dropped
        if cut <= CUT_SHARE * all_of_them:
            return ""
        return (
            f"{cut / all_of_them:.0%} of the conversations are longer than the context: {self.truncated:,} are cut "
            f"after an answer, {self.dropped:,} left out since their first answer does not fit; a base model with a "
            "longer context (--max_seq_len) reads them whole"
        )

    def __str__(self) -> str:
        return (
            f"{self.conversations:,} conversations in {self.rows:,} rows, {100 * self.padding_share:.1f}% padding, "
            f"{100 * self.supervised / max(1, self.tokens):.0f}% of tokens supervised, {self.truncated:,} truncated, "
            f"{self.dropped:,} dropped as too long"
        )


class ChatCursor(NamedTuple):
    """The position of the next sequence."""

    epoch: int = 0
    window: int = 0
    row: int = 0
    """Sequences of the window that are done."""


ChatSequence = TrainingSequence[PackingStats, ChatCursor]


class Rendered(NamedTuple):
    """A conversation that fits into a sequence: ids (n,) and which of them are targets (n,)."""

    ids: npt.NDArray[Any]
    mask: npt.NDArray[np.bool_]
    truncated: bool


class Packer:
    """The endless order of packed sequences.

    Args:
        dataset: has a length and gives conversation i.
        tokenizer: renders them.
        capacity: tokens of a sequence, T+1.
        supervise: learn "all" tokens (but bos), or those of the "assistant" only.
        seed: of the shuffles.
    """

    def __init__(
        self,
        dataset: Sequence[Conversation],
        tokenizer: RustBPETokenizer,
        capacity: int,
        supervise: Supervise,
        seed: int,
    ) -> None:
        self.dataset, self.tokenizer, self.capacity = dataset, tokenizer, capacity
        self.supervise, self.seed = supervise, seed
        self.num_windows = -(-len(dataset) // WINDOW)
        self._cache: dict[int, Rendered | None] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()  # the forecast and the background thread may render at the same time

    def sequences(self, start: ChatCursor) -> Iterator[ChatSequence]:
        """All sequences from `start` on, without end.

        Raises:
            ValueError: a whole epoch has no sequence.
        """
        epoch, first_window, first_row = start
        while True:
            order = self._order(epoch)
            # Held back until it is known where the next one comes from: windows may have none, and after the last one
            # of an epoch the cursor must say that the next epoch begins.
            pending: ChatSequence | None = None
            dropped = 0
            for number in range(first_window, self.num_windows):
                packed, newly_dropped = self._window(epoch, number, order)
                if pending is not None and not packed:
                    pending.counts.dropped += newly_dropped  # a resume will begin behind this window
                elif first_row == 0:
                    dropped += newly_dropped
                for i in range(first_row, len(packed)):
                    cursor = ChatCursor(epoch, number, i)
                    if pending is not None:
                        pending.after = cursor
                        yield pending
                    pending = self._join(packed[i], cursor)
                    pending.counts.dropped, dropped = dropped, 0
                first_row = 0
            if pending is None:
                raise ValueError(
                    f"none of the {len(order)} conversations has an assistant's turn that fits into "
                    f"{self.capacity} tokens: raise --max_seq_len or use shorter ones"
                )
            epoch, first_window = epoch + 1, 0
            pending.after = ChatCursor(epoch)
            yield pending

    def forecast(self) -> PackingStats:
        """The statistics of the first epoch, predicted from its first windows."""
        seen, total = min(FORECAST_WINDOWS, self.num_windows), PackingStats()
        order = self._order(0)
        for number in range(seen):
            packed, dropped = self._window(0, number, order)
            total += PackingStats(dropped=dropped)
            for parts in packed:
                total += self._stats(parts)
        scale = len(order) / min(len(order), seen * WINDOW)
        return PackingStats(**{name: round(value * scale) for name, value in asdict(total).items()})

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.dataset)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def _window(self, epoch: int, window: int, order: Sequence[int]) -> tuple[list[list[Rendered]], int]:
        """(the conversations of each sequence, how many were dropped) of one window."""
        rendered = [self._render(i) for i in order[window * WINDOW : (window + 1) * WINDOW]]
        kept = [r for r in rendered if r is not None]
        packed = pack_best_fit([len(r.ids) for r in kept], self.capacity)
        shuffler = random.Random(f"{self.seed}/{epoch}/{window}")
        shuffler.shuffle(packed)  # packing puts the longest conversations into the first sequences
        for places in packed:  # and into the first positions of each
            shuffler.shuffle(places)
        return [[kept[i] for i in places] for places in packed], len(rendered) - len(kept)

    def _stats(self, parts: list[Rendered]) -> PackingStats:
        tokens = sum(len(r.ids) for r in parts)
        return PackingStats(
            rows=1,
            conversations=len(parts),
            truncated=sum(r.truncated for r in parts),
            tokens=tokens,
            supervised=sum(int(r.mask.sum()) for r in parts),
            padding=self.capacity - tokens,
        )

    def _join(self, parts: list[Rendered], cursor: ChatCursor) -> ChatSequence:
        ids, mask = np.concatenate([r.ids for r in parts]), np.concatenate([r.mask for r in parts])
        return TrainingSequence(ids, self._stats(parts), cursor, mask, [len(r.ids) for r in parts])

    def _render(self, i: int) -> Rendered | None:
        """Conversation i, cut at a turn's end to fit into a sequence; None if no assistant turn fits."""
        with self._lock:
            if i not in self._cache:
                try:
                    rendered = self._render_anew(self.dataset[i])
                except ValueError as error:
                    raise ValueError(f"conversation {i}: {error}") from None
                size = 400  # about what Python needs for the objects themselves
                size += 0 if rendered is None else rendered.ids.nbytes + rendered.mask.nbytes
                if self._cached_bytes + size > CACHE_BYTES:
                    return rendered
                self._cache[i] = rendered
                self._cached_bytes += size
            return self._cache[i]

    def _render_anew(self, conversation: Conversation) -> Rendered | None:
        ids: list[int] = []
        mask: list[int] = []
        end_of_fitting = 0  # tokens up to the last assistant turn that fits
        turns = [message for message in conversation["messages"] if message["role"] != "system"]
        for message, (turn_ids, turn_mask) in zip(turns, self.tokenizer.render_turns(conversation), strict=True):
            ids += turn_ids
            if any(turn_mask) and len(ids) <= self.capacity:
                end_of_fitting = len(ids)
            if self.supervise == "all" and message.get("weight") != 0:
                turn_mask = [1] * len(turn_mask)
            mask += turn_mask
        truncated = len(ids) > self.capacity
        keep = end_of_fitting if truncated else len(ids)
        supervised = np.array(mask[:keep], dtype=np.bool_)
        # Not bos: in a packed sequence the token before it is the end of another conversation, and nothing in that says
        # what begins now.
        supervised[:1] = False
        if not supervised.any():
            return None
        return Rendered(np.array(ids[:keep], dtype=self.tokenizer.dtype), supervised, truncated)
