"""Micro-batches that fit: the largest one that a real step survives, and the next smaller one when memory runs out."""

from __future__ import annotations

import torch

from nanochat.common import Compute
from nanochat.env import print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import free_memory, is_out_of_memory, release_memory
from nanochat.optim import MuonAdamW
from nanochat.plan.local_speed import pass_seconds, random_tokens
from nanochat.plan.memory import (
    GB,
    SMALLEST,
    MicroBatch,
    StepSetup,
    depth_that_fits,
    estimate_training_memory,
    largest_micro_batch,
    least_bytes,
)


def too_large(config: GPTConfig, compute: Compute, budget_bytes: float) -> RuntimeError:
    """The error for a model with which not even one sequence fits; names the depth that does."""
    setup = StepSetup(compute.dtype, compute.device_type)
    needed = f"more than {least_bytes(config) / GB:,.0f}"
    if least_bytes(config) <= budget_bytes:
        needed = f"about {estimate_training_memory(config, SMALLEST, config.sequence_len, setup).total / GB:.1f}"
    depth = depth_that_fits(config, budget_bytes, config.sequence_len, setup)
    remedy = f"--depth={depth} fits" if depth else "no depth fits with this vocabulary and context"
    return RuntimeError(
        f"a model of depth {config.n_layer} does not fit into the memory of this device: one sequence of "
        f"{config.sequence_len} tokens needs {needed} GB, {budget_bytes / GB:.1f} GB are free; "
        f"{remedy}"
    )


def refuse_too_large(config: GPTConfig, compute: Compute, only_warn: bool = False) -> None:
    """Raise before any work if not even one sequence fits, by the memory model; or only warn, if the weights fit.

    Raises:
        RuntimeError: names the depth that fits.
    """
    budget = free_memory(compute.device)
    setup = StepSetup(compute.dtype, compute.device_type, compute.world_size)
    if largest_micro_batch(config, budget, config.sequence_len, setup) is None:
        error = too_large(config, compute, budget)
        if not only_warn or least_bytes(config) > budget:
            raise error
        print0(f"warning: {error}; trying all the same, as the rows are given")


def smaller_micro_batch(
    model: GPT, optimizer: MuonAdamW, compute: Compute, micro: MicroBatch | None, rows: int
) -> MicroBatch:
    """The next measure after a step ran out of memory with `micro` (None: `rows` at a time), the same on all ranks.

    Raises:
        RuntimeError: there is none; names the depth that fits.
    """
    optimizer.zero_grad(set_to_none=True)
    release_memory()
    rows = int(compute.broadcast(rows))  # the answers of RL may not be as many on every rank
    before = micro or MicroBatch(rows, None, model.activation_checkpointing)
    after = before.smaller()
    if after is None:
        own = [*model.parameters(), *optimizer.own_flat_state().values()]  # a model of another size has it too
        budget = free_memory(compute.device) + sum(x.numel() * x.element_size() for x in own)
        raise too_large(model.config, compute, budget)
    after.apply(model)
    print0(f"out of memory with {before}; the step is made again with {after}, nothing is lost")
    return after


def seconds_of(model: GPT, compute: Compute, rows: int, sequence_len: int, reserve_bytes: int) -> float | None:
    """Seconds of a forward and backward pass of random tokens; None if memory runs out.

    Args:
        model: on the device, in training mode; its gradients are dropped.
        compute: where it runs.
        rows: sequences in the micro-batch.
        sequence_len: tokens per sequence.
        reserve_bytes: memory that the optimizer will hold.
    """
    idx = random_tokens(model.config.vocab_size, rows, sequence_len, compute.device)
    model.set_product_dtype(compute.precision.product_dtype)
    try:
        held = torch.empty(reserve_bytes if compute.device_type == "cuda" else 0, dtype=torch.uint8, device=idx.device)
        # In the first pass libraries load; the second meets the gradients of the first.
        seconds = [pass_seconds(model, compute.precision, idx) for _ in range(2)][-1]
        del held
        return seconds
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        model.zero_grad(set_to_none=True)


def choose_micro_batch(
    model: GPT, compute: Compute, sequence_len: int, max_rows: int, activation_checkpointing: bool = False
) -> tuple[MicroBatch, float]:
    """The largest micro-batch by the memory model that a real step survives, and its seconds; the same on all ranks.

    Args:
        model: on the device, in training mode, without gradients.
        compute: where it runs.
        sequence_len: tokens per sequence.
        max_rows: sequences of a whole step per process; the micro-batch divides them.
        activation_checkpointing: it is asked for anyway.

    Raises:
        RuntimeError: not even one sequence fits; names the depth that does.
    """
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = free_memory(compute.device) + weights
    if compute.ddp:
        smallest = torch.tensor(float(budget), device=compute.device)
        torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
        budget = int(smallest)
    setup = StepSetup(compute.dtype, compute.device_type, compute.world_size)
    micro = largest_micro_batch(config, budget, sequence_len, setup, max_rows, activation_checkpointing)
    while micro is not None:
        micro.apply(model)
        held = estimate_training_memory(config, MicroBatch(1), sequence_len, setup)
        seconds = seconds_of(model, compute, micro.rows, sequence_len, held.optimizer)
        release_memory()
        (failed,) = compute.any_rank(seconds is None)
        if not failed:
            seconds = compute.broadcast(seconds or 0.0)
            print0(f"micro-batch: {micro} (auto; {budget / GB:.1f} GB for training)")
            return micro, seconds
        print0(f"micro-batch: {micro} do not fit after all")
        micro = micro.smaller()
        while micro is not None and max_rows % micro.rows:
            micro = MicroBatch(micro.rows - 1, micro.loss_chunk_bytes, micro.activation_checkpointing)
    raise too_large(config, compute, budget)
