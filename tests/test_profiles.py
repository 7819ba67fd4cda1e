"""Which profile a machine and a user's settings lead to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nanochat.data.sources import count_shards
from nanochat.data.worlds import CORE_TOPICS
from nanochat.interop.qwen3 import obstacles
from nanochat.pipeline import profiles
from nanochat.pipeline.chosen import fit_steps, with_steps
from nanochat.pipeline.profiles import (
    CPU,
    D20,
    DEMO,
    P100,
    PROFILES,
    TINY,
    Settings,
    choose_profile,
    fit_batches,
)
from nanochat.pipeline.stages import make_stages


@pytest.fixture(autouse=True)
def plain_cpu(monkeypatch):
    """A CPU without bfloat16 instructions, whatever this one has."""
    monkeypatch.setattr(profiles, "cpu_has_bf16", lambda: False)


def test_auto_takes_what_the_machine_has(tmp_path):
    assert choose_profile(Settings(), 0) == DEMO
    assert choose_profile(Settings(), 1).name == "p100"
    assert choose_profile(Settings(data_dir=tmp_path), 0).name == "cpu"
    assert choose_profile(Settings(data_dir=tmp_path), 2).name == "p100"
    assert choose_profile(Settings(dataset="climbmix"), 0).name == "cpu"
    assert choose_profile(Settings(profile="tiny"), 4) == TINY


def test_bfloat16_only_without_a_card_and_where_the_cpu_has_it(monkeypatch, tmp_path):
    assert choose_profile(Settings(), 0).dtype == "auto"
    monkeypatch.setattr(profiles, "cpu_has_bf16", lambda: True)
    assert choose_profile(Settings(), 0).dtype == "bfloat16"
    assert choose_profile(Settings(data_dir=tmp_path), 0).dtype == "bfloat16"
    assert choose_profile(Settings(), 1).dtype == "auto"
    assert choose_profile(Settings(profile="demo"), 1).dtype == "auto"


def test_the_p100_preset_is_the_one_that_is_documented():
    assert (P100.depth, P100.vocab_size, P100.device_batch_size, P100.base_batch_size) == (12, 65536, 8, None)
    assert (P100.nproc, P100.hours, P100.dataset) == (1, 8.0, "climbmix")
    assert (D20.depth, D20.nproc) == (20, 8)


def test_own_data_on_a_cpu_gets_a_small_vocabulary_and_can_chat_without_conversations(tmp_path):
    profile = choose_profile(Settings(data_dir=tmp_path), 0)
    assert (profile.vocab_size, profile.depth, profile.dataset, profile.chat_data) == (8192, 4, None, "demo")
    own = choose_profile(Settings(data_dir=tmp_path, chat_data="/chats.jsonl"), 0)
    assert own.chat_data == "/chats.jsonl"
    assert choose_profile(Settings(data_dir=tmp_path, chat_data="nanochat"), 0).chat_data is None


def test_the_users_settings_go_before_the_profiles(tmp_path):
    settings = Settings(depth=6, vocab_size=4096, hours=0.25, nproc=2, data_dir=tmp_path)
    profile = choose_profile(settings, 0)
    assert (profile.depth, profile.vocab_size, profile.hours, profile.nproc, profile.tag) == (6, 4096, 0.25, 2, "d6")


@pytest.mark.parametrize(("depth", "rows"), [(4, 16), (8, 16), (12, 8), (16, 4), (20, 2), (32, 1)])
def test_deeper_models_get_smaller_forward_passes_on_a_p100(depth, rows):
    assert choose_profile(Settings(depth=depth), 1).device_batch_size == rows


def test_batches_divide_in_every_profile():
    for profile in PROFILES.values():
        rows = profile.device_batch_size * profile.max_seq_len * profile.nproc
        assert profile.mid_batch_size % rows == 0, profile.name
        assert profile.sft_batch_size % (profile.sft_rows * profile.max_seq_len * profile.nproc) == 0, profile.name


def test_missing_cards_and_missing_data_are_errors_with_a_remedy():
    with pytest.raises(ValueError, match="PROFILE=demo"):
        choose_profile(Settings(profile="p100"), 0)
    with pytest.raises(ValueError, match="set NPROC"):
        choose_profile(Settings(nproc=4), 2)
    with pytest.raises(ValueError, match="DATA_DIR"):
        choose_profile(Settings(profile="cpu"), 0)


def test_settings_come_from_the_environment(tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("")
    env = {"PROFILE": "cpu", "DEPTH": "5", "HOURS": "0.5", "DATA_DIR": str(tmp_path), "CHAT_DATA": str(chats)}
    settings = Settings.from_env(env | {"VOCAB_SIZE": "300", "NPROC": "2", "WANDB_RUN": "night", "DATASET": ""})
    assert settings == Settings(
        profile="cpu",
        depth=5,
        vocab_size=300,
        hours=0.5,
        nproc=2,
        data_dir=tmp_path,
        chat_data=str(chats),
        wandb_run="night",
    )
    assert Settings.from_env({"PROFILE": "", "DEPTH": ""}) == Settings()


def test_a_portable_model_gets_the_tokenizer_that_other_programs_know(tmp_path):
    for name in ("tiny", "demo"):
        settings = Settings.from_env({"PROFILE": name, "RECIPE": "portable"})
        profile = choose_profile(settings, 0)
        stages = {stage.name: stage for stage in make_stages(profile, settings, tmp_path)}
        assert "--pattern=runtimes" in stages["tok_train"].flags
        assert "--recipe=portable" in stages["base_train"].flags
        assert not obstacles(profile.model_config)
    assert choose_profile(Settings(recipe="classic", profile="tiny"), 0).recipe == "classic"
    usual = make_stages(choose_profile(Settings(profile="tiny"), 0), Settings(profile="tiny"), tmp_path)
    assert not any(flag.startswith("--pattern") for stage in usual for flag in stage.flags)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROFILE", "p200"),
        ("DEPTH", "0"),
        ("DEPTH", "four"),
        ("VOCAB_SIZE", "264"),
        ("HOURS", "0"),
        ("HOURS", "nan"),
        ("HOURS", "inf"),
        ("NPROC", "-1"),
        ("RECIPE", "large"),
        ("DATASET", "internet"),
        ("DATA_DIR", "/no/such/folder"),
        ("CHAT_DATA", "/no/such/file"),
        ("WORLD", "/no/such/folder"),
        ("WORLD", "nanochat:0"),
    ],
)
def test_a_bad_setting_names_itself_and_its_value(name, value):
    with pytest.raises((ValueError, FileNotFoundError), match=f"{name}={value}"):
        Settings.from_env({name: value})


def test_the_longer_the_run_the_more_of_the_shipped_world(tmp_path):
    def world(**env):
        return choose_profile(Settings.from_env(env), 0).world

    assert world(PROFILE="demo") == world(PROFILE="tiny") == "nanochat"
    assert world(PROFILE="demo", HOURS="0.05") == f"nanochat:{CORE_TOPICS}"
    assert world(PROFILE="demo", HOURS="0.25") == "nanochat:400"
    assert world(PROFILE="demo", HOURS="0.25", WORLD="nanochat:600") == "nanochat:600"
    assert world(PROFILE="demo", HOURS="0.25", WORLD=f"nanochat,{tmp_path}") == f"nanochat:400,{tmp_path}"
    assert world(PROFILE="demo", HOURS="0.25", WORLD=str(tmp_path)) == str(tmp_path)
    assert world(PROFILE="cpu", HOURS="0.2", DATA_DIR=str(tmp_path)) == "nanochat"  # only its chats are of a world
    with pytest.raises(ValueError, match="learns no world here"):
        choose_profile(Settings.from_env({"PROFILE": "p100", "WORLD": str(tmp_path)}), 1)


def test_a_changed_world_is_a_changed_input(tmp_path):
    def keys(world):
        settings = Settings.from_env({"PROFILE": "tiny", "WORLD": world})
        stages = make_stages(choose_profile(settings, 0), settings, tmp_path)
        return {stage.name: stage.key for stage in stages if stage.name in ("data", "mid_train", "chat_sft")}

    (tmp_path / "a.txt").write_text("one")
    worlds = ("nanochat", "nanochat:9", str(tmp_path), f"nanochat,{tmp_path}")
    before = [keys(world) for world in worlds]
    (tmp_path / "a.txt").write_text("two")
    after = [keys(world) for world in worlds]
    for stage in ("data", "mid_train", "chat_sft"):
        assert len({of[stage] for of in before}) == len(worlds)
        assert [a[stage] != b[stage] for a, b in zip(after, before, strict=True)] == [False, False, True, True]


def test_data_dir_and_dataset_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="unset one"):
        Settings.from_env({"DATASET": "demo", "DATA_DIR": str(tmp_path)})


def test_shards_hold_the_tokens_of_the_budget():
    assert count_shards(1) == 1
    # 220 million tokens are a little over a thousand million characters.
    assert count_shards(220e6) == 5


def test_every_equal_card_trains_unless_nproc_says_otherwise():
    assert choose_profile(Settings(), 2).nproc == 2
    assert choose_profile(Settings(nproc=1), 2).nproc == 1
    assert choose_profile(Settings(profile="d20"), 4).nproc == 4
    assert choose_profile(Settings(profile="demo"), 2).nproc == 1


@pytest.mark.parametrize("nproc", [1, 2, 3, 5, 6, 7, 8, 16, 17])
@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_batches_divide_for_any_number_of_processes(profile, nproc):
    fitted = fit_batches(replace(profile, nproc=nproc))
    T = profile.max_seq_len
    assert fitted.mid_batch_size % (fitted.device_batch_size * T * nproc) == 0
    assert fitted.sft_batch_size % (fitted.sft_rows * T * nproc) == 0
    smallest = T * nproc  # a row per process
    assert fitted.mid_batch_size <= max(1.5 * profile.mid_batch_size, smallest)
    assert fitted.mid_batch_size >= 0.5 * profile.mid_batch_size


def test_two_t4s_train_the_preset_with_its_own_batches():
    profile = choose_profile(Settings(), 2)
    assert (profile.device_batch_size, profile.mid_batch_size, profile.sft_batch_size) == (8, 32768, 32768)


def test_a_profile_is_not_changed_by_choosing():
    before = replace(CPU)
    choose_profile(Settings(dataset="climbmix", depth=9), 0)
    assert before == CPU


def test_the_demo_takes_as_many_steps_as_its_minutes_have_room_for():
    def fitted(slower, hours=None):
        return fit_steps(replace(DEMO, hours=hours), DEMO.seconds, slower * DEMO.step_seconds)

    quick, measured, slow = fitted(0.8), fitted(1), fitted(10)
    assert all(quick.steps[stage] > measured.steps[stage] > DEMO.steps[stage] for stage in DEMO.steps)
    for profile in (quick, measured):
        assert sum(profile.seconds.values()) == pytest.approx(300, rel=0.02)
    # A slow machine takes longer, and learns as much.
    assert slow.steps == DEMO.steps
    assert sum(slow.seconds.values()) == pytest.approx(10 * sum(DEMO.seconds.values()))
    # HOURS are kept either way, as far as there is time to train at all.
    assert sum(fitted(1, hours=0.5).seconds.values()) == pytest.approx(1800, rel=0.02)
    assert sum(fitted(2, hours=0.05).seconds.values()) == pytest.approx(180, rel=0.1)
    assert set(fitted(10, hours=0.001).steps.values()) == {10, 20}
    # What is not run gets no time of it.
    base = fit_steps(replace(DEMO, hours=0.5), ["report_reset", "data", "base_train", "report"], DEMO.step_seconds)
    assert list(base.steps) == ["base_train"]
    assert base.steps["base_train"] > 2 * fitted(1, hours=0.5).steps["base_train"]
    assert sum(base.seconds.values()) == pytest.approx(1800, rel=0.02)
    # A machine ten times as fast is done sooner.
    assert fitted(0.1).steps == {stage: 3 * steps for stage, steps in DEMO.steps.items()}


def test_a_run_that_goes_on_has_the_steps_that_it_began_with(tmp_path):
    path = tmp_path / "pipeline" / "steps.json"
    path.parent.mkdir()
    first = with_steps(DEMO, DEMO.seconds, path, lambda: DEMO.step_seconds)
    assert first.steps != DEMO.steps
    again = with_steps(DEMO, DEMO.seconds, path, lambda: pytest.fail("was timed before"))
    assert (again.steps, again.seconds) == (first.steps, first.seconds)
    other = with_steps(replace(DEMO, hours=0.5), DEMO.seconds, path, lambda: DEMO.step_seconds)
    assert other.steps["chat_sft"] > first.steps["chat_sft"]


def test_a_demo_in_hours_trains_by_steps_as_long_as_it_is_told_to(tmp_path):
    profile = fit_steps(choose_profile(Settings(profile="demo", hours=1.0), 0), DEMO.seconds, DEMO.step_seconds)
    flags = {stage.name: stage.flags for stage in make_stages(profile, Settings(), tmp_path)}
    for stage, steps in profile.steps.items():
        assert steps > 10 * DEMO.steps[stage]
        assert f"--num_iterations={steps}" in flags[stage]
        assert not any(flag.startswith("--hours") for flag in flags[stage])
    # A card's speed is not timed beforehand: there the clock counts.
    card = choose_profile(Settings(profile="demo", hours=1.0), 1)
    assert card.stage_hours("base_train") == 1.0
    assert "--hours=1" in make_stages(card, Settings(), tmp_path)[4].flags


def test_where_text_does_not_end_a_cpu_trains_the_width_for_its_hours_and_the_model_carries_text(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "in_rust", lambda: True)

    def made(dataset="climbmix", **more):
        settings = Settings(dataset=dataset, data_dir=None if dataset else tmp_path, **more)
        profile = choose_profile(settings, 0)
        base = next(stage for stage in make_stages(profile, settings, tmp_path, 1) if stage.trains)
        return profile.model_config, base.flags

    for hours, channels, heads in ((0.1, 128, 1), (None, 192, 2), (1.0, 256, 2), (24.0, 256, 2)):
        config, flags = made(hours=hours)
        assert (config.n_embd, config.n_head, config.window_pattern) == (channels, heads, "SSSL")
        expected = {"--window_pattern=SSSL", "--recall=16000000", "--separate_documents=True", "--max_seq_len=2048"}
        assert expected | {"--reach=1024", "--eval_every=100"} <= set(flags)
    with monkeypatch.context() as patch:  # where nothing was compiled, looking up would take longer than learning
        patch.setattr(profiles, "in_rust", lambda: False)
        assert made()[0].n_embd == 256
        assert not choose_profile(Settings(dataset="climbmix"), 0).switches
    # A model that goes on is what it is; own text, a depth that is asked for, and other programs carry none.
    assert not choose_profile(Settings(dataset="climbmix", base="d4"), 0).switches
    for config, flags in (made(dataset=None), made(depth=4), made(recipe="portable")):
        assert config.n_embd == 256
        assert not any(flag.startswith(("--window_pattern", "--recall", "--aspect", "--separate")) for flag in flags)
