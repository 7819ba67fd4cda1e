"""What a budget of hours buys on a device: for each depth the memory, speed, tokens, quality and disk of a run.

Nothing here has a formula of its own: parameters and FLOPs are the model's, batches the recipe's, memory
nanochat/plan/memory.py, time nanochat/plan/roofline.py or nanochat/plan/local_speed.py, quality
nanochat/plan/scaling_law.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from nanochat.cards import Card
from nanochat.data.sources import SHARD_BYTES, count_shards
from nanochat.gpt import GPTConfig
from nanochat.plan.measured import measured_card
from nanochat.plan.memory import MicroBatch, StepSetup, estimate_training_memory, largest_micro_batch, meta_model
from nanochat.plan.roofline import CardRoofline, best_dtype, tokens_per_second
from nanochat.plan.scaling_law import predict_bpb
from nanochat.precision import DTYPES
from nanochat.recipe import PRESETS, Preset, scale_hyperparameters

DEPTHS = range(4, 21)
VOCAB_SIZES = (4096, 8192, 16384, 32768, 65536)
# What torch sees of the memory a card is sold with; least on a T4 with ECC. Rounded down.
CARD_MEMORY_SHARE = 0.92
# What is left of n cards' speed when they exchange gradients. A guess: it depends on the links between them.
CARDS_SHARE = 0.9
# Activation checkpointing makes the forward pass, a third of the arithmetic, twice.
CHECKPOINTING_SHARE = 3 / 4
CHINCHILLA = 20  # tokens per parameter
# Two of an unfinished run, the best one, and one that is being written.
CHECKPOINTS = 4
# On this machine these depths are timed, the others take their FLOP/s. A CPU is as busy with 8 layers as with 12, and
# would need minutes for these.
MEASURED_DEPTHS = {"cpu": (4, 8)}
MEASURED_DEPTHS_DEFAULT = (4, 8, 12)

# Tokens per second on one device of a model in such micro-batches, and so many of them in a step.
SpeedModel = Callable[[GPTConfig, MicroBatch, int], float]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is asked."""

    hours: float
    recipe: str
    vocab_size: int
    sequence_len: int
    dtype: str
    num_cards: int
    memory_bytes: int
    """Of one card that training may use."""
    fineweb: bool
    device_type: str = "cuda"
    compiled: bool = False

    @property
    def preset(self) -> Preset:
        """The recipe."""
        return PRESETS[self.recipe]

    @property
    def setup(self) -> StepSetup:
        """How a step is computed."""
        return StepSetup(DTYPES[self.dtype], self.device_type, self.num_cards, self.compiled)

    def config(self, depth: int) -> GPTConfig:
        """The model of a depth."""
        return GPTConfig.from_depth(depth, self.vocab_size, self.sequence_len, **self.preset.switches)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A depth and what becomes of it. Without a micro-batch that fits, what follows from it is None."""

    depth: int
    vocab_size: int
    parameters: int
    flops_per_token: int
    micro_batch: MicroBatch | None
    memory_bytes: int
    """With this micro-batch, or with the smallest."""
    total_batch_size: int | None = None
    tokens_per_second: float | None = None
    tokens: float | None = None
    steps: int | None = None
    tokens_per_parameter: float | None = None
    bpb: float | None = None
    chinchilla_hours: float | None = None
    disk_bytes: float | None = None
    best: bool = False


def card_speed(card: CardRoofline, budget: Budget) -> SpeedModel:
    """The speed by a card's data sheet."""

    def speed(config: GPTConfig, micro: MicroBatch, passes: int) -> float:
        rate = tokens_per_second(card, config, micro.rows, config.sequence_len, passes, budget.dtype, budget.preset)
        return rate * (CHECKPOINTING_SHARE if micro.activation_checkpointing else 1.0)

    return speed


