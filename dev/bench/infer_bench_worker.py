"""One contestant of infer_bench.py, in a process of its own: reads requests as JSON lines, answers with timings.

It imports the `nanochat` package that PYTHONPATH names, this project's or that of another checkout, and therefore uses
nothing else of this project.

argv: kind (ours, nanochat, transformers), folder with model.safetensors and config.json, JSON settings.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Times = list[list[float]]  # per request: the time of each of its tokens
Run = Callable[[list[list[int]], int], tuple[Times, list[list[int]]]]  # (prompts, new tokens) -> times, tokens


in_steps: list[tuple[float, float]] = []  # when this project's steps in Rust began, and how many seconds they took


class PlainTokenizer:
    """Replaces the tokenizer: special tokens never occur, so that every answer has its full length."""

    def encode_special(self, name: str) -> int:
        return 10**9 + hash(name) % 1000

    def get_special_tokens(self) -> set[str]:
        return set()

    def get_bos_token_id(self) -> int:
        return 10**9

    def encode(self, text: str) -> list[int]:
        return [0]

    def decode(self, ids: Any) -> str:
        return ""

    def decode_bytes(self, ids: Any) -> bytes:
        return b"a"


def ours(config: dict[str, Any], state: dict[str, torch.Tensor], settings: dict[str, Any]) -> Run:
    """This project: continuous batching."""
    from nanochat.generate.sampling import Sampling  # lazy: PYTHONPATH decides which nanochat this is
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.precision import DTYPES, Precision
    from nanochat.serve.batch_engine import BatchEngine, GenerationRequest

    with contextlib.suppress(ImportError):  # an older checkout has no step in Rust
        from rustbpe import decoding  # lazy: as above

        def timed(inner: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                start = time.perf_counter()
                result = inner(*args)
                in_steps.append((start, time.perf_counter() - start))
                return result

            return run

        for name in ("step", "ahead"):
            if hasattr(decoding.Decoder, name):
                setattr(decoding.Decoder, name, timed(getattr(decoding.Decoder, name)))
    model = GPT(GPTConfig(**config))
    model.load_state_dict(state)
    device = torch.device(settings["device"])
    precision = Precision(device.type, DTYPES[settings["dtype"]])
    engine = BatchEngine(
        model.to(device).eval(),
        PlainTokenizer(),
        precision,
        max_batch_size=settings["slots"],
        weights=settings["weights"],
    )

    def run(prompts: list[list[int]], count: int) -> tuple[Times, list[list[int]]]:
        # Listeners, and one wait at the end: a thread that wakes for every token would compete for the interpreter.
        times: Times = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        over = threading.Semaphore(0)

        def hear(event: Any, i: int) -> None:
            times[i] += [time.perf_counter()] * len(event.tokens)
            tokens[i] += event.tokens
            if event.finish_reason is not None:
                over.release()

        for i, prompt in enumerate(prompts):
            request = GenerationRequest(tokens=prompt, sampling=Sampling(max_tokens=count, temperature=0.0))
            engine.submit(request).add_listener(lambda event, i=i: hear(event, i))
        for _ in prompts:
            over.acquire()
        return times, tokens

    return run


def nanochat(config: dict[str, Any], state: dict[str, torch.Tensor], settings: dict[str, Any]) -> Run:
    """Another checkout's engine: one prompt, with as many samples as there are requests."""
    from nanochat.engine import Engine  # lazy: another checkout's, not this project's
    from nanochat.gpt import GPT, GPTConfig

    known = inspect.signature(GPTConfig).parameters
    extra = {"window_pattern": "L"} if "window_pattern" in known else {}
    model = GPT(GPTConfig(**{k: v for k, v in config.items() if k in known}, **extra)).to(settings["device"])
    model.init_weights()
    own = model.state_dict()
    for name, value in own.items():  # weights that the classic model does not have get values without effect
        if name not in state:
            value.fill_(1.0 if "resid" in name else 0.0)
        else:
            rows = min(value.size(0), state[name].size(0))
            value[:rows] = state[name][:rows].to(value.dtype)
    engine = Engine(model.eval(), PlainTokenizer())

    def run(prompts: list[list[int]], count: int) -> tuple[Times, list[list[int]]]:
        when, columns = [], []
        for column, _ in engine.generate(prompts[0], len(prompts), count, temperature=0.0):
            when.append(time.perf_counter())
            columns.append(column)
        return [when] * len(prompts), [list(row) for row in zip(*columns, strict=True)]

    return run


