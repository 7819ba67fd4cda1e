"""The start of every script: device, ranks, dtype, seeds. Folders and printing (env) and downloads are re-exported.

`setup_compute` turns a script's `Runtime` flags into a `Compute`: device, ranks and the one `Precision` object with the
autocast context and the loss scaler, so that no script has precision code of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanochat.cards import LAST_OLD_DRIVER, torch_builds
from nanochat.config import Runtime
from nanochat.env import check_disk_space, get_base_dir, get_dist_info, print0, usable_cores  # noqa: F401
from nanochat.hardware import measure_matmul, synchronize, wheel_runs
from nanochat.ops.cpu import watch_cores
from nanochat.ops.fp16_gemm import Mode
from nanochat.precision import DTYPE_NAMES, DTYPES, Precision, candidate_dtypes, dtype_cost
from nanochat.progress import print_banner  # noqa: F401

with contextlib.suppress(ModuleNotFoundError):  # of httpx, say: dev/gpu_check.py needs only torch and numpy
    from nanochat.data.download import download_file_with_lock  # noqa: F401


class DummyWandb:
    """Stands in for a tracker (see nanochat/train/tracking.py) when `--run=dummy`, the default, asks for none."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Ignore the metrics."""

    def finish(self) -> None:
        """Nothing to close."""


def autodetect_device_type() -> str:
    """cuda, else mps, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def autodetect_dtype(device_type: str) -> torch.dtype:
    """The dtype in which this machine computes best: the one rule that every script follows.

    CPU and MPS: float32. CUDA by the weakest card's capability: 8.0 and newer bfloat16, below 7.0 (P100) float16;
    7.x (V100, T4, RTX 20xx) and AMD's cards by measurement. See `nanochat.precision.candidate_dtypes`.
    """
    if device_type != "cuda":
        return candidate_dtypes(device_type)[0]
    weakest = min(range(torch.cuda.device_count()), key=torch.cuda.get_device_capability)
    here = torch.cuda.current_device()
    if torch.cuda.get_device_capability(here) == torch.cuda.get_device_capability(weakest):
        weakest = here  # each rank measures its own card and needs no memory on another
    # AMD's numbers are of another series (gfx906 is 9.0, without fast bfloat16): there too the measurement decides.
    capability = (7, 0) if torch.version.hip else torch.cuda.get_device_capability(weakest)
    candidates = candidate_dtypes("cuda", capability)
    return candidates[0] if len(candidates) == 1 else _fastest_dtype(candidates, f"cuda:{weakest}")


@functools.cache
def _fastest_dtype(candidates: tuple[torch.dtype, ...], device: str) -> torch.dtype:
    """The candidate with the fastest matmuls, measured once per process in about 0.2 s; the last if that fails."""
    try:
        speed = {dtype: measure_matmul(dtype, device) for dtype in candidates}
    except RuntimeError as error:
        names = " against ".join(DTYPE_NAMES[dtype] for dtype in candidates)
        fallback = candidates[-1]
        print0(
            f"warning: could not measure {names} ({error}); taking {DTYPE_NAMES[fallback]}: if this card only emulates "
            f"it, --dtype={DTYPE_NAMES[candidates[0]]} is several times faster"
        )
        return fallback
    print0("measured matmul: " + ", ".join(f"{DTYPE_NAMES[dtype]} {speed[dtype]:.1f}" for dtype in speed) + " TFLOP/s")
    return max(speed, key=lambda dtype: speed[dtype])


def check_wheel(devices: Iterable[int] | None = None) -> None:
    """Refuse a torch wheel without kernels for a card here, with which the first operation would fail obscurely.

    Args:
        devices: the cards that count; default: all that torch sees.

    Raises:
        RuntimeError: names the card and a wheel that runs on it. Source: PyTorch's release compatibility matrix.
    """
    arches = [a for a in torch.cuda.get_arch_list() if a.startswith(("sm_", "compute_"))]
    for i in range(torch.cuda.device_count()) if devices is None else devices:
        major, minor = torch.cuda.get_device_capability(i)
        if not wheel_runs((major, minor), arches):
            raise RuntimeError(
                f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(i)} (capability "
                f"{major}.{minor}; this wheel holds {' '.join(arches)}). Install one that does: "
                f"{reinstall_line((major, minor))}"
            )


def reinstall_line(capability: tuple[int, int]) -> str:
    """The command that installs a torch with kernels for a card. Source: PyTorch's release compatibility matrix."""
    first, *others = (build.requirement.split(" ") for build in torch_builds([capability], [str(LAST_OLD_DRIVER)]))
    line = f"pip install --force-reinstall '{first[0]}' {' '.join(first[1:])}".strip()
    from_pypi = [words[0] for words in others if len(words) == 1]
    if len(first) > 1 and from_pypi:
        line += f"   (or, from PyPI: pip install --force-reinstall {from_pypi[0]})"
    return line


