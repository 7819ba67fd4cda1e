"""Float32 products in bfloat16: only where they are allowed, and as close as bfloat16 can be."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, GPTConfig
from nanochat.ops.linear import Linear, training_product_dtype
from nanochat.precision import DTYPES, MEDIUM, Precision


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Linear(64, 48)


def gradients(layer, x, seed, dtype=None):
    layer.product_dtype = dtype
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, layer.weight), seed.to(y.dtype))]


def test_a_product_dtype_rounds_the_factors_of_all_three_products_and_keeps_gradients_float32(layer):
    x, seed = torch.randn(3, 5, 64), torch.randn(3, 5, 48)
    ours = gradients(layer, x, seed, MEDIUM)
    low_x, low_w, low_g = (t.to(MEDIUM).double() for t in (x, layer.weight.detach(), seed))
    expected = [
        F.linear(low_x, low_w),
        low_g @ low_w,
        torch.einsum("bto,bti->oi", low_g, low_x),
    ]
    assert [t.dtype for t in ours] == [MEDIUM, torch.float32, torch.float32]
    for a, b in zip(ours, expected, strict=True):
        assert float((a.detach().double() - b).norm() / b.norm()) < 2**-8  # the result is rounded to bfloat16 once


def test_without_a_product_dtype_or_a_gradient_and_in_float64_products_are_exact(layer):
    x, seed = torch.randn(3, 5, 64), torch.randn(3, 5, 48)
    plain = [F.linear(x, layer.weight), seed @ layer.weight]
    for a, b in zip(gradients(layer, x, seed), plain, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    layer.product_dtype = MEDIUM
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain[0], rtol=1e-6, atol=1e-6)
    assert training_product_dtype(x.double(), MEDIUM) == torch.float64
    with torch.autocast("cpu", dtype=MEDIUM):
        assert training_product_dtype(x) == MEDIUM


def test_a_model_learns_the_same_with_rounded_products():
    """20 steps on one batch: the loss falls as far as in exact float32, within 1 %."""
    config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64)
    tokens = torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(0))
    ends = []
    for dtype in (None, MEDIUM):
        model = GPT(config)
        model.set_product_dtype(dtype)
        model.init_weights(torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(20):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 3.5
    assert ends[1] == pytest.approx(ends[0], rel=0.01)
    assert ends[1] != ends[0]  # the products were rounded


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("has_bf16", [False, True])
def test_speed_is_measured_in_the_dtype_that_training_multiplies_in(monkeypatch, dtype, has_bf16):
    monkeypatch.setattr("nanochat.precision.cpu_has_bf16", lambda: has_bf16)
    precision = Precision("cpu", dtype)
    with precision.autocast():
        assert precision.product_dtype == training_product_dtype(torch.ones(2, 2), precision.product_dtype)
