"""How long a training step takes, from the operations it is made of.

`step_operations` lists them: what one step of nanochat/train/trainer.py computes (FLOPs) and moves (bytes). A
`CardRoofline` gives each its time from the data sheet and matmul speeds that others measured: the slower of arithmetic
and memory. Left out: communication between cards, the loader (see `data_wait_share` in the training log), evaluation
and checkpoints. A machine that is here is timed instead (nanochat/plan/local_speed.py).

Letters: n tokens of a micro-batch, C = n_embd, V padded vocabulary, r bytes of a residual number, e of a computed one.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass

from nanochat.cards import MEASURED_MATMUL, Card
from nanochat.gpt import GPTConfig
from nanochat.plan.measured import CardRecord, measured_card
from nanochat.plan.memory import meta_model, switch_cost
from nanochat.precision import DTYPE_NAMES, DTYPES, candidate_dtypes
from nanochat.recipe import PRESETS, Preset

# Cards that nobody measured: shares of the data sheet. The first is the mean of the cards in MEASURED_MATMUL (0.65 to
# 0.85 with tensor cores); without tensor cores the P100's share in float32.
TENSOR_CORE_SHARE, PLAIN_SHARE = 0.77, 0.92
# What a training step makes of the measured matmul speed, for its matmuls alone: smaller matrices, transposed
# operands. What an element-wise kernel makes of the bandwidth. Attention against matmuls. All three are guesses.
GEMM_SHARE, BANDWIDTH_SHARE, ATTENTION_SHARE = 0.85, 0.8, 0.5
# torch.compile fuses element-wise operations; this share of their bytes is left. A guess.
COMPILED_BYTES = 0.4
# Python and driver, per kernel that is launched eagerly. A guess for an old host.
LAUNCH_SECONDS = 10e-6


@dataclass(frozen=True)
class Operation:
    """A kind of operation with its gradient, `count` times in a step. FLOPs and bytes are of one."""

    kind: str
    shape: tuple[int, ...]
    count: int
    flops: float
    bytes: float
    dtype: str
    kernels: int = 1


def step_operations(
    config: GPTConfig, rows: int, sequence_len: int, micro_batches: int, dtype: str, preset: Preset
) -> list[Operation]:
    """All operations of one optimizer step: forward, backward, update.

    Args:
        config: the model.
        rows: of a micro-batch.
        sequence_len: T.
        micro_batches: per step and process.
        dtype: of matmuls.
        preset: the recipe, for its optimizer.
    """
    operations = [
        *_layer_operations(config, rows, sequence_len, dtype),
        *_outer_operations(config, rows, sequence_len, dtype),
    ]
    operations = [_times(op, micro_batches) for op in operations]
    if micro_batches > 1:
        numel = meta_model(config).num_params()
        operations.append(Operation("accumulate", (numel,), micro_batches - 1, numel, 12.0 * numel, "float32", 10))
    return operations + _update_operations(config, preset)


def _times(op: Operation, factor: int) -> Operation:
    return Operation(op.kind, op.shape, op.count * factor, op.flops, op.bytes, op.dtype, op.kernels)


def _sizes(dtype: str) -> tuple[int, int]:
    """Bytes of a number of the residual stream and of one that is computed with."""
    e = DTYPES[dtype].itemsize
    return (2, 2) if dtype == "bfloat16" else (4, e)


def _linear(n: int, inputs: int, outputs: int, count: int, dtype: str) -> Operation:
    """A linear map, the gradients of its input and of its float32 weight."""
    r, e = _sizes(dtype)
    weight = inputs * outputs
    casts = n * inputs * 2 * (r + e) + weight * (4 + 2 * e + 4) if e != 4 else 0
    moved = 3 * e * (n * inputs + n * outputs) + weight * (2 * e + 4) + casts
    return Operation("linear", (n, inputs, outputs), count, 6.0 * n * weight, moved, dtype, 3)


def _layer_operations(config: GPTConfig, rows: int, T: int, dtype: str) -> list[Operation]:
    n, C, L = rows * T, config.n_embd, config.n_layer
    kv, adds = config.n_kv_head * config.head_dim, L * (2 + switch_cost(config).operations_per_layer)
    r, e = _sizes(dtype)
    operations = [
        _linear(n, C, C, 2 * L, dtype),
        _linear(n, C, kv, 2 * L, dtype),
        _linear(n, C, 4 * C, L, dtype),
        _linear(n, 4 * C, C, L, dtype),
        Operation("norm", (n, C), 2 * L, 8.0 * n * C, 5.0 * r * n * C, dtype, 2),
        # Both directions in float32: cast, roll, two products, norm, cast.
        Operation(
            "rotary", (rows, T, config.n_head, config.head_dim), L, 20.0 * n * C, (4.0 * e + 90) * n * C, dtype, 14
        ),
        Operation(
            "rotary", (rows, T, config.n_kv_head, config.head_dim), L, 20.0 * n * kv, (4.0 * e + 90) * n * kv, dtype, 14
        ),
        # relu, square, and the gradient of both; float16 also finds each row's peak, scales and scales back.
        Operation("relu2", (n, 4 * C), L, 20.0 * n * C, (36.0 if dtype != "float16" else 60.0) * e * n * C, dtype, 4),
        Operation("add", (n, C), adds, n * C, (4.0 * r + 2 * e) * n * C, dtype, 3),
    ]
    if config.key_offset:
        operations.append(Operation("add", (n, kv), L, n * kv, (4.0 * r + 2 * e) * n * kv, dtype, 3))
    # 2 products of T × T forward, 5 backward, half of each is masked; a window reaches less far.
    for window, layers in Counter(config.windows).items():
        reach = T / 2 if window is None else min(window, T / 2)
        shape = (rows, T, config.n_head, config.n_kv_head, config.head_dim, window or 0)
        operations.append(Operation("attention", shape, layers, 14.0 * n * reach * C, 12.0 * e * n * C, dtype, 2))
    return operations


def _outer_operations(config: GPTConfig, rows: int, T: int, dtype: str) -> list[Operation]:
    """Embeddings and loss, whose memory goes with the vocabulary."""
    n, C, V = rows * T, config.n_embd, config.padded_vocab_size
    r, e = _sizes(dtype)
    tables = 1 + sum(config.has_value_embedding(i) for i in range(config.n_layer))
    gathered = (4.0 + 2 * r) * n * C + 4.0 * V * C
    # nanochat/ops/loss.py: about ten passes over float32 logits; the weight's gradient is made once, scaled once.
    logits = 40.0 * n * V + 2 * e * n * V + 16.0 * V * C
    return [
        Operation("embedding", (n, V, C), tables, 0.0, gathered, dtype, 4),
        Operation("norm", (n, C), 2, 8.0 * n * C, 5.0 * r * n * C, dtype, 2),
        Operation("loss", (n, C, V), 1, 6.0 * n * C * V, logits, dtype, 40),
    ]


def _update_operations(config: GPTConfig, preset: Preset) -> list[Operation]:
    """Muon on the blocks' matrices, AdamW on everything else, and the norm of the gradients."""
    model = meta_model(config)
    matrices = Counter(tuple(p.shape) for p in model.matrices)
    operations = []
    for (rows, cols), count in matrices.items():
        small, large = min(rows, cols), max(rows, cols)
        flops = preset.muon.get("ns_steps", 5) * (4.0 * small * small * large + 2.0 * small**3)
        # momentum, Nesterov, cast, update, and five products; each several times over the matrix
        operations.append(Operation("muon", (rows, cols), count, flops, 100.0 * rows * cols, "muon", 3))
    rest = model.num_params() - sum(rows * cols * count for (rows, cols), count in matrices.items())
    operations.append(Operation("adamw", (rest,), 1, 12.0 * rest, 28.0 * rest, "float32", 10))
    return [
        *operations,
        Operation(
            "grad_norm", (model.num_params(),), 1, 2.0 * model.num_params(), 4.0 * model.num_params(), "float32", 10
        ),
    ]


