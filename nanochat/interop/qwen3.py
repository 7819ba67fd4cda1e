"""A nanochat model as a Qwen3 model, which every common runtime knows, and back: the same function by other weights.

- The norm after the embedding depends on the token alone: the table holds the normalised rows.
- nanochat rotates by −θ, Qwen3 by θ: the two halves of each head's rows in q_proj and k_proj change places.
- qk_scale is the weight of q_norm and k_norm; every other norm has weight 1.
- relu²(h) = relu(h)·h ≈ silu(β·h)/β·h: gate_proj = β·W, up_proj = W/√β, down_proj = W₂/√β. At β = 256 the value is off
  by at most 0.483/β² = 7e-6, whatever h. Powers of two lose nothing in any float; and 1/β is shared by two matrices,
  because in one alone the 16-bit scales of an 8-bit file (Q8_0) would be too small to be exact.
- A stream scaled before each layer is a scaled sum, and whoever reads it norms it: with the factors λ, a block's two
  outputs are divided by the product of the λ so far.

The logit softcap has no counterpart. Greedy answers do not depend on it; the probabilities of sampling do.

Shapes: V vocabulary, C channels, H·D and K·D rows of queries and of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from nanochat.gpt import GPT, NORM_EPS, GPTConfig

ARCHITECTURE = "Qwen3ForCausalLM"
GATE, SHARE = 256.0, 1 / 16  # β, and 1/√β
# What may differ from the default: shapes, how weights begin, and what is folded into weights or has a setting.
FOLDS = {
    *("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "init"),
    *("qk_scale", "rope_base", "residual_factors", "logit_softcap", "window_pattern", "reach"),
    "document_start",  # is for sequences of several documents, without a cache
}
ULPS = "ulps."  # in the remainder, before the name of a weight


def obstacles(config: GPTConfig) -> list[str]:
    """Return the settings that keep a model from being a Qwen3 model, as "smear=True"; empty if it is one exactly."""
    # A switch that this module does not know is an obstacle: it must never be left out silently.
    found = [f.name for f in fields(config) if f.name not in FOLDS and getattr(config, f.name) != f.default]
    # A reach of the whole context is none, and so is a window that covers it.
    found += ["window_pattern"] if any(window is not None for window in replace(config, reach=0).windows) else []
    found += ["reach"] if 0 < config.reach < config.sequence_len else []
    found += ["logit_softcap"] if config.logit_softcap is not None else []
    return [f"{name}={getattr(config, name)}" for name in found]


def check_folds(config: GPTConfig, without_softcap: bool = False) -> None:
    """Raise ValueError with the reason if the model is no Qwen3 model (`without_softcap`: but for its softcap)."""
    reasons = [r for r in obstacles(config) if not (without_softcap and r.startswith("logit_softcap="))]
    if reasons:
        raise ValueError(
            f"this model is no Qwen3 model: it has {', '.join(reasons)}; "
            "one trained with --recipe=portable and nothing of that is"
        )


def qwen3_config(config: GPTConfig) -> dict[str, Any]:
    """Return the content of config.json, but for the tokenizer's ids."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_base,  # where programs of before transformers 5 look for it
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def fold(model: GPT, without_softcap: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config.json, float32 weights by name) of the Qwen3 model that computes what `model` does.

    Args:
        model: it stays as it is.
        without_softcap: fold a softcapped model too; its logits then lack the softcap.

    Raises:
        ValueError: it has something that Qwen3 lacks; names it.
    """
    check_folds(model.config, without_softcap)
    return qwen3_config(model.config), fold_weights(model.state_dict(), model.config)


def fold_weights(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Return Qwen3's weights from ours, in float32, without the padding rows of the vocabulary."""
    V, C, D = config.vocab_size, config.n_embd, config.head_dim
    shrink = 1.0 / _factors(state, config)
    wte = state["transformer.wte.weight"][:V].double()
    weights = {
        "model.embed_tokens.weight": wte / _rms(wte),
        "model.norm.weight": torch.ones(C),
        "lm_head.weight": state["lm_head.weight"][:V],
    }
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}", f"model.layers.{i}"
        fc = state[f"{ours}.mlp.c_fc.weight"]
        weights |= {
            f"{theirs}.input_layernorm.weight": torch.ones(C),
            f"{theirs}.self_attn.q_proj.weight": _swap_halves(state[f"{ours}.attn.c_q.weight"], D),
            f"{theirs}.self_attn.k_proj.weight": _swap_halves(state[f"{ours}.attn.c_k.weight"], D),
            f"{theirs}.self_attn.v_proj.weight": state[f"{ours}.attn.c_v.weight"],
            f"{theirs}.self_attn.o_proj.weight": state[f"{ours}.attn.c_proj.weight"].double() * shrink[i],
            f"{theirs}.self_attn.q_norm.weight": torch.full((D,), config.qk_scale),
            f"{theirs}.self_attn.k_norm.weight": torch.full((D,), config.qk_scale),
            f"{theirs}.post_attention_layernorm.weight": torch.ones(C),
            f"{theirs}.mlp.gate_proj.weight": GATE * fc,
            f"{theirs}.mlp.up_proj.weight": SHARE * fc,
            f"{theirs}.mlp.down_proj.weight": state[f"{ours}.mlp.c_proj.weight"].double() * (SHARE * shrink[i]),
        }
    return {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}


