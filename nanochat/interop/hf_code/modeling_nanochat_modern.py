"""A nanochat model with modern additions, for Hugging Face transformers (trust_remote_code). Needs nothing else.

The classic parts: rotary positions, RMSNorm without parameters, on queries and keys too, squared ReLU, softcapped
logits. The additions: scalars on the residual stream, gated value embeddings, smear (a share of the previous token's
embedding), backout (the middle layer subtracted before the end), sharper attention, keys with half of their channels
from the token before, sliding windows, hashed bigrams.

Shapes: B batch, T tokens, S tokens with the cached ones, C width, H query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat_modern import NanoChatModernConfig

# What transformers calls the cache: since 5.24, and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def rotate(x, cos, sin):
    """Rotary positions, in float32: x (B, T, H, D), the tables (B, T, 1, D)."""
    x = x.float()
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


def offset_keys(k, follows):
    """Take half of the channels of k (B, K, S, D) from the position before; zeros where `follows` (B, S) is false."""
    own, lent = k.unflatten(-1, (2, 2, -1)).unbind(-2)  # (B, K, S, 2, D/4)
    before = F.pad(lent, (0, 0, 0, 0, 1, -1)).masked_fill(~follows[:, None, :, None, None], 0.0)
    return torch.stack((own, before), dim=-2).flatten(-3)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.n_head, self.n_kv_head = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // self.n_head
        kv_dim = self.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.c_k = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.c_v = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.scale = config.qk_scale**2 * self.head_dim**-0.5
        self.key_offset = config.key_offset
        self.channels = config.value_gate_channels
        if layer in config.value_embedding_layers:
            self.ve_gate = nn.Linear(self.channels, self.n_kv_head, bias=False)

    def forward(self, x, cos, sin, mask, follows, cache, value):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if value is not None:
            gate = 3.0 * torch.sigmoid(self.ve_gate(x[..., : self.channels]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * value.to(v.dtype).view(v.shape)
        q, k = (F.rms_norm(rotate(t, cos, sin), (self.head_dim,), eps=self.eps).to(v.dtype) for t in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D)
        if self.key_offset:
            k = offset_keys(k, follows)
        repeats = self.n_head // self.n_kv_head
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matmuls around a squared ReLU."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        h = F.relu(self.c_fc(x))
        if h.dtype != torch.float16:
            return self.c_proj(h * h)
        # The square of anything above 255 overflows float16: take a power of two out of each row, put it back after.
        peak = h.amax(dim=-1, keepdim=True).float()
        exponent = torch.ceil(torch.log2(peak.clamp(min=1.0) / 128)).clamp(min=0)
        h = h * torch.exp2(-exponent).to(h.dtype)
        return self.c_proj(h * h).float() * torch.exp2(2 * exponent)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.width, self.eps = config.hidden_size, config.rms_norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def norm(self, x):
        weight_dtype = self.mlp.c_fc.weight.dtype
        return F.rms_norm(x.float(), (self.width,), eps=self.eps).to(weight_dtype)

    def forward(self, x, cos, sin, mask, follows, cache, value):
        x = x + self.attn(self.norm(x), cos, sin, mask, follows, cache, value)
        return x + self.mlp(self.norm(x))


class NanoChatModernForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; parameters have nanochat's names."""

    config_class = NanoChatModernConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config):
        super().__init__(config)
        rows, width, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
        blocks = nn.ModuleList([Block(config, i) for i in range(layers)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, width), "h": blocks})
        self.lm_head = nn.Linear(width, rows, bias=False)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        if config.value_embedding_layers:
            kv_dim = config.num_key_value_heads * (width // config.num_attention_heads)
            self.value_embeds = nn.ModuleDict(
                {str(i): nn.Embedding(rows, kv_dim) for i in config.value_embedding_layers}
            )
        if config.smear:
            self.smear_gate = nn.Linear(config.smear_gate_channels, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        if config.bigram_buckets:
            self.bigram = nn.Embedding(config.bigram_buckets, width)
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.transformer["wte"]

    def get_output_embeddings(self):
        """The layer that gives the logits."""
        return self.lm_head

    def _embed(self, ids, before):
        """The normalised embedding (B, T, C) of tokens, with what comes from the token before (−1: none)."""
        c, wte = self.config, self.transformer["wte"]

        def normed(tokens):
            x = wte(tokens)
            return F.rms_norm(x.float(), (c.hidden_size,), eps=c.rms_norm_eps).to(x.dtype)

        plain = x = normed(ids)
        if c.bigram_buckets:
            x = x + self.bigram((c.bigram_hash[0] * ids + c.bigram_hash[1] * (before + 1)) % c.bigram_buckets)
        if c.smear:
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(plain[..., : c.smear_gate_channels]))
            x = x + gate.masked_fill(before.unsqueeze(-1) < 0, 0.0) * normed(before.clamp(min=0))
        return x

    def _rotary(self, positions, head_dim):
        """cos and ±sin for positions (B, T): (B, T, 1, D) each."""
        channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
        angle = positions.float().unsqueeze(-1) * self.config.rope_base ** (-channel / head_dim)  # (B, T, D/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat((cos, cos), -1).unsqueeze(2), torch.cat((sin, -sin), -1).unsqueeze(2)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        c, (B, T), device = self.config, input_ids.shape, input_ids.device
        use_cache = c.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        S = past + T
        real = torch.ones(B, S, dtype=torch.bool, device=device)  # which of all tokens are no padding
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask[:, -S:].bool()
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        # What stands before each token: the cache remembers the last token it has seen.
        last = getattr(cache, "last_ids", None) if past else None
        before = F.pad(input_ids, (1, -1), value=-1)
        if last is not None:
            before[:, 0] = last
        follows = F.pad(real, (1, -1), value=False)  # (B, S), whether a real token stands before
        before = before.masked_fill(~follows[:, past:], -1)
        if cache is not None:
            cache.last_ids = input_ids[:, -1]

        x = x0 = self._embed(input_ids, before)
        cos, sin = self._rotary(position_ids, c.hidden_size // c.num_attention_heads)
        query = torch.arange(past, S, device=device)[:, None]
        key = torch.arange(S, device=device)[None]
        # A padding query sees itself, so that no row of the softmax is empty.
        visible = ((key <= query) & real[:, None]) | (key == query)  # (B, T, S)
        masks = {
            window: (visible if window is None else visible & (key >= query - window)).unsqueeze(1)
            for window in set(c.windows)
        }
        middle = None
        for i, block in enumerate(self.transformer["h"]):
            if c.residual_scalars:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = self.value_embeds[str(i)](input_ids) if i in c.value_embedding_layers else None
            x = block(x, cos, sin, masks[c.windows[i]], follows, cache, value)
            if i == c.num_hidden_layers // 2 and c.backout:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda * middle
        x = F.rms_norm(x.float(), (c.hidden_size,), eps=c.rms_norm_eps).to(self.lm_head.weight.dtype)
        kept = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) and logits_to_keep else x
        logits = self.lm_head(kept).float()
        logits = c.final_logit_softcapping * torch.tanh(logits / c.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
