"""Rotary positions on the halves of each head. Source: RoFormer, arXiv 2104.09864."""

from __future__ import annotations

import torch
from torch import Tensor


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
