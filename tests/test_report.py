"""The report: complete, in order, and never in the way of a run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import report as report_module
from nanochat.config import run_script
from nanochat.files import read_json, write_record
from nanochat.report import Report, get_report
from nanochat.report.__main__ import Config, main
from nanochat.report.sections import SECTIONS
from nanochat.report.text import format_value, slugify, to_plain


@pytest.fixture
def report(base_dir) -> Report:
    return Report(base_dir / "report")


def table_row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_sections_come_in_pipeline_order_and_missing_stages_are_named(report, tmp_path):
    report.reset()
    for section in ("SFT", "My experiment", "Tokenizer training", "Base model training"):
        report.log(section, [{"said by": section}])
    text = report.generate(tmp_path / "copy.md").read_text(encoding="utf-8")
    assert text == (tmp_path / "copy.md").read_text(encoding="utf-8")
    headings = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["Summary", "Tokenizer training", "Base model training", "SFT", "My experiment"]
    (missing,) = [line for line in text.splitlines() if line.startswith("- Stages without a section")]
    assert missing.partition(": ")[2].split(", ") == [
        name
        for name in SECTIONS
        if name not in ("SFT", "Tokenizer training", "Base model training", "RL", "Chat evaluation rl")
    ]


def test_a_run_that_ends_with_the_base_model_lacks_no_chat_stages(report):
    report.reset()
    for section in ("Tokenizer training", "Base model training", "Base model loss", "Base model evaluation"):
        report.log(section, [])
    text = report.generate().read_text(encoding="utf-8")
    assert "- Stages without a section: Tokenizer evaluation\n" in text
    report.log("Chat evaluation mid", [])
    assert "section: Tokenizer evaluation, Midtraining\n" in report.generate().read_text(encoding="utf-8")


def test_an_interrupted_run_lacks_what_its_plan_names(report, base_dir):
    for section in ("Tokenizer training", "Tokenizer evaluation", "Base model training"):
        report.log(section, [])
    seconds = {"tok_train": 1, "tok_eval": 1, "base_train": 9, "base_loss": None, "chat_sft": None, "answer": 1}
    (base_dir / "pipeline").mkdir()
    (base_dir / "pipeline" / "plan.json").write_text(json.dumps({"folder": str(base_dir), "seconds": seconds}))
    path = report.generate()
    assert "section: Base model loss, SFT\n" in path.read_text(encoding="utf-8")
    assert "Not in this report:</strong> Base model loss, SFT." in path.with_suffix(".html").read_text(encoding="utf-8")
    for broken in ("{torn", '{"seconds": 3}'):
        (base_dir / "pipeline" / "plan.json").write_text(broken)
        assert "Stages without a section" in (text := report.generate().read_text(encoding="utf-8"))
        assert "SFT" not in text


def test_summary_puts_metrics_under_their_stage(report):
    report.log("Base model loss", [], metrics={"train bpb": 1.2, "val bpb": 1.25})
    report.log("Base model evaluation", [], metrics={"CORE": 0.1234})
    report.log("Chat evaluation mid", [], metrics={"GSM8K": 0.01, "ARC-Easy": 0.3, "ChatCORE": 0.05})
    report.log("Chat evaluation sft", [], metrics={"GSM8K": 0.02, "ARC-Easy": 0.4, "Sums": 0.9, "ChatCORE": 0.15})
    report.log("My experiment", [], metrics={"odd": 1.0})
    text = report.generate().read_text(encoding="utf-8")
    assert table_row(text, "Metric") == ["BASE", "MID", "SFT", "RL"]
    assert table_row(text, "val bpb") == ["1.2500", "-", "-", "-"]
    assert table_row(text, "CORE") == ["0.1234", "-", "-", "-"]
    assert table_row(text, "GSM8K") == ["-", "0.0100", "0.0200", "-"]
    assert table_row(text, "Sums") == ["-", "-", "0.9000", "-"]
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert names == ["Metric", "train bpb", "val bpb", "CORE", "GSM8K", "ARC-Easy", "Sums", "ChatCORE"]


def test_later_evaluation_of_a_stage_replaces_the_earlier_number(report):
    report.log("Base model training", [], metrics={"val bpb": 1.5})
    report.log("Base model loss", [], metrics={"val bpb": 1.4})
    assert table_row(report.generate().read_text(encoding="utf-8"), "val bpb")[0] == "1.4000"


def test_header_says_where_it_ran(report):
    report.reset()
    text = report.generate().read_text(encoding="utf-8")
    for fact in ("Commit", "Machine", "CPU", "GPU", "torch", "dtype", "Total wall clock time"):
        assert f"- {fact}" in text
    assert torch.__version__ in text
    assert "No stage has logged a metric yet." in text


def test_wall_clock_runs_from_reset_to_the_last_section(report):
    report.reset()
    report.log("SFT", [])
    for name, time in (("_header", "2026-01-01T10:00:00+00:00"), ("sft", "2026-01-01T12:30:00+00:00")):
        path = report.folder / f"{name}.json"
        write_record(path, read_json(path) | {"time": time})
    assert "Total wall clock time: 2h30m" in report.generate().read_text(encoding="utf-8")


def test_a_reset_keeps_the_report_that_was_there(report):
    report.log("Anything", {"value": 1})
    report.reset()
    report.reset()  # nothing was logged: the older one stays
    assert not report.sections()
    assert [s["section"] for s in Report(report.folder.with_name(f"{report.folder.name}.old")).sections()] == [
        "Anything"
    ]


def test_logging_again_replaces_and_reset_forgets(report):
    report.log("SFT", [{"run": "first"}])
    report.log("SFT", [{"run": "second"}])
    text = report.generate().read_text(encoding="utf-8")
    assert "second" in text
    assert "first" not in text
    report.reset()
    assert report.sections() == []
    assert sorted(path.name for path in report.folder.iterdir()) == ["_header.json"]


@dataclasses.dataclass
class Settings:
    depth: int = 4
    path: Path = Path("/data")


def test_weird_values_are_written_not_raised(report):
    loop = [
        {
            "nan": float("nan"),
            "inf": np.float32("inf"),
            "tensor": torch.tensor(2.5),
            "vector": torch.arange(3),
            "none": None,
            "bytes": b"\xff",
            "nested": {"a": [1, {"b": (2, 3)}]},
            "lines": "one\n| two\n# three",
            3: {4, 5},
            "function": len,
        },
        Settings(),
        None,
        {},
        "a paragraph\n\nwith *markdown*",
        42,
    ]
    text = report.log("SFT", loop, metrics={"bad": float("nan"), "none": None, "ok": torch.tensor(0.5)}).read_text()
    assert "- nan: nan" in text
    assert "- tensor: 2.5" in text
    assert "- lines: one | two # three" in text
    assert "- depth: 4" in text
    assert "with *markdown*" in text
    assert "- 42" in text
    full = report.generate().read_text(encoding="utf-8")
    assert table_row(full, "ok") == ["-", "-", "0.5000", "-"]
    assert "| bad |" not in full


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(anything)
def test_any_value_is_json_and_one_line(value):
    plain = to_plain(value)
    json.dumps(plain, allow_nan=False)
    assert len(format_value(plain).splitlines()) <= 1


def test_numbers_are_readable():
    assert [format_value(v) for v in (7, 1234567, 0.5, 0.123456, 3e-5, 123456.7, 0.0, True)] == [
        "7",
        "1,234,567",
        "0.5",
        "0.1235",
        "3e-05",
        "123,457",
        "0",
        "yes",
    ]


def test_file_names_stay_in_the_folder(report):
    path = report.log("../../Évil/../name", "text")
    assert path.parent == report.folder
    assert slugify("Chat evaluation sft") == "chat-evaluation-sft"


def test_broken_section_files_are_left_out(report):
    report.log("SFT", ["fine"])
    (report.folder / "rl.json").write_text("{torn", encoding="utf-8")
    (report.folder / "list.json").write_text("[]", encoding="utf-8")
    assert [record["section"] for record in report.sections()] == ["SFT"]


def test_only_rank_0_writes(base_dir, monkeypatch):
    monkeypatch.setattr(report_module, "get_dist_info", lambda: (True, 1, 1, 2))
    get_report().log("SFT", ["from rank 1"])
    assert not (base_dir / "report").exists()


def test_command_line(base_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_script(main, Config, ["reset"])
    get_report().log("Base model evaluation", [{"CORE": 0.2}], metrics={"CORE": 0.2})
    run_script(main, Config, ["generate"])
    assert "| CORE | 0.2000 |" in capsys.readouterr().out
    assert (tmp_path / "report.md").read_bytes() == (base_dir / "report" / "report.md").read_bytes()
    with pytest.raises(SystemExit) as error:
        run_script(main, Config, ["erase"])
    assert error.value.code == 2
