"""The training loop of every stage: base, mid-training, SFT and RL differ in data, loss and schedule, not here.

One optimizer step: gather the micro-batches, count the tokens that are supervised on all ranks, add up the gradients of
the summed loss divided by that count (so that any split into micro-batches or ranks is the same mathematics), then
`Precision.step`. A skipped step doesn't count: the step number, the schedule and the token count stay until an update
is made, with the same batches if a smaller loss scale can mend it, else with the next ones. A checkpoint holds
everything the next step depends on, the position in the data included; nanochat/checkpoint/saver.py says when it is
written.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint.saver import Saver, SaveSettings
from nanochat.checkpoint.writer import Snapshot, host_copy
from nanochat.checkpoint_manager import restore_rng_state, rng_state
from nanochat.common import Compute, DummyWandb
from nanochat.data.loader import Batch
from nanochat.env import git_state, print0
from nanochat.gpt import GPT
from nanochat.hardware import ThrottleWatcher, free_memory, is_out_of_memory, release_memory
from nanochat.ops.cpu import keep_freed_memory
from nanochat.ops.fp16_gemm import choose_half_gemm, layer_shapes
from nanochat.ops.linear import use_half_gemm
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import MicroBatch
from nanochat.precision import NonFiniteError, StepResult, first_nonfinite_module
from nanochat.progress import Bar, format_seconds, progress
from nanochat.recipe import Schedule
from nanochat.report.metrics_log import MetricsLog, last_value
from nanochat.signals import StopRequest
from nanochat.train.clock import COARSE, REHEARSE_AFTER, Clock
from nanochat.train.compiling import compiled, should_compile
from nanochat.train.micro_batch import too_large, use_micro_batch
from nanochat.train.tracking import Tracker

METRICS_FILE = "metrics.jsonl"
LOSS_SMOOTHING = 0.9
WORTH_SAYING = 0.01  # share of a step spent waiting for data
EXTRA_STATE = "more."  # how tensors of `extra_state` are called in a checkpoint


class Loader(Protocol):
    """Batches without end."""

    def __next__(self) -> tuple[Any, ...]:
        """The fields of the next `Batch`."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready position of the next batch that was not handed out."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(SaveSettings):
    """How the loop runs; nothing here changes the mathematics of a step."""

    schedule: Schedule
    grad_accum_steps: int = 1
    grad_clip: float | None = None
    eval_every: int | None = None
    sample_every: int | None = None


