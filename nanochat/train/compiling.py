"""torch.compile where it pays on this card, for this model, in this run: measured, not assumed.

Compiling takes a while and may fail (no C compiler, an old Triton); short runs never earn that back. The decision
is kept in the checkpoint, so that a resumed run computes the same bits. The optimizer needs no compiled kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Compute
from nanochat.env import print0
from nanochat.gpt import GPT

Hidden = Callable[..., Tensor]
WORTH_SECONDS = 600.0
"""Shorter runs stay eager: compiling could not earn its time back."""
MIN_SPEEDUP = 1.03
"""Less than this is within the noise of three passes."""


def compiled(model: GPT) -> Hidden:
    """The layers of `model`, compiled at the first call; the loss works chunk by chunk and stays outside."""
    hidden: Hidden = torch.compile(model.hidden, dynamic=False)
    return hidden


def seconds_per_pass(hidden: Hidden, model: GPT, compute: Compute, idx: Tensor, passes: int = 3) -> float:
    """The fastest forward and backward pass over tokens `idx` (B, T), after one to warm up; leaves no gradients."""
    best, found = float("inf"), model.recall.nothing(idx) if model.config.recall else None
    for i in range(passes + 1):
        compute.synchronize()
        start = time.perf_counter()
        with compute.precision.autocast():
            x = hidden(idx, found=found)
        x.float().mean().backward()
        compute.synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    return best


def should_compile(
    model: GPT, compute: Compute, idx: Tensor, passes_left: float | None, seconds_left: float | None
) -> bool:
    """True if the rest of the run is faster with compiled layers; the same answer on all ranks.

    Args:
        model: in training mode, without gradients.
        compute: where it runs.
        idx: (B, T), a micro-batch of the run.
        passes_left: micro-batches to come; None: only the clock ends the run.
        seconds_left: of the clock; None: it does not end the run.
    """
    eager = compute.broadcast(seconds_per_pass(model.hidden, model, compute, idx))
    limits = seconds_left, None if passes_left is None else passes_left * eager
    left = min(limit for limit in limits if limit is not None)
    if left < WORTH_SECONDS:
        print0(f"compile off: the {left:.0f} s of this run would not earn back the time to compile")
        return False
    try:
        fast = seconds_per_pass(compiled(model), model, compute, idx)
    except Exception as error:  # whatever the compiler dies of, the run does without it
        print0(f"warning: torch.compile does not work here ({str(error).strip().splitlines()[:1]}); continuing without")
        fast = float("inf")
        model.zero_grad(set_to_none=True)
    slowest = torch.tensor(fast, device=compute.device)
    if compute.ddp:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    fast = float(slowest)
    chosen = fast * MIN_SPEEDUP < eager
    print0(f"compile {'on' if chosen else 'off'}: {1e3 * eager:.1f} ms per pass eager, {1e3 * fast:.1f} ms compiled")
    return chosen
