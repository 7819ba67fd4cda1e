"""The recipe: how a run's numbers follow from a few settings. Pure functions, no training here.

Four presets: `small`, the default, chosen by experiment for one card or a CPU and some hours; `portable`, the best
whose models open in other programs; `classic`, nanochat of December 2025; `modern`, what nanochat's main branch had
learned by July 2026, on large cards. Batch, steps and gradient accumulation; the schedules of learning rate, momentum
and decay; which parameter gets which optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig

DEFAULT_RECIPE = "small"
# AdamW learning rates were tuned at this width; they scale with width^-½. Source: nanochat.
REFERENCE_WIDTH = 768
# Modern rates and decay were tuned at this batch, for a model of this depth. Source: nanochat.
REFERENCE_BATCH = 2**19
REFERENCE_DEPTH = 12
# The best batch grows with the horizon to this power. Source: Power Lines, arXiv 2505.13738.
BATCH_EXPONENT = 0.383
# Decay is scaled up for short runs, to keep its sum; far below the reference that leaves no weights. This is a guess.
MAX_WEIGHT_DECAY = 1.0
# At most this share of a run is warmup. A guess, for runs so short that it matters.
MAX_WARMUP_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A recipe for any depth, vocabulary and horizon. Learning rates are for the reference width and batch."""

    switches: dict[str, Any]
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    scalar_lr: float
    weight_decay: float
    total_batch_size: int | None  # tokens; None: from the horizon, as for all recipes that scale
    # The best batch for a horizon of so many tokens; None: REFERENCE_BATCH for the reference model's.
    batch_at: tuple[int, float] | None = None
    rates_follow_batch: bool = False  # learning rates × √(B/B_ref)
    tokens_per_parameter: float  # the horizon when none is asked for
    warmup_steps: int
    warmdown_ratio: float
    final_lr_frac: float
    momentum: Momentum
    decay_to_zero: bool
    muon: dict[str, Any]
    # AdamW settings by group, see `parameter_groups`; what isn't named has ADAM and the run's weight decay.
    adam: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def scales(self) -> bool:
        """True if the batch follows from the horizon."""
        return self.total_batch_size is None

    def scaling_params(self, model: GPT) -> int:
        """The parameters that `tokens_per_parameter` counts: classic all, else matrices and lm_head."""
        # An embedding is looked up, not multiplied: it costs no FLOPs. Counting only what is multiplied makes one ratio
        # serve every vocabulary.
        if not self.scales:
            return model.num_params()
        return sum(p.numel() for p in model.matrices) + model.lm_head.weight.numel()


@dataclass(frozen=True)
class Momentum:
    """Muon's momentum: from `start` to `peak` in `steps`; during the LR's warmdown on to `end`."""

    start: float = 0.85
    peak: float = 0.95
    steps: int = 300
    end: float | None = None

    def at(self, step: int, warmdown: float = 0.0) -> float:
        """The momentum of `step`; `warmdown` is the share of the warmdown that lies behind."""
        # In the first steps gradients change direction fast: a long memory would keep pushing in old ones.
        share = min(step / self.steps, 1.0)
        if share == 1.0 and self.end is not None:  # shorter again at the end, where the rate is small
            return self.peak + warmdown * (self.end - self.peak)
        return (1 - share) * self.start + share * self.peak


