"""How much memory a training step takes, by what it is for, and the largest micro-batch that fits into a budget.

Weights, gradients and moments are counted exactly, activations layer by layer from what autograd saves (a test compares
with the bytes it really saves), the loss from its chunks. What only lives for a moment and what the allocator wastes
are guesses, marked as such. A real step has the last word (micro_batch.py); this model says where to begin, and what a
card can hold that is not here.

Shapes: B rows, T tokens, C = n_embd, V rows of lm_head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.ops.attention import MAX_PROBABILITY_BYTES, plan_attention, probability_bytes, split_causal
from nanochat.ops.loss import chunk_tokens
from nanochat.ops.recall import FOLLOWERS
from nanochat.optim import STACK_ELEMENTS
from nanochat.precision import NARROW_RANGE

GB = 1e9
# What a CUDA context, cuBLAS workspaces and kernels take besides tensors. A guess: a few hundred MB are usual.
CONTEXT_BYTES = 600 * 2**20
# Share of the activations that an allocator of blocks wastes. A guess.
FRAGMENTATION = 0.08
# Float32 copies of its largest stack that Muon holds at once: gradient, normalised, two of the iteration, update.
MUON_COPIES = 5
# Of a token's matches: what was found, tokens, lengths, levels, trust and shares, 64 bytes for each match. A guess.
RECALL_BYTES = 64 * FOLLOWERS
# Chunks of the loss that are tried when one row does not fit with the usual one, in bytes of float32 logits.
SMALL_CHUNKS = (64 << 20, 16 << 20)
# More tokens than this in a micro-batch make a step no faster: a matmul is large enough long before. A guess.
MOST_TOKENS = {"cpu": 8192}
MOST_TOKENS_DEFAULT = 65536


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.overhead


@dataclass(frozen=True)
class MicroBatch:
    """How the rows of a step go through the model."""

    rows: int
    """Rows per forward pass and process."""
    loss_chunk_bytes: int | None = None
    """Memory for the logits of one chunk of the loss, counted as float32; None: the usual."""
    activation_checkpointing: bool = False

    def __str__(self) -> str:
        chunk = f", loss in chunks of {self.loss_chunk_bytes >> 20} MiB" if self.loss_chunk_bytes else ""
        return f"{self.rows} rows{chunk}" + (", activation checkpointing" if self.activation_checkpointing else "")

    def apply(self, model: GPT) -> None:
        """Set what it asks of the model."""
        model.loss_chunk_bytes = self.loss_chunk_bytes
        if self.activation_checkpointing:
            model.activation_checkpointing = True

    def smaller(self) -> MicroBatch | None:
        """The next measure against too little memory: half the rows, a smaller loss chunk, activation checkpointing."""
        if self.rows > 1:
            return replace(self, rows=(self.rows + 1) // 2)
        chunks = [size for size in SMALL_CHUNKS if self.loss_chunk_bytes is None or size < self.loss_chunk_bytes]
        if chunks:
            return replace(self, loss_chunk_bytes=chunks[0])
        return None if self.activation_checkpointing else replace(self, activation_checkpointing=True)


SMALLEST = MicroBatch(1, SMALL_CHUNKS[-1], True)


@dataclass(frozen=True)
class StepSetup:
    """How a training step is computed, as far as its memory depends on it."""

    dtype: torch.dtype
    """Of the matmuls."""
    device_type: str = "cuda"
    world_size: int = 1
    """Processes, which share the optimizer's state."""
    compiled: bool = False
    """torch.compile fuses the element-wise work: it saves about a quarter less (a guess, on the safe side)."""


class SwitchCost(NamedTuple):
    """What a switch costs in training, in passes over the residual stream (tokens × C)."""

    kept: int = 0  # numbers that autograd keeps, once
    kept_per_layer: int = 0
    operations_per_layer: int = 0  # element-wise ones, for nanochat/plan/roofline.py


# Switches that are not here cost nothing worth counting, or by the layer: see `layer_bytes_per_token`.
SWITCH_COSTS = {
    "residual_scalars": SwitchCost(kept=1, kept_per_layer=1, operations_per_layer=2),
    "residual_factors": SwitchCost(kept_per_layer=1, operations_per_layer=1),
    "smear": SwitchCost(kept=3),
    "backout": SwitchCost(kept=2),
}


def switch_cost(config: GPTConfig) -> SwitchCost:
    """The cost of all switches of a model that are on."""
    costs = [cost for name, cost in SWITCH_COSTS.items() if getattr(config, name)]
    return SwitchCost(*(sum(column) for column in zip(SwitchCost(), *costs, strict=True)))


class _Counts(NamedTuple):
    """Parameters of a model by what their memory depends on."""

    total: int
    matrices: int  # Muon's; cast to the compute dtype once per micro-batch
    largest_stack: int


