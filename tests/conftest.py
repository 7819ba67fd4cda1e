"""Shared fixtures: a folder of its own for every test, a tiny tokenizer, a tiny model, and a browser."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from hypothesis import HealthCheck, settings

from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer

# How long a draw takes says something about the machine only.
settings.register_profile("nanochat", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nanochat")
# The models here are tiny: more threads only wait for each other, and long ones on a busy machine.
torch.set_num_threads(1)

TEXT = [
    "The sky is blue because air scatters blue light more than red light.",
    "Rivers carry water from the mountains to the sea. Rain fills the rivers again.",
    "def add(a, b):\n    return a + b\n",
    "12 + 34 = 46 and 7 * 8 = 56.",
]


@pytest.fixture(autouse=True)
def base_dir(tmp_path_factory, monkeypatch):
    """Every test has its own NANOCHAT_BASE_DIR, so none sees another's files or the user's."""
    folder = tmp_path_factory.mktemp("base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "1")
    monkeypatch.delenv("NANOCHAT_TASK_DIR", raising=False)
    return folder


@pytest.fixture(autouse=True)
def exact_matmuls():
    """Nothing may leave torch's one switch for float32 products elsewhere than where it found it."""
    yield
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture(autouse=True, scope="session")
def no_fast_bfloat16():
    """Tests compute the same on a CPU that is fast at bfloat16 as on any other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.precision.cpu_has_bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = os.environ.get("NANOCHAT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def accessible():
    """A function that lets axe-core look at a page of the browser."""
    axe = pytest.importorskip("axe_playwright_python", reason="axe-core is not installed")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")

    def check(page):
        page.evaluate(script)
        found = page.evaluate("axe.run().then(result => result.violations)")
        assert [(v["id"], [n["html"][:200] for n in v["nodes"]][:5]) for v in found] == []

    return check


@pytest.fixture(scope="session")
def tiny_tokenizer() -> RustBPETokenizer:
    """A tokenizer of 300 tokens trained on a few sentences."""
    return RustBPETokenizer.train_from_iterator(iter(TEXT * 4), 300)


@pytest.fixture
def tiny_model(tiny_tokenizer) -> GPT:
    """A two-layer float32 model with random (not zero) weights and a context of 128."""
    torch.manual_seed(1234)
    config = GPTConfig(128, tiny_tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=64)
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.count_nonzero() == 0:
                p.normal_(0.0, 0.3)
    return model.eval()
