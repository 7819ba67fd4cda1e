"""The training loop: it learns, micro-batches don't matter, and a killed run goes on exactly."""

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

from nanochat import checkpoint_writer
from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.precision import NonFiniteError
from nanochat.recipe import Schedule, parameter_groups
from nanochat.resume import find_resume
from nanochat.signals import EXIT_STOPPED
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
        trainer.writer.wait()  # so that what is seen does not depend on the disk's speed
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
    after_step(trainer, 5, lambda: (trainer.writer.wait(), shutil.rmtree(base_dir / "part")))
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
        trainer, 3, lambda: (may_write.set(), trainer.writer.wait(), shutil.copytree(base_dir / "t", base_dir / "copy"))
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
        trainer.settings = replace(trainer.settings, eval_every=2, save_every=2)
        trainer.run()

    run(base_dir / "whole", make(base_dir / "whole"))
    killed = make(base_dir / "part")

    def die():
        killed.writer.wait()
        raise KeyboardInterrupt

    after_step(killed, 4, die)
    with pytest.raises(KeyboardInterrupt):
        run(base_dir / "part", killed)
    run(base_dir / "part", resumed(base_dir / "part"))
    steps = [
        [json.loads(line)["step"] for line in (base_dir / n / METRICS_FILE).read_text().splitlines()]
        for n in ("whole", "part")
    ]
    assert steps[0] == steps[1]
