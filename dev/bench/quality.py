"""Measure what nanochat's own base_train.py, the peer of our recipes, learns in a given time from the same text.

    git clone https://github.com/karpathy/nanochat /tmp/nanochat && git -C /tmp/nanochat checkout 8c89661   # Dec 2025
    python dev/bench/quality.py --peer /tmp/nanochat --data FOLDER --flags="--total_batch_size=4096"
    python dev/ablate.py --data FOLDER --experiment recipes --only small --seconds 1200                     # ours

The peer's script runs unchanged, compiled as usual. A short run measures its tokens/s, which determine the number of
steps for the given time; so only the short run needs a machine that does nothing else. The validation bpb is the peer's
own, over as much of the last shard as dev/ablate.py reads.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "dev")]

from ablate import Config as AblateConfig  # noqa: E402
from ablate import prepare  # noqa: E402

from nanochat.config import run_script  # noqa: E402

TRIAL_STEPS = 24  # of which the first third compiles and warms up
SEED = "import torch, runpy, sys; m = torch.manual_seed; torch.manual_seed = lambda _: m({seed}); " + (
    "sys.argv[0] = 'base_train.py'; runpy.run_module('scripts.base_train', run_name='__main__', alter_sys=False)"
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run of the peer's script."""

    peer: str
    """A checkout of nanochat."""
    data: str
    """Folder of parquet shards; the last one is the validation text."""
    flags: str = ""
    """Flags of the peer's base_train, written with underscores; they override those in --base."""
    base: str = "--depth=4 --max_seq_len=512 --device_batch_size=8 --total_batch_size=16384"
    """Flags of all runs."""
    vocab_size: int = 8192
    """Vocabulary; the tokenizer is ours, in the peer's format."""
    seconds: float = 1200
    """Training time."""
    dtype: str = "float32"
    """Precision of the peer of 2026, which uses float32 on a CPU by default; the one of 2025 has only float32."""
    tokens_per_second: float | None = None
    """The peer's speed, if it was measured before."""
    seeds: tuple[int, ...] = (0,)
    """One run with each; the peer itself always takes 42."""
    eval_bytes: int = 2_000_000
    """Bytes of validation text to evaluate."""
    results: str = "quality.jsonl"
    """File for finished runs, one per line; new ones are appended."""
    work: str = "ablate"
    """Folder for tokenizers and the logs of the runs; it may be that of dev/ablate.py."""


def run_peer(cfg: Config, base_dir: Path, flags: dict[str, str], seed: int) -> str:
    """Run the peer's base_train; returns its output."""
    peer = Path(cfg.peer).resolve()
    dashes = not (peer / "nanochat" / "configurator.py").exists()  # 2026: argparse, with its dashes
    words = [f"--{name.replace('_', '-') if dashes else name}={value}" for name, value in flags.items()]
    command = [sys.executable, "-c", SEED.format(seed=seed), *words]
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(base_dir), "NANOCHAT_DTYPE": cfg.dtype}
    environment["PYTHONPATH"] = f"{peer}{os.pathsep}{base_dir / 'packages'}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=peer, env=environment, **pipes)
    (base_dir / "peer.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[3:])} failed: {done.stdout[-2000:]}")
    return done.stdout


def peer_base(cfg: Config) -> tuple[Path, int]:
    """A base folder that the peer reads, and the number of tokens to evaluate."""
    ours, bytes_per_token = prepare(AblateConfig(data=cfg.data, flops=1.0, work=cfg.work), cfg.vocab_size)
    base_dir = Path(cfg.work).absolute() / f"peer_{Path(cfg.peer).resolve().name}_{cfg.vocab_size}_{os.getpid()}"
    folder = base_dir / "tokenizer"
    folder.mkdir(parents=True)
    shutil.copy(ours / "tokenizer" / "token_bytes.pt", folder)
    known = json.loads((ours / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    ranks = {base64.b64decode(token): i for i, token in enumerate(known["ranks"])}
    encoding = tiktoken.Encoding(
        "rustbpe", pat_str=known["pattern"], mergeable_ranks=ranks, special_tokens=known["special_tokens"]
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    for name in ("base_data", "base_data_climbmix"):
        (base_dir / name).symlink_to(Path(cfg.data).resolve())
    (base_dir / "packages").mkdir()
    (base_dir / "packages" / "rustbpe").symlink_to(ROOT / "rustbpe")  # imported by its tokenizer, not used
    return base_dir, int(cfg.eval_bytes / bytes_per_token)


def speed(output: str) -> float:
    """Tokens per second: the median of the steps after the first third."""
    values = [float(v.replace(",", "")) for v in re.findall(r"tok/sec: ([\d,]+)", output)]
    return statistics.median(values[len(values) // 3 :])


def main(cfg: Config) -> None:
    """Measure the speed, run every seed, print and record the results."""
    base_dir, eval_tokens = peer_base(cfg)
    flags = dict(word.removeprefix("--").split("=", 1) for word in f"{cfg.base} {cfg.flags}".split())
    flags |= {"core_metric_every": "-1", "sample_every": "100000000", "eval_every": "100000000"}
    batch = int(flags["total_batch_size"])
    rate = cfg.tokens_per_second
    if rate is None:
        trial = {"num_iterations": str(TRIAL_STEPS), "eval_tokens": "4096"}
        rate = speed(run_peer(cfg, base_dir, flags | trial, 0))
        print(f"{rate:,.0f} tokens/s", flush=True)
    steps = round(cfg.seconds * rate / batch)
    values = []
    for seed in cfg.seeds:
        output = run_peer(cfg, base_dir, flags | {"num_iterations": str(steps), "eval_tokens": str(eval_tokens)}, seed)
        values.append(float(re.findall(r"Validation bpb: ([\d.]+)", output)[-1]))
        result = {"peer": cfg.peer, "flags": flags, "dtype": cfg.dtype, "seed": seed, "steps": steps}
        result |= {
            "tokens": steps * batch,
            "tokens_per_second": rate,
            "val_bpb": values[-1],
            "date": time.strftime("%Y-%m-%d %H:%M"),
        }
        with open(cfg.results, "a", encoding="utf-8") as f:
            f.write(json.dumps(result) + "\n")
        label = cfg.flags or "as it is"
        print(f"{label}: seed {seed}, {steps} steps, {steps * batch / 1e6:.2f} M tokens, {values[-1]:.4f}", flush=True)
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    print(f"val bpb {statistics.mean(values):.4f}{spread}; torch {torch.__version__}")


if __name__ == "__main__":
    run_script(main, Config)
