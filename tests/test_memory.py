"""The memory model counts what autograd really saves, and the largest micro-batch follows from it."""

import contextlib
from dataclasses import replace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import (
    SMALL_CHUNKS,
    MicroBatch,
    depth_that_fits,
    estimate_training_memory,
    free_memory,
    largest_micro_batch,
    saved_bytes,
)
from nanochat.precision import DTYPES
from nanochat.recipe import MODERN

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
    autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast("cpu", dtype=DTYPES[dtype])
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.hidden(x)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("switches", [{}, MODERN.switches, {"n_kv_head": 1}], ids=["classic", "modern", "gqa"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_activations_are_what_autograd_saves(dtype, switches):
    for depth, rows in ((4, 2), (2, 3)):
        config = GPTConfig.from_depth(depth, 500, 128, **switches)
        model_says = saved_bytes(config, rows, 128, DTYPES[dtype], device_type="cpu")
        assert model_says == pytest.approx(really_saved(config, rows, dtype), rel=0.03)


def test_activation_checkpointing_keeps_the_inputs_of_the_layers():
    config = GPTConfig.from_depth(4, 500, 128)
    kept = saved_bytes(config, 2, 128, torch.float32, activation_checkpointing=True, device_type="cpu")
    assert kept == pytest.approx(really_saved(config, 2, "float32", checkpointing=True), rel=0.15)
    assert kept < 0.15 * saved_bytes(config, 2, 128, torch.float32, device_type="cpu")
