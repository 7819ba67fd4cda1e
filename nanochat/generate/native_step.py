"""The decode step in Rust: the whole model in one call, without a Python operator per layer.

A small model's step takes less time than the calls of torch's operators it consists of, and a large one's is as long as
reading its weights takes, which torch's operators don't do at the memory's speed for a few rows. So for CPUs there is
rustbpe/src/decode, which knows the arithmetic of nanochat.gpt with all its switches. Sums are in float32, the residual
stream too, whatever the weights are. In 8 bits weights have a scale per output channel, in 4 bits one for each 32
of its inputs (the head stays in 8), and activations are rounded to 15 bits; in bfloat16 they are rounded to it where
the CPU has instructions for it, else not at all.

A sequence gets the same logits, bit for bit, whichever other sequences run beside it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from nanochat.generate.kv_cache import KVCache
from nanochat.generate.sampling import Sampling, raw_sampling
from nanochat.gpt import GPT, MLP, NORM_EPS, Attention
from nanochat.precision import NARROW_RANGE
from rustbpe import decoding


def supports(model: GPT, dtype: torch.dtype) -> bool:
    """True if the model's step can run here: on a CPU, with float32 parameters, and the compiled crate."""
    parameters = [*model.parameters(), model.cos, model.sin]
    if dtype in NARROW_RANGE or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters):
        return False
    if decoding.library() is None:
        _say_once()
        return False
    return True


@functools.cache
def _say_once() -> None:
    logging.getLogger(__name__).info("no decode step in Rust (see `bash setup_env.sh`): decoding by torch, more slowly")


class NativeStep:
    """Runs one token per sequence. It reads float32 weights where they are and keeps copies of smaller ones.

    Args:
        model: whose weights to use, as they are now.
        kind: what the matrices are kept as, one of `decoding.FORMATS`.
        level: the instructions to use, see rustbpe/decoding.py.
    """

    def __init__(self, model: GPT, kind: str, level: str = "best") -> None:
        c = model.config
        self.threads, self._vocab = torch.get_num_threads(), c.vocab_size
        self._kept: list[object] = []  # what the library points to
        layers = (decoding.Layer * c.n_layer)(*(self._layer(model, i) for i in range(c.n_layer)))
        self._kept.append(layers)
        width = cast(MLP, model.blocks[0].mlp).c_fc.weight.size(0)
        shape = {"num_layers": c.n_layer, "channels": c.n_embd, "mlp": width}
        raw = decoding.Model(layers, **shape, heads=c.n_head, kv_heads=c.n_kv_head, vocab=c.vocab_size, eps=NORM_EPS)
        raw.embedding, raw.head = self._at(model.wte.weight), self._at(model.lm_head.weight[: c.vocab_size])
        raw.cos, raw.sin = self._at(model.cos), self._at(model.sin)
        raw.key_offset, raw.softcap = c.key_offset, c.logit_softcap or 0.0
        if c.recall:
            recall = model.recall
            tables = recall.text, recall.order, recall.token_weights()
            raw.text, raw.order, raw.token_weights = (decoding.Tokens(*self._where(t)) for t in tables)
            raw.followers, raw.trust = self._at(recall.followers.weight), self._at(recall.trust)
            raw.follower_scale = self._at(recall.scale)
        if c.smear:
            raw.smear_gate, raw.smear = self._at(model.smear_gate.weight), model.smear_lambda.item()
        if c.backout:
            raw.backout = model.backout_lambda.item()
        self._remembers = bool(c.smear or c.recall)
        self._decoder = decoding.Decoder(raw, kind, self.threads, level)
        self._cache: tuple[weakref.ref[KVCache], decoding.Cache] | None = None

    def _layer(self, model: GPT, i: int) -> decoding.Layer:
        c, attention, mlp = model.config, cast(Attention, model.blocks[i].attn), cast(MLP, model.blocks[i].mlp)
        linear = {"query": attention.c_q, "key": attention.c_k, "value": attention.c_v, "output": attention.c_proj}
        linear |= {"hidden": mlp.c_fc, "residual": mlp.c_proj}
        layer = decoding.Layer(**{name: self._at(module.weight) for name, module in linear.items()})
        if attention.ve_gate is not None:
            layer.value_table, layer.value_gate = self._at(model.value_embed(i)), self._at(attention.ve_gate.weight)
        layer.keep, layer.again = 1.0, 0.0
        if c.residual_scalars:
            layer.keep, layer.again = model.resid_lambdas[i].item(), model.x0_lambdas[i].item()
        elif c.residual_factors:
            layer.keep = model.resid_logs[i].exp().item()
        layer.scale = c.head_dim**-0.5 if attention.scale is None else attention.scale
        layer.window = c.sequence_len if attention.window is None else attention.window
        return layer

    def _at(self, tensor: Tensor) -> decoding.Floats:
        return decoding.Floats(*self._where(tensor))

    def _where(self, tensor: Tensor) -> tuple[int, int]:
        numbers = tensor.detach().contiguous()
        self._kept.append(numbers)
        return numbers.data_ptr(), numbers.numel()

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Run token ids (B, 1) on the cache's selected rows; return float32 logits (B, V)."""
        first_row, lengths = cache.selected(1)
        if idx.shape != (len(lengths), 1):
            raise ValueError(f"{tuple(idx.shape)} tokens for {len(lengths)} rows of the cache: give one token for each")
        idx = idx.long().contiguous()
        logits = torch.empty(len(lengths), self._vocab)
        self._decoder.step(self._raw(cache), idx.data_ptr(), lengths, first_row, logits.data_ptr(), logits.numel())
        cache.advance(1)
        return logits

    def ahead(
        self,
        ids: list[int],
        cache: KVCache,
        settings: Sequence[Sampling],
        uniforms: Sequence[Sequence[float]],
        stops: Iterable[int],
    ) -> list[list[int]]:
        """Run several steps on the cache's selected rows, see `decoding.Decoder.ahead`."""
        first_row, lengths = cache.selected(len(uniforms))
        how = [raw_sampling(s) for s in settings]
        tokens = self._decoder.ahead(self._raw(cache), ids, lengths, first_row, how, uniforms, stops)
        cache.advance(len(tokens))
        return tokens

    def _raw(self, cache: KVCache) -> decoding.Cache:
        """Where the cache's memory is; made once per cache, which this must not keep alive."""
        if self._cache is None or self._cache[0]() is not cache:
            keys, values, tokens = cache.k_cache, cache.v_cache, cache.tokens
            raw = decoding.Cache(keys.data_ptr(), values.data_ptr(), keys.numel(), keys.dtype.itemsize)
            raw.rows, raw.positions = keys.shape[1:3]
            if self._remembers:
                raw.tokens, raw.token_positions = tokens.data_ptr(), tokens.size(1)
            self._cache = weakref.ref(cache), raw
        return self._cache[1]
