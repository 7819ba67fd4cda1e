"""Measure a card and check that this project trains correctly on it, with one command that needs only torch and numpy.

    python dev/gpu_check.py                                   any CUDA card: about 200 steps of a d12 in each dtype
    python dev/gpu_check.py --device_type=cpu --depth=2 --steps=20 --sequence_len=128 --rows=4

Prints the capability, the architectures that the wheel has kernels for, the measured matmul speed of each dtype, and
the attention kernels that run; then the loss curves of the same training run in float32, float16 and bfloat16 side by
side, with speed, share of the card's peak, and peak memory. Writes the same as JSON. The text is the demo world's
files, byte by byte, because nothing can be learned from random tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import statistics
import sys
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanochat.cards import find_card  # noqa: E402
from nanochat.common import Compute, setup_compute  # noqa: E402
from nanochat.config import Runtime  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # noqa: E402
from nanochat.hardware import measure_matmul  # noqa: E402
from nanochat.optim import MuonAdamW  # noqa: E402
from nanochat.plan.memory import GB, StepSetup, estimate_training_memory  # noqa: E402
from nanochat.precision import DTYPES, Precision  # noqa: E402
from nanochat.recipe import Schedule, parameter_groups  # noqa: E402
from nanochat.train.compiling import compiled, seconds_per_pass  # noqa: E402
from nanochat.train.micro_batch import choose_micro_batch  # noqa: E402

VOCAB = 256
FINAL_SHARE = 0.1  # the final loss is the mean over this share of the steps, at the end
# Depth and vocabulary of the models that a 16 GB card must hold, tokens per sequence, and sequences per step.
MEMORY_MODELS = ((12, 65536), (16, 32768))
MEMORY_TOKENS, MEMORY_ROWS = 2048, 64
SAME = 0.01  # final losses within this ratio count as the same


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the flags, with argparse, because this script must not need more than torch and numpy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device_type", choices=["auto", "cuda", "cpu", "mps"], default="auto")
    parser.add_argument("--depth", type=int, default=12, help="layers of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps per dtype (default: %(default)s)")
    parser.add_argument("--sequence_len", type=int, default=1024, help="bytes per sequence (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="sequences per step; fewer if memory runs out")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--compile", action="store_true", help="also compare torch.compile with eager mode")
    parser.add_argument("--memory", type=float, help="only check that models train in this many GB, at auto batch")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="the JSON (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.dtypes = arguments.dtypes.split(",")
    if unknown := [name for name in arguments.dtypes if name not in DTYPES]:
        parser.error(f"--dtypes: unknown {', '.join(unknown)}; choose from {', '.join(DTYPES)}")
    for name in ("depth", "steps", "sequence_len", "rows"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


# --- the device ------------------------------------------------------------------------------------------------------


def device_facts(compute: Compute) -> dict[str, Any]:
    """Name, capability, memory, and what the data sheet says."""
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "device": "cpu"}
    if compute.device_type != "cuda":
        return facts | {"device": compute.device_type, "processor": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(compute.device)
    card = find_card(properties.name)
    return facts | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list(),
        "data_sheet": {name: card.peak_tflops(name) for name in DTYPES} if card else None,
        "bandwidth_gbs": card.bandwidth_gbs if card else None,
    }


def matmul_speeds(compute: Compute, names: list[str]) -> dict[str, float | None]:
    """TFLOP/s of large matmuls by dtype, as training runs them (float32 with TF32 where there is any)."""
    n = 4096 if compute.device_type == "cuda" else 512
    speeds: dict[str, float | None] = {}
    for name in names:
        try:
            with Precision(compute.device_type, DTYPES[name]).training():
                speeds[name] = measure_matmul(DTYPES[name], compute.device, n=n, seconds=0.5)
        except RuntimeError:
            speeds[name] = None
    return speeds


def attention_backends(compute: Compute, name: str, T: int) -> dict[str, float | None]:
    """Milliseconds of causal attention, forward and backward, by backend; None if a backend refuses."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times: dict[str, float | None] = {}
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        qkv = torch.randn(3, 2, 6, T, 128, device=compute.device, dtype=DTYPES[name], requires_grad=True)
        try:
            with warnings.catch_warnings(), sdpa_kernel(backend):
                warnings.simplefilter("ignore")  # each refusal comes with a long list of reasons
                best = float("inf")
                for _ in range(3):
                    compute.synchronize()
                    start = time.perf_counter()
                    y = torch.nn.functional.scaled_dot_product_attention(*qkv.unbind(), is_causal=True)
                    y.sum().backward()
                    compute.synchronize()
                    best = min(best, time.perf_counter() - start)
            times[backend.name.removesuffix("_ATTENTION").lower()] = round(1e3 * best, 3)
        except RuntimeError:
            times[backend.name.removesuffix("_ATTENTION").lower()] = None
    return times


