"""The shell side: syntax, which torch is chosen for which card, what the scripts hand on, and the README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted(ROOT.glob("*.sh")), ROOT / ".ci" / "run"]
CU126 = "torch==2.14.* --index-url https://download.pytorch.org/whl/cu126"
NEWEST = "torch>=2.7,<2.16"
MAXWELL = "torch==2.7.1"
CPU = "torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
SETTINGS = [
    *("PROFILE", "DEPTH", "VOCAB_SIZE", "HOURS", "RECIPE", "DATASET", "DATA_DIR", "CHAT_DATA", "NPROC", "WANDB_RUN"),
    "WORLD",
    "NANOCHAT_BASE_DIR",
]
BASH = shutil.which("bash") or "bash"


def bash(
    *arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script with bash; `env` is added to this process's."""
    return subprocess.run(
        [BASH, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_nvidia_smi(folder: Path, cards: list[tuple[str, str, str]], knows_capability: bool = True) -> dict[str, str]:
    """Put a nvidia-smi first on PATH that shows cards (name, capability, driver); returns the environment."""
    values = [
        {"name": name, "compute_cap": capability, "driver_version": driver, "memory.total": "16280"}
        for name, capability, driver in cards
    ]
    lines = ["#!/usr/bin/env bash", 'query="${1#--query-gpu=}"']
    if not knows_capability:
        refusal = "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2"
        lines.append(f'if [[ "$query" == *compute_cap* ]]; then {refusal}; fi')
    if not cards:
        lines.append("echo 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9")
    for card in values:
        # Fields in the order in which they are asked for.
        lines.append('line=""; for field in ${query//,/ }; do case $field in')
        lines += [f"{field}) line+=', {value}' ;;" for field, value in card.items()]
        lines.append('esac; done; echo "${line#, }"')
    folder.mkdir(exist_ok=True)
    path = folder / "nvidia-smi"
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert bash("-n", script).stderr == ""
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", *map(str, SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.stdout == ""


# --- setup_env.sh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "first"),
    [
        ([("Tesla P100-PCIE-16GB", "6.0", "580.95.05")], CU126),
        ([("Tesla V100-SXM2-16GB", "7.0", "535.104.05")], CU126),
        ([("Tesla T4", "7.5", "580.65")], NEWEST),
        ([("Tesla T4", "7.5", "550.54.15")], CU126),
        ([("NVIDIA H100 80GB HBM3", "9.0", "590.44")], NEWEST),
        ([("NVIDIA B200", "10.0", "590.44")], NEWEST),
        ([("NVIDIA A100", "8.0", "535.1")], CU126),
        ([("NVIDIA H100", "9.0", "580.1"), ("Tesla P100", "6.0", "580.1")], CU126),
        ([("Tesla M40 24GB", "5.2", "580.1")], MAXWELL),
        ([("NVIDIA GeForce GTX TITAN X", "5.2", "535.1"), ("NVIDIA GeForce GTX 980 Ti", "5.2", "535.1")], MAXWELL),
        ([("Tesla K80", "3.7", "470.1"), ("Tesla K80", "3.7", "470.1")], CPU),
        ([("Tesla K80", "3.7", "470.1"), ("Tesla P100", "6.0", "580.1")], CU126),
        ([], CPU),
    ],
)
def test_torch_is_chosen_by_card_and_driver(tmp_path, cards, first):
    done = bash(ROOT / "setup_env.sh", "--print-torch", env=fake_nvidia_smi(tmp_path, cards))
    assert done.returncode == 0, done.stderr
    candidates = done.stdout.splitlines()
    assert candidates[0] == first
    if cards and first == CU126:
        assert candidates[1] == MAXWELL


def test_an_nvidia_smi_too_old_to_know_capabilities_means_an_old_driver(tmp_path):
    env = fake_nvidia_smi(tmp_path, [("Tesla P100-PCIE-16GB", "6.0", "470.82")], knows_capability=False)
    assert bash(ROOT / "setup_env.sh", "--print-torch", env=env).stdout.splitlines()[0] == CU126


def test_the_choice_of_torch_can_be_overridden(tmp_path):
    env = {"NANOCHAT_TORCH": "torch==2.9.1 --index-url https://example.org/whl"}
    done = bash(ROOT / "setup_env.sh", "--print-torch", cwd=tmp_path, env=env)
    assert done.stdout == env["NANOCHAT_TORCH"] + "\n"


def test_an_unknown_option_is_refused():
    done = bash(ROOT / "setup_env.sh", "--fast")
    assert done.returncode == 1
    assert "--fast" in done.stderr


# --- speedrun --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A copy of the speedrun scripts whose set-up and Python only tell how they were called."""
    folder = tmp_path / "check out"  # with a space, as people have
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("speedrun_p100.sh", "speedrun.sh"):
        shutil.copy(ROOT / name, folder)
    (folder / "setup_env.sh").write_text("echo set up\n")
    python = folder / ".venv" / "bin" / "python"
    told = '"$*" "$PWD" "${PROFILE-}" "${DATA_DIR-}" "${CHAT_DATA-}" "${NANOCHAT_BASE_DIR-}" "${WORLD-}"'
    python.write_text(f"#!/usr/bin/env bash\nprintf '%s\\n' {told}\n")
    python.chmod(0o755)
    return folder


def test_speedrun_sets_up_and_hands_on_absolute_paths(checkout, tmp_path):
    env = {"PROFILE": "", "DATA_DIR": "texts", "CHAT_DATA": "/chats.jsonl", "NANOCHAT_BASE_DIR": "out"}
    env["WORLD"] = "nanochat:400,my world,/other,~/third"
    done = bash(checkout / "speedrun_p100.sh", "--dry_run", cwd=tmp_path, env=env)
    assert done.stdout.splitlines() == [
        "set up",
        "-m nanochat.pipeline --dry_run",
        str(checkout),
        "",
        f"{tmp_path}/texts",
        "/chats.jsonl",
        f"{tmp_path}/out",
        f"nanochat:400,{tmp_path}/my world,/other,~/third",
    ]


def test_the_big_speedrun_is_the_same_with_another_profile(checkout, tmp_path):
    env = {"CHAT_DATA": "demo", "PROFILE": "", "DATA_DIR": ""}
    lines = bash(checkout / "speedrun.sh", cwd=tmp_path, env=env).stdout.splitlines()
    assert lines[1] == "-m nanochat.pipeline"
    assert lines[3] == "d20"
    assert lines[5] == "demo"


def test_a_failed_setup_stops_the_run(checkout):
    (checkout / "setup_env.sh").write_text("exit 1\n")
    done = bash(checkout / "speedrun_p100.sh")
    assert done.returncode == 1
    assert "pipeline" not in done.stdout


def test_help_lists_every_setting_without_a_setup(checkout):
    (checkout / "setup_env.sh").write_text("exit 1\n")
    for script in ("speedrun_p100.sh", "speedrun.sh"):
        text = bash(checkout / script, "-h").stdout
        for name in SETTINGS:
            assert re.search(rf"^  {name} ", text, re.MULTILINE), name


# --- documents -------------------------------------------------------------------------------------------------------

DOCUMENTS = ["README.md", "README_P100.md", "P100_SETUP.md", "CHANGES_FOR_P100.md", "SUMMARY.md"]


def test_the_readme_is_under_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 90  # of 45 lines each
    assert "bash speedrun_p100.sh" in lines
    assert "bash run_tests.sh" in lines


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_modules_that_a_document_names_are_there(name):
    text = (ROOT / name).read_text()
    for module in re.findall(r"python -m (?!torch\.)([a-z_]+(?:\.[a-z_]+)+)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for script in re.findall(r"\b[a-z0-9_]+\.sh\b", text):
        assert (ROOT / script).is_file(), script
    for document in re.findall(r"\]\(([A-Za-z0-9_./]+)\)", text):
        assert (ROOT / document).exists(), document
    for folder in re.findall(r"^\| `([a-z_]+/)`", text, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
