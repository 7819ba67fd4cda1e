"""Mid-training and SFT: the same loop as pretraining, on conversations. What differs is in `Stage`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from nanochat.checkpoint_manager import Checkpoint, checkpoint_folder
from nanochat.common import Compute, print_banner, setup_compute
from nanochat.config import short
from nanochat.data.chat_loader import ConversationLoader
from nanochat.data.loader import Batch
from nanochat.env import print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import MicroBatch, divisors
from nanochat.progress import format_seconds
from nanochat.recipe import BatchPlan, Schedule, plan_batch, recipe_of
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.clock import Clock
from nanochat.train.micro_batch import choose_micro_batch
from nanochat.train.resume import find_resume, model_hash, only_run, saved_dtype, saved_meta
from nanochat.train.samples import print_answers
from nanochat.train.stage import (
    StageConfig,
    Start,
    checkpoint_hooks,
    describe_horizon,
    find_start,
    make_schedule,
    prepare_model,
    run_trainer,
    train_settings,
)
from nanochat.train.tracking import init_tracker
from nanochat.train.trainer import Trainer

SAMPLED = 256
EVAL_ROWS = 8  # rows of one of the `eval_batches`, where rows are chosen by what fits
# Share of the measured matmul speed that training is assumed to reach, to foretell how much it will read in some hours.
ASSUMED_EFFICIENCY = 0.3


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
    project: str


MID = Stage("mid", "base", "Midtraining", "nanochat-mid")
SFT = Stage("sft", "mid", "SFT", "nanochat-sft")


def make_loader(
    cfg: FinetuneConfig,
    compute: Compute,
    dataset: Sequence[Any],
    tokenizer: RustBPETokenizer,
    rows: int,
    sequence_len: int,
    state: dict[str, Any] | None = None,
) -> ConversationLoader:
    """Packed rows of these conversations."""
    return ConversationLoader(
        dataset,
        tokenizer,
        rows,
        sequence_len,
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
        supervise=cfg.supervise,
        isolate=cfg.isolate_conversations,
        seed=cfg.runtime.seed,
        state=state,
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


# --- mid-training and SFT ---------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """How much a run can read, so that a mixture can be cut to it."""

    tokens: int | None
    """None: as much as there is."""
    depth: int


def plan_budget(
    cfg: FinetuneConfig, model_config: GPTConfig, compute: Compute, before: dict[str, Any] | None = None
) -> Budget:
    """The tokens of the asked steps; those of the asked hours are estimated from the speed of matmuls here.

    A run that goes on takes what it took `before` (its record): no two measurements are equal, and another budget would
    make other conversations.
    """
    tokens = None
    if cfg.num_iterations and cfg.num_iterations > 0:
        tokens = cfg.num_iterations * cfg.total_batch_size
    elif cfg.hours and before and before["config"].get("hours") == cfg.hours and "budget_tokens" in before:
        tokens = before["budget_tokens"]
    elif cfg.hours:
        measured = compute.broadcast(compute.matmul_tflops())
        speed = ASSUMED_EFFICIENCY * 1e12 * measured
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
    clock = Clock()
    print_banner()
    start = find_start(stage.source, cfg)
    folder = checkpoint_folder(stage.name, start.tag)
    dtypes = saved_dtype(folder, cfg.resume), start.checkpoint.meta.get("dtype")
    with setup_compute(cfg.runtime, *dtypes) as compute, only_run(folder, needed=not cfg.dry_run):
        model_config = start.checkpoint.meta["model_config"]
        sequence_len = min(cfg.max_seq_len or 1 << 62, model_config["sequence_len"])
        before = saved_meta(folder, cfg.resume)
        budget = plan_budget(cfg, GPTConfig.from_dict(model_config), compute, before)
        data = load_data(budget)
        inputs = {
            "tokenizer": start.tokenizer.hash,
            "model": model_hash(start.checkpoint),
            "conversations": sample_hash(data.train),
        }
        checkpoint = None
        if not cfg.dry_run:
            checkpoint = find_resume(folder, asdict(cfg), cfg.resume, inputs=inputs, force=cfg.force)
        learner = None if cfg.dry_run else prepare_model(cfg, start.checkpoint, checkpoint, compute.device)
        batch, micro = choose_batch(cfg, compute, sequence_len, learner[0] if learner else None, checkpoint)
        place = checkpoint.meta["loader"] if checkpoint else None
        loader = make_loader(cfg, compute, data.train, start.tokenizer, batch.device_batch_size, sequence_len, place)
        schedule = make_schedule(cfg, loader.rows_per_epoch * sequence_len / batch.total_tokens)
        print0(f"{stage.name}: data {data.name}, one epoch is {loader.forecast}")
        print0(f"{stage.name}: {describe_horizon(schedule)}, {batch.total_tokens:,} tokens per step")
        epoch_tokens = max(1, loader.rows_per_epoch * sequence_len)
        if batch.total_tokens > epoch_tokens:
            print0(
                f"warning: a step of {batch.total_tokens:,} tokens reads all conversations "
                f"{batch.total_tokens / epoch_tokens:.0f} times: a smaller --total_batch_size makes more steps of them"
            )
        check_validation(make_loader(cfg, compute, data.val, start.tokenizer, 1, sequence_len), data.name)
        if learner is None:
            return
        trainer = make_trainer(stage, cfg, compute, start, learner, data, loader, schedule, batch, folder)
        trainer.clock, trainer.micro = clock, micro
        trainer.meta |= {"inputs": inputs, "budget_tokens": budget.tokens}
        run_trainer(trainer, checkpoint)
        passes = trainer.state.tokens / epoch_tokens
        print0(f"{stage.name}: learned from {loader.stats}, each about {max(1, passes):.0f} times")
        report(stage, trainer, data, loader, compute)


def check_validation(loader: ConversationLoader, name: str) -> None:
    """Ask now whether anything can be evaluated: after the training it would be too late.

    Raises:
        ValueError: none of the conversations kept for validation fits into the context.
    """
    if loader.rows_per_epoch == 0:
        raise ValueError(
            f"none of the conversations of {name} that are kept for validation has an assistant's turn that fits into "
            "the context: shorten the longest ones, or train a base model with a larger --max_seq_len"
        )


def choose_batch(
    cfg: FinetuneConfig, compute: Compute, sequence_len: int, model: GPT | None, checkpoint: Checkpoint | None
) -> tuple[BatchPlan, MicroBatch | None]:
    """How the total batch is made up; a resumed run keeps what was chosen at its start."""
    total, world, rows = cfg.total_batch_size, compute.world_size, cfg.device_batch_size
    if isinstance(rows, int):
        return plan_batch(total, rows, sequence_len, world), None
    per_step = plan_batch(total, 1, sequence_len, world).grad_accum_steps
    micro = MicroBatch(EVAL_ROWS)
    if checkpoint is not None and checkpoint.meta.get("micro_batch"):
        micro = MicroBatch(**checkpoint.meta["micro_batch"])
    elif model is not None:
        micro, _ = choose_micro_batch(model, compute, sequence_len, per_step)
    return plan_batch(total, divisors(per_step, micro.rows)[0], sequence_len, world), micro


def make_trainer(
    stage: Stage,
    cfg: FinetuneConfig,
    compute: Compute,
    start: Start,
    learner: tuple[GPT, MuonAdamW],
    data: Conversations,
    loader: ConversationLoader,
    schedule: Schedule,
    batch: BatchPlan,
    folder: Path,
) -> Trainer:
    """The shared loop with what is this stage's own."""
    model, optimizer = learner
    tokenizer, rows = start.tokenizer, batch.device_batch_size
    # The same text is evaluated whatever number of rows fits.
    evaluated = cfg.eval_batches if cfg.device_batch_size != "auto" else -(-cfg.eval_batches * EVAL_ROWS // rows)
    return Trainer(
        label=stage.name,
        model=model,
        optimizer=optimizer,
        loader=loader,
        compute=compute,
        settings=train_settings(cfg, schedule, batch.grad_accum_steps),
        folder=folder,
        meta={
            "config": asdict(cfg),
            "tokenizer_hash": tokenizer.hash,
            "chat_data": data.name,
            "recipe": recipe_of(start.checkpoint.meta),
        },
        evaluate=lambda: evaluate_loss(
            model, make_loader(cfg, compute, data.val, tokenizer, rows, batch.sequence_len), evaluated, compute
        ),
        val_name="val_loss",
        sample=lambda: print_answers(model, tokenizer, compute),
        tracker=init_tracker(cfg.tracker, cfg.run, stage.project, asdict(cfg)),
        **checkpoint_hooks(cfg, model),
    )


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
        "loss scale": compute.precision.scaler.scale,
        "peak memory (GB)": compute.peak_memory_bytes() / 1e9,
        "validation loss (nats per supervised token)": state.val,
    }
    metrics = {"val loss": state.val} if state.val is not None else None
    get_report().log(section=stage.section, data=[trainer.meta["config"], facts], metrics=metrics)
    print0(f"{stage.name} done: {state.step} steps in {format_seconds(state.seconds)}, in {trainer.folder}")


def sample_hash(conversations: Sequence[Any]) -> str:
    """A hash of how many conversations there are and of SAMPLED of them: reading all could take minutes."""
    count = len(conversations)
    chosen = [conversations[i * count // SAMPLED] for i in range(SAMPLED)] if count else []
    return hashlib.sha256(json.dumps([count, chosen], sort_keys=True, default=str).encode()).hexdigest()[:16]
