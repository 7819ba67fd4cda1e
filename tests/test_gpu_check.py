"""dev/gpu_check.py runs with nothing but torch and numpy installed, and says what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Everything else that the project depends on, and its own Rust extension.
ABSENT = (
    *("tyro", "rich", "yaml", "pyarrow", "tiktoken", "safetensors", "httpx", "psutil", "datasets"),
    *("fastapi", "uvicorn", "sse_starlette", "wandb", "transformers", "regex", "rustbpe"),
)
WITHOUT = f"""
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def gpu_check(folder, *flags):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, str(ROOT / "dev" / "gpu_check.py"), "--device_type=cpu", *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_dtypes_learn_the_same_and_the_record_says_so(tmp_path):
    done = gpu_check(tmp_path, "--depth=1", "--steps=12", "--sequence_len=32", "--rows=4", "--out=x.json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "x.json").read_text())
    assert list(record["runs"]) == ["float32", "float16", "bfloat16"]
    for name, run in record["runs"].items():
        assert len(run["losses"]) == 12
        assert run["final_loss"] < 0.8 * run["losses"][0]
        assert run["tokens_per_second"] > 0
        assert 0 < record["matmul_tflops"][name] < 1000
        assert run["mfu"] is None  # no data sheet says what this CPU can do: no made-up share
        assert run["share_of_matmul"] > 0
    assert record["same_loss"] is True
    assert record["attention_ms"]["float32"]["math"] > 0
    for word in ("final loss", "tokens/s", "step", "matmul TFLOP/s", "ok: final losses differ by"):
        assert word in done.stdout


def test_a_bad_flag_is_named(tmp_path):
    done = gpu_check(tmp_path, "--dtypes=float8")
    assert done.returncode == 2
    assert "float8" in done.stderr
