"""CUDA cards: NVIDIA's data sheets, measured speeds, and which cards of a machine train together.

Peaks are dense (no 2:4 sparsity), at boost clock. `float16` is the fastest way in which the card multiplies float16
matrices and accumulates in float32, as PyTorch asks for: tensor cores where it has them, at the rate with float32
accumulation (half of the advertised one on GeForce cards from RTX 20xx on). Without tensor cores it is half-precision
arithmetic where that is fast (P100, GTX 16xx). All other old cards save memory with float16 but no time, so there it is
the float32 rate.

Memory is in GB, as sold. A card sold under one name in several sizes is listed with the most common one; where it is
present, ask the device itself. Laptop chips and MIG slices run at other speeds than the card whose name they carry, so
they are unknown here. `nanochat.hardware.measure_matmul` serves for every unknown card.

Also which torch builds run on a card, and which driver they need: set-up, verification, planning and the choice of
cards all ask this file. It imports the standard library only, because it is asked before anything is installed:

    printf 'Tesla T4,7.5,15360\\n' | python -m nanochat.cards      name, capability, MiB; prints the indices taken
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One card of the data sheets. Speeds in TFLOP/s, bandwidth in GB/s, memory in GB."""

    name: str
    capability: tuple[int, int]
    memory_gb: float
    bandwidth_gbs: float
    float32: float
    float16: float

    @property
    def tensor_cores(self) -> bool:
        """True if it has matrix units: Volta and newer, but not the GTX 16xx."""
        return self.capability >= (7, 0) and not self.name.startswith("GTX")

    @property
    def bfloat16(self) -> float | None:
        """Peak in bfloat16: that of float16 from Ampere on; None where bfloat16 is only emulated."""
        return self.float16 if self.capability >= (8, 0) else None

    @property
    def tf32(self) -> float | None:
        """Peak of float32 matmuls with inputs rounded to TF32: half that of float16 from Ampere on; else None."""
        return self.float16 / 2 if self.capability >= (8, 0) else None

    def peak_tflops(self, dtype: str) -> float | None:
        """Peak of matmuls in `dtype` ("float32" with TF32 where there is any, "float16", "bfloat16").

        None where the card only emulates the dtype.

        Raises:
            ValueError: another dtype.
        """
        peaks = {"float32": max(self.float32, self.tf32 or 0.0), "float16": self.float16, "bfloat16": self.bfloat16}
        if dtype not in peaks:
            raise ValueError(f"no peak for dtype {dtype!r}: use one of {', '.join(peaks)}")
        return peaks[dtype]


