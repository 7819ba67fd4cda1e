"""Reinforcement learning on tasks that can be judged: REINFORCE with a group baseline, on the loop of every stage.

Answers are sampled from the model as it is (rollouts.py); the loss is −advantage · log p of the tokens the model chose,
averaged over all of them. Off by default: the clipped ratio of PPO (arXiv 1707.06347), which makes sense with several
updates per rollout, and a penalty for leaving the start (the estimator k3 of Schulman, http://joschu.net/blog/kl-approx.html).
Left out: a value model, rewards per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint_manager import Checkpoint, build_model
from nanochat.common import Compute, print0, print_banner
from nanochat.data.loader import Batch
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.recipe import recipe_of
from nanochat.scoring import pass_at_k
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.clock import Clock
from nanochat.train.rollouts import (
    FittingProblems,
    RewardTask,
    RolloutConfig,
    RolloutLoader,
    Scorer,
    attempt_problems,
)
from nanochat.train.samples import print_answers
from nanochat.train.stage import (
    StageConfig,
    Start,
    checkpoint_hooks,
    describe_horizon,
    find_start,
    make_schedule,
    prepare_model,
    start_run,
    train,
)

EVAL_ROWS = 256  # answers sampled together in an evaluation


@dataclass(frozen=True, kw_only=True)
class RLConfig(StageConfig, RolloutConfig):
    """Settings of reinforcement learning."""

    device_batch_size: int = 8
    """Answers per forward pass and process."""
    source: Literal["mid", "sft"] = "sft"
    """The stage whose model to start from."""
    clip: float | None = None
    """PPO's clipping of the probability ratio to 1 ± this; off by default."""
    kl: float = 0.0
    """Weight of the penalty for moving away from the model at the start; off by default."""
    init_lr_frac: float | None = None
    """All learning rates start at this share; default: the task's own, 0.1 for DemoWordSums, 0.05 for the others."""
    warmdown_ratio: float = 1.0
    """Share of the run in which the learning rate falls."""
    eval_every: int = 60
    """Steps between evaluations (0: only before and after)."""
    eval_examples: int = 400
    """Held-out problems per evaluation."""
    eval_samples: int = 8
    """Answers to each of them: pass@k is measured up to this k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.updates_per_rollout > 1 and self.clip is None:
            raise ValueError("--updates_per_rollout above 1 learns from answers of an older model: give --clip=0.2 too")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"--clip must be between 0 and 1, got {self.clip}")
        if self.kl < 0 or self.temperature <= 0:
            raise ValueError("--kl must not be negative, and --temperature must be above 0")
        for name in ("examples_per_step", "num_samples", "max_new_tokens", "updates_per_rollout", "eval_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_samples < 1 or self.top_k < 0:
            raise ValueError("--eval_samples must be at least 1, and --top_k at least 0")


class RLTasks(NamedTuple):
    """The task to learn, and the one that is held out."""

    train: RewardTask
    val: RewardTask
    lr_frac: float = 0.05
    """The share that learning rates start at, if none is given: nanochat's. Other tasks may bear more."""


def policy_loss(losses: Tensor, batch: Batch, clip: float | None = None, kl: float = 0.0) -> Tensor:
    """The summed loss of answers.

    Args:
        losses: (B, T) nats of each target under the model, 0 where unsupervised.
        batch: with "advantage" (B, 1) in its extras, for `clip` "old" and for `kl` "reference", (B, T) nats.
        clip: bound of the ratio's distance from 1.
        kl: weight of the penalty.
    """
    extras = batch.extras or {}
    advantage = extras["advantage"]
    each = losses * advantage
    if clip is not None:
        ratio = (extras["old"] - losses).exp()
        each = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if kl:
        log_ratio = losses - extras["reference"]  # of the reference to the model
        each = each + kl * (log_ratio.exp() - 1 - log_ratio)
    return torch.where(batch.y >= 0, each, 0.0).sum()


def make_scorer(model: GPT, compute: Compute) -> Scorer:
    """Losses of each target under `model`, without gradient."""

    @torch.no_grad()
    def score(x: Tensor, y: Tensor) -> Tensor:
        with compute.precision.autocast():
            return model(x, y, loss_reduction="none").float()

    return score


def make_scorers(cfg: RLConfig, model: GPT, start: Checkpoint, compute: Compute) -> dict[str, Scorer]:
    """The models that clipping and the penalty compare with."""
    scorers = {}
    if cfg.clip is not None:
        scorers["old"] = make_scorer(model, compute)
    if cfg.kl:
        reference = build_model(start, compute.device, "eval").requires_grad_(False)
        scorers["reference"] = make_scorer(reference, compute)
    return scorers


