"""Evaluate our models and nanochat's (of 2026) on both kinds of validation sequences.

    python dev/bench/same_rows.py --peer /tmp/nanochat --peer_base ablate/peer_nanochat_8192_123 \
        --ours ablate/vocab_8192 --data FOLDER

dev/bench/quality.py leaves the folder of the peer's run, dev/ablate.py that of ours. Our validation sequences are cut
from a stream of text; each of the peer's begins with a document, and what does not fit is cut off, so its figures are
lower on the same text. Each model is run by its own code, in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanochat.config import run_script  # noqa: E402
from nanochat.data.corpus import open_corpus  # noqa: E402
from nanochat.dataloader import PretrainLoader  # noqa: E402
from nanochat.loss_eval import evaluate_bpb  # noqa: E402

# Runs with the peer's package: saves its sequences, prints the bits per byte of its model on them and on ours.
PEER = """
import json, sys, torch
from nanochat.checkpoint_manager import load_model
from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit as loader
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import get_token_bytes
folder, rows, length, batches = sys.argv[1], *map(int, sys.argv[2:])
model, tokenizer, _ = load_model("base", torch.device("cpu"), "eval")
batches = zip(range(batches), loader(tokenizer, rows, length, split="val", device="cpu"))
own = [(x.clone(), y.clone()) for _, (x, y) in batches]
torch.save(own, f"{folder}/peer.pt")
sets = {"peer": own, "ours": torch.load(f"{folder}/ours.pt")}
print(json.dumps({k: evaluate_bpb(model, iter(v), len(v), get_token_bytes("cpu")) for k, v in sets.items()}))
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Two models with the same vocabulary."""

    peer: str
    """A checkout of nanochat."""
    peer_base: str
    """The base folder of the peer's run."""
    ours: str
    """Our base folder, with base_checkpoints and the tokenizer."""
    data: str
    """Folder of parquet shards; the last one is the validation text."""
    model_tags: tuple[str, ...] = ("ablate",)
    """Tags of our models."""
    rows: int = 8
    """Sequences per batch."""
    sequence_len: int = 512
    """Tokens per sequence."""
    eval_bytes: int = 2_000_000
    """Bytes of validation text to evaluate."""


def main(cfg: Config) -> None:
    """Evaluate both models on both kinds of sequences."""
    os.environ["NANOCHAT_BASE_DIR"] = str(Path(cfg.ours).resolve())
    from nanochat.checkpoint_manager import load_model
    from nanochat.tokenizer import get_token_bytes

    device = torch.device("cpu")
    models = {}
    for tag in cfg.model_tags:
        models[tag], tokenizer, _ = load_model("base", device, "eval", tag)
    known = json.loads((Path(cfg.ours) / "bytes_per_token.json").read_text(encoding="utf-8"))
    tokens = int(cfg.eval_bytes / known)
    corpus = open_corpus(cfg.data)
    max_rows = max(1, tokens // cfg.sequence_len)
    stream = PretrainLoader(corpus, tokenizer, cfg.rows, cfg.sequence_len, split="val", max_rows=max_rows)
    own = [(x.clone(), y.clone()) for x, y in stream]
    peer_base = Path(cfg.peer_base).resolve()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(own, f"{folder}/ours.pt")
        environment = os.environ | {"NANOCHAT_BASE_DIR": str(peer_base), "NANOCHAT_DTYPE": "float32"}
        environment["PYTHONPATH"] = f"{Path(cfg.peer).resolve()}{os.pathsep}{peer_base / 'packages'}"
        numbers = [str(n) for n in (cfg.rows, cfg.sequence_len, tokens // (cfg.rows * cfg.sequence_len))]
        command = [sys.executable, "-c", PEER, folder, *numbers]
        done = subprocess.run(command, cwd=cfg.peer, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the peer failed: {done.stderr[-2000:]}")
        peer = json.loads(done.stdout.splitlines()[-1])
        other = torch.load(f"{folder}/peer.pt")
    token_bytes = get_token_bytes(device)
    results = {}
    for tag, model in models.items():
        result = {name: evaluate_bpb(model, rows, None, token_bytes) for name, rows in (("ours", own), ("peer", other))}
        for rows, name in (("ours", "stream"), ("peer", "the peer's rows")):
            less = 1 - result[rows] / peer[rows]
            print(f"{tag}, {name}: ours {result[rows]:.4f}, the peer {peer[rows]:.4f}, {less:.1%} lower", flush=True)
        results[tag] = result
    print(json.dumps({"ours": results, "peer": peer}))


if __name__ == "__main__":
    run_script(main, Config)