def remainder(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Return what the folded weights do not tell of ours: `unfold` needs it to give them back bit for bit.

    The size of each row of the embedding (V,), the logarithms of the factors (L,), and how far a weight that was
    divided and multiplied again is off, in steps of float32 (int8): none is off by more than a few.
    """
    wte = state["transformer.wte.weight"][: config.vocab_size].double()
    rest = {"wte_rms": _rms(wte)[:, 0].cpu()}
    if config.residual_factors:
        rest["resid_logs"] = state["resid_logs"].cpu()
    for name, value in unfold(fold_weights(state, config), config, rest).items():
        steps = state[name].cpu()[: len(value)].view(torch.int32) - value.view(torch.int32)
        if steps.any():
            rest[ULPS + name] = steps.clamp(-128, 127).to(torch.int8)
    return rest


def unfold(
    weights: Mapping[str, Tensor], config: GPTConfig, rest: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return our float32 weights, with V rows of the vocabulary, from Qwen3's.

    Args:
        weights: by Qwen3's names.
        config: ours.
        rest: `remainder`'s result gives the very weights that were folded; without it the function is the same.

    Raises:
        ValueError: these weights are of no folded model, or were trained on in the other form; names the first.
    """
    rest, D = rest or {}, config.head_dim
    _check_folded(weights, config)
    logs = rest.get("resid_logs", torch.zeros(config.n_layer))
    grow = _factors({"resid_logs": logs}, config)
    embedding = weights["model.embed_tokens.weight"].double()
    rms = rest["wte_rms"][:, None] if "wte_rms" in rest else _rms_before(embedding)
    state = {
        "transformer.wte.weight": embedding * rms,
        "lm_head.weight": weights["lm_head.weight"],
    }
    for i in range(config.n_layer):
        ours, theirs = f"transformer.h.{i}", f"model.layers.{i}"
        state |= {
            f"{ours}.attn.c_q.weight": _swap_halves(weights[f"{theirs}.self_attn.q_proj.weight"], D),
            f"{ours}.attn.c_k.weight": _swap_halves(weights[f"{theirs}.self_attn.k_proj.weight"], D),
            f"{ours}.attn.c_v.weight": weights[f"{theirs}.self_attn.v_proj.weight"],
            f"{ours}.attn.c_proj.weight": weights[f"{theirs}.self_attn.o_proj.weight"].double() * grow[i],
            f"{ours}.mlp.c_fc.weight": weights[f"{theirs}.mlp.gate_proj.weight"].float() / GATE,
            f"{ours}.mlp.c_proj.weight": weights[f"{theirs}.mlp.down_proj.weight"].double() * (grow[i] / SHARE),
        }
    state = {name: value.float().contiguous() for name, value in state.items()}
    for name, steps in ((key.removeprefix(ULPS), rest[key]) for key in rest if key.startswith(ULPS)):
        state[name] = (state[name].view(torch.int32) + steps).view(torch.float32)
    return state | ({"resid_logs": logs} if config.residual_factors else {})


@dataclass(frozen=True)
class Difference:
    """How far the answers of one model are from another's on the same text."""

    tokens: int
    kl: float
    """Mean Kullback-Leibler divergence, nats per token."""
    bpb: tuple[float, float]
    """Bits per byte of the first and of the second."""
    greedy: float
    """Share of the tokens for which another next one is the most probable."""

    def __str__(self) -> str:
        before, after = self.bpb
        return (
            f"on {self.tokens:,} tokens of the base model's validation text: mean KL {self.kl:.2e} nats per token; bits"
            f" per byte {before:.4f} -> {after:.4f}; {self.greedy:.2%} of the greedy tokens differ"
        )


@torch.no_grad()
def compare_logits(
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
) -> Difference:
    """Compare two models.

    Args:
        ours, theirs: give the logits (B, T, V) of tokens (B, T).
        batches: tokens and their next ones, both (B, T), −1 where that does not count; at least one batch.
        token_bytes: (V,) bytes of each token, 0 for special ones.
    """
    sums = torch.zeros(6, dtype=torch.float64)
    for x, y in batches:
        counts = y >= 0
        p, q = (logits(x)[counts].double().log_softmax(-1) for logits in (ours, theirs))  # (N, V)
        targets = y[counts]
        length = token_bytes[targets]
        # A special token has no bytes, and its bits count nothing.
        nats = [-(logs.gather(-1, targets[:, None])[:, 0] * (length > 0)).sum() for logs in (p, q)]
        kl, other = (p.exp() * (p - q)).sum(), (p.argmax(-1) != q.argmax(-1)).sum()
        sums += torch.tensor([float(v) for v in (kl, *nats, length.sum(), other, counts.sum())], dtype=torch.float64)
    kl, before, after, num_bytes, other, tokens = sums.tolist()
    bits = math.log(2) * num_bytes
    return Difference(int(tokens), kl / tokens, (before / bits, after / bits), other / tokens)


def config_of(stored: Mapping[str, Any], weights: Mapping[str, Tensor]) -> GPTConfig:
    """Return our config from a Qwen3 config.json; ValueError names a setting that no folded model has."""
    if stored.get("sliding_window") and stored.get("use_sliding_window"):
        raise ValueError(f"config.json: sliding_window is {stored['sliding_window']}, expected none")
    rope = stored.get("rope_parameters") or {}
    base = rope.get("rope_theta") or stored["rope_theta"]
    config = GPTConfig(
        sequence_len=stored["max_position_embeddings"],
        vocab_size=stored["vocab_size"],
        n_layer=stored["num_hidden_layers"],
        n_head=stored["num_attention_heads"],
        n_kv_head=stored["num_key_value_heads"],
        n_embd=stored["hidden_size"],
        qk_scale=float(weights["model.layers.0.self_attn.q_norm.weight"].float().mean()),
        rope_base=base,
        logit_softcap=None,
    )
    for name, value in (qwen3_config(config) | {"rope_parameters": rope}).items():
        found = stored.get(name, value)
        if name not in ("architectures", "use_cache", "attention_dropout", "use_sliding_window") and found != value:
            raise ValueError(f"config.json: {name} is {found!r}, this model can only be imported with {value!r}")
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"config.json: rope_type is {rope['rope_type']!r}, this model can only be imported without")
    return config


