"""Generation with a cache, in batches, with tools, equals the obvious: run the whole sequence again for every token."""

import pytest
import torch
from reference_generation import naive_greedy

from nanochat.engine import Engine
from nanochat.generate.kv_cache import KVCache, fitting_slots
from nanochat.generate.scheduler import Scheduler
from nanochat.gpt import GPT, GPTConfig
from nanochat.precision import Precision


class Script(GPT):
    """A model that says given texts: after token i of the sequence the likeliest token is script[i].

    `scripts` maps the first prompt token to the whole sequence. Both are read back from the real cache.
    """

    def __init__(self, scripts, vocab_size, sequence_len=128):
        super().__init__(GPTConfig(sequence_len, vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=64))
        self.scripts = scripts
        self.rows_run = []

    def hidden(self, idx, kv_cache=None, segments=None, found=None):
        # Each token's key holds its id; its position and the row's first token are read back from the cache.
        ids = idx.float()[:, :, None, None].expand(-1, -1, 1, self.config.head_dim)
        positions = kv_cache.positions(idx.size(1)).expand(idx.shape)
        keys, _ = kv_cache.update(0, ids, ids)
        kv_cache.advance(idx.size(1))
        self.rows_run.append(idx.size(0))
        first = keys[:, 0, 0, 0].long()[:, None].expand(idx.shape)
        return torch.stack([first, positions], dim=-1).float()

    def logits_at(self, x):
        logits = torch.zeros(*x.shape[:-1], self.config.vocab_size)
        for i, (first, position) in enumerate(x.reshape(-1, 2).long().tolist()):
            script = self.scripts.get(first, [])
            following = script[position + 1] if position + 1 < len(script) else 0
            logits.view(-1, self.config.vocab_size)[i, following] = 10.0
        return logits


def test_greedy_equals_naive_recomputation(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    for text in ("The sky", "Rivers carry water from the", "12 + 34"):
        prompt = tiny_tokenizer.encode(text, prepend="<|bos|>")
        expected, masks = naive_greedy(tiny_model, tiny_tokenizer, prompt, 60)
        columns = list(engine.generate(prompt, max_tokens=60, temperature=0.0))
        assert [c[0] for c, _ in columns] == expected
        assert [m[0] for _, m in columns] == masks


@pytest.mark.parametrize("budget", [1, 300, None])
def test_many_prompts_equal_one_at_a_time(tiny_model, tiny_tokenizer, budget):
    engine = Engine(tiny_model, tiny_tokenizer)
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 40, 3, 17, 17, 90, 126, 127, 2, 25, 8, 60]
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    sequences, masks = engine.generate_prompts(prompts, max_tokens=30, max_batch_tokens=budget)
    stop = {tiny_tokenizer.encode_special("<|assistant_end|>"), tiny_tokenizer.get_bos_token_id()}
    for prompt, sequence, mask in zip(prompts, sequences, masks, strict=True):
        expected, expected_mask = naive_greedy(tiny_model, tiny_tokenizer, prompt, 30)
        kept = len(expected) - (expected[-1] in stop)
        assert sequence == prompt + expected[:kept]
        assert mask == [0] * len(prompt) + expected_mask[:kept]


def tool_script(tokenizer, marker, expression, result, tail):
    """[marker] text python_start expression python_end output_start result output_end tail assistant_end."""
    special = tokenizer.encode_special
    script = [marker, *tokenizer.encode("So "), special("<|python_start|>"), *tokenizer.encode(expression)]
    script.append(special("<|python_end|>"))
    if result is not None:
        script += [special("<|output_start|>"), *tokenizer.encode(result), special("<|output_end|>")]
    return [*script, *tokenizer.encode(tail), special("<|assistant_end|>")]


CALLS = [
    ("12*13", "156", " done"),
    ("'berry'.count('r')", "2", "."),
    ("nonsense(", None, " hm"),
    ("1,000+1", "1001", ""),
]


def test_tools_run_per_row_in_a_mixed_batch(tiny_tokenizer):
    scripts = {65 + i: tool_script(tiny_tokenizer, 65 + i, *call) for i, call in enumerate(CALLS)}
    model = Script(scripts, tiny_tokenizer.get_vocab_size())
    engine = Engine(model, tiny_tokenizer)
    prompts = [scripts[65 + i][: 1 + i % 3] for i in range(len(CALLS))]
    sequences, masks = engine.generate_prompts(prompts, max_tokens=None)
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        script = scripts[65 + i]
        assert sequence == script[:-1]
        forced = [t for t, m in zip(sequence, mask, strict=True) if m == 0][len(prompts[i]) :]
        result = CALLS[i][1]
        expected = "" if result is None else f"<|output_start|>{result}<|output_end|>"
        assert tiny_tokenizer.decode(forced) == expected


