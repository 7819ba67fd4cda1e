"""Cross entropy of a softcapped lm_head without ever holding all the logits.

Plain logits → loss keeps 16 bytes per logit between forward and backward: 16 GiB for 8 × 2048 tokens and a vocabulary
of 65536. Here a chunk of tokens at a time gets its logits, its loss and its gradient, and the logits are dropped. The
softmax is float32. Gradients are formed for a loss of weight 1 and multiplied by the incoming gradient at the end, so
that a loss scaler's factor can't overflow inside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Memory for the logits of one chunk, counted as float32.
CHUNK_BYTES = {"cpu": 128 << 20}
CHUNK_BYTES_DEFAULT = 256 << 20
# A float16 sum of more unscaled gradients could overflow, with a small vocabulary. A guess.
MOST_CHUNK_TOKENS = 8192
# Everything between the matmuls takes so much of a chunk at a time: a CPU is faster when that stays in its caches.
PASS_BYTES = {"cpu": 2 << 20}
FEWEST_PASS_TOKENS = 32


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap): keeps every logit inside ±cap (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap)


def chunk_tokens(device_type: str, vocab: int, chunk_bytes: int | None = None) -> tuple[int, int]:
    """Tokens whose logits are held at once, and how many of them are between the matmuls at once."""
    chunk = (chunk_bytes or CHUNK_BYTES.get(device_type, CHUNK_BYTES_DEFAULT)) // (4 * vocab)
    chunk = max(64, min(chunk, MOST_CHUNK_TOKENS))
    if device_type not in PASS_BYTES:
        return chunk, chunk
    return chunk, min(chunk, max(FEWEST_PASS_TOKENS, PASS_BYTES[device_type] // (4 * vocab)))


# With σ the sigmoid, cap·tanh(z/cap) = 2·cap·σ(2·z/cap) − cap, and the constant cancels in a softmax. σ and 2^x are
# what a CPU is fast at (dev/LOG.md): a tanh takes as long as ten of them. 2·cap·σ is at least 0 and at most 2·cap, so
# that no exponential can overflow and no maximum needs to be subtracted.


def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float, chunk_bytes: int | None
) -> Iterator[tuple[slice, Tensor, list[tuple[Tensor, Tensor]]]]:
    """Tokens of a chunk, 2·z/cap of their logits z = x @ weight.T in the dtype of x, and that and the targets in parts.

    The logits of the next chunk take the same memory.
    """
    n, m = chunk_tokens(x.device.type, weight.size(0), chunk_bytes)
    logits = x.new_empty(min(n, x.size(0)), weight.size(0))
    for i in range(0, x.size(0), n):
        chunk = slice(i, min(i + n, x.size(0)))
        z = logits[: chunk.stop - i].addmm_(x[chunk], weight.t(), beta=0, alpha=2 / cap)
        yield chunk, z, list(zip(z.split(m), targets[chunk].split(m), strict=True))


def _softmax(z: Tensor, targets: Tensor, vocab_size: int, cap: float) -> tuple[Tensor, ...]:
    """Of 2·z/cap (n, V): losses (n,), σ and e = exp(2·cap·σ), both (n, V), and its row sums (n, 1).

    Overwrites the logits if they are float32 or wider.
    """
    s = z.to(torch.promote_types(z.dtype, torch.float32)).sigmoid_()
    e = torch.mul(s, 2 * cap / math.log(2)).exp2_()
    if e.size(1) > vocab_size:
        e[:, vocab_size:] = 0.0  # padding rows of lm_head have no probability
    sums = e.sum(dim=1, keepdim=True)
    target = 2 * cap * s.gather(1, targets.clamp(min=0)[:, None])
    losses = torch.where(targets >= 0, (sums.log() - target)[:, 0], 0.0)
    return losses, s, e, sums


def _gradient(s: Tensor, e: Tensor, sums: Tensor, targets: Tensor) -> Tensor:
    """d loss / d z (n, V), in the memory of e; overwrites s.

    dz = (softmax − onehot)·4·σ·(1 − σ) = (e − sums·onehot)·(σ − σ²)·4/sums, and 0 where there is no target.
    """
    e.scatter_add_(1, targets.clamp(min=0)[:, None], -sums)
    e.mul_(s.addcmul_(s, s, value=-1))
    return e.mul_((targets >= 0)[:, None] * 4.0 / sums)


def _losses(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float, chunk_bytes: int | None) -> Tensor:
    """(N,) losses, for which no gradient is formed."""
    chunks = _chunks(x, weight, targets, cap, chunk_bytes)
    return torch.cat([_softmax(zc, tc, vocab_size, cap)[0] for _, _, parts in chunks for zc, tc in parts])


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        master: Tensor,
        targets: Tensor,
        vocab_size: int,
        cap: float,
        chunk_bytes: int | None,
        need_grad: bool,
    ) -> Tensor:
        # x (N, C) in the compute dtype; master (V, C) float32, so that its gradient is never rounded to 16 bits.
        weight = master.to(x.dtype)
        if not need_grad:
            return _losses(x, weight, targets, vocab_size, cap, chunk_bytes).sum()
        high = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=high, device=x.device)
        dx, dw = torch.empty_like(x), torch.zeros(weight.shape, dtype=high, device=x.device)
        for chunk, dz, parts in _chunks(x, weight, targets, cap, chunk_bytes):
            for zc, tc in parts:  # the logits are by and by overwritten with their gradient
                losses, s, e, sums = _softmax(zc, tc, vocab_size, cap)
                total += losses.sum()
                zc.copy_(_gradient(s, e, sums, tc))
            dx[chunk] = dz @ weight
            if x.dtype == high:
                dw.addmm_(dz.t(), x[chunk])
            else:
                dw += dz.t() @ x[chunk]
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        return dx.to(grads[0].dtype) * grads[0], dw * grads[0], None, None, None, None, None


def _losses_each(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float, chunk_bytes: int | None
) -> Tensor:
    """(N,) losses by plain autograd, each chunk recomputed in the backward pass."""
    from torch.utils.checkpoint import checkpoint

    def one(xc: Tensor, tc: Tensor) -> Tensor:
        logits = xc @ weight.t()  # (n, V)
        logits = softcap(logits[:, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32)), cap)
        return torch.nn.functional.cross_entropy(logits, tc, ignore_index=-1, reduction="none")

    n, _ = chunk_tokens(x.device.type, weight.size(0), chunk_bytes)
    chunks = [(x[i : i + n], targets[i : i + n]) for i in range(0, x.size(0), n)]
    return torch.cat([checkpoint(one, xc, tc, use_reentrant=False) for xc, tc in chunks])


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: float,
    reduction: Literal["mean", "sum", "none"] = "mean",
    dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross entropy of `softcap(x @ weight.T)` against `targets`. Runs outside torch.compile (see Trainer).

    Args:
        x: (…, C) hidden states.
        weight: (V, C) rows of lm_head, padding included.
        targets: (…) ids, −1 ignored.
        vocab_size: the real number of tokens, at most V.
        cap: the softcap.
        reduction: "mean" over the targets that count (NaN if there is none), "sum", or "none" -> (…).
        dtype: the matmuls' dtype (default: that of x).
        chunk_bytes: memory for the logits of one chunk, counted as float32 (default: by the device).
    """
    dtype = dtype or x.dtype
    flat = x.reshape(-1, x.size(-1)).to(dtype)
    t = targets.reshape(-1)
    with torch.autocast(x.device.type, enabled=False):
        if reduction == "none" and torch.is_grad_enabled():
            return _losses_each(flat, weight.to(dtype), t, vocab_size, cap, chunk_bytes).view(targets.shape)
        if reduction == "none":
            return _losses(flat, weight.to(dtype), t, vocab_size, cap, chunk_bytes).view(targets.shape)
        # ctx.needs_input_grad would be true under no_grad too, and an evaluation pay for gradients.
        need_grad = torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad)
        total: Tensor = _SummedLoss.apply(flat, weight, t, vocab_size, cap, chunk_bytes, need_grad)
    return total if reduction == "sum" else total / (t >= 0).sum()
