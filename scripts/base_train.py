"""Pretrain the base model: predict the next token of plain text.

python -m scripts.base_train --depth=12 --device_batch_size=8 --total_batch_size=131072
torchrun --standalone --nproc_per_node=8 --max_restarts=3 -m scripts.base_train --depth=20   (a dead rank: goes on)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from nanochat.checkpoint_manager import checkpoint_folder, load_weights
from nanochat.common import Compute, init_wandb, print0, print_banner, setup_compute
from nanochat.config import Runtime, run_script
from nanochat.dataloader import PretrainLoader
from nanochat.dataset import Corpus, open_corpus, prepare_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.progress import format_seconds
from nanochat.recipe import BatchPlan, Schedule, parameter_groups, plan_batch, plan_iterations
from nanochat.report import get_report
from nanochat.resume import find_resume, only_run, saved_dtype
from nanochat.samples import print_samples
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer
from nanochat.trainer import Trainer, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a pretraining run."""

    runtime: Runtime = field(default_factory=Runtime)
    run: str = "dummy"
    """Name of the wandb run; dummy means no wandb."""
    depth: int = 20
    """Layers; the width follows: 64 × depth channels, rounded up to whole heads of 128."""
    max_seq_len: int = 2048
    """Context length in tokens."""
    vocab_size: int | None = None
    """Vocabulary to plan for with --dry_run before a tokenizer exists; a run takes its tokenizer's."""
    data_dir: str | None = None
    """Folder (or file) of parquet, jsonl or txt text; default: what the dataset step prepared."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu) or demo."""
    num_iterations: int | None = None
    """Optimizer steps; goes before the other horizons (-1 is off, as in nanochat)."""
    hours: float | None = None
    """Train for this long: the schedule follows the clock."""
    target_flops: float | None = None
    """Train for this many FLOPs."""
    target_param_data_ratio: float | None = 20.0
    """Train on this many tokens per parameter (20: Chinchilla)."""
    device_batch_size: int = 32
    """Rows per forward pass and process: lower it when memory runs out, the total batch stays."""
    total_batch_size: int = 524288
    """Tokens per optimizer step, over all processes and micro-batches."""
    embedding_lr: float = 0.2
    """Learning rate of the embedding (AdamW), × (width/768)^-½."""
    unembedding_lr: float = 0.004
    """Learning rate of lm_head (AdamW), × (width/768)^-½."""
    matrix_lr: float = 0.02
    """Learning rate of the blocks' matrices (Muon)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    warmup_ratio: float = 0.0
    """Share of the run in which the learning rate rises."""
    warmdown_ratio: float = 0.2
    """Share of the run in which the learning rate falls to its end."""
    final_lr_frac: float = 0.0
    """Learning rate at the end, as a share of the full one."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on with an unfinished run of the same settings."""
    force: bool = False
    """Go on with an unfinished run although settings differ."""
    eval_every: int = 250
    """Steps between evaluations of the validation set (0: only at the end)."""
    eval_tokens: int = 20 * 524288
    """Validation tokens per evaluation (fewer when the validation set is smaller)."""
    sample_every: int = 2000
    """Steps between printed samples (0: only at the end)."""
    save_every: int = 0
    """Steps between checkpoints, besides those by the clock (0: none)."""
    save_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    keep_last: int = 2
    """How many checkpoints of an unfinished run stay, besides the one of the lowest validation loss."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this, for good (0: none)."""
    model_tag: str | None = None
    """Name of the checkpoint folder; default d<depth>."""
    dry_run: bool = False
    """Print the resolved plan and stop."""

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"--depth must be at least 1, got {self.depth}")
        if self.hours is not None and self.hours <= 0:
            raise ValueError(f"--hours must be positive, got {self.hours}")
        if self.keep_last < 1:
            raise ValueError(f"--keep_last must be at least 1, got {self.keep_last}")

    @property
    def tag(self) -> str:
        """Name of the checkpoint folder."""
        return self.model_tag or f"d{self.depth}"


@dataclass(frozen=True)
class Plan:
    """The resolved run."""

    model: GPTConfig
    batch: BatchPlan
    schedule: Schedule
    num_params: int
    flops_per_token: int

    def lines(self) -> list[str]:
        """For people."""
        m, b, s = self.model, self.batch, self.schedule
        lines = [
            f"model: {m.n_layer} layers, {m.n_embd} channels, {m.n_head} heads of {m.head_dim}, "
            f"vocabulary {m.vocab_size}",
            f"parameters: {self.num_params:,}; FLOPs per token: {self.flops_per_token:.4g}",
            f"batch: {b.total_tokens:,} tokens = {b.device_batch_size} rows × {b.sequence_len} tokens × "
            f"{b.world_size} processes × {b.grad_accum_steps} micro-batches",
        ]
        if s.num_iterations is not None:
            tokens = s.num_iterations * b.total_tokens
            lines.append(
                f"horizon: {s.num_iterations:,} steps = {tokens:,} tokens "
                f"({tokens / self.num_params:.1f} per parameter) = {tokens * self.flops_per_token:.3g} FLOPs"
            )
        elif s.seconds is not None:
            lines.append(f"horizon: {format_seconds(s.seconds)} of training")
        return lines


