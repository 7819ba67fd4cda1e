"""What lies between the products of a training step on a CPU, by the compiled crate (rustbpe/src/between).

torch makes such operations one at a time, and each one reads and writes its tensors once more; a mix of float32 and
bfloat16 costs a copy on top. Here each is one pass, forward and backward, and writes what the next product takes.
nanochat/ops has the same in torch's operations: the reference, and what runs wherever `kernels_for` says no.

Values and gradients equal the reference's within rounding. A kernel's do not depend on the number of threads.

Shapes: B batch, T tokens, H heads, D head size, C channels; of Muon's: N matrices, R rows, C columns.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanochat.precision import DTYPES

# The dtypes' numbers in the crate.
CODES = {DTYPES["float32"]: 0, DTYPES["bfloat16"]: 1}
# Up to here the sum of a softcapped row's exponentials fits into float32, whatever the logits, for 2^18 tokens.
LARGEST_CAP = 38.0
LARGEST_HEAD = 512
TILES = 32  # what divides tokens and channels of a head, or both sides of a matrix, in the kernels by tiles
_allowed = True


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Inside, everything runs in torch's operations: for tests and comparisons."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@functools.cache
def _library() -> Any:
    try:
        from rustbpe import between  # lazy: a model runs without the crate
    except ImportError:
        return None
    return between.kernels()


def kernels_for(*tensors: Tensor, gradients: bool = True) -> Any:
    """The crate's kernels, where they can take these tensors, on a CPU and (if asked) with gradients; else None.

    The one place that decides.
    """
    # A compiler is left to see plain operations, and without gradients the reference stays exact.
    if not _allowed or torch.compiler.is_compiling() or (gradients and not torch.is_grad_enabled()):
        return None
    for x in tensors:
        # Subclasses, such as torch's fake tensors, have no memory.
        if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.dtype not in CODES:
            return None
        if not x.is_contiguous() or x.numel() == 0:
            return None
    return _library()


def _fits_tiles(kernels: Any, *sizes: int) -> bool:
    return kernels is not None and kernels.has_tiles and all(size % TILES == 0 for size in sizes)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class _AddNorm(torch.autograd.Function):
    """r = x + delta and y = norm(r); without a delta r is x. Without a `dtype` there is no y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, eps: float, dtype: torch.dtype | None, kernels: Any) -> Any:
        channels = x.size(-1)
        rows = x.numel() // channels
        product = dtype or (x if delta is None else delta).dtype
        r = x if delta is None else torch.empty_like(x)
        y = None if dtype is None else x.new_empty(x.shape, dtype=dtype)
        scale = None if dtype is None else x.new_empty(rows, dtype=DTYPES["float32"])
        tensors = (_address(t) for t in (x, delta, r, y, scale))
        kernels.add_norm(torch.get_num_threads(), CODES[x.dtype], CODES[product], *tensors, rows, channels, eps)
        ctx.kernels, ctx.has_delta, ctx.product = kernels, delta is not None, product
        ctx.set_materialize_grads(False)
        if y is None:
            return r
        ctx.save_for_backward(r, scale)
        return r, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dr, dy = grads if len(grads) == 2 else (grads[0], None)
        if dy is None:  # nobody used the norm
            ddelta = dr.to(ctx.product) if ctx.has_delta and dr is not None else None
            return dr, ddelta, None, None, None
        r, scale = ctx.saved_tensors
        dy, dr = dy.contiguous(), None if dr is None else dr.contiguous()
        dx = torch.empty_like(r)
        # In one dtype the two gradients are one tensor; autograd does not write into it.
        ddelta = torch.empty_like(dy) if ctx.has_delta and dy.dtype != dx.dtype else None
        tensors = (_address(t) for t in (r, scale, dy, dr, dx, ddelta))
        codes, shape = (CODES[r.dtype], CODES[dy.dtype]), (scale.numel(), r.size(-1))
        ctx.kernels.add_norm_back(torch.get_num_threads(), *codes, *tensors, *shape)
        return dx, (dx if ddelta is None else ddelta) if ctx.has_delta else None, None, None, None


