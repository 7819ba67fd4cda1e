"""The plan of a pretraining run: what the recipes derive, what flags override, and a run of each."""

import json
from dataclasses import asdict, fields

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.config import parse_config
from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig
from nanochat.plan.local_speed import hours_sentence
from nanochat.recipe import MODERN, PRESETS
from nanochat.train.pretrain import make_plan
from nanochat.train.pretrain_config import Architecture
from scripts.base_train import Config, main


def plan_of(*flags, vocab_size=32768, **settings):
    return make_plan(parse_config(Config, list(flags)), vocab_size, 1, **settings)


def test_classic_is_nanochats():
    plan = plan_of("--depth=20", "--recipe=classic", vocab_size=65536)
    assert plan.batch.total_tokens == 524288
    assert plan.num_params == 560_988_160
    assert plan.schedule.num_iterations == 21400
    assert plan.model.to_dict().items() >= {"smear": False, "window_pattern": "L", "qk_scale": 1.0}.items()
    assert (plan.rates.matrix_lr, plan.schedule.warmdown_ratio, plan.schedule.final_lr_frac) == (0.02, 0.2, 0.0)


def test_modern_at_its_reference_is_nanochats():
    plan = plan_of("--depth=12", "--recipe=modern")
    assert plan.model.to_dict().items() >= NANOCHAT_2026.items()
    assert plan.batch.total_tokens == 524288
    assert plan.rates.weight_decay == pytest.approx(0.28)
    assert plan.schedule.num_iterations == 2520
    s = plan.schedule
    assert (s.warmup_steps, s.warmdown_ratio, s.final_lr_frac, s.decay_to_zero) == (40, 0.65, 0.05, True)


def test_a_small_budget_takes_smaller_batches_and_rows_that_divide_them():
    flags = ["--depth=4", "--recipe=modern", "--target_flops=1e14", "--max_seq_len=512", "--device_batch_size=100"]
    plan = plan_of(*flags)
    assert plan.batch.total_tokens < 2**17
    assert plan.batch.device_batch_size <= 100
    assert plan.rates.matrix_lr < 0.02
    config = parse_config(Config, flags)
    decided = {"horizon_tokens": plan.horizon_tokens, "total_batch_size": plan.batch.total_tokens}
    assert make_plan(config, 32768, 1, **decided) == plan  # as a resume makes it: rows that divide the batch again
    timed = plan_of("--depth=4", "--recipe=modern", "--hours=1", tflops=lambda: 0.1)
    faster = plan_of("--depth=4", "--recipe=modern", "--hours=1", tflops=lambda: 100.0)
    assert timed.batch.total_tokens < faster.batch.total_tokens
    again = plan_of("--depth=4", "--recipe=modern", "--hours=1", horizon_tokens=timed.horizon_tokens)
    assert again == timed


def test_flags_go_before_the_recipe():
    flags = ("--matrix_lr=0.5", "--weight_decay=0", "--warmdown_ratio=0.1", "--smear=False", "--window_pattern=SL")
    plan = plan_of("--depth=4", "--recipe=modern", "--total_batch_size=65536", "--num_iterations=9", *flags)
    assert plan.batch.total_tokens == 65536
    assert (plan.rates.matrix_lr, plan.rates.weight_decay, plan.schedule.warmdown_ratio) == (0.5, 0.0, 0.1)
    assert (plan.model.smear, plan.model.window_pattern, plan.model.backout) == (False, "SL", True)
    assert plan.schedule.num_iterations == 9
    assert plan.rates.embedding_lr == pytest.approx(MODERN.embedding_lr * 0.125**0.5)
    with pytest.raises(ValueError, match="n_kv_head"):
        plan_of("--depth=4", "--n_kv_head=3")