@dataclass(frozen=True)
class CardRoofline:
    """A card by its data sheet: each operation takes as long as its arithmetic or its memory, whichever is longer."""

    card: Card
    compiled: bool = False
    measured: CardRecord | None = None
    """What an owner has measured on this card; goes before everything else."""

    def matmul_tflops(self, dtype: str) -> float:
        """What matmuls reach through PyTorch: measured on this card, or by others, else a share of the data sheet."""
        own = self.measured.matmul_tflops.get(dtype) if self.measured is not None else None
        if own:
            return own
        near = {"P100-PCIE-12GB": "P100", "P100-SXM2": "P100", "V100": "V100-SXM2", "V100-SXM2-32GB": "V100-SXM2"}
        measured = MEASURED_MATMUL.get(near.get(self.card.name, self.card.name))
        if measured is not None:
            return measured[dtype]
        peak = self.card.peak_tflops(dtype) or self.card.float32 / 2  # emulated
        if dtype == "float16" and self.card.capability < (7, 0):
            peak = self.card.float32  # PyTorch accumulates in float32
        tensor_cores = self.card.tensor_cores and peak > self.card.float32
        return (TENSOR_CORE_SHARE if tensor_cores else PLAIN_SHARE) * peak

    def seconds(self, operation: Operation) -> float:
        """Time of one operation."""
        dtype = operation.dtype
        if dtype == "muon":  # see newton_schulz_dtype
            dtype = "bfloat16" if self.card.capability >= (8, 0) else "float32"
        matmul = operation.kind in ("linear", "loss", "attention", "muon")
        share = ATTENTION_SHARE if operation.kind == "attention" else GEMM_SHARE
        rate = self.matmul_tflops(dtype) * 1e12 * share if matmul else self.card.float32 * 1e12
        fused = self.compiled and not matmul and operation.kind in ("norm", "rotary", "relu2", "add")
        moved = operation.bytes * (COMPILED_BYTES if fused else 1.0)
        memory = moved / (self.card.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE)
        # The loss's passes over the logits come after its matmuls, not beside them.
        busy = operation.flops / rate + memory if operation.kind == "loss" else max(operation.flops / rate, memory)
        return max(busy, operation.kernels * LAUNCH_SECONDS)


