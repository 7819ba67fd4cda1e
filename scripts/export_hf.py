"""Write a model as a folder that Hugging Face transformers loads, and push it to the hub if asked.

python -m scripts.export_hf -i sft -o my-assistant
python -m scripts.export_hf -i sft -o my-assistant --push owner/my-assistant
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.config import run_script, short
from nanochat.env import get_base_dir, print0
from nanochat.interop.hf_format import EXPORT_FILES, OWN_FILE, is_classic, push_folder, write_hf_folder
from nanochat.interop.model_card import model_card
from nanochat.precision import DTYPES
from nanochat.report import Report


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an export."""

    output: Annotated[str, short("-o")]
    """The folder to write; one that is there is replaced only if it holds an export and nothing else."""
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """The stage whose model to export."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """The type to store the weights in; float32 loses nothing."""
    push: str | None = None
    """Also upload to this hub repository (owner/name), with the token of HF_TOKEN or `hf auth login`."""
    private: bool = True
    """A repository that --push creates is private."""


def refuse_other_folder(folder: Path) -> None:
    """Only an export may be replaced.

    Raises:
        ValueError: the folder holds something else; names what.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / OWN_FILE).is_file():
        raise ValueError(f"--output={folder} is there and holds no export: choose another folder")
    others = sorted(path.name for path in folder.iterdir() if path.name not in EXPORT_FILES)
    if others:
        raise ValueError(
            f"--output={folder} holds an export and also {', '.join(others[:5])}, which would be lost: choose another "
            "folder"
        )


def main(cfg: Config) -> None:
    """Export, and push."""
    folder = Path(cfg.output)
    refuse_other_folder(folder)
    model, tokenizer, meta = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag, cfg.step)
    card = model_card(
        cfg.push or folder.name, cfg.source, model, meta, Report(get_base_dir() / "report").sections(), cfg.dtype
    )
    write_hf_folder(folder, model.state_dict(), model.config, tokenizer, card, DTYPES[cfg.dtype])
    arguments = f"{str(folder)!r}" if is_classic(model.config) else f"{str(folder)!r}, trust_remote_code=True"
    print0(f"wrote {folder}: AutoModelForCausalLM.from_pretrained({arguments}) loads it")
    if cfg.push is not None:
        print0(f"pushed to {push_folder(folder, cfg.push, cfg.private)}")


if __name__ == "__main__":
    run_script(main, Config)
