"""Checkpoints appear whole, are verified, and the newest good one is found."""

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.files import write_text


def save(folder, step, value=0.0, keep=2):
    return cm.save_checkpoint(
        folder, step, {"w": torch.full((4,), value)}, {"w.exp_avg": torch.ones(4)}, {"x": 1}, keep
    )


def test_steps_are_numbers_and_strays_are_ignored(base_dir):
    folder = base_dir / "t"
    for step in (9, 10, 100):
        save(folder, step, step, keep=None)
    (folder / "step_000200").mkdir()  # no meta.json: never finished
    (folder / "notes.txt").write_text("hello")
    assert cm.saved_steps(folder) == [9, 10, 100]
    assert cm.load_checkpoint(folder).model["w"][0] == 100


def test_only_the_newest_stay(base_dir):
    for step in range(5):
        save(base_dir / "t", step)
    assert cm.saved_steps(base_dir / "t") == [3, 4]


def test_optimizer_state_is_loaded_only_when_asked_for(base_dir):
    save(base_dir / "t", 1)
    assert cm.load_checkpoint(base_dir / "t").optimizer == {}
    assert set(cm.load_checkpoint(base_dir / "t", with_optimizer=True).optimizer) == {"w.exp_avg"}


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json"])
@pytest.mark.parametrize("position", [0.0, 0.5, 0.99])
def test_a_flipped_byte_is_found_and_the_older_checkpoint_taken(base_dir, name, position, capsys):
    folder = base_dir / "t"
    save(folder, 1, 1.0)
    file = save(folder, 2, 2.0) / name
    data = bytearray(file.read_bytes())
    data[int(position * (len(data) - 1))] ^= 0xFF
    file.write_bytes(bytes(data))
    assert cm.load_checkpoint(folder).meta["step"] == 1
    assert "step_000002" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="damaged"):
        cm.load_checkpoint(folder, step=2)


def test_no_checkpoint_names_the_command(base_dir):
    with pytest.raises(FileNotFoundError, match=r"scripts\.chat_sft"):
        cm.find_tag("sft")
    with pytest.raises(FileNotFoundError, match="tag 'nope'"):
        cm.find_tag("base", "nope")
    for tag in ("../base_checkpoints", ".hidden", ""):
        with pytest.raises(ValueError, match="give a short folder name"):
            cm.load_model("base", torch.device("cpu"), model_tag=tag)
    with pytest.raises(ValueError, match="base, mid, sft, rl"):
        cm.find_tag("other")


def test_the_deepest_model_wins_and_empty_folders_do_not(base_dir):
    save(cm.checkpoint_folder("base", "d4"), 5)
    save(cm.checkpoint_folder("base", "d12"), 5)
    cm.checkpoint_folder("base", "d20").mkdir()
    write_text(cm.checkpoint_folder("base", "d20") / "junk", "")
    assert cm.find_tag("base").name == "d12"


def test_asking_for_a_missing_step_lists_the_steps(base_dir):
    save(base_dir / "t", 7)
    with pytest.raises(FileNotFoundError, match="steps 7"):
        cm.load_checkpoint(base_dir / "t", step=8)


def test_generators_continue_where_they_were():
    import random

    import numpy as np

    device = torch.device("cpu")
    state = cm.rng_state(device)
    first = (random.random(), np.random.rand(), torch.rand(3))
    cm.restore_rng_state(state, device)
    second = (random.random(), np.random.rand(), torch.rand(3))
    assert first[:2] == second[:2]
    assert torch.equal(first[2], second[2])
