"""The ladder: bits per byte over training FLOPs, as a picture with the law through each recipe's runs.

    python dev/ladder.py --runs dev/ladder.jsonl --picture docs/ladder.svg

A line of the file is a run: its setting, FLOPs and bits per byte. `dev/ablate.py --ladder` draws its own runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dev.fit_scaling_law import power_law  # noqa: E402
from nanochat.config import run_script  # noqa: E402
from nanochat.files import atomic_path  # noqa: E402

# How far seeds scatter, as a share of the loss, where a setting has one seed only: three seeds of `small` at 5.56e14
# FLOPs, 1.4220 ± 0.0052 (dev/LOG.md).
SEED_NOISE = 0.0037
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # told apart by colour-blind readers too


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is drawn, and where to."""

    runs: str = str(ROOT / "dev" / "ladder.jsonl")
    """A line a run, with "setting", "flops" and "val_bpb", or the results of dev/ablate.py."""
    picture: str = "ladder.svg"
    """File that is written."""


def draw(ladder: Mapping[str, Sequence[tuple[float, float]]], path: Path, noise: float = SEED_NOISE) -> None:
    """Write an SVG: every run a point, a line for each setting's law where it has three rungs, else from mean to mean.

    Args:
        ladder: setting -> its runs, as (FLOPs, bits per byte).
        path: of the file.
        noise: how far seeds scatter, as a share of the loss.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with matplotlib.rc_context({"svg.hashsalt": "nanochat", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        for (label, runs), color in zip(ladder.items(), COLORS * len(ladder), strict=False):
            rungs = sorted({flops for flops, _ in runs})
            try:
                law, _ = power_law(runs, noise)
                low, high = rungs[0], rungs[-1]
                x = [low * (high / low) ** (i / 50) for i in range(51)]
                y = [law.bpb(flops) for flops in x]
            except ValueError:  # fewer than three rungs, or no gain from more compute
                groups = [[bpb for flops, bpb in runs if flops == rung] for rung in rungs]
                x, y = rungs, [sum(group) / len(group) for group in groups]
            axes.plot(*zip(*runs, strict=True), "o", color=color, markersize=4, label="_")
            axes.plot(x, y, color=color, linewidth=1.2, label=label.replace("$", r"\$"))
        axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="bits per byte")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
        ticks = sorted({flops for runs in ladder.values() for flops, _ in runs})
        axes.set_xticks(ticks, [f"{flops:.2g}".replace("+", "") for flops in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(which="both", color="#dddddd", linewidth=0.5)
        axes.legend(frameon=False)
        FigureCanvasSVG(figure)
        with atomic_path(path) as part:
            figure.savefig(part, format="svg", metadata={"Date": None})


def main(cfg: Config) -> None:
    """Draw the runs of a file."""
    ladder: dict[str, list[tuple[float, float]]] = {}
    for line in Path(cfg.runs).read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        flops = run["flops"] if "flops" in run else float(run["flags"]["target_flops"])  # of dev/ablate.py's results
        ladder.setdefault(run["setting"], []).append((flops, run["val_bpb"]))
    draw(ladder, Path(cfg.picture))
    print(f"{len(ladder)} settings in {cfg.picture}")


if __name__ == "__main__":
    run_script(main, Config)
