"""One token per sequence, as fast as torch allows: the same arithmetic as nanochat.gpt, laid out for decoding.

A decode step reads every weight once and computes next to nothing with it, so what counts is how many bytes the weights
have, how fast they are read (nanochat.generate.decode_linear) and how many small operations surround them. Compared
with the model's own forward pass this one has the weights in the dtype they are multiplied in (autocast would convert
all of them for every token), query, key and value as one matmul, queries and keys rotated and normalised together,
residuals added by the matmul, views of the cache made for all layers at once, and no module calls in a layer.

`weights` may also be smaller than the run's precision: "bfloat16" halves the bytes of float32, "int8" quarters them
(a scale per output channel; CPU only), "int4" halves them again (a scale for each 32 weights; in Rust only, with an
lm_head in 8 bits). Only decoding changes: prompts are read by the model.

On a CPU the step is taken in Rust (nanochat.generate.native_step), where the crate was compiled. What is below serves
cards, larger batches in float32, and machines without a Rust compiler.

Shapes: B sequences, C channels, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.generate.decode_linear import FixedLinear, Int8Linear, best_form
from nanochat.generate.graph_step import GraphSteps
from nanochat.generate.kv_cache import KVCache
from nanochat.generate.native_step import NativeStep, supports
from nanochat.generate.sampling import Sampling
from nanochat.gpt import GPT, MLP, NORM_EPS, VALUE_GATE_CHANNELS, Attention, Block, GPTConfig, Linear, unnumbered
from nanochat.ops.cpu import ThreadChoice
from nanochat.ops.pointwise import scaled_square
from nanochat.ops.recall import Recall
from nanochat.precision import DTYPE_NAMES, DTYPES, NARROW_RANGE, Precision

Weights = Literal["auto", "model", "bfloat16", "int8", "int4"]
"""auto: those of the run's precision. model: the model's own forward pass, not this module. The rest: smaller."""

# Sequences up to which the step in Rust is taken in float32: it multiplies few rows at a time, torch large blocks. Of
# narrower models it is faster for more. With smaller weights it is for every number that was measured, up to 64.
NATIVE_ROWS = 16
NATIVE_ROWS_NARROW = 32
NARROW = 512  # channels
# For each layer the maps C -> query, key and value, C -> C, C -> 4C and 4C -> C; and the lm_head.
_Matrices = tuple[list[tuple[FixedLinear, FixedLinear, FixedLinear, FixedLinear]], FixedLinear]

# The parameters (without the numbers of layers) and the settings whose arithmetic is below. A model that has another
# one is run by its own forward pass: what this module does not know must never be left out silently.
KNOWN_PARAMETERS = {
    "transformer.wte.weight",
    *(f"transformer.h.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj", "ve_gate")),
    *(f"transformer.h.mlp.{name}.weight" for name in ("c_fc", "c_proj")),
    "lm_head.weight",
    *("resid_lambdas", "x0_lambdas", "resid_logs", "value_embeds.weight", "backout_lambda"),
    *("smear_gate.weight", "smear_lambda", "recall.followers.weight", "recall.trust", "recall.scale"),  # in GPT.embed
}
KNOWN_SETTINGS = {
    *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "init"),
    *("residual_scalars", "residual_factors", "value_embeddings", "smear", "backout", "recall"),
    *("qk_scale", "rope_base", "key_offset", "window_pattern", "reach", "document_start", "logit_softcap"),
}
# A block may have the old names and another class: its arithmetic is another.
KNOWN_MODULES = {GPT, Block, Attention, MLP, Linear, Recall, nn.Embedding, nn.ModuleDict, nn.ModuleList}


def unknown_parts(model: GPT) -> list[str]:
    """The parameters of a model, its modules' classes, and its settings not at their default, that are not known here.

    Subclasses of GPT and LoRA's layers are not among them: `make_decoder` knows both.
    """
    parameters = {unnumbered(name) for name, _ in model.named_parameters()}
    modules = {f"{unnumbered(name)} ({type(m).__name__})" for name, m in model.named_modules() if not _is_known(m)}
    settings = {f.name for f in fields(GPTConfig) if getattr(model.config, f.name) != f.default}
    return sorted((parameters - KNOWN_PARAMETERS) | modules | (settings - KNOWN_SETTINGS))


def _is_known(module: nn.Module) -> bool:
    return type(module) in KNOWN_MODULES or isinstance(module, GPT) or hasattr(module, "lora_a")


def make_decoder(model: GPT, precision: Precision | None, weights: Weights = "auto") -> FastDecoder | None:
    """A decoder for the model; None where its own forward pass must do.

    Raises:
        ValueError: small weights were asked for, and this model or device cannot have them.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    if weights == "model":
        return None
    # A LoRA's matrices stand beside the model's, which the decoder would keep alone.
    unknown = unknown_parts(model)
    new = ", ".join(name for name in unknown if ".lora_" not in name)
    dtype = model.lm_head.weight.dtype if precision is None else precision.dtype
    # torch's step has no windows; that in Rust has.
    windows = any(window is not None for window in model.config.windows) and not supports(model, dtype)
    if type(model) is not GPT or unknown or windows:
        if weights != "auto":
            raise ValueError(f"weights={weights} does not work for models with {new or 'windows or a LoRA'}: use auto")
        if new:
            _say_once(f"decoding by the model's own forward pass, which is slower: {new} is unknown to fast_decode.py")
        return None
    device = model.get_device().type
    if model.config.recall and device != "cpu":
        if weights != "auto":
            raise ValueError(f"weights={weights} works on a CPU only for models with recall (here: {device}): use auto")
        # The look-up is the CPU's: it waits for the tokens, and no card can record it.
        _say_once("decoding by the model's own forward pass, which is slower: recall looks up its text on the CPU")
        return None
    if weights == "int8" and (device != "cpu" or not hasattr(torch, "_weight_int8pack_mm")):
        raise ValueError(f"weights=int8 works on a CPU only (here: {device}): use auto or bfloat16")
    native = supports(model, dtype)
    if weights == "int4" and not native:
        raise ValueError(
            f"weights=int4 needs a CPU, a run not in float16, and the decode step in Rust (here: {device}, "
            f"{DTYPE_NAMES[dtype]}): run `bash setup_env.sh`, or use auto or bfloat16"
        )
    integers = weights if weights in ("int8", "int4") else None
    return FastDecoder(model, dtype if weights == "auto" else DTYPES["bfloat16"], integers, native)


