"""The model: nanochat's classic GPT, and what its main branch has added since, each addition a switch.

Classic: rotary positions, RMSNorm on queries and keys, RMSNorm without parameters, squared ReLU, untied embeddings, no
biases, softcapped logits, grouped-query attention. The switches are fields of `GPTConfig`; one that is off costs
nothing. Parameters are float32; `nanochat.precision` decides what matmuls run in.

To add a switch: a field of `GPTConfig`, its parameters in a constructor, how they begin in `GPT._init_rules`, its
arithmetic in a forward pass. Then the same in generate/fast_decode.py (until then such a model decodes more slowly) and
in interop/hf_code (for export), and what it costs in plan/memory.py. The rest follows from the field.

Shapes: B sequences of a batch, T tokens, C = n_embd, H query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.ops import pointwise
from nanochat.ops.attention import Cache, Piece, attend, attention_block, plan_attention, plan_ragged, segment_starts
from nanochat.ops.induction import start_induction
from nanochat.ops.linear import Linear, embedding, training_product_dtype
from nanochat.ops.loss import linear_cross_entropy, softcap
from nanochat.ops.recall import MOST_IDS, WINDOW, Recall, first_trust
from nanochat.precision import NARROW_RANGE, autocast_dtype

LOGIT_SOFTCAP = 15.0  # nanochat's: logits lie between −15 and 15, 15·tanh(x/15)
# One fixed epsilon for every dtype, so that a model gives the same results in each of them.
NORM_EPS = 1e-6
HEAD_SIZE = 128  # of models made by depth, as in nanochat
ROPE_BASE = 10000.0  # RoFormer, arXiv 2104.09864
VOCAB_MULTIPLE = 64  # tensor cores multiply tiles: a size that they divide is faster
# How many channels of the residual stream decide on a gate: a handful is enough for yes or no. Source: nanochat.
VALUE_GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 24
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


def flag(default: Any, help: str) -> Any:
    """A field of `GPTConfig` that is a flag of pretraining too, with the text of its --help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines the model. Stored in every checkpoint; a field that an old one lacks has its default.

    A field made by `flag` is a flag of `scripts.base_train` and part of an exported config.json without further ado.
    """

    sequence_len: int = 2048  # the longest context in tokens
    vocab_size: int = 65536  # V, without padding
    n_layer: int = 12
    n_head: int = 6  # H
    n_kv_head: int = flag(6, "Key/value heads, a divisor of the heads; default: as many as heads.")
    n_embd: int = 768  # C, the width of the residual stream
    residual_scalars: bool = flag(False, "Before layer i: x = λ[i]·x + μ[i]·x0, λ and μ learned, x0 the embedding.")
    residual_factors: bool = flag(False, "Before layer i: x = λ[i]·x, λ above 0 and learned; folds into the weights.")
    value_embeddings: bool = flag(False, "Every second layer adds a gated embedding of the token to its values.")
    smear: bool = flag(False, "Mix a gated share of the previous token's embedding into each token's.")
    backout: bool = flag(False, "Subtract a share of the middle layer's output before the final norm.")
    qk_scale: float = flag(1.0, "Factor on the normalised queries and on the keys: above 1 attention is sharper.")
    rope_base: float = flag(ROPE_BASE, "Base of the rotary frequencies.")
    key_offset: bool = flag(False, "Take half of each key's channels from the token before.")
    init: Literal["classic", "modern", "induction"] = flag("classic", "How weights begin, see `GPT.init_weights`.")
    window_pattern: str = flag("L", "Repeated over the layers: L sees the whole context, S a quarter; the last is L.")
    document_start: int = -1  # token whose document attention does not leave, where there is no cache; −1: none
    reach: int = flag(0, "Tokens before its own that a layer of L sees; S sees a quarter of it. 0: the whole context.")
    recall: int = flag(0, "Tokens of training text that the model carries, to look up its last ones in; 0: none.")
    logit_softcap: float | None = flag(LOGIT_SOFTCAP, "Bound of the logits, by a tanh; 0: none.")

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        # Rotary positions turn channels in pairs, so a head has an even number of them.
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd {self.n_embd} must be an even multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise ValueError(f"window_pattern is {self.window_pattern!r}: use the letters S and L, as in SSSL")
        if self.init not in ("classic", "modern", "induction"):
            raise ValueError(f"init is {self.init!r}, expected classic, modern or induction")
        if self.logit_softcap is not None and not self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap must be finite, got {self.logit_softcap}; 0 is none")
        if (self.logit_softcap or 0) <= 0:  # as a flag it is 0, where None leaves it to the recipe
            object.__setattr__(self, "logit_softcap", None)
        if self.residual_factors and self.residual_scalars:
            raise ValueError("residual_scalars holds the factors of residual_factors already: switch one of them off")
        for name in ("qk_scale", "rope_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.reach < 0 or self.recall < 0 or self.recall == 1:  # one token is followed by none
            raise ValueError(
                f"reach and recall must be 0 or more, and recall not 1: got {self.reach} and {self.recall}"
            )
        if self.recall and self.vocab_size > MOST_IDS:
            raise ValueError(f"recall works with at most {MOST_IDS} token ids, got vocab_size {self.vocab_size}")
        if self.key_offset and self.head_dim % 4:
            raise ValueError(f"key_offset needs heads of a multiple of 4 channels, got {self.head_dim}")
        if self.smear and self.n_embd < SMEAR_GATE_CHANNELS:
            raise ValueError(f"smear needs at least {SMEAR_GATE_CHANNELS} channels, got n_embd {self.n_embd}")

    @classmethod
    def from_depth(
        cls, depth: int, vocab_size: int, sequence_len: int = 2048, aspect_ratio: int = 64, **settings: Any
    ) -> GPTConfig:
        """The classic shape of a depth: 64 channels (or `aspect_ratio`) per layer, rounded up to whole heads.

        `settings` are further fields (n_kv_head must divide the number of heads), and `head_size` instead of 128.
        """
        head_size = settings.pop("head_size", HEAD_SIZE)
        for name, value in (("depth", depth), ("aspect_ratio", aspect_ratio), ("head_size", head_size)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        n_head = max(1, math.ceil(aspect_ratio * depth / head_size))
        shape = {"n_layer": depth, "n_head": n_head, "n_kv_head": n_head, "n_embd": n_head * head_size}
        return cls(sequence_len=sequence_len, vocab_size=vocab_size, **shape | settings)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The config of a checkpoint's record; ValueError names the fields that this version does not know."""
        values = {name: value for name, value in values.items() if name != "bigram_buckets" or value}  # was a switch
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            gone = (
                " (an embedding of pairs of tokens, which --recall has replaced)" if "bigram_buckets" in unknown else ""
            )
            raise ValueError(
                f"this checkpoint's model has settings unknown to this version: {', '.join(sorted(unknown))}{gone}"
            )
        return cls(**values)

    @classmethod
    def from_nanochat(cls, values: dict[str, Any], keys: Collection[str]) -> GPTConfig:
        """The config of nanochat's own checkpoint, classic or of July 2026 and later, by its record and state keys.

        Raises:
            ValueError: a version in between, whose other settings no key tells.
        """
        # nanochat records the shape only; which of its switches are on shows in the parameters that there are.
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
        """For each layer: how many tokens before its own a query sees (S: a quarter, in tiles of 128); None: all."""
        reach = min(self.reach or self.sequence_len, self.sequence_len)
        short = min(math.ceil(reach / 4 / 128) * 128, reach)  # a window that covers the context is none
        pattern = self.window_pattern.upper()
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        spans = (short if letter == "S" else reach for letter in letters)
        return [span if span < self.sequence_len else None for span in spans]

    def has_value_embedding(self, layer: int) -> bool:
        """True for the layers that add value embeddings: every second one, counted from the last."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2


def unnumbered(name: str) -> str:
    """A parameter's name without the number of its layer."""
    return re.sub(r"\.\d+", "", name)  # transformer.h.3.attn.c_q.weight -> transformer.h.attn.c_q.weight


