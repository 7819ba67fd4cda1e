"""Measure training and decoding beside other programs: tokens/s on the quiet machine, and the share that stays.

    python dev/bench/busy.py                                      ours, beside 0, 1 and 2 busy processes
    python dev/bench/busy.py --busy loop training                 the second busy process is another training
    python dev/bench/busy.py --peer /tmp/nanochat                 and nanochat of December 2025 (see train_step.py)
    python dev/bench/busy.py --settings default OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=1000      compare settings

A busy process that loops in Python or multiplies with numpy keeps one core; a training wants them all. A fair split
between processes leaves 1/(1 + busy) of the machine. Every contestant is a process of its own, and they take turns, so
that other work on the machine affects all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPE = ["--depth", "4", "--vocab_size", "4096", "--sequence_len", "256", "--rows", "8"]
TRAINING = [str(HERE / "train_step.py"), *SHAPE, "--worker"]
BUSY = {
    "loop": ["-c", "while True: pass"],
    "numpy": [
        "-c",
        "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'\n"
        "import numpy as np\na = np.ones((300, 300))\nwhile True: a = a @ a * 1e-3",
    ],
    "training": [*TRAINING, "ours:strict"],
}
TRAIN_TOKENS, NEW_TOKENS = 8 * 256, 200


def decode() -> None:
    """A contestant: answers each line of input with the seconds of decoding one answer of NEW_TOKENS tokens."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(HERE.parents[1]))
    from infer_bench_worker import PlainTokenizer

    from nanochat.common import setup_compute
    from nanochat.config import Runtime
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    setup_compute(Runtime(device_type="cpu"))
    model = GPT(GPTConfig.from_depth(4, 4096, 512))
    model.init_weights()
    engine = Engine(model.eval(), PlainTokenizer())
    engine.generate_batch([1, 2, 3], max_tokens=8, temperature=0.0)
    print("{}", file=answer, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.generate_batch([1, 2, 3], max_tokens=NEW_TOKENS, temperature=0.0)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answer, flush=True)


class Worker:
    """A process that answers each line of its input with the seconds of one step."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, *command], env=env, stdin=pipe, stdout=pipe, text=True)
        self.name = command[-1]

    def ready(self) -> None:
        """Wait until it is."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"{self.name} did not start; its error is above")

    def ask(self, steps: int = 1) -> None:
        """Let it make some steps of training, or answer once."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()

    def seconds(self) -> float:
        """One step of training, or one answer."""
        self.ask()
        assert self.process.stdout is not None
        return float(json.loads(self.process.stdout.readline())["seconds"])


def start(name: str, setting: str, peer: str | None) -> Worker:
    """A contestant: decode, or side:mode of train_step.py, in the environment that `setting` describes."""
    env = dict(os.environ)
    if "=" in setting:
        env |= dict(pair.split("=") for pair in setting.split(","))
    if name == "decode":
        return Worker([__file__, "--worker"], env)
    return Worker([*([*TRAINING[:-1], "--peer", peer, "--worker"] if peer else TRAINING), name], env)


def start_busy(kind: str) -> subprocess.Popen[Any]:
    """A busy process, at work."""
    if kind != "training":
        return subprocess.Popen([sys.executable, *BUSY[kind]])
    worker = Worker(BUSY[kind], dict(os.environ))
    worker.ready()
    worker.ask(10**9)
    return worker.process


def measure(workers: list[Worker], seconds: float) -> list[float]:
    """The mean seconds of a step of each, over turns that take about `seconds` for each of them."""
    rounds: list[list[float]] = []
    until = time.monotonic() + seconds * len(workers)
    while time.monotonic() < until or not rounds:
        rounds.append([worker.seconds() for worker in workers])
    return [statistics.mean(turns) for turns in zip(*rounds, strict=True)]


def main(args: argparse.Namespace) -> None:
    """Measure beside no, one and two busy processes, and print."""
    names = [(name, setting) for name in args.contestants for setting in args.settings]
    names += [(f"peer:{mode}", "default") for mode in args.peer_modes if args.peer]
    workers = [start(name, setting, args.peer) for name, setting in names]
    busy: list[subprocess.Popen[Any]] = []
    table = []
    try:
        for worker in workers:
            worker.ready()
        table.append(measure(workers, args.seconds))
        for kind in args.busy:
            busy.append(start_busy(kind))
            table.append(measure(workers, args.seconds))
    finally:
        for process in [*busy, *(worker.process for worker in workers)]:
            process.kill()
    print(f"{len(os.sched_getaffinity(0))} cores; busy: {', '.join(args.busy)}")
    loads = "".join(f"{n + 1} busy".rjust(10) + "share".rjust(7) for n in range(len(args.busy)))
    print(f"{'tokens/s':42}{'quiet':>9}{loads}")
    for (name, setting), times in zip(names, zip(*table, strict=True), strict=True):
        tokens = NEW_TOKENS if name == "decode" else TRAIN_TOKENS
        quiet, *others = (tokens / t for t in times)
        shares = "".join(f"{speed:10,.0f}{speed / quiet:7.0%}" for speed in others)
        print(f"{name:18}{setting:24}{quiet:9,.0f}{shares}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="*", default=["ours:bfloat16", "ours:strict", "decode"])
    parser.add_argument("--busy", nargs="*", choices=BUSY, default=["loop", "numpy"], help="started one by one")
    parser.add_argument("--settings", nargs="*", default=["default"], help="environment: NAME=VALUE,NAME=VALUE")
    parser.add_argument("--peer", help="a checkout of nanochat of December 2025")
    parser.add_argument("--peer_modes", nargs="*", default=["eager"], help="eager, compiled")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each contestant beside each load")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker:
        decode()
    else:
        main(parsed)
