"""BASE: a run that goes on from a model, wherever that lies."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.config import run_script
from nanochat.interop import start_model
from nanochat.interop.foreign import read_remainder
from nanochat.interop.hf_format import has_a_row_per_token, write_hf_folder
from nanochat.interop.start_model import keep_tokenizer, read_start_model
from nanochat.pipeline.chosen import go_on
from nanochat.pipeline.inputs import base_lines
from nanochat.pipeline.profiles import CPU, TINY, Settings, choose_profile
from nanochat.pipeline.stages import make_stages
from nanochat.tokenizer import RustBPETokenizer
from scripts import import_hf


@pytest.fixture
def model(tiny_model, tiny_tokenizer, base_dir):
    """A finished base model with the tag d1 in the base dir, and its tokenizer."""
    tiny_tokenizer.save(base_dir / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash, "complete": True}
    meta["config"] = {"recipe": "portable"}
    save_checkpoint(base_dir / "base_checkpoints" / "d1", 7, tiny_model.state_dict(), None, meta)
    return tiny_model


def test_a_model_is_read_from_wherever_it_lies(model, tiny_tokenizer, base_dir, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    write_hf_folder(tmp_path / "hf", state, model.config, tiny_tokenizer, "# card", recipe="portable")
    tag = base_dir / "base_checkpoints" / "d1"
    for place, name in (
        ("d1", "d1"),
        (str(tag), "d1"),
        (str(tag / "step_000007"), "d1"),
        (str(base_dir), base_dir.name),
        (str(tmp_path / "hf"), "hf"),
    ):
        start = read_start_model(place)
        assert (start.name, start.config, start.recipe) == (name, model.config, "portable"), place
        assert start.tokenizer.hash == tiny_tokenizer.hash
        for key, value in state.items():
            rows = model.config.vocab_size if has_a_row_per_token(key) else None
            assert torch.equal(start.state[key][:rows], value[:rows]), (place, key)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_else_lies_in_a_model_folder_is_not_opened(model, tiny_tokenizer, base_dir, tmp_path, capsys):
    folder = tmp_path / "hf"
    write_hf_folder(folder, model.state_dict(), model.config, tiny_tokenizer, "# card", recipe="portable")
    before = read_start_model(str(folder)).fingerprint
    os.mkfifo(folder / "notes.json")  # to open it waits for ever
    (folder / "endless.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "other.safetensors")
    assert read_start_model(str(folder)).fingerprint == before  # a run that went on from it goes on
    with pytest.raises(ValueError, match="it is no file"):
        read_remainder(folder / "notes.json", 1000)
    (folder / "nanochat.json").unlink()
    os.mkfifo(folder / "nanochat.json")
    with pytest.raises(FileNotFoundError, match=r"nanochat\.json is missing"):
        read_start_model(str(folder))
    with open(folder / "config.json", "wb") as f:
        f.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"config\.json has 1,099,511,627,776 bytes"):
        read_start_model(str(folder))
    for tag in ("../x", ".x", "", "x" * 300):
        with pytest.raises(SystemExit):
            run_script(import_hf.main, import_hf.Config, [f"--path={folder}", f"--model_tag={tag}"])
        assert "give a short folder name" in capsys.readouterr().err


def test_what_is_no_model_is_refused_in_one_sentence(model, base_dir, tmp_path, monkeypatch):
    tag = base_dir / "base_checkpoints" / "d1"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    foreign = tmp_path / "llama"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    shutil.copy(tag / "step_000007" / "model.safetensors", foreign)
    (tmp_path / "empty").mkdir()
    torn = tmp_path / "home" / "base_checkpoints" / "torn"
    shutil.copytree(tag, torn)
    (torn / "step_000007" / "model.safetensors").write_bytes(b"torn")
    stranger = tmp_path / "stranger" / "base_checkpoints" / "d1"
    shutil.copytree(tag, stranger)
    renamed = tmp_path / "renamed"
    shutil.copytree(tag / "step_000007", renamed)
    for place, complaint in (
        (str(renamed), "under another name than step_<number>"),
        ("d9", r"no base model of that name in .* \(there are d1\)"),
        ("/no/where", "there is no such folder"),
        (str(tmp_path / "model.gguf"), "is a file: give a folder with config.json"),
        (str(tmp_path / "empty"), "holds no model"),
        (str(foreign), "model_type is 'llama'|does not say"),
        (str(torn), "damaged checkpoint"),
        (str(stranger), "the tokenizer of its model is missing"),
    ):
        with pytest.raises((ValueError, FileNotFoundError, RuntimeError), match=complaint) as error:
            read_start_model(place)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(start_model, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="take a smaller model"):
        read_start_model("d1")


def test_another_tokenizer_in_the_base_dir_stops_the_run_before_anything(model, tiny_tokenizer, base_dir):
    keep_tokenizer(tiny_tokenizer, only_ask=True)
    RustBPETokenizer.train_from_iterator(["other words"] * 9, 280).save(base_dir / "tokenizer")
    with pytest.raises(ValueError, match="set NANOCHAT_BASE_DIR"):
        keep_tokenizer(tiny_tokenizer, only_ask=True)


def test_an_import_can_take_the_place_of_another(model, base_dir, capsys):
    config = import_hf.Config(path="d1", source="base", model_tag="start")
    import_hf.main(config)
    with pytest.raises(ValueError, match="--replace"):
        import_hf.main(config)
    import_hf.main(replace(config, replace=True))
    folder = base_dir / "base_checkpoints"
    meta = load_checkpoint(folder / "start").meta
    assert (meta["complete"], meta["recipe"], meta["model_config"]) == (True, "portable", model.config.to_dict())
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "d1",
        "start",
        "start.old",
    ]


def going_on(profile, given, **settings):
    start = read_start_model(given)
    chosen = go_on(choose_profile(Settings(profile=profile, base=given, **settings), 0), start, given)
    stages = make_stages(chosen, Settings(base=given, **settings), Path("/base"))
    return start, chosen, {stage.name: stage for stage in stages}


def test_with_texts_and_chats_only_the_tokenizer_is_not_trained(model, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    chats = str(tmp_path / "a.txt")
    start, profile, stages = going_on("cpu", "d1", data_dir=tmp_path, chat_data=chats)
    assert list(stages) == [
        *("report_reset", "base_import", "tok_eval", "base_train", "base_loss", "base_eval"),
        *("mid_train", "chat_eval_mid", "chat_sft", "chat_eval_sft", "report", "answer"),
    ]
    train = stages["base_train"]
    assert {"--init_from=d1-start", "--model_tag=d1-own", "--recipe=portable"} <= set(train.flags)
    assert not any(flag.startswith(("--depth", "--max_seq_len")) for flag in train.flags)
    assert "base_import" in train.needs
    length = model.config.sequence_len
    assert (profile.max_seq_len, profile.vocab_size) == (length, model.config.vocab_size)
    for tokens, rows in (
        (profile.mid_batch_size, profile.device_batch_size),
        (profile.sft_batch_size, profile.sft_rows),
    ):
        assert tokens % (rows * length) == 0
    assert f"context: {length:,} tokens" in base_lines(CPU, start)[1]


def test_without_texts_it_goes_straight_to_the_answers(model, tmp_path):
    (tmp_path / "chats.jsonl").write_text("{}")
    _, _, stages = going_on("tiny", "d1", chat_data=str(tmp_path / "chats.jsonl"))
    assert list(stages) == ["report_reset", "base_import", "chat_sft", "chat_eval_sft", "report", "answer"]
    assert {"--source=base", "--model_tag=d1-own", "--max_epochs=20"} <= set(stages["chat_sft"].flags)
    assert "--model_tag=d1-own" in stages["base_import"].flags
    changed = read_start_model("d1")._replace(fingerprint="other")
    settings = Settings(base="d1", chat_data=str(tmp_path / "chats.jsonl"))
    others = make_stages(go_on(choose_profile(replace(settings, profile="tiny"), 0), changed, "d1"), settings, tmp_path)
    assert next(s for s in others if s.name == "base_import").key != stages["base_import"].key


def test_a_context_that_divides_no_batch_is_fitted(model):
    start = read_start_model("d1")
    for length in (100, 1000, 3000):
        odd = start._replace(config=replace(start.config, sequence_len=length))
        for profile in (CPU, TINY):
            fitted = go_on(profile, odd, "d1")
            assert fitted.mid_batch_size % (fitted.device_batch_size * length) == 0
            assert fitted.sft_batch_size % (fitted.sft_rows * length) == 0


def test_settings_that_contradict_the_model_or_teach_nothing_are_refused(tmp_path):
    for name in ("DEPTH", "VOCAB_SIZE", "RECIPE"):
        value = {"DEPTH": "4", "VOCAB_SIZE": "999", "RECIPE": "small"}[name]
        with pytest.raises(ValueError, match=f"{name} and BASE are both set"):
            Settings.from_env({"BASE": "d1", name: value, "DATA_DIR": str(tmp_path)})
    for chats in (None, "none"):
        with pytest.raises(ValueError, match="needs something to learn"):
            choose_profile(Settings(base="d1", chat_data=chats), 0)
    assert choose_profile(Settings(base="d1", chat_data="demo"), 0).name == "cpu"
