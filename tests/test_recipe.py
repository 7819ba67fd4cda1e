"""Planning: batches that divide, schedules that start, fall and end where they should."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.recipe import Schedule, muon_momentum, plan_batch, plan_iterations


@given(
    n=st.integers(2, 5000),
    warmup=st.floats(0, 0.5),
    warmdown=st.just(0.0) | st.floats(0.01, 0.5),
    final=st.floats(0, 1),
)
def test_learning_rate_is_never_negative_and_ends_at_its_final_value(n, warmup, warmdown, final):
    schedule = Schedule(num_iterations=n, warmup_ratio=warmup, warmdown_ratio=warmdown, final_lr_frac=final)
    values = [schedule.lr_multiplier(schedule.progress(step, 0.0)) for step in range(n)]
    assert all(0 <= v <= 1 for v in values)
    if warmdown > 0:
        assert values[-1] == pytest.approx(final, abs=1e-9)
    assert schedule.finished(n, 0.0)
    assert not schedule.finished(n - 1, 0.0)


def test_a_timed_schedule_follows_the_clock():
    schedule = Schedule(seconds=100.0, warmdown_ratio=0.5)
    assert schedule.lr_multiplier(schedule.progress(10**6, 25.0)) == 1.0
    assert schedule.lr_multiplier(schedule.progress(0, 75.0)) == pytest.approx(0.5)
    assert schedule.lr_multiplier(schedule.progress(0, 100.0)) == 0.0
    assert schedule.finished(0, 100.0)


@pytest.mark.parametrize("values", [{}, {"num_iterations": 5, "seconds": 3.0}, {"num_iterations": 0}, {"seconds": 0.0}])
def test_a_schedule_needs_one_horizon(values):
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


def test_momentum_rises_to_its_end():
    assert muon_momentum(0) == pytest.approx(0.85)
    assert muon_momentum(150) == pytest.approx(0.90)
    assert muon_momentum(10_000) == pytest.approx(0.95)
