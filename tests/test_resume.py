"""Which run is gone on with: never one of other settings or another tokenizer, never two at a time."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from nanochat.checkpoint.saver import pending_folder
from nanochat.checkpoint_manager import checkpoint_folder, load_model, save_checkpoint, saved_steps
from nanochat.train.resume import differences, find_resume, run_lock, saved_dtype

CONFIG = {"depth": 4, "matrix_lr": 0.02, "run": "a", "runtime": {"seed": 42, "device_type": "cpu"}}
INPUTS = {"tokenizer": "t1", "model": "m1"}


def save(folder, complete=False, step=5):
    meta = {"complete": complete, "config": CONFIG, "inputs": INPUTS, "dtype": "float16", "state": {}}
    save_checkpoint(folder, step, {"w": torch.ones(2)}, None if complete else {"w.m": torch.ones(2)}, meta)


def find(folder, config=None, inputs=INPUTS, resume="auto", force=False):
    return find_resume(folder, config or CONFIG, resume, inputs=inputs, force=force)


def test_differences_are_named_line_by_line():
    other = {**CONFIG, "depth": 6, "run": "b", "runtime": {"seed": 7, "device_type": "cuda"}, "new": 1}
    assert differences(CONFIG, other) == ["depth: 4 -> 6", "new: None -> 1", "seed: 42 -> 7"]


def test_the_same_run_goes_on_and_another_is_refused_unless_forced(base_dir, capsys):
    folder = base_dir / "t"
    assert find(folder) is None
    save(folder)
    assert find(folder, {**CONFIG, "run": "other"}).meta["step"] == 5
    with pytest.raises(ValueError, match=r"\n  depth: 4 -> 6\n.*--force.*--resume=never"):
        find(folder, {**CONFIG, "depth": 6})
    assert saved_steps(folder) == [5]
    assert find(folder, {**CONFIG, "depth": 6}, force=True) is not None
    assert "depth: 4 -> 6" in capsys.readouterr().out


def test_another_model_to_start_from_is_refused_and_another_tokenizer_always(base_dir):
    save(base_dir / "t")
    with pytest.raises(ValueError, match="model: m1 -> m2"):
        find(base_dir / "t", inputs={**INPUTS, "model": "m2"})
    with pytest.raises(ValueError, match="tokenizer: t1 -> t2") as refused:
        find(base_dir / "t", inputs={**INPUTS, "tokenizer": "t2"}, force=True)
    assert "--force" not in str(refused.value)


def test_a_finished_run_is_given_back_if_it_is_the_same_else_left_alone(base_dir):
    save(base_dir / "t", complete=True)
    assert find(base_dir / "t").meta["complete"]
    assert find(base_dir / "t", inputs={**INPUTS, "model": "m2"}) is None
    assert saved_steps(base_dir / "t") == [5]  # nothing is moved before the new run has a checkpoint


def test_never_starts_over_but_not_when_torchrun_restarts_the_same_run(base_dir, monkeypatch):
    save(base_dir / "t")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find(base_dir / "t", resume="never").meta["step"] == 5
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert find(base_dir / "t", resume="never") is None
    assert saved_steps(base_dir / "t") == [5]


def test_torchrun_restarts_a_fresh_start_that_had_no_checkpoint_yet_from_the_beginning(base_dir, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "before")
    save(base_dir / "t")
    meta = {"complete": True, "config": CONFIG, "inputs": INPUTS, "launch": "before", "state": {}}
    save_checkpoint(base_dir / "t", 9, {"w": torch.ones(2)}, None, meta)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find(base_dir / "t", resume="never").meta["step"] == 9  # its own, from before the restart
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "now")
    assert find(base_dir / "t", resume="never") is None
    assert find(base_dir / "t").meta["step"] == 9


def test_a_fresh_start_has_the_tag_from_its_first_checkpoint_on(base_dir, capsys):
    folder, pending = base_dir / "t", pending_folder(base_dir / "t")
    save(folder, complete=True)
    save(base_dir / "t.old", step=1)
    with run_lock(folder):
        pending.mkdir()  # begun, and killed before it had a checkpoint
    assert (saved_steps(folder), saved_steps(base_dir / "t.old"), pending.exists()) == ([5], [1], False)
    save(pending, step=2)  # killed after the first one
    with run_lock(folder):
        assert (saved_steps(folder), saved_steps(base_dir / "t.old"), pending.exists()) == ([2], [5], False)
    assert "the one before is t.old" in capsys.readouterr().out


def test_a_resume_keeps_the_dtype(base_dir):
    assert saved_dtype(base_dir / "t", "auto") is None
    save(base_dir / "t")
    assert saved_dtype(base_dir / "t", "auto") == "float16"
    assert saved_dtype(base_dir / "t", "never") is None
    save(base_dir / "t", complete=True, step=6)
    assert saved_dtype(base_dir / "t", "auto") is None


def test_two_runs_in_one_folder_are_refused_but_a_killed_one_does_not_block(base_dir, monkeypatch):
    monkeypatch.setattr("nanochat.train.resume.LOCK_SECONDS", 0.2)
    code = (
        "import sys, time; from pathlib import Path; from nanochat.train.resume import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('in', flush=True); time.sleep(100)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(base_dir / "t")], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"in\n"
    with pytest.raises(RuntimeError, match="another run"), run_lock(base_dir / "t"):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    other.stdout.close()
    with run_lock(base_dir / "t"):
        pass


def test_the_choice_of_a_checkpoint_is_explained_and_old_runs_are_not_taken(
    base_dir, tiny_model, tiny_tokenizer, capsys
):
    tiny_tokenizer.save(base_dir / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash}
    for tag, step in (("d2", 9), ("d2", 10), ("d12", 3), ("d20.old", 1)):
        save_checkpoint(checkpoint_folder("sft", tag), step, tiny_model.state_dict(), None, meta)
    load_model("sft", torch.device("cpu"))
    assert "tag d12 (the deepest of d12, d2), step 3 (the newest)" in capsys.readouterr().out
    (checkpoint_folder("sft", "d2") / "step_000010" / "model.safetensors").write_bytes(b"")
    load_model("sft", torch.device("cpu"), model_tag="d2")
    assert "tag d2 (asked for), step 9 (the newest that is undamaged)" in capsys.readouterr().out
    other = {**meta, "tokenizer_hash": "0" * 64}
    save_checkpoint(checkpoint_folder("sft", "d30"), 1, tiny_model.state_dict(), None, other)
    with pytest.raises(RuntimeError, match="another tokenizer"):
        load_model("sft", torch.device("cpu"))