def test_every_switch_of_the_model_is_a_flag_with_a_help_text(capsys):
    switches = {f.name: f.metadata["help"] for f in fields(GPTConfig) if f.metadata}
    assert list(switches) == list(asdict(Architecture()))
    assert {f.name for f in fields(GPTConfig)} - set(switches) == {
        *("sequence_len", "vocab_size", "n_layer", "n_head", "n_embd", "document_start")
    }
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help_all"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(text in said for text in switches.values())
    assert Architecture().given() == {}
    assert plan_of("--depth=4", "--logit_softcap=0").model.logit_softcap is None
    assert plan_of("--depth=4", "--recipe=portable", "--logit_softcap=20").model.logit_softcap == 20.0
    given = parse_config(Config, ["--init=modern", "--qk-scale=2", "--smear=False", "--n_kv_head=1"])
    assert given.architecture.given() == {"init": "modern", "qk_scale": 2.0, "smear": False, "n_kv_head": 1}
    with pytest.raises(SystemExit):
        parse_config(Config, ["--init=lucky"])


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"Rain {name} {i} fills the rivers. " * 30}) for i in range(40)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_run_of_each_recipe(recipe, tiny_tokenizer, base_dir, text):
    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--depth=2", "--max_seq_len=64", "--device_batch_size=4", "--total_batch_size=256", "--num_iterations=12"]
    flags += ["--eval_tokens=256", "--sample_every=0", f"--data_dir={text}", f"--recipe={recipe}", "--device_type=cpu"]
    flags += ["--activation_checkpointing", "--compile=off", "--short_rows_ratio=0.3"]
    main(parse_config(Config, flags))
    folder = base_dir / "base_checkpoints" / "d2"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    meta = load_checkpoint(folder).meta
    assert meta["model_config"]["smear"] == (recipe in ("small", "modern"))
    assert meta["model_config"]["logit_softcap"] == (None if recipe == "portable" else 15.0)
    assert torch.isfinite(torch.tensor(losses)).all()


def test_half_a_run_of_a_version_without_these_settings_goes_on(tiny_tokenizer, base_dir, text, monkeypatch):
    from nanochat.train.trainer import Trainer

    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--depth=2", "--max_seq_len=64", "--device_batch_size=4", "--total_batch_size=256", "--num_iterations=9"]
    flags += ["--eval_tokens=256", "--sample_every=0", f"--data_dir={text}", "--device_type=cpu", "--compile=off"]
    original = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self: (self.state.step == 7 and 1 / 0) or original(self))
        with pytest.raises(ZeroDivisionError):
            main(parse_config(Config, [*flags, "--save_every=3"]))
    folder = base_dir / "base_checkpoints" / "d2"
    half = load_checkpoint(folder)
    for name in ("document_start", "recall", "reach"):
        del half.meta["model_config"][name]
    save_checkpoint(folder, 6, half.model, half.optimizer, half.meta)
    main(parse_config(Config, [*flags, "--save_every=3"]))
    assert load_checkpoint(folder).meta["model_config"]["document_start"] == -1


def test_a_run_whose_model_looks_up_its_text_goes_on_where_it_was(tiny_tokenizer, base_dir, text, monkeypatch):
    """Killed half-way it ends with the same weights as a run that was not; the text is in its checkpoint."""
    from nanochat.train.trainer import Trainer

    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--depth=2", "--max_seq_len=64", "--device_batch_size=4", "--total_batch_size=256", "--num_iterations=12"]
    flags += ["--eval_tokens=256", "--sample_every=0", f"--data_dir={text}", "--device_type=cpu", "--compile=off"]
    flags += ["--recall=2000", "--separate_documents=True", "--save_every=3", "--mean_weights=True", "--eval_every=4"]
    main(parse_config(Config, flags))
    original = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self: (self.state.step == 7 and 1 / 0) or original(self))
        with pytest.raises(ZeroDivisionError):
            main(parse_config(Config, [*flags, "--model_tag=killed"]))
    for other in ("--recall=3000", "--separate_documents=False"):  # what can't be changed is not left out silently
        with pytest.raises(ValueError, match="another shape"):
            main(parse_config(Config, [*flags, "--model_tag=killed", "--force", other]))
    main(parse_config(Config, [*flags, "--model_tag=killed"]))
    whole, killed = (load_checkpoint(base_dir / "base_checkpoints" / tag) for tag in ("d2", "killed"))
    config = whole.meta["model_config"]
    assert 1 < config["recall"] <= 2000
    assert config["document_start"] == tiny_tokenizer.get_bos_token_id()
    assert whole.model.keys() == killed.model.keys()
    assert all(torch.equal(value, killed.model[name]) for name, value in whole.model.items())
    assert whole.model["recall.text"].numel() == config["recall"]
    assert sorted(whole.model["recall.order"].tolist()) == list(range(config["recall"] - 1))