def step_correction(card: CardRoofline, dtype: str) -> float:
    """Median of measured over planned seconds of this card's steps in `dtype`; 1 where none was measured."""
    ratios = []
    for step in card.measured.steps if card.measured is not None else ():
        if step["dtype"] == dtype:
            preset = PRESETS[step["recipe"]]
            config = GPTConfig.from_depth(step["depth"], step["vocab_size"], step["sequence_len"], **preset.switches)
            operations = step_operations(config, step["rows"], step["sequence_len"], 1, dtype, preset)
            ratios.append(step["seconds"] / sum(op.count * card.seconds(op) for op in operations))
    return statistics.median(ratios) if ratios else 1.0


def tokens_per_second(
    card: CardRoofline, config: GPTConfig, rows: int, sequence_len: int, micro_batches: int, dtype: str, preset: Preset
) -> float:
    """Predicted speed of training on one card."""
    operations = step_operations(config, rows, sequence_len, micro_batches, dtype, preset)
    seconds = sum(op.count * card.seconds(op) for op in operations) * step_correction(card, dtype)
    return rows * sequence_len * micro_batches / seconds


def best_dtype(card: Card) -> str:
    """The dtype training takes on this card (see `candidate_dtypes`): the fastest where there is a choice."""
    roofline = CardRoofline(card, measured=measured_card(card.name))
    names = [DTYPE_NAMES[dtype] for dtype in candidate_dtypes("cuda", card.capability)]
    return max(names, key=roofline.matmul_tflops)
