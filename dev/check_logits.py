"""Compare every logit of 50 prompts with those of transformers and llama.cpp, all in float32.

    python -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python numpy   (compiles llama.cpp here)
    NANOCHAT_BASE_DIR=... python -m dev.check_logits --python ~/llama/bin/python

Prompts are questions of the demo world. Exits with 1 if a logit differs by more than 1e-3.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.config import run_script, short
from nanochat.files import write_json
from nanochat.interop.gguf_file import GGUFCard, write_gguf
from nanochat.interop.hf_format import write_hf_folder
from nanochat.interop.qwen3 import fold
from tasks.demo.chat import demo_eval_tasks

PROMPTS = 50
WORST = 1e-3


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison."""

    python: Path = Path(sys.executable)
    """A Python that has llama-cpp-python and numpy."""
    source: Annotated[Literal["mid", "sft", "rl"], short("-i")] = "sft"
    """The stage whose model to compare."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""


def main(cfg: Config) -> None:
    """Compare and print."""
    from transformers import AutoModelForCausalLM  # lazy: a second to start

    model, tokenizer, _ = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag)
    facts = demo_eval_tasks(facts=PROMPTS)["DemoFacts"]
    prompts = [tokenizer.render_for_completion(facts[i]) for i in range(PROMPTS)]
    with torch.inference_mode():
        ours = torch.cat([model(torch.tensor([prompt]))[0].float() for prompt in prompts])  # (tokens, vocabulary)
    print(f"{len(ours):,} tokens of {PROMPTS} prompts, logits from {ours.min():.1f} to {ours.max():.1f}")
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        write_hf_folder(tmp / "hf", model.state_dict(), model.config, tokenizer, "", form="qwen3")
        theirs: Any = AutoModelForCausalLM.from_pretrained(tmp / "hf", dtype=torch.float32).eval()
        with torch.inference_mode():
            found = {"transformers": torch.cat([theirs(torch.tensor([prompt])).logits[0] for prompt in prompts])}
        write_gguf(tmp / "f32.gguf", *fold(model), tokenizer, GGUFCard.of("compared", model, "sft", "mit"), "f32")
        write_json(tmp / "prompts.json", prompts)
        worker = Path(__file__).with_name("llama_logits.py")
        command = [str(cfg.python), str(worker), *(str(tmp / f) for f in ("f32.gguf", "prompts.json", "logits.npy"))]
        subprocess.run(command, check=True)
        found["llama.cpp"] = torch.from_numpy(np.load(tmp / "logits.npy"))
    worst = {name: (logits - ours).abs().max().item() for name, logits in found.items()}
    for name, difference in worst.items():
        same = (found[name].argmax(-1) == ours.argmax(-1)).float().mean().item()
        print(f"{name}: the largest difference is {difference:.1e}; the likeliest token is ours at {same:.2%} of them")
    if max(worst.values()) > WORST:
        raise SystemExit(f"a logit differs by more than {WORST}")


if __name__ == "__main__":
    run_script(main, Config)
