"""Mid-training and SFT: the same loop as pretraining, on conversations. What differs is in `StageDefaults`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanochat.chat_data import ConversationLoader
from nanochat.checkpoint_manager import Checkpoint, build_model, checkpoint_folder, find_tag, load_checkpoint
from nanochat.common import Compute, init_wandb, measure_matmul, print0, print_banner, setup_compute
from nanochat.config import Runtime, short
from nanochat.gpt import GPT, GPTConfig
from nanochat.lora import (
    add_lora,
    load_lora,
    lora_groups,
    lora_tensors,
    merged_weights,
    train_last_layers,
    trainable_groups,
)
from nanochat.optim import MuonAdamW
from nanochat.progress import format_seconds
from nanochat.recipe import BatchPlan, Schedule, parameter_groups, plan_batch
from nanochat.report import get_report
from nanochat.samples import print_answers
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.trainer import MORE_STATE, Batch, Trainer, TrainSettings, find_resume

MAY_CHANGE = {"run", "resume", "eval_every", "save_every", "save_every_minutes", "dry_run", "runtime"}


# Share of the measured matmul speed that training is assumed to reach, to foretell how much it will read in some hours.
ASSUMED_EFFICIENCY = 0.3


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings that every stage after the base has."""

    runtime: Runtime = field(default_factory=Runtime)
    run: str = "dummy"
    """Name of the wandb run; dummy means no wandb."""
    model_tag: str | None = None
    """Tag of the model to start from; default: the deepest."""
    step: int | None = None
    """Step of the model to start from; default: the last."""
    num_iterations: int | None = None
    """Optimizer steps; default: as many as num_epochs need."""
    num_epochs: float = 1.0
    """Passes over the data."""
    hours: float | None = None
    """Train for this long instead; the schedule follows the clock."""
    device_batch_size: int = 8
    """Rows per forward pass and process."""
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
    eval_every: int = 150
    """Steps between evaluations (0: only at the end)."""
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
        if self.lora_rank is not None and self.last_layers is not None:
            raise ValueError("--lora_rank and --last_layers are two ways of training a part: give one of them")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Settings of mid-training and SFT."""

    chat_data: Annotated[str | None, short("--data")] = None
    """Conversations: a .jsonl or .parquet file, "demo", or nothing for nanochat's own mixture."""
    max_seq_len: int | None = None
    """Tokens per row; default: the model's context."""
    total_batch_size: int = 524288
    """Tokens per optimizer step, padding included."""
    supervise: Literal["all", "assistant"] = "all"
    """Learn every token of a conversation, or the assistant's only."""
    isolate_conversations: bool = False
    """Read each conversation of a row as if it were alone in it."""
    eval_batches: int = 20
    """Batches per evaluation."""


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
        isolate=cfg.isolate_conversations,
        seed=cfg.runtime.seed,
        state=state,
    )


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


@torch.no_grad()
def evaluate_loss(model: GPT, loader: ConversationLoader, batches: int, compute: Compute) -> float:
    """Mean loss in nats per supervised token over some batches, all ranks together."""
    model.eval()
    total = torch.zeros(2, device=compute.device)
    for _ in range(batches):
        batch = Batch(*next(loader))
        with compute.precision.autocast():
            total[0] += model(batch.x, batch.y, loss_reduction="sum", segments=batch.segments)
        total[1] += (batch.y >= 0).sum()
    if compute.ddp:
        torch.distributed.all_reduce(total)
    model.train()
    return float(total[0] / total[1])


# --- where a stage starts, and what it trains -------------------------------------------------------------------------


class Start(NamedTuple):
    """What a stage starts from."""

    tag: str
    checkpoint: Checkpoint
    tokenizer: RustBPETokenizer


