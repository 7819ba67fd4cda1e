"""The fast decode path computes what the model's own forward pass computes, in every precision and batch.

With torch's operators: the step in Rust, which machines with a compiler take instead, has test_native_step.py.
"""

import numpy as np
import pytest
import torch
from reference_generation import ToolModel, make_model, naive_greedy

from nanochat.engine import Engine
from nanochat.generate import fast_decode
from nanochat.generate.decode_linear import Int8Linear
from nanochat.generate.fast_decode import make_decoder, unknown_parts
from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import GPT, MLP, NANOCHAT_2026, GPTConfig
from nanochat.precision import Precision
from nanochat.train.lora import add_lora, merged_weights

SHAPES = [
    {"n_head": 2, "n_kv_head": 2},
    {"n_head": 4, "n_kv_head": 1},
    {"n_head": 4, "n_kv_head": 2, "n_layer": 3},
    {"n_head": 4, "n_kv_head": 2, "n_layer": 3, **NANOCHAT_2026, "recall": 20_000},
    {"n_head": 2, "n_kv_head": 2, "n_layer": 2, "smear": True, "backout": True},
    {"n_head": 4, "n_kv_head": 2, "n_layer": 3, **NANOCHAT_2026, "key_offset": True},
]


@pytest.fixture(autouse=True)
def without_rust(monkeypatch):
    monkeypatch.setattr(fast_decode, "supports", lambda model, dtype: False)


def carrying_model(tokenizer, shape):
    model = make_model(tokenizer, **shape)
    if model.config.recall:
        text = np.random.default_rng(0).integers(0, 256, model.config.recall, dtype=np.int32)
        text[:500] = np.arange(500) % 100  # the prompts below have long matches too
        model.recall.carry(text)
        with torch.no_grad():
            model.recall.scale.fill_(20.0)  # so that what is found decides about tokens
    return model


def caches(model, lengths, dtype):
    """Two equal caches filled by the model, with rows of these lengths."""
    made = []
    for _ in range(2):
        cache = KVCache.for_model(model, len(lengths), 40, dtype)
        generator = torch.Generator().manual_seed(0)
        for row, n in enumerate(lengths):
            cache.select(row, row + 1)
            with torch.inference_mode():
                model.hidden(torch.randint(0, 256, (1, n), generator=generator), kv_cache=cache)
        cache.select(0, len(lengths))
        made.append(cache)
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 17, 1, 30]])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15), (torch.float16, 0.03)])
def test_equals_the_model(tiny_tokenizer, shape, lengths, dtype, tolerance):
    model = carrying_model(tiny_tokenizer, shape)
    precision = Precision("cpu", dtype)
    decoder = make_decoder(model, precision).refresh()
    with precision.autocast():
        ours, theirs = caches(model, lengths, dtype)
    for step in range(3):
        idx = torch.arange(len(lengths)).unsqueeze(1) + 10 * step
        with torch.inference_mode(), precision.autocast():
            expected = model(idx, kv_cache=theirs)[:, -1]
        logits = decoder(idx, ours)
        assert logits.dtype == torch.float32
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.k_cache.float(), theirs.k_cache.float(), atol=tolerance, rtol=tolerance)
    assert ours.cache_seqlens.tolist() == theirs.cache_seqlens.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_equals_naive_recomputation(tiny_tokenizer, shape):
    model = carrying_model(tiny_tokenizer, shape)
    assert make_decoder(model, None) is not None
    for prompt in ([65], [1, 2, 3, 4, 5, 6], list(range(100))):
        columns = Engine(model, tiny_tokenizer).generate(prompt, max_tokens=25, temperature=0.0)
        assert [c[0] for c, _ in columns] == naive_greedy(model, tiny_tokenizer, prompt, 25)[0]


