"""What mid-training, SFT and RL have in common: their settings, where they start, what they train, how they run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanochat.checkpoint_manager import Checkpoint, build_model, check_tokenizer, choose_tag, load_checkpoint
from nanochat.config import Runtime, positive
from nanochat.env import print0
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.progress import format_seconds
from nanochat.recipe import PRESETS, Schedule, parameter_groups, recipe_of
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.train.lora import (
    add_lora,
    load_lora,
    lora_groups,
    lora_tensors,
    merged_weights,
    train_last_layers,
    trainable_groups,
)
from nanochat.train.tracking import TrackerName
from nanochat.train.trainer import MORE_STATE, Trainer, TrainSettings


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings that every stage after the base has."""

    runtime: Runtime = field(default_factory=Runtime)
    run: str = "dummy"
    """Name of the run in the tracker; dummy means no tracker. metrics.jsonl is always written."""
    tracker: TrackerName = "wandb"
    """Where --run logs to."""
    model_tag: str | None = None
    """Tag of the model to start from; default: the deepest."""
    step: int | None = None
    """Step of the model to start from; default: the last."""
    num_iterations: int | None = None
    """Optimizer steps; default: as many as num_epochs need."""
    num_epochs: float = 1.0
    """Passes over the data."""
    hours: float | None = None
    """Be done in this time instead, last evaluation and checkpoint included: the schedule follows the clock."""
    device_batch_size: int | Literal["auto"] = "auto"
    """Rows per forward pass and process: auto finds the most that fit and pay. The total batch stays, whatever fits."""
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
    init_lr_frac: float = 1.0
    """All learning rates start at this share."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    warmup_ratio: float = 0.0
    """Share of the run in which the learning rate rises."""
    warmdown_ratio: float = 0.2
    """Share of the run in which the learning rate falls."""
    final_lr_frac: float = 0.0
    """Learning rate at the end, as a share of the first."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on with an unfinished run of the same settings."""
    force: bool = False
    """Go on with an unfinished run although settings differ."""
    eval_every: int = 150
    """Steps between evaluations (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints, besides those by the clock (0: none)."""
    save_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    keep_last: int = 2
    """How many checkpoints of an unfinished run stay, besides the one of the lowest validation loss."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this, for good (0: none)."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    def __post_init__(self) -> None:
        if self.num_epochs <= 0:
            raise ValueError(f"--num_epochs must be positive, got {self.num_epochs}")
        if self.hours is not None and self.hours <= 0:
            raise ValueError(f"--hours must be positive, got {self.hours}")
        if self.keep_last < 1:
            raise ValueError(f"--keep_last must be at least 1, got {self.keep_last}")
        if self.lora_rank is not None and self.last_layers is not None:
            raise ValueError("--lora_rank and --last_layers are two ways of training a part: give one of them")


def make_schedule(cfg: StageConfig, steps_per_epoch: float) -> Schedule:
    """Steps for the asked epochs, or the asked time."""
    iterations = cfg.num_iterations if cfg.num_iterations and cfg.num_iterations > 0 else None
    seconds = cfg.hours * 3600 if cfg.hours and iterations is None else None
    if iterations is None and seconds is None:
        iterations = max(1, round(cfg.num_epochs * steps_per_epoch))
    return Schedule(
        num_iterations=iterations,
        seconds=seconds,
        warmup_ratio=cfg.warmup_ratio,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
    )


def describe_horizon(schedule: Schedule) -> str:
    """How long a run is, for people."""
    if schedule.num_iterations is not None:
        return f"{schedule.num_iterations:,} steps"
    return f"{format_seconds(schedule.seconds or 0)} of training"


# --- where a stage starts, and what it trains -------------------------------------------------------------------------


class Start(NamedTuple):
    """What a stage starts from."""

    tag: str
    """Name of the checkpoint folder."""
    checkpoint: Checkpoint
    tokenizer: RustBPETokenizer


def find_start(source: str, cfg: StageConfig) -> Start:
    """The checkpoint of an earlier stage, and the tokenizer it was trained with.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: the tokenizer in use is another.
    """
    folder, why = choose_tag(source, cfg.model_tag)
    checkpoint, tokenizer = load_checkpoint(folder, cfg.step), get_tokenizer()
    check_tokenizer(checkpoint, tokenizer)
    print0(f"starts from {checkpoint.folder} ({why})")
    return Start(folder.name, checkpoint, tokenizer)


def prepare_model(
    cfg: StageConfig, start: Checkpoint, resumed: Checkpoint | None, device: torch.device
) -> tuple[GPT, MuonAdamW]:
    """The model to train and its optimizer: all parameters, a LoRA, or the last layers."""
    lora = cfg.lora_rank
    if resumed is not None and resumed.meta["complete"]:
        lora = None  # it has only its merged weights, and will not be trained
    # A checkpoint holds merged weights. LoRA goes on from the matrices that it does not change, those of the start.
    model = build_model(start if lora else resumed or start, device, "train")
    if lora:
        add_lora(model, lora)
        if resumed is not None:
            names = lora_tensors(model)
            load_lora(model, {name: resumed.optimizer[MORE_STATE + name] for name in names})
        groups = lora_groups(model, cfg.lora_lr)
    else:
        preset = PRESETS[recipe_of(start.meta)]  # each parameter is moved as before
        groups = parameter_groups(
            model,
            embedding_lr=cfg.embedding_lr,
            unembedding_lr=cfg.unembedding_lr,
            matrix_lr=cfg.matrix_lr,
            weight_decay=cfg.weight_decay,
            scalar_lr=preset.scalar_lr,
            lr_frac=cfg.init_lr_frac,
            preset=preset,
        )
        if cfg.last_layers:
            train_last_layers(model, cfg.last_layers)
            groups = trainable_groups(groups)
    trained = sum(p.numel() for group in groups for p in group["params"])
    if lora or cfg.last_layers:
        print0(f"trains {trained:,} of {start_size(start):,} parameters")
    return model, MuonAdamW(groups)


def start_size(start: Checkpoint) -> int:
    """Parameters of the model in a checkpoint."""
    return sum(weight.numel() for weight in start.model.values())


def checkpoint_hooks(cfg: StageConfig, model: GPT) -> dict[str, Any]:
    """What the Trainer must know to save a model with LoRA: merged, and the thin matrices beside it."""
    if not cfg.lora_rank:
        return {}

    def more_state() -> dict[str, Tensor]:
        return lora_tensors(model)

    return {"weights": lambda: merged_weights(model), "more_state": more_state}


def train_settings(cfg: StageConfig, schedule: Schedule, grad_accum_steps: int) -> TrainSettings:
    """The loop's settings from a stage's."""
    return TrainSettings(
        schedule=schedule,
        grad_accum_steps=grad_accum_steps,
        grad_clip=positive(cfg.grad_clip),
        eval_every=positive(cfg.eval_every),
        save_every=positive(cfg.save_every),
        save_every_minutes=positive(cfg.save_every_minutes) or math.inf,
        keep_last=cfg.keep_last,
        keep_every=positive(cfg.keep_every),
    )


def run_trainer(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Train from the start, or from where a checkpoint stopped; answers are printed before and after."""
    if checkpoint is not None:
        trainer.resume(checkpoint.meta, checkpoint.optimizer)
        checkpoint.release()
    elif trainer.sample is not None:
        print0(f"{trainer.label}: answers before")
        trainer.sample()
    trainer.run()
    trainer.tracker.finish()
