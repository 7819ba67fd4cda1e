"""The training loop: it learns, micro-batches don't matter, and a killed run goes on exactly."""

import json

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.precision import NonFiniteError
from nanochat.recipe import Schedule, parameter_groups
from nanochat.resume import find_resume
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
