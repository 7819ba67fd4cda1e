"""CORE, the benchmark of base models: in-context learning on 22 tasks.

python -m scripts.base_eval
python -m scripts.base_eval --eval_bundle=/path/to/eval_bundle --max_per_task=100
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from nanochat.checkpoint_manager import find_tag, load_model
from nanochat.common import get_base_dir, print0, print_banner, setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.core_eval import CoreResult, TaskResult, evaluate_core, get_bundle_folder, load_bundle
from nanochat.progress import format_seconds
from nanochat.report import get_report

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
    skip_if_missing: bool = False
    """Say so and exit well when there is no evaluation bundle."""

    def __post_init__(self) -> None:
        if self.max_per_task is not None and self.max_per_task < 1 and self.max_per_task != -1:
            raise ValueError(f"--max_per_task must be at least 1 (or -1 for all), got {self.max_per_task}")
        if self.batch_tokens < 1:
            raise ValueError(f"--batch_tokens must be at least 1, got {self.batch_tokens}")


def print_result(result: TaskResult) -> None:
    """One line per task."""
    print0(
        f"{result.label:<35} accuracy {result.accuracy:.4f} ± {result.stderr:.4f}  centered {result.centered:+.4f}  "
        f"({len(result.correct)} examples)"
    )


def report_lines(result: CoreResult) -> dict[str, str]:
    """Each task's centered accuracy, for the report."""
    return {
        task.label: f"accuracy {task.accuracy:.4f} ± {task.stderr:.4f}, centered {task.centered:.4f}"
        for task in result.tasks
    }


def main(cfg: Config) -> None:
    """Find the bundle, evaluate, write CSV and report."""
    print_banner()
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
    start = time.monotonic()
    with setup_compute(cfg.runtime) as compute:
        model, tokenizer, meta = load_model("base", compute.device, "eval", cfg.model_tag, cfg.step)
        result = evaluate_core(
            model,
            tokenizer,
            bundle,
            max_per_task=None if cfg.max_per_task == -1 else cfg.max_per_task,
            autocast=compute.precision.autocast,
            batch_tokens=cfg.batch_tokens,
            on_result=print_result,
        )
        name = "CORE (partial)" if result.partial else "CORE"
        print0(f"{name} {result.core:.4f} ± {result.stderr:.4f} in {format_seconds(time.monotonic() - start)}")
        if compute.rank == 0:
            tag = find_tag("base", cfg.model_tag).name
            path = get_base_dir() / "base_eval" / f"base_{tag}_{meta['step']:06d}.csv"
            result.save_csv(path)
            print0(f"wrote {path}")
            facts = {
                "model": f"{tag}, step {meta['step']}",
                name: f"{result.core:.4f} ± {result.stderr:.4f}",
                "examples per task": "all" if cfg.max_per_task in (None, -1) else f"at most {cfg.max_per_task}",
                "tasks missing": ", ".join(result.missing) or "none",
                "time": format_seconds(time.monotonic() - start),
            }
            get_report().log(SECTION, [facts, report_lines(result)], metrics={name: result.core})


if __name__ == "__main__":
    run_script(main, Config)
