"""Compare decoding with llama.cpp on the same machine, weights and prompts, in turns.

    python -m venv ~/llama && ~/llama/bin/pip install llama-cpp-python     (it compiles llama.cpp for this processor)
    python dev/bench/llama_cpp.py --python ~/llama/bin/python --depth 12 --vocab_size 32768

A model of random weights that is exact as a GGUF file (recipe `portable`) is decoded greedily by this project's server
engine, with each kind of weights, and by llama.cpp from `export_gguf`'s file of the same kind; each in a process of its
own. What is printed for each number of requests: tokens per second (the median of the rounds), the ratio, how much of
our time passes outside the step in Rust, and how fast the step reads the weights, each matrix once. If they do not stay
in the processor's cache, also the share of the speed at which torch sums 512 MB. llama.cpp reads a quarter more, since
the file's MLPs have one matrix more (see interop/qwen3.py).

One thread each by default, which is fair on a machine that others use too: llama.cpp's threads wait for each other by
spinning, and with two of them beside another program its speed falls to a fraction.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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
FILES = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5 + 2 / 32}  # 4 bits have a scale for each 32


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison."""

    python: Path = Path(sys.executable)
    """A Python that has llama-cpp-python."""
    depth: int = 4
    """Depth of the model."""
    vocab_size: int = 4096
    """Its vocabulary."""
    weights: tuple[Literal["float32", "bfloat16", "int8", "int4"], ...] = ("bfloat16", "int8", "int4")
    """Kinds of weights; llama.cpp gets f32, bf16, q8_0 and q4_0."""
    requests: tuple[int, ...] = (1, 8)
    """Numbers of simultaneous requests."""
    prompt_tokens: int = 32
    """Length of the prompts."""
    new_tokens: int = 64
    """Length of the answers."""
    repeats: int = 3
    """Rounds, after one for warm-up."""
    threads: int = 1
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


def cache_bytes() -> int:
    """The size of the processor's largest cache; 0 where the system doesn't say."""
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")
    sizes = [path.read_text(encoding="ascii").strip() for path in files]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=0)


def memory_speed() -> float:
    """The bytes per second at which torch sums 512 MB, the best of some tries."""
    count = 512 << 20
    numbers = torch.ones(count // 4)
    best = float("inf")
    for _ in range(5):
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


def start(cfg: Config, folder: Path) -> tuple[list[Contestant], int, int]:
    """Start the contestants, ours and llama.cpp's in turns; return also the sizes of all matrices and of the head."""
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
        model = GPT(GPTConfig(**config))
    return contestants, model.num_matmul_params(), cfg.vocab_size * model.config.n_embd


def compare(cfg: Config, contestants: list[Contestant], parameters: int, head: int) -> list[dict[str, Any]]:
    """Measure in turns; a row for each kind of weights and number of requests."""
    rows = []
    speed, cache = memory_speed(), cache_bytes()
    for requests in cfg.requests:
        outside: list[list[float]] = [[] for _ in cfg.weights]
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
                if repeat > 0 and result.get("outside_share") is not None:
                    outside[contestants.index(contestant) // 2].append(result["outside_share"])
        pairs_of = zip(*[iter(contestants)] * 2, strict=True)
        for weights, rest, (ours, theirs) in zip(cfg.weights, outside, pairs_of, strict=True):
            mine, other = (statistics.median(speeds[c.name]) for c in (ours, theirs))
            pairs = zip(tokens[ours.name], tokens[theirs.name], strict=True)
            row = {"weights": weights, "requests": requests, "ours": mine, "llama.cpp": other, "ratio": mine / other}
            row["outside_share"] = statistics.median(rest) if rest else 0.0  # none: torch takes the steps
            head_bytes = BYTES["int8" if weights == "int4" else weights]
            size = (parameters - head) * BYTES[weights] + head * head_bytes
            row["read"] = mine / requests * size / (1 - row["outside_share"])  # bytes a second of the step
            # Other programs, and the guests beside a virtual machine, have their part of the cache.
            cached = size <= cache / 8 or row["read"] > speed
            row["share"] = None if cached else row["read"] / speed
            fits = f"(faster than memory or small: the {size / 1e6:.0f} MB stay in the cache of {cache / 1e6:.0f})"
            reading = fits if row["share"] is None else f"({row['share']:.0%} of the memory's {speed / 1e9:.1f})"
            row["same_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), cfg.new_tokens)
            rows.append(row)
            print(
                f"{weights:9}{requests:3} requests: ours {mine:8.1f} tokens/s, llama.cpp {other:8.1f}, "
                f"{row['ratio']:.2f} x; {row['outside_share']:.0%} outside the step; "
                f"{row['read'] / 1e9:.1f} GB/s {reading}; "
                f"the first {row['same_tokens']} tokens are the same",
                flush=True,
            )
    return rows


def main(cfg: Config) -> None:
    """Measure and print; the last line is JSON."""
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as name:
        contestants, parameters, head = start(cfg, cfg.folder or Path(name))
        try:
            rows = compare(cfg, contestants, parameters, head)
        finally:
            for contestant in contestants:
                contestant.close()
    print(json.dumps({"depth": cfg.depth, "vocab_size": cfg.vocab_size, "parameters": parameters, "results": rows}))


if __name__ == "__main__":
    run_script(main, Config)
