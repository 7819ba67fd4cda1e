"""Mid-training and SFT: the same loop as pretraining, on conversations. What differs is in `StageDefaults`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from nanochat.chat_data import ConversationLoader
from nanochat.checkpoint_manager import build_model, checkpoint_folder, find_tag, load_checkpoint
from nanochat.common import Compute, init_wandb, print0, print_banner, setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.progress import format_seconds
from nanochat.recipe import BatchPlan, Schedule, parameter_groups, plan_batch
from nanochat.report import get_report
from nanochat.samples import print_answers
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.trainer import Trainer, TrainSettings, find_resume, unfinished_dtype

MAY_CHANGE = {"run", "resume", "eval_every", "save_every", "save_every_minutes", "dry_run", "runtime"}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of mid-training and SFT."""

    runtime: Runtime = field(default_factory=Runtime)
    run: str = "dummy"
    """Name of the wandb run; dummy means no wandb."""
    model_tag: str | None = None
    """Tag of the model to start from; default: the deepest."""
    step: int | None = None
    """Step of the model to start from; default: the last."""
    chat_data: str | None = None
    """Conversations: a .jsonl or .parquet file, "demo", or nothing for nanochat's own mixture."""
    num_iterations: int | None = None
    """Optimizer steps; default: as many as num_epochs need."""
    num_epochs: float = 1.0
    """Passes over the conversations."""
    hours: float | None = None
    """Train for this long instead; the schedule follows the clock."""
    max_seq_len: int | None = None
    """Tokens per row; default: the model's context."""
    device_batch_size: int = 8
    """Rows per forward pass and process."""
    total_batch_size: int = 524288
    """Tokens per optimizer step, padding included."""
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
    supervise: Literal["all", "assistant"] = "all"
    """Learn every token of a conversation, or the assistant's only."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on with an unfinished run of the same settings."""
    eval_every: int = 150
    """Steps between evaluations (0: only at the end)."""
    eval_batches: int = 20
    """Batches per evaluation."""
    save_every: int = 0
    """Steps between checkpoints, besides those by the clock (0: none)."""
    save_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    def __post_init__(self) -> None:
        if self.num_epochs <= 0:
            raise ValueError(f"--num_epochs must be positive, got {self.num_epochs}")
        if self.hours is not None and self.hours <= 0:
            raise ValueError(f"--hours must be positive, got {self.hours}")


@dataclass(frozen=True)
class Stage:
    """What sets one stage apart."""

    name: Literal["mid", "sft"]
    source: Literal["base", "mid"]
    section: str
    wandb_project: str


MID = Stage("mid", "base", "Midtraining", "nanochat-mid")
SFT = Stage("sft", "mid", "SFT", "nanochat-sft")


def make_loader(
    cfg: FinetuneConfig,
    compute: Compute,
    dataset: Sequence[Any],
    tokenizer: RustBPETokenizer,
    sequence_len: int,
    state: dict[str, Any] | None = None,
) -> ConversationLoader:
    """Packed rows of these conversations."""
    return ConversationLoader(
        dataset,
        tokenizer,
        cfg.device_batch_size,
        sequence_len,
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
        supervise=cfg.supervise,
        seed=cfg.runtime.seed,
        state=state,
    )


def make_schedule(cfg: FinetuneConfig, batch: BatchPlan, rows_per_epoch: int) -> Schedule:
    """Steps for the asked epochs, or the asked time."""
    rows_per_step = batch.total_tokens // batch.sequence_len
    iterations = cfg.num_iterations if cfg.num_iterations and cfg.num_iterations > 0 else None
    seconds = cfg.hours * 3600 if cfg.hours and iterations is None else None
    if iterations is None and seconds is None:
        iterations = max(1, round(cfg.num_epochs * rows_per_epoch / rows_per_step))
    return Schedule(
        num_iterations=iterations,
        seconds=seconds,
        warmup_ratio=cfg.warmup_ratio,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
    )


@torch.no_grad()
def evaluate_loss(model: GPT, loader: ConversationLoader, batches: int, compute: Compute) -> float:
    """Mean loss in nats per supervised token over some batches, all ranks together."""
    model.eval()
    total = torch.zeros(2, device=compute.device)
    for _ in range(batches):
        x, y = next(loader)
        with compute.precision.autocast():
            total[0] += model(x, y, loss_reduction="sum")
        total[1] += (y >= 0).sum()
    if compute.ddp:
        torch.distributed.all_reduce(total)
    model.train()
    return float(total[0] / total[1])