# Shorter memories than Adam's usual 0.9 and 0.999; an eps below the second moments of rare tokens, which are tiny.
# Source: nanochat.
ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-10}
CLASSIC = Preset(
    switches={},
    embedding_lr=0.2,
    unembedding_lr=0.004,  # every row moves in each step; one of the embedding when its token occurs
    matrix_lr=0.02,  # of an orthogonal update: how far every singular direction of a matrix moves
    scalar_lr=0.5,
    weight_decay=0.0,
    total_batch_size=524288,
    tokens_per_parameter=20.0,  # Chinchilla, arXiv 2203.15556
    warmup_steps=0,
    warmdown_ratio=0.2,
    final_lr_frac=0.0,
    momentum=Momentum(),
    decay_to_zero=False,
    muon={"momentum": 0.95},  # until the first step, when the schedule sets it
)
# Source of every number: nanochat's base_train.py of July 2026.
MODERN = Preset(
    switches=NANOCHAT_2026,
    embedding_lr=0.3,
    unembedding_lr=0.008,
    matrix_lr=0.02,
    scalar_lr=0.5,
    weight_decay=0.28,
    total_batch_size=None,
    rates_follow_batch=True,
    tokens_per_parameter=12.0,
    warmup_steps=40,
    warmdown_ratio=0.65,  # most of a run: the loss falls most while the rate does
    final_lr_frac=0.05,
    momentum=Momentum(0.85, 0.97, 400, 0.90),
    decay_to_zero=True,
    muon={"momentum": 0.97, "coefficients": "polar", "beta2": 0.9, "row_equalize": True, "cautious": True},
    adam={
        "wte": {"betas": (0.8, 0.995), "weight_decay": 0.001},
        "values": {"betas": (0.8, 0.995), "weight_decay": 0.01},
        "lm_head": {"betas": (0.8, 0.96), "weight_decay": 0.01},
        "resid": {"weight_decay": 0.05},
        "x0": {"betas": (0.96, 0.95), "weight_decay": 0.0},
        "gates": {"weight_decay": 0.0},
    },
)
# The modern model with offset keys, the modern optimizer, the classic momentum and rates of embedding and lm_head, and
# a small batch. Offset keys let a model find what followed an earlier occurrence from the first million tokens on.
# Scalars that move by 0.5 a step make the loss jump in the first steps, which a short run never makes good. Source:
# dev/LOG.md, "modern's optimizer in small"; the batch grows from the measured one as in Power Lines.
SMALL = replace(
    CLASSIC,
    switches=MODERN.switches | {"key_offset": True},
    matrix_lr=0.03,
    scalar_lr=0.1,
    total_batch_size=None,
    batch_at=(4096, 1e6),
    tokens_per_parameter=MODERN.tokens_per_parameter,
    warmdown_ratio=MODERN.warmdown_ratio,
    muon=MODERN.muon,
    adam=MODERN.adam,
)
# What of small folds exactly into a Qwen3 model (nanochat/interop/qwen3.py), which llama.cpp, Ollama and every other
# runtime open: none of the switches that add to the stream, to values or to keys, and no softcap.
PORTABLE = replace(
    SMALL,
    switches={
        "qk_scale": 1.2,
        "rope_base": 100000.0,
        "init": "induction",  # it has no offset keys, which find what followed an earlier occurrence
        "residual_factors": True,
        "logit_softcap": None,
    },
)
PRESETS = {"small": SMALL, "portable": PORTABLE, "classic": CLASSIC, "modern": MODERN}


