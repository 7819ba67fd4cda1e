"""The evaluation bundle of CORE: found or downloaded, and read. See nanochat/core_eval.py, which evaluates it.

A bundle is somebody's file: what is in it is checked, and nothing is read from outside it.
"""

from __future__ import annotations

import csv
import random
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from nanochat.data.download import download_file_with_lock
from nanochat.env import get_base_dir
from nanochat.files import atomic_folder, read_jsonl

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# The kinds of tasks, and the columns each needs in its data.
COLUMNS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
# A bundle is somebody's file; more than this it has only if it was made to do harm.
MOST_BUNDLE_BYTES, MOST_TASK_BYTES, MOST_CONFIG_CHARS, MOST_SHOTS = 20 << 30, 2 << 30, 1 << 20, 1000
SHUFFLE_SEED = 1337
Item = Mapping[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """One task of a bundle."""

    label: str
    kind: str
    path: Path
    num_fewshot: int
    delimiter: str
    """The text between a context and its continuation."""
    baseline: float
    """Accuracy of guessing, 0 to 1."""


@dataclass(frozen=True)
class Bundle:
    """The tasks of a bundle whose data is there, and the labels of the others."""

    tasks: list[CoreTask]
    missing: list[str]


def get_bundle_folder(path: str | Path | None = None) -> Path:
    """The bundle's folder: `path`, else <base dir>/eval_bundle, downloaded (162 MB) and unpacked when not there.

    Raises:
        FileNotFoundError: `path` is no bundle, or there is none and it can't be downloaded.
    """
    folder = get_base_dir() / "eval_bundle" if path is None else Path(path).expanduser()
    if (folder / "core.yaml").is_file():
        return folder
    if path is not None:
        raise FileNotFoundError(f"--eval_bundle {folder}: no core.yaml there; name the folder that holds it")
    try:
        archive = download_file_with_lock(BUNDLE_URL, "eval_bundle.zip")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"the CORE evaluation bundle is unavailable: {error}. Or name a folder with it: --eval_bundle PATH"
        ) from error
    with FileLock(f"{folder}.lock"):
        if not (folder / "core.yaml").is_file():
            _unpack(archive, folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a bundle's zip so that `folder` appears whole; a damaged zip is removed, to be downloaded again."""
    try:
        with zipfile.ZipFile(archive) as bundle:
            size = sum(member.file_size for member in bundle.infolist())
        if size > MOST_BUNDLE_BYTES:
            raise zipfile.BadZipFile(f"it would unpack to {size / 1e9:,.0f} GB")
        with zipfile.ZipFile(archive) as bundle, atomic_folder(folder, size) as tmp:
            bundle.extractall(tmp)
            inner = tmp / "eval_bundle"  # the public zip holds one folder of this name
            for path in list(inner.iterdir()) if inner.is_dir() else []:
                path.rename(tmp / path.name)
            if not (tmp / "core.yaml").is_file():
                raise zipfile.BadZipFile("it has no core.yaml")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        archive.unlink()
        raise FileNotFoundError(f"{archive} is no evaluation bundle ({error}): removed, run again") from error


def load_bundle(folder: Path, only: Sequence[str] | None = None) -> Bundle:
    """Read core.yaml and the baselines; `only` keeps the tasks with these labels.

    Raises:
        FileNotFoundError: a file of the bundle is missing, or no task has data.
        ValueError: core.yaml is malformed or names an unknown kind of task, or `only` an unknown task.
    """
    try:
        config = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8")[:MOST_CONFIG_CHARS])
        with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
        entries = [(_text(entry, "label"), entry) for entry in config["icl_tasks"]]
    except (yaml.YAMLError, csv.Error, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"evaluation bundle {folder} is malformed: {type(error).__name__} {said}") from error
    labels = [label for label, _ in entries]
    unknown = [label for label in only or () if label not in labels]
    if unknown:
        raise ValueError(f"no CORE task {', '.join(unknown)} in {folder}; there are {', '.join(labels)}")
    tasks = [_read_task(folder, entry, baselines) for label, entry in entries if not only or label in only]
    present = [task for task in tasks if task.path.is_file()]
    if not present:
        raise FileNotFoundError(f"evaluation bundle {folder} holds no data: eval_data is empty")
    return Bundle(present, [label for label in labels if label not in {task.label for task in present}])


def _text(entry: Any, name: str) -> str:
    """A text of core.yaml. What is none is not shown: a few lines of YAML can stand for gigabytes."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{name} of a task is {type(value).__name__}, expected a text")
    return value


def _read_task(folder: Path, entry: Mapping[str, Any], baselines: Mapping[str, float]) -> CoreTask:
    where = folder / "core.yaml"
    label, kind, name = (_text(entry, key) for key in ("label", "icl_task_type", "dataset_uri"))
    if kind not in COLUMNS:
        raise ValueError(f"{where}: task {label} is of the unknown kind {kind!r}; known: {[*COLUMNS]}")
    if label not in baselines:
        raise ValueError(f"{folder / 'eval_meta_data.csv'} has no random baseline for task {label}")
    if not 0 <= baselines[label] < 1:
        raise ValueError(
            f"{folder / 'eval_meta_data.csv'}: the random baseline of task {label} is no share below 100 %"
        )
    path = folder / "eval_data" / name
    if not path.resolve().is_relative_to((folder / "eval_data").resolve()):
        raise ValueError(f"{where}: the data of task {label} are outside the bundle ({name})")
    shots = entry.get("num_fewshot")
    if not isinstance(shots, list) or not shots or type(shots[0]) is not int or not 0 <= shots[0] <= MOST_SHOTS:
        raise ValueError(f"{where}: num_fewshot of task {label} must be a list of a number from 0 to {MOST_SHOTS}")
    delimiter = _text(entry, "continuation_delimiter") if "continuation_delimiter" in entry else " "
    return CoreTask(label, kind, path, shots[0], delimiter, baselines[label])


def load_items(task: CoreTask) -> list[Item]:
    """The task's examples in CORE's shuffled order. Raises ValueError for a file with no or incomplete examples."""
    if task.path.stat().st_size > MOST_TASK_BYTES:
        raise ValueError(f"{task.path} has more than {MOST_TASK_BYTES >> 20} MB: that is no task of CORE")
    items: list[Item] = list(read_jsonl(task.path))
    if not items:
        raise ValueError(f"{task.path} holds no examples")
    for number, item in enumerate(items, 1):
        lacking = [column for column in COLUMNS[task.kind] if column not in item]
        if lacking:
            raise ValueError(f"{task.path}, example {number}: lacks {', '.join(lacking)}, needed for {task.kind}")
        if wrong := _wrong_column(task.kind, item):
            raise ValueError(f"{task.path}, example {number}: {wrong} is not what {task.kind} needs")
    random.Random(SHUFFLE_SEED).shuffle(items)
    return items


def _wrong_column(kind: str, item: Item) -> str | None:
    """The first column that holds something of another form."""
    several = {"multiple_choice": "choices", "schema": "context_options"}.get(kind)
    texts = item[several] if several else []
    if several and not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        return several
    if several and not (isinstance(item["gold"], int) and 0 <= item["gold"] < len(texts)):
        return "gold"
    single = [column for column in COLUMNS[kind] if column not in (several, "gold")]
    return next((column for column in single if not isinstance(item[column], str)), None)
