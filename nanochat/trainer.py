"""The training loop of every stage: base, mid-training, SFT and RL differ in data, loss and schedule, not here.

One optimizer step: gather the micro-batches, count the tokens that are supervised on all ranks, add up the gradients
of the summed loss divided by that count (so that any split into micro-batches or ranks is the same mathematics), then
`Precision.step`. A skipped step doesn't count: the step number, the schedule and the token count stay until an update
is made, with the same batches if a smaller loss scale can mend it, else with the next ones. A checkpoint holds
everything the next step depends on, the position in the data included; it is written in the background, and a disk
that can't take it does not stop the training.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint_manager import restore_rng_state, rng_state, saved_steps
from nanochat.checkpoint_writer import CheckpointWriter, Keep, Snapshot, clean_leftovers, host_copy
from nanochat.common import Compute, DummyWandb, measure_matmul, print0
from nanochat.compiling import compiled, should_compile
from nanochat.gpt import GPT
from nanochat.metrics_log import MetricsLog
from nanochat.optim import MuonAdamW
from nanochat.precision import NonFiniteError, StepResult, first_nonfinite_module
from nanochat.progress import Bar, format_seconds, progress
from nanochat.recipe import Schedule
from nanochat.report import git_state
from nanochat.signals import Stopped, StopRequest
from nanochat.tracking import Tracker

METRICS_FILE = "metrics.jsonl"
RETRY_SECONDS = 30.0  # after a checkpoint that could not be written
LOSS_SMOOTHING = 0.9
WORTH_SAYING = 0.01  # share of a step spent waiting for data
MORE_STATE = "more."  # how tensors of `more_state` are called in a checkpoint


class Batch(NamedTuple):
    """What a loader hands out, each (B, T) on the device; a loader may leave out the last ones."""

    x: Tensor
    y: Tensor
    """The next tokens; −1 is not supervised."""
    segments: Tensor | None = None
    """Which conversation of its row a token belongs to; None: a row is one text."""
    extras: dict[str, Tensor] | None = None
    """What an `objective` of its own needs, by name."""


class Loader(Protocol):
    """Batches without end."""

    def __next__(self) -> tuple[Any, ...]:
        """The fields of the next `Batch`."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready position of the next batch that was not handed out."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the loop runs; nothing here changes the mathematics of a step."""

    schedule: Schedule
    grad_accum_steps: int = 1
    grad_clip: float | None = None
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None
    save_every_minutes: float = 10.0
    keep_last: int = 2
    keep_every: int | None = None
    final_retry_minutes: float = 30.0
    """How long the finished model waits for a disk that can take it."""


@dataclass
class TrainState:
    """What a step depends on besides model, optimizer, data and generators."""

    step: int = 0
    seconds: float = 0.0
    smooth_loss: float = 0.0
    tokens: int = 0
    val: float | None = None
    min_val: float | None = None
    metrics_bytes: int = 0


@dataclass(kw_only=True)
class Trainer:
    """Trains `model` on `loader` and keeps checkpoints in `folder`."""

    label: str
    model: GPT
    optimizer: MuonAdamW
    loader: Loader
    compute: Compute
    settings: TrainSettings
    folder: Path
    meta: dict[str, Any]
    evaluate: Callable[[], float | dict[str, float]] | None = None
    """The value to follow, called `val_name`; or several values by name, that one among them."""
    val_name: str = "val_bpb"
    objective: Callable[[GPT, Tensor, Batch], Tensor] | None = None
    """The loss of hidden states (B, T, C), summed over the supervised tokens; None: cross entropy."""
    more_metrics: Callable[[], dict[str, float]] | None = None
    """What to log with every step besides the loop's own."""
    weights: Callable[[], dict[str, Tensor]] | None = None
    """The weights for a checkpoint; None: the model's."""
    more_state: Callable[[], dict[str, Tensor]] | None = None
    """What an unfinished checkpoint needs besides those weights; `resume` leaves it to the caller."""
    sample: Callable[[], None] | None = None
    tracker: Tracker = field(default_factory=DummyWandb)
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self.flops_per_token = self.model.estimate_flops(self.model.config.sequence_len)
        # None: to be measured before the first step.
        self._compile: bool | None = None if self.compute.measure_compile else self.compute.compile
        self._hidden = compiled(self.model) if self._compile else self.model.hidden
        self.compute.precision.plan_steps(self.settings.schedule.num_iterations)
        keep = Keep(self.settings.keep_last, self.settings.keep_every)
        self.writer = CheckpointWriter(self.folder, keep)
        self.metrics_log = MetricsLog(self.folder / METRICS_FILE)
        self.complete = False
        self._last_save = time.monotonic()
        self.last_evaluation: dict[str, float] = {}
        self._retry_at: float | None = None
        self._owed = False  # a checkpoint was due while the one before was still being written
        self._saves = 0

    # -- one step -------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next `grad_accum_steps` batches; returns its metrics."""
        multiplier = self.settings.schedule.apply(self.optimizer.param_groups, self.state.step, self.state.seconds)
        self._data_seconds = 0.0
        batches = self._next_batches()
        if self._compile is None:
            self._decide_compile(batches[0].x)
        result, loss = self._attempt(batches)
        while result.skipped:
            self._report_skip(result, loss)
            if not result.retry:
                batches = self._next_batches()
            result, loss = self._attempt(batches)
        self.state.tokens += sum(batch.x.numel() for batch in batches) * self.compute.world_size
        metrics = {
            "loss": loss,
            "lr_multiplier": multiplier,
            "grad_norm": result.grad_norm,
            "skipped": self.compute.precision.skipped,
            "scale": self.compute.precision.scaler.scale,
        }
        return metrics if self.more_metrics is None else metrics | self.more_metrics()

    def _next_batches(self) -> list[Batch]:
        start = time.perf_counter()
        batches = [Batch(*next(self.loader)) for _ in range(self.settings.grad_accum_steps)]
        self._data_seconds += time.perf_counter() - start
        schedule = self.settings.schedule
        split = schedule.row_split(schedule.progress(self.state.step, self.state.seconds))
        return [_split_rows(batch, split) for batch in batches] if split > 1 else batches

    def _attempt(self, batches: list[Batch]) -> tuple[StepResult, float]:
        """Try an update with these micro-batches; returns what became of it and the mean loss."""
        self._batches = batches
        count = torch.stack([(batch.y >= 0).sum() for batch in batches]).sum()
        if self.compute.ddp:
            dist.all_reduce(count)
        # reduce_gradients averages over ranks, hence the factor world_size.
        weight = self.compute.world_size / count
        total = torch.zeros((), device=self.compute.device)
        for batch in batches:
            with self.compute.precision.autocast():
                loss = self.summed_loss(batch) * weight
            self.compute.precision.backward(loss)
            total += loss.detach()
        if self.compute.ddp:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= self.compute.world_size
        result = self.compute.precision.step([self.optimizer], self.settings.grad_clip, total)
        self.optimizer.zero_grad(set_to_none=True)
        return result, float(total)

    def _report_skip(self, result: StepResult, loss: float) -> None:
        precision = self.compute.precision
        reason = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        how = f"again at loss scale {precision.scaler.scale:g}" if result.retry else "on the next batch instead"
        step = self.state.step + 1
        print0(f"{self.label}: step {step} skipped ({reason}), {how}; {precision.skipped} skipped so far")

    def _decide_compile(self, idx: Tensor) -> None:
        schedule = self.settings.schedule
        steps = schedule.num_iterations
        passes = None if steps is None else (steps - self.state.step) * self.settings.grad_accum_steps
        seconds = (schedule.seconds or 0.0) - self.state.seconds
        self._compile = should_compile(self.model, self.compute, idx, passes, seconds)
        if self._compile:
            self._hidden = compiled(self.model)

    def summed_loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, summed over its supervised tokens; compute it under autocast."""
        x = self._hidden(batch.x, segments=batch.segments)
        if self.objective is not None:
            return self.objective(self.model, x, batch)
        return self.model.loss(x, batch.y, "sum")

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the schedule; the last checkpoint is marked complete.

        Raises:
            NonFiniteError: the run can't go on; names the first layer that is not finite. The last checkpoint stays.
            Stopped: a signal asked to stop; the run is saved.
        """
        if self.complete:
            print0(f"{self.label}: this run is complete already (--resume=never trains it again)")
            return self.state
        try:
            with StopRequest() as stop:
                self._train(stop)
                self._final_evaluation()
                self._save_finished()
        finally:
            self._close_writer()
        return self.state

    def _train(self, stop: StopRequest) -> None:
        schedule = self.settings.schedule
        peak = measure_matmul(self.compute.dtype, self.compute.device, n=1024)
        total = schedule.num_iterations or schedule.seconds or 1.0
        if self.compute.rank == 0:
            self.metrics_log.cut(self.state.metrics_bytes, self.state.step)
        with progress(total, self.label) as bar:
            while not schedule.finished(self.state.step, self.state.seconds):
                self._maybe_evaluate()
                start = time.perf_counter()
                tokens_before = self.state.tokens
                try:
                    metrics = self.train_step()
                except NonFiniteError as error:
                    raise self._explain(error) from error
                self.compute.synchronize()
                seconds = time.perf_counter() - start
                self._account(metrics, seconds, self.state.tokens - tokens_before, peak)
                self._report(bar, metrics)
                self._maybe_save(stop)

    def _account(self, metrics: dict[str, float], seconds: float, tokens: int, peak_tflops: float) -> None:
        state = self.state
        # The clock of the schedule is rank 0's, so that every rank stops at the same step.
        state.seconds = self.compute.broadcast(state.seconds + seconds)
        state.step += 1
        state.smooth_loss = LOSS_SMOOTHING * state.smooth_loss + (1 - LOSS_SMOOTHING) * metrics["loss"]
        metrics["smooth_loss"] = state.smooth_loss / (1 - LOSS_SMOOTHING**state.step)
        metrics["tokens_per_second"] = tokens / seconds
        metrics["data_wait_share"] = self._data_seconds / seconds
        tflops = tokens * self.flops_per_token / seconds / 1e12 / self.compute.world_size
        metrics["share_of_matmul_speed"] = tflops / peak_tflops
        metrics["peak_memory_gb"] = self.compute.peak_memory_bytes() / 1e9

    def _report(self, bar: Bar, metrics: dict[str, float]) -> None:
        state, schedule = self.state, self.settings.schedule
        done = state.step if schedule.num_iterations is not None else state.seconds
        share = done / (schedule.num_iterations or schedule.seconds or 1.0)
        left = state.seconds / max(share, 1e-9) * (1 - min(share, 1.0))
        note = (
            f"step {state.step} loss {metrics['smooth_loss']:.4f} lr ×{metrics['lr_multiplier']:.2f} "
            f"{metrics['tokens_per_second']:,.0f} tok/s ({metrics['share_of_matmul_speed']:.0%} of matmul speed) "
            f"left {format_seconds(left)}"
        )
        if metrics["data_wait_share"] > WORTH_SAYING:
            note += f" waiting for data {metrics['data_wait_share']:.0%}"
        if metrics["skipped"]:
            note += f" skipped {metrics['skipped']:.0f} scale {metrics['scale']:g}"
        bar.set(done, note)
        record = {"step": state.step, "seconds": round(state.seconds, 3), "tokens": state.tokens}
        record["progress"] = round(min(share, 1.0), 6)
        record |= {k: float(f"{v:.9g}") for k, v in metrics.items()}
        self._append_metrics(record)
        self.tracker.log(record)

    def _append_metrics(self, record: dict[str, Any]) -> None:
        if self.compute.rank == 0:
            self.metrics_log.append(record)
            self.state.metrics_bytes = self.metrics_log.position

    # -- evaluation and checkpoints -------------------------------------------------------------------------------

    def _maybe_evaluate(self) -> None:
        s, step = self.settings, self.state.step
        if step and s.eval_every and step % s.eval_every == 0:
            self.run_evaluation()
        if step and s.sample_every and step % s.sample_every == 0 and self.sample is not None:
            self.sample()

    def run_evaluation(self) -> None:
        """Evaluate, and log the values."""
        if self.evaluate is None:
            return
        self.model.eval()
        result = self.evaluate()
        self.model.train()
        values = result if isinstance(result, dict) else {self.val_name: result}
        value = values[self.val_name]
        self.last_evaluation = values
        self.state.val = value
        self.state.min_val = value if self.state.min_val is None else min(value, self.state.min_val)
        print0(f"{self.label}: step {self.state.step} " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        record = {"step": self.state.step, "seconds": round(self.state.seconds, 3), **values}
        self._append_metrics(record)
        self.tracker.log(record)

    def _final_evaluation(self) -> None:
        self.run_evaluation()
        if self.sample is not None:
            print0(f"{self.label}: samples after {self.state.step} steps")
            self.model.eval()
            self.sample()

    def _maybe_save(self, stop: StopRequest) -> None:
        """Save if it is time, stop if that was asked for, try again what has failed. All ranks do the same."""
        s, now = self.settings, time.monotonic()
        due = now - self._last_save >= 60 * s.save_every_minutes or (
            self._retry_at is not None and now >= self._retry_at
        )
        stopping, due, busy, failed = self.compute.any_rank(
            stop.requested, due and self.compute.rank == 0, self.writer.busy, self.writer.error is not None
        )
        due = due or self._owed or bool(s.save_every and self.state.step % s.save_every == 0)
        if failed:
            self._save_failed()
        if stopping:
            self._save_and_stop()
        elif due:
            self._owed = busy and not failed
            if not self._owed:
                self.save(complete=False, wait=False)

    def save(self, complete: bool, wait: bool = True) -> bool:
        """Write a checkpoint; all ranks take part. A complete one carries no optimizer state.

        Args:
            complete: the run is over.
            wait: until it is on the disk; else training goes on while it is written.

        Returns:
            Whether it is there (with `wait`; else True).
        """
        self.writer.wait()
        self.writer.error = None
        self._last_save, self._retry_at = time.monotonic(), None
        self._saves += 1
        if not complete or self.compute.rank == 0:
            self.writer.start(self._snapshot(complete))
        if not wait:
            return True
        self.writer.wait()
        (failed,) = self.compute.any_rank(self.writer.error is not None)
        if failed:
            self._save_failed()
        return not failed

    def _snapshot(self, complete: bool) -> Snapshot:
        """A copy of all that the next step depends on."""
        first = self.compute.rank == 0
        optimizer = None
        if not complete:
            optimizer = host_copy(self.optimizer.own_flat_state()) | rng_state(self.compute.device)
            if first and self.more_state is not None:
                optimizer |= host_copy({MORE_STATE + name: value for name, value in self.more_state().items()})
        meta = self.meta | {
            "complete": complete,
            "state": vars(self.state),
            "loader": self.loader.state_dict(),
            "precision": self.compute.precision.state_dict(),
            "dtype": self.compute.precision.name,
            "world_size": self.compute.world_size,
            "compile": self._compile,
            "model_config": self.model.config.to_dict(),
            "code": git_state(),
            "torch": torch.__version__,
            self.val_name: self.state.val,
        }
        return Snapshot(
            self.state.step,
            host_copy(self.weights() if self.weights is not None else self.model.state_dict()) if first else {},
            optimizer,
            copy.deepcopy(meta),
            self.compute.rank,
            self.compute.world_size,
            self._saves,
        )

    def _save_failed(self) -> None:
        """Say loudly what is wrong, and plan another try."""
        if self.writer.error is None:
            self.writer.abandon()  # another rank has failed
        error, self.writer.error = self.writer.error, None
        self._retry_at = time.monotonic() + min(RETRY_SECONDS, 60 * self.settings.save_every_minutes)
        if error is not None:
            steps = saved_steps(self.folder)
            newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
            print(
                f"\nWARNING: {self.label}: no checkpoint could be written to {self.folder} ({error}). Training goes on "
                f"and will try again; until then {newest}",
                file=sys.stderr,
                flush=True,
            )
        self.compute.any_rank(False)  # nobody writes any more
        if self.compute.rank == 0:
            clean_leftovers(self.folder)

    def _save_and_stop(self) -> None:
        saved = self.save(complete=False)
        print0(f"{self.label}: stopped at step {self.state.step}" + (", saved" if saved else ", NOT saved"))
        print0("the same command goes on from here")
        raise Stopped

    def _save_finished(self) -> None:
        """The last checkpoint: nothing is left to do but to wait for a disk that can take it."""
        give_up = time.monotonic() + 60 * self.settings.final_retry_minutes
        while not self.save(complete=True):
            (over,) = self.compute.any_rank(time.monotonic() > give_up)
            if over:
                raise RuntimeError(
                    f"the finished model could not be written to {self.folder}: make room there and start the same "
                    "command again, it goes on from the newest checkpoint"
                )
            time.sleep(min(RETRY_SECONDS, 6 * self.settings.final_retry_minutes))
        self.complete = True

    def _close_writer(self) -> None:
        """Let what is being written come to its end, unless it waits for a rank that is gone."""
        self.writer.wait(5.0 if self.compute.ddp else None)

    def resume(self, checkpoint_meta: dict[str, Any], optimizer: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's meta and optimizer tensors (the model and loader are built from it already).

        Raises:
            RuntimeError: the ranks have found different checkpoints.
        """
        self.state = TrainState(**checkpoint_meta["state"])
        if self.compute.broadcast(self.state.step) != self.state.step:
            raise RuntimeError(
                f"rank 0 and rank {self.compute.rank} found different checkpoints in {self.folder}: can all of them "
                "read it?"
            )
        self.complete = bool(checkpoint_meta["complete"])
        if self.complete:
            return
        self.optimizer.load_flat_state({k: v for k, v in optimizer.items() if not k.startswith(("rng.", MORE_STATE))})
        self.compute.precision.load_state_dict(checkpoint_meta["precision"])
        if self._compile is None:
            self._compile = checkpoint_meta.get("compile")
            self._hidden = compiled(self.model) if self._compile else self.model.hidden
        restore_rng_state(optimizer, self.compute.device)
        print0(f"{self.label}: goes on at step {self.state.step}")

    def _explain(self, error: NonFiniteError) -> NonFiniteError:
        def forward() -> None:
            with self.compute.precision.autocast():
                for batch in self._batches:
                    x = self.model.hidden(batch.x, segments=batch.segments)
                    self.model.logits_at(x[:, -1])

        found = [first_nonfinite_module(self.model, forward)]
        if self.compute.ddp:  # all ranks stopped at this step, but only one may have met the batch
            found = [None] * self.compute.world_size
            dist.all_gather_object(found, first_nonfinite_module(self.model, forward))
        where = next((name for name in found if name), None)
        layer = f"the first layer with non-finite activations is {where}" if where else "all activations are finite"
        doubt = " or --dtype=float32" if self.compute.precision.scaler.enabled else ""
        return NonFiniteError(
            f"training stopped at step {self.state.step}: {error}; {layer}. Lower the learning rates "
            f"(--matrix_lr, --embedding_lr), set --grad_clip=1.0{doubt}; the last checkpoint stays"
        )


def _split_rows(batch: Batch, split: int) -> Batch:
    """The same tokens in `split` times as many rows: (B, T) -> (split·B, T / split)."""
    rows = split * len(batch.x)
    segments = None if batch.segments is None else batch.segments.reshape(rows, -1)
    return batch._replace(x=batch.x.reshape(rows, -1), y=batch.y.reshape(rows, -1), segments=segments)
