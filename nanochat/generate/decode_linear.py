"""Products of a few rows with weights that stay the same, as in decoding, in the form that is fastest on a CPU.

Such a product takes as long as reading its weight. torch's own reads it with one core where there is one row, and for
more rows in a layout made for many. So on x86 CPUs a weight is held in up to two forms, each made when it is first
needed: cut into a part per thread for one row (`SplitLinear`), in oneDNN's layout for several (`PackedLinear`).
Measurements: dev/LOG.md, "decoding on a CPU".

Shapes: B rows; a weight is (out, in).
"""

from __future__ import annotations

import abc
import platform

import torch
from torch import Tensor

from nanochat.precision import DTYPES, cpu_has_bf16

# oneDNN lays a weight out for this many rows. The layout for one row is slow for more; this one serves all.
LAYOUT_ROWS = 16
# Weights with fewer entries than this are not cut: they are read before another thread has begun.
SPLIT_FROM = 200_000


class FixedLinear(abc.ABC):
    """A weight to multiply rows x (B, in) with. A form that can do more in one operation overrides `relu` or `add`."""

    @abc.abstractmethod
    def __init__(self, weight: Tensor) -> None: ...

    @abc.abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x · Wᵀ (B, out)."""

    def relu(self, x: Tensor) -> Tensor:
        """The positive part of x · Wᵀ."""
        return self(x).relu_()

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x · Wᵀ."""
        return residual + self(x)


class PlainLinear(FixedLinear):
    """The weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.t()  # (in, out)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self._weight)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if residual.dtype != x.dtype:  # a float32 residual stream beside float16 products
            return super().add(x, residual)
        return torch.addmm(residual, x, self._weight)


class SplitLinear(FixedLinear):
    """For one row: a matmul for each part of the outputs, all parts at once."""

    def __init__(self, weight: Tensor) -> None:
        out, width = weight.shape
        parts = torch.get_num_threads()
        if weight.numel() < SPLIT_FROM or out % parts:
            parts = 1
        split = weight.reshape(parts, out // parts, width).transpose(1, 2)  # (parts, in, out / parts)
        # MKL reads a wide matrix up to twice as fast when it is contiguous this way round.
        split = split.contiguous() if out > width else split
        self._weight = split if parts > 1 else split[0]
        self._parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        if self._parts == 1:
            return torch.mm(x, self._weight)
        return torch.bmm(x.expand(self._parts, -1, -1), self._weight).view(1, -1)  # (parts, 1, out / parts) -> (1, out)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._parts == 1:
            return torch.addmm(residual, x, self._weight)
        return self(x).add_(residual)


class PackedLinear(FixedLinear):
    """The weight in oneDNN's layout; what follows the matmul is part of it."""

    def __init__(self, weight: Tensor) -> None:
        # torch.compile calls these operators too; they have no public name.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LAYOUT_ROWS)
        self._run = torch.ops.mkldnn._linear_pointwise.default
        self._run_with = torch.ops.mkldnn._linear_pointwise.binary

    @staticmethod
    def suits(device: str, dtype: torch.dtype) -> bool:
        """True if this machine can do it, and machines like it were seen to gain by it."""
        if device != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
            return False
        known = dtype == torch.float32 or (dtype == DTYPES["bfloat16"] and cpu_has_bf16())
        return known and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._run(x, self._weight, None, "none", [], "")
        return y

    def relu(self, x: Tensor) -> Tensor:
        y: Tensor = self._run(x, self._weight, None, "relu", [], "")
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self._run_with(x, residual, self._weight, None, "add")
        return y


class Int8Linear(FixedLinear):
    """The weight in 8 bits with a scale per output channel, the rows in bfloat16 (CPUs only)."""

    def __init__(self, weight: Tensor) -> None:
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,): the largest weight becomes ±127
        self.scale = scale.to(DTYPES["bfloat16"])  # rounded before dividing by it, so that the error stays below half
        self.weight = (weight / self.scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.weight, self.scale)


def best_form(rows: int, device: str, dtype: torch.dtype) -> type[FixedLinear]:
    """The form in which a weight multiplies this many rows fastest; one form serves 1 row, another all more."""
    if not PackedLinear.suits(device, dtype):
        return PlainLinear
    return SplitLinear if rows == 1 and dtype == torch.float32 else PackedLinear
