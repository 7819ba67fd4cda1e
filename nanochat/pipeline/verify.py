"""What only torch can tell about a machine: do its kernels fit the card, does a step train, how fast, how long.

`bash verify_p100_setup.sh` asks this module once the environment is there; it also works alone:

    python -m nanochat.pipeline.verify            lines with ✓, ⚠, ✗ and what to do; exit 1 when a run will not work
    python -m nanochat.pipeline.verify --tsv      lines "status, name, text, remedy", separated by tabs; exit 0
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nanochat.cards import DeviceInfo, find_card, training_speed
from nanochat.common import Compute, check_wheel, reinstall_line, setup_compute
from nanochat.config import Runtime, run_script
from nanochat.data.sources import SHARD_BYTES
from nanochat.env import get_base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.hardware import query_nvidia_smi
from nanochat.optim import MuonAdamW
from nanochat.pipeline.chosen import profile_for
from nanochat.pipeline.machine import list_devices, shards_needed, take_cards, visible_cards
from nanochat.pipeline.profiles import Profile, Settings
from nanochat.plan.memory import meta_model
from nanochat.precision import DTYPE_NAMES
from nanochat.progress import format_seconds
from nanochat.recipe import CLASSIC, PRESETS, parameter_groups

SIGNS = {"ok": "✓", "warn": "⚠", "fail": "✗"}
STEPS, DEPTH, VOCAB, ROWS, T = 8, 2, 512, 4, 128
# A card below this share of the speed that others measured on it is busy, hot, or held back.
SLOW = 0.5
FREE = 0.85
# Float32 weights with at most two moments; four such checkpoints (two, the best, the one being written), three models.
CHECKPOINTS, MODELS = 4, 3
BYTES_PER_PARAMETER = CHECKPOINTS * 12 + MODELS * 4
# Conversations, benchmarks, caches: a guess.
OTHER_BYTES = 3e9


@dataclass(frozen=True)
class Check:
    """One line of the answer."""

    status: str
    """ok, warn or fail."""
    name: str
    text: str
    remedy: str = ""


def cards_of_the_driver() -> int:
    """How many cards the driver shows; 0 where there is none, or CUDA_VISIBLE_DEVICES hides all."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return 0 if hidden else len(query_nvidia_smi(["name"]))


