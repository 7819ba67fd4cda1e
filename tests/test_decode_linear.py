"""Every form of a weight multiplies like the weight itself."""

import pytest
import torch

from nanochat.generate.decode_linear import (
    SPLIT_FROM,
    Int8Linear,
    PlainLinear,
    SplitLinear,
    best_form,
)

SHAPES = [(64, 32), (32, 64), (48, 48), (1000, 300), (300, 1000)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def operands(shape, rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(shape, generator=generator)
    x, residual = torch.randn(rows, shape[1], generator=generator), torch.randn(rows, shape[0], generator=generator)
    return weight.to(dtype), x.to(dtype), residual.to(dtype)


def check(linear, weight, x, residual, tolerance):
    expected = x.float() @ weight.float().t()
    tolerance *= weight.size(1) ** 0.5
    with torch.inference_mode():
        torch.testing.assert_close(linear(x).float(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(linear.relu(x).float(), expected.relu(), atol=tolerance, rtol=tolerance)
        kept = residual.clone()
        torch.testing.assert_close(linear.add(x, residual).float(), kept.float() + expected, atol=tolerance, rtol=0.02)
        assert torch.equal(residual, kept)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_float32_forms_multiply_alike(shape, rows, two_threads):
    weight, x, residual = operands(shape, rows)
    forms = {PlainLinear, best_form(rows, "cpu", torch.float32)} | ({SplitLinear} if rows == 1 else set())
    for form in forms:
        check(form(weight), weight, x, residual, 1e-5)


def test_a_large_weight_is_cut_and_an_odd_one_is_not(two_threads):
    for out, parts in ((1000, 2), (1001, 1)):
        weight, x, residual = operands((out, 300), 1)
        assert weight.numel() > SPLIT_FROM
        linear = SplitLinear(weight)
        assert linear._parts == parts
        check(linear, weight, x, residual, 1e-5)


@pytest.mark.parametrize("rows", [1, 7])
def test_bfloat16_and_int8_are_as_exact_as_they_can_be(rows):
    for form in (best_form(rows, "cpu", torch.bfloat16), Int8Linear):
        weight, x, residual = operands((96, 64), rows, torch.bfloat16)
        check(form(weight.float() if form is Int8Linear else weight), weight, x, residual, 0.03)


def test_a_card_takes_the_weights_as_they_are():
    assert best_form(1, "cuda", torch.float16) is PlainLinear
    assert best_form(1, "cpu", torch.float16) is PlainLinear
