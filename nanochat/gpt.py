"""The model: nanochat's classic GPT.

Rotary positions, RMSNorm on queries and keys, RMSNorm without parameters, squared ReLU, untied embeddings, no biases,
softcapped logits, grouped-query attention. Parameters are float32; `nanochat.precision` decides what matmuls run in.

Shapes: B batch, T tokens, C = n_embd, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.attention import Piece, attend, plan_attention, plan_ragged, segment_starts
from nanochat.loss import linear_cross_entropy, softcap
from nanochat.precision import NARROW_RANGE
from nanochat.rms_norm import rms_norm

HEAD_SIZE = 128
LOGIT_SOFTCAP = 15.0
ROPE_BASE = 10000.0
# One fixed epsilon for every dtype, so that a model gives the same results in each of them.
NORM_EPS = 1e-6
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines the model's shape. Stored in every checkpoint."""

    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")

    @classmethod
    def from_depth(cls, depth: int, vocab_size: int, sequence_len: int = 2048) -> GPTConfig:
        """The classic shape of a depth: 64 channels per layer, rounded up to whole heads of 128."""
        if depth < 1:
            raise ValueError(f"--depth must be at least 1, got {depth}")
        n_head = max(1, math.ceil(64 * depth / HEAD_SIZE))
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_head * HEAD_SIZE)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """From a checkpoint's record; names the fields this version doesn't know."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"this checkpoint's model has settings unknown to this version: {', '.join(sorted(unknown))}"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of lm_head: a multiple of 64 multiplies faster."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Cache(Protocol):
    """What the model asks of a key/value cache (nanochat.engine.KVCache)."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's (B, T, K, D) keys and values; return all so far."""

    def get_pos(self) -> int:
        """Length of the longest row."""

    def positions(self, n_tokens: int) -> Tensor:
        """Rotary positions of the next `n_tokens`: (1, T) or (B, T)."""

    def attention_mask(self) -> Tensor | None:
        """Which cached positions each query may see, (B, 1, T, all); None: causal."""

    def advance(self, n: int) -> None:
        """Called once after the last layer."""


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters over the last dimension, in the dtype of `x`."""
    return rms_norm(x, NORM_EPS)


def rotary_tables(n_positions: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and ±sin of position × frequency for both halves of a head, each (n_positions, head_dim), float32.

    Source: RoFormer, arXiv 2104.09864.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequency = ROPE_BASE ** (-channel / head_dim)
    angle = torch.outer(torch.arange(n_positions, dtype=torch.float32, device=device), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((sin, -sin), dim=1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head in float32: y1 = x1·cos + x2·sin, y2 = x2·cos − x1·sin.

    x is (B, T, H, D), the tables are (1 or B, T, 1, D). Swapping the halves and adding two products passes over the
    memory less often than working on each half.
    """
    x = x.to(torch.promote_types(x.dtype, cos.dtype))
    swapped = x.roll(x.size(-1) // 2, dims=-1)
    return torch.addcmul(x * cos, swapped, sin)


@dataclass
class Context:
    """What one forward pass has in common for all layers."""

    cos: Tensor  # (1 or B, T, 1, D)
    sin: Tensor
    pieces: list[Piece]
    kv_cache: Cache | None


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        kv_dim = self.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        q = norm(apply_rotary(q, context.cos, context.sin)).to(v.dtype)
        k = norm(apply_rotary(k, context.cos, context.sin)).to(v.dtype)
        if context.kv_cache is not None:
            k, v = context.kv_cache.update(self.layer, k, v)  # (B, all, K, D)
        y = attend(q, k, v, context.pieces)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """Two matmuls around a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.c_fc(x))  # (B, T, 4C)
        if h.dtype not in NARROW_RANGE:
            return self.c_proj(h * h)
        # relu² of anything above 255 overflows float16. Divide each token's row by a power of two (exact) that brings
        # its largest entry to at most 128, and multiply the square of it back in float32. Rows below 128 are untouched.
        # The factor cancels, so no gradient runs through it.
        peak = h.detach().amax(dim=-1, keepdim=True).float()  # (B, T, 1)
        exponent = torch.ceil(torch.log2(peak.clamp(min=1.0) / 128)).clamp(min=0)
        shrink = torch.exp2(-exponent)
        h = h * shrink.to(h.dtype)
        return self.c_proj(h * h).float() * torch.exp2(2 * exponent)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn(norm(x), context)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The language model. State keys are nanochat's: transformer.wte, transformer.h.{i}…, lm_head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        cos, sin = rotary_tables(config.sequence_len, config.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return cast(nn.ModuleList, self.transformer["h"])

    @property
    def max_seq_len(self) -> int:
        """The context length the model is trained for."""
        return self.config.sequence_len

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Classic: embedding N(0, 1); matrices N(0, min(1, √(out/in)) / √in); outputs of a block and lm_head zero."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.zero_()
            elif name == "transformer.wte.weight":
                p.normal_(0.0, 1.0, generator=generator)
            else:
                fan_out, fan_in = p.shape
                p.normal_(0.0, fan_in**-0.5 * min(1.0, math.sqrt(fan_out / fan_in)), generator=generator)

    def get_device(self) -> torch.device:
        """The device the parameters are on."""
        return self.lm_head.weight.device

    def num_params(self) -> int:
        """All parameters, embedding included."""
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self, sequence_len: int | None = None) -> int:
        """Training FLOPs per token: 6 per matmul parameter, 12·L·H·D·T for attention (PaLM, arXiv 2204.02311, B)."""
        c = self.config
        matmul = self.num_params() - self.wte.weight.numel()
        return 6 * matmul + 12 * c.n_layer * c.n_head * c.head_dim * (sequence_len or c.sequence_len)

    def _context(self, idx: Tensor, kv_cache: Cache | None, segments: Tensor | None) -> Context:
        """Rotary tables and attention pieces of a forward pass."""
        T, device = idx.size(1), idx.device
        if kv_cache is not None:
            if segments is not None:
                raise ValueError("segments are for training rows: with a kv_cache every row is one segment")
            positions = kv_cache.positions(T)  # (1 or B, T)
            mask = kv_cache.attention_mask()
            pieces = plan_attention(T, kv_cache.get_pos() + T, device) if mask is None else plan_ragged(mask, positions)
            return Context(self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2), pieces, kv_cache)
        if self.cos.size(0) < T:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.sequence_len}")
        if segments is None:
            return Context(self.cos[None, :T, None], self.sin[None, :T, None], plan_attention(T, T, device), None)
        if segments.shape != idx.shape:
            raise ValueError(f"segments are {tuple(segments.shape)}, the tokens {tuple(idx.shape)}: give one per token")
        starts = segment_starts(segments)
        positions = torch.arange(T, device=device) - starts  # (B, T)
        pieces = plan_attention(T, T, device, starts=starts)
        return Context(self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2), pieces, None)

    def hidden(self, idx: Tensor, kv_cache: Cache | None = None, segments: Tensor | None = None) -> Tensor:
        """The final normalised hidden states of tokens `idx` (B, T): (B, T, C). `segments`: see `forward`."""
        context = self._context(idx, kv_cache, segments)
        x = self.wte(idx)  # (B, T, C)
        # bfloat16 has float32's range, so the residual stream may be narrow; float16 has not, so it stays float32.
        compute_dtype = _autocast_dtype(x)
        if compute_dtype not in NARROW_RANGE:
            x = x.to(compute_dtype)
        x = norm(x)
        for block in self.blocks:
            x = block(x, context)
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))
        return norm(x)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Cache | None = None,
        loss_reduction: Literal["mean", "sum", "none"] = "mean",
        segments: Tensor | None = None,
    ) -> Tensor:
        """Logits of tokens `idx`, or the loss against `targets`.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids of the next tokens; −1 is ignored.
            kv_cache: keys and values of the tokens before `idx`.
            loss_reduction: over the targets that count; "none" gives (B, T) with 0 where ignored.
            segments: (B, T) integers, the same inside a document or conversation and different between neighbours in a
                row: each is computed as if it were alone. Not together with a kv_cache.

        Returns:
            float32 softcapped logits (B, T, V), or the loss in float32.

        Raises:
            ValueError: more tokens than the context, or segments of another shape or with a kv_cache.
        """
        x = self.hidden(idx, kv_cache, segments)
        return self.logits_at(x) if targets is None else self.loss(x, targets, loss_reduction)

    def loss(self, x: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """The loss of hidden states `x` (B, T, C) against `targets` (B, T); never compiled, unlike `hidden`."""
        return linear_cross_entropy(
            x, self.lm_head.weight, targets, self.config.vocab_size, LOGIT_SOFTCAP, reduction, _autocast_dtype(x)
        )

    def logits_at(self, x: Tensor) -> Tensor:
        """Softcapped float32 logits of chosen hidden states (…, C) -> (…, V): for when few positions matter."""
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        return softcap(logits.to(torch.promote_types(logits.dtype, torch.float32)), LOGIT_SOFTCAP)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype matmuls run in right now for tensors like `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
