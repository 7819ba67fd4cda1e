"""CORE, a benchmark of base models: the mean over in-context learning tasks of an evaluation bundle.

A bundle is a folder with core.yaml (the tasks), eval_meta_data.csv (the accuracy of guessing) and eval_data/**.jsonl.
Three kinds of tasks, none of which needs the model to generate:

- multiple_choice: one context, several continuations; the one with the lowest mean loss wins.
- schema: several contexts, one continuation; the context that makes the continuation likeliest wins.
- language_modeling: right when every token of the continuation is the model's first choice.

Accuracies are centered, (accuracy - guessing) / (1 - guessing), and averaged.
Source: DCLM, https://arxiv.org/abs/2406.11794, section 3.5 and appendix G. Prompts and sampling follow nanochat.
"""

from __future__ import annotations

import csv
import random
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import yaml
from filelock import FileLock

from nanochat.data.download import download_file_with_lock
from nanochat.env import get_base_dir, get_dist_info
from nanochat.files import ResumeLog, atomic_folder, read_jsonl
from nanochat.progress import progress
from nanochat.scoring import (
    LanguageModel,
    Score,
    Span,
    TaskScore,
    batches_of_examples,
    common_prefix_length,
    mean_centered,
    score_groups,
)

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
FEWSHOT_SEED = 1234
# Examples tokenized and sorted by length together.
WINDOW = 512
Item = Mapping[str, Any]


class TextEncoder(Protocol):
    """The part of a tokenizer that CORE uses."""

    def encode(self, text: list[str], prepend: int | None = None) -> list[list[int]]:
        """Ids of each text, `prepend` first."""

    def get_bos_token_id(self) -> int:
        """The token that starts a document."""


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


@dataclass(frozen=True)
class CoreResult:
    """Results of all tasks."""

    tasks: list[TaskScore]
    missing: list[str]

    @property
    def partial(self) -> bool:
        """True if tasks are missing: then the score can't be compared with that of the whole bundle."""
        return bool(self.missing)

    @property
    def core(self) -> float:
        """The mean centered accuracy."""
        return mean_centered(self.tasks)[0]

    @property
    def stderr(self) -> float:
        """The standard error of `core`."""
        return mean_centered(self.tasks)[1]

    def csv(self) -> str:
        """The table in nanochat's form: Task, Accuracy, Centered."""
        lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
        lines += [f"{task.name:<35}, {task.accuracy:<10.6f}, {task.centered:<10.6f}" for task in self.tasks]
        lines.append(f"{'CORE (partial)' if self.partial else 'CORE':<35}, {'':<10}, {self.core:<10.6f}")
        return "\n".join(lines) + "\n"


# --- the bundle ------------------------------------------------------------------------------------------------------


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


# --- prompts ---------------------------------------------------------------------------------------------------------


def pick_fewshot(index: int, items: Sequence[Item], everything: Sequence[Item], count: int) -> list[Item]:
    """The solved examples shown before example `index` of `items`: never itself, the same in every run.

    They come from the evaluated examples, as in nanochat; when those are too few, from the whole task.
    """
    # nanochat draws from the examples it evaluates, so --max_per_task changes the prompts too; the seed is the
    # example's number. Drawn from one less than there are, then shifted past `index`: every other example is equally
    # likely.
    pool = items if len(items) > count else everything
    others = random.Random(FEWSHOT_SEED + index).sample(range(len(pool) - 1), min(count, len(pool) - 1))
    return [pool[i + (i >= index)] for i in others]


def render_prompts(task: CoreTask, item: Item, shots: Sequence[Item]) -> list[str]:
    """The texts to score: one per choice or context, and for language modeling without and with the continuation."""
    join = task.delimiter.join
    if task.kind == "multiple_choice":
        solved = [join((shot["query"], shot["choices"][shot["gold"]])) for shot in shots]
        asked = [join((item["query"], choice)) for choice in item["choices"]]
    elif task.kind == "schema":
        solved = [join((shot["context_options"][shot["gold"]], shot["continuation"])) for shot in shots]
        asked = [join((context, item["continuation"])) for context in item["context_options"]]
    else:
        solved = [join((shot["context"].strip(), shot["continuation"])) for shot in shots]
        asked = [join((item["context"].strip(), text)) for text in ("", item["continuation"])]
    prompts = ["\n\n".join([*solved, question]) for question in asked]
    if task.kind == "language_modeling":
        # A space at the end would be a token of its own, which the text with the continuation does not have.
        prompts[0] = prompts[0].strip()
    return prompts


def find_spans(kind: str, rows: Sequence[Sequence[int]]) -> list[Span]:
    """The spans of an example's tokenized prompts that are scored.

    At least one token of each is, also where one choice is the beginning of another and nothing else would be left.
    """
    if kind == "schema":  # the contexts differ, the continuation is the same: it is the common end
        suffix = common_prefix_length([row[::-1] for row in rows])
        return [Span(row, max(1, min(len(row) - suffix, len(row) - 1)), len(row)) for row in rows]
    same = common_prefix_length(rows)
    if kind == "language_modeling":
        rows = rows[1:]  # the prompt alone has only shown where the continuation begins
    start = max(1, min(same, *(len(row) - 1 for row in rows)))
    return [Span(row, start, len(row)) for row in rows]


