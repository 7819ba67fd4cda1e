"""The skeleton of every training run (base, mid-training, SFT, RL): settings, one machine and folder, loop, report.

And what the stages after the base have in common: where they start, and which part of the model they train.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from nanochat.checkpoint.format import check_tag, saved_steps
from nanochat.checkpoint.saver import pending_folder
from nanochat.checkpoint_manager import (
    Checkpoint,
    build_model,
    checkpoint_folder,
    choose_tag,
    load_checkpoint,
    tokenizer_of,
)
from nanochat.common import Compute, print0, setup_compute
from nanochat.config import MOST, Runtime, positive
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.progress import format_seconds
from nanochat.recipe import PRESETS, Preset, Schedule, parameter_groups, recipe_of
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.clock import Clock
from nanochat.train.lora import (
    add_lora,
    load_lora,
    lora_groups,
    lora_tensors,
    merged_weights,
    train_last_layers,
    trainable_groups,
)
from nanochat.train.resume import find_resume, model_hash, run_lock, saved_dtype
from nanochat.train.tracking import TrackerName, init_tracker
from nanochat.train.trainer import EXTRA_STATE, Loader, Trainer, TrainSettings

MOST_RATE = 100.0  # Muon and AdamW move a number by about its rate: no recipe's is above 1
AT_LEAST_ONE = ("device_batch_size", "keep_last", "eval_tokens", "eval_batches", "lora_rank", "last_layers")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every training run has."""

    runtime: Runtime = field(default_factory=Runtime)
    run: str = "dummy"
    """Name of the run in the tracker; dummy means no tracker. metrics.jsonl is always written."""
    tracker: TrackerName = "wandb"
    """The service --run logs to."""
    model_tag: str | None = None
    """Name of the checkpoint folder."""
    num_iterations: int | None = None
    """Optimizer steps; goes before the other horizons (-1 is off, as in nanochat)."""
    hours: float | None = None
    """Be done in this time, last evaluation, samples and checkpoint included: the schedule follows the clock."""
    device_batch_size: int | Literal["auto"] = "auto"
    """Sequences per forward pass and process: auto finds the most that fit and pay. The total batch stays the same."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    warmup_ratio: float = 0.0
    """Share of the run in which the learning rate rises."""
    resume: Literal["auto", "never"] = "auto"
    """auto resumes an unfinished run of the same settings."""
    force: bool = False
    """Resume an unfinished run although settings differ."""
    eval_every: int = 150
    """Steps between evaluations (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints, besides those by the clock (0: none)."""
    save_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    keep_last: int = 2
    """Checkpoints of an unfinished run that stay, besides the best by its validation loss (RL: pass@1)."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this, for good (0: none)."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    def __post_init__(self) -> None:
        if self.hours is not None and self.hours <= 0:
            raise ValueError(f"--hours must be positive, got {self.hours}")
        for name, value in vars(self).items():
            if name in AT_LEAST_ONE and isinstance(value, int) and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
            never = name == "save_every_minutes" and value == math.inf
            if isinstance(value, float) and not (abs(value) < MOST or never):
                raise ValueError(f"--{name} must be a number below {MOST:g}, got {value}")
            bounded = name.endswith(("_lr", "_frac")) or name in ("weight_decay", "grad_clip", "lr_scale")
            off = name == "grad_clip" and value == -1  # as in the flags that count steps
            if bounded and isinstance(value, int | float) and not (off or value >= 0):
                raise ValueError(f"--{name} must be 0 or more, got {value}")
            if bounded and name != "grad_clip" and (value or 0) > MOST_RATE:  # a run would end with a dead model
                raise ValueError(f"--{name} must be at most {MOST_RATE:g}, got {value}")
        check_tag(self.model_tag)
        length = getattr(self, "max_seq_len", None)  # of the stages that read text
        if length is not None and length < 2:
            raise ValueError(f"--max_seq_len must be at least 2, got {length}: a token predicts the next one")


@dataclass(frozen=True, kw_only=True)
class StageConfig(RunConfig):
    """Settings that every stage after the base has."""

    model_tag: str | None = None
    """Tag of the model to start from; default: the deepest."""
    step: int | None = None
    """Step of the model to start from; default: the last."""
    num_iterations: int | None = None
    """Optimizer steps; default: as many as num_epochs need."""
    num_epochs: float = 1.0
    """Passes over the data."""
    max_epochs: float | None = None
    """No more passes than these, however many steps or hours are given; default: no limit."""
    lora_rank: int | None = None
    """Train thin matrices of this rank beside those of the blocks (LoRA), and merge them when saving."""
    lora_lr: float = 0.001
    """Learning rate of LoRA (init_lr_frac does not scale it)."""
    last_layers: int | None = None
    """Train only this many of the last layers, and lm_head."""
    embedding_lr: float = 0.2
    """Learning rate of the embedding, as in base_train."""
    unembedding_lr: float = 0.004
    """Learning rate of lm_head, as in base_train."""
    matrix_lr: float = 0.02
    """Learning rate of the matrices, as in base_train."""
    init_lr_frac: float | None = 1.0
    """All learning rates start at this share."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmdown_ratio: float = 0.2
    """Share of the run in which the learning rate falls."""
    final_lr_frac: float = 0.0
    """Learning rate at the end, as a share of the first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs <= 0:
            raise ValueError(f"--num_epochs must be positive, got {self.num_epochs}")
        if self.max_epochs is not None and self.max_epochs <= 0:
            raise ValueError(f"--max_epochs must be positive, got {self.max_epochs}")
        if self.lora_rank is not None and self.last_layers is not None:
            raise ValueError("--lora_rank and --last_layers are two ways of training a part: give one of them")


# --- a run ------------------------------------------------------------------------------------------------------------


@dataclass
class TrainingRun:
    """A run on this machine: its settings, its device and ranks, and the folder that it alone trains in."""

    label: str
    """base, mid, sft or rl."""
    cfg: RunConfig
    folder: Path
    compute: Compute
    clock: Clock
    replaces: Path | None = None
    """`folder`, where a fresh start takes it over from an older run."""

    def find_checkpoint(self, inputs: dict[str, str]) -> Checkpoint | None:
        """The checkpoint to resume from, if the run has the same settings and was made from the same `inputs`."""
        found = find_resume(self.folder, asdict(self.cfg), self.cfg.resume, inputs=inputs, force=self.cfg.force)
        if found is None and saved_steps(self.folder):
            self.replaces = self.folder
            print0(
                f"a run is in {self.folder}: it stays there until this one has its first checkpoint, and moves to "
                f"{self.folder.name}.old then"
            )
        return found

    def make_trainer(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        loader: Loader,
        schedule: Schedule,
        grad_accum_steps: int,
        inputs: dict[str, str],
        meta: dict[str, Any],
        **own: Any,
    ) -> Trainer:
        """The loop of every stage; `meta` and `own` (fields of the Trainer) are what this one has besides."""
        cfg = self.cfg
        config = asdict(cfg)
        project = "nanochat" if self.label == "base" else f"nanochat-{self.label}"
        settings = TrainSettings(
            schedule=schedule,
            grad_accum_steps=grad_accum_steps,
            grad_clip=positive(cfg.grad_clip),
            eval_every=positive(cfg.eval_every),
            sample_every=positive(getattr(cfg, "sample_every", None)),  # only the base samples on the way
            save_every=positive(cfg.save_every),
            save_every_minutes=positive(cfg.save_every_minutes) or math.inf,
            keep_last=cfg.keep_last,
            keep_every=positive(cfg.keep_every),
        )
        return Trainer(
            label=self.label,
            model=model,
            optimizer=optimizer,
            loader=loader,
            compute=self.compute,
            settings=settings,
            folder=self.folder if self.replaces is None else pending_folder(self.replaces),
            replaces=self.replaces,
            meta={"config": config, "inputs": inputs, "tokenizer_hash": inputs["tokenizer"]} | meta,
            clock=self.clock,
            tracker=init_tracker(cfg.tracker, cfg.run, project, config),
            **own,
        )

    def report(
        self, section: str, trainer: Trainer, facts: dict[str, Any], metrics: dict[str, Any], result: str = ""
    ) -> None:
        """Log a finished run to the report: its own `facts` and those of every run; prints `result` with the end."""
        state, precision = trainer.state, self.compute.precision
        facts = facts | {
            "steps": state.step,
            "tokens": state.tokens,
            "dtype": precision.name,
            "training time": format_seconds(state.seconds),
            "tokens per second": state.tokens / max(state.seconds, 1e-9),
            "skipped steps": precision.skipped,
            **({"steps without signal, not made": state.without_signal} if state.without_signal else {}),
            "loss scale": precision.scaler.get_scale(),
            "peak memory (GB)": self.compute.peak_memory_bytes() / 1e9,
        }
        metrics = {name: value for name, value in metrics.items() if value is not None}
        get_report().log(section=section, data=[trainer.meta["config"], facts], metrics=metrics or None)
        print0(f"{self.label} done: {state.step} steps in {format_seconds(state.seconds)}, {result}in {self.folder}")


@contextlib.contextmanager
def start_run(
    label: str, cfg: RunConfig, tag: str, clock: Clock, previous_dtype: str | None = None
) -> Iterator[TrainingRun]:
    """Set up device, ranks and dtype of a run and lock its folder; leaving it closes the process group.

    Args:
        label: the stage.
        cfg: the settings.
        tag: name of the checkpoint folder.
        clock: the run's, started by the script: all that happens before the first step counts too.
        previous_dtype: the dtype of the model to start from, taken where this device computes well in it.
    """
    folder = checkpoint_folder(label, tag)
    with (
        setup_compute(cfg.runtime, saved_dtype(folder, cfg.resume), previous_dtype) as compute,
        run_lock(folder, needed=not cfg.dry_run),
    ):
        yield TrainingRun(label, cfg, folder, compute, clock)


def train(trainer: Trainer, checkpoint: Checkpoint | None, answers_before: bool = False) -> None:
    """Train from the start, or from where a checkpoint stopped; `answers_before` prints samples of a fresh start."""
    if checkpoint is not None:
        trainer.resume(checkpoint.meta, checkpoint.optimizer)
        checkpoint.release()
    elif answers_before and trainer.sample is not None:
        print0(f"{trainer.label}: answers before")
        trainer.sample()
    trainer.run()
    trainer.tracker.finish()


def describe_horizon(schedule: Schedule) -> str:
    """The length of a run, for people."""
    steps = [f"{schedule.num_iterations:,} steps"] if schedule.num_iterations is not None else []
    time = [f"{format_seconds(schedule.seconds)} of training"] if schedule.seconds is not None else []
    return " or ".join(steps + time)


# --- where a stage starts, and what it trains -------------------------------------------------------------------------


def make_schedule(cfg: StageConfig, steps_per_epoch: float, preset: Preset) -> Schedule:
    """The asked steps, epochs or time, and no more than `max_epochs`; momentum and decay are those of the `preset`.

    Args:
        cfg: the settings.
        steps_per_epoch: of the stage's data.
        preset: the recipe of the base model.
    """
    iterations = positive(cfg.num_iterations)
    seconds = cfg.hours * 3600 if cfg.hours and iterations is None else None
    if iterations is None and seconds is None:
        iterations = max(1, round(cfg.num_epochs * steps_per_epoch))
    if cfg.max_epochs is not None:
        most = max(1, round(cfg.max_epochs * steps_per_epoch))
        if iterations is None or iterations > most:
            print0(f"the run has at most {most:,} steps: they read the data {cfg.max_epochs:g} times (--max_epochs)")
            iterations = most
    return Schedule(
        num_iterations=iterations,
        seconds=seconds,
        warmup_ratio=cfg.warmup_ratio,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
        momentum=preset.momentum,
        decay_to_zero=preset.decay_to_zero,
    )


class Start(NamedTuple):
    """The start of a stage."""

    tag: str
    """Name of the checkpoint folder."""
    checkpoint: Checkpoint
    tokenizer: RustBPETokenizer

    @property
    def preset(self) -> Preset:
        """The recipe of the base model."""
        return PRESETS[recipe_of(self.checkpoint.meta)]

    def inputs(self, **own: str) -> dict[str, str]:
        """Hashes by name of all that the run is made from, the stage's `own` among them."""
        return {"tokenizer": self.tokenizer.hash, "model": model_hash(self.checkpoint)} | own


def find_start(source: str, cfg: StageConfig) -> Start:
    """The checkpoint of an earlier stage, and the tokenizer it was trained with.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: that tokenizer is not there any more.
    """
    folder, why = choose_tag(source, cfg.model_tag)
    checkpoint = load_checkpoint(folder, cfg.step)
    tokenizer = tokenizer_of(checkpoint)
    print0(f"starts from {checkpoint.folder} ({why}{checkpoint.unfinished})")
    return Start(folder.name, checkpoint, tokenizer)


def prepare_model(
    cfg: StageConfig, start: Checkpoint, resumed: Checkpoint | None, device: torch.device
) -> tuple[GPT, MuonAdamW]:
    """The model to train and its optimizer: all parameters, a LoRA, or the last layers."""
    lora = cfg.lora_rank
    if resumed is not None and resumed.meta["complete"]:
        lora = None  # it has only its merged weights, and will not be trained
    # A checkpoint holds merged weights. LoRA resumes from the matrices that it does not change, those of the start.
    model = build_model(start if lora else resumed or start, device, "train")
    if lora:
        add_lora(model, lora)
        if resumed is not None:
            load_lora(model, {name: resumed.optimizer[EXTRA_STATE + name] for name in lora_tensors(model)})
        groups = lora_groups(model, cfg.lora_lr)
    else:
        preset = PRESETS[recipe_of(start.meta)]  # each parameter is moved as in the base run
        groups = parameter_groups(
            model,
            embedding_lr=cfg.embedding_lr,
            unembedding_lr=cfg.unembedding_lr,
            matrix_lr=cfg.matrix_lr,
            weight_decay=cfg.weight_decay,
            scalar_lr=preset.scalar_lr,
            lr_frac=1.0 if cfg.init_lr_frac is None else cfg.init_lr_frac,
            preset=preset,
        )
        if cfg.last_layers:
            train_last_layers(model, cfg.last_layers)
            groups = trainable_groups(groups)
    if lora or cfg.last_layers:
        trained = sum(p.numel() for group in groups for p in group["params"])
        size = sum(weight.numel() for weight in start.model.values() if weight.is_floating_point())  # not a text's ids
        print0(f"trains {trained:,} of {size:,} parameters")
    return model, MuonAdamW(groups)


def checkpoint_hooks(cfg: StageConfig, model: GPT) -> dict[str, Any]:
    """The Trainer's fields that save a model with LoRA: merged weights, and the thin matrices beside them."""
    if not cfg.lora_rank:
        return {}
    return {"weights": lambda: merged_weights(model), "extra_state": lambda: lora_tensors(model)}
