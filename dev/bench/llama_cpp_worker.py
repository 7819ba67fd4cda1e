"""llama.cpp in llama_cpp.py, in a process of its own; it needs nothing of this project, only `llama-cpp-python`.

argv: a GGUF file, JSON settings. It speaks the language of infer_bench_worker.py.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

sys.path.pop(0)  # this folder has a llama_cpp.py of its own

import llama_cpp as lib
import numpy as np


class Runner:
    """A model with room for as many sequences as are asked for together; decodes greedily through the C functions."""

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.silent = lib.llama_log_callback(lambda level, text, data: None)  # kept: C calls it until the end
        lib.llama_log_set(self.silent, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp cannot read {path}")
        params = lib.llama_context_default_params()
        params.n_seq_max = settings["slots"]
        params.n_ctx = settings["slots"] * settings["positions"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(settings["slots"] * settings["positions"], 0, 1)

    def run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, whether its logits are wanted); return the likeliest token of those."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if lib.llama_decode(self.context, batch) != 0:
            sys.exit("llama_decode failed")
        wanted = [i for i, row in enumerate(rows) if row[3]]
        return [
            int(np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (self.vocab,)).argmax())
            for i in wanted
        ]

    def answer(self, prompts: list[list[int]], count: int) -> tuple[list[float], list[list[int]]]:
        """Continue prompts by `count` tokens: the time of each step, and the tokens of each prompt."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        length = len(prompts[0])
        last = self.run([(t, p, s, p == length - 1) for s, prompt in enumerate(prompts) for p, t in enumerate(prompt)])
        when, columns = [time.perf_counter()], [last]
        for position in range(length, length + count - 1):
            last = self.run([(token, position, sequence, True) for sequence, token in enumerate(last)])
            when.append(time.perf_counter())
            columns.append(last)
        return when, [list(row) for row in zip(*columns, strict=True)]


def main() -> None:
    """Answer requests until the input ends."""
    runner = Runner(sys.argv[1], json.loads(sys.argv[2]))
    for line in sys.stdin:
        task = json.loads(line)
        when, tokens = runner.answer(task["prompts"], task["new_tokens"])
        seconds = when[-1] - when[0]
        speed = len(task["prompts"]) * (len(when) - 1) / seconds
        print(json.dumps({"decode_tokens_per_second": speed, "tokens": tokens[0]}), flush=True)


if __name__ == "__main__":
    main()
