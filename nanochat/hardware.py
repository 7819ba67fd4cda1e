"""This machine: cards, torch wheel, CPU, memory, disk, measured speeds, and what to do when memory or power runs out.

`inspect_machine` only asks torch, nvidia-smi and the operating system; `measure_matmul` computes. A `ThrottleWatcher`
asks nvidia-smi from time to time during a run whether a card has had to slow down. Speeds of cards that are not here
are in nanochat/cards.py.
"""

from __future__ import annotations

import csv
import gc
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from nanochat.cards import find_card
from nanochat.env import cpu_name, cpuinfo, get_base_dir, usable_cores

T = TypeVar("T")
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve")
SMI_SECONDS = 10.0  # nvidia-smi answers in well under one; a hanging driver must not hang us


def inspect_machine(folder: str | Path | None = None) -> dict[str, Any]:
    """Describe cards, torch wheel, CPU, memory and disk of this machine, ready for JSON. Computes nothing.

    Args:
        folder: whose disk is meant; default: the base dir.
    """
    import psutil  # lazy: dev/gpu_check.py needs only torch and numpy

    memory = psutil.virtual_memory()
    flags = cpuinfo("flags", "Features").split()
    return {
        "cards": _cards(),
        "wheel": {"version": torch.__version__, "cuda": torch.version.cuda, "arches": torch.cuda.get_arch_list()},
        "cpu": {
            "name": cpu_name(),
            "cores": usable_cores(),
            "features": [name for name in CPU_FEATURES if name in flags],
        },
        "ram_total_bytes": memory.total,
        "ram_free_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(folder or get_base_dir()).free,
    }


def _cards() -> list[dict[str, Any]]:
    """The cards that torch sees. If it sees none, those of nvidia-smi, which no run can use then."""
    rows = query_nvidia_smi(("uuid", "name", "compute_cap", "memory.total", "memory.free", "driver_version"))
    keys = ("index", "name", "capability", "total_bytes", "free_bytes", "driver", "usable", "uuid")
    cards: list[tuple[Any, ...]] = []
    if torch.cuda.is_available():
        driver, arches = rows[0]["driver_version"] if rows else None, torch.cuda.get_arch_list()
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            capability = (card.major, card.minor)
            free, total = torch.cuda.mem_get_info(i)  # other programs, a display among them, hold the rest
            usable = wheel_runs(capability, arches)
            cards.append((i, card.name, capability, total, free, driver, usable, f"GPU-{card.uuid}"))
    else:
        for i, row in enumerate(rows):
            known = find_card(row["name"])
            capability = known.capability if known else (0, 0)
            if told := re.fullmatch(r"(\d+)\.(\d+)", row["compute_cap"]):  # an old driver doesn't tell
                capability = (int(told[1]), int(told[2]))
            total, free = (int(row[k]) << 20 if row[k].isdigit() else 0 for k in ("memory.total", "memory.free"))
            cards.append((i, row["name"], capability, total, free, row["driver_version"], False, row["uuid"] or None))
    return [dict(zip(keys, card, strict=True)) for card in cards]


