"""Batches of pretraining: sequences of T tokens from the documents of a corpus, each document as bos + its tokens.

    documents --token_stream--> blocks of tokens --text_rows--> sequences of T+1 tokens --loader--> (x, y), each (B, T)

How tokens become sequences is `mode`: `stream`, the classic one, or `bestfit`, whose sequences begin at a document
(see data/text_rows.py). There is one order of sequences for every batch size and number of ranks (see data/loader.py).

Training never ends, each epoch in an order of its own (data/token_stream.py). Validation is one pass; its last batch
is filled up with targets of -1, so in `stream` mode every token counts whatever B and T are.

The state is a position in the corpus (shard, row group, row, token), not a count of batches: a resume
continues with exactly the same sequences, with another batch size or number of ranks too.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch

from nanochat.data.corpus import Corpus
from nanochat.data.loader import Batch, BatchLoader
from nanochat.data.text_rows import ROWS, TextCounts
from nanochat.data.token_cache import TokenCache
from nanochat.data.token_stream import LookUp, TextCursor, TokenStream, chunk_order
from nanochat.env import print0, usable_cores
from nanochat.tokenizer import RustBPETokenizer, Tokens

Mode = Literal["stream", "bestfit"]
# Of the state. Raise it when the order of sequences changes: then a state of before would silently repeat or skip text.
STATE_VERSION = 2
MOST_THREADS = 4  # of the tokenizer, which must only be faster than the model learns


def default_threads(world_size: int) -> int:
    """Threads of the tokenizer: the cores that are this process's share, at most MOST_THREADS."""
    return max(1, min(MOST_THREADS, usable_cores() // world_size))


def first_tokens(corpus: Corpus, tokenizer: RustBPETokenizer, most: int, skip_bad_shards: bool = False) -> Tokens:
    """The training text's first documents, as many as have at most so many tokens together; int32.

    Raises:
        ValueError: these are fewer than two.
    """
    parts: list[Tokens] = []
    for block in TokenStream(corpus, tokenizer, "train", default_threads(1), skip_bad_shards).blocks(TextCursor()):
        if block.cursor.epoch > 0:  # that was all
            break
        room = most - sum(map(len, parts))
        end = int(block.bounds[np.searchsorted(block.bounds, room, side="right") - 1])
        parts.append(np.asarray(block.tokens[:end], np.int32))
        if end < len(block.tokens):
            break
    text = np.concatenate([np.empty(0, np.int32), *parts])
    documents = np.count_nonzero(text == tokenizer.get_bos_token_id())
    if documents < 2:  # none is found in itself: nothing would be learned
        raise ValueError(
            f"--recall={most}: the training text begins with {documents} whole documents of so many tokens together, "
            "and each is looked up in the others: give more tokens, or leave --recall out"
        )
    return text


class PretrainLoader(BatchLoader[TextCounts, TextCursor]):
    """Iterator of (x, y), both int64 (B, T) on `device`, or of a `Batch` with what is found for each token.

    Args:
        corpus: where the documents are.
        tokenizer: turns them into tokens.
        batch_size: sequences per batch on this rank (B).
        sequence_len: tokens per sequence (T).
        split: "train" (endless) or "val" (one pass, targets of -1 fill the last batch).
        device: where the batches go.
        rank: which of the `world_size` processes this is.
        world_size: how many processes share the batches.
        state: `state_dict()` of an earlier loader, to continue where it stopped.
        num_threads: threads of the tokenizer; None takes this process's share of the cores.
        mode: "stream" or "bestfit".
        skip_bad_shards: pass over what can't be read, with a warning, instead of stopping.
        cache: documents that have been tokenized before.
        max_rows: end after so many sequences, whatever the batch size and the number of ranks.
        look_up: what the model would find in the text it carries, see TokenStream; batches are a `Batch` with it then.

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
        cache: TokenCache | None = None,
        max_rows: int | None = None,
        look_up: LookUp | None = None,
    ) -> None:
        super().__init__(batch_size, sequence_len, device, rank, world_size)
        if mode not in ROWS:
            raise ValueError(f"mode is {mode!r}, but must be {' or '.join(ROWS)}")
        self.counts, self.tokens_seen = TextCounts(), 0  # tokens_seen: handed out to all ranks since the first batch
        self._corpus, self._tokenizer, self._split, self._mode = corpus, tokenizer, split, mode
        # The background thread may be waiting for a shard that is still being downloaded: it asks this event meanwhile,
        # and it must end when the program drops the loader, not only when it calls `close`.
        stop = threading.Event()
        self._stop = weakref.finalize(self, stop.set)
        # Every rank tokenizes the whole stream and keeps its share: that costs less than telling the others, and a rank
        # needs no other to know where all of them are.
        threads = default_threads(world_size) if num_threads is None else num_threads
        stream = TokenStream(corpus, tokenizer, split, threads, skip_bad_shards, cache, stop.is_set, look_up)
        self._chunks = stream.chunks  # the stream's own list: it grows while shards arrive
        self._cursor = start = TextCursor() if state is None else self._restore(state)
        # Cut before the sequences are shared out among ranks, so that `max_rows` are the same for any number of them.
        # (No `self` in here: the thread must not keep the loader alive.)
        more = 0 if look_up is None else stream.nothing.shape[1] - 1
        rows = partial(ROWS[mode], stream, start, sequence_len)
        self._start(lambda: islice(rows(), max_rows), tokenizer.get_bos_token_id(), more)

    def __next__(self) -> tuple[Any, ...]:
        epoch = self.epoch
        # x and y, each (B, T); y[b, t] is the token after x[b, t], or -1 behind the end of the text
        x, y, *found = super().__next__()
        # Those of all ranks, as each counts the whole run; padding counts too, as the model computes it all the same.
        self.tokens_seen += self.world_size * self.batch_size * self.sequence_len
        if self._split == "train" and self.epoch > epoch:  # a small corpus that is read many times should be noticed
            print0(
                f"{self._corpus.name}: epoch {self.epoch} begins (counted from 0), "
                f"its {len(self._chunks):,} row groups and their documents in a new order"
            )
        return Batch(x, y, found=torch.stack(found, dim=-1)) if found else (x, y)

    @property
    def epoch(self) -> int:
        """Complete passes over the corpus before the next batch."""
        return self._cursor.epoch

    def close(self) -> None:
        """Stop the background thread (it also stops by itself when the loader is gone)."""
        self._stop()
        super().close()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position of the next batch that is not handed out yet; for JSON. The same on every rank."""
        chunk = self._chunks[chunk_order(len(self._chunks), self._cursor.epoch)[self._cursor.index]]
        return {
            "version": STATE_VERSION,
            "mode": self._mode,
            "sequence_len": self.sequence_len,  # batch size and ranks are left out: any will do
            **asdict(self._cursor),  # epoch, index, row, token, rows
            "split": self._split,
            # Where the cursor is, by name too: `index` counts chunks, and means another one once shards are added.
            "shard": chunk.shard.name,
            "row_group": chunk.row_group,
            "tokens_seen": self.tokens_seen,
            "counts": asdict(self.counts),
            # What the cursor counts in: with other tokens or other texts the same numbers are another position.
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._tokenizer.hash,
        }

    def _restore(self, state: dict[str, Any]) -> TextCursor:
        if state.get("version") != STATE_VERSION:
            raise ValueError("the saved position in the data is of another version of this program: start anew")
        # Nothing of the state is used before all of it fits: a wrong position would repeat or skip text unseen.
        if state["tokenizer"] != self._tokenizer.hash:
            raise ValueError(
                "the saved position in the data belongs to another tokenizer: restore that one, or start anew"
            )
        for name, value in (("split", self._split), ("mode", self._mode)):
            if state[name] != value:
                raise ValueError(f"the saved position is in the {state[name]} {name}, not in {value}")
        # A position in the stream holds for any T; a window of `bestfit` is packed for one T.
        if self._mode == "bestfit" and state["sequence_len"] != self.sequence_len:
            raise ValueError(
                f"the saved position counts sequences of {state['sequence_len']} tokens, not of {self.sequence_len}: "
                "sequences that begin at documents can't be continued with another length"
            )
        self.tokens_seen, self.counts = state["tokens_seen"], TextCounts(**state["counts"])
        return self._find(TextCursor(*(state[name] for name in ("epoch", "index", "row", "token", "rows"))), state)

    def _find(self, cursor: TextCursor, state: dict[str, Any]) -> TextCursor:
        """The cursor in the corpus as it is now: shards may have been added since."""
        if cursor.epoch > 0:  # the order of a later epoch is drawn over all chunks, so all of them must be here
            self._corpus.wait_for_all(self._split)
        if state["corpus"] == self._corpus.fingerprint:
            self._corpus.grow(self._split, cursor.index)
            return cursor
        # Other shards than before: look for the row group by its name, and read on from there in the new order.
        for index, number in enumerate(chunk_order(len(self._chunks), cursor.epoch)):
            chunk = self._chunks[number]
            if (chunk.shard.name, chunk.row_group) == (state["shard"], state["row_group"]):
                print0(f"warning: the shards in {self._corpus.name} changed; continuing in {chunk.shard.name}")
                return replace(cursor, index=index)
        raise ValueError(
            f"{self._corpus.name} no longer has row group {state['row_group']} of {state['shard']} for {self._split}, "
            "where training stopped: put the shard back"
        )
