"""Bring a nanochat model of the Hugging Face format into our checkpoints, to chat with it or to train it further.

python -m scripts.import_hf --path my-assistant                    a folder, or a hub repository (owner/name)
python -m scripts.chat_cli -i sft -g imported -p "Hello!"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat.checkpoint.format import checkpoint_folder, saved_steps
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.config import run_script, short
from nanochat.env import get_base_dir, print0
from nanochat.interop.hf_format import model_folder, read_hf_folder, recorded_facts
from nanochat.tokenizer import TOKENIZER_FOLDER, RustBPETokenizer


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


def main(cfg: Config) -> None:
    """Import weights and tokenizer."""
    target = checkpoint_folder(cfg.source, cfg.model_tag)
    if saved_steps(target):
        raise ValueError(f"{target} holds a model already: choose another --model_tag")
    folder = model_folder(cfg.path)
    state, config, tokenizer = read_hf_folder(folder)
    keep_tokenizer(tokenizer)
    meta = {
        "complete": True,
        "imported_from": cfg.path,
        "model_config": config.to_dict(),
        "tokenizer_hash": tokenizer.hash,
        "dtype": cfg.dtype,
        **recorded_facts(folder),
    }
    path = save_checkpoint(target, 0, state, None, meta)
    print0(f"imported into {path}: python -m scripts.chat_cli -i {cfg.source} -g {cfg.model_tag}")


def keep_tokenizer(tokenizer: RustBPETokenizer) -> None:
    """Put the tokenizer in the base dir; ValueError when another one is there, on which other models depend."""
    folder = get_base_dir() / TOKENIZER_FOLDER
    if (folder / "tokenizer.json").exists():
        if RustBPETokenizer.from_directory(folder).hash != tokenizer.hash:
            raise ValueError(
                f"{folder} holds another tokenizer, which the models beside it need: import into an empty folder, "
                "NANOCHAT_BASE_DIR=… python -m scripts.import_hf …"
            )
        return
    tokenizer.save(folder)


if __name__ == "__main__":
    run_script(main, Config)
