"""Measure how fast a model answers: time to the first token, tokens per second at 1, 8 and 32 requests, memory.

python -m scripts.infer_bench                                        the newest chat model
python -m scripts.infer_bench --depth 12 --vocab_size 32768          random weights of this shape
python -m scripts.infer_bench --nanochat_path ~/nanochat             compared with another checkout's engine

Every contestant (this project with each kind of weights, transformers if installed, another nanochat checkout if named)
has the same weights and prompts and runs in a process of its own. They take turns, so that other work on the machine
affects all of them. transformers knows only the classic model and is left out for others; a nanochat checkout of 2025
knows only that model too and must not be named for others. Figures are medians over the repeats. The last line of the
output is one JSON document with all of them.

Decoding reads every weight for each token, so at one request the memory bandwidth decides. Another nanochat's engine
continues only one prompt: its 8 and 32 requests are samples of the same prompt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import save_file

from nanochat.checkpoint_manager import load_model
from nanochat.common import setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.files import write_json
from nanochat.generate.fast_decode import Weights
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.hf_format import is_classic

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("infer_bench_worker.py")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the benchmark."""

    runtime: Runtime = field(default_factory=Runtime)
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """Stage of the model."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    depth: int | None = None
    """Measure a model of this depth with random weights instead of a checkpoint."""
    vocab_size: int = 32768
    """Its vocabulary."""
    sequence_len: int = 2048
    """Its context."""
    weights: tuple[Weights, ...] = ("auto",)
    """Forms of the weights that this project decodes with; each is measured."""
    requests: tuple[int, ...] = (1, 8, 32)
    """Numbers of simultaneous requests."""
    prompt_tokens: int = 32
    """Length of the prompts."""
    new_tokens: int = 128
    """Length of the answers."""
    repeats: int = 3
    """Measurements of each, after one for warm-up; the median is taken."""
    threads: int = 0
    """Threads of each contestant on a CPU; 0: torch's choice."""
    nanochat_path: Path | None = None
    """A checkout of nanochat to compare with."""
    transformers: bool = True
    """Compare with transformers' generate, if it is installed."""

    def __post_init__(self) -> None:
        if not self.weights or not self.requests or min(self.requests) < 1:
            raise ValueError("--weights and --requests need at least one value, requests of 1 or more")
        if self.prompt_tokens < 1 or self.new_tokens < 2 or self.repeats < 1:
            raise ValueError("--prompt_tokens and --repeats must be at least 1, --new_tokens at least 2")
        if self.nanochat_path is not None and not (self.nanochat_path / "nanochat" / "engine.py").exists():
            raise ValueError(f"--nanochat_path: no nanochat/engine.py in {self.nanochat_path}")


class Contestant:
    """A process that runs the model in its own way."""

    def __init__(self, name: str, command: list[str], path: Path) -> None:
        self.name = name
        # The named checkout's `nanochat` comes first; ours follows for other packages that it may import (rustbpe).
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=path
        )

    def measure(self, task: dict[str, int]) -> dict[str, Any]:
        """Run one task."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name} failed: its error is above")
        result: dict[str, Any] = json.loads(line)
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def worker_command(kind: str, folder: Path, settings: dict[str, Any]) -> list[str]:
    """What starts a contestant of infer_bench_worker.py."""
    return [sys.executable, str(WORKER), kind, str(folder), json.dumps(settings)]


def random_model(depth: int, vocab_size: int, sequence_len: int, **settings: Any) -> GPT:
    """A model whose weights are all random, including those that start at zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(depth, vocab_size, sequence_len, **settings))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.count_nonzero() == 0:
                p.normal_(0.0, 0.02)
    return model


