"""A card as people write it: "t4", "rtx3060", "3060", "P100 12GB", "2x T4", "Tesla V100-SXM2-16GB"."""

from __future__ import annotations

import re
from dataclasses import replace

from nanochat.cards import CARDS, OLDEST, Card, find_card, known_capability, runs_torch

# Words that names from drivers and shops carry besides the card's own.
_FILLERS = set(re.findall(r"\S+", "NVIDIA TESLA GEFORCE QUADRO GPU CARD GENERATION PASCAL MAXWELL CORE TENSOR"))
_FORMS = set(re.findall(r"\S+", "PCIE SXM SXM2 SXM3 SXM4 SXM5 HBM HBM2 HBM2E HBM3 HBM3E"))
_SIZE = re.compile(r"(\d+)\s*(GB|GIB)\b", re.I)
_COUNT = re.compile(r"^(?P<before>\d+)\s*[x×*]\s*(?P<card>.+)$|^(?P<name>.+?)(?<=[\d\s])[x×*]\s*(?P<after>\d+)$", re.I)


def parse_card(text: str) -> tuple[Card, int]:
    """The card that `text` names, and how many of it.

    Raises:
        ValueError: no card, several, or words that nothing is known about; says what is.
    """
    try:
        return _one_card(text), 1
    except ValueError as error:
        counted = _COUNT.match(text.strip())
        if counted is None:
            raise
        number = int(counted["before"] or counted["after"])
        if not 1 <= number <= 1024:
            raise ValueError(f"{text}: {number} cards?") from error
        return _one_card(counted["card"] or counted["name"]), number


def _compact(text: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", text.upper())


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Z0-9.]+|[^\sA-Z0-9.,()/_-]+", text.upper())


def _one_card(text: str) -> Card:
    size = _SIZE.search(text)
    # A row that has the size in its name ("GTX 1060 3GB") goes before the row of the usual size.
    card = find_card(text) or _by_letters(text)
    if size is not None and card is None:
        card = _by_letters(_SIZE.sub("", text))
    if card is None:
        raise ValueError(f"{text} is not in nanochat/cards.py: {_hint(text)}")
    if not runs_torch(card.capability):
        raise ValueError(f"{card.name} is older than {OLDEST[0]}.{OLDEST[1]}: no torch supports it")
    known = _compact(card.name)
    left = [
        word
        for word in _words(_SIZE.sub(" ", text))
        if word not in _FILLERS | _FORMS and _compact(word) not in known and known not in _compact(word)
    ]
    if left:
        raise ValueError(f'{text}: {card.name} is known, but not what "{" ".join(left).lower()}" means')
    return card if size is None else _of_size(card, int(size[1]))


def _by_letters(text: str) -> Card | None:
    """The row whose letters are these, or the only one that ends with them; None if there is none, or several."""
    wanted = _compact(" ".join(word for word in _words(text) if word not in _FILLERS | _FORMS))
    for prefix in ("NVIDIA", "GEFORCE", "TESLA"):
        wanted = wanted.removeprefix(prefix)
    rows = [card for card in CARDS if _compact(card.name) == wanted]
    if not rows and len(wanted) >= 3:
        rows = [card for card in CARDS if _compact(card.name).endswith(wanted)]
    return rows[0] if len(rows) == 1 else None


def _of_size(card: Card, gb: int) -> Card:
    """`card` with so much memory: another row of its kind, else the same card sold with half or twice as much."""
    own, form = _words(card.name), {*_FORMS, f"{gb}GB"}
    kin = [
        row
        for row in CARDS
        if row.memory_gb == gb and _words(row.name)[: len(own)] == own and form.issuperset(_words(row.name)[len(own) :])
    ]
    if card.memory_gb == gb:
        return card
    if kin:
        return min(kin, key=lambda row: len(row.name))
    if not 0.5 <= gb / card.memory_gb <= 2:
        raise ValueError(f"a {card.name} has {card.memory_gb:g} GB, not {gb}")
    return replace(card, name=f"{card.name} {gb}GB", memory_gb=gb)


def _hint(text: str) -> str:
    if not runs_torch(known_capability(text)):
        return (
            f"no torch that this project supports has kernels for it (they begin with {OLDEST[0]}.{OLDEST[1]}, Maxwell)"
        )
    wanted = _compact(text)
    similar = [card.name for card in CARDS if wanted and wanted in _compact(card.name)]
    return f"did you mean {', '.join(similar)}?" if similar else "`--card=list` shows all"


def card_table() -> str:
    """All cards, a line each."""
    return "\n".join(
        f"{card.name:45} {card.memory_gb:4g} GB  {card.capability[0]}.{card.capability[1]:<3} "
        f"{card.float32:6.1f} TFLOP/s float32 {card.float16:7.1f} float16"
        for card in CARDS
    )
