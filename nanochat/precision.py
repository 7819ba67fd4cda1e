"""Precision: one object per run that knows the dtype, its autocast context and its loss scaling.

Parameters, gradients and optimizer state stay float32 in every mode; only matmuls and activations change. In float16 a
loss scaler keeps small gradients from vanishing. It is torch's GradScaler but for one thing: torch decides for each
optimizer and each rank by itself, so that one can skip a step while another takes it; here all of them do, or none.

This file holds the one table of dtypes and the one rule that maps a device to its dtype; no other file names a 16-bit
dtype of torch (tests/test_precision.py checks it).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.cards import find_card

# The one table of precisions: names on the command line and in checkpoints. How far each reaches, and how fine it is:
#             largest   smallest   steps near 1
#   float32   3e38      1e-45      1e-7
#   float16   65504     6e-8       1e-3          small gradients become 0: hence the loss scaler
#   bfloat16  3e38      9e-41      8e-3          the range of float32, a third of its digits
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The dtypes whose largest number (65504) ordinary activations reach.
NARROW_RANGE = frozenset({torch.float16})
# What training rounds the factors of float32 products to on a CPU that is fast at it.
MEDIUM = DTYPES["bfloat16"]
# Twelve halvings take a loss scale of 65536 to 16. What is not finite then does not come from the scale.
MAX_SKIPS_IN_A_ROW = 12
# Steps between attempts to double the loss scale when the run's length is not known. Each may cost a skipped step.
GROWTH_INTERVAL = 200
MIN_GROWTH_INTERVAL, MAX_GROWTH_INTERVAL = 10, 1000


def candidate_dtypes(device_type: str, capability: tuple[int, int] = (0, 0)) -> tuple[torch.dtype, ...]:
    """The dtypes among which the fastest is the best for a device; the last one where nothing can be measured.

    CPU and MPS float32. CUDA: bfloat16 from capability 8.0 on, float16 below 7.0. 7.x (V100, T4, RTX 20xx) has fast
    float16 and takes bfloat16 by emulation, so there both are candidates. `torch.cuda.is_bf16_supported()` is no help:
    it counts emulation.
    """
    if device_type != "cuda":
        return (DTYPES["float32"],)  # a CPU with bfloat16 units rounds factors only, see `product_dtype`
    if capability >= (8, 0):
        return (DTYPES["bfloat16"],)
    if capability < (7, 0):
        return (DTYPES["float16"],)
    return DTYPES["float16"], DTYPES["bfloat16"]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype matmuls of tensors like `x` run in right now."""
    # Outside of autocast, and for tensors of another device, nothing is cast.
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of training's matrix products: bfloat16 for float32 on a CPU that is fast at it, else `dtype`."""
    # Only the factors are rounded, as they are read. Sums, activations and all between the matmuls stay float32.
    return MEDIUM if device_type == "cpu" and dtype == DTYPES["float32"] and cpu_has_bf16() else dtype


def dtype_cost(
    device_type: str, dtype: torch.dtype, capability: tuple[int, int] = (0, 0), card: str = ""
) -> str | None:
    """The cost of computing in `dtype` on a device that does better in another one; None if there is nothing to say.

    Args:
        device_type: cuda, cpu or mps.
        dtype: one of DTYPES.
        capability: of the CUDA card.
        card: its name, as torch gives it.
    """
    name = DTYPE_NAMES[dtype]
    if device_type == "cpu":
        if name == "float16":
            return "float16 on a CPU is for tests: its matmuls are several times slower than float32"
        if name == "bfloat16" and not cpu_has_bf16():
            return "this CPU has no bfloat16 instructions: slower than float32, and less precise"
    elif device_type == "mps" and name != "float32":
        return f"{name} on MPS was not tested: overflow or missing operations are possible; float32 is the safe choice"
    elif device_type == "cuda":
        return _cuda_dtype_cost(name, capability, card)
    return None


def _cuda_dtype_cost(name: str, capability: tuple[int, int], card: str) -> str | None:
    # 7.0 brought tensor cores for float16, 8.0 those for bfloat16 and TF32; before 7.0 a card has none.
    known = find_card(card)
    if name == "bfloat16" and capability < (8, 0):
        return (
            "this card has no bfloat16 arithmetic and emulates it: slower than float32, and on cards with tensor cores "
            "several times slower than float16 (a V100 was measured at 10 against 95 TFLOP/s)"
        )
    if name == "float16" and capability >= (8, 0):
        return "float16 is no faster than bfloat16 on this card, and needs loss scaling: steps may be skipped"
    if name == "float16" and capability < (7, 0):
        return "PyTorch multiplies float16 in float32 on this card: half the memory for activations, but no faster"
    if name == "float32" and capability < (7, 0):
        return "activations take twice the memory of float16; the matmuls are as fast"
    if name == "float32":
        fast = "half the matmul speed of bfloat16 at best" if capability >= (8, 0) else "the tensor cores stay unused"
        if known is not None and known.tensor_cores:
            fast += f" (peak {known.peak_tflops('float32'):g} instead of {known.float16:g} TFLOP/s)"
        return f"{fast}, and activations take twice the memory"
    return None