def recipe_of(meta: Mapping[str, Any]) -> str:
    """The recipe of a checkpoint's base model, by its record; classic for a model from elsewhere."""
    name = meta.get("recipe") or meta.get("config", {}).get("recipe")
    return name if name in PRESETS else "classic"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of a run and the course of its learning rate. Whichever limit comes first ends it."""

    num_iterations: int | None = None
    seconds: float | None = None
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0
    short_rows_ratio: float = 0.0
    momentum: Momentum = Momentum()
    decay_to_zero: bool = False

    def __post_init__(self) -> None:
        if self.num_iterations is None and self.seconds is None:
            raise ValueError("a schedule needs a number of iterations or a time")
        if self.num_iterations is not None and self.num_iterations < 1:
            raise ValueError(f"training needs at least 1 iteration, got {self.num_iterations}")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"the time to train must be positive, got {self.seconds} s")
        if not (self.warmup_ratio >= 0 and self.warmdown_ratio >= 0 and self.warmup_ratio + self.warmdown_ratio <= 1):
            raise ValueError("--warmup_ratio and --warmdown_ratio must be at least 0 and at most 1 together")
        if self.warmup_steps < 0:
            raise ValueError(f"--warmup_steps must be 0 or more, got {self.warmup_steps}")

    def row_split(self, progress: float) -> int:
        """The number of shorter sequences each one is cut into: 4, then 2, after `short_rows_ratio` of the run 1."""
        # What is learned first needs no long context, and short sequences cost less attention (arXiv 2108.06084).
        return 1 if progress >= self.short_rows_ratio else 2 if progress >= self.short_rows_ratio / 2 else 4

    def progress(self, step: int, elapsed_seconds: float) -> float:
        """Share of the run that lies behind before `step`: 0 at the first one, 1 after the last one."""
        of_steps = step / self.num_iterations if self.num_iterations is not None else 0.0
        of_time = elapsed_seconds / self.seconds if self.seconds is not None else 0.0
        return min(1.0, max(of_steps, of_time))  # whichever limit is nearer ends the run

    def finished(self, step: int, elapsed_seconds: float) -> bool:
        """True if the run is over before `step`."""
        return self.progress(step, elapsed_seconds) >= 1.0

    def lr_multiplier(self, progress: float, step: int | None = None) -> float:
        """Linear warmup (by `step` where it is counted in steps), constant, linear warmdown; never negative."""
        # A trapezoid, no cosine: the horizon need not be known until the rate begins to fall (arXiv 2405.18392).
        warmup = 1.0
        if step is not None and step < self.warmup_steps:
            warmup = (step + 1) / self.warmup_steps
        elif self.warmup_ratio > 0 and progress < self.warmup_ratio:
            return max(progress / self.warmup_ratio, 0.01)  # a first step at rate 0 would teach nothing
        done = self.warmdown(progress)
        return min(warmup, (1 - done) + done * self.final_lr_frac)

    def warmdown(self, progress: float) -> float:
        """Share of the warmdown that lies behind: 0 until it begins, 1 at the end."""
        if self.warmdown_ratio > 0 and progress > 1 - self.warmdown_ratio:
            return 1 - (1 - progress) / self.warmdown_ratio
        return 0.0

    def apply(self, groups: Iterable[dict[str, Any]], step: int, elapsed_seconds: float) -> float:
        """Set every optimizer group's learning rate, Muon's momentum and decay for `step`; returns the multiplier."""
        # One share for all three, of steps or of time: they end together however the speed changes.
        share = self.progress(step, elapsed_seconds)
        multiplier = self.lr_multiplier(share, step)
        for group in groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = self.momentum.at(step, self.warmdown(share))
                # A cosine besides the falling rate, by which decay is multiplied anyway. Source: nanochat.
                decay = 0.5 * (1 + math.cos(math.pi * share)) if self.decay_to_zero else 1.0
                group["weight_decay"] = group["initial_weight_decay"] * decay
        return multiplier


RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")  # flags of these names override


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """A run's resolved numbers."""

    total_batch_size: int
    embedding_lr: float
    unembedding_lr: float
    matrix_lr: float
    scalar_lr: float
    weight_decay: float

    def override(self, flags: object) -> Hyperparameters:
        """The same with every rate that is set among a script's flags."""
        given = {name: getattr(flags, name) for name in RATES if getattr(flags, name) is not None}
        return replace(self, **given)

    def rates(self) -> dict[str, float]:
        """The arguments of `parameter_groups`."""
        return {name: getattr(self, name) for name in RATES}


