"""A run's numbers on their way out: metrics.jsonl always, a progress bar for people, a tracker (wandb, TensorBoard or
trackio) where one is asked for.

All of them take the same record: numbers by name, "step" among them.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

from nanochat.checkpoint.keep import Goal
from nanochat.common import Compute, DummyWandb
from nanochat.env import error_text, get_base_dir, get_dist_info, print0, require_wandb_login
from nanochat.files import naming
from nanochat.hardware import ThrottleWatcher
from nanochat.precision import StepResult
from nanochat.progress import Bar, format_seconds
from nanochat.recipe import Schedule
from nanochat.report.metrics_log import MetricsLog
from nanochat.train.clock import Clock

TrackerName = Literal["wandb", "tensorboard", "trackio"]
NO_RUN = "dummy"
LOSS_SMOOTHING = 0.9
METRICS_FILE = "metrics.jsonl"
WORTH_SAYING = 0.01  # share of a step spent waiting for data
FEW_STEPS = 10  # too few to say that a run has nothing to learn from


class Tracker(Protocol):
    """A service that takes metrics."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record of metrics."""

    def finish(self) -> None:
        """Write what is left and close."""


class TensorBoard:
    """Event files under the base dir: `tensorboard --logdir <base dir>/tensorboard`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # lazy: an optional package

        self._folder, self._lost = folder, False
        threading.excepthook = _without_writers(threading.excepthook)
        with naming(folder):
            self._writer = SummaryWriter(str(folder))
            self._writer.add_text("config", "\n".join(f"- {k}: {v}" for k, v in config.items()))

    def log(self, record: dict[str, Any]) -> None:
        """One point for every number, at the record's step; a full disk costs curves, not the run."""
        with self._told():
            for name, value in record.items():
                if name != "step" and isinstance(value, Real) and not self._lost:
                    self._writer.add_scalar(name, float(value), record.get("step"))

    def finish(self) -> None:
        """Flush and close the files."""
        with self._told():
            self._writer.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with naming(self._folder):
                yield
        except OSError as error:
            if not self._lost:
                print0(f"WARNING: no more curves for TensorBoard, training goes on ({error_text(error)})")
            self._lost = True


def _without_writers(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[[threading.ExceptHookArgs], Any]:
    """`hook`, but silent where an OSError ends TensorBoard's writing thread: the next record raises it again and is
    reported.
    """

    def told(args: threading.ExceptHookArgs) -> None:
        if not (type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)):
            hook(args)

    return told


class Trackio:
    """trackio: wandb's interface, kept in a local database, with its own dashboard."""

    def __init__(self, project: str, run: str, config: dict[str, Any]) -> None:
        import trackio  # lazy: an optional package

        self._trackio = trackio
        trackio.init(project=project, name=run, config=config)

    def log(self, record: dict[str, Any]) -> None:
        """Hand the numbers over."""
        numbers = {name: value for name, value in record.items() if name != "step"}
        self._trackio.log(numbers, step=record.get("step"))

    def finish(self) -> None:
        """Wait until they are stored."""
        self._trackio.finish()


def init_tracker(tracker: TrackerName, run: str, project: str, config: dict[str, Any]) -> Tracker:
    """The tracker of this run; one that ignores everything if `run` is "dummy", and on every rank but 0.

    Args:
        tracker: which one.
        run: the run's name.
        project: nanochat, nanochat-mid, nanochat-sft or nanochat-rl.
        config: the run's settings.

    Raises:
        RuntimeError: the tracker's package is not installed, or wandb knows no login; says what to do.
    """
    if run == NO_RUN or get_dist_info()[1] != 0:
        return DummyWandb()
    try:
        if tracker == "tensorboard":
            return TensorBoard(get_base_dir() / "tensorboard" / project / run, config)
        if tracker == "trackio":
            return Trackio(project, run, config)
        require_wandb_login()
        import wandb  # lazy: a second to start, and most runs do without
    except ImportError as error:
        raise RuntimeError(
            f"--tracker={tracker} needs a package that is missing ({error}): pip install {tracker}, or leave --run out"
        ) from error
    return wandb.init(project=project, name=run, config=config)


@dataclass
class TrainState:
    """Counters and averages of a run; a checkpoint holds them."""

    step: int = 0
    seconds: float = 0.0
    """Spent in steps."""
    waited: float = 0.0
    """Of these, waiting for data."""
    smooth_loss: float = 0.0
    tokens: int = 0
    val: float | None = None
    val_step: int | None = None
    """The step after which `val` was measured."""
    best_val: float | None = None
    best_step: int | None = None
    """The step after which `best_val` was measured."""
    without_signal: int = 0
    """Steps that were not made, since there was nothing to learn from."""

    def count_step(self, seconds: float, loss: float, waited: float = 0.0) -> None:
        """An update was made."""
        self.step += 1
        self.seconds += seconds
        self.waited += waited
        self.smooth_loss = LOSS_SMOOTHING * self.smooth_loss + (1 - LOSS_SMOOTHING) * loss

    def count_evaluation(self, value: float, goal: Goal) -> bool:
        """`value` was measured after this step; returns whether it is the best so far."""
        self.val, self.val_step = value, self.step
        best = self.best_val
        better = best is None or not math.isfinite(best) or (value < best if goal == "lowest" else value > best)
        if better:
            self.best_val, self.best_step = value, self.step
        return better

    @classmethod
    def restored(cls, saved: Mapping[str, Any], goal: Goal) -> TrainState:
        """The counters that a checkpoint's record holds among others."""
        known = {f.name: saved[f.name] for f in fields(cls) if f.name in saved}
        if "min_val" in saved:  # an older checkpoint, which took the lowest value for the best in every stage
            known["best_val"] = saved["min_val"] if goal == "lowest" else saved["val"]
        return cls(**known)

    @property
    def average_loss(self) -> float:
        """The smoothed loss without the bias of its start at 0, as Adam takes it out (arXiv 1412.6980)."""
        return self.smooth_loss / (1 - LOSS_SMOOTHING**self.step)


