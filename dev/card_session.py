"""The parts of dev/card_session.sh. Each is a process of its own with a time limit; one that fails costs no other.

dtypes    one model trained in float32, float16 and bfloat16: the final losses agree within 1 %
compile   a forward and backward pass, eager and compiled
steps     time and memory of real steps of d8, d12 and d16 at two micro-batches, measured against planned
loss      the chunked loss against the plain one: value, gradient, time, memory
memory    the largest models of a 16 GB card train within a cap of 16 GB
decode    tokens/s of answers, one and eight at once, by recorded steps (CUDA graphs) and without
scaling   float16 from a loss scale of 2^24: it falls to one that holds, and no step is lost for good
halfgemm  the float16 accumulation of ops/fp16_gemm.py: accurate and faster, or refused with the reason
resume    a run that is killed and resumed gives the same weights bit for bit (deterministic mode)
ddp       one process under torchrun gives the losses of a run without it
peer      a step of ours against the peer's, bfloat16 compiled and float16 eager
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "dev"), str(ROOT / "dev" / "bench")]

import gpu_check  # noqa: E402
from infer_bench_worker import PlainTokenizer  # noqa: E402

from nanochat.cards import find_card  # noqa: E402
from nanochat.common import Compute, setup_compute  # noqa: E402
from nanochat.config import Runtime  # noqa: E402
from nanochat.engine import Engine  # noqa: E402
from nanochat.gpt import GPT, GPTConfig  # noqa: E402
from nanochat.ops.fp16_gemm import MAX_ERROR, CublasHalfGemm, check_half_gemm, layer_shapes  # noqa: E402
from nanochat.ops.loss import linear_cross_entropy  # noqa: E402
from nanochat.optim import MuonAdamW  # noqa: E402
from nanochat.plan.memory import GB, MicroBatch, StepSetup, estimate_training_memory  # noqa: E402
from nanochat.plan.roofline import CardRoofline, tokens_per_second  # noqa: E402
from nanochat.precision import DTYPES  # noqa: E402
from nanochat.recipe import PRESETS, parameter_groups  # noqa: E402

Result = dict[str, Any]
RATES = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.0}
# Seconds that each part may take; together eight minutes.
LIMITS = {
    "dtypes": 80,
    "compile": 60,
    "steps": 90,
    "loss": 20,
    "memory": 60,
    "decode": 30,
    "scaling": 20,
    "halfgemm": 15,
    "resume": 40,
    "ddp": 25,
    "peer": 40,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with argparse: nothing but torch, numpy, transformers, safetensors and pyarrow may be needed."""
    parser = argparse.ArgumentParser(description="everything worth knowing about one card, in eight minutes")
    parser.add_argument("--device_type", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal without a card")
    parser.add_argument("--out", type=Path, default=Path("card_session.json"), help="the JSON (default: %(default)s)")
    parser.add_argument("--peer", type=Path, help="a checkout of nanochat to compare with")
    parser.add_argument("--parts", default=",".join(LIMITS), help="comma-separated (default: all)")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # the one part that this process is
    parser.add_argument("--steps", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.parts.split(",") if name not in LIMITS]:
        parser.error(f"--parts: unknown {', '.join(unknown)}; choose from {', '.join(LIMITS)}")
    if arguments.device_type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA card here: --device_type=cpu --tiny rehearses")
    return arguments


# --- what the parts share --------------------------------------------------------------------------------------------


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sizes of the models here."""
    if arguments.tiny:
        return {"depth": 1, "vocab": 512, "T": 64, "rows": (1, 2), "depths": (1, 2), "steps": 6, "tokens": 8}
    return {"depth": 12, "vocab": 65536, "T": 2048, "rows": (1, 4), "depths": (8, 12, 16), "steps": 60, "tokens": 256}


def compute_of(arguments: argparse.Namespace, dtype: str = "auto", deterministic: bool = False) -> Compute:
    """The device in a precision."""
    settings = {"device_type": arguments.device_type, "dtype": dtype, "deterministic": deterministic}
    return setup_compute(Runtime(compile="off", **settings))  # type: ignore[arg-type]


def make(compute: Compute, config: GPTConfig, recipe: str = "classic") -> tuple[GPT, MuonAdamW]:
    """A model and its optimizer, as training has them."""
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    model.to(compute.device).train()
    optimizer = MuonAdamW(parameter_groups(model, **RATES, preset=PRESETS[recipe]))
    model.set_product_dtype(compute.precision.product_dtype)
    optimizer.set_product_dtype(compute.precision.muon_dtype)
    return model, optimizer


def step(compute: Compute, model: GPT, optimizer: MuonAdamW, tokens: torch.Tensor) -> float:
    """One update on tokens (B, T + 1); the loss."""
    retry = True
    while retry:
        with compute.precision.training():
            with compute.precision.autocast():
                loss = model(tokens[:, :-1], tokens[:, 1:].contiguous())
            compute.precision.backward(loss)
            retry = compute.precision.step([optimizer], 1.0, loss).retry
        optimizer.zero_grad()
    return float(loss.detach())


def batch(compute: Compute, vocab: int, rows: int, T: int, seed: int = 0) -> torch.Tensor:
    """(rows, T + 1) random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (rows, T + 1), generator=generator).to(compute.device)


