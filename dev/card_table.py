"""Print the table of measured cards for docs/cards.md, from the JSON files in dev/cards/.

python -m dev.card_table
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import run_script
from nanochat.plan.measured import CardRecord, read_records
from nanochat.precision import DTYPES

HEAD = ["card", "capability", "memory", "torch", *(f"{name} TFLOP/s" for name in DTYPES), "training steps", "date"]


@dataclass(frozen=True)
class Config:
    """This tool has no settings."""


def line(record: CardRecord) -> list[str]:
    """One card's cells."""
    speeds = [record.matmul_tflops.get(name) for name in DTYPES]
    steps = []
    for step in record.steps:
        speed = step["rows"] * step["sequence_len"] / step["seconds"]
        steps.append(f"d{step['depth']} × {step['rows']} {step['dtype']}: {speed:,.0f} tokens/s")
    return [
        *(record.device, record.capability, f"{record.memory_gib:g} GiB", record.torch),
        *("-" if speed is None else f"{speed:.3g}" for speed in speeds),
        *("; ".join(steps) or "-", record.date or "-"),
    ]


def main(cfg: Config) -> None:
    """Print the table, or that there is nothing yet."""
    rows = [line(record) for record in read_records()]
    if not rows:
        print("No card has been measured yet: every figure about cards in these documents is planned.")
        return
    print("\n".join(f"| {' | '.join(row)} |" for row in [HEAD, ["---"] * len(HEAD), *rows]))


if __name__ == "__main__":
    run_script(main, Config)
