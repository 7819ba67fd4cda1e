"""Answers of the model itself as training batches: what reinforcement learning learns from.

A step draws problems, lets the model answer each several times with the tools it has, and rewards the answers. An
answer's advantage is its reward less the mean reward of its group, so a group whose answers are all right or all wrong
teaches nothing: it is left out. While fewer than a quarter of a step's problems are left, others take the place of
those that teach nothing, a few times at most. A step for which nothing is left is not made (see `Precision.step`).

Everything that is drawn follows from (seed, rollout number, place among the step's problems, try), so it does not
depend on the number of ranks, and a resume needs only the rollout's number and the answers still to be learned from.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Compute
from nanochat.engine import Engine, row_seed
from nanochat.env import print0
from nanochat.gpt import GPT
from nanochat.messages import Conversation
from nanochat.tokenizer import RustBPETokenizer

COUNTED = ("answers", "reward", "answer_tokens", "useful", "too_long", "redrawn")  # of a rollout
MAX_TRIES = 4  # draws of problems for a place of a step
ENOUGH = 0.25  # share of a step's places whose problems must teach something; until then the others are drawn anew


class RewardTask(Protocol):
    """A task that reinforcement learning can use."""

    name: str

    def __len__(self) -> int:
        """Number of problems."""

    def __getitem__(self, index: int) -> Conversation:
        """The conversation of a problem; its last message is the reference answer."""

    def reward(self, problem: Conversation, completion: str) -> float:
        """The worth of an answer: 1 right, 0 wrong, or between."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Settings of the sampling."""

    examples_per_step: int = 16
    """Problems per step, over all processes."""
    num_samples: int = 16
    """Answers to each problem."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 1.0
    """Of the sampling; the gradient assumes 1."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0: from all, as the gradient assumes."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same answers; more than 1 needs --clip."""


class Rollout(NamedTuple):
    """One answer to a problem."""

    ids: list[int]
    """Prompt and answer."""
    mask: list[int]
    """1 where the model chose the token."""
    advantage: float = 0.0
    reward: float = 0.0
    length: int = 0
    """Tokens of the answer."""


class FittingProblems:
    """The problems of a task whose prompts leave room for an answer in a context of so many tokens.

    Raises:
        ValueError: none does.
    """

    def __init__(self, task: RewardTask, tokenizer: RustBPETokenizer, context: int) -> None:
        self.task, self.name = task, task.name
        lengths = (len(tokenizer.render_for_completion(task[i])) for i in range(len(task)))
        self.indices = [i for i, length in enumerate(lengths) if length < context]
        if len(task) == 0:
            raise ValueError(f"task {task.name} has no problems")
        if not self.indices:
            raise ValueError(
                f"no problem of {task.name} leaves room for an answer in the model's context of {context} tokens: "
                "train a model with a longer one"
            )
        if self.too_long:
            print0(
                f"{task.name}: {self.too_long:,} of {len(task):,} problems do not fit into the model's context of "
                f"{context} tokens and are left out"
            )

    @property
    def too_long(self) -> int:
        """Problems that were left out."""
        return len(self.task) - len(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Conversation:
        return self.task[self.indices[index]]

    def reward(self, problem: Conversation, completion: str) -> float:
        """The task's judgement."""
        return self.task.reward(problem, completion)


Scorer = Callable[[Tensor, Tensor], Tensor]
"""Loss in nats of each target: x, y (B, T) -> (B, T)."""


def attempt_problems(
    engine: Engine,
    tokenizer: RustBPETokenizer,
    task: RewardTask,
    problems: Sequence[Conversation],
    count: int,
    cfg: RolloutConfig,
    seeds: Sequence[int | str],
) -> list[list[Rollout]]:
    """`count` answers to each problem with their rewards; none to one that fills the context. `seeds`: by problem."""
    prompts = [tokenizer.render_for_completion(problem) for problem in problems]
    owners = [i for i, prompt in enumerate(prompts) if len(prompt) < engine.context_length for _ in range(count)]
    sequences, masks = engine.generate_prompts(
        [prompts[i] for i in owners],
        cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k or None,
        seeds=[row_seed(seeds[i], n % count) for n, i in enumerate(owners)],
        keep_end=True,  # the model chose to end there: that is learned too
    )
    rollouts: list[list[Rollout]] = [[] for _ in problems]
    for i, ids, mask in zip(owners, sequences, masks, strict=True):
        answer = ids[len(prompts[i]) :]
        reward = float(task.reward(problems[i], tokenizer.decode(answer)))
        rollouts[i].append(Rollout(ids, mask, reward=reward, length=len(answer)))
    return rollouts