def seconds_of(compute: Compute, work: Callable[[], Any], times: int = 3) -> float:
    """The median of the seconds that `work` takes, after one call that is not counted."""
    work()
    taken = []
    for _ in range(times):
        compute.synchronize()
        start = time.perf_counter()
        work()
        compute.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


# --- the parts -------------------------------------------------------------------------------------------------------


def part_dtypes(arguments: argparse.Namespace, folder: Path, *more: str) -> Result:
    """dev/gpu_check.py, whose JSON is the result."""
    out = folder / "gpu_check.json"
    size = ["--depth=1", "--steps=8", "--sequence_len=64", "--rows=2"] if arguments.tiny else ["--steps=60", "--rows=4"]
    with contextlib.redirect_stdout(sys.stderr):
        gpu_check.main([f"--device_type={arguments.device_type}", f"--out={out}", *size, *more])
    found = json.loads(out.read_text(encoding="utf-8"))
    for run in found["runs"].values():
        run["losses"] = run["losses"][:: max(1, len(run["losses"]) // 10)]
    keep = ("device", "capability", "memory_gib", "cuda", "torch", "matmul_tflops", "attention_ms", "runs", "same_loss")
    return {"ok": found["same_loss"]} | {name: found[name] for name in keep if name in found}


def part_compile(arguments: argparse.Namespace, folder: Path) -> Result:
    """The same with torch.compile, in the dtype of auto."""
    dtype = compute_of(arguments).precision.name
    found = part_dtypes(arguments, folder, "--compile", f"--dtypes={dtype}")
    times = found["runs"][dtype]["pass_ms"]
    ratio = times["eager"] / times["compiled"] if isinstance(times["compiled"], float) else None
    return {"ok": ratio is not None or found.get("capability", "9.0") < "7.0", "pass_ms": times, "speedup": ratio}


def part_steps(arguments: argparse.Namespace, folder: Path) -> Result:
    """Real steps against the planner: seconds and memory."""
    compute, size = compute_of(arguments), sizes(arguments)
    dtype = compute.precision.name
    card = find_card(torch.cuda.get_device_name()) if compute.device_type == "cuda" else None
    rows = []
    for depth in size["depths"]:
        for micro_rows in size["rows"]:
            config = GPTConfig.from_depth(depth, size["vocab"], size["T"], **PRESETS["small"].switches)
            planned = estimate_training_memory(
                config, MicroBatch(micro_rows), size["T"], StepSetup(DTYPES[dtype], compute.device_type)
            )
            row: Result = {"depth": depth, "rows": micro_rows, "vocab_size": size["vocab"], "sequence_len": size["T"]}
            row |= {"recipe": "small", "dtype": dtype, "planned_gib": planned.total / GB}
            if card is not None:
                speed = tokens_per_second(CardRoofline(card), config, micro_rows, size["T"], 1, dtype, PRESETS["small"])
                row["planned_seconds"] = micro_rows * size["T"] / speed
            gpu_check.forget(compute)
            try:
                model, optimizer = make(compute, config, "small")
                tokens = batch(compute, size["vocab"], micro_rows, size["T"])
                row["seconds"] = seconds_of(compute, lambda m=model, o=optimizer, t=tokens: step(compute, m, o, t))
                if compute.device_type == "cuda":
                    row["gib"] = torch.cuda.max_memory_allocated() / GB
                    row["memory_error"] = row["planned_gib"] / row["gib"] - 1
                if "planned_seconds" in row:
                    row["time_error"] = row["planned_seconds"] / row["seconds"] - 1
                model = optimizer = None  # type: ignore[assignment]
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            rows.append(row)
    errors = [abs(row[name]) for row in rows for name in ("time_error", "memory_error") if name in row]
    return {
        "ok": all(error <= 0.15 for error in errors),
        "dtype": dtype,
        "largest_error": max(errors, default=None),
        "rows": rows,
    }


def part_loss(arguments: argparse.Namespace, folder: Path) -> Result:
    """The chunked loss and torch's own, value and gradients."""
    compute, size = compute_of(arguments, "float32"), sizes(arguments)
    n, channels, vocab = 16 * size["T"] // 2, 64 * size["depth"], size["vocab"]
    x = torch.randn(n, channels, device=compute.device, requires_grad=True)
    weight = (torch.randn(vocab, channels, device=compute.device) / channels**0.5).requires_grad_()
    targets = torch.randint(0, vocab, (n,), device=compute.device)

    def plain() -> torch.Tensor:
        logits = 15.0 * torch.tanh((x @ weight.T) / 15.0)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    def chunked() -> torch.Tensor:
        return linear_cross_entropy(x, weight, targets, vocab, 15.0, reduction="sum")

    found: Result = {}
    gradients = {}
    for name, loss in (("plain", plain), ("chunked", chunked)):
        gpu_check.forget(compute)
        x.grad = weight.grad = None
        value = loss()
        value.backward()
        assert x.grad is not None
        gradients[name] = x.grad.clone()
        found[name] = {"value": float(value.detach()) / n}
        found[name]["seconds"] = seconds_of(compute, lambda f=loss: f().backward())
        if compute.device_type == "cuda":
            found[name]["gib"] = torch.cuda.max_memory_allocated() / GB
    error = (gradients["plain"] - gradients["chunked"]).norm() / gradients["plain"].norm()
    difference = abs(found["plain"]["value"] - found["chunked"]["value"])
    return {"ok": float(error) < 1e-3 and difference < 1e-3, "gradient_error": float(error)} | found


def part_memory(arguments: argparse.Namespace, folder: Path) -> Result:
    """The models of gpu_check --memory, within 16 GB of whatever the card has."""
    if arguments.device_type != "cuda":
        return {"ok": True, "skipped": "a cap on memory needs a card"}
    compute = compute_of(arguments)
    total = torch.cuda.get_device_properties(0).total_memory / GB
    with contextlib.redirect_stdout(sys.stderr):
        fits = gpu_check.check_memory(compute, min(15.8, total))
    return {"ok": fits, "cap_gib": min(15.8, total)}


def part_decode(arguments: argparse.Namespace, folder: Path) -> Result:
    """Greedy answers: the same alone and together, with recorded steps (CUDA graphs) and without; and their speed."""
    compute, size = compute_of(arguments), sizes(arguments)
    model, _ = make(compute, GPTConfig.from_depth(size["depth"], size["vocab"], size["T"]))
    with torch.no_grad():  # it begins with zeros, and then every token is as likely as any other
        model.lm_head.weight.normal_(0.0, 0.05, generator=torch.Generator(compute.device).manual_seed(1))
    engine = Engine(model.eval(), PlainTokenizer(), compute.precision)  # type: ignore[arg-type]
    prompt, count = [1, 2, 3, 4], size["tokens"]
    found: Result = {}
    answers = {}
    decoder = engine._decoder
    graphs = decoder.graphs if decoder is not None else None
    for name, recorded in (("", graphs), ("_eager", None)) if graphs is not None else (("_eager", None),):
        if decoder is not None:
            decoder.graphs = recorded
        for rows in (1, 8):
            taken = seconds_of(
                compute,
                lambda key=(name, rows): answers.__setitem__(
                    key, engine.generate_batch(prompt, key[1], count, temperature=0.0)[0]
                ),
                times=2,
            )
            found[f"tokens_per_second_{rows}{name}"] = rows * count / taken
    if graphs is not None:
        found["graphs"] = graphs.why_off or "on"
    same = all(row == answers[name, 1][0] for (name, rows), found_rows in answers.items() for row in found_rows)
    return {"ok": same and (graphs is None or not graphs.why_off)} | found


def part_scaling(arguments: argparse.Namespace, folder: Path) -> Result:
    """float16 with a loss scale that is far too high at first."""
    compute, size = compute_of(arguments, "float16"), sizes(arguments)
    model, optimizer = make(compute, GPTConfig.from_depth(size["depth"], size["vocab"], size["T"]))
    compute.precision.plan_steps(size["steps"])
    compute.precision.scaler.load_state_dict(compute.precision.scaler.state_dict() | {"scale": 2.0**24})
    tokens = batch(compute, size["vocab"], 2, size["T"])
    losses = [step(compute, model, optimizer, tokens) for _ in range(12)]
    scale = compute.precision.scaler.get_scale()
    return {
        "ok": all(map(math.isfinite, losses)) and losses[-1] < losses[0],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "scale": f"2^{math.log2(scale):.0f}",
        "skipped": compute.precision.skipped,
    }


def part_halfgemm(arguments: argparse.Namespace, folder: Path) -> Result:
    """The arithmetic of the products that are accumulated in float16. Only a P100 gains speed by them."""
    if arguments.device_type != "cuda":
        return {"ok": True, "skipped": "cuBLAS needs a card"}
    compute = compute_of(arguments, "float16")
    verdict = check_half_gemm(CublasHalfGemm(), layer_shapes(64 if arguments.tiny else 768, 2048), compute.device)
    return {"ok": verdict.error <= MAX_ERROR, "error_of_products": verdict.error, "speedup": verdict.speedup}


def training_command(arguments: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    """A process that trains `steps` in deterministic mode, saving after each and going on from what it finds."""
    command = [sys.executable, __file__, "--work=train", f"--steps={steps}", f"--device_type={arguments.device_type}"]
    return [*command, f"--out={folder / 'state.pt'}", *(["--tiny"] if arguments.tiny else [])]


def work_train(arguments: argparse.Namespace) -> None:
    """The process of `training_command`. Prints one line per step."""
    compute = compute_of(arguments, deterministic=True)
    vocab = 512
    model, optimizer = make(compute, GPTConfig.from_depth(2, vocab, 128))
    done, losses = 0, []
    if arguments.out.exists():
        state = torch.load(arguments.out, map_location=compute.device, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        compute.precision.scaler.load_state_dict(state["scaler"])
        done, losses = state["done"], state["losses"]
    for number in range(done, arguments.steps):
        losses.append(step(compute, model, optimizer, batch(compute, vocab, 4, 128, seed=number)))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": number + 1, "losses": losses}
        partial = arguments.out.with_suffix(".part")
        torch.save(state | {"scaler": compute.precision.scaler.state_dict()}, partial)
        os.replace(partial, arguments.out)
        print(number, losses[-1], flush=True)


def same_bits(one: Path, other: Path) -> bool:
    """True if two runs ended with the same losses and weights."""
    a, b = (torch.load(path, map_location="cpu", weights_only=False) for path in (one, other))
    weights = all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    return bool(weights and a["losses"] == b["losses"])


def part_resume(arguments: argparse.Namespace, folder: Path) -> Result:
    """One run to its end, and one that is killed after some steps and started again."""
    steps = 8
    whole, killed = folder / "whole", folder / "killed"
    for path in (whole, killed):
        path.mkdir()
    subprocess.run(training_command(arguments, whole, steps), check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(training_command(arguments, killed, steps), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    subprocess.run(training_command(arguments, killed, steps), check=True, stdout=subprocess.DEVNULL)
    return {"ok": same_bits(whole / "state.pt", killed / "state.pt")}


def part_ddp(arguments: argparse.Namespace, folder: Path) -> Result:
    """One process under torchrun, and one without."""
    alone, ranked = folder / "alone", folder / "ranked"
    for path in (alone, ranked):
        path.mkdir()
    subprocess.run(training_command(arguments, alone, 4), check=True, stdout=subprocess.DEVNULL)
    command = training_command(arguments, ranked, 4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    subprocess.run([*torchrun, *command[1:]], check=True, stdout=subprocess.DEVNULL)
    return {"ok": same_bits(alone / "state.pt", ranked / "state.pt")}


def part_peer(arguments: argparse.Namespace, folder: Path) -> Result:
    """dev/bench/train_step.py against a checkout of nanochat."""
    if arguments.peer is None:
        return {"ok": True, "skipped": "no --peer"}
    size = sizes(arguments)
    command = [sys.executable, str(ROOT / "dev" / "bench" / "train_step.py"), f"--peer={arguments.peer}"]
    command += [f"--depth={size['depth']}", f"--vocab_size={size['vocab']}", f"--sequence_len={size['T']}"]
    command += [f"--rows={size['rows'][1]}", "--rounds=2", "--steps=2", f"--device={arguments.device_type}"]
    modes = {"bfloat16": ("compiled", "on", 1.0), "float16": ("eager", "off", 1.2)}
    found: Result = {"ok": True}
    for mode, (peer_mode, compiled, aim) in modes.items():
        run = [*command, f"--modes={mode}", f"--peer_modes={peer_mode}", f"--compile={compiled}"]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        if done.returncode:
            found[mode] = {"error": done.stderr.strip().splitlines()[-1:]}
            found["ok"] = False
            continue
        ratio = json.loads(done.stdout.splitlines()[-1])[f"ours:{mode}"]["ratio"]
        found[mode] = {"ratio": ratio, "aim": aim}
        found["ok"] = found["ok"] and ratio >= aim
    return found


# --- one after the other ---------------------------------------------------------------------------------------------


def run_part(arguments: argparse.Namespace, name: str) -> Result:
    """A part in a process of its own: its result, with its seconds; a failure or the limit become an error."""
    start = time.monotonic()
    limit = LIMITS[name] * (10 if arguments.tiny else 1)  # a rehearsal may run on a busy machine
    command = [sys.executable, __file__, f"--work={name}", f"--device_type={arguments.device_type}"]
    command += ["--tiny"] if arguments.tiny else []
    command += [f"--peer={arguments.peer}"] if arguments.peer else []
    # A session of its own: what the part has started goes with it when its time is over.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, errors = process.communicate(timeout=limit)
        lines = said.strip().splitlines()
        result: Result = json.loads(lines[-1]) if process.returncode == 0 and lines else {}
        if not result:
            result = {"ok": False, "error": (errors.strip().splitlines() or ["no output"])[-1]}
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        result = {"ok": False, "error": f"not done in {limit} s"}
    return result | {"wall_seconds": round(time.monotonic() - start, 1)}


def card_record(parts: Result) -> Result | None:
    """What dev/cards/ keeps of a session (nanochat/plan/measured.py); None without the part dtypes."""
    facts = parts.get("dtypes", {})
    if "matmul_tflops" not in facts:
        return None
    names = ("depth", "rows", "vocab_size", "sequence_len", "recipe", "dtype", "seconds", "gib")
    steps = [
        {n: row[n] for n in names if n in row} for row in parts.get("steps", {}).get("rows", []) if "seconds" in row
    ]
    keep = ("device", "capability", "memory_gib", "torch", "cuda", "matmul_tflops")
    return {name: facts[name] for name in keep if name in facts} | {"date": f"{date.today()}", "steps": steps}


def short(result: Result) -> str:
    """The numbers of a result in one cell."""
    words = []
    for name, value in result.items():
        if isinstance(value, float) and name != "wall_seconds":
            words.append(f"{name} {value:.4g}")
        elif isinstance(value, str):
            words.append(f"{name} {value}")
    return "; ".join(words)[:110]


def main(argv: list[str] | None = None) -> int:
    """Run the parts, print the table, write the JSON after each part; returns 0 if all are well."""
    arguments = parse_arguments(argv)
    if arguments.work == "train":
        work_train(arguments)
        return 0
    if arguments.work:
        with tempfile.TemporaryDirectory() as folder:
            result = globals()[f"part_{arguments.work}"](arguments, Path(folder))
        print(json.dumps(result), flush=True)
        return 0
    record: Result = {
        "torch": torch.__version__,
        "device_type": arguments.device_type,
        "tiny": arguments.tiny,
        "parts": {},
    }
    if arguments.device_type == "cuda":
        record["device"] = torch.cuda.get_device_name()
    names = arguments.parts.split(",")
    minutes = sum(LIMITS[name] for name in names) / 60
    print(f"{len(names)} parts, planned for at most {minutes:.1f} minutes on a card", flush=True)
    for name in names:
        result = record["parts"][name] = run_part(arguments, name)
        state, seconds = "ok" if result["ok"] else "FAILED", result["wall_seconds"]
        print(f"{state:7}{name:10}{seconds:6.1f} s  {result.get('error') or short(result)}", flush=True)
        # After each part: what there is comes home even if the session is cut off.
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.device_type == "cuda" and (own := card_record(record["parts"])) is not None:
        print(f"\nfor dev/cards/, and the planner of everybody who has this card:\n{json.dumps(own)}")
    print(f"wrote {arguments.out}")
    return 0 if all(result["ok"] for result in record["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