def make_plan(cfg: Config, vocab_size: int, world_size: int) -> Plan:
    """Everything that follows from the settings."""
    model_config = GPTConfig.from_depth(cfg.depth, vocab_size, cfg.max_seq_len)
    with torch.device("meta"):
        model = GPT(model_config)
    batch = plan_batch(cfg.total_batch_size, cfg.device_batch_size, cfg.max_seq_len, world_size)
    by_time = cfg.hours is not None and not (cfg.num_iterations and cfg.num_iterations > 0)
    iterations = None
    if not by_time:
        iterations = plan_iterations(
            batch_tokens=batch.total_tokens,
            num_params=model.num_params(),
            flops_per_token=model.estimate_flops(),
            num_iterations=cfg.num_iterations,
            target_flops=cfg.target_flops,
            target_param_data_ratio=cfg.target_param_data_ratio,
        )
    schedule = Schedule(
        num_iterations=iterations,
        seconds=cfg.hours * 3600 if by_time and cfg.hours else None,
        warmup_ratio=cfg.warmup_ratio,
        warmdown_ratio=cfg.warmdown_ratio,
        final_lr_frac=cfg.final_lr_frac,
    )
    return Plan(model_config, batch, schedule, model.num_params(), model.estimate_flops())


def validation(cfg: Config, compute: Compute, model: GPT, corpus: Corpus, tokenizer: RustBPETokenizer) -> float:
    """Bits per byte over the first `eval_tokens` of the validation set, or all of it."""
    row_tokens = cfg.device_batch_size * cfg.max_seq_len * compute.world_size
    loader = PretrainLoader(
        corpus,
        tokenizer,
        cfg.device_batch_size,
        cfg.max_seq_len,
        split="val",
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
    )
    steps = max(1, cfg.eval_tokens // row_tokens)
    return evaluate_bpb(model, loader, steps, get_token_bytes(compute.device), compute.precision.autocast())


def main(cfg: Config) -> None:
    """Plan, build, train, report."""
    print_banner()
    if cfg.dry_run and cfg.vocab_size is not None:
        vocab_size = cfg.vocab_size
    else:
        try:
            vocab_size = get_tokenizer().get_vocab_size()
        except FileNotFoundError:
            if not cfg.dry_run:
                raise
            vocab_size = 65536
    folder = checkpoint_folder("base", cfg.tag)
    with (
        setup_compute(cfg.runtime, saved_dtype(folder, cfg.resume)) as compute,
        only_run(folder, needed=not cfg.dry_run),
    ):
        plan = make_plan(cfg, vocab_size, compute.world_size)
        for line in plan.lines():
            print0(line)
        if not cfg.dry_run:
            train(cfg, plan, compute)


def train(cfg: Config, plan: Plan, compute: Compute) -> None:
    """Train by `plan` and log to the report."""
    tokenizer = get_tokenizer()
    corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir))
    folder = checkpoint_folder("base", cfg.tag)
    config = asdict(cfg)
    inputs = {"tokenizer": tokenizer.hash}
    checkpoint = find_resume(folder, config, cfg.resume, inputs=inputs, force=cfg.force)
    model = GPT(plan.model)
    if checkpoint is None:
        model.init_weights()
    else:
        load_weights(model, checkpoint)
    model.to(compute.device).train()
    loader = PretrainLoader(
        corpus,
        tokenizer,
        cfg.device_batch_size,
        cfg.max_seq_len,
        split="train",
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
        state=checkpoint.meta["loader"] if checkpoint else None,
    )
    groups = parameter_groups(
        model,
        embedding_lr=cfg.embedding_lr,
        unembedding_lr=cfg.unembedding_lr,
        matrix_lr=cfg.matrix_lr,
        weight_decay=cfg.weight_decay,
    )
    trainer = Trainer(
        label="base",
        model=model,
        optimizer=MuonAdamW(groups),
        loader=loader,
        compute=compute,
        settings=TrainSettings(
            schedule=plan.schedule,
            grad_accum_steps=plan.batch.grad_accum_steps,
            grad_clip=cfg.grad_clip or None,
            eval_every=cfg.eval_every or None,
            sample_every=cfg.sample_every or None,
            save_every=cfg.save_every or None,
            save_every_minutes=cfg.save_every_minutes,
            keep_last=cfg.keep_last,
            keep_every=cfg.keep_every or None,
        ),
        folder=folder,
        meta={"config": config, "inputs": inputs, "tokenizer_hash": tokenizer.hash, "corpus": corpus.name},
        evaluate=lambda: validation(cfg, compute, model, corpus, tokenizer),
        sample=lambda: print_samples(model, tokenizer, compute),
        wandb=init_wandb(cfg.run, "nanochat", config),
    )
    if checkpoint is not None:
        trainer.resume(checkpoint.meta, checkpoint.optimizer)
    state = trainer.run()
    trainer.wandb.finish()
    tokens_per_second = state.tokens / max(state.seconds, 1e-9)
    get_report().log(
        section="Base model training",
        data=[
            config,
            {
                "parameters": plan.num_params,
                "FLOPs per token": plan.flops_per_token,
                "steps": state.step,
                "tokens": state.tokens,
                "tokens per parameter": state.tokens / plan.num_params,
                "total FLOPs": float(state.tokens * plan.flops_per_token),
                "dtype": compute.precision.name,
                "training time": format_seconds(state.seconds),
                "tokens per second": tokens_per_second,
                "share of time waiting for data": loader.wait_seconds / max(state.seconds, 1e-9),
                "epochs begun": loader.epoch + 1,
                "skipped steps": compute.precision.skipped,
                "peak memory (GB)": compute.peak_memory_bytes() / 1e9,
                "minimum validation bpb": state.min_val,
                "final validation bpb": state.val,
            },
        ],
        metrics={"val bpb": state.val} if state.val is not None else None,
    )
    print0(
        f"base model done: {state.step} steps in {format_seconds(state.seconds)}, val bpb {state.val:.4f}, in {folder}"
    )


if __name__ == "__main__":
    run_script(main, Config)