def test_the_tool_answers_not_the_model(tiny_tokenizer):
    """What the model would have said in place of the result is overruled by the calculator."""
    wrong = tool_script(tiny_tokenizer, 65, "2+2", "5", "!")
    model = Script({65: wrong}, tiny_tokenizer.get_vocab_size())
    sequence = Engine(model, tiny_tokenizer).generate_batch([65], temperature=0.0)[0][0]
    assert "<|output_start|>4<|output_end|>!" in tiny_tokenizer.decode(sequence)


def test_finished_rows_leave_the_batch_and_run_no_tools(tiny_tokenizer, monkeypatch):
    end = tiny_tokenizer.encode_special("<|assistant_end|>")
    short, long = [65, 66, end], [67, *range(70, 90), end]
    model = Script({65: short, 67: long}, tiny_tokenizer.get_vocab_size())
    calls = []
    monkeypatch.setattr("nanochat.generate.sequence.use_calculator", lambda text: calls.append(text))
    sequences, _ = Engine(model, tiny_tokenizer).generate_prompts([[65], [67]], max_tokens=50)
    assert sequences == [short[:-1], long[:-1]]
    assert model.rows_run[:3] == [2, 2, 1]
    assert set(model.rows_run[3:]) == {1}
    assert len(model.rows_run) == len(long) - 1  # nothing is run after the last row has finished
    assert calls == []


