"""A step that runs out of memory, wherever, is made again: the loss curve is that of the undisturbed run."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from nanochat import gpt, muon, optim
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.ops import native
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import SMALL_CHUNKS, MicroBatch
from nanochat.recipe import MODERN, Schedule, parameter_groups
from nanochat.train.resume import find_resume
from nanochat.train.tracking import METRICS_FILE
from nanochat.train.trainer import Trainer, TrainSettings

VOCAB, T, ROWS, ACCUM, STEPS = 60, 16, 4, 2, 4


class Rows:
    """Batch n is a function of n; over several ranks each has its own rows."""

    def __init__(self, rank=0, world=1, n=0):
        self.rank, self.world, self.n = rank, world, n

    def __next__(self):
        starts = (self.n * self.world + self.rank) * ROWS + torch.arange(ROWS)[:, None]
        tokens = (starts * 7 + torch.arange(T + 1)) % VOCAB
        self.n += 1
        y = tokens[:, 1:].clone()
        y[:, : 1 + self.n % 3] = -1
        return tokens[:, :-1], y

    def state_dict(self):
        return {"n": self.n}


def make(folder, steps=STEPS, n=0, preset=MODERN, schedule=None, **settings):
    compute = setup_compute(Runtime(device_type="cpu", dtype="float32", seed=5))
    model = GPT(GPTConfig(T, VOCAB, 2, 2, 1, 32))
    model.init_weights()
    rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.1}
    return Trainer(
        label="test",
        model=model,
        optimizer=MuonAdamW(parameter_groups(model, **rates, preset=preset)),
        loader=Rows(compute.rank, compute.world_size, n),
        compute=compute,
        settings=TrainSettings(
            schedule=schedule or Schedule(num_iterations=steps), grad_accum_steps=ACCUM, grad_clip=1.0, **settings
        ),
        folder=folder,
        meta={"config": {"steps": steps}},
    )


def losses(folder):
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def fail_at(monkeypatch, owner, name, call, error=torch.OutOfMemoryError):
    """Let the `call`-th call of owner.name (from 0) run out of memory; returns the list of calls."""
    real, calls = getattr(owner, name), []

    def once(*args, **kwargs):
        calls.append(name)
        if len(calls) == call + 1:
            raise error("CUDA out of memory (simulated)")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, once)
    return calls


@pytest.fixture(scope="module", autouse=True)
def as_on_a_card():
    """Cards run out of memory, and take torch's path."""
    with native.reference_only():
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    make(folder).run()
    return losses(folder)


PASSES = STEPS * ACCUM


