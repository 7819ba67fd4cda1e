"""The recipe: how a run's numbers follow from a few settings. Pure functions, no training here.

Batch, steps and gradient accumulation; the learning rate and momentum schedules; which parameter gets which optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nanochat.gpt import GPT

# AdamW learning rates were tuned at this width; they scale with width^-½. Source: nanochat.
REFERENCE_WIDTH = 768
MUON_WARMUP_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is and how its learning rate moves. Either `num_iterations` or `seconds` is set."""

    num_iterations: int | None = None
    seconds: float | None = None
    warmup_ratio: float = 0.0
    warmdown_ratio: float = 0.2
    final_lr_frac: float = 0.0

    def __post_init__(self) -> None:
        if (self.num_iterations is None) == (self.seconds is None):
            raise ValueError("a schedule needs either a number of iterations or a time")
        if self.num_iterations is not None and self.num_iterations < 1:
            raise ValueError(f"training needs at least 1 iteration, got {self.num_iterations}")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"the time to train must be positive, got {self.seconds} s")
        if not (self.warmup_ratio >= 0 and self.warmdown_ratio >= 0 and self.warmup_ratio + self.warmdown_ratio <= 1):
            raise ValueError("--warmup_ratio and --warmdown_ratio must be at least 0 and at most 1 together")

    def progress(self, step: int, elapsed_seconds: float) -> float:
        """Share of the run that lies behind at `step`: 0 at the first step, 1 at the last one if steps are counted."""
        if self.num_iterations is not None:
            return min(1.0, step / max(1, self.num_iterations - 1))
        assert self.seconds is not None
        return min(1.0, elapsed_seconds / self.seconds)

    def finished(self, step: int, elapsed_seconds: float) -> bool:
        """Whether the run is over before `step`."""
        if self.num_iterations is not None:
            return step >= self.num_iterations
        assert self.seconds is not None
        return elapsed_seconds >= self.seconds

    def lr_multiplier(self, progress: float) -> float:
        """Linear warmup, constant, linear warmdown to `final_lr_frac`; never negative."""
        if self.warmup_ratio > 0 and progress < self.warmup_ratio:
            return max(progress / self.warmup_ratio, 0.01)
        if self.warmdown_ratio > 0 and progress > 1 - self.warmdown_ratio:
            left = (1 - progress) / self.warmdown_ratio
            return left + (1 - left) * self.final_lr_frac
        return 1.0


def muon_momentum(step: int) -> float:
    """Muon's momentum: 0.85 rising to 0.95 over the first 300 steps. Source: nanochat."""
    share = min(step / MUON_WARMUP_STEPS, 1.0)
    return (1 - share) * 0.85 + share * 0.95


@dataclass(frozen=True)
class BatchPlan:
    """How the total batch is made up: rows of `sequence_len` tokens per forward pass, times passes, times ranks."""

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
    per_pass = device_batch_size * sequence_len * world_size
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
) -> list[dict[str, Any]]:
    """Classic nanochat: AdamW for the embedding and lm_head (rates × (width/768)^-½), Muon for the blocks' matrices.

    `lr_frac` scales every learning rate: a later stage starts where the one before ended.
    """
    named = list(model.named_parameters())
    wte = [(n, p) for n, p in named if n == "transformer.wte.weight"]
    head = [(n, p) for n, p in named if n == "lm_head.weight"]
    matrices = [(n, p) for n, p in named if n.startswith("transformer.h.")]
    if len(wte) + len(head) + len(matrices) != len(named):
        raise RuntimeError("a parameter belongs to no optimizer group: extend parameter_groups in nanochat/recipe.py")
    width_scale = (model.config.n_embd / REFERENCE_WIDTH) ** -0.5

    def group(kind: str, members: list[tuple[str, Any]], lr: float, **settings: Any) -> dict[str, Any]:
        names, params = [n for n, _ in members], [p for _, p in members]
        return {
            "kind": kind,
            "params": params,
            "names": names,
            "lr": lr * lr_frac,
            "weight_decay": weight_decay,
            **settings,
        }

    adam = {"betas": (0.8, 0.95), "eps": 1e-10}
    return [
        group("adamw", wte, embedding_lr * width_scale, **adam),
        group("adamw", head, unembedding_lr * width_scale, **adam),
        group("muon", matrices, matrix_lr, momentum=0.95),
    ]
