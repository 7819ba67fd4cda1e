"""The model is exactly the public architecture, for any shape."""

import pytest
import torch

from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import GPT, LOGIT_SOFTCAP, NORM_EPS, ROPE_BASE, GPTConfig


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.count_nonzero() == 0:
                p.normal_(0.0, 0.2)
    return model.eval()


def as_transformers(model):
    """The same weights in transformers' NanoChatForCausalLM."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    c = model.config
    config = NanoChatConfig(
        vocab_size=c.padded_vocab_size,
        hidden_size=c.n_embd,
        intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        max_position_embeddings=c.sequence_len,
        hidden_act="relu2",
        final_logit_softcapping=LOGIT_SOFTCAP,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        attention_bias=False,
        tie_word_embeddings=False,
        use_cache=False,
    )
    theirs = NanoChatForCausalLM(config).eval()
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.h": "model.layers",
        ".attn.c_q": ".self_attn.q_proj",
        ".attn.c_k": ".self_attn.k_proj",
        ".attn.c_v": ".self_attn.v_proj",
        ".attn.c_proj": ".self_attn.o_proj",
        ".mlp.c_fc": ".mlp.fc1",
        ".mlp.c_proj": ".mlp.fc2",
    }
    state = {}
    for key, value in model.state_dict().items():
        for ours, other in names.items():
            key = key.replace(ours, other)
        state[key] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [m for m in missing if "rotary" not in m]
    return theirs


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(64, 128, 2, 2, 2, 64),
        GPTConfig(64, 101, 3, 4, 2, 128),
        GPTConfig(64, 300, 1, 4, 1, 64),
    ],
    ids=["MHA", "GQA, odd depth and vocabulary", "MQA"],
)
def test_logits_equal_transformers(config):
    pytest.importorskip("transformers")
    ours = random_model(config)
    theirs = as_transformers(ours)
    x = torch.randint(0, config.vocab_size, (2, 48))
    with torch.no_grad():
        a, b = ours(x), theirs(x).logits[..., : config.vocab_size]
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("depth", range(1, 21))
def test_every_depth_has_a_shape(depth):
    config = GPTConfig.from_depth(depth, 100, 16)
    assert config.head_dim == 128
    assert config.n_embd >= 64 * depth
    assert config.n_embd - 64 * depth < 128


def test_smaller_heads_make_widths_that_are_no_multiple_of_128():
    config = GPTConfig.from_depth(4, 100, 16, aspect_ratio=48, head_size=64)
    assert (config.n_embd, config.n_head, config.n_kv_head, config.head_dim) == (192, 3, 3, 64)
    with pytest.raises(ValueError, match="--head_size"):
        GPTConfig.from_depth(4, 100, 16, head_size=0)


@pytest.mark.parametrize(
    ("depth", "vocab", "millions"), [(8, 32768, 58.7), (12, 65536, 185.6), (16, 32768, 268.4), (20, 65536, 561.0)]
)
def test_parameter_counts_are_nanochats(depth, vocab, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, vocab))
    assert model.num_params() / 1e6 == pytest.approx(millions, abs=0.05)


def test_flops_by_hand():
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(12, 65536))
    matrices = 12 * 12 * 768**2
    assert model.estimate_flops() == 6 * (matrices + 768 * 65536) + 12 * 12 * 768 * 2048


def test_future_tokens_change_nothing_before_them():
    model = random_model(GPTConfig(32, 90, 2, 2, 1, 64))
    x = torch.randint(0, 90, (1, 32))
    y = x.clone()
    y[0, 20:] = 1
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:, :20], model(y)[:, :20])


def test_a_fresh_model_guesses_evenly():
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 100, 2, 2, 2, 64))
    model.init_weights()
    x = torch.randint(0, 100, (2, 32))
    assert model(x, x).item() == pytest.approx(torch.tensor(100.0).log().item(), abs=1e-5)


def test_a_parameter_without_a_rule_is_not_left_as_it_is():
    model = GPT(GPTConfig(32, 100, 1, 2, 2, 64))
    model.blocks[0].attn.gain = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.gain"):
        model.init_weights()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_layer": 0}, "n_layer"),
        ({"n_head": 5}, "n_embd"),
        ({"n_kv_head": 4}, "n_kv_head"),
    ],
)
def test_impossible_shapes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**values)


def test_unknown_settings_of_a_checkpoint_are_named():
    with pytest.raises(ValueError, match="frobnicate"):
        GPTConfig.from_dict({"frobnicate": 1})


def test_longer_than_the_context_is_refused():
    model = random_model(GPTConfig(16, 64, 1, 1, 1, 32))
    with pytest.raises(ValueError, match="context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def pieces_of_rows(rows):
    """(B, T) segments from lists of lengths."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows])


def test_segments_are_computed_as_if_alone():
    config = GPTConfig(600, 90, 2, 2, 1, 64)
    model = random_model(config)
    rows = [[300, 299, 1], [600], [7, 500, 93]]
    x = torch.randint(0, 90, (3, 600))
    y = torch.randint(0, 90, (3, 600))
    packed = model(x, y, loss_reduction="sum", segments=pieces_of_rows(rows))
    alone = 0.0
    for i, lengths in enumerate(rows):
        for a, b in zip(x[i : i + 1].split(lengths, dim=1), y[i : i + 1].split(lengths, dim=1), strict=True):
            alone = alone + model(a, b, loss_reduction="sum")
    torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(packed, parameters), torch.autograd.grad(alone, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)


def test_segments_in_a_compiled_model_and_with_wrong_input():
    model = random_model(GPTConfig(40, 90, 1, 2, 2, 32))
    x = torch.randint(0, 90, (2, 40))
    segments = pieces_of_rows([[10, 30], [39, 1]])
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model.hidden, dynamic=False, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, segments=segments), model.hidden(x, segments=segments))
    with pytest.raises(ValueError, match="one per token"):
        model(x, segments=segments[:, :5])
    cache = KVCache(2, 2, 40, 16, 1)
    with pytest.raises(ValueError, match="kv_cache"):
        model(x, kv_cache=cache, segments=segments)


def test_greedy_decoding_equals_transformers():
    """64 tokens, one at a time through our cache, by naive recomputation through theirs."""
    pytest.importorskip("transformers")
    config = GPTConfig(96, 101, 3, 4, 2, 128)
    ours = random_model(config)
    theirs = as_transformers(ours)
    prompt = torch.randint(0, 101, (1, 8))
    cache = KVCache(1, 2, 96, 32, 3)
    a, b, step = prompt, prompt, prompt
    with torch.no_grad():
        for _ in range(64):
            step = ours(step, kv_cache=cache)[:, -1].argmax(-1, keepdim=True)
            a = torch.cat([a, step], dim=1)
            b = torch.cat([b, theirs(b).logits[:, -1, :101].argmax(-1, keepdim=True)], dim=1)
    assert a.tolist() == b.tolist()
