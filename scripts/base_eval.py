"""CORE, the benchmark of base models: in-context learning on 22 tasks.

python -m scripts.base_eval
python -m scripts.base_eval --eval_bundle=/path/to/eval_bundle --max_per_task=100
python -m scripts.base_eval --hf_path=openai-community/gpt2
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

Killed and started again with the same settings, it resumes where it was. The scores are in <base dir>/base_eval/*.csv,
the model's choice in every example in a .jsonl beside it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from nanochat.checkpoint.format import check_saved, find_tag, step_folder, weights_hash
from nanochat.config import Runtime, run_script, short
from nanochat.data.core_bundle import Bundle, get_bundle_folder, load_bundle
from nanochat.env import get_base_dir, print0
from nanochat.files import ResumeLog, seal, write_jsonl, write_text
from nanochat.progress import format_seconds, print_banner
from nanochat.report import get_report
from nanochat.report.text import slugify

if TYPE_CHECKING:
    import torch

    from nanochat.common import Compute
    from nanochat.core_eval import CoreResult, TextEncoder
    from nanochat.scoring import LanguageModel, TaskScore

SECTION = "Base model evaluation"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a CORE evaluation."""

    runtime: Runtime = field(default_factory=Runtime)
    eval_bundle: str | None = None
    """Folder with core.yaml; default: <base dir>/eval_bundle, downloaded (162 MB) when missing."""
    tasks: str | None = None
    """Only these tasks, as "copa|boolq"; the score is then partial."""
    max_per_task: int | None = None
    """Examples per task; default (or -1): all."""
    batch_tokens: int = 8192
    """Padded tokens computed together: lower it when memory runs out."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    hf_path: str | None = None
    """Evaluate this Hugging Face model instead: a folder, or a name on the hub."""
    skip_if_missing: bool = False
    """Say so and exit well when there is no evaluation bundle."""

    @property
    def limit(self) -> int | None:
        """max_per_task, None for all."""
        return None if self.max_per_task == -1 else self.max_per_task

    def __post_init__(self) -> None:
        if self.max_per_task is not None and self.max_per_task < 1 and self.max_per_task != -1:
            raise ValueError(f"--max_per_task must be at least 1 (or -1 for all), got {self.max_per_task}")
        if self.batch_tokens < 1:
            raise ValueError(f"--batch_tokens must be at least 1, got {self.batch_tokens}")


def print_result(result: TaskScore) -> None:
    """One line per task."""
    print0(
        f"{result.name:<35} accuracy {result.accuracy:.4f} ± {result.stderr:.4f}  centered {result.centered:+.4f}  "
        f"({len(result.records)} examples)"
    )


def report_lines(result: CoreResult) -> dict[str, str]:
    """Each task's centered accuracy, for the report."""
    return {
        task.name: f"accuracy {task.accuracy:.4f} ± {task.stderr:.4f}, centered {task.centered:.4f}"
        for task in result.tasks
    }


def main(cfg: Config) -> None:
    """Find model and bundle, evaluate, write CSV and report."""
    print_banner()
    # First: nothing is downloaded for a model that is not there.
    if cfg.hf_path is None:
        check_saved(find_tag("base", cfg.model_tag), cfg.step)
    else:
        from nanochat.interop.hf_model import check_hf_model  # lazy: as below

        check_hf_model(cfg.hf_path)
    try:
        folder = get_bundle_folder(cfg.eval_bundle)
        bundle = load_bundle(folder, cfg.tasks.split("|") if cfg.tasks else None)
    except FileNotFoundError as error:
        if not cfg.skip_if_missing:
            raise
        print0(f"CORE is skipped: {error}")
        get_report().log(SECTION, [f"CORE was skipped: {error}"])
        return
    if bundle.missing:
        print0(f"not evaluated, so CORE is partial: {', '.join(bundle.missing)}")
    from nanochat.common import setup_compute  # lazy: torch, which is not needed to say that CORE is skipped

    with setup_compute(cfg.runtime) as compute:
        evaluate(cfg, folder, bundle, compute)


