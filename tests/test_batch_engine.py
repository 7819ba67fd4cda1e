"""Continuous batching gives everybody what they would get alone, whoever comes and goes meanwhile."""

import contextlib
import math
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_generation import ToolModel, make_model, naive_greedy

from nanochat.engine import Engine
from nanochat.generate import ahead
from nanochat.generate.logprobs import answer_logprob
from nanochat.generate.sampling import Sampling
from nanochat.generate.scheduler import Scheduler
from nanochat.generate.sequence import RowState
from nanochat.gpt import NANOCHAT_2026
from nanochat.ops import recall
from nanochat.serve.answer_events import StopTexts
from nanochat.serve.batch_engine import BatchEngine, EngineClosed, GenerationRequest, QueueFull


@pytest.fixture(scope="module")
def tool_model(tiny_tokenizer):
    return make_model(tiny_tokenizer, ToolModel)


@pytest.fixture(scope="module")
def naive(tool_model, tiny_tokenizer):
    """Naive answers, computed once for each (prompt, max_tokens)."""
    known = {}

    def answer(prompt, max_tokens):
        key = (tuple(prompt), max_tokens)
        if key not in known:
            known[key] = naive_greedy(tool_model, tiny_tokenizer, prompt, max_tokens)
        return known[key]

    return answer


def random_prompts(count, seed=0, longest=60):
    generator = random.Random(seed)
    prompts = [[generator.randrange(256) for _ in range(generator.randint(1, longest))] for _ in range(count)]
    prompts[1:3] = [prompts[0] + [7], prompts[0][: len(prompts[0]) // 2 + 1]]  # some begin alike
    return prompts


def collect(generation):
    """(tokens, text, last event) of a generation, waited for."""
    tokens, text, last = [], "", None
    for event in generation.events():
        assert last is None
        tokens += event.tokens
        text += event.text if event.kind == "text" else ""
        last = event if event.kind in ("done", "error") else None
    return tokens, text, last


def ask_for(tokens, stop=(), slide=False, keep=1, **knobs):
    return GenerationRequest(tokens=tokens, sampling=Sampling(**knobs), stop=stop, slide=slide, keep=keep)


PROMPTS = random_prompts(10)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([1, 3, 16, 200]))
def test_random_arrivals_and_departures_equal_naive_recomputation(
    tool_model, tiny_tokenizer, naive, seed, slots, prefill_chunk
):
    """Rows join at random steps, some are taken away at random steps; tools run; whatever each says is right."""
    generator = random.Random(seed)
    scheduler = Scheduler(tool_model, tiny_tokenizer, None, slots, 128, prefill_chunk)
    waiting = [(p, generator.choice([1, 20, 70])) for p in generator.choices(PROMPTS, k=8)]
    expected, written = {}, {}
    while waiting or scheduler.rows:
        while waiting and scheduler.free and generator.random() < 0.3:
            prompt, limit = waiting.pop()
            row = RowState(prompt, min(limit, 128 - len(prompt)), Sampling(temperature=0.0), 0)
            expected[row], written[row] = naive(prompt, limit), []
            scheduler.add(row)
        for row, new in scheduler.step():
            written[row] += new
        if scheduler.rows and generator.random() < 0.02:
            gone = generator.choice(scheduler.rows)
            gone.finish_reason = "cancelled"
            scheduler.remove(gone)
    for row, new in written.items():
        tokens, masks = expected[row]
        if row.finish_reason == "cancelled":
            tokens, masks = tokens[: len(new)], masks[: len(new)]
        assert [t for t, _ in new] == tokens
        assert [m for _, m in new] == masks


def test_the_tools_above_were_really_called(naive):
    answers = [naive(p, 70) for p in PROMPTS]
    assert sum(masks.count(0) > 0 for _, masks in answers) >= 3
    assert len({tuple(tokens) for tokens, _ in answers}) == len(PROMPTS)


def test_many_threads_get_the_naive_answers(tool_model, tiny_tokenizer, naive):
    results = {}
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=4, prefill_chunk=8) as engine:

        def ask(i):
            time.sleep(0.01 * (i % 5))
            request = ask_for(tokens=PROMPTS[i % len(PROMPTS)], max_tokens=40, temperature=0.0)
            results[i] = collect(engine.submit(request))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = engine.stats()
    for i, (tokens, _, last) in results.items():
        prompt = PROMPTS[i % len(PROMPTS)]
        assert tokens == naive(prompt, 40)[0]
        assert last.finish_reason in ("stop", "length")
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), len(tokens))
    assert (stats["submitted"], stats["finished"], stats["running"], stats["waiting"]) == (20, 20, 0, 0)
    assert stats["generated_tokens"] == sum(len(tokens) for tokens, _, _ in results.values())
    assert stats["cached_tokens"] > 0  # half of the prompts had been read before


