"""Products accumulated in float16: cuBLAS gets the arguments its manual asks for, and nothing is used unchecked."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nanochat.ops import fp16_gemm, linear
from nanochat.ops.fp16_gemm import CublasHalfGemm, Verdict, add_parts, check_half_gemm, choose_half_gemm, parts_of
from nanochat.precision import DTYPES

HALF = DTYPES["float16"]
CARD = torch.device("cuda", 0)


class CublasOnTheCPU:
    """cublasGemmStridedBatchedEx as its manual has it: column-major, in the memory behind the pointers."""

    def __init__(self):
        self.calls = []
        for name in ("cublasGetPointerMode_v2", "cublasSetPointerMode_v2"):
            setattr(self, name, self.Function(lambda *_: 0))
        self.cublasGemmStridedBatchedEx = self.Function(self.gemm)

    class Function:
        def __init__(self, call):
            self.call = call

        def __call__(self, *args):
            return self.call(*args)

    def gemm(self, handle, op_a, op_b, m, n, k, alpha, a, ta, lda, step_a, b, tb, ldb, step_b, beta, c, tc, ldc, step_c,
             batch, compute, algorithm):  # fmt: skip
        self.calls.append(compute)
        assert (ta, tb, tc) == (2, 2, 2)
        assert ctypes.c_uint16.from_address(alpha).value == 0x3C00
        assert ctypes.c_uint16.from_address(beta).value == 0

        def matrix(pointer, rows, columns, lead):  # column-major: element (i, j) is at i + j·lead
            assert lead >= rows
            memory = (ctypes.c_uint16 * (lead * (columns - 1) + rows)).from_address(pointer)
            flat = torch.frombuffer(memory, dtype=HALF)
            return flat.as_strided((rows, columns), (1, lead))

        for i in range(batch):
            at_a, at_b, at_c = (p + 2 * i * step for p, step in ((a, step_a), (b, step_b), (c, step_c)))
            x = matrix(at_a, k, m, lda).t() if op_a else matrix(at_a, m, k, lda)
            y = matrix(at_b, n, k, ldb).t() if op_b else matrix(at_b, k, n, ldb)
            matrix(at_c, m, n, ldc).copy_((x.float() @ y.float()).to(HALF))
        return 0


@pytest.fixture
def cublas(monkeypatch):
    library = CublasOnTheCPU()
    monkeypatch.setattr(fp16_gemm, "_load_cublas", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 1)
    return library


@pytest.fixture(autouse=True)
def torchs_products_again():
    yield
    linear.use_half_gemm(None)


@given(st.integers(1, 5000))
def test_parts_are_equal_short_and_add_up(k):
    parts = parts_of(k)
    if parts is None:
        assert k % 8
    else:
        assert k % parts == 0
        assert k // parts <= fp16_gemm.PART
        assert (k // parts) % 8 == 0


@pytest.mark.parametrize(("m", "n", "k"), [(5, 7, 8), (16, 24, 256), (3, 4, 768), (2, 9, 1024), (4, 6, 1400)])
@pytest.mark.parametrize("b_is_transposed", [False, True])
def test_cublas_is_asked_for_the_product(cublas, m, n, k, b_is_transposed):
    torch.manual_seed(0)
    a, b = torch.randn(m, k).to(HALF), torch.randn(n, k).to(HALF)
    if b_is_transposed:
        b = b.t().contiguous().t()
    y = CublasHalfGemm()(a, b)
    torch.testing.assert_close(y.float(), a.float() @ b.float().t(), rtol=3e-3, atol=3e-2)
    assert cublas.calls == [64]  # CUBLAS_COMPUTE_16F


def test_a_matrix_with_gaps_is_refused_and_an_error_of_cublas_is_said(cublas):
    gemm = CublasHalfGemm()
    with pytest.raises(ValueError, match="contiguous"):
        gemm(torch.zeros(4, 16, dtype=HALF)[:, ::2], torch.zeros(4, 8, dtype=HALF))
    gemm.gemm = lambda *_: 13
    with pytest.raises(RuntimeError, match=r"status 13.*--fp16_gemm=off"):
        gemm(torch.zeros(4, 8, dtype=HALF), torch.zeros(4, 8, dtype=HALF))


def test_parts_are_added_in_float32():
    parts = torch.tensor([2048.0, 1.0, 1.0, 1.0, 1.0]).to(HALF).view(5, 1, 1)
    assert add_parts(parts).item() == 2052  # added in float16, each 1 would be lost


@pytest.mark.parametrize("shape", [(12, 64), (2, 6, 64)])
def test_training_under_autocast_uses_it_for_y_and_dx(shape):
    calls = []

    def gemm(a, b):
        calls.append((tuple(a.shape), tuple(b.shape)))
        return (a.float() @ b.float().t()).to(HALF)

    torch.manual_seed(0)
    layer = linear.Linear(64, 32)
    results = []
    for product in (None, gemm):
        linear.use_half_gemm(product)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=HALF):
            y = layer(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), (x, layer.weight))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert calls == [((12, 64), (32, 64)), ((12, 32), (64, 32))]
    with torch.no_grad(), torch.autocast("cpu", dtype=HALF):
        layer(torch.randn(shape))
    F.linear(torch.randn(shape), layer.weight)
    assert len(calls) == 2  # not without gradients: chat has few rows, and answers stay as they are


def test_the_check_measures_error_and_speed():
    exact = check_half_gemm(lambda a, b: a @ b.t(), [(8, 16, 32)], torch.device("cpu"), calls=2)
    assert exact.error < 1e-3
    wrong = check_half_gemm(lambda a, b: 1.01 * (a @ b.t()), [(8, 16, 32)], torch.device("cpu"), calls=2)
    assert wrong.error == pytest.approx(0.01, rel=0.1)
    nan = check_half_gemm(lambda a, b: torch.nan * (a @ b.t()), [(8, 16, 32)], torch.device("cpu"), calls=2)
    assert not Verdict(nan.error, 2.0).good


@pytest.mark.parametrize(
    ("mode", "capability", "verdict", "taken", "words"),
    [
        ("auto", (6, 0), Verdict(2.4e-3, 1.9), True, "1.90 ×"),
        ("auto", (6, 0), Verdict(2.4e-3, 1.1), False, "1.10 ×"),
        ("auto", (6, 0), Verdict(2e-2, 1.9), False, "2.0e-02"),
        ("auto", (6, 1), Verdict(2.4e-3, 1.9), False, ""),
        ("auto", (7, 0), Verdict(2.4e-3, 1.9), False, ""),
        ("on", (7, 0), Verdict(2.4e-3, 1.1), True, "1.10 ×"),
        ("off", (6, 0), Verdict(2.4e-3, 1.9), False, "off"),
    ],
)
def test_auto_takes_it_on_capability_6_0_only_after_a_good_check(monkeypatch, mode, capability, verdict, taken, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp16_gemm, "CublasHalfGemm", lambda: "cublas")
    monkeypatch.setattr(fp16_gemm, "check_half_gemm", lambda gemm, shapes, device: verdict)
    gemm, why = choose_half_gemm(mode, CARD, HALF, [(8, 8, 8)])
    assert gemm == ("cublas" if taken else None)
    assert words in why


def test_without_a_library_auto_goes_on_and_on_says_what_is_wrong(monkeypatch):
    def missing():
        raise RuntimeError("no such library")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    monkeypatch.setattr(fp16_gemm, "CublasHalfGemm", missing)
    gemm, why = choose_half_gemm("auto", CARD, HALF, [(8, 8, 8)])
    assert gemm is None
    assert "no such library" in why
    with pytest.raises(RuntimeError, match="no such library"):
        choose_half_gemm("on", CARD, HALF, [(8, 8, 8)])
    for device, dtype in ((torch.device("cpu"), HALF), (CARD, torch.float32)):
        assert choose_half_gemm("auto", device, dtype, []) == (None, "")
        with pytest.raises(ValueError, match="--fp16_gemm=on needs a CUDA card"):
            choose_half_gemm("on", device, dtype, [])
