"""The training loop: it learns, micro-batches don't matter, and a killed run goes on exactly."""

import json

import pytest
import torch

from nanochat import compiling
from nanochat.checkpoint_manager import load_checkpoint, rng_state, saved_steps
from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.precision import NonFiniteError
from nanochat.recipe import Schedule, parameter_groups
from nanochat.resume import find_resume, saved_dtype
from nanochat.trainer import METRICS_FILE, Trainer, TrainSettings

VOCAB, T = 60, 16


class CountingData:
    """Batch n is a function of n: rows that count upwards from some number; the state is n."""

    def __init__(self, rows, n=0):
        self.rows, self.n = rows, n

    def __next__(self):
        starts = torch.arange(self.n, self.n + self.rows)[:, None] * 7
        tokens = (starts + torch.arange(T + 1)) % VOCAB
        self.n += self.rows
        y = tokens[:, 1:].clone()
        y[:, : 1 + self.n % 3] = -1  # an uneven number of supervised tokens
        return tokens[:, :-1], y

    def state_dict(self):
        return {"n": self.n}


def make(folder, steps=8, rows=4, accum=1, dtype="float32", n=0, **settings):
    compute = setup_compute(Runtime(device_type="cpu", dtype=dtype, seed=5))
    model = GPT(GPTConfig(T, VOCAB, 2, 2, 1, 32))
    model.init_weights()
    groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
    return Trainer(
        label="test",
        model=model,
        optimizer=MuonAdamW(groups),
        loader=CountingData(rows, n),
        compute=compute,
        settings=TrainSettings(
            schedule=Schedule(num_iterations=steps), grad_accum_steps=accum, grad_clip=1.0, **settings
        ),
        folder=folder,
        meta={"config": {"steps": steps}},
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_loss_falls_in_every_dtype(base_dir, dtype):
    trainer = make(base_dir / "t", steps=25, dtype=dtype)
    trainer.run()
    history = losses(base_dir / "t")
    assert len(history) == 25
    assert history[-1] < 0.5 * history[0]
    assert load_checkpoint(base_dir / "t").meta["complete"]


def test_micro_batches_are_the_same_mathematics(base_dir):
    results = []
    for rows, accum in ((4, 1), (2, 2), (1, 4)):
        trainer = make(base_dir / f"t{accum}", steps=3, rows=rows, accum=accum)
        trainer.loader = _Split(CountingData(4), accum)
        trainer.run()
        results.append(losses(base_dir / f"t{accum}"))
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0] == pytest.approx(results[2], rel=1e-4)


class _Split:
    """The batches of `data`, each in `parts` pieces."""

    def __init__(self, data, parts):
        self.data, self.parts, self.queue = data, parts, []

    def __next__(self):
        if not self.queue:
            x, y = next(self.data)
            self.queue = list(zip(x.chunk(self.parts), y.chunk(self.parts), strict=True))
        return self.queue.pop(0)

    def state_dict(self):
        return {}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_resumed_run_ends_with_the_same_weights(base_dir, dtype):
    whole = make(base_dir / "whole", dtype=dtype)
    whole.run()
    part = make(base_dir / "part", dtype=dtype, save_every=3)
    part.settings = TrainSettings(schedule=part.settings.schedule, grad_clip=1.0, save_every=3)
    original = part.train_step

    def die_at_five():
        if part.state.step == 5:
            raise KeyboardInterrupt
        return original()

    part.train_step = die_at_five
    with pytest.raises(KeyboardInterrupt):
        part.run()
    assert saved_steps(base_dir / "part") == [3]
    checkpoint = find_resume(base_dir / "part", {"steps": 8}, "auto", set())
    again = make(base_dir / "part", dtype=dtype, n=checkpoint.meta["loader"]["n"])
    again.model.load_state_dict(checkpoint.model)
    again.resume(checkpoint.meta, checkpoint.optimizer)
    again.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert losses(base_dir / "whole") == losses(base_dir / "part")


def test_an_unfinished_run_with_other_settings_is_refused_by_name(base_dir):
    trainer = make(base_dir / "t", steps=4)
    trainer.train_step()
    trainer.save(complete=False)
    with pytest.raises(ValueError, match=r"(?s)steps: 4 -> 9.*--resume=never"):
        find_resume(base_dir / "t", {"steps": 9}, "auto", set())
    assert find_resume(base_dir / "t", {"steps": 9}, "auto", {"steps"}) is not None


def test_a_fresh_start_keeps_the_old_run_aside(base_dir):
    make(base_dir / "t", steps=2).run()
    assert find_resume(base_dir / "t", {}, "auto", set()) is None  # complete: train again
    assert saved_steps(base_dir / "t") == []
    assert saved_steps(base_dir / "t.old") == [2]


def test_a_nan_stops_the_run_and_names_the_layer(base_dir):
    trainer = make(base_dir / "t", steps=40)
    with torch.no_grad():
        trainer.model.transformer["h"][1].mlp.c_fc.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_fc"):
        trainer.run()


class _Poisoned(CountingData):
    """Before batch `at` is handed out for the first time, one weight's gradient is made infinite, once."""

    def __init__(self, rows, model, at):
        super().__init__(rows)
        self.model, self.at, self.batches = model, at, 0
        model.lm_head.weight.register_hook(self.poison)

    def __next__(self):
        self.batches += 1
        return super().__next__()

    def poison(self, grad):
        if self.batches == self.at:
            self.at = None
            return grad.clone().fill_(float("inf"))
        return None


