"""Curves as small SVG pictures that take their colours from the page: light, dark or printed.

matplotlib draws; then the picture is made fit to stand inside a page: colours become CSS variables, identifiers become
unique, numbers lose the digits nobody sees, and what names other addresses (doctype, namespaces) goes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import count
from typing import Any

MAX_POINTS = 400
LOSS_UNIT = "nats per token learned"
WIDTH, HEIGHT = 3.6, 2.0  # inches; the page scales it
# Colours that stand for CSS variables.
TEXT, GRID = "#0000f0", "#0000f1"
SERIES = ("#0000f2", "#0000f3", "#0000f4", "#0000f5")
VARIABLES = {TEXT: "--muted", GRID: "--line"} | {color: f"--c{i + 1}" for i, color in enumerate(SERIES)}


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    """Which of the page's series colours."""
    faint: bool = False
    """Drawn thin and pale, without a legend: the raw values behind a smooth curve."""


def thin(x: Sequence[float], y: Sequence[float], most: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most about `most` points with the same outline: of each bucket its lowest and highest, and both ends."""
    n = len(x)
    if n <= most:
        return list(x), list(y)
    keep = {0, n - 1}
    buckets = most // 2 - 1
    for b in range(buckets):
        span = range(b * n // buckets, (b + 1) * n // buckets)
        keep |= {min(span, key=lambda i: y[i]), max(span, key=lambda i: y[i])}
    kept = sorted(keep)
    return [x[i] for i in kept], [y[i] for i in kept]


class Plotter:
    """Draws the pictures of one page; each gets identifiers of its own."""

    def __init__(self) -> None:
        self._numbers = count()

    def lines(
        self,
        title: str,
        lines: Sequence[Line],
        *,
        unit: str = "",
        zero: bool = False,
        log: bool = False,
        mark: tuple[float, float] | None = None,
    ) -> str:
        """An SVG of curves over the optimizer steps.

        Args:
            title: what is drawn, for readers who can't see it; the page writes its own heading.
            lines: at least one curve with at least one point.
            unit: of the values, written above the axis.
            zero: let the axis begin at 0.
            log: powers of two.
            mark: (step, value) of a point to mark.
        """
        with _style():
            figure, axes = _figure(WIDTH, HEIGHT)
            for line in lines:
                x, y = thin(line.x, line.y)
                few = len(x) < 8 and not line.faint
                axes.plot(
                    x,
                    y,
                    color=SERIES[line.color % len(SERIES)],
                    linewidth=0.6 if line.faint else 1.4,
                    alpha=0.35 if line.faint else None,
                    label="_" if line.faint else _plain(line.label),
                    **({"marker": "o", "markersize": 3} if few else {}),
                )
            if mark is not None:
                axes.plot(*([value] for value in mark), color=TEXT, marker="o", markersize=5, fillstyle="none")
            if log:
                axes.set_yscale("log", base=2)
            _grid(axes, unit)
            if zero:
                axes.set_ylim(bottom=0)
            if sum(not line.faint for line in lines) > 1:
                axes.legend(frameon=False, fontsize=8, labelcolor=TEXT, handlelength=1.2)
            return self._finish(figure, describe(title, lines))

    def _finish(self, figure: Any, title: str) -> str:
        out = io.StringIO()
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set(facecolor="none", edgecolor="none")
        # Not figure.savefig, which draws a first time to place everything: print_svg does that too.
        figure.canvas.print_svg(out)
        return embed(out.getvalue(), f"p{next(self._numbers)}", title)


def _style() -> Any:
    import matplotlib  # lazy: the monitor thins curves without it

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "nanochat",
            "font.size": 8,
            "font.family": ["DejaVu Sans"],  # comes with matplotlib; the page draws with its own
            "axes.edgecolor": GRID,
            "xtick.color": TEXT,
            "ytick.color": TEXT,
            "text.color": TEXT,
            "axes.labelcolor": TEXT,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "path.simplify": True,
        }
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # lazy: as above
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _grid(axes: Any, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter  # lazy: as above

    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(4))
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_powerlimits((-4, 6))
        axes.yaxis.set_major_formatter(formatter)
    axes.set_xlabel("step", loc="right", labelpad=1)
    if unit:
        axes.set_title(unit, loc="left", fontsize=8, color=TEXT)


def _plain(text: str) -> str:
    """The text cut to what fits into a legend, without matplotlib's formulas."""
    return text[:24].replace("$", r"\$")


def describe(title: str, lines: Sequence[Line]) -> str:
    """The picture in a sentence, for readers who can't see it."""
    parts = []
    for line in lines:
        if not line.faint and line.y:
            name = f"{line.label}: " if sum(not other.faint for other in lines) > 1 else ""
            first, last = line.y[0], line.y[-1]
            steps = f"step {line.x[0]:.0f} to {line.x[-1]:.0f}"
            parts.append(
                f"{name}{first:.4g} to {last:.4g}, lowest {min(line.y):.4g}, highest {max(line.y):.4g}, {steps}"
            )
    return f"{title}: {'; '.join(parts)}" if parts else title


def embed(svg: str, prefix: str, title: str) -> str:
    """The SVG file as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _embed_tag(tag.group(), prefix), svg)
    head = f'<svg class="plot" role="img" aria-label="{escape(title)}" viewBox="{box.group(1) if box else "0 0 1 1"}">'
    svg = re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _embed_tag(tag: str, prefix: str) -> str:
    tag = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', tag)
    tag = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', tag)
    tag = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", tag)
    tag = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", tag)
    tag = re.sub(r"\s*font-family: [^;\"]+;?", "", tag)
    tag = re.sub(r"(\d\.\d)\d+", r"\1", tag)
    for color, variable in VARIABLES.items():
        tag = tag.replace(color, f"var({variable})")
    return tag


def is_flat(y: Sequence[float]) -> bool:
    """Whether a curve says no more than its one value."""
    return not y or math.isclose(min(y), max(y), rel_tol=1e-9, abs_tol=1e-12)
