"""Damage of what a run has left is found by the first stage that uses it; the full tour is dev/damage_tour.py."""

import json
import zlib
from pathlib import Path

import pytest
from local_hub import write_shard

from dev.damage_tour import damage
from nanochat.checkpoint_manager import checkpoint_folder, save_checkpoint
from nanochat.data.shards import Entry, Manifest
from nanochat.files import ResumeLog, place_of, read_json, seal, sha256_file, unseal, write_jsonl, write_record
from nanochat.report import Report
from nanochat.report.metrics_log import MetricsLog


@pytest.fixture
def run(base_dir, tiny_model, tiny_tokenizer):
    """A base dir with something of everything that a figure depends on."""
    folder, entries = base_dir / "base_data" / "texts", []
    for i in range(3):
        path = folder / f"shard_{i:05d}.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        write_shard(path, [[f"text {i} {j}" for j in range(50)]])
        entries.append(Entry(path.name, path.stat().st_size, f"sha256:{sha256_file(path)}", rows=50))
    Manifest("urls:x", entries[:2], entries[2:]).save(folder)
    tiny_tokenizer.save(base_dir / "tokenizer")
    report = Report(base_dir / "report")
    report.reset()
    for source, section in (("base", "Base model training"), ("sft", "SFT")):
        tag = checkpoint_folder(source, "d2")
        log = MetricsLog(tag / "metrics.jsonl")
        for step in range(1, 6):
            log.append({"step": step, "loss": 1 / step + len(source), "seconds": step * 0.1})
        meta = {"model_config": tiny_model.config.to_dict(), "step": 5, "complete": True, "state": log.state()}
        save_checkpoint(tag, 5, tiny_model.state_dict(), None, meta)
        report.log(section, [{"depth": 2}, {"final": 0.25 + len(source)}], {"val bpb": 0.5 + len(source)})
        write_record(base_dir / "pipeline" / f"{source}.json", {"state": "done", "seconds": 10.5 + len(source)})
        for task in ("facts", "chat"):
            rows = [{"index": i, "question": f"{task} {i}?", "completions": [f"{source} {i}"]} for i in range(2)]
            path = base_dir / "chat_eval" / f"{source}_d2_000005" / f"{task}.jsonl"
            write_jsonl(path, [seal(row, place_of(path)) for row in rows])
    return base_dir


def test_flipped_deleted_and_swapped_files_are_found_or_change_no_figure(run):
    counts, missed = damage(run, flips=120, seed=3)
    assert missed == [], missed
    ended = {kind: sum(n for name, n in counts.items() if name.endswith(kind)) for kind in ("refused", "warning")}
    assert ended["refused"] > 30
    assert ended["warning"] > 30
    assert sum(counts.values()) > 150


def test_a_changed_digit_is_told_and_an_older_record_read(tmp_path, capsys):
    path = tmp_path / "sft.json"
    write_record(path, {"val bpb": 0.85, 1: None})
    assert read_json(path) == {"val bpb": 0.85, "1": None}
    path.write_text(path.read_text().replace("0.85", "0.58"))
    assert read_json(path) == {}
    assert f"{path} is damaged or was edited, it is left out" in capsys.readouterr().out
    path.write_text(json.dumps({"val bpb": 0.58}))
    assert read_json(path) == {"val bpb": 0.58}
    assert read_json(tmp_path / "none.json") == {}
    assert capsys.readouterr().out == ""


def test_records_of_two_places_are_not_each_others():
    assert unseal(seal({"a": 1}, "mid/facts.jsonl"), "mid/facts.jsonl")
    assert not unseal(seal({"a": 1}, "mid/facts.jsonl"), "sft/facts.jsonl")


def test_a_changed_answer_of_an_interrupted_evaluation_is_computed_again(tmp_path):
    ResumeLog(tmp_path).add([{"index": 0, "passed": True}, {"index": 1, "passed": False}])
    path = next(tmp_path.glob("*.jsonl"))
    path.write_text(path.read_text().replace("false", "true "))
    assert ResumeLog(tmp_path).records == [{"index": 0, "passed": True}]


def test_a_resumed_loss_log_knows_its_checksum(tmp_path: Path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for step in (1, 2, 3):
        log.append({"step": step})
        if step == 2:
            state = log.state()
    again = MetricsLog(tmp_path / "m.jsonl")
    again.cut(state["metrics_bytes"], 2)
    assert again.state() == state
    again.append({"step": 3})
    assert again.state() == log.state()
    assert again.crc == zlib.crc32((tmp_path / "m.jsonl").read_bytes())
