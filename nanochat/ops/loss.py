"""Cross entropy of an lm_head, softcapped or not, without ever holding all the logits.

Computed plainly, logits and loss keep 16 bytes per logit between forward and backward: 16 GiB for 8 × 2048 tokens and a
vocabulary of 65536. Here one chunk of tokens at a time gets its logits, its loss and at once its gradient; then the
logits are dropped. The softmax is float32. Gradients are those of a loss with weight 1, multiplied by the incoming
gradient at the end, so that a loss scaler's factor can't overflow inside.

Shapes: N tokens, n of them in a part of a chunk, C channels, V rows of lm_head, of which vocab_size are real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanochat.ops import native

# Memory for the logits of one chunk, counted as float32.
CHUNK_BYTES = {"cpu": 128 << 20}
CHUNK_BYTES_DEFAULT = 256 << 20
# A chunk's part of dW is a sum over its tokens. In float16 one over more unscaled gradients could overflow. A guess.
MOST_CHUNK_TOKENS = 8192
# So many bytes of a chunk's logits go through everything between the matmuls at once: they stay in a CPU's caches.
PASS_BYTES = {"cpu": 2 << 20}
FEWEST_PASS_TOKENS = 32
# Of tokens with a target a multiple of this is taken. For each new size oneDNN writes programs and keeps a thousand of
# them: with any number a step took a fifth longer, and a run grew by a GB (dev/LOG.md).
ROWS_STEP = 128


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap·tanh(logits/cap): keeps every logit inside ±cap (Gemma 2, arXiv 2408.00118). None: the logits as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def chunk_tokens(device_type: str, vocab: int, chunk_bytes: int | None = None) -> tuple[int, int]:
    """Tokens of a chunk, whose logits are held at once, and of a part, processed at once between the matmuls."""
    chunk = (chunk_bytes or CHUNK_BYTES.get(device_type, CHUNK_BYTES_DEFAULT)) // (4 * vocab)
    chunk = max(64, min(chunk, MOST_CHUNK_TOKENS))
    if device_type not in PASS_BYTES:
        return chunk, chunk
    return chunk, min(chunk, max(FEWEST_PASS_TOKENS, PASS_BYTES[device_type] // (4 * vocab)))


# With σ the sigmoid, cap·tanh(z/cap) = 2·cap·σ(2·z/cap) − cap, and the constant cancels in a softmax. A CPU is fast at
# σ and 2^x (dev/LOG.md): a tanh takes as long as ten of them. Since 2·cap·σ lies between 0 and 2·cap, no exponential
# can overflow, and the usual pass that subtracts the maximum is not needed.


def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, cap: float | None, chunk_bytes: int | None
) -> Iterator[tuple[slice, Tensor, list[tuple[Tensor, Tensor]]]]:
    """Yield for each chunk its slice of the tokens, 2·z/cap with z = x @ weight.T in the dtype of x, and its parts.

    A part is (2·z/cap, targets) of a few tokens; it is a view of the chunk. Without a cap z takes the place of 2·z/cap.
    """
    n, m = chunk_tokens(x.device.type, weight.size(0), chunk_bytes)
    logits = x.new_empty(min(n, x.size(0)), weight.size(0))  # one memory for the logits of all chunks
    for i in range(0, x.size(0), n):
        chunk = slice(i, min(i + n, x.size(0)))
        # beta=0 overwrites what the chunk before left; alpha is applied in the product, not in a pass of its own.
        alpha = 1.0 if cap is None else 2 / cap
        z = logits[: chunk.stop - i].addmm_(x[chunk], weight.t(), beta=0, alpha=alpha)  # (chunk, V)
        yield chunk, z, list(zip(z.split(m), targets[chunk].split(m), strict=True))


def _softmax(
    z: Tensor, targets: Tensor, vocab_size: int, cap: float | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """From 2·z/cap (n, V): losses (n,), σ and e = exp(2·cap·σ), both (n, V), and the row sums of e (n, 1).

    Without a cap: from z, and e = exp(z − max z) without σ. Overwrites the logits if they are float32 or wider.
    """
    # `to` is no copy for float32: σ then takes the place of the logits, and this holds two (n, V), not three.
    s = z.to(torch.promote_types(z.dtype, torch.float32))
    if cap is None:
        s[:, vocab_size:] = -math.inf  # padding rows of lm_head have no probability
        e = s.sub_(s.amax(dim=1, keepdim=True))  # nothing bounds these logits: exp of the largest might overflow
        target = e.gather(1, targets.clamp(min=0)[:, None])
        e = e.mul_(1 / math.log(2)).exp2_()
        sums = e.sum(dim=1, keepdim=True)
        return torch.where(targets >= 0, (sums.log() - target)[:, 0], 0.0), None, e, sums
    s.sigmoid_()
    e = torch.mul(s, 2 * cap / math.log(2)).exp2_()  # exp(u) = 2^(u/ln 2)
    if e.size(1) > vocab_size:
        e[:, vocab_size:] = 0.0  # padding rows of lm_head have no probability
    sums = e.sum(dim=1, keepdim=True)
    target = 2 * cap * s.gather(1, targets.clamp(min=0)[:, None])
    # −log softmax = log Σe − 2·cap·σ of the target; an ignored one (−1, gathered as 0) counts nothing.
    losses = torch.where(targets >= 0, (sums.log() - target)[:, 0], 0.0)
    return losses, s, e, sums


def _gradient(s: Tensor | None, e: Tensor, sums: Tensor, targets: Tensor) -> Tensor:
    """d loss / d z (n, V), in the memory of e; overwrites s.

    dz = (softmax − onehot)·4·σ·(1 − σ) = (e − sums·onehot)·(σ − σ²)·4/sums, and 0 where there is no target. Without a
    cap there is no σ: dz = (e − sums·onehot)/sums.
    """
    e.scatter_add_(1, targets.clamp(min=0)[:, None], -sums)  # e − sums·onehot
    if s is None:
        return e.mul_((targets >= 0)[:, None] / sums)
    e.mul_(s.addcmul_(s, s, value=-1))  # σ − σ², a quarter of the softcap's derivative
    return e.mul_((targets >= 0)[:, None] * 4.0 / sums)


def _losses(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None, chunk_bytes: int | None
) -> Tensor:
    """(N,) losses without gradients."""
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
        cap: float | None,
        chunk_bytes: int | None,
        need_grad: bool,
        kernels: Any,
    ) -> Tensor:
        # x (N, C) in the compute dtype; master (V, C) float32, so that dW is summed and returned in float32.
        weight, num_tokens = master.to(x.dtype), x.size(0)
        rows = _rows_with_targets(targets)
        if rows is not None:
            spare = -len(rows) % ROWS_STEP
            x, targets = x.index_select(0, F.pad(rows, (0, spare))), F.pad(targets[rows], (0, spare), value=-1)
        if not need_grad:
            return _losses(x, weight, targets, vocab_size, cap, chunk_bytes).sum()
        high = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=high, device=x.device)
        dx, dw = torch.empty_like(x), torch.zeros(weight.shape, dtype=high, device=x.device)
        for chunk, dz, parts in _chunks(x, weight, targets, cap, chunk_bytes):
            if kernels is not None:
                total += native.cross_entropy_(kernels, dz, targets[chunk], vocab_size, cap).sum()
                parts = []
            for zc, tc in parts:  # part by part, the logits are overwritten with their gradient
                losses, s, e, sums = _softmax(zc, tc, vocab_size, cap)
                total += losses.sum()
                zc.copy_(_gradient(s, e, sums, tc))
            dx[chunk] = dz @ weight  # (chunk, V) @ (V, C)
            if x.dtype == high:  # adds inside the product; from 16 bits each chunk's part is first made in 16
                dw.addmm_(dz.t(), x[chunk])
            else:
                dw += dz.t() @ x[chunk]
        if rows is not None:
            dx = dx.new_zeros(num_tokens, dx.size(1)).index_copy_(0, rows, dx[: len(rows)])
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Only these two wait for the backward pass, N·C and V·C numbers, in place of N·V logits.
        dx, dw = ctx.saved_tensors
        return dx.to(grads[0].dtype) * grads[0], dw * grads[0], None, None, None, None, None, None


def _rows_with_targets(targets: Tensor) -> Tensor | None:
    """Which of the tokens have a target, where some do and some don't: in a chat half need no logits."""
    # A card would have to be waited for to know how many they are.
    if targets.device.type != "cpu":
        return None
    rows = (targets >= 0).nonzero()[:, 0]
    return rows if len(rows) > 0 and len(rows) + -len(rows) % ROWS_STEP < len(targets) else None