def evaluate(cfg: Config, folder: Path, bundle: Bundle, compute: Compute) -> None:
    """Evaluate the model on the bundle; write what came out."""
    import torch.distributed as dist  # lazy: as in main

    from nanochat.core_eval import evaluate_core  # lazy: as in main

    start = time.monotonic()
    subject = load_subject(cfg, compute.device)
    part = f"_{slugify(cfg.tasks)}" if cfg.tasks else ""  # beside the file of all tasks
    csv_path = get_base_dir() / "base_eval" / f"{subject.slug}{part}.csv"
    finished = ResumeLog(csv_path.with_suffix(".unfinished") / fingerprint(cfg, folder, subject, compute))
    if finished.records:
        print0(f"resuming after {len(finished.records)} examples that an earlier run has answered")
    if dist.is_initialized():
        dist.barrier()  # all have read what there is before anybody adds to it
    result = evaluate_core(
        subject.model,
        subject.tokenizer,
        bundle,
        max_per_task=cfg.limit,
        autocast=compute.precision.autocast,
        batch_tokens=cfg.batch_tokens,
        finished=finished,
        on_result=print_result,
    )
    name = "CORE (partial)" if result.partial else "CORE"
    print0(f"{name} {result.core:.4f} ± {result.stderr:.4f} in {format_seconds(time.monotonic() - start)}")
    if compute.rank == 0:
        write_text(csv_path, result.csv())
        write_jsonl(csv_path.with_suffix(".jsonl"), map(seal, read_answers(finished.path.parent, result)))
        shutil.rmtree(csv_path.with_suffix(".unfinished"), ignore_errors=True)
        print0(f"wrote {csv_path}")
        facts = {
            "model": subject.name,
            name: f"{result.core:.4f} ± {result.stderr:.4f}",
            "examples per task": "all" if cfg.limit is None else f"at most {cfg.limit}",
            "tasks missing": ", ".join(result.missing) or "none",
            "time": format_seconds(time.monotonic() - start),
        }
        if cfg.hf_path is None:  # the report is about our own model
            section = get_report().section_for(SECTION, cfg.tasks, [name]) if cfg.tasks else SECTION
            get_report().log(section, [facts, report_lines(result)], metrics={name: result.core})


def read_answers(folder: Path, result: CoreResult) -> list[dict[str, Any]]:
    """The model's choice in each example, in order, from what all ranks kept in `folder`."""
    place = {task.name: i for i, task in enumerate(result.tasks)}
    answers = {(place[r["task"]], r["index"]): r for r in ResumeLog(folder).records if r["task"] in place}
    return [answers[key] for key in sorted(answers)]


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated."""

    model: LanguageModel
    tokenizer: TextEncoder
    name: str
    slug: str
    version: str
    """Changes when the model's files do."""


def load_subject(cfg: Config, device: torch.device) -> Subject:
    """Our checkpoint, or the Hugging Face model that was asked for."""
    from nanochat.checkpoint_manager import load_model  # lazy: as in main
    from nanochat.interop.hf_model import load_hf_model

    if cfg.hf_path is not None:
        hf_model, hf_tokenizer = load_hf_model(cfg.hf_path, device)
        files = sorted(Path(cfg.hf_path).glob("*")) if Path(cfg.hf_path).is_dir() else []
        version = str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
        return Subject(hf_model, hf_tokenizer, cfg.hf_path, slugify(cfg.hf_path.strip("/.")), version)
    model, tokenizer, meta = load_model("base", device, "eval", cfg.model_tag, cfg.step)
    checkpoint = find_tag("base", cfg.model_tag)
    version = weights_hash(step_folder(checkpoint, meta["step"]))
    slug = f"base_{checkpoint.name}_{meta['step']:06d}"
    return Subject(model, tokenizer, f"{checkpoint.name}, step {meta['step']}", slug, version)


def fingerprint(cfg: Config, folder: Path, subject: Subject, compute: Compute) -> str:
    """Short name of everything that answers depend on: those of another fingerprint are not taken over."""
    facts = [subject.name, subject.version, str(folder.resolve()), cfg.limit, compute.precision.name]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    run_script(main, Config)
