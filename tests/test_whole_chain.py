"""The whole chain, tiny: from text to an answer by one command, and the notebook that goes on where that was cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_pipeline import snapshot

from nanochat.pipeline.profiles import TINY, Settings
from nanochat.pipeline.stages import make_stages

ROOT = Path(__file__).resolve().parent.parent
ORDER = [stage.name for stage in make_stages(TINY, Settings(), Path("/base"))]


@dataclass
class TinyRun:
    """What `PROFILE=tiny python -m nanochat.pipeline` said and left."""

    cwd: Path
    base: Path
    done: subprocess.CompletedProcess[str]


def pipeline(cwd: Path, base: Path) -> subprocess.CompletedProcess[str]:
    """The command, from another folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PROFILE": "tiny", "NANOCHAT_BASE_DIR": str(base)}
    command = [sys.executable, "-m", "nanochat.pipeline"]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> TinyRun:
    cwd, base = tmp_path_factory.mktemp("cwd"), tmp_path_factory.mktemp("base")
    return TinyRun(cwd, base, pipeline(cwd, base))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tiny_profile_runs_from_text_to_an_answer(tiny_run):
    first, base_dir = tiny_run.done, tiny_run.base
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for number, name in enumerate(ORDER, 1):
        assert f"[{number}/13] {name}: finished" in first.stdout
    report = (base_dir / "report" / "report.md").read_text()
    assert (tiny_run.cwd / "report.md").read_text() == report
    for section in (
        "Summary",
        "Tokenizer training",
        "Tokenizer evaluation",
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Midtraining",
        "Chat evaluation mid",
        "SFT",
        "Chat evaluation sft",
    ):
        assert f"## {section}\n" in report
    answer = (base_dir / "pipeline" / "answer.log").read_text().splitlines()
    assert len(answer) > 1

    before = snapshot(base_dir)
    second = pipeline(tiny_run.cwd, base_dir)
    assert second.returncode == 0
    assert second.stdout.count("skipped, done before") == 13
    assert snapshot(base_dir) == before


# --- the notebook ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository of this working copy, whose set-up takes the Python that runs the tests."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("nanochat", "scripts", "tasks", "rustbpe"):
        ignore = shutil.ignore_patterns("__pycache__", "target")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("speedrun_p100.sh", "verify_p100_setup.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "setup_env.sh").write_text(
        'cd "$(dirname "$0")" && mkdir -p .venv/bin && touch .venv/nanochat-setup.stamp\n'
        f"printf '#!/bin/sh\\nexec {sys.executable} \"$@\"\\n' > .venv/bin/python && chmod +x .venv/bin/python\n"
    )
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "--force", "."], ["commit", "--quiet", "--message=all"]):
        subprocess.run([*git, *command], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebook_clones_verifies_goes_on_with_an_earlier_session_and_chats(
    tmp_path, repository, tiny_run, monkeypatch
):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, folder in (("JUPYTER_RUNTIME_DIR", "jupyter"), ("IPYTHONDIR", "ipython")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "nanochat_free_gpu.ipynb", as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += f"\nREPOSITORY = {str(repository)!r}\nSETTINGS = {{'PROFILE': 'tiny'}}"
    work = tmp_path / "work"
    work.mkdir()
    shutil.copytree(tiny_run.base, work / "nanochat-run")
    for left in ("pipeline/chat_sft.json", "chatsft_checkpoints", "report/report.md"):  # the session ended before SFT
        path = work / "nanochat-run" / left
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    client = nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(work)}})
    client.execute()
    said = ["".join(o.get("text", "") for o in c.outputs) for c in notebook.cells if c.cell_type == "code"]
    assert "ready: bash speedrun_p100.sh (profile tiny)" in "".join(said)
    assert "] mid_train: skipped, done before" in "".join(said)
    assert "] chat_sft: finished" in "".join(said)
    assert (work / "nanochat-run" / "report" / "report.md").is_file()
    assert said[-1].strip() or notebook.cells[-1].outputs  # an answer, of a model that learned next to nothing
