"""What the driver's list of cards says before anything is installed: which of them a run can use, and which torch.

verify_p100_setup.sh and setup_env.sh ask it; the facts are those of `nanochat.cards`. Standard library only.

    … | python -m nanochat.pipeline.card_checks torch     the builds to try: requirement, GB to download, GB on disk
    … | python -m nanochat.pipeline.card_checks verify "apt install nvidia-driver"     lines of the verification

Both read lines "name, capability, MiB, driver" and write fields separated by tabs; an unknown field is "?".

    python -m nanochat.pipeline.card_checks other     a line of the verification about an AMD, Jetson or Apple GPU
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence

from nanochat.cards import (
    LAST_OLD_DRIVER,
    LEAST_DRIVER,
    OLDEST,
    OLDEST_OF_CUDA_13,
    OTHER_PACKAGES,
    PYTORCH_INDEX,
    DeviceInfo,
    choose_cards,
    describe_choice,
    parse_device,
    runs_torch,
    torch_builds,
)

# MiB: less than the first trains at no depth of the profile p100, less than the second is no 16 GB card.
LEAST_MIB, FULL_MIB = 3500, 15000
Line = tuple[str, str, str, str]  # status (ok, warn, fail), name, text, remedy
LEAST = f"{LEAST_DRIVER[0]}.{LEAST_DRIVER[1]}"


def read_cards(lines: Sequence[str]) -> list[tuple[DeviceInfo, str]]:
    """Card and driver of each line "name, capability, MiB, driver"."""
    rows = [line.rsplit(",", 1) for line in lines if line.strip()]
    return [(parse_device(row[0]), row[1].strip()) for row in rows]


def check_driver(card: DeviceInfo, driver: str, install: str) -> Line:
    """Judge the version of the driver: too old for CUDA 12.6, or too new for this card."""
    numbers = [int(part) for part in driver.split(".")[:2] if part.isdigit()]
    old = card.capability is not None and card.capability < OLDEST_OF_CUDA_13
    if not numbers:
        wanted = f"any from {LEAST} to {LAST_OLD_DRIVER} runs every card from Maxwell to Hopper"
        return "warn", "driver", f"nvidia-smi tells no driver version ({driver})", wanted
    if tuple(numbers) < LEAST_DRIVER:
        text = f"{driver} is older than {LEAST}, which CUDA 12.6 needs"
        return "fail", "driver", text, f"{install} (580 is the last branch for P100 and V100) and reboot"
    if numbers[0] > LAST_OLD_DRIVER + 9 and old:
        text = f"{driver} does not drive a {card.name}: {LAST_OLD_DRIVER} is the last branch that does"
        return "fail", "driver", text, f"{install}, then keep it from being upgraded (apt-mark hold), and reboot"
    return "ok", "driver", driver, ""


def check_vram(card: DeviceInfo) -> Iterator[Line]:
    """A line if the card has less memory than the profile p100 is made for."""
    mib = card.memory_mib
    if mib < LEAST_MIB:
        text = f"{card.name} has {mib} MiB, less than training with the p100 profile needs at any depth"
        yield "fail", "vram", text, "use the CPU: CUDA_VISIBLE_DEVICES= bash speedrun_p100.sh"
    elif mib < FULL_MIB:
        depth = 4 if mib < 7000 else 8 if mib < 11000 else 10
        yield (
            "warn",
            "vram",
            f"{card.name} has {mib} MiB, less than 16 GB: the run takes a depth that fits, if it knows the card",
            "nothing to do for a card in nanochat/cards.py; for another: "
            f"DEPTH={depth} VOCAB_SIZE=32768 bash speedrun_p100.sh",
        )


def check_cards(cards: Sequence[tuple[DeviceInfo, str]], install: str) -> Iterator[Line]:
    """Judge every card, its driver and its memory, then say which of several train."""
    for card, driver in cards:
        capability = "unknown" if card.capability is None else "{}.{}".format(*card.capability)
        if not runs_torch(card.capability):
            text = (
                f"{card.name} (capability {capability}) is too old for every torch that this project supports: they "
                f"begin with {OLDEST[0]}.{OLDEST[1]} (Maxwell)"
            )
            yield "warn", "capability", text, "nothing to do: this card is not used"
            continue
        yield "ok", "card", f"{card.name}, capability {capability}, {card.memory_mib} MiB, driver {driver}", ""
        yield check_driver(card, driver, install)
        yield from check_vram(card)
    devices = [card for card, _ in cards]
    taken = choose_cards(devices)
    if not taken:
        yield "ok", "cards", "no card that torch can use: the demo will run, on the CPU", ""
    elif len(taken) < len(devices):
        remedy = "nothing to do; other cards: CUDA_VISIBLE_DEVICES (with CUDA_DEVICE_ORDER=PCI_BUS_ID)"
        text = f"cards of different kinds: the run takes {describe_choice(devices, taken)}"
        yield "warn", "cards", text, remedy
    elif len(devices) > 1:
        yield "ok", "cards", f"the run takes {describe_choice(devices, taken)}, one process each (NPROC)", ""


def build_lines(cards: Sequence[tuple[DeviceInfo, str]]) -> Iterator[str]:
    """The torch builds to try, best first, with the size of the whole environment."""
    for build in torch_builds([card.capability for card, _ in cards], [driver for _, driver in cards]):
        download, disk = build.download_gb + OTHER_PACKAGES.download_gb, build.disk_gb + OTHER_PACKAGES.disk_gb
        yield f"{build.requirement}\t{download:.1f}\t{disk:.1f}"


def other_gpus() -> Iterator[Line]:
    """A line about a GPU of this machine whose driver is not asked by nvidia-smi: AMD's, a Jetson's or Apple's."""
    if os.path.exists(os.environ.get("KFD", "/dev/kfd")):
        text = "an AMD card is here. Its torch is not chosen by itself, and nobody has tried it"
        remedy = f"to try it, name one of ROCm: NANOCHAT_TORCH='torch --index-url {PYTORCH_INDEX}/rocm6.4'"
        yield "warn", "cards", text, f"{remedy} bash setup_env.sh; else the CPU is used"
    elif os.path.exists(os.environ.get("TEGRA", "/etc/nv_tegra_release")):
        text = "a Jetson is here. Only NVIDIA's own torch for its JetPack sees the GPU, and nobody has tried it"
        remedy = "to try it, name its wheel (NVIDIA's page is PyTorch for Jetson): NANOCHAT_TORCH=/path/or/address.whl"
        yield "warn", "cards", text, f"{remedy} bash setup_env.sh; else the CPU is used"
    elif (sys.platform, platform.machine()) == ("darwin", "arm64"):
        yield "ok", "cards", "Apple's GPU: the scripts take it (MPS, float32); nobody has tried it", ""


if __name__ == "__main__":
    if sys.argv[1] == "other":
        print("\n".join("\t".join(line) for line in other_gpus()))
        sys.exit()
    found = read_cards(sys.stdin.readlines())
    if sys.argv[1] == "torch":
        print("\n".join(build_lines(found)))
    else:
        print("\n".join("\t".join(line) for line in check_cards(found, sys.argv[2])))
