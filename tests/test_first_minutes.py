"""What somebody meets first: a dry run on a laptop, a card that torch cannot use, the notebook as it comes."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.cards import DeviceInfo, known_capability
from nanochat.common import print_banner
from nanochat.config import run_script
from nanochat.env import require_wandb_login
from nanochat.pipeline import run
from nanochat.pipeline.chosen import profile_for
from nanochat.pipeline.machine import unused_cards
from nanochat.pipeline.profiles import P100, STAGE_HOURS, Settings
from nanochat.pipeline.verify import check_room
from nanochat.progress import PROGRESS_FILE
from nanochat.train.tracking import init_tracker

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose torch sees no card; call it with the names that nvidia-smi shows."""
    for name in ("PROFILE", "DATA_DIR", "DATASET", "DEPTH", "NPROC", "HOURS", "CHAT_DATA", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(run, "list_devices", list)

    def show(*names: str) -> None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text("#!/bin/sh\n" + "".join(f"echo '{name}'\n" for name in names))
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return show


@pytest.mark.parametrize(("profile", "card"), [("p100", "1 × Tesla P100"), ("d20", "8 × NVIDIA H100")])
def test_a_dry_run_of_a_profile_for_cards_needs_none(machine, monkeypatch, capsys, profile, card):
    machine()
    monkeypatch.setenv("PROFILE", profile)
    run.main(run.Config(dry_run=True))
    first, note, *stages = capsys.readouterr().out.splitlines()
    assert first.startswith(f"profile {profile}: ")
    assert card in note
    assert any("python -m torch.distributed" in line or "scripts.base_train" in line for line in stages)
    with pytest.raises(SystemExit) as stop:  # but a run does
        run.main(run.Config())
    assert stop.value.code == 2
    assert "CUDA cards" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cards", "said"),
    [
        (["Tesla P100-PCIE-16GB"], "Tesla P100-PCIE-16GB not used: torch"),
        (["Tesla K80", "Tesla K80"], "2 × Tesla K80 not used: too old for every torch"),
    ],
)
def test_the_first_line_names_a_card_that_torch_cannot_use(machine, capsys, cards, said):
    machine(*cards)
    run.main(run.Config(dry_run=True))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("profile demo: ")
    assert said in first


def test_hidden_and_used_cards_are_not_named(machine, monkeypatch):
    machine("Tesla T4")
    assert unused_cards([DeviceInfo("Tesla T4", (7, 5), 15360)]) == ""
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert "sees no card" in unused_cards([])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_cards([]) == ""


def test_the_banner_comes_once_a_run(monkeypatch, capsys):
    monkeypatch.delenv(PROGRESS_FILE, raising=False)
    print_banner()
    assert "nanochat" in capsys.readouterr().out
    monkeypatch.setenv(PROGRESS_FILE, "/some/file")  # in a stage of the pipeline
    print_banner()
    assert capsys.readouterr().out == ""


def test_the_notebook_as_it_comes_ends_within_its_session():
    cells = json.loads((ROOT / "notebooks" / "nanochat_free_gpu.ipynb").read_text(encoding="utf-8"))["cells"]
    settings: dict = {}
    exec("".join(cells[1]["source"]), settings)
    profile = replace(P100, hours=float(settings["SETTINGS"]["HOURS"]))
    hours = sum(profile.stage_hours(stage) or 0.0 for stage in ("base_train", *STAGE_HOURS))
    assert hours < settings["SESSION_HOURS"] - 2  # set-up, evaluation and saving


@pytest.mark.parametrize(("cards", "most_gb"), [(["Tesla T4"], 15), (["Tesla T4"] * 2, 20), (["Tesla P100"], 20)])
def test_the_notebook_as_it_comes_fits_into_what_is_kept(cards, most_gb):
    """Google Drive keeps 15 GB of its T4, Kaggle 20 GB."""
    cells = json.loads((ROOT / "notebooks" / "nanochat_free_gpu.ipynb").read_text(encoding="utf-8"))["cells"]
    settings: dict = {}
    exec("".join(cells[1]["source"]), settings)
    devices = [DeviceInfo(name, known_capability(name), 15360) for name in cards]
    text = check_room(profile_for(Settings.from_env(settings["SETTINGS"]), devices), devices).text
    assert 1 < float(re.search(r"parameters: ([\d.]+) GB", text)[1]) < most_gb


def test_wandb_without_a_login_is_one_sentence_before_any_work(machine, monkeypatch, capsys, tmp_path):
    machine()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(api=SimpleNamespace(api_key=None)))
    monkeypatch.setenv("WANDB_RUN", "first")
    with pytest.raises(SystemExit) as stop:
        run_script(run.main, run.Config, [])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in ("WANDB_MODE=offline", "wandb login", "--tracker=tensorboard"))
    assert not list((tmp_path / "base").rglob("*.json"))
    with pytest.raises(RuntimeError, match="wandb login"):
        init_tracker("wandb", "first", "nanochat", {})
    monkeypatch.setenv("WANDB_MODE", "offline")
    require_wandb_login()
