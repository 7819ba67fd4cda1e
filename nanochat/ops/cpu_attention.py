"""Attention for training on a CPU: plain matrix products, a block of queries at a time, with the gradient written out.

torch's own kernel for CPUs keeps no probabilities and forms them again in the backward pass, in small tiles; for rows
of a few hundred tokens it is faster to keep them (see dev/LOG.md). Blocks of queries skip the keys after them.
Source of the gradient: softmax' = P ∘ (dP − rowsum(dP ∘ P)), where rowsum(dP ∘ P) = rowsum(dY ∘ Y), as in
FlashAttention, arXiv 2205.14135.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from nanochat.ops.attention import Piece

MAX_BYTES = 96 << 20  # of probabilities kept by one layer; longer rows are left to torch's kernel, which needs none
CAUSAL_BLOCK = 128


def probability_bytes(batch_heads: int, pieces: Sequence[Piece], itemsize: int) -> int:
    """Memory of the probabilities that are kept for the backward pass."""
    return sum(batch_heads * _length(p.queries) * _length(p.keys) * itemsize for p in pieces)


def split_causal(pieces: Sequence[Piece], device: torch.device) -> list[Piece]:
    """The same pieces, with a causal one cut into blocks of queries under one mask for their last keys each."""
    from nanochat.ops.attention import Piece

    blocks = []
    for piece in pieces:
        if not piece.causal:
            blocks.append(piece)
            continue
        offset = piece.queries.start - piece.keys.start
        for first in range(piece.queries.start, piece.queries.stop, CAUSAL_BLOCK):
            last = min(first + CAUSAL_BLOCK, piece.queries.stop)
            n = last - first
            mask = torch.ones(n, n, dtype=torch.bool, device=device).tril_()[None, None]
            blocks.append(Piece(slice(first, last), slice(piece.keys.start, last - offset), mask))
    return blocks


class _Attention(torch.autograd.Function):
    """Heads of all rows side by side: q, k, v (N, T, D) with N = B·H."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], scale: float) -> Tensor:
        y = torch.empty_like(q)
        probabilities = []
        for piece in pieces:
            scores = torch.bmm(q[:, piece.queries], k[:, piece.keys].mT).mul_(scale)  # (N, queries, keys)
            if piece.mask is not None:  # (1 or B, 1, queries, the last keys)
                masked = scores[:, :, scores.size(2) - piece.mask.size(3) :].unflatten(0, (piece.mask.size(0), -1))
                masked.masked_fill_(piece.mask.logical_not(), float("-inf"))
            probabilities.append(torch.softmax(scores, dim=-1))
            y[:, piece.queries] = torch.bmm(probabilities[-1], v[:, piece.keys])
        ctx.save_for_backward(q, k, v, y, *probabilities)
        ctx.pieces, ctx.scale = pieces, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *probabilities = ctx.saved_tensors
        g = grads[0]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        total = torch.linalg.vecdot(g, y).unsqueeze(-1)  # (N, T, 1)
        for piece, p in zip(ctx.pieces, probabilities, strict=True):
            dy = g[:, piece.queries]
            dv[:, piece.keys] += torch.bmm(p.mT, dy)
            ds = torch.bmm(dy, v[:, piece.keys].mT).sub_(total[:, piece.queries]).mul_(p).mul_(ctx.scale)
            dq[:, piece.queries] = torch.bmm(ds, k[:, piece.keys])
            dk[:, piece.keys] += torch.bmm(ds.mT, q[:, piece.queries])
        return dq, dk, dv, None, None


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Piece], scale: float) -> Tensor:
    """Attention of q (B, H, T, D) to k and v of the same shape -> (B, H, T, D).

    Args:
        q: queries.
        k: keys.
        v: values.
        pieces: see `nanochat.ops.attention.plan_attention`; every query sees at least one key.
        scale: factor on the products of queries and keys.
    """
    blocks = split_causal(pieces, q.device)
    y: Tensor = _Attention.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), blocks, scale)
    return y.view(q.shape)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
