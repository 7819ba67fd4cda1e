"""verify_p100_setup.sh on machines made of fake commands: the verdict, the line that says why, and the remedy."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat import common
from nanochat.cards import DeviceInfo
from nanochat.pipeline import verify
from nanochat.pipeline.chosen import profile_for
from nanochat.pipeline.profiles import DEMO, P100, TINY, Settings

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ["awk", "bash", "cat", "cut", "dirname", "du", "grep", "iconv", "id", "sed", "tail", "timeout", "tr"]
BUS = "01:00.0 3D controller: NVIDIA Corporation GP100GL [Tesla P100 PCIe 16GB] (rev a1)"
BROKEN_DRIVER = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
GIB = 1024 * 1024  # in KiB

TESLA_P100 = ("Tesla P100-PCIE-16GB", 16280, "580.95.05", "6.0")
TESLA_T4 = ("Tesla T4", 15360, "580.65.06", "7.5")
SMALL = ("NVIDIA GeForce GTX 1050 Ti", 4096, "580.95.05", "6.1")


@dataclass
class Machine:
    """What its commands say."""

    cards: tuple = ()
    smi_fails: str = ""
    """What nvidia-smi says when it shows no card; without it and without cards there is no nvidia-smi."""
    bus: str = ""
    python: str = "3.11.7"
    python_lacks: tuple = ()
    """What an import in Python fails with."""
    free_gib: int = 100
    memory_gib: float = 30.0
    blocked: str = "nothing"
    """Addresses with this word don't answer."""
    tools: tuple = ("cargo", "cc")
    venv: str | None = None
    """What .venv's Python prints, if there is one."""
    env: dict = field(default_factory=dict)
    system: str = "ubuntu"

    def commands(self) -> dict[str, str]:
        """Bash code by command."""
        lacks = "|".join(f"*{word}*" for word in self.python_lacks) or "no-such-code"
        version = tuple(map(int, self.python.split(".")[:2]))
        python = f"""case "$*" in
            {lacks}) exit 1 ;;
            --version) echo Python {self.python}; exit ;;
            *nanochat.pipeline.card*|*nanochat.cards*) exec {sys.executable} "$@" ;;
            *config*) exit 1 ;;
            *version_info*) exec {sys.executable} -c "${{2//sys.version_info/{version}}}" ;;
        esac"""
        commands = {
            "python3": python,
            "df": f"echo head; echo /dev/sda1 1 1 {self.free_gib * GIB} 1% /",
            "getconf": f"case $1 in _PHYS_PAGES) echo {int(self.memory_gib * GIB / 4)} ;; *) echo 4096 ;; esac",
            "lspci": f"echo '{self.bus}'",
            "curl": f'case "$*" in *{self.blocked}*) exit 6 ;; esac',
            **dict.fromkeys(self.tools, ":"),
        }
        if self.cards or self.smi_fails:
            lines = ['query="${1#--query-gpu=}"']
            if any(not card[3] for card in self.cards):
                lines.append('case "$query" in *compute_cap*) exit 2 ;; esac')
            if not self.cards:
                lines.append(f'echo "{self.smi_fails}"; exit 9')
            for values in self.cards:
                fields = dict(zip(("name", "memory.total", "driver_version", "compute_cap"), values, strict=True))
                cases = " ".join(f"{key}) line+=$', {value}' ;;" for key, value in fields.items())
                lines.append(
                    f'line=""; for f in ${{query//,/ }}; do case $f in {cases} esac; done; echo "${{line#, }}"'
                )
            commands["nvidia-smi"] = "\n".join(lines)
        return commands

    def verify(self, folder: Path, *flags: str) -> subprocess.CompletedProcess[bytes]:
        """Run a copy of the script with nothing on PATH but these commands."""
        checkout, path = folder / "check out", folder / "bin"
        checkout.mkdir()
        path.mkdir()
        script = (ROOT / "verify_p100_setup.sh").read_text()
        script = script.replace("/sys/fs/cgroup/memory.max", "/no/limit").replace("/etc/os-release", "../bin/system")
        (checkout / "verify_p100_setup.sh").write_text(script)
        (path / "system").write_text(f'NAME="{self.system} 12"\nID={self.system}\n')
        shutil.copy(ROOT / "setup_env.sh", checkout)
        (checkout / "nanochat").symlink_to(ROOT / "nanochat")
        for tool in TOOLS:
            if where := shutil.which(tool):
                (path / tool).symlink_to(where)
        commands = self.commands()
        if self.venv is not None:
            (checkout / ".venv" / "bin").mkdir(parents=True)
            commands["../check out/.venv/bin/python"] = self.venv
        for name, code in commands.items():
            (path / name).write_text(f"#!{shutil.which('bash')}\n{code}\n")
            (path / name).chmod(0o755)
        env = {"PATH": str(path), "HOME": str(folder), "LC_ALL": os.environ.get("LC_ALL", ""), **self.env}
        command = [str(shutil.which("bash")), str(checkout / "verify_p100_setup.sh"), *flags]
        return subprocess.run(command, env=env, capture_output=True, check=False, cwd=checkout)