@dataclass
class Compute:
    """The device, ranks and precision of a script. A context manager: leaving it closes the process group."""

    device: torch.device
    ddp: bool
    rank: int
    world_size: int
    precision: Precision
    compile: bool
    """torch.compile works here and is not turned off."""
    measure_compile: bool = False
    """Compile only if that is measured to be faster (`--compile=auto`)."""
    fp16_gemm: Mode = "off"
    """See `nanochat.ops.fp16_gemm.choose_half_gemm`."""

    @property
    def device_type(self) -> str:
        """cuda, cpu or mps."""
        return self.device.type

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matmuls and activations."""
        return self.precision.dtype

    def synchronize(self) -> None:
        """Wait until the device has finished (for timing)."""
        synchronize(self.device)

    def peak_memory_bytes(self) -> int:
        """The most memory held at once: on the card, or on a CPU this process's resident memory."""
        if self.device_type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def matmul_tflops(self, n: int = 1024, seconds: float = 0.1) -> float:
        """Measure the speed of n×n matmuls in TFLOP/s, in the dtype and mode of training."""
        with self.precision.training():
            return measure_matmul(self.precision.product_dtype, self.device, n, seconds)

    def broadcast(self, value: float) -> float:
        """Rank 0's `value` on every rank, so that all ranks decide the same by it."""
        if not self.ddp:
            return value
        tensor = torch.tensor(value, dtype=torch.float64 if self.device_type != "mps" else torch.float32)
        tensor = tensor.to(self.device)
        dist.broadcast(tensor, src=0)
        return float(tensor)

    def any_rank(self, *flags: bool) -> list[bool]:
        """For each flag: True if it is true on at least one rank."""
        if not self.ddp:
            return list(flags)
        tensor = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [bool(x) for x in tensor.tolist()]

    def __enter__(self) -> Compute:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        compute_cleanup(barrier=kind is None)  # a rank that failed must not wait for the others


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on all cards."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Restrict torch to algorithms that give the same bits every time (with the same number of threads and cards)."""
    # Not use_deterministic_algorithms, which says it to the compiler too, and imports that.
    torch.set_deterministic_debug_mode("error" if on else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # NaN there only costs time
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.backends.cudnn.benchmark = False


def compute_init(device_type: str) -> tuple[bool, int, int, int, torch.device]:
    """Start the process group if torchrun started us; returns (ddp, rank, local_rank, world_size, device).

    Raises:
        RuntimeError: the device was asked for but is not there.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device_type=cuda, but {_why_no_cuda()}, or use --device_type=cpu")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise RuntimeError("--device_type=mps, but this machine has no MPS device: use --device_type=cpu")
    ddp, rank, local_rank, world_size = get_dist_info()
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        check_wheel()
        torch.cuda.set_device(device)
    if ddp and not dist.is_initialized():
        # Its functions take the process group of the moment it is imported as a default argument. Imported after the
        # group is made, as torch's optimizers do, they would keep the group's threads alive to the end of the
        # interpreter, where these can abort it.
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return ddp, rank, local_rank, world_size, device


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA: install one with it (P100, V100 and older: "
            f"{reinstall_line((6, 0))}; newer cards: {reinstall_line((8, 0))})"
        )
    return "torch sees no CUDA card: check `nvidia-smi` and run `bash verify_p100_setup.sh`"


def compute_cleanup(barrier: bool = False) -> None:
    """Close the process group if there is one.

    Args:
        barrier: wait for the other ranks first.
    """
    if dist.is_available() and dist.is_initialized():
        if barrier:  # with torch 2.7.1 a rank was seen to hang while closing gloo when another was gone
            dist.barrier()
        dist.destroy_process_group()


def _compile_allowed(wish: str, device: torch.device) -> bool:
    # Triton refuses cards below capability 7.0; on a CPU compiling costs more than a short run gains.
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    if wish == "on" and device.type == "cuda" and not capable:
        raise ValueError("--compile=on needs a card of capability 7.0 or newer (Triton refuses older ones); use auto")
    return wish == "on" or (wish == "auto" and capable)


def _agree_on_dtype(chosen: torch.dtype, device: torch.device) -> torch.dtype:
    """The choice of the rank with the weakest card, on all ranks."""
    # Measurements differ, and so may the machines. The rank number decides between equal cards.
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    proposals: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(proposals, (capability, dist.get_rank(), DTYPE_NAMES[chosen]))
    return DTYPES[min(proposals)[2]]


def _choose_dtype(wish: str, device: torch.device, ddp: bool) -> torch.dtype:
    """The dtype that `wish` (a name of DTYPES, or auto) stands for. Warns about one that is slow or risky here.

    Raises:
        RuntimeError: the device can't compute in it.
    """
    chosen = autodetect_dtype(device.type) if wish == "auto" else DTYPES[wish]
    if ddp:
        chosen = _agree_on_dtype(chosen, device)
    name = DTYPE_NAMES[chosen]
    try:  # now, with the remedy, rather than in the middle of the first step
        a = torch.ones(8, 8, device=device).to(chosen)
        a @ a
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(f"{device.type} can't compute in {name} ({error}): use --dtype=float32") from error
    cost = _dtype_cost_on(device, chosen)
    if wish != "auto" and cost is not None:
        print0(f"warning: dtype {name}: {cost}")
    return chosen


def _dtype_cost_on(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return dtype_cost(device.type, dtype)
    return dtype_cost("cuda", dtype, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


def _limit_threads() -> None:
    """Let the threads of all processes here together be at most the cores, unless the user has chosen their number."""
    # torch counts the cores that it is bound to, but not a container's share of CPU time, nor the other ranks.
    share = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > share:
        torch.set_num_threads(share)


def setup_compute(runtime: Runtime, dtype: str | None = None, previous: str | None = None) -> Compute:
    """Set up device, ranks and precision for these flags, and seed every generator.

    Args:
        runtime: the script's flags. A dtype named there takes precedence over the following two.
        dtype: the dtype of the run that is resumed, so that resuming on another card doesn't change it.
        previous: the dtype of the previous stage, taken if this device computes well in it.
    """
    device_type = autodetect_device_type() if runtime.device_type == "auto" else runtime.device_type
    set_deterministic(runtime.deterministic or device_type == "cpu")  # a CPU run is always reproducible
    _limit_threads()
    if device_type == "cpu":
        watch_cores()
    ddp, rank, _, world_size, device = compute_init(device_type)
    if runtime.device_type == "auto" and device_type == "cpu" and shutil.which("nvidia-smi"):
        print0(f"warning: this machine has NVIDIA's driver, but the run takes the CPU: {_why_no_cuda()}")
    wish = runtime.dtype if runtime.dtype != "auto" else dtype or "auto"
    if wish == "auto" and previous and _dtype_cost_on(device, DTYPES[previous]) is None:
        wish = previous
    precision = Precision(device_type, _choose_dtype(wish, device, ddp))
    seed_everything(runtime.seed)
    compiles = _compile_allowed(runtime.compile, device)
    if compiles:
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())
    measure = compiles and runtime.compile == "auto"
    compute = Compute(device, ddp, rank, world_size, precision, compiles, measure, runtime.fp16_gemm)
    where = torch.cuda.get_device_name(device) if device_type == "cuda" else device_type
    ranks = f", {world_size} processes" if world_size > 1 else ""
    compiling = "if faster" if measure else "on" if compiles else "off"
    print0(f"device {where}{ranks}, dtype {precision.name}, compile {compiling}")
    return compute
