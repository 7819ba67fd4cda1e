"""One table of machines that nobody here has: what set-up installs, what verification says, what a dry run plans.

nvidia-smi's and torch's answers are faked; `test_verify.py` and `test_setup_env.py` run the scripts themselves.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from nanochat.pipeline import card_checks, machine, run, verify

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
OF_CU126 = "torch==2.14.* --index-url https://download.pytorch.org/whl/cu126"
NEWEST = "torch>=2.7,<2.16"
CPU = "torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"

P100 = ("Tesla P100-PCIE-16GB", (6, 0), 16280)
T4 = ("Tesla T4", (7, 5), 15360)
MAXWELL = ("NVIDIA GeForce GTX 980 Ti", (5, 2), 6144)
V100 = ("Tesla V100-SXM2-16GB", (7, 0), 16160)
RTX_3060 = ("NVIDIA GeForce RTX 3060", (8, 6), 12288)
H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 81559)
GRACE = ("NVIDIA GH200 480GB", (9, 0), 97871)
AMD = ("AMD Instinct MI210", (9, 0), 65520)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What its driver and its torch answer, and what must come of it."""

    torch: str
    """The first build that set-up tries."""
    says: tuple[str, str, str]
    """A line of the verification before torch is there: status, name, a piece of the text or of the remedy."""
    wheel: tuple[str, str]
    """Of the verification with torch: status, and a piece of the text or of the remedy."""
    plans: str
    """A piece of what a dry run says first."""
    cards: tuple = ()
    driver: str = "580.95.05"
    seen: tuple | None = None
    """The cards that torch sees; default: all."""
    arches: tuple = CU126
    cuda: str | None = "12.6"
    hip: str | None = None
    mps: bool = False
    system: tuple[str, str] = ("linux", "x86_64")
    file: str = ""
    """KFD or TEGRA: what shows an AMD card or a Jetson exists."""