@dataclass
class TrainState:
    """What a step depends on besides model, optimizer, data and generators."""

    step: int = 0
    seconds: float = 0.0
    """Spent in steps."""
    clock: float = 0.0
    """Spent in all, see nanochat/train/clock.py."""
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
    extra_metrics: Callable[[], dict[str, float]] | None = None
    """What to log with every step besides the loop's own."""
    weights: Callable[[], dict[str, Tensor]] | None = None
    """The weights for a checkpoint; None: the model's."""
    extra_state: Callable[[], dict[str, Tensor]] | None = None
    """What an unfinished checkpoint needs besides those weights; `resume` leaves it to the caller."""
    sample: Callable[[], None] | None = None
    tracker: Tracker = field(default_factory=DummyWandb)
    state: TrainState = field(default_factory=TrainState)
    clock: Clock = field(default_factory=Clock)
    micro: MicroBatch | None = None
    """Into which pieces batches are cut; None: they go through the model whole, until memory runs out."""

    def __post_init__(self) -> None:
        self.flops_per_token = self.model.estimate_flops(self.model.config.sequence_len)
        self.model.set_product_dtype(self.compute.precision.product_dtype)
        self.optimizer.set_product_dtype(self.compute.precision.muon_dtype)
        # None: to be measured before the first step.
        self._compile: bool | None = None if self.compute.measure_compile else self.compute.compile
        self._hidden = compiled(self.model) if self._compile else self.model.hidden
        self.compute.precision.plan_steps(self.settings.schedule.num_iterations)
        seconds = self.settings.schedule.seconds
        self.saver = Saver(self.label, self.folder, self.compute, self.settings, self._snapshot, seconds)
        self.metrics_log = MetricsLog(self.folder / METRICS_FILE)
        self.complete = False
        self.last_evaluation: dict[str, float] = {}
        self._last_step_done = False
        self._row_split = 1
        self._throttling = ThrottleWatcher(self.compute.device)
        if self.compute.device.type == "cpu":
            keep_freed_memory()
        compute, channels = self.compute, self.model.config.n_embd
        gemm, why = choose_half_gemm(compute.fp16_gemm, compute.device, compute.dtype, layer_shapes(channels, 4096))
        use_half_gemm(gemm)
        if why:
            print0(f"{self.label}: {why}")

    # -- one step -------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next `grad_accum_steps` batches; returns its metrics."""
        multiplier = self.settings.schedule.apply(self.optimizer.param_groups, self.state.step, self._place())
        self._data_seconds = 0.0
        batches = self._next_batches()
        with self.compute.precision.training():
            result, loss = self._attempt(batches)
            while result.skipped:
                self._report_skip(result, loss)
                if not result.retry:
                    batches = self._next_batches()
                result, loss = self._attempt(batches)
        if self._compile is None:  # now that it is known how many rows fit
            self._decide_compile(next(self._pieces(batches[0])).x)
        self.state.tokens += sum(batch.x.numel() for batch in batches) * self.compute.world_size
        metrics = {
            "loss": loss,
            "lr_multiplier": multiplier,
            "grad_norm": result.grad_norm,
            "skipped": self.compute.precision.skipped,
            "scale": self.compute.precision.scaler.scale,
        }
        return metrics if self.extra_metrics is None else metrics | self.extra_metrics()

    def _next_batches(self) -> list[Batch]:
        start = time.perf_counter()
        batches = [Batch(*next(self.loader)) for _ in range(self.settings.grad_accum_steps)]
        self._data_seconds += time.perf_counter() - start
        schedule = self.settings.schedule
        self._row_split = schedule.row_split(schedule.progress(self.state.step, self._place()))
        return [b.shorter_rows(self._row_split) for b in batches] if self._row_split > 1 else batches

    def _place(self) -> float:
        """Where the schedule is, in its seconds; meaningless where steps are counted."""
        seconds = self.settings.schedule.seconds
        return 0.0 if seconds is None else seconds * self.clock.progress(seconds, self.state.clock)

    def _attempt(self, batches: list[Batch]) -> tuple[StepResult, float]:
        """Try an update with these micro-batches; returns what became of it and the mean loss."""
        self._batches = batches
        count = torch.stack([(batch.y >= 0).sum() for batch in batches]).sum()
        if self.compute.ddp:
            dist.all_reduce(count)
        # reduce_gradients averages over ranks, hence the factor world_size.
        weight = self.compute.world_size / count
        while (total := self._backward(batches, weight)) is None:
            self._take_smaller_pieces(batches)
        if self.compute.ddp:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= self.compute.world_size
        result = self.compute.precision.step([self.optimizer], self.settings.grad_clip, total)
        self.optimizer.zero_grad(set_to_none=True)
        return result, float(total)

    def _backward(self, batches: list[Batch], weight: Tensor) -> Tensor | None:
        """Add up the gradients of all pieces; returns this rank's loss, or None if memory ran out on some rank."""
        total, fits = torch.zeros((), device=self.compute.device), True
        try:
            for batch in batches:
                for piece in self._pieces(batch):
                    with self.compute.precision.autocast():
                        loss = self.summed_loss(piece) * weight
                    self.compute.precision.backward(loss)
                    total += loss.detach()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        (failed,) = self.compute.any_rank(not fits)
        return None if failed else total

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        """The parts of a micro-batch that fit into memory at a time."""
        return batch.pieces(len(batch.x) if self.micro is None else self.micro.rows * self._row_split)

    def _take_smaller_pieces(self, batches: list[Batch]) -> None:
        """Forget the gradients of a step that ran out of memory and take the next measure, on all ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        release_memory()
        rows = max(len(batch.x) // self._row_split for batch in batches)
        rows = int(self.compute.broadcast(rows))  # the answers of RL may not be as many on every rank
        before = self.micro or MicroBatch(rows, None, self.model.activation_checkpointing)
        self.micro = before.smaller()
        if self.micro is None:
            own = [*self.model.parameters(), *self.optimizer.own_flat_state().values()]  # another size has it too
            budget = free_memory(self.compute.device) + sum(x.numel() * x.element_size() for x in own)
            raise too_large(self.model.config, self.compute, budget)
        use_micro_batch(self.model, self.micro)
        print0(f"{self.label}: out of memory with {before}; the step is made again with {self.micro}, nothing is lost")

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
        seconds = (schedule.seconds or 0.0) - self.state.clock
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
                self.saver.before_the_end()
                self._final_evaluation()
                self.saver.save_finished()
                self.complete = True
                self._report_time()
        finally:
            self.saver.close()
        return self.state

    def _train(self, stop: StopRequest) -> None:
        schedule = self.settings.schedule
        peak = self.compute.matmul_tflops()
        total = schedule.num_iterations or schedule.seconds or 1.0
        if self.compute.rank == 0:
            self.metrics_log.cut(self.state.metrics_bytes, self.state.step)
        if self.micro is not None:
            use_micro_batch(self.model, self.micro)
        self._tick()
        with progress(total, self.label) as bar:
            while not self._finished():
                self._maybe_evaluate()
                self._last_step_done = self._is_last_step()
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
                self.saver.after_step(self.state.step, stop.requested)
                self._maybe_rehearse()

    def _finished(self) -> bool:
        schedule = self.settings.schedule
        return self._last_step_done if schedule.seconds else schedule.finished(self.state.step, 0.0)

    def _is_last_step(self) -> bool:
        seconds = self.settings.schedule.seconds
        return seconds is not None and self.clock.is_last(seconds, self.state.clock)

    def _tick(self) -> float:
        """Read the clock: rank 0's, so that every rank decides the same."""
        self.state.clock = self.compute.broadcast(self.clock.elapsed())
        return self.state.clock

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Remember how long this takes: the end of a run is made of such things."""
        start = self._tick()
        yield
        self.clock.costs[what] = self._tick() - start

    def _maybe_rehearse(self) -> None:
        """Once, early in a run of a given time, do what its end will do, to measure it."""
        seconds = self.settings.schedule.seconds
        if seconds is None or len(self.clock.steps) != REHEARSE_AFTER or "checkpoint" in self.clock.costs:
            return
        if self.evaluate is not None and "evaluation" not in self.clock.costs:
            self.run_evaluation()
        if self.sample is not None and "samples" not in self.clock.costs:
            self.run_sample()
        with self._timed("checkpoint"):
            self.saver.save(complete=False)
        step, left = self.clock.step_seconds or 0.0, self.clock.steps_left(seconds, self.state.clock)
        print0(
            f"{self.label}: {step:.2f} s per step: about {max(0.0, left):,.0f} more in {format_seconds(seconds)}, with "
            f"{format_seconds(self.clock.ending)} for the last evaluation, samples and checkpoint"
        )
        if step > COARSE * seconds or self.clock.ending > 0.5 * seconds:
            print0(f"warning: {self.label}: the time is short for such steps or evaluations, the end may miss it")

    def _account(self, metrics: dict[str, float], seconds: float, tokens: int, peak_tflops: float) -> None:
        state = self.state
        seconds = self.compute.broadcast(seconds)
        state.seconds += seconds
        self.clock.steps.append(seconds)
        self._tick()
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
        done: float = state.step if schedule.num_iterations is not None else state.clock
        if schedule.seconds is not None:
            left = schedule.seconds - state.clock
        else:
            left = state.clock / state.step * ((schedule.num_iterations or 0) - state.step) + self.clock.ending
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
        if (slower := self._throttling.poll()) is not None:
            print0(f"{self.label}: {slower}")
        record = {"step": state.step, "seconds": round(state.seconds, 3), "tokens": state.tokens}
        record["progress"] = round(min(done / (schedule.num_iterations or schedule.seconds or 1.0), 1.0), 6)
        record["clock"] = round(state.clock, 3)
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
        if step and s.eval_every and step % s.eval_every == 0 and self._time_for("evaluation"):
            self.run_evaluation()
        if step and s.sample_every and step % s.sample_every == 0 and self._time_for("samples"):
            self.run_sample()

    def _time_for(self, what: str) -> bool:
        seconds = self.settings.schedule.seconds
        return seconds is None or self.clock.has_time_for(what, seconds, self.state.clock)

    def run_sample(self) -> None:
        """Print samples."""
        if self.sample is not None:
            self.model.eval()
            with self._timed("samples"):
                self.sample()
            self.model.train()

    def run_evaluation(self) -> None:
        """Evaluate, and log the values."""
        if self.evaluate is None:
            return
        self.model.eval()
        with self._timed("evaluation"):
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
            self.run_sample()

    def _snapshot(self, complete: bool, attempt: int) -> Snapshot:
        """A copy of all that the next step depends on."""
        first = self.compute.rank == 0
        optimizer = None
        if not complete:
            optimizer = host_copy(self.optimizer.own_flat_state()) | rng_state(self.compute.device)
            if first and self.extra_state is not None:
                optimizer |= host_copy({EXTRA_STATE + name: value for name, value in self.extra_state().items()})
        meta = self.meta | {
            "complete": complete,
            "state": vars(self.state),
            "loader": self.loader.state_dict(),
            "precision": self.compute.precision.state_dict(),
            "dtype": self.compute.precision.name,
            "world_size": self.compute.world_size,
            "compile": self._compile,
            "costs": self.clock.costs,
            "micro_batch": None if self.micro is None else asdict(self.micro),
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
            attempt,
        )

    def _report_time(self) -> None:
        used, seconds = self._tick(), self.settings.schedule.seconds
        if seconds is not None:
            print0(f"{self.label}: used {used:.1f} s of {seconds:.1f} s ({used / seconds - 1:+.1%})")

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
        # What was done after the checkpoint is lost, but its time is used.
        clock = max(self.state.clock, self.state.seconds, last_value(self.metrics_log.path, "clock"))
        self.clock.used = self.state.clock = self.compute.broadcast(clock)
        self.clock.costs |= checkpoint_meta.get("costs", {})
        if checkpoint_meta.get("micro_batch") is not None and self.micro is None:
            self.micro = MicroBatch(**checkpoint_meta["micro_batch"])
        self.optimizer.load_flat_state({k: v for k, v in optimizer.items() if not k.startswith(("rng.", EXTRA_STATE))})
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
