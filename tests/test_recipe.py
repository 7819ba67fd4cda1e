"""Planning: batches that divide, schedules that start, fall and end where they should."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.recipe import (
    CLASSIC,
    MODERN,
    PRESETS,
    RATES,
    REFERENCE_BATCH,
    SMALL,
    Momentum,
    Schedule,
    batch_for_steps,
    parameter_groups,
    plan_batch,
    plan_iterations,
    reference_tokens,
    scale_hyperparameters,
)


@given(
    n=st.integers(2, 5000),
    warmup=st.floats(0, 0.5),
    warmdown=st.just(0.0) | st.floats(0.01, 0.5),
    final=st.floats(0, 1),
)
def test_learning_rate_is_never_negative_and_ends_at_its_final_value(n, warmup, warmdown, final):
    schedule = Schedule(num_iterations=n, warmup_ratio=warmup, warmdown_ratio=warmdown, final_lr_frac=final)
    values = [schedule.lr_multiplier(schedule.progress(step, 0.0)) for step in range(n + 1)]
    assert all(0 <= v <= 1 for v in values)
    if warmdown > 0:  # reached when the last step is made: none of rate 0 is computed for nothing
        assert values[n] == pytest.approx(final, abs=1e-9)
        assert values[n - 1] > 0
    assert schedule.finished(n, 0.0)
    assert not schedule.finished(n - 1, 0.0)


def test_a_timed_schedule_follows_the_clock():
    schedule = Schedule(seconds=100.0, warmdown_ratio=0.5)
    assert schedule.lr_multiplier(schedule.progress(10**6, 25.0)) == 1.0
    assert schedule.lr_multiplier(schedule.progress(0, 75.0)) == pytest.approx(0.5)
    assert schedule.lr_multiplier(schedule.progress(0, 100.0)) == 0.0
    assert schedule.finished(0, 100.0)


def test_of_two_limits_the_first_ends_the_run():
    schedule = Schedule(num_iterations=10, seconds=100.0, warmdown_ratio=0.5)
    assert schedule.progress(2, 40.0) == 0.4
    assert schedule.progress(6, 40.0) == 0.6
    assert schedule.lr_multiplier(schedule.progress(1, 75.0)) == pytest.approx(0.5)
    ended = {(9, 99.0): False, (10, 1.0): True, (1, 100.0): True}
    assert {at: schedule.finished(*at) for at in ended} == ended


@pytest.mark.parametrize("values", [{}, {"num_iterations": 0}, {"seconds": 0.0}, {"num_iterations": 5, "seconds": 0.0}])
def test_a_schedule_needs_a_horizon(values):
    with pytest.raises(ValueError, match=r"iteration|time"):
        Schedule(**values)


@pytest.mark.parametrize(("device_batch", "accum"), [(16, 4), (8, 8), (4, 16)])
def test_the_total_batch_stays_whatever_fits_on_the_card(device_batch, accum):
    plan = plan_batch(131072, device_batch, 2048, 1)
    assert plan.grad_accum_steps == accum
    assert plan.total_tokens == 131072


def test_a_batch_that_does_not_divide_names_the_nearest():
    with pytest.raises(ValueError, match="--total_batch_size=131072"):
        plan_batch(130000, 8, 2048, 1)
    with pytest.raises(ValueError, match="--device_batch_size"):
        plan_batch(131072, 0, 2048, 1)


def test_horizons_in_their_order():
    common = {"batch_tokens": 1000, "num_params": 10_000, "flops_per_token": 60}
    everything = {"num_iterations": 7, "target_flops": 6e5, "target_param_data_ratio": 20.0}
    assert plan_iterations(**common, **everything) == 7
    assert plan_iterations(**common, **(everything | {"num_iterations": -1})) == 10
    assert plan_iterations(**common, num_iterations=None, target_flops=None, target_param_data_ratio=20.0) == 200
    with pytest.raises(ValueError, match="--hours"):
        plan_iterations(**common, num_iterations=None, target_flops=None, target_param_data_ratio=None)


def test_momentum_rises_to_its_end_and_falls_with_the_learning_rate():
    classic, modern = CLASSIC.momentum, MODERN.momentum
    assert [classic.at(step) for step in (0, 150, 10_000)] == pytest.approx([0.85, 0.90, 0.95])
    assert classic.at(10_000, warmdown=1.0) == pytest.approx(0.95)
    assert [modern.at(step) for step in (0, 200, 400)] == pytest.approx([0.85, 0.91, 0.97])
    assert modern.at(9_000, warmdown=0.5) == pytest.approx(0.935)
    assert Momentum(0.8, 0.9, 10, 0.85).at(5, warmdown=1.0) == pytest.approx(0.85)


def test_warmup_in_steps():
    schedule = Schedule(num_iterations=100, warmup_steps=10, warmdown_ratio=0.5, final_lr_frac=0.1)
    values = [schedule.lr_multiplier(schedule.progress(step, 0.0), step) for step in range(101)]
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10:51] == [1.0] * 41
    assert values[-1] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="--warmup_steps"):
        Schedule(num_iterations=5, warmup_steps=-1)


def meta_model(depth=4, vocab=1000, **settings):
    with torch.device("meta"):
        return GPT(GPTConfig.from_depth(depth, vocab, 64, **settings))


def test_modern_numbers_hold_at_the_reference_and_scale_from_there():
    model = meta_model(12, 32768, **MODERN.switches)
    at = scale_hyperparameters(MODERN, model, None)
    # 12 tokens for each of the matrices' 84.9M and lm_head's 25.2M parameters, and the gates of the value embeddings
    assert reference_tokens(MODERN, model.config) == 12 * (12 * 12 * 768**2 + 768 * 32768 + 6 * 12 * 6)
    assert at.total_batch_size == REFERENCE_BATCH == 524288
    assert (at.embedding_lr, at.unembedding_lr, at.matrix_lr, at.scalar_lr) == (0.3, 0.008, 0.02, 0.5)
    assert at.weight_decay == pytest.approx(0.28)
    quarter = scale_hyperparameters(MODERN, model, reference_tokens(MODERN, model.config) / 64)
    assert quarter.total_batch_size == 2**17  # 64^0.383 = 4.9, and the nearest power of two is 4
    assert quarter.matrix_lr == pytest.approx(0.01)
    given_batch = scale_hyperparameters(MODERN, model, None, total_batch_size=2**15)
    assert given_batch.matrix_lr == pytest.approx(0.005)
    assert given_batch.weight_decay == pytest.approx(0.07)
    short = scale_hyperparameters(MODERN, model, 1e6, multiple_of=3000)
    assert short.total_batch_size % 3000 == 0
    assert short.weight_decay <= 1.0
    flags = SimpleNamespace(**dict.fromkeys(RATES), other=1)
    assert at.override(flags) == at
    flags.matrix_lr = 0.5
    assert at.override(flags) == replace(at, matrix_lr=0.5)


def test_the_batch_of_a_number_of_steps_agrees_with_the_batch_of_its_tokens():
    model = meta_model(12, 32768, **MODERN.switches)
    for steps in (300, 2520, 20_000):
        batch = batch_for_steps(MODERN, model, steps)
        derived = scale_hyperparameters(MODERN, model, batch * steps).total_batch_size
        assert 0.7 < derived / batch < 1.42
    assert batch_for_steps(CLASSIC, model, 300) == 524288


def test_classic_numbers_do_not_scale():
    r = scale_hyperparameters(CLASSIC, meta_model(), 1e6, total_batch_size=4096)
    assert (r.total_batch_size, r.embedding_lr, r.unembedding_lr, r.matrix_lr) == (4096, 0.2, 0.004, 0.02)
    assert r.weight_decay == 0.0


def test_small_takes_the_measured_batch_and_leaves_the_rates():
    model = meta_model(4, 8192, **SMALL.switches)
    assert scale_hyperparameters(SMALL, model, 1.06e6, multiple_of=512).total_batch_size == 4096
    # Half a billion tokens are 500 times as many: 500^0.383 = 10.8, and the nearest power of two is 8.
    assert scale_hyperparameters(SMALL, model, 5e8).total_batch_size == 8 * 4096
    for tokens in (1e6, 7e6, 1e10):
        r = scale_hyperparameters(SMALL, model, tokens)
        assert (r.embedding_lr, r.unembedding_lr, r.matrix_lr, r.scalar_lr) == (0.2, 0.004, 0.03, 0.1)
        assert r.weight_decay == 0.0
    assert 0.7 < batch_for_steps(SMALL, model, 250) / 4096 < 1.42


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("switches", [{}, MODERN.switches | {"recall": 64}], ids=["classic", "modern"])
def test_every_parameter_is_in_one_group_and_a_step_works(name, switches):
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(2, 70, 16, **switches))
    model.init_weights()
    rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.1, "scalar_lr": 0.5}
    groups = parameter_groups(model, **rates, preset=PRESETS[name])
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    optimizer = MuonAdamW(groups)
    schedule = Schedule(num_iterations=10, decay_to_zero=True, warmdown_ratio=0.5)
    multiplier = schedule.apply(optimizer.param_groups, 10, 0.0)
    assert multiplier == 0.0
    assert [g["weight_decay"] for g in optimizer.param_groups if g["kind"] == "muon"] == [pytest.approx(0.0)]
    schedule.apply(optimizer.param_groups, 2, 0.0)
    x = torch.randint(0, 70, (2, 16))
    before = model(x, x)
    before.backward()
    optimizer.step()
    assert model(x, x) < before
    rate = {n: g["lr"] for g in groups for n in g["names"]}
    width = (128 / 768) ** -0.5
    assert rate["transformer.wte.weight"] == pytest.approx(0.2 * width)
    if switches:
        assert rate["value_embeds.1.weight"] == pytest.approx(0.1 * width)
        assert (rate["resid_lambdas"], rate["x0_lambdas"], rate["smear_lambda"]) == (0.005, 0.5, 0.2)


def test_short_rows_come_first():
    schedule = Schedule(num_iterations=101, short_rows_ratio=0.4)
    splits = [schedule.row_split(step / 100) for step in range(101)]
    assert splits == [4] * 20 + [2] * 20 + [1] * 61
    assert Schedule(num_iterations=5).row_split(0.0) == 1
