"""Time the chunked, softcapped cross entropy with its gradients, compared with the plain way: all logits at once.

    python dev/bench/loss.py
    python dev/bench/loss.py --dtype float32 --vocab_sizes 8192 65536

The peer is what every GPT does: logits = lm_head(x), softcap and softmax in float32, F.cross_entropy, backward. Both
take turns in one process; medians over the rounds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanochat.gpt import LOGIT_SOFTCAP
from nanochat.hardware import synchronize
from nanochat.ops.cpu import keep_freed_memory
from nanochat.ops.loss import linear_cross_entropy, softcap
from nanochat.precision import DTYPES


def ours(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The chunked loss."""
    return linear_cross_entropy(x, weight, targets, weight.size(0), LOGIT_SOFTCAP, dtype=dtype)


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The loss from all logits at once."""
    return F.cross_entropy(softcap((x.to(dtype) @ weight.to(dtype).t()).float(), LOGIT_SOFTCAP), targets)


def main(args: argparse.Namespace) -> None:
    """Time both in turns, for every vocabulary."""
    keep_freed_memory()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    print(f"{args.tokens} tokens of width {args.width}, {args.dtype}, {args.device}, torch {torch.__version__}")
    result = {}
    for vocab in args.vocab_sizes:
        x = torch.randn(args.tokens, args.width, device=device, requires_grad=True)
        weight = (0.3 * torch.randn(vocab, args.width, device=device)).requires_grad_()
        targets = torch.randint(0, vocab, (args.tokens,), device=device)
        seconds: dict[str, list[float]] = {"plain": [], "ours": []}
        for round_ in range(args.rounds + 1):
            for name, loss in (("plain", plain), ("ours", ours)):
                start = time.perf_counter()
                torch.autograd.grad(loss(x, weight, targets, dtype), (x, weight))
                synchronize(device)
                if round_:  # the first round allocates the memory
                    seconds[name].append(time.perf_counter() - start)
        median = {name: 1000 * statistics.median(times) for name, times in seconds.items()}
        ratio = statistics.median(p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True))
        print(f"vocabulary {vocab:6}: plain {median['plain']:7.1f} ms, ours {median['ours']:7.1f} ms, {ratio:.2f} ×")
        result[vocab] = median | {"ratio": ratio}
    print(json.dumps(vars(args) | {"result": result}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[4096, 8192, 32768])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
