"""Measure what saving costs: a model with its optimizer state, written as training writes it, and by torch.save.

    python dev/bench/checkpoint.py                     d12, vocabulary 65536, on the CPU
    python dev/bench/checkpoint.py --depth 4 --vocab_size 4096

"stop" is how long a step waits for the copy. While the thread writes, this process multiplies matrices and counts how
many fewer it completes than without the thread, which is the other part of what training loses. The cost is both
together, as a share of the default interval of 10 minutes. The peer is torch.save of the same tensors, during which
training stands still; both are synced to the disk. They take turns. Prints the medians of --rounds, then one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanochat.checkpoint.keep import Keep
from nanochat.checkpoint.writer import CheckpointWriter, Snapshot, host_copy
from nanochat.config import run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.recipe import parameter_groups

INTERVAL_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes."""

    depth: int = 12
    """Layers."""
    vocab_size: int = 65536
    """Size of the vocabulary."""
    rounds: int = 3
    """Measurements of each."""
    folder: str | None = None
    """Folder to write to; default: the temporary folder."""


def make_state(cfg: Config) -> tuple[GPT, MuonAdamW]:
    """A model, and an optimizer with its state."""
    model = GPT(GPTConfig.from_depth(cfg.depth, cfg.vocab_size, 2048))
    model.init_weights()
    groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
    optimizer = MuonAdamW(groups)
    for bucket in optimizer.buckets:
        bucket.init_state()
    return model, optimizer


def products_per_second(until: object, seconds: float) -> tuple[float, float]:
    """(matrix products per second, seconds) while `until.busy`, or for `seconds`."""
    a = torch.ones(512, 512)
    start, count = time.perf_counter(), 0
    while getattr(until, "busy", False) if until is not None else time.perf_counter() - start < seconds:
        a @ a
        count += 1
    took = time.perf_counter() - start
    return count / max(took, 1e-9), took


def ours(model: GPT, optimizer: MuonAdamW, folder: Path, step: int) -> dict[str, float]:
    """One checkpoint in the background."""
    writer = CheckpointWriter(folder, Keep(1))
    free, _ = products_per_second(None, 3.0)
    start = time.perf_counter()
    snapshot = Snapshot(step, host_copy(model.state_dict()), host_copy(optimizer.own_flat_state()), {"state": {}})
    writer.start(snapshot)
    stop = time.perf_counter() - start
    busy, took = products_per_second(writer, 0.0)
    writer.wait()
    if writer.error is not None:
        raise writer.error
    return {"stop": stop, "write": took, "lost": stop + took * max(0.0, 1 - busy / free)}


def peer(model: GPT, optimizer: MuonAdamW, folder: Path) -> float:
    """Seconds of torch.save."""
    start = time.perf_counter()
    with open(folder / "peer.pt", "wb") as f:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.own_flat_state()}, f)
        f.flush()
        os.fsync(f.fileno())
    return time.perf_counter() - start


def main(cfg: Config) -> None:
    """Measure in turns and print."""
    model, optimizer = make_state(cfg)
    tensors = [*model.state_dict().values(), *optimizer.own_flat_state().values()]
    gigabytes = sum(t.numel() * t.element_size() for t in tensors) / 1e9
    runs, peers = [], []
    with tempfile.TemporaryDirectory(dir=cfg.folder) as name:
        for i in range(cfg.rounds):
            runs.append(ours(model, optimizer, Path(name) / "ours", i))
            shutil.rmtree(Path(name) / "ours")
            peers.append(peer(model, optimizer, Path(name)))
    result = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    result["torch_save"] = statistics.median(peers)
    cost, peer_cost = 100 * result["lost"] / INTERVAL_SECONDS, 100 * result["torch_save"] / INTERVAL_SECONDS
    print(f"d{cfg.depth}, vocabulary {cfg.vocab_size}: {gigabytes:.2f} GB per checkpoint")
    print(f"  a step stops for            {result['stop']:8.2f} s")
    print(f"  written in the background in{result['write']:8.2f} s (hashed and synced)")
    print(f"  training loses in total     {result['lost']:8.2f} s = {cost:.2f} % of 10 minutes")
    print(f"  torch.save stops it for     {result['torch_save']:8.2f} s = {peer_cost:.2f} %")
    print(f"  stop, as a share of the peer's {result['stop'] / result['torch_save']:.2f}")
    print(json.dumps({**{k: round(v, 3) for k, v in result.items()}, "cost_percent": round(cost, 3)}))


if __name__ == "__main__":
    run_script(main, Config)
