"""Keys that know the token before: half of a key's channels are those of the previous token's key.

A query that looks for its own token there finds the places right behind earlier occurrences, and so what followed them:
one layer copies what else takes two (Olsson et al. 2022, arXiv 2209.11895, "smeared keys"; half of the channels, the
slowly rotating ones: modded-nanogpt). No parameters, no matmuls.

Shapes: B rows, T tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
