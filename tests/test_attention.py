"""Every way attention is computed equals the obvious one, forward and backward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat.ops import attention
from nanochat.ops.attention import attend, plan_attention, plan_ragged, segment_starts
from nanochat.precision import DTYPES

BRAIN = DTYPES["bfloat16"]


def reference(q, k, v, allowed):
    """Plain softmax attention; allowed (1 or B, T, S) bool."""
    repeats = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.size(-1) ** 0.5
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def inputs(B, T, S, H, K, D=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    return [torch.randn(*shape, generator=g).requires_grad_() for shape in shapes]


def assert_equal_with_gradients(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(theirs, leaves, seed), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def causal(T, S):
    return (torch.arange(S) <= torch.arange(S - T, S)[:, None])[None]


@pytest.mark.parametrize("backend", ["own", "torch's choice", SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    ("T", "S"), [(40, 40), (1, 40), (9, 40), (40, 47)], ids=["train", "decode", "continued prefill", "several blocks"]
)
@pytest.mark.parametrize("window", [None, 5])
def test_every_path_equals_plain_attention(monkeypatch, backend, H, K, T, S, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(attention, "CAUSAL_BLOCK", 16)
    if backend != "own":
        monkeypatch.setattr(attention, "MAX_PROBABILITY_BYTES", 0)
    q, k, v = inputs(2, T, S, H, K)
    allowed = causal(T, S)
    if window is not None:
        allowed = allowed & (torch.arange(S) >= torch.arange(S - T, S)[:, None] - window)
    expected = reference(q, k, v, allowed)
    pieces = plan_attention(T, S, q.device, window)
    if isinstance(backend, str):
        ours = attend(q, k, v, pieces)
    else:
        with sdpa_kernel(backend):
            ours = attend(q, k, v, pieces)
    assert_equal_with_gradients(ours, expected, (q, k, v))


@pytest.mark.parametrize("window", [None, 100, 10])
def test_a_window_is_cut_into_blocks_and_no_mask_is_square(window):
    pieces = plan_attention(1024, 1024, torch.device("cpu"), window)
    masks = [p.mask for p in pieces if p.mask is not None]
    assert (window is None) == (not masks)
    assert sum(m.numel() for m in masks) <= 1024 * 3 * (window or 1) or window == 10
    assert all(m.size(-2) * m.size(-1) < 1024 * 1024 / 4 for m in masks)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("H", "K"), [(2, 2), (4, 2)])
def test_rows_of_different_lengths(window, H, K):
    lengths = torch.tensor([3, 9, 0])
    for T in (1, 5):
        S = int(lengths.max()) + T
        q, k, v = inputs(3, T, S, H, K)
        positions = lengths[:, None] + torch.arange(T)
        allowed = torch.arange(S) <= positions[..., None]
        pieces = plan_ragged(allowed[:, None], positions, window)
        if window is not None:
            allowed = allowed & (torch.arange(S) >= positions[..., None] - window)
        assert_equal_with_gradients(attend(q, k, v, pieces), reference(q, k, v, allowed), (q, k, v))


@pytest.mark.parametrize("window", [None, 6])
def test_segments_do_not_see_each_other(monkeypatch, window):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    segments = torch.tensor([[0] * 10 + [1] * 25 + [2] * 5, [7] * 40, [3] * 1 + [4] * 38 + [3] * 1])
    q, k, v = inputs(3, 40, 40, 4, 2)
    allowed = causal(40, 40) & (segments[:, :, None] == segments[:, None, :])
    allowed[2, 39, 0] = False  # the same number, but another segment
    if window is not None:
        allowed = allowed & (torch.arange(40) >= torch.arange(40)[:, None] - window)
    pieces = plan_attention(40, 40, q.device, window, segment_starts(segments))
    assert_equal_with_gradients(attend(q, k, v, pieces), reference(q, k, v, allowed), (q, k, v))


def test_segment_starts():
    segments = torch.tensor([[5, 5, 2, 2, 2, 5], [0, 1, 2, 3, 4, 4]])
    assert segment_starts(segments).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 4, 4]]


def test_training_on_a_cpu_in_bfloat16_is_as_exact_as_torchs_kernel(monkeypatch):
    exact = inputs(2, 200, 200, 2, 2, D=64)
    seed = torch.randn(2, 200, 2, 64, generator=torch.Generator().manual_seed(1))
    pieces = plan_attention(200, 200, seed.device)

    def errors():
        low = [x.detach().to(BRAIN).requires_grad_() for x in exact]
        y = attend(*low, pieces)
        found = [y, *torch.autograd.grad(y, low, seed.to(BRAIN))]
        return [((a.detach() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]

    y = reference(*exact, causal(200, 200))
    truth = [y.detach(), *torch.autograd.grad(y, exact, seed)]
    ours = errors()
    monkeypatch.setattr(attention, "MAX_PROBABILITY_BYTES", 0)
    assert all(a < 2 * b for a, b in zip(ours, errors(), strict=True))