def stream_and_norm(
    kernels: Any, x: Tensor, delta: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + delta in the dtype of x, and its RMSNorm in `dtype`, which is that of delta."""
    result: tuple[Tensor, Tensor] = _AddNorm.apply(x, delta, eps, dtype, kernels)
    return result


def stream(kernels: Any, x: Tensor, delta: Tensor) -> Tensor:
    """x + delta in the dtype of x."""
    result: Tensor = _AddNorm.apply(x, delta, 0.0, None, kernels)
    return result


class _ReLUSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Any) -> Tensor:
        y = torch.empty_like(x)
        kernels.relu_squared(torch.get_num_threads(), CODES[x.dtype], x.data_ptr(), y.data_ptr(), x.numel())
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = torch.empty_like(x)
        tensors = (t.data_ptr() for t in (x, dy, dx))
        ctx.kernels.relu_squared_back(torch.get_num_threads(), CODES[x.dtype], *tensors, x.numel())
        return dx, None


def squared_relu(kernels: Any, x: Tensor) -> Tensor:
    """relu(x)²."""
    y: Tensor = _ReLUSquared.apply(x, kernels)
    return y


def _heads_shape(kernels: Any, sizes: tuple[int, int, int], cos: Tensor, sin: Tensor, x_heads: int = 0) -> Any:
    """Of heads with `sizes` (T, H, D); it holds the addresses of cos and sin, which must outlive it.

    In x a token has `x_heads` of them, by default H.
    """
    T, H, D = sizes
    return kernels.Shape(T, H, D, cos.data_ptr(), sin.data_ptr(), int(cos.size(0) > 1), x_heads or H)


class _RotaryNorm(torch.autograd.Function):
    """x (B, T, H, D) -> (B, T, H, D), which lies in memory as (B, H, T, D): so attention's products take it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype, kernels: Any) -> Tensor:
        B, T, H, D = x.shape
        y, scale = x.new_empty(B, H, T, D, dtype=dtype), x.new_empty(B, H, T, dtype=DTYPES["float32"])
        shape = _heads_shape(kernels, (T, H, D), cos, sin)
        tensors = (t.data_ptr() for t in (x, y, scale))
        kernels.rotary_norm(
            torch.get_num_threads(), CODES[x.dtype], CODES[dtype], *tensors, ctypes.byref(shape), B, eps
        )
        ctx.save_for_backward(y, scale, cos, sin)
        ctx.kernels, ctx.dtype = kernels, x.dtype
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, cos, sin = ctx.saved_tensors
        B, H, T, D = y.shape
        shape = _heads_shape(ctx.kernels, (T, H, D), cos, sin)
        dy = grads[0].transpose(1, 2).contiguous()
        dx = y.new_empty(B, T, H, D, dtype=ctx.dtype)
        codes = CODES[ctx.dtype], CODES[y.dtype]
        tensors = (t.data_ptr() for t in (y, dy, scale, dx))
        ctx.kernels.rotary_norm_back(torch.get_num_threads(), *codes, *tensors, ctypes.byref(shape), B)
        return dx, None, None, None, None, None


def fits_heads(x: Tensor, cos: Tensor) -> bool:
    """True if the kernel takes heads and angles of these shapes."""
    same = cos.dim() == 4 and cos.shape == (cos.size(0), x.size(1), 1, x.size(3)) and cos.size(0) in (1, x.size(0))
    return x.dim() == 4 and same and cos.dtype == DTYPES["float32"] and x.size(3) % 2 == 0 and x.size(3) <= LARGEST_HEAD


def normed_heads(kernels: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm in `dtype` of the heads x (B, T, H, D), rotated by the tables (1 or B, T, 1, D)."""
    y: Tensor = _RotaryNorm.apply(x, cos, sin, eps, dtype, kernels)
    return y


def softmax_(kernels: Any, scores: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · scores) in place, scores (N, queries, keys); mask (share of N, 1, queries, last keys) or None."""
    N, queries, keys = scores.shape
    seen = (None, 0, N) if mask is None else (mask.data_ptr(), mask.size(3), N // mask.size(0))
    sizes = N * queries, queries, keys
    kernels.softmax(torch.get_num_threads(), CODES[scores.dtype], scores.data_ptr(), *sizes, scale, *seen)
    return scores


def softmax_back_(kernels: Any, p: Tensor, dp: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, in place of that of the probabilities p, both (N, queries, keys)."""
    rows, keys = p.size(0) * p.size(1), p.size(2)
    tensors = p.data_ptr(), dp.data_ptr()
    kernels.softmax_back(torch.get_num_threads(), CODES[p.dtype], *tensors, rows, keys, scale)
    return dp


class _CausalAttention(torch.autograd.Function):
    """q (B, T, H, D), k and v (B, T, K, D), in any order in memory but for D -> (B, T, H, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, kernels: Any) -> Tensor:
        B, T, H, D = q.shape
        y, sums = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=DTYPES["float32"])
        ctx.shape = kernels.AttentionShape(H, k.size(2), T, D, scale)
        _attend(kernels.attend, kernels, ctx.shape, sums, q, k, v, y)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sums = ctx.saved_tensors
        q, k, v, _ = tensors
        # Queries and keys come from `normed_heads`, which wants the gradients as it gave them; values from a product.
        dq, dk = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k))
        dv = v.new_empty(v.shape)
        _attend(ctx.kernels.attend_back, ctx.kernels, ctx.shape, sums, *tensors, grads[0].contiguous(), dq, dk, dv)
        return dq, dk, dv, None, None


def _attend(function: Any, kernels: Any, shape: Any, sums: Tensor, *tensors: Tensor) -> None:
    views = (kernels.View * len(tensors))(*((t.data_ptr(), t.stride(0), t.stride(2), t.stride(1)) for t in tensors))
    function(torch.get_num_threads(), views, sums.data_ptr(), ctypes.byref(shape), tensors[0].size(0))


def fits_attention(kernels: Any, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if the crate has a kernel for causal attention of q (B, T, H, D), k and v (B, T, K, D)."""
    plain = all(type(x) is Tensor and x.dtype == DTYPES["bfloat16"] and x.stride(3) == 1 for x in (q, k, v))
    (B, T, H, D), K = q.shape, k.size(2)
    return plain and k.shape == v.shape == (B, T, K, D) and H % K == 0 and _fits_tiles(kernels, T, D)


def causal_attention(kernels: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q·kᵀ)·v of each query with the keys up to its own: (B, T, H, D)."""
    y: Tensor = _CausalAttention.apply(q, k, v, scale, kernels)
    return y


class _AttentionBlock(torch.autograd.Function):
    """x (B, T, C) to what the heads have found (B, T, H·D): one product for query, key and value, no copy between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float, scale: float, kernels: Any, *w: Tensor
    ) -> Tensor:
        (B, T, _), D = x.shape, cos.size(-1)
        H, K = w[0].size(0) // D, w[1].size(0) // D
        weight = torch.cat([part.to(x.dtype) for part in w])  # ((H + 2K)·D, C)
        heads = F.linear(x, weight).view(B, T, -1, D)  # (B, T, H + 2K, D): queries, keys, values
        turned = x.new_empty(B, H + K, T, D)
        lengths = x.new_empty(B, H + K, T, dtype=DTYPES["float32"])
        shape = _heads_shape(kernels, (T, H + K, D), cos, sin, H + 2 * K)
        code, tensors = CODES[x.dtype], (t.data_ptr() for t in (heads, turned, lengths))
        kernels.rotary_norm(torch.get_num_threads(), code, code, *tensors, ctypes.byref(shape), B, eps)
        y, sums = x.new_empty(B, T, H, D), x.new_empty(B, H, T, dtype=DTYPES["float32"])
        ctx.shape = kernels.AttentionShape(H, K, T, D, scale)
        _attend(kernels.attend, kernels, ctx.shape, sums, *_parts(turned, heads, H), y)
        ctx.save_for_backward(x, weight, heads, turned, lengths, y, sums, cos, sin)
        ctx.kernels, ctx.dtypes, ctx.rows = kernels, [part.dtype for part in w], [part.size(0) for part in w]
        return y.view(B, T, H * D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, heads, turned, lengths, y, sums, cos, sin = ctx.saved_tensors
        (B, T, H, D), kernels = y.shape, ctx.kernels
        dheads, dturned = torch.empty_like(heads), torch.empty_like(turned)
        dy = grads[0].contiguous().view(y.shape)
        given = *_parts(turned, heads, H), y, dy
        _attend(kernels.attend_back, kernels, ctx.shape, sums, *given, *_parts(dturned, dheads, H))
        shape = _heads_shape(kernels, (T, turned.size(1), D), cos, sin, heads.size(2))
        tensors, code = (t.data_ptr() for t in (turned, dturned, lengths, dheads)), CODES[x.dtype]
        kernels.rotary_norm_back(torch.get_num_threads(), code, code, *tensors, ctypes.byref(shape), B)
        flat = dheads.view(-1, weight.size(0))  # (N, (H + 2K)·D)
        dx = (flat @ weight).view(x.shape)
        dw = (flat.t() @ x.flatten(0, 1)).split(ctx.rows)
        return dx, *(None,) * 5, *(part.to(dtype) for part, dtype in zip(dw, ctx.dtypes, strict=True))


def _parts(turned: Tensor, heads: Tensor, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of H + K turned heads (B, H + K, T, D), and of all heads (B, T, H + 2K, D)."""
    q, k = turned[:, :H], turned[:, H:]
    return q.transpose(1, 2), k.transpose(1, 2), heads[:, :, turned.size(1) :]


def attention_by_tiles(
    kernels: Any, x: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float, scale: float
) -> Tensor | None:
    """What causal attention finds in x (B, T, C), (B, T, H·D); None where the crate has no kernel for it.

    Args:
        kernels: from `kernels_for`, for all tensors here.
        x: the normed stream in bfloat16.
        weights: of query (H·D, C), key and value (K·D, C).
        cos: of the positions, (1 or B, T, 1, D).
        sin: the same.
        eps: of the heads' norm.
        scale: on the products of queries and keys.
    """
    (B, T, _), D = x.shape, cos.size(-1)
    if not (x.dtype == DTYPES["bfloat16"] and D <= LARGEST_HEAD and _fits_tiles(kernels, T, D)):
        return None
    sizes = {w.size(0) for w in weights[1:]}
    if len(sizes) > 1 or any(w.size(0) % D for w in weights) or weights[0].size(0) % max(sizes):
        return None
    table = (cos.size(0), T, 1, D)
    if any(t.dtype != DTYPES["float32"] or t.shape != table for t in (cos, sin)) or cos.size(0) not in (1, B):
        return None
    y: Tensor = _AttentionBlock.apply(x, cos, sin, eps, scale, kernels, *weights)
    return y


def cross_entropy_(kernels: Any, z: Tensor, targets: Tensor, vocab_size: int, cap: float | None) -> Tensor:
    """Losses (n,) of z (n, V) as `loss._chunks` gives it; z becomes its gradient. `targets` (n,) int64, −1 ignored.

    Raises: ValueError for a target that is no token.
    """
    if (largest := int(targets.max())) >= vocab_size:
        raise ValueError(f"target {largest} is not in the vocabulary of {vocab_size} tokens")
    losses = z.new_empty(z.size(0), dtype=DTYPES["float32"])
    tensors = (t.data_ptr() for t in (z, targets, losses))
    sizes = z.size(0), z.size(1), vocab_size
    kernels.loss(torch.get_num_threads(), CODES[z.dtype], *tensors, *sizes, cap or 0.0)
    return losses


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def muon_look_ahead(
    kernels: Any,
    grads: Sequence[Tensor],
    momentum: Tensor,
    multiplier: float,
    beta: float,
    equalize: bool,
    safety: float,
    dtype: torch.dtype,
) -> Tensor:
    """Nesterov's momentum (N, R, C) with the Frobenius norm 1/safety, in `dtype`; updates the momentum (N, R, C).

    Args:
        kernels: from `kernels_for`, for gradients and momentum.
        grads: float32, N times (R, C).
        momentum: float32.
        multiplier: on the gradients.
        beta: share of the momentum that stays.
        equalize: give every row the length 1 first.
        safety: what the norm is multiplied with.
        dtype: of the result.
    """
    y = momentum.new_empty(momentum.shape, dtype=dtype)
    tensors = _addresses(grads), momentum.data_ptr(), y.data_ptr()
    numbers = multiplier, beta, int(equalize), safety
    kernels.muon_look_ahead(torch.get_num_threads(), CODES[dtype], *tensors, *momentum.shape, *numbers)
    return y


def muon_products(kernels: Any, x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor | None:
    """`muon.newton_schulz` of x (N, R, C), also of tall matrices; None where torch should multiply.

    Args:
        kernels: from `kernels_for`, for x.
        x: contiguous, singular values at most 1.
        coefficients: (a, b, c) of each iteration.
    """
    (N, R, C), count = x.shape, len(coefficients)
    # A matrix is the work of one thread; torch can share it among many. Their sums may differ in the last digit.
    if x.dtype != DTYPES["bfloat16"] or not _fits_tiles(kernels, R, C) or torch.get_num_threads() > 2 * N:
        return None
    numbers = (ctypes.c_float * (3 * count))(*itertools.chain(*coefficients))
    y = torch.empty_like(x)
    kernels.muon_orthogonalize(torch.get_num_threads(), x.data_ptr(), y.data_ptr(), N, R, C, numbers, count)
    return y


def muon_apply(
    kernels: Any,
    params: Sequence[Tensor],
    update: Tensor,
    moment: Tensor | None,
    beta2: float,
    rate: float,
    decay: float,
    cautious: bool,
) -> None:
    """p -= rate·update + decay·p for N params (R, C), with NorMuon's normalisation where there is a second moment.

    Args:
        kernels: from `kernels_for`, for params and update.
        params: float32, changed in place.
        update: (N, R, C), contiguous.
        moment: (N, R, 1) or (N, 1, C), float32, updated; None: the update is taken as it is.
        beta2: share of the moment that stays.
        rate: the learning rate.
        decay: the share of a weight that goes.
        cautious: decay only where the update shrinks the weight too.
    """
    by_rows = moment is not None and moment.size(-1) == 1
    tensors = update.data_ptr(), _addresses(params), _address(moment)
    sizes = update.size(0), int(by_rows), *update.shape[1:]
    numbers = beta2, rate, decay, int(cautious)
    kernels.muon_apply(torch.get_num_threads(), CODES[update.dtype], *tensors, *sizes, *numbers)
