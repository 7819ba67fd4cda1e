"""Attention through torch's scaled_dot_product_attention, which picks the fastest kernel the device has.

Plain causal attention is one call. What a kernel doesn't know (sliding windows, several documents in one sequence,
queries that continue a cache) is cut into blocks of queries: each block reads only the keys it can reach, under a small
mask, so that no mask of T × T ever exists. The pieces are planned once per forward pass and serve every layer.

Key/value heads are repeated explicitly: on older cards `enable_gqa` falls back to a kernel that needs O(T²) memory.

Training on a CPU has an implementation of its own: plain matrix products, one block of queries at a time, with the
gradient written out. torch's kernel for CPUs doesn't keep the probabilities but recomputes them in the backward pass,
in small tiles; for sequences of a few hundred tokens it is faster to keep them (see dev/LOG.md).

Shapes: B batch, T queries, S keys, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.ops import native
from nanochat.ops.linear import training_product_dtype
from nanochat.precision import NARROW_RANGE

# Queries of a masked piece: a mask is at most this long, while a piece is still a large matrix product.
QUERY_BLOCK = 256
# The most probabilities that a layer keeps in training on a CPU; longer sequences are left to torch's kernel.
MAX_PROBABILITY_BYTES = 96 << 20
# Queries of a piece there. Smaller pieces skip more of the half above the diagonal, in smaller products.
CAUSAL_BLOCK = 128


class Cache(Protocol):
    """The part of a key/value cache that the model calls; `nanochat.generate.kv_cache.KVCache` is one.

    A protocol, because the model must not import what generates with it.
    """

    @property
    def key_offset(self) -> bool:
        """True if `update` gives keys the channels of the token before, as the model's switch of this name asks."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's (B, T, K, D) keys and values; return all so far."""

    def get_pos(self) -> int:
        """Length of the longest sequence."""

    def positions(self, n_tokens: int) -> Tensor:
        """Rotary positions of the next `n_tokens`: (1, T) or (B, T)."""

    def attention_mask(self) -> Tensor | None:
        """The cached positions that each query may see, (B, 1, T, all); None: causal."""

    def with_previous(self, idx: Tensor, n: int) -> Tensor:
        """Remember the next tokens (B, T); return them behind the `n` before, −1 where there is none: (B, n + T)."""

    def advance(self, n: int) -> None:
        """Called once after the last layer."""


@dataclass(frozen=True)
class Piece:
    """A range of queries and the range of keys they may reach."""

    queries: slice
    keys: slice
    mask: Tensor | None = None
    """(1 or B, 1, queries, keys) bool, true where a query may look; None: everywhere, or causal."""
    causal: bool = False


def segment_starts(segments: Tensor) -> Tensor:
    """The position at which each token's segment begins: (B, T) ids that differ between neighbours -> (B, T)."""
    border = torch.ones_like(segments, dtype=torch.bool)
    border[:, 1:] = segments[:, 1:] != segments[:, :-1]
    position = torch.arange(segments.size(1), device=segments.device)
    # Only borders keep their position; the running maximum carries it to the rest of the segment.
    return torch.where(border, position, 0).cummax(dim=1).values


def plan_attention(
    T: int, S: int, device: torch.device, window: int | None = None, starts: Tensor | None = None
) -> list[Piece]:
    """The pieces in which T queries, the last of S positions, attend to the keys up to their own.

    Args:
        T: number of queries.
        S: number of keys, at least T.
        device: where masks are made.
        window: how many keys before its own a query sees; None: all.
        starts: (B, T) the first key each query may see (needs S == T); None: key 0.
    """
    if window is not None and window >= S - 1:
        window = None  # it reaches everything
    if starts is None and T == 1:  # one new token: nothing lies after it, so no mask
        return [Piece(slice(0, 1), slice(0 if window is None else S - 1 - window, S))]
    if starts is None and window is None and T == S:
        return [Piece(slice(0, T), slice(0, T), causal=True)]
    block = QUERY_BLOCK if window is None else max(64, min(QUERY_BLOCK, window))
    pieces = []
    for q0 in range(0, T, block):
        q1 = min(q0 + block, T)
        first, last = S - T + q0, S - T + q1  # the block's queries as positions among the keys
        low = 0 if window is None else max(0, first - window)  # the first key that any of them sees
        if starts is not None and device.type == "cpu" and not torch.compiler.is_compiling():
            # Starts only grow, so the first query reaches furthest back. On a card, reading it would stall the queue.
            low = max(low, int(starts[:, q0].min()))
        query = torch.arange(first, last, device=device)[:, None]  # (q, 1)
        key = torch.arange(low, last, device=device)  # (k,)
        mask = (key <= query)[None]  # (1, q, k)
        if window is not None:
            mask = mask & (key >= query - window)
        if starts is not None:
            mask = mask & (key >= starts[:, q0:q1, None])  # (B, q, k)
        pieces.append(Piece(slice(q0, q1), slice(low, last), mask.unsqueeze(1)))
    return pieces