# name, capability, memory GB, bandwidth GB/s, float32 TFLOP/s, float16 TFLOP/s (see the top of this file)
# fmt: off
CARDS: tuple[Card, ...] = tuple(Card(*row) for row in (
    # Maxwell
    ("GTX 970",                 (5, 2),   4,  224,   3.5,   3.5),
    ("GTX 980",                 (5, 2),   4,  224,   4.6,   4.6),
    ("GTX 980 Ti",              (5, 2),   6,  336,   5.6,   5.6),
    ("GTX TITAN X",             (5, 2),  12,  336,   6.1,   6.1),
    ("Tesla M40",               (5, 2),  12,  288,   6.8,   6.8),
    ("Tesla M40 24GB",          (5, 2),  24,  288,   6.8,   6.8),
    # Pascal
    ("P100",                    (6, 0),  16,  732,   9.3,  18.7),
    ("P100-PCIE-12GB",          (6, 0),  12,  549,   9.3,  18.7),
    ("P100-SXM2",               (6, 0),  16,  732,  10.6,  21.2),
    ("Quadro GP100",            (6, 0),  16,  717,  10.3,  20.7),
    ("P40",                     (6, 1),  24,  346,  11.8,  11.8),
    ("P4",                      (6, 1),   8,  192,   5.5,   5.5),
    ("GTX 1050",                (6, 1),   2,  112,   1.9,   1.9),
    ("GTX 1050 Ti",             (6, 1),   4,  112,   2.1,   2.1),
    ("GTX 1060",                (6, 1),   6,  192,   4.4,   4.4),
    ("GTX 1060 3GB",            (6, 1),   3,  192,   3.9,   3.9),
    ("GTX 1070",                (6, 1),   8,  256,   6.5,   6.5),
    ("GTX 1070 Ti",             (6, 1),   8,  256,   8.2,   8.2),
    ("GTX 1080",                (6, 1),   8,  320,   8.9,   8.9),
    ("GTX 1080 Ti",             (6, 1),  11,  484,  11.3,  11.3),
    ("TITAN X",                 (6, 1),  12,  480,  11.0,  11.0),
    ("TITAN Xp",                (6, 1),  12,  548,  12.1,  12.1),
    ("Quadro P1000",            (6, 1),   4,   82,   1.9,   1.9),
    ("Quadro P2000",            (6, 1),   5,  140,   3.0,   3.0),
    ("Quadro P4000",            (6, 1),   8,  243,   5.3,   5.3),
    ("Quadro P5000",            (6, 1),  16,  288,   8.9,   8.9),
    ("Quadro P6000",            (6, 1),  24,  432,  12.6,  12.6),
    # Volta
    ("V100",                    (7, 0),  16,  900,  14.0, 112.0),
    ("V100-PCIE-32GB",          (7, 0),  32,  900,  14.0, 112.0),
    ("V100-SXM2",               (7, 0),  16,  900,  15.7, 125.0),
    ("V100-SXM2-32GB",          (7, 0),  32,  900,  15.7, 125.0),
    ("V100-SXM3-32GB",          (7, 0),  32,  981,  16.4, 131.0),
    ("V100S",                   (7, 0),  32, 1134,  16.4, 130.0),
    ("TITAN V",                 (7, 0),  12,  653,  14.9, 110.0),
    ("Quadro GV100",            (7, 0),  32,  870,  14.8, 118.5),
    # Turing
    ("GTX 1650",                (7, 5),   4,  128,   3.0,   6.0),
    ("GTX 1650 SUPER",          (7, 5),   4,  192,   4.4,   8.9),
    ("GTX 1660",                (7, 5),   6,  192,   5.0,  10.0),
    ("GTX 1660 SUPER",          (7, 5),   6,  336,   5.0,  10.0),
    ("GTX 1660 Ti",             (7, 5),   6,  288,   5.4,  10.9),
    ("T4",                      (7, 5),  16,  320,   8.1,  65.0),
    ("RTX 2060",                (7, 5),   6,  336,   6.5,  25.8),
    ("RTX 2060 SUPER",          (7, 5),   8,  448,   7.2,  28.7),
    ("RTX 2070",                (7, 5),   8,  448,   7.5,  29.9),
    ("RTX 2070 SUPER",          (7, 5),   8,  448,   9.1,  36.3),
    ("RTX 2080",                (7, 5),   8,  448,  10.1,  40.3),
    ("RTX 2080 SUPER",          (7, 5),   8,  496,  11.2,  44.6),
    ("RTX 2080 Ti",             (7, 5),  11,  616,  13.4,  53.8),
    ("TITAN RTX",               (7, 5),  24,  672,  16.3, 130.5),
    ("Quadro RTX 4000",         (7, 5),   8,  416,   7.1,  57.0),
    ("Quadro RTX 5000",         (7, 5),  16,  448,  11.2,  89.2),
    ("Quadro RTX 6000",         (7, 5),  24,  672,  16.3, 130.5),
    ("Quadro RTX 8000",         (7, 5),  48,  672,  16.3, 130.5),
    # Ampere
    ("A100",                    (8, 0),  40, 1555,  19.5, 312.0),
    ("A100 80GB PCIe",          (8, 0),  80, 1935,  19.5, 312.0),
    ("A100-SXM4-80GB",          (8, 0),  80, 2039,  19.5, 312.0),
    ("A800",                    (8, 0),  80, 2039,  19.5, 312.0),
    ("A30",                     (8, 0),  24,  933,  10.3, 165.0),
    ("A2",                      (8, 6),  16,  200,   4.5,  18.0),
    ("A10",                     (8, 6),  24,  600,  31.2, 125.0),
    ("A10G",                    (8, 6),  24,  600,  35.0,  70.0),
    ("A16",                     (8, 6),  16,  200,   4.5,  17.9),
    ("A40",                     (8, 6),  48,  696,  37.4, 149.7),
    ("RTX A2000",               (8, 6),   6,  288,   8.0,  31.9),
    ("RTX A2000 12GB",          (8, 6),  12,  288,   8.0,  31.9),
    ("RTX A4000",               (8, 6),  16,  448,  19.2,  76.7),
    ("RTX A4500",               (8, 6),  20,  640,  23.7,  94.6),
    ("RTX A5000",               (8, 6),  24,  768,  27.8, 111.1),
    ("RTX A5500",               (8, 6),  24,  768,  34.1, 136.4),
    ("RTX A6000",               (8, 6),  48,  768,  38.7, 154.8),
    ("RTX 3050",                (8, 6),   8,  224,   9.1,  18.2),
    ("RTX 3060",                (8, 6),  12,  360,  12.7,  25.5),
    ("RTX 3060 Ti",             (8, 6),   8,  448,  16.2,  32.4),
    ("RTX 3070",                (8, 6),   8,  448,  20.3,  40.6),
    ("RTX 3070 Ti",             (8, 6),   8,  608,  21.7,  43.5),
    ("RTX 3080",                (8, 6),  10,  760,  29.8,  59.5),
    ("RTX 3080 Ti",             (8, 6),  12,  912,  34.1,  68.2),
    ("RTX 3090",                (8, 6),  24,  936,  35.6,  71.0),
    ("RTX 3090 Ti",             (8, 6),  24, 1008,  40.0,  80.0),
    # Ada
    ("L4",                      (8, 9),  24,  300,  30.3, 121.0),
    ("L40",                     (8, 9),  48,  864,  90.5, 181.0),
    ("L40S",                    (8, 9),  48,  864,  91.6, 362.0),
    ("RTX 2000 Ada",            (8, 9),  16,  224,  12.0,  48.0),
    ("RTX 4000 Ada",            (8, 9),  20,  360,  26.7, 106.9),
    ("RTX 4500 Ada",            (8, 9),  24,  432,  39.6, 158.5),
    ("RTX 5000 Ada",            (8, 9),  32,  576,  65.3, 261.1),
    ("RTX 6000 Ada",            (8, 9),  48,  960,  91.1, 364.2),
    ("RTX 4060",                (8, 9),   8,  272,  15.1,  30.2),
    ("RTX 4060 Ti",             (8, 9),   8,  288,  22.1,  44.1),
    ("RTX 4070",                (8, 9),  12,  504,  29.1,  58.3),
    ("RTX 4070 SUPER",          (8, 9),  12,  504,  35.5,  71.0),
    ("RTX 4070 Ti",             (8, 9),  12,  504,  40.1,  80.2),
    ("RTX 4070 Ti SUPER",       (8, 9),  16,  672,  44.1,  88.2),
    ("RTX 4080",                (8, 9),  16,  717,  48.7,  97.5),
    ("RTX 4080 SUPER",          (8, 9),  16,  736,  52.2, 104.4),
    ("RTX 4090",                (8, 9),  24, 1008,  82.6, 165.2),
    ("RTX 4090 D",              (8, 9),  24, 1008,  73.5, 147.1),
    # Hopper
    ("H20",                     (9, 0),  96, 4000,  44.0, 148.0),
    ("H100",                    (9, 0),  80, 3352,  66.9, 989.4),
    ("H100 PCIe",               (9, 0),  80, 2039,  51.2, 756.0),
    ("H100 NVL",                (9, 0),  94, 3938,  60.0, 835.5),
    ("H800",                    (9, 0),  80, 3352,  66.9, 989.4),
    ("H200",                    (9, 0), 141, 4800,  66.9, 989.4),
    ("H200 NVL",                (9, 0), 141, 4800,  60.0, 835.5),
    ("GH200",                   (9, 0),  96, 4022,  66.9, 989.4),
    # Blackwell
    ("B100",                   (10, 0), 192, 8000,  60.0, 1750.0),
    ("B200",                   (10, 0), 180, 8000,  75.0, 2250.0),
    ("GB200",                  (10, 0), 186, 8000,  80.0, 2500.0),
    ("RTX 5050",               (12, 0),   8,  320,  13.2,  26.3),
    ("RTX 5060",               (12, 0),   8,  448,  19.2,  38.4),
    ("RTX 5060 Ti",            (12, 0),  16,  448,  23.7,  47.4),
    ("RTX 5070",               (12, 0),  12,  672,  30.9,  61.7),
    ("RTX 5070 Ti",            (12, 0),  16,  896,  43.9,  87.9),
    ("RTX 5080",               (12, 0),  16,  960,  56.3, 112.6),
    ("RTX 5090",               (12, 0),  32, 1792, 104.8, 209.5),
    ("RTX PRO 6000 Blackwell Workstation Edition", (12, 0), 96, 1792, 125.0, 503.8),
))
# fmt: on

