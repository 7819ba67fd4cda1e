"""Attention through torch's scaled_dot_product_attention, which picks the fastest kernel the device has.

Key/value heads are repeated by hand: on older cards `enable_gqa` falls back to a kernel that needs O(T²) memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of T queries, the last of S keys.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D) with S ≥ T; H is a multiple of K.
        v: (B, S, K, D).
        mask: (B, 1, T, S) bool, true where a query may look; None: causal, query i sees keys up to S − T + i.

    Returns:
        (B, T, H, D).
    """
    T, S = q.size(1), k.size(1)
    repeats = q.size(2) // k.size(2)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, D)
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
    return y.transpose(1, 2)
