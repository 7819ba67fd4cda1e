"""The benchmark runs from its flags to its table, with other engines that get the same weights."""

import json
import subprocess
import sys

import pytest

import dev.bench.infer_bench as infer_bench
from nanochat.config import parse_config, run_script


def test_a_small_run_prints_a_table_and_json(capsys):
    argv = ["--depth", "1", "--vocab_size", "300", "--sequence_len", "32", "--device_type=cpu", "--dtype=float32"]
    argv += ["--weights", "auto", "model", "--requests", "1", "3", "--prompt_tokens", "4", "--new_tokens", "5"]
    run_script(infer_bench.main, infer_bench.Config, [*argv, "--repeats", "1", "--threads", "1", "--no-transformers"])
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["results"]
    assert [(r["name"], r["requests"]) for r in rows] == [
        ("ours float32", 1), ("ours model", 1), ("ours float32", 3), ("ours model", 3)
    ]  # fmt: skip
    assert all(r["same_tokens"] and r["ttft_seconds"] > 0 and r["memory_bytes"] > 0 for r in rows)
    assert "1.00x" in out


def test_the_worker_alone_names_the_script_that_starts_it():
    done = subprocess.run([sys.executable, infer_bench.WORKER, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "scripts.infer_bench starts this; to compare engines: python -m scripts.infer_bench --help"
    ]


def test_transformers_continues_the_same_way(capsys):
    pytest.importorskip("transformers")
    argv = ["--depth", "1", "--vocab_size", "320", "--sequence_len", "64", "--device_type=cpu", "--dtype=float32"]
    argv += ["--requests", "2", "--prompt_tokens", "6", "--new_tokens", "12", "--repeats", "1", "--threads", "1"]
    run_script(infer_bench.main, infer_bench.Config, argv)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [r["name"] for r in rows] == ["ours float32", "transformers"]
    assert rows[1]["same_tokens"]


@pytest.mark.parametrize("argv", [["--requests", "0"], ["--new_tokens", "1"], ["--weights", "int3"]])
def test_bad_flags_exit_with_2(argv):
    with pytest.raises(SystemExit) as error:
        parse_config(infer_bench.Config, argv)
    assert error.value.code == 2


def test_a_context_too_small_and_a_missing_checkout_are_named(tmp_path, capsys):
    for argv, named in (
        (["--depth", "1", "--sequence_len", "16", "--device_type=cpu"], "context of 16"),
        (["--nanochat_path", str(tmp_path)], str(tmp_path)),
    ):
        with pytest.raises(SystemExit):
            run_script(infer_bench.main, infer_bench.Config, argv)
        assert named in capsys.readouterr().err