Conversations = tuple[Sequence[Any], Sequence[Any], str]
"""For training, for validation, and the name of the data."""


def finetune(stage: Stage, cfg: FinetuneConfig, load_data: Callable[[], Conversations]) -> None:
    """Train the previous stage's model on conversations and log to the report.

    Args:
        stage: MID or SFT.
        cfg: the settings.
        load_data: reads the conversations; called once the model to start from is known to be there.
    """
    print_banner()
    tag_folder = find_tag(stage.source, cfg.model_tag)
    start = load_checkpoint(tag_folder, cfg.step)
    tokenizer = get_tokenizer()
    if start.meta["tokenizer_hash"] != tokenizer.hash:
        raise RuntimeError(
            f"{start.folder} was trained with another tokenizer than the one in use: run the base stage again"
        )
    print0(f"{stage.name}: starts from {start.folder}")
    train_data, val_data, data_name = load_data()
    folder = checkpoint_folder(stage.name, tag_folder.name)
    with setup_compute(cfg.runtime, unfinished_dtype(folder, cfg.resume), start.meta["dtype"]) as compute:
        sequence_len = min(cfg.max_seq_len or 1 << 62, start.meta["model_config"]["sequence_len"])
        batch = plan_batch(cfg.total_batch_size, cfg.device_batch_size, sequence_len, compute.world_size)
        config = asdict(cfg)
        checkpoint = None if cfg.dry_run else find_resume(folder, config, cfg.resume, MAY_CHANGE)
        loader = make_loader(
            cfg, compute, train_data, tokenizer, sequence_len, checkpoint.meta["loader"] if checkpoint else None
        )
        schedule = make_schedule(cfg, batch, loader.rows_per_epoch)
        print0(f"{stage.name}: data {data_name}, one epoch is {loader.forecast}")
        print0(f"{stage.name}: {_horizon(schedule)}, {batch.total_tokens:,} tokens per step")
        if cfg.dry_run:
            return
        model = build_model(checkpoint or start, compute.device, "train")
        groups = parameter_groups(
            model,
            embedding_lr=cfg.embedding_lr,
            unembedding_lr=cfg.unembedding_lr,
            matrix_lr=cfg.matrix_lr,
            weight_decay=cfg.weight_decay,
            lr_frac=cfg.init_lr_frac,
        )
        trainer = Trainer(
            label=stage.name,
            model=model,
            optimizer=MuonAdamW(groups),
            loader=loader,
            compute=compute,
            settings=TrainSettings(
                schedule=schedule,
                grad_accum_steps=batch.grad_accum_steps,
                grad_clip=cfg.grad_clip or None,
                eval_every=cfg.eval_every or None,
                save_every=cfg.save_every or None,
                save_every_minutes=cfg.save_every_minutes,
            ),
            folder=folder,
            meta={"config": config, "tokenizer_hash": tokenizer.hash, "chat_data": data_name},
            evaluate=lambda: evaluate_loss(
                model, make_loader(cfg, compute, val_data, tokenizer, sequence_len), cfg.eval_batches, compute
            ),
            val_name="val_loss",
            sample=lambda: print_answers(model, tokenizer, compute),
            wandb=init_wandb(cfg.run, stage.wandb_project, config),
        )
        if checkpoint is not None:
            trainer.resume(checkpoint.meta, checkpoint.optimizer)
        else:
            print0(f"{stage.name}: answers before")
            print_answers(model, tokenizer, compute)
        state = trainer.run()
        trainer.wandb.finish()
        facts = {
            "conversations": len(train_data),
            "data": data_name,
            "packing": str(loader.stats),
            "steps": state.step,
            "tokens": state.tokens,
            "dtype": compute.precision.name,
            "training time": format_seconds(state.seconds),
            "tokens per second": state.tokens / max(state.seconds, 1e-9),
            "skipped steps": compute.precision.skipped,
            "loss scale": compute.precision.scaler.scale,
            "peak memory (GB)": compute.peak_memory_bytes() / 1e9,
            "validation loss (nats per supervised token)": state.val,
        }
        metrics = {"val loss": state.val} if state.val is not None else None
        get_report().log(section=stage.section, data=[config, facts], metrics=metrics)
        print0(f"{stage.name} done: {state.step} steps in {format_seconds(state.seconds)}, in {folder}")


def _horizon(schedule: Schedule) -> str:
    if schedule.num_iterations is not None:
        return f"{schedule.num_iterations:,} steps"
    return f"{format_seconds(schedule.seconds or 0)} of training"
