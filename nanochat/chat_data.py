"""Conversations as training rows, for mid-training and SFT.

    B  rows per batch and rank     T  tokens per row     W  world size (ranks)

Whole conversations are packed into rows of T+1 tokens (x is the first T, y the last T). An epoch is a shuffled pass
over the dataset in windows of WINDOW conversations; each window is packed by itself, best fit, longest first, and its
rows are shuffled. So the place (epoch, window, row) is all a resume needs, and the rows are the same for every world
size.

A conversation longer than a row is cut after the last assistant turn that fits; if not even one fits it is left out.
Both are counted, as is padding. Padding and everything unsupervised is -1 in y, and every row supervises something.
"""

from __future__ import annotations

import bisect
import json
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanochat.background import Prefetch, to_device
from nanochat.tokenizer import Conversation, RustBPETokenizer, check_messages

WINDOW = 1024  # conversations packed together: more pack tighter, fewer start and resume faster
CACHE_BYTES = 512_000_000  # renders kept for the next epoch
FORECAST_WINDOWS = 4  # read to foretell the rows of an epoch

Supervise = Literal["all", "assistant"]


# --- reading ----------------------------------------------------------------------------------------------------------


def load_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a .jsonl file or of a .parquet file with a column `messages`.

    A line of JSONL is a list of messages or {"messages": [...]}; a message is {"role", "content"}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a conversation is malformed; names the file, the line and the message.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no conversations at {path}: give a .jsonl file, or a .parquet with a column 'messages'"
        )
    read = _read_parquet if path.suffix == ".parquet" else _read_jsonl
    conversations = []
    for place, record in read(path):
        messages = record.get("messages") if isinstance(record, dict) else record
        try:
            check_messages(messages)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
        conversations.append({"messages": messages})
    if not conversations:
        raise ValueError(f"{path} holds no conversations")
    return conversations


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if "messages" not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column 'messages' (it has: {', '.join(file.schema_arrow.names)})")
            row = 0
            for batch in file.iter_batches(columns=["messages"]):
                for messages in batch.column(0).to_pylist():
                    yield f"row {row}", messages
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error})") from error


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
            size = 0 if rendered is None else rendered.ids.nbytes + rendered.mask.nbytes
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
class PackingStats:
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

    def add(self, other: PackingStats) -> None:
        """Count `other` too."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

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


class Place(NamedTuple):
    """Where the next row comes from."""

    epoch: int = 0
    window: int = 0
    row: int = 0


class Row(NamedTuple):
    """One packed row: the conversations in it, what it adds to the statistics, and the place after it."""

    conversations: list[Rendered]
    stats: PackingStats
    after: Place


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
        """The statistics of one row."""
        tokens = sum(len(r.ids) for r in row)
        return PackingStats(
            rows=1,
            conversations=len(row),
            truncated=sum(r.truncated for r in row),
            tokens=tokens,
            supervised=sum(int(r.mask.sum()) for r in row),
            padding=self.renderer.capacity - tokens,
        )

    def rows(self, start: Place) -> Iterator[Row]:
        """All rows from `start` on, for ever.

        Raises:
            ValueError: a whole epoch has no row.
        """
        epoch, first_window, first_row = start
        dropped = 0  # not yet told with a row
        while True:
            order = self.order(epoch)
            found = False
            for number in range(first_window, self.num_windows):
                rows, newly_dropped = self.window(epoch, number, order)
                dropped += newly_dropped if first_row == 0 else 0
                for i in range(first_row, len(rows)):
                    found = True
                    stats = self.stats_of(rows[i])
                    stats.dropped, dropped = dropped, 0
                    last_window, last_row = number + 1 == self.num_windows, i + 1 == len(rows)
                    after = Place(epoch, number, i + 1)
                    if last_row:
                        after = Place(epoch + 1) if last_window else Place(epoch, number + 1)
                    yield Row(rows[i], stats, after)
                first_row = 0
            if not found and first_window == 0:
                raise ValueError(
                    f"none of the {len(self.renderer.dataset)} conversations has an assistant's turn that fits into "
                    f"{self.renderer.capacity} tokens: raise --max_seq_len or use shorter ones"
                )
            epoch, first_window = epoch + 1, 0

    def forecast(self) -> PackingStats:
        """The statistics of the first epoch, from its first windows."""
        seen, total = min(FORECAST_WINDOWS, self.num_windows), PackingStats()
        order = self.order(0)
        for number in range(seen):
            rows, dropped = self.window(0, number, order)
            total.dropped += dropped
            for row in rows:
                total.add(self.stats_of(row))
        scale = len(order) / min(len(order), seen * WINDOW)
        return PackingStats(**{name: round(value * scale) for name, value in asdict(total).items()})


class Batch(NamedTuple):
    """What the background thread makes: (B, T) int64 arrays, what they add to the statistics, the place after."""

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    stats: PackingStats
    after: Place


class ConversationLoader:
    """Endless iterator of (x, y), both int64 (B, T) on `device`; y is -1 where nothing is to be learned.

    Args:
        dataset: has a length and gives conversation i as {"messages": [...]}.
        tokenizer: renders them.
        batch_size: rows per batch on this rank (B).
        sequence_len: tokens per row (T).
        device: where the batches go.
        rank: which of the `world_size` processes this is.
        world_size: how many processes share the batches.
        supervise: learn "all" tokens (but bos), or those of the "assistant" only.
        seed: of the shuffles.
        state: `state_dict()` of an earlier loader, to go on where it stopped.

    Raises:
        ValueError: no conversations, or `state` belongs to other conversations or settings.
    """

    def __init__(
        self,
        dataset: Sequence[Conversation],
        tokenizer: RustBPETokenizer,
        batch_size: int,
        sequence_len: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        supervise: Supervise = "assistant",
        seed: int = 42,
        state: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or sequence_len < 1:
            raise ValueError(f"batch size and sequence length must be positive, got {batch_size} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        if len(dataset) == 0:
            raise ValueError("there are no conversations to train on")
        self.device = torch.device(device)
        self.stats = PackingStats()
        """Of the rows handed out to all ranks together so far."""
        self._identity = {
            "conversations": len(dataset),
            "sequence_len": sequence_len,
            "supervise": supervise,
            "seed": seed,
            "tokenizer": tokenizer.hash,
        }
        self._place = Place() if state is None else self._restore(state)
        self._packer = Packer(Renderer(dataset, tokenizer, sequence_len + 1, supervise), seed)
        self._forecast: PackingStats | None = None
        packer, start = self._packer, self._place
        self._batches = Prefetch(lambda: _batches(packer, start, batch_size, rank, world_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(self._batches)
        self._place = batch.after
        self.stats.add(batch.stats)
        return to_device(batch.x, self.device), to_device(batch.y, self.device)

    @property
    def epoch(self) -> int:
        """How often all conversations have been passed before the next row."""
        return self._place.epoch

    @property
    def forecast(self) -> PackingStats:
        """What packing will do in the first epoch: exact for up to 4096 conversations, else scaled up from these."""
        if self._forecast is None:
            self._forecast = self._packer.forecast()
        return self._forecast

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch over all ranks (see `forecast`)."""
        return self.forecast.rows

    @property
    def wait_seconds(self) -> float:
        """How long `next` had to wait for data in all."""
        return self._batches.wait_seconds

    def close(self) -> None:
        """Stop the background thread (it also stops by itself when the loader is gone)."""
        self._batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the next row, not yet handed out, comes from; for JSON. The same on every rank."""
        return {**self._place._asdict(), **self._identity, "stats": asdict(self.stats)}

    def _restore(self, state: dict[str, Any]) -> Place:
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"the saved place belongs to other rows ({name} was {state[name]}, is {value}): "
                    "use the same settings, or start anew"
                )
        self.stats = PackingStats(**state["stats"])
        return Place(state["epoch"], state["window"], state["row"])


def _batches(packer: Packer, start: Place, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's batches from `start` on. A module function: the thread that runs it must not hold the loader."""
    capacity = packer.renderer.capacity
    rows = packer.rows(start)
    bos = packer.renderer.tokenizer.get_bos_token_id()
    while True:
        ids = np.full((batch_size, capacity), bos, dtype=np.int64)  # (B, T+1)
        mask = np.zeros((batch_size, capacity), dtype=np.bool_)  # (B, T+1)
        stats, after = PackingStats(), start
        for i in range(batch_size * world_size):
            row = next(rows)
            stats.add(row.stats)
            after = row.after
            if i // batch_size == rank:
                n = sum(len(r.ids) for r in row.conversations)
                ids[i % batch_size, :n] = np.concatenate([r.ids for r in row.conversations])
                mask[i % batch_size, :n] = np.concatenate([r.mask for r in row.conversations])
        x = np.ascontiguousarray(ids[:, :-1])
        y = np.where(mask[:, 1:], ids[:, 1:], -1)
        yield Batch(x, y, stats, after)
