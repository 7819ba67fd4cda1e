"""A frame of the monitor for a terminal, also over SSH: rich draws the panels, plotext the curve."""

from __future__ import annotations

from collections.abc import Iterable

import plotext
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from nanochat.report.monitor import Frame

STYLES = {"done": "green", "now": "bold cyan", "waiting": "dim"}
SIGNS = {"done": "✓", "now": "▶", "waiting": "·"}
CURVE_HEIGHT = 13


def render(frame: Frame, width: int) -> Group:
    """The frame as something that rich can print on `width` columns."""
    stages = Text(" ").join(Text(f"{SIGNS[state]}\u00a0{name}", style=STYLES[state]) for name, state in frame.stages)
    parts: list[RenderableType] = [
        Text.assemble(("nanochat ", "bold"), frame.headline, ("  " + frame.clock, "dim")),
        Text(str(frame.base_dir), style="dim"),
        stages,
        progress_line(frame, width),
    ]
    if frame.facts:
        parts.append(_table(frame.facts))
    x, y = frame.curve
    if len(x) > 1:
        plot = Text.from_ansi(curve(x, y, min(width - 4, 120)))
        parts.append(Panel(plot, title="loss", title_align="left", expand=False, style="dim"))
    parts.append(_table(frame.machine))
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in frame.log]
    return Group(*parts)


def progress_line(frame: Frame, width: int) -> Text:
    """A bar with percent and time left; empty while neither is known."""
    if frame.progress is None or frame.current is None:
        return Text("")
    cells = max(10, min(width - 30, 80))
    full = round(cells * frame.progress)
    left = f"  {frame.eta} left" if frame.eta else ""
    return Text.assemble(("━" * full, "cyan"), ("━" * (cells - full), "dim"), f" {frame.progress:6.1%}{left}")


def curve(x: Iterable[float], y: Iterable[float], width: int) -> str:
    """A curve in characters, without colours."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, CURVE_HEIGHT)
    plotext.plot(list(x), list(y), marker="braille")
    return str(plotext.build())


def _table(facts: Iterable[tuple[str, str]]) -> Columns:
    return Columns([Text.assemble((f"{name} ", "dim"), value) for name, value in facts], padding=(0, 3))