def test_finished_rows_show_as_assistant_end_with_mask_0(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    end, bos = engine.assistant_end, tiny_tokenizer.get_bos_token_id()
    prompt = tiny_tokenizer.encode("The sky", prepend="<|bos|>")
    columns = list(engine.generate(prompt, num_samples=40, max_tokens=100, temperature=3.0, seed=1))
    ended = 0
    for row in range(40):
        tokens, masks = [c[row] for c, _ in columns], [m[row] for _, m in columns]
        stops = [i for i, t in enumerate(tokens) if t in (end, bos)]
        if stops and stops[0] + 1 < len(tokens):
            ended += 1
            assert set(tokens[stops[0] + 1 :]) == {end}
            assert set(masks[stops[0] + 1 :]) == {0}
    assert ended > 3


def test_each_row_samples_its_own_first_token(tiny_model, tiny_tokenizer):
    prompt = tiny_tokenizer.encode("The sky", prepend="<|bos|>")
    first, _ = next(Engine(tiny_model, tiny_tokenizer).generate(prompt, num_samples=32, temperature=3.0))
    assert len(set(first)) > 5


def test_a_seed_repeats_its_result_and_leaves_the_global_one_alone(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = engine.generate_batch([65, 66], num_samples=3, max_tokens=12, temperature=2.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert engine.generate_batch([65, 66], num_samples=3, max_tokens=12, temperature=2.0, seed=1) == first
    assert engine.generate_batch([65, 66], num_samples=3, max_tokens=12, temperature=2.0, seed=2) != first


def test_generation_stops_at_the_context_limit(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    context = tiny_model.config.sequence_len
    model = Script({65: [65] * (context + 50)}, tiny_tokenizer.get_vocab_size(), context)
    for max_tokens in (None, 10_000):
        sequence = Engine(model, tiny_tokenizer).generate_batch([65] * 5, max_tokens=max_tokens, temperature=0.0)[0][0]
        assert len(sequence) == context
    assert len(list(engine.generate([65] * (context - 1)))) == 1
    assert list(engine.generate([65], max_tokens=0)) == []


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "empty"),
        ([65] * 128, {}, "128 tokens leaves no room in the model's context of 128"),
        ([65] * 500, {}, "500 tokens"),
        ([100_000], {}, "vocabulary"),
        ([-1], {}, "vocabulary"),
        ([65], {"temperature": -0.1}, "temperature"),
        ([65], {"temperature": float("nan")}, "temperature"),
        ([65], {"top_k": -1}, "top_k"),
        ([65], {"max_tokens": -1}, "max_tokens"),
        ([65], {"num_samples": 0}, "num_samples"),
    ],
)
def test_bad_requests_are_refused_at_the_call(tiny_model, tiny_tokenizer, prompt, settings, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny_model, tiny_tokenizer).generate(prompt, **settings)


def test_bfloat16_uses_a_bfloat16_cache(tiny_model, tiny_tokenizer):
    precision = Precision("cpu", torch.bfloat16)
    assert Scheduler(tiny_model, tiny_tokenizer, precision, 1, 8, 8).cache.k_cache.dtype == torch.bfloat16
    sequences, _ = Engine(tiny_model, tiny_tokenizer, precision).generate_prompts([[65], [66, 67, 68]], max_tokens=5)
    assert all(len(s) > 1 for s in sequences)


def test_samples_of_one_prompt_read_it_once(tiny_tokenizer):
    model = Script({65: [65, 66, 67, 68, 69, 70]}, tiny_tokenizer.get_vocab_size())
    Engine(model, tiny_tokenizer).generate_batch([65, 66, 67, 68], num_samples=4, max_tokens=2, temperature=0.0)
    assert model.rows_run == [1, 3, 4]  # all four tokens; the last one of the others; the second new one of all


def test_weights_that_were_trained_since_are_used(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    engine.generate_batch([65, 66], max_tokens=3, temperature=0.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in tiny_model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    expected, _ = naive_greedy(tiny_model, tiny_tokenizer, [65, 66], 20)
    assert [c[0] for c, _ in engine.generate([65, 66], max_tokens=20, temperature=0.0)] == expected


class TestKVCache:
    def test_overflow_is_an_error_before_anything_is_written(self):
        cache = KVCache(1, 1, 4, 2, 1)
        cache.update(0, torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2))
        cache.advance(3)
        with pytest.raises(ValueError, match="5 tokens are more than the 4"):
            cache.update(0, torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 2))
        assert cache.get_pos() == 3

    def test_prefill_repeats_one_row(self):
        one = KVCache(1, 1, 3, 2, 2)
        for layer in range(2):
            one.update(layer, torch.full((1, 3, 1, 2), layer + 1.0), torch.full((1, 3, 1, 2), layer + 5.0))
        one.advance(3)
        three = KVCache(3, 1, 8, 2, 2)
        three.prefill(one)
        assert three.cache_seqlens.tolist() == [3, 3, 3]
        keys, values = three.get_layer_cache(1)
        assert keys.shape == (3, 8, 1, 2)
        assert (keys[:, :3] == 2).all()
        assert (values[:, :3] == 6).all()
        with pytest.raises(ValueError, match="room"):
            KVCache(1, 1, 2, 2, 2).prefill(one)
        with pytest.raises(ValueError, match="2 rows"):
            KVCache(2, 1, 8, 2, 2).prefill(three)

    def test_rows_of_different_lengths_see_only_their_own(self):
        cache = KVCache(2, 1, 6, 1, 1)
        cache.update(0, torch.arange(6.0).view(2, 3, 1, 1), torch.zeros(2, 3, 1, 1))
        cache.advance(3)
        cache.set_lengths([1, 3])
        assert cache.positions(2).tolist() == [[1, 2], [3, 4]]
        keys, _ = cache.update(0, torch.tensor([[10.0, 11.0], [12.0, 13.0]]).view(2, 2, 1, 1), torch.zeros(2, 2, 1, 1))
        assert keys[:, :, 0, 0].tolist() == [[0, 10, 11, 0, 0], [3, 4, 5, 12, 13]]
        mask = cache.attention_mask()
        assert mask.shape == (2, 1, 2, 5)
        assert mask.sum(-1).flatten().tolist() == [2, 3, 4, 5]

    def test_rows_are_selected_swapped_copied_and_wiped(self):
        cache = KVCache(3, 1, 4, 1, 2)
        cache.select(1, 2)
        for layer in range(2):
            cache.update(layer, torch.full((1, 2, 1, 1), 5.0), torch.full((1, 2, 1, 1), 6.0))
        cache.advance(2)
        assert cache.cache_seqlens.tolist() == [0, 2, 0]
        cache.swap(1, 0)
        cache.copy(0, 2, 1)
        assert cache.cache_seqlens.tolist() == [2, 0, 1]
        assert cache.k_cache[1, :, :2, 0, 0].tolist() == [[5, 5], [0, 0], [5, 0]]
        assert cache.v_cache[0, :, :2, 0, 0].tolist() == [[6, 6], [0, 0], [6, 0]]
        cache.wipe(0)
        assert cache.cache_seqlens.tolist() == [0, 0, 1]
        assert not cache.k_cache[:, 0].any()

    def test_reset_starts_again(self):
        cache = KVCache(2, 1, 2, 1, 1)
        cache.update(0, torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1))
        cache.advance(2)
        cache.reset()
        assert cache.get_pos() == 0
        cache.update(0, torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1))


def test_a_server_takes_as_many_contexts_as_fit():
    d4, d12 = GPTConfig.from_depth(4, 4096, 256), GPTConfig.from_depth(12, 32768, 2048)
    assert fitting_slots(d4, torch.float32) == 32
    context = KVCache(1, d12.n_kv_head, 2048, d12.head_dim, 12, torch.device("cpu"), torch.float32)
    slots = fitting_slots(d12, torch.float32)
    assert slots * 2 * context.k_cache.nbytes <= 4 << 30 < (slots + 1) * 2 * context.k_cache.nbytes
    assert fitting_slots(d12, torch.float32, max_bytes=1) == 1
