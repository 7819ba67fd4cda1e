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

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from nanochat.data.core_bundle import (  # noqa: F401 - a part of it for programs outside
    COLUMNS,
    Bundle,
    CoreTask,
    Item,
    get_bundle_folder,
    load_bundle,
    load_items,
)
from nanochat.env import get_dist_info
from nanochat.files import ResumeLog
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

FEWSHOT_SEED = 1234
# Examples tokenized and sorted by length together.
WINDOW = 512


class TextEncoder(Protocol):
    """The part of a tokenizer that CORE uses."""

    def encode(self, text: list[str], prepend: int | None = None) -> list[list[int]]:
        """Ids of each text, `prepend` first."""

    def get_bos_token_id(self) -> int:
        """The token that starts a document."""


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
