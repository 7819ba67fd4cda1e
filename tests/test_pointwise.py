"""The norm and the squared ReLU written out by hand are torch's."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.ops.pointwise import relu_squared, rms_norm


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