def test_without_a_softcap_float16_learns_like_float32(tiny_tokenizer, base_dir, text, capsys):
    """Nothing bounds the logits of portable: the loss scaler still finds every gradient finite."""
    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--depth=2", "--max_seq_len=64", "--device_batch_size=4", "--total_batch_size=256", "--num_iterations=20"]
    flags += ["--eval_tokens=256", "--sample_every=0", f"--data_dir={text}", "--recipe=portable", "--device_type=cpu"]
    losses = {}
    for dtype in ("float32", "float16"):
        main(parse_config(Config, [*flags, f"--dtype={dtype}", f"--model_tag={dtype}", "--compile=off"]))
        lines = (base_dir / "base_checkpoints" / dtype / "metrics.jsonl").read_text().splitlines()
        records = [r for r in map(json.loads, lines) if "loss" in r]
        assert sum(r.get("skipped", 0) for r in records) <= 2  # the scale is tried out at the start
        losses[dtype] = [r["loss"] for r in records]
    assert losses["float16"] == pytest.approx(losses["float32"], abs=0.05)
    assert "--pattern=runtimes" in capsys.readouterr().out  # this tokenizer has nanochat's pattern


def test_what_keeps_a_portable_model_from_other_programs_is_said_before_it_is_trained(base_dir, capsys):
    flags = ["--recipe=portable", "--depth=1", "--max_seq_len=64", "--device_type=cpu", "--dry_run"]
    for more, lacking in (([], ""), (["--separate_documents=True"], ""), (["--recall=99", "--reach=9"], "recall=99")):
        main(parse_config(Config, [*flags, *more]))
        said = [line for line in capsys.readouterr().out.splitlines() if "llama.cpp" in line]
        assert len(said) == bool(lacking)
        assert not lacking or f"these lack {lacking}, reach=9" in said[0]


