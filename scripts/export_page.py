"""Write a model as a web page: a folder that any static host serves, in which the visitor's browser runs the model.

python -m scripts.export_page -i sft -o my-page
python -m http.server --directory my-page 8080
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.config import run_script, short
from nanochat.env import print0
from nanochat.files import atomic_folder
from nanochat.interop.gguf_file import GGUFCard, GGUFType, check_exact, import_gguf, write_gguf
from nanochat.interop.qwen3 import fold
from nanochat.serve.static_page import (
    MODEL_FILE,
    add_page,
    page_facts,
    refuse_other_page,
    wllama_files,
    wllama_tarball,
)

BROWSER_BYTES = 2**31 - 1  # of one piece of memory, in which the page keeps the file


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an export."""

    output: Annotated[str, short("-o")]
    """The folder to write; one that is there is replaced only if it holds such a page and nothing else."""
    source: Annotated[Literal["mid", "sft", "rl"], short("-i")] = "sft"
    """The stage whose model to export."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    type: GGUFType = "q8_0"
    """What the matrices are stored in."""
    name: str | None = None
    """What the page calls the model; default: the folder's name."""
    license: str = "mit"
    """The licence that the model's file names, an SPDX identifier."""
    wllama: Path | None = None
    """The npm package that runs the model, as a file; default: download it with npm, once."""
    cdn: bool = False
    """Let visitors load that package from cdn.jsdelivr.net instead of keeping it in the folder."""
    approximate: bool = False
    """Also export a model that is no Qwen3 model but for its logit softcap, or the pattern of its tokenizer."""


def main(cfg: Config) -> None:
    """Export, and say how to look at it."""
    folder = Path(cfg.output)
    refuse_other_page(folder)
    import_gguf()
    wllama = None if cfg.cdn else wllama_files(wllama_tarball(cfg.wllama))
    model, tokenizer, meta = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag, cfg.step)
    for note in check_exact(model, tokenizer, cfg.approximate):
        print0(note)
    name = cfg.name or folder.resolve().name
    with atomic_folder(folder) as tmp:
        config, state = fold(model, cfg.approximate)
        card = GGUFCard.of(name, model, cfg.source, cfg.license, meta.get("sampling"))
        write_gguf(tmp / MODEL_FILE, config, state, tokenizer, card, cfg.type, cfg.approximate)
        add_page(tmp, page_facts(name, model, tokenizer, meta, cfg.type), wllama)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print0(f"wrote {folder} ({size / 1e6:.1f} MB)")
    if (folder / MODEL_FILE).stat().st_size > BROWSER_BYTES:
        print0("warning: browsers load no model above 2 GB: export a smaller --type, or a smaller model")
    print0(f"look at it: python -m http.server --directory {folder} 8080, then http://localhost:8080")
    print0(
        "any static host serves it: GitHub Pages, a web space, a USB stick with the line above; not a click on the file"
    )


if __name__ == "__main__":
    run_script(main, Config)
