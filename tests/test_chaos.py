"""The short form of dev/chaos.py: a killed and a stopped pipeline end as an undisturbed one, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(3600)  # dev/chaos.py has limits of its own, on computing
@pytest.mark.parametrize(
    "ends", [["--kills=1", "--terms=1", "--steps=40"], ["--kills=1", "--terms=0", "--steps=20", "--move"]]
)
def test_a_killed_pipeline_ends_with_the_same_weights_and_loss_log(tmp_path, ends):
    """Resumed where it was killed; or with a copy of its folder, as after the end of a notebook's session."""
    flags = ["--tears=0", "--only=base_train", "--pause=0", *ends]
    flags += [f"--folder={tmp_path / 'work'}"]
    command = [sys.executable, str(ROOT / "dev" / "chaos.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same result bit for bit" in done.stdout
    assert ("with a copy of the folder" in done.stdout) == ("--move" in ends)
