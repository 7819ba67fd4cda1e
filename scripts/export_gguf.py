"""Write a model as one GGUF file for llama.cpp and what is built on it, with a Modelfile for Ollama beside it.

python -m scripts.export_gguf -i sft -o my-assistant.gguf
python -m scripts.export_gguf -i sft -o my-assistant.gguf --type=q8_0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.config import run_script, short
from nanochat.env import print0
from nanochat.files import write_text
from nanochat.interop.gguf_file import (
    GGUFCard,
    GGUFType,
    check_exact,
    how_to_open,
    import_gguf,
    modelfile,
    refuse_other_file,
    write_gguf,
)
from nanochat.interop.qwen3 import fold


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an export."""

    output: Annotated[str, short("-o")]
    """The file to write, ending in .gguf; one that is there is replaced only if it is a GGUF file."""
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """The stage whose model to export."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    type: GGUFType = "bf16"
    """What the matrices are stored in; there is no float16, which such a model's activations overflow."""
    name: str | None = None
    """What programs call the model; default: the file's name."""
    license: str = "mit"
    """The licence that the file names, an SPDX identifier."""
    approximate: bool = False
    """Also export a model that is no Qwen3 model but for its logit softcap, or the pattern of its tokenizer."""


def main(cfg: Config) -> None:
    """Export, and say how to open the file."""
    path = Path(cfg.output)
    refuse_other_file(path)
    import_gguf()
    model, tokenizer, meta = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag, cfg.step)
    for note in check_exact(model, tokenizer, cfg.approximate):
        print0(note)
    config, state = fold(model, cfg.approximate)
    card = GGUFCard.of(cfg.name or path.stem, model, cfg.source, cfg.license, meta.get("sampling"))
    write_gguf(path, config, state, tokenizer, card, cfg.type, cfg.approximate)
    recipe = path.with_suffix(".Modelfile")
    write_text(recipe, modelfile(path.name, card, model.config.sequence_len))
    print0(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB, {cfg.type}) and {recipe}")
    for line in how_to_open(path, recipe, card.chat):
        print0(line)


if __name__ == "__main__":
    run_script(main, Config)
