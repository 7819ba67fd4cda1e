"""A decode step that a card has recorded (a CUDA graph): started by one call instead of some hundred.

An old card, or one beside a slow CPU, waits between the small operations of a decode step for the next one to be
started. A graph holds them all. It repeats what was recorded, with the same shapes at the same addresses, so nothing in
the step may depend on a number that only Python knows: how long each sequence is stands in a tensor, attention looks at
a fixed number of positions and masks those behind a sequence's end, and the cache's memory never moves.

Nobody has to believe that this works on a given card. A recorded step is used only after CHECKED steps were computed
both ways and gave the same tokens; where recording fails or anything differs, decoding goes on without, and says so.

Shapes: B sequences, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.generate.kv_cache import KVCache
from nanochat.precision import DTYPES

# With more sequences the operations are large enough to hide what starting them costs; and each number has graphs.
MOST_ROWS = 8
LEAST_LENGTH = 256  # positions that attention looks at: this, or a power of two above it, or the whole context
# Steps of one shape before it is recorded, which costs about as much as some of them: a short answer is over by then,
# and so is the tail of a batch, whose sequences end one after the other. A server's cache lives long enough.
EAGER_STEPS = 32
CHECKED = 8  # steps that are computed both ways before a recorded one is trusted
# Of the largest logit. Masked positions change the order of sums, and so the last bits.
TOLERANCE = {DTYPES["float32"]: 1e-3, DTYPES["bfloat16"]: 5e-2, DTYPES["float16"]: 1e-2}

Step = Callable[[Tensor, KVCache], Tensor]  # a token per sequence (B, 1) and the cache -> logits (B, V)
Record = Callable[[Callable[[], Tensor], torch.device], Callable[[], Tensor]]
"""Runs a step on a device and records it; returns what repeats it, and gives the tensor that then holds its result."""


def record_on_card(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record a step as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        # The first run of an operation may allocate and choose kernels, which a recording must not. Another stream, as
        # torch's manual asks for.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        # thread_local: another card's engine may be at work in its own thread meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()

    def repeat() -> Tensor:
        graph.replay()
        return result

    return repeat


class FixedRows(KVCache):
    """The first rows of a cache for a step that is recorded: their lengths are in a tensor, not in Python's numbers.

    Args:
        cache: whose memory to use.
        rows: how many of its rows, B.
        length: positions that attention looks at; those behind a row's end are masked.
    """

    is_fixed = True

    def __init__(self, cache: KVCache, rows: int, length: int) -> None:
        device = cache.k_cache.device
        self.k_cache, self.v_cache, self.tokens = cache.k_cache, cache.v_cache, cache.tokens
        self.batch_size, self.max_seq_len, self.key_offset = cache.batch_size, cache.max_seq_len, cache.key_offset
        self._start, self._stop, self._length = 0, rows, length
        self._positions = torch.zeros(rows, 1, dtype=torch.long, device=device)  # (B, 1), of the new tokens
        self._rows = torch.arange(rows, device=device).unsqueeze(1)  # (B, 1)
        self._all = torch.arange(length, device=device)
        self._planned = None

    def begin(self, lengths: list[int]) -> None:
        """Let the next step write at these positions."""
        self._positions.copy_(torch.tensor(lengths).unsqueeze(1), non_blocking=True)

    def get_pos(self) -> int:
        """Such that `update` returns as many positions as attention looks at, whatever the rows hold."""
        return self._length - 1

    def advance(self, n: int) -> None:
        """The step is over; the cache itself counts."""
        self._planned = None

    def _plan(self, n: int) -> None:
        if self._planned is None:  # once a step: the mask is a part of what is recorded
            self._mask = self._all <= self._positions[:, None, :, None]  # (B, 1, 1, length)
            self._planned = n


@dataclass
class _Shape:
    """The step for a number of rows and of positions."""

    seen: int = 0
    tokens: Tensor | None = None  # (B, 1), read by the recorded step
    rows: FixedRows | None = None
    repeat: Callable[[], Tensor] | None = None


class GraphSteps:
    """Runs decode steps, recorded where that was proven to give the same tokens.

    Args:
        step: the step as it is without recording.
        record: how to record one.
    """

    def __init__(self, step: Step, record: Record = record_on_card) -> None:
        self._step, self._record = step, record
        self.why_off = ""
        """Why nothing is recorded any more; "" while it is."""
        # A graph keeps the cache's memory, and both are freed with the cache: a training run wants it for itself.
        self._shapes: weakref.WeakKeyDictionary[KVCache, dict[tuple[int, int], _Shape]] = weakref.WeakKeyDictionary()

    def forget(self) -> None:
        """Drop what is recorded: the weights have changed."""
        self._shapes.clear()

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Run token ids (B, 1) on the cache's selected rows; return float32 logits (B, V)."""
        start, lengths = cache.selected(1)
        if self.why_off or start != 0 or len(lengths) > MOST_ROWS:
            return self._step(idx, cache)
        length = min(cache.max_seq_len, max(LEAST_LENGTH, 1 << max(lengths).bit_length()))
        shape = self._shapes.setdefault(cache, {}).setdefault((len(lengths), length), _Shape())
        shape.seen += 1
        if shape.seen <= EAGER_STEPS:
            return self._step(idx, cache)
        try:
            found = self._repeat(shape, idx, cache, lengths, length)
        except Exception as error:
            self._turn_off(f"{type(error).__name__}: {error}".splitlines()[0])
            return self._step(idx, cache)
        if shape.seen > EAGER_STEPS + CHECKED:
            cache.advance(1)
            return found
        expected = self._step(idx, cache)  # it stores the same keys and values at the same places again
        sound = expected.isfinite().all(-1)  # a sequence that went wrong says nothing about the others
        ours, theirs = expected[sound], found[sound]
        limit = TOLERANCE.get(cache.k_cache.dtype, max(TOLERANCE.values()))
        near = (ours - theirs).abs() <= limit * ours.abs().amax(-1, keepdim=True)
        if not bool((ours.argmax(-1) == theirs.argmax(-1)).all() & near.all()):
            self._turn_off("a recorded step gave other logits")
        return expected

    def _repeat(self, shape: _Shape, idx: Tensor, cache: KVCache, lengths: list[int], length: int) -> Tensor:
        if shape.rows is None or shape.tokens is None:
            shape.rows, shape.tokens = FixedRows(cache, len(lengths), length), idx.clone()
        rows, tokens = shape.rows, shape.tokens
        rows.begin(lengths)
        tokens.copy_(idx)
        if shape.repeat is None:
            shape.repeat = self._record(lambda: self._step(tokens, rows), idx.device)
        # The result's place is written by the next step; who asked may keep it longer.
        return shape.repeat().clone()

    def _turn_off(self, why: str) -> None:
        self.why_off = why
        self._shapes.clear()
        logging.getLogger(__name__).warning("decoding without CUDA graphs, which is slower: %s", why)
