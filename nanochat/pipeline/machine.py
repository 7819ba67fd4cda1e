"""The machine of a run: which cards train, what the stages must know of it, and how much text it can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch

from nanochat.cards import DeviceInfo, choose_cards, known_capability, runs_torch, training_speed
from nanochat.data.sources import count_shards
from nanochat.env import usable_cores
from nanochat.hardware import measure_matmul, query_nvidia_smi
from nanochat.ops.cpu import release_workers, watch_cores
from nanochat.pipeline.profiles import Profile
from nanochat.plan.local_speed import LocalMachine
from nanochat.plan.memory import MicroBatch, meta_model
from nanochat.precision import DTYPES, Precision, product_dtype
from nanochat.recipe import PRESETS

# Asked in a process of its own: starting CUDA here would hold memory on every card for the whole run.
_PROBE = """
import json, torch
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[c.name, [c.major, c.minor], c.total_memory >> 20] for c in cards]))
"""


def list_devices() -> list[DeviceInfo]:
    """The cards that torch sees, in its order: CUDA's, or AMD's by a torch of ROCm, which gives them the same names."""
    if not (torch.version.cuda or torch.version.hip) or not torch.cuda.device_count():
        return []
    answer = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        reason = (answer.stderr.strip() or "no reason given").splitlines()[-1]
        raise RuntimeError(f"the cards don't answer: {reason}. See `nvidia-smi` and `bash verify_p100_setup.sh`")
    cards = json.loads(answer.stdout.splitlines()[-1])
    return [DeviceInfo(name, (major, minor), mib) for name, (major, minor), mib in cards]


def unused_cards(devices: Sequence[DeviceInfo]) -> str:
    """Names the cards of the driver that this run cannot use at all, and why; "" if there are none."""
    if choose_cards(devices) or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    names = [row["name"] for row in query_nvidia_smi(["name"])]
    if not names:
        return ""
    cards = f"{len(names)} × {names[0]}" if len(set(names)) == 1 and len(names) > 1 else ", ".join(names)
    known = [known_capability(name) for name in names] + [device.capability for device in devices]
    if not any(runs_torch(capability) for capability in known):
        return f"{cards} not used: too old for every torch that this project supports"
    if not torch.version.cuda:
        return f"{cards} not used: torch {torch.__version__} is a build for CPUs (remedy: bash setup_env.sh)"
    return f"{cards} not used: torch {torch.__version__} sees no card; bash verify_p100_setup.sh says why"


def take_cards(devices: Sequence[DeviceInfo], nproc: int | None) -> list[int]:
    """Places of the cards that train: the fastest group of equal ones, as many as NPROC if that is set.

    More than are equal is the user's wish too: then every card counts, and the slowest sets the pace.
    """
    chosen = choose_cards(devices)
    if nproc is None or nproc <= len(chosen):
        return chosen[:nproc]
    return (chosen + [place for place in range(len(devices)) if place not in chosen])[:nproc]


def visible_cards(chosen: Sequence[int], env: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES for these places among the devices that are visible now."""
    before = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(before[place] if before else str(place) for place in chosen)


def machine_env(profile: Profile, devices: Sequence[DeviceInfo], chosen: Sequence[int]) -> dict[str, str]:
    """What the stages must know of the machine: their cards; and cores, which torchrun would cut to one a process."""
    env = {}
    if profile.nproc > 1 and "OMP_NUM_THREADS" not in os.environ:
        env["OMP_NUM_THREADS"] = str(max(1, usable_cores() // profile.nproc))
    if profile.nproc > 1 and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        # torchrun kills its ranks so long after a signal (default 30 s); they may have to evaluate and save before.
        env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"
    if devices and len(chosen) < len(devices):
        env["CUDA_VISIBLE_DEVICES"] = visible_cards(chosen, os.environ)
    return env


def flops_per_second(profile: Profile, devices: Sequence[DeviceInfo]) -> float:
    """An upper bound of the speed that training reaches with all its processes."""
    if devices:
        return max(training_speed(device.name) for device in devices) * profile.nproc
    dtype = product_dtype("cpu", DTYPES.get(profile.dtype, torch.float32))
    return 1e12 * measure_matmul(dtype, "cpu", n=1024)  # by all cores together


def step_seconds(profile: Profile) -> float:
    """How long a step of base training takes on this CPU now, timed."""
    assert profile.base_batch_size is not None
    micro = MicroBatch(profile.device_batch_size)
    passes = max(1, profile.base_batch_size // (micro.rows * profile.max_seq_len))
    precision = Precision("cpu", DTYPES.get(profile.dtype, torch.float32))
    machine = LocalMachine(torch.device("cpu"), precision, PRESETS[profile.recipe])
    watch_cores()
    speed = machine.tokens_per_second(profile.model_config, micro, passes)
    release_workers()
    return profile.base_batch_size / speed


def tokens_needed(profile: Profile, speed: float) -> float:
    """Tokens that base training will read, at most: by its hours and this speed, its steps, or its recipe's horizon."""
    by_steps = profile.hours is None or profile.minutes is not None
    if by_steps and "base_train" in profile.steps and profile.base_batch_size is not None:
        return profile.steps["base_train"] * profile.base_batch_size
    preset = PRESETS[profile.recipe]
    model = meta_model(profile.model_config)
    if profile.hours is None:
        return preset.tokens_per_parameter * preset.scaling_params(model)
    return profile.hours * 3600 * speed / model.estimate_flops()


def shards_needed(profile: Profile, devices: Sequence[DeviceInfo] = ()) -> int:
    """Shards of a public corpus for the tokens that base training will read."""
    speed = flops_per_second(profile, devices) if profile.hours is not None else 0.0
    return count_shards(tokens_needed(profile, speed))
