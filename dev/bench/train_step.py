"""Measure tokens/s of a training step: ours and nanochat's own code, with the same classic model, batch and machine.

    git clone https://github.com/karpathy/nanochat /tmp/nanochat && git -C /tmp/nanochat checkout 8c89661   # Dec 2025
    python dev/bench/train_step.py --peer /tmp/nanochat --depth 4 --vocab_size 4096
    python dev/bench/train_step.py --peer /tmp/nanochat --depth 6 --vocab_size 16384

Every contestant is a process of its own (both packages are called nanochat); they take turns, so that other work on
the machine affects all of them. The peer runs as its base_train.py does: on a CPU in float32 without autocast, with
Muon's products in bfloat16, eager and compiled; we are compared with the better of the two. Ours is the step of
nanochat/train/trainer.py in strict float32 (Muon in bfloat16 too), in float32 with "medium" matmuls, and in bfloat16.
Prints the medians over the rounds of tokens/s, of the ratio to the peer in the same round, and of the share of the
matmul speed measured in the same precision.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
OURS = ("strict", "medium", "bfloat16")
PEER = ("eager", "compiled")


def batch(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and targets."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.rows, args.sequence_len + 1)
    tokens = torch.randint(0, args.vocab_size, shape, generator=generator).to(args.device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class SameBatch:
    """A loader that always has the same batch ready, at no cost."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.batch = (x, y)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no position."""
        return {}


def build_ours(args: argparse.Namespace, mode: str) -> tuple[Callable[[], Any], int]:
    """One step of our trainer, and FLOPs per token."""
    sys.path.insert(0, str(ROOT))
    from nanochat.common import setup_compute
    from nanochat.config import Runtime
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.optim import MuonAdamW
    from nanochat.precision import DTYPES
    from nanochat.recipe import Schedule, parameter_groups
    from nanochat.train.trainer import Trainer, TrainSettings

    dtype = mode if mode in ("bfloat16", "float16") else "float32"
    compute = setup_compute(Runtime(device_type=args.device, dtype=dtype, compile=args.compile))
    model = GPT(GPTConfig.from_depth(args.depth, args.vocab_size, args.sequence_len))
    model.init_weights()
    model.to(compute.device).train()
    groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
    for group in groups:
        if group["kind"] == "muon":
            group["ns_dtype"] = DTYPES["bfloat16"]
    settings = TrainSettings(schedule=Schedule(num_iterations=10**6), grad_clip=1.0)
    trainer = Trainer(
        label="bench",
        model=model,
        optimizer=MuonAdamW(groups),
        loader=SameBatch(*batch(args)),
        compute=compute,
        settings=settings,
        folder=Path(os.devnull),
        meta={},
    )
    if mode == "strict":
        model.set_product_dtype(None)
    return trainer.train_step, model.estimate_flops()


def build_peer(args: argparse.Namespace, mode: str) -> tuple[Callable[[], Any], int]:
    """One step as in the peer's base_train.py, and FLOPs per token."""
    sys.path.insert(0, str(Path(args.peer).resolve()))
    from nanochat.gpt import GPT, GPTConfig

    heads = max(1, -(-args.depth * 64 // 128))
    shape = {"n_layer": args.depth, "n_head": heads, "n_kv_head": heads, "n_embd": heads * 128}
    config = GPTConfig(sequence_len=args.sequence_len, vocab_size=args.vocab_size, **shape)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=args.device)
    model.init_weights()
    flops = int(model.estimate_flops())
    optimizers = model.setup_optimizers()
    parameters = list(model.parameters())
    forward = torch.compile(model, dynamic=False) if mode == "compiled" else model
    x, y = batch(args)
    cuda = args.device == "cuda"
    autocast = torch.autocast("cuda", dtype=torch.bfloat16) if cuda else nullcontext()

    def step() -> None:
        with autocast:
            loss = forward(x, y)
        value = loss.detach()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        value.item()

    return step, flops


def matmul_flops(mode: str, device: str, n: int = 1024) -> float:
    """Measured matmul speed in FLOP/s, in the precision of the process."""
    dtype = getattr(torch, mode) if mode in ("bfloat16", "float16") else torch.float32
    a = torch.randn(n, n, device=device).to(dtype)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[2:])


def work(args: argparse.Namespace) -> None:
    """A contestant: builds its model, then reads numbers of steps, line by line, makes them, and answers in JSON."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what the packages print out of the answers
    side, mode = args.worker.split(":")
    step, flops_per_token = (build_ours if side == "ours" else build_peer)(args, mode)
    for _ in range(5):  # until memory is allocated and kernels are chosen
        step()
    print(json.dumps({"flops_per_token": flops_per_token}), file=answer, flush=True)
    for line in sys.stdin:
        speed = matmul_flops(mode, args.device)
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / int(line)
        print(json.dumps({"seconds": seconds, "matmul": speed}), file=answer, flush=True)


def race(args: argparse.Namespace, names: list[str]) -> tuple[dict[str, list[dict[str, float]]], float]:
    """Let all take turns; returns each one's rounds, and FLOPs per token."""
    workers = {}
    flops: dict[str, float] = {}
    for name in names:  # one after the other: compiling takes both cores
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = workers[name].stdout.readline()
        if not line:
            raise RuntimeError(f"{name} did not start; its error is above")
        flops[name] = json.loads(line)["flops_per_token"]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for _ in range(args.rounds):
            for name, worker in workers.items():
                worker.stdin.write(f"{args.steps}\n")
                worker.stdin.flush()
                rounds[name].append(json.loads(worker.stdout.readline()))
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    if max(flops.values()) > 1.02 * min(flops.values()):
        raise RuntimeError(f"the models differ: FLOPs per token {flops}")
    return rounds, min(flops.values())


def main(args: argparse.Namespace) -> None:
    """Race, compare, print."""
    peers = [f"peer:{mode}" for mode in args.peer_modes.split(",")] if args.peer else []
    names = peers + [f"ours:{mode}" for mode in args.modes.split(",")]
    rounds, flops = race(args, names)
    tokens = args.rows * args.sequence_len
    median = {name: statistics.median(r["seconds"] for r in rounds[name]) for name in names}
    best = min(peers, key=lambda name: median[name]) if peers else None
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"d{args.depth}, vocabulary {args.vocab_size}, {args.rows} rows of {args.sequence_len} tokens, {device}, torch "
        f"{torch.__version__}, {args.rounds} rounds of {args.steps} steps; the peer's better mode: {best}"
    )
    print(f"{'':16}{'tokens/s':>10}{'ms/step':>9}{'of matmul speed':>17}{'× best peer':>13}")
    result: dict[str, Any] = vars(args) | {"best_peer": best}
    for name in names:
        share = statistics.median(flops * tokens / r["seconds"] / r["matmul"] for r in rounds[name])
        ratio = None
        if best is not None:
            pairs = zip(rounds[best], rounds[name], strict=True)
            ratio = statistics.median(b["seconds"] / r["seconds"] for b, r in pairs)
        speed = tokens / median[name]
        print(f"{name:16}{speed:10,.0f}{1000 * median[name]:9.0f}{share:17.0%}{ratio or float('nan'):13.2f}")
        result[name] = {"tokens_per_second": speed, "share_of_matmul": share, "ratio": ratio}
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of nanochat of December 2025")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--sequence_len", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps in a round")
    parser.add_argument("--modes", default=",".join(OURS), help="ours: strict, medium, bfloat16, float16")
    parser.add_argument("--peer_modes", default=",".join(PEER), help="the peer's: eager, compiled")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="ours")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker:
        work(parsed)
    else:
        main(parsed)
