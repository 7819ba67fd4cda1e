"""The decode step in Rust computes what the model's own forward pass computes, on every kind of processor."""

import types

import numpy as np
import pytest
import torch
from reference_generation import make_model, naive_greedy

import rustbpe
from nanochat.engine import Engine
from nanochat.generate import ahead as ahead_module
from nanochat.generate import fast_decode
from nanochat.generate.fast_decode import FastDecoder, make_decoder
from nanochat.generate.kv_cache import KVCache
from nanochat.generate.native_step import NativeStep, supports
from nanochat.generate.rounding import Decoded, rounding_cost, rounding_notice
from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.ops import recall as ops_recall
from nanochat.optim import MuonAdamW
from nanochat.precision import DTYPE_NAMES, Precision
from nanochat.recipe import PRESETS, parameter_groups
from rustbpe import decoding

pytestmark = pytest.mark.skipif(decoding.library() is None, reason="rustbpe was not compiled here")


@pytest.fixture(autouse=True)
def of_so_few_tokens_each_says_something_of_a_subject(monkeypatch):
    monkeypatch.setattr(ops_recall, "COMMON", 10)


SHAPES = {
    "plain": {},
    "shared keys": {"n_head": 4, "n_kv_head": 1, "residual_factors": True},
    "2026": {"n_head": 4, "n_kv_head": 2, "n_layer": 3, **NANOCHAT_2026},
    # Few tokens, so that matches of several lengths and with several followers are found in a random text.
    "recall": {"recall": 3000, "vocab_size": 20, "reach": 150},
    "all but factors": {
        **NANOCHAT_2026,
        "n_layer": 4,
        "recall": 3000,
        "vocab_size": 20,
        "key_offset": True,
        "window_pattern": "S",
    },
    # Neither channels nor outputs are multiples of what a processor takes at once.
    "odd sizes": {"n_head": 3, "n_kv_head": 3, "n_embd": 54, "vocab_size": 301, "logit_softcap": None},
    "wide": {"n_embd": 384, "n_head": 3, "n_kv_head": 1, "n_layer": 2},
}


def available(level):
    model = GPT(GPTConfig(8, 8, 1, 1, 1, 8))
    try:
        NativeStep(model, "float32", level=level)
    except ValueError:
        return False
    return True


LEVELS = [level for level in decoding.LEVELS[1:] if decoding.library() is not None and available(level)]


def random_model(settings, seed=0):
    shape = {"sequence_len": 1024, "vocab_size": 320, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape | settings))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.count_nonzero() < p.numel() / 2:  # what begins as zero would hide mistakes
                p.normal_(0.0, 0.1)
        if model.config.recall:
            carry_any_text(model, seed)
    return model.eval()


def carry_any_text(model, seed=0):
    text = np.random.default_rng(seed).integers(1, model.config.vocab_size, model.config.recall, dtype=np.int32)
    text[0] = 0  # what documents begin with
    model.recall.carry(text)
    with torch.no_grad():
        model.recall.scale.copy_(20.0 * torch.rand(model.recall.scale.shape))


def filled(model, lengths, dtype=torch.float32):
    """A cache with rows of these lengths, as a prompt leaves them, with a row before and one behind them."""
    cache = KVCache.for_model(model, len(lengths) + 2, 320, dtype)
    generator = torch.Generator().manual_seed(0)
    for row, n in enumerate(lengths, start=1):
        cache.select(row, row + 1)
        with torch.inference_mode():
            model.hidden(torch.randint(0, model.config.vocab_size, (1, n), generator=generator), kv_cache=cache)
    cache.select(1, len(lengths) + 1)
    return cache


