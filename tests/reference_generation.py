"""What generation must equal: the slow way, and a model that says given texts."""

from __future__ import annotations

import torch

from nanochat.generate.calculator import use_calculator
from nanochat.gpt import GPT, GPTConfig


def naive_greedy(model, tokenizer, prompt, max_tokens):
    """No cache, no batch. Returns (new tokens, masks) with the token that ended it."""
    special = tokenizer.encode_special
    tokens, masks, forced, expression = [], [], [], None
    while len(tokens) < min(max_tokens, model.config.sequence_len - len(prompt)):
        if forced:
            tokens.append(forced.pop(0))
            masks.append(0)
            continue
        with torch.no_grad():
            token = int(model(torch.tensor([prompt + tokens]))[0, -1].argmax())
        tokens.append(token)
        masks.append(1)
        if token in (special("<|assistant_end|>"), special("<|bos|>")):
            break
        if token == special("<|python_start|>"):
            expression = []
        elif token == special("<|python_end|>") and expression is not None:
            result = use_calculator(tokenizer.decode(expression))
            if result is not None:
                forced = [special("<|output_start|>"), *tokenizer.encode(result), special("<|output_end|>")]
            expression = None
        elif expression is not None:
            expression.append(token)
    return tokens, masks


class ToolModel(GPT):
    """A real model that now and then calls the calculator and now and then ends.

    A random projection of the hidden state favours the tokens of a calculation, so that whether and what it calls
    depends on everything it has seen, through the real attention and the real cache.
    """

    def __init__(self, config, tokenizer):
        super().__init__(config)
        special = tokenizer.encode_special
        names = [special("<|python_start|>"), *tokenizer.encode("7"), *tokenizer.encode("+"), special("<|python_end|>")]
        self.favoured = torch.tensor([*names, special("<|assistant_end|>")])
        generator = torch.Generator().manual_seed(1)
        self.projection = torch.randn(config.n_embd, 5, generator=generator) / config.n_embd**0.5
        self.bias = torch.tensor([0.0, 2.0, 2.0, 3.0, -9.0])

    def logits_at(self, x):
        logits = super().logits_at(x).clone()
        logits[..., self.favoured] += 9.0 * (x @ self.projection) + self.bias
        return logits


def make_model(tokenizer, kind=GPT, seed=22, **shape):
    """A small model with random weights that looks at its context a lot (or it would soon repeat itself)."""
    torch.manual_seed(seed)
    values = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64} | shape
    config = GPTConfig(128, tokenizer.get_vocab_size(), **values)
    model = kind(config, tokenizer) if kind is ToolModel else kind(config)
    model.init_weights()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.count_nonzero() == 0:
                p.normal_(0.0, 1.2 if "attn" in name else 0.3)
    return model.eval()