def test_minus_one_switches_off_as_zero_does(base_dir, text, tiny_tokenizer):
    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--depth=1", "--max_seq_len=32", "--total_batch_size=64", "--device_batch_size=2", "--num_iterations=4"]
    flags += ["--device_type=cpu", "--eval_tokens=64", f"--data_dir={text}", "--compile=off"]
    losses = []
    for off in ("0", "-1"):
        names = ("eval_every", "sample_every", "save_every", "keep_every", "grad_clip", "save_every_minutes")
        main(parse_config(Config, [*flags, *(f"--{name}={off}" for name in names), f"--model_tag=off{off}"]))
        folder = base_dir / "base_checkpoints" / f"off{off}"
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len([r for r in records if "val_bpb" in r]) == 1
        losses.append([r["loss"] for r in records if "loss" in r])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_iterations": 0}, "num_iterations must be positive"),
        ({"target_param_data_ratio": 0}, "target_param_data_ratio must be positive"),
        ({"short_rows_ratio": 7}, "from 0 to 1"),
        ({"short_rows_ratio": 0.5, "max_seq_len": 62}, "max_seq_len=62 has none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        Config(**settings)


def test_more_processes_go_on_with_the_batch_of_the_start(base_dir, text, tiny_tokenizer, monkeypatch):
    """The batch of a horizon is rounded to what the processes share; a resume by others must not change the run."""
    import nanochat.train.pretrain as script
    from nanochat.train.trainer import Trainer

    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--depth=1", "--max_seq_len=64", "--num_iterations=6", "--device_type=cpu", "--eval_tokens=64"]
    flags += [f"--data_dir={text}", "--compile=off", "--save_every=2", "--sample_every=0"]
    original = Trainer.train_step

    def killed(self):
        if self.state.step == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        main(parse_config(Config, flags))
    monkeypatch.setattr(Trainer, "train_step", original)
    folder = base_dir / "base_checkpoints" / "d1"
    batch = load_checkpoint(folder).meta["total_batch_size"]
    plans = script.make_plan

    def as_if_more_ranks(cfg, *args, total_batch_size=None, **kwargs):
        return plans(cfg, *args, total_batch_size=total_batch_size or 2 * batch, **kwargs)

    monkeypatch.setattr(script, "make_plan", as_if_more_ranks)
    main(parse_config(Config, flags))
    meta = load_checkpoint(folder).meta
    assert (meta["total_batch_size"], meta["state"]["step"], meta["state"]["tokens"]) == (batch, 6, 6 * batch)


def test_a_run_of_counted_steps_says_its_hours(capsys):
    plan = plan_of("--depth=12", "--device_batch_size=8", "--total_batch_size=32768", "--recipe=classic")
    flops = plan.schedule.num_iterations * 32768 * plan.flops_per_token
    hours = flops / 4e12 / 3600
    assert hours > 100  # the night that a guide promises is not enough for the recipe's horizon
    sentence = hours_sentence(flops, 4.0)
    assert f"about {hours:,.3g} hours" in sentence
    assert "--hours" in sentence


def test_going_on_from_a_model_keeps_its_shape_and_what_it_knows(base_dir, text, tiny_tokenizer, monkeypatch):
    from nanochat.train.trainer import Trainer

    tiny_tokenizer.save(base_dir / "tokenizer")
    flags = ["--device_batch_size=4", "--total_batch_size=256", "--eval_tokens=256", "--sample_every=0"]
    flags += [f"--data_dir={text}", "--device_type=cpu", "--compile=off", "--num_iterations=12", "--save_every=3"]
    first = ["--depth=2", "--max_seq_len=64", "--recipe=portable", "--aspect_ratio=32"]
    main(parse_config(Config, [*flags, *first]))
    start = load_checkpoint(base_dir / "base_checkpoints" / "d2")

    original, more = Trainer.train_step, [*flags, "--init_from=d2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self: (self.state.step == 7 and 1 / 0) or original(self))
        with pytest.raises(ZeroDivisionError):
            main(parse_config(Config, more))
    folder = base_dir / "base_checkpoints" / "d2-more"
    assert load_checkpoint(folder).meta["state"]["step"] == 6
    save_checkpoint(base_dir / "base_checkpoints" / "other", 3, start.model, None, start.meta)
    with pytest.raises(ValueError, match="init_from: d2 -> other"):  # half a run of another model is not gone on with
        main(parse_config(Config, [*more, "--init_from=other", "--model_tag=d2-more"]))
    main(parse_config(Config, more))
    ended = load_checkpoint(folder).meta
    assert ended["model_config"] == start.meta["model_config"]
    assert (ended["config"]["recipe"], ended["config"]["lr_scale"], ended["config"]["depth"]) == ("portable", 0.3, 2)
    losses = [
        [r["loss"] for r in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
        for path in (start.folder.parent, folder)
    ]
    assert len(losses[1]) == 12
    assert losses[1][0] < losses[0][0] - 0.3  # from what it has learned, not from nothing


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--depth=3", "--depth contradicts --init_from=d1, whose model has 1 layers"),
        ("--aspect_ratio=32", "--aspect_ratio contradicts"),
        ("--head_size=64", "--head_size contradicts"),
        ("--vocab_size=999", "--vocab_size contradicts"),
        ("--smear=False", "--smear contradicts"),
        ("--max_seq_len=64", "has a context of 32"),
        ("--model_tag=d1", "choose another name"),
        ("--init_from=d7", "no base checkpoint with tag 'd7'"),
        ("--init_from=/no/where", "there is no such folder"),
        ("--init_from=.nowhere", "there is no such folder"),
    ],
)
def test_what_contradicts_the_model_to_go_on_from_is_refused_by_name(flag, complaint, base_dir, tiny_tokenizer):
    config = GPTConfig.from_depth(1, tiny_tokenizer.get_vocab_size(), 32, smear=True)
    meta = {"model_config": config.to_dict(), "complete": True}
    save_checkpoint(base_dir / "base_checkpoints" / "d1", 5, GPT(config).state_dict(), None, meta)
    with pytest.raises((ValueError, FileNotFoundError), match=complaint):
        main(parse_config(Config, ["--init_from=d1", "--dry_run", "--device_type=cpu", flag]))
