"""setup_env.sh on faked machines: no compiler, no root, no rustup, a slow line. Nothing is downloaded or installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = (
    *("awk", "bash", "cat", "chmod", "cp", "cut", "date", "dirname", "du", "env", "find", "grep", "head", "id", "kill"),
    *("ls", "mkdir", "mktemp", "mv", "ps", "rm", "sed", "sha256sum", "sleep", "sort", "tail", "tr", "uname", "wc"),
)
# A Python whose venvs are itself, and whose pip writes down what it was asked for. What only reads facts is real.
PYTHON = """#!{bash}
case "$*" in
    "-m venv "*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip install "*)
        printf 'pip %s\\n' "$*" >> "{log}"
        [[ -z "${{SLOW:-}}" ]] || sleep "$SLOW"
        while [[ $# -gt 0 ]]; do
            if [[ "$1" == --target ]]; then mkdir -p "$2"; fi
            if [[ "$1" == -e ]] && command -v cargo > /dev/null; then : > "{checkout}/rustbpe/_rustbpe.so"; fi
            shift
        done ;;
    "-c import torch"*) echo 2.14.0+cu126 ;;
    "-m nanochat."*) exec {python} "$@" ;;
    *) cat > /dev/null ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A checkout, and a PATH with nothing but a shell's tools and the fake Python; `run` runs setup_env.sh there."""
    checkout, tools = tmp_path / "checkout", tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    log = tmp_path / "log.txt"
    log.write_text("")
    (checkout / "rustbpe").mkdir(parents=True)
    for name in ("setup_env.sh", "pyproject.toml", "rustbpe/Cargo.toml"):
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "nanochat").symlink_to(ROOT / "nanochat")

    def tool(name, text):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    bash = shutil.which("bash")
    tool("python3.11", PYTHON.format(bash=bash, log=log, checkout=checkout, python=sys.executable))
    for name in ("curl", "apt-get", "sudo"):  # sudo -n asks for a password: it fails
        tool(name, f'#!{bash}\nprintf "%s %s\\n" {name} "$*" >> "{log}"\nexit 1\n')

    def run(**env):
        keep = {"PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp_path / "home"), "PATH": str(tools)}
        done = subprocess.run(
            [bash, checkout / "setup_env.sh"], env={**keep, **env}, capture_output=True, text=True, check=False
        )
        return done, log.read_text()

    run.tool = tool
    run.checkout = checkout
    return run


def test_without_a_compiler_and_without_root_the_set_up_goes_on_with_pypis_rustbpe(machine):
    done, log = machine(NANOCHAT_TORCH="torch==2.13.0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no Rust compiler: PyPI's rustbpe will train the tokenizer" in done.stdout
    assert "several times slower" in done.stdout
    assert "rustbpe==0.1.0" in log
    assert "--no-deps" in log
    assert "apt-get" not in log  # nobody was asked, nothing was installed for the whole system
    assert "done in" in done.stdout


def test_a_second_run_does_nothing_and_a_compiler_that_came_is_used(machine):
    machine(NANOCHAT_TORCH="torch==2.13.0")
    done, before = machine(NANOCHAT_TORCH="torch==2.13.0")
    assert (done.returncode, done.stdout) == (0, "")
    bash = shutil.which("bash")
    for name, answer in (("cargo", ""), ("cc", ""), ("rustc", "rustc 1.90.0")):
        machine.tool(name, f"#!{bash}\necho {answer}\n")
    done, log = machine(NANOCHAT_TORCH="torch==2.13.0")
    assert done.returncode == 0
    assert "no Rust compiler" not in done.stdout
    assert log[len(before) :].count("rustbpe==0.1.0") == 0
    assert not (machine.checkout / ".venv" / "portable").exists()


def test_another_torch_that_came_later_makes_the_setup_run_again(machine):
    machine(NANOCHAT_TORCH="torch==2.13.0")
    packages = machine.checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / "torch-2.15.0.dist-info").mkdir(parents=True)
    done, _ = machine(NANOCHAT_TORCH="torch==2.13.0")
    assert "done in" in done.stdout
    done, _ = machine(NANOCHAT_TORCH="torch==2.13.0")
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may use the package manager")
@pytest.mark.parametrize(("answer", "installs"), [("0", False), ("1", True)])
def test_the_package_manager_is_used_only_with_a_yes(machine, answer, installs):
    done, log = machine(NANOCHAT_TORCH="torch==2.13.0", NANOCHAT_INSTALL_SYSTEM=answer)
    assert done.returncode == 0  # it fails here, and the run goes on
    assert ("apt-get install -y cargo gcc" in log) == installs


def test_a_rustup_that_does_not_answer_is_no_end(machine):
    machine.tool("gcc", f"#!{shutil.which('bash')}\n")
    done, log = machine(NANOCHAT_TORCH="torch==2.13.0")
    assert done.returncode == 0
    assert "https://static.rust-lang.org/rustup/archive/" in log  # a pinned version, not `curl | sh`
    assert "failed after" in done.stdout
    assert "PyPI's rustbpe will train" in done.stdout


def test_the_size_is_said_before_torch_comes_and_a_line_while_it_comes(machine):
    script = machine.checkout / "setup_env.sh"
    script.write_text(script.read_text().replace("REPORT_SECONDS=10", "REPORT_SECONDS=1"))
    done, _ = machine(SLOW="1.5")
    assert done.returncode == 0, done.stdout + done.stderr
    size, first = done.stdout.index("GB to download"), done.stdout.index("setup: installing torch")
    assert size < first
    assert "GB on disk" in done.stdout[:first]
    assert done.stdout[first:].count("MB in .venv") >= 1


@pytest.mark.parametrize(
    ("name", "capability", "held"), [("Tesla P100-PCIE-16GB", "6.0", True), ("Tesla T4", "7.5", False)]
)
def test_an_old_cards_torch_is_held_against_upgrades(machine, name, capability, held):
    answer = f'case "$1" in *compute_cap*) echo "{name}, {capability}, 16280, 580.95" ;; esac'
    machine.tool("nvidia-smi", f"#!{shutil.which('bash')}\n{answer}\n")
    machine.tool("curl", f"#!{shutil.which('bash')}\n")
    done, _ = machine()
    assert done.returncode == 0, done.stdout + done.stderr
    venv = machine.checkout / ".venv"
    assert (venv / "pip.conf").exists() == held
    if held:
        assert (venv / "constraints.txt").read_text() == "torch==2.14.0+cu126\n"
        assert str(venv / "constraints.txt") in (venv / "pip.conf").read_text()
        assert "is held in .venv" in done.stdout


def test_the_locked_packages_are_installed_by_their_hashes(machine):
    _, log = machine(NANOCHAT_TORCH="torch==2.13.0", NANOCHAT_LOCKED="1")
    assert log.index("--require-hashes") < log.index("install --no-input -e")


def test_the_lock_has_every_package_that_a_run_needs_and_no_torch():
    text = (ROOT / "requirements.lock").read_text()
    locked = {name.lower().replace("_", "-") for name in re.findall(r"(?m)^([\w.-]+)==", text)}
    block = re.search(r"(?s)^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert block is not None
    wanted = [re.sub(r"[_.]", "-", name) for name in re.findall(r'"([\w.-]+)', block[1])]
    assert len(wanted) > 20
    missing = {name.lower().replace("_", "-") for name in wanted} - locked - {"torch"}
    assert not missing, "python -m dev.lock"
    assert "torch" not in locked
    for requirement in re.split(r"(?m)^(?=[\w.-]+==)", text)[1:]:
        assert "--hash=sha256:" in requirement


def test_an_amd_card_is_named_and_its_torch_too(machine, tmp_path):
    (tmp_path / "kfd").write_text("")
    done, _ = machine(KFD=str(tmp_path / "kfd"))
    assert done.returncode == 0
    assert "an AMD card is here" in done.stdout
    assert "NANOCHAT_TORCH='torch --index-url" in done.stdout
    assert "AMD" not in machine(KFD=str(tmp_path / "none"))[0].stdout


def test_no_python_that_fits_names_what_to_install(machine):
    machine.tool("python3.11", f"#!{shutil.which('bash')}\nexit 1\n")
    done, _ = machine()
    assert done.returncode == 1
    assert "apt install python3 python3-venv" in done.stderr
