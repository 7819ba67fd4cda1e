"""The model's linear layers, whose products may be computed in another precision than their inputs have.

A CPU with bfloat16 instructions multiplies float32 numbers several times faster when they are rounded to bfloat16
first. torch has a switch for it, `torch.set_float32_matmul_precision("medium")`, but it works only where oneDNN has AMX
kernels, and there it affects every float32 product of the process, those of evaluation and chat too. So it stays at
"highest", and in training the conversion happens here, where the model's `product_dtype` asks for it. Results stay in
bfloat16 until something float32 is added to them, so that what is between two products (the MLP's h, attention) is not
converted back and forth. Weights, their gradients, the residual stream, norms and rotations are float32.

On a P100 in float16 the products can be those of nanochat/ops/fp16_gemm.py, see `use_half_gemm`.
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
    """The dtype in which training multiplies `x`: autocast's, else `wanted` for float32 on a CPU, else that of `x`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    # Without gradients float32 stays exact, so that evaluation and chat don't depend on how a batch is cut. And a
    # compiler is left to see one plain product.
    if kind != "cpu" or x.dtype != torch.float32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x.dtype
    return wanted or x.dtype


class _LowProducts(torch.autograd.Function):
    """y = x·Wᵀ and its gradients dx = dy·W and dW = dyᵀ·x, with each factor rounded to `dtype` once.

    x (…, in), weight (out, in). With a `gemm` y and dx are its products; dW, a sum over all tokens, stays with torch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, gemm: HalfGemm | None) -> Tensor:
        low_x, low_weight = x.to(dtype), weight.to(dtype)
        # The backward pass needs the rounded factors too: they are kept in half the bytes, and not rounded again.
        ctx.save_for_backward(low_x, low_weight)
        ctx.gemm, ctx.dtypes = gemm, (x.dtype, weight.dtype)
        if gemm is None:
            return F.linear(low_x, low_weight)
        return gemm(low_x.flatten(0, -2), low_weight).view(*x.shape[:-1], -1)  # (N, out) -> (…, out)

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
            dw = (grad.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight_dtype)  # (out, N) @ (N, in)
        return dx, dw, None, None


# One for the whole process: it depends on the card alone.
_half_gemm: HalfGemm | None = None


def use_half_gemm(gemm: HalfGemm | None) -> None:
    """Multiply with `gemm` from now on where training is in float16 under autocast; None: with torch."""
    global _half_gemm
    _half_gemm = gemm


def linear(x: Tensor, weight: Tensor, wanted: torch.dtype | None = None) -> Tensor:
    """x (…, in) times the transpose of weight (out, in) -> (…, out), in the dtype of `training_product_dtype`."""
    dtype = training_product_dtype(x, wanted)
    autocast = torch.is_autocast_enabled(x.device.type)
    training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    gemm = _half_gemm if autocast and dtype in NARROW_RANGE and training else None
    if gemm is None and (autocast or dtype == weight.dtype):
        return F.linear(x, weight)  # autocast casts both factors itself
    y: Tensor = _LowProducts.apply(x, weight, dtype, gemm)
    return y


class Linear(nn.Linear):
    """A linear layer without bias."""

    product_dtype: torch.dtype | None = None
    """float32 is rounded to this dtype for products in training, see `GPT.set_product_dtype`; None: not at all."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        return linear(x, self.weight, self.product_dtype)


def embedding(rows: int, width: int) -> nn.Embedding:
    """A table of `rows` vectors (rows, width), filled by torch, but on the meta device: it would load its compiler."""
    weight = torch.empty(rows, width)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else None)
