"""The training loop of every stage: base, mid-training, SFT and RL differ in data, loss and schedule, not here.

One optimizer step (`Trainer.train_step`): gather the micro-batches, count the tokens that are supervised on all ranks,
add up the gradients of the summed loss divided by that count, then `Precision.step`. A skipped step doesn't count: the
step number, the schedule and the token count stay until an update is made. A checkpoint holds everything the next step
depends on, the position in the data included; nanochat/checkpoint/saver.py says when it is written, nanochat/train/
clock.py when the run ends, nanochat/train/tracking.py where its numbers go.

Letters for shapes: B sequences in a micro-batch, T tokens in a sequence, C channels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint.format import saved_steps
from nanochat.checkpoint.keep import Goal
from nanochat.checkpoint.saver import Saver, SaveSettings
from nanochat.checkpoint.writer import Snapshot, host_copy
from nanochat.checkpoint_manager import restore_rng_state, rng_state
from nanochat.common import Compute, DummyWandb
from nanochat.data.loader import Batch
from nanochat.env import git_state, print0
from nanochat.gpt import GPT
from nanochat.hardware import is_out_of_memory
from nanochat.ops.cpu import keep_freed_memory
from nanochat.ops.fp16_gemm import choose_half_gemm, layer_shapes
from nanochat.ops.linear import use_half_gemm
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import MicroBatch
from nanochat.precision import NonFiniteError, StepResult
from nanochat.progress import progress
from nanochat.recipe import Schedule
from nanochat.report.metrics_log import last_value
from nanochat.signals import StopRequest
from nanochat.train.best_weights import BEST, MEAN, BestWeights
from nanochat.train.clock import Clock
from nanochat.train.compiling import compiled, should_compile
from nanochat.train.micro_batch import smaller_micro_batch
from nanochat.train.nonfinite import explained
from nanochat.train.resume import launch_id
from nanochat.train.tracking import RunLog, Tracker, TrainState

EXTRA_STATE = "more."  # prefix of the tensors of `extra_state` in a checkpoint


class Loader(Protocol):
    """Batches without end."""

    def __next__(self) -> tuple[Any, ...]:
        """The fields of the next `Batch`."""

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready position of the next batch that was not handed out."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(SaveSettings):
    """Settings of the loop."""

    schedule: Schedule
    grad_accum_steps: int = 1
    grad_clip: float | None = None
    eval_every: int | None = None
    sample_every: int | None = None


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
    """Where the checkpoints are; `pending_folder(replaces)` until the first one of a run that replaces an older."""
    meta: dict[str, Any]
    evaluate: Callable[[], float | dict[str, float]] | None = None
    """The value to follow, called `val_name`; or several values by name, that one among them."""
    val_name: str = "val_bpb"
    val_goal: Goal = "lowest"
    """Which values of it are the better ones: checkpoints are kept by it."""
    no_signal_advice: str = "the batches have no target in them: check the data"
    """What to do when most steps have nothing to learn from."""
    objective: Callable[[GPT, Tensor, Batch], Tensor] | None = None
    """The loss of hidden states (B, T, C), summed over the supervised tokens; None: cross entropy."""
    extra_metrics: Callable[[], dict[str, float]] | None = None
    """Metrics to log with every step besides the loop's own."""
    weights: Callable[[], dict[str, Tensor]] | None = None
    """The weights for a checkpoint; None: the model's."""
    extra_state: Callable[[], dict[str, Tensor]] | None = None
    """Tensors that an unfinished checkpoint needs besides those weights; `resume` leaves them to the caller."""
    sample: Callable[[], None] | None = None
    finish: Callable[[], dict[str, Any]] | None = None
    """Asked once, when training has ended: what the finished checkpoint's meta has besides."""
    tracker: Tracker = field(default_factory=DummyWandb)
    state: TrainState = field(default_factory=TrainState)
    clock: Clock = field(default_factory=Clock)
    best: BestWeights | None = None
    """Give the finished model the weights of the best evaluation; None: those of the last step."""
    replaces: Path | None = None
    """The folder of an older run of this tag, see `Saver`."""
    micro: MicroBatch | None = None
    """The pieces that batches are cut into; None: they go through the model whole, until memory runs out."""

    def __post_init__(self) -> None:
        compute, schedule = self.compute, self.settings.schedule
        # Training may round the factors of its products (see `Precision.product_dtype`). It tells model and optimizer,
        # instead of turning a switch of the whole process: evaluation and chat stay exact.
        self.model.set_product_dtype(compute.precision.product_dtype)
        self.optimizer.set_product_dtype(compute.precision.muon_dtype)
        self._use_compiled(None if compute.measure_compile else compute.compile)
        compute.precision.plan_steps(schedule.num_iterations)
        self.clock.seconds, self.clock.agree = schedule.seconds, compute.broadcast
        saved = self.settings, self._snapshot, schedule.seconds, self._moved, self.replaces
        self.saver = Saver(self.label, self.folder, compute, *saved)
        flops = self.model.estimate_flops(self.model.config.sequence_len)
        self.log = RunLog(self.label, self.folder, compute, self.tracker, flops, self.no_signal_advice)
        # The loop's own, not in a checkpoint.
        self.complete = False
        self.last_evaluation: dict[str, float] = {}
        self._row_split = 1
        self._data_seconds = 0.0
        if compute.device.type == "cpu":
            keep_freed_memory()  # every step allocates the same tensors: without page faults a step is faster
        shapes = layer_shapes(self.model.config.n_embd, 4096)
        gemm, why = choose_half_gemm(compute.fp16_gemm, compute.device, compute.dtype, shapes)
        use_half_gemm(gemm)
        if why:
            print0(f"{self.label}: {why}")

    def _use_compiled(self, on: bool | None) -> None:
        """Run the layers compiled or eager; None: eager, until it can be measured which is faster."""
        self._compile = on
        self._hidden = compiled(self.model) if on else self.model.hidden

    # --- one step -----------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next `grad_accum_steps` batches; returns its metrics."""
        precision, schedule = self.compute.precision, self.settings.schedule
        # Rates, momentum and decay first: they belong to this step, and a skipped attempt does not move them on.
        multiplier = schedule.apply(self.optimizer.param_groups, self.state.step, self.clock.schedule_seconds())
        self._data_seconds = 0.0
        batches = self._next_batches()
        with precision.training():
            result, loss = self._attempt(batches)
            while result.skipped:
                # float16 gradients that overflowed can succeed at the halved scale: the same text again, none is lost.
                # A loss that is not finite comes back whatever the scale: only other text can help.
                self.log.write_skip(self.state.step + 1, result, loss)
                if not result.retry:
                    batches = self._next_batches()
                result, loss = self._attempt(batches)
        if self._compile is None:  # only now is it known how many rows fit, and so which shape is compiled
            self._measure_compile(next(self._pieces(batches[0])).x)
        self.state.tokens += sum(batch.x.numel() for batch in batches) * self.compute.world_size
        self.state.without_signal += result.without_signal
        metrics = {
            "loss": loss,
            "lr_multiplier": multiplier,
            "grad_norm": result.grad_norm,
            "skipped": precision.skipped,
            "scale": precision.scaler.get_scale(),
        }
        if self.state.without_signal:
            metrics["share_without_signal"] = self.state.without_signal / (self.state.step + 1)
        return metrics if self.extra_metrics is None else metrics | self.extra_metrics()

    def _next_batches(self) -> list[Batch]:
        """The micro-batches of a step, each (B, T); early in the run they may be cut into shorter sequences."""
        # The loader works ahead in the background: what is measured here is only the time it was too slow.
        start = time.perf_counter()
        batches = [Batch(*next(self.loader)) for _ in range(self.settings.grad_accum_steps)]
        self._data_seconds += time.perf_counter() - start
        schedule = self.settings.schedule
        self._row_split = schedule.row_split(schedule.progress(self.state.step, self.clock.schedule_seconds()))
        return [b.shorter_rows(self._row_split) for b in batches] if self._row_split > 1 else batches

    def _attempt(self, batches: list[Batch]) -> tuple[StepResult, float]:
        """Try an update with these micro-batches; returns what became of it and the mean loss."""
        self._batches = batches  # should the run end here, `explained` passes them through the model again
        # The loss is a sum over tokens, divided by the supervised tokens of all micro-batches and ranks. A mean per
        # micro-batch would weigh a token more where fewer are supervised, and the result would depend on the split.
        count = torch.stack([(batch.y >= 0).sum() for batch in batches]).sum()
        if self.compute.ddp:
            dist.all_reduce(count)
        # reduce_gradients averages over ranks, hence the factor world_size. Without a target anywhere all gradients are
        # 0, and `Precision.step` makes no update.
        weight = self.compute.world_size / count.clamp(min=1)
        while (total := self._backward(batches, weight)) is None:
            rows = max(len(batch.x) // self._row_split for batch in batches)
            self.micro = smaller_micro_batch(self.model, self.optimizer, self.compute, self.micro, rows)
        if self.compute.ddp:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= self.compute.world_size
        # On one card nothing has waited for the device until here. Precision.step reads norm and loss in one go: the
        # only host sync of a step.
        result = self.compute.precision.step([self.optimizer], self.settings.grad_clip, total)
        self.optimizer.zero_grad(set_to_none=True)
        return result, float(total)

    def _backward(self, batches: list[Batch], weight: Tensor) -> Tensor | None:
        """Add up the gradients of all pieces; returns this rank's loss, or None if memory ran out on some rank."""
        # `any_rank` below is the only message between ranks: gradients are reduced once a step, not once a micro-batch.
        total, fits = torch.zeros((), device=self.compute.device), True
        try:
            # Each backward pass frees its activations and adds to p.grad: the memory is that of one piece, the result
            # that of all of them at once.
            for batch in batches:
                for piece in self._pieces(batch):
                    with self.compute.precision.autocast():
                        loss = self.summed_loss(piece) * weight
                    self.compute.precision.backward(loss)
                    total += loss.detach()  # a number would wait for the device, once per piece
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        # A rank that ran out must not leave the others alone in the next collective: all of them try again, or none.
        (failed,) = self.compute.any_rank(not fits)
        return None if failed else total

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        """The parts of a micro-batch that fit into memory at a time."""
        # Sequences that were cut into quarters are four times as many, and as large together.
        return batch.pieces(len(batch.x) if self.micro is None else self.micro.rows * self._row_split)

    def summed_loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, summed over its supervised tokens; compute it under autocast."""
        # Layers and loss apart: the layers can be compiled, the loss never makes all logits (B, T, V) at once.
        x = self._hidden(batch.x, segments=batch.segments, found=batch.found)  # (B, T, C)
        if self.objective is not None:
            return self.objective(self.model, x, batch)
        return self.model.loss(x, batch.y, "sum")

    def _measure_compile(self, idx: Tensor) -> None:
        steps, seconds = self.settings.schedule.num_iterations, self.clock.seconds
        passes = None if steps is None else (steps - self.state.step) * self.settings.grad_accum_steps
        seconds = None if seconds is None else seconds - self.clock.ticked
        self._use_compiled(should_compile(self.model, self.compute, idx, passes, seconds))

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the schedule; the last checkpoint is marked complete.

        Raises:
            NonFiniteError: the run can't continue; names the first layer that is not finite.
            Stopped: a signal asked to stop; the run is saved.
        """
        if self.complete:
            print0(f"{self.label}: this run is complete already (--resume=never trains it again)")
            return self.state
        try:
            with StopRequest() as stop:
                self._train(stop)
                self.saver.before_the_end()  # a last evaluation that fails must not take the training along
                self.run_evaluation()
                if self.best is not None:
                    self.best.finish(self.state, self.label, self.val_name)
                if self.sample is not None:
                    print0(f"{self.label}: samples after {self.state.step} steps")
                    self.run_sample()
                if self.finish is not None:
                    self.meta = self.meta | self.finish()
                self.saver.save_finished()
                self.complete = True
                used, seconds = self.clock.tick(), self.clock.seconds
                if seconds is not None:
                    print0(f"{self.label}: used {used:.1f} s of {seconds:.1f} s ({used / seconds - 1:+.1%})")
        finally:
            self.saver.close()
        return self.state

    def _train(self, stop: StopRequest) -> None:
        state, schedule, clock = self.state, self.settings.schedule, self.clock
        self.log.begin()
        if self.micro is not None:
            self.micro.apply(self.model)
        clock.tick()
        over = schedule.finished(state.step, 0.0)
        with progress(1.0, self.label) as bar:
            while not over:
                self._evaluate_on_the_way()
                self._sample_on_the_way()
                last = clock.is_last()  # decided before the step, which then ends the schedule
                start, tokens = clock.now(), state.tokens
                try:
                    metrics = self.train_step()
                except NonFiniteError as error:
                    raise explained(
                        error, self.model, self.compute, self._batches, state.step, saved_steps(self.folder)
                    ) from error
                self.compute.synchronize()  # the update is still running on the device: without it steps look faster
                seconds = clock.count_step(clock.now() - start, state.tokens - tokens)
                state.count_step(seconds, metrics["loss"], self._data_seconds)
                if self.best is not None:
                    self.best.count_step(state.step)
                metrics |= self.log.speed(state.tokens - tokens, seconds, self._data_seconds)
                self.log.write_step(bar, state, clock, schedule, metrics)
                # Before the save, so that a checkpoint is kept or dropped by its own value. Who wants the run to stop
                # does not wait for it: it is made up for when the run resumes.
                over = last or schedule.finished(state.step, 0.0)
                if not (over or stop.requested):
                    self._evaluate_on_the_way()
                self.saver.after_step(state.step, stop.requested)  # may stop here: after a whole step, never within one
                if clock.wants_rehearsal() and not over:
                    self._rehearse()

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate_on_the_way(self) -> None:
        s, step = self.settings, self.state.step
        due = step and s.eval_every and step % s.eval_every == 0 and self.state.val_step != step
        if due and self.clock.has_time_for("evaluation"):
            self.run_evaluation()

    def _sample_on_the_way(self) -> None:
        s, step = self.settings, self.state.step
        if step and s.sample_every and step % s.sample_every == 0 and self.clock.has_time_for("samples"):
            self.run_sample()

    def _rehearse(self) -> None:
        """Do once, early in a run of a given time, what its end will do: then that time is measured."""
        if "evaluation" not in self.clock.costs:
            self.run_evaluation()
        if "samples" not in self.clock.costs:
            self.run_sample()
        with self.clock.timed("checkpoint"):
            self.saver.save(complete=False)
        for line in self.clock.forecast():
            print0(f"{self.label}: {line}")

    def run_sample(self) -> None:
        """Print samples."""
        if self.sample is not None:
            self.model.eval()
            with self.clock.timed("samples"):
                self.sample()
            self.model.train()

    def run_evaluation(self) -> None:
        """Evaluate, and log the values."""
        if self.evaluate is None:
            return
        self.model.eval()
        with self.clock.timed("evaluation"):
            result = self.evaluate() if self.best is None else self.best.evaluate(self.evaluate, self.val_name)
        self.model.train()
        state = self.state
        self.last_evaluation = result if isinstance(result, dict) else {self.val_name: result}
        if state.count_evaluation(self.last_evaluation[self.val_name], self.val_goal) and self.best is not None:
            self.best.take()
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.last_evaluation.items())
        print0(f"{self.label}: step {state.step} {shown}")
        self.log.write({"step": state.step, "seconds": round(state.seconds, 3), **self.last_evaluation})

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _moved(self, folder: Path) -> None:
        """The run's files have moved to this folder."""
        self.folder = folder
        self.log.metrics.path = folder / self.log.metrics.path.name

    def _snapshot(self, complete: bool, attempt: int) -> Snapshot:
        """A copy of all that the next step depends on; training continues while it is written."""
        # Weights are the same on all ranks, bit for bit: rank 0 writes them. A finished model needs no optimizer.
        first = self.compute.rank == 0
        optimizer = None
        if not complete:
            # Every rank saves its own share of the moments; the generators too, dropout or not: RL samples from them.
            optimizer = host_copy(self.optimizer.own_flat_state()) | rng_state(self.compute.device)
            if first and self.best is not None:
                optimizer |= self.best.state()
            if first and self.extra_state is not None:
                optimizer |= host_copy({EXTRA_STATE + name: value for name, value in self.extra_state().items()})
        counted = {"clock": self.clock.ticked, **self.log.metrics.state()}
        meta = self.meta | {
            "complete": complete,
            "state": vars(self.state) | counted,
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
            "val_goal": self.val_goal,
            "launch": launch_id(),
        }
        return Snapshot(
            self.state.step,
            host_copy(self.weights() if self.weights is not None else self.model.state_dict()) if first else {},
            optimizer,
            copy.deepcopy(meta),  # the next step changes counters while this is written
            self.compute.rank,
            self.compute.world_size,
            attempt,
        )

    def resume(self, checkpoint_meta: dict[str, Any], optimizer: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's meta and optimizer tensors (the model and loader are built from it already).

        Raises:
            RuntimeError: the ranks have found different checkpoints.
        """
        saved = checkpoint_meta["state"]
        self.state, clock = TrainState.restored(saved, self.val_goal), saved.get("clock", 0)
        self.log.resume(saved.get("metrics_bytes", 0), self.state.step)
        if self.compute.broadcast(self.state.step) != self.state.step:
            raise RuntimeError(
                f"rank 0 and rank {self.compute.rank} found different checkpoints in {self.folder}: can all of them "
                "read it?"
            )
        self.complete = bool(checkpoint_meta["complete"])
        if self.complete:
            return
        # The steps after the checkpoint are lost, but their time is used: the last one that was logged tells how much.
        clock = max(clock, self.state.seconds, last_value(self.log.metrics.path, "clock"))
        self.clock.used = self.clock.ticked = self.compute.broadcast(clock)
        self.clock.costs |= checkpoint_meta.get("costs", {})
        if checkpoint_meta.get("micro_batch") is not None and self.micro is None:
            self.micro = MicroBatch(**checkpoint_meta["micro_batch"])
        # By parameters' names and whole, whatever number of ranks has saved it.
        beside = ("rng.", EXTRA_STATE, BEST, MEAN)
        self.optimizer.load_flat_state({k: v for k, v in optimizer.items() if not k.startswith(beside)})
        if self.best is not None:
            self.best.resume(optimizer, self.state)
        self.compute.precision.load_state_dict(checkpoint_meta["precision"])
        if self._compile is None:  # the measurement of the start, so that a resumed run computes the same bits
            self._use_compiled(checkpoint_meta.get("compile"))
        restore_rng_state(optimizer, self.compute.device)  # last: what was built above has drawn from the generators
        print0(f"{self.label}: resumes at step {self.state.step}")