def measured_speed(measure: SpeedModel, budget: Budget, depths: Sequence[int]) -> SpeedModel:
    """`measure` at those depths that fit; between them FLOP/s are interpolated, beyond them they stay."""
    fitting = [depth for depth in depths if micro_batch(budget.config(depth), 1, budget)]

    def flops_per_second(depth: int, micro: MicroBatch, passes: int) -> float:
        config = budget.config(depth)
        own = micro_batch(config, micro.rows, budget) or micro  # a deeper model's may be smaller
        return measure(config, own, passes * micro.rows // own.rows) * meta_model(config).estimate_flops()

    def speed(config: GPTConfig, micro: MicroBatch, passes: int) -> float:
        depth = min(max(config.n_layer, fitting[0]), fitting[-1])
        low = max(d for d in fitting if d <= depth)
        high = min(d for d in fitting if d >= depth)
        share = 0.0 if low == high else (depth - low) / (high - low)
        rate = (1 - share) * flops_per_second(low, micro, passes)
        rate += share * flops_per_second(high, micro, passes) if share else 0.0
        return rate / meta_model(config).estimate_flops()

    return speed


def micro_batch(config: GPTConfig, rows: int, budget: Budget) -> MicroBatch | None:
    """The largest micro-batch that divides `rows` rows and fits; None if not even one row does."""
    return largest_micro_batch(config, budget.memory_bytes, budget.sequence_len, budget.setup, rows)


def plan_row(depth: int, budget: Budget, speed: SpeedModel) -> Row:
    """The run of one depth. A recipe that scales takes its batch from the horizon, and that from the speed."""
    preset, config = budget.preset, budget.config(depth)
    model = meta_model(config)
    row = Row(
        depth=depth,
        vocab_size=budget.vocab_size,
        parameters=model.num_params(),
        flops_per_token=model.estimate_flops(),
        micro_batch=None,
        memory_bytes=_memory(config, MicroBatch(1), budget)[0],
    )
    tokens: float | None = None
    for _ in range(3 if preset.scales else 1):
        batch = scale_hyperparameters(preset, model, tokens, None, budget.sequence_len * budget.num_cards)
        rows = max(1, batch.total_batch_size // (budget.sequence_len * budget.num_cards))
        micro = micro_batch(config, rows, budget)
        if micro is None:
            return row
        cards = budget.num_cards * (CARDS_SHARE if budget.num_cards > 1 else 1.0)
        rate = cards * speed(config, micro, rows // micro.rows)
        tokens = rate * budget.hours * 3600
        row = replace(row, micro_batch=micro, total_batch_size=batch.total_batch_size, tokens_per_second=rate)
    assert tokens is not None
    assert row.micro_batch is not None
    memory, checkpoint = _memory(config, row.micro_batch, budget)
    return replace(
        row,
        memory_bytes=memory,
        tokens=tokens,
        steps=int(tokens / batch.total_batch_size),
        tokens_per_parameter=tokens / preset.scaling_params(model),
        bpb=predict_bpb(
            model.num_matmul_params() - model.lm_head.weight.numel(),
            model.lm_head.weight.numel(),
            tokens,
            budget.vocab_size,
            not preset.scales,
            budget.fineweb,
        ),
        chinchilla_hours=CHINCHILLA * preset.scaling_params(model) / rate / 3600,
        disk_bytes=SHARD_BYTES * (count_shards(tokens) + 1) + CHECKPOINTS * checkpoint,
    )


def _memory(config: GPTConfig, micro: MicroBatch, budget: Budget) -> tuple[int, int]:
    """Bytes of a step on one card, and of a checkpoint of an unfinished run."""
    memory = estimate_training_memory(config, micro, budget.sequence_len, budget.setup)
    return memory.total, memory.weights + memory.optimizer * budget.num_cards


def plan(
    depths: Iterable[int], budget: Budget, speed: SpeedModel, vocab_sizes: Iterable[int] | None = None
) -> list[Row]:
    """A row per vocabulary (only the budget's, unless given) and depth; the lowest predicted loss is marked."""
    budgets = [replace(budget, vocab_size=size) for size in vocab_sizes or [budget.vocab_size]]
    rows = [plan_row(depth, asked, speed) for asked in budgets for depth in depths]
    best = best_row(rows)
    return [replace(row, best=row is best) for row in rows]


def best_row(rows: Iterable[Row]) -> Row | None:
    """The one with the lowest predicted bits per byte; None if none fits."""
    return min((row for row in rows if row.bpb is not None), key=lambda row: row.bpb or math.inf, default=None)


# --- by a card's data sheet ------------------------------------------------------------------------------------------


def on_card(
    card: Card,
    *,
    hours: float,
    recipe: str,
    vocab_size: int,
    sequence_len: int,
    num_cards: int = 1,
    dtype: str = "auto",
    fineweb: bool = False,
) -> tuple[Budget, CardRoofline]:
    """What is asked of a card, and its speed; the same on every machine."""
    # Triton's condition
    roofline = CardRoofline(card, compiled=card.capability >= (7, 0), measured=measured_card(card.name))
    budget = Budget(
        hours=hours,
        recipe=recipe,
        vocab_size=vocab_size,
        sequence_len=sequence_len,
        dtype=best_dtype(card) if dtype == "auto" else dtype,
        num_cards=num_cards,
        memory_bytes=int(card.memory_gb * 2**30 * CARD_MEMORY_SHARE),
        fineweb=fineweb,
        compiled=roofline.compiled,
    )
    return budget, roofline