# machine, plan, then: what it must say (status, name, a piece of the text, a piece of the remedy); no fail: ready.
CASES = {
    "P100": (Machine(cards=(TESLA_P100,)), "p100", ("ok", "driver", "580.95.05", "")),
    "P100 on its bus with driver 590": (
        Machine(smi_fails="No devices were found", bus=BUS),
        "demo",
        ("fail", "driver", "No devices were found", "nvidia-driver-580"),
    ),
    "P100 with driver 590": (
        Machine(cards=(("Tesla P100-PCIE-16GB", 16280, "590.44.01", "6.0"),)),
        "p100",
        ("fail", "driver", "580 is the last branch", "install driver 580"),
    ),
    "T4 with driver 590": (
        Machine(cards=(("Tesla T4", 15360, "590.44.01", "7.5"),)),
        "p100",
        ("ok", "driver", "590.44.01", ""),
    ),
    "driver 470": (
        Machine(cards=(("Tesla P100-PCIE-16GB", 16280, "470.82.01", ""),)),
        "p100",
        ("fail", "driver", "older than 525.60", "install driver 580"),
    ),
    "4 GB card": (Machine(cards=(SMALL,)), "p100", ("warn", "vram", "4096 MiB", "nothing to do")),
    "2 GB card": (
        Machine(cards=(("NVIDIA GeForce GTX 1050", 2048, "580.1", "6.1"),)),
        "p100",
        ("fail", "vram", "2048 MiB", "CUDA_VISIBLE_DEVICES= bash speedrun_p100.sh"),
    ),
    "no disk": (
        Machine(cards=(TESLA_P100,), free_gib=8),
        "p100",
        ("fail", "disk", "8 GB free", "NANOCHAT_BASE_DIR=/big/disk"),
    ),
    "22 GiB of disk": (
        Machine(cards=(TESLA_P100,), free_gib=22),
        "p100",
        ("fail", "disk", "23 GB free", "NANOCHAT_BASE_DIR"),
    ),
    "no network": (
        Machine(cards=(TESLA_P100,), blocked="http"),
        "p100",
        ("fail", "network", "no public text and conversations", "HF_ENDPOINT"),
        ("fail", "packages", "does not answer", "PIP_INDEX_URL"),
    ),
    "no hub": (Machine(cards=(TESLA_P100,), blocked="huggingface"), "p100", ("fail", "network", "", "HF_ENDPOINT")),
    "a mirror of the hub": (
        Machine(cards=(TESLA_P100,), blocked="huggingface", env={"HF_ENDPOINT": "https://mirror.example"}),
        "p100",
        ("ok", "network", "https://mirror.example answers", ""),
    ),
    "own data without a hub": (
        Machine(cards=(TESLA_P100,), blocked="huggingface", env={"DATA_DIR": "/", "CHAT_DATA": "/chats.jsonl"}),
        "p100",
        ("ok", "data", "/", ""),
    ),
    "own text only, without a hub": (
        Machine(cards=(TESLA_P100,), blocked="huggingface", env={"DATA_DIR": "/"}),
        "p100",
        ("fail", "network", "no public conversations", "CHAT_DATA"),
    ),
    "data that is not there": (
        Machine(cards=(TESLA_P100,), env={"DATA_DIR": "/no/such"}),
        "p100",
        ("fail", "data", "DATA_DIR=/no/such", "correct it"),
    ),
    "no GPU": (Machine(), "demo", ("ok", "cards", "the demo will run", "")),
    "no GPU, nothing to download for the demo": (Machine(blocked="huggingface"), "demo", ("ok", "cards", "CPU", "")),
    "no GPU, own data": (Machine(env={"DATA_DIR": "/"}), "cpu", ("ok", "data", "/", "")),
    "a card wanted, none there": (
        Machine(env={"PROFILE": "p100"}),
        "p100",
        ("fail", "plan", "needs a CUDA card", "PROFILE=demo"),
    ),
    "two different cards": (
        Machine(cards=(SMALL, TESLA_P100)),
        "p100",
        ("warn", "cards", "1 × Tesla P100-PCIE-16GB; idle: NVIDIA GeForce GTX 1050 Ti", "CUDA_VISIBLE_DEVICES"),
    ),
    "two equal T4": (Machine(cards=(TESLA_T4, TESLA_T4)), "p100", ("ok", "cards", "the run takes 2 × Tesla T4", "")),
    "one of two is hidden": (
        Machine(cards=(SMALL, TESLA_P100), env={"CUDA_VISIBLE_DEVICES": "1"}),
        "p100",
        ("ok", "card", "Tesla P100-PCIE-16GB, capability 6.0", ""),
    ),
    "V100": (
        Machine(cards=(("Tesla V100-SXM2-16GB", 16160, "535.104.05", "7.0"),)),
        "p100",
        ("ok", "environment", "torch==2.14.* --index-url https://download.pytorch.org/whl/cu126", ""),
    ),
    "Kepler, whose nvidia-smi knows no capabilities": (
        Machine(cards=(("Tesla K80", 11441, "470.82.01", ""),)),
        "demo",
        ("warn", "capability", "Tesla K80 (capability 3.7) is too old for every torch", "not used"),
        ("ok", "cards", "the demo will run, on the CPU", ""),
        ("ok", "environment", "torch==2.13.0+cpu", ""),
    ),
    "two K80": (
        Machine(cards=(("Tesla K80", 11441, "470.82.01", "3.7"),) * 2),
        "demo",
        ("warn", "capability", "Tesla K80 (capability 3.7) is too old for every torch", "not used"),
        ("ok", "cards", "no card that torch can use", ""),
        ("ok", "environment", "torch==2.13.0+cpu", ""),
    ),
    "a K80 beside a T4": (
        Machine(cards=(("Tesla K80", 11441, "470.82.01", "3.7"), TESLA_T4)),
        "p100",
        ("warn", "cards", "1 × Tesla T4; idle: Tesla K80", "CUDA_VISIBLE_DEVICES"),
    ),
    "a profile for cards with nothing but a K80": (
        Machine(cards=(("Tesla K80", 11441, "470.82.01", "3.7"),), env={"PROFILE": "p100"}),
        "p100",
        ("fail", "plan", "needs a CUDA card", "PROFILE=demo"),
    ),
    **{
        f"Maxwell: {name}": (
            Machine(cards=((name, mib, "580.95.05", "5.2"),)),
            "p100",
            ("ok", "card", f"{name}, capability 5.2", ""),
            ("ok", "environment", "torch==2.7.1", ""),
        )
        for name, mib in (("Tesla M40 24GB", 22945), ("NVIDIA GeForce GTX TITAN X", 12212), ("GTX 980 Ti", 6144))
    },
    "pytorch.org unreachable, CPU": (
        Machine(blocked="pytorch.org"),
        "demo",
        ("warn", "packages", "PyPI's build comes, with CUDA: 2.9 GB to download, 5.5 GB on disk", "NANOCHAT_TORCH"),
        ("ok", "disk", "the environment: 6 GB", ""),
    ),
    "a CPU": (Machine(), "demo", ("ok", "environment", "0.5 GB (1.8 GB on disk)", ""), ("ok", "disk", "nt: 2 GB", "")),
    "the CUDA build does not fit": (
        Machine(blocked="pytorch.org", free_gib=5),
        "demo",
        ("fail", "disk", "the environment: 6 GB", "free some space"),
    ),
    "driver 470 on Debian": (
        Machine(cards=(("Tesla P100-PCIE-16GB", 16280, "470.82.01", ""),), system="debian"),
        "p100",
        ("fail", "driver", "older than 525.60", "Debian: apt install nvidia-driver,"),
    ),
    "Python 3.14": (Machine(python="3.14.0"), "demo", ("ok", "python", "Python 3.14.0", "")),
    "Kepler hidden": (
        Machine(cards=(("Tesla K80", 11441, "470.82.01", ""),), env={"CUDA_VISIBLE_DEVICES": ""}),
        "demo",
        ("ok", "cards", "the demo will run", ""),
    ),
    "no venv module": (
        Machine(cards=(TESLA_P100,), python_lacks=("version_info",)),
        "p100",
        ("fail", "python", "with its venv module (here: Python 3.11.7)", "python3-venv"),
    ),
    "venv without pip": (
        Machine(python_lacks=("ensurepip", "pip")),
        "demo",
        ("fail", "installer", "no ensurepip", "apt install python3-venv"),
    ),
    "venv without pip, but uv": (
        Machine(python_lacks=("ensurepip", "pip"), tools=("uv", "cargo", "cc")),
        "demo",
        ("ok", "installer", "uv", ""),
    ),
    "Python 3.8": (
        Machine(python="3.8.10"),
        "demo",
        ("fail", "python", "here: Python 3.8.10", "apt install python3 "),
    ),
    "a driver that does not answer": (
        Machine(smi_fails=BROKEN_DRIVER, bus=BUS),
        "demo",
        ("fail", "driver", "couldn't communicate with the NVIDIA driver", "CUDA_VISIBLE_DEVICES= bash speedrun"),
    ),
    "nvidia-smi of an image on a machine without a card": (
        Machine(smi_fails=BROKEN_DRIVER),
        "demo",
        ("warn", "cards", "shows no card", "driver 580"),
    ),
    "a card without a driver": (Machine(bus=BUS), "demo", ("warn", "driver", "Tesla P100", "docker run --gpus all")),
    "RAM of 8 GB": (
        Machine(cards=(TESLA_P100,), memory_gib=7.7),
        "p100",
        ("fail", "memory", "7 GiB; this run needs 16 GB", "PROFILE=demo"),
    ),
    "RAM of 12.7 GB": (Machine(cards=(TESLA_T4,), memory_gib=12.7), "p100", ("warn", "memory", "12 GiB", "NPROC=1")),
    "RAM of 16 GB": (Machine(cards=(TESLA_T4,), memory_gib=15.4), "p100", ("ok", "memory", "15 GiB", "")),
    "no Rust": (Machine(tools=("cc",)), "demo", ("warn", "rust", "no cargo", "setup_env.sh installs it")),
    "no Rust, and none to be had": (
        Machine(tools=("cc",), blocked="rust-lang"),
        "demo",
        ("warn", "rust", "PyPI's rustbpe trains the tokenizer", "NANOCHAT_INSTALL_SYSTEM=1"),
    ),
    "no linker": (Machine(tools=("cargo",)), "demo", ("warn", "rust", "no linker", "apt install gcc")),
    "a broken environment": (
        Machine(venv="echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1"),
        "demo",
        ("fail", "environment", "No module named 'torch'", "bash setup_env.sh"),
    ),
    "a working environment": (
        Machine(cards=(TESLA_P100,), venv="printf 'noise\\nok\\ttraining\\t8 steps\\t\\nok\\tplan\\t8 h\\t\\n'"),
        "p100",
        ("ok", "training", "8 steps", ""),
        ("ok", "plan", "8 h", ""),
    ),
    "odd characters in a name": (
        Machine(cards=(('Te"sla\\\\ \\x01P100 é \\xff', 16280, "580.95.05", "6.0"),)),
        "p100",
        ("ok", "card", 'Te"sla\\', ""),
    ),
}


