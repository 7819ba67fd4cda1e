"""Fits the law of nanochat/plan/scaling_law.py to published and own runs, and prints its numbers and errors.

python -m dev.fit_scaling_law

`power_law` is for a ladder of own runs (dev/ablate.py --ladder): one recipe at several amounts of compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from nanochat.plan.scaling_law import ALPHA, BETA, BYTES, GAMMA, PARAMS, Law, bytes_per_token

FLOPS = 1e15  # unit of compute in a PowerLaw
# How much the optimum of a sweep counts in the fit, against a run's bits per byte.
OPTIMUM_WEIGHT = 0.1
FACTORS = ("classic", "fineweb", "wikipedia", "older")


@dataclass(frozen=True)
class Run:
    """What was trained on what, and the validation bits per byte at its end."""

    about: str
    channels: int
    block_params: int
    tokens: float
    vocab_size: int
    bpb: float
    factors: tuple[str, ...] = ()
    """Of the law."""
    optimal: bool = False
    """The best split of its FLOPs between size and text."""
    published: bool = True

    @property
    def head_params(self) -> int:
        """Weights of lm_head."""
        return self.vocab_size * self.channels

    @property
    def text_bytes(self) -> float:
        """What the tokens stand for."""
        return self.tokens * bytes_per_token(self.vocab_size)


def _published(
    about: str,
    channels: int,
    matmul_params: int,
    tokens: int,
    vocab_size: int,
    bpb: float,
    *factors: str,
    optimal: bool = False,
) -> Run:
    blocks = matmul_params - vocab_size * channels
    return Run(about, channels, blocks, tokens, vocab_size, bpb, factors, optimal)


def _own(layers: int, channels: int, megatokens: float, vocab_size: int, bpb: float, *factors: str) -> Run:
    about = f"{layers} layers of {channels}, {megatokens} M tokens, vocabulary {vocab_size}, Nov 2026"
    blocks = 12 * layers * channels**2
    return Run(about, channels, blocks, megatokens * 1e6, vocab_size, bpb, ("wikipedia", *factors), published=False)


# Of 4 layers of 128 with 8,192 tokens at 4e13 FLOPs: with a context of 1,024 and windows, against 512 without.
WINDOWS = 1.6767 / 1.6911
# Reports of runs in public repositories, as nanochat and autoresearch (its 5-minute variant) write them, and four
# optima of nanochat's own sweep over sizes (its dev/LOG.md, January 2026), whose channels are 64 per (uneven) layer.
# Then own runs of `small` on Wikipedia (see dev/LOG.md), each at 4e13 FLOPs but the last three; texts read once.
RUNS = (
    _published(
        "d8, 200 steps of 2^19 tokens, Oct 2025", 512, 58_720_256, 104_857_600, 65536, 1.2992, "classic", "fineweb"
    ),
    _published(
        "d10, 20 tokens per parameter, Oct 2025", 640, 91_095_040, 2_660_761_600, 65536, 0.9539, "classic", "fineweb"
    ),
    _published(
        "d20, 20 tokens per parameter, Dec 2025", 1280, 477_102_080, 11_219_763_200, 65536, 0.8148, "classic", "fineweb"
    ),
    _published("best of 1e18 FLOPs, Jan 2026", 770, 110_678_115, 1_241_505_403, 32768, 0.8972, "fineweb", optimal=True),
    _published("best of 2e18 FLOPs, Jan 2026", 903, 167_797_457, 1_785_336_422, 32768, 0.8616, "fineweb", optimal=True),
    _published(
        "best of 5e18 FLOPs, Jan 2026", 1049, 250_650_865, 2_642_234_152, 32768, 0.8293, "fineweb", optimal=True
    ),
    _published(
        "best of 1e19 FLOPs, Jan 2026", 1222, 381_758_347, 3_806_871_243, 32768, 0.7999, "fineweb", optimal=True
    ),
    _published(
        "d24, 10.5 tokens per parameter, Mar 2026 (mean of two)",
        1536,
        729_808_896,
        7_662_993_408,
        32768,
        0.7542,
        "fineweb",
    ),
    _published("d24, 8 tokens per parameter, Mar to Jul 2026", 1536, 729_808_896, 5_838_471_168, 32768, 0.7190),
    _published("d12, 560 tokens per parameter, Jun 2026", 768, 110_100_480, 61_656_268_800, 32768, 0.7745),
    _published("autoresearch d8, 5 minutes of an H100", 512, 29_360_128, 499_600_000, 8192, 0.9979),
    _published("autoresearch d4, 5 minutes", 256, 5_242_880, 57_000_000, 8192, 1.2838),
    _published("autoresearch d6, 5 minutes", 384, 13_762_560, 40_600_000, 8192, 1.2280),
    _own(4, 256, 1.06, 8192, 1.8421),
    _own(3, 256, 1.27, 8192, 1.8149),
    _own(4, 192, 1.62, 8192, 1.7666),
    _own(4, 128, 2.83, 8192, 1.6911),
    _own(3, 128, 3.28, 8192, 1.6860),
    _own(4, 96, 4.11, 8192, 1.6664),
    _own(4, 128, 3.63, 4096, 1.6928),
    _own(4, 128, 3.77, 4096, 1.6762 / WINDOWS),
    _own(4, 128, 2.00, 16384, 1.7342 / WINDOWS),
    _own(4, 128, 1.22, 32768, 1.8402 / WINDOWS),
    _own(4, 256, 1.27, 4096, 1.9697, "older"),
    _own(4, 256, 1.06, 8192, 1.9298, "older"),
    _own(4, 256, 0.795, 16384, 1.9739, "older"),
    _own(4, 256, 0.53, 32768, 2.0206, "older"),
    _own(4, 256, 4.24, 8192, 1.5774),
    _own(4, 128, 11.62, 8192, 1.4902 / WINDOWS),
    _own(4, 256, 14.73, 8192, 1.4220),
)


def fit(runs: Sequence[Run], steps: int = 200, softness: float = 0.01) -> Law:
    """The law closest to `runs` in logarithms: Gauss-Newton with residuals beyond `softness` counted less (soft L1).

    Where a run is `optimal`, a deeper model and more text must help equally, for FLOPs of 6·(N + V)·D. Channels grow
    with the depth, so that V goes as the cube root of N: (α·A/N^α + γ/3·H/V^γ) / (N + V/3) · (N + V) = β·B/D^β.
    """

    def column(values: Iterable[float]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.float64)

    n, v = column(run.block_params / PARAMS for run in runs), column(run.head_params / PARAMS for run in runs)
    d = column(run.text_bytes / BYTES for run in runs)
    target = column(math.log(run.bpb) for run in runs)
    factors = torch.stack([column(float(name in run.factors) for run in runs) for name in FACTORS])  # (factors, runs)
    best = torch.tensor([run.optimal for run in runs])
    share = ((n + v / 3) / (n + v))[best]  # of N's growth in that of N + V

    x = torch.tensor([-0.9, -1.5, -4.0, -1.2, *[0.0] * len(FACTORS)], dtype=torch.float64)
    for _ in range(steps):
        parts = x[:4, None].exp() * torch.stack([torch.ones_like(n), n**-ALPHA, v**-GAMMA, d**-BETA])  # (4, runs)
        loss = parts.sum(0)
        r = loss.log() + x[4:] @ factors - target
        jacobian = torch.cat([parts / loss, factors]).T  # (runs, 4 + factors)
        blocks, head = ALPHA * parts[1, best], GAMMA / 3 * parts[2, best]
        balance = ((blocks + head) / share / (BETA * parts[3, best])).log()
        slopes = torch.zeros(len(balance), len(x), dtype=torch.float64)
        slopes[:, 1], slopes[:, 2], slopes[:, 3] = blocks / (blocks + head), head / (blocks + head), -1.0
        r = torch.cat([r, OPTIMUM_WEIGHT * balance])
        jacobian = torch.cat([jacobian, OPTIMUM_WEIGHT * slopes])
        weight = (1 + (r / softness) ** 2) ** -0.25
        x = x + 0.5 * torch.linalg.lstsq(weight[:, None] * jacobian, -weight * r).solution
    return Law(*(math.exp(value) for value in x.tolist()))


def held_out_errors(runs: Sequence[Run]) -> list[float]:
    """Each run's prediction by the law of all the others, against what was measured: the logarithm of their ratio."""
    errors = []
    for i, run in enumerate(runs):
        law = fit([*runs[:i], *runs[i + 1 :]])
        errors.append(math.log(law.bpb(run.block_params, run.head_params, run.text_bytes, run.factors) / run.bpb))
    return errors


def root_mean_square(errors: Sequence[float]) -> float:
    """The size of a usual error."""
    return math.sqrt(sum(e * e for e in errors) / len(errors))


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
    errors = held_out_errors(RUNS)
    for run, error in zip(RUNS, errors, strict=True):
        print(f"{error:+.1%}  {run.about}")
    published = [error for run, error in zip(RUNS, errors, strict=True) if run.published]
    largest = max(map(abs, errors))
    print(
        f"held out: {root_mean_square(errors):.1%} over all, {root_mean_square(published):.1%} over the published runs"
    )
    print(f"at most: {largest:.1%}")
