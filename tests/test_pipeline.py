"""The pipeline: which stages a profile means, what is skipped, what a failure says, and the whole chain once, tiny."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.cards import DeviceInfo
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.data.shards import Entry, Manifest
from nanochat.data.sources import count_shards
from nanochat.pipeline.machine import (
    flops_per_second,
    machine_env,
    shards_needed,
    take_cards,
    tokens_needed,
    visible_cards,
)
from nanochat.pipeline.profiles import CPU, D20, DEMO, P100, TINY, Profile, Settings, choose_profile
from nanochat.pipeline.run import Pipeline, only_one
from nanochat.pipeline.stages import READY_SHARDS, Stage, expected_seconds, fingerprint, make_stages
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes

ROOT = Path(__file__).resolve().parent.parent
ORDER = [
    *("report_reset", "data", "tok_train", "tok_eval", "base_train", "base_loss", "base_eval"),
    *("mid_train", "chat_eval_mid", "chat_sft", "chat_eval_sft", "report", "answer"),
]


def stages_of(profile: Profile, **settings) -> dict[str, Stage]:
    stages = make_stages(profile, Settings(**settings), Path("/base"), 5)
    return {stage.name: stage for stage in stages}


# --- which stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", [DEMO, TINY, P100, D20])
def test_the_stages_come_in_nanochats_order(profile):
    assert list(stages_of(profile)) == ORDER


def test_own_data_needs_no_data_stage(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    profile = choose_profile(Settings(data_dir=tmp_path), 0)
    stages = stages_of(profile, data_dir=tmp_path)
    assert list(stages) == [name for name in ORDER if name != "data"]
    for name in ("tok_train", "tok_eval", "base_train", "base_loss"):
        assert f"--data_dir={tmp_path}" in stages[name].flags


def test_the_p100_preset_in_flags():
    stages = stages_of(P100, wandb_run="night")
    flags = " ".join(stages["base_train"].command())
    assert "torch.distributed" not in flags
    for flag in ("--depth=12", "--device_batch_size=auto", "--hours=8", "--run=night"):
        assert flag in flags
    assert "--num_files=5" in stages["data"].flags
    assert "--hours=0.5" in stages["mid_train"].flags
    assert "--hours=0.3333" in stages["chat_sft"].flags


def test_several_cards_go_through_torchrun_and_one_process_does_not():
    stages = stages_of(D20)
    for name in ("base_train", "base_loss", "base_eval", "mid_train", "chat_sft", "chat_eval_sft"):
        command = stages[name].command()
        assert command[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=8"], name
    for name in ("tok_train", "report", "answer"):
        assert "torch.distributed.run" not in stages[name].command(), name


def test_every_stage_names_the_model_it_means():
    for name, stage in stages_of(replace(TINY, depth=2)).items():
        if stage.module.split(".")[-1] in ("base_train", "base_loss", "base_eval", "mid_train", "chat_sft", "chat_cli"):
            assert "--model_tag=d2" in stage.flags, name


def test_only_the_demo_forbids_the_download_of_the_core_bundle():
    assert any(flag.startswith("--eval_bundle=") for flag in stages_of(DEMO)["base_eval"].flags)
    assert not any(flag.startswith("--eval_bundle=") for flag in stages_of(P100)["base_eval"].flags)


def test_shards_that_arrive_later_change_nothing(tmp_path):
    """The text is there as soon as a start can be made; what follows must not undo the stages that read it."""
    data = stages_of(replace(P100, dataset="climbmix"))["data"]
    folder = tmp_path / "base_data" / "climbmix"
    folder.mkdir(parents=True)
    names = [f"shard_{i:05d}.parquet" for i in range(READY_SHARDS + 3)]
    manifest = Manifest("climbmix", [Entry(name, 100, "sha256:0") for name in names[:-1]], [Entry(names[-1], 100)])
    manifest.save(folder)
    assert data.result(tmp_path) is None
    for name in [*names[:READY_SHARDS], names[-1]]:
        (folder / name).write_text(name)
    first = data.result(tmp_path)
    assert first
    (folder / names[READY_SHARDS]).write_text("late")
    assert data.result(tmp_path) == first
    replace(manifest, train=manifest.train[:-1]).save(folder)
    assert data.result(tmp_path) != first


def test_flags_are_known_to_the_scripts():
    """The scripts themselves parse what the pipeline gives them."""
    from nanochat.config import parse_config
    from scripts import base_eval, base_loss, base_train, chat_cli, chat_eval, chat_sft, mid_train, tok_eval, tok_train

    modules = {
        module.__name__: module
        for module in (base_eval, base_loss, base_train, chat_cli, chat_eval, chat_sft, mid_train, tok_eval, tok_train)
    }
    cpu = replace(CPU, dataset="climbmix")
    for profile in (DEMO, TINY, cpu, P100, D20):
        for stage in stages_of(profile).values():
            if stage.module in modules:
                command = replace(stage, nproc=1).command()[3:]
                assert parse_config(modules[stage.module].Config, command), stage.name


def test_expected_time_comes_from_the_hours_or_from_a_measurement():
    assert expected_seconds(P100, "mid_train") == pytest.approx(3600 / 2)
    assert expected_seconds(replace(TINY, seconds={"tok_train": 3.0}), "tok_train") == 3.0
    assert expected_seconds(replace(TINY, seconds={}), "tok_train") is None


PASCAL, TURING = DeviceInfo("Tesla P100-PCIE-16GB", (6, 0), 16280), DeviceInfo("Tesla T4", (7, 5), 15360)


def modern(profile: Profile, **changes) -> Profile:
    return replace(profile, recipe="modern", **changes)


def test_a_night_on_a_p100_needs_a_few_shards_and_more_cards_or_hours_need_more():
    night = shards_needed(P100, [PASCAL])
    assert 5 <= night <= 10
    assert shards_needed(replace(P100, hours=16.0), [PASCAL]) == pytest.approx(2 * night, abs=1)
    assert shards_needed(replace(P100, nproc=2), [TURING] * 2) > shards_needed(P100, [TURING])
    assert 0.5 * night < shards_needed(modern(P100), [PASCAL]) <= 1.1 * night


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_without_hours_the_recipes_own_horizon_counts(recipe):
    """As many tokens as base_train plans for with the same flags."""
    from nanochat.train.pretrain import make_plan
    from nanochat.train.pretrain_config import PretrainConfig

    profile = modern(D20) if recipe == "modern" else D20
    config = PretrainConfig(depth=20, recipe=recipe, total_batch_size=524288, device_batch_size=32)
    plan = make_plan(config, 65536, 8)
    assert plan.horizon_tokens == pytest.approx(tokens_needed(profile, 0.0), rel=1e-6)
    assert shards_needed(profile) == count_shards(plan.horizon_tokens)


def test_half_an_hour_on_a_cpu_downloads_no_hundred_shards(monkeypatch):
    monkeypatch.setattr("nanochat.pipeline.machine.measure_matmul", lambda *_, **__: 0.4)
    assert shards_needed(replace(CPU, dataset="climbmix")) == 1


def test_the_speed_of_a_cpu_is_that_of_the_products_training_makes(monkeypatch):
    """Float32 runs are trained by bfloat16 products where they are fast: shards for half that speed would run out."""
    monkeypatch.setattr("nanochat.precision.cpu_has_bf16", lambda: True)
    speeds = {torch.float32: 0.1, torch.bfloat16: 0.3}
    monkeypatch.setattr("nanochat.pipeline.machine.measure_matmul", lambda dtype, *_, **__: speeds[dtype])
    assert flops_per_second(replace(CPU, dtype="float32"), []) == pytest.approx(0.3e12)


def test_steps_count_where_a_profile_has_them():
    assert tokens_needed(TINY, 0.0) == 10 * 512


# --- which cards -----------------------------------------------------------------------------------------------------


def test_of_two_different_cards_only_the_better_one_is_visible_to_the_stages(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = [DeviceInfo("GeForce GTX 1050", (6, 1), 2048), PASCAL]
    chosen = take_cards(devices, None)
    assert chosen == [1]
    assert machine_env(P100, devices, chosen) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert machine_env(P100, [PASCAL], [0]) == {}
    assert take_cards(devices, 2) == [1, 0]  # the user's wish


def test_two_equal_cards_train_one_model(monkeypatch):
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    devices = [TURING, TURING]
    chosen = take_cards(devices, None)
    profile = choose_profile(Settings(), len(chosen))
    env = machine_env(profile, devices, chosen)
    assert int(env.pop("OMP_NUM_THREADS")) >= 1
    assert env == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}  # time for an evaluation and a save after Ctrl-C
    for name in ("base_train", "mid_train", "chat_sft"):
        assert "--nproc_per_node=2" in stages_of(profile)[name].command(), name
    assert take_cards(devices, 1) == [0]


def test_the_choice_is_made_among_the_cards_that_are_visible():
    assert visible_cards([1, 2], {"CUDA_VISIBLE_DEVICES": "3,5,0"}) == "5,0"
    assert visible_cards([0], {"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}) == "GPU-1a"
    assert visible_cards([0, 2], {}) == "0,2"


def test_the_key_follows_the_data_and_the_settings_but_not_the_wandb_name(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one")
    profile = choose_profile(Settings(data_dir=tmp_path), 0)
    before = stages_of(profile, data_dir=tmp_path)
    assert stages_of(profile, data_dir=tmp_path, wandb_run="x")["base_train"].key == before["base_train"].key
    assert stages_of(replace(profile, hours=9.0), data_dir=tmp_path)["base_train"].key != before["base_train"].key
    text.write_text("two")
    assert stages_of(profile, data_dir=tmp_path)["tok_train"].key != before["tok_train"].key


def test_fingerprint_sees_new_changed_and_renamed_files(tmp_path):
    prints = {fingerprint(tmp_path)}
    (tmp_path / "a.txt").write_text("one")
    prints.add(fingerprint(tmp_path))
    (tmp_path / "a.txt").write_text("two")
    prints.add(fingerprint(tmp_path))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    prints.add(fingerprint(tmp_path))
    (tmp_path / "notes.lock").write_text("not a text")
    (tmp_path / "~$b.csv").write_text("what Office has open")
    assert fingerprint(tmp_path) in prints
    assert len(prints) == 4


def test_fingerprint_sees_what_a_linked_folder_holds(tmp_path):
    for name in ("chats", "real"):
        (tmp_path / name).mkdir()
    (tmp_path / "chats" / "l").symlink_to(tmp_path / "real")
    prints = set()
    for text in ("one", "two"):
        (tmp_path / "real" / "a.json").write_text(text)
        prints.add(fingerprint(tmp_path / "chats"))
    assert len(prints) == 2


# --- running them ----------------------------------------------------------------------------------------------------

STAGE_CODE = """
import os, sys
from pathlib import Path
name, *flags = sys.argv[1:]
base = Path(os.environ["NANOCHAT_BASE_DIR"])
with open(base / "ran.txt", "a") as f:
    f.write(" ".join([name, *(x for x in flags if x.startswith("--resume"))]) + "\\n")
