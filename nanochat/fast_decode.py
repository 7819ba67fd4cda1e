"""One token per row, as fast as plain torch allows: the same arithmetic as nanochat.gpt, laid out for decoding.

A decode step reads every weight once and computes next to nothing with it, so what counts is how many bytes the weights
have and how many small operations surround them. Compared with the model's own forward pass this one has the weights in
the dtype they are multiplied in (autocast would convert all of them for every token), query, key and value as one
matmul, queries and keys rotated and normalised together, residuals added by the matmul, and no module calls.

`weights` may also be smaller than the run's precision: "bfloat16" halves the bytes of float32, "int8" quarters them
(a scale per output channel, activations in bfloat16; CPU only). Only decoding changes: prompts are read by the model.

Shapes: B rows, C channels, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPT, LOGIT_SOFTCAP, MLP, NORM_EPS, Attention, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.loss import softcap
from nanochat.precision import DTYPES, NARROW_RANGE, Precision

Weights = Literal["auto", "model", "bfloat16", "int8"]
"""auto: those of the run's precision. model: the model's own forward pass, not this module. bfloat16, int8: smaller."""


def is_supported(model: GPT) -> bool:
    """Whether this module knows the model's arithmetic: the classic one, without switches, and nothing overridden."""
    c = model.config
    classic = GPTConfig(c.sequence_len, c.vocab_size, c.n_layer, c.n_head, c.n_kv_head, c.n_embd)
    return type(model) is GPT and c == classic


def make_decoder(model: GPT, precision: Precision | None, weights: Weights = "auto") -> FastDecoder | None:
    """A decoder for the model; None where its own forward pass must do.

    Raises:
        ValueError: small weights were asked for, and this model or device can't have them.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    if weights in ("auto", "model") and (weights == "model" or not is_supported(model)):
        return None
    if not is_supported(model):
        raise ValueError(f"weights={weights} works for classic models only: leave it at auto for this one")
    device = model.get_device().type
    if weights == "int8" and (device != "cpu" or not hasattr(torch, "_weight_int8pack_mm")):
        raise ValueError(f"weights=int8 works on a CPU only (here: {device}): use auto or bfloat16")
    dtype = model.lm_head.weight.dtype if precision is None else precision.dtype
    return FastDecoder(model, DTYPES["bfloat16"] if weights in ("bfloat16", "int8") else dtype, weights == "int8")


class FastDecoder:
    """Runs one token per row. Call `refresh` before a generation: the model may have been trained since.

    Args:
        model: whose weights to use.
        dtype: what matmuls run in.
        int8: hold the weights in 8 bits.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, int8: bool = False) -> None:
        self.model, self.dtype, self.int8 = model, dtype, int8
        self._seen: list[tuple[int, int]] | None = None

    def refresh(self) -> FastDecoder:
        """Take the model's weights as they are now, if they have changed."""
        now = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if now != self._seen:
            self._take_weights()
            self._seen = now
        return self

    @torch.no_grad()
    def _take_weights(self) -> None:
        model, c = self.model, self.model.config
        self._layers: list[tuple[Any, Any, Any, Any]] = []
        for block in model.blocks:
            a, m = cast(Attention, block.attn), cast(MLP, block.mlp)
            qkv = torch.cat([a.c_q.weight, a.c_k.weight, a.c_v.weight])  # (C + 2·K·D, C)
            layer = (qkv, a.c_proj.weight, m.c_fc.weight, m.c_proj.weight)
            self._layers.append(tuple(self._pack(w) for w in layer))
        self._lm_head = self._pack(model.lm_head.weight[: c.vocab_size])
        # The rotation mixes a head's halves: x·cos + (halves swapped)·sin.
        self._cos, self._sin = model.cos[:, None, None], model.sin[:, None, None]  # (T, 1, 1, D)

    def _pack(self, weight: Tensor) -> Any:
        """A weight (out, in) in the form that `_linear` multiplies with: (in, out), or in 8 bits with its scales."""
        if not self.int8:
            w = weight.detach().to(self.dtype).t()
            # For a few rows MKL reads a wide float32 matrix up to twice as fast when it is contiguous this way round.
            wide = w.device.type == "cpu" and self.dtype == torch.float32 and w.size(1) >= w.size(0)
            return w.contiguous() if wide else w
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        scale = scale.to(DTYPES["bfloat16"])
        packed = (weight / scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
        return packed, scale

    def _linear(self, x: Tensor, weight: Any) -> Tensor:
        if self.int8:
            return torch._weight_int8pack_mm(x, *weight)
        return torch.mm(x, weight)

    def _add_linear(self, residual: Tensor, x: Tensor, weight: Any) -> Tensor:
        """residual + x · weightᵀ."""
        if self.int8 or residual.dtype != x.dtype:
            return residual + self._linear(x, weight)
        return torch.addmm(residual, x, weight)

    @torch.inference_mode()
    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Run token ids (B, 1) on the cache's selected rows; return softcapped float32 logits (B, V)."""
        c = self.model.config
        B, H, K, D = idx.size(0), c.n_head, c.n_kv_head, c.head_dim
        positions = cache.positions(1)[:, 0]  # (1 or B,)
        cos, sin = self._cos[positions], self._sin[positions]  # (1 or B, 1, 1, D)
        mask = _additive_mask(cache.attention_mask(), cache.k_cache.dtype)  # (B, 1, 1, all) or None
        x = self.model.wte.weight[idx[:, 0]]  # (B, C)
        if self.dtype not in NARROW_RANGE:
            x = x.to(self.dtype)
        x = self._norm(x)
        heads, attend_in = H + K, cache.k_cache.dtype
        for layer, (qkv_weight, out_weight, fc_weight, proj_weight) in enumerate(self._layers):
            qkv = self._linear(self._norm(x).to(self.dtype), qkv_weight).view(B, 1, heads + K, D)
            qk = qkv[:, :, :heads].to(cos.dtype)
            qk = self._norm(torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin))  # (B, 1, H + K, D)
            qk, v = qk.to(self.dtype).to(attend_in), qkv[:, :, heads:].to(attend_in)
            keys, values = cache.update(layer, qk[:, :, H:], v)  # (B, all, K, D)
            # The queries that share a key/value head stand in the place of positions: none is repeated in memory.
            q = qk[:, 0, :H].view(B, K, H // K, D)
            y = F.scaled_dot_product_attention(q, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
            x = self._add_linear(x, y.reshape(B, H * D).to(self.dtype), out_weight)
            h = self._linear(self._norm(x).to(self.dtype), fc_weight).relu_()  # (B, 4C)
            x = self._add_mlp(x, h, proj_weight)
        cache.advance(1)
        logits = self._linear(self._norm(x).to(self.dtype), self._lm_head)
        return softcap(logits.to(torch.promote_types(logits.dtype, torch.float32)), LOGIT_SOFTCAP)

    def _add_mlp(self, x: Tensor, h: Tensor, weight: Any) -> Tensor:
        """x + relu² · weightᵀ; in float16 with the row scaled so that the square can't overflow, as in gpt.MLP."""
        if h.dtype not in NARROW_RANGE:
            return self._add_linear(x, h.mul_(h), weight)
        peak = h.amax(dim=-1, keepdim=True).float()
        exponent = torch.ceil(torch.log2(peak.clamp(min=1.0) / 128)).clamp(min=0)
        h = h * torch.exp2(-exponent).to(h.dtype)
        return x + self._linear(h * h, weight).float() * torch.exp2(2 * exponent)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        """RMSNorm in the dtype of `x`."""
        return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def _additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to the scores, made once: attention would turn a bool mask into one in every layer."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
