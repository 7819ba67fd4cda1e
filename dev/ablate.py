"""Train a matrix of settings with equal compute on real text, and compare their bits per byte.

    python dev/ablate.py --data FOLDER --experiment switches --seconds 300 --seeds 0
    python dev/ablate.py --data FOLDER --experiment vocabulary --flops 2e14 --seeds 0 1 2
    python dev/ablate.py --data FOLDER --experiment recipes --seconds 1200 --seeds 0 1 2 --dtype bfloat16
    python dev/ablate.py --data FOLDER --experiment shape --ladder --seeds 0
    python dev/ablate.py --data FOLDER --experiment epochs --train_bytes=4000000 --eval_every=100 --flops 5.56e14

Every run is `scripts.base_train` in a process of its own, with a base folder for each vocabulary (its tokenizer is
trained on first use). A finished run is one line in the results file and is not repeated, so a matrix that was killed
resumes, and the run that it was at goes on from its last checkpoint. The validation text is the same for every
vocabulary: the tokenizer's bytes per token determine the number of tokens. Times are comparable only on a machine that
does nothing else; on a busy one use --flops.

A setting that wins at one size may lose at the next. `--ladder` trains each at three, prints its gain over the first
setting at every rung, fits how its loss falls with compute, and draws it beside the results.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dev.fit_scaling_law import power_law  # noqa: E402
from dev.ladder import SEED_NOISE, draw  # noqa: E402
from nanochat.config import run_script  # noqa: E402
from nanochat.gpt import NANOCHAT_2026  # noqa: E402

LADDER = (4e13, 1.6e14, 5.6e14)  # training FLOPs of the rungs; each is about four times the one before
NEXT_RUNG = 2.2e15  # for which the ladder's fit makes a prediction

SWITCHES = {
    "residual_scalars": "--residual_scalars=True",
    "value_embeddings": "--value_embeddings=True",
    "smear": "--smear=True",
    "backout": "--backout=True",
    "qk_scale": "--qk_scale=1.2",
    "rope_base": "--rope_base=100000",
    "init": "--init=modern",
}
assert set(SWITCHES) == set(NANOCHAT_2026)

NARROW = "--recipe=small --aspect_ratio=32 --window_pattern=SSSL --max_seq_len=1024 --device_batch_size=4"
SEPARATE = "--max_seq_len=2048 --device_batch_size=2 --reach=1024 --separate_documents=True"
# name of an experiment -> label of a setting -> flags of base_train; --vocab_size chooses the tokenizer.
EXPERIMENTS: dict[str, dict[str, str]] = {
    "recipes": {
        "small": "--recipe=small",
        "portable": "--recipe=portable",
        "classic": "--recipe=classic --total_batch_size=16384",
        "modern": "--recipe=modern",
    },
    "switches": {"none": ""}
    | SWITCHES
    | {
        "all": " ".join(SWITCHES.values()),
        "key offset": "--key_offset=True",
        "windows": "--window_pattern=SSSL",
        "recall": "--recall=16000000",
    },
    "without": {"all": " ".join(SWITCHES.values())}
    | {f"without {name}": " ".join(v for k, v in SWITCHES.items() if k != name) for name in SWITCHES},
    "vocabulary": {f"{v}": f"--vocab_size={v}" for v in (4096, 8192, 16384, 32768, 65536)},
    "batch": {f"{b}": f"--total_batch_size={b}" for b in (4096, 8192, 16384, 32768, 65536)},
    "warmdown": {f"{r}": f"--warmdown_ratio={r}" for r in (0.2, 0.4, 0.65, 0.9)},
    "lr": {f"× {m}": f"--lr_scale={m}" for m in (0.25, 0.5, 1.0, 2.0, 4.0)},
    "matrix_lr": {f"{lr}": f"--matrix_lr={lr}" for lr in (0.0025, 0.005, 0.01, 0.02, 0.04)},
    # The recipe's rate first: the ladder's gains are against it.
    "small_rates": {
        "small": "--recipe=small",
        "matrices 0.045": "--recipe=small --matrix_lr=0.045",
        "matrices 0.06": "--recipe=small --matrix_lr=0.06",
        "all × 1.5": "--recipe=small --lr_scale=1.5",
    },
    "scalar_lr": {f"{lr}": f"--scalar_lr={lr}" for lr in (0.02, 0.1, 0.5)},
    "weight_decay": {f"{w}": f"--weight_decay={w}" for w in (0.0, 0.05, 0.28, 1.0)},
    "ramp": {f"{r}": f"--short_rows_ratio={r}" for r in (0.0, 0.3, 0.6)},
    # What portable gives up, and what might win it back: only what folds into a Qwen3 model (but for the softcap).
    "portable": {
        "small": "--recipe=small",
        "portable": "--recipe=portable",
        "modern init": "--recipe=portable --init=modern",
        "without factors": "--recipe=portable --residual_factors=False",
        "with a softcap": "--recipe=portable --logit_softcap=15",
        "qk 1.0": "--recipe=portable --qk_scale=1",
        "qk 1.5": "--recipe=portable --qk_scale=1.5",
        "rope 10000": "--recipe=portable --rope_base=10000",
        "classic init": "--recipe=portable --init=classic",
        "lm_head × 2": "--recipe=portable --unembedding_lr=0.008",
        "embedding × 1.5": "--recipe=portable --embedding_lr=0.3",
        "matrices 0.04": "--recipe=portable --matrix_lr=0.04",
        "half the heads": "--recipe=portable --n_kv_head=1",
        "short rows": "--recipe=portable --short_rows_ratio=0.5",
    },
    # What small runs can change most: the batch, how fast to learn, and the modern model with the classic optimizer.
    "screen": {
        "classic 16k": "--recipe=classic --total_batch_size=16384",
        "classic 8k": "--recipe=classic --total_batch_size=8192",
        "classic 4k": "--recipe=classic --total_batch_size=4096",
        "switches 4k": "--recipe=classic --total_batch_size=4096 " + " ".join(SWITCHES.values()),
        "switches 4k × 2": "--recipe=classic --total_batch_size=4096 --lr_scale=2 " + " ".join(SWITCHES.values()),
        "switches 4k × 0.5": "--recipe=classic --total_batch_size=4096 --lr_scale=0.5 " + " ".join(SWITCHES.values()),
        "switches 4k, warmdown 0.65": "--recipe=classic --total_batch_size=4096 --warmdown_ratio=0.65 "
        + " ".join(SWITCHES.values()),
        "switches 2k": "--recipe=classic --total_batch_size=2048 --device_batch_size=4 " + " ".join(SWITCHES.values()),
        "modern 4k × 4": "--recipe=modern --total_batch_size=4096 --lr_scale=4",
        "modern 4k × 8": "--recipe=modern --total_batch_size=4096 --lr_scale=8",
        "modern 4k × 4, no decay": "--recipe=modern --total_batch_size=4096 --lr_scale=4 --weight_decay=0",
        "modern 2k × 4": "--recipe=modern --total_batch_size=2048 --device_batch_size=4 --lr_scale=4",
    },
    # Little text, read many times (--train_bytes): what lowers the best value of a run?
    "epochs": {
        "small": "--recipe=small",
        "decay 0.3": "--recipe=small --weight_decay=0.3",
        "decay 1": "--recipe=small --weight_decay=1",
        "decay 3": "--recipe=small --weight_decay=3",
        "decay 8": "--recipe=small --weight_decay=8",
        "dropout 0.1": "--recipe=small --dropout=0.1",
        "dropout 0.2": "--recipe=small --dropout=0.2",
        "decay 1, dropout 0.3": "--recipe=small --weight_decay=1 --dropout=0.3",
        "no value embeddings": "--recipe=small --value_embeddings=False",
        "half the rates": "--recipe=small --lr_scale=0.5",
        "recall": "--recipe=small --recall=20000000",
        "recall, apart": "--recipe=small --recall=20000000 --separate_documents=True",
        "d2": "--recipe=small --depth=2 --aspect_ratio=64",
    },
    # At equal batches in tokens; the same validation text in longer or shorter rows.
    "context": {
        "512": "--recipe=small",
        "1024": "--recipe=small --max_seq_len=1024 --device_batch_size=4",
        "2048": "--recipe=small --max_seq_len=2048 --device_batch_size=2",
        "1024, windows": "--recipe=small --max_seq_len=1024 --device_batch_size=4 --window_pattern=SSSL",
        "2048, windows": "--recipe=small --max_seq_len=2048 --device_batch_size=2 --window_pattern=SSSL",
        "2048, windows, short rows": "--recipe=small --max_seq_len=2048 --device_batch_size=2 --window_pattern=SSSL "
        "--short_rows_ratio=0.5",
    },
    "small_shape": {
        "4 × 256": "--recipe=small",
        "4 × 256, heads of 64": "--recipe=small --head_size=64",
        "3 × 256": "--recipe=small --depth=3 --aspect_ratio=85",
        "4 × 192": "--recipe=small --aspect_ratio=48 --head_size=64",
        "4 × 128": "--recipe=small --aspect_ratio=32",
        "4 × 128, windows": "--recipe=small --aspect_ratio=32 --window_pattern=SSSL",
        "4 × 128, 1,024, windows": NARROW,
        # Each adds to the one before it.
        "4 × 128, long rows": f"{NARROW} --max_seq_len=4096 --device_batch_size=1 --reach=1024",
        "4 × 128, separate": f"{NARROW} {SEPARATE}",
        "4 × 128, recall": f"{NARROW} {SEPARATE} --recall=17000000",
        "4 × 192, recall": f"{NARROW} {SEPARATE} --recall=17000000 --aspect_ratio=48 --head_size=96",
        "4 × 256, recall": f"{NARROW} {SEPARATE} --recall=17000000 --aspect_ratio=64",
    },
    "shape": {
        "d4": "--depth=4",
        "d6": "--depth=6",
        "d8, half as wide": "--depth=8 --aspect_ratio=32",
        "d4, twice as wide": "--depth=4 --aspect_ratio=128",
    },
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A matrix of runs."""

    data: str
    """Folder of parquet shards; the last one is the validation text."""
    train_bytes: int | None = None
    """Train on the first so many bytes of the text only, as often as the compute lasts; default: all of it."""
    experiment: Literal[tuple(EXPERIMENTS)] = "switches"  # type: ignore[valid-type]
    """Settings to compare."""
    seconds: float | None = None
    """Training time of each run."""
    flops: float | None = None
    """Training FLOPs of each run, instead of a time."""
    ladder: bool = False
    """Every setting at 4e13, 1.6e14 and 5.6e14 FLOPs, instead of a time: does its gain last?"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every setting is run once with each."""
    base: str = "--recipe=classic --depth=4 --max_seq_len=512 --device_batch_size=8 --total_batch_size=16384"
    """Flags of base_train for all runs, as --base="--depth=4 ..."; a setting's own flags come after them."""
    vocab_size: int = 8192
    """Vocabulary, unless a setting names another."""
    dtype: str = "float32"
    """Precision of training."""
    only: tuple[str, ...] = ()
    """Labels of the settings to run; default: all."""
    eval_bytes: int = 2_000_000
    """Bytes of validation text to evaluate."""
    eval_every: int = 0
    """Steps between evaluations, to find the best one (0: only at the end)."""
    results: str = "ablate.jsonl"
    """File for finished runs, one per line; new ones are appended."""
    work: str = "ablate"
    """Folder for tokenizers and the runs' logs."""

    def __post_init__(self) -> None:
        if (self.seconds is not None) + (self.flops is not None) + self.ladder != 1:
            raise ValueError("give one of --seconds, --flops and --ladder: equal compute for every run")
        if unknown := set(self.only) - set(EXPERIMENTS[self.experiment]):
            raise ValueError(f"--only names {sorted(unknown)}; there is {list(EXPERIMENTS[self.experiment])}")


