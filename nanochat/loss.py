"""Cross entropy of a softcapped lm_head without ever holding all the logits.

Plain logits → loss keeps 16 bytes per logit between forward and backward: 16 GiB for 8 × 2048 tokens and a vocabulary
of 65536. Here a chunk of tokens at a time gets its logits, its loss and its gradient, and the logits are dropped. The
softmax is float32. Gradients are formed for a loss of weight 1 and multiplied by the incoming gradient at the end, so
that a loss scaler's factor can't overflow inside.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Memory for the float32 logits of one chunk. A CPU is faster when they stay near its caches.
CHUNK_BYTES = {"cpu": 4 << 20}
CHUNK_BYTES_DEFAULT = 256 << 20
# A float16 sum of more unscaled gradients could overflow, with a small vocabulary. A guess.
MOST_CHUNK_TOKENS = 8192


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap·tanh(logits/cap): keeps every logit inside ±cap (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(logits / cap)


def _chunk_tokens(device: torch.device, vocab: int, chunk_bytes: int | None = None) -> int:
    tokens = (chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES_DEFAULT)) // (4 * vocab)
    return max(64, min(tokens, MOST_CHUNK_TOKENS))


def _chunk_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, cap: float) -> tuple[Tensor, ...]:
    """One chunk: losses (n,), t (n, V) with softcapped logits cap·t, e = exp(cap·t) and its row sums (n, 1).

    The softcap bounds every logit, so the exponentials can't overflow and no maximum needs to be subtracted.
    """
    high = torch.promote_types(x.dtype, torch.float32)
    t = (x @ weight.t()).to(high).div_(cap).tanh_()
    e = torch.mul(t, cap).exp_()
    if t.size(1) > vocab_size:
        e[:, vocab_size:] = 0.0  # padding rows of lm_head have no probability
    sums = e.sum(dim=1, keepdim=True)
    target_t = t.gather(1, targets.clamp(min=0)[:, None])
    losses = torch.where(targets >= 0, (sums.log() - cap * target_t)[:, 0], 0.0)
    return losses, t, e, sums


def _chunk_gradient(t: Tensor, e: Tensor, sums: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """d loss / d logits of one chunk as rows × matrix: r (n, 1) and m (n, V); reuses the memory of e and t.

    dz = (softmax − onehot)·(1 − t²) = r·m with r = valid / sums and m = (e − sums·onehot)·(1 − t²): dividing the rows
    is left to the much smaller neighbours of m in the two matmuls.
    """
    e.scatter_add_(1, targets.clamp(min=0)[:, None], -sums)
    t.mul_(t)
    return (targets >= 0)[:, None] / sums, e.addcmul_(e, t, value=-1)


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
        high = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=high, device=x.device)
        dx = torch.empty_like(x) if need_grad else None
        dw = torch.zeros(weight.shape, dtype=high, device=x.device) if need_grad else None
        n = _chunk_tokens(x.device, weight.size(0), chunk_bytes)
        for i in range(0, x.size(0), n):
            xc, tc = x[i : i + n], targets[i : i + n]
            losses, t, e, sums = _chunk_loss(xc, weight, tc, vocab_size, cap)
            total += losses.sum()
            if dx is None or dw is None:
                continue
            rows, dz = _chunk_gradient(t, e, sums, tc)
            if x.dtype == high:
                dx[i : i + n] = (dz @ weight).mul_(rows)
                dw.addmm_(dz.t(), xc * rows)
            else:
                dz16 = dz.mul_(rows).to(x.dtype)  # the exponentials alone would overflow float16
                dx[i : i + n] = dz16 @ weight
                dw += dz16.t() @ xc
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

    n = _chunk_tokens(x.device, weight.size(0), chunk_bytes)
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
        chunk_bytes: memory for the float32 logits of one chunk (default: by the device).
    """
    dtype = dtype or x.dtype
    flat = x.reshape(-1, x.size(-1)).to(dtype)
    t = targets.reshape(-1)
    with torch.autocast(x.device.type, enabled=False):
        if reduction == "none" and torch.is_grad_enabled():
            return _losses_each(flat, weight.to(dtype), t, vocab_size, cap, chunk_bytes).view(targets.shape)
        if reduction == "none":
            w = weight.to(dtype)
            n = _chunk_tokens(x.device, w.size(0), chunk_bytes)
            parts = [
                _chunk_loss(flat[i : i + n], w, t[i : i + n], vocab_size, cap)[0] for i in range(0, flat.size(0), n)
            ]
            return torch.cat(parts).view(targets.shape)
        # ctx.needs_input_grad would be true under no_grad too, and an evaluation pay for gradients.
        need_grad = torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad)
        total: Tensor = _SummedLoss.apply(flat, weight, t, vocab_size, cap, chunk_bytes, need_grad)
    return total if reduction == "sum" else total / (t >= 0).sum()