def judge(answer: dict, returncode: int, plan: str, lines: tuple) -> None:
    """The verdict, the exit code and every line belong together."""
    checks = answer["checks"]
    failed = [check for check in checks if check["status"] == "fail"]
    expected = [line for line in lines if line[0] == "fail"]
    assert {check["name"] for check in failed} == {line[1] for line in expected}, failed
    assert answer["ready"] == (not expected)
    assert answer["problems"] == len(failed)
    assert returncode == (1 if expected else 0)
    assert answer["plan"] == plan
    for check in checks:
        assert check["remedy"] or check["status"] == "ok", check
    for status, name, text, remedy in lines:
        found = [c for c in checks if c["status"] == status and c["name"] == name and text in c["text"]]
        assert found, (status, name, text, checks)
        assert remedy in found[0]["remedy"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_verdict_and_the_remedy(tmp_path, case):
    machine, plan, *lines = CASES[case]
    done = machine.verify(tmp_path, "--json")
    assert done.stderr == b""
    judge(json.loads(done.stdout.decode()), done.returncode, plan, tuple(lines))


def test_for_people_every_problem_has_a_sign_and_its_remedy_below(tmp_path):
    done = Machine(cards=(SMALL,), blocked="huggingface", free_gib=8).verify(tmp_path)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1
    assert lines[-1].startswith("2 problem(s)")
    marked = [i for i, line in enumerate(lines) if line[0] in "✗⚠"]
    assert len(marked) == 3
    assert all(lines[i + 1].startswith("    → ") for i in marked)


def test_an_unknown_option_is_refused(tmp_path):
    done = Machine().verify(tmp_path, "--jsno")
    assert done.returncode == 2
    assert b"--jsno" in done.stderr


def test_asking_changes_nothing(tmp_path):
    Machine(cards=(TESLA_P100,)).verify(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if "bin/" not in str(p)}
    assert left == {
        "bin",
        "check out",
        *(f"check out/{n}" for n in ("nanochat", "setup_env.sh", "verify_p100_setup.sh")),
    }


# --- what torch says -------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Make torch believe in cards of one capability and in a wheel with these kernels."""

    def pretend(name: str, capability: tuple[int, int], arches: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arches)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)

    return pretend


CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


def test_a_cu128_wheel_on_a_p100_is_told_before_anything_runs(tmp_path, card):
    card("Tesla P100-PCIE-16GB", (6, 0), CU128)
    [check] = verify.checks()  # nothing else is tried
    assert (check.status, check.name) == ("fail", "wheel")
    assert "no kernels for Tesla P100-PCIE-16GB (capability 6.0" in check.text
    line = "\t".join([check.status, check.name, check.text, check.remedy])
    done = Machine(cards=(TESLA_P100,), venv=f"printf '%s\\n' {shlex.quote(line)}").verify(tmp_path, "--json")
    wanted = ("fail", "wheel", "has no kernels", "torch==2.14.*' --index-url https://download.pytorch.org/whl/cu126")
    judge(json.loads(done.stdout), done.returncode, "p100", (wanted,))


@pytest.mark.parametrize(
    ("name", "capability", "arches"),
    [
        ("Tesla P100", (6, 0), CU126),
        ("GeForce GTX 1080", (6, 1), CU126),
        ("V100", (7, 0), CU128),
        ("T4", (7, 5), CU128),
    ],
)
def test_a_wheel_with_kernels_is_good(card, name, capability, arches):
    card(name, capability, arches)
    assert verify.check_torch().status == "ok"


def test_a_wheel_for_cpus_beside_a_card_is_no_good(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-1)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = verify.check_torch()
    assert (check.status, check.name) == ("fail", "wheel")
    assert "none of the driver's 1 cards" in check.text
    assert "setup_env.sh" in check.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert verify.check_torch().status == "ok"