def next_tokens(model, batch, step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, model.config.vocab_size, (batch, 1), generator=generator)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("lengths", [[7], [3, 300, 1], [9] * 5, list(range(1, 14))])
def test_equals_the_model(name, lengths, level):
    model = random_model(SHAPES[name])
    ours, theirs = filled(model, lengths), filled(model, lengths)
    step = NativeStep(model, "float32", level=level)
    for i in range(3):
        idx = next_tokens(model, len(lengths), i)
        with torch.inference_mode():
            expected = model(idx, kv_cache=theirs)[:, -1]
        torch.testing.assert_close(step(idx, ours), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours.k_cache, theirs.k_cache, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(ours.v_cache, theirs.v_cache, atol=2e-5, rtol=2e-5)
    assert ours.cache_seqlens.tolist() == theirs.cache_seqlens.tolist()
    assert torch.equal(ours.tokens, theirs.tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.02), ("int8", 0.01)])
def test_small_weights_give_nearly_the_same(weights, tolerance, level):
    model = random_model(SHAPES["all but factors"] | {"n_embd": 128})
    idx = next_tokens(model, 3, 0)
    with torch.inference_mode():
        expected = model(idx, kv_cache=filled(model, [5, 60, 2]))[:, -1]
    step = NativeStep(model, weights, level)
    error = (step(idx, filled(model, [5, 60, 2])) - expected).norm() / expected.norm()
    torchs = FastDecoder(random_model({"n_embd": 128}), torch.bfloat16, "int8" if weights == "int8" else None).refresh()
    plain = torchs.model
    with torch.inference_mode():
        exact = plain(idx, kv_cache=filled(plain, [5, 60, 2]))[:, -1]
    theirs = (torchs(idx, filled(plain, [5, 60, 2])) - exact).norm() / exact.norm()
    ours = NativeStep(plain, weights, level)(idx, filled(plain, [5, 60, 2]))
    assert error < tolerance
    assert (ours - exact).norm() / exact.norm() < 1.1 * theirs  # as good as torch's with the same weights