@functools.lru_cache(maxsize=8)
def meta_model(config: GPTConfig) -> GPT:
    """The model without memory, for counting; not to be changed."""
    with torch.device("meta"):
        return GPT(config)


@functools.lru_cache(maxsize=256)
def _counts(config: GPTConfig) -> _Counts:
    model = meta_model(config)
    sizes: dict[torch.Size, int] = {}
    for p in model.matrices:
        sizes[p.shape] = sizes.get(p.shape, 0) + p.numel()
    stacks = [min(size, max(STACK_ELEMENTS, shape.numel())) for shape, size in sizes.items()]
    return _Counts(model.num_params(), sum(sizes.values()), max(stacks))


def _width(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes per number of the matmuls and of the residual stream (float32 where the dtype's range is narrow)."""
    size = dtype.itemsize
    return size, 4 if dtype in NARROW_RANGE else size


def layer_bytes_per_token(config: GPTConfig, setup: StepSetup, layer: int, own_attention: bool = False) -> float:
    """What autograd saves of one layer, in bytes per token, without the probabilities of `own_attention`.

    That is the way of nanochat/ops/attention.py there, which lays q, k, v and its result out anew.
    """
    a, s = _width(setup.dtype)
    c, kv = config.n_embd, config.n_kv_head / config.n_head
    cpu = setup.device_type == "cpu"
    same = a == s
    # A norm saves its input; on a CPU its output (rms_norm.py), which is then the input of the matmul too.
    norms = 0.0 if cpu and same else 2 * s
    # With another residual dtype autocast makes a copy for each of the four matmuls that read the stream.
    inputs = 2 * a if same else 4 * a
    laid_out = own_attention and config.n_head > 1  # a single head lies in memory as it should already
    rotated = 0.0 if cpu else 4 * (1 + kv)  # float32, q and k before the norm; a CPU keeps what attention reads
    attention: float = (5 if laid_out else 4) * a  # q, k and v (repeated for every query head), and the output
    if cpu and (kv < 1 or config.key_offset):
        attention += a * kv  # k before it is repeated or takes from the token before
    mlp = (12 if setup.dtype in NARROW_RANGE else 8) * a
    more: float = s * switch_cost(config).kept_per_layer
    if config.has_value_embedding(layer):
        more += kv * a + (kv * 4 if a != 4 else 0)
    if config.windows[layer] is not None and not own_attention:
        more += a  # the pieces of the output, besides the whole
    return c * (norms + inputs + rotated + attention + mlp + more)


def saved_bytes(config: GPTConfig, micro: MicroBatch, sequence_len: int, setup: StepSetup) -> int:
    """What autograd saves between forward and backward pass of `GPT.hidden`, in bytes, if nothing is compiled."""
    a, s = _width(setup.dtype)
    tokens, c, cpu = micro.rows * sequence_len, config.n_embd, setup.device_type == "cpu"
    norms = 2 if cpu else 4  # the first and the last one
    per_token: float = (norms + switch_cost(config).kept) * s * c
    if micro.activation_checkpointing:
        # On a CPU the first norm's output, which it keeps, is the first layer's input.
        per_token += s * c * (config.n_layer - cpu)
    else:
        for layer in range(config.n_layer):
            own = _probability_bytes(config, micro.rows, sequence_len, setup.dtype, layer) if cpu else 0
            per_token += layer_bytes_per_token(config, setup, layer, own > 0) + own / tokens
    weights = 0 if a == 4 or micro.activation_checkpointing else a * _counts(config).matrices
    return round(tokens * per_token) + weights


def _probability_bytes(config: GPTConfig, rows: int, sequence_len: int, dtype: torch.dtype, layer: int) -> int:
    """What a layer keeps of its attention on a CPU; 0 where that is left to torch's kernel."""
    device = torch.device("cpu")
    pieces = plan_attention(sequence_len, sequence_len, device, config.windows[layer])
    heads = rows * config.n_head
    if dtype in NARROW_RANGE or probability_bytes(heads, pieces, dtype.itemsize) > MAX_PROBABILITY_BYTES:
        return 0
    return probability_bytes(heads, split_causal(pieces, device), dtype.itemsize)


def _loss_bytes(config: GPTConfig, tokens: int, dtype: torch.dtype, chunk_bytes: int | None, device_type: str) -> int:
    """The most that `nanochat.ops.loss` holds: weights and gradient of lm_head, a chunk of logits, dx."""
    a = dtype.itemsize
    v, c = config.padded_vocab_size, config.n_embd
    n, m = (min(tokens, part) for part in chunk_tokens(device_type, v, chunk_bytes))
    narrow = a < 4
    chunk = v * (n * a + m * (8 if narrow else 4))  # logits; sigmoid (float32 logits become it in place) and exp
    forward = v * c * (4 + (2 * a if narrow else 0)) + chunk  # dw, and of 16 bits the weights and a chunk's part of dw
    backward = 2 * 4 * v * c  # dw, and the same times the incoming gradient
    return max(forward, backward) + 2 * a * tokens * c


def estimate_training_memory(
    config: GPTConfig, micro: MicroBatch, sequence_len: int, setup: StepSetup
) -> MemoryEstimate:
    """Bytes at the peak of a training step with sequences of `sequence_len` tokens (T)."""
    counts, tokens = _counts(config), micro.rows * sequence_len
    saved = saved_bytes(config, micro, sequence_len, setup)
    if setup.compiled and not micro.activation_checkpointing:
        saved = round(0.75 * saved)
    # While one layer goes backwards, its gradients are about as large as what it had saved; with checkpointing what it
    # saves is made again too.
    moment = tokens * max(layer_bytes_per_token(config, setup, i) for i in range(config.n_layer))
    activations = saved + round(moment * (2 if micro.activation_checkpointing else 1))
    if config.recall:
        activations += tokens * RECALL_BYTES
    loss = _loss_bytes(config, tokens, setup.dtype, micro.loss_chunk_bytes, setup.device_type)
    # Muon keeps one moment, AdamW two; each rank keeps its share.
    optimizer = 4 * (counts.matrices + 2 * (counts.total - counts.matrices)) // setup.world_size
    # Muon works when the activations are gone; over several ranks a stack of gradients is reduced there too.
    muon = MUON_COPIES * 4 * counts.largest_stack
    overhead = round(FRAGMENTATION * activations) + max(0, muon - activations - loss)
    overhead += CONTEXT_BYTES if setup.device_type == "cuda" else 0
    # With the text that the model carries: its tokens, their order, and in training their places in it.
    weights = 4 * counts.total + 12 * config.recall
    return MemoryEstimate(weights, 4 * counts.total, optimizer, activations, loss, overhead)


def least_bytes(config: GPTConfig) -> int:
    """Bytes of the weights and gradients of the layers' matrices alone: a lower bound that takes no model to know.

    To build one of thousands of layers takes minutes even without memory for its weights.
    """
    return 8 * config.n_layer * 10 * config.n_embd**2  # attention's queries and output 2 C², MLP 8 C²


def most_rows(sequence_len: int, device_type: str = "cuda") -> int:
    """Rows of a micro-batch beyond which a step is no faster."""
    return max(1, MOST_TOKENS.get(device_type, MOST_TOKENS_DEFAULT) // sequence_len)


def divisors(n: int, most: int) -> list[int]:
    """The divisors of `n` up to `most`, largest first."""
    return [d for d in range(min(n, most), 0, -1) if n % d == 0]


def _candidates(rows: list[int], checkpointing: bool) -> Iterator[MicroBatch]:
    """What is tried, in this order: fewer rows, smaller chunks of the loss, activation checkpointing."""
    if checkpointing:
        yield from (MicroBatch(n, None, True) for n in rows)
    else:
        yield from (MicroBatch(n) for n in rows)
        yield from (MicroBatch(1, size) for size in SMALL_CHUNKS)
        yield from (MicroBatch(n, SMALL_CHUNKS[0], True) for n in rows)
    yield SMALLEST


def largest_micro_batch(
    config: GPTConfig,
    budget_bytes: float,
    sequence_len: int,
    setup: StepSetup,
    max_rows: int = 1,
    activation_checkpointing: bool = False,
) -> MicroBatch | None:
    """The largest micro-batch whose step fits into `budget_bytes`; None if not even one sequence does.

    Args:
        config: the model.
        budget_bytes: memory of the device that a training process may have.
        sequence_len: tokens per sequence (T).
        setup: how a step is computed.
        max_rows: sequences of a whole step per process; the micro-batch divides them.
        activation_checkpointing: it is asked for anyway.
    """
    if least_bytes(config) > budget_bytes:
        return None
    rows = divisors(max_rows, most_rows(sequence_len, setup.device_type))
    for micro in _candidates(rows, activation_checkpointing):
        if estimate_training_memory(config, micro, sequence_len, setup).total <= budget_bytes:
            return micro
    return None


def depth_that_fits(config: GPTConfig, budget_bytes: float, sequence_len: int, setup: StepSetup) -> int | None:
    """The most layers, in a model of the same proportions, of which one sequence fits; None if there is none."""
    ratio = max(1, config.n_embd // config.n_layer)
    fits, too_deep = 0, config.n_layer
    while too_deep - fits > 1:
        depth = (fits + too_deep) // 2
        heads = max(1, -(-ratio * depth // config.head_dim))
        shape = replace(config, n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=heads * config.head_dim)
        if largest_micro_batch(shape, budget_bytes, sequence_len, setup) is None:
            too_deep = depth
        else:
            fits = depth
    return fits or None
