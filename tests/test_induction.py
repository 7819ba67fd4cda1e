"""A model of init="induction" finds what followed an earlier occurrence before it has learned anything."""

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig, norm
from nanochat.ops.pointwise import apply_rotary
from nanochat.recipe import PORTABLE


def fresh(init: str, **settings) -> GPT:
    switches = PORTABLE.switches | {"init": init}
    model = GPT(GPTConfig(**({"sequence_len": 256, "vocab_size": 512, "n_layer": 3} | switches | settings)))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@torch.no_grad()
def attention_of(model: GPT, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """What head 0 of a layer looks at: (T, T)."""
    caught: list[torch.Tensor] = []
    attn = model.blocks[layer].attn
    hook = attn.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(tokens)
    hook.remove()
    T, D = tokens.size(1), model.config.head_dim
    cos, sin = model.cos[None, :T, None], model.sin[None, :T, None]
    q, k = (norm(apply_rotary(c(caught[0]).view(1, T, -1, D), cos, sin))[0, :, 0] for c in (attn.c_q, attn.c_k))
    scores = (q @ k.T * attn.scale).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    return scores.softmax(-1)


@pytest.mark.parametrize("shape", [(2, 2, 128), (4, 2, 256), (6, 6, 768)], ids=["narrow", "grouped", "wide"])
def test_it_looks_at_what_followed_an_earlier_occurrence(shape):
    n_head, n_kv_head, n_embd = shape
    tokens = torch.randperm(512, generator=torch.Generator().manual_seed(1))[None, :100].repeat(1, 2)
    found = {}
    for init in ("modern", "induction"):
        model = fresh(init, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd)
        before = attention_of(model, 0, tokens).diagonal(-1)[10:].mean()
        followed = attention_of(model, 1, tokens).diagonal(-99)[10:].mean()  # the second time: one after the first
        found[init] = before.item(), followed.item()
    assert found["modern"][0] < 0.1
    assert found["modern"][1] < 0.1
    assert found["induction"][0] > 0.6
    assert found["induction"][1] > 0.3


def test_every_shape_begins_and_the_first_loss_is_that_of_guessing():
    for settings in ({"n_layer": 1}, {"sequence_len": 1}, {"n_head": 1, "n_kv_head": 1, "n_embd": 4}):
        model = fresh("induction", **({"n_head": 2, "n_kv_head": 2, "n_embd": 32} | settings))
        assert all(p.isfinite().all() for p in model.parameters())
        loss = model(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long))
        assert loss.item() == pytest.approx(6.24, abs=0.1)  # ln 512
