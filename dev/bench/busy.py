"""Measure training and decoding beside other programs: tokens/s on the quiet machine, and the share that stays.

    python dev/bench/busy.py                          ours, beside 0, 1 and 2 busy processes
    python dev/bench/busy.py --peer /tmp/nanochat     and nanochat of December 2025 under the same load (train_step.py)

Each busy process keeps one core: the first loops in Python, the second multiplies with numpy. A fair split between
processes leaves 1/(1 + busy) of the machine. Every contestant is a process of its own, and they take turns, so that
other work on the machine affects all of them. OMP_* and GOMP_* in the environment are used as they are: to compare
settings, run this once with each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUSY = (
    "while True: pass",
    "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'\n"
    "import numpy as np\na = np.ones((300, 300))\nwhile True: a = a @ a * 1e-3",
)
SHAPE = ["--depth", "4", "--vocab_size", "4096", "--sequence_len", "256", "--rows", "8"]
TRAIN_TOKENS, NEW_TOKENS = 8 * 256, 200


def decode() -> None:
    """A contestant: answers each line of input with the seconds of decoding one answer of NEW_TOKENS tokens."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(HERE.parents[1]))
    from infer_bench_worker import PlainTokenizer

    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    model = GPT(GPTConfig.from_depth(4, 4096, 512))
    model.init_weights()
    engine = Engine(model.eval(), PlainTokenizer())
    engine.generate_batch([1, 2, 3], max_tokens=8, temperature=0.0)
    print("{}", file=answer, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        engine.generate_batch([1, 2, 3], max_tokens=NEW_TOKENS, temperature=0.0)
        print(json.dumps({"seconds": time.perf_counter() - start}), file=answer, flush=True)


def start(name: str, peer: str | None) -> subprocess.Popen[str]:
    """A contestant that is ready: decode, or side:mode of train_step.py."""
    command = [sys.executable, str(HERE / "train_step.py"), *SHAPE, "--worker", name]
    if name == "decode":
        command = [sys.executable, __file__, "--worker"]
    elif peer:
        command += ["--peer", peer]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not process.stdout.readline():
        raise RuntimeError(f"{name} did not start; its error is above")
    return process


def seconds(worker: subprocess.Popen[str]) -> float:
    """One step of training, or one answer."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("1\n")
    worker.stdin.flush()
    return float(json.loads(worker.stdout.readline())["seconds"])


def main(args: argparse.Namespace) -> None:
    """Measure beside no, one and two busy processes, and print."""
    names = ["ours:bfloat16", "ours:strict", "decode"] + (["peer:eager"] if args.peer else [])
    workers = {name: start(name, args.peer) for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    busy: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(len(BUSY) + 1):
            if number:
                busy.append(subprocess.Popen([sys.executable, "-c", BUSY[number - 1]]))
            rounds: dict[str, list[float]] = {name: [] for name in names}
            until = time.monotonic() + args.seconds * len(names)
            while time.monotonic() < until or not rounds[names[-1]]:
                for name, worker in workers.items():
                    rounds[name].append(seconds(worker))
            for name in names:
                tokens = NEW_TOKENS if name == "decode" else TRAIN_TOKENS
                speeds[name].append(tokens / statistics.mean(rounds[name]))
    finally:
        for process in [*busy, *workers.values()]:
            process.kill()
    policy = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}
    print(f"{os.cpu_count()} cores, waiting policy of the environment: {policy or 'none set'}")
    print(f"{'tokens/s':16}{'quiet':>10}{'1 busy':>10}{'share':>7}{'2 busy':>10}{'share':>7}")
    for name, (quiet, one, two) in speeds.items():
        print(f"{name:16}{quiet:10,.0f}{one:10,.0f}{one / quiet:7.0%}{two:10,.0f}{two / quiet:7.0%}")
    print(json.dumps({"policy": policy, "tokens_per_second": speeds}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of nanochat of December 2025")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each contestant beside each load")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.worker:
        decode()
    else:
        main(parsed)
