"""The training loop of every stage: base, mid-training and SFT differ in data, loss mask and schedule, not here.

One optimizer step: gather the micro-batches, count the tokens that are supervised on all ranks, add up the gradients
of the summed loss divided by that count (so that any split into micro-batches or ranks is the same mathematics), then
`Precision.step`. A checkpoint holds everything the next step depends on, the position in the data included.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint_manager import (
    load_checkpoint,
    restore_rng_state,
    rng_state,
    save_checkpoint,
    saved_steps,
)
from nanochat.common import Compute, DummyWandb, measure_matmul, print0
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.precision import NonFiniteError, first_nonfinite_module
from nanochat.progress import Bar, format_seconds, progress
from nanochat.recipe import Schedule, muon_momentum

METRICS_FILE = "metrics.jsonl"
LOSS_SMOOTHING = 0.9
WORTH_SAYING = 0.01  # share of a step spent waiting for data


class Loader(Protocol):
    """Batches (x, y), each (B, T) on the device; −1 in y is not supervised."""

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch."""

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


@dataclass
class TrainState:
    """What a step depends on besides model, optimizer, data and generators."""

    step: int = 0
    seconds: float = 0.0
    smooth_loss: float = 0.0
    tokens: int = 0
    val: float | None = None
    min_val: float | None = None


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
    evaluate: Callable[[], float] | None = None
    val_name: str = "val_bpb"
    sample: Callable[[], None] | None = None
    wandb: Any = field(default_factory=DummyWandb)
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self.flops_per_token = self.model.estimate_flops(self.model.config.sequence_len)
        # The layers are compiled; the loss works chunk by chunk and stays outside.
        self._hidden = torch.compile(self.model.hidden, dynamic=False) if self.compute.compile else self.model.hidden
        self._last_save = time.monotonic()

    # -- one step -------------------------------------------------------------------------------------------------

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the next `grad_accum_steps` batches; returns its metrics."""
        s = self.settings
        share = s.schedule.progress(self.state.step, self.state.seconds)
        multiplier = s.schedule.lr_multiplier(share)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(self.state.step)
        start = time.perf_counter()
        batches = [next(self.loader) for _ in range(s.grad_accum_steps)]
        self._data_seconds = time.perf_counter() - start
        count = torch.stack([(y >= 0).sum() for _, y in batches]).sum()
        if self.compute.ddp:
            dist.all_reduce(count)
        # reduce_gradients averages over ranks, hence the factor world_size.
        weight = self.compute.world_size / count
        total = torch.zeros((), device=self.compute.device)
        for x, y in batches:
            with self.compute.precision.autocast():
                loss = self.model.loss(self._hidden(x), y, "sum") * weight
            self.compute.precision.backward(loss)
            total += loss.detach()
        result = self.compute.precision.step([self.optimizer], s.grad_clip)
        self.optimizer.zero_grad(set_to_none=True)
        if self.compute.ddp:
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= self.compute.world_size
        self.state.tokens += int(batches[0][0].numel()) * len(batches) * self.compute.world_size
        metrics = {"loss": float(total), "lr_multiplier": multiplier, "grad_norm": result.grad_norm}
        if not result.skipped and metrics["loss"] != metrics["loss"]:
            raise NonFiniteError("the loss is not a number")
        metrics["skipped"] = self.compute.precision.skipped
        metrics["scale"] = self.compute.precision.scaler.scale
        self._batches = batches
        return metrics

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the schedule; the last checkpoint is marked complete.

        Raises:
            NonFiniteError: the run can't go on; names the first layer that is not finite. The last checkpoint stays.
        """
        schedule = self.settings.schedule
        peak = measure_matmul(self.compute.dtype, self.compute.device, n=1024)
        total = schedule.num_iterations or schedule.seconds or 1.0
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
                self._maybe_save()
        self._final_evaluation()
        self.save(complete=True)
        return self.state

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
        record |= {k: float(f"{v:.6g}") for k, v in metrics.items()}
        self._append_metrics(record)
        self.wandb.log(record)

    def _append_metrics(self, record: dict[str, Any]) -> None:
        if self.compute.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")

    # -- evaluation and checkpoints -------------------------------------------------------------------------------

    def _maybe_evaluate(self) -> None:
        s, step = self.settings, self.state.step
        if step and s.eval_every and step % s.eval_every == 0:
            self._evaluate()
        if step and s.sample_every and step % s.sample_every == 0 and self.sample is not None:
            self.sample()

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        value = self.evaluate()
        self.model.train()
        self.state.val = value
        self.state.min_val = value if self.state.min_val is None else min(value, self.state.min_val)
        print0(f"{self.label}: step {self.state.step} {self.val_name} {value:.4f}")
        record = {"step": self.state.step, "seconds": round(self.state.seconds, 3), self.val_name: value}
        self._append_metrics(record)
        self.wandb.log(record)

    def _final_evaluation(self) -> None:
        self._evaluate()
        if self.sample is not None:
            self.model.eval()
            self.sample()

    def _maybe_save(self) -> None:
        s = self.settings
        due = self.compute.broadcast(time.monotonic() - self._last_save) >= 60 * s.save_every_minutes
        if due or (s.save_every and self.state.step % s.save_every == 0):
            self.save(complete=False)

    def save(self, complete: bool) -> None:
        """Write a checkpoint (all ranks take part; rank 0 writes). A complete one carries no optimizer state."""
        self._last_save = time.monotonic()
        optimizer: dict[str, Tensor] | None = None
        if not complete:
            optimizer = self.optimizer.flat_state()
            optimizer |= rng_state(self.compute.device)
        meta = self.meta | {
            "complete": complete,
            "state": vars(self.state),
            "loader": self.loader.state_dict(),
            "precision": self.compute.precision.state_dict(),
            "dtype": self.compute.precision.name,
            "model_config": self.model.config.to_dict(),
            self.val_name: self.state.val,
        }
        if self.compute.rank == 0:
            save_checkpoint(
                self.folder, self.state.step, self.model.state_dict(), optimizer, meta, keep=1 if complete else 2
            )
        if self.compute.ddp:
            dist.barrier()

    def resume(self, checkpoint_meta: dict[str, Any], optimizer: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's meta and optimizer tensors (the model and loader are built from it already)."""
        self.optimizer.load_flat_state({k: v for k, v in optimizer.items() if not k.startswith("rng.")})
        self.compute.precision.load_state_dict(checkpoint_meta["precision"])
        self.state = TrainState(**checkpoint_meta["state"])
        if self.compute.rank == 0:
            _drop_later_metrics(self.folder / METRICS_FILE, self.state.step)
        restore_rng_state(optimizer, self.compute.device)
        print0(f"{self.label}: goes on at step {self.state.step}")

    def _explain(self, error: NonFiniteError) -> NonFiniteError:
        batch = getattr(self, "_batches", None)
        where = None
        if batch is not None:
            x = batch[0][0]

            def forward() -> None:
                with self.compute.precision.autocast():
                    self.model(x)

            where = first_nonfinite_module(self.model, forward)
        layer = f"the first layer with non-finite activations is {where}" if where else "all activations are finite"
        return NonFiniteError(
            f"training stopped at step {self.state.step}: {error}; {layer}. Lower the learning rates "
            "(--matrix_lr, --embedding_lr), set --grad_clip=1.0, or use --dtype=float32; the last checkpoint stays"
        )


def _drop_later_metrics(path: Path, step: int) -> None:
    """Forget the metrics of steps that will be made again."""
    from nanochat.files import write_text

    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # a line torn by a kill
        return 1 << 62


def find_resume(folder: Path, config: dict[str, Any], resume: str, ignore: set[str]) -> Any:
    """The checkpoint to continue in `folder`, or None for a fresh start (an older run there is moved to `<tag>.old`).

    Args:
        folder: the tag's checkpoint folder.
        config: this run's settings, JSON-ready.
        resume: "auto" or "never".
        ignore: settings that may differ.

    Raises:
        ValueError: an unfinished run with other settings is there; names each difference and the remedy.
    """
    if not saved_steps(folder):
        return None
    if resume == "auto":
        checkpoint = load_checkpoint(folder, with_optimizer=True)
        if not checkpoint.meta["complete"]:
            before = checkpoint.meta["config"]
            names = sorted((set(before) | set(config)) - ignore)
            changed = [f"{n}: {before.get(n)} -> {config.get(n)}" for n in names if before.get(n) != config.get(n)]
            if changed:
                raise ValueError(
                    f"an unfinished run with other settings is in {folder} ({'; '.join(changed)}): use its settings, "
                    "another --model_tag, or --resume=never to start over"
                )
            return checkpoint
    if int(os.environ.get("RANK", "0")) == 0:
        import shutil

        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        print0(f"a run was in {folder}: moved to {old.name}")
    if dist.is_initialized():
        dist.barrier()
    return None
