"""Compare CORE's choices with those of lm-evaluation-harness, on the same prompts, example by example.

pip install lm_eval, then
python -m dev.compare_lm_eval --hf_path FOLDER --eval_bundle FOLDER [--n 20] [--tasks "copa|piqa|..."]

Writes each task as a local YAML file with its rendered prompts (few-shot examples included) and lets the harness
score it. The harness reports the log-likelihood of each whole continuation; ours leaves out the tokens that all
choices share at their start. The choices are therefore compared by totals, where a shared constant cancels, and by
the mean per scored token. If two contexts (of a schema task) end with the same text, CORE scores that text too: it is
then part of the continuation that the harness gets.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nanochat.config import run_script
from nanochat.core_eval import (
    CoreTask,
    Item,
    find_spans,
    get_bundle_folder,
    load_bundle,
    load_items,
    pick_fewshot,
    render_prompts,
)
from nanochat.interop.hf_model import HuggingFaceModel, HuggingFaceTokenizer, load_hf_model
from nanochat.scoring import score_groups

TASKS = "copa|piqa|openbook_qa|winograd|winogrande|lambada_openai|bigbench_qa_wikidata"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison."""

    hf_path: str
    """Folder of a Hugging Face model."""
    eval_bundle: str | None = None
    """Folder with core.yaml."""
    n: int = 20
    """Examples per task."""
    tasks: str = TASKS
    """Labels of CORE tasks."""


def as_pairs(task: CoreTask, item: Item, shots: list[Item], tokenizer: HuggingFaceTokenizer) -> list[tuple[str, str]]:
    """(context, continuation) of each row of an example, as the harness asks for them."""
    prompts = render_prompts(task, item, shots)
    bos = tokenizer.tokenizer.decode([tokenizer.bos])
    if task.kind == "multiple_choice":
        endings = [task.delimiter + choice for choice in item["choices"]]
    elif task.kind == "schema":
        spans = find_spans(task.kind, tokenizer.encode(prompts, prepend=tokenizer.bos))
        endings = [tokenizer.tokenizer.decode(span.tokens[span.start :]) for span in spans]
    else:
        prompts, endings = prompts[1:], [prompts[1][len(prompts[0]) :]]
    for prompt, ending in zip(prompts, endings, strict=True):
        if not prompt.endswith(ending):
            raise RuntimeError(f"{task.label}: the prompt {prompt!r} does not end with {ending!r}")
    return [(bos + prompt[: len(prompt) - len(end)], end) for prompt, end in zip(prompts, endings, strict=True)]


def write_task(folder: Path, name: str, rows: list[tuple[str, str]]) -> None:
    """Write a local harness task with one document per row."""
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"ctx": context, "end": ending}) + "\n" for context, ending in rows)
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{end}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def harness_scores(cfg: Config, folder: Path, names: list[str]) -> dict[str, list[tuple[float, bool]]]:
    """(log-likelihood, greedy) of each row of each task, by lm_eval."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=cfg.hf_path, device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result: Any = lm_eval.simple_evaluate(
        lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, confirm_run_unsafe_code=True
    )
    scores = {}
    for name in names:
        samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
        scores[name] = [tuple(sample["filtered_resps"][0]) for sample in samples]
    return scores


def compare(
    model: HuggingFaceModel,
    tokenizer: HuggingFaceTokenizer,
    task: CoreTask,
    examples: list[tuple[Item, list[Item]]],
    theirs: list[tuple[float, bool]],
) -> tuple[int, float]:
    """(examples with the same choice, largest difference of totals in nats)."""
    same, worst, row = 0, 0.0, 0
    for item, shots in examples:
        texts = tokenizer.encode(render_prompts(task, item, shots), prepend=tokenizer.bos)
        spans = find_spans(task.kind, texts)
        ours = score_groups(model, [spans])
        part = theirs[row : row + len(spans)]
        row += len(spans)
        totals = [score.mean_nats * (span.end - span.start) for score, span in zip(ours, spans, strict=True)]
        their_totals = [-float(loglikelihood) for loglikelihood, _ in part]
        # Tokens that all choices share add the same to each of their totals; elsewhere the totals must be equal.
        by_row = [a - b for a, b in zip(their_totals, totals, strict=True)]
        shift = min(by_row) if task.kind == "multiple_choice" else 0.0
        worst = max(worst, *(abs(a - shift - b) for a, b in zip(their_totals, totals, strict=True)))
        if task.kind == "language_modeling":
            same += ours[0].greedy == bool(part[0][1])
            continue
        counts = [span.end - span.start for span in spans]
        their_means = [(a - shift) / n for a, n in zip(their_totals, counts, strict=True)]
        our_means = [score.mean_nats for score in ours]
        same += our_means.index(min(our_means)) == their_means.index(min(their_means))
    return same, worst


def main(cfg: Config) -> None:
    """Render, score twice, compare."""
    bundle = load_bundle(get_bundle_folder(cfg.eval_bundle), cfg.tasks.split("|"))
    model, tokenizer = load_hf_model(cfg.hf_path, torch.device("cpu"))
    examples: dict[str, list[tuple[Item, list[Item]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in bundle.tasks:
            everything = load_items(task)
            items = everything[: cfg.n]
            examples[task.label] = [
                (items[i], pick_fewshot(i, items, everything, task.num_fewshot)) for i in range(len(items))
            ]
            rows = [pair for item, shots in examples[task.label] for pair in as_pairs(task, item, shots, tokenizer)]
            write_task(folder, f"core_{task.label}", rows)
        theirs = harness_scores(cfg, folder, [f"core_{task.label}" for task in bundle.tasks])
    different = 0
    for task in bundle.tasks:
        same, worst = compare(model, tokenizer, task, examples[task.label], theirs[f"core_{task.label}"])
        count = len(examples[task.label])
        different += count - same
        print(f"{task.label:<25} {task.kind:<18} same choice {same}/{count}, totals differ by at most {worst:.1e} nats")
    sys.exit(int(different > 0))


if __name__ == "__main__":
    run_script(main, Config)
