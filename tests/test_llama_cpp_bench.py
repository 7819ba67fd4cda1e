"""The comparison with llama.cpp, with a stand-in for llama.cpp: from its flags to its figures."""

import json
import sys

import dev.bench.llama_cpp as bench
from nanochat.config import run_script

STAND_IN = """
import json, sys
for line in sys.stdin:
    task = json.loads(line)
    tokens = [0] * task["new_tokens"]
    assert len(task["prompts"]) == task["requests"]
    print(json.dumps({"decode_tokens_per_second": 10.0, "tokens": tokens}), flush=True)
"""


def test_a_small_run_compares_both_on_the_same_weights(tmp_path, monkeypatch, capsys):
    worker = tmp_path / "worker.py"
    worker.write_text(STAND_IN)
    monkeypatch.setattr(bench, "WORKER", worker)
    argv = [
        "--depth",
        "1",
        "--vocab_size",
        "300",
        "--weights",
        "int8",
        "int4",
        "--requests",
        "1",
        "2",
        "--new_tokens",
        "4",
    ]
    argv += ["--prompt_tokens", "5", "--repeats", "1", "--threads", "1", "--python", sys.executable]
    folder = tmp_path / "files"
    run_script(bench.main, bench.Config, [*argv, "--folder", str(folder)])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["requests"], row["weights"], row["llama.cpp"]) for row in report["results"]] == [
        (1, "int8", 10.0), (1, "int4", 10.0), (2, "int8", 10.0), (2, "int4", 10.0)
    ]  # fmt: skip
    for row in report["results"]:
        assert row["ratio"] == row["ours"] / 10
        assert row["read"] > 0
        assert 0 <= row["outside_share"] < 1
        assert row["share"] is None or row["share"] > 0
    assert (folder / "int8.gguf").read_bytes()[:4] == b"GGUF"