@functools.cache
def _say_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


class FastDecoder:
    """Runs one token per sequence. Call `refresh` before a generation: the model may have been trained since.

    Args:
        model: whose weights to use.
        dtype: what matmuls run in.
        integers: hold the weights as these, "int8" or "int4", instead.
        native: take the step in Rust, where it is faster than torch's.
    """

    def __init__(self, model: GPT, dtype: torch.dtype, integers: str | None = None, native: bool = False) -> None:
        self.model, self.dtype, self.integers = model, dtype, integers
        rows = NATIVE_ROWS if model.config.n_embd > NARROW else NATIVE_ROWS_NARROW
        if integers or dtype.itemsize < 4 or any(window is not None for window in model.config.windows):
            rows = 1 << 30
        self._native_rows = rows if native else 0
        self._native: NativeStep | None = None  # made when it is first needed
        self.device = model.get_device().type
        autocast = functools.partial(torch.autocast, self.device, dtype)
        self._autocast: Any = autocast if dtype.itemsize < 4 else contextlib.nullcontext
        self._seen: list[tuple[int, int]] | None = None  # of each parameter and buffer, when its weights were taken
        self._forms: dict[type[FixedLinear], _Matrices] = {}  # by the kind of linear map, see best_form
        self._threads: dict[int, ThreadChoice] = {}  # by the power of two of the number of sequences
        self.graphs = GraphSteps(self._decode) if self.device == "cuda" else None
        """Records steps, which a card then starts by one call; None: not here."""

    def refresh(self) -> FastDecoder:
        """Take the model's weights as they are now, if they have changed."""
        model = self.model
        # An optimizer step changes a tensor's version, loading other weights its address. Recall's text is a buffer.
        now = [(p.data_ptr(), p._version) for p in (*model.parameters(), *model.buffers())]
        if now != self._seen:
            self._forms.clear()
            self._native = None
            if self.graphs is not None:
                self.graphs.forget()
            self._seen = now
            self._cos, self._sin = model.cos[:, None, None], model.sin[:, None, None]  # (T, 1, 1, D)
            self._take_switches()
        return self

    @torch.no_grad()
    def _take_switches(self) -> None:
        """Take the parameters of the switches that are on; scalars as numbers, which cost no operation."""
        model, c, dtype = self.model, self.model.config, self.dtype
        self._scalars = [(1.0, 0.0)] * c.n_layer
        if c.residual_scalars:
            self._scalars = list(zip(model.resid_lambdas.tolist(), model.x0_lambdas.tolist(), strict=True))
        elif c.residual_factors:
            self._scalars = [(factor, 0.0) for factor in model.resid_logs.exp().tolist()]
        attention = [cast(Attention, block.attn) for block in model.blocks]
        self._scales = [a.scale for a in attention]
        # By layer: the value embeddings (V, K·D) and their gate (K, channels), or None.
        self._values: list[tuple[Tensor, Tensor] | None] = [
            None if gate is None else (model.value_embed(i).detach(), gate.weight.to(dtype))
            for i, gate in enumerate(a.ve_gate for a in attention)
        ]
        self._backout = float(model.backout_lambda) if c.backout else 0.0

    def _matrices(self, rows: int) -> _Matrices:
        """The weights in the form that is fastest for this many sequences."""
        form = Int8Linear if self.integers else best_form(rows, self.device, self.dtype)
        if form not in self._forms:
            self._forms[form] = self._take_weights(form)
        return self._forms[form]

    @torch.no_grad()
    def _take_weights(self, form: type[FixedLinear]) -> _Matrices:
        model, dtype = self.model, torch.float32 if self.integers else self.dtype
        layers = []
        for block in model.blocks:
            a, m = cast(Attention, block.attn), cast(MLP, block.mlp)
            # One operation instead of three: they read the same input.
            qkv = torch.cat([a.c_q.weight, a.c_k.weight, a.c_v.weight])  # (C + 2·K·D, C)
            q, o, f, p = (form(w.detach().to(dtype)) for w in (qkv, a.c_proj.weight, m.c_fc.weight, m.c_proj.weight))
            layers.append((q, o, f, p))
        return layers, form(model.lm_head.weight.detach()[: model.config.vocab_size].to(dtype))

    @torch.inference_mode()
    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Run token ids (B, 1) on the cache's selected rows; return float32 logits (B, V)."""
        if (native := self._native_for(idx.size(0), cache)) is not None:
            return native(idx, cache)
        self._matrices(idx.size(0))  # before the choice of threads: new forms are made with all of them
        if self.graphs is not None:
            return self.graphs(idx, cache)
        with self._threads.setdefault(idx.size(0).bit_length(), ThreadChoice(self.device))():
            return self._decode(idx, cache)

    def ahead(
        self,
        ids: list[int],
        cache: KVCache,
        settings: Sequence[Sampling],
        draw: Callable[[], Sequence[Sequence[float]]],
        stops: Iterable[int],
    ) -> list[list[int]] | None:
        """Several steps in one call, see `decoding.Decoder.ahead`; None where the step is not in Rust.

        `draw` makes the random numbers, which need not be made there.
        """
        native = self._native_for(len(ids), cache)
        return None if native is None else native.ahead(ids, cache, settings, draw(), stops)

    def _native_for(self, rows: int, cache: KVCache) -> NativeStep | None:
        """The step in Rust, where it takes so many rows."""
        if rows > self._native_rows or cache.k_cache.dtype in NARROW_RANGE:
            return None
        if self._native is None or self._native.threads != torch.get_num_threads():
            self._native = NativeStep(self.model, self.integers or DTYPE_NAMES[self.dtype])
        return self._native

    def _decode(self, idx: Tensor, cache: KVCache) -> Tensor:
        c, dtype = self.model.config, self.dtype
        B, H, K, D = idx.size(0), c.n_head, c.n_kv_head, c.head_dim
        cos, sin = self._rotation(cache)  # (1 or B, 1, 1, D)
        views = cache.decode_views()  # None where the sequences differ in length
        mask = _additive_mask(cache.attention_mask(), cache.k_cache.dtype)  # (B, 1, 1, all) or None
        with self._autocast():  # the model's own code, once per token; all that follows has its dtypes by hand
            x = x0 = self.model.embed(idx, cache)[:, 0]  # (B, C)
        middle: Tensor | None = None
        # From here on x is the residual stream (B, C): one token per sequence, so T is left out until attention.
        heads, attend_in = H + K, cache.k_cache.dtype
        layers, lm_head = self._matrices(B)
        for layer, (to_qkv, to_out, to_hidden, to_residual) in enumerate(layers):
            if c.residual_scalars:
                keep, again = self._scalars[layer]
                x = x * keep + x0 * again
            elif c.residual_factors:
                x = x * self._scalars[layer][0]
            inputs = self._norm(x).to(dtype)
            qkv = to_qkv(inputs).view(B, 1, heads + K, D)
            qk, v = qkv[:, :, :heads].to(cos.dtype), qkv[:, :, heads:]  # (B, 1, H + K, D), (B, 1, K, D)
            if (embedded := self._values[layer]) is not None:
                v = v + self._gated_value(idx[:, 0], inputs, *embedded).view(B, 1, K, D)
            # Queries and keys are rotated alike, x·cos + (halves swapped)·sin, and normalised alike: both at once.
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, dims=-1), sin)
            qk = torch.rms_norm(qk, (D,), eps=NORM_EPS).to(dtype)  # (B, 1, H + K, D)
            if views is not None:
                views[layer].put(qk[:, :, H:], v)
                keys, values = views[layer].keys, views[layer].values  # (B, K, all, D)
            else:
                keys, values = cache.update(layer, qk[:, :, H:].to(attend_in), v.to(attend_in))  # (B, all, K, D)
                keys, values = keys.transpose(1, 2), values.transpose(1, 2)
            # The queries that share a key/value head take the dimension of positions, so that no key is repeated in
            # memory. They may: a single position needs no causal mask.
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
        logits = lm_head(self._norm(x).to(dtype))  # (B, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if c.logit_softcap is None:
            return logits
        return logits.div_(c.logit_softcap).tanh_().mul_(c.logit_softcap)

    @staticmethod
    def _gated_value(idx: Tensor, x: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        """The share of the tokens' value embeddings that is added to the values, (B, K, D)."""
        share = 3.0 * torch.sigmoid(F.linear(x[:, :VALUE_GATE_CHANNELS], gate))  # (B, K)
        value = F.embedding(idx, table).to(x.dtype)  # (B, K·D)
        return share.unsqueeze(-1) * value.view(*share.shape, -1)

    def _rotation(self, cache: KVCache) -> tuple[Tensor, Tensor]:
        """cos and sin at the sequences' positions, (1 or B, 1, 1, D)."""
        positions = cache.positions(1)[:, 0]
        if positions.size(0) == 1 and not cache.is_fixed:
            p = cache.get_pos()  # a slice is a view, an index tensor would copy
            return self._cos[p : p + 1], self._sin[p : p + 1]
        return self._cos[positions], self._sin[positions]

    def _add_mlp(self, x: Tensor, h: Tensor, linear: FixedLinear) -> Tensor:
        """x + h² · weightᵀ, as in gpt.MLP."""
        if h.dtype not in NARROW_RANGE:
            return linear.add(h.mul_(h), x)
        square, factor = scaled_square(h)
        return x + linear(square).float() * factor

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