# TFLOP/s of matmuls measured through PyTorch, by the row above. A P100's float16 is no faster than its float32:
# PyTorch accumulates in float32. Source: zzc0721/torch-performance-test-data.
MEASURED_MATMUL: dict[str, dict[str, float]] = {
    "P100": {"float32": 8.6, "float16": 8.4, "bfloat16": 6.1},
    "T4": {"float32": 4.3, "float16": 42.0, "bfloat16": 2.0},
    "V100-SXM2": {"float32": 14.1, "float16": 94.8, "bfloat16": 10.3},
    "A100": {"float32": 19.0, "float16": 258.0, "bfloat16": 264.0},
    "H100": {"float32": 52.0, "float16": 760.0, "bfloat16": 797.0},
}
# Words in the name of a device that is slower than the card whose name it carries.
_OTHER_SPEED = {"LAPTOP", "MOBILE", "MAX", "MIG"}


def _words(name: str) -> list[str]:
    return re.findall(r"[A-Z0-9.]+", name.upper())


def find_card(name: str) -> Card | None:
    """The card that torch calls `name` (`torch.cuda.get_device_name()`), or None if it is not in the table.

    A row fits if its words occur in `name` one after the other. The row with the most characters wins, so that
    "NVIDIA GeForce RTX 3080 Ti" is not taken for an RTX 3080.

    >>> find_card("Tesla P100-PCIE-16GB").name
    'P100'
    >>> find_card("NVIDIA GeForce RTX 3080 Ti").memory_gb
    12
    """
    words = _words(name)
    if _OTHER_SPEED & set(words):
        return None

    def fits(card: Card) -> bool:
        wanted = _words(card.name)
        return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))

    return max(filter(fits, CARDS), key=lambda card: len(card.name), default=None)


