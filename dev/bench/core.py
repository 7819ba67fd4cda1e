"""CORE: our batched evaluation against a plain one, an example at a time with the logits of every position.

python -m dev.bench.core --hf_path FOLDER --eval_bundle FOLDER [--n 8] [--tasks "copa|piqa"]

Both evaluate the same examples of each task, in float32. Prints the speed-up per kind of task, whether all answers are
the same, and one JSON line last.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass
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
from nanochat.hf_model import HuggingFaceTokenizer, load_hf_model


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    hf_path: str
    """Hugging Face model: folder or name."""
    eval_bundle: str | None = None
    """Folder with core.yaml."""
    n: int = 8
    """Examples per task."""
    tasks: str | None = None
    """Only these tasks."""
    batch_tokens: int = 8192
    """Padded tokens in a batch of ours."""


def same_at_start(rows: list[list[int]]) -> int:
    """Length of the common beginning."""
    n = 0
    while all(len(row) > n and row[n] == rows[0][n] for row in rows):
        n += 1
    return n


@torch.no_grad()
def plain_answer(model: Any, tokenizer: HuggingFaceTokenizer, task: CoreTask, items: list[Item], i: int) -> bool:
    """One example: all of its rows through the whole model, losses from the logits of all positions."""
    shots = pick_fewshot(i, items, items, task.num_fewshot)
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
        return bool((logits[0, s - 1 : e - 1].argmax(-1) == idx[0, s:e]).all())
    means = [float(losses[r, s - 1 : len(row) - 1].mean()) for r, (row, s) in enumerate(zip(rows, starts, strict=True))]
    return means.index(min(means)) == items[i]["gold"]


def main(cfg: Config) -> None:
    """Measure task after task."""
    model, tokenizer = load_hf_model(cfg.hf_path, torch.device("cpu"))
    bundle = load_bundle(get_bundle_folder(cfg.eval_bundle), cfg.tasks.split("|") if cfg.tasks else None)
    seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    different = total = 0
    for task in bundle.tasks:
        items = load_items(task)[: cfg.n]
        start = time.perf_counter()
        plain = [plain_answer(model.model, tokenizer, task, items, i) for i in range(len(items))]
        middle = time.perf_counter()
        ours = evaluate_task(model, tokenizer, task, items, batch_tokens=cfg.batch_tokens)
        end = time.perf_counter()
        for kind in (task.kind, "all"):
            seconds[kind][0] += middle - start
            seconds[kind][1] += end - middle
        different += sum(a != b for a, b in zip(plain, ours, strict=True))
        total += len(items)
        print(
            f"{task.label:<35} {task.kind:<18} plain {middle - start:6.2f} s  ours {end - middle:6.2f} s  "
            f"×{(middle - start) / (end - middle):5.2f}  accuracy {sum(plain) / len(items):.3f} / "
            f"{sum(ours) / len(items):.3f} ({len(items)})",
            flush=True,
        )
    speedups = {kind: round(a / b, 2) for kind, (a, b) in seconds.items()}
    print(f"speed-up {speedups}; answers that differ: {different} of {total}")
    print(json.dumps({"speedup": speedups, "different": different, "examples": total}))


if __name__ == "__main__":
    run_script(main, Config)
