"""How fast this machine trains: a step of the real model on random tokens, timed.

A step is passes (forward and backward, one per micro-batch) and one update. They are timed apart: both times hold for
any number of passes. Results are kept in the base dir, since a machine does not change.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanochat.files import write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import speeds_key, synchronize
from nanochat.optim import MuonAdamW
from nanochat.plan.memory import MicroBatch
from nanochat.precision import Precision
from nanochat.recipe import Preset, parameter_groups

# A pass over so many tokens keeps a device busy, more take proportionally longer. A guess.
ENOUGH_TOKENS = {"cpu": 2048}
ENOUGH_TOKENS_DEFAULT = 16384
SPEEDS_FILE = "step_speeds.json"
LONG_FLOPS = 1e15  # a run of more is worth a word about its hours: minutes on any machine


def hours_sentence(flops: float, tflops: float) -> str:
    """How long a run of counted steps takes at a training speed in TFLOP/s."""
    return (
        f"planned: about {flops / (tflops * 1e12) / 3600:,.3g} hours of training ({flops:.3g} FLOPs at {tflops:.3g} "
        "TFLOP/s, a guess from the speed of matmuls here); --hours=8 would be done in eight"
    )


def pass_seconds(model: GPT, precision: Precision, idx: Tensor) -> float:
    """Time of a forward and backward pass over `idx` (B, T + 1); its gradients are added to those that are there."""
    start = time.perf_counter()
    with precision.training():
        with precision.autocast():
            found = model.recall.nothing(idx[:, 1:]) if model.config.recall else None
            loss = model(idx[:, :-1], idx[:, 1:].contiguous(), found=found)
        precision.backward(loss)
    synchronize(idx.device)
    return time.perf_counter() - start


def random_tokens(vocab_size: int, rows: int, sequence_len: int, device: torch.device) -> Tensor:
    """(rows, sequence_len + 1) tokens of a generator of their own: a run's random numbers stay as they are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (rows, sequence_len + 1), generator=generator).to(device)


@dataclass
class LocalMachine:
    """Times steps in this precision on `device`. `path`: where results are kept; None: every call times anew."""

    device: torch.device
    precision: Precision
    preset: Preset
    path: Path | None = None

    def tokens_per_second(self, config: GPTConfig, micro: MicroBatch, passes: int) -> float:
        """Predicted speed of training with `passes` such micro-batches in a step."""
        enough = ENOUGH_TOKENS.get(self.device.type, ENOUGH_TOKENS_DEFAULT)
        timed = replace(micro, rows=min(micro.rows, max(1, enough // config.sequence_len)))
        forward_backward, update = self._known_times(config, timed)
        step = passes * forward_backward * micro.rows / timed.rows + update
        return passes * micro.rows * config.sequence_len / step

    def _known_times(self, config: GPTConfig, micro: MicroBatch) -> tuple[float, float]:
        everything: dict[str, dict[str, tuple[float, float]]] = {}
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                everything = json.loads(self.path.read_text(encoding="utf-8"))
        known = everything.setdefault(speeds_key(self.device, self.precision.product_dtype), {})
        name = f"{config}, {micro}, {self.precision.name}, {self.preset.muon}"
        if name not in known:
            known[name] = self._measure(config, micro)
            if self.path is not None:
                write_json(self.path, everything)
        return known[name]

    def _measure(self, config: GPTConfig, micro: MicroBatch) -> tuple[float, float]:
        model = GPT(config)
        model.init_weights()
        model.to(self.device).train()
        micro.apply(model)
        rates = {"embedding_lr": 0.0, "unembedding_lr": 0.0, "matrix_lr": 0.0, "weight_decay": 0.0}
        optimizer = MuonAdamW(parameter_groups(model, **rates, preset=self.preset), distributed=False)
        model.set_product_dtype(self.precision.product_dtype)
        optimizer.set_product_dtype(self.precision.muon_dtype)
        idx = random_tokens(config.vocab_size, micro.rows, config.sequence_len, self.device)
        passes, updates = [], []
        for _ in range(2):
            pass_seconds(model, self.precision, idx)  # libraries load, the gradients are made that others add to
            passes.append(pass_seconds(model, self.precision, idx))
            start = time.perf_counter()
            with self.precision.training():
                optimizer.grad_norm()
                optimizer.step(1 / self.precision.scaler.get_scale())
            synchronize(self.device)
            updates.append(time.perf_counter() - start)
        # The first update makes the optimizer's state. Whatever else runs here only adds time: the shorter pass counts.
        return min(passes), updates[-1]
