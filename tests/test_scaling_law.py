"""The law of bits per byte: its numbers follow from the published runs, and its error is the one it states."""

from dataclasses import astuple

import pytest

from dev.fit_scaling_law import RUNS, fit, held_out_errors, root_mean_square
from nanochat.plan.scaling_law import BYTES_PER_TOKEN, ERROR, LAW, bytes_per_token, predict_bpb


def test_the_law_is_what_the_runs_give():
    assert astuple(fit(RUNS)) == pytest.approx(astuple(LAW), rel=2e-3)


def test_the_error_is_that_of_runs_the_law_has_not_seen():
    errors = held_out_errors(RUNS)
    published = [error for run, error in zip(RUNS, errors, strict=True) if run.published]
    assert root_mean_square(published) == pytest.approx(ERROR, abs=0.002)
    assert root_mean_square(errors) < ERROR
    assert max(map(abs, errors)) < 0.11


def test_more_weights_and_more_text_help_and_the_recipe_counts():
    small = predict_bpb(10**7, 10**7, 1e8, 32768, classic=True)
    assert predict_bpb(10**8, 10**7, 1e8, 32768, classic=True) < small
    assert predict_bpb(10**7, 10**8, 1e8, 32768, classic=True) < small
    assert predict_bpb(10**7, 10**7, 1e9, 32768, classic=True) < small
    assert predict_bpb(10**7, 10**7, 1e8, 32768, classic=False) < small
    assert predict_bpb(10**7, 10**7, 1e8, 32768, classic=True, fineweb=True) > small


def test_the_best_vocabulary_grows_with_compute_and_weights_of_blocks_count_for_more():
    def best(depth, flops):
        channels = 64 * depth
        blocks = 12 * depth * channels**2

        def bpb(vocab_size):
            head = vocab_size * channels
            return predict_bpb(blocks, head, flops / (6 * (blocks + head)), vocab_size, classic=False)

        return min(BYTES_PER_TOKEN, key=bpb)

    assert best(4, 1e15) <= 8192  # as measured
    assert best(4, 1e15) < best(12, 1e18) <= best(24, 1e20)
    assert LAW.bpb(2e8, 1e8, 1e9) < LAW.bpb(1e8, 2e8, 1e9)


def test_bytes_per_token():
    for vocab_size, measured in BYTES_PER_TOKEN.items():
        assert bytes_per_token(vocab_size) == pytest.approx(measured)
    assert 3.41 < bytes_per_token(6000) < 3.85
    assert 1.0 <= bytes_per_token(256) < 3.41
    assert bytes_per_token(131072) > 4.76


def test_the_optimum_of_the_published_sweep_is_the_laws_too():
    best = [run for run in RUNS if run.optimal]
    for run in best:
        flops = (run.block_params + run.head_params) * run.tokens

        def bpb(factor, flops=flops, run=run):  # of depths: blocks grow as their cube
            blocks, head = factor**3 * run.block_params, factor * run.head_params
            text = flops / (blocks + head) * bytes_per_token(run.vocab_size)
            return LAW.bpb(blocks, head, text, run.factors)

        assert bpb(1.0) < min(bpb(0.7), bpb(1.4))
    assert len(best) == 4
