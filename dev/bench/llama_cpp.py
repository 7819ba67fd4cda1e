"""Compare decoding with llama.cpp on the same machine, weights and prompts, in turns.

    python -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python     (it compiles llama.cpp for this processor)
    python -m dev.bench.llama_cpp --python ~/llama/bin/python --depth 12 --vocab_size 32768

A model of random weights that is exact as a GGUF file (recipe `portable`) is decoded greedily by this project's server
engine, with each kind of weights, and by llama.cpp from `export_gguf`'s file of the same kind; each in a process of its
own. What is printed for each number of requests: tokens per second (the median of the rounds), the ratio, and the share
of the memory's speed that this project reaches: a step reads every matrix once, and the speed is that at which torch
sums as many bytes. llama.cpp reads a quarter more, since the file's MLPs have one matrix more (see interop/qwen3.py).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from dev.bench.infer_bench import ROOT, Contestant, random_model, worker_command
from dev.bench.infer_bench_worker import make_prompts
from nanochat.config import run_script
from nanochat.files import write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.gguf_file import GGUFCard, write_gguf
from nanochat.interop.qwen3 import fold
from nanochat.recipe import PRESETS
from nanochat.tokenizer import RUNTIMES_PATTERN, RustBPETokenizer

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
FILES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison."""

    python: Path = Path(sys.executable)
    """A Python that has llama-cpp-python."""
    depth: int = 4
    """Depth of the model."""
    vocab_size: int = 4096
    """Its vocabulary."""
    weights: tuple[Literal["float32", "bfloat16", "int8"], ...] = ("bfloat16", "int8")
    """Kinds of weights; llama.cpp gets f32, bf16 and q8_0."""
    requests: tuple[int, ...] = (1, 8)
    """Numbers of simultaneous requests."""
    prompt_tokens: int = 32
    """Length of the prompts."""
    new_tokens: int = 64
    """Length of the answers."""
    repeats: int = 3
    """Rounds, after one for warm-up."""
    threads: int = 2
    """Threads of each."""
    folder: Path | None = None
    """Keep the model's files here, and use those that are there; default: a temporary folder."""

    def __post_init__(self) -> None:
        if not self.weights or not self.requests or min(self.requests) < 1 or self.repeats < 1 or self.new_tokens < 2:
            raise ValueError("--weights and --requests need a value, --repeats 1 or more, --new_tokens 2 or more")


