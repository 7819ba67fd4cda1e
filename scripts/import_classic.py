"""Take over a model that nanochat itself has trained (model_*.pt with meta_*.json).

python -m scripts.import_classic --folder=/old/base_checkpoints/d20 --source=base
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat.checkpoint.format import check_tag
from nanochat.config import run_script
from nanochat.interop.nanochat_pt import import_classic
from nanochat.tokenizer import get_tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an import."""

    folder: Path
    """The folder with the .pt files."""
    source: Literal["base", "mid", "sft", "rl"] = "base"
    """The stage that made it."""
    model_tag: str | None = None
    """The name it gets here; default: that of the folder."""
    step: int | None = None
    """Default: the last."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """The type that a later stage computes in if its card does so well; the original trains in bfloat16."""

    def __post_init__(self) -> None:
        check_tag(self.model_tag)


def main(cfg: Config) -> None:
    """Read, check, write."""
    folder = cfg.folder.expanduser().absolute()
    target = import_classic(folder, cfg.source, cfg.model_tag or folder.name, get_tokenizer(), cfg.step, cfg.dtype)
    print(f"imported into {target}")


if __name__ == "__main__":
    run_script(main, Config)
