"""A frame of the monitor for a terminal, also over SSH: rich draws the panels, plotext the curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import plotext
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from nanochat.report.monitor import Frame, StageCurve

STYLES = {"done": "green", "now": "bold cyan", "stopped": "bold yellow", "waiting": "dim"}
SIGNS = {"done": "✓", "now": "▶", "stopped": "■", "waiting": "·"}
CURVE_HEIGHT, CURVE_WIDTH = 13, 58


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
    # As many pictures as fit beside each other, of the newest stages; the others in a line each.
    beside = min(len(frame.curves), max(1, width // CURVE_WIDTH))
    parts += [Text(old.summary, style="dim") for old in frame.curves[: len(frame.curves) - beside]]
    if beside:
        parts.append(Columns([_picture(one, width // beside) for one in frame.curves[-beside:]], padding=(0, 0)))
    if frame.report:
        parts.append(Text(f"report: {frame.report}", overflow="fold"))
    if frame.chat:
        parts.append(Text(f"talk to it: {frame.chat}", overflow="fold"))
    parts.append(_table(frame.machine))
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in frame.log]
    return Group(*parts)


def progress_line(frame: Frame, width: int) -> Text:
    """A bar with percent and time left, and the time of all stages; empty while nothing is known."""
    total = f"all that is left: about {frame.total_left}" if frame.total_left else ""
    if frame.progress is None or frame.current is None:
        return Text(total)
    cells = max(10, min(width - 30, 80))
    full = round(cells * frame.progress)
    left = f"  {frame.eta} left" if frame.eta else ""
    bar = (("━" * full, "cyan"), ("━" * (cells - full), "dim"), f" {frame.progress:6.1%}{left}")
    return Text.assemble(*bar, f"\n{total}" if total else "")


def _picture(stage: StageCurve, width: int) -> Panel:
    plot = Text.from_ansi(curve(stage.steps, stage.losses, min(width - 4, 116), stage.new_text))
    return Panel(plot, title=f"{stage.title}: {stage.unit}", title_align="left", expand=False, style="dim")


def curve(
    x: Iterable[float], y: Iterable[float], width: int, other: tuple[Sequence[float], Sequence[float]] | None = None
) -> str:
    """A curve in characters, without colours; `other`: a second one, in dots."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, CURVE_HEIGHT)
    plotext.xlabel("step")
    plotext.plot(list(x), list(y), marker="braille")
    if other is not None:
        plotext.scatter(*map(list, other), marker="o", label="o new text")
    return str(plotext.build())


def _table(facts: Iterable[tuple[str, str]]) -> Columns:
    return Columns([Text.assemble((f"{name} ", "dim"), value) for name, value in facts], padding=(0, 3))