def any_tokenizer(vocab_size: int) -> RustBPETokenizer:
    """A tokenizer of this size, of words that mean nothing: only numbers are decoded here."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(ord("a"), ord("z") + 1, (max(4000, 2 * vocab_size), 6), generator=generator)
    words = [" " + "".join(map(chr, row)) for row in letters.tolist()]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(words), vocab_size, RUNTIMES_PATTERN)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"--vocab_size={vocab_size} is larger than the words' vocabulary: choose a smaller one")
    return tokenizer


def bytes_per_second(count: int) -> float:
    """The speed at which torch sums `count` bytes, the best of some tries."""
    numbers = torch.ones(count // 4)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return count / best


def write_files(cfg: Config, folder: Path) -> dict[str, Any]:
    """Write the model in all forms, unless they are there; return its config."""
    about = folder / "config.json"
    wanted = [folder / "model.safetensors", *(folder / f"{weights}.gguf" for weights in cfg.weights)]
    if not about.exists() or not all(path.exists() for path in wanted):
        settings = {k: v for k, v in PRESETS["portable"].switches.items() if k != "init"}
        model = random_model(cfg.depth, cfg.vocab_size, cfg.prompt_tokens + cfg.new_tokens, **settings)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, wanted[0])
        tokenizer, (config, state) = any_tokenizer(cfg.vocab_size), fold(model)
        card = GGUFCard.of("bench", model, "base", "mit")
        for weights, path in zip(cfg.weights, wanted[1:], strict=True):
            write_gguf(path, config, state, tokenizer, card, FILES[weights])
        write_json(about, model.config.to_dict())
    found: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    asked = {"n_layer": cfg.depth, "vocab_size": cfg.vocab_size, "sequence_len": cfg.prompt_tokens + cfg.new_tokens}
    if any(found[name] != value for name, value in asked.items()):
        raise ValueError(f"--folder={folder} holds another model or context: choose another folder")
    return found


def start(cfg: Config, folder: Path) -> tuple[list[Contestant], int]:
    """Start the contestants, ours and llama.cpp's in turns; return also the size of the model's matrices."""
    config = write_files(cfg, folder)
    contestants = []
    most = {"slots": max(cfg.requests), "threads": cfg.threads, "positions": config["sequence_len"]}
    for weights in cfg.weights:
        # A run in bfloat16 decodes so by itself; 8 bits are what a user asks for beside a run in float32.
        dtype, form = ("bfloat16", "auto") if weights == "bfloat16" else ("float32", weights.replace("float32", "auto"))
        ours = most | {"device": "cpu", "dtype": dtype, "weights": form}
        contestants.append(Contestant(f"ours {weights}", worker_command("ours", folder, ours), ROOT))
        command = [str(cfg.python), str(WORKER), str(folder / f"{weights}.gguf"), json.dumps(most)]
        contestants.append(Contestant(f"llama.cpp {FILES[weights]}", command, ROOT))
    with torch.device("meta"):
        return contestants, GPT(GPTConfig(**config)).num_matmul_params()


def compare(cfg: Config, contestants: list[Contestant], parameters: int) -> list[dict[str, Any]]:
    """Measure in turns; a row for each kind of weights and number of requests."""
    rows = []
    for requests in cfg.requests:
        speeds: dict[str, list[float]] = {c.name: [] for c in contestants}
        tokens: dict[str, list[int]] = {}
        for repeat in range(cfg.repeats + 1):
            task = {"requests": requests, "prompt_tokens": cfg.prompt_tokens, "new_tokens": cfg.new_tokens}
            task |= {"seed": 1000 * requests + repeat}
            prompts = make_prompts(task, cfg.vocab_size)
            for contestant in contestants:
                result = contestant.measure(task | {"prompts": prompts})
                tokens[contestant.name] = result["tokens"]
                if repeat > 0:
                    speeds[contestant.name].append(result["decode_tokens_per_second"])
        for weights, (ours, theirs) in zip(cfg.weights, zip(*[iter(contestants)] * 2, strict=True), strict=True):
            mine, other = (statistics.median(speeds[c.name]) for c in (ours, theirs))
            pairs = zip(tokens[ours.name], tokens[theirs.name], strict=True)
            row = {"weights": weights, "requests": requests, "ours": mine, "llama.cpp": other, "ratio": mine / other}
            row["read"] = mine / requests * parameters * BYTES[weights]  # bytes a second
            row["share"] = row["read"] / bytes_per_second(parameters * BYTES[weights])
            row["same_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), cfg.new_tokens)
            rows.append(row)
            print(
                f"{weights:9}{requests:3} requests: ours {mine:8.1f} tokens/s, llama.cpp {other:8.1f}, "
                f"{row['ratio']:.2f} x; {row['read'] / 1e9:.1f} GB/s, {row['share']:.0%} of the memory's speed; "
                f"the first {row['same_tokens']} tokens are the same",
                flush=True,
            )
    return rows


def main(cfg: Config) -> None:
    """Measure and print; the last line is JSON."""
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as name:
        contestants, parameters = start(cfg, cfg.folder or Path(name))
        try:
            rows = compare(cfg, contestants, parameters)
        finally:
            for contestant in contestants:
                contestant.close()
    print(json.dumps({"depth": cfg.depth, "vocab_size": cfg.vocab_size, "parameters": parameters, "results": rows}))


if __name__ == "__main__":
    run_script(main, Config)
