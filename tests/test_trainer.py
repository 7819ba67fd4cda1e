"""The training loop: it learns, micro-batches don't matter, and a killed run goes on exactly."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from test_out_of_memory import losses

from nanochat.checkpoint import saver as saving
from nanochat.checkpoint import writer as checkpoint_writer
from nanochat.checkpoint.saver import pending_folder
from nanochat.checkpoint_manager import load_checkpoint, rng_state, saved_steps
from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import MicroBatch
from nanochat.precision import NonFiniteError
from nanochat.recipe import Schedule, parameter_groups
from nanochat.signals import EXIT_STOPPED
from nanochat.train import compiling
from nanochat.train.resume import find_resume, run_lock, saved_dtype
from nanochat.train.tracking import METRICS_FILE
from nanochat.train.trainer import Trainer, TrainSettings

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


def make(folder, steps=8, rows=4, accum=1, dtype="float32", n=0, replaces=None, **settings):
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
        replaces=replaces,
        meta={"config": {"steps": steps}},
    )


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
    trainer.saver.save(complete=False)
    with pytest.raises(ValueError, match=r"(?s)steps: 4 -> 9.*--resume=never"):
        find_resume(base_dir / "t", {"steps": 9}, "auto", set())
    assert find_resume(base_dir / "t", {"steps": 9}, "auto", {"steps"}) is not None


def test_a_fresh_start_moves_the_old_run_aside_with_its_first_checkpoint(base_dir):
    folder, pending = base_dir / "t", pending_folder(base_dir / "t")
    make(folder, steps=2).run()
    assert find_resume(folder, {}, "auto", set()) is None  # complete: train again
    trainer = make(pending, steps=6, replaces=folder, save_every=3)
    seen, original = [], trainer.train_step

    def train_step():
        trainer.saver.writer.wait()  # as on a fast disk
        seen.append((saved_steps(folder), saved_steps(base_dir / "t.old")))
        return original()

    trainer.train_step = train_step
    trainer.run()
    assert seen[:4] == [([2], [])] * 4  # the fourth step follows the first save
    assert seen[4:] == [([3], [2])] * 2  # and at its end the tag is the new run's
    assert (saved_steps(folder), saved_steps(base_dir / "t.old"), pending.exists()) == ([6], [2], False)
    assert len(losses(folder)) == 6  # the whole log has moved along


def test_a_run_that_dies_before_its_first_checkpoint_costs_nothing(base_dir):
    folder = base_dir / "t"
    make(folder, steps=2).run()
    before = load_checkpoint(folder).model
    trainer = make(pending_folder(folder), steps=6, replaces=folder)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with run_lock(folder), pytest.raises(NonFiniteError, match="there is no checkpoint of this run yet"):
        trainer.run()
    assert all(torch.equal(before[name], value) for name, value in load_checkpoint(folder).model.items())
    assert sorted(path.name for path in base_dir.iterdir() if path.is_dir()) == ["t"]


class _Mute(CountingData):
    """Only every `heard`-th batch has targets, if any; the gradients of a step on another are exactly 0."""

    def __init__(self, rows, heard=None):
        super().__init__(rows)
        self.heard = heard

    def __next__(self):
        x, y = super().__next__()
        return x, (y if self.heard and (self.n // self.rows - 1) % self.heard == 0 else y.fill_(-1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_without_a_target_moves_nothing_and_is_counted(base_dir, capsys, dtype):
    trainer = make(base_dir / "t", steps=6, dtype=dtype, accum=1)
    trainer.loader = _Mute(4, heard=2)
    states, original = [], trainer.train_step

    def train_step():
        states.append([p.detach().clone() for p in trainer.model.parameters()])
        return original()

    trainer.train_step = train_step
    trainer.run()
    states.append([p.detach() for p in trainer.model.parameters()])
    still = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(states)]
    assert still == [False, True] * 3
    assert (trainer.state.step, trainer.state.without_signal) == (6, 3)
    assert all(loss == loss for loss in losses(base_dir / "t"))
    assert load_checkpoint(base_dir / "t").meta["state"]["without_signal"] == 3
    assert "had nothing to learn from" not in capsys.readouterr().out  # no more than half


def test_a_run_that_mostly_has_no_signal_says_what_to_do(base_dir, capsys):
    trainer = make(base_dir / "t", steps=25)
    trainer.loader = _Mute(4)
    trainer.run()
    out = capsys.readouterr().out
    assert "warning: 10 of 10 steps had nothing to learn from and were not made: the batches have no target" in out
    assert out.count("had nothing to learn from") == 2  # at 10 steps and at 20


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


class _Tracker:
    def __init__(self):
        self.logged = []

    def log(self, record):
        self.logged.append(record)


def test_a_skipped_float16_step_is_made_again_with_the_same_batch(base_dir, capsys):
    clean = make(base_dir / "clean", steps=6, dtype="float16")
    clean.compute.precision.scaler.update(2.0**15)  # powers of two: the scale itself changes no bit
    clean.run()
    capsys.readouterr()
    trainer = make(base_dir / "t", steps=6, dtype="float16")
    trainer.loader = _Poisoned(4, trainer.model, at=3)
    trainer.log.tracker = _Tracker()
    trainer.run()
    assert [(r["skipped"], r["scale"]) for r in trainer.log.tracker.logged[1:4]] == [
        (0, 2.0**16),
        (1, 2.0**15),
        (1, 2.0**15),
    ]
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
    assert (scaler.get_scale(), again.compute.precision.skipped) == (2.0**15, 1)
    assert scaler.state_dict()["_growth_tracker"] == 2
    again.run()
    assert saved_dtype(base_dir / "t", "auto") is None  # complete


def measuring(trainer, monkeypatch, times):
    """Let `trainer` measure torch.compile; `times` are the seconds of an eager and a compiled pass."""
    trainer.compute.compile = trainer.compute.measure_compile = True
    trainer.__post_init__()
    calls = []
    monkeypatch.setattr(compiling, "compiled", lambda model: calls.append("compiled") or model.hidden)
    monkeypatch.setattr("nanochat.train.trainer.compiled", compiling.compiled)
    queue = list(times)
    monkeypatch.setattr(compiling, "seconds_per_pass", lambda *arguments: queue.pop(0))
    return calls


def test_compiling_is_measured_with_the_rows_that_fit(base_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "nanochat.train.trainer.should_compile", lambda model, compute, idx, *_: bool(seen.append(idx.shape))
    )
    trainer = make(base_dir / "t", steps=2)
    trainer.compute.compile = trainer.compute.measure_compile = True
    trainer.__post_init__()
    trainer.micro = MicroBatch(1)
    trainer.run()
    assert seen == [(1, T)]


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


# --- nothing is lost -------------------------------------------------------------------------------------------------


def resumed(folder, steps=8, **settings):
    """A trainer that goes on with what is in `folder`."""
    checkpoint = find_resume(folder, {"steps": steps}, "auto")
    trainer = make(folder, steps=steps, n=checkpoint.meta["loader"]["n"], **settings)
    trainer.model.load_state_dict(checkpoint.model)
    trainer.resume(checkpoint.meta, checkpoint.optimizer)
    return trainer


def after_step(trainer, step, action):
    """Let `action` happen while the step after `step` is made."""
    original = trainer.train_step

    def train_step():
        if trainer.state.step == step:
            action()
        return original()

    trainer.train_step = train_step


def same_end(folder, other):
    first, second = load_checkpoint(folder), load_checkpoint(other)
    for name, value in first.model.items():
        assert torch.equal(value, second.model[name]), name
    assert losses(folder) == losses(other)
    assert first.meta["loader"] == second.meta["loader"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(base_dir, name, capfd):
    make(base_dir / "whole").run()
    trainer = make(base_dir / "part")
    after_step(trainer, 3, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(SystemExit) as stopped:
        trainer.run()
    assert stopped.value.code == EXIT_STOPPED == 75
    assert saved_steps(base_dir / "part") == [4]
    assert name in capfd.readouterr().err
    again = resumed(base_dir / "part")
    assert again.state.step == 4
    again.run()
    same_end(base_dir / "whole", base_dir / "part")


def test_a_second_signal_leaves_at_once(base_dir):
    code = (
        "import os, signal, time; from nanochat.signals import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.requested; print('one wish', flush=True); time.sleep(1.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('still there')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "one wish\n")
    assert "leaving at once" in done.stderr


def test_a_disk_that_fails_for_a_while_loses_nothing(base_dir, monkeypatch, capfd):
    make(base_dir / "whole").run()
    trainer = make(base_dir / "part", save_every=2)
    real = checkpoint_writer.write_safetensors

    def full(path, tensors):
        if 3 <= trainer.state.step <= 6:
            raise OSError(28, "No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(checkpoint_writer, "write_safetensors", full)
    original = trainer.train_step

    def train_step():
        trainer.saver.writer.wait()  # so that what is seen does not depend on the disk's speed
        return original()

    trainer.train_step = train_step
    trainer.run()
    said = capfd.readouterr().err
    assert "No space left" in said
    assert "newest checkpoint is of step 2" in said
    same_end(base_dir / "whole", base_dir / "part")


def test_a_folder_that_vanishes_is_made_again_and_training_goes_on(base_dir):
    make(base_dir / "whole").run()
    trainer = make(base_dir / "part", save_every=2)
    after_step(trainer, 5, lambda: (trainer.saver.writer.wait(), shutil.rmtree(base_dir / "part")))
    trainer.run()
    end, wanted = load_checkpoint(base_dir / "part").model, load_checkpoint(base_dir / "whole").model
    assert all(torch.equal(end[name], value) for name, value in wanted.items())
    assert losses(base_dir / "part") == losses(base_dir / "whole")[5:]


def test_the_finished_model_waits_for_the_disk_and_then_gives_up_with_a_reason(base_dir, monkeypatch):
    trainer = make(base_dir / "t", steps=2, final_retry_minutes=0.0005)

    def full(path, tensors):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint_writer, "write_safetensors", full)
    with pytest.raises(RuntimeError, match="finished model could not be written"):
        trainer.run()


def test_a_last_evaluation_that_fails_takes_no_training_along(base_dir, monkeypatch):
    monkeypatch.setattr(saving, "WORTH_SAVING", 0.0)
    trainer = make(base_dir / "t", steps=3)
    trainer.evaluate = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    checkpoint = load_checkpoint(base_dir / "t")
    assert checkpoint.meta["step"] == 3
    assert not checkpoint.meta["complete"]


def test_training_does_not_wait_for_a_slow_disk(base_dir, monkeypatch):
    trainer = make(base_dir / "t", steps=6, save_every=1)
    real, may_write = checkpoint_writer.write_safetensors, threading.Event()
    monkeypatch.setattr(checkpoint_writer, "write_safetensors", lambda *args: (may_write.wait(), real(*args))[1])
    after_step(trainer, 5, may_write.set)  # the disk wakes up in the last step: the steps before did not need it
    trainer.run()
    assert load_checkpoint(base_dir / "t").meta["step"] == 6


def test_what_is_saved_is_the_step_it_was_taken_at(base_dir, monkeypatch):
    """The copy is not changed by the steps that are made while it is written."""
    trainer = make(base_dir / "t", steps=4, save_every=2)
    real, may_write = checkpoint_writer.write_safetensors, threading.Event()
    monkeypatch.setattr(checkpoint_writer, "write_safetensors", lambda *args: (may_write.wait(), real(*args))[1])
    weights = {}
    after_step(trainer, 2, lambda: weights.update({k: v.clone() for k, v in trainer.model.state_dict().items()}))
    after_step(
        trainer,
        3,
        lambda: (may_write.set(), trainer.saver.writer.wait(), shutil.copytree(base_dir / "t", base_dir / "copy")),
    )
    trainer.run()
    saved = load_checkpoint(base_dir / "copy")
    assert saved.meta["state"]["step"] == saved.meta["step"] == 2
    assert all(torch.equal(saved.model[name], value) for name, value in weights.items())


def test_a_complete_run_is_not_trained_again(base_dir, capsys):
    make(base_dir / "t", steps=2).run()
    trainer = resumed(base_dir / "t", steps=2)
    trainer.train_step = None
    assert trainer.run().step == 2
    assert "complete already" in capsys.readouterr().out


def test_a_checkpoint_says_what_made_it(base_dir):
    make(base_dir / "t", steps=2).run()
    meta = load_checkpoint(base_dir / "t").meta
    assert meta["torch"] == torch.__version__
    assert {"code", "config", "loader", "precision", "dtype", "world_size", "model_config"} <= set(meta)
    assert meta["state"]["seconds"] > 0


def test_evaluations_are_not_logged_twice_after_a_kill(base_dir):
    def run(folder, trainer):
        trainer.evaluate = lambda: 1.0
        trainer.settings = replace(trainer.settings, eval_every=2)
        trainer.run()

    run(base_dir / "whole", make(base_dir / "whole", save_every=2))
    killed = make(base_dir / "part", save_every=2)

    def die():
        killed.saver.writer.wait()
        raise KeyboardInterrupt

    after_step(killed, 4, die)
    with pytest.raises(KeyboardInterrupt):
        run(base_dir / "part", killed)
    run(base_dir / "part", resumed(base_dir / "part", save_every=2))
    steps = [
        [json.loads(line)["step"] for line in (base_dir / n / METRICS_FILE).read_text().splitlines()]
        for n in ("whole", "part")
    ]
    assert steps[0] == steps[1]