def _losses_each(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float | None, chunk_bytes: int | None
) -> Tensor:
    """(N,) losses by plain autograd, each chunk recomputed in the backward pass.

    For RL: each token's loss gets a weight of its own later, so the gradient can't be formed in the forward pass.
    """

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
    cap: float | None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Cross entropy of `softcap(x @ weight.T)` with `targets`. Runs outside torch.compile (see Trainer).

    Args:
        x: (…, C) hidden states.
        weight: (V, C) rows of lm_head, padding included.
        targets: (…) ids, −1 is ignored.
        vocab_size: the real number of tokens, at most V.
        cap: the softcap; None for none.
        reduction: "mean" over the targets that count (NaN if there is none), "sum", or "none" -> (…).
        dtype: the matmuls' dtype (default: that of x).
        chunk_bytes: memory for the logits of one chunk, counted as float32 (default: by the device).
    """
    dtype = dtype or x.dtype
    flat = x.reshape(-1, x.size(-1)).to(dtype)
    t = targets.reshape(-1)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are chosen here
        if reduction == "none" and torch.is_grad_enabled():
            return _losses_each(flat, weight.to(dtype), t, vocab_size, cap, chunk_bytes).view(targets.shape)
        if reduction == "none":
            return _losses(flat, weight.to(dtype), t, vocab_size, cap, chunk_bytes).view(targets.shape)
        # ctx.needs_input_grad would be true under no_grad too, and an evaluation would pay for gradients.
        need_grad = torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad)
        # The kernel reads the targets' memory as it is.
        readable = t.dtype == torch.int64 and t.device == flat.device and t.is_contiguous()
        kernels = native.kernels_for(flat) if (cap or 0.0) <= native.LARGEST_CAP and readable else None
        total: Tensor = _SummedLoss.apply(flat, weight, t, vocab_size, cap, chunk_bytes, need_grad, kernels)
    return total if reduction == "sum" else total / (t >= 0).sum()
