"""Little text, read many times: how often is said before, the best weights are the model, dropout leaves no trace."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import nanochat.train.pretrain as script
from dev import ablate
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.config import parse_config
from nanochat.data.corpus import BadShardError, open_corpus
from nanochat.dataset import prepare_corpus
from nanochat.report.html import stage_view
from nanochat.report.monitor import Watcher
from nanochat.report.plots import Plotter
from nanochat.report.run_data import BestEvaluation, Run, StageRun
from nanochat.train.best_weights import BestWeights
from nanochat.train.few_texts import TextSize, add_dropout, kept_weights
from nanochat.train.tracking import TrainState
from nanochat.train.trainer import Trainer
from scripts.base_train import Config, main


@pytest.fixture
def text(tmp_path):
    """40 documents to train on, 40 to validate with, as shards."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, name in enumerate(("rain", "snow")):
        texts = [f"The {name} of day {number} fills the rivers, é. " for number in range(40)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet")
    return folder


VALUES = {3: 3.0, 6: 2.0, 9: 2.5, 12: 2.7}
FLAGS = ["--depth=1", "--max_seq_len=64", "--device_batch_size=4", "--total_batch_size=256", "--num_iterations=12"]
FLAGS += ["--device_type=cpu", "--compile=off", "--sample_every=0", "--eval_every=3", "--dropout=0.1", "--save_every=1"]


@pytest.fixture
def train(base_dir, text, tiny_tokenizer, monkeypatch):
    """Runs base_train with made-up validation values; returns its checkpoint and the weights at each evaluation."""
    tiny_tokenizer.save(base_dir / "tokenizer")
    original = Trainer.run_evaluation

    def run(tag, *more):
        at = {}

        def noted(self):
            at[self.state.step] = {name: value.clone() for name, value in self.model.state_dict().items()}
            values = iter([VALUES[self.state.step], VALUES[self.state.step] - 0.1])  # of own weights, of their mean
            monkeypatch.setattr(script, "corpus_bpb", lambda *args, **kwargs: next(values))
            original(self)

        monkeypatch.setattr(Trainer, "run_evaluation", noted)
        main(parse_config(Config, [*FLAGS, f"--data_dir={text}", f"--model_tag={tag}", *more]))
        return load_checkpoint(base_dir / "base_checkpoints" / tag), at

    return run


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def log_of(checkpoint):
    lines = (checkpoint.folder.parent / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_finished_model_has_the_best_weights(train, capsys):
    best, at = train("best")  # 12 steps are more than one epoch: so by default
    assert "has the weights of step 6 (val_bpb 2.0000); those of step 12 have 2.7000" in capsys.readouterr().out
    assert (best.meta["step"], best.meta["complete"], best.meta["val_bpb"]) == (12, True, 2.0)
    assert same(best.model, at[6])
    assert not same(best.model, at[12])
    last, at = train("last", "--keep_best=False")
    assert last.meta["val_bpb"] == 2.7
    assert same(last.model, at[12])
    assert last.meta["state"]["best_step"] == 6


def test_a_kill_after_the_best_evaluation_changes_no_bit(train, monkeypatch):
    whole, _ = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed_at(8, Trainer.train_step))
        with pytest.raises(KeyboardInterrupt):
            train("killed")
    resumed, at = train("killed")
    assert sorted(at) == [9, 12]  # the best weights are from before the kill, with dropout's random numbers after it
    assert same(whole.model, resumed.model)
    kept = ("step", "loss", "val_bpb", "train_bpb", "epoch")
    logs = [[{key: r[key] for key in kept if key in r} for r in log_of(c)] for c in (whole, resumed)]
    assert logs[0] == logs[1]


def test_with_a_mean_of_the_weights_the_model_is_the_best_mean(train, monkeypatch):
    """Evaluations see the mean too, training does not; a kill changes no bit of either."""
    original, taken = BestWeights.take, {}

    def take(self):
        original(self)
        taken[len(taken)] = dict(self._best)

    monkeypatch.setattr(BestWeights, "take", take)
    whole, own = train("mean", "--mean_weights=True")
    plain, at = train("plain", "--keep_best=False")
    assert [r["loss"] for r in log_of(whole) if "loss" in r] == [r["loss"] for r in log_of(plain) if "loss" in r]
    assert all(same(own[step], at[step]) for step in VALUES)
    assert same(whole.model, taken[1])  # of step 6
    assert not same(whole.model, own[6])
    assert whole.meta["val_bpb"] == pytest.approx(1.9)
    record = next(r for r in log_of(whole) if r["step"] == 6 and "val_bpb" in r)
    assert (record["own_val_bpb"], record["mean_val_bpb"], record["val_bpb"]) == pytest.approx((2.0, 1.9, 1.9))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed_at(8, Trainer.train_step))
        with pytest.raises(KeyboardInterrupt):
            train("killed", "--mean_weights=True")
    resumed, later = train("killed", "--mean_weights=True")
    assert sorted(later) == [9, 12]
    assert same(whole.model, resumed.model)
    assert log_of(whole)[-1]["mean_val_bpb"] == log_of(resumed)[-1]["mean_val_bpb"]