def transformers(config: dict[str, Any], state: dict[str, torch.Tensor], settings: dict[str, Any]) -> Run:
    """transformers' NanoChatForCausalLM.generate."""
    from transformers import NanoChatConfig, NanoChatForCausalLM, StoppingCriteria, StoppingCriteriaList

    from nanochat.gpt import GPTConfig  # lazy: PYTHONPATH decides which
    from nanochat.interop.hf_format import hf_config, hf_name

    # All rows of the matrices, including the padding of the vocabulary; no token ends an answer.
    plain = {"vocab_size": state["lm_head.weight"].size(0), "eos_token_id": None, "bos_token_id": None}
    shape = hf_config(GPTConfig(**config), PlainTokenizer()) | plain | {"pad_token_id": 0}
    model = NanoChatForCausalLM(NanoChatConfig.from_dict(shape)).eval()
    model.load_state_dict({hf_name(name): value for name, value in state.items()}, strict=False)
    model.to(settings["device"], dtype=getattr(torch, settings["dtype"]))

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.when: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            self.when.append(time.perf_counter())
            return torch.zeros(input_ids.size(0), dtype=torch.bool, device=input_ids.device)

    def run(prompts: list[list[int]], count: int) -> tuple[Times, list[list[int]]]:
        clock = Clock()
        idx = torch.tensor(prompts, device=settings["device"])
        out = model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return [clock.when] * len(prompts), out[:, idx.size(1) :].tolist()

    return run


def make_prompts(task: dict[str, int], vocab_size: int) -> list[list[int]]:
    """The prompts of a task, random tokens."""
    generator = torch.Generator().manual_seed(task["seed"])
    size = (task["requests"], task["prompt_tokens"])
    prompts: list[list[int]] = torch.randint(0, min(256, vocab_size), size, generator=generator).tolist()
    return prompts


def memory_bytes(device: str) -> int:
    """The most memory used so far: of the card, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Load the model, then answer lines {"requests", "prompt_tokens", "new_tokens", "seed"} until the input ends."""
    if len(sys.argv) != 4:
        sys.exit("scripts.infer_bench starts this; to compare engines: python -m scripts.infer_bench --help")
    kind, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "model.safetensors")
    answers = sys.stdout
    sys.stdout = sys.stderr  # keeps what others print out of the answers
    run = {"ours": ours, "nanochat": nanochat, "transformers": transformers}[kind](config, state, settings)
    del state
    for line in sys.stdin:
        task = json.loads(line)
        prompts = make_prompts(task, config["vocab_size"])
        in_steps.clear()
        start = time.perf_counter()
        times, tokens = run(prompts, task["new_tokens"])
        first = [when[0] for when in times]
        last = max(when[-1] for when in times)
        # From the moment when all prompts are read: reading the last of them would count as decoding otherwise.
        begin = max(first)
        decoded = sum(t > begin for when in times for t in when)
        inside = sum(seconds for began, seconds in in_steps if began > begin)
        result = {
            "ttft_seconds": sum(first) / len(first) - start,
            "decode_tokens_per_second": decoded / (last - begin),
            "tokens_per_second": sum(map(len, tokens)) / (last - start),
            "outside_share": 1 - inside / (last - begin) if inside else None,  # None: torch takes the steps
            "memory_bytes": memory_bytes(settings["device"]),
            "tokens": tokens[0],
        }
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