class RunLog:
    """Sends out a run's numbers: records to metrics.jsonl and the tracker, a note behind the progress bar."""

    def __init__(
        self,
        label: str,
        folder: Path,
        compute: Compute,
        tracker: Tracker,
        flops_per_token: int,
        no_signal_advice: str = "",
    ) -> None:
        self.label, self.compute, self.tracker, self.flops_per_token = label, compute, tracker, flops_per_token
        self._no_signal_advice, self._look_at_signal = no_signal_advice, FEW_STEPS
        self.metrics = MetricsLog(folder / METRICS_FILE)
        self._throttling = ThrottleWatcher(compute.device)
        self._peak_tflops = 1.0
        self._kept: tuple[int, int] | None = (0, 0)  # bytes and steps of metrics.jsonl; None: it is cut already

    def resume(self, metrics_bytes: int, step: int) -> None:
        """Keep what a checkpoint of `step` knows of metrics.jsonl: the rest will be made again."""
        self._kept = metrics_bytes, step

    def begin(self) -> None:
        """Measure what speeds are compared with, and forget what an earlier run has logged after its checkpoint."""
        self._peak_tflops = self.compute.matmul_tflops()
        self._cut()

    def _cut(self) -> None:
        # Not before something is written: a run that is complete already keeps its file.
        if self._kept is not None and self.compute.rank == 0:
            self.metrics.cut(*self._kept)
        self._kept = None

    def write(self, record: dict[str, Any]) -> None:
        """Send a record out; only rank 0 has a file and a tracker."""
        self._cut()
        if self.compute.rank == 0:
            self.metrics.append(record)
        self.tracker.log(record)

    def write_skip(self, step: int, result: StepResult, loss: float) -> None:
        """Say that an attempt at a step was no update, why, and what is tried next."""
        precision = self.compute.precision
        reason = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        how = f"again at loss scale {precision.scaler.get_scale():g}" if result.retry else "on the next batch instead"
        print0(f"{self.label}: step {step} skipped ({reason}), {how}; {precision.skipped} skipped so far")

    def speed(self, tokens: int, seconds: float, data_seconds: float) -> dict[str, float]:
        """The speed of a step of so many tokens, over all ranks."""
        tflops = tokens * self.flops_per_token / seconds / 1e12 / self.compute.world_size
        return {
            "tokens_per_second": tokens / seconds,
            "data_wait_share": data_seconds / seconds,
            "share_of_matmul_speed": tflops / self._peak_tflops,
            "peak_memory_gb": self.compute.peak_memory_bytes() / 1e9,
        }

    def write_step(
        self, bar: Bar, state: TrainState, clock: Clock, schedule: Schedule, metrics: dict[str, float]
    ) -> None:
        """Log a step and move the bar to the share of the run that lies behind."""
        done = schedule.progress(state.step, clock.ticked)
        metrics["smooth_loss"] = state.average_loss
        note = (
            f"step {state.step} loss {state.average_loss:.4f} lr ×{metrics['lr_multiplier']:.2f} "
            f"{metrics['tokens_per_second']:,.0f} tok/s ({metrics['share_of_matmul_speed']:.0%} of matmul speed) "
            f"left {format_seconds(clock.left(state.step, schedule.num_iterations))}"
        )
        if metrics["data_wait_share"] > WORTH_SAYING:
            note += f" waiting for data {metrics['data_wait_share']:.0%}"
        if clock.shares_cores():
            note += " another program uses the cores"
        if metrics.get("share_without_signal"):
            note += f" without signal {metrics['share_without_signal']:.0%}"
        if metrics["skipped"]:
            note += f" skipped {metrics['skipped']:.0f} scale {metrics['scale']:g}"
        bar.set(done, note)
        if (slower := self._throttling.poll()) is not None:
            print0(f"{self.label}: {slower}")
        self._warn_of_silence(state)
        record = {
            "step": state.step,
            "seconds": round(state.seconds, 3),
            "tokens": state.tokens,
            "progress": round(done, 6),
            "clock": round(clock.ticked, 3),
        }
        self.write(record | {name: float(f"{value:.9g}") for name, value in metrics.items()})

    def _warn_of_silence(self, state: TrainState) -> None:
        """Say, at 10 steps and each time they have doubled, that most of them had nothing to learn from."""
        if state.step >= self._look_at_signal and 2 * state.without_signal > state.step:
            self._look_at_signal = 2 * state.step
            print0(
                f"{self.label}: warning: {state.without_signal} of {state.step} steps had nothing to learn from and "
                f"were not made: {self._no_signal_advice}"
            )
