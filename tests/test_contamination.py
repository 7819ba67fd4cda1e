"""The contamination count, against the obvious way to count."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import write_shard

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("contamination", ROOT / "dev" / "contamination.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["contamination"] = module
    spec.loader.exec_module(module)
    return module


def slow_ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall("[0-9a-z\u0080-\U0010ffff]+", re.sub("[A-Z]", lambda m: m[0].lower(), text))
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


texts = st.lists(st.text(alphabet="abB é.-\n", max_size=25), max_size=8)


@given(train=texts, items=texts, n=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_counts_are_those_of_the_obvious_way(tool: ModuleType, train: list[str], items: list[str], n: int) -> None:
    seen = {gram for text in train for gram in slow_ngrams(text, n)}
    found = tool.scan(iter([pa.array(train, pa.string())]), [tool.EvalSet("x", items)], n, 1, 2)[0]
    grams = [slow_ngrams(item, n) for item in items]
    hits = [sum(gram in seen for gram in of_item) for of_item in grams]
    everything = {gram for of_item in grams for gram in of_item}
    assert found.items == len(items)
    assert found.too_short == sum(not of_item for of_item in grams)
    assert found.touched == sum(h > 0 for h in hits)
    assert found.covered == sum(h > 0 and 2 * h >= len(g) for h, g in zip(hits, grams, strict=True))
    assert (found.ngrams, found.ngrams_found) == (len(everything), len(everything & seen))
    assert found.training_documents == sum(bool(everything & set(slow_ngrams(text, n))) for text in train)


def test_blocks_are_cut_without_loss(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "BLOCK_BYTES", 60)
    array = pa.array([str(i) * 7 for i in range(40)])
    parts = list(tool.blocks(iter([array])))
    assert len(parts) > 3
    assert [text for part in parts for text in part.to_pylist()] == array.to_pylist()


def test_command_finds_a_task_in_the_training_text(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "A farmer has seven hens, and each of them lays three eggs on every day of the week. How many eggs?"
    for name, documents in (("a", ["nothing here", f"Quiz! {question.upper()}"]), ("b", ["validation text " * 10])):
        write_shard(tmp_path / f"{name}.parquet", [documents])
    row = {"question": question, "answer": "7 * 3 * 7 = <<7*3*7=147>>147\n#### 147"}
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("NANOCHAT_TASK_DIR", str(tmp_path))
    out = tmp_path / "found.json"
    tool.run_script(
        tool.main,
        tool.Config,
        [f"--data_dir={tmp_path}", "--no-core", "--tasks", "GSM8K", "HumanEval", f"--json={out}"],
    )
    said = capsys.readouterr().out
    assert "left out: chat HumanEval" in said
    counts = {s["name"]: s for s in json.loads(out.read_text())["sets"]}
    assert counts["chat GSM8K"]["touched"] == counts["chat GSM8K"]["training_documents"] == 1
    assert counts["validation"]["touched"] == 0
