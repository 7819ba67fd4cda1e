"""The P100's missing factor of two: float16 matrix products that are also accumulated in float16.

A P100 (capability 6.0) is twice as fast at float16 arithmetic as at float32, but PyTorch asks cuBLAS to accumulate in
float32, and on that card such a product runs at the speed of float32. PyTorch ignores
`torch.backends.cuda.matmul.allow_fp16_accumulation` below capability 7.0. So cuBLAS is called directly here, through
PyTorch's own handle.

A sum of K terms in float16 has a relative error of about √(K/2)·2·10⁻⁴, so K is split: each part is accumulated in
float16, and the parts are added in float32. Weight gradients are sums over thousands of tokens and stay with PyTorch.

It is used only after a check on the card itself, see `choose_half_gemm`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat.precision import NARROW_RANGE

Mode = Literal["auto", "on", "off"]
HalfGemm = Callable[[Tensor, Tensor], Tensor]
"""a (M, K), b (N, K) in float16 -> a @ b.T (M, N) in float16. The rows or the columns of each are contiguous."""

PART = 256  # longest sum in float16
MAX_ERROR = 5e-3
"""Largest relative error (Frobenius norm) against float32 products of the same factors. bfloat16 rounds each of its
factors by up to 2⁻⁸ = 3.9e-3."""
MIN_SPEEDUP = 1.3
# Of cuBLAS's headers.
_CUDA_R_16F, _COMPUTE_16F, _ALGO_DEFAULT = 2, 64, -1
_OP_N, _OP_T, _POINTER_MODE_HOST = 0, 1, 0


def parts_of(k: int, longest: int = PART) -> int | None:
    """Number of equal parts of at most `longest` for a sum over `k` terms; None if they can't be multiples of 8."""
    for parts in range(-(-k // longest), k // 8 + 1):
        if k % parts == 0 and k // parts % 8 == 0:
            return parts
    return None


def add_parts(parts: Tensor) -> Tensor:
    """(P, M, N) in float16 -> their sum (M, N), added in float32 and rounded once."""
    return parts[0] if parts.size(0) == 1 else parts.sum(dim=0, dtype=torch.float32).to(parts.dtype)


class CublasHalfGemm:
    """`HalfGemm` by cublasGemmStridedBatchedEx with CUBLAS_COMPUTE_16F, a batch entry for each part of K.

    Raises:
        RuntimeError: the library isn't found, or (in a call) cuBLAS reports an error.
    """

    def __init__(self) -> None:
        self.library = _load_cublas()
        self.gemm = self.library.cublasGemmStridedBatchedEx
        pointer, number, wide = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
        self.gemm.argtypes = [
            *(pointer, number, number, number, number, number, pointer),  # handle, two ops, m, n, k, alpha
            *(pointer, number, number, wide, pointer, number, number, wide, pointer),  # A, B with strides; beta
            *(pointer, number, number, wide, number, number, number),  # C; batch, compute type, algorithm
        ]
        self.gemm.restype = number
        self.library.cublasGetPointerMode_v2.argtypes = [pointer, ctypes.POINTER(number)]
        self.library.cublasSetPointerMode_v2.argtypes = [pointer, number]
        self.one, self.zero = ctypes.c_uint16(0x3C00), ctypes.c_uint16(0)  # 1.0 and 0.0 in float16

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """a (M, K), b (N, K) -> a @ b.T (M, N)."""
        (m, k), n = a.shape, b.size(0)
        parts = parts_of(k)
        if parts is None:
            return a @ b.t()
        length = k // parts
        out = torch.empty(parts, m, n, dtype=a.dtype, device=a.device)
        # cuBLAS counts by columns: a row-major (M, N) is its (N, M), so we ask for b @ a.T.
        op_b, lead_b, step_b = _layout(b, length, transposed=True)
        op_a, lead_a, step_a = _layout(a, length, transposed=False)
        handle = torch.cuda.current_blas_handle()  # on the current stream
        # alpha and beta lie in host memory. PyTorch shares the handle, so its mode is put back afterwards.
        mode = ctypes.c_int()
        self._check(self.library.cublasGetPointerMode_v2(handle, ctypes.byref(mode)))
        self._check(self.library.cublasSetPointerMode_v2(handle, _POINTER_MODE_HOST))
        status = self.gemm(
            *(handle, op_b, op_a, n, m, length, ctypes.addressof(self.one)),
            *(b.data_ptr(), _CUDA_R_16F, lead_b, step_b),
            *(a.data_ptr(), _CUDA_R_16F, lead_a, step_a, ctypes.addressof(self.zero)),
            *(out.data_ptr(), _CUDA_R_16F, n, m * n, parts, _COMPUTE_16F, _ALGO_DEFAULT),
        )
        self.library.cublasSetPointerMode_v2(handle, mode.value)
        self._check(status)
        return add_parts(out)

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"cuBLAS failed with status {status} in a float16 product: go on with --fp16_gemm=off")


def _layout(x: Tensor, length: int, transposed: bool) -> tuple[int, int, int]:
    """(operation, leading dimension, elements from one part of K to the next) by which cuBLAS reads x (rows, K)."""
    if x.stride(1) == 1:  # (rows, K) in memory, to cuBLAS (K, rows)
        return (_OP_T if transposed else _OP_N), x.stride(0), length
    if x.stride(0) == 1:
        return (_OP_N if transposed else _OP_T), x.stride(1), length * x.stride(1)
    raise ValueError("a float16 product needs matrices whose rows or columns are contiguous")


def _load_cublas() -> Any:
    """The cuBLAS that PyTorch has already loaded."""
    torch.cuda.current_blas_handle()  # loads it
    major = (torch.version.cuda or "12").split(".")[0]
    try:
        return ctypes.CDLL(f"libcublas.so.{major}")
    except OSError as error:
        raise RuntimeError(f"cuBLAS can't be called directly ({error}): use --fp16_gemm=off") from None


@dataclass(frozen=True)
class Verdict:
    """The result of a check on the card: the worst error and the worst speedup over all shapes."""

    error: float
    speedup: float

    @property
    def good(self) -> bool:
        """True if it is accurate enough and worth it."""
        return self.error <= MAX_ERROR and self.speedup >= MIN_SPEEDUP

    def __str__(self) -> str:
        return f"error {self.error:.1e} (at most {MAX_ERROR:g}), {self.speedup:.2f} × as fast (at least {MIN_SPEEDUP})"


def check_half_gemm(
    gemm: HalfGemm, shapes: Iterable[tuple[int, int, int]], device: torch.device, calls: int = 10
) -> Verdict:
    """Compare error and speed of `gemm` with PyTorch's product, over shapes (M, N, K) of real layers."""
    (half,) = NARROW_RANGE
    generator = torch.Generator(device).manual_seed(0)
    errors, speedups = [], []
    for m, n, k in shapes:
        a = torch.randn(m, k, generator=generator, device=device).to(half)
        b = (torch.randn(n, k, generator=generator, device=device) * k**-0.5).to(half)
        exact = a.float() @ b.float().t()
        for factors in ((a, b), (a, b.t().contiguous().t())):  # as in the forward and the backward pass
            errors.append(float(torch.linalg.norm(gemm(*factors).float() - exact) / torch.linalg.norm(exact)))
        torchs = _seconds(lambda a, b: a @ b.t(), a, b, device, calls)
        speedups.append(torchs / _seconds(gemm, a, b, device, calls))
    return Verdict(max(e if e == e else float("inf") for e in errors), min(speedups))


def choose_half_gemm(
    mode: Mode, device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]]
) -> tuple[HalfGemm | None, str]:
    """The product to train with (None: PyTorch's own), and a sentence that says why.

    "auto" takes it on a card of capability 6.0 that computes in float16, if the check on this card is good. "on" takes
    it on any card, and says what the check found.

    Raises:
        ValueError: "on" without a CUDA card or in another dtype than float16.
    """
    if mode == "off":
        return None, "float16 products: PyTorch's (--fp16_gemm=off)"
    possible = device.type == "cuda" and dtype in NARROW_RANGE
    if mode == "on" and not possible:
        where = f"this run computes on {device.type} in {dtype}"
        raise ValueError(f"--fp16_gemm=on needs a CUDA card and --dtype=float16; {where}")
    if not possible or (mode == "auto" and torch.cuda.get_device_capability(device) != (6, 0)):
        return None, ""
    try:
        gemm = CublasHalfGemm()
        verdict = check_half_gemm(gemm, shapes, device)
    except (RuntimeError, AttributeError) as error:
        if mode == "on":
            raise
        return None, f"float16 products: PyTorch's, because {error}"
    if mode == "on" or verdict.good:
        return gemm, f"float16 products accumulated in float16: {verdict}"
    return None, f"float16 products: PyTorch's, because accumulation in float16 has {verdict}"


def layer_shapes(channels: int, tokens: int) -> list[tuple[int, int, int]]:
    """(M, N, K) of the blocks' products for `tokens` tokens of a model with `channels` channels."""
    c = channels
    return [(tokens, c, c), (tokens, 4 * c, c), (tokens, c, 4 * c)]


def _seconds(product: HalfGemm, a: Tensor, b: Tensor, device: torch.device, calls: int) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    product(a, b)
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        product(a, b)
    wait()
    return time.perf_counter() - start
