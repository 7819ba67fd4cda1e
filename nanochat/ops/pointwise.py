"""Operations between the matrix products: RMSNorm, squared ReLU, rotary positions, keys that include the token before.

They are limited by memory, so what counts is how often they pass over it. On a GPU torch's RMSNorm is one kernel; on a
CPU it is many passes, as are the gradients that autograd puts together. So values and gradients are written out here in
as few passes as possible (the norm from 4.3 to 1.5 ms in one case, see dev/LOG.md). A compiler fuses the plain form.

Shapes: B batch, T tokens, H heads, D head size, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.ops import native
from nanochat.ops.linear import training_product_dtype


class _RMSNormCPU(torch.autograd.Function):
    """y = x·scale with scale = 1/√(mean(x²) + ε), over the last dimension. Source: arXiv 1910.07467."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)  # 300² overflows float16
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=high)  # (…, 1)
        scale = length.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)  # y, not x: the next matrix product may keep it anyway
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        g = grads[0]
        # dx = scale·(g − y·mean(g·y)): without the part along y, since the norm of x doesn't change y.
        mean = torch.linalg.vecdot(g, y).unsqueeze(-1).div_(-y.size(-1))
        return torch.addcmul(g, y, mean).mul_(scale.to(g.dtype)), None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without parameters of `x` (…, C), in its own dtype."""
    if (kernels := native.kernels_for(x)) is not None:
        return native.stream_and_norm(kernels, x, None, eps, x.dtype)[1]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        normalized: Tensor = _RMSNormCPU.apply(x, eps)
        return normalized
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def add_norm(x: Tensor, delta: Tensor | None, eps: float, wanted: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta (…, C), and its RMSNorm for a product that wants float32 rounded to `wanted`.

    Without a delta the stream is x itself.
    """
    dtype = training_product_dtype(x, wanted)
    kernels = native.kernels_for(x) if delta is None else native.kernels_for(x, delta)
    if kernels is not None and dtype in native.CODES and (delta is None or delta.dtype == dtype):
        # The stream passes through the function even where it stays as it is: so both its gradients arrive together.
        return native.stream_and_norm(kernels, x, delta, eps, dtype)
    x = x if delta is None else x + delta
    return x, rms_norm(x, eps)


