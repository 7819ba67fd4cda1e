"""Mid-training and SFT end to end on a tiny model: steps, schedule, resume, LoRA, samples, nothing lost silently."""

import json
from dataclasses import replace

import pytest
import torch

from nanochat import common
from nanochat.checkpoint_manager import checkpoint_folder, load_checkpoint, load_model, save_checkpoint
from nanochat.common import get_base_dir, setup_compute
from nanochat.config import Runtime, parse_config, run_script
from nanochat.files import read_json, write_record
from nanochat.recipe import PRESETS
from nanochat.report import get_report
from nanochat.train.finetune import MID, SFT, Conversations, DataBudget, FinetuneConfig, finetune, plan_budget
from nanochat.train.stage import find_start, prepare_model
from nanochat.train.tracking import METRICS_FILE
from nanochat.train.trainer import Trainer
from scripts import chat_sft, mid_train
from tasks.mixtures import MID_TASKS, TOKENS_EACH, conversations, mid_sizes
from tasks.sources import Rows

CPU = Runtime(device_type="cpu", dtype="float32")


def chat(n):
    """A short conversation; every seventh is too long for the context, and every eleventh nearly."""
    answer = "the answer is long " * 40 if n % 7 == 0 else f"It is {n}."
    turns = [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": answer}]
    if n % 11 == 0:
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, *turns]
    return {"messages": turns}


DATA = Conversations([chat(n) for n in range(60)], [chat(n) for n in range(60, 70)], "test")


def config(**changes):
    settings = {
        "runtime": CPU,
        "num_iterations": 6,
        "device_batch_size": 2,
        "total_batch_size": 512,
        "supervise": "assistant",
        "isolate_conversations": True,
        "eval_batches": 2,
        "eval_every": 0,
        "warmdown_ratio": 0.5,
        "final_lr_frac": 0.1,
    }
    return FinetuneConfig(**(settings | changes))


@pytest.fixture
def saved_mid(tiny_model, tiny_tokenizer):
    """The tiny model as a mid-trained checkpoint."""
    tiny_tokenizer.save(get_base_dir() / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash, "dtype": "float32"}
    save_checkpoint(checkpoint_folder("mid", "d2"), 1, tiny_model.state_dict(), None, meta)


def sft(**changes):
    finetune(SFT, config(**changes), lambda budget: DATA)
    return load_checkpoint(checkpoint_folder("sft", "d2"))


def metrics(name="loss"):
    lines = (checkpoint_folder("sft", "d2") / METRICS_FILE).read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def kill_before_step(monkeypatch, step):
    """The process dies when it is about to make this step, once."""
    original = Trainer.train_step

    def train_step(self):
        if self.state.step == step:
            monkeypatch.setattr(Trainer, "train_step", original)
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_steps_are_optimizer_steps_and_rates_follow_the_schedule_for_any_accumulation(saved_mid):
    histories = []
    for rows in (4, 2, 1):
        sft(device_batch_size=rows, resume="never")
        rates = metrics("lr_multiplier")
        assert rates == pytest.approx([1, 1, 1, 1, 0.7, 0.4])
        histories.append(metrics())
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    assert histories[0] == pytest.approx(histories[2], rel=1e-3)


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_stage_moves_parameters_as_the_base_model_was_moved(saved_mid, recipe):
    start = load_checkpoint(checkpoint_folder("mid", "d2"))
    start.meta["config"] = {"recipe": recipe}
    _, optimizer = prepare_model(config(), start, None, torch.device("cpu"))
    (muon,) = (group for group in optimizer.param_groups if group["kind"] == "muon")
    assert muon["beta2"] == PRESETS[recipe].muon.get("beta2")
    assert sft().meta["recipe"] == "classic"  # a checkpoint that says nothing


def test_a_start_from_half_a_run_is_said(saved_mid, capsys):
    half = find_start("mid", config()).checkpoint
    assert "unfinished" not in capsys.readouterr().out
    save_checkpoint(checkpoint_folder("mid", "d2"), 2, half.model, None, half.meta | {"complete": False})
    find_start("mid", config())
    assert "step_000002 (" in (out := capsys.readouterr().out)
    assert ", of an unfinished run)" in out


