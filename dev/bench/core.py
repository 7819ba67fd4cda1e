"""Compare our batched evaluation of CORE with a plain one: one example at a time, with the logits of every position.

python -m dev.bench.core --hf_path FOLDER --eval_bundle FOLDER [--n 6] [--tasks "copa|piqa"]

Both evaluate the same first `n` shuffled examples of each task, with the same few-shot examples, in float32 and one
after the other. Prints the speed-up per kind of task, in seconds and in seconds of processor time (which other work on
the machine affects less), the number of choices that differ, and finally one JSON line.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.config import run_script
from nanochat.core_eval import (
    CoreTask,
    Item,
    evaluate_task,
    get_bundle_folder,
    load_bundle,
    load_items,
    pick_fewshot,
    render_prompts,
)
from nanochat.files import ResumeLog
from nanochat.gpt import GPT
from nanochat.interop.hf_model import HuggingFaceModel, HuggingFaceTokenizer, load_hf_model


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison."""

    hf_path: str
    """Hugging Face model: folder or name."""
    eval_bundle: str | None = None
    """Folder with core.yaml."""
    n: int = 6
    """Examples per task."""
    tasks: str | None = None
    """Only these tasks."""
    batch_tokens: int = 8192
    """Padded tokens in one of our batches."""


def same_at_start(rows: list[list[int]]) -> int:
    """Length of the common prefix."""
    n = 0
    while all(len(row) > n and row[n] == rows[0][n] for row in rows):
        n += 1
    return n


@torch.no_grad()
def plain_choice(
    model: Any, tokenizer: HuggingFaceTokenizer, task: CoreTask, items: list[Item], everything: list[Item], i: int
) -> int:
    """Choose in one example: all rows go through the whole model, losses come from the logits of all positions."""
    shots = pick_fewshot(i, items, everything, task.num_fewshot)
    rows = tokenizer.encode(render_prompts(task, items[i], shots), prepend=tokenizer.get_bos_token_id())
    if task.kind == "schema":
        same = same_at_start([row[::-1] for row in rows])
        starts = [len(row) - same for row in rows]
    elif task.kind == "multiple_choice":
        starts = [min(same_at_start(rows), *(len(row) - 1 for row in rows))] * len(rows)
    else:
        starts, rows = [same_at_start(rows)], rows[1:]
    longest = max(map(len, rows))
    idx = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # (rows, T)
    logits: Tensor = model(idx).logits  # (rows, T, V)
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), idx[:, 1:], reduction="none")
    if task.kind == "language_modeling":
        s, e = starts[0], len(rows[0])
        return int((logits[0, s - 1 : e - 1].argmax(-1) == idx[0, s:e]).all())
    means = [float(losses[r, s - 1 : len(row) - 1].mean()) for r, (row, s) in enumerate(zip(rows, starts, strict=True))]
    return means.index(min(means))


class Stopwatch:
    """Measures the seconds and processor seconds of a block."""

    def __enter__(self) -> Stopwatch:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def our_choices(
    model: HuggingFaceModel | GPT, tokenizer: Any, task: CoreTask, items: list[Item], everything: list[Item], size: int
) -> list[int]:
    """The choice in each example, by evaluate_task."""
    with tempfile.TemporaryDirectory() as folder:
        log = ResumeLog(Path(folder))
        evaluate_task(model, tokenizer, task, items, everything, batch_tokens=size, finished=log)
        return [record["choice"] for record in sorted(ResumeLog(Path(folder)).records, key=lambda r: r["index"])]


def main(cfg: Config) -> None:
    """Measure task after task."""
    model, tokenizer = load_hf_model(cfg.hf_path, torch.device("cpu"))
    if not isinstance(model, HuggingFaceModel) or not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(f"--hf_path {cfg.hf_path}: the plain evaluation needs a model of transformers")
    bundle = load_bundle(get_bundle_folder(cfg.eval_bundle), cfg.tasks.split("|") if cfg.tasks else None)
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    different = total = 0
    for task in bundle.tasks:
        everything = load_items(task)
        items = everything[: cfg.n]
        with Stopwatch() as slow:
            plain = [plain_choice(model.model, tokenizer, task, items, everything, i) for i in range(len(items))]
        with Stopwatch() as fast:
            ours = our_choices(model, tokenizer, task, items, everything, cfg.batch_tokens)
        for kind in (task.kind, "all"):
            times = (slow.wall, fast.wall, slow.cpu, fast.cpu)
            seconds[kind] = [a + b for a, b in zip(seconds[kind], times, strict=True)]
        unequal = sum(a != b for a, b in zip(plain, ours, strict=True))
        different, total = different + unequal, total + len(items)
        print(
            f"{task.label:<33} {task.kind:<17} plain {slow.wall:6.2f} s  ours {fast.wall:6.2f} s  "
            f"×{slow.wall / fast.wall:5.2f} (processor time ×{slow.cpu / fast.cpu:5.2f})  "
            f"same choice {len(items) - unequal}/{len(items)}",
            flush=True,
        )
    speedups = {kind: round(s[0] / s[1], 2) for kind, s in seconds.items()}
    processor = {kind: round(s[2] / s[3], 2) for kind, s in seconds.items()}
    print(f"speed-up {speedups}, in processor time {processor}; choices that differ: {different} of {total}")
    print(json.dumps({"speedup": speedups, "processor": processor, "different": different, "examples": total}))


if __name__ == "__main__":
    run_script(main, Config)
