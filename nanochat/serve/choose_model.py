"""The choice of a chat script's model, a checkpoint of ours or a folder in the format of transformers, and of how its
answers are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import find_tag, load_model
from nanochat.gpt import GPT
from nanochat.interop.hf_format import load_nanochat_folder, model_folder
from nanochat.tokenizer import RustBPETokenizer

BASE_NOTICE = "a base model has learned no chats: it goes on with your text, as plain text"


def find_model(source: str, model_tag: str | None, hf_path: str | None) -> str:
    """Return the name of the model, after checking that there is one; `hf_path` comes before the checkpoints.

    Raises:
        FileNotFoundError: there is none; says how to get one.
        ValueError: both a folder and a checkpoint are asked for.
    """
    if hf_path is None:
        return f"{find_tag(source, model_tag).name} {source}"
    if model_tag is not None:
        raise ValueError("--hf_path and --model_tag name two models: give one of them")
    return model_folder(hf_path).name if Path(hf_path).expanduser().is_dir() else hf_path


def load_chosen(
    source: str, model_tag: str | None, step: int | None, hf_path: str | None, device: torch.device
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """Load the model that `find_model` has named: (model, tokenizer, meta), in eval mode on `device`."""
    if hf_path is not None:
        return load_nanochat_folder(hf_path, device)
    return load_model(source, device, "eval", model_tag, step)


def choose_drawing(
    meta: Mapping[str, Any],
    temperature: float | None,
    top_k: int | None,
    usual: Mapping[str, float | int],
    min_answer_p: float | None = None,
) -> tuple[dict[str, Any], str]:
    """How answers are drawn where nobody says otherwise.

    Args:
        meta: of the model; SFT records in it what suits the model (`sampling`).
        temperature: what the user asks for, if anything.
        top_k: likewise.
        usual: both, for a model that records nothing.
        min_answer_p: how likely an answer must be to be given; None: as the model records, else any is.

    Returns:
        (fields of `Sampling`, a sentence that says where they come from).

    Raises:
        ValueError: `min_answer_p` is above 0, and the model records nothing to say instead.
    """
    recorded = meta.get("sampling") or {}
    asked = {name: value for name, value in (("temperature", temperature), ("top_k", top_k)) if value is not None}
    drawing = {name: asked.get(name, recorded.get(name, value)) for name, value in usual.items()}
    if len(asked) == len(usual):
        why = "as asked for"
    else:
        why = "what SFT found to suit this model" if recorded else "the usual ones: this model records none of its own"
    why = f"answers: temperature {drawing['temperature']:g}, top_k {drawing['top_k']} ({why})"
    unsure = recorded.get("unsure", "")
    least = recorded.get("min_answer_p") or 0.0 if min_answer_p is None else min_answer_p
    if least and not unsure and meta:
        raise ValueError(f"--min_answer_p={least}: this checkpoint does not record what to say instead: leave it out")
    if least:
        why += f"; instead of one that it finds less likely than {least:.0%}: {unsure!r} (--min_answer_p=0: guess)"
    return {**drawing, "min_answer_p": least, "unsure": unsure}, why