WITHOUT = {"cuda": None, "arches": ()}
MACHINES = {
    "Maxwell": Machine(
        cards=(MAXWELL,),
        torch="torch==2.7.1",
        says=("warn", "vram", "6144 MiB"),
        wheel=("ok", "has kernels for NVIDIA GeForce GTX 980 Ti"),
        plans="planned for 8 hours on NVIDIA GeForce GTX 980 Ti",
    ),
    "P100": Machine(
        cards=(P100,),
        torch=OF_CU126,
        says=("ok", "card", "Tesla P100-PCIE-16GB, capability 6.0"),
        wheel=("ok", "has kernels for Tesla P100"),
        plans="profile p100: depth 12",
    ),
    "two T4": Machine(
        cards=(T4, T4),
        torch=NEWEST,
        says=("ok", "cards", "the run takes 2 × Tesla T4, one process each"),
        wheel=("ok", "has kernels for Tesla T4"),
        plans="cards: 2 × Tesla T4",
    ),
    "T4 and P100": Machine(
        cards=(P100, T4),
        torch=OF_CU126,  # one torch for both
        says=("warn", "cards", "the run takes 1 × Tesla T4; idle: Tesla P100"),
        wheel=("ok", "has kernels"),
        plans="cards: 1 × Tesla T4; idle: Tesla P100",
    ),
    "V100": Machine(
        cards=(V100,),
        torch=OF_CU126,
        says=("ok", "card", "capability 7.0"),
        wheel=("ok", "has kernels for Tesla V100"),
        plans="on Tesla V100-SXM2-16GB",
    ),
    "3060": Machine(
        cards=(RTX_3060,),
        driver="590.44.01",
        arches=CU128,
        torch=NEWEST,
        says=("ok", "driver", "590.44.01"),
        wheel=("ok", "has kernels for NVIDIA GeForce RTX 3060"),
        plans="on NVIDIA GeForce RTX 3060",
    ),
    "H100": Machine(
        cards=(H100,),
        arches=CU128,
        torch=NEWEST,
        says=("ok", "card", "capability 9.0, 81559 MiB"),
        wheel=("ok", "has kernels for NVIDIA H100"),
        plans="on NVIDIA H100 80GB HBM3",
    ),
    "P100 with driver 590": Machine(
        cards=(P100,),
        driver="590.44.01",
        seen=(),
        torch=OF_CU126,
        says=("fail", "driver", "580 is the last branch"),
        wheel=("fail", "sees none of the driver's 1 cards"),
        plans="Tesla P100-PCIE-16GB not used: torch",
    ),
    "torch without sm_60": Machine(
        cards=(P100,),
        arches=CU128,
        cuda="12.8",
        torch=OF_CU126,
        says=("ok", "card", "capability 6.0"),
        wheel=("fail", "torch==2.14.*' --index-url https://download.pytorch.org/whl/cu126"),
        plans="profile p100: depth 12",
    ),
    "ROCm, before its torch is there": Machine(
        **WITHOUT,
        file="KFD",
        torch=CPU,
        says=("warn", "cards", "rocm6.4' bash setup_env.sh; else the CPU is used"),
        wheel=("ok", "for the CPU"),
        plans="profile demo",
    ),
    "ROCm": Machine(
        cuda=None,
        hip="6.4",
        arches=("gfx90a", "gfx942"),
        seen=(AMD,),
        file="KFD",
        torch=CPU,
        says=("warn", "cards", "an AMD card is here"),
        wheel=("ok", "has kernels for AMD Instinct MI210"),
        plans="profile p100: ",
    ),
    "MPS": Machine(
        **WITHOUT,
        mps=True,
        system=("darwin", "arm64"),
        torch="torch==2.13.0",
        says=("ok", "cards", "MPS, float32"),
        wheel=("ok", "for Apple GPUs (MPS)"),
        plans="profile demo",
    ),
    "an older Mac": Machine(
        **WITHOUT,
        system=("darwin", "x86_64"),
        torch="torch==2.13.0",
        says=("", "", ""),
        wheel=("ok", "for the CPU"),
        plans="profile demo",
    ),
    "aarch64, a Jetson": Machine(
        **WITHOUT,
        system=("linux", "aarch64"),
        file="TEGRA",
        torch=CPU,
        says=("warn", "cards", "NANOCHAT_TORCH=/path/or/address.whl bash setup_env.sh"),
        wheel=("ok", "for the CPU"),
        plans="profile demo",
    ),
    "aarch64, a Jetson with NVIDIA's torch": Machine(
        seen=(("Orin", (8, 7), 62841),),
        arches=("sm_87",),
        system=("linux", "aarch64"),
        file="TEGRA",
        torch=CPU,
        says=("warn", "cards", "a Jetson is here"),
        wheel=("ok", "has kernels for Orin"),
        plans="profile p100: ",
    ),
    "aarch64, Grace Hopper": Machine(
        cards=(GRACE,),
        arches=CU128,
        system=("linux", "aarch64"),
        torch=NEWEST,
        says=("ok", "card", "NVIDIA GH200 480GB, capability 9.0"),
        wheel=("ok", "has kernels for NVIDIA GH200 480GB"),
        plans="profile p100: ",
    ),
    "aarch64 without a card": Machine(
        **WITHOUT,
        system=("linux", "aarch64"),
        torch=CPU,
        says=("", "", ""),
        wheel=("ok", "for the CPU"),
        plans="profile demo",
    ),
}


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Make this process a machine of the table."""
    for name in ("PROFILE", "DATA_DIR", "DATASET", "DEPTH", "NPROC", "HOURS", "CHAT_DATA", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))

    def be(here: Machine) -> list[str]:
        """The lines that set-up and verification make of nvidia-smi's answer."""
        seen = here.cards if here.seen is None else here.seen
        monkeypatch.setattr(sys, "platform", here.system[0])
        monkeypatch.setattr(platform, "machine", lambda: here.system[1])
        for variable in ("KFD", "TEGRA"):
            monkeypatch.setenv(variable, str(tmp_path if variable == here.file else tmp_path / "nothing"))
        monkeypatch.setattr(torch.version, "cuda", here.cuda)
        monkeypatch.setattr(torch.version, "hip", here.hip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: here.mps)
        for name, answer in {
            "is_available": lambda: bool(seen),
            "device_count": lambda: len(seen),
            "get_arch_list": lambda: list(here.arches),
            "get_device_name": lambda i=0: seen[i][0],
            "get_device_capability": lambda i=0: seen[i][1],
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        probed = SimpleNamespace(returncode=0, stdout=json.dumps(seen), stderr="")
        monkeypatch.setattr(machine, "subprocess", SimpleNamespace(run=lambda *args, **kwargs: probed))
        smi = [{"name": name} for name, _, _ in here.cards]
        for module in (machine, verify):
            monkeypatch.setattr(module, "query_nvidia_smi", lambda fields: smi)
        return [f"{name},{major}.{minor},{mib},{here.driver}" for name, (major, minor), mib in here.cards]

    return be


@pytest.mark.parametrize("name", MACHINES)
def test_set_up_verification_and_dry_run(pretend, capsys, name):
    here = MACHINES[name]
    cards = card_checks.read_cards(pretend(here))

    assert next(card_checks.build_lines(cards)).split("\t")[0] == here.torch

    lines = list(card_checks.check_cards(cards, "install a driver") if cards else card_checks.other_gpus())
    status, about, piece = here.says
    found = [line for line in lines if line[:2] == (status, about) and piece in f"{line[2]} → {line[3]}"]
    assert found or (not about and not lines), lines
    assert [line[1] for line in lines if line[0] == "fail"] == [about] * (status == "fail")

    check = verify.check_torch()
    assert check.status == here.wheel[0], check
    assert here.wheel[1] in f"{check.text} → {check.remedy}"

    run.main(run.Config(dry_run=True))
    said = capsys.readouterr().out
    assert here.plans in said.partition("\n    python")[0], said[:600]


def test_a_card_of_rocm_is_asked_for_by_torch(pretend):
    pretend(MACHINES["ROCm"])
    (card,) = machine.list_devices()
    assert (card.name, card.capability) == ("AMD Instinct MI210", (9, 0))
