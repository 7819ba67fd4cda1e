"""Evaluate an assistant: multiple choice by letter, everything else by writing an answer that the task judges.

python -m scripts.chat_eval -i sft
python -m scripts.chat_eval -i sft -a "GSM8K|ARC-Easy" -x 50
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -i mid
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.distributed as dist

from nanochat.chat_eval import check_samples, evaluate_chat_task
from nanochat.checkpoint.format import step_folder, weights_hash
from nanochat.checkpoint_manager import find_tag, load_model
from nanochat.common import Compute, get_base_dir, print0, print_banner, setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.engine import Engine
from nanochat.execution import isolation
from nanochat.files import ResumeLog, place_of, seal, write_jsonl
from nanochat.generate.sampling import Sampling
from nanochat.gpt import GPT
from nanochat.report import get_report
from nanochat.report.text import slugify
from nanochat.scoring import TaskScore, mean_centered
from nanochat.serve.choose_model import choose_drawing
from nanochat.tokenizer import RustBPETokenizer
from tasks.common import CodeTask, Task
from tasks.registry import CLASSIC_TASKS, demo_tasks, get_task, load_available


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an assistant's evaluation."""

    runtime: Runtime = field(default_factory=Runtime)
    source: Annotated[Literal["mid", "sft", "rl"], short("-i")] = "sft"
    """Which stage's model."""
    task_name: Annotated[str | None, short("-a")] = None
    """Tasks as "GSM8K|ARC-Easy"; default: the demo world's for a model trained on it, else those nanochat uses."""
    temperature: Annotated[float, short("-t")] = 0.0
    """0 takes the likeliest token."""
    min_answer_p: float | None = None
    """Instead of an answer that the model finds less likely than this, say that it does not know; 0: let it guess.
    Default: as a chat with the model does."""
    max_new_tokens: Annotated[int, short("-m")] = 512
    """Longest answer."""
    num_samples: Annotated[int, short("-n")] = 1
    """Answers per problem; one right answer solves it."""
    top_k: Annotated[int, short("-k")] = 50
    """Sample from the k likeliest tokens; 0: from all."""
    batch_size: Annotated[int, short("-b")] = 32
    """Rows computed together."""
    max_problems: Annotated[int | None, short("-x")] = None
    """Problems per task; default: all."""
    allow_weak_isolation: bool = False
    """Run the code that a model writes (HumanEval) also where the kernel can't shut it off."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size (-b) must be at least 1, got {self.batch_size}")
        if self.max_problems is not None and self.max_problems < 1:
            raise ValueError(f"--max_problems (-x) must be at least 1, got {self.max_problems}")
        check_samples(self.num_samples, self.sampling({}))

    def sampling(self, meta: Mapping[str, Any]) -> Sampling:
        """The settings of answers by a model with this meta, checked."""
        drawing, _ = choose_drawing(
            meta, self.temperature, self.top_k, {"temperature": 0.0, "top_k": 50}, self.min_answer_p
        )
        return Sampling(**drawing, max_tokens=self.max_new_tokens, seed=self.runtime.seed)


def choose_tasks(
    task_name: str | None, meta: Mapping[str, Any], allow_weak_isolation: bool = False
) -> tuple[dict[str, Task], dict[str, str]]:
    """(tasks to evaluate, why others are not available). Tasks asked for by name must be there."""
    if task_name is not None:
        names = list(dict.fromkeys(name.strip() for name in task_name.split("|")))
        if "" in names:
            raise ValueError(f'--task_name (-a) is {task_name!r}, with a blank name: give tasks as "GSM8K|ARC-Easy"')
        once = cache(demo_tasks)
        named = [get_task(name, allow_weak_isolation=allow_weak_isolation, demo_tasks=once) for name in names]
        return {task.name: task for task in named}, {}
    if meta.get("chat_data") == "demo" or meta.get("config", {}).get("dataset") == "demo":
        return demo_tasks(), {}
    return load_available(list(CLASSIC_TASKS), allow_weak_isolation=allow_weak_isolation)


def evaluate(
    cfg: Config,
    tasks: Mapping[str, Task],
    model: GPT,
    tokenizer: RustBPETokenizer,
    compute: Compute,
    folder: Path,
    sampling: Sampling,
) -> list[TaskScore]:
    """Evaluate task after task; each one's problems and answers are logged to a file in `folder`."""
    engine = Engine(model, tokenizer, compute.precision)
    scores = []
    for name, task in tasks.items():
        if isinstance(task, CodeTask):
            print0(f"{name} runs the model's code; isolation is {isolation()}")
        log_path = folder / f"{slugify(name)}.jsonl"
        finished = ResumeLog(log_path.with_suffix(".unfinished") / fingerprint(cfg, compute, folder, sampling))
        if dist.is_initialized():
            dist.barrier()  # all have read what there is before anybody adds to it
        score = evaluate_chat_task(
            task,
            model,
            engine,
            tokenizer,
            max_problems=cfg.max_problems,
            batch_size=cfg.batch_size,
            sampling=sampling,
            num_samples=cfg.num_samples,
            autocast=compute.precision.autocast,
            finished=finished,
        )
        print_score(cfg, score)
        if compute.rank == 0:
            write_jsonl(log_path, [seal(record, place_of(log_path)) for record in score.records])
            shutil.rmtree(log_path.with_suffix(".unfinished"), ignore_errors=True)
        scores.append(score)
    return scores


