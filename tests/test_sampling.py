"""Sampling follows the distribution that its settings describe, and a row's choice is its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.generate.logit_rules import LogitRules, penalize
from nanochat.generate.sampling import NOT_FINITE, Sampling, likeliest, sample
from rustbpe import decoding


def uniform(n, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [(1.0, None, None, 4), (0.5, 0, 1.0, 4), (1.0, 2, None, 2), (2.0, 3, None, 3), (1.0, 100, None, 4),
     (1.0, None, 0.6, 1), (1.0, None, 0.7, 2), (1.0, 3, 0.95, 3), (1.0, 3, 0.9, 2), (1.0, None, 1e-9, 1)],
)  # fmt: skip
def test_follows_the_distribution(temperature, top_k, top_p, kept):
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.0]])  # probabilities .24 .64 .03 .09
    chosen = sample(
        logits.repeat(20_000, 1), Sampling(temperature=temperature, top_k=top_k, top_p=top_p), uniform(20_000)
    )
    counts = chosen.bincount(minlength=4) / 20_000
    allowed = logits[0].clone()
    allowed[logits[0].argsort(descending=True)[kept:]] = -float("inf")
    torch.testing.assert_close(counts, (allowed / temperature).softmax(0), atol=0.015, rtol=0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 1, 5, 299]), st.sampled_from([None, 0.3, 0.999]))
def test_a_row_does_not_depend_on_the_others(seed, top_k, top_p):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(seed)) * 5
    u, s = uniform(6, seed), Sampling(top_k=top_k, top_p=top_p)
    together = sample(logits, s, u)
    assert together.tolist() == [int(sample(logits[i : i + 1], s, u[i : i + 1])) for i in range(6)]


def test_the_ends_of_the_random_range_choose_possible_tokens():
    logits = torch.full((3, 1000), -float("inf"))
    logits[:, 10:20] = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    for top_k in (None, 50):
        chosen = sample(logits, Sampling(top_k=top_k), torch.tensor([0.0, 1.0, 1 - 2**-24]))
        assert all(10 <= t < 20 for t in chosen.tolist())


def test_temperature_0_and_tiny_temperatures_take_the_likeliest():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    for temperature in (0.0, 1e-30, 1e-300):
        assert torch.equal(sample(logits, Sampling(temperature=temperature)), logits.argmax(-1))
    assert torch.equal(sample(logits, Sampling(top_k=1), uniform(50)), logits.argmax(-1))


@pytest.mark.skipif(decoding.library() is None, reason="rustbpe was not compiled here")
@pytest.mark.parametrize("knobs", [
    {"temperature": 0.0}, {}, {"temperature": 0.3, "top_k": 7}, {"top_k": 299}, {"top_p": 0.8}, {"min_p": 0.05},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
])  # fmt: skip
def test_the_crate_chooses_as_torch_does(knobs, monkeypatch):
    logits = 3 * torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    logits[5, 7], logits[6, 8], logits[7, ::2], logits[8] = float("nan"), float("inf"), -float("inf"), -float("inf")
    logits[9, 4] = 3e38  # finite, but not over a small temperature
    choose, calls = decoding.choose, []
    monkeypatch.setattr(decoding, "choose", lambda *args: calls.append(choose(*args)))
    ours = sample(logits, Sampling(**knobs), uniform(2000))
    monkeypatch.setattr(decoding, "library", lambda: None)
    theirs = sample(logits, Sampling(**knobs), uniform(2000))
    assert len(calls) == 1  # the first is the crate's, the second is not
    assert ours[[5, 6, 8]].tolist() == [NOT_FINITE] * 3
    assert ours[9] == theirs[9]
    # A random number may lie between two sums that are rounded differently.
    assert (ours != theirs).sum() <= (0 if knobs.get("temperature") == 0.0 else 2)


@pytest.mark.parametrize("k", [1, 3, 50, 200, 1000])
def test_the_likeliest_are_those_of_topk_and_equal_ones_come_by_their_ids(k):
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(k))
    logits[1, 7], logits[2, ::3] = float("inf"), -float("inf")
    values, ids = likeliest(logits, k)
    expected = logits.topk(k)
    assert torch.equal(values, expected.values)
    assert torch.equal(logits.gather(-1, ids), values)
    finite = values.isfinite() & (k <= 200)
    assert torch.equal(ids[finite], expected.indices[finite])
    equal = torch.zeros(2, 1000)
    equal[1, 900] = 1.0
    if k <= 200:
        assert likeliest(equal, k)[1].tolist() == [list(range(k)), [900, *range(k - 1)]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 2}, {"top_k": 30, "top_p": 0.5}, {}])
def test_one_bad_logit_spoils_its_row_only(bad, settings):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    good = sample(logits, Sampling(**settings), torch.full((3,), 0.5))
    logits[1, 20] = bad
    chosen = sample(logits, Sampling(**settings), torch.full((3,), 0.5))
    assert chosen.tolist() == [good[0], NOT_FINITE, good[2]]


def test_rows_that_are_not_numbers_are_told():
    logits = torch.zeros(3, 5)
    logits[1, 2] = float("nan")
    for s in (Sampling(temperature=0.0), Sampling(), Sampling(top_k=3)):
        chosen = sample(logits, s, uniform(3))
        assert [t == NOT_FINITE for t in chosen.tolist()] == [False, True, False]


def test_the_penalty_makes_seen_tokens_less_likely():
    logits = torch.tensor([2.0, -2.0, 1.0])
    penalize(logits, {0, 1}, 2.0)
    assert logits.tolist() == [1.0, -4.0, 1.0]
    penalize(logits, set(), 2.0)
    assert logits.tolist() == [1.0, -4.0, 1.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
     ("top_p", float("nan")), ("repetition_penalty", 0.0), ("repetition_penalty", float("inf")),
     ("min_p", -0.1), ("min_p", 1.1), ("frequency_penalty", float("nan")), ("presence_penalty", float("inf")),
     ("logit_bias", ((-1, 1.0),)), ("logit_bias", ((1, float("nan")),)), ("logprobs", -1), ("min_tokens", -1),
     ("max_tokens", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        Sampling(**{setting: value})


def test_min_p_keeps_what_is_likely_enough_and_top_p_counts_what_is_left():
    logits = torch.tensor([[1.0, 2.0, -1.0, 0.0]])  # probabilities .24 .64 .03 .09
    for min_p, top_p, kept in ((0.2, None, 2), (0.1, None, 3), (1.0, None, 1), (0.2, 0.72, 1), (0.2, 0.74, 2)):
        chosen = sample(logits.repeat(5000, 1), Sampling(min_p=min_p, top_p=top_p), uniform(5000))
        assert set(chosen.tolist()) == set(logits[0].argsort(descending=True)[:kept].tolist())
    hot = sample(logits.repeat(5000, 1), Sampling(min_p=0.2, temperature=2.0), uniform(5000))  # after temperature
    assert set(hot.tolist()) == {0, 1, 2, 3}


def ruled(sampling, prompt, written, logits, room=9, ends=(4,)):
    """The logits that the settings make of `logits`, after a prompt and what was written."""
    rules = LogitRules.needed(sampling, prompt)
    rules.take(written)
    changed = torch.tensor(logits)
    rules.apply(changed, room, ends)
    return changed.tolist()


def test_bias_and_penalties_change_the_logits_as_vllm_s_do():
    logits = [1.0, -1.0, 2.0, 0.5, 3.0]
    assert ruled(Sampling(logit_bias=((0, 2.0), (4, -100.0))), [], [], logits) == [3.0, -1.0, 2.0, 0.5, -97.0]
    # What was written counts, the prompt doesn't.
    assert ruled(Sampling(frequency_penalty=0.5), [0, 0], [2, 2, 1], logits) == [1.0, -1.5, 1.0, 0.5, 3.0]
    assert ruled(Sampling(presence_penalty=0.5), [0, 0], [2, 2, 1], logits) == [1.0, -1.5, 1.5, 0.5, 3.0]
    assert ruled(Sampling(frequency_penalty=-0.5, presence_penalty=0.25), [], [2, 2], logits)[2] == 2.75
    assert ruled(Sampling(repetition_penalty=2.0, logit_bias=((1, 3.0),)), [1], [], logits)[1] == 1.0  # bias first
    assert LogitRules.needed(Sampling(temperature=0.3, top_k=4, min_p=0.5), [1]) is None


def test_an_answer_can_be_kept_from_ending_early():
    never = -float("inf")
    for written, last in (([], never), ([1], never), ([1, 2], 3.0)):
        assert ruled(Sampling(min_tokens=2), [1], written, [1.0, 1.0, 1.0, 1.0, 3.0])[4] == last
