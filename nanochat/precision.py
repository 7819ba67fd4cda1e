"""Precision: one object per run that knows the dtype, its autocast context and its loss scaling.

Parameters, gradients and optimizer state stay float32 in every mode; only matmuls and activations change. In float16 a
loss scaler keeps small gradients from vanishing. torch's own GradScaler decides for each optimizer and each rank by
itself, so that one optimizer can skip a step while another takes it; here every step is taken by all or by none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# The one table of precisions: names on the command line and in checkpoints.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The dtypes whose largest number (65504) ordinary activations reach.
NARROW_RANGE = frozenset({torch.float16})
MAX_SKIPS_IN_A_ROW = 12


class ShardedOptimizer(Protocol):
    """What `Precision.step` asks of an optimizer (see nanochat/optim.py)."""

    def reduce_gradients(self) -> None:
        """Average the gradients over the ranks."""

    def grad_norm(self) -> Tensor:
        """Global norm of all gradients, 0-dim; non-finite if any gradient on any rank is."""

    def step(self, grad_multiplier: Tensor | float = 1.0) -> Any:
        """Update with gradients times `grad_multiplier`."""


class LossScaler:
    """Multiplies the loss so that float16 gradients neither vanish nor overflow.

    After a non-finite step the scale is halved; after `growth_interval` good steps in a row it is doubled.
    Same rule as torch.amp.GradScaler (Micikevicius et al. 2017, arXiv 1710.03740).
    """

    def __init__(self, enabled: bool, init_scale: float = 2.0**16, growth_interval: int = 1000) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = init_scale if enabled else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Adapt the scale to the step just made."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale *= 0.5
        elif self.good_steps == self.growth_interval:
            self.scale *= 2.0
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """JSON-ready state."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict`'s result."""
        if self.enabled:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    skipped: bool
    grad_norm: float


class Precision:
    """The dtype of a run, with everything that follows from it."""

    def __init__(self, device_type: str, dtype: torch.dtype, growth_interval: int = 1000) -> None:
        self.device_type = device_type
        self.dtype = dtype
        self.name = DTYPE_NAMES[dtype]
        self.scaler = LossScaler(dtype in NARROW_RANGE, growth_interval=growth_interval)
        self.skipped = 0
        self.skipped_in_a_row = 0
        if dtype == torch.float32:
            # Float32 matmuls may round their inputs where the hardware is much faster at it: TF32 on Ampere and
            # newer, bfloat16 on CPUs with such instructions. Everything else stays float32.
            fast = "high" if device_type == "cuda" else "medium" if cpu_has_bf16() else "highest"
            torch.set_float32_matmul_precision(fast)

    @property
    def cache_dtype(self) -> torch.dtype:
        """The dtype of a KV cache."""
        return self.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context to run a forward pass in."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the scaled loss."""
        (loss * self.scaler.scale).backward()

    def step(self, optimizers: Sequence[ShardedOptimizer], grad_clip: float | None = None) -> StepResult:
        """Average, unscale, check, clip and apply the gradients: all optimizers on all ranks, or none.

        Raises:
            RuntimeError: too many steps in a row had non-finite gradients, or the scale fell below 1.
        """
        for optimizer in optimizers:
            optimizer.reduce_gradients()
        norms = torch.stack([optimizer.grad_norm().float() for optimizer in optimizers])
        # One host sync a step. The norm is global, so every rank takes the same branch.
        norm = float(torch.linalg.vector_norm(norms)) / self.scaler.scale
        finite = norm == norm and norm != float("inf")
        if finite:
            multiplier = 1.0 / self.scaler.scale
            if grad_clip is not None and norm > grad_clip:
                multiplier *= grad_clip / norm
            for optimizer in optimizers:
                optimizer.step(multiplier)
        self.scaler.update(finite)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW or self.scaler.scale < 1.0:
            raise NonFiniteError(
                f"gradients were not finite {self.skipped_in_a_row} steps in a row, loss scale {self.scaler.scale:g}"
            )
        return StepResult(skipped=not finite, grad_norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: scaler and skip counters."""
        return {
            "dtype": self.name,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = int(state["skipped"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])


class NonFiniteError(RuntimeError):
    """Training can't go on: gradients or loss are not finite."""


@functools.cache
def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = f.read()
    except OSError:
        return False
    return ("avx512_bf16" in flags or "amx_bf16" in flags) and (check is None or bool(check()))


def first_nonfinite_module(model: nn.Module, run: Any) -> str | None:
    """Name of the first module whose output is not finite while `run()` calls the model; None if all are finite."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