def four_bits(weight):
    """A weight (out, in) as rustbpe/src/decode/four.rs keeps it: groups of 32 inputs, the best of five scales."""
    out, width = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -width % 32)).view(out, -1, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    tries = []
    for steps in (7.0, 7.5, 8.0, 8.5, 9.0):
        scale = (-largest / steps).bfloat16().float()
        tries.append(scale * (groups / scale).nan_to_num(0.0).round().clamp(-8, 7))
    tries = torch.stack(tries)  # (5, out, groups, 32)
    best = (tries - groups).square().sum(-1, keepdim=True).argmin(0, keepdim=True).expand(1, -1, -1, 32)
    return tries.gather(0, best)[0].view(out, -1)[:, :width]


def eight_bits(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


@pytest.mark.parametrize("name", ["all but factors", "odd sizes", "wide"])
def test_four_bits_equal_the_model_with_weights_rounded_alike(name):
    """And every processor gives the same tokens."""
    model, rounded = random_model(SHAPES[name]), random_model(SHAPES[name])
    with torch.no_grad():
        for key, p in rounded.named_parameters():
            if ".attn.c_" in key or ".mlp.c_" in key:
                p.copy_(four_bits(p))
        rounded.lm_head.weight.copy_(eight_bits(rounded.lm_head.weight))
    for lengths in ([7], list(range(1, 14))):
        idx = next_tokens(model, len(lengths), 0)
        with torch.inference_mode():
            expected = rounded(idx, kv_cache=filled(model, lengths))[:, -1]
            unlike = model(idx, kv_cache=filled(model, lengths))[:, -1]
        for level in LEVELS:
            logits = NativeStep(model, "int4", level)(idx, filled(model, lengths))
            assert (logits - expected).norm() < 2e-3 * expected.norm()
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
            assert (logits - unlike).norm() > 2e-2 * unlike.norm()  # and rounded they are


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_bfloat16_is_read_and_written(dtype, level):
    model = random_model(SHAPES["2026"])
    idx = next_tokens(model, 2, 0)
    ours, theirs = filled(model, [4, 9], torch.bfloat16), filled(model, [4, 9], torch.bfloat16)
    with torch.inference_mode():
        expected = model(idx, kv_cache=theirs)[:, -1]
    torch.testing.assert_close(
        NativeStep(model, DTYPE_NAMES[dtype], level=level)(idx, ours), expected, atol=0.1, rtol=0.05
    )
    torch.testing.assert_close(ours.k_cache, theirs.k_cache, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weights", decoding.FORMATS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_does_not_depend_on_the_others_nor_on_threads(weights, level, threads):
    model = random_model(SHAPES["all but factors"] | {"n_embd": 128, "n_head": 4})
    lengths = [30, 2, 200, 2, 7, 9, 11, 13, 15]
    idx = next_tokens(model, len(lengths), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = NativeStep(model, weights, level)
    finally:
        torch.set_num_threads(before)
    together = step(idx, filled(model, lengths))
    alone = NativeStep(model, weights, level)
    for row in (0, 2, 8):
        cache = filled(model, lengths)
        cache.select(row + 1, row + 2)
        assert torch.equal(alone(idx[row : row + 1], cache)[0], together[row])


@pytest.mark.parametrize("recipe", PRESETS)
def test_greedy_text_is_the_references_for_every_recipe(tiny_tokenizer, recipe):
    model = make_model(tiny_tokenizer, n_head=4, n_kv_head=2, n_layer=3, **PRESETS[recipe].switches)
    assert supports(model, torch.float32)
    engine = Engine(model, tiny_tokenizer)
    prompts = [[65], list(range(60)), [1, 2, 3, 4, 5, 6]]
    together = engine.generate_prompts(prompts, max_tokens=20, keep_end=True)[0]
    assert engine._decoder._native is not None
    for prompt, sequence in zip(prompts, together, strict=True):
        assert sequence == prompt + naive_greedy(model, tiny_tokenizer, prompt, 20)[0]


@pytest.mark.parametrize(
    "knobs", [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 200}, {"top_p": 0.9, "min_p": 0.01}], ids=str
)
@pytest.mark.parametrize("shape", [{}, {"recall": 20_000, "key_offset": True, "smear": True}], ids=["plain", "recall"])
def test_several_tokens_in_one_call_are_those_of_single_steps(tiny_tokenizer, monkeypatch, knobs, shape):
    model = make_model(tiny_tokenizer, n_head=4, n_kv_head=2, **shape)
    if model.config.recall:
        carry_any_text(model)
    prompts, calls, ahead = [[65], list(range(60)), [1, 2, 3, 4, 5, 6]], [], FastDecoder.ahead

    def counted(self, *args):
        calls.append(ahead(self, *args))
        return calls[-1]

    def answers(seconds, weights="auto"):
        monkeypatch.setattr(ahead_module, "AHEAD_SECONDS", seconds)
        calls.clear()
        settings = {"stop_tokens": (70,), "keep_end": True, "seeds": [1, "b", 3]}
        engine = Engine(model, tiny_tokenizer, weights=weights)
        return engine.generate_prompts(prompts, 50, max_batch_tokens=250, **settings, **knobs)

    monkeypatch.setattr(FastDecoder, "ahead", counted)
    by_steps = answers(0.0)
    assert not calls
    assert answers(60.0) == by_steps
    assert len(calls) < sum(map(len, calls)) <= 100  # two slots, the third prompt waits for one of them
    assert max(map(len, calls)) > 10
    if knobs == {"temperature": 0.0}:
        assert by_steps == answers(0.0, "model")


def test_a_call_for_several_tokens_that_fails_is_told_and_not_repeated(tiny_tokenizer, monkeypatch, caplog):
    def answers():
        return Engine(model, tiny_tokenizer).generate_prompts([[65], [1, 2, 3]], 20, temperature=0.0, keep_end=True)[0]

    def fail(*args):
        calls.append(args)
        raise RuntimeError("out of order")

    model, calls = make_model(tiny_tokenizer, n_head=4, n_kv_head=2), []
    monkeypatch.setattr(ahead_module, "AHEAD_SECONDS", 60.0)
    expected = answers()
    monkeypatch.setattr(FastDecoder, "ahead", fail)
    assert answers() == expected
    assert len(calls) == 1
    assert [r.getMessage() for r in caplog.records] == [
        "decoding step by step from now on, which is slower: out of order"
    ]


def test_what_is_not_a_number_stays_so():
    """The scheduler ends such an answer with an error; as a number it would be a wrong token."""
    for weights in decoding.FORMATS:
        for part in ("lm_head.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_k.weight"):
            model = random_model({})
            with torch.no_grad():
                model.get_parameter(part).view(-1)[3] = float("nan")
            for level in LEVELS:
                logits = NativeStep(model, weights, level)(next_tokens(model, 1, 0), filled(model, [4]))
                assert logits.isnan().any(), (weights, part, level)


def test_changed_weights_are_taken():
    model = random_model({})
    decoder = make_decoder(model, None).refresh()
    idx = next_tokens(model, 1, 0)
    before = decoder(idx, filled(model, [4]))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    with torch.inference_mode():
        expected = model(idx, kv_cache=filled(model, [4]))[:, -1]
    after = decoder.refresh()(idx, filled(model, [4]))
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(before, after, atol=1e-2)


def test_another_text_is_taken():
    model = random_model(SHAPES["recall"])
    decoder = make_decoder(model, None).refresh()
    idx = torch.arange(8)[:, None]
    before = decoder(idx, filled(model, [40] * 8))
    carry_any_text(model, seed=1)
    after = decoder.refresh()(idx, filled(model, [40] * 8))
    with torch.inference_mode():
        expected = model(idx, kv_cache=filled(model, [40] * 8))[:, -1]
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(before, after, atol=1e-2)


def test_long_matches_are_found_step_by_step():
    """Each row repeats a part of the text, so that the matches grow to the longest kind."""
    model = random_model(SHAPES["recall"])
    text, lengths = model.recall.text.long(), [1, 2, 5, 9]
    ours, theirs = filled(model, lengths), filled(model, lengths)
    step = NativeStep(model, "float32")
    for i in range(12):
        idx = torch.stack([text[100 * row + i] for row in range(4)])[:, None]
        with torch.inference_mode():
            expected = model(idx, kv_cache=theirs)[:, -1]
        torch.testing.assert_close(step(idx, ours), expected, atol=2e-5, rtol=2e-5)
    for row, n in enumerate(lengths, start=1):
        longest = model.recall.look_up(ours.tokens[row : row + 1, : n + 12])[0, -1, 0].item()
        assert longest % ops_recall.KINDS // ops_recall.LEVELS == ops_recall.LONGEST


def test_what_is_found_goes_by_the_subject_of_a_long_context(monkeypatch):
    """Of more tokens than a window has, a part of the text with some changed: matches are of many levels."""
    monkeypatch.setattr(ops_recall, "COMMON", 200)
    model = random_model({"recall": 3000})
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([model.recall.text[at : at + 210].long() for at in (100, 1200, 2000)])
    rows = torch.where(torch.rand(rows.shape, generator=generator) < 0.2, rows.flip(0), rows)
    ours, theirs = (KVCache.for_model(model, 3, 320, torch.float32) for _ in range(2))
    with torch.inference_mode():
        for cache in (ours, theirs):
            model.hidden(rows[:, :200], kv_cache=cache)
        step = NativeStep(model, "float32")
        for i in range(200, 210):
            expected = model(rows[:, i : i + 1], kv_cache=theirs)[:, -1]
            torch.testing.assert_close(step(rows[:, i : i + 1], ours), expected, atol=2e-5, rtol=2e-5)
    assert len((model.recall.look_up(rows, 100) % ops_recall.LEVELS).unique()) > 3


def test_a_text_that_does_not_fit_is_refused():
    model = random_model(SHAPES["recall"])
    model.recall.order.fill_(2999)  # the last one is followed by nothing
    with pytest.raises(ValueError, match="not in the text"):
        NativeStep(model, "float32")(torch.tensor([[1]]), filled_plainly(model))
    model.recall.carry(np.r_[0, 1, 1, np.full(2997, 1000)].astype(np.int32))
    with pytest.raises(ValueError, match="not in the vocabulary"):
        NativeStep(model, "float32")(torch.tensor([[1]]), filled_plainly(model))
    model.recall.order = model.recall.order[1:]
    with pytest.raises(ValueError, match="has no order"):
        NativeStep(model, "float32")


def filled_plainly(model):
    """A cache as after tokens that are 1, without a look-up."""
    cache = KVCache.for_model(model, 1, 320)
    cache.tokens.fill_(1)
    cache.set_lengths([2])
    return cache


def test_what_does_not_fit_is_refused_before_memory_is_touched():
    model = random_model({})
    step = NativeStep(model, "float32")
    with pytest.raises(ValueError, match="outside the vocabulary of 320"):
        step(torch.tensor([[320]]), filled(model, [4]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        step(torch.tensor([[-1]]), filled(model, [4]))
    full = filled(model, [4])
    full.set_lengths([320])
    with pytest.raises(ValueError, match="room for"):
        step(torch.tensor([[1]]), full)
    with pytest.raises(ValueError, match="one token for each"):
        step(torch.tensor([[1]]), filled(model, [4, 4]))
    other = random_model({"n_layer": 3})
    with pytest.raises(ValueError, match="another shape"):
        step(torch.tensor([[1]]), filled(other, [4]))
    with pytest.raises(ValueError, match="impossible"):
        decoding.Decoder(decoding.Model(), "float32", 1)


def test_a_library_without_the_step_leaves_it_to_torch(tiny_tokenizer, monkeypatch):
    """PyPI's rustbpe has none, and neither has one that was compiled by an older checkout."""
    model = make_model(tiny_tokenizer)
    prompt = tiny_tokenizer.encode("The sky is")
    expected = Engine(model, tiny_tokenizer).generate_batch(prompt, max_tokens=12, temperature=0.0)
    old = types.SimpleNamespace(rustbpe_sizes=None)
    newer = types.SimpleNamespace(rustbpe_decoder_version=lambda: 99)
    for library in (None, old, newer):
        monkeypatch.setattr(rustbpe, "_lib", library)
        decoding.library.cache_clear()
        try:
            assert not supports(model, torch.float32)
            engine = Engine(model, tiny_tokenizer)
            assert engine.generate_batch(prompt, max_tokens=12, temperature=0.0) == expected
            assert engine._decoder._native is None
            windows = GPT(GPTConfig(512, 320, 2, 2, 1, 64, window_pattern="SL"))
            assert make_decoder(windows, None) is None
            with pytest.raises(ValueError, match="does not work for models with windows"):
                make_decoder(windows, None, "int8")
            with pytest.raises(ValueError, match=r"int4 needs a CPU.*setup_env\.sh"):
                make_decoder(model, None, "int4")
        finally:
            monkeypatch.undo()
            decoding.library.cache_clear()


@pytest.mark.parametrize("weights", ["int4", "int8", "bfloat16"])
def test_smaller_weights_serve_any_number_of_sequences(tiny_tokenizer, weights):
    engine = Engine(make_model(tiny_tokenizer), tiny_tokenizer, weights=weights)
    prompts = [[65 + i] for i in range(fast_decode.NATIVE_ROWS_NARROW + 5)]
    together = engine.generate_prompts(prompts, max_tokens=6, keep_end=True)[0]
    assert together[3] == engine.generate_prompts(prompts[3:4], max_tokens=6, keep_end=True)[0][0]
    assert not engine._decoder._forms  # those of torch


def test_what_integers_cost_is_measured_and_said(tiny_tokenizer):
    model, precision = make_model(tiny_tokenizer), Precision("cpu", torch.float32)
    with torch.no_grad():
        for p in model.parameters():  # as unsure as a new model is, rounding would change nothing
            p.mul_(3.0)
    costs = {kind: rounding_cost(model, tiny_tokenizer, precision, kind) for kind in ("auto", "int8", "int4")}
    assert costs["auto"] == 0.0
    assert 0 < 10 * costs["int8"] < costs["int4"] < 2
    notice = rounding_notice(model, tiny_tokenizer, precision, "int4")
    assert notice.startswith(f"int4 weights cost {costs['int4']:.4f} bits per byte")
    assert rounding_notice(model, tiny_tokenizer, precision, "bfloat16") == ""


def test_a_loss_can_be_measured_through_the_decoder():
    model, precision = random_model(SHAPES["2026"]), Precision("cpu", torch.float32)
    x = torch.randint(0, 320, (2, 3, 17), generator=torch.Generator().manual_seed(0))
    y = x[:, :, 1:].clone()
    y[0, 1, 5:] = -1
    token_bytes = torch.arange(320) % 7  # some tokens are special
    batches = list(zip(x[:, :, :-1], y, strict=True))
    expected = evaluate_bpb(model, batches, None, token_bytes)
    bpb = {kind: evaluate_bpb(Decoded(model, precision, kind), batches, None, token_bytes) for kind in ("auto", "int4")}
    assert bpb["auto"] == pytest.approx(expected, abs=1e-5)
    assert 1e-5 < abs(bpb["int4"] - expected) < 0.1


def test_float16_and_other_parameters_are_left_to_torch():
    model = random_model({})
    assert supports(model, torch.float32)
    assert not supports(model, torch.float16)
    assert make_decoder(model, Precision("cpu", torch.float16))._native_rows == 0
    assert not supports(model.to(torch.float64), torch.float32)


def test_the_memory_of_a_decoder_ends_with_it():
    """A server may load models one after another; only what the decoder itself holds counts here."""
    import resource

    model = random_model({"n_embd": 256, "n_layer": 4, "vocab_size": 8192})
    cache, idx = filled(model, [4]), next_tokens(model, 1, 0)

    def run(times):
        for _ in range(times):
            NativeStep(model, "bfloat16")(idx, cache)
            cache.set_lengths([4])
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(3)
    assert run(30) - before < 30 << 10  # KiB; one has 10 MiB


@pytest.mark.parametrize("in_rust", [True, False])
def test_a_training_step_is_seen(tiny_tokenizer, monkeypatch, in_rust):
    """The engine of a reinforcement learning run answers with the weights of now, whatever kernels move them."""
    if not in_rust:
        monkeypatch.setattr(fast_decode, "supports", lambda model, dtype: False)
    model = make_model(tiny_tokenizer)
    prompts = [tiny_tokenizer.encode(text) for text in ("The sky is", "One and")]
    sampling = {"max_tokens": 12, "temperature": 0.0}
    engine = Engine(model, tiny_tokenizer)
    before = engine.generate_prompts(prompts, **sampling)
    optimizer = MuonAdamW(
        parameter_groups(model, matrix_lr=0.3, embedding_lr=0.3, unembedding_lr=0.1, weight_decay=0.0)
    )
    x = torch.tensor(prompts[0])[None]
    for kinds in (("muon",), ("adamw",)):  # each alone: neither may hide that the other leaves no trace
        model(x[:, :-1], x[:, 1:]).backward()
        for group in optimizer.param_groups:
            if group["kind"] not in kinds:
                for p in group["params"]:
                    p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        after = engine.generate_prompts(prompts, **sampling)
        assert after == Engine(model, tiny_tokenizer).generate_prompts(prompts, **sampling)
    assert after != before