@torch.inference_mode()
def evaluate_pass_at_k(
    cfg: RLConfig, model: GPT, tokenizer: RustBPETokenizer, task: RewardTask, compute: Compute
) -> dict[str, float]:
    """{"pass@1": …, "pass@2": …, "pass@4": …, …} of the first `eval_examples` problems, all ranks together.

    An answer passes with a reward of at least 1. A problem that fills the context counts as failed.
    """
    engine, k = Engine(model, tokenizer, compute.precision), cfg.eval_samples
    count = min(cfg.eval_examples, len(task))
    solved = [0] * (k + 1)  # problems by how many of their answers passed: whole numbers add up alike in any order
    mine = list(range(compute.rank, count, compute.world_size))
    per_batch = max(1, EVAL_ROWS // k)
    for first in range(0, len(mine), per_batch):
        chosen = mine[first : first + per_batch]
        problems, seeds = [task[i] for i in chosen], [f"{cfg.runtime.seed}/{i}" for i in chosen]
        for answers in attempt_problems(engine, tokenizer, task, problems, k, cfg, seeds):
            solved[sum(answer.reward >= 1.0 for answer in answers)] += 1
    if compute.ddp:
        totals = torch.tensor(solved, device=compute.device)
        dist.all_reduce(totals)
        solved = totals.tolist()
    ks = [n for n in (2**i for i in range(k.bit_length())) if n <= k]
    return {f"pass@{n}": sum(pass_at_k(k, c, n) * times for c, times in enumerate(solved)) / count for n in ks}


def reinforce(cfg: RLConfig, load_tasks: Callable[[dict[str, Any]], RLTasks]) -> None:
    """Train a chat model by its rewards and log to the report.

    Args:
        cfg: the settings.
        load_tasks: gives the tasks for the meta data of the model to start from.
    """
    clock = Clock()
    print_banner()
    start = find_start(cfg.source, cfg)
    tasks, tokenizer = load_tasks(start.checkpoint.meta), start.tokenizer
    cfg = replace(cfg, init_lr_frac=tasks.lr_frac if cfg.init_lr_frac is None else cfg.init_lr_frac)
    with start_run("rl", cfg, start.tag, clock, start.checkpoint.meta.get("dtype")) as run:
        # Every step has sequences of another length: compiling would start again and again.
        run.compute = compute = replace(run.compute, compile=False, measure_compile=False)
        context = start.checkpoint.meta["model_config"]["sequence_len"]
        train_task, val_task = (FittingProblems(task, tokenizer, context) for task in (tasks.train, tasks.val))
        tasks = tasks._replace(train=train_task, val=val_task)
        steps_per_epoch = len(tasks.train) / cfg.examples_per_step * cfg.updates_per_rollout
        schedule = make_schedule(cfg, steps_per_epoch, start.preset)
        print0(
            f"rl: {tasks.train.name}, {len(tasks.train):,} problems, {describe_horizon(schedule)} of "
            f"{cfg.examples_per_step} problems × {cfg.num_samples} answers, "
            f"learning rates from {cfg.init_lr_frac:g} of the base run's"
        )
        if cfg.dry_run:
            return
        inputs = start.inputs(task=tasks.train.name)
        checkpoint = run.find_checkpoint(inputs)
        model, optimizer = prepare_model(cfg, start.checkpoint, checkpoint, compute.device)
        loader = make_rollouts(cfg, compute, model, start, checkpoint, tasks.train)

        def objective(model: GPT, x: Tensor, batch: Batch) -> Tensor:
            return policy_loss(model.loss(x, batch.y, "none"), batch, cfg.clip, cfg.kl)

        trainer = run.make_trainer(
            model,
            optimizer,
            loader,
            schedule,
            loader.micro_batches,
            inputs,
            {
                "chat_data": start.checkpoint.meta.get("chat_data"),
                "task": tasks.train.name,
                "recipe": recipe_of(start.checkpoint.meta),
            },
            evaluate=lambda: evaluate_pass_at_k(cfg, model, tokenizer, tasks.val, compute),
            val_name="pass@1",
            val_goal="highest",
            no_signal_advice="choose an easier --task, raise --num_samples, or train the SFT model for longer",
            objective=objective,
            extra_metrics=lambda: loader.metrics,
            sample=lambda: print_answers(model, tokenizer, compute),
            **checkpoint_hooks(cfg, model),
        )
        if checkpoint is None:
            trainer.run_evaluation()
        before = trainer.last_evaluation if checkpoint is None else checkpoint.meta["before"]
        trainer.meta["before"] = before
        train(trainer, checkpoint, answers_before=True)
        after = trainer.last_evaluation
        if not after:  # the run was complete before, and reported
            return
        facts = {
            "task": tasks.train.name,
            "held-out problems": min(cfg.eval_examples, len(tasks.val)),
            **{f"{name} before": value for name, value in before.items()},
            **{f"{name} after": value for name, value in after.items()},
            "mean reward of the last step": loader.metrics.get("reward"),
        }
        metrics = {f"{tasks.val.name} {name}": value for name, value in after.items()}
        run.report("RL", trainer, facts, metrics, f"pass@1 {before['pass@1']:.4f} -> {after['pass@1']:.4f}, ")


def make_rollouts(
    cfg: RLConfig, compute: Compute, model: GPT, start: Start, checkpoint: Checkpoint | None, task: RewardTask
) -> RolloutLoader:
    """The answers that `model` gives to `task` as batches; resumes where `checkpoint` stopped."""
    answers = cfg.examples_per_step // compute.world_size * cfg.num_samples
    return RolloutLoader(
        model,
        start.tokenizer,
        task,
        compute,
        cfg,
        micro_batches=max(1, -(-answers // cfg.device_batch_size)),
        seed=cfg.runtime.seed,
        scorers=make_scorers(cfg, model, start.checkpoint, compute),
        state=checkpoint.meta["loader"] if checkpoint else None,
    )
