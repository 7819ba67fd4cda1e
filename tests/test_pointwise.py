"""The norm, the squared ReLU and rotated heads written out by hand are torch's."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.ops import native, pointwise
from nanochat.ops.pointwise import apply_rotary, relu_squared, rms_norm, rotary_norm, rotary_tables


@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 7, 4, 32), (1, 8)])
def test_value_and_gradient_equal_torchs(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    ours, theirs = rms_norm(x, 1e-6), F.rms_norm(x, (shape[-1],), eps=1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    a, b = torch.autograd.grad(ours, x, g)[0], torch.autograd.grad(theirs, x, g)[0]
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_are_normed_in_float32(dtype):
    x = torch.full((2, 64), 300.0, dtype=dtype)  # 300² overflows float16
    torch.testing.assert_close(rms_norm(x, 1e-6), torch.ones(2, 64, dtype=dtype))
    assert torch.isfinite(rms_norm(torch.zeros(2, 64, dtype=dtype), 1e-6)).all()


def test_squared_relu_and_its_gradient():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(relu_squared(x), torch.relu(x) ** 2)
    assert torch.autograd.gradcheck(relu_squared, (x,))


def heads(dtype, own_positions):
    """x (3, 7, 2, 8) and the tables, the same for all sequences or of their own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, 2, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    positions = torch.randint(0, 50, (3, 7), generator=generator) if own_positions else torch.arange(7)[None]
    cos, sin = (table[positions].unsqueeze(2) for table in rotary_tables(50, 8, 100.0))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, cos.to(wide), sin.to(wide)


@pytest.mark.parametrize("block", [1, 3 * 16, 2 * 7 * 16, 1 << 17], ids=["a token", "3 tokens", "2 sequences", "all"])
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotated_heads_are_normed_block_by_block_as_in_one_go(monkeypatch, dtype, own_positions, block):
    monkeypatch.setattr(pointwise, "ROTARY_BLOCK", block)
    x, cos, sin = heads(dtype, own_positions)
    with native.reference_only():
        ours, reference = rotary_norm(x, cos, sin, 1e-6, dtype), rms_norm(apply_rotary(x, cos, sin), 1e-6).to(dtype)
    torch.testing.assert_close(ours, reference, rtol=0, atol=0)  # the same bits, at least in the forward pass
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = (torch.autograd.grad(y, x, g)[0] for y in (ours, reference))
    torch.testing.assert_close(a, b, **({"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}))
    assert a.dtype == dtype


def test_the_gradient_of_rotated_heads():
    x, cos, sin = heads(torch.float64, True)
    assert torch.autograd.gradcheck(lambda x: rotary_norm(x, cos, sin, 1e-6, torch.float64), (x,))
    assert rotary_norm(x, cos, sin, 1e-6, torch.float32).dtype == torch.float32