# --- which torch runs on which card -----------------------------------------------------------------------------------
# Source: PyTorch's release compatibility matrix and the architectures listed in the wheels. CUDA 12.6 is the last with
# kernels for Maxwell, Pascal and Volta, and the last that runs on drivers before 580.

OLDEST = (5, 0)  # Maxwell. Kepler (K80, GTX 780) has no kernels in any torch that this project supports.
OLDEST_OF_CUDA_13 = (7, 5)  # Turing
LEAST_DRIVER = (525, 60)
LAST_OLD_DRIVER = 580  # the last branch that drives Maxwell, Pascal and Volta, and the first that runs CUDA 13
# Names of cards before Maxwell, for an nvidia-smi too old to tell the capability. The GTX 745 and 750 are Maxwell.
_KEPLER = re.compile(
    r"\bK(10|20\w*|40\w*|80)\b|Quadro K\d|\bGTX? ?[4-7](?<!7)\d\d\b|\bGTX 7[678]0\b|\b[CM]20[579]0\b", re.I
)


@dataclass(frozen=True)
class TorchBuild:
    """A torch that pip can install, with its size: CUDA's libraries are most of it."""

    requirement: str
    """What follows `pip install`."""
    download_gb: float
    disk_gb: float


PYTORCH_INDEX = "https://download.pytorch.org/whl"
# GB to download and GB on disk. Measured: the CPU build, and the download of 2.7.1. The others are estimates.
TORCH_CPU = TorchBuild(f"torch==2.13.0+cpu --extra-index-url {PYTORCH_INDEX}/cpu", 0.2, 0.8)
TORCH_MAC = TorchBuild("torch==2.13.0", 0.1, 0.4)
TORCH_PYPI = TorchBuild("torch==2.13.0", 2.6, 4.5)  # with CUDA, for a CPU too where pytorch.org is out of reach
TORCH_NEWEST = TorchBuild("torch>=2.7,<2.16", 2.6, 4.5)
TORCH_CU126 = TorchBuild(f"torch==2.14.* --index-url {PYTORCH_INDEX}/cu126", 3.0, 5.5)
TORCH_MAXWELL = TorchBuild("torch==2.7.1", 3.0, 5.5)  # from PyPI, with kernels from 5.0 on; for Python up to 3.13
OTHER_PACKAGES = TorchBuild("", 0.3, 1.0)  # everything else that the project installs