def check_torch() -> Check:
    """Whether this torch sees the cards that the driver sees, and has kernels for them."""
    version = f"torch {torch.__version__}"
    if not torch.cuda.is_available() and (cards := cards_of_the_driver()):
        why = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is a build for CPUs"
        text = f"{version} {why} and sees none of the driver's {cards} cards"
        return Check("fail", "wheel", text, "bash setup_env.sh (if that is done: a driver from 525.60 to 580)")
    if not torch.cuda.is_available():
        return Check("ok", "wheel", f"{version}, for {'Apple GPUs (MPS)' if _has_mps() else 'the CPU'}")
    try:
        check_wheel()
    except RuntimeError as error:
        weakest = min(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
        remedy = f"bash setup_env.sh, or by hand: .venv/bin/{reinstall_line(weakest)}"
        return Check("fail", "wheel", str(error).split(". Install")[0], remedy)
    return Check("ok", "wheel", f"{version} has kernels for {torch.cuda.get_device_name(0)}")


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def train_a_little(compute: Compute) -> list[float]:
    """The losses of a few optimizer steps of a tiny model on one batch, in the precision that a run would have."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.from_depth(DEPTH, VOCAB, T))
    model.init_weights()
    model.to(compute.device).train()
    rates = {name: getattr(CLASSIC, name) for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "weight_decay")}
    optimizer = MuonAdamW(parameter_groups(model, **rates))
    compute.precision.plan_steps(STEPS)
    tokens = torch.randint(VOCAB, (ROWS, T + 1), generator=torch.Generator().manual_seed(0)).to(compute.device)
    losses = []
    for _ in range(STEPS):
        retry = True
        while retry:
            with compute.precision.autocast():
                loss = model(tokens[:, :-1], tokens[:, 1:])
            compute.precision.backward(loss)
            retry = compute.precision.step([optimizer], 1.0, loss).retry
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def check_step(compute: Compute) -> Check:
    """A real training step in a run's own precision: the loss must be finite, and fall."""
    name = compute.precision.name
    try:
        losses = train_a_little(compute)
    except RuntimeError as error:
        text = f"training in {name} on {compute.device} failed: {str(error).splitlines()[0]}"
        return Check("fail", "training", text, "bash setup_env.sh; if it stays, look at the driver (nvidia-smi)")
    text = f"{STEPS} steps in {name} on {compute.device}: loss {losses[0]:.2f} to {losses[-1]:.2f}"
    if not math.isfinite(losses[-1]) or losses[-1] >= losses[0]:
        return Check("fail", "training", f"{text}, which is no learning", "run with --dtype=float32, and report it")
    return Check("ok", "training", text)


def check_free_memory(compute: Compute) -> Check:
    """Whether other programs hold memory of the card."""
    free, total = torch.cuda.mem_get_info(compute.device)
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the card are free"
    if free < FREE * total:
        return Check("warn", "vram", text, "end the programs that nvidia-smi lists, or take a smaller DEPTH")
    return Check("ok", "vram", text)


def check_speed(compute: Compute) -> tuple[float, Check]:
    """(FLOP/s of large matmuls, what to think of it)."""
    cuda = compute.device_type == "cuda"
    dtype = compute.precision.product_dtype
    tflops = compute.matmul_tflops(n=4096 if cuda else 1024, seconds=0.5)
    text = f"{tflops:.3g} TFLOP/s in {DTYPE_NAMES[dtype]} matmuls"
    name = torch.cuda.get_device_name(compute.device) if cuda else ""
    if cuda and find_card(name) and 1e12 * tflops < SLOW * training_speed(name):
        remedy = "see nvidia-smi -q -d PERFORMANCE,TEMPERATURE: is it hot, limited in power, or used by others?"
        return 1e12 * tflops, Check("warn", "speed", f"{text}, less than half of what a {name} can do", remedy)
    return 1e12 * tflops, Check("ok", "speed", text)


def check_plan(profile: Profile, speed: float) -> Check:
    """The hours that a run will take, and how much text it can read in them at the very most."""
    if profile.minutes is not None:
        time = format_seconds(60 * (profile.minutes if profile.hours is None else 60 * profile.hours))
        fewest = ", or what its fewest steps take" if profile.hours is None else ""
        return Check("ok", "plan", f"profile {profile.name}: {profile.about}; about {time}{fewest}")
    if profile.hours is None:
        known = sum(profile.seconds.values())
        time = f"about {format_seconds(known)} (as measured on 2 CPU cores)" if known else "by tokens, not by the clock"
        return Check("ok", "plan", f"profile {profile.name}: {profile.about}; {time}")
    model = meta_model(profile.model_config)
    cost = model.estimate_flops()
    tokens = profile.hours * 3600 * speed * profile.nproc / cost
    preset = PRESETS[profile.recipe]
    ratio, counted = preset.tokens_per_parameter, preset.scaling_params(model)
    long = ratio * counted * cost / speed / profile.nproc / 3600
    hours = [profile.stage_hours(stage) for stage in ("base_train", "mid_train", "chat_sft")]
    text = (
        f"profile {profile.name}: base {hours[0]:.3g} h, mid {hours[1]:.2g} h, SFT {hours[2]:.2g} h, and evaluation. "
        f"At the measured matmul speed d{profile.depth} reads at most {tokens / 1e6:,.0f} million tokens in that time; "
        f"the {ratio * counted / 1e6:,.0f} million of the recipe {profile.recipe} would take at least {long:,.0f} h"
    )
    return Check("ok", "plan", text)


def check_room(profile: Profile, devices: Sequence[DeviceInfo]) -> Check:
    """Whether the base dir's disk holds this run: its shards, its checkpoints while it trains, its three models."""
    config = profile.model_config
    num_params = meta_model(config).num_params()
    public = profile.dataset not in (None, "demo")
    shards = shards_needed(profile, devices) if public else 0
    needed = shards * SHARD_BYTES + num_params * BYTES_PER_PARAMETER + OTHER_BYTES * public
    needed += (CHECKPOINTS + MODELS) * 8 * config.recall  # the text that each of them carries, and its order
    base_dir = get_base_dir()
    there = sum(path.stat().st_size for path in base_dir.rglob("*") if path.is_file())
    free = shutil.disk_usage(base_dir).free
    text = (
        f"{free / 1e9:.0f} GB free in {base_dir}; {shards} shards, checkpoints and models of {num_params / 1e6:,.0f} "
        f"million parameters: {needed / 1e9:.1f} GB, of which {there / 1e9:.1f} GB are there"
    )
    if free < needed - there:
        return Check("fail", "disk", text, "free some space, or set NANOCHAT_BASE_DIR to a folder on another disk")
    return Check("ok", "disk", text)


def checks() -> Iterator[Check]:
    """All of them, in order; what needs a working wheel is left out without one."""
    try:
        settings = Settings.from_env(os.environ)
        devices = list_devices()
        chosen = take_cards(devices, settings.nproc)
        profile = profile_for(settings, [devices[place] for place in chosen])
    except (ValueError, FileNotFoundError) as error:
        yield Check("fail", "settings", str(error), "correct this setting")
        return
    except RuntimeError as error:
        yield Check("fail", "driver", str(error), "look at nvidia-smi; restart the machine if the driver is stuck")
        return
    if len(chosen) < len(devices):  # before CUDA starts here: device 0 is then the card that trains
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_cards(chosen, os.environ)
    wheel = check_torch()
    yield wheel
    if wheel.status == "fail":
        return
    device_type: Literal["cuda", "mps", "cpu"] = "cuda" if devices else "mps" if _has_mps() else "cpu"
    with setup_compute(Runtime(device_type=device_type, compile="off")) as compute:
        if devices:
            yield check_free_memory(compute)
        yield check_step(compute)
        speed, check = check_speed(compute)
        yield check
    yield check_room(profile, [devices[place] for place in chosen])
    yield check_plan(profile, speed)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Ask torch whether a run will work here."""

    tsv: bool = False
    """Print for verify_p100_setup.sh."""


def main(cfg: Config) -> None:
    """Print every check as soon as it is done."""
    failed = False
    for check in checks():
        failed = failed or check.status == "fail"
        if cfg.tsv:
            fields = (check.status, check.name, check.text, check.remedy)
            print("\t".join(" ".join(field.split()) for field in fields), flush=True)
        else:
            remedy = f"\n    → {check.remedy}" if check.remedy else ""
            print(f"{SIGNS[check.status]} {check.name}: {check.text}{remedy}", flush=True)
    if failed and not cfg.tsv:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Config)
