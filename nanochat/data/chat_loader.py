"""Conversations for mid-training and SFT: read from files, handed out as packed batches.

    B  rows per batch and rank     T  tokens per row     W  world size (ranks)

Rows have T+1 tokens (x is the first T, y the last T) and hold whole conversations; how they are chosen is packing.py's
business. Batch n is WB consecutive rows, of which rank r gets B from rB on: the order is the same for every world size.
Padding and everything unsupervised is -1 in y, and every row supervises something.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from nanochat.data.chat_rows import Packer, PackingStats, Place, Renderer, Supervise
from nanochat.data.prefetch import Prefetch, to_device
from nanochat.env import print0
from nanochat.messages import Conversation, check_messages, from_openai
from nanochat.tokenizer import RustBPETokenizer

# --- reading ----------------------------------------------------------------------------------------------------------


def load_conversations(path: str | Path) -> list[Conversation]:
    """The conversations of a .jsonl file or of a .parquet file with a column `messages`.

    A line of JSONL is a list of messages or {"messages": [...]}; a message is {"role", "content"}, or one of OpenAI's
    form with tool calls. Calls of tools that the engine does not have are learned as text, and said.

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
    other_tools: Counter[str] = Counter()
    for place, record in read(path):
        messages = record.get("messages") if isinstance(record, dict) else record
        try:
            messages = from_openai(messages, other_tools)
            check_messages(messages)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
        conversations.append({"messages": messages})
    if not conversations:
        raise ValueError(f"{path} holds no conversations")
    if other_tools:
        names = ", ".join(f"{name} ({count}×)" for name, count in other_tools.most_common(5))
        print0(f"warning: {path} calls tools that nothing will answer, as the engine has a calculator only: {names}")
    return conversations


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not UTF-8 ({error}): save the file as UTF-8") from None
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


# --- training rows ----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the background thread makes: (B, T) int64 arrays, what they add to the statistics, the place after."""

    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    stats: PackingStats
    after: Place


class ConversationLoader:
    """Endless iterator of (x, y) or (x, y, segments), int64 (B, T) on `device`; y is -1 where nothing is learned.

    Segments number the conversations of a row, padding last: with them the model reads each as if it were alone.

    Args:
        dataset: has a length and gives conversation i as {"messages": [...]}.
        tokenizer: renders them.
        batch_size: rows per batch on this rank (B).
        sequence_len: tokens per row (T).
        device: where the batches go.
        rank: which of the `world_size` processes this is.
        world_size: how many processes share the batches.
        supervise: learn "all" tokens (but bos), or those of the "assistant" only.
        isolate: hand out segments.
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
        isolate: bool = False,
        seed: int = 42,
        state: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or sequence_len < 1:
            raise ValueError(f"batch size and sequence length must be positive, got {batch_size} and {sequence_len}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not below the world size {world_size}")
        if len(dataset) == 0:
            raise ValueError("there are no conversations to train on")
        self.device, self.isolate = torch.device(device), isolate
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

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return self

    def __next__(self) -> tuple[Any, ...]:
        batch = next(self._batches)
        self._place = batch.after
        self.stats.add(batch.stats)
        arrays = (batch.x, batch.y, batch.segments) if self.isolate else (batch.x, batch.y)
        return tuple(to_device(array, self.device) for array in arrays)

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
        segments = np.zeros((batch_size, capacity), dtype=np.int64)  # (B, T+1)
        stats, after = PackingStats(), start
        for i in range(batch_size * world_size):
            row = next(rows)
            stats.add(row.stats)
            after = row.after
            if i // batch_size == rank:
                lengths = [len(r.ids) for r in row.conversations]
                n, count = sum(lengths), len(lengths)
                ids[i % batch_size, :n] = np.concatenate([r.ids for r in row.conversations])
                mask[i % batch_size, :n] = np.concatenate([r.mask for r in row.conversations])
                segments[i % batch_size] = np.repeat(np.arange(count + 1), [*lengths, capacity - n])
        x = np.ascontiguousarray(ids[:, :-1])
        y = np.where(mask[:, 1:], ids[:, 1:], -1)
        yield Batch(x, y, np.ascontiguousarray(segments[:, :-1]), stats, after)