class _Wandb:
    def __init__(self):
        self.logged = []

    def log(self, record):
        self.logged.append(record)


def test_a_skipped_float16_step_is_made_again_with_the_same_batch(base_dir, capsys):
    clean = make(base_dir / "clean", steps=6, dtype="float16")
    clean.compute.precision.scaler.scale = 2.0**15  # powers of two: the scale itself changes no bit
    clean.run()
    capsys.readouterr()
    trainer = make(base_dir / "t", steps=6, dtype="float16")
    trainer.loader = _Poisoned(4, trainer.model, at=3)
    trainer.wandb = _Wandb()
    trainer.run()
    assert [(r["skipped"], r["scale"]) for r in trainer.wandb.logged[1:4]] == [(0, 2.0**16), (1, 2.0**15), (1, 2.0**15)]
    assert (trainer.state.step, trainer.state.tokens) == (clean.state.step, clean.state.tokens)
    assert trainer.loader.state_dict() == clean.loader.state_dict()  # no text was lost
    assert losses(base_dir / "t") == pytest.approx(losses(base_dir / "clean"), rel=1e-3)
    records = [json.loads(line) for line in (base_dir / "t" / METRICS_FILE).read_text().splitlines()]
    assert [(r["skipped"], r["scale"]) for r in records[:6]] == [(0, 2.0**16)] * 2 + [(1, 2.0**15)] * 4
    assert "step 3 skipped (a gradient is not finite), again at loss scale 32768; 1 skipped so far" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_scale_the_next_batch_is_taken_and_the_step_does_not_count(base_dir, capsys, dtype):
    trainer = make(base_dir / "t", steps=6, dtype=dtype)
    trainer.loader = _Poisoned(4, trainer.model, at=3)
    trainer.run()
    assert (trainer.state.step, trainer.compute.precision.skipped, trainer.loader.batches) == (6, 1, 7)
    assert trainer.state.tokens == 6 * 4 * T
    assert "on the next batch instead; 1 skipped so far" in capsys.readouterr().out


def test_a_resumed_run_keeps_scale_and_dtype(base_dir):
    trainer = make(base_dir / "t", steps=6, dtype="float16", save_every=2)
    trainer.loader = _Poisoned(4, trainer.model, at=1)
    original = trainer.train_step

    def die_at_three():
        if trainer.state.step == 3:
            raise KeyboardInterrupt
        return original()

    trainer.train_step = die_at_three
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert saved_dtype(base_dir / "t", "auto") == "float16"
    assert saved_dtype(base_dir / "t", "never") is None
    checkpoint = load_checkpoint(base_dir / "t", with_optimizer=True)
    again = make(base_dir / "t", steps=6, dtype=saved_dtype(base_dir / "t", "auto"))
    again.resume(checkpoint.meta, checkpoint.optimizer)
    scaler = again.compute.precision.scaler
    assert (scaler.scale, scaler.good_steps, again.compute.precision.skipped) == (2.0**15, 2, 1)
    again.run()
    assert saved_dtype(base_dir / "t", "auto") is None  # complete


def measuring(trainer, monkeypatch, times):
    """Let `trainer` measure torch.compile; `times` are the seconds of an eager and a compiled pass."""
    trainer.compute.compile = trainer.compute.measure_compile = True
    trainer.__post_init__()
    calls = []
    monkeypatch.setattr(compiling, "compiled", lambda model: calls.append("compiled") or model.hidden)
    monkeypatch.setattr("nanochat.trainer.compiled", compiling.compiled)
    queue = list(times)
    monkeypatch.setattr(compiling, "seconds_per_pass", lambda *arguments: queue.pop(0))
    return calls


@pytest.mark.parametrize(
    ("eager", "fast", "tried", "kept"),
    [
        (1.0, 0.5, False, False),  # 8 s in all: too short to try
        (100.0, 50.0, True, True),
        (100.0, 99.0, True, False),
        (100.0, float("inf"), True, False),
    ],
)
def test_compile_is_kept_only_where_it_pays(base_dir, monkeypatch, eager, fast, tried, kept):
    trainer = make(base_dir / "t", steps=8)
    calls = measuring(trainer, monkeypatch, [eager, fast])
    trainer.run()
    assert len(calls) == tried + kept
    assert load_checkpoint(base_dir / "t").meta["compile"] is kept
    again = make(base_dir / "t", steps=8)
    calls = measuring(again, monkeypatch, [])  # nothing is measured on a resume
    tensors = trainer.optimizer.flat_state() | rng_state(trainer.compute.device)
    again.resume(load_checkpoint(base_dir / "t").meta | {"complete": False}, tensors)
    assert len(calls) == kept


def test_a_compiler_that_fails_is_done_without(base_dir, monkeypatch, capsys):
    trainer = make(base_dir / "t", steps=4)
    trainer.compute.compile = trainer.compute.measure_compile = True
    trainer.__post_init__()

    def fail(model):
        raise FileNotFoundError("no C compiler\nat all")

    monkeypatch.setattr(compiling, "compiled", fail)
    monkeypatch.setattr(compiling, "WORTH_SECONDS", 0.0)
    trainer.run()
    assert "warning: torch.compile does not work here" in capsys.readouterr().out
    assert trainer.state.step == 4