def known_capability(name: str, told: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """The compute capability that nvidia-smi `told`, else that of the table, else None."""
    if told is not None:
        return told
    card = find_card(name)
    if card is not None:
        return card.capability
    return ((3, 7) if "K80" in name else (3, 5)) if _KEPLER.search(name) else None


def runs_torch(capability: tuple[int, int] | None) -> bool:
    """True if a supported torch has kernels for this capability; an unknown one gets the benefit of the doubt."""
    return capability is None or capability >= OLDEST


def torch_builds(capabilities: Sequence[tuple[int, int] | None], drivers: Sequence[str] = ()) -> list[TorchBuild]:
    """The builds to try on a machine with these cards, best first; cards that are too old do not count."""
    usable = [capability for capability in capabilities if runs_torch(capability)]
    if not usable:
        return [TORCH_MAC, TORCH_NEWEST] if sys.platform == "darwin" else [TORCH_CPU, TORCH_PYPI, TORCH_NEWEST]
    weakest = min(capability or OLDEST for capability in usable)
    if weakest < (6, 0) and None not in usable:
        return [TORCH_MAXWELL, TORCH_CU126]
    branches = [int(driver.split(".")[0]) for driver in drivers if driver.split(".")[0].isdigit()]
    old_driver = min(branches, default=LAST_OLD_DRIVER) < LAST_OLD_DRIVER
    old = weakest < OLDEST_OF_CUDA_13 or old_driver
    return [TORCH_CU126, TORCH_MAXWELL] if old else [TORCH_NEWEST, TORCH_CU126, TORCH_MAXWELL]


# --- which cards train together --------------------------------------------------------------------------------------
# Ranks wait for each other at every step, so a card among slower ones is no faster than they are, and a mixed group
# would train in the precision of its weakest card. So the fastest group of equal cards trains.

UNKNOWN_CARD_FLOPS_PER_SECOND = 130e12  # about an A100's: for an upper bound, too much is the safe side


@dataclass(frozen=True)
class DeviceInfo:
    """A card of this machine, as the driver or torch names it."""

    name: str
    capability: tuple[int, int] | None
    """None if unknown."""
    memory_mib: int

    @property
    def kind(self) -> tuple[str, int]:
        """Cards of one kind are equal: the same name and, to a GiB, the same memory."""
        return self.name, round(self.memory_mib / 1024)


def training_speed(name: str) -> float:
    """An upper bound of the FLOP/s that training reaches on the card of this name.

    The number of shards to download follows from it: too few, and text would be read twice.
    """
    # Training reaches at most half the measured speed of matmuls on tensor cores; on a P100 95 % of it, and half as
    # much again if its products are accumulated in float16. Cards that nobody measured go by the data sheet.
    for row, speeds in MEASURED_MATMUL.items():
        if row.split("-")[0] in re.split("[ -]", name):
            return 1e12 * max(speeds.values()) * (0.95 * 1.5 if row == "P100" else 0.5)
    card = find_card(name)
    if card is None:
        return UNKNOWN_CARD_FLOPS_PER_SECOND
    return 1e12 * (card.float16 / 2 if card.tensor_cores else card.float32)


def choose_cards(cards: Sequence[DeviceInfo]) -> list[int]:
    """Indices in `cards` of those that train one model: the kind that is fastest together, then has most memory.

    Cards for which no supported torch has kernels are left out.
    """
    groups: dict[tuple[str, int], list[int]] = {}
    for index, card in enumerate(cards):
        if runs_torch(card.capability):
            groups.setdefault(card.kind, []).append(index)
    if not groups:
        return []
    best = max(groups, key=lambda kind: (len(groups[kind]) * training_speed(kind[0]), kind[1]))
    return groups[best]


def describe_choice(cards: Sequence[DeviceInfo], chosen: Sequence[int]) -> str:
    """Names the cards that train and those that stay idle, such as "2 × Tesla T4; idle: GeForce GTX 1050"."""
    idle = [card.name for index, card in enumerate(cards) if index not in chosen]
    taken = f"{len(chosen)} × {cards[chosen[0]].name}" if chosen else "no card"
    return taken + (f"; idle: {', '.join(idle)}" if idle else "")


def parse_device(line: str) -> DeviceInfo:
    """A line "name, capability, MiB"; a capability that is no number is unknown."""
    name, capability, memory = (part.strip() for part in line.rsplit(",", 2))
    major, _, minor = capability.partition(".")
    known = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return DeviceInfo(name, known_capability(name, known), int(memory))


if __name__ == "__main__":
    devices = [parse_device(line) for line in sys.stdin if line.strip()]
    taken = choose_cards(devices)
    print(" ".join(map(str, taken)))
    print(describe_choice(devices, taken))