# --- training --------------------------------------------------------------------------------------------------------


def demo_bytes(device: torch.device) -> torch.Tensor:
    """All text of the demo world as one vector of bytes."""
    files = sorted((ROOT / "tasks" / "demo" / "world").glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"no text in {ROOT / 'tasks' / 'demo' / 'world'}: the checkout is incomplete")
    text = b"".join(path.read_bytes() for path in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().to(device)


class Run:
    """A fresh model in one dtype, fed with the same batches as every other run of this seed."""

    def __init__(self, arguments: argparse.Namespace, compute: Compute, text: torch.Tensor, name: str) -> None:
        torch.manual_seed(arguments.seed)
        self.precision = compute.precision = Precision(compute.device_type, DTYPES[name])
        self.precision.plan_steps(arguments.steps)
        self.compute, self.text, self.T = compute, text, arguments.sequence_len
        self.model = GPT(GPTConfig.from_depth(arguments.depth, VOCAB, self.T))
        self.model.init_weights()
        self.model.to(compute.device).train()
        groups = parameter_groups(self.model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
        self.optimizer = MuonAdamW(groups)
        self.model.set_product_dtype(self.precision.product_dtype)
        self.optimizer.set_product_dtype(self.precision.muon_dtype)
        self.schedule = Schedule(num_iterations=arguments.steps)
        self.offsets = torch.Generator().manual_seed(arguments.seed)

    def batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next (rows, T) bytes and the bytes after them."""
        starts = torch.randint(self.text.numel() - self.T - 1, (rows, 1), generator=self.offsets)
        tokens = self.text[(starts + torch.arange(self.T + 1)).to(self.text.device)]
        return tokens[:, :-1], tokens[:, 1:]

    def step(self, rows: int, step: int) -> float:
        """One update; returns the mean loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule.lr_multiplier(self.schedule.progress(step, 0.0))
        x, y = self.batch(rows)
        retry = True
        while retry:
            with self.precision.training():
                with self.precision.autocast():
                    loss = self.model(x, y)
                self.precision.backward(loss)
                retry = self.precision.step([self.optimizer], 1.0, loss).retry
            self.optimizer.zero_grad()
        return float(loss.detach())


def forget(compute: Compute) -> None:
    """Release the memory of tensors that are no longer used."""
    gc.collect()
    if compute.device_type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(compute.device)


def find_rows(arguments: argparse.Namespace, compute: Compute, text: torch.Tensor) -> int:
    """The number of sequences that fit in every dtype; float32 needs the most memory. Halved until a step succeeds."""
    rows = arguments.rows
    while True:
        try:
            Run(arguments, compute, text, "float32").step(rows, 0)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise RuntimeError(
                    f"not even one sequence of {arguments.sequence_len} fits: lower --sequence_len or --depth"
                ) from None
            rows //= 2
        finally:
            forget(compute)


def train(
    arguments: argparse.Namespace, compute: Compute, text: torch.Tensor, name: str, rows: int, matmul: float | None
) -> dict[str, Any]:
    """Loss curve, speed and memory of one dtype."""
    forget(compute)
    run = Run(arguments, compute, text, name)
    losses, seconds, error = [], [], None
    for step in range(arguments.steps):
        compute.synchronize()
        start = time.perf_counter()
        try:
            losses.append(run.step(rows, step))
        except RuntimeError as stop:
            error = str(stop).splitlines()[0]
            break
        compute.synchronize()
        seconds.append(time.perf_counter() - start)
    result: dict[str, Any] = {
        "losses": losses,
        "skipped": run.precision.skipped,
        "scale": run.precision.scaler.get_scale(),
    }
    if error is not None:
        return result | {"error": error}
    last = losses[-max(1, round(FINAL_SHARE * len(losses))) :]
    tokens_per_second = rows * run.T / statistics.median(seconds[min(5, len(seconds) - 1) :])
    tflops = tokens_per_second * run.model.estimate_flops() / 1e12
    card = find_card(torch.cuda.get_device_name(compute.device)) if compute.device_type == "cuda" else None
    peak = card.peak_tflops(name) if card else None
    result |= {
        "final_loss": statistics.fmean(last),
        "tokens_per_second": tokens_per_second,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "share_of_matmul": tflops / matmul if matmul else None,
        "peak_memory_gb": compute.peak_memory_bytes() / 1e9,
    }
    if arguments.compile:
        result["pass_ms"] = time_compiled(run, rows)
    return result


def time_compiled(run: Run, rows: int) -> dict[str, float | str]:
    """Milliseconds of a forward and backward pass, eager and compiled."""
    x, _ = run.batch(rows)
    times: dict[str, float | str] = {
        "eager": 1e3 * seconds_per_pass(run.model.hidden, run.model, run.compute, x),
    }
    try:
        times["compiled"] = 1e3 * seconds_per_pass(compiled(run.model), run.model, run.compute, x)
    except Exception as error:  # the check continues, and reports the compiler's error
        times["compiled"] = f"failed: {str(error).strip().splitlines()[0]}"
    return times


# --- does it fit ------------------------------------------------------------------------------------------------------


def check_memory(compute: Compute, memory_gb: float) -> bool:
    """Train the models meant for a 16 GB card at the micro-batch chosen for it, on a card limited to `memory_gb`."""
    if compute.device_type != "cuda":
        raise RuntimeError("--memory limits a CUDA card, but there is none here")
    total = torch.cuda.get_device_properties(compute.device).total_memory
    if memory_gb * GB > total:
        raise ValueError(f"--memory={memory_gb:g}: this card has {total / GB:.1f} GB")
    torch.cuda.set_per_process_memory_fraction(memory_gb * GB / total, compute.device)
    rows = [["model", "dtype", "micro-batch", "estimated GB", "peak GB", "tokens/s"]]
    for depth, vocab in MEMORY_MODELS:
        for name in ("float16", "bfloat16", "float32"):
            forget(compute)
            try:
                rows.append([f"d{depth}/{vocab}", name, *train_to_the_brim(compute, depth, vocab, name)])
            except RuntimeError as error:
                rows.append([f"d{depth}/{vocab}", name, str(error).splitlines()[0], "-", "-", "FAILED"])
    print(table(rows))
    return not any(row[-1] == "FAILED" for row in rows)


def train_to_the_brim(compute: Compute, depth: int, vocab: int, name: str) -> list[str]:
    """Five steps on random tokens at automatic batch size: micro-batch, estimated and measured memory, speed."""
    compute.precision = Precision(compute.device_type, DTYPES[name])
    config = GPTConfig.from_depth(depth, vocab, MEMORY_TOKENS)
    model = GPT(config)
    model.init_weights()
    model.to(compute.device).train()
    optimizer = MuonAdamW(
        parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
    )
    micro, _ = choose_micro_batch(model, compute, MEMORY_TOKENS, MEMORY_ROWS)
    torch.cuda.reset_peak_memory_stats(compute.device)
    x = torch.randint(0, vocab, (micro.rows, MEMORY_TOKENS), device=compute.device)
    compute.synchronize()
    start = time.perf_counter()
    steps, passes = 5, 2
    for _ in range(steps):
        for _ in range(passes):
            with compute.precision.autocast():
                loss = model(x, x, loss_reduction="sum") / (passes * x.numel())
            compute.precision.backward(loss)
        compute.precision.step([optimizer], 1.0, loss)
        optimizer.zero_grad()
    compute.synchronize()
    speed = steps * passes * x.numel() / (time.perf_counter() - start)
    estimate = estimate_training_memory(config, micro, MEMORY_TOKENS, StepSetup(DTYPES[name]))
    peak = torch.cuda.max_memory_reserved(compute.device)
    return [str(micro), f"{estimate.total / GB:.2f}", f"{peak / GB:.2f}", f"{speed:,.0f}"]


# --- the report ------------------------------------------------------------------------------------------------------


def show(value: float | None, form: str) -> str:
    """A number, or a dash."""
    return "-" if value is None else format(value, form)


def table(rows: list[list[str]]) -> str:
    """Columns aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def curves(runs: dict[str, dict[str, Any]], steps: int) -> str:
    """Loss by step, one column per dtype."""
    marks = sorted({0, *(round(i * (steps - 1) / 10) for i in range(11))})
    rows = [["step", *runs]]
    for i in marks:
        rows.append([str(i + 1), *(f"{r['losses'][i]:.4f}" if i < len(r["losses"]) else "-" for r in runs.values())])
    return table(rows)


def summary(runs: dict[str, dict[str, Any]]) -> str:
    """Final loss, speed and memory, one line per dtype; then the errors."""
    head = ["dtype", "final loss", "tokens/s", "TFLOP/s", "MFU", "of matmul", "memory GB", "skipped", "scale"]
    rows = [head]
    for name, r in runs.items():
        cells = [show(r.get("final_loss"), ".4f"), show(r.get("tokens_per_second"), ",.0f")]
        cells += [show(r.get("tflops"), ".3g"), show(r.get("mfu"), ".1%"), show(r.get("share_of_matmul"), ".1%")]
        cells += [show(r.get("peak_memory_gb"), ".2f"), str(r["skipped"]), f"2^{math.log2(r['scale']):.0f}"]
        rows.append([name, *cells])
    lines = [table(rows)]
    lines += [f"{name}: {r['error']}" for name, r in runs.items() if "error" in r]
    lines += [f"{name}: ms per pass {r['pass_ms']}" for name, r in runs.items() if "pass_ms" in r]
    return "\n".join(lines)


def verdict(runs: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """(A sentence, True if all dtypes end at the same loss)."""
    finals = {name: r["final_loss"] for name, r in runs.items() if "final_loss" in r}
    if len(finals) < len(runs) or not finals:
        return "FAILED: not every dtype could train", False
    spread = max(finals.values()) / min(finals.values()) - 1
    same = spread <= SAME
    return (
        f"{'ok' if same else 'FAILED'}: final losses differ by {spread:.2%} (the same: at most {SAME:.0%})",
        same,
    )


def main(argv: list[str] | None = None) -> int:
    """Check, print, write; returns 0 if every dtype trains to the same loss."""
    arguments = parse_arguments(argv)
    compute = setup_compute(Runtime(device_type=arguments.device_type, compile="off", seed=arguments.seed))
    if arguments.memory is not None:
        return 0 if check_memory(compute, arguments.memory) else 1
    facts = device_facts(compute)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    speeds = matmul_speeds(compute, arguments.dtypes)
    print("matmul TFLOP/s: " + ", ".join(f"{name} {show(speed, '.3g')}" for name, speed in speeds.items()))
    attention = {name: attention_backends(compute, name, arguments.sequence_len) for name in arguments.dtypes}
    rows = [["attention ms", *next(iter(attention.values()))]]
    rows += [[name, *(show(ms, ".2f") for ms in times.values())] for name, times in attention.items()]
    print(table(rows))
    text = demo_bytes(compute.device)
    batch_rows = find_rows(arguments, compute, text)
    print(f"\nd{arguments.depth}, {arguments.steps} steps of {batch_rows} sequences × {arguments.sequence_len} bytes")
    runs = {name: train(arguments, compute, text, name, batch_rows, speeds[name]) for name in arguments.dtypes}
    print(curves(runs, arguments.steps) + "\n\n" + summary(runs))
    words, same = verdict(runs)
    print(words)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    record = {"settings": settings, "rows": batch_rows, **facts, "matmul_tflops": speeds, "attention_ms": attention}
    arguments.out.write_text(json.dumps(record | {"runs": runs, "same_loss": same}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")
    if compute.device_type == "cuda":
        keep = ("device", "capability", "memory_gib", "torch", "cuda")
        card = {name: facts[name] for name in keep} | {"date": f"{date.today()}", "matmul_tflops": speeds}
        print(f"for dev/cards/, and the planner of everybody who has this card:\n{json.dumps(card)}")
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