def choose(kind: str, scores: Sequence[Score]) -> int:
    """The index of the preferred span; for language modeling 1 if the model would write the continuation, else 0."""
    if kind == "language_modeling":
        return int(scores[0].greedy)
    losses = [score.mean_nats for score in scores]  # means, not sums: longer choices are not punished
    return losses.index(min(losses))


def right_choice(kind: str, item: Item) -> int:
    """The result of `choose` that counts as correct."""
    return 1 if kind == "language_modeling" else int(item["gold"])


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluate_task(
    model: LanguageModel,
    tokenizer: TextEncoder,
    task: CoreTask,
    items: Sequence[Item],
    everything: Sequence[Item] | None = None,
    *,
    batch_tokens: int = 8192,
    finished: ResumeLog | None = None,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[bool]:
    """Tell for each of `items` if the model answers it right; ranks share the work, and all get the whole list.

    Args:
        model: see LanguageModel; prompts longer than its context lose their beginning.
        tokenizer: see TextEncoder.
        task: what `items` are.
        items: examples to answer, usually the first of `everything`.
        everything: all examples of the task, for few-shot prompts.
        batch_tokens: padded tokens in a batch.
        finished: answers of an interrupted run, which are not computed again, and where new ones are kept.
        on_progress: called with the number of examples finished.
    """
    _, rank, _, world_size = get_dist_info()
    everything = items if everything is None else everything
    correct = torch.zeros(len(items), dtype=torch.int32, device=model.get_device())
    before = [record for record in finished.records if record["task"] == task.label] if finished else []
    known = {record["index"]: bool(record["correct"]) for record in before if record["index"] < len(items)}
    mine = range(rank, len(items), world_size)  # every rank fills in its own; the sum at the end has them all
    todo = [i for i in mine if i not in known]
    for i in mine:
        correct[i] = known.get(i, False)
    on_progress(len(mine) - len(todo))
    for offset in range(0, len(todo), WINDOW):
        window = todo[offset : offset + WINDOW]
        shots = [pick_fewshot(i, items, everything, task.num_fewshot) for i in window]
        examples = [
            _tokenize(tokenizer, task, items[i], shown, model.max_seq_len)
            for i, shown in zip(window, shots, strict=True)
        ]
        for batch in batches_of_examples(examples, batch_tokens, model.max_seq_len):
            scores = iter(score_groups(model, [examples[b] for b in batch]))
            records = []
            for b in batch:
                i, choice = window[b], choose(task.kind, [next(scores) for _ in examples[b]])
                right = choice == right_choice(task.kind, items[i])
                correct[i] = right
                records.append({"task": task.label, "index": i, "choice": choice, "correct": right})
            if finished is not None:
                finished.add(records)
            on_progress(len(batch))
    if world_size > 1 and dist.is_initialized():
        dist.all_reduce(correct)
    return [bool(c) for c in correct.tolist()]


def _tokenize(tokenizer: TextEncoder, task: CoreTask, item: Item, shots: Sequence[Item], max_tokens: int) -> list[Span]:
    rows = tokenizer.encode(render_prompts(task, item, shots), prepend=tokenizer.get_bos_token_id())
    return [span.cropped(max_tokens) for span in find_spans(task.kind, rows)]


def evaluate_core(
    model: LanguageModel,
    tokenizer: TextEncoder,
    bundle: Bundle,
    *,
    max_per_task: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    batch_tokens: int = 8192,
    finished: ResumeLog | None = None,
    on_result: Callable[[TaskScore], None] = lambda result: None,
) -> CoreResult:
    """Evaluate every task of a bundle on its first `max_per_task` shuffled examples (all by default).

    Args:
        model: in eval mode.
        tokenizer: the model's.
        bundle: from `load_bundle`.
        max_per_task: at least 1, or None.
        autocast: makes the context to run the model in.
        batch_tokens: padded tokens in a batch.
        finished: answers of an interrupted evaluation.
        on_result: called with each task's result when it is known.
    """
    if max_per_task is not None and max_per_task < 1:
        raise ValueError(f"max_per_task must be at least 1, got {max_per_task}")
    results = []
    for task in bundle.tasks:
        everything = load_items(task)
        items = everything[:max_per_task]
        with progress(len(items), task.label) as bar, autocast():
            correct = evaluate_task(
                model,
                tokenizer,
                task,
                items,
                everything,
                batch_tokens=batch_tokens,
                finished=finished,
                on_progress=bar.advance,
            )
        results.append(TaskScore(task.label, [{"passed": c} for c in correct], task.baseline))
        on_result(results[-1])
    return CoreResult(results, bundle.missing)