def norm(x: Tensor) -> Tensor:
    """RMSNorm without parameters over the last dimension, in the dtype of `x`."""
    return pointwise.rms_norm(x, NORM_EPS)


@dataclass
class Context:
    """Everything about a forward pass that is the same in all layers."""

    cos: Tensor  # (1 or B, T, 1, D); B where the sequences stand at different positions
    sin: Tensor
    pieces: dict[int | None, list[Piece]]  # by window: into which calls attention is cut
    kv_cache: Cache | None = None
    first: Tensor | None = None  # (B, T) bool, true where a segment begins; None: at position 0 only


class Attention(nn.Module):
    """Causal self-attention. With K < H each key/value head serves H/K query heads, and the cache is that much smaller.

    Grouped queries: arXiv 2305.13245.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        kv_dim = self.n_kv_head * self.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)  # C -> H·D, which is C
        self.c_k = Linear(config.n_embd, kv_dim)  # C -> K·D
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)  # H·D -> C, mixes what the heads have found
        gated = config.has_value_embedding(layer)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, self.n_kv_head) if gated else None
        self.window = config.windows[layer]
        self.product_dtype: torch.dtype | None = None  # see GPT.set_product_dtype
        self.key_offset = config.key_offset
        # A factor on q and on k is a factor on their product, which attention multiplies with anyway (by 1/√D).
        self.scale = None if config.qk_scale == 1.0 else config.qk_scale**2 * self.head_dim**-0.5

    def forward(self, x: Tensor, context: Context, value: Tensor | None = None) -> Tensor:
        """x (B, T, C); value (B, T, K·D): the tokens' value embeddings in this layer, if it has them."""
        B, T, C = x.shape
        maps, pieces = (self.c_q, self.c_k, self.c_v), context.pieces[self.window]
        if context.kv_cache is None and value is None and not self.key_offset and all(type(m) is Linear for m in maps):
            angles, how = (context.cos, context.sin), (pieces, self.scale, self.product_dtype)
            if (y := attention_block(x, [m.weight for m in maps], angles, NORM_EPS, *how)) is not None:  # as below
                return self.c_proj(y)
        q, k, v = (m(x).view(B, T, -1, self.head_dim) for m in maps)  # (B, T, H or K, D)
        if self.ve_gate is not None and value is not None:
            # Source: value residuals, arXiv 2410.17897; gated and as an embedding: modded-nanogpt, nanochat.
            gate = 3.0 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, K), begins near 1.5
            v = v + gate.to(v.dtype).unsqueeze(-1) * value.to(v.dtype).view(v.shape)  # (B, T, K, 1) · (B, T, K, D)
        # Normalised queries and keys bound the scores, so that no step of training makes the softmax explode (arXiv
        # 2302.05442). Rotation and norm are in float32: late positions turn by large angles, and bfloat16 has 8 bits.
        q, k = (pointwise.rotary_norm(x, context.cos, context.sin, NORM_EPS, v.dtype) for x in (q, k))
        if context.kv_cache is not None:
            # Keys are stored with their rotation: a position never changes. The cache offsets them, where it is asked.
            k, v = context.kv_cache.update(self.layer, k, v)  # (B, all, K, D)
        elif self.key_offset:
            k = pointwise.offset_keys(k, context.first)
        y = attend(q, k, v, pieces, self.scale, self.product_dtype)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """Two matmuls around a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)  # two thirds of a layer's weights are in the MLP
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)  # (B, T, 4C)
        if h.dtype not in NARROW_RANGE:
            return self.c_proj(pointwise.relu_squared(h))
        # In float16 a square overflows from 256 on: multiply a scaled one, and undo the scale in float32.
        square, factor = pointwise.scaled_square(F.relu(h))
        return self.c_proj(square).float() * factor


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context, value: Tensor | None = None) -> Tensor:
        # The stream itself is never normalised, so that gradients reach every layer through the sums unchanged.
        x, y = pointwise.add_norm(x, None, NORM_EPS, self.attn.product_dtype)
        x, y = pointwise.add_norm(x, self.attn(y, context, value), NORM_EPS, self.attn.product_dtype)
        return pointwise.add(x, self.mlp(y))


class GPT(nn.Module):
    """The language model. State keys are nanochat's: transformer.wte, transformer.h.{i}…, lm_head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.windows = set(config.windows)
        # wte and lm_head have up to 63 rows more than there are tokens: they are never looked up and never predicted.
        self.transformer = nn.ModuleDict(
            {
                "wte": embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
            }
        )
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        # The parameters of the switches that are on, under nanochat's names.
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))  # λ
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))  # μ
        if config.residual_factors:
            self.resid_logs = nn.Parameter(torch.zeros(config.n_layer))  # ln λ, so that λ stays above 0
        if config.value_embeddings:
            gated = [i for i in range(config.n_layer) if config.has_value_embedding(i)]
            kv_dim = config.n_kv_head * config.head_dim
            self.value_embeds = nn.ModuleDict({str(i): embedding(config.padded_vocab_size, kv_dim) for i in gated})
        if config.smear:
            self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))  # the largest share
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))  # the share that is subtracted
        if config.recall:
            self.recall = Recall(config.recall, config.padded_vocab_size, config.n_embd)
        # How to compute, not what: none of this changes the function beyond rounding.
        self.activation_checkpointing = False
        self.loss_chunk_bytes: int | None = None  # None: by the device, see nanochat/ops/loss.py
        self.product_dtype: torch.dtype | None = None  # see set_product_dtype
        # Buffers move with the model to its device. They follow from the config, so no checkpoint holds them.
        cos, sin = pointwise.rotary_tables(config.sequence_len, config.head_dim, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def set_product_dtype(self, dtype: torch.dtype | None) -> None:
        """Round float32 to `dtype` for the products of training on a CPU (nanochat/ops/linear.py); None: not at all."""
        for module in self.modules():
            if hasattr(module, "product_dtype"):
                cast(Any, module).product_dtype = dtype

    @property
    def wte(self) -> nn.Embedding:
        """The token embedding."""
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return cast(nn.ModuleList, self.transformer["h"])

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The layers' matrices, which Muon optimizes; AdamW has everything else."""
        return [p for p in self.blocks.parameters() if p.dim() == 2]

    def value_embed(self, layer: int) -> Tensor:
        """The table of value embeddings (V, K·D) of a layer that has one."""
        return cast(nn.Embedding, self.value_embeds[str(layer)]).weight

    @property
    def max_seq_len(self) -> int:
        """The context length the model is trained for."""
        return self.config.sequence_len

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights.

        Classic: embedding N(0, 1); matrices N(0, min(1, √(out/in)) / √in); outputs of a block and lm_head zero.
        Modern: embedding N(0, 0.8); lm_head N(0, 0.001); matrices uniform with deviation 1/√in, 0.4/√in for c_fc;
        outputs of a block zero. Induction: modern, and two heads that find earlier occurrences (ops/induction.py).
        The switches' parameters: close to what the model would be without them.

        Raises:
            ValueError: there is no rule for a parameter.
        """
        rules = self._init_rules(generator)
        for name, p in self.named_parameters():
            if unnumbered(name) not in rules:
                raise ValueError(f"no rule says how parameter {name} begins: add one to GPT._init_rules")
            rules[unnumbered(name)](p)
        if self.config.init == "induction":
            start_induction(self.wte.weight, self.blocks[:2], self.config.head_dim, self.config.rope_base, generator)

    def _init_rules(self, generator: torch.Generator | None) -> dict[str, Callable[[Tensor], object]]:
        """How each parameter begins, by its name without numbers. Source: nanochat."""
        modern = self.config.init != "classic"

        def normal(std: float) -> Callable[[Tensor], object]:
            return lambda p: p.normal_(0.0, std, generator=generator)

        def uniform(low: float, high: float) -> Callable[[Tensor], object]:
            return lambda p: p.uniform_(low, high, generator=generator)

        def falling(start: float, by: float) -> Callable[[Tensor], object]:
            return lambda p: p.copy_(start - by * torch.linspace(0.0, 1.0, p.size(0), device=p.device))

        def matrix(p: Tensor, share: float = 1.0) -> object:
            fan_out, fan_in = p.shape
            if not modern:
                # 1/√in keeps the size of activations; what makes wide of narrow gets less. Spectral: arXiv 2310.17813.
                return normal(fan_in**-0.5 * min(1.0, math.sqrt(fan_out / fan_in)))(p)
            bound = math.sqrt(3 / fan_in) * share  # a uniform distribution's deviation is its bound / √3
            return uniform(-bound, bound)(p)

        table_bound = math.sqrt(3 / self.config.n_embd)
        return {
            "transformer.wte.weight": normal(0.8 if modern else 1.0),
            "transformer.h.attn.c_q.weight": matrix,
            "transformer.h.attn.c_k.weight": matrix,
            "transformer.h.attn.c_v.weight": matrix,
            # A block's outputs begin as zero: every layer passes the residual stream on as it is.
            "transformer.h.attn.c_proj.weight": Tensor.zero_,
            "transformer.h.attn.ve_gate.weight": uniform(0.0, 0.02),
            "transformer.h.mlp.c_fc.weight": partial(matrix, share=0.4),
            "transformer.h.mlp.c_proj.weight": Tensor.zero_,
            # Logits of nearly zero: the first loss is that of guessing evenly, ln V.
            "lm_head.weight": normal(0.001) if modern else Tensor.zero_,
            # Scalars of the layers, from the first to the last.
            "resid_lambdas": falling(1.15, by=0.10),
            "x0_lambdas": falling(0.20, by=0.15),
            "resid_logs": lambda p: p.copy_(torch.linspace(1.15, 1.05, p.size(0)).log()),
            "value_embeds.weight": uniform(-table_bound, table_bound),
            # λ = 0: at the start nothing is smeared, but λ has a gradient.
            "smear_gate.weight": uniform(0.0, 0.02),
            "smear_lambda": Tensor.zero_,
            "backout_lambda": lambda p: p.fill_(0.2),
            "recall.followers.weight": uniform(-0.1 * table_bound, 0.1 * table_bound),
            "recall.scale": lambda p: p.fill_(1.0),
            "recall.trust": lambda p: p.copy_(first_trust()),
        }

    def get_device(self) -> torch.device:
        """The device the parameters are on."""
        return self.lm_head.weight.device

    def num_params(self) -> int:
        """Number of all parameters, embedding included."""
        return sum(p.numel() for p in self.parameters())

    def num_matmul_params(self) -> int:
        """Number of parameters a token is multiplied with: all but embeddings, which are looked up, and scalars."""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def estimate_flops(self, sequence_len: int | None = None) -> int:
        """Training FLOPs per token: 6 per matmul parameter, 12·H·D·T for each layer's attention, T at most its window.

        Source: PaLM, arXiv 2204.02311, B.
        """
        # A weight costs a multiplication and an addition forward, twice that backward (for the input and for itself).
        c, T = self.config, sequence_len or self.config.sequence_len
        reach = sum(T if window is None else min(window, T) for window in c.windows)
        return 6 * self.num_matmul_params() + 12 * c.n_head * c.head_dim * reach

    def _context(self, idx: Tensor, kv_cache: Cache | None, segments: Tensor | None) -> Context:
        """Rotary tables and attention pieces, made once for all layers."""
        T, device, windows = idx.size(1), idx.device, self.windows
        if kv_cache is not None:
            # The tokens go on where the cache ends, each sequence at its own position.
            if segments is not None:
                raise ValueError("segments are for training: with a kv_cache every sequence is one segment")
            if kv_cache.key_offset != self.config.key_offset:
                raise ValueError(f"the model has key_offset={self.config.key_offset}, its kv_cache the opposite")
            positions = kv_cache.positions(T)  # (1 or B, T)
            mask = kv_cache.attention_mask()
            if mask is None:  # all sequences are equally long
                pieces = {w: plan_attention(T, kv_cache.get_pos() + T, device, w) for w in windows}
            else:
                pieces = {w: plan_ragged(mask, positions, w) for w in windows}
            return Context(self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2), pieces, kv_cache)
        if self.cos.size(0) < T:
            raise ValueError(f"{T} tokens are more than the model's context of {self.config.sequence_len}")
        if segments is None:
            pieces = {w: plan_attention(T, T, device, w) for w in windows}
            return Context(self.cos[None, :T, None], self.sin[None, :T, None], pieces)
        if segments.shape != idx.shape:
            raise ValueError(f"segments are {tuple(segments.shape)}, the tokens {tuple(idx.shape)}: give one per token")
        # Several documents in one sequence: each begins at position 0, and no query sees beyond its start.
        starts = segment_starts(segments)
        positions = torch.arange(T, device=device) - starts  # (B, T)
        pieces = {w: plan_attention(T, T, device, w, starts) for w in windows}
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        return Context(cos, sin, pieces, first=positions == 0)

    def embed(
        self, idx: Tensor, kv_cache: Cache | None = None, first: Tensor | None = None, found: Tensor | None = None
    ) -> Tensor:
        """The normalised embedding of tokens (B, T), with what the switches take from the tokens before: (B, T, C)."""
        plain = x = self._normed_wte(idx)
        if not (self.config.smear or self.config.recall):
            return x
        n = WINDOW - 1 if self.config.recall else 1
        text = F.pad(idx, (n, 0), value=-1) if kv_cache is None else kv_cache.with_previous(idx, n)  # (B, n + T)
        before = text[:, n - 1 : -1]  # the token before each, (B, T); −1 where a sequence or a segment begins
        if first is not None:  # never with a cache
            before = before.masked_fill(first, -1)
        if self.config.recall:
            found = self.recall.look_up(text, n, first) if found is None else found
            x = x + self.recall(found).to(x.dtype)
        if self.config.smear:
            # The embeddings before: without a cache they are here, one to the left; with one they are looked up again.
            shifted = F.pad(plain, (0, 0, 1, -1)) if kv_cache is None else self._normed_wte(before.clamp(min=0))
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(plain[..., :SMEAR_GATE_CHANNELS]))  # (B, T, 1)
            x = x + gate.masked_fill(before.unsqueeze(-1) < 0, 0.0).to(x.dtype) * shifted
        return x

    def _normed_wte(self, idx: Tensor) -> Tensor:
        x = self.wte(idx)  # (B, T, C)
        # bfloat16 has float32's range, so the residual stream may be narrow; float16 has not, so it stays float32.
        compute_dtype = autocast_dtype(x)  # what the products will be made in
        return norm(x if compute_dtype in NARROW_RANGE else x.to(compute_dtype))

    def hidden(
        self,
        idx: Tensor,
        kv_cache: Cache | None = None,
        segments: Tensor | None = None,
        found: Tensor | None = None,
    ) -> Tensor:
        """The final normalised hidden states of tokens `idx` (B, T): (B, T, C). The rest: see `forward`."""
        c = self.config
        if segments is None and kv_cache is None and c.document_start >= 0:
            segments = (idx == c.document_start).cumsum(1)
        context = self._context(idx, kv_cache, segments)
        x = x0 = self.embed(idx, kv_cache, context.first, found)
        middle = None
        for i, block in enumerate(self.blocks):
            if c.residual_scalars:
                # Every layer can look at the token itself again, whatever the layers before have made of it.
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            elif c.residual_factors:
                x = self.resid_logs[i].exp() * x
            value = F.embedding(idx, self.value_embed(i)) if c.has_value_embedding(i) else None  # (B, T, K·D)
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Keep the block's input only and run the block once more in the backward pass.
                x = checkpoint(block, x, context, value, use_reentrant=False)
            else:
                x = block(x, context, value)
            if i == c.n_layer // 2 and c.backout:
                middle = x
        if middle is not None:
            # What the first half wrote for the second half to read is of no use for the prediction.
            x = x - self.backout_lambda.to(x.dtype) * middle
        if kv_cache is not None:
            kv_cache.advance(idx.size(1))  # only now: every layer has stored its keys at the same positions
        return norm(x)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: Cache | None = None,
        loss_reduction: Literal["mean", "sum", "none"] = "mean",
        segments: Tensor | None = None,
        found: Tensor | None = None,
    ) -> Tensor:
        """Logits of tokens `idx`, or the loss against `targets`.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids of the next tokens; −1 is ignored.
            kv_cache: keys and values of the tokens before `idx`.
            loss_reduction: over the targets that count; "none" gives (B, T) with 0 where ignored.
            segments: (B, T) integers, the same inside a document or conversation and different between neighbours:
                each is computed as if it were alone. Not together with a kv_cache.
            found: what `Recall.look_up` would find; given in training, where a text must not find itself.

        Returns:
            float32 logits (B, T, V), softcapped by default, or the loss in float32.

        Raises:
            ValueError: more tokens than the context, or segments of another shape or with a kv_cache.
        """
        x = self.hidden(idx, kv_cache, segments, found)
        return self.logits_at(x) if targets is None else self.loss(x, targets, loss_reduction)

    def loss(self, x: Tensor, targets: Tensor, reduction: Literal["mean", "sum", "none"] = "mean") -> Tensor:
        """The loss of hidden states `x` (B, T, C) against `targets` (B, T); never compiled, unlike `hidden`."""
        # The logits of a batch (B·T·V) would be the largest tensor of all: they are made and used a chunk at a time.
        dtype, chunk, c = training_product_dtype(x, self.product_dtype), self.loss_chunk_bytes, self.config
        return linear_cross_entropy(
            x, self.lm_head.weight, targets, c.vocab_size, c.logit_softcap, reduction, dtype, chunk
        )

    def logits_at(self, x: Tensor) -> Tensor:
        """float32 logits of chosen hidden states (…, C) -> (…, V): for when few positions matter."""
        logits = self.lm_head(x)[..., : self.config.vocab_size]  # without the padding rows
        return softcap(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.config.logit_softcap)
