"""The model's linear layers, whose products may be made in another precision than their inputs have.

A CPU with bfloat16 instructions multiplies float32 numbers several times faster when they are rounded to bfloat16
first. torch has a switch for it, `torch.set_float32_matmul_precision("medium")`, but it works only where oneDNN has AMX
kernels, and there it reaches every float32 product of the process, those of evaluation and chat too. So it stays at
"highest", and in training the conversion is made here, where the model's `product_dtype` asks for it. Results stay in
bfloat16 until something float32 is added to them: what is between two products (the MLP's h, attention) is not
converted back and forth. Weights, their gradients, the residual stream, norms and rotations are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanochat.ops.fp16_gemm import HalfGemm
from nanochat.precision import NARROW_RANGE


def training_product_dtype(x: Tensor, wanted: torch.dtype | None = None) -> torch.dtype:
    """In which dtype training multiplies `x`: that of autocast, else the `wanted` one for float32 on a CPU, or its own.

    Without gradients float32 stays exact, so that evaluation and chat don't depend on how a batch is cut.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    if kind != "cpu" or x.dtype != torch.float32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x.dtype
    return wanted or x.dtype


class _LowProducts(torch.autograd.Function):
    """x @ weight.T in `dtype` and the two products of its gradient, all factors rounded to `dtype`; each once.

    With a `gemm` (nanochat/ops/fp16_gemm.py) y and dx are its products; dw, a sum over all tokens, stays with torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, gemm: HalfGemm | None) -> Tensor:
        low_x, low_weight = x.to(dtype), weight.to(dtype)
        # The rounded factors serve the backward pass too: kept in half the bytes, and not rounded again.
        ctx.save_for_backward(low_x, low_weight)
        ctx.gemm, ctx.dtypes = gemm, (x.dtype, weight.dtype)
        if gemm is None:
            return F.linear(low_x, low_weight)
        return gemm(low_x.flatten(0, -2), low_weight).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad = grads[0].to(x.dtype)  # (…, out)
        dx = dw = None
        if ctx.gemm is not None:
            grad = grad.flatten(0, -2).contiguous()  # (N, out)
        if ctx.needs_input_grad[0]:
            dx = (grad @ weight if ctx.gemm is None else ctx.gemm(grad, weight.t()).view(x.shape)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            dw = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight_dtype)
        return dx, dw, None, None


_half_gemm: HalfGemm | None = None


def use_half_gemm(gemm: HalfGemm | None) -> None:
    """From now on multiply with `gemm` where training is in float16 under autocast; None: with torch."""
    global _half_gemm
    _half_gemm = gemm


def linear(x: Tensor, weight: Tensor, wanted: torch.dtype | None = None) -> Tensor:
    """x (…, in) times weight (out, in) transposed -> (…, out), in the dtype of `training_product_dtype`."""
    dtype = training_product_dtype(x, wanted)
    autocast = torch.is_autocast_enabled(x.device.type)
    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    gemm = _half_gemm if autocast and dtype in NARROW_RANGE and training else None
    if gemm is None and (autocast or dtype == weight.dtype):
        return F.linear(x, weight)
    y: Tensor = _LowProducts.apply(x, weight, dtype, gemm)
    return y


class Linear(nn.Linear):
    """A linear layer without bias."""

    product_dtype: torch.dtype | None = None
    """What float32 is rounded to for products in training, see `GPT.set_product_dtype`; None: nothing."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        return linear(x, self.weight, self.product_dtype)
