"""The ladder of dev/ablate.py: equal compute at every rung, the law through the rungs, and which gains last."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dev import ablate, ladder
from dev.fit_scaling_law import PowerLaw, power_law

TRUE = PowerLaw(floor=0.9, scale=0.5, exponent=0.25)


def test_a_power_law_is_found_again_and_says_how_sure_it_is():
    runs = [(c, TRUE.bpb(c)) for c in ablate.LADDER]
    best, others = power_law(runs, noise=0.004)
    assert (best.floor, best.scale, best.exponent) == pytest.approx((0.9, 0.5, 0.25), rel=0.01)
    predictions = [law.bpb(2.2e15) for law in others]
    assert min(predictions) < TRUE.bpb(2.2e15) < max(predictions)
    # Less noise, or more rungs, and the range is narrower.
    narrow = [law.bpb(2.2e15) for law in power_law(runs, noise=0.001)[1]]
    assert max(narrow) - min(narrow) < 0.5 * (max(predictions) - min(predictions))
    far = [law.bpb(2.2e15) for law in power_law([*runs, (2.2e15, TRUE.bpb(2.2e15))], noise=0.004)[1]]
    assert max(far) - min(far) < 0.7 * (max(predictions) - min(predictions))


def test_what_no_law_can_be_fitted_to_is_refused():
    with pytest.raises(ValueError, match="three amounts"):
        power_law([(1e13, 2.0), (1e13, 2.1), (4e13, 1.9)], noise=0.004)
    with pytest.raises(ValueError, match="did not lower"):
        power_law([(1e13, 1.5), (4e13, 1.6), (1.6e14, 1.7)], noise=0.004)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((0.01, 0.01, 0.011), "counts"),
        ((-0.01, 0.01, 0.02), "counts"),  # the lowest rung alone says nothing against it
        ((0.05, 0.03, 0.01), "shrinks"),
        ((0.05, 0.012, 0.01), "counts"),  # within the noise
        ((0.05, 0.02, -0.001), "loses"),
        ((0.05, -0.02, 0.03), "loses"),
    ],
)
def test_a_gain_counts_when_it_lasts(gains, said):
    assert ablate.verdict(gains, noise=0.004) == said


def test_the_ladder_trains_every_setting_at_every_rung_once(tmp_path, monkeypatch, capsys):
    gain = {"d4": [1.0, 1.0, 1.0], "d6": [1.05, 0.99, 0.97], "d8, half as wide": [0.9, 0.96, 0.98]}
    ran = []

    def run_one(cfg, flags):
        flops = float(flags["target_flops"])
        depth, rung = flags["depth"], ablate.LADDER.index(flops)
        ran.append((depth, flops, flags["seed"]))
        label = {"4": "d4", "6": "d6", "8": "d8, half as wide"}[depth]
        seed = {"0": 0.999, "1": 1.001}[flags["seed"]]
        figures = {"val_bpb": TRUE.bpb(flops) * gain[label][rung] * seed, "steps": 10, "tokens": 2e6, "seconds": 1.0}
        (tmp_path / "run").mkdir()
        return figures, tmp_path / "run"

    monkeypatch.setattr(ablate, "run_one", run_one)
    monkeypatch.setattr(ablate, "prepare", lambda cfg, vocab_size: (tmp_path, 4.0))
    monkeypatch.setattr(ablate, "corpus_bytes", lambda cfg: 16_000_000)
    cfg = ablate.Config(data="x", experiment="shape", ladder=True, seeds=(0, 1), only=tuple(gain))
    monkeypatch.chdir(tmp_path)
    ablate.main(cfg)
    out = capsys.readouterr().out
    assert len(ran) == len(set(ran)) == 3 * 3 * 2
    assert out.count("epochs: d4 0.50") == 3  # 2 million tokens of 4 bytes, of 16 million
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if "1e15" in line}
    assert "+5.0%, -1.0%, -3.0%: counts" in rows["d6"]
    assert "shrinks" in rows["d8, half as wide"]
    assert re.search(r"0\.9\d \+ 0\.\d\d·\(C/1e15\)", rows["d4"])
    picture = (tmp_path / "ablate.svg").read_text(encoding="utf-8")
    assert all(f">{label}</text>" in picture for label in gain)
    ablate.main(cfg)  # what is in the results file is not run again
    assert len(ran) == 18
    assert (tmp_path / "ablate.svg").read_text(encoding="utf-8") == picture


def test_the_lab_books_ladder_and_the_results_of_runs_are_drawn(tmp_path):
    runs = [
        json.loads(line) for line in (ladder.ROOT / "dev" / "ladder.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    ladder.main(ladder.Config(picture=str(tmp_path / "a.svg")))
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(f">{run['setting']}</text>" in picture for run in runs)
    own = [{**run, "flags": {"target_flops": str(run.pop("flops"))}} for run in runs]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(run) + "\n" for run in own), encoding="utf-8")
    ladder.main(ladder.Config(runs=str(tmp_path / "own.jsonl"), picture=str(tmp_path / "b.svg")))
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == picture


def test_a_run_that_was_killed_goes_on_in_its_own_folder(tmp_path, monkeypatch, capsys):
    """The folder is another one for every set of flags; when the result is written, it is that of the latest run."""
    killed, ran = [True], []

    def run_module(module, flags, base_dir, log):
        folder = base_dir / "base_checkpoints" / flags["model_tag"]
        ran.append((flags, folder.exists()))
        folder.mkdir(parents=True, exist_ok=True)
        if killed.pop() if killed else False:
            raise KeyboardInterrupt
        records = [{"loss": 1.0, "step": 1, "tokens": 9, "seconds": 1.0}, {"val_bpb": 1.0, "step": 1}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    monkeypatch.setattr(ablate, "run_module", run_module)
    monkeypatch.setattr(ablate, "prepare", lambda cfg, vocab_size: (tmp_path, 4.0))
    monkeypatch.setattr(ablate, "corpus_bytes", lambda cfg: 16_000_000)
    monkeypatch.chdir(tmp_path)
    cfg = ablate.Config(data="x", experiment="shape", flops=1e13, seeds=(0,), only=("d4", "d6"))
    with pytest.raises(KeyboardInterrupt):
        ablate.main(cfg)
    ablate.main(cfg)
    (first, was_there), (again, found), (other, found_other) = ran
    assert capsys.readouterr().out.count("goes on with the run in ") == 1
    assert (was_there, found, found_other) == (False, True, False)
    assert first == again
    assert first["model_tag"] != other["model_tag"]
    assert first.get("resume", "auto") == "auto"
    assert [folder.name for folder in (tmp_path / "base_checkpoints").iterdir()] == ["ablate"]


def test_runs_without_a_law_still_end_with_their_table():
    rungs = {
        flops: {"a": [{"val_bpb": 1.5}], "b": [{"val_bpb": 1.5 - i / 10}]} for i, flops in enumerate(ablate.LADDER)
    }
    a, b = ablate.ladder_table(rungs).splitlines()[2:]
    assert "did not lower the loss" in a
    assert "1e15" in b
    assert a.count("|") == b.count("|")


def test_a_folder_without_training_shards_is_refused_before_the_first_rung(tmp_path):
    for names, error in (((), "no parquet shards"), (("text", "text"), ""), (("body", "text"), "no column named text")):
        folder = tmp_path / "-".join(("data", *names))
        folder.mkdir()
        for i, name in enumerate(names):
            pq.write_table(pa.table({name: ["some text"] * 100}), folder / f"shard_{i}.parquet")
        cfg = ablate.Config(data=str(folder), ladder=True)
        if error:
            with pytest.raises(ValueError, match=error):
                ablate.main(cfg)
        else:
            assert ablate.corpus_bytes(cfg) > 0


def test_compute_is_given_once():
    for given in ({}, {"flops": 1e13, "ladder": True}, {"seconds": 1.0, "ladder": True}):
        with pytest.raises(ValueError, match="one of --seconds, --flops and --ladder"):
            ablate.Config(data="x", **given)
