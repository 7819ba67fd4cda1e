"""The memory model counts what autograd really saves, and the largest micro-batch follows from it."""

import contextlib
from dataclasses import replace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.ops import native
from nanochat.plan.memory import (
    SMALL_CHUNKS,
    SMALLEST,
    MicroBatch,
    StepSetup,
    depth_that_fits,
    estimate_training_memory,
    largest_micro_batch,
    least_bytes,
    saved_bytes,
)
from nanochat.precision import DTYPES
from nanochat.recipe import MODERN, PORTABLE, SMALL

GIB = 2**30


def really_saved(config, rows, dtype, checkpointing=False):
    """Bytes of the different tensors, other than parameters, that autograd saves in a forward pass."""
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    model.activation_checkpointing = checkpointing
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen = {}

    def pack(t):
        key = t.untyped_storage().data_ptr()
        if key not in own:
            seen[key] = (t.untyped_storage().nbytes(), t)  # the tensor is held, so that no address is used twice
        return t

    x = torch.randint(0, config.vocab_size, (rows, config.sequence_len))
    # What is planned is torch's path, which cards take; the kernels for CPUs save a little less.
    autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=DTYPES[dtype])
    with native.reference_only(), autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.hidden(x)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize(
    "switches",
    [{}, MODERN.switches, SMALL.switches, PORTABLE.switches, {"n_kv_head": 1}],
    ids=["classic", "modern", "small", "portable", "gqa"],
)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_activations_are_what_autograd_saves(dtype, switches):
    for depth, rows in ((4, 2), (2, 3)):
        config = GPTConfig.from_depth(depth, 500, 128, **switches)
        model_says = saved_bytes(config, MicroBatch(rows), 128, StepSetup(DTYPES[dtype], "cpu"))
        assert model_says == pytest.approx(really_saved(config, rows, dtype), rel=0.15 if "smear" in switches else 0.03)


def test_activation_checkpointing_keeps_the_inputs_of_the_layers():
    config = GPTConfig.from_depth(4, 500, 128)
    on_cpu = StepSetup(torch.float32, "cpu")
    kept = saved_bytes(config, MicroBatch(2, activation_checkpointing=True), 128, on_cpu)
    assert kept == pytest.approx(really_saved(config, 2, "float32", checkpointing=True), rel=0.05)
    assert kept < 0.15 * saved_bytes(config, MicroBatch(2), 128, on_cpu)


def test_weights_gradients_and_moments_are_counted_exactly():
    config = GPTConfig.from_depth(12, 65536)
    matrices, rest = 12 * 12 * 768**2, 2 * 65536 * 768
    estimate = estimate_training_memory(config, MicroBatch(8), 2048, StepSetup(torch.float16))
    assert estimate.weights == estimate.gradients == 4 * (matrices + rest)
    assert estimate.optimizer == 4 * matrices + 8 * rest
    of_four = estimate_training_memory(config, MicroBatch(8), 2048, StepSetup(torch.float16, world_size=4))
    assert of_four.optimizer == estimate.optimizer // 4
    parts = list(vars(estimate).values())
    assert estimate.total == sum(parts)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    config, T, setup = GPTConfig.from_depth(12, 65536), 2048, StepSetup(torch.float16)

    def needs(micro):
        return estimate_training_memory(config, micro, T, setup).total

    def choose(budget, max_rows=64):
        return largest_micro_batch(config, budget, T, setup, max_rows)

    micro = choose(16e9)
    assert needs(micro) <= 16e9 < needs(replace(micro, rows=2 * micro.rows))
    assert choose(16e9, max_rows=3).rows == 3
    assert choose(1e12).rows == 32  # more is no faster
    one = needs(MicroBatch(1))
    assert choose(one) == MicroBatch(1)
    assert choose(one - 1).rows == 1
    assert choose(one - 1).loss_chunk_bytes in SMALL_CHUNKS
    assert choose(needs(MicroBatch(1, SMALL_CHUNKS[-1])) - 1).activation_checkpointing
    assert choose(1e9) is None
    depth = depth_that_fits(config, 3 * GIB, T, setup)
    assert 1 <= depth < 12
    assert depth_that_fits(config, 1e6, T, setup) is None


def test_measures_against_too_little_memory_come_to_an_end():
    micro, seen = MicroBatch(5), []
    while micro is not None:
        seen.append(micro)
        micro = micro.smaller()
    assert [m.rows for m in seen] == [5, 3, 2, 1, 1, 1, 1]
    assert [m.loss_chunk_bytes for m in seen[3:]] == [None, *SMALL_CHUNKS, SMALL_CHUNKS[-1]]
    assert [m.activation_checkpointing for m in seen] == [False] * 6 + [True]


def test_a_model_of_thousands_of_layers_is_refused_without_being_built(monkeypatch):
    built = []

    def build(config):
        built.append(config.n_layer)
        return GPT(config)

    monkeypatch.setattr("nanochat.plan.memory.GPT", build)
    config, budget, setup = GPTConfig.from_depth(4000, 65536), 16e9, StepSetup(torch.float32, "cpu")
    assert largest_micro_batch(config, budget, 2048, setup) is None
    depth = depth_that_fits(config, budget, 2048, setup)
    assert depth is not None
    assert max(built) < 2 * depth
    deeper = GPTConfig.from_depth(depth + 1, 65536)
    assert largest_micro_batch(deeper, budget, 2048, setup) is None
    assert largest_micro_batch(GPTConfig.from_depth(depth, 65536), budget, 2048, setup) is not None
    share = least_bytes(deeper) / estimate_training_memory(deeper, SMALLEST, 2048, setup).total
    assert 0.2 < share < 1  # a bound from below, and not far below
