"""Conversations for mid-training and SFT: read from files, handed out as packed batches.

Sequences hold whole conversations (see chat_rows.py) and are the same for every number of ranks (see loader.py).
Padding and everything unsupervised is -1 in y, and every sequence supervises something.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanochat.data.chat_rows import ChatCursor, Packer, PackingStats, Supervise
from nanochat.data.chat_store import Chats
from nanochat.data.chats import ChatSource, load_chats
from nanochat.data.loader import BatchLoader
from nanochat.env import print0
from nanochat.messages import Conversation
from nanochat.tokenizer import RustBPETokenizer

# --- reading ----------------------------------------------------------------------------------------------------------


def load_conversations(path: str | Path) -> Chats:
    """The conversations of a file or folder in any form that people have (see chats.py); prints what was found.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: they can't be learned from; names the file, the line and what is there.
    """
    chats, inventory = load_chats(ChatSource.from_env(str(path)))
    print0("\n".join(inventory.lines()))
    return chats


# --- training batches -------------------------------------------------------------------------------------------------


class ConversationLoader(BatchLoader[PackingStats, ChatCursor]):
    """Endless iterator of (x, y) or (x, y, segments), int64 (B, T) on `device`; y is -1 where nothing is learned.

    Segments number the conversations of a sequence, padding last: with them the model reads each as if it were alone.

    Args:
        dataset: has a length and gives conversation i as {"messages": [...]}.
        tokenizer: renders them.
        batch_size: sequences per batch on this rank (B).
        sequence_len: tokens per sequence (T).
        device: where the batches go.
        rank: which of the `world_size` processes this is.
        world_size: how many processes share the batches.
        supervise: learn "all" tokens (but bos), or those of the "assistant" only.
        isolate: hand out segments.
        seed: of the shuffles.
        state: `state_dict()` of an earlier loader, to continue where it stopped.

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
        super().__init__(batch_size, sequence_len, device, rank, world_size)
        if len(dataset) == 0:
            raise ValueError("there are no conversations to train on")
        self.counts, self._cursor = PackingStats(), ChatCursor()
        self._identity = {
            "conversations": len(dataset),
            "sequence_len": sequence_len,
            "supervise": supervise,
            "seed": seed,
            "tokenizer": tokenizer.hash,
        }
        if state is not None:
            self._restore(state)
        packer, start = Packer(dataset, tokenizer, sequence_len + 1, supervise, seed), self._cursor
        self._packer = packer
        # Padding is bos, which begins a conversation: what stands before it says nothing about what comes.
        self._start(lambda: packer.sequences(start), tokenizer.get_bos_token_id(), int(isolate))

    @property
    def epoch(self) -> int:
        """Complete passes over all conversations before the next sequence."""
        return self._cursor.epoch

    @functools.cached_property
    def forecast(self) -> PackingStats:
        """The statistics of the first epoch: exact for up to 4096 conversations, else scaled up from these."""
        return self._packer.forecast()

    @property
    def rows_per_epoch(self) -> int:
        """Sequences of one epoch over all ranks (see `forecast`)."""
        return self.forecast.rows

    def state_dict(self) -> dict[str, Any]:
        """The position of the next sequence that is not handed out yet; for JSON. The same on every rank."""
        return {**self._cursor._asdict(), **self._identity, "stats": asdict(self.counts)}

    def _restore(self, state: dict[str, Any]) -> None:
        # The cursor counts in an order that follows from these: with others the same numbers are another position, and
        # some conversations would be learned twice and some never.
        for name, value in self._identity.items():
            if state[name] != value:
                raise ValueError(
                    f"the saved position belongs to other sequences ({name} was {state[name]}, is {value}): "
                    "use the same settings, or start anew"
                )
        self.counts = PackingStats(**state["stats"])
        self._cursor = ChatCursor(*(state[name] for name in ChatCursor._fields))
