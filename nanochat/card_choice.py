"""Which of a machine's cards train together: the fastest group of equal ones.

Ranks wait for each other at every step, so a card among slower ones is no faster than those; and a group of unequal
cards would train in the weakest one's precision. Only the standard library is needed here: verify_p100_setup.sh asks
before anything is installed,

    printf 'Tesla T4,7.5,15360\\n' | python -m nanochat.card_choice      name, capability, MiB; prints the places taken
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.cards import find_card

OLDEST = (6, 0)
"""No torch that this project supports has kernels for older cards."""
# An upper bound of the FLOP/s that training reaches, so that no text is read twice for want of shards: half the
# measured matmul speed on cards with tensor cores; on a P100 95 % of it, and half as much again should its matmuls be
# summed in float16.
# Source of the measured speeds: zzc0721/torch-performance-test-data.
TRAINING_FLOPS_PER_SECOND = {"P100": 12e12, "T4": 21e12, "V100": 47e12, "A100": 130e12, "H100": 400e12}
UNKNOWN_CARD_FLOPS_PER_SECOND = 130e12


@dataclass(frozen=True)
class DeviceInfo:
    """A card of this machine, as the driver or torch names it."""

    name: str
    capability: tuple[int, int] | None
    """None where it can't be told."""
    memory_mib: int

    @property
    def kind(self) -> tuple[str, int]:
        """Cards of one kind are equal: the same name and, to a GiB, the same memory."""
        return self.name, round(self.memory_mib / 1024)


def training_speed(name: str) -> float:
    """An upper bound of the FLOP/s that training reaches on the card of this name: measured, else by its data sheet."""
    known = [speed for word, speed in TRAINING_FLOPS_PER_SECOND.items() if word in name.split() or f"{word}-" in name]
    if known:
        return known[0]
    card = find_card(name)
    if card is None:
        return UNKNOWN_CARD_FLOPS_PER_SECOND
    return 1e12 * (card.float16 / 2 if card.tensor_cores else card.float32)


def choose_cards(cards: Sequence[DeviceInfo]) -> list[int]:
    """Places in `cards` of those that train one model: the kind that is fastest together, then the larger memory.

    Cards that no supported torch has kernels for are left out.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for place, card in enumerate(cards):
        if card.capability is None or card.capability >= OLDEST:
            groups.setdefault(card.kind, []).append(place)
    if not groups:
        return []
    best = max(groups, key=lambda kind: (len(groups[kind]) * training_speed(kind[0]), kind[1]))
    return groups[best]


def describe_choice(cards: Sequence[DeviceInfo], chosen: Sequence[int]) -> str:
    """Which cards are taken and which stay idle, such as "2 × Tesla T4; idle: GeForce GTX 1050"."""
    idle = [card.name for place, card in enumerate(cards) if place not in chosen]
    taken = f"{len(chosen)} × {cards[chosen[0]].name}" if chosen else "no card"
    return taken + (f"; idle: {', '.join(idle)}" if idle else "")


def _parse(line: str) -> DeviceInfo:
    name, capability, memory = (part.strip() for part in line.rsplit(",", 2))
    major, _, minor = capability.partition(".")
    known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return DeviceInfo(name, known, int(memory))


if __name__ == "__main__":
    devices = [_parse(line) for line in sys.stdin if line.strip()]
    taken = choose_cards(devices)
    print(" ".join(map(str, taken)))
    print(describe_choice(devices, taken))