def test_a_seed_says_the_same_in_any_company(tool_model, tiny_tokenizer):
    settings_ = {"max_tokens": 30, "temperature": 1.0, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2}
    alone = []
    for i, prompt in enumerate(PROMPTS):
        with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1) as engine:
            alone.append(collect(engine.submit(ask_for(tokens=prompt, seed=i, **settings_)))[0])
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=3, prefill_chunk=5) as engine:
        generations = [engine.submit(ask_for(tokens=prompt, seed=i, **settings_)) for i, prompt in enumerate(PROMPTS)]
        assert [collect(g)[0] for g in generations] == alone
    columns = Engine(tool_model, tiny_tokenizer).generate(
        PROMPTS[0], 3, 30, 1.0, 40, 0, top_p=0.95, repetition_penalty=1.2
    )
    assert [c[0] for c, _ in columns][: len(alone[0])] == alone[0]


def test_long_prompts_do_not_hold_up_the_running(tool_model, tiny_tokenizer):
    """While a long prompt is read in small chunks, a running answer gets a token with every chunk."""
    scheduler = Scheduler(tool_model, tiny_tokenizer, None, 2, 128, 10)
    running = RowState(PROMPTS[0][:5], 60, Sampling(temperature=1.0), 1)
    scheduler.add(running)
    scheduler.step()
    late = RowState([5] * 100, 5, Sampling(temperature=1.0), 2)
    scheduler.add(late)
    steps = 0
    while late.count == 0:
        assert len(dict(scheduler.step())[running]) >= 1
        steps += 1
    assert steps == 10


def test_samples_of_a_long_prompt_read_it_once(tool_model, tiny_tokenizer):
    """Also where the prompt is longer than what is read in a step."""
    scheduler = Scheduler(tool_model, tiny_tokenizer, None, 4, 128, 16)
    rows = [RowState([5] * 100, 3, Sampling(temperature=1.0), seed) for seed in range(4)]
    for row in rows:
        scheduler.add(row)
    while scheduler.rows:
        scheduler.step()
    assert [row.reused for row in rows] == [0, 99, 99, 99]


def test_after_a_failure_nothing_of_the_cache_is_used_again(tool_model, tiny_tokenizer, monkeypatch):
    """A failure between two copies leaves keys of one row beside values of another."""
    scheduler = Scheduler(tool_model, tiny_tokenizer, None, 2, 128, 64)
    row = RowState([5] * 40, 30, Sampling(temperature=0.0), 0)
    scheduler.add(row)
    scheduler.step()
    with monkeypatch.context() as broken:
        broken.setattr(scheduler, "_decode_ready", raise_out_of_memory)
        with pytest.raises(MemoryError):
            scheduler.step()
    scheduler.remove(row)
    again = RowState([5] * 40, 30, Sampling(temperature=0.0), 0)
    scheduler.add(again)
    scheduler.step()
    assert again.reused == 0


def raise_out_of_memory(*_):
    raise MemoryError