def test_the_mean_after_a_kill_is_that_of_all_steps():
    def after(model, best, steps):
        for step in steps:
            with torch.no_grad():
                model.weight.fill_(step**2)
            best.count_step(step)

    model = torch.nn.Linear(1, 1, bias=False)
    whole = BestWeights(model, mean=True)
    after(model, whole, range(1, 6))
    saved = whole.state()
    after(model, whole, range(6, 9))
    resumed = BestWeights(model, mean=True)
    resumed.resume(saved, TrainState())
    after(model, resumed, range(6, 9))
    assert torch.equal(whole.state()["mean.weight"], resumed.state()["mean.weight"])
    assert saved["mean.weight"] != whole.state()["mean.weight"]


def test_the_weights_that_are_better_are_kept_mean_or_not():
    model = torch.nn.Linear(1, 1, bias=False)
    best = BestWeights(model, mean=True)
    for step in range(1, 5):
        with torch.no_grad():
            model.weight.fill_(step)
        best.count_step(step)
    for wanted, kept in ((0.0, best.state()["mean.weight"].item()), (10.0, 4.0)):
        values = best.evaluate(lambda wanted=wanted: {"val_bpb": abs(model.weight.item() - wanted)}, "val_bpb")
        best.take()
        assert values["val_bpb"] == pytest.approx(abs(kept - wanted))
        assert best.state()["best.weight"].item() == kept
        assert model.weight.item() == 4.0


def test_the_mean_reaches_back_over_a_share_of_the_steps():
    model = torch.nn.Linear(1, 1, bias=False)
    best, values = BestWeights(model, mean=True), []
    for step in range(1, 601):
        with torch.no_grad():
            model.weight.fill_(step)
        best.count_step(step)
        with best.in_place():
            values.append(model.weight.item())
        assert model.weight.item() == step
    assert values[0] == 1.0
    assert values[299] == pytest.approx(300 * 3 / 4, rel=0.01)
    assert values[599] == pytest.approx(600 * 3 / 4, rel=0.01)


def killed_at(step, original):
    """A kill before this step; what is saved by then does not depend on how fast the disk is."""

    def train_step(self):
        if self.state.step == step:
            self.saver.save(complete=False)
            raise KeyboardInterrupt
        return original(self)

    return train_step


def test_a_checkpoint_of_before_seeks_the_best_from_there_on(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed_at(8, Trainer.train_step))
        with pytest.raises(KeyboardInterrupt):
            train("old", "--keep_best=False")
    ended, at = train("old", "--keep_best=True", "--force")
    assert same(ended.model, at[9])  # 2.5: what was better before has left no weights
    assert ended.meta["val_bpb"] == 2.5


def test_the_number_of_epochs_is_said_before_training(train, text, tiny_tokenizer, capsys):
    checkpoint, _ = train("said")
    corpus = open_corpus(text)
    documents = list(corpus.documents("train"))
    tokens = sum(len(ids) + 1 for ids in tiny_tokenizer.encode(documents))
    size = TextSize.of(corpus, tiny_tokenizer)
    assert size == TextSize(sum(len(d.encode()) for d in documents), tokens)
    out = capsys.readouterr().out
    epochs = 12 * 256 / tokens
    assert f"about {tokens:,} tokens: {epochs:.1f} epochs" in out
    assert out.index("epochs") < out.index("step 3 val_bpb")
    evaluated = [r for r in log_of(checkpoint) if "val_bpb" in r]
    assert evaluated[-1]["epoch"] == pytest.approx(epochs)
    assert size.describe(9.25, 1200.0).endswith("tokens: 9.2 epochs in 20m00s")
    assert size.describe(None, 1200.0).endswith("tokens in an epoch")


