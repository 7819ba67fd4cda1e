"""The model's settings: its shape, and the modern additions, each a switch. All switches off is the classic model."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

HEAD_SIZE = 128
ROPE_BASE = 10000.0
VOCAB_MULTIPLE = 64
# How many channels of the residual stream decide on a gate. Source: nanochat.
VALUE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24
# What nanochat's main branch has switched on since 2026; it does not record it in its checkpoints.
NANOCHAT_2026: dict[str, Any] = {
    "residual_scalars": True,
    "value_embeddings": True,
    "smear": True,
    "backout": True,
    "qk_scale": 1.2,
    "rope_base": 100000.0,
    "init": "modern",
}


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines the model. Stored in every checkpoint; a field that an old one lacks is off."""

    sequence_len: int = 2048
    vocab_size: int = 65536
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    residual_scalars: bool = False
    """Before layer i: x = λ[i]·x + μ[i]·x0, with x0 the embedding."""
    value_embeddings: bool = False
    """Every second layer, the last included, adds a gated embedding of the token to its values."""
    smear: bool = False
    """Mix a gated share of the previous token's embedding into each token's."""
    backout: bool = False
    """Subtract a share of the middle layer's output before the final norm."""
    qk_scale: float = 1.0
    """Factor on the normalised queries and keys each: more than 1 is a sharper attention."""
    rope_base: float = ROPE_BASE
    """Base of the rotary frequencies."""
    key_offset: bool = False
    """Half of each key's channels are those of the token before, see nanochat/ops/key_offset.py."""
    init: Literal["classic", "modern"] = "classic"
    """How the weights begin."""
    window_pattern: str = "L"
    """Repeated over the layers: L sees the whole context, S the last quarter of it; the last layer is always L."""
    bigram_buckets: int = 0
    """Size of an embedding of hashed pairs of tokens, added to the token's; 0: none."""

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise ValueError(f"window_pattern is {self.window_pattern!r}: use the letters S and L, as in SSSL")
        if self.init not in ("classic", "modern"):
            raise ValueError(f"init is {self.init!r}, expected classic or modern")
        for name in ("qk_scale", "rope_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.bigram_buckets < 0:
            raise ValueError(f"bigram_buckets must be 0 (off) or more, got {self.bigram_buckets}")
        if self.key_offset and self.head_dim % 4:
            raise ValueError(f"key_offset needs heads of a multiple of 4 channels, got {self.head_dim}")
        if self.smear and self.n_embd < SMEAR_GATE_CHANNELS:
            raise ValueError(f"smear needs at least {SMEAR_GATE_CHANNELS} channels, got n_embd {self.n_embd}")

    @classmethod
    def from_depth(
        cls, depth: int, vocab_size: int, sequence_len: int = 2048, aspect_ratio: int = 64, **settings: Any
    ) -> GPTConfig:
        """The classic shape of a depth: 64 channels (or `aspect_ratio`) per layer, rounded up to whole heads of 128.

        `settings` are further fields; n_kv_head must divide the number of heads.
        """
        if depth < 1:
            raise ValueError(f"--depth must be at least 1, got {depth}")
        if aspect_ratio < 1:
            raise ValueError(f"--aspect_ratio must be at least 1, got {aspect_ratio}")
        n_head = max(1, math.ceil(aspect_ratio * depth / HEAD_SIZE))
        shape = {"n_layer": depth, "n_head": n_head, "n_kv_head": n_head, "n_embd": n_head * HEAD_SIZE}
        return cls(sequence_len=sequence_len, vocab_size=vocab_size, **shape | settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """From a checkpoint's record; names the fields this version doesn't know."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"this checkpoint's model has settings unknown to this version: {', '.join(sorted(unknown))}"
            )
        return cls(**values)

    @classmethod
    def from_nanochat(cls, values: dict[str, Any], keys: Collection[str]) -> GPTConfig:
        """From the config and the state keys of nanochat's own checkpoint, classic or of July 2026 and later.

        Raises:
            ValueError: a version in between, whose other settings no key tells.
        """
        config = cls.from_dict(values)
        modern = {"resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"}
        if modern <= set(keys):
            return cls.from_dict(config.to_dict() | NANOCHAT_2026)
        if found := sorted(key for key in keys if key in modern or key.startswith("value_embeds.")):
            raise ValueError(
                f"this checkpoint is from a nanochat between the classic and the one of 2026: it has {found}"
            )
        return config

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

    @property
    def windows(self) -> list[int | None]:
        """Of each layer: how many tokens before its own a query sees (a quarter, in tiles of 128); None: all."""
        short = math.ceil(self.sequence_len / 4 / 128) * 128
        pattern = self.window_pattern.upper()
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return [short if letter == "S" and short < self.sequence_len else None for letter in letters]

    def has_value_embedding(self, layer: int) -> bool:
        """Whether this layer adds value embeddings: every second one, counted from the last."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2
