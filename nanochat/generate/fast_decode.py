"""One token per row, as fast as torch allows: the same arithmetic as nanochat.gpt, laid out for decoding.

A decode step reads every weight once and computes next to nothing with it, so what counts is how many bytes the weights
have, how fast they are read (nanochat.generate.decode_linear) and how many small operations surround them. Compared
with the model's own forward pass this one has the weights in the dtype they are multiplied in (autocast would convert
all of them for every token), query, key and value as one matmul, queries and keys rotated and normalised together,
residuals added by the matmul, places in the cache found for all layers at once, and no module calls.

`weights` may also be smaller than the run's precision: "bfloat16" halves the bytes of float32, "int8" quarters them
(a scale per output channel, activations in bfloat16; CPU only). Only decoding changes: prompts are read by the model.

Shapes: B rows, C channels, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.generate.decode_linear import Int8Linear, Linear, best_form
from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import (
    BIGRAM_HASH,
    GPT,
    LOGIT_SOFTCAP,
    MLP,
    NORM_EPS,
    SMEAR_GATE_CHANNELS,
    VALUE_GATE_CHANNELS,
    Attention,
)
from nanochat.ops.cpu import ThreadChoice
from nanochat.ops.linear import Linear as ModelLinear
from nanochat.precision import DTYPES, NARROW_RANGE, Precision

Weights = Literal["auto", "model", "bfloat16", "int8"]
"""auto: those of the run's precision. model: the model's own forward pass, not this module. bfloat16, int8: smaller."""

# Per layer (C -> query, key, value), (C -> C), (C -> 4C), (4C -> C); and the lm_head.
_Matrices = tuple[list[tuple[Linear, Linear, Linear, Linear]], Linear]


def is_supported(model: GPT) -> bool:
    """Whether this module knows the model's arithmetic: every switch but windows, and nothing overridden.

    Nor a LoRA, whose matrices can't be kept in another form: a fused AdamW step leaves no trace that `refresh` sees.
    """
    named = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    plain = all(type(block.get_submodule(name)) is ModelLinear for block in model.blocks for name in named)
    return type(model) is GPT and plain and all(window is None for window in model.config.windows)


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
        raise ValueError(f"weights={weights} does not work for models with windows or a LoRA: leave it at auto")
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
        self.device = model.get_device().type
        self._seen: list[tuple[int, int]] | None = None
        self._forms: dict[Callable[[Tensor], Linear], _Matrices] = {}
        self._threads: dict[int, ThreadChoice] = {}

    def refresh(self) -> FastDecoder:
        """Take the model's weights as they are now, if they have changed."""
        model = self.model
        now = [(p.data_ptr(), p._version) for p in model.parameters()]
        if now != self._seen:
            self._forms.clear()
            self._seen = now
            # The rotation mixes a head's halves: x·cos + (halves swapped)·sin.
            self._cos, self._sin = model.cos[:, None, None], model.sin[:, None, None]  # (T, 1, 1, D)
            self._wte = model.wte.weight.detach()
            self._take_switches()
        return self

    @torch.no_grad()
    def _take_switches(self) -> None:
        """The parameters of the switches that are on; scalars as numbers, which cost no operation."""
        model, c, dtype = self.model, self.model.config, self.dtype
        self._scalars = [(1.0, 0.0)] * c.n_layer
        if c.residual_scalars:
            self._scalars = list(zip(model.resid_lambdas.tolist(), model.x0_lambdas.tolist(), strict=True))
        attention = [cast(Attention, block.attn) for block in model.blocks]
        self._scales = [a.scale for a in attention]
        # By layer: the value embeddings (V, K·D) and their gate (K, channels), or None.
        self._values: list[tuple[Tensor, Tensor] | None] = [
            None if gate is None else (model.value_embed(i).detach(), gate.weight.to(dtype))
            for i, gate in enumerate(a.ve_gate for a in attention)
        ]
        self._smear_gate = model.smear_gate.weight.to(dtype) if c.smear else None
        self._smear = float(model.smear_lambda) if c.smear else 0.0
        self._backout = float(model.backout_lambda) if c.backout else 0.0

    def _matrices(self, rows: int) -> _Matrices:
        """The weights in the form for this many rows."""
        form: Callable[[Tensor], Linear] = Int8Linear if self.int8 else best_form(rows, self.device, self.dtype)
        if form not in self._forms:
            self._forms[form] = self._take_weights(form)
        return self._forms[form]

    @torch.no_grad()
    def _take_weights(self, form: Callable[[Tensor], Linear]) -> _Matrices:
        model, dtype = self.model, torch.float32 if self.int8 else self.dtype
        layers = []
        for block in model.blocks:
            a, m = cast(Attention, block.attn), cast(MLP, block.mlp)
            qkv = torch.cat([a.c_q.weight, a.c_k.weight, a.c_v.weight])  # (C + 2·K·D, C)
            q, o, f, p = (form(w.detach().to(dtype)) for w in (qkv, a.c_proj.weight, m.c_fc.weight, m.c_proj.weight))
            layers.append((q, o, f, p))
        return layers, form(model.lm_head.weight.detach()[: model.config.vocab_size].to(dtype))

    @torch.inference_mode()
    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Run token ids (B, 1) on the cache's selected rows; return softcapped float32 logits (B, V)."""
        self._matrices(idx.size(0))  # made with all threads
        with self._threads.setdefault(idx.size(0).bit_length(), ThreadChoice(self.device))():
            return self._decode(idx, cache)

    def _decode(self, idx: Tensor, cache: KVCache) -> Tensor:
        c, dtype = self.model.config, self.dtype
        B, H, K, D = idx.size(0), c.n_head, c.n_kv_head, c.head_dim
        cos, sin = self._rotation(cache)  # (1 or B, 1, 1, D)
        places = cache.decode_views()
        mask = _additive_mask(cache.attention_mask(), cache.k_cache.dtype)  # (B, 1, 1, all) or None
        x = x0 = self._embed(idx[:, 0], cache)  # (B, C)
        middle: Tensor | None = None
        heads, attend_in = H + K, cache.k_cache.dtype
        layers, lm_head = self._matrices(B)
        for layer, (to_qkv, to_out, to_hidden, to_residual) in enumerate(layers):
            if c.residual_scalars:
                keep, again = self._scalars[layer]
                x = x * keep + x0 * again
            inputs = self._norm(x).to(dtype)
            qkv = to_qkv(inputs).view(B, 1, heads + K, D)
            qk, v = qkv[:, :, :heads].to(cos.dtype), qkv[:, :, heads:]
            if (embedded := self._values[layer]) is not None:
                v = v + self._gated_value(idx[:, 0], inputs, *embedded).view(B, 1, K, D)
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin)
            qk = torch.rms_norm(qk, (D,), eps=NORM_EPS).to(dtype)  # (B, 1, H + K, D)
            if places is not None:
                place = places[layer]
                place.put(qk[:, :, H:], v)
                keys, values = place.keys, place.values
            else:
                keys, values = cache.update(layer, qk[:, :, H:].to(attend_in), v.to(attend_in))  # (B, all, K, D)
                keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            # The queries that share a key/value head stand in the place of positions: none is repeated in memory.
            q = qk[:, 0, :H].view(B, K, H // K, D).to(attend_in)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self._scales[layer])
            x = to_out.add(y.reshape(B, H * D).to(dtype), x)
            h = to_hidden.relu(self._norm(x).to(dtype))  # (B, 4C)
            x = self._add_mlp(x, h, to_residual)
            if layer == c.n_layer // 2 and c.backout:
                middle = x
        if middle is not None:
            x = x - middle * self._backout
        cache.advance(1)
        logits = lm_head(self._norm(x).to(dtype))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.div_(LOGIT_SOFTCAP).tanh_().mul_(LOGIT_SOFTCAP)

    def _embed(self, idx: Tensor, cache: KVCache) -> Tensor:
        """The normalised embedding of tokens (B,), with what the switches take from the token before: (B, C)."""
        c = self.model.config
        x = self._normed_wte(idx)
        if not (c.smear or c.bigram_buckets):
            return x
        before = cache.previous_tokens(idx.unsqueeze(1))[:, 0]  # (B,)
        plain = x
        if c.bigram_buckets:
            bucket = (BIGRAM_HASH[0] * idx + BIGRAM_HASH[1] * (before + 1)) % c.bigram_buckets
            x = x + F.embedding(bucket, self.model.bigram.weight).to(x.dtype)
        if self._smear_gate is not None:
            gate = torch.sigmoid(F.linear(plain[:, :SMEAR_GATE_CHANNELS].to(self.dtype), self._smear_gate))
            gate = (gate * self._smear).masked_fill((before < 0).unsqueeze(1), 0.0)  # (B, 1)
            x = x + gate.to(x.dtype) * self._normed_wte(before.clamp(min=0))
        return x

    def _normed_wte(self, idx: Tensor) -> Tensor:
        x = F.embedding(idx, self._wte)  # (B, C)
        return self._norm(x if self.dtype in NARROW_RANGE else x.to(self.dtype))

    @staticmethod
    def _gated_value(idx: Tensor, x: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        """What the tokens' value embeddings add to the values, (B, K, D)."""
        share = 3.0 * torch.sigmoid(F.linear(x[:, :VALUE_GATE_CHANNELS], gate))  # (B, K)
        value = F.embedding(idx, table).to(x.dtype)  # (B, K·D)
        return share.unsqueeze(-1) * value.view(*share.shape, -1)

    def _rotation(self, cache: KVCache) -> tuple[Tensor, Tensor]:
        """cos and sin at the rows' positions, (1 or B, 1, 1, D)."""
        positions = cache.positions(1)[:, 0]
        if positions.size(0) == 1:
            p = cache.get_pos()
            return self._cos[p : p + 1], self._sin[p : p + 1]
        return self._cos[positions], self._sin[positions]

    def _add_mlp(self, x: Tensor, h: Tensor, linear: Linear) -> Tensor:
        """x + relu² · weightᵀ; in float16 with the row scaled so that the square can't overflow, as in gpt.MLP."""
        if h.dtype not in NARROW_RANGE:
            return linear.add(h.mul_(h), x)
        peak = h.amax(dim=-1, keepdim=True).float()
        exponent = torch.ceil(torch.log2(peak.clamp(min=1.0) / 128)).clamp(min=0)
        h = h * torch.exp2(-exponent).to(h.dtype)
        return x + linear(h * h).float() * torch.exp2(2 * exponent)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        """RMSNorm in the dtype of `x`."""
        if x.size(0) == 1 and x.device.type == "cpu" and x.dtype == torch.float32:
            # torch puts this together from six operations; for one row two and a number will do.
            mean = float(torch.dot(x[0], x[0])) / x.size(-1)
            return x * (mean + NORM_EPS) ** -0.5
        return torch.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def _additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to the scores, made once: attention would turn a bool mask into one in every layer."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
