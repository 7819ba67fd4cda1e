"""Write a model as a folder that Hugging Face transformers loads, and push it to the hub if asked.

python -m scripts.export_hf -i sft -o my-assistant
python -m scripts.export_hf -i sft -o my-assistant --push owner/my-assistant

A model of --recipe=portable becomes a Qwen3 model, which llama.cpp, Ollama, vLLM, MLX and others open too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from nanochat.checkpoint.format import checkpoint_folder, read_meta, saved_steps, step_folder
from nanochat.checkpoint_manager import find_tag, load_model
from nanochat.config import run_script, short
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import open_corpus, prepare_corpus
from nanochat.env import get_base_dir, print0
from nanochat.gpt import GPT
from nanochat.interop.hf_format import EXPORT_FILES, OWN_FILE, Form, is_classic, push_folder, write_hf_folder
from nanochat.interop.model_card import CARRIES, model_card
from nanochat.interop.qwen3 import check_folds, compare_logits, obstacles
from nanochat.precision import DTYPES
from nanochat.recipe import recipe_of
from nanochat.report import Report
from nanochat.tokenizer import RustBPETokenizer

COMPARED_TOKENS = 8192  # of validation text, where an export loses the softcap


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
    format: Literal["auto", "qwen3", "native"] = "auto"
    """qwen3: a Qwen3 model, for every runtime; native: nanochat's own class; auto: qwen3 where it is exact. A model
    with a softcap and no other switch is written as qwen3 only on request, and the difference is measured."""
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


def choose_form(cfg: Config, model: GPT) -> Form:
    """The form to write.

    Raises:
        ValueError: a Qwen3 model was asked for, and this is none; or the folder would be loaded in float16.
    """
    form: Form = cfg.format if cfg.format != "auto" else "native" if obstacles(model.config) else "qwen3"
    if form == "qwen3":
        check_folds(model.config, without_softcap=True)
        # Our own code scales each row of squares. Others do not, and they compute in what a file is stored in.
        if cfg.dtype == "float16":
            raise ValueError(
                "--dtype=float16 does not suit a Qwen3 model: the squares in its layers leave the range of float16; "
                "store it in bfloat16 or float32, or take --format=native"
            )
    return form


def uncapped(model: GPT, folder: Path) -> Callable[[Tensor], Tensor]:
    """The logits without the softcap: of the folder itself where transformers is installed, else of our own model."""
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM  # lazy: an export needs no transformers

        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return lambda x: theirs(x, use_cache=False).logits
    free = copy(model)
    free.config = replace(model.config, logit_softcap=None)
    return free


def print_difference(model: GPT, tokenizer: RustBPETokenizer, folder: Path, tag: str) -> None:
    """Say how much the softcap that the export lacks matters on the text that the model was validated on."""
    base = checkpoint_folder("base", tag)
    settings = read_meta(step_folder(base, saved_steps(base)[-1])).get("config", {}) if saved_steps(base) else {}
    try:
        corpus = open_corpus(prepare_corpus(settings.get("dataset"), settings.get("data_dir")))
    except (FileNotFoundError, ValueError) as error:
        print0(f"warning: this model has a softcap, which Qwen3 lacks; the difference is not measured ({error})")
        return
    T = model.config.sequence_len
    loader = PretrainLoader(corpus, tokenizer, 1, T, split="val", max_rows=max(1, COMPARED_TOKENS // T))
    lengths = torch.from_numpy(tokenizer.token_lengths()).long()
    difference = compare_logits(model, uncapped(model, folder), loader, lengths)
    print0(f"without its softcap, which Qwen3 lacks, {difference} (a model of --recipe=portable has none)")


def main(cfg: Config) -> None:
    """Export, and push."""
    folder = Path(cfg.output)
    refuse_other_folder(folder)
    model, tokenizer, meta = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag, cfg.step)
    form = choose_form(cfg, model)
    card = model_card(
        cfg.push or folder.name, cfg.source, model, meta, Report(get_base_dir() / "report").sections(), cfg.dtype, form
    )
    sampling = meta.get("sampling")  # what SFT found to suit the model
    state, dtype = model.state_dict(), DTYPES[cfg.dtype]
    write_hf_folder(folder, state, model.config, tokenizer, card, dtype, form, sampling, recipe_of(meta))
    plain = form == "qwen3" or is_classic(model.config)
    arguments = f"{str(folder)!r}" if plain else f"{str(folder)!r}, trust_remote_code=True"
    kind = "a Qwen3 model" if form == "qwen3" else "nanochat's own class"
    print0(f"wrote {folder} ({kind}): AutoModelForCausalLM.from_pretrained({arguments}) loads it")
    if form == "native" and cfg.format == "auto":
        print0(f"no Qwen3 model, since it has {', '.join(obstacles(model.config))}: --recipe=portable trains one")
    if model.config.recall:
        print0(f"note: {CARRIES.format(model.config.recall)}")
    if form == "qwen3" and model.config.logit_softcap is not None:
        print_difference(model, tokenizer, folder, find_tag(cfg.source, cfg.model_tag).name)
    if cfg.push is not None:
        print0(f"pushed to {push_folder(folder, cfg.push, cfg.private)}")


if __name__ == "__main__":
    run_script(main, Config)
