"""Log-probabilities are those of the whole sequence run at once, however it was batched, cached and cut into chunks."""

import random

import pytest
import torch
from reference_generation import ToolModel, make_model

from nanochat.generate.logprobs import answer_logprob
from nanochat.generate.sampling import Sampling
from nanochat.serve.batch_engine import BatchEngine, GenerationRequest


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return make_model(tiny_tokenizer)


def ask(engine, prompt, prompt_logprobs=False, **knobs):
    return engine.submit(GenerationRequest(tokens=prompt, sampling=Sampling(**knobs), prompt_logprobs=prompt_logprobs))


def events_of(generation):
    events = list(generation.events())
    assert events[-1].kind == "done", events[-1].text
    return events


def reference(model, tokens):
    """The log-probability of each token but the first, by one plain forward pass: (T - 1, V)."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, :-1].double().log_softmax(-1)


def check(known, expected, tokenizer, top):
    for logprob, row in zip(known, expected, strict=True):
        assert logprob.bytes == tokenizer.decode_bytes([logprob.token])
        assert logprob.logprob == pytest.approx(row[logprob.token].item(), abs=1e-5)
        assert len(logprob.top) == top
        torch.testing.assert_close(
            torch.tensor([t.logprob for t in logprob.top]).double(), row.topk(top).values, atol=1e-5, rtol=0
        )
        for t in logprob.top:
            assert t.logprob == pytest.approx(row[t.token].item(), abs=1e-5)


def test_what_an_answer_asks_counts_less_than_what_it_claims():
    pieces = [(b"You", -3.0), (b" mean", -2.0), (b"?", -1.0), (b" It", -0.1), (b" is", None), (b" so", -0.2)]
    assert answer_logprob(pieces) == pytest.approx(-6 / 4 - 0.3)
    assert answer_logprob(pieces[:2]) == -5.0
    assert answer_logprob([(b"So?", -1.0), (b"?", -1.0)]) == -0.5


def test_answers_in_any_company_have_the_reference_s(model, tiny_tokenizer):
    """Prompts that share beginnings, settings that change what is drawn but not how likely it was."""
    draw = random.Random(3)
    shared = [draw.randrange(256) for _ in range(40)]
    prompts = [shared[: draw.randrange(1, 40)] + [draw.randrange(256) for _ in range(i % 5)] for i in range(12)]
    knobs = [
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 7, "seed": 5},
        {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
        {"temperature": 1.0, "logit_bias": ((65, 8.0), (66, -100.0))},
    ]
    with BatchEngine(model, tiny_tokenizer, max_batch_size=3, prefill_chunk=7) as engine:
        asked = [ask(engine, p, max_tokens=30, logprobs=i % 3, **knobs[i % 4]) for i, p in enumerate(prompts)]
        for i, (prompt, generation) in enumerate(zip(prompts, asked, strict=True)):
            events = events_of(generation)
            tokens = [t for e in events for t in e.tokens]
            known = [t for e in events for t in e.logprobs]
            assert all(len(e.logprobs) == len(e.tokens) for e in events)
            assert [t.token for t in known] == tokens
            check(known, reference(model, prompt + tokens)[len(prompt) - 1 :], tiny_tokenizer, i % 3)
        assert engine.stats()["cached_tokens"] > 0


def test_the_calculator_s_tokens_are_nobody_s_choice(tiny_tokenizer):
    model = make_model(tiny_tokenizer, ToolModel)
    draw, forced = random.Random(2), 0
    with BatchEngine(model, tiny_tokenizer, max_batch_size=4) as engine:
        for _ in range(8):
            prompt = [draw.randrange(256) for _ in range(20)]
            events = events_of(ask(engine, prompt, max_tokens=60, temperature=0.0, logprobs=0))
            known = [t for e in events for t in e.logprobs]
            rows = reference(model, prompt + [t.token for t in known])[len(prompt) - 1 :]
            start, end = (tiny_tokenizer.encode_special(f"<|output_{place}|>") for place in ("start", "end"))
            inside = False
            for logprob, row in zip(known, rows, strict=True):
                inside |= logprob.token == start
                assert (logprob.logprob is None) == inside
                forced += inside
                if not inside:  # this model's logits are nine times those of others, and so is their rounding
                    assert logprob.logprob == pytest.approx(row[logprob.token].item(), abs=1e-4)
                inside &= logprob.token != end
    assert forced > 0


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_prompts_have_the_reference_s(model, tiny_tokenizer, max_tokens):
    draw = random.Random(4)
    prompts = [[draw.randrange(256) for _ in range(n)] for n in (1, 2, 70, 70, 30)]
    prompts[3] = prompts[2][:50] + prompts[3][:20]
    with BatchEngine(model, tiny_tokenizer, max_batch_size=2, prefill_chunk=13) as engine:
        events_of(ask(engine, prompts[2], max_tokens=3))  # it is in the cache now
        asked = [ask(engine, p, True, max_tokens=max_tokens, logprobs=2, temperature=0.0) for p in prompts]
        for prompt, generation in zip(prompts, asked, strict=True):
            first, *rest = events_of(generation)
            assert first.kind == "prompt"
            assert [t.token for t in first.logprobs] == list(first.tokens) == prompt
            assert first.logprobs[0].logprob is None
            check(first.logprobs[1:], reference(model, prompt), tiny_tokenizer, 2)
            assert sum(len(e.tokens) for e in rest) <= max_tokens
            assert rest[-1].usage.completion_tokens == sum(len(e.tokens) for e in rest)
            assert rest[-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize("fails", [False, True])
def test_prompts_that_are_judged_are_read_together(model, tiny_tokenizer, monkeypatch, fails):
    """As a harness sends them, with an ordinary request between; and one by one again where a pass fails."""
    draw, passes, hidden = random.Random(5), [], model.hidden

    def counted(idx, kv_cache=None, segments=None, found=None):
        if kv_cache is not None:
            passes.append(tuple(idx.shape))
        if fails and idx.size(0) > 1 and idx.size(1) > 1:
            raise RuntimeError("out of memory")
        return hidden(idx, kv_cache, segments)

    prompts = [[draw.randrange(256) for _ in range(20 + 3 * (i % 9))] for i in range(24)]
    knobs = {"max_tokens": 1, "temperature": 0.0}
    with BatchEngine(model, tiny_tokenizer, max_batch_size=8, prefill_chunk=64) as engine:
        alone = [[t for e in events_of(ask(engine, p, **knobs)) for t in e.tokens] for p in prompts]
    with BatchEngine(model, tiny_tokenizer, max_batch_size=8, prefill_chunk=64) as engine:
        monkeypatch.setattr(model, "hidden", counted)
        asked = [ask(engine, p, True, logprobs=1, **knobs) for p in prompts[:-1]]
        other = ask(engine, prompts[-1], **knobs)
        for prompt, tokens, generation in zip(prompts, alone, asked, strict=False):
            first, *rest = events_of(generation)
            check(first.logprobs[1:], reference(model, prompt), tiny_tokenizer, 1)
            assert [t for e in rest for t in e.tokens] == tokens
        assert [t for e in events_of(other) for t in e.tokens] == alone[-1]
    reads = [shape for shape in passes if shape[1] > 1]
    together = [shape for shape in reads if shape[0] > 1]
    assert together
    assert all(rows * longest <= 4 * 64 for rows, longest in together)
    if not fails:
        assert len(reads) <= len(prompts) / 2


def test_a_prompt_that_fills_the_context_can_be_judged(model, tiny_tokenizer):
    prompt = [i % 200 for i in range(128)]
    with BatchEngine(model, tiny_tokenizer, max_batch_size=1) as engine:
        first, last = events_of(ask(engine, prompt, True, max_tokens=0, logprobs=0))
        assert (len(first.logprobs), last.finish_reason) == (128, "length")
        check(first.logprobs[1:], reference(model, prompt), tiny_tokenizer, 0)
        with pytest.raises(ValueError, match="no room"):
            ask(engine, prompt, True, max_tokens=1)
        nothing = events_of(ask(engine, prompt[:5], max_tokens=0))
        assert [(e.kind, e.tokens, e.finish_reason) for e in nothing] == [("done", (), "length")]


def test_without_the_asking_nothing_is_reported(model, tiny_tokenizer):
    with BatchEngine(model, tiny_tokenizer, max_batch_size=1) as engine:
        assert all(not e.logprobs for e in events_of(ask(engine, [1, 2, 3], max_tokens=5)))
