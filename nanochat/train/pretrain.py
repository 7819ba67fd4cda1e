"""Pretraining: the plan that follows from its settings and from this machine, and the run.

The plan is made once, by `resolve_plan`, before there is a model: its shape, the length of the run, the
sequences that go through it at a time, the learning rates. All that comes after carries the plan out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from nanochat.checkpoint_manager import Checkpoint, load_weights, tokenizer_of
from nanochat.common import Compute, print0, print_banner
from nanochat.config import positive
from nanochat.data.token_cache import TokenCache
from nanochat.dataloader import PretrainLoader, first_tokens
from nanochat.dataset import open_corpus, prepare_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.qwen3 import obstacles
from nanochat.loss_eval import corpus_bpb
from nanochat.ops.recall import in_rust
from nanochat.optim import MuonAdamW
from nanochat.plan.local_speed import LONG_FLOPS, hours_sentence
from nanochat.plan.memory import MicroBatch, divisors
from nanochat.progress import format_seconds
from nanochat.recipe import (
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
from nanochat.tokenizer import PATTERNS, get_tokenizer
from nanochat.train.best_weights import BestWeights
from nanochat.train.clock import Clock
from nanochat.train.few_texts import TextSize, add_dropout, kept_weights
from nanochat.train.going_on import load_start, settle
from nanochat.train.micro_batch import choose_micro_batch, refuse_too_large, seconds_of
from nanochat.train.pretrain_config import PretrainConfig
from nanochat.train.resume import flatten, model_hash
from nanochat.train.samples import print_samples
from nanochat.train.stage import TrainingRun, start_run, train

# What training makes of the measured matmul speed, to plan a horizon given in hours. A guess.
SHARE_OF_MATMUL_SPEED = 0.5
DEFAULT_ROWS = 32  # to plan with, where no device is asked what fits
# Of a run of a given time: at most this share for one evaluation, and what is expected to be left for steps.
EVAL_SHARE, STEP_SHARE = 0.02, 0.9


# --- the plan ---------------------------------------------------------------------------------------------------------


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
    eval_tokens: int
    """Tokens per evaluation."""
    text: TextSize | None = None
    """The training text, where it is known."""
    epochs: float | None = None
    """How often it is read, where that and the horizon are known."""
    micro: MicroBatch | None = None
    """The micro-batch that fits into the device's memory, where that was measured."""

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
        if self.text is not None:
            lines.append(self.text.describe(self.epochs, s.seconds))
        return lines


def _model_config(cfg: PretrainConfig, vocab_size: int, **of_the_text: int) -> GPTConfig:
    settings = {"head_size": cfg.head_size} | PRESETS[cfg.recipe].switches | cfg.architecture.given() | of_the_text
    return GPTConfig.from_depth(cfg.depth, vocab_size, cfg.max_seq_len, cfg.aspect_ratio, **settings)