def start_all(cfg: Config, folder: Path, device: str, dtype: str, classic: bool) -> list[Contestant]:
    """Start all contestants, this project's first; transformers only if it knows the model."""
    settings = {"device": device, "dtype": dtype, "threads": cfg.threads, "slots": max(cfg.requests)}
    made = []
    for weights in cfg.weights:
        name = f"ours {dtype}" if weights == "auto" else f"ours {weights}"
        made.append(Contestant(name, worker_command("ours", folder, settings | {"weights": weights}), ROOT))
    if cfg.nanochat_path is not None:
        made.append(Contestant("nanochat", worker_command("nanochat", folder, settings), cfg.nanochat_path.resolve()))
    if cfg.transformers and not classic:
        print("without transformers: it does not know models with switches")
    elif cfg.transformers and importlib.util.find_spec("transformers") is not None:
        made.append(Contestant("transformers", worker_command("transformers", folder, settings), ROOT))
    return made


def compare(cfg: Config, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """Medians of every contestant at every number of requests; they take turns."""
    rows = []
    for requests in cfg.requests:
        results: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contestants}
        for repeat in range(cfg.repeats + 1):
            task = {"requests": requests, "prompt_tokens": cfg.prompt_tokens, "new_tokens": cfg.new_tokens}
            for contestant in contestants:
                # Another prompt every time, because this project would find a known one in its cache.
                result = contestant.measure(task | {"seed": 1000 * requests + repeat})
                if repeat > 0:
                    results[contestant.name].append(result)
        first = [r["tokens"] for r in results[contestants[0].name]]
        for name, measured in results.items():
            row: dict[str, Any] = {"name": name, "requests": requests}
            for key in ("ttft_seconds", "decode_tokens_per_second", "tokens_per_second", "memory_bytes"):
                row[key] = statistics.median(r[key] for r in measured)
            row["same_tokens"] = [r["tokens"] for r in measured] == first
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table; the last column is the decoding speed relative to the first contestant."""
    print(f"{'':20}{'requests':>9}{'first token':>13}{'decode tok/s':>14}{'all tok/s':>11}{'memory':>10}  vs first")
    for row in rows:
        base = next(r for r in rows if r["requests"] == row["requests"])
        ratio = row["decode_tokens_per_second"] / base["decode_tokens_per_second"]
        same = "" if row["same_tokens"] else "  (other tokens)"
        print(
            f"{row['name']:20}{row['requests']:9}{row['ttft_seconds'] * 1000:10.1f} ms"
            f"{row['decode_tokens_per_second']:14.1f}{row['tokens_per_second']:11.1f}"
            f"{row['memory_bytes'] / 2**20:6.0f} MiB{ratio:8.2f}x{same}"
        )


def show_ratios(rows: list[dict[str, Any]]) -> None:
    """Print the ratios of this project's decoding speed to that of each other engine."""
    for row in rows:
        others = [o for o in rows if o["requests"] == row["requests"] and not o["name"].startswith("ours ")]
        if row["name"].startswith("ours ") and others:
            key = "decode_tokens_per_second"
            ratios = ", ".join(f"{row[key] / o[key]:.2f} x {o['name']}" for o in others)
            print(f"requests {row['requests']}, {row['name']}: {ratios}")


def main(cfg: Config) -> None:
    """Measure and print."""
    with setup_compute(cfg.runtime) as compute, tempfile.TemporaryDirectory() as name:
        if cfg.depth is not None:
            model = random_model(cfg.depth, cfg.vocab_size, cfg.sequence_len)
        else:
            model, _, _ = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag, cfg.step)
        if cfg.prompt_tokens + cfg.new_tokens > model.config.sequence_len:
            raise ValueError(
                f"--prompt_tokens plus --new_tokens must fit into the model's context of {model.config.sequence_len}"
            )
        folder, dtype = Path(name), compute.precision.name
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        write_json(folder / "config.json", model.config.to_dict())
        params = model.num_params()
        threads = cfg.threads or torch.get_num_threads()
        print(f"{params / 1e6:.1f}M parameters, {dtype}, {compute.device}, {threads} threads")
        classic = is_classic(model.config)
        del model
        contestants = start_all(cfg, folder, compute.device.type, dtype, classic)
        try:
            rows = compare(cfg, contestants)
        finally:
            for contestant in contestants:
                contestant.close()
    show(rows)
    show_ratios(rows)
    print(json.dumps({"parameters": params, "dtype": dtype, "device": str(compute.device), "results": rows}))


if __name__ == "__main__":
    run_script(main, Config)
