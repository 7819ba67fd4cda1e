"""A nanochat model with modern additions, for Hugging Face transformers (trust_remote_code). Needs nothing else.

The classic parts: rotary positions, RMSNorm without parameters, on queries and keys too, squared ReLU, softcapped
logits. The additions: scalars on the residual stream, gated value embeddings, smear (a share of the previous token's
embedding), backout (the middle layer subtracted before the end), sharper attention, keys with half of their channels
from the token before, sliding windows, recall (what followed the last tokens elsewhere, in a text that it carries).

The cache is transformers' own, dynamic or static. Smear and recall also need the last tokens that it has seen: the ids
are kept in the cache itself, in three more channels of the first layer's values, so that they follow when beam search
moves or repeats rows, and when the cache is cropped.

Shapes: B batch, T tokens, S tokens with the cached ones, C width, H query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat_modern import NanoChatModernConfig

# What transformers calls the cache: since 5.24, and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# An id as this many digits to this base: whole numbers up to 256 are exact in every dtype, bfloat16 included.
ID_DIGITS, ID_BASE = 3, 256


def id_digits(ids):
    """The digits of ids (B, T), the lowest first: (B, T, ID_DIGITS)."""
    return torch.stack([ids // ID_BASE**i % ID_BASE for i in range(ID_DIGITS)], dim=-1)


def cached_ids(cache, past, n):
    """The ids of the last n of the `past` tokens in a cache, (B, n); where there are fewer, anything comes first."""
    values = cache.layers[0].values
    at = torch.arange(past - n, past, device=values.device).clamp(min=0)
    digits = values[:, 0, at, -ID_DIGITS:].long()  # the same in every head
    return sum(digits[..., i] * ID_BASE**i for i in range(ID_DIGITS))


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

    def forward(self, x, cos, sin, mask, follows, cache, value, digits):
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
            if digits is not None:
                v = torch.cat((v, digits[:, None].expand(-1, self.n_kv_head, -1, -1).to(v.dtype)), dim=-1)
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D)
            v = v[..., : self.head_dim]
            room = k.size(2) - mask.size(-1)  # of a static cache, whose slots that are still free nobody may see
            mask, follows = F.pad(mask, (0, room), value=False), F.pad(follows, (0, room), value=False)
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


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.width, self.eps = config.hidden_size, config.rms_norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def norm(self, x):
        weight_dtype = self.mlp.c_fc.weight.dtype
        return F.rms_norm(x.float(), (self.width,), eps=self.eps).to(weight_dtype)

    def forward(self, x, cos, sin, mask, follows, cache, value, digits=None):
        x = x + self.attn(self.norm(x), cos, sin, mask, follows, cache, value, digits)
        return x + self.mlp(self.norm(x))


class Recall(nn.Module):
    """What followed the longest matches of the last tokens in a text that the model carries.

    The positions of the text are in the order of the tokens up to them, read backwards: `keys`. The longest matches of
    a context are the neighbours of the place that it would have there. The more rare tokens the text before a match has
    in common with the context, the higher its level. N: tokens of the text, L: of a key, W: of a window, F: matches.
    """

    def __init__(self, config):
        super().__init__()
        self.shortest, self.longest = config.recall_lengths
        self.most, self.neighbours = config.recall_followers, config.recall_neighbours
        self.window, self.common = config.recall_window, config.recall_common
        self.levels, self.level = config.recall_levels
        self.numbers, self.grades = config.recall_sureness
        rows = (self.longest - self.shortest + 1) * self.numbers * self.grades
        self.followers = nn.Embedding(config.vocab_size, config.hidden_size)
        self.trust = nn.Parameter(torch.zeros(self.longest + 1 + self.levels))
        self.scale = nn.Parameter(torch.ones(rows, config.hidden_size))
        self.register_buffer("text", torch.zeros(config.recall, dtype=torch.int32))
        self.register_buffer("order", torch.arange(config.recall - 1, dtype=torch.int32))
        self.counted = None

    def weights(self):
        """(V,): what each token says of a subject. Counted when a text is there, and again for another one."""
        of = self.text.device, self.text._version
        if self.counted is None or self.counted[0] != of:
            counts = torch.bincount(self.text, minlength=self.followers.num_embeddings).clamp(min=1)
            ratio = len(self.text) // (self.common * counts)
            bits = (ratio.unsqueeze(-1) >= 2 ** torch.arange(31, device=ratio.device)).sum(-1)
            self.counted = of, bits
        return self.counted[1]

    def keys(self, at):
        """The tokens of the text up to positions `at`, backwards: (…,) -> (…, L); −1 before its beginning."""
        back = at.unsqueeze(-1) - torch.arange(self.longest, device=at.device)
        return self.text[back.clamp(min=0)].masked_fill(back < 0, -1)

    def places(self, wanted):
        """How many keys of the text are smaller than each of `wanted` (…, L)."""
        N = len(self.order)
        low = torch.zeros(wanted.shape[:-1], dtype=torch.long, device=wanted.device)
        high = low + N
        for _ in range(N.bit_length()):  # bisection
            middle = (low + high) // 2
            key = self.keys(self.order[middle.clamp(max=N - 1)])
            first = (key != wanted).int().argmax(-1, keepdim=True)  # where they part; 0 where they do not
            smaller = (key.gather(-1, first) < wanted.gather(-1, first)).squeeze(-1) & (low < high)
            low, high = torch.where(smaller, middle + 1, low), torch.where(smaller, high, middle)
        return low

    def subject_levels(self, at, windows):
        """How much the text up to positions `at` (n, F), before matches, has in common with contexts (n, W): (n, F)."""
        # The match's first token, too: nothing is before a document.
        back = at.unsqueeze(-1) - torch.arange(-1, self.window, device=at.device)
        before = self.text[back.clamp(min=0)].masked_fill(back < 0, self.text[0]).long()  # (n, F, 1 + W)
        inside = ((before == self.text[0]).cumsum(-1) == 0)[..., 1:]
        before = before[..., 1:]
        V = self.followers.num_embeddings
        present = torch.zeros(len(at), V + 1, dtype=torch.bool, device=at.device)
        present.scatter_(1, windows.masked_fill(windows < 0, V).long(), True)  # the last one takes the gaps
        present = present.gather(1, before.flatten(1)).view_as(before)
        before = before.masked_fill(~(inside & present), -1).sort(-1).values
        once = before.diff(dim=-1, prepend=torch.full_like(before[..., :1], -1)) != 0  # each token counts once
        shared = (self.weights()[before.clamp(min=0)] * once).sum(-1)
        return (shared // self.level).clamp(max=self.levels - 1)

    def find(self, ids):
        """Look up each of the last T tokens of ids (B, W − 1 + T); −1: none.

        Returns the longest matches, what followed, how long they are, 0 without one, and their levels: (B, T, F) each.
        """
        windows = ids.unfold(1, self.window, 1).flip(-1).int()  # (B, T, W), the last token first
        opens = windows == self.text[0]  # the token that a document begins with
        # Nothing counts before a document's beginning, and in a match nothing beyond a gap.
        windows = windows.masked_fill(opens.cumsum(-1) > opens, -1)
        wanted = windows[..., : self.longest]
        wanted = wanted.masked_fill((wanted < 0).cumsum(-1) > 0, -1)
        ahead = torch.arange(self.neighbours, device=ids.device)
        # By turns the next above and the next below: (B, T, 2·neighbours). A stable sort leaves the nearer first.
        beside = self.places(wanted).unsqueeze(-1) + torch.stack((ahead, -1 - ahead), -1).flatten()
        there = (beside >= 0) & (beside < len(self.order))
        found = self.order[beside.clamp(0, len(self.order) - 1)].long()
        same = (self.keys(found) == wanted.unsqueeze(-2)) & (wanted >= 0).unsqueeze(-2)
        length = same.int().cumprod(-1).sum(-1) * there
        length, best = length.sort(dim=-1, descending=True, stable=True)
        length = length[..., : self.most].masked_fill(length[..., : self.most] < self.shortest, 0)
        found = found.gather(-1, best[..., : self.most])  # (B, T, F)
        # Some tokens at a time: each has F windows of W tokens.
        parts = zip((found - length).flatten(0, 1).split(64), windows.flatten(0, 1).split(64), strict=True)
        levels = torch.cat([self.subject_levels(at, subjects) for at, subjects in parts])
        return self.text[found + 1].long() * (length > 0), length, levels.view_as(length) * (length > 0)

    def forward(self, ids):
        """ids (B, W − 1 + T) -> (B, T, C)."""
        tokens, length, level = self.find(ids)
        by_length, by_level = self.trust.float().split((self.longest + 1, self.levels))
        trust = (by_length[length] + by_level[level]).masked_fill(length == 0, -1e4)
        share = trust.softmax(-1) * (length > 0)
        mean = F.embedding_bag(
            tokens.flatten(0, 1),
            self.followers.weight,
            mode="sum",
            per_sample_weights=share.flatten(0, 1).to(self.followers.weight.dtype),
        ).view(*ids.shape[:1], -1, self.followers.embedding_dim)
        longest = length[..., 0]
        number = (length == longest.unsqueeze(-1)).sum(-1).clamp(max=self.numbers) - 1
        grade = level.amax(-1) * self.grades // self.levels
        row = ((longest - self.shortest).clamp(min=0) * self.numbers + number) * self.grades + grade
        return mean * F.embedding(row, self.scale)


class NanoChatModernForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; parameters have nanochat's names."""

    config_class = NanoChatModernConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    _no_split_modules = ("Block",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # num_items_in_batch

    def __init__(self, config):
        super().__init__(config)
        rows, width, layers = config.vocab_size, config.hidden_size, config.num_hidden_layers
        blocks = nn.ModuleList([Block(config, i) for i in range(layers)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(rows, width), "h": blocks})
        self.lm_head = nn.Linear(width, rows, bias=False)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(layers))
            self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        if config.residual_factors:
            self.resid_logs = nn.Parameter(torch.zeros(layers))
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
        if config.recall:
            self.recall = Recall(config)
        self.looks_back = config.recall_window - 1 if config.recall else int(config.smear)  # how many tokens
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.transformer["wte"]

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs):
        """Leave the mask as it is, one number a token: windows and smear need to know which tokens are padding."""
        return attention_mask

    def prepare_inputs_for_generation(self, *args, tokenizer=None, assistant_tokenizer=None, **kwargs):
        """What `forward` takes: transformers passes on the tokenizer too that stop_strings need."""
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def get_output_embeddings(self):
        """The layer that gives the logits."""
        return self.lm_head

    def _embed(self, ids, seen):
        """The normalised embedding (B, T, C) of tokens, with what comes from those before.

        `seen` (B, looks_back + T): these tokens behind those before them, −1 where there is none.
        """
        c, wte = self.config, self.transformer["wte"]

        def normed(tokens):
            x = wte(tokens)
            return F.rms_norm(x.float(), (c.hidden_size,), eps=c.rms_norm_eps).to(x.dtype)

        plain = x = normed(ids)
        if c.recall:
            x = x + self.recall(seen)
        if c.smear:
            before = seen[:, self.looks_back - 1 : -1]
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
        num_items_in_batch=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """Logits of tokens, and their loss where there are labels (-100 is ignored), as in transformers' own models.

        The attention mask is (B, S), 1 for tokens and 0 for padding. What is not named here is not offered: there are
        no inputs_embeds, since some switches look at the tokens themselves, and no attention probabilities.
        """
        c, (B, T), device = self.config, input_ids.shape, input_ids.device
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), got {tuple(attention_mask.shape)}")
        use_cache = c.use_cache if use_cache is None else use_cache
        checkpointed = any(block.gradient_checkpointing for block in self.transformer["h"])
        cache = past_key_values if cache is None else cache
        if self.training and checkpointed and torch.is_grad_enabled():
            use_cache = False  # what a layer computes twice must not be cached twice
            if cache is not None:
                raise ValueError(
                    "training with activation checkpointing takes no cache: pass none, or turn checkpointing off"
                )
        if use_cache and cache is None:
            cache = DynamicCache()
        past = int(cache.get_seq_length()) if cache is not None else 0
        S = past + T
        real = torch.ones(B, S, dtype=torch.bool, device=device)  # which of all tokens are no padding
        if attention_mask is not None:
            real = attention_mask[:, :S].bool()
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        # What stands before each token.
        follows = F.pad(real, (1, -1), value=False)  # (B, S), whether a real token stands before
        n, seen, digits = self.looks_back, input_ids, None
        if n:
            seen = torch.cat((cached_ids(cache, past, n), seen), 1) if past else F.pad(seen, (n, 0))
            seen = seen.masked_fill(~F.pad(real, (n, 0), value=False)[:, past:], -1)  # (B, n + T)
            digits = id_digits(input_ids)
        x = x0 = self._embed(input_ids, seen)
        cos, sin = self._rotary(position_ids, c.hidden_size // c.num_attention_heads)
        query = torch.arange(past, S, device=device)[:, None]
        key = torch.arange(S, device=device)[None]
        # A padding query sees itself, so that no row of the softmax is empty.
        visible = ((key <= query) & real[:, None]) | (key == query)  # (B, T, S)
        masks = {
            window: (visible if window is None else visible & (key >= query - window)).unsqueeze(1)
            for window in set(c.windows)
        }
        middle, states = None, []
        for i, block in enumerate(self.transformer["h"]):
            if c.residual_scalars:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            elif c.residual_factors:
                x = self.resid_logs[i].exp() * x
            value = self.value_embeds[str(i)](input_ids) if i in c.value_embedding_layers else None
            states.append(x)
            x = block(x, cos, sin, masks[c.windows[i]], follows, cache, value, digits if i == 0 else None)
            if i == c.num_hidden_layers // 2 and c.backout:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda * middle
        x = F.rms_norm(x.float(), (c.hidden_size,), eps=c.rms_norm_eps).to(self.lm_head.weight.dtype)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0: all
        logits = self.lm_head(x[:, kept]).float()
        if c.final_logit_softcapping is not None:
            logits = c.final_logit_softcapping * torch.tanh(logits / c.final_logit_softcapping)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, c.vocab_size, num_items_in_batch=num_items_in_batch)
        states = (
            (*states, x) if output_hidden_states or (output_hidden_states is None and c.output_hidden_states) else None
        )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states, **{CACHE: cache})
        return output if return_dict is not False else output.to_tuple()