def wheel_runs(capability: tuple[int, int], arches: Sequence[str]) -> bool:
    """True if a wheel with these arches (`torch.cuda.get_arch_list()`) has kernels for a card, or lists no arches."""
    # A cubin (sm_) runs on its own major version and an equal or newer minor one; PTX (compute_) on all newer cards.
    major, minor = capability
    known = [a.split("_") for a in arches if a.startswith(("sm_", "compute_"))]
    numbers = [(kind, int("".join(c for c in number if c.isdigit()))) for kind, number in known]
    return not numbers or any(
        (kind == "sm" and n // 10 == major and n % 10 <= minor) or (kind == "compute" and n <= major * 10 + minor)
        for kind, n in numbers
    )


def query_nvidia_smi(fields: Sequence[str], device: str | None = None) -> list[dict[str, str]]:
    """nvidia-smi's answer for each card; a field it doesn't know is "". Empty without a working nvidia-smi.

    Args:
        fields: as in `nvidia-smi --help-query-gpu`.
        device: the UUID of the only card to ask about.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command += [] if device is None else ["-i", device]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    unknown = [name for name in fields if f'"{name}"' in done.stdout]
    if done.returncode and 0 < len(unknown) < len(fields):  # an older driver: once more without those
        rows = query_nvidia_smi([name for name in fields if name not in unknown], device)
        return [dict.fromkeys(fields, "") | row for row in rows]
    lines = csv.reader([] if done.returncode else done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]


def describe_cards() -> list[str]:
    """The state of each card now, such as "Tesla P100: 61 °C, 8.0 of 16.0 GiB, 171 of 250 W, 98 % busy"."""

    def show(cell: str, divisor: float = 1.0, digits: int = 0) -> str:
        try:
            return f"{float(cell) / divisor:.{digits}f}"
        except ValueError:  # [N/A], [Not Supported], ERR!
            return "?"

    said = []
    fields = ("name", "temperature.gpu", "memory.used", "memory.total", "power.draw", "power.limit", "utilization.gpu")
    for row in query_nvidia_smi(fields):
        name, heat, used, total, power, limit, load = row.values()
        memory = f"{show(used, 1024, 1)} of {show(total, 1024, 1)} GiB"  # nvidia-smi counts in MiB
        said.append(f"{name}: {show(heat)} °C, {memory}, {show(power)} of {show(limit)} W, {show(load)} % busy")
    return said


# --- speeds -----------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work (a CPU always has)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_matmul(dtype: torch.dtype, device: torch.device | str, n: int = 2048, seconds: float = 0.1) -> float:
    """Measure the speed of n×n matmuls in TFLOP/s (2n³ operations each) for about `seconds` after a warm-up.

    If a single matmul would take longer than that (emulated dtypes), n is halved until it doesn't.
    """
    device = torch.device(device)

    def matmuls(size: int, limit: float) -> tuple[int, float]:
        # A generator of its own: a resumed run measures again, and its random numbers must not depend on that.
        a = torch.randn(size, size, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < limit:
            a @ a
            synchronize(device)  # a card is only told what to do: without this its queue would be timed
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
    """Name everything that measured speeds depend on: device, torch, and on a CPU threads and dtype of products."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    where = cpu_name() if device.type == "cpu" else device.type
    products = str(product_dtype).removeprefix("torch.")
    return f"{where}, {torch.get_num_threads()} threads, products in {products}, torch {torch.__version__}"


# --- memory ----------------------------------------------------------------------------------------------------------

# CUDA libraries and the CPU's allocator raise plain RuntimeErrors with these words.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def free_memory(device: torch.device | str) -> int:
    """Bytes that this process can still allocate on `device`.

    A card that drives a display has less than its size. What this process has cached there counts as free. On a CPU it
    is the available memory, or what is left of a container's limit.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return min(free + reserved - used, round(share * total) - used)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min(_available_ram(), _container_ram())


def _available_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil  # lazy: dev/gpu_check.py needs only torch and numpy

    return int(psutil.virtual_memory().available)


def _container_ram() -> int:
    """Bytes left of a container's limit (cgroup v2); without a limit a very large number."""
    try:
        folder = Path("/sys/fs/cgroup")
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        stat = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
        # Cached pages of files count as used, but give way; `docker stats` leaves out the inactive ones too.
        return int(limit) - used + stat.get("inactive_file", 0)
    except (OSError, ValueError):
        return 1 << 62


def is_out_of_memory(error: BaseException) -> bool:
    """True if `error` says that there was too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in OUT_OF_MEMORY)


def release_memory() -> None:
    """Free what nothing refers to any more, on the device too."""
    gc.collect()  # tensors in reference cycles, such as those of a traceback, first
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def with_more_memory(work: Callable[[], T]) -> T:
    """`work()`, called a second time if it runs out of memory; it must not have changed anything by then."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside `except`: in there the error's traceback still holds the tensors of the failed call.
    release_memory()
    return work()


# --- throttling ------------------------------------------------------------------------------------------------------

# Bits of clocks_event_reasons.active. Source: NVML, nvmlClocksEventReasons.
SLOWDOWNS = {
    0x04: "its power limit",
    0x08: "a hardware slowdown (heat or power supply)",
    0x20: "heat",
    0x40: "heat, in hardware",
    0x80: "the power supply, in hardware",
}
HOT = 0x20 | 0x40
# The name since the drivers of 2023, and the one before.
REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
STATE_FIELDS = ("temperature.gpu", "power.draw", "clocks.sm", "clocks.max.sm")


class ThrottleWatcher:
    """Reports when a card begins to run slower than it could, because of heat or power.

    `poll` never waits: every `every_seconds` it starts nvidia-smi in a thread, and a later call reads the answer. It
    does nothing on a device without nvidia-smi.
    """

    def __init__(self, device: torch.device | str, every_seconds: float = 60.0, uuid: str | None = None) -> None:
        device = torch.device(device)
        self.every_seconds = every_seconds
        self.active = (device.type == "cuda" or uuid is not None) and shutil.which("nvidia-smi") is not None
        if self.active and uuid is None:
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self.uuid = uuid
        self._fields: tuple[str, ...] = REASON_FIELDS
        self._query: threading.Thread | None = None
        self._answer: dict[str, str] = {}
        self._started = float("-inf")
        self._known = 0

    def poll(self) -> str | None:
        """A sentence if a new reason to slow down has appeared since the last call, else None."""
        if not self.active:
            return None
        if self._query is None:
            if time.monotonic() - self._started >= self.every_seconds:
                self._started = time.monotonic()
                self._query = threading.Thread(target=self._ask, daemon=True)
                self._query.start()
            return None
        if self._query.is_alive():
            return None
        self._query = None
        return self._judge(self._answer)

    def _ask(self) -> None:
        self._answer = {}
        for field in self._fields:
            for row in query_nvidia_smi((field, *STATE_FIELDS), self.uuid):
                if row[field]:
                    self._fields, self._answer = (field,), {**row, "active": row[field]}
                    return

    def _judge(self, row: dict[str, str]) -> str | None:
        try:
            active = int(row["active"], 16)
        except (KeyError, ValueError):  # no answer, or "[N/A]"
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
