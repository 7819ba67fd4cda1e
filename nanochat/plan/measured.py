"""Cards as their owners have measured them with dev/card_session.sh or dev/gpu_check.py: one JSON each in dev/cards/.

The planner takes these before a data sheet and its guesses. A file has the keys of `CardRecord`; docs/cards.md is
generated from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nanochat.cards import find_card

CARDS_FOLDER = Path(__file__).resolve().parents[2] / "dev" / "cards"


@dataclass(frozen=True, kw_only=True)
class CardRecord:
    """One card, measured."""

    device: str
    """As torch calls it."""
    capability: str
    memory_gib: float
    torch: str
    cuda: str | None = None
    date: str = ""
    matmul_tflops: Mapping[str, float | None]
    """By dtype, as training runs matmuls."""
    steps: tuple[Mapping[str, Any], ...] = ()
    """Training steps: depth, rows, vocab_size, sequence_len, recipe, dtype, seconds, and gib where it was measured."""


def read_record(path: Path) -> CardRecord:
    """One file.

    Raises:
        ValueError: it is not such a record; names the file and what is wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        record = CardRecord(**{field.name: found[field.name] for field in fields(CardRecord) if field.name in found})
        if not all(isinstance(speed, float | int | None) for speed in record.matmul_tflops.values()):
            raise TypeError("matmul_tflops must have numbers")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not the record of a card ({error}); dev/card_session.sh prints one") from None
    return record


def read_records(folder: Path = CARDS_FOLDER) -> list[CardRecord]:
    """All cards that were measured, in the order of their files' names.

    Raises:
        ValueError: a file is not such a record.
    """
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def measured_card(name: str, folder: Path = CARDS_FOLDER) -> CardRecord | None:
    """The last record of the card that nanochat/cards.py calls `name`; None if nobody has measured it."""
    found = None
    for record in read_records(folder):
        card = find_card(record.device)
        if card is not None and card.name == name:
            found = record
    return found