def test_the_tokens_of_much_text_are_estimated_from_its_first_megabyte(tmp_path, tiny_tokenizer, monkeypatch):
    texts = [f"{i} rivers and rain. " * 60 for i in range(2000)]
    for i in range(2):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"shard_{i:05d}.parquet", row_group_size=100)
    monkeypatch.setattr("nanochat.train.few_texts.SAMPLE_BYTES", 200_000)
    corpus = open_corpus(tmp_path)
    size, read = TextSize.of(corpus, tiny_tokenizer), sum(len(text) for text in texts)
    assert size.num_bytes == pytest.approx(read, rel=0.05)
    assert size.tokens == pytest.approx(sum(len(ids) + 1 for ids in tiny_tokenizer.encode(texts)), rel=0.05)


def test_a_shard_that_is_passed_over_in_training_is_passed_over_here(text, tiny_tokenizer):
    corpus = open_corpus(text, skip_bad_shards=True)
    (text / "shard_00000.parquet").write_bytes(b"PAR1, and then it broke off")
    assert TextSize.of(corpus, tiny_tokenizer).tokens == round(0.25 * corpus.num_bytes("train"))
    corpus.skip_bad_shards = False
    with pytest.raises(BadShardError):
        TextSize.of(corpus, tiny_tokenizer)


def test_a_document_that_is_a_whole_library_is_not_tokenized_to_be_counted(tmp_path, tiny_tokenizer, monkeypatch):
    for i in range(2):
        pq.write_table(pa.table({"text": ["rain and snow " * 100_000]}), tmp_path / f"shard_{i:05d}.parquet")
    asked = []
    monkeypatch.setattr("nanochat.train.few_texts.SAMPLE_BYTES", 1400)
    encode = tiny_tokenizer.encode
    monkeypatch.setattr(tiny_tokenizer, "encode", lambda texts: asked.extend(texts) or encode(texts))
    size = TextSize.of(open_corpus(tmp_path), tiny_tokenizer)
    assert sum(map(len, asked)) == 1400
    assert size.tokens / size.num_bytes == pytest.approx((len(encode("rain and snow " * 100)) + 1) / 1400, rel=0.01)


TEXT = TextSize(num_bytes=4_000_000, tokens=1_000_000)


def plan_of(*flags, text=TEXT):
    shape = ["--depth=2", "--max_seq_len=64", "--device_batch_size=4", "--total_batch_size=4096", "--device_type=cpu"]
    return script.make_plan(parse_config(Config, [*shape, *flags]), 512, 1, text=text)


def test_many_epochs_look_at_a_mean_of_the_weights_too(capsys):
    often, rarely, once = (
        "--num_iterations=1000",
        "--num_iterations=900",
        "--num_iterations=200",
    )  # 4.1, 3.7, 0.8 epochs
    assert plan_of(often).rates == plan_of(often, text=None).rates  # training is as ever
    assert "3.7 epochs" in plan_of(rarely).lines()[-1]

    def kept(*flags):
        return kept_weights(parse_config(Config, [*flags]), plan_of(*flags).epochs)

    assert [kept(flag) for flag in (often, rarely, once)] == [(True, True), (True, False), (False, False)]
    assert capsys.readouterr().out.count("--mean_weights") == 1  # it is said
    assert kept(often, "--keep_best=False") == (False, False)
    assert kept(often, "--mean_weights=False") == (True, False)
    assert kept(once, "--mean_weights=True") == (True, True)
    with pytest.raises(SystemExit):
        kept(often, "--mean_weights=True", "--keep_best=False")


def test_bits_per_byte_of_training_text():
    state = TrainState(step=1, tokens=500, best_step=1)
    state.smooth_loss = 0.1 * 2.0  # one step of 2 nats a token
    progress = TextSize(num_bytes=4000, tokens=1000).progress(state)
    assert progress["train_bpb"] == pytest.approx(2.0 * 1000 / 4000 / 0.693147, rel=1e-5)
    assert progress["epoch"] == 0.5


def test_dropout_is_for_training_only_and_leaves_nothing_in_the_model(tiny_model):
    idx = torch.arange(32).view(2, 16)
    names = list(tiny_model.state_dict())
    with torch.no_grad():
        for block in tiny_model.blocks:  # what begins as 0 would hide that something is dropped
            block.mlp.c_proj.weight.normal_(0, 0.1)
        expected = tiny_model.eval().hidden(idx)
        add_dropout(tiny_model, 0.5)
        assert torch.equal(tiny_model.hidden(idx), expected)
        torch.manual_seed(1)
        first = tiny_model.train().hidden(idx)
        assert not torch.allclose(first, expected)
        assert not torch.allclose(tiny_model.hidden(idx), first)
        torch.manual_seed(1)
        assert torch.equal(tiny_model.hidden(idx), first)
    assert list(tiny_model.state_dict()) == names


