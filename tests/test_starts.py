"""What a start costs: stages that compute nothing with tensors load no torch, and training loads no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint.format import META_FILE, checkpoint_folder, step_folder
from nanochat.common import autodetect_dtype
from nanochat.files import write_json
from nanochat.report import environment

ROOT = Path(__file__).resolve().parents[1]


def loaded(code: str) -> set[str]:
    """The modules that a new process has loaded after `code`."""
    code += "\nimport sys\nprint('\\nloaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_stages_without_tensors_load_no_torch(base_dir, tiny_tokenizer):
    tiny_tokenizer.save(base_dir / "tokenizer")
    write_json(step_folder(checkpoint_folder("base", "d2"), 1) / META_FILE, {})
    modules = loaded(
        "from nanochat.config import run_script\n"
        "from nanochat.report import __main__ as report\n"
        "from scripts import base_eval, tok_eval\n"
        "import nanochat.dataset, tasks.demo.__main__\n"
        "run_script(tok_eval.main, tok_eval.Config, ['--no-compare'])\n"
        f"run_script(base_eval.main, base_eval.Config, ['--skip_if_missing', '--eval_bundle={base_dir}/none'])\n"
        "sections = report.Report(report.get_base_dir() / 'report').sections()\n"
        "assert [s['section'] for s in sections] == ['Tokenizer evaluation', 'Base model evaluation'], sections\n"
        + ("run_script(report.main, report.Config, ['reset'])\n" if torch.version.cuda is None else "")
        + "import os; os.chdir(report.get_base_dir())\n"
        "run_script(report.main, report.Config, ['generate'])"
    )
    assert (base_dir / "report" / "report.html").is_file()
    assert "nanochat.tokenizer" in modules
    assert "torch" not in modules


def test_the_report_names_torch_and_its_dtype_as_torch_does():
    facts = environment()
    assert facts["torch"].startswith(torch.__version__)
    if torch.version.cuda is None and not torch.backends.mps.is_available():
        assert facts["GPU"] == "none"
        assert facts["torch"] == f"{torch.__version__}, CPU build"
        assert facts["dtype chosen by auto"] == str(autodetect_dtype("cpu")).removeprefix("torch.")


def test_training_loads_no_compiler():
    modules = loaded(
        "import torch\n"
        "from nanochat.gpt import GPT, GPTConfig\n"
        "from nanochat.optim import MuonAdamW\n"
        "from nanochat.recipe import parameter_groups, PRESETS\n"
        "with torch.device('meta'):\n"
        "    for preset in PRESETS.values():\n"
        "        counted = GPT(GPTConfig(n_layer=4, n_head=1, n_kv_head=1, n_embd=32, **preset.switches))\n"
        "        assert counted.num_params() and counted.get_device().type == 'meta' and counted.cos.is_meta\n"
        "model = GPT(GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32))\n"
        "model.init_weights()\n"
        "rates = dict(embedding_lr=0.1, unembedding_lr=0.1, matrix_lr=0.1, weight_decay=0.1)\n"
        "optimizer = MuonAdamW(parameter_groups(model, **rates))\n"
        "x = torch.arange(8)[None]\n"
        "model(x, x).backward()\n"
        "optimizer.reduce_gradients(); optimizer.step(1.0); optimizer.zero_grad()\n"
        "assert all(p.grad is None for p in model.parameters())\n"
        "optimizer.state_dict()"
    )
    assert "torch" in modules
    assert "torch._dynamo" not in modules


@pytest.mark.parametrize("module", ["scripts.chat_cli", "nanochat.pipeline", "nanochat.dataset", "tasks.demo"])
def test_a_python_without_the_packages_says_what_to_do(module):
    # -S: without site-packages, as the system's own Python has them
    command = [sys.executable, "-S", "-m", module]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "source .venv/bin/activate" in done.stderr
