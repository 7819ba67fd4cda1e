"""Bring a nanochat model of the Hugging Face format into our checkpoints, to chat with it or to train it further.

python -m scripts.import_hf --path my-assistant                    a folder, or a hub repository (owner/name)
python -m scripts.chat_cli -i sft -g imported -p "Hello!"

A checkpoint of another base folder is taken too, with its tokenizer.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat.checkpoint.format import check_tag, checkpoint_folder, saved_steps
from nanochat.checkpoint.saver import pending_folder, take_over
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.config import run_script, short
from nanochat.env import print0
from nanochat.interop.start_model import keep_tokenizer, read_start_model


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an import."""

    path: str
    """The folder, or a hub repository (owner/name)."""
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """The stage whose checkpoints it joins."""
    model_tag: Annotated[str, short("-g")] = "imported"
    """Name of the checkpoint folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """The type that a later stage computes in if its card does so well; the weights stay float32."""
    replace: bool = False
    """Take the place of a model of that name, which moves to <name>.old."""

    def __post_init__(self) -> None:
        check_tag(self.model_tag)


def main(cfg: Config) -> None:
    """Import weights and tokenizer."""
    target = checkpoint_folder(cfg.source, cfg.model_tag)
    there = bool(saved_steps(target))
    if there and not cfg.replace:
        raise ValueError(f"{target} holds a model already: choose another --model_tag, or --replace it")
    model = read_start_model(cfg.path)
    keep_tokenizer(model.tokenizer)
    meta = {
        "complete": True,
        "imported_from": cfg.path,
        "model_config": model.config.to_dict(),
        "tokenizer_hash": model.tokenizer.hash,
        "dtype": cfg.dtype,
        **model.facts,
    }
    folder = pending_folder(target) if there else target
    shutil.rmtree(pending_folder(target), ignore_errors=True)
    save_checkpoint(folder, 0, model.state, None, meta)
    if there:
        take_over(folder, target)
    print0(f"imported into {target}: python -m scripts.chat_cli -i {cfg.source} -g {cfg.model_tag}")


if __name__ == "__main__":
    run_script(main, Config)