def find_start(source: str, cfg: StageConfig) -> Start:
    """The checkpoint of an earlier stage, and the tokenizer it was trained with.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: the tokenizer in use is another.
    """
    folder = find_tag(source, cfg.model_tag)
    checkpoint, tokenizer = load_checkpoint(folder, cfg.step), get_tokenizer()
    if checkpoint.meta["tokenizer_hash"] != tokenizer.hash:
        raise RuntimeError(
            f"{checkpoint.folder} was trained with another tokenizer than the one in use: run the base stage again"
        )
    return Start(folder.name, checkpoint, tokenizer)


def prepare_model(
    cfg: StageConfig, start: Checkpoint, resumed: Checkpoint | None, device: torch.device
) -> tuple[GPT, MuonAdamW]:
    """The model to train and its optimizer: all parameters, a LoRA, or the last layers."""
    # A checkpoint holds merged weights. LoRA goes on from the matrices that it does not change, those of the start.
    model = build_model(start if cfg.lora_rank else resumed or start, device, "train")
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank)
        if resumed is not None:
            names = lora_tensors(model)
            load_lora(model, {name: resumed.optimizer[MORE_STATE + name] for name in names})
        groups = lora_groups(model, cfg.lora_lr)
    else:
        groups = parameter_groups(
            model,
            embedding_lr=cfg.embedding_lr,
            unembedding_lr=cfg.unembedding_lr,
            matrix_lr=cfg.matrix_lr,
            weight_decay=cfg.weight_decay,
            lr_frac=cfg.init_lr_frac,
        )
        if cfg.last_layers:
            train_last_layers(model, cfg.last_layers)
            groups = trainable_groups(groups)
    trained = sum(p.numel() for group in groups for p in group["params"])
    if cfg.lora_rank or cfg.last_layers:
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


def train_settings(cfg: StageConfig, schedule: Schedule, grad_accum_steps: int, **more: Any) -> TrainSettings:
    """The loop's settings from a stage's."""
    return TrainSettings(
        schedule=schedule,
        grad_accum_steps=grad_accum_steps,
        grad_clip=cfg.grad_clip or None,
        eval_every=cfg.eval_every or None,
        save_every=cfg.save_every or None,
        save_every_minutes=cfg.save_every_minutes,
        **more,
    )


# --- mid-training and SFT ---------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """How much a run can read, so that a mixture can be cut to it."""

    tokens: int | None
    """None: as much as there is."""
    depth: int


def plan_budget(cfg: FinetuneConfig, model_config: GPTConfig, compute: Compute) -> Budget:
    """The tokens of the asked steps; those of the asked hours are estimated from the speed of matmuls here."""
    tokens = None
    if cfg.num_iterations and cfg.num_iterations > 0:
        tokens = cfg.num_iterations * cfg.total_batch_size
    elif cfg.hours:
        speed = ASSUMED_EFFICIENCY * 1e12 * measure_matmul(compute.dtype, compute.device, n=1024)
        with torch.device("meta"):
            flops = GPT(model_config).estimate_flops()
        tokens = int(cfg.hours * 3600 * speed * compute.world_size / flops)
    return Budget(tokens, model_config.n_layer)


class Conversations(NamedTuple):
    """What a stage learns from."""

    train: Sequence[Any]
    val: Sequence[Any]
    name: str