def add(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, in the wider of their dtypes: the residual stream and what a product gave."""
    if (kernels := native.kernels_for(x, delta)) is not None and x.dtype == torch.promote_types(x.dtype, delta.dtype):
        return native.stream(kernels, x, delta)
    return x + delta


class _ReLUSquared(torch.autograd.Function):
    """relu(x)² (Primer, arXiv 2109.08668) and its gradient 2·relu(x)·g, for which autograd would take five passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return torch.addcmul(r.new_zeros(()), grads[0], r, value=2)  # one pass; a product and then a factor are two


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)² of any shape."""
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    if (kernels := native.kernels_for(x)) is not None:
        return native.squared_relu(kernels, x)
    y: Tensor = _ReLUSquared.apply(x)
    return y


def scaled_square(h: Tensor) -> tuple[Tensor, Tensor]:
    """h² of h (…, C) ≥ 0 where it would overflow float16: a smaller square, and the float32 factor (…, 1) it lacks.

    The square of anything above 255 is too large. Each row is divided by a power of two (exact) that brings its largest
    entry to at most 128; rows below 128 are untouched. The factor cancels, so no gradient runs through it.
    """
    peak = h.detach().amax(dim=-1, keepdim=True).float()  # (…, 1)
    exponent = torch.ceil(torch.log2(peak.clamp(min=1.0) / 128)).clamp(min=0)
    h = h * torch.exp2(-exponent).to(h.dtype)
    return h * h, torch.exp2(2 * exponent)


# --- rotary positions: RoFormer, arXiv 2104.09864 ---------------------------------------------------------------------


def rotary_tables(n_positions: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and ±sin of position × frequency for both halves of a head, each (n_positions, head_dim), float32."""
    table = torch.empty(n_positions, head_dim)
    if table.is_meta:  # wanted for its shape: to compute there, torch would load its compiler
        return table, table.clone()
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32)  # (D/2,): a frequency for each pair of channels
    frequency = base ** (-channel / head_dim)  # from 1 down to almost 1/base radians per position
    angle = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequency)  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head in float32: y1 = x1·cos + x2·sin, y2 = x2·cos − x1·sin.

    x is (B, T, H, D), the tables are (1 or B, T, 1, D).
    """
    # Channel i is paired with i + D/2. Swapping the halves and adding two products passes over memory less often than
    # working on each half. In float32: in bfloat16 the slow channels of neighbouring positions would look alike.
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    swapped = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)


# Elements that go through all passes at once: two copies in float32 fit into a core's second cache.
ROTARY_BLOCK = 1 << 17


def _rotary_blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Sequences and positions of x (B, T, H, D), a block at a time."""
    B, T, H, D = x.shape
    positions = max(1, ROTARY_BLOCK // (H * D))
    sequences = max(1, positions // T)
    for b in range(0, B, sequences):
        for t in range(0, T, positions):
            yield slice(b, b + sequences), slice(t, t + positions)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, block: tuple[slice, slice]) -> Tensor:
    """A block of x, rotated: the bits of `apply_rotary`."""
    own, half = (block if cos.size(0) > 1 else (slice(None), block[1])), x.size(-1) // 2
    cos, sin = cos[own], sin[own]
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half])
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class _RotaryNormCPU(torch.autograd.Function):
    """RMSNorm of rotated heads, a block of tokens at a time: it stays in the cache between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        B, T, H, D = x.shape
        high = torch.promote_types(x.dtype, cos.dtype)
        # Attention works on one head after the other: in this order it needs no copy.
        y = x.new_empty(B, H, T, D, dtype=dtype).transpose(1, 2)
        scale = x.new_empty(B, T, H, 1, dtype=high)
        for block in _rotary_blocks(x):
            rotated = _rotate(x[block].to(high), cos, sin, block)
            length = torch.linalg.vector_norm(rotated, dim=-1, keepdim=True)
            scale[block] = length.square_().div_(D).add_(eps).rsqrt_()
            y[block] = rotated.mul_(length)
        ctx.save_for_backward(y, scale, cos, sin)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, cos, sin = ctx.saved_tensors
        dx = y.new_empty(y.shape, dtype=ctx.dtype)
        back = -sin  # the inverse of a rotation
        for block in _rotary_blocks(y):
            g, normed = grads[0][block].to(scale.dtype), y[block].to(scale.dtype)
            mean = torch.linalg.vecdot(g, normed).unsqueeze(-1).div_(-y.size(-1))  # as in _RMSNormCPU
            dx[block] = _rotate(torch.addcmul(g, normed, mean).mul_(scale[block]), cos, back, block)
        return dx, None, None, None, None


def rotary_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """`rms_norm(apply_rotary(x, cos, sin), eps)` in `dtype`; x is (B, T, H, D), the tables are (1 or B, T, 1, D)."""
    if (kernels := native.kernels_for(x, cos, sin)) is not None and dtype in native.CODES and native.fits_heads(x, cos):
        return native.normed_heads(kernels, x, cos, sin, eps, dtype)
    if x.device.type == "cpu" and x.size(1) > 1 and not torch.compiler.is_compiling():
        normalized: Tensor = _RotaryNormCPU.apply(x, cos, sin, eps, dtype)
        return normalized
    return rms_norm(apply_rotary(x, cos, sin), eps).to(dtype)


# --- keys that include the token before ------------------------------------------------------------------------------
# Half of a key's channels are those of the previous token's key. A query that looks for its own token there finds the
# positions right after earlier occurrences, and so what followed them: one layer copies what otherwise takes two.
# Source: Olsson et al. 2022, arXiv 2209.11895, "smeared keys"; only the slowly rotating channels: modded-nanogpt.


def split_key(k: Tensor) -> tuple[Tensor, Tensor]:
    """Views of k (…, D), each (…, 2, D/4): the channels that stay with their token, and those the next token gets."""
    # Rotary positions turn channel i together with i + D/2, slower as i grows. The next token gets the slow ones, for
    # which a shift by one position hardly matters: of each half the second half.
    own, lent = k.unflatten(-1, (2, 2, -1)).unbind(-2)
    return own, lent


def offset_keys(k: Tensor, first: Tensor | None = None) -> Tensor:
    """Give every key of k (B, T, H, D) half of its channels from the token before; zeros where there is none.

    Args:
        k: rotated and normalised keys.
        first: (B, T) bool, true where a segment begins; None: at position 0 only.
    """
    own, lent = split_key(k)
    before = F.pad(lent, (0, 0, 0, 0, 0, 0, 1, -1))  # (B, T, H, 2, D/4), one position later
    if first is not None:
        before = before.masked_fill(first[:, :, None, None, None], 0.0)  # nothing leaks from the document before
    return torch.stack((own, before), dim=-2).flatten(-3)
