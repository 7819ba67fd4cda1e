"""Mid-training and SFT: the same loop as pretraining, on conversations. They differ in their `FinetuneStage`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch

from nanochat.chat_eval import choose_sampling
from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import Compute, print0, print_banner
from nanochat.config import positive, short
from nanochat.data.chat_loader import ConversationLoader
from nanochat.data.chat_rows import has_fitting_answer
from nanochat.data.loader import Batch
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.messages import Conversation
from nanochat.plan.memory import MicroBatch, divisors
from nanochat.recipe import BatchPlan, plan_batch, recipe_of
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.clock import Clock
from nanochat.train.held_out import HeldOutChats
from nanochat.train.micro_batch import choose_micro_batch
from nanochat.train.resume import saved_meta
from nanochat.train.samples import print_answers
from nanochat.train.stage import (
    StageConfig,
    checkpoint_hooks,
    describe_horizon,
    find_start,
    make_schedule,
    prepare_model,
    start_run,
    train,
)

SAMPLED = 256
EVAL_ROWS = 8  # sequences in one of the `eval_batches`, where a micro-batch has as many as fit
# Share of the measured matmul speed that training is assumed to reach, to predict how much it will read in some hours.
ASSUMED_EFFICIENCY = 0.3


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Settings of mid-training and SFT."""

    chat_data: Annotated[str | None, short("--data")] = None
    """Conversations: a file or folder (docs/own_data.md), hf:owner/name or "demo"; default: nanochat's own mixture."""
    max_seq_len: int | None = None
    """Tokens per sequence; default: the model's context."""
    total_batch_size: int = 524288
    """Tokens per optimizer step, padding included."""
    supervise: Literal["all", "assistant"] = "all"
    """Learn every token of a conversation, or the assistant's only."""
    isolate_conversations: bool = False
    """Read each conversation of a sequence as if it were alone in it."""
    eval_batches: int = 20
    """Batches per evaluation."""


@dataclass(frozen=True)
class FinetuneStage:
    """One of the two stages: its name, the stage it starts from, its section of the report."""

    name: Literal["mid", "sft"]
    source: Literal["base", "mid"]
    section: str


MID = FinetuneStage("mid", "base", "Midtraining")
SFT = FinetuneStage("sft", "mid", "SFT")


def make_loader(
    cfg: FinetuneConfig,
    compute: Compute,
    dataset: Sequence[Any],
    tokenizer: RustBPETokenizer,
    rows: int,
    sequence_len: int,
    state: dict[str, Any] | None = None,
) -> ConversationLoader:
    """Packed sequences of these conversations."""
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


class DataBudget(NamedTuple):
    """The most that a run can read, so that a mixture can be cut to it."""

    tokens: int | None
    """None: as much as there is."""
    depth: int
    fits: Callable[[Conversation], bool] = lambda conversation: True
    """True of a conversation with an answer that fits into the context."""
    chat_data: str | None = None
    """What the model to start from has learned conversations from, if it has."""


def plan_budget(
    cfg: FinetuneConfig, model_config: GPTConfig, compute: Compute, before: dict[str, Any] | None = None
) -> DataBudget:
    """The tokens of the asked steps; those of the asked hours are estimated from the speed of matmuls here.

    A resumed run takes what it took `before` (its record): no two measurements are equal, and another budget would make
    other conversations.
    """
    tokens = None
    if positive(cfg.num_iterations):
        tokens = positive(cfg.num_iterations) * cfg.total_batch_size
    elif cfg.hours and before and before["config"].get("hours") == cfg.hours and "budget_tokens" in before:
        tokens = before["budget_tokens"]
    elif cfg.hours:
        measured = compute.broadcast(compute.matmul_tflops())
        speed = ASSUMED_EFFICIENCY * 1e12 * measured
        with torch.device("meta"):
            flops = GPT(model_config).estimate_flops()
        tokens = int(cfg.hours * 3600 * speed * compute.world_size / flops)
    return DataBudget(tokens, model_config.n_layer)


class Conversations(NamedTuple):
    """The data of a stage."""

    train: Sequence[Any]
    val: Sequence[Any]
    name: str
    own: bool = False
    """The user's: the report shows answers to the held-out ones."""
    unsure: str = ""
    """What it teaches to say when something is not known; "": nothing."""