def finetune(stage: Stage, cfg: FinetuneConfig, load_data: Callable[[Budget], Conversations]) -> None:
    """Train the previous stage's model on conversations and log to the report.

    Args:
        stage: MID or SFT.
        cfg: the settings.
        load_data: reads the conversations; called once the model to start from is known to be there.
    """
    print_banner()
    start = find_start(stage.source, cfg)
    print0(f"{stage.name}: starts from {start.checkpoint.folder}")
    with setup_compute(cfg.runtime, start.checkpoint.meta["dtype"]) as compute:
        model_config = start.checkpoint.meta["model_config"]
        sequence_len = min(cfg.max_seq_len or 1 << 62, model_config["sequence_len"])
        batch = plan_batch(cfg.total_batch_size, cfg.device_batch_size, sequence_len, compute.world_size)
        data = load_data(plan_budget(cfg, GPTConfig.from_dict(model_config), compute))
        config = asdict(cfg)
        folder = checkpoint_folder(stage.name, start.tag)
        checkpoint = None if cfg.dry_run else find_resume(folder, config, cfg.resume, MAY_CHANGE)
        loader = make_loader(
            cfg, compute, data.train, start.tokenizer, sequence_len, checkpoint.meta["loader"] if checkpoint else None
        )
        schedule = make_schedule(cfg, loader.rows_per_epoch * sequence_len / batch.total_tokens)
        print0(f"{stage.name}: data {data.name}, one epoch is {loader.forecast}")
        print0(f"{stage.name}: {describe_horizon(schedule)}, {batch.total_tokens:,} tokens per step")
        if cfg.dry_run:
            return
        trainer = make_trainer(stage, cfg, compute, start, checkpoint, data, loader, schedule, batch, folder)
        run_trainer(trainer, checkpoint)
        print0(f"{stage.name}: learned from {loader.stats}")
        report(stage, trainer, data, loader, compute)


def make_trainer(
    stage: Stage,
    cfg: FinetuneConfig,
    compute: Compute,
    start: Start,
    checkpoint: Checkpoint | None,
    data: Conversations,
    loader: ConversationLoader,
    schedule: Schedule,
    batch: BatchPlan,
    folder: Path,
) -> Trainer:
    """The shared loop with what is this stage's own."""
    model, optimizer = prepare_model(cfg, start.checkpoint, checkpoint, compute.device)
    tokenizer = start.tokenizer
    return Trainer(
        label=stage.name,
        model=model,
        optimizer=optimizer,
        loader=loader,
        compute=compute,
        settings=train_settings(cfg, schedule, batch.grad_accum_steps),
        folder=folder,
        meta={"config": asdict(cfg), "tokenizer_hash": tokenizer.hash, "chat_data": data.name},
        evaluate=lambda: evaluate_loss(
            model, make_loader(cfg, compute, data.val, tokenizer, batch.sequence_len), cfg.eval_batches, compute
        ),
        val_name="val_loss",
        sample=lambda: print_answers(model, tokenizer, compute),
        wandb=init_wandb(cfg.run, stage.wandb_project, asdict(cfg)),
        **checkpoint_hooks(cfg, model),
    )


def run_trainer(trainer: Trainer, checkpoint: Checkpoint | None) -> None:
    """Train from the start, or from where a checkpoint stopped; answers are printed before and after."""
    if checkpoint is not None:
        trainer.resume(checkpoint.meta, checkpoint.optimizer)
    elif trainer.sample is not None:
        print0(f"{trainer.label}: answers before")
        trainer.sample()
    trainer.run()
    trainer.wandb.finish()


def report(stage: Stage, trainer: Trainer, data: Conversations, loader: ConversationLoader, compute: Compute) -> None:
    """Log the run to the report."""
    state = trainer.state
    facts = {
        "conversations": len(data.train),
        "data": data.name,
        "packing": str(loader.stats),
        "steps": state.step,
        "tokens": state.tokens,
        "dtype": compute.precision.name,
        "training time": format_seconds(state.seconds),
        "tokens per second": state.tokens / max(state.seconds, 1e-9),
        "skipped steps": compute.precision.skipped,
        "peak memory (GB)": compute.peak_memory_bytes() / 1e9,
        "validation loss (nats per supervised token)": state.val,
    }
    metrics = {"val loss": state.val} if state.val is not None else None
    get_report().log(section=stage.section, data=[trainer.meta["config"], facts], metrics=metrics)
    print0(f"{stage.name} done: {state.step} steps in {format_seconds(state.seconds)}, in {trainer.folder}")


def describe_horizon(schedule: Schedule) -> str:
    """How long a run is, for people."""
    if schedule.num_iterations is not None:
        return f"{schedule.num_iterations:,} steps"
    return f"{format_seconds(schedule.seconds or 0)} of training"