def test_float16_survives_large_activations(tiny_tokenizer):
    """relu² of what float16 can hold does not fit into float16."""
    model = make_model(tiny_tokenizer)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.c_fc.weight *= 1000
            block.mlp.c_proj.weight *= 1e-6
    precision = Precision("cpu", torch.float16)
    with precision.autocast():
        ours, theirs = caches(model, [4, 9], torch.float16)
    idx = torch.tensor([[5], [6]])
    with torch.inference_mode(), precision.autocast():
        x = model.hidden(idx, kv_cache=theirs)
        assert model.blocks[0].mlp.c_fc(x).amax() > 256
        expected = model.logits_at(x)[:, -1]
    logits = make_decoder(model, precision).refresh()(idx, ours)
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_small_weights_say_nearly_the_same(tiny_tokenizer, weights):
    model = make_model(tiny_tokenizer)
    ours, theirs = caches(model, [3, 17, 1, 30], torch.float32)
    idx = torch.tensor([[10], [20], [30], [40]])
    logits = make_decoder(model, None, weights).refresh()(idx, ours)
    with torch.inference_mode():
        expected = model(idx, kv_cache=theirs)[:, -1]
    similar = torch.cosine_similarity(logits, expected)
    assert (similar > 0.99).all()
    engine = Engine(model, tiny_tokenizer, weights=weights)
    assert len(engine.generate_batch([65, 66], max_tokens=5, temperature=0.0)[0][0]) > 2


def test_int8_rounds_each_channel_by_its_own_largest_weight(tiny_tokenizer):
    model = make_model(tiny_tokenizer)
    weight = model.lm_head.weight.detach()
    linear = Int8Linear(weight)
    packed, scale = linear.weight, linear.scale
    error = (packed.float() * scale.float().unsqueeze(1) - weight).abs().amax(dim=1)
    assert packed.dtype == torch.int8
    assert (error <= 0.51 * scale.float() + 1e-8).all()


def test_an_adapter_is_not_forgotten_while_decoding(tiny_tokenizer):
    model = make_model(tiny_tokenizer)
    prompt = tiny_tokenizer.encode("The sky is")
    before = Engine(model, tiny_tokenizer).generate_batch(prompt, max_tokens=12, temperature=0.0)[0]
    add_lora(model, 4)
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    assert make_decoder(model, None) is None
    ours = Engine(model, tiny_tokenizer).generate_batch(prompt, max_tokens=12, temperature=0.0)[0]
    merged = make_model(tiny_tokenizer)
    merged.load_state_dict(merged_weights(model))
    assert ours == Engine(merged, tiny_tokenizer).generate_batch(prompt, max_tokens=12, temperature=0.0)[0]
    assert ours != before


def test_models_with_other_arithmetic_run_by_themselves(tiny_tokenizer):
    other = make_model(tiny_tokenizer, ToolModel)
    assert make_decoder(other, None) is None
    assert make_decoder(make_model(tiny_tokenizer), None, "model") is None
    windows = GPT(GPTConfig(512, 320, 2, 2, 1, 64, window_pattern="SL"))
    assert make_decoder(windows, None) is None
    with pytest.raises(ValueError, match="does not work for models with windows"):
        make_decoder(windows, None, "int8")
    with pytest.raises(ValueError, match="weights must be one of"):
        make_decoder(other, None, "int3")


def test_what_it_does_not_know_is_left_to_the_model_and_said_once(tiny_tokenizer, caplog):
    model = make_model(tiny_tokenizer)
    assert unknown_parts(model) == []
    model.blocks[1].attn.gain = torch.nn.Parameter(torch.ones(2))
    assert make_decoder(model, None) is None
    assert make_decoder(model, None) is None
    (record,) = caplog.records
    assert "slower: transformer.h.attn.gain is unknown to fast_decode.py" in record.getMessage()
    with pytest.raises(ValueError, match=r"weights=int8 does not work for models with transformer\.h\.attn\.gain"):
        make_decoder(model, None, "int8")


def test_a_block_of_another_class_is_left_to_the_model(tiny_tokenizer, caplog):
    class Gelu(MLP):
        def forward(self, x):
            return self.c_proj(torch.nn.functional.gelu(self.c_fc(x)))

    model = make_model(tiny_tokenizer)
    model.blocks[1].mlp = Gelu(model.config)
    assert unknown_parts(model) == ["transformer.h.mlp (Gelu)"]
    prompt = tiny_tokenizer.encode("The sky is")
    ours = Engine(model, tiny_tokenizer).generate_batch(prompt, max_tokens=9, temperature=0.0)
    assert ours == Engine(model, tiny_tokenizer, weights="model").generate_batch(prompt, max_tokens=9, temperature=0.0)
    assert "transformer.h.mlp (Gelu) is unknown to fast_decode.py" in caplog.text


def test_every_switch_is_known(tiny_tokenizer):
    switches = NANOCHAT_2026 | {"key_offset": True, "recall": 64, "n_kv_head": 1, "window_pattern": "SL", "reach": 64}
    assert unknown_parts(make_model(tiny_tokenizer, **switches)) == []
