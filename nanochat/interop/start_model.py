"""A model to go on from, wherever it lies: a tag, a folder of checkpoints, a base folder, or one for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.checkpoint.format import META_FILE, checkpoint_folder, read_sums, saved_steps, step_folder
from nanochat.checkpoint_manager import load_checkpoint, tokenizer_of
from nanochat.data.inventory import format_bytes
from nanochat.env import get_base_dir
from nanochat.files import sha256_file
from nanochat.gpt import GPTConfig
from nanochat.hardware import free_memory
from nanochat.interop.foreign import weight_files
from nanochat.interop.hf_format import OWN_FILE, REMAINDER_FILE, model_folder, read_hf_folder, recorded_facts
from nanochat.recipe import recipe_of
from nanochat.stages import TRAINED
from nanochat.tokenizer import TOKENIZER_FOLDER, RustBPETokenizer

FORMS = "a folder with config.json and model.safetensors, a checkpoint of this project, or its base folder"
# Weights, gradients and what the optimizer remembers are at least four times the file.
TRAINING_TIMES = 4


class StartModel(NamedTuple):
    """A model to go on from."""

    name: str
    """Its tag, or the name of its folder."""
    folder: Path
    state: dict[str, Tensor]
    config: GPTConfig
    tokenizer: RustBPETokenizer
    facts: dict[str, Any]
    """Recipe, sampling and dtype, where they are known."""
    fingerprint: str
    """Changes when its files do."""

    @property
    def recipe(self) -> str:
        """Of its base model; classic where it is not known."""
        return recipe_of(self.facts)

    def __str__(self) -> str:
        config = self.config
        return (
            f"{self.folder}: {config.n_layer} layers, {config.n_embd} channels, a vocabulary of {config.vocab_size:,}, "
            f"a context of {config.sequence_len:,} tokens"
        )


def read_start_model(name: str) -> StartModel:
    """Read a model and its tokenizer, checked.

    Args:
        name: the tag of a base model, a folder, or a repository of the hub (owner/name).

    Raises:
        FileNotFoundError: there is no such thing; says what there is.
        ValueError: it is a model of another kind, damaged, or too large for this machine's memory.
        RuntimeError: a checkpoint is damaged or its tokenizer another; or the hub can't be reached.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ValueError(f"{path} is a file: give {FORMS}")
    if not path.is_dir():
        if len(path.parts) == 1 and saved_steps(checkpoint_folder("base", name)):
            path = checkpoint_folder("base", name)
        elif name.count("/") == 1 and not name.startswith((".", "/", "~")):
            path = model_folder(name)
        else:
            raise FileNotFoundError(f"{name}: there is no such folder{_tags_there(name)}")
    if (path / META_FILE).is_file():
        return _of_checkpoint(path, path.resolve().parent.name)
    shown = path.resolve().name if Path(name).expanduser().is_dir() else name.rsplit("/", 1)[-1]
    if (path / "config.json").is_file():
        return _of_hf(path, shown)
    return _of_checkpoint(_checkpoint_of(path), shown)


def _tags_there(name: str) -> str:
    if len(Path(name).parts) > 1:
        return ""
    root = checkpoint_folder("base", "x").parent
    tags = sorted(path.name for path in root.iterdir() if saved_steps(path)) if root.is_dir() else []
    return f", and no base model of that name in {root} (there {'are ' + ', '.join(tags) if tags else 'is none'})"


def _checkpoint_of(path: Path) -> Path:
    """The folder of the newest step, of a tag's or a base folder."""
    if steps := saved_steps(path):
        return step_folder(path, steps[-1])
    if any(path.glob("model_*.pt")):
        raise ValueError(
            f"{path} holds a checkpoint of nanochat itself: bring it here with python -m scripts.import_classic "
            f"--folder={path}, then give its tag"
        )
    root = path / TRAINED["base"].folder
    tags = sorted(tag for tag in root.iterdir() if saved_steps(tag)) if root.is_dir() else []
    tags = [tag for tag in tags if tag.suffix != ".old" and not tag.name.startswith(".")]
    if len(tags) > 1:
        raise ValueError(f"{path} holds several base models: give one of {', '.join(map(str, tags))}")
    if not tags:
        raise ValueError(f"{path} holds no model: give {FORMS}")
    return _checkpoint_of(tags[0])


def _of_hf(folder: Path, name: str) -> StartModel:
    files = weight_files(folder)
    _refuse_too_large(folder, sum(file.stat().st_size for file in files))
    state, config, tokenizer = read_hf_folder(folder)
    # Only of the files that are read: anything else in the folder may change, be endless, or be no regular file.
    others = ("config.json", OWN_FILE, "tokenizer.json", "tokenizer_config.json", REMAINDER_FILE)
    known = [path for name in others if (path := folder / name).is_file()]
    fingerprint = " ".join(sha256_file(file) for file in [*known, *files])
    return StartModel(name, folder, state, config, tokenizer, recorded_facts(folder), fingerprint)


def _of_checkpoint(folder: Path, name: str) -> StartModel:
    _refuse_too_large(folder, sum(file.stat().st_size for file in folder.glob("model*.safetensors")))
    step = folder.name.removeprefix("step_")
    if not step.isdecimal():
        raise ValueError(f"{folder} holds a checkpoint under another name than step_<number>: give it its name back")
    checkpoint = load_checkpoint(folder.parent, int(step))
    # <base folder>/<stage>_checkpoints/<tag>/<step>
    home = (folder / "../../..").resolve() / TOKENIZER_FOLDER
    if not (home / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: the tokenizer of its model is missing, it should be in {home}")
    tokenizer = tokenizer_of(checkpoint, home)
    meta = checkpoint.meta
    facts = {key: meta[key] for key in ("sampling", "dtype") if meta.get(key)} | {"recipe": recipe_of(meta)}
    config = GPTConfig.from_dict(meta["model_config"])
    fingerprint = read_sums(folder)["model.safetensors"]
    return StartModel(name, folder, checkpoint.model, config, tokenizer, facts, fingerprint)


def _refuse_too_large(folder: Path, num_bytes: int) -> None:
    free = free_memory(torch.device("cpu"))
    if TRAINING_TIMES * num_bytes > free:
        raise ValueError(
            f"{folder}: its weights are {format_bytes(num_bytes)}, training takes at least {TRAINING_TIMES} times as "
            f"much memory, but {format_bytes(free)} are free: close other programs, or take a smaller model"
        )


def keep_tokenizer(tokenizer: RustBPETokenizer, only_ask: bool = False) -> None:
    """Put the tokenizer of a model into the base dir, or `only_ask` whether that is possible.

    Raises:
        ValueError: another one is there, on which other models depend.
    """
    folder = get_base_dir() / TOKENIZER_FOLDER
    if (folder / "tokenizer.json").exists():
        if RustBPETokenizer.from_directory(folder).hash != tokenizer.hash:
            raise ValueError(
                f"{folder} holds another tokenizer, which the models beside it need: set NANOCHAT_BASE_DIR to an empty "
                "folder for this one"
            )
    elif not only_ask:
        tokenizer.save(folder)