def make_plan(
    cfg: PretrainConfig,
    vocab_size: int,
    world_size: int,
    *,
    model_config: GPTConfig | None = None,
    horizon_tokens: int | None = None,
    total_batch_size: int | None = None,
    text: TextSize | None = None,
    tflops: Callable[[], float] = lambda: 1.0,
    rows: int = DEFAULT_ROWS,
) -> Plan:
    """Everything that follows from the settings alone.

    Args:
        cfg: the settings.
        vocab_size: of the tokenizer.
        world_size: processes.
        model_config: of the model to go on from; default: by the settings.
        horizon_tokens: tokens of the whole run, where they are known already.
        total_batch_size: tokens per step of the run that is resumed; the settings' goes before it.
        text: the training text.
        tflops: measures this machine's matmul speed per process, in TFLOP/s; called when the horizon is a time.
        rows: the most sequences in a micro-batch, where they are not set.
    """
    preset, config = PRESETS[cfg.recipe], model_config or _model_config(cfg, vocab_size)
    with torch.device("meta"):  # shapes only: to count parameters and FLOPs
        model = GPT(config)
    flops = model.estimate_flops()
    ratio = positive(cfg.target_param_data_ratio) or preset.tokens_per_parameter

    # The horizon first: batch, learning rates and decay of the recipes that scale follow from it.
    steps = positive(cfg.num_iterations)
    if horizon_tokens is None and cfg.seconds is not None and preset.scales:
        horizon_tokens = int(cfg.seconds * tflops() * 1e12 * SHARE_OF_MATMUL_SPEED * world_size / flops)
    elif horizon_tokens is None and steps:
        horizon_tokens = steps * (cfg.total_batch_size or batch_for_steps(preset, model, steps))
    elif horizon_tokens is None and positive(cfg.target_flops):
        horizon_tokens = int(positive(cfg.target_flops) / flops)
    tokens = horizon_tokens or int(ratio * preset.scaling_params(model))

    per_row = cfg.max_seq_len * world_size  # tokens in one sequence on every rank
    total_given = cfg.total_batch_size or total_batch_size
    rates = scale_hyperparameters(preset, model, tokens, total_given, per_row).override(cfg)
    auto = not isinstance(cfg.device_batch_size, int)
    rows = cfg.device_batch_size if isinstance(cfg.device_batch_size, int) else rows
    # Where the batch or the micro-batch is ours to choose, so is a micro-batch that divides it.
    if rows > 0 and (auto or (cfg.total_batch_size is None and preset.scales)):
        rows = divisors(max(1, rates.total_batch_size // per_row), rows)[0]
    batch = plan_batch(rates.total_batch_size, rows, cfg.max_seq_len, world_size)

    iterations = None
    if cfg.seconds is None:
        iterations = plan_iterations(
            batch_tokens=batch.total_tokens,
            num_params=preset.scaling_params(model),
            flops_per_token=flops,
            num_iterations=cfg.num_iterations,
            target_flops=cfg.target_flops,
            target_param_data_ratio=ratio,
        )
    warmup_steps = min(preset.warmup_steps, int(MAX_WARMUP_SHARE * (iterations or tokens // batch.total_tokens)))
    schedule = Schedule(
        num_iterations=iterations,
        seconds=cfg.seconds,
        warmup_ratio=cfg.warmup_ratio,
        warmup_steps=warmup_steps if cfg.warmup_steps is None else cfg.warmup_steps,
        warmdown_ratio=preset.warmdown_ratio if cfg.warmdown_ratio is None else cfg.warmdown_ratio,
        final_lr_frac=preset.final_lr_frac if cfg.final_lr_frac is None else cfg.final_lr_frac,
        short_rows_ratio=cfg.short_rows_ratio,
        momentum=preset.momentum,
        decay_to_zero=preset.decay_to_zero,
    )
    planned = iterations * batch.total_tokens if iterations else tokens if preset.scales else None
    epochs = planned / text.tokens if text and planned else None
    return Plan(config, batch, schedule, rates, model.num_params(), flops, tokens, cfg.eval_tokens, text, epochs)


def resolve_plan(
    cfg: PretrainConfig,
    vocab_size: int,
    compute: Compute,
    checkpoint: Checkpoint | None = None,
    model_config: GPTConfig | None = None,
    text: TextSize | None = None,
) -> Plan:
    """The plan of a run on this machine: micro-batches that fit, and for a time the horizon that a real step promises.

    A resumed run keeps horizon, batch, micro-batch and evaluation of its start: they must not change with a second
    measurement, nor with the number of processes. With --dry_run nothing is tried on the device.

    Raises:
        RuntimeError: not even one sequence fits; names the depth that does.
    """
    T, world, auto = cfg.max_seq_len, compute.world_size, cfg.device_batch_size == "auto"
    if not cfg.dry_run:  # before there is even a plan: one for thousands of layers takes minutes
        refuse_too_large(model_config or _model_config(cfg, vocab_size), compute, only_warn=not auto)
    meta = {} if checkpoint is None else checkpoint.meta
    micro = MicroBatch(**meta["micro_batch"]) if meta.get("micro_batch") else None
    batch = meta.get("total_batch_size")
    planned = partial(make_plan, cfg, vocab_size, world, model_config=model_config, total_batch_size=batch, text=text)
    plan = planned(
        horizon_tokens=meta.get("horizon_tokens"),
        tflops=lambda: compute.broadcast(compute.matmul_tflops()),
        rows=DEFAULT_ROWS if micro is None else micro.rows,
    )
    plan = replace(plan, micro=micro, eval_tokens=meta.get("eval_tokens", cfg.eval_tokens))
    if cfg.dry_run:
        return plan
    if (checkpoint is not None and not (auto and micro is None)) or not (auto or plan.schedule.seconds):
        return plan

    # Real steps of a model of this shape have the last word. It is another one than the run's: the random state stays.
    with torch.random.fork_rng(devices=[]):
        model = GPT(plan.model)
        model.init_weights()
    model.activation_checkpointing = cfg.activation_checkpointing
    model.to(compute.device).train()
    rows, horizon = plan.batch.device_batch_size, plan.horizon_tokens
    if auto:
        per_step = plan.batch.total_tokens // (T * world)
        micro, seconds = choose_micro_batch(model, compute, T, per_step, cfg.activation_checkpointing)
        rows = micro.rows
    else:
        seconds = compute.broadcast(seconds_of(model, compute, rows, T, 0) or 0.0)
        if not seconds:  # too many for the memory: the trainer will take fewer
            return plan
    del model
    speed = rows * T * world / max(seconds, 1e-9)  # tokens per second
    run_seconds = plan.schedule.seconds if checkpoint is None else None
    if run_seconds is not None and PRESETS[cfg.recipe].scales:
        horizon = int(STEP_SHARE * run_seconds * speed)
    plan = replace(planned(horizon_tokens=horizon, rows=rows), micro=micro, eval_tokens=plan.eval_tokens)
    if run_seconds is not None:
        # Without a backward pass three times as fast. All together get at most twice the share of one.
        evaluations = horizon / plan.batch.total_tokens / cfg.eval_every if cfg.eval_every > 0 else 1
        share = EVAL_SHARE / max(1.0, evaluations / 2)
        eval_tokens = min(cfg.eval_tokens, max(rows * T * world, int(3 * share * run_seconds * speed)))
        plan = replace(plan, eval_tokens=eval_tokens)
        print0(f"about {speed:,.0f} tokens per second; {eval_tokens:,} tokens per evaluation")
    return plan


# --- the run ----------------------------------------------------------------------------------------------------------


def pretrain(cfg: PretrainConfig) -> None:
    """Plan, build, train, report."""
    clock = Clock()
    print_banner()
    start = None if cfg.init_from is None else load_start(cfg.init_from)
    cfg = settle(cfg, start)
    with start_run("base", cfg, cfg.tag, clock, start.meta.get("dtype") if start else None) as run:
        if start is not None:
            of = f"{start.folder}{start.unfinished}"
            print0(f"goes on from {of}, with {cfg.lr_scale:g} of the recipe's learning rates")
        elif cfg.recipe == "portable" and (lacking := obstacles(_model_config(cfg, 1))):  # of any vocabulary
            print0(
                "warning: --recipe=portable is for models that open in llama.cpp and others, and these lack "
                f"{', '.join(lacking)}: with that scripts.export_gguf refuses the model"
            )
        if cfg.dry_run:
            config = GPTConfig.from_dict(start.meta["model_config"]) if start else None
            plan = resolve_plan(cfg, _vocab_size(cfg), run.compute, model_config=config)
            print0("\n".join(plan.lines()))
        else:
            _pretrain(cfg, run, start)


def _vocab_size(cfg: PretrainConfig) -> int:
    """The vocabulary to plan for where nothing is trained: there may be no tokenizer yet."""
    try:
        return cfg.vocab_size or get_tokenizer().get_vocab_size()
    except FileNotFoundError:
        return 65536


def _pretrain(cfg: PretrainConfig, run: TrainingRun, start: Checkpoint | None) -> None:
    compute, tokenizer = run.compute, tokenizer_of(start) if start else get_tokenizer()
    config = None
    if start is not None:
        config = GPTConfig.from_dict(start.meta["model_config"])
    elif cfg.recipe == "portable" and tokenizer.pattern != PATTERNS["runtimes"]:
        print0(
            "warning: this tokenizer cuts text as only nanochat and transformers can: for one that opens in llama.cpp "
            "and others too, train it with `python -m scripts.tok_train --pattern=runtimes` first"
        )
    if cfg.vocab_size not in (None, tokenizer.get_vocab_size()):
        print0(f"warning: --vocab_size is for --dry_run; this run takes its tokenizer's {tokenizer.get_vocab_size():,}")
    corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir, cfg.text_column), cfg.skip_bad_shards)
    for split in ("train", "val"):
        corpus.chunks(split)  # a split without documents is an error now, not after hours
    inputs = {"tokenizer": tokenizer.hash} | ({"model": model_hash(start)} if start else {})
    checkpoint = run.find_checkpoint(inputs)
    if checkpoint is not None and "text_size" in checkpoint.meta:  # what follows from it must not be decided anew
        text = TextSize(**checkpoint.meta["text_size"])
    else:
        text = TextSize.of(corpus, tokenizer)
    carried = None
    if config is None:
        config = _model_config(cfg, tokenizer.get_vocab_size())  # what is wrong with it is said before a text is read
        of_the_text = {"document_start": tokenizer.get_bos_token_id()} if cfg.separate_documents else {}
        if checkpoint is not None:
            asked = flatten(checkpoint.meta["config"]).get("recall") or 0
            if config.recall == asked:  # it has no more than there were; what --force changes does not fit, and is said
                of_the_text["recall"] = GPTConfig.from_dict(checkpoint.meta["model_config"]).recall
        elif most := config.recall:
            carried = first_tokens(corpus, tokenizer, most, cfg.skip_bad_shards)
            of_the_text["recall"] = len(carried)
            print0(
                f"the model carries the first {len(carried):,} tokens of the training text, to look up what followed: "
                "who is given the model is given this text"
            )
            if not in_rust():
                print0(
                    "WARNING: rustbpe is not compiled here: looking up will take most of the time (bash setup_env.sh)"
                )
        config = _model_config(cfg, tokenizer.get_vocab_size(), **of_the_text)

    plan = resolve_plan(cfg, tokenizer.get_vocab_size(), compute, checkpoint, config, text)
    print0("\n".join(plan.lines()))
    flops = (plan.schedule.num_iterations or 0) * plan.batch.total_tokens * plan.flops_per_token
    if checkpoint is None and flops > LONG_FLOPS:  # hours are not asked for: say them
        speed = compute.broadcast(compute.matmul_tflops()) * compute.world_size * SHARE_OF_MATMUL_SPEED
        print0(hours_sentence(flops, speed))

    model = GPT(plan.model)
    model.activation_checkpointing = cfg.activation_checkpointing
    weights = checkpoint or start
    if weights is None:
        model.init_weights()
        if carried is not None:
            model.recall.carry(carried)
    else:
        load_weights(model, weights)
    if start is not None:
        start.release()
    if cfg.dropout:
        add_dropout(model, cfg.dropout)
    model.to(compute.device).train()
    scale, preset = 1.0 if cfg.lr_scale is None else cfg.lr_scale, PRESETS[cfg.recipe]
    groups = parameter_groups(model, **plan.rates.rates(), lr_frac=scale, preset=preset)
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
        look_up=model.recall.elsewhere() if plan.model.recall else None,
    )

    def evaluate() -> dict[str, float]:
        val_bpb = corpus_bpb(
            model,
            corpus,
            tokenizer,
            compute,
            split="val",
            rows=plan.batch.device_batch_size,
            max_rows=max(1, plan.eval_tokens // cfg.max_seq_len),
            skip_bad_shards=cfg.skip_bad_shards,
        )
        return {"val_bpb": val_bpb, **text.progress(trainer.state)}

    keep_best, mean = kept_weights(cfg, plan.epochs)
    # What a resume must not decide anew.
    decided = {"horizon_tokens": plan.horizon_tokens, "total_batch_size": plan.batch.total_tokens}
    trainer = run.make_trainer(
        model,
        MuonAdamW(groups),
        loader,
        plan.schedule,
        plan.batch.grad_accum_steps,
        inputs,
        {"corpus": corpus.name, **decided, "eval_tokens": plan.eval_tokens, "text_size": asdict(text)},
        micro=plan.micro,
        evaluate=evaluate,
        best=BestWeights(model, mean) if keep_best else None,
        sample=lambda: print_samples(model, tokenizer, compute, corpus),
    )
    train(trainer, checkpoint)
    state = trainer.state
    facts = {
        "parameters": plan.num_params,
        "FLOPs per token": plan.flops_per_token,
        "tokens per parameter": state.tokens / plan.num_params,
        "total FLOPs": float(state.tokens * plan.flops_per_token),
        "share of time waiting for data": state.waited / max(state.seconds, 1e-9),
        "epochs begun": loader.epoch + 1,
        **text.facts(state),
        "share of tokens cropped": loader.counts.cropped_share,
        "minimum validation bpb": state.best_val,
        "final validation bpb": trainer.last_evaluation.get("val_bpb", state.val),
        "the model's weights are those of": "the minimum" if trainer.best else "the end",
    }
    run.report("Base model training", trainer, facts, {"val bpb": state.val}, f"val bpb {state.val:.4f}, ")
