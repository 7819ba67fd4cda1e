"""The files of a checkpoint: names, checksums and the record. No tensors; the writer and the loader stand above.

<base dir>/<source>_checkpoints/<tag>/step_000123/
    model.safetensors        weights
    optim_rank0.safetensors  rank 0's part of the optimizer state, and its random generators (in an unfinished run);
    optim_rank1.safetensors  ... so for every rank
    meta.json                step, model config, training config, position in the data, loss scale, time used, code
    SHA256SUMS               of all of these, as `sha256sum -c` reads it
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nanochat.env import get_base_dir
from nanochat.files import sha256_file
from nanochat.stages import TRAINED

MODEL_FILE, META_FILE, SUMS_FILE = "model.safetensors", "meta.json", "SHA256SUMS"
DAMAGED = (OSError, ValueError, KeyError, TypeError, SafetensorError)
"""The exceptions that reading a damaged checkpoint may raise."""
# Six digits, or more without leading zeros: each step has one name, so no two folders can claim the same step.
_STEP = re.compile(r"step_(\d{6}|[1-9]\d{6,})")
_SUM = re.compile(r"([0-9a-f]{64})  ([\w.]+)\n")


def check_tag(tag: str | None) -> None:
    """Raise ValueError where a --model_tag is no name that a folder can have."""
    if tag is not None and (Path(tag).name != tag or tag[:1] in ("", ".") or "\0" in tag or len(tag.encode()) > 200):
        raise ValueError(
            f"--model_tag={tag[:100]}: give a short folder name, without a path and without a dot in front"
        )


def checkpoint_folder(source: str, tag: str) -> Path:
    """The folder of a stage's checkpoints under `tag`."""
    if source not in TRAINED:
        raise ValueError(f"unknown model source {source!r}: choose one of {', '.join(TRAINED)}")
    return get_base_dir() / TRAINED[source].folder / tag


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return folder / f"step_{step:06d}"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps saved in `folder`, ascending; strays and half-written folders are ignored."""
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(p.name), p) for p in folder.iterdir())
    return sorted(int(m.group(1)) for m, p in matches if m and (p / META_FILE).is_file())


def check_saved(folder: Path, step: int | None) -> None:
    """Raise FileNotFoundError where a --step is none of those saved in `folder`."""
    steps = saved_steps(folder)
    if step is not None and step not in steps:
        have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has none"
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}: {have}")


def find_tag(source: str, model_tag: str | None = None) -> Path:
    """Return the folder of `model_tag`, else of the deepest model, else of the one saved last.

    Raises:
        FileNotFoundError: there is none; says which command makes one.
        ValueError: `model_tag` is no name that a folder can have.
    """
    return choose_tag(source, model_tag)[0]


def choose_tag(source: str, model_tag: str | None = None) -> tuple[Path, str]:
    """Return `find_tag`'s folder, and why it was chosen."""
    check_tag(model_tag)
    root = checkpoint_folder(source, "x").parent
    command = f"python -m scripts.{TRAINED[source].name}"
    if model_tag is not None:
        if not saved_steps(root / model_tag):
            raise FileNotFoundError(
                f"no {source} checkpoint with tag {model_tag!r} in {root}: train it with `{command}`"
            )
        return root / model_tag, "asked for"
    # A run that a fresh start has moved aside is taken only when it is named, one that has just begun not at all.
    found = [p for p in root.iterdir() if p.suffix != ".old" and not p.name.startswith(".")] if root.is_dir() else []
    tags = [p for p in found if saved_steps(p)]
    if not tags:
        raise FileNotFoundError(
            f"no {source} checkpoint in {root}: train one with `{command}` (or everything: `bash speedrun_p100.sh`)"
        )

    def depth(tag: Path) -> int:
        match = re.fullmatch(r"d(\d+)", tag.name)
        return int(match.group(1)) if match else -1

    chosen = max(tags, key=lambda tag: (depth(tag), tag.stat().st_mtime))
    names = ", ".join(sorted(tag.name for tag in tags))
    if len(tags) == 1:
        return chosen, "the only one"
    return chosen, f"the deepest of {names}" if depth(chosen) >= 0 else f"saved last of {names}"


def optimizer_file(rank: int) -> str:
    """Return the name of a rank's part of the optimizer state."""
    return f"optim_rank{rank}.safetensors"


def read_meta(path: Path) -> dict[str, Any]:
    """Read the meta.json of the checkpoint in the folder `path`, once its hash is checked."""
    if sha256_file(path / META_FILE) != read_sums(path).get(META_FILE):
        raise ValueError(f"{META_FILE} does not match its SHA-256")
    meta = json.loads((path / META_FILE).read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        raise ValueError(f"{META_FILE} holds no record")
    return meta


def weights_hash(path: Path) -> str:
    """Return the SHA-256 of the weights in the folder `path`: it names the model wherever results are kept."""
    return read_sums(path)[MODEL_FILE]


def read_sums(path: Path) -> dict[str, str]:
    """Read SHA256SUMS: hashes by file name."""
    text = (path / SUMS_FILE).read_text(encoding="ascii")
    sums = {name: digest for digest, name in _SUM.findall(text)}
    # Written again it must be the same text: the list of hashes has no hash of its own that would show damage.
    if text != format_sums(sums):
        raise ValueError(f"{SUMS_FILE} is malformed")
    return sums


def format_sums(sums: dict[str, str]) -> str:
    """Return the text of SHA256SUMS."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