def test_epochs_give_the_number_of_steps(saved_mid, capsys):
    checkpoint = sft(num_iterations=None, num_epochs=2.0)
    stats = checkpoint.meta["loader"]["stats"]
    assert checkpoint.meta["step"] * 4 == stats["rows"]
    assert stats["rows"] == pytest.approx(2 * stats["rows"] / (checkpoint.meta["loader"]["epoch"] or 1), rel=0.5)
    out = capsys.readouterr().out
    assert "truncated" in out
    assert "dropped" in out


def test_no_more_epochs_than_asked_however_long_the_run(saved_mid, capsys):
    two = sft(num_iterations=None, num_epochs=2.0).meta["step"]
    assert sft(num_iterations=1000, max_epochs=2.0).meta["step"] == two
    capsys.readouterr()
    assert sft(num_iterations=None, hours=10.0, max_epochs=2.0).meta["step"] == two
    out = capsys.readouterr().out
    assert f"the run has at most {two} steps: they read the data 2 times (--max_epochs)" in out
    assert f"sft: {two} steps or 10h00m of training" in out
    assert sft(num_iterations=2, max_epochs=100.0).meta["step"] == 2


def test_every_conversation_is_packed_or_dropped_and_both_are_counted(saved_mid):
    stats = sft(num_iterations=None, num_epochs=3.0).meta["loader"]["stats"]
    epochs = (stats["conversations"] + stats["dropped"]) / len(DATA.train)
    assert epochs >= 2.5
    assert stats["dropped"] > 0
    assert stats["truncated"] > 0
    assert stats["tokens"] + stats["padding"] == stats["rows"] * 129


def test_short_context_stays_finite_and_never_meets_a_batch_without_targets(saved_mid):
    sft(max_seq_len=32, device_batch_size=1, total_batch_size=32, num_iterations=20)
    assert len(metrics()) == 20
    assert all(loss == loss and loss > 0 for loss in metrics())


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"last_layers": 1}, {"supervise": "all"}])
def test_a_killed_run_ends_with_the_same_weights(saved_mid, monkeypatch, changes):
    whole, history = sft(**changes).model, metrics()
    kill_before_step(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        sft(resume="never", save_every=3, **changes)
    part = sft(save_every=3, **changes).model
    assert metrics() == history
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_lora_changes_the_blocks_only_and_saves_a_plain_model(saved_mid, tiny_model):
    checkpoint = sft(lora_rank=2, lora_lr=0.01)
    before = tiny_model.state_dict()
    assert checkpoint.model.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], checkpoint.model[name])}
    assert changed == {name for name in before if name.startswith("transformer.h.")}
    for name in changed:
        assert torch.linalg.matrix_rank(checkpoint.model[name] - before[name], rtol=1e-4) <= 2
    assert metrics()[-1] < metrics()[0]
    model, _, _ = load_model("sft", torch.device("cpu"))
    assert model.num_params() == tiny_model.num_params()


def test_an_unfinished_lora_checkpoint_is_a_plain_model_too(saved_mid, monkeypatch):
    kill_before_step(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        sft(lora_rank=2, save_every=2)
    load_model("sft", torch.device("cpu"))


def test_last_layers_leaves_the_others(saved_mid, tiny_model):
    checkpoint, before = sft(last_layers=1), tiny_model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], checkpoint.model[name])}
    assert changed == {name for name in before if name.startswith(("transformer.h.1.", "lm_head"))}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"lora_rank": 2, "last_layers": 1}, "one of them"),
        ({"last_layers": 9}, "the model has 2 layers"),
        ({"lora_rank": 1000}, "lora_rank=1000"),
        ({"num_epochs": 0.0}, "num_epochs"),
    ],
)
def test_impossible_settings_are_refused(saved_mid, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        sft(**changes)


def test_float16_is_finite(saved_mid):
    sft(runtime=replace(CPU, dtype="float16"), num_iterations=2, total_batch_size=256)
    assert all(loss == loss for loss in metrics())


def test_answers_are_printed_before_and_after(saved_mid, capsys):
    sft()
    out = capsys.readouterr().out
    assert out.count("Who are you? ->") == 2
    assert out.index("answers before") < out.index("step 6 val_loss") < out.index("samples after 6 steps")


def test_own_data_by_either_flag(saved_mid, tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(chat(n)) + "\n" for n in range(1, 30)))
    command = ["--num_iterations=2", "--device_batch_size=1", "--total_batch_size=128", "--device_type=cpu"]
    for flag in ("--data", "--chat_data"):
        argv = [*command, f"{flag}={path}", "--eval_batches=1", "--resume=never"]
        assert parse_config(chat_sft.Config, argv).chat_data == str(path)
    run_script(chat_sft.main, chat_sft.Config, argv)
    assert load_checkpoint(checkpoint_folder("sft", "d2")).meta["chat_data"] == str(path)