if (base / f"fail-{name}").exists():
    sys.exit("something is wrong with " + name)
if (base / f"stop-{name}").exists():
    sys.exit(75)
(base / f"{name}.out").write_text("done")
(base / f"{name}.progress").write_text(os.environ["NANOCHAT_PROGRESS_FILE"])
"""


@pytest.fixture
def runs(tmp_path, base_dir, monkeypatch):
    """Run a chain of four little stages; returns what ran. Changes to the stages are given as stage=changes."""
    (tmp_path / "little_stage.py").write_text(STAGE_CODE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(**changes) -> list[str]:
        chain = [
            Stage(name="tok", about="a", module="little_stage", flags=("tok",), output="tok.out"),
            Stage(name="base", about="b", module="little_stage", flags=("base",), needs=("tok",), trains=True),
            Stage(name="eval", about="c", module="little_stage", flags=("eval",), needs=("base",)),
            Stage(name="mid", about="d", module="little_stage", flags=("mid",), needs=("base",), output="mid.out"),
        ]
        chain[1] = replace(chain[1], output="base.out")
        chain = [replace(stage, **changes.get(stage.name, {})) for stage in chain]
        log = base_dir / "ran.txt"
        log.unlink(missing_ok=True)
        Pipeline(chain, base_dir, TINY).run(os.environ)
        return log.read_text().splitlines() if log.exists() else []

    return run


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_does_nothing_and_changes_nothing(runs, base_dir, capsys):
    assert runs() == ["tok", "base --resume=never", "eval", "mid"]
    (base_dir / "ran.txt").unlink()
    before = snapshot(base_dir)
    capsys.readouterr()
    assert runs() == []
    assert snapshot(base_dir) == before
    assert capsys.readouterr().out.count("skipped") == 4


def test_a_failed_stage_names_itself_its_log_and_how_to_go_on(runs, base_dir):
    (base_dir / "fail-base").touch()
    with pytest.raises(RuntimeError, match=r"stage base failed: exit code 1.*base\.log.*same command again"):
        runs()
    assert "something is wrong with base" in (base_dir / "pipeline" / "base.log").read_text()
    (base_dir / "fail-base").unlink()
    # tok is not repeated, and base goes on with what it had.
    assert runs() == ["base --resume=auto", "eval", "mid"]


def test_a_stage_is_told_where_its_progress_goes(runs, base_dir):
    runs()
    assert (base_dir / "eval.progress").read_text() == str(base_dir / "pipeline" / "eval.progress.json")


def test_other_settings_repeat_the_stage_and_all_that_build_on_it(runs):
    runs()
    assert runs(base={"flags": ("base", "--depth=9")}) == ["base --resume=never", "eval", "mid"]


def test_a_changed_evaluation_does_not_repeat_any_training(runs):
    runs()
    assert runs(eval={"flags": ("eval", "--more")}) == ["eval"]


def test_a_stage_whose_output_is_gone_runs_again(runs, base_dir):
    runs()
    (base_dir / "base.out").unlink()
    assert runs() == ["base --resume=never", "eval", "mid"]


def test_after_a_redo_was_interrupted_later_stages_are_not_trusted(runs, base_dir):
    runs()
    (base_dir / "base.out").unlink()
    (base_dir / "fail-base").touch()
    with pytest.raises(RuntimeError):
        runs()
    (base_dir / "fail-base").unlink()
    assert runs() == ["base --resume=auto", "eval", "mid"]


def test_a_mistake_that_changes_nothing_leaves_what_was_finished(runs, base_dir):
    runs()
    marks = {path.name: path.read_bytes() for path in (base_dir / "pipeline").glob("*.json")}
    for name in ("tok", "base", "eval"):
        (base_dir / f"fail-{name}").touch()
        with pytest.raises(RuntimeError, match=f"the stage {name} failed"):
            runs(**{name: {"flags": (name, "--mistyped")}})
        (base_dir / f"fail-{name}").unlink()
        assert {path.name: path.read_bytes() for path in (base_dir / "pipeline").glob("*.json")} == marks
    assert runs() == []


def test_the_tokenizer_is_known_by_its_content(base_dir, tiny_tokenizer):
    """A stray file beside it, or one that follows from it and is gone, must not make base training start over."""
    stage = next(stage for stage in make_stages(TINY, Settings(), base_dir) if stage.name == "tok_train")
    assert stage.result(base_dir) is None
    folder = base_dir / "tokenizer"
    tiny_tokenizer.save(folder)
    before, lengths = stage.result(base_dir), (folder / "token_bytes.pt").read_bytes()
    (folder / "notes.txt").write_text("stray")
    (folder / "token_bytes.pt").unlink()
    assert stage.result(base_dir) == before
    assert get_token_bytes().tolist() == tiny_tokenizer.token_lengths().tolist()
    assert (folder / "token_bytes.pt").read_bytes() == lengths  # made again, the same bytes
    assert torch.load(folder / "token_bytes.pt", weights_only=True).dtype == torch.int32
    (folder / "token_bytes.pt").write_bytes(lengths[:-90] + b"!" + lengths[-89:])  # damaged: made again too
    assert get_token_bytes().tolist() == tiny_tokenizer.token_lengths().tolist()
    assert (folder / "token_bytes.pt").read_bytes() == lengths
    RustBPETokenizer.train_from_iterator(iter(["other text, other merges"] * 9), 280).save(folder)
    assert stage.result(base_dir) != before


def test_an_unfinished_run_with_other_settings_is_not_continued(runs, base_dir):
    (base_dir / "fail-base").touch()
    with pytest.raises(RuntimeError):
        runs()
    (base_dir / "fail-base").unlink()
    assert runs(base={"flags": ("base", "--depth=9")})[0] == "base --resume=never"


def test_a_result_changed_by_hand_is_noticed(runs, base_dir):
    runs()
    (base_dir / "base.out").write_text("another model")
    assert runs() == ["base --resume=never", "eval", "mid"]
    (base_dir / "tok.out").write_text("another tokenizer")
    assert runs() == ["tok", "base --resume=never", "eval", "mid"]
    (base_dir / "mid.out").write_text("edited")  # nothing is made from it
    assert runs() == []


def test_an_unfinished_stage_is_not_continued_on_another_input(runs, base_dir):
    (base_dir / "fail-base").touch()
    with pytest.raises(RuntimeError):
        runs()
    (base_dir / "fail-base").unlink()
    (base_dir / "tok.out").write_text("another tokenizer")
    assert runs()[:2] == ["tok", "base --resume=never"]


def test_a_stage_that_was_asked_to_stop_is_told_from_one_that_failed(runs, base_dir, capsys):
    (base_dir / "stop-base").touch()
    with pytest.raises(SystemExit) as stopped:
        runs()
    assert stopped.value.code == 75
    assert "stopped in the stage base; the same command goes on" in capsys.readouterr().out
    (base_dir / "stop-base").unlink()
    assert runs()[0] == "base --resume=auto"


def test_the_result_of_training_is_its_finished_weights(base_dir):
    stage = Stage(name="b", about="", module="m", output="base_checkpoints/d1/step_*/meta.json")
    assert stage.result(base_dir) is None
    results = []
    for step, complete, value in ((1, False, 0.0), (2, True, 1.0), (3, True, 1.0), (4, True, 2.0)):
        folder = base_dir / "base_checkpoints" / "d1"
        save_checkpoint(folder, step, {"w": torch.full((2,), value)}, None, {"complete": complete})
        results.append(stage.result(base_dir))
    assert results[0] is None
    assert results[1] == results[2] != results[3]


def test_two_pipelines_in_one_folder_are_refused(tmp_path):
    with only_one(tmp_path), pytest.raises(RuntimeError, match="NANOCHAT_BASE_DIR"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


# --- the command -------------------------------------------------------------------------------------------------


def pipeline(cwd: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m nanochat.pipeline` from another folder."""
    return subprocess.run(
        [sys.executable, "-m", "nanochat.pipeline", *flags],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_bad_settings_exit_with_2_and_one_line(tmp_path):
    done = pipeline(tmp_path, DEPTH="0")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: DEPTH=0: must be at least 1"


def test_a_world_with_mistakes_stops_a_run_before_anything_is_made(tmp_path):
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "a.txt").write_text("[sky]\nfact: The sky is blue.\nkey: blue\n")
    done = pipeline(tmp_path, WORLD="world", PROFILE="tiny", CUDA_VISIBLE_DEVICES="", NANOCHAT_BASE_DIR="base")
    assert done.returncode == 2
    assert "a.txt:2: no ask: a fact needs fact, ask, key" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: WORLD=")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "base" / "base_data").exists()
