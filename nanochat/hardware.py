"""What this machine is and what it can do: cards, torch wheel, CPU, memory, disk, measured speeds, throttling.

`inspect_machine` only asks (torch, nvidia-smi, the operating system); `measure_matmul` computes. A `ThrottleWatcher`
asks nvidia-smi now and then during a run whether a card had to slow down. Speeds that nobody measured are in
nanochat/cards.py.
"""

from __future__ import annotations

import contextlib
import csv
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.cards import find_card
from nanochat.env import get_base_dir

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve")
SMI_SECONDS = 10.0  # nvidia-smi answers in well under one; a hanging driver must not hang us


@dataclass(frozen=True)
class CardInfo:
    """A CUDA card of this machine."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    """What other programs, a display among them, leave over."""
    driver: str | None
    usable: bool
    """torch sees it, and the installed wheel has kernels for it."""
    uuid: str | None = None


@dataclass(frozen=True)
class Wheel:
    """The installed torch."""

    version: str
    cuda: str | None
    """The CUDA it was built with; None: a build without."""
    arches: tuple[str, ...]


@dataclass(frozen=True)
class CPUInfo:
    """The processor."""

    name: str
    cores: int
    """Those this process may use."""
    features: tuple[str, ...]
    """Instructions that matter for matmuls, as the operating system calls them."""


@dataclass(frozen=True)
class Machine:
    """What `inspect_machine` found. Memory and disk in bytes."""

    cards: tuple[CardInfo, ...]
    wheel: Wheel
    cpu: CPUInfo
    ram_total_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def inspect_machine(folder: str | Path | None = None) -> Machine:
    """Ask what is here; computes nothing.

    Args:
        folder: whose disk is meant; default: the base dir.
    """
    import psutil

    memory = psutil.virtual_memory()
    return Machine(
        cards=_cards(),
        wheel=Wheel(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list())),
        cpu=CPUInfo(cpu_name(), _usable_cores(), _cpu_features()),
        ram_total_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder or get_base_dir()).free,
    )


def wheel_runs(capability: tuple[int, int], arches: Sequence[str]) -> bool:
    """Whether a wheel with these arches (`torch.cuda.get_arch_list()`) has kernels for a card; True if it lists none.

    A cubin runs on its own major version and an equal or newer minor one; PTX (compute_) runs on all newer cards.
    """
    major, minor = capability
    known = [a.split("_") for a in arches if a.startswith(("sm_", "compute_"))]
    numbers = [(kind, int("".join(c for c in number if c.isdigit()))) for kind, number in known]
    return not numbers or any(
        (kind == "sm" and n // 10 == major and n % 10 <= minor) or (kind == "compute" and n <= major * 10 + minor)
        for kind, n in numbers
    )


def _cards() -> tuple[CardInfo, ...]:
    """The cards torch sees; where it sees none, those of nvidia-smi."""
    fields = ("uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version")
    rows = query_nvidia_smi(fields)
    if not torch.cuda.is_available():
        return tuple(_card_of_smi(i, row) for i, row in enumerate(rows))
    driver = rows[0]["driver_version"] if rows else None
    arches, cards = torch.cuda.get_arch_list(), []
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        capability = (card.major, card.minor)
        free, total = torch.cuda.mem_get_info(i)
        uuid = f"GPU-{card.uuid}"
        cards.append(CardInfo(i, card.name, capability, total, free, driver, wheel_runs(capability, arches), uuid))
    return tuple(cards)


def _card_of_smi(index: int, row: dict[str, str]) -> CardInfo:
    known = find_card(row["name"])
    try:
        major, minor = (int(part) for part in row["compute_cap"].split("."))
    except ValueError:  # an old driver doesn't tell
        major, minor = known.capability if known else (0, 0)
    total, free = (int(mib) << 20 if mib.isdigit() else 0 for mib in (row["memory.total"], row["memory.free"]))
    return CardInfo(index, row["name"], (major, minor), total, free, row["driver_version"], False, row["uuid"] or None)


def query_nvidia_smi(fields: Sequence[str], device: str | None = None) -> list[dict[str, str]]:
    """nvidia-smi's answer for every card; a field it doesn't know is "". Empty without a working nvidia-smi.

    Args:
        fields: as in `nvidia-smi --help-query-gpu`.
        device: the UUID of the only card to ask about.
    """
    command = _smi_command(fields, device)
    if command is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    unknown = [name for name in fields if f'"{name}"' in done.stdout]
    if done.returncode and 0 < len(unknown) < len(fields):
        rows = query_nvidia_smi([name for name in fields if name not in unknown], device)
        return [dict.fromkeys(fields, "") | row for row in rows]
    return [] if done.returncode else _parse_smi(fields, done.stdout)


def _smi_command(fields: Sequence[str], device: str | None) -> list[str] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return command if device is None else [*command, "-i", device]


def _parse_smi(fields: Sequence[str], text: str) -> list[dict[str, str]]:
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def cpu_name() -> str:
    """The processor's name, as the operating system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _usable_cores() -> int:
    import psutil

    try:
        return len(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS
        return psutil.cpu_count() or 1


def _cpu_features() -> tuple[str, ...]:
    found: set[str] = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                found |= set(line.partition(":")[2].split())
                break
    return tuple(name for name in CPU_FEATURES if name in found)


# -- speeds -----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_matmul(dtype: torch.dtype, device: torch.device | str, n: int = 2048, seconds: float = 0.1) -> float:
    """Measured speed of an n×n matmul in TFLOP/s (2n³ operations each), for at most about `seconds` after warm-up.

    Where one such matmul would take longer than that (emulated dtypes), n is halved until it doesn't.
    """
    device = torch.device(device)

    def matmuls(size: int, limit: float) -> tuple[int, float]:
        # A generator of its own: a resumed run measures again, and its random numbers must not depend on that.
        a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < limit:
            a @ a
            synchronize(device)
            count += 1
        return count, time.perf_counter() - start

    small = min(n, 256)
    matmuls(small, 0.0)  # loads libraries and kernels
    once = matmuls(small, 0.0)[1]
    while n > small and once * (n / small) ** 3 > seconds:
        n //= 2
    matmuls(n, 0.0)
    count, used = matmuls(n, seconds)
    return count * 2 * n**3 / used / 1e12


def speeds_key(device: torch.device, product_dtype: torch.dtype) -> str:
    """What measured speeds depend on: the device, torch, and on a CPU its threads and the dtype of its products."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    where = cpu_name() if device.type == "cpu" else device.type
    products = str(product_dtype).removeprefix("torch.")
    return f"{where}, {torch.get_num_threads()} threads, products in {products}, torch {torch.__version__}"


# -- throttling -------------------------------------------------------------------------------------------------------

# Bits of clocks_event_reasons.active. Source: NVML, nvmlClocksEventReasons.
SLOWDOWNS = {
    0x04: "its power limit",
    0x08: "a hardware slowdown (heat or power supply)",
    0x20: "heat",
    0x40: "heat, in hardware",
    0x80: "the power supply, in hardware",
}
HOT = 0x20 | 0x40
# The name drivers of 2023 and later use, and the one before.
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
STATE_FIELDS = ("temperature.gpu", "power.draw", "clocks.sm", "clocks.max.sm")


class ThrottleWatcher:
    """Tells when a card starts to run slower than it could, because of heat or power.

    `poll` never waits: once in `every_seconds` it starts nvidia-smi, and a later call reads the answer. Nothing happens
    on a device without nvidia-smi.
    """

    def __init__(self, device: torch.device | str, every_seconds: float = 60.0, uuid: str | None = None) -> None:
        device = torch.device(device)
        self.every_seconds = every_seconds
        self.active = (device.type == "cuda" or uuid is not None) and shutil.which("nvidia-smi") is not None
        if self.active and uuid is None:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self.uuid = uuid
        self._names = list(REASON_FIELDS)
        self._process: subprocess.Popen[str] | None = None
        self._started = float("-inf")
        self._known = 0

    def poll(self) -> str | None:
        """A sentence when a reason to slow down has come up since the last one, else None."""
        now = time.monotonic()
        if not self.active:
            return None
        if self._process is None:
            if now - self._started >= self.every_seconds:
                self._start(now)
            return None
        if self._process.poll() is None:
            if now - self._started > SMI_SECONDS:
                self.close()
            return None
        text, code = self._process.communicate()[0], self._process.returncode
        self._process = None
        if code and self._names[0] in text and len(self._names) > 1:
            del self._names[0]  # an older driver
            self._start(now)
            return None
        rows = [] if code else _parse_smi(self._fields, text)
        return self._judge(rows[0]) if rows else None

    def close(self) -> None:
        """End an nvidia-smi that is still running."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @property
    def _fields(self) -> list[str]:
        return [self._names[0], *STATE_FIELDS]

    def _start(self, now: float) -> None:
        command = _smi_command(self._fields, self.uuid)
        if command is None:
            return
        self._started = now
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True
            )

    def _judge(self, row: dict[str, str]) -> str | None:
        try:
            active = int(row[self._names[0]], 16)
        except ValueError:  # "[N/A]"
            return None
        reasons = active & sum(SLOWDOWNS)
        new, self._known = reasons & ~self._known, reasons
        if not new:
            return None
        causes = ", ".join(text for bit, text in SLOWDOWNS.items() if reasons & bit)
        remedy = "improve its cooling" if reasons & HOT else "raise it with `nvidia-smi -pl`, or expect this speed"
        return (
            f"the card runs slower than it could, because of {causes}: {row['temperature.gpu']} °C, "
            f"{row['power.draw']} W, {row['clocks.sm']} of {row['clocks.max.sm']} MHz; {remedy}"
        )