def test_sft_isolates_conversations_and_mid_training_by_a_switch():
    assert chat_sft.Config().isolate_conversations
    assert chat_sft.Config().supervise == "assistant"
    assert not mid_train.Config().isolate_conversations
    assert parse_config(mid_train.Config, ["--isolate_conversations", "--supervise=assistant"]).isolate_conversations
    assert (MID.source, SFT.source) == ("base", "mid")


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [100_000, 3_000_000, 100_000_000])
@pytest.mark.parametrize("depth", [4, 12])
def test_a_mixture_fits_the_budget_in_the_same_proportions(tokens, depth):
    sizes = mid_sizes(DataBudget(tokens, depth))
    read = sum(n * TOKENS_EACH[name] for name, n in sizes.items())
    assert read == pytest.approx(tokens, rel=0.02)
    assert sizes["identity"] * TOKENS_EACH["identity"] <= tokens / 10
    assert sizes["smoltalk"] / sizes["spelling"] == pytest.approx(460_341 / 200_000, rel=0.1)
    assert ("mmlu" in sizes) == (depth >= 8)


def test_a_resumed_run_by_the_clock_reads_the_same_mixture(tiny_model, monkeypatch):
    """No two measurements of a machine are equal; the conversations of a run must be."""
    speeds = iter((1.0, 1.1, 1.2))
    monkeypatch.setattr(common, "measure_matmul", lambda *_, **__: next(speeds))
    cfg, config = FinetuneConfig(hours=1.0), tiny_model.config
    with setup_compute(Runtime(device_type="cpu")) as compute:
        first = plan_budget(cfg, config, compute)
        record = {"config": {"hours": 1.0}, "budget_tokens": first.tokens}
        assert plan_budget(cfg, config, compute) != first
        assert plan_budget(cfg, config, compute, record) == first
        assert plan_budget(FinetuneConfig(hours=2.0), config, compute, record).tokens > first.tokens


def test_of_few_conversations_a_middling_one_validates(tmp_path):
    turns = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x" * n}] for n in (900, 3, 50, 7, 20)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(messages) + "\n" for messages in turns))
    own = conversations("mid", str(path), DataBudget(None, 4))
    assert [len(c["messages"][1]["content"]) for c in own.val] == [20]
    assert len(own.train) == 4