def finetune(stage: FinetuneStage, cfg: FinetuneConfig, load_data: Callable[[DataBudget], Conversations]) -> None:
    """Train the previous stage's model on conversations and log to the report.

    Args:
        stage: MID or SFT.
        cfg: the settings.
        load_data: reads the conversations; called once the model to start from is known to be there.
    """
    clock = Clock()
    print_banner()
    start = find_start(stage.source, cfg)
    with start_run(stage.name, cfg, start.tag, clock, start.checkpoint.meta.get("dtype")) as run:
        compute, tokenizer = run.compute, start.tokenizer
        model_config = GPTConfig.from_dict(start.checkpoint.meta["model_config"])
        sequence_len = min(cfg.max_seq_len or model_config.sequence_len, model_config.sequence_len)
        if cfg.max_seq_len is not None and cfg.max_seq_len > sequence_len:
            print0(f"warning: --max_seq_len={cfg.max_seq_len} is lowered to {sequence_len}, the model's context")
        budget = plan_budget(cfg, model_config, compute, saved_meta(run.folder, cfg.resume))
        data = load_data(
            budget._replace(
                fits=lambda conversation: has_fitting_answer(conversation, tokenizer, sequence_len + 1),
                chat_data=start.checkpoint.meta.get("chat_data"),
            )
        )
        inputs = start.inputs(conversations=sample_hash(data.train))
        checkpoint, model, optimizer = None, None, None
        if not cfg.dry_run:
            checkpoint = run.find_checkpoint(inputs)
            model, optimizer = prepare_model(cfg, start.checkpoint, checkpoint, compute.device)
        batch, micro = choose_batch(cfg, compute, sequence_len, model, checkpoint)
        rows = batch.device_batch_size

        position = checkpoint.meta["loader"] if checkpoint else None
        loader = make_loader(cfg, compute, data.train, tokenizer, rows, sequence_len, position)
        epoch_tokens = max(1, loader.rows_per_epoch * sequence_len)
        schedule = make_schedule(cfg, epoch_tokens / batch.total_tokens, start.preset)
        print0(f"{stage.name}: data {data.name}, one epoch is {loader.forecast}")
        if loader.forecast.cut_warning:
            print0(f"warning: {loader.forecast.cut_warning}")
        print0(f"{stage.name}: {describe_horizon(schedule)}, {batch.total_tokens:,} tokens per step")
        if batch.total_tokens > epoch_tokens:
            print0(
                f"warning: a step of {batch.total_tokens:,} tokens reads all conversations "
                f"{batch.total_tokens / epoch_tokens:.0f} times: a smaller --total_batch_size makes more steps of them"
            )
        check_validation(make_loader(cfg, compute, data.val, tokenizer, 1, sequence_len), data.name)
        if model is None or optimizer is None:
            return

        # The same text is evaluated whatever number of sequences fits.
        evaluated = cfg.eval_batches if cfg.device_batch_size != "auto" else -(-cfg.eval_batches * EVAL_ROWS // rows)
        meta = {"chat_data": data.name, "recipe": recipe_of(start.checkpoint.meta), "budget_tokens": budget.tokens}
        trainer = run.make_trainer(
            model,
            optimizer,
            loader,
            schedule,
            batch.grad_accum_steps,
            inputs,
            meta,
            micro=micro,
            evaluate=lambda: evaluate_loss(
                model, make_loader(cfg, compute, data.val, tokenizer, rows, sequence_len), evaluated, compute
            ),
            val_name="val_loss",
            sample=lambda: print_answers(model, tokenizer, compute),
            finish=(lambda: find_sampling(model, tokenizer, compute, data)) if stage.name == SFT.name else None,
            **checkpoint_hooks(cfg, model),
        )
        held_out = HeldOutChats(data.val if data.own else (), start.tag)
        held_out.ask_before(model, tokenizer, compute, resumed=checkpoint is not None)
        train(trainer, checkpoint, answers_before=True)
        held_out.report(model, tokenizer, compute)

        state = trainer.state
        passes = state.tokens / epoch_tokens
        print0(f"{stage.name}: learned from {loader.counts}, each about {max(1, passes):.0f} times")
        facts = {
            "conversations": len(data.train),
            "data": data.name,
            "packing": str(loader.counts),
            "validation loss (nats per supervised token)": state.val,
        }
        run.report(stage.section, trainer, facts, {"val loss": state.val})


def find_sampling(model: GPT, tokenizer: RustBPETokenizer, compute: Compute, data: Conversations) -> dict[str, Any]:
    """How answers of this model are best drawn, for its checkpoint's meta: rank 0 tries, the others have nothing."""
    if compute.rank != 0:
        return {}
    model.eval()
    start = time.perf_counter()
    chosen = choose_sampling(Engine(model, tokenizer, compute.precision), tokenizer, data.val, data.unsure)
    model.train()
    shown = (
        ", ".join(f"{name} {value}" for name, value in chosen.items())
        or "not found, too few answers agree with the held-out ones"
    )
    print0(f"sft: sampling that costs next to no right answers: {shown} ({time.perf_counter() - start:.0f} s)")
    return {"sampling": chosen} if chosen else {}


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
    """The split of the total batch into micro-batches; a resumed run keeps the one of its start."""
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


def sample_hash(conversations: Sequence[Any]) -> str:
    """A hash of how many conversations there are and of SAMPLED of them: reading all could take minutes."""
    count = len(conversations)
    chosen = [conversations[i * count // SAMPLED] for i in range(SAMPLED)] if count else []
    return hashlib.sha256(json.dumps([count, chosen], sort_keys=True, default=str).encode()).hexdigest()[:16]