def test_on_this_machine_a_step_trains_and_the_demo_is_planned(monkeypatch, capsys):
    for name in ("PROFILE", "DATA_DIR", "DATASET", "DEPTH", "NPROC", "HOURS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(common, "measure_matmul", lambda *_, **__: 0.1)
    monkeypatch.setattr(verify, "list_devices", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    verify.main(verify.Config(tsv=True))
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert [row[1] for row in rows] == ["wheel", "training", "speed", "disk", "plan"]
    assert {row[0] for row in rows} <= {"ok", "warn"}
    assert rows[-1][2].startswith("profile demo")


def test_a_step_that_fails_or_learns_nothing_is_no_good(monkeypatch):
    with verify.setup_compute(verify.Runtime(device_type="cpu")) as compute:
        for losses in ([5.0, 6.0], [5.0, float("nan")]):
            monkeypatch.setattr(verify, "train_a_little", lambda _, losses=losses: losses)
            assert verify.check_step(compute).status == "fail"

        def stop(_):
            raise RuntimeError("CUDA error: no kernel image is available")

        monkeypatch.setattr(verify, "train_a_little", stop)
        check = verify.check_step(compute)
    assert "no kernel image" in check.text
    assert "setup_env.sh" in check.remedy


def test_the_plan_is_what_physics_allows():
    """Eight hours of d12 at 8 TFLOP/s: 2.3e17 FLOPs; the recipe's whole horizon takes days, and the line says so."""
    text = verify.check_plan(P100, 8e12).text
    assert "base 8 h, mid 0.5 h, SFT 0.33 h" in text
    tokens = 1e6 * int(text.split("at most ")[1].split(" million")[0].replace(",", ""))
    assert 150e6 < tokens < 300e6
    assert 50 < float(text.split("at least ")[1].split(" h")[0]) < 70  # 1.62e9 tokens × 1.04e9 FLOPs / 8e12
    assert "as measured" in verify.check_plan(TINY, 1e11).text
    assert "about 5m00s, or what its fewest steps take" in verify.check_plan(DEMO, 1e11).text
    assert verify.check_plan(replace(DEMO, hours=0.5), 1e11).text.endswith("about 30m00s")


def test_the_disk_must_hold_what_the_plan_makes(monkeypatch):
    cards = {"p100": DeviceInfo("Tesla P100-PCIE-16GB", (6, 0), 16280), "h100": DeviceInfo("H100", (9, 0), 81559)}
    text = {name: verify.check_room(profile_for(Settings(), [card]), [card]).text for name, card in cards.items()}
    needed = {name: float(text[name].split("parameters: ")[1].split(" GB")[0]) for name in cards}
    assert 30 < needed["p100"] < 34  # the script asks for 34 GB before the set-up
    assert needed["h100"] > 1.5 * needed["p100"]
    monkeypatch.setattr(verify.shutil, "disk_usage", lambda _: SimpleNamespace(free=5e9))
    check = verify.check_room(P100, [cards["p100"]])
    assert check.status == "fail"
    assert "NANOCHAT_BASE_DIR" in check.remedy
