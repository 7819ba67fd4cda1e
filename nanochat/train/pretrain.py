"""Pretraining: settings, the plan that follows from them, and a run of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from nanochat.checkpoint_manager import Checkpoint, checkpoint_folder, load_weights
from nanochat.common import Compute, print0, print_banner, setup_compute
from nanochat.config import Runtime, positive
from nanochat.data.token_cache import TokenCache
from nanochat.dataloader import Mode, PretrainLoader
from nanochat.dataset import Corpus, open_corpus, prepare_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import MicroBatch, divisors
from nanochat.progress import format_seconds
from nanochat.recipe import (
    DEFAULT_RECIPE,
    MAX_WARMUP_SHARE,
    PRESETS,
    BatchPlan,
    Hyperparameters,
    Schedule,
    batch_for_steps,
    parameter_groups,
    plan_batch,
    plan_iterations,
    scale_hyperparameters,
)
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer
from nanochat.train.clock import Clock
from nanochat.train.micro_batch import choose_micro_batch, refuse_too_large, seconds_of
from nanochat.train.resume import find_resume, only_run, saved_dtype
from nanochat.train.samples import print_samples
from nanochat.train.tracking import TrackerName, init_tracker
from nanochat.train.trainer import Trainer, TrainSettings

# What training makes of the measured matmul speed, to plan a horizon given in hours. A guess.
SHARE_OF_MATMUL_SPEED = 0.5
DEFAULT_ROWS = 32  # to plan with, where no device is asked what fits
# Of a run of a given time: at most this share for one evaluation, and what is expected to be left for steps.
EVAL_SHARE, STEP_SHARE = 0.02, 0.9


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The model's switches; each is the recipe's unless it is given."""

    n_kv_head: int | None = None
    """Key/value heads, a divisor of the heads; default: as many as heads."""
    residual_scalars: bool | None = None
    """Learned scalars on the residual stream and on the embedding, per layer."""
    value_embeddings: bool | None = None
    """Gated embeddings added to the values of every second layer."""
    smear: bool | None = None
    """Mix the previous token's embedding into each token's."""
    backout: bool | None = None
    """Subtract a share of the middle layer before the output."""
    qk_scale: float | None = None
    """Factor on normalised queries and keys."""
    rope_base: float | None = None
    """Base of the rotary frequencies."""
    key_offset: bool | None = None
    """Take half of each key's channels from the token before."""
    init: Literal["classic", "modern"] | None = None
    """How weights begin."""
    window_pattern: str | None = None
    """Repeated over the layers, the last is always L. L: whole context, S: a quarter of it."""
    bigram_buckets: int | None = None
    """Size of a hashed embedding of token pairs; 0: none."""

    def given(self) -> dict[str, Any]:
        """The settings that are not left to the recipe."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings of a pretraining run."""

    runtime: Runtime = field(default_factory=Runtime)
    architecture: Architecture = field(default_factory=Architecture)
    recipe: Literal["small", "classic", "modern"] = DEFAULT_RECIPE  # type: ignore[assignment]
    """Preset of model and optimizer: small is for one card or a CPU and some hours, classic is nanochat of December
    2025, modern that of July 2026; every flag that is given goes before it."""
    run: str = "dummy"
    """Name of the run in the tracker; dummy means no tracker. metrics.jsonl is always written."""
    tracker: TrackerName = "wandb"
    """Where --run logs to."""
    depth: int = 20
    """Layers; the width follows: aspect_ratio × depth channels, rounded up to whole heads of 128."""
    aspect_ratio: int = 64
    """Channels per layer."""
    max_seq_len: int = 2048
    """Context length in tokens."""
    vocab_size: int | None = None
    """Vocabulary to plan for with --dry_run before a tokenizer exists; a run takes its tokenizer's."""
    data_dir: str | None = None
    """Folder (or file) of parquet, txt, md, jsonl, csv or html text; default: what the dataset step prepared."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo."""
    packing: Mode = "stream"
    """How documents become rows: stream (one after the other, as in classic nanochat), or bestfit (every row begins
    at a document, the ends of some are cropped; the share is reported)."""
    skip_bad_shards: bool = False
    """Pass over shards that can't be read, with a warning, instead of stopping."""
    token_cache: bool = False
    """Use the shards that `python -m nanochat.data.token_cache` has tokenized before."""
    num_iterations: int | None = None
    """Optimizer steps; goes before the other horizons (-1 is off, as in nanochat)."""
    hours: float | None = None
    """Be done in this time, last evaluation, samples and checkpoint included: the schedule follows the clock."""
    target_flops: float | None = None
    """Train for this many FLOPs."""
    target_param_data_ratio: float | None = None
    """Train on this many tokens per parameter; default: 20 per parameter (classic, Chinchilla), 12 per parameter of
    matrices and lm_head (small, modern)."""
    device_batch_size: int | Literal["auto"] = "auto"
    """Rows per forward pass and process: auto finds the most that fit and pay. The total batch stays, whatever fits."""
    total_batch_size: int | None = None
    """Tokens per optimizer step, over all processes and micro-batches; default: 524288 (classic), by the horizon
    (small, modern)."""
    embedding_lr: float | None = None
    """Learning rate of the embedding (AdamW), × (width/768)^-½; default: 0.2 (small, classic), 0.3 by batch
    (modern)."""
    unembedding_lr: float | None = None
    """Learning rate of lm_head (AdamW), × (width/768)^-½; default: 0.004 (small, classic), 0.008 by batch
    (modern)."""
    matrix_lr: float | None = None
    """Learning rate of the blocks' matrices (Muon); default: 0.03 (small), 0.02 (classic), 0.02 by batch (modern)."""
    scalar_lr: float | None = None
    """Learning rate of the switches' scalars (AdamW); default: 0.1 (small), 0.5 (classic), 0.5 by batch (modern)."""
    weight_decay: float | None = None
    """Decoupled weight decay; default: 0 (small, classic), 0.28 by batch and horizon (modern)."""
    lr_scale: float = 1.0
    """Factor on all learning rates."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    warmup_ratio: float = 0.0
    """Share of the run in which the learning rate rises."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises; default: 0 (small, classic), 40 (modern; fewer in a short
    run)."""
    warmdown_ratio: float | None = None
    """Share of the run in which the learning rate falls to its end; default: 0.2 (classic), 0.65 (small, modern)."""
    final_lr_frac: float | None = None
    """Learning rate at the end, as a share of the full one; default: 0 (small, classic), 0.05 (modern)."""
    short_rows_ratio: float = 0.0
    """Share of the run in which rows are cut into shorter ones: first quarters, then halves."""
    activation_checkpointing: bool = False
    """Keep no activations inside the layers but compute them again: less memory, about a third more time."""
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
        if self.num_iterations == 0:
            raise ValueError("--num_iterations must be positive, got 0 (leave it out, or -1, for another horizon)")
        if self.target_param_data_ratio is not None and self.target_param_data_ratio == 0:
            raise ValueError("--target_param_data_ratio must be positive, got 0")
        if not 0 <= self.short_rows_ratio <= 1:
            raise ValueError(f"--short_rows_ratio must be from 0 to 1, got {self.short_rows_ratio}")
        if self.short_rows_ratio and self.max_seq_len % 4:
            raise ValueError(
                f"--short_rows_ratio cuts rows into quarters, and --max_seq_len={self.max_seq_len} has none"
            )

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
    rates: Hyperparameters
    num_params: int
    flops_per_token: int
    horizon_tokens: int

    def lines(self) -> list[str]:
        """For people."""
        m, b, s, r = self.model, self.batch, self.schedule, self.rates
        lines = [
            f"model: {m.n_layer} layers, {m.n_embd} channels, {m.n_head} heads of {m.head_dim}, "
            f"vocabulary {m.vocab_size}",
            f"parameters: {self.num_params:,}; FLOPs per token: {self.flops_per_token:.4g}",
            f"batch: {b.total_tokens:,} tokens = {b.device_batch_size} rows × {b.sequence_len} tokens × "
            f"{b.world_size} processes × {b.grad_accum_steps} micro-batches",
            f"learning rates: embedding {r.embedding_lr:.4g}, lm_head {r.unembedding_lr:.4g}, "
            f"matrices {r.matrix_lr:.4g}, scalars {r.scalar_lr:.4g}; weight decay {r.weight_decay:.4g}",
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


def make_plan(
    cfg: PretrainConfig,
    vocab_size: int,
    world_size: int,
    horizon_tokens: int | None = None,
    tflops: Callable[[], float] = lambda: 1.0,
    rows: int = DEFAULT_ROWS,
) -> Plan:
    """Everything that follows from the settings.

    Args:
        cfg: the settings.
        vocab_size: of the tokenizer.
        world_size: processes.
        horizon_tokens: what a resumed run has planned for.
        tflops: measures this machine's matmul speed per process, in TFLOP/s; called when the horizon is a time.
        rows: the most rows of a micro-batch, where they are not set.
    """
    preset = PRESETS[cfg.recipe]
    settings = preset.switches | cfg.architecture.given()
    model_config = GPTConfig.from_depth(cfg.depth, vocab_size, cfg.max_seq_len, cfg.aspect_ratio, **settings)
    with torch.device("meta"):
        model = GPT(model_config)
    flops, by_steps = model.estimate_flops(), bool(cfg.num_iterations and cfg.num_iterations > 0)
    by_time = cfg.hours is not None and not by_steps
    if horizon_tokens is None and by_time and cfg.hours is not None and preset.scales:
        horizon_tokens = int(cfg.hours * 3600 * tflops() * 1e12 * SHARE_OF_MATMUL_SPEED * world_size / flops)
    ratio = positive(cfg.target_param_data_ratio or 0) or preset.tokens_per_parameter
    tokens = horizon_tokens or _horizon(
        cfg, preset.scaling_params(model), ratio, flops, partial(batch_for_steps, preset, model)
    )
    per_row = cfg.max_seq_len * world_size
    rates = scale_hyperparameters(preset, model, tokens, cfg.total_batch_size, per_row)
    rates = rates.override(
        embedding_lr=cfg.embedding_lr,
        unembedding_lr=cfg.unembedding_lr,
        matrix_lr=cfg.matrix_lr,
        scalar_lr=cfg.scalar_lr,
        weight_decay=cfg.weight_decay,
    )
    auto = not isinstance(cfg.device_batch_size, int)
    rows = cfg.device_batch_size if isinstance(cfg.device_batch_size, int) else rows
    # Where the batch or the rows are ours to choose, so are rows that divide it.
    if rows > 0 and (auto or (cfg.total_batch_size is None and preset.scales)):
        rows = divisors(max(1, rates.total_batch_size // per_row), rows)[0]
    batch = plan_batch(rates.total_batch_size, rows, cfg.max_seq_len, world_size)
    iterations = None
    if not by_time:
        iterations = plan_iterations(
            batch_tokens=batch.total_tokens,
            num_params=preset.scaling_params(model),
            flops_per_token=flops,
            num_iterations=cfg.num_iterations,
            target_flops=cfg.target_flops,
            target_param_data_ratio=ratio,
        )
    steps = iterations or tokens // batch.total_tokens
    warmup_steps = min(preset.warmup_steps, int(MAX_WARMUP_SHARE * steps))
    schedule = Schedule(
        num_iterations=iterations,
        seconds=cfg.hours * 3600 if by_time and cfg.hours else None,
        warmup_ratio=cfg.warmup_ratio,
        warmup_steps=warmup_steps if cfg.warmup_steps is None else cfg.warmup_steps,
        warmdown_ratio=preset.warmdown_ratio if cfg.warmdown_ratio is None else cfg.warmdown_ratio,
        final_lr_frac=preset.final_lr_frac if cfg.final_lr_frac is None else cfg.final_lr_frac,
        short_rows_ratio=cfg.short_rows_ratio,
        momentum=preset.momentum,
        decay_to_zero=preset.decay_to_zero,
    )
    return Plan(model_config, batch, schedule, rates, model.num_params(), flops, tokens)


def _horizon(cfg: PretrainConfig, scaling_params: int, ratio: float, flops: int, batch_of: Callable[[int], int]) -> int:
    """Tokens of the run, by the first horizon that is set."""
    if cfg.num_iterations and cfg.num_iterations > 0:
        return cfg.num_iterations * (cfg.total_batch_size or batch_of(cfg.num_iterations))
    if cfg.target_flops and cfg.target_flops > 0:
        return int(cfg.target_flops / flops)
    return int(ratio * scaling_params)


def validation(
    cfg: PretrainConfig,
    compute: Compute,
    model: GPT,
    corpus: Corpus,
    tokenizer: RustBPETokenizer,
    rows: int,
    tokens: int,
) -> float:
    """Bits per byte over the first `tokens` of the validation set, or all of it, `rows` at a time."""
    loader = PretrainLoader(
        corpus,
        tokenizer,
        rows,
        cfg.max_seq_len,
        split="val",
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
        max_rows=max(1, tokens // cfg.max_seq_len),
        skip_bad_shards=cfg.skip_bad_shards,
    )
    return evaluate_bpb(model, loader, None, get_token_bytes(compute.device), compute.precision.autocast())


def pretrain(cfg: PretrainConfig) -> None:
    """Plan, build, train, report."""
    clock = Clock()
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
        plan = make_plan(cfg, vocab_size, compute.world_size, tflops=partial(_measure, compute))
        for line in plan.lines():
            print0(line)
        if not cfg.dry_run:
            train(cfg, plan, compute, clock)


def _measure(compute: Compute) -> float:
    return compute.broadcast(compute.matmul_tflops())


class Fit(NamedTuple):
    """What the device has made of a plan."""

    plan: Plan
    micro: MicroBatch | None
    eval_tokens: int


def fit_to_device(cfg: PretrainConfig, plan: Plan, model: GPT, compute: Compute, checkpoint: Checkpoint | None) -> Fit:
    """Choose the micro-batch, and for a horizon in hours plan with the speed that a real step has here.

    A resumed run keeps what was chosen at its start.
    """
    T, world, auto = cfg.max_seq_len, compute.world_size, cfg.device_batch_size == "auto"
    meta = {} if checkpoint is None else checkpoint.meta
    micro = MicroBatch(**meta["micro_batch"]) if meta.get("micro_batch") else None
    replan = partial(make_plan, cfg, plan.model.vocab_size, world)
    if checkpoint is not None and (micro is not None or not auto):
        plan = replan(plan.horizon_tokens, rows=micro.rows) if micro is not None else plan
        return Fit(plan, micro, meta.get("eval_tokens", cfg.eval_tokens))
    seconds, rows = 0.0, plan.batch.device_batch_size
    if auto:
        per_step = plan.batch.total_tokens // (T * world)
        micro, seconds = choose_micro_batch(model, compute, T, per_step, cfg.activation_checkpointing)
        rows = micro.rows
    run_seconds = plan.schedule.seconds
    if run_seconds is None:
        return Fit(replan(plan.horizon_tokens, rows=rows), micro, cfg.eval_tokens)
    if not auto:
        seconds = compute.broadcast(seconds_of(model, compute, rows, T, 0) or 0.0)
        if not seconds:  # too many rows: the trainer will take fewer
            return Fit(plan, None, cfg.eval_tokens)
    speed = rows * T * world / max(seconds, 1e-9)  # tokens per second
    tokens = plan.horizon_tokens
    if checkpoint is None and PRESETS[cfg.recipe].scales:
        tokens = int(STEP_SHARE * run_seconds * speed)
    plan = replan(tokens, rows=rows)
    # Without a backward pass three times as fast. All together get at most twice the share of one.
    evaluations = tokens / plan.batch.total_tokens / cfg.eval_every if cfg.eval_every > 0 else 1
    share = EVAL_SHARE / max(1.0, evaluations / 2)
    eval_tokens = min(cfg.eval_tokens, max(rows * T * world, int(3 * share * run_seconds * speed)))
    print0(f"about {speed:,.0f} tokens per second; {eval_tokens:,} tokens per evaluation")
    return Fit(plan, micro, eval_tokens)


def train(cfg: PretrainConfig, plan: Plan, compute: Compute, clock: Clock) -> None:
    """Train by `plan`, in the time that `clock` says is left of it, and log to the report."""
    tokenizer = get_tokenizer()
    corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir), cfg.skip_bad_shards)
    for split in ("train", "val"):
        corpus.chunks(split)  # a split without documents is an error now, not after hours
    folder = checkpoint_folder("base", cfg.tag)
    config = asdict(cfg)
    inputs = {"tokenizer": tokenizer.hash}
    checkpoint = find_resume(folder, config, cfg.resume, inputs=inputs, force=cfg.force)
    if checkpoint is not None and plan.horizon_tokens != checkpoint.meta.get("horizon_tokens", plan.horizon_tokens):
        # A horizon in hours was measured; the batch must not change with the machine's mood.
        plan = make_plan(cfg, plan.model.vocab_size, compute.world_size, checkpoint.meta["horizon_tokens"])
    if checkpoint is not None and cfg.total_batch_size is None and "total_batch_size" in checkpoint.meta:
        # A batch that follows from the horizon is rounded to what the processes share; their number may have changed.
        cfg = replace(cfg, total_batch_size=checkpoint.meta["total_batch_size"])
        horizon = checkpoint.meta["horizon_tokens"]
        plan = make_plan(cfg, plan.model.vocab_size, compute.world_size, horizon, rows=plan.batch.device_batch_size)
    refuse_too_large(plan.model, compute, plan.batch.sequence_len, only_warn=cfg.device_batch_size != "auto")
    model = GPT(plan.model)
    model.activation_checkpointing = cfg.activation_checkpointing
    if checkpoint is None:
        model.init_weights()
    else:
        load_weights(model, checkpoint)
    model.to(compute.device).train()
    fit = fit_to_device(cfg, plan, model, compute, checkpoint)
    plan = fit.plan
    print0(plan.lines()[2])
    loader = PretrainLoader(
        corpus,
        tokenizer,
        plan.batch.device_batch_size,
        cfg.max_seq_len,
        split="train",
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
        state=checkpoint.meta["loader"] if checkpoint else None,
        mode=cfg.packing,
        skip_bad_shards=cfg.skip_bad_shards,
        cache=TokenCache(tokenizer) if cfg.token_cache else None,
    )
    rates = plan.rates
    groups = parameter_groups(
        model,
        embedding_lr=rates.embedding_lr,
        unembedding_lr=rates.unembedding_lr,
        matrix_lr=rates.matrix_lr,
        scalar_lr=rates.scalar_lr,
        weight_decay=rates.weight_decay,
        lr_frac=cfg.lr_scale,
        preset=PRESETS[cfg.recipe],
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
            grad_clip=positive(cfg.grad_clip),
            eval_every=positive(cfg.eval_every),
            sample_every=positive(cfg.sample_every),
            save_every=positive(cfg.save_every),
            save_every_minutes=positive(cfg.save_every_minutes) or math.inf,
            keep_last=cfg.keep_last,
            keep_every=positive(cfg.keep_every),
        ),
        folder=folder,
        meta={"config": config, "inputs": inputs, "tokenizer_hash": tokenizer.hash, "corpus": corpus.name}
        | {"horizon_tokens": plan.horizon_tokens, "total_batch_size": plan.batch.total_tokens}
        | {"eval_tokens": fit.eval_tokens},
        clock=clock,
        micro=fit.micro,
        evaluate=lambda: validation(
            cfg, compute, model, corpus, tokenizer, plan.batch.device_batch_size, fit.eval_tokens
        ),
        sample=lambda: print_samples(model, tokenizer, compute),
        tracker=init_tracker(cfg.tracker, cfg.run, "nanochat", config),
    )
    if checkpoint is not None:
        trainer.resume(checkpoint.meta, checkpoint.optimizer)
        checkpoint.release()
    state = trainer.run()
    trainer.tracker.finish()
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
                "share of tokens cropped": loader.counts.cropped_share,
                "skipped steps": compute.precision.skipped,
                "loss scale": compute.precision.scaler.scale,
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
