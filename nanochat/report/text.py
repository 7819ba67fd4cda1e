"""Values and tables as text: what a report can store as JSON, and how people read it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any


def slugify(text: str) -> str:
    """A file name: "Chat evaluation sft" -> "chat-evaluation-sft"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def to_plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays of one number become the number, dataclasses dicts, anything else text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if callable(getattr(value, "item", None)):  # torch and numpy scalars
        try:
            return to_plain(value.item())
        except (ValueError, RuntimeError, TypeError):
            pass
    return str(value)


def format_value(value: Any) -> str:
    """One line for a value: 1234567 -> 1,234,567; 0.123456 -> 0.1235; text without line breaks."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4f}".rstrip("0").rstrip(".")
    if isinstance(value, (list, dict)):
        items = [f"{k}: {format_value(v)}" for k, v in value.items()] if isinstance(value, dict) else value
        return ", ".join(format_value(item) for item in items)
    return " ".join(str(value).split())


def to_markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table; the first row is its head, all columns but the first are numbers."""
    head, *rows = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return [head, "|---|" + "---:|" * (len(table[0]) - 1), *rows]