class ShardedOptimizer(Protocol):
    """An optimizer that `Precision.step` can use (see nanochat/optim.py)."""

    def reduce_gradients(self) -> None:
        """Average the gradients over the ranks."""

    def grad_norm(self) -> Tensor:
        """Global norm of all gradients, 0-dim; non-finite if any gradient on any rank is."""

    def step(self, grad_multiplier: Tensor | float = 1.0) -> Any:
        """Update with gradients times `grad_multiplier`."""


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler whose verdict covers all optimizers and ranks; its scale lives on the host.

    `scale`, `update`, `get_scale`, `is_enabled`, `state_dict` and `load_state_dict` are torch's, and so is the rule: a
    non-finite step halves the scale, `growth_interval` good ones in a row double it (Micikevicius et al. 2017, arXiv
    1710.03740). What differs is who tells it: `Precision.step` does, by `found_inf`, once for all.
    """

    def __init__(self, enabled: bool, init_scale: float = 2.0**16, growth_interval: int = GROWTH_INTERVAL) -> None:
        # "cpu" is where torch keeps the scale, not where it computes. On the card every get_scale() would wait for it.
        super().__init__("cpu", init_scale=init_scale, growth_interval=growth_interval, enabled=enabled)
        if enabled:
            self._lazy_init_scale_growth_tracker(torch.device("cpu"))

    def found_inf(self, found: bool) -> None:
        """Tell what the step has met, for the next `update()`."""
        # torch keeps a verdict by optimizer and device and lets each optimizer follow its own; here there is one.
        if self._enabled:
            self._per_optimizer_states[0]["found_inf_per_device"] = {torch.device("cpu"): torch.tensor(float(found))}

    def set_growth_interval(self, new_interval: int) -> None:
        """Good steps in a row that double the scale; those made already count."""
        super().set_growth_interval(new_interval)
        if self._enabled and self._growth_tracker is not None:
            # torch doubles when the count *equals* the interval: beyond a shortened one it would never again.
            self._growth_tracker.clamp_(max=new_interval - 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result, or from {"scale", "good_steps"} of an older checkpoint."""
        if self._enabled and "good_steps" in state_dict:
            tracked = {"scale": state_dict["scale"], "_growth_tracker": state_dict["good_steps"]}
            state_dict = self.state_dict() | tracked
        super().load_state_dict(state_dict)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step."""

    skipped: bool
    grad_norm: float
    retry: bool = False
    """Skipped because the scaled gradients overflowed: the same batch can succeed at the scale that is set now."""
    without_signal: bool = False
    """No update was made, since every gradient is exactly 0: the batch had nothing to learn from."""


class Precision:
    """The dtype of a run, with everything that follows from it."""

    def __init__(self, device_type: str, dtype: torch.dtype) -> None:
        self.device_type, self.dtype = device_type, dtype
        self.name = DTYPE_NAMES[dtype]
        self.scaler = LossScaler(dtype in NARROW_RANGE)  # bfloat16 reaches as far as float32 and needs none
        self.skipped = 0
        self.skipped_in_a_row = 0

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype in which training multiplies matrices (see nanochat/ops/linear.py)."""
        return product_dtype(self.device_type, self.dtype)

    @property
    def muon_dtype(self) -> torch.dtype | None:
        """The dtype of Muon's products; None: what the card is fast at (see `muon.newton_schulz_dtype`)."""
        if self.device_type != "cpu":
            return None
        # Muon orthogonalises float32 momentum in every mode. float16 runs are for tests: they stay exact here.
        return MEDIUM if self.dtype not in NARROW_RANGE and cpu_has_bf16() else torch.float32

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the passes and the update of a step: on a card float32 products may be rounded to TF32 in here.

        torch has one switch for the whole process. It stays at "highest" everywhere else, so that evaluation and chat
        are exact and do not depend on how a batch is cut. Cards below capability 8.0 have no TF32 and ignore it.
        """
        if self.device_type != "cuda" or self.dtype != torch.float32:
            yield
            return
        # TF32 has the range of float32 and the digits of float16: enough for a training step's products.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context to run a forward pass in."""
        # Parameters stay float32 in every mode and are cast as they are used: in 16 bits an update of 1e-4 of a weight
        # would be rounded away. Autocast keeps the cast weights until the context is left.
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the scaled loss."""
        # Scaling the loss scales every gradient. float16 ends at 6e-8: what is smaller would be 0 on its way back.
        self.scaler.scale(loss).backward()

    def plan_steps(self, num_steps: int | None) -> None:
        """Fit the growth interval to the run: at most ten attempts to double the scale, each of which may cost a step.

        None: the length is not known (it follows the clock).
        """
        # torch's default of 2000 steps would leave a short run without a single attempt.
        if num_steps is not None:
            interval = min(MAX_GROWTH_INTERVAL, max(MIN_GROWTH_INTERVAL, num_steps // 10))
            self.scaler.set_growth_interval(interval)

    def step(
        self, optimizers: Sequence[ShardedOptimizer], grad_clip: float | None = None, loss: Tensor | None = None
    ) -> StepResult:
        """Average, unscale, check, clip and apply the gradients: all optimizers on all ranks, or none.

        A gradient that is exactly 0 is not applied. Adam's and Muon's updates do not shrink with it: a step that has
        nothing to learn from would move the model as far as any other, along the momentum of earlier steps.

        Args:
            optimizers: all of the run.
            grad_clip: the largest global norm of the gradient; None doesn't clip.
            loss: the unscaled loss of the step, 0-dim; a step whose loss is not finite on any rank is skipped in every
                dtype. The loss scale is left alone then: it acts only after the loss.

        Raises:
            NonFiniteError: too many steps in a row had non-finite gradients, or the scale fell below 1.
        """
        # Averaged before they are checked: the norm to clip by is that of the whole batch.
        for optimizer in optimizers:
            optimizer.reduce_gradients()
        # The norm answers two questions in one pass over the gradients: how much to clip, and whether all are finite
        # (one inf or NaN anywhere makes it so). That it is still scaled does not matter for either.
        norm = torch.linalg.vector_norm(torch.stack([optimizer.grad_norm().float() for optimizer in optimizers]))
        checked = norm[None] if loss is None else torch.stack([norm, loss.detach().to(norm)])
        bad = (~torch.isfinite(checked)).to(norm.dtype)  # (1,) or (2,): gradients, loss
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        # One host sync a step: until here everything is queued on the device, and each further .item() would let it run
        # dry. `bad` is the same on all ranks, so every rank takes the same branch, else the next collective would hang.
        scaled_norm, bad_gradient, *rest = torch.cat([norm[None], bad]).tolist()
        bad_loss, finite = any(rest), not (bad_gradient or any(rest))
        scale = self.scaler.get_scale()
        without_signal = finite and scaled_norm == 0.0
        if finite and not without_signal:
            # Unscaling and clipping are both a factor on every gradient. As one number it is multiplied in where the
            # optimizer reads the gradients anyway, without a pass over memory of its own.
            multiplier = 1.0 / scale
            if grad_clip is not None and scaled_norm / scale > grad_clip:
                multiplier = grad_clip / scaled_norm
            for optimizer in optimizers:
                optimizer.step(multiplier)
        if not (bad_loss or without_signal):  # what says nothing about overflow leaves the scale alone
            self.scaler.found_inf(not finite)
            self.scaler.update()
        self._count(finite, "loss" if bad_loss else "gradient")
        retry = not finite and not bad_loss and self.scaler.is_enabled()
        return StepResult(not finite, scaled_norm / scale, retry, without_signal)

    def _count(self, finite: bool, what: str) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
            raise NonFiniteError(f"{self.skipped_in_a_row} steps in a row were skipped: the {what} is not finite")
        if self.scaler.get_scale() < 1.0:
            raise NonFiniteError(f"the {what} is not finite even at a loss scale of {2 * self.scaler.get_scale():g}")

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state: scaler and skip counters."""
        # Without the scale a resumed run would begin at 65536 again, and skip steps to find its height once more.
        return {
            "dtype": self.name,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`'s result; a scale of another dtype means nothing here and is left out."""
        if state["dtype"] == self.name and self.scaler.is_enabled():
            interval = self.scaler.get_growth_interval()
            self.scaler.load_state_dict(state["scaler"])
            self.scaler.set_growth_interval(interval)  # as planned for this run: a resumed one may be longer
        self.skipped = int(state["skipped"])
        self.skipped_in_a_row = int(state["skipped_in_a_row"])


class NonFiniteError(RuntimeError):
    """Training cannot continue: gradients or loss are not finite."""


@functools.cache
def cpu_has_bf16() -> bool:
    """True if this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    # oneDNN says yes where it only emulates too, so the CPU's own flags are asked as well.
    check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = f.read()
    except OSError:
        return False
    return ("avx512_bf16" in flags or "amx_bf16" in flags) and (check is None or bool(check()))


def first_nonfinite_module(model: nn.Module, run: Any) -> str | None:
    """Name of the first module whose output is not finite while `run()` calls the model; None if all are finite."""
    # Modules end in the order in which they compute, inner ones before those around them: the first that is not finite
    # is where it happened, all later ones only pass it on.
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