def test_cancel_frees_the_slot_at_once(tool_model, tiny_tokenizer):
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1) as engine:
        first = engine.submit(ask_for(tokens=[65], max_tokens=10**6, slide=True))
        second = engine.submit(ask_for(tokens=[66], max_tokens=3))
        third = engine.submit(ask_for(tokens=[67], max_tokens=3))
        next(first.events())
        third.cancel()  # while it waits
        assert collect(third)[2].finish_reason == "cancelled"
        assert not second.finished
        first.cancel()
        assert collect(first)[2].finish_reason == "cancelled"
        assert collect(second)[2].finish_reason in ("stop", "length")
        second.cancel()  # too late: harmless
        assert engine.stats()["cancelled"] == 2


def test_the_queue_is_bounded(tool_model, tiny_tokenizer):
    endless = ask_for(tokens=[65], max_tokens=10**6, slide=True)
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=2, max_queue=3) as engine:
        for _ in range(5):
            engine.submit(endless)
        with pytest.raises(QueueFull, match="waiting already") as error:
            engine.submit(endless)
        assert 1 <= error.value.retry_after_seconds <= 60


def test_what_a_tool_puts_in_is_no_step(tool_model, tiny_tokenizer, naive, monkeypatch):
    monkeypatch.setattr(ahead, "AHEAD_SECONDS", 0.0)  # a token per step
    rounds = []
    monkeypatch.setattr(BatchEngine, "_measure", lambda self, seconds, *made: rounds.append(made))
    prompt = next(p for p in PROMPTS if 0 in naive(p, 60)[1])
    with BatchEngine(tool_model, tiny_tokenizer) as engine:
        collect(engine.submit(ask_for(tokens=prompt, max_tokens=60, temperature=0.0)))
    assert max(tokens for tokens, _, _ in rounds) > 1
    assert {steps for _, steps, _ in rounds} == {1}
    assert {answers for *_, answers in rounds} <= {0, 1}


def test_a_full_queue_asks_to_wait_by_the_speed_with_all_places_taken(tool_model, tiny_tokenizer):
    """Neither a round of few answers counts, nor is one with a tool's long result a fuller one."""
    engine = BatchEngine(tool_model, tiny_tokenizer, max_batch_size=4, max_queue=3)
    engine.close()  # its thread would take what stands for a running answer below
    engine._running = [SimpleNamespace(row=SimpleNamespace(limit=120, count=20))]
    for seconds, tokens, steps, answers in [(0.1, 1, 1, 1), (0.8, 8, 2, 4), (0.4, 4, 1, 4), (0.2, 30, 1, 2)]:
        engine._measure(seconds, tokens, steps, answers)
    assert engine._retry_after() == 40  # 100 tokens left, 0.4 s a step


def test_the_error_of_one_request_is_its_own(tool_model, tiny_tokenizer, naive, monkeypatch):
    """NaN from one row, an exception in the tool of another, a forward pass that fails: the rest goes on, and slots
    are clean for those who come after."""
    hidden = tool_model.hidden

    def poisoned(idx, kv_cache=None, segments=None, found=None):
        if 251 in idx:
            raise RuntimeError("card on fire")
        x = hidden(idx, kv_cache)
        keys = kv_cache.get_layer_cache(0)[0]
        rows = (idx == 250).any(dim=1)
        keys[rows] = float("nan")
        return x.masked_fill(rows[:, None, None], float("nan"))

    prompts = [p for p in PROMPTS if not {250, 251} & set(p) and not {250, 251} & set(naive(p, 20)[0])]
    monkeypatch.setattr(tool_model, "hidden", poisoned)
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=3) as engine:
        for prompt in prompts:
            bad = [engine.submit(ask_for(tokens=t, max_tokens=9)) for t in ([65, 250], [251], [66, 251, 3])]
            good = engine.submit(ask_for(tokens=prompt, max_tokens=20, temperature=0.0))
            assert collect(good)[0] == naive(prompt, 20)[0]
            events = [collect(g)[2] for g in bad]
            assert [e.kind for e in events] == ["error"] * 3
            assert "not a number" in events[0].text
            assert "card on fire" in events[1].text
        assert engine.stats()["failed"] == 3 * len(prompts)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": []}, "empty"),
        ({"tokens": [65] * 128}, "128 tokens leaves no room in the model's context of 128"),
        ({"tokens": [99_999]}, "vocabulary"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"stop": ("",)}, "stop"),
        ({"keep": 100}, "keep"),
    ],
)
def test_bad_requests_are_refused_at_once(tool_model, tiny_tokenizer, values, message):
    with (
        BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1) as engine,
        pytest.raises(ValueError, match=message),
    ):
        engine.submit(ask_for(**({"tokens": [65], "max_tokens": 5} | values)))


