"""Checks of model files that somebody else made, before anything is built or allocated by what they say."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanochat.env import is_system_error
from nanochat.gpt import GPT, GPTConfig

WEIGHTS_FILE = "model.safetensors"
TEXT_BUFFERS = ("recall.text", "recall.order")  # whole numbers, all other weights are floating-point ones
LONGEST_CONTEXT = 1 << 20
MOST_JSON_BYTES = 1 << 28  # the largest tokenizers have some 30 MB
# What reading fields of the wrong kind raises.
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError, RuntimeError)


def check_config(config: GPTConfig, weights: Mapping[str, Tensor], where: str) -> None:
    """Check a stranger's config before anything is built by it: kinds of fields, and sizes against the weights.

    Raises:
        ValueError: names the first field that can't be.
    """
    for f in fields(GPTConfig):
        value, kind = getattr(config, f.name), str(f.type)
        if kind.startswith("float"):
            fits = type(value) in (int, float) or (value is None and "None" in kind)
        else:
            fits = type(value) is {"int": int, "bool": bool}.get(kind, str)
        if not fits or (isinstance(value, (int, float)) and not abs(value) < 1 << 40):
            raise ValueError(f"{where}: {f.name} of its config is {value!r}")
    if config.n_layer > len(weights):  # each layer has several weights
        raise ValueError(f"{where}: its config says {config.n_layer} layers, but there are {len(weights)} weights")
    if config.sequence_len > LONGEST_CONTEXT:  # a table of rotations is as long
        raise ValueError(f"{where}: its config says a context of {config.sequence_len}, at most {LONGEST_CONTEXT} fit")
    for name, value in weights.items():
        if name in TEXT_BUFFERS and value.dtype != torch.int32:
            raise ValueError(f"{where}: {name} holds {value.dtype}, expected int32")
        if name not in TEXT_BUFFERS and not value.is_floating_point():
            raise ValueError(f"{where}: {name} holds {value.dtype}, expected floating-point numbers")


def check_shapes(state: Mapping[str, Tensor], config: GPTConfig, where: str) -> None:
    """Raise ValueError, which names up to five, if the weights are not those of a model with this config."""
    try:
        with torch.device("meta"):  # shapes only: no memory is spent on a model before its weights are known to fit it
            expected = {name: value.shape for name, value in GPT(config).state_dict().items()}
    except RuntimeError as error:  # more numbers than torch can count
        raise ValueError(f"{where}: no model can have the sizes of its config ({one_line(error)})") from None
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(state))]
    problems += [f"{name} is unknown" for name in sorted(set(state) - set(expected))]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(expected[name])}"
        for name in sorted(set(expected) & set(state))
        if state[name].shape != expected[name]
    ]
    if problems:
        raise ValueError(f"{where} holds another model than its config says: {'; '.join(problems[:5])}")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError, which names the first, if weights are not finite numbers."""
    for name, value in state.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{where}: {name} holds values that are no finite numbers: get the file again")


def check_text(state: Mapping[str, Tensor], config: GPTConfig, where: str) -> None:
    """Refuse a text to recall from (see nanochat/ops/recall.py) with ids or positions outside of their tables."""
    if not config.recall:
        return
    if config.recall < 2:
        raise ValueError(f"{where}: recall of its config is {config.recall}, and a token must follow another")
    for name, size in zip(TEXT_BUFFERS, (config.vocab_size, config.recall - 1), strict=True):
        if not 0 <= int(state[name].min()) <= int(state[name].max()) < size:
            raise ValueError(f"{where}: {name} holds numbers outside of 0 to {size - 1}: get the file again")


def in_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whatever they were stored in; whole numbers as they are."""
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def check_ids(ids: Iterable[Any], config: GPTConfig, folder: Path) -> None:
    """Refuse ids outside the model's vocabulary: a table as long as the largest is made from them."""
    for i in ids:
        if type(i) is not int or not 0 <= i < config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has the id {i!r}, the model's are 0 to {config.vocab_size - 1}")


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    if isinstance(error, pickle.UnpicklingError):  # torch advises to load without its check: no advice to pass on
        return "UnpicklingError: it is damaged, or holds more than weights"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# --- files -----------------------------------------------------------------------------------------------------------


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FileNotFoundError or ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder must hold a model in the format of transformers")
    if path.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, which no tokenizer or config has: get the file again"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({one_line(error)}): get the file again") from None
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds {type(stored).__name__}, expected an object")
    return stored


def read_remainder(path: Path, most_bytes: int) -> dict[str, Tensor]:
    """The arrays of an .npz file that unpack to at most `most_bytes`; ValueError if it is damaged."""
    try:
        if not path.is_file() or path.stat().st_size > most_bytes:
            raise ValueError("it is no file, or larger than the weights")
        # Without pickles: loading it can run nothing.
        packed = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(packed) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > most_bytes:
            raise ValueError(f"it unpacks to {size} bytes, more than the weights")
        with np.load(packed) as rest:
            return {name: torch.from_numpy(rest[name]) for name in rest}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(
            f"{path} is damaged ({one_line(error)}): without it the import is the same but for rounding"
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files, by its index if it has one; ValueError or FileNotFoundError names what is wrong."""
    index = folder / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    if index.exists():
        listed = read_json_object(index).get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
            raise ValueError(f"{index} has no weight_map of file names: get the file again")
        names = sorted(set(listed.values()))
    if outside := [name for name in names if Path(name).name != name or "\\" in name]:
        raise ValueError(f"{index} names {outside[0]!r}, which is no file of this folder")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: only safetensors weights can be imported")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's safetensors files; ValueError or FileNotFoundError names the file."""
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= load_file(path)
        except (SafetensorError, ValueError, KeyError) as error:
            if is_system_error(error):
                raise
            raise ValueError(f"{path} is damaged ({one_line(error)}): get the file again") from None
    return weights


# Fields of transformers' configs by what bounds them: the number of weights, or their largest dimension.
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim", "d_ff", "vocab_size")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "num_heads", "num_experts", "num_local_experts")
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
LONGEST_OF_ALL = 1 << 24


def check_transformers_folder(folder: Path, resolved: Mapping[str, Any] | None = None) -> None:
    """Compare the sizes that a transformers folder's config states with the shapes of its weights, before any is read.

    Args:
        folder: with config.json and safetensors.
        resolved: the config with transformers' defaults for what the file does not say; default: the file.

    Raises:
        ValueError, FileNotFoundError: names the first field that can't be, or the file that is damaged.
    """
    path = folder / "config.json"
    stored, count, largest = resolved or read_json_object(path), 0, 0
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    count += 1
                    largest = max(largest, *weights.get_slice(name).get_shape(), 0)
        except (SafetensorError, ValueError) as error:
            if is_system_error(error):
                raise
            raise ValueError(f"{file} is damaged ({one_line(error)}): get the file again") from None
    bounds = (
        (LAYERS, count, "weights"),
        ((*WIDTHS, *HEADS), largest, "rows and columns in its largest weight"),
        (LENGTHS, LONGEST_OF_ALL, "positions that are allowed"),
    )
    inner = [value for value in stored.values() if isinstance(value, dict)]  # such as text_config
    for config in (stored, *inner):
        for names, most, what in bounds:
            for name in names:
                value = config.get(name)
                if value is not None and (type(value) is not int or not 0 <= value <= most):
                    raise ValueError(f"{path}: {name} is {value!r}, but there are {most} {what}")