def own(tmp_path, texts, fits=lambda conversation: True):
    """The split of conversations with these questions: (learned, held out)."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(chat_of(text)) + "\n" for text in texts))
    data = conversations("sft", str(path), DataBudget(None, 4, fits))
    return tuple([c["messages"][0]["content"] for c in part] for part in (data.train, data.val))


def chat_of(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]


def test_without_repeats_every_fiftieth_is_held_out(tmp_path):
    texts = [str(i) for i in range(120)]
    assert own(tmp_path, texts) == ([t for t in texts if t not in ("0", "50", "100")], ["0", "50", "100"])


def test_what_is_held_out_fits_and_is_not_learned_too(tmp_path, capsys):
    texts = ["who?", *(str(i) for i in range(1, 60)), *["who?"] * 60]
    learned, held_out = own(tmp_path, texts, lambda c: c["messages"][0]["content"] not in ("1", "2"))
    assert held_out == ["3", "50"]  # not the first: it is given 61 times, on purpose; nor those that don't fit
    assert learned == [t for t in texts if t not in held_out]
    assert "60 conversations are repeated" in capsys.readouterr().out
    learned, held_out = own(tmp_path, [str(i) for i in range(5)], lambda c: c["messages"][0]["content"] != "2")
    assert held_out == ["1"]
    assert len(learned) == 4
    with pytest.raises(ValueError, match=r"none of the conversations .* fits into the context"):
        own(tmp_path, ["a", "b"], lambda c: False)


def test_one_conversation_alone_is_learned_and_said(tmp_path, capsys):
    assert own(tmp_path, ["a"] * 3) == (["a"] * 3, ["a"])
    assert "learned and validated as well" in capsys.readouterr().out


def test_sft_goes_on_with_the_chats_that_its_model_has_learned(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(chat_of(text)) + "\n" for text in "abc"))
    assert conversations("sft", None, DataBudget(None, 4, chat_data=str(path))).name == str(path)
    assert conversations("sft", None, DataBudget(None, 4, chat_data="demo")).name == "demo"


def test_validation_that_cannot_fit_is_refused_before_training(saved_mid):
    data = DATA._replace(val=[chat(63), chat(70)])
    with pytest.raises(ValueError, match="kept for validation"):
        finetune(SFT, config(), lambda budget: data)
    assert not list(checkpoint_folder("sft", "d2").glob("*.jsonl"))


def test_a_batch_that_is_many_times_the_data_is_said(saved_mid, capsys):
    data = DATA._replace(train=[chat(n) for n in range(1, 5)])
    finetune(SFT, config(num_iterations=1, total_batch_size=4096), lambda budget: data)
    out = capsys.readouterr().out
    assert "a smaller --total_batch_size makes more steps" in out
    assert "each about" in out


def test_without_a_limit_the_mixture_is_whole():
    assert mid_sizes(DataBudget(None, 12)) == {**MID_TASKS, "identity": 2000}
    assert mid_sizes(DataBudget(10**12, 12)) == {**MID_TASKS, "identity": 2000}


def test_the_demo_needs_no_network():
    data = conversations("sft", "demo", DataBudget(None, 4))
    assert len(data.train) > 1000
    assert data.name == "demo"


def test_the_users_identity_replaces_the_shipped_one(base_dir):
    from tasks.mixtures import _identities

    shipped = _identities(1500)
    assert [len(task) for task in shipped] == [1000, 500]
    assert "nanochat" in str(shipped[0][0]) + str(shipped[0][5]) + str(shipped[0][9])
    path = base_dir / "identity_conversations.jsonl"
    path.write_text(json.dumps(chat(1)) + "\n")
    assert _identities(5)[0][0] == chat(1)
    path.write_text("".join(json.dumps(chat_of(str(i))) + "\n" for i in range(2500)))
    passes = _identities(5000)
    assert [len(task) for task in passes] == [2500, 2500]
    assert passes[1][2499]["messages"][0]["content"] == "2499"
    (part,) = _identities(1000)
    assert len(part) == 1000
    assert part[999]["messages"][0]["content"] == "1998"


def test_the_report_shows_held_out_chats_before_and_after(saved_mid, capsys):
    """Before is what the model said that no stage had taught these chats: SFT does not ask again."""
    chats = [
        {"messages": [{"role": "system", "content": "s"}, *chat_of("who|am\nI"), {"role": "user", "content": "x"}]},
        {"messages": [*chat_of("two")]},
    ]
    data = DATA._replace(val=Rows(chats, range(2)), own=True)
    finetune(SFT, config(), lambda budget: data)
    text = (get_report().folder / "your-chats-before-and-after.md").read_text()
    header, _, first, second = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        *("question", "answer before", "answer after", "the chat says"),
    ]
    assert first.startswith("| who/am I |")
    assert first.endswith("| a |")
    assert second.startswith("| two |")
    assert "2 held-out chats" in capsys.readouterr().out
    known = read_json(get_report().folder / "held_out_chats.json")
    known["before"] = ["from before", "from before"]
    write_record(get_report().folder / "held_out_chats.json", known)
    finetune(SFT, config(resume="never"), lambda budget: data)
    assert (get_report().folder / "your-chats-before-and-after.md").read_text().count("from before") == 2


def test_sft_records_how_its_answers_are_best_drawn(saved_mid, monkeypatch, capsys):
    """In the finished checkpoint, and only SFT: what comes before it is not asked for answers."""
    seen = []
    monkeypatch.setattr(
        "nanochat.train.finetune.choose_sampling",
        lambda engine, tokenizer, *data: seen.append(data) or {"temperature": 0.3, "top_k": 50},
    )
    before = sft(num_iterations=2).model
    assert load_checkpoint(checkpoint_folder("sft", "d2")).meta["sampling"] == {"temperature": 0.3, "top_k": 50}
    assert seen == [(DATA.val, "")]  # which teaches nothing to say instead of a guess
    assert "temperature 0.3, top_k 50" in capsys.readouterr().out
    monkeypatch.setattr("nanochat.train.finetune.choose_sampling", lambda *args: {})
    again = sft(num_iterations=2, resume="never")
    assert "sampling" not in again.meta  # nothing could be said
    assert all(torch.equal(again.model[name], tensor) for name, tensor in before.items())