def merged_flags(cfg: Config, flags: str, seed: int, flops: float | None) -> dict[str, str]:
    """Flags of one run by name; later ones replace earlier ones."""
    compute = f"--hours={cfg.seconds / 3600}" if cfg.seconds else f"--target_flops={flops}"
    common = f"--vocab_size={cfg.vocab_size} --dtype={cfg.dtype} --seed={seed} {compute} {cfg.base}"
    words = [word.removeprefix("--").split("=", 1) for word in f"{common} {flags}".split()]
    merged = dict(words)
    if merged.get("recipe") in ("small", "portable", "modern") and "--total_batch_size" not in flags:
        merged.pop("total_batch_size", None)  # the recipe's own
    return merged


def run_module(module: str, flags: dict[str, str], base_dir: Path, log: Path) -> None:
    """Run a script. Its output goes to the log; if it fails, the end of it goes into the error."""
    command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in flags.items())]
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.call(
            command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"NANOCHAT_BASE_DIR": str(base_dir)}
        )
    if code:
        raise RuntimeError(f"{' '.join(command)} failed: {log.read_text(encoding='utf-8')[-800:]}")


def shards_of(folder: str | Path) -> list[Path]:
    """The shards of a corpus; the last one is the validation text."""
    return sorted(Path(folder).glob("*.parquet"))


