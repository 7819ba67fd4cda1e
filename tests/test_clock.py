"""A run of a given time ends in it, with the learning rate fully decayed, whatever happens to the speed."""

import json
import random

import pytest
from test_out_of_memory import make

from nanochat.precision import StepResult
from nanochat.recipe import Schedule
from nanochat.train.clock import REHEARSE_AFTER, Clock
from nanochat.train.resume import find_resume
from nanochat.train.tracking import METRICS_FILE


class World:
    """A clock that only work moves forward."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def timed(folder, seconds, speed, evaluation=2.0, sampling=0.5, n=0, steps=None):
    """A trainer in a world where a step takes `speed(step)` seconds."""
    world = World()
    trainer = make(folder, n=n, schedule=Schedule(num_iterations=steps, seconds=seconds))
    trainer.clock = Clock(now=world, seconds=seconds)
    trainer._attempt = lambda batches: (StepResult(False, 1.0), 1.0)  # what is learned doesn't matter here
    real = trainer.train_step

    def train_step():
        world.time += speed(trainer.state.step)
        return real()

    def evaluate():
        world.time += evaluation
        return 1.0

    def sample():
        world.time += sampling

    trainer.train_step, trainer.evaluate, trainer.sample, trainer.world = train_step, evaluate, sample, world
    return trainer


def records(folder):
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if "loss" in line]


SPEEDS = {
    "steady": lambda step: 1.0,
    "compiles": lambda step: 20.0 if step == 0 else 1.0,
    "throttles": lambda step: 1.0 if step < 30 else 2.0,
    "recovers": lambda step: 2.0 if step < 20 else 0.7,
    "noisy": lambda step: random.Random(step).uniform(0.5, 1.5),
}


@pytest.mark.parametrize("name", SPEEDS)
def test_the_end_comes_in_time_and_the_learning_rate_is_fully_decayed(base_dir, name):
    trainer = timed(base_dir / "t", 100.0, SPEEDS[name])
    trainer.run()
    assert trainer.clock.elapsed() == pytest.approx(100.0, rel=0.03)
    multipliers = [r["lr_multiplier"] for r in records(base_dir / "t")]
    assert multipliers[-1] == 0.0
    assert multipliers == sorted(multipliers, reverse=True)


def test_one_long_hiccup_makes_it_late_but_the_schedule_still_ends(base_dir):
    trainer = timed(base_dir / "t", 60.0, lambda step: 30.0 if step == 45 else 1.0)
    trainer.run()
    assert records(base_dir / "t")[-1]["lr_multiplier"] == 0.0


def test_evaluations_on_the_way_are_left_out_when_they_would_make_it_late(base_dir):
    trainer = timed(base_dir / "t", 100.0, SPEEDS["steady"], evaluation=6.0)
    trainer.settings = trainer.settings.__class__(**{**vars(trainer.settings), "eval_every": 7, "sample_every": 5})
    trainer.run()
    assert trainer.clock.elapsed() == pytest.approx(100.0, rel=0.03)


def test_a_killed_run_counts_what_it_had_used_and_keeps_the_promise(base_dir):
    first = timed(base_dir / "t", 100.0, SPEEDS["steady"])
    step = first.train_step

    def die_at_forty():
        if first.state.step == 20:
            first.saver.save(complete=False)
        if first.state.step == 40:
            raise KeyboardInterrupt
        return step()

    first.train_step = die_at_forty
    with pytest.raises(KeyboardInterrupt):
        first.run()
    used = first.clock.elapsed()
    checkpoint = find_resume(base_dir / "t", {"steps": 4}, "auto")
    again = timed(base_dir / "t", 100.0, SPEEDS["steady"], n=checkpoint.meta["loader"]["n"])
    again.model.load_state_dict(checkpoint.model)
    again.resume(checkpoint.meta, checkpoint.optimizer)
    assert 20 <= again.state.step < 40
    assert again.clock.elapsed() == pytest.approx(used, abs=1.1)  # the steps after the checkpoint took time too
    again.run()
    assert again.clock.elapsed() == pytest.approx(100.0, rel=0.03)
    assert records(base_dir / "t")[-1]["lr_multiplier"] == 0.0


def test_a_time_that_is_over_already_still_ends_with_a_model(base_dir):
    trainer = timed(base_dir / "t", 1.0, SPEEDS["steady"])
    trainer.run()
    assert trainer.complete
    assert records(base_dir / "t")[-1]["lr_multiplier"] == 0.0


@pytest.mark.parametrize(("steps", "speed", "end"), [(20, 1.0, 20), (200, 1.0, None), (20, 10.0, None)])
def test_of_steps_and_time_the_first_ends_the_run(base_dir, monkeypatch, steps, speed, end):
    shown = []
    monkeypatch.setattr(
        "nanochat.progress.Bar.set", lambda self, done, note="": shown.append((done / self.total, note))
    )
    trainer = timed(base_dir / "t", 100.0, lambda step: speed, steps=steps)
    trainer.run()
    assert trainer.complete
    made = records(base_dir / "t")
    assert [round(share, 6) for share, _ in shown] == [record["progress"] for record in made]
    assert made[0]["progress"] == pytest.approx(max(1 / steps, made[0]["clock"] / 100), abs=1e-6)
    if end is None:  # the time
        assert len(made) < steps
        assert trainer.clock.elapsed() == pytest.approx(100.0, abs=6.0)
        assert made[-1]["lr_multiplier"] == 0.0
    else:
        assert len(made) == end
        assert trainer.clock.elapsed() < 50
        assert made[-1]["progress"] == 1.0
        assert "left 1m" not in shown[-1][1]  # of the steps, not of the time


def test_a_run_of_so_few_steps_does_not_rehearse_its_end(base_dir):
    trainer, evaluations = timed(base_dir / "t", 100.0, SPEEDS["steady"], steps=REHEARSE_AFTER), []
    trainer.evaluate = lambda: evaluations.append(trainer.state.step) or 1.0
    trainer.run()
    assert evaluations == [REHEARSE_AFTER]


def test_a_run_that_others_slow_down_says_so(tmp_path, monkeypatch):
    """Beside another program threads wait for cores; heat slows a run down as well, but nobody waits then."""
    notes = []
    monkeypatch.setattr("nanochat.progress.Bar.set", lambda self, done, note="": notes.append(note))
    waited = [0.0]

    def speed(step):
        waited[0] += 1.3 if 10 <= step < 20 else 0.01
        return 2.5 if 10 <= step < 20 or step >= 30 else 1.0  # from 30 on it is the heat

    trainer = timed(tmp_path, 70.0, speed)
    trainer.clock = Clock(now=trainer.world, seconds=70.0, delay=lambda: waited[0])
    trainer.run()
    said = [step for step, note in enumerate(notes) if "another program uses the cores" in note]
    assert len(notes) > 32
    assert said == list(range(11, 21))  # the median of three steps


@pytest.mark.parametrize("delay", [None, 5.0], ids=["unknown", "steady"])
def test_a_slow_run_blames_nobody_without_evidence(delay):
    world = World()
    clock = Clock(now=world, delay=lambda: delay)
    for seconds in [1.0] * 5 + [9.0] * 5:
        clock.count_step(seconds, tokens=100)
        assert not clock.shares_cores()