def test_a_run_of_before_these_flags_is_still_the_same_run():
    fresh = vars(parse_config(Config, []))
    assert [fresh[name] for name in ("dropout", "keep_best", "mean_weights")] == [None] * 3  # as where they are missing


@pytest.mark.parametrize("share", ["1", "-0.1"])
def test_a_dropout_that_means_nothing_is_refused(share):
    with pytest.raises(SystemExit):
        parse_config(Config, [f"--dropout={share}"])


# --- where it is shown ------------------------------------------------------------------------------------------------

RECORDS = [
    {"step": step, "seconds": float(step), "val_bpb": val, "train_bpb": 2.4 - step / 10, "epoch": step / 2}
    for step, val in VALUES.items()
]


def test_the_report_shows_both_curves_and_the_epoch_of_the_best(tmp_path):
    steps = [{"step": i, "loss": 3.0 - i / 10, "smooth_loss": 3.0 - i / 10} for i in range(1, 13)]
    stage = StageRun(source="base", title="Base", section={}, steps=steps, evaluations=RECORDS, meta={})
    assert stage.best == BestEvaluation(6, 2.0, 3.0)
    view = stage_view(Plotter(), Run(tmp_path, {}, []), stage)
    plots = {title: (value, svg) for title, value, svg in view["plots"]}
    value, svg = plots["Validation bits per byte"]
    assert value == "last: 2.7, best: 2 at step 6, epoch 3.0"
    assert "training text: 2.1 to 1.2" in svg
    assert "new text: 3 to 2.7, lowest 2" in svg
    assert not {"Epoch", "Train bpb"} & plots.keys()
    older = [{key: r[key] for key in ("step", "seconds", "val_bpb")} for r in RECORDS]
    stage = StageRun(source="base", title="Base", section={}, steps=steps, evaluations=older, meta={})
    (value,) = [v for title, v, _ in stage_view(Plotter(), Run(tmp_path, {}, []), stage)["plots"] if "bits" in title]
    assert value == "last: 2.7, best: 2 at step 6"


def test_the_monitor_shows_both_curves_and_the_epoch_of_the_best(base_dir):
    folder = base_dir / "base_checkpoints" / "d1"
    folder.mkdir(parents=True)
    steps = [{"step": i, "loss": 3.0, "smooth_loss": 3.0, "seconds": i, "progress": i / 20} for i in range(1, 13)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*steps, *RECORDS]))
    frame = Watcher(base_dir).look()
    assert ("best val bpb", "2 at step 6, epoch 3.0") in frame.facts
    loss, bpb = frame.curves
    assert bpb.steps == [3, 6, 9, 12]
    assert bpb.new_text == ([3, 6, 9, 12], [3.0, 2.0, 2.5, 2.7])
    assert "bits per byte of training text" in bpb.summary
    assert "loss 3 to 3" in loss.summary


# --- dev/ablate.py ----------------------------------------------------------------------------------------------------


def test_an_ablation_on_a_part_of_a_corpus_keeps_the_validation_text(tmp_path, text):
    cfg = ablate.Config(data=str(text), flops=1e9, train_bytes=1_000, work=str(tmp_path / "work"))
    part = ablate.part_of(cfg)
    train, val = ablate.shards_of(part.data)
    texts = pq.read_table(train)["text"].to_pylist()
    whole = pq.read_table(text / "shard_00000.parquet")["text"].to_pylist()
    assert texts == whole[: len(texts)]
    size = sum(len(t.encode()) for t in texts)
    assert 1_000 <= size < 1_000 + len(texts[-1].encode())
    assert val.read_bytes() == (text / "shard_00001.parquet").read_bytes()
    corpus = open_corpus(prepare_corpus(None, part.data))  # as base_train opens it: in place, with the same split
    assert list(corpus.documents("train")) == texts
    assert ablate.part_of(part) == part  # made once
    with pytest.raises(ValueError, match="less than that to train on"):
        ablate.part_of(ablate.Config(data=str(text), flops=1e9, train_bytes=10**9, work=str(tmp_path)))