def part_of(cfg: Config) -> Config:
    """The settings with a corpus of the first `train_bytes` of text, and the same validation text."""
    if cfg.train_bytes is None:
        return cfg
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(cfg.work).absolute() / f"first_{cfg.train_bytes}"
    if not folder.exists():
        *train, val = shards_of(cfg.data)
        texts, left = [], cfg.train_bytes
        for group in (g for path in train for g in pq.ParquetFile(path).iter_batches(columns=["text"])):
            for text in group["text"].to_pylist():
                if left > 0:
                    texts.append(text)
                    left -= len(text.encode())
        if left > 0:
            raise ValueError(f"--train_bytes={cfg.train_bytes}: {cfg.data} has {left} bytes less than that to train on")
        begun = folder.with_name(folder.name + ".begun")
        begun.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": texts}), begun / "shard_00000.parquet", row_group_size=256)
        shutil.copyfile(val, begun / "shard_00001.parquet")
        begun.rename(folder)
    return replace(cfg, data=str(folder))


def prepare(cfg: Config, vocab_size: int) -> tuple[Path, float]:
    """The base folder of a vocabulary, with its tokenizer, and its bytes per token of validation text."""
    part = "" if cfg.train_bytes is None else f"_first_{cfg.train_bytes}"
    base_dir = Path(cfg.work).absolute() / f"vocab_{vocab_size}{part}"
    base_dir.mkdir(parents=True, exist_ok=True)
    record = base_dir / "bytes_per_token.json"
    if not record.exists():
        flags = {"vocab_size": str(vocab_size), "data_dir": cfg.data}
        run_module("scripts.tok_train", flags, base_dir, base_dir / "tok_train.log")
        import pyarrow.parquet as pq

        from nanochat.tokenizer import RustBPETokenizer

        tokenizer = RustBPETokenizer.from_directory(base_dir / "tokenizer")
        file = pq.ParquetFile(sorted(Path(cfg.data).glob("*.parquet"))[-1])
        texts = file.read_row_group(0, columns=["text"])["text"].to_pylist()
        num_tokens = sum(len(ids) for ids in tokenizer.encode(texts))
        record.write_text(json.dumps(sum(len(text.encode()) for text in texts) / num_tokens), encoding="utf-8")
    return base_dir, json.loads(record.read_text(encoding="utf-8"))