@pytest.mark.parametrize("call", range(PASSES))
@pytest.mark.parametrize(
    "place", [(GPT, "hidden"), (gpt, "linear_cross_entropy"), (torch.Tensor, "backward")], ids=lambda place: place[1]
)
def test_memory_that_runs_out_in_any_micro_step_changes_no_loss(base_dir, monkeypatch, undisturbed, place, call):
    calls = fail_at(monkeypatch, *place, call)
    trainer = make(base_dir / "t")
    trainer.run()
    assert len(calls) > PASSES
    assert trainer.micro == MicroBatch(ROWS // 2)
    assert losses(base_dir / "t") == pytest.approx(undisturbed, rel=1e-3)
    assert trainer.loader.n == PASSES


@pytest.mark.parametrize("call", [0, 1, 5])
@pytest.mark.parametrize(
    "place",
    [
        (optim, "get_total_norm"),
        (optim, "adamw"),
        (muon, "orthogonalize"),
        (muon.MuonStack, "direction"),
        (muon, "normalize_neurons"),
        (muon.MuonStack, "apply"),
        (muon.MuonStack, "init_state"),
        (torch, "_foreach_sub_"),
    ],
    ids=lambda place: place[1],
)
def test_memory_that_runs_out_in_the_optimizer_changes_no_bit(base_dir, monkeypatch, undisturbed, place, call):
    most = {"get_total_norm": STEPS, "init_state": 4}.get(place[1], 6)
    calls = fail_at(monkeypatch, *place, min(call, most - 1))
    make(base_dir / "t").run()
    assert len(calls) > call or most <= call
    assert losses(base_dir / "t") == undisturbed


def test_a_driver_that_says_it_in_words_is_understood_and_other_errors_are_not_swallowed(base_dir, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, GPT, "hidden", 2, RuntimeError)
        trainer = make(base_dir / "t")
        trainer.run()
        assert trainer.micro == MicroBatch(2)
    monkeypatch.setattr(GPT, "hidden", lambda *args, **kwargs: [][0])
    with pytest.raises(IndexError):
        make(base_dir / "u").run()


def limit(monkeypatch, fits):
    """Memory runs out in every forward pass for which `fits(model, rows)` is false."""
    real = GPT.hidden

    def hidden(self, idx, *args, **kwargs):
        if not fits(self, len(idx)):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(self, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "hidden", hidden)


def test_the_measures_come_in_their_order_and_then_a_depth_is_named(base_dir, monkeypatch, undisturbed, capsys):
    with monkeypatch.context() as patch:
        limit(patch, lambda model, rows: rows == 1 and model.activation_checkpointing)
        trainer = make(base_dir / "t")
        trainer.run()
        assert trainer.micro == MicroBatch(1, SMALL_CHUNKS[-1], True)
        assert losses(base_dir / "t") == pytest.approx(undisturbed, rel=1e-3)
        said = capsys.readouterr().out
        assert said.index("with 2 rows") < said.index("loss in chunks of 64 MiB") < said.index("activation checkp")
    limit(monkeypatch, lambda model, rows: False)
    with pytest.raises(RuntimeError, match=r"depth 2 does not fit.*--depth=1 fits"):
        make(base_dir / "u").run()


def test_a_resumed_run_remembers_what_fits(base_dir, monkeypatch, undisturbed):
    with monkeypatch.context() as patch:
        limit(patch, lambda model, rows: rows <= 1)
        trainer = make(base_dir / "t", save_every=2)
        original = trainer.train_step

        def die_at_three():
            if trainer.state.step == 3:
                trainer.saver.writer.wait()
                raise KeyboardInterrupt
            return original()

        trainer.train_step = die_at_three
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    checkpoint = find_resume(base_dir / "t", {"steps": STEPS}, "auto")
    again = make(base_dir / "t", n=checkpoint.meta["loader"]["n"])
    again.model.load_state_dict(checkpoint.model)
    again.resume(checkpoint.meta, checkpoint.optimizer)
    assert again.micro == MicroBatch(1)
    again.run()
    assert losses(base_dir / "t") == pytest.approx(undisturbed, rel=1e-3)
    assert load_checkpoint(base_dir / "t").meta["micro_batch"]["rows"] == 1


RANKS = """
import contextlib, os, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from nanochat.gpt import GPT
from nanochat.common import compute_cleanup
from test_out_of_memory import make
call, folder = int(sys.argv[1]), Path(sys.argv[2])
real, calls = GPT.hidden, []
def hidden(self, *args, **kwargs):
    calls.append(1)
    if len(calls) == call + 1:
        raise torch.OutOfMemoryError("simulated")
    return real(self, *args, **kwargs)
if os.environ["RANK"] == "1":
    GPT.hidden = hidden
trainer = make(folder)
trainer.run()
print("rank", trainer.compute.rank, trainer.micro, flush=True)
compute_cleanup(barrier=True)
# A group that is still alive while the interpreter ends can abort it.
tasks, names = Path("/proc/self/task"), []
for task in tasks.iterdir() if tasks.is_dir() else ():
    with contextlib.suppress(OSError):  # a thread that ended meanwhile
        names.append((task / "comm").read_text())
print("left", [name for name in names if "gloo" in name], flush=True)
"""


def two_ranks(folder, call):
    """A run of two ranks of which the second runs out of memory in its `call`-th pass."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = RANKS.format(tests=os.path.dirname(__file__))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(call), str(folder)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return said, losses(folder)


def test_if_one_of_two_ranks_runs_out_both_take_smaller_pieces(base_dir):
    _, whole = two_ranks(base_dir / "whole", -1)
    for call in (0, 3):
        said, disturbed = two_ranks(base_dir / f"t{call}", call)
        assert disturbed == pytest.approx(whole, rel=1e-3)
        assert all(f"rank {rank} 2 rows" in said[rank] and "left []" in said[rank] for rank in range(2))