def test_a_sliding_context_forgets_the_older_half(tool_model, tiny_tokenizer):
    """What is said after forgetting is what the model says to the tokens kept; the first ones are never forgotten."""
    row = RowState([1, 2, 3, *PROMPTS[0]], 400, Sampling(temperature=0.0), 0, keep=3)
    scheduler = Scheduler(tool_model, tiny_tokenizer, None, 1, 128, 16)
    scheduler.tools.stop_tokens = set()
    scheduler.add(row)
    forgets, before = 0, list(row.context)
    while scheduler.rows:
        ((_, new),) = scheduler.step() or [(row, [])]
        if new and new[0][1] == 1:
            window = row.context[: len(row.context) - len(new)]
            with torch.no_grad():
                assert new[0][0] == int(tool_model(torch.tensor([window]))[0, -1].argmax())
        if len(row.context) < len(before):
            forgets += 1
            assert row.context[:3] == [1, 2, 3]
        before = list(row.context)
    assert forgets >= 4
    assert row.count == 400
    assert row.finish_reason == "length"


def test_the_context_ends_an_answer_that_may_not_slide(tool_model, tiny_tokenizer):
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1) as engine:
        engine._scheduler.tools.stop_tokens = set()
        tokens, _, last = collect(engine.submit(ask_for(tokens=[65] * 100, max_tokens=1000)))
        assert (len(tokens), last.finish_reason) == (28, "length")


def test_every_token_is_in_one_event_and_text_is_whole(tool_model, tiny_tokenizer):
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=4) as engine:
        generations = [
            engine.submit(ask_for(tokens=[65 + i], max_tokens=60, temperature=3.0, seed=i)) for i in range(8)
        ]
        for generation in generations:
            heard = []
            generation.add_listener(heard.append)
            tokens, text, last = collect(generation)
            assert len(tokens) == last.usage.completion_tokens
            assert "\ufffd" not in text
            assert "<|" not in text
            late = []
            generation.add_listener(late.append)
            assert heard == late == list(generation.events())


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_texts_end_where_they_begin_however_the_text_is_cut(text, stops, data):
    filter_, shown, rest = StopTexts(tuple(stops)), "", text
    while rest and not filter_.found:
        size = data.draw(st.integers(1, len(rest)))
        shown += filter_.feed(rest[:size])
        assert text.startswith(shown)
        rest = rest[size:]
    read = text[: len(text) - len(rest)]
    places = [read.find(stop) for stop in stops if stop in read]
    assert filter_.found == bool(places)
    shown += filter_.flush()
    assert shown == (read[: min(places)] if places else read)


def test_a_stop_text_ends_the_answer(tool_model, tiny_tokenizer):
    request = ask_for(tokens=PROMPTS[3], max_tokens=60, temperature=0.0)
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1) as engine:
        text = collect(engine.submit(request))[1]
        assert len(text) > 1
        stop = text[-1]
        _, shown, last = collect(
            engine.submit(ask_for(tokens=PROMPTS[3], max_tokens=60, temperature=0.0, stop=(stop,)))
        )
        assert shown == text[: text.index(stop)]
        assert last.finish_reason == "stop"
        assert engine.stats()["running"] == 0