def print_score(cfg: Config, score: TaskScore) -> None:
    """One line for the task, one for each group of its problems, one for pass@k."""
    for label, part in {score.name: score, **score.groups()}.items():
        indent = "" if part is score else "  "
        print0(f"{indent}{label}: {100 * part.accuracy:.2f}% ± {100 * part.stderr:.2f} ({len(part.records)} problems)")
    if rules := score.by_rule():
        shown = ", ".join(f"{name} {100 * share:.2f}%" for name, share in rules.items())
        print0(f"  by lm-evaluation-harness's rules: {shown}")
    # A prompt that fills the context has no answers, and counts as failed.
    if cfg.num_samples > 1 and all(record.get("num_samples") in (0, cfg.num_samples) for record in score.records):
        powers = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= cfg.num_samples]
        print0("  " + ", ".join(f"pass@{k} {100 * score.pass_at(k):.2f}%" for k in powers))


def fingerprint(cfg: Config, compute: Compute, folder: Path, sampling: Sampling) -> str:
    """A hash of all that answers depend on: those of another fingerprint are not taken over."""
    checkpoint = find_tag(cfg.source, cfg.model_tag)
    version = weights_hash(step_folder(checkpoint, int(folder.name[-6:])))
    data = os.environ.get("NANOCHAT_TASK_DIR")
    facts = [str(checkpoint), folder.name, version, sampling, cfg.num_samples, compute.precision.name, data]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def report(
    cfg: Config, meta: Mapping[str, Any], scores: list[TaskScore], missing: Mapping[str, str], sampling: Sampling
) -> None:
    """Print ChatCORE and log the section; a score over a part of the default tasks is called partial."""
    core, stderr = mean_centered(scores)
    partial = bool(missing) or cfg.task_name is not None
    core_name = "ChatCORE (partial)" if partial else "ChatCORE"
    print0(f"{core_name}: {core:.4f} ± {stderr:.4f} (mean centered accuracy of {len(scores)} tasks)")
    settings = {
        "model": f"{cfg.source}, step {meta['step']}",
        "problems per task": cfg.max_problems or "all",
        "temperature": cfg.temperature,
        "samples per problem": cfg.num_samples,
        **({f"below {sampling.min_answer_p:.0%} likely": repr(sampling.unsure)} if sampling.min_answer_p else {}),
    }
    lines: dict[str, Any] = {s.name: f"{100 * s.accuracy:.2f}% ± {100 * s.stderr:.2f}" for s in scores}
    lines[core_name] = f"{core:.4f} ± {stderr:.4f}"
    metrics = {s.name: s.accuracy for s in scores} | {core_name: core}
    notes = {f"{name} not evaluated": reason for name, reason in missing.items()}
    section = f"Chat evaluation {cfg.source}"
    if cfg.task_name is not None:
        section = get_report().section_for(section, ", ".join(s.name for s in scores), metrics)
    get_report().log(section, [settings, lines, notes], metrics=metrics)


def main(cfg: Config) -> None:
    """Load the model, evaluate its tasks, report."""
    print_banner()
    with setup_compute(cfg.runtime) as compute:
        model, tokenizer, meta = load_model(cfg.source, compute.device, "eval", cfg.model_tag, cfg.step)
        tasks, missing = choose_tasks(cfg.task_name, meta, cfg.allow_weak_isolation)
        for name, reason in missing.items():
            print0(f"{name} is not evaluated: {reason}")
        if not tasks:
            print0("no task could be loaded: nothing was evaluated")
            notes = {f"{name} not evaluated": reason for name, reason in missing.items()}
            get_report().log(f"Chat evaluation {cfg.source}", [notes])
            return
        tag = find_tag(cfg.source, cfg.model_tag).name
        folder = get_base_dir() / "chat_eval" / f"{cfg.source}_{tag}_{meta['step']:06d}"
        sampling = cfg.sampling(meta)
        if sampling.min_answer_p:
            print0(f"said instead of an answer less likely than {sampling.min_answer_p:.0%}: {sampling.unsure}")
        scores = evaluate(cfg, tasks, model, tokenizer, compute, folder, sampling)
        report(cfg, meta, scores, missing, sampling)
        print0(f"every question and answer: {folder}")


if __name__ == "__main__":
    run_script(main, Config)
