"""Fits the law of nanochat/plan/scaling_law.py to published runs, and prints its numbers.

python -m dev.fit_scaling_law

`power_law` is for a ladder of own runs (dev/ablate.py --ladder): one recipe at several amounts of compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanochat.plan.scaling_law import ALPHA, BETA, BYTES, PARAMS, Law, bytes_per_token

FLOPS = 1e15  # unit of compute in a PowerLaw
# How much the optimum of a sweep counts in the fit, against a run's bits per byte.
OPTIMUM_WEIGHT = 0.1


@dataclass(frozen=True)
class Run:
    """A published run: what was trained on what, and the validation bits per byte at its end."""

    about: str
    matmul_params: int
    tokens: int
    vocab_size: int
    bpb: float
    classic: bool
    fineweb: bool
    optimal: bool = False
    """The best split of its FLOPs between size and text."""


# Reports of runs in public repositories, as nanochat and autoresearch (its 5-minute variant) write them, and four
# optima of nanochat's own sweep over sizes (its dev/LOG.md, January 2026).
RUNS = (
    Run("d8, 200 steps of 2^19 tokens, Oct 2025", 58_720_256, 104_857_600, 65536, 1.2992, True, True),
    Run("d10, 20 tokens per parameter, Oct 2025", 91_095_040, 2_660_761_600, 65536, 0.9539, True, True),
    Run("d20, 20 tokens per parameter, Dec 2025", 477_102_080, 11_219_763_200, 65536, 0.8148, True, True),
    Run("best of 1e18 FLOPs, Jan 2026", 110_678_115, 1_241_505_403, 32768, 0.8972, False, True, True),
    Run("best of 2e18 FLOPs, Jan 2026", 167_797_457, 1_785_336_422, 32768, 0.8616, False, True, True),
    Run("best of 5e18 FLOPs, Jan 2026", 250_650_865, 2_642_234_152, 32768, 0.8293, False, True, True),
    Run("best of 1e19 FLOPs, Jan 2026", 381_758_347, 3_806_871_243, 32768, 0.7999, False, True, True),
    Run(
        "d24, 10.5 tokens per parameter, Mar 2026 (mean of two)", 729_808_896, 7_662_993_408, 32768, 0.7542, False, True
    ),
    Run("d24, 8 tokens per parameter, Mar to Jul 2026", 729_808_896, 5_838_471_168, 32768, 0.7190, False, False),
    Run("d12, 560 tokens per parameter, Jun 2026", 110_100_480, 61_656_268_800, 32768, 0.7745, False, False),
    Run("autoresearch d8, 5 minutes of an H100", 29_360_128, 499_600_000, 8192, 0.9979, False, False),
    Run("autoresearch d4, 5 minutes", 5_242_880, 57_000_000, 8192, 1.2838, False, False),
    Run("autoresearch d6, 5 minutes", 13_762_560, 40_600_000, 8192, 1.2280, False, False),
)


def fit(runs: Sequence[Run], steps: int = 200, softness: float = 0.01) -> Law:
    """The law closest to `runs` in logarithms: Gauss-Newton with residuals beyond `softness` counted less (soft L1).

    Where a run is `optimal`, more weights and more text must help equally: α·A/N^α = β·B/D^β, for FLOPs of 6·N·D.
    """
    n = torch.tensor([run.matmul_params / PARAMS for run in runs], dtype=torch.float64)
    d = torch.tensor([run.tokens * bytes_per_token(run.vocab_size) / BYTES for run in runs], dtype=torch.float64)
    classic = torch.tensor([float(run.classic) for run in runs], dtype=torch.float64)
    fineweb = torch.tensor([float(run.fineweb) for run in runs], dtype=torch.float64)
    target = torch.tensor([math.log(run.bpb) for run in runs], dtype=torch.float64)

    optimal = torch.tensor([run.optimal for run in runs])
    balanced = torch.tensor([[0.0, 1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([-0.5, -2.0, -2.0, 0.05, 0.05], dtype=torch.float64)
    for _ in range(steps):
        parts = x[:3, None].exp() * torch.stack([torch.ones_like(n), n**-ALPHA, d**-BETA])  # (3, runs)
        loss = parts.sum(0)
        r = loss.log() + x[3] * classic + x[4] * fineweb - target
        jacobian = torch.cat([parts / loss, classic[None], fineweb[None]]).T  # (runs, 5)
        balance = math.log(ALPHA / BETA) + (parts[1] / parts[2])[optimal].log()
        r = torch.cat([r, OPTIMUM_WEIGHT * balance])
        jacobian = torch.cat([jacobian, OPTIMUM_WEIGHT * balanced.expand(len(balance), 5)])
        weight = (1 + (r / softness) ** 2) ** -0.25
        x = x + 0.5 * torch.linalg.lstsq(weight[:, None] * jacobian, -weight * r).solution
    return Law(*(math.exp(value) for value in x.tolist()))


@dataclass(frozen=True)
class PowerLaw:
    """Bits per byte over training FLOPs C: floor + scale·(C/FLOPS)^−exponent."""

    floor: float
    scale: float
    exponent: float

    def bpb(self, flops: float) -> float:
        """Predicted bits per byte."""
        return self.floor + self.scale * (flops / FLOPS) ** -self.exponent


def power_law(runs: Sequence[tuple[float, float]], noise: float) -> tuple[PowerLaw, list[PowerLaw]]:
    """The law closest to runs of (FLOPs, bits per byte), and all others within one standard deviation of it.

    Few rungs fix the floor badly, so it is tried from 0 up to the best run: for each floor the rest is a line in
    logarithms. Those whose Σ (error/noise)² is at most 1 above the least are within one deviation.

    Args:
        runs: of at least three different amounts of compute.
        noise: how far seeds scatter, as a share of the loss.

    Raises:
        ValueError: fewer than three amounts, or more compute never helped.
    """
    if len({flops for flops, _ in runs}) < 3:
        raise ValueError("a power law with a floor needs runs at three amounts of compute or more")
    x = torch.tensor([math.log(flops / FLOPS) for flops, _ in runs], dtype=torch.float64)
    y = torch.tensor([bpb for _, bpb in runs], dtype=torch.float64)
    found = []
    for floor in torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1].tolist():
        rest = y - floor * y.min()
        weight = rest / y  # a relative error of the rest is so much less of the whole
        columns = torch.stack([torch.ones_like(x), -x], dim=1)  # (runs, 2)
        line = torch.linalg.lstsq(weight[:, None] * columns, weight * rest.log()).solution
        law = PowerLaw(floor * y.min().item(), math.exp(line[0]), line[1].item())
        errors = [(law.bpb(flops) / bpb - 1) / noise for flops, bpb in runs]
        if law.exponent > 1e-6:
            found.append((sum(e * e for e in errors), law))
    if not found:
        raise ValueError("more compute did not lower the loss: there is no power law to fit")
    least, best = min(found, key=lambda pair: pair[0])
    return best, [law for square, law in found if square <= least + 1]


if __name__ == "__main__":
    print(fit(RUNS))
