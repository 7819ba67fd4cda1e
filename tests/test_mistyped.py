"""On top of a finished run, what is mistyped costs nothing: after each mistake the models still have their tags."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.checkpoint.format import read_meta, saved_steps, step_folder, weights_hash
from nanochat.checkpoint_manager import checkpoint_folder, load_model
from nanochat.config import run_script
from nanochat.engine import Engine
from nanochat.files import sha256_file
from nanochat.stages import TRAINED
from nanochat.train.trainer import Trainer
from scripts import base_train, chat_rl, chat_sft, mid_train, tok_train

CPU = ["--device_type=cpu", "--dtype=float32", "--resume=never"]
BASE = [*CPU, "--depth=1", "--aspect_ratio=32", "--max_seq_len=128", "--eval_tokens=256", "--sample_every=0"]
BASE += ["--model_tag=t", "--num_iterations=2", "--device_batch_size=2", "--total_batch_size=256"]
STAGE = [*CPU, "--model_tag=t", "--num_iterations=2", "--device_batch_size=2", "--total_batch_size=256"]
RL = [*CPU, "--model_tag=t", "--num_iterations=1", "--task=DemoWordSums", "--examples_per_step=2", "--num_samples=2"]
RL += ["--max_new_tokens=4", "--eval_examples=2", "--eval_samples=1"]
COMMANDS = {
    "base": (base_train, BASE),
    "mid": (mid_train, [*STAGE, "--eval_batches=1"]),
    "sft": (chat_sft, [*STAGE, "--eval_batches=1"]),
    "rl": (chat_rl, RL),
    "tok": (tok_train, ["--vocab_size=300"]),
}
# The command, and what is wrong: of the same flag given twice the last counts. {…}: paths, see `files`.
MISTAKES = [
    ("base", "--depth=0"),
    ("base", "--depth=-4"),
    ("base", "--depth=four"),
    ("base", "--depht=4"),
    ("base", "--aspect_ratio=4000000 --device_batch_size=auto"),  # more than any memory
    ("base", "--num_iterations=0"),
    ("base", "--num_iterations=1.5"),
    ("base", "--max_seq_len=1"),
    ("base", "--max_seq_len=0"),
    ("base", "--total_batch_size=300"),
    ("base", "--device_batch_size=0"),
    ("base", "--dtype=float8"),
    ("base", "--device_type=tpu"),
    ("base", "--recipe=clasic"),
    ("base", "--warmup_ratio=0.9 --warmdown_ratio=0.9"),
    ("base", "--warmup_steps=-1"),
    ("base", "--keep_last=0"),
    ("base", "--hours=-1"),
    ("base", "--short_rows_ratio=2"),
    ("base", "--tracker=wandbb --run=x"),
    ("base", "--packing=best"),
    ("base", "--dataset=climbmixx"),
    ("base", "--data_dir={missing}"),
    ("base", "--data_dir={empty}"),
    ("base", "--data_dir={broken}"),
    ("base", "--data_dir={texts} --token_cache=maybe"),
    ("base", "--final_lr_frac=nan"),
    ("base", "--matrix_lr=-1"),
    ("base", "--embedding_lr=inf"),
    ("base", "--grad_clip=-0.5"),
    ("base", "--eval_tokens=0"),
    ("base", "--lr_scale=-1"),
    ("base", "--hours=inf --num_iterations=-1"),
    ("base", "--hours=1e308 --num_iterations=-1"),
    ("base", "--target_flops=inf --num_iterations=-1"),
    ("base", "--target_param_data_ratio=1e300 --num_iterations=-1"),
    ("base", "--embedding_lr=1e30"),
    ("base", "--matrix_lr=200"),
    ("base", "--qk_scale=inf"),
    ("base", "--logit_softcap=nan"),
    ("base", "--seed=99999999999999999999"),
    ("base", "--weight_decay=nan"),
    ("base", "--model_tag=../x"),
    ("base", "--model_tag=a/b"),
    ("base", "--model_tag=.t"),
    ("base", "--model_tag="),
    ("mid", "--init_lr_frac=-1"),
    ("mid", "--final_lr_frac=-1"),
    ("sft", "--weight_decay=-1"),
    ("sft", "--hours=1e308 --num_iterations=-1"),
    ("sft", "--grad_clip=nan"),
    ("sft", "--lora_rank=2 --lora_lr=nan"),
    ("rl", "--kl=nan"),
    ("rl", "--kl=inf"),
    ("rl", "--device_batch_size=0"),
    ("rl", "--temperature=nan"),
    ("rl", "--init_lr_frac=-0.1"),
    ("mid", "--chat_data={missing}"),
    ("mid", "--chat_data={torn}"),  # every line; a single one is left out, and counted
    ("mid", "--step=99"),
    ("mid", "--model_tag=d99"),
    ("mid", "--total_batch_size=100"),
    ("mid", "--max_seq_len=1"),
    ("mid", "--eval_batches=two"),
    ("sft", "--chat_data={long}"),
    ("sft", "--chat_data={empty}"),
    ("sft", "--eval_batches=0"),
    ("sft", "--lora_rank=0"),
    ("sft", "--last_layers=0"),
    ("sft", "--lora_rank=999"),
    ("sft", "--lora_rank=2 --last_layers=1"),
    ("sft", "--last_layers=9"),
    ("sft", "--num_epochs=0"),
    ("sft", "--max_epochs=0"),
    ("sft", "--supervise=user"),
    ("sft", "--resume=maybe"),
    ("rl", "--task=chess"),
    ("rl", "--task=GSM8K"),  # no data here
    ("rl", "--num_samples=1"),
    ("rl", "--examples_per_step=0"),
    ("rl", "--clip=2"),
    ("rl", "--temperature=0"),
    ("rl", "--updates_per_rollout=2"),
    ("rl", "--eval_examples=0"),
    ("rl", "--source=base"),
    ("tok", "--vocab_size=200"),
    ("tok", "--max_chars=0"),
    ("tok", "--data_dir={missing}"),
    ("tok", "--data_dir={broken}"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A finished run of all stages, and the files that mistakes name."""
    folder = tmp_path_factory.mktemp("mistyped")
    (folder / "texts").mkdir()
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    lines = [
        json.dumps({"text": f"Rivers carry water to the sea, and rain fills river {i} again."}) for i in range(300)
    ]
    for name in ("a", "b"):
        (folder / "texts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "broken" / "a.parquet")
    (folder / "broken" / "a.parquet").write_bytes((folder / "broken" / "a.parquet").read_bytes()[:-9])

    def chats(name, answers):
        turns = [[{"role": "user", "content": "Say it."}, {"role": "assistant", "content": text}] for text in answers]
        (folder / name).write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
        return folder / name

    good = chats("good.jsonl", [f"Here is {i}." for i in range(60)])
    (folder / "torn.jsonl").write_text("".join(line[:-20] + "\n" for line in good.read_text().splitlines()))
    places = {name: folder / name for name in ("texts", "empty", "broken", "missing")}
    places |= {"torn": folder / "torn.jsonl", "good": good}
    places["long"] = chats("long.jsonl", ["word " * 200 for _ in range(60)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        for name in ("tok", "base", "mid", "sft", "rl"):
            assert run(name, "", places) == 0
    return places


def run(name, flags, files):
    """Run a stage's command with these flags besides; returns its exit code."""
    script, own = COMMANDS[name]
    data = {"tok": ["--data_dir={texts}"], "base": ["--data_dir={texts}"], "rl": []}.get(name, ["--chat_data={good}"])
    more = [] if any(flag in flags for flag in ("--data", "--chat_data")) else data
    try:
        run_script(script.main, script.Config, [*own, *(flag.format(**files) for flag in [*more, *flags.split()])])
    except SystemExit as stop:
        return stop.code
    return 0


def state(base):
    """The weights behind each tag, and the tokenizer."""
    found = {"tokenizer": sha256_file(base / "tokenizer" / "tokenizer.json")}
    for source in TRAINED:
        folder = checkpoint_folder(source, "t")
        found[source] = weights_hash(step_folder(folder, saved_steps(folder)[-1]))
    return found


def answers(source):
    """Whether the model of a stage says something under its tag."""
    model, tokenizer, _ = load_model(source, torch.device("cpu"), model_tag="t")
    sequences, _ = Engine(model, tokenizer).generate_prompts([tokenizer.encode("Hi", prepend="<|bos|>")], max_tokens=4)
    return len(sequences[0]) > 2


@pytest.fixture
def base(files, monkeypatch):
    """The finished run's base dir."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(files["texts"].parent / "base"))
    return files["texts"].parent / "base"


@pytest.mark.parametrize(("name", "flags"), MISTAKES, ids=[" ".join(mistake) for mistake in MISTAKES])
def test_a_mistake_costs_no_model(files, base, capsys, name, flags):
    before = state(base)
    assert run(name, flags, files) in (1, 2)
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ")
    assert not any("Traceback" in line for line in said)
    assert state(base) == before
    assert name == "tok" or answers(name)


@pytest.mark.parametrize("name", ["base", "mid", "sft", "rl"])
def test_a_run_that_dies_in_its_first_step_costs_no_model(files, base, monkeypatch, name):
    def dies(self):
        raise RuntimeError("out of luck")

    before = state(base)
    monkeypatch.setattr(Trainer, "train_step", dies)
    assert run(name, "--num_iterations=9", files) == 1
    assert state(base) == before
    assert answers(name)
    folder = checkpoint_folder(name, "t").parent
    assert [entry for entry in os.listdir(folder) if not entry.endswith(".lock")] == ["t"]


def test_another_tokenizer_costs_no_model(files, base, capsys):
    before, own = state(base), (base / "tokenizer" / "tokenizer.json").read_bytes()
    try:
        assert run("tok", "--vocab_size=290", files) == 0  # as large as a user wants it, by mistake
        after = state(base)
        assert after.pop("tokenizer") != before.pop("tokenizer")
        assert after == before
        assert all(answers(name) for name in COMMANDS if name != "tok")
        assert "it is kept as" in capsys.readouterr().out.lower()
        # Going on from a model needs the model's own tokenizer, in training and in evaluation.
        assert run("mid", "--num_iterations=1 --model_tag=t", files) == 0
        meta = read_meta(step_folder(checkpoint_folder("mid", "t"), 1))
        assert meta["tokenizer_hash"] == load_model("base", torch.device("cpu"), model_tag="t")[1].hash
    finally:
        (base / "tokenizer" / "tokenizer.json").write_bytes(own)
