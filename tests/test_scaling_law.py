"""The law of bits per byte: its numbers follow from the published runs, and its error is the one it states."""

import math
from dataclasses import astuple

import pytest

from dev.fit_scaling_law import RUNS, fit
from nanochat.plan.scaling_law import BYTES_PER_TOKEN, ERROR, LAW, bytes_per_token, predict_bpb


def test_the_law_is_what_the_runs_give():
    assert astuple(fit(RUNS)) == pytest.approx(astuple(LAW), rel=2e-3)


def test_the_error_is_that_of_runs_the_law_has_not_seen():
    errors = []
    for i, run in enumerate(RUNS):
        law = fit(RUNS[:i] + RUNS[i + 1 :])
        text = run.tokens * bytes_per_token(run.vocab_size)
        errors.append(math.log(law.bpb(run.matmul_params, text, run.classic, run.fineweb) / run.bpb))
    assert math.sqrt(sum(e * e for e in errors) / len(errors)) == pytest.approx(ERROR, abs=0.002)
    assert max(map(abs, errors)) < 0.12


def test_more_weights_and_more_text_help_and_the_recipe_counts():
    small = predict_bpb(10**7, 1e8, 32768, classic=True)
    assert predict_bpb(10**8, 1e8, 32768, classic=True) < small
    assert predict_bpb(10**7, 1e9, 32768, classic=True) < small
    assert predict_bpb(10**7, 1e8, 32768, classic=False) < small
    assert predict_bpb(10**7, 1e8, 32768, classic=True, fineweb=True) > small


def test_bytes_per_token():
    for vocab_size, measured in BYTES_PER_TOKEN.items():
        assert bytes_per_token(vocab_size) == pytest.approx(measured)
    assert 3.41 < bytes_per_token(6000) < 3.85
    assert 1.0 <= bytes_per_token(256) < 3.41
    assert bytes_per_token(131072) > 4.76


def test_the_optimum_of_the_published_sweep_is_the_laws_too():
    best = [run for run in RUNS if run.optimal]
    for run in best:
        flops = run.matmul_params * run.tokens

        def bpb(factor, flops=flops, run=run):
            params = factor * run.matmul_params
            return LAW.bpb(params, flops / params * bytes_per_token(run.vocab_size), run.classic, run.fineweb)

        assert bpb(1.0) < min(bpb(0.4), bpb(2.5))
    assert len(best) == 4