def to_rows(answers: Sequence[Rollout], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x and y (B, T), padded behind with unsupervised positions, and the advantages (B, 1)."""
    T = max(len(a.ids) for a in answers) - 1
    x = torch.zeros(len(answers), T, dtype=torch.long)
    y = torch.full((len(answers), T), -1, dtype=torch.long)
    for i, a in enumerate(answers):
        n, ids = len(a.ids) - 1, torch.tensor(a.ids)
        x[i, :n] = ids[:-1]
        y[i, :n] = torch.where(torch.tensor(a.mask[1:]) == 1, ids[1:], -1)
    return x.to(device), y.to(device), torch.tensor([[a.advantage] for a in answers], device=device)


def with_advantages(group: Sequence[Rollout]) -> list[Rollout]:
    """The answers to one problem with their advantages."""
    advantages = group_advantages([answer.reward for answer in group], len(group))
    return [answer._replace(advantage=a) for answer, a in zip(group, advantages, strict=True)]


def group_advantages(rewards: Sequence[float], group: int) -> list[float]:
    """Each reward less the mean of its group of `group` neighbours. Source: Kool et al. 2019, "Buy 4 REINFORCE
    Samples, Get a Baseline for Free!"; without the division by the deviation, which favours the very easy and the very
    hard (Liu et al. 2025, arXiv 2503.20783)."""
    means = [sum(rewards[i : i + group]) / group for i in range(0, len(rewards), group)]
    return [reward - means[i // group] for i, reward in enumerate(rewards)]


class RolloutLoader:
    """Endless iterator of micro-batches (x, y, None, extras), all sampled from the model as it is at the step's start.

    `extras` holds "advantage" (B, 1), and for each scorer its losses (B, T) by name.

    Args:
        model: the model that is being trained.
        tokenizer: its tokenizer.
        task: the problems.
        compute: device, ranks and precision.
        cfg: how to sample.
        micro_batches: that the answers of one step are handed out in.
        seed: everything that is drawn follows from it.
        scorers: what else to compute of the answers before the first update, by name.
        state: `state_dict()` of an earlier loader, to resume where it stopped.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: RustBPETokenizer,
        task: RewardTask,
        compute: Compute,
        cfg: RolloutConfig,
        *,
        micro_batches: int = 1,
        seed: int = 42,
        scorers: dict[str, Scorer] | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        if cfg.num_samples < 2:
            raise ValueError(f"--num_samples={cfg.num_samples}: the group baseline needs at least 2 answers each")
        if len(task) == 0:
            raise ValueError(f"task {task.name} has no problems")
        if cfg.examples_per_step % compute.world_size:
            raise ValueError(
                f"--examples_per_step={cfg.examples_per_step} is not a multiple of the {compute.world_size} processes"
            )
        self.tokenizer, self.task, self.compute, self.cfg = tokenizer, task, compute, cfg
        self.micro_batches, self.seed = micro_batches, seed
        self.engine = Engine(model, tokenizer, compute.precision)
        self.scorers = scorers or {}
        self.metrics: dict[str, float] = {}
        """Of the last rollout, over all ranks."""
        self._rollouts = 0 if state is None else int(state["rollouts"])
        self._uses_left = 0 if state is None else int(state["uses_left"])
        self._epoch_order: tuple[int, list[int]] | None = None
        self._queue: list[tuple[Any, ...]] = []
        self._batches: list[tuple[Any, ...]] = []
        self._saved: list[Any] = []
        if self._uses_left:
            assert state is not None
            self._saved = state["batches"]
            if len(self._saved) != compute.world_size:
                raise ValueError(
                    f"these answers were sampled by {len(self._saved)} processes, now there are {compute.world_size}: "
                    "resume with as many, or start over with --resume=never"
                )
            self._batches = [self._from_json(rows) for rows in self._saved[compute.rank]]
            self.metrics = state["metrics"]

    def __iter__(self) -> RolloutLoader:
        return self

    def __next__(self) -> tuple[Any, ...]:
        if not self._queue:
            if self._uses_left == 0:
                self._batches = self._make_batches(self._roll_out())
                self._saved = self._share() if self.cfg.updates_per_rollout > 1 else []
                self._uses_left = self.cfg.updates_per_rollout
            self._queue = list(self._batches)
            self._uses_left -= 1
        return self._queue.pop(0)

    # --- sampling -----------------------------------------------------------------------------------------------------

    def _problem(self, place: int, attempt: int) -> int:
        """The problem at a place of the step: of a shuffled pass over the task; further tries draw anew."""
        count = len(self.task)
        if attempt:
            return random.Random(self._draw_seed(place, attempt)).randrange(count)
        epoch, position = divmod(self._rollouts * self.cfg.examples_per_step + place, count)
        return self._order(epoch)[position]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = list(range(len(self.task)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._epoch_order = epoch, order
        return self._epoch_order[1]

    def _draw_seed(self, place: int, attempt: int) -> str:
        return f"{self.seed}/{self._rollouts}/{attempt}/{place}"

    @torch.inference_mode()
    def _roll_out(self) -> list[Rollout]:
        """This rank's answers for the next step, those without an advantage left out: perhaps none."""
        cfg, totals = self.cfg, defaultdict[str, float](float)
        places = list(range(self.compute.rank, cfg.examples_per_step, self.compute.world_size))
        useful: list[Rollout] = []
        for attempt in range(MAX_TRIES):
            seeds = [self._draw_seed(place, attempt) for place in places]
            groups = self._answer([self.task[self._problem(place, attempt)] for place in places], seeds, totals)
            flat = []
            for place, group in zip(places, groups, strict=True):
                if len({answer.reward for answer in group}) > 1:
                    useful += [answer for answer in with_advantages(group) if abs(answer.advantage) > 1e-9]
                else:
                    flat.append(place)
            places = flat
            # All ranks together, so that they decide alike, and as one rank would.
            if self._total(len(places)) <= cfg.examples_per_step * (1 - ENOUGH):
                break
            totals["redrawn"] += len(places) if attempt + 1 < MAX_TRIES else 0
        totals["useful"] += len(useful)
        self._rollouts += 1
        self.metrics = self._means(totals)
        return useful

    def _total(self, count: int) -> int:
        """The sum over all ranks."""
        if not self.compute.ddp:
            return count
        total = torch.tensor(count, device=self.compute.device)
        dist.all_reduce(total)
        return int(total)

    def _answer(self, problems: list[Conversation], seeds: list[str], totals: dict[str, float]) -> list[list[Rollout]]:
        """The answers to each problem; none to one that fills the context."""
        cfg = self.cfg
        groups = attempt_problems(self.engine, self.tokenizer, self.task, problems, cfg.num_samples, cfg, seeds)
        totals["answers"] += sum(map(len, groups))
        totals["reward"] += sum(answer.reward for group in groups for answer in group)
        totals["too_long"] += sum(not group for group in groups)
        totals["answer_tokens"] += sum(answer.length for group in groups for answer in group)
        return groups

    def _means(self, totals: dict[str, float]) -> dict[str, float]:
        values = torch.tensor([totals[name] for name in COUNTED], dtype=torch.float32, device=self.compute.device)
        if self.compute.ddp:
            dist.all_reduce(values)
        sums = dict(zip(COUNTED, values.tolist(), strict=True))
        answers = max(1.0, sums["answers"])
        return {
            "reward": sums["reward"] / answers,
            "answer_tokens": sums["answer_tokens"] / answers,
            "useful_share": sums["useful"] / answers,
            "problems_too_long": sums["too_long"],
            "problems_redrawn": sums["redrawn"],
            "answers": sums["answers"],
        }

    # --- batches ------------------------------------------------------------------------------------------------------

    def _make_batches(self, answers: list[Rollout]) -> list[tuple[Any, ...]]:
        """Exactly `micro_batches` of them, answers of similar length together; one may hold nothing to learn."""
        answers = sorted(answers, key=lambda a: len(a.ids))
        n = self.micro_batches
        borders = [round(i * len(answers) / n) for i in range(n + 1)]
        parts = [answers[a:b] for a, b in pairwise(borders)]
        empty = Rollout([0, 0], [0, 0])
        return [self._make_batch(part or [empty]) for part in parts]

    def _make_batch(self, answers: list[Rollout]) -> tuple[Any, ...]:
        x, y, advantage = to_rows(answers, self.compute.device)
        extras = {"advantage": advantage} | {name: score(x, y) for name, score in self.scorers.items()}
        return x, y, None, extras

    # --- state --------------------------------------------------------------------------------------------------------

    def _share(self) -> list[Any]:
        """Every rank's batches for a checkpoint. Collective."""
        mine = [self._to_json(batch) for batch in self._batches]
        every: list[Any] = [mine]
        if self.compute.ddp:
            every = [None] * self.compute.world_size
            dist.all_gather_object(every, mine)
        return every

    def state_dict(self) -> dict[str, Any]:
        """The number of rollouts made, and the answers that will be used again; for JSON. The same on every rank."""
        state: dict[str, Any] = {"rollouts": self._rollouts, "uses_left": self._uses_left}
        return state | ({"batches": self._saved, "metrics": self.metrics} if self._uses_left else {})

    @staticmethod
    def _to_json(batch: tuple[Any, ...]) -> dict[str, Any]:
        x, y, _, extras = batch
        return {"x": x.tolist(), "y": y.tolist(), "extras": {k: v.tolist() for k, v in extras.items()}}

    def _from_json(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        device = self.compute.device
        extras = {k: torch.tensor(v, dtype=torch.float32, device=device) for k, v in batch["extras"].items()}
        return torch.tensor(batch["x"], device=device), torch.tensor(batch["y"], device=device), None, extras
