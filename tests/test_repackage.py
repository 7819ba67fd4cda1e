"""A data set of the `datasets` library becomes a corpus: every text once, shuffled by the seed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from nanochat.config import run_script
from nanochat.data import shards
from nanochat.data.corpus import open_corpus

ROOT = Path(__file__).resolve().parent.parent


def test_local_files_become_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("repackage", ROOT / "dev" / "repackage_data_reference.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "repackage", tool)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(shards, "SHARD_CHARS", 300)
    monkeypatch.setattr(shards, "ROW_GROUP_DOCUMENTS", 4)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"document {i:03d}" for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": t}) + "\n" for t in [*texts, " "]))
    flags = ["--dataset=json", f"--data_files={tmp_path}/a.jsonl", "--text_column=content"]
    run_script(tool.main, tool.Config, [*flags, f"--out={tmp_path}/one"])
    corpus = open_corpus(tmp_path / "one")
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert sorted(train + val) == texts
    assert train != sorted(train)
    assert len({chunk.shard for chunk in corpus.train}) >= 3
    for bad in ([*flags, f"--out={tmp_path}/one"], [*flags[:2], f"--out={tmp_path}/two"]):
        with pytest.raises(SystemExit):
            run_script(tool.main, tool.Config, bad)
    said = capsys.readouterr().err
    assert "exists" in said
    assert "no column 'text'; there are content" in said
