"""Does the time model hold? Predicts tokens/s of three models on this machine, then really trains them.

    nice -n -10 python dev/bench/plan.py

The prediction times a pass over few tokens and an update (nanochat/plan/local_speed.py), never the trainer. Both are
taken in turns, so that other work on the machine meets both. Prints predicted and measured tokens/s and their ratio;
the last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanochat.common import Compute, setup_compute  # noqa: E402
from nanochat.config import Runtime  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # noqa: E402
from nanochat.optim import MuonAdamW  # noqa: E402
from nanochat.plan.local_speed import LocalMachine  # noqa: E402
from nanochat.plan.memory import MicroBatch  # noqa: E402
from nanochat.recipe import PRESETS, Schedule, parameter_groups  # noqa: E402
from nanochat.train.trainer import Trainer, TrainSettings  # noqa: E402

# depth, vocabulary, T, rows, micro-batches
CONFIGS = ((2, 4096, 256, 16, 2), (4, 16384, 512, 4, 2), (6, 8192, 1024, 2, 2))


class SameBatch:
    """A loader that always has the same batch ready."""

    def __init__(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.batch = batch

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing to go on from."""
        return {}


def build(compute: Compute, recipe: str, depth: int, vocab: int, T: int, rows: int, micro_batches: int) -> Trainer:
    """A trainer of this model on random tokens."""
    preset = PRESETS[recipe]
    model = GPT(GPTConfig.from_depth(depth, vocab, T, **preset.switches))
    model.init_weights()
    model.to(compute.device).train()
    tokens = torch.randint(0, vocab, (rows, T + 1), generator=torch.Generator().manual_seed(0)).to(compute.device)
    groups = parameter_groups(
        model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0, preset=preset
    )
    return Trainer(
        label="bench",
        model=model,
        optimizer=MuonAdamW(groups),
        loader=SameBatch((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())),
        compute=compute,
        settings=TrainSettings(schedule=Schedule(num_iterations=10**6), grad_accum_steps=micro_batches, grad_clip=1.0),
        folder=Path(os.devnull),
        meta={},
    )


def measure(trainer: Trainer, compute: Compute, steps: int) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.train_step()
        compute.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(args: argparse.Namespace) -> None:
    """Predict, train, compare."""
    compute = setup_compute(Runtime(device_type=args.device, dtype=args.dtype, compile="off"))
    dtype = compute.precision.name
    print(f"{'model':34}{'predicted tok/s':>16}{'measured tok/s':>16}{'ratio':>8}")
    result: dict[str, Any] = {"dtype": dtype, "threads": torch.get_num_threads(), "configs": []}
    for depth, vocab, T, rows, micro_batches in CONFIGS:
        preset = PRESETS[args.recipe]
        config = GPTConfig.from_depth(depth, vocab, T, **preset.switches)
        trainer = build(compute, args.recipe, depth, vocab, T, rows, micro_batches)
        measure(trainer, compute, 2)
        predicted, measured = [], []
        for _ in range(args.rounds):
            machine = LocalMachine(compute.device, compute.precision, preset)
            predicted.append(machine.tokens_per_second(config, MicroBatch(rows), micro_batches))
            measured.append(rows * T * micro_batches / measure(trainer, compute, args.steps))
        speeds = statistics.median(predicted), statistics.median(measured)
        ratio = statistics.median(p / m for p, m in zip(predicted, measured, strict=True))
        name = f"d{depth}, V {vocab}, T {T}, {rows} rows × {micro_batches}"
        print(f"{name:34}{speeds[0]:16,.0f}{speeds[1]:16,.0f}{ratio:8.2f}", flush=True)
        result["configs"].append({"name": name, "predicted": speeds[0], "measured": speeds[1], "ratio": ratio})
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--recipe", default="classic", choices=sorted(PRESETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    main(parser.parse_args())