def scale_hyperparameters(
    preset: Preset, model: GPT, horizon_tokens: float | None, total_batch_size: int | None = None, multiple_of: int = 1
) -> Hyperparameters:
    """A preset's numbers for a model and a horizon.

    Args:
        preset: the recipe.
        model: may be on the meta device.
        horizon_tokens: D, tokens of the whole run; None: `preset.tokens_per_parameter`.
        total_batch_size: tokens per step, when it is not the recipe's to choose.
        multiple_of: a batch that is derived is rounded to a multiple of this.

    B = B_ref·(D/D_ref)^0.383 as a power of two. Where the rates follow the batch they are × √(B/B_ref), and the decay
    is × √(B/B_ref)·D_ref/D. Source: nanochat; the decay keeps the averaging time of AdamW in epochs constant, arXiv
    2405.13698.
    """
    rates = {name: getattr(preset, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")}
    if preset.total_batch_size is not None:  # classic: one batch and one set of rates for every run
        batch = total_batch_size or preset.total_batch_size
        return Hyperparameters(total_batch_size=batch, weight_decay=preset.weight_decay, **rates)
    reference_batch, reference = batch_reference(preset, model.config)
    tokens = horizon_tokens or preset.tokens_per_parameter * preset.scaling_params(model)
    if total_batch_size is None:
        # The lower the loss, the noisier the gradient in comparison, and the larger the batch that still pays
        # (arXiv 1812.06162); longer runs get lower. Too large a batch makes fewer steps that are hardly better.
        ideal = reference_batch * (tokens / reference) ** BATCH_EXPONENT
        total_batch_size = max(1, round(2 ** round(math.log2(ideal)) / multiple_of)) * multiple_of
    decay = preset.weight_decay
    if preset.rates_follow_batch:
        # The square root, not the ratio: Adam and Muon normalise their updates, so only the noise in them shrinks.
        factor = math.sqrt(total_batch_size / reference_batch)
        rates = {name: rate * factor for name, rate in rates.items()}
        decay = min(decay * factor * reference / tokens, MAX_WEIGHT_DECAY)
    return Hyperparameters(total_batch_size=total_batch_size, weight_decay=decay, **rates)


def batch_for_steps(preset: Preset, model: GPT, num_iterations: int) -> int:
    """The batch of a run of so many steps: B = B_ref·(steps·B/D_ref)^0.383, solved for B."""
    if preset.total_batch_size is not None:
        return preset.total_batch_size
    # Here the horizon D = steps·B depends on the batch that depends on it; with B on both sides the exponent becomes
    # x / (1 - x).
    batch, tokens = batch_reference(preset, model.config)
    return round(batch * (num_iterations * batch / tokens) ** (BATCH_EXPONENT / (1 - BATCH_EXPONENT)))


def batch_reference(preset: Preset, config: GPTConfig) -> tuple[int, float]:
    """B_ref and D_ref: a batch, and the horizon in tokens for which it is the best."""
    return preset.batch_at or (REFERENCE_BATCH, reference_tokens(preset, config))


def reference_tokens(preset: Preset, config: GPTConfig) -> float:
    """D_ref: the tokens a model of the reference depth and this vocabulary is trained on."""
    with torch.device("meta"):  # shapes only
        model = GPT(GPTConfig.from_depth(REFERENCE_DEPTH, config.vocab_size, 64, **preset.switches))
    return preset.tokens_per_parameter * preset.scaling_params(model)


@dataclass(frozen=True)
class BatchPlan:
    """The parts of the total batch: sequences per forward pass, times passes, times ranks."""

    device_batch_size: int
    sequence_len: int
    world_size: int
    grad_accum_steps: int

    @property
    def total_tokens(self) -> int:
        """Tokens per optimizer step over all ranks."""
        return self.device_batch_size * self.sequence_len * self.world_size * self.grad_accum_steps


def plan_batch(total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int) -> BatchPlan:
    """Split a batch of `total_batch_size` tokens into equal micro-batches.

    Raises:
        ValueError: it doesn't divide; names the nearest size that does.
    """
    for name, value in (("device_batch_size", device_batch_size), ("max_seq_len", sequence_len)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    per_pass = device_batch_size * sequence_len * world_size  # tokens of one micro-batch over all ranks
    # Rounding the batch silently would make it depend on the machine, and with it the result.
    if total_batch_size < 1 or total_batch_size % per_pass:
        nearest = max(1, round(total_batch_size / per_pass)) * per_pass
        raise ValueError(
            f"--total_batch_size={total_batch_size} is not a multiple of device_batch_size × max_seq_len × processes = "
            f"{device_batch_size} × {sequence_len} × {world_size} = {per_pass}; nearest is --total_batch_size={nearest}"
        )
    return BatchPlan(device_batch_size, sequence_len, world_size, total_batch_size // per_pass)


def plan_iterations(
    *,
    batch_tokens: int,
    num_params: int,
    flops_per_token: int,
    num_iterations: int | None,
    target_flops: float | None,
    target_param_data_ratio: float | None,
) -> int:
    """Optimizer steps by the first horizon that is set: steps, then training FLOPs, then tokens per parameter."""
    if num_iterations is not None and num_iterations > 0:
        return num_iterations
    if target_flops is not None and target_flops > 0:
        return max(1, round(target_flops / (flops_per_token * batch_tokens)))
    if target_param_data_ratio is not None and target_param_data_ratio > 0:
        return max(1, math.floor(target_param_data_ratio * num_params / batch_tokens))
    raise ValueError("no horizon: give --num_iterations, --hours, --target_flops or --target_param_data_ratio")


def parameter_groups(
    model: GPT,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    weight_decay: float,
    lr_frac: float = 1.0,
    scalar_lr: float = 0.5,
    preset: Preset = CLASSIC,
) -> list[dict[str, Any]]:
    """The optimizer's groups: Muon for the blocks' matrices, AdamW for everything else, each with its learning rate.

    Rates of embeddings and lm_head are × (width/768)^-½; value embeddings and those of what is recalled have half the
    embedding's.
    `lr_frac` scales every learning rate: a later stage starts where the one before ended. Source: nanochat.
    """
    # AdamW moves each number by about its rate, so a wider row moves further in all. Muon needs no such factor: an
    # orthogonal update changes the length of a vector equally at every width.
    width_scale = (model.config.n_embd / REFERENCE_WIDTH) ** -0.5
    rates = {
        "wte": embedding_lr * width_scale,
        "lm_head": unembedding_lr * width_scale,
        "matrices": matrix_lr,
        "values": 0.5 * embedding_lr * width_scale,
        "resid": 0.01 * scalar_lr,  # factors on the stream, layer upon layer: their changes multiply
        "x0": scalar_lr,
        "gates": 0.4 * scalar_lr,
    }
    members: dict[str, list[tuple[str, Any]]] = {kind: [] for kind in rates}
    for name, p in model.named_parameters():
        members[_group_of(name, p)].append((name, p))
    groups = []
    for kind, named in members.items():
        muon = kind == "matrices"
        # Later entries win: the run's decay, then the preset's own for the group, then what is fixed.
        settings: dict[str, Any] = {"weight_decay": weight_decay}
        settings |= preset.muon if muon else ADAM | preset.adam.get(kind, {})
        settings |= {"kind": "muon" if muon else "adamw", "lr": rates[kind] * lr_frac}
        if named:
            groups.append(settings | {"names": [n for n, _ in named], "params": [p for _, p in named]})
    return groups


def _group_of(name: str, p: Tensor) -> str:
    """The parameter group of a parameter, by its name; of those in a layer the matrices are Muon's."""
    # Muon treats the singular directions of a matrix alike, which suits a map between hidden states. The rows of an
    # embedding or of lm_head are single tokens, each with a frequency of its own: Adam scales them one by one.
    if name.startswith("transformer.h."):
        return "matrices" if p.dim() == 2 else "gates"
    for prefix, kind in {
        "transformer.wte.": "wte",
        "lm_head.": "lm_head",
        "value_embeds.": "values",
        "recall.followers.": "values",
        "recall.scale": "gates",
        "recall.trust": "gates",
        "resid_lambdas": "resid",
        "resid_logs": "resid",
        "x0_lambdas": "x0",
        "smear_": "gates",
        "backout_": "gates",
    }.items():
        if name.startswith(prefix):
            return kind
    raise RuntimeError(f"parameter {name} belongs to no optimizer group: extend nanochat/recipe.py")