def test_a_guess_is_not_given(tool_model, tiny_tokenizer):
    """The whole answer, once it is known to be likely enough; else what was asked for instead, and nothing of it."""
    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=2) as engine:
        for prompt in PROMPTS[:6]:
            known = list(engine.submit(ask_for(prompt, max_tokens=12, temperature=0.0, logprobs=0)).events())
            share = math.exp(answer_logprob((t.bytes, t.logprob) for event in known for t in event.logprobs))
            for least, given in ((0.9 * share, True), (min(1.0, 1.1 * share), False)):
                asked = ask_for(prompt, max_tokens=12, temperature=0.0, min_answer_p=least, unsure="Who knows?")
                events = list(engine.submit(asked).events())
                assert not any(event.logprobs for event in events)  # nobody asked for them
                assert events[-1].kind == "done"
                if given:
                    assert [(e.kind, e.text, e.tokens) for e in events] == [(e.kind, e.text, e.tokens) for e in known]
                else:
                    assert [(e.kind, e.text) for e in events[:-1]] == [("text", "Who knows?")]
                    assert events[-1].finish_reason == "stop"
                    assert not events[-1].tokens
                    # It was written all the same, and its tokens count.
                    assert events[-1].usage.completion_tokens == known[-1].usage.completion_tokens


def test_closing_finishes_what_runs_or_cancels_it(tool_model, tiny_tokenizer):
    engine = BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1)
    generations = [engine.submit(ask_for(tokens=[65], max_tokens=10, temperature=2.0)) for _ in range(3)]
    engine.close()
    assert all(g.finished for g in generations)
    assert collect(generations[2])[2].finish_reason in ("stop", "length")
    with pytest.raises(EngineClosed, match="closed"):
        engine.submit(ask_for(tokens=[65], max_tokens=3))
    endless = ask_for(tokens=[65], max_tokens=10**7, slide=True, temperature=1.0)
    for close in ({"drain": False}, {"timeout": 0.05}):
        engine = BatchEngine(tool_model, tiny_tokenizer, max_batch_size=1)
        engine._scheduler.tools.stop_tokens = set()
        generations = [engine.submit(endless) for _ in range(2)]
        engine.close(**close)
        assert [collect(g)[2].finish_reason for g in generations] == ["cancelled"] * 2
    assert "batch-engine" not in [t.name for t in threading.enumerate()]


def test_a_listener_that_fails_harms_nobody(tool_model, tiny_tokenizer):
    def broken(event):
        raise RuntimeError("the loop is closed")

    with BatchEngine(tool_model, tiny_tokenizer, max_batch_size=2) as engine:
        generation = engine.submit(ask_for(tokens=[65], max_tokens=30))
        with contextlib.suppress(RuntimeError):
            generation.add_listener(broken)
        assert collect(generation)[2].kind == "done"
        assert collect(engine.submit(ask_for(tokens=[66], max_tokens=5)))[2].kind == "done"


@pytest.mark.parametrize("window", ["L", "SL"])
def test_modern_switches_batch_like_classic_models(tiny_tokenizer, window, monkeypatch):
    """Smear, recall and offset keys look at tokens before: rows must never see each other's."""
    monkeypatch.setattr(recall, "COMMON", 2)  # of so few tokens each says something of a subject
    switches = NANOCHAT_2026 | {"recall": 500, "window_pattern": window, "key_offset": True}
    model = make_model(tiny_tokenizer, ToolModel, **switches)
    model.recall.carry(np.random.default_rng(0).integers(60, 80, 500).astype(np.int32))
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() == 1:  # a share of 0 would hide what smear does
                p.fill_(0.5)
    scheduler = Scheduler(model, tiny_tokenizer, None, 3, 128, prefill_chunk=5)
    waiting, written, prompts = list(PROMPTS[:6]), {}, {}
    while waiting or scheduler.rows:
        while waiting and scheduler.free:
            prompt = waiting.pop()
            row = RowState(prompt, 20, Sampling(temperature=0.0), 0)
            written[row], prompts[row] = [], prompt
            scheduler.add(row)
        for row, new in scheduler.step():
            written[row] += new
    for row, new in written.items():
        assert [t for t, _ in new] == naive_greedy(model, tiny_tokenizer, prompts[row], 20)[0]