def plan_ragged(mask: Tensor, positions: Tensor, window: int | None = None) -> list[Piece]:
    """The same for a cache whose sequences have different lengths: one piece under one mask.

    Args:
        mask: (B, 1, T, S) bool, true for the keys up to a query's own.
        positions: (B, T) positions of the queries.
        window: as in `plan_attention`.
    """
    if window is not None and window < mask.size(-1) - 1:
        key = torch.arange(mask.size(-1), device=mask.device)
        mask = mask & (key >= positions[:, None, :, None] - window)
    return [Piece(slice(0, mask.size(2)), slice(0, mask.size(3)), mask)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Sequence[Piece],
    scale: float | None = None,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention of T queries to S keys.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D); H is a multiple of K.
        v: (B, S, K, D).
        pieces: from `plan_attention` or `plan_ragged`; they cover the queries in their order.
        scale: factor on the products of queries and keys; None: 1/√D.
        product_dtype: what float32 is rounded to in training on a CPU (see nanochat/ops/linear.py); None: not at all.

    Returns:
        (B, T, H, D).
    """
    repeats = q.size(2) // k.size(2)
    if repeats > 1 and q.size(1) == 1:
        return _attend_one(q, k, v, pieces[0], scale)
    if q.requires_grad and native.fits_attention(kernels := _causal_kernels(pieces, q), q, k, v):
        return native.causal_attention(kernels, q, k, v, q.size(-1) ** -0.5 if scale is None else scale)
    if repeats > 1:  # query heads h·repeats … (h+1)·repeats − 1 share key/value head h
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T or S, D)
    if q.device.type == "cpu" and q.requires_grad and not torch.compiler.is_compiling():
        # float16 is for tests there, and stays with torch's kernel.
        dtype, heads = training_product_dtype(q, product_dtype), q.size(0) * q.size(1)
        if dtype not in NARROW_RANGE and probability_bytes(heads, pieces, dtype.itemsize) <= MAX_PROBABILITY_BYTES:
            scale = q.size(-1) ** -0.5 if scale is None else scale
            low = (x.to(dtype).flatten(0, 1) for x in (q, k, v))  # (B·H, T, D)
            blocks = split_causal(pieces, q.device)
            kernels = native.kernels_for() if dtype in native.CODES else None
            if not all(p.mask is None or p.mask.is_contiguous() for p in blocks):
                kernels = None
            y = _CPUAttention.apply(*low, blocks, scale, kernels).view(q.shape)
            return y.to(v.dtype).transpose(1, 2)
    parts = [
        F.scaled_dot_product_attention(
            _run(q, p.queries), _run(k, p.keys), _run(v, p.keys), attn_mask=p.mask, is_causal=p.causal, scale=scale
        )
        for p in pieces
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return y.transpose(1, 2)


def attention_block(
    x: Tensor,
    weights: Sequence[Tensor],
    angles: tuple[Tensor, Tensor],
    eps: float,
    pieces: Sequence[Piece],
    scale: float | None = None,
    product_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """From the normed stream x (B, T, C) to what the heads have found (B, T, H·D), as in `gpt.Attention`.

    `weights` are those of query, key and value, `angles` cos and sin, `eps` of the heads' norm; the rest as in
    `attend`. None where the crate has no kernel for all of it.
    """
    if training_product_dtype(x, product_dtype) != x.dtype:
        return None
    kernels = _causal_kernels(pieces, x)
    if kernels is None or native.kernels_for(x, *weights, *angles) is None:
        return None
    scale = angles[0].size(-1) ** -0.5 if scale is None else scale
    return native.attention_by_tiles(kernels, x, weights, *angles, eps, scale)


def _causal_kernels(pieces: Sequence[Piece], x: Tensor) -> Any:
    """The crate's kernels for x, where attention is plainly causal; else None."""
    if len(pieces) != 1 or not pieces[0].causal or x.device.type != "cpu":
        return None
    return native.kernels_for()


def _run(x: Tensor, part: slice) -> Tensor:
    """x (B, H, n, D) from part.start to part.stop. If that is all of x, then x itself: its gradient needs no copy."""
    return x if part == slice(0, x.size(2)) else x[:, :, part]


