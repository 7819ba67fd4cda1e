"""Write requirements.lock: all packages of pyproject.toml but torch, with hashes, for every supported Python.

    python -m pip install uv
    python -m dev.lock

torch is left out, because setup_env.sh chooses its build by the card. `pip-audit -r requirements.lock --disable-pip`
looks for known vulnerabilities; .github/workflows/ci.yml runs it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanochat.config import run_script
from nanochat.files import write_text

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEAD = """\
# Every package but torch (setup_env.sh chooses that by the card), with hashes, for Python 3.10 to 3.14:
# python -m dev.lock writes this file; NANOCHAT_LOCKED=1 bash setup_env.sh installs exactly these.
"""


@dataclass(frozen=True)
class Config:
    """This tool has no settings."""


def requirements() -> list[str]:
    """The packages that a run needs, without torch."""
    if sys.version_info < (3, 11):
        raise RuntimeError("dev.lock reads pyproject.toml by tomllib: run it with Python 3.11 or newer")
    import tomllib  # lazy: Python 3.10 has none

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [line for line in project["dependencies"] if not line.startswith("torch")]


def main(cfg: Config) -> None:
    """Resolve and write."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise RuntimeError("uv resolves for all versions of Python at once: python -m pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.in"
        wanted.write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        flags = ["--universal", "--python-version", "3.10", "--generate-hashes", "--no-header", "--no-annotate"]
        done = subprocess.run(
            [uv, "pip", "compile", str(wanted), *flags, "--no-emit-index-url", "--quiet"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"uv could not resolve the packages: {done.stderr.strip().splitlines()[-1]}")
    write_text(LOCK, HEAD + done.stdout)
    print(f"{LOCK.name}: {done.stdout.count('==')} packages")


if __name__ == "__main__":
    run_script(main, Config)