def _check_folded(weights: Mapping[str, Tensor], config: GPTConfig) -> None:
    for name, value in weights.items():
        wanted: Tensor | None = None
        if name.endswith("norm.weight"):
            wanted = torch.full_like(value, config.qk_scale if name.endswith(("q_norm.weight", "k_norm.weight")) else 1)
        elif name.endswith("gate_proj.weight"):
            wanted = weights[name.replace("gate_proj", "up_proj")].float() * (GATE / SHARE)
        tolerance = 1e-5 if value.dtype == torch.float32 else 5e-3
        if wanted is not None and (value.float() - wanted).abs().max() > tolerance * wanted.abs().max():
            raise ValueError(
                f"{name} is not what a folded nanochat model has there: only a Qwen3 model that export_hf wrote, and "
                "that was not trained on since, can be imported"
            )


def _factors(state: Mapping[str, Tensor], config: GPTConfig) -> Tensor:
    """The products of the residual factors up to each layer, (L,) float64; ones without them."""
    if not config.residual_factors:
        return torch.ones(config.n_layer, dtype=torch.float64)
    return state["resid_logs"].detach().cpu().double().cumsum(0).exp()


def _rms(wte: Tensor) -> Tensor:
    """The size of each row that a norm divides by, (V, 1)."""
    return (wte.square().mean(dim=1, keepdim=True) + NORM_EPS).sqrt()


def _rms_before(embedding: Tensor) -> Tensor:
    """A size for each normalised row, (V, 1), that the norm takes back to exactly this row."""
    # e = w / √(m + ε), m the mean of w²; so 1 − mean e² = ε / (m + ε). Near 1 that is rounding, and any size will do.
    return (NORM_EPS / (1 - embedding.square().mean(dim=1, keepdim=True)).clamp(min=NORM_EPS)).sqrt()


def _swap_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows (heads·D, C) with the two halves of each head exchanged; twice gives the same again."""
    return weight.view(-1, 2, head_dim // 2, weight.size(1)).flip(1).reshape(weight.shape)
