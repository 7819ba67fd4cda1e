"""Temperature, memory, power and load of the cards, as nvidia-smi reads them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

QUERY = ("name", "temperature.gpu", "memory.used", "memory.total", "power.draw", "power.limit", "utilization.gpu")
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class CardReading:
    """One card now; None is what it doesn't report."""

    name: str
    temperature_c: float | None
    memory_used_gib: float | None
    memory_total_gib: float | None
    power_w: float | None
    power_limit_w: float | None
    load_percent: float | None


def read_cards() -> list[CardReading]:
    """All cards of this machine; empty where there is none, or no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_readings(answer.stdout) if answer.returncode == 0 else []


def parse_readings(text: str) -> list[CardReading]:
    """The lines that nvidia-smi prints for QUERY, memory in MiB.

    >>> parse_readings("Tesla P100-PCIE-16GB, 61, 8192, 16384, 171.25, 250.00, 98")[0].memory_used_gib
    8.0
    """
    readings = []
    for line in text.splitlines():
        name, *rest = [cell.strip() for cell in line.split(",")]
        if len(rest) == len(QUERY) - 1:
            temperature, used, total, power, limit, load = [_number(cell) for cell in rest]
            gib = [None if value is None else value / 1024 for value in (used, total)]
            readings.append(CardReading(name, temperature, gib[0], gib[1], power, limit, load))
    return readings


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A], [Not Supported], ERR!
        return None