def run_one(cfg: Config, flags: dict[str, str]) -> tuple[dict[str, Any], Path]:
    """Train once, or go on with what a kill has left: the figures that are compared, the cost, and the run's folder."""
    flags = dict(flags)
    base_dir, bytes_per_token = prepare(cfg, int(flags.pop("vocab_size")))
    flags |= {
        "data_dir": cfg.data,
        "eval_tokens": str(int(cfg.eval_bytes / bytes_per_token)),
        "eval_every": str(cfg.eval_every),
    }
    flags |= {"sample_every": "0", "save_every_minutes": "15"}
    # By its flags: only this very run goes on there.
    flags["model_tag"] = f"ablate-{hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:12]}"
    folder = base_dir / "base_checkpoints" / flags["model_tag"]
    if folder.exists():
        print(f"goes on with the run in {folder} (if the code has changed since, delete it)", flush=True)
    run_module("scripts.base_train", flags, base_dir, base_dir / "base_train.log")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [r for r in records if "loss" in r][-1]
    evaluated = [r for r in records if "val_bpb" in r]
    values = [(r["val_bpb"], r["step"]) for r in evaluated]
    # of the weights of a step alone, where the mean of the latest ones was looked at too
    own = [r.get("own_val_bpb", r["val_bpb"]) for r in evaluated]
    best, at = min(values)
    epochs = last["tokens"] * bytes_per_token / corpus_bytes(cfg)
    result = {
        "val_bpb": values[-1][0],
        "best_bpb": best,
        "own_bpb": own[-1],
        "best_own_bpb": min(own),
        "epochs": epochs,
        "best_epoch": epochs * at / last["step"],
        "train_loss": last["loss"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "seconds": last["seconds"],
        "curve": [(step, round(value, 5)) for value, step in values],
    }
    return result, folder


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and spread (sample deviation) of each setting, best first."""
    lines = ["| setting | val bpb | ± | runs | steps | million tokens | best, at epoch |", "|---" * 7 + "|"]
    for label, runs in sorted(rows.items(), key=lambda item: statistics.mean(r["val_bpb"] for r in item[1])):
        values = [r["val_bpb"] for r in runs]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"
        steps, tokens = (statistics.mean(r[key] for r in runs) for key in ("steps", "tokens"))
        best = [f"{r['best_bpb']:.4f} at {r['best_epoch']:.1f} of {r['epochs']:.1f}" for r in runs if "best_bpb" in r]
        lines.append(
            f"| {label} | {statistics.mean(values):.4f} | {spread} | {len(runs)} | {steps:.0f} | {tokens / 1e6:.2f} | "
            f"{', '.join(best) or '–'} |"
        )
    return "\n".join(lines)


def corpus_bytes(cfg: Config) -> int:
    """Bytes of training text, by the shards' own count.

    Raises:
        ValueError: there are no shards of text to train on.
    """
    import pyarrow.parquet as pq

    total = 0
    for path in sorted(Path(cfg.data).glob("*.parquet"))[:-1]:
        shard = pq.ParquetFile(path)
        column = shard.schema_arrow.get_field_index("text")
        if column < 0:
            raise ValueError(f"{path} has no column named text")
        total += sum(
            shard.metadata.row_group(i).column(column).total_uncompressed_size for i in range(shard.num_row_groups)
        )
    if not total:  # said now, not after the first rung
        raise ValueError(f"--data={cfg.data} holds no parquet shards to train on besides the last, the validation text")
    return total


def run_rung(cfg: Config, flops: float | None) -> dict[str, list[dict[str, Any]]]:
    """Run whatever is missing at one amount of compute, all settings seed by seed; print the table after each seed."""
    path = Path(cfg.results)
    done = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    settings = {k: v for k, v in EXPERIMENTS[cfg.experiment].items() if not cfg.only or k in cfg.only}
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in cfg.seeds:
        for label, own in settings.items():
            flags = merged_flags(cfg, own, seed, flops)
            asked = {"flags": flags, "eval_bytes": cfg.eval_bytes, "train_bytes": cfg.train_bytes}
            result = next((r for r in done if all(r.get(name) == value for name, value in asked.items())), None)
            if result is None:
                start = time.time()
                result = {"experiment": cfg.experiment, "setting": label, **asked}
                figures, folder = run_one(cfg, flags)
                result |= figures | {"date": time.strftime("%Y-%m-%d %H:%M")}
                with open(path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(result) + "\n")
                # Only now: until here it can go on. The latest model stays, for dev/bench/same_rows.py and base_loss.
                shutil.rmtree(latest := folder.with_name("ablate"), ignore_errors=True)
                folder.rename(latest)
                print(f"{label}, seed {seed}: {result['val_bpb']:.4f} ({time.time() - start:.0f} s)", flush=True)
            rows.setdefault(label, []).append(result)
        print(table(rows), flush=True)
    return rows


def verdict(gains: Sequence[float], noise: float) -> str:
    """What a setting's gains at the rungs, as shares of the first setting's loss, say: counts, shrinks or loses.

    It counts when it is better at every rung but the lowest, and its gain at the last is no smaller than at the one
    before by more than `noise`, the deviation of one gain.
    """
    if min(gains[1:]) <= 0:
        return "loses"
    return "shrinks" if gains[-1] < gains[-2] - noise else "counts"


def law_text(runs: Sequence[tuple[float, float]], noise: float) -> str:
    """Two cells: the law through runs of (FLOPs, bits per byte), and what it says of the next rung; with ranges."""
    try:
        best, others = power_law(runs, noise)
    except ValueError as error:  # hours of runs must not end without their table
        return f"{error} | –"
    floors, exponents = [law.floor for law in others], [law.exponent for law in others]
    at = [law.bpb(NEXT_RUNG) for law in others]
    return (
        f"{best.floor:.2f} + {best.scale:.2f}·(C/1e15)^−{best.exponent:.2f} "
        f"(floor {min(floors):.2f} to {max(floors):.2f}, exponent {min(exponents):.2f} to {max(exponents):.2f}) | "
        f"{best.bpb(NEXT_RUNG):.3f} ({min(at):.3f} to {max(at):.3f})"
    )


def ladder_table(rungs: dict[float, dict[str, list[dict[str, Any]]]]) -> str:
    """Every setting at every rung, its gain over the first setting, its law L(C) and what that says of the next rung.

    `rungs`: FLOPs -> setting -> its runs.
    """
    means = {
        flops: {label: statistics.mean(run["val_bpb"] for run in runs) for label, runs in rows.items()}
        for flops, rows in rungs.items()
    }
    groups = [[run["val_bpb"] for run in runs] for rows in rungs.values() for runs in rows.values()]
    spreads = [statistics.stdev(g) / statistics.mean(g) for g in groups if len(g) > 1]
    noise = statistics.mean(spreads) if spreads else SEED_NOISE  # of one run
    base, *_ = labels = list(next(iter(rungs.values())))
    gain_noise = noise * math.sqrt(2 / min(map(len, groups)))  # of a difference of two means
    head = " | ".join(f"{flops:.3g} FLOPs" for flops in rungs)
    lines = [f"| setting | {head} | against {base} | law | at {NEXT_RUNG:.3g} |", "|---" * (len(rungs) + 4) + "|"]
    for label in labels:
        gains = [1 - mean[label] / mean[base] for mean in means.values()]
        against = "" if label == base else ", ".join(f"{-gain:+.1%}" for gain in gains)
        against += "" if label == base else f": {verdict(gains, gain_noise)}"
        runs = [(flops, run["val_bpb"]) for flops, rows in rungs.items() for run in rows[label]]
        values = " | ".join(f"{mean[label]:.4f}" for mean in means.values())
        lines.append(f"| {label} | {values} | {against} | {law_text(runs, noise)} |")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Run the matrix, once or at every rung of the ladder; print the tables."""
    cfg = part_of(cfg)
    if not cfg.ladder:
        run_rung(cfg, cfg.flops)
        return
    text, rungs = corpus_bytes(cfg), {}
    for flops in LADDER:
        print(f"\n{flops:.3g} FLOPs", flush=True)
        rows = rungs[flops] = run_rung(cfg, flops)
        epochs = {}
        for label, runs in rows.items():
            bytes_per_token = prepare(cfg, int(runs[0]["flags"]["vocab_size"]))[1]
            epochs[label] = runs[0]["tokens"] * bytes_per_token / text
        print("epochs: " + ", ".join(f"{label} {share:.2f}" for label, share in epochs.items()), flush=True)
    print(f"\n{ladder_table(rungs)}", flush=True)
    ladder: dict[str, list[tuple[float, float]]] = {}
    for flops, rows in rungs.items():
        for label, runs in rows.items():
            ladder.setdefault(label, []).extend((flops, run["val_bpb"]) for run in runs)
    draw(ladder, picture := Path(cfg.results).with_suffix(".svg"))
    print(f"drawn in {picture}", flush=True)


if __name__ == "__main__":
    run_script(main, Config)
