"""What stands between the matrix products: RMSNorm, rotary positions, squared ReLU, keys that know the token before.

torch's own RMSNorm is fused on a GPU; on a CPU it is put together from many passes over the memory, and so are the
others' gradients. There value and gradient are written out by hand in as few passes as possible (the norm 4.3 to 1.5 ms
in one case, see dev/LOG.md). A compiler fuses the plain form by itself.

Shapes: B batch, T tokens, H heads, D head size, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RMSNormCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=high)  # (…, 1)
        scale = length.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        g = grads[0]
        # dx = scale·(g − y·mean(g·y))
        mean = torch.linalg.vecdot(g, y).unsqueeze(-1).div_(-y.size(-1))
        return torch.addcmul(g, y, mean).mul_(scale.to(g.dtype)), None


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm of `x` (…, C) in its own dtype."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        normalized: Tensor = _RMSNormCPU.apply(x, eps)
        return normalized
    return F.rms_norm(x, (x.size(-1),), eps=eps)


class _ReLUSquared(torch.autograd.Function):
    """relu(x)² with its gradient 2·relu(x)·g in one product: autograd's own way takes five passes over the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        return (grads[0] * r).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)², see `_ReLUSquared`; a compiler finds the same by itself."""
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    y: Tensor = _ReLUSquared.apply(x)
    return y


# --- rotary positions: RoFormer, arXiv 2104.09864 ---------------------------------------------------------------------


def rotary_tables(n_positions: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and ±sin of position × frequency for both halves of a head, each (n_positions, head_dim), float32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequency = base ** (-channel / head_dim)
    angle = torch.outer(torch.arange(n_positions, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head in float32: y1 = x1·cos + x2·sin, y2 = x2·cos − x1·sin.

    x is (B, T, H, D), the tables are (1 or B, T, 1, D). Swapping the halves and adding two products passes over the
    memory less often than working on each half.
    """
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    swapped = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)


# --- keys that know the token before ---------------------------------------------------------------------------------
# Half of a key's channels are those of the previous token's key. A query that looks for its own token there finds the
# places right behind earlier occurrences, and so what followed them: one layer copies what else takes two (Olsson et
# al. 2022, arXiv 2209.11895, "smeared keys"; half of the channels, the slowly rotating ones: modded-nanogpt).


def split_key(k: Tensor) -> tuple[Tensor, Tensor]:
    """Views of k (…, D), each (…, 2, D/4): the channels that stay with their token, and those the next token gets.

    Rotary positions turn channel i together with i + D/2, the faster the lower i is: from each half the second half.
    """
    own, lent = k.unflatten(-1, (2, 2, -1)).unbind(-2)
    return own, lent


def offset_keys(k: Tensor, first: Tensor | None = None) -> Tensor:
    """Give every key of k (B, T, H, D) the lent channels of the token before; zeros where there is none.

    Args:
        k: rotated and normalised keys.
        first: (B, T) bool, true where a segment begins; None: at position 0 only.
    """
    own, lent = split_key(k)
    before = F.pad(lent, (0, 0, 0, 0, 0, 0, 1, -1))  # (B, T, H, 2, D/4)
    if first is not None:
        before = before.masked_fill(first[:, :, None, None, None], 0.0)
    return torch.stack((own, before), dim=-2).flatten(-3)