def _attend_one(q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float | None) -> Tensor:
    """One query per sequence: the heads that share keys become queries of one head, so that no key is copied."""
    B, _, H, D = q.shape
    repeats = H // k.size(2)
    grouped = q.view(B, H // repeats, repeats, D)  # (B, K, repeats, D)
    k, v = _run(k.transpose(1, 2), piece.keys), _run(v.transpose(1, 2), piece.keys)  # (B, K, S, D)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=piece.mask, scale=scale).reshape(B, 1, H, D)


# --- training on a CPU -----------------------------------------------------------------------------------------------


def probability_bytes(batch_heads: int, pieces: Sequence[Piece], itemsize: int) -> int:
    """Memory of the probabilities kept for the backward pass; `batch_heads` is B·H."""
    return sum(batch_heads * _length(p.queries) * _length(p.keys) * itemsize for p in pieces)


def split_causal(pieces: Sequence[Piece], device: torch.device) -> list[Piece]:
    """The same pieces, with a causal one cut into blocks of queries, each with a mask for its last keys only."""
    blocks = []
    for piece in pieces:
        if not piece.causal:
            blocks.append(piece)
            continue
        # Before the block's own positions every key is visible. Within them, in the last n keys, the lower triangle is.
        offset = piece.queries.start - piece.keys.start
        for first in range(piece.queries.start, piece.queries.stop, CAUSAL_BLOCK):
            last = min(first + CAUSAL_BLOCK, piece.queries.stop)
            n = last - first
            mask = torch.ones(n, n, dtype=torch.bool, device=device).tril_()[None, None]
            blocks.append(Piece(slice(first, last), slice(piece.keys.start, last - offset), mask))
    return blocks


class _CPUAttention(torch.autograd.Function):
    """Y = P·V with P = softmax(scale·Q·Kᵀ); q, k, v (N, T, D) with N = B·H.

    With S the scores: dV = Pᵀ·dY, dP = dY·Vᵀ, dS = P ∘ (dP − rowsum(dP ∘ P)), dQ = scale·dS·K, dK = scale·dSᵀ·Q. And
    rowsum(dP ∘ P) = rowsum(dY ∘ Y), which costs T·D instead of T² (FlashAttention, arXiv 2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[Piece], scale: float, kernels: Any) -> Tensor:
        y = torch.empty_like(q)
        probabilities = []
        for piece in pieces:
            scores = torch.bmm(q[:, piece.queries], k[:, piece.keys].mT)  # (N, queries, keys)
            if kernels is not None:
                probabilities.append(native.softmax_(kernels, scores, piece.mask, scale))
            else:
                probabilities.append(_masked_softmax(scores.mul_(scale), piece.mask))
            y[:, piece.queries] = torch.bmm(probabilities[-1], v[:, piece.keys])
        # The kernel sums dP ∘ P itself, row by row as it passes, and needs no Y.
        ctx.save_for_backward(q, k, v, y if kernels is None else None, *probabilities)
        ctx.pieces, ctx.scale, ctx.kernels = pieces, scale, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *probabilities = ctx.saved_tensors
        g = grads[0]
        # Each query is in one piece, but keys are in several: their gradients add up.
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        total = None if y is None else torch.linalg.vecdot(g, y).unsqueeze(-1)  # (N, T, 1)
        for piece, p in zip(ctx.pieces, probabilities, strict=True):
            dy = g[:, piece.queries]
            dv[:, piece.keys] += torch.bmm(p.mT, dy)
            dp = torch.bmm(dy, v[:, piece.keys].mT)  # (N, queries, keys)
            if total is None:
                ds = native.softmax_back_(ctx.kernels, p, dp, ctx.scale)
            else:
                ds = dp.sub_(total[:, piece.queries]).mul_(p).mul_(ctx.scale)
            dq[:, piece.queries] = torch.bmm(ds, k[:, piece.keys])  # ds (N, queries, keys)
            dk[:, piece.keys] += torch.bmm(ds.mT, q[:, piece.queries])
        return dq, dk, dv, None, None, None


def _masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Probabilities of scores (N, queries, keys), which it overwrites; mask (1 or B, 1, queries, the last keys)."""
    if mask is not None:
        masked = scores[:, :, scores.size(2) - mask.size(3) :].unflatten(0, (mask.size(0), -1))
        masked.masked_fill_(mask.logical_not(), float("-inf"))  # a view: this writes into the scores
    return torch.softmax(scores, dim=-1)


def _length(part: slice) -> int:
    return int(part.stop - part.start)
