"""A frame of the monitor for a terminal, also over SSH: rich draws the panels, plotext the curve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nanochat.progress import format_seconds
from nanochat.report.monitor import Frame, Training

STYLES = {"done": "green", "now": "bold cyan", "waiting": "dim"}
SIGNS = {"done": "✓", "now": "▶", "waiting": "·"}
CURVE_HEIGHT = 13


def render(frame: Frame, width: int) -> Any:
    """The frame as something that rich can print.

    Args:
        frame: what was seen.
        width: columns of the terminal.
    """
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    stages = Text(" ").join(Text(f"{SIGNS[state]}\u00a0{name}", style=STYLES[state]) for name, state in frame.stages)
    parts: list[Any] = [
        Text.assemble(("nanochat ", "bold"), headline(frame), ("  " + frame.clock, "dim")),
        Text(str(frame.base_dir), style="dim"),
        stages,
        progress_line(frame, width),
    ]
    if frame.training is not None:
        parts.append(_table(training_facts(frame.training)))
        x, y = frame.training.curve
        if len(x) > 1:
            plot = Text.from_ansi(curve(x, y, min(width - 4, 120)))
            parts.append(Panel(plot, title="loss", title_align="left", expand=False, style="dim"))
    parts.append(_table(machine_facts(frame.cards, frame.load)))
    parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in frame.log]
    return Group(*parts)


def headline(frame: Frame) -> str:
    """One line that says what is going on."""
    if frame.finished:
        return "all stages are finished"
    if frame.current is None:
        return "nothing has run here yet"
    if frame.is_quiet:
        return f"{frame.current}: nothing written for {format_seconds(frame.quiet_seconds)}: stopped, or at a long step"
    return frame.current


def progress_line(frame: Frame, width: int) -> Any:
    """A bar with percent and time left; empty while neither is known."""
    from rich.text import Text

    if frame.progress is None or frame.current is None:
        return Text("")
    cells = max(10, min(width - 30, 80))
    full = round(cells * frame.progress)
    left = f"  {frame.eta} left" if frame.eta else ""
    return Text.assemble(("━" * full, "cyan"), ("━" * (cells - full), "dim"), f" {frame.progress:6.1%}{left}")


def training_facts(training: Training) -> list[tuple[str, str]]:
    """(name, value) of a training stage."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    facts = [
        ("step", f"{training.step:,}"),
        ("trained", format_seconds(training.seconds)),
        ("loss", show(training.loss, ".4f")),
        ("learning rate", "×" + show(training.lr_multiplier, ".2f")),
        ("tokens/s", show(training.tokens_per_second, ",.0f")),
        ("of matmul speed", show(training.matmul_share, ".0%")),
        ("peak memory", show(training.peak_memory_gb, ".2f") + " GB"),
        ("skipped steps", str(training.skipped)),
        ("loss scale", show(training.scale, "g")),
    ]
    return facts + [(name.replace("_", " "), f"{value:.4f}") for name, value in training.evaluations.items()]


def machine_facts(cards: Iterable[str], load: str) -> list[tuple[str, str]]:
    """(name, value) of each card and of the machine."""
    facts = [(f"card {i}", card) for i, card in enumerate(cards)]
    return [*(facts or [("card", "no card")]), ("machine", load)]


def curve(x: Iterable[float], y: Iterable[float], width: int) -> str:
    """A curve in characters, without colours."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(width, CURVE_HEIGHT)
    plotext.plot(list(x), list(y), marker="braille")
    return str(plotext.build())


def _table(facts: list[tuple[str, str]]) -> Any:
    from rich.columns import Columns
    from rich.text import Text

    return Columns([Text.assemble((f"{name} ", "dim"), value) for name, value in facts], padding=(0, 3))
