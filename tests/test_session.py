"""A run in a lent machine: what is kept, when it is stopped; the notebook is valid (test_whole_chain.py runs it)."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from nanochat.pipeline import session
from nanochat.pipeline.session import STOPPED, Chat, run_until, sync
from nanochat.signals import EXIT_STOPPED

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SERVER = """
import http.server, json, sys
class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = " | ".join(m["content"] for m in body["messages"])
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())
port = next(int(a.partition("=")[2]) for a in sys.argv if a.startswith("--port="))
http.server.HTTPServer(("127.0.0.1", port), Echo).serve_forever()
"""
STOPPABLE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("training", flush=True)
time.sleep(60)
"""


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_the_kept_folder_becomes_a_copy_and_old_checkpoints_go(tmp_path):
    base, kept = tmp_path / "base", tmp_path / "kept"
    write(base, tokenizer="t", run__step_1__meta="1", run__step_1__model="m")
    assert sync(base, kept) == 3
    assert contents(kept) == contents(base)
    shutil.rmtree(base / "run" / "step_1")
    write(base, run__step_2__model="mm", tokenizer="new words")
    assert sync(base, kept) == 2
    assert contents(kept) == contents(base)
    assert not (kept / "run" / "step_1").exists()
    assert sync(base, kept) == 0


def test_locks_and_unfinished_files_are_not_kept(tmp_path):
    base, kept = tmp_path / "base", tmp_path / "kept"
    write(base, good="1")
    write(base, **{"pipeline__.lock": "", "shard.parquet.part": "half", "a.lock": "", ".hidden__model": "half"})
    sync(base, kept)
    assert contents(kept) == {"good": "1"}


def test_a_cut_while_copying_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    base, kept = tmp_path / "base", tmp_path / "kept"
    write(base, **{"step_1__meta.json": "1", "step_1__model": "old"})
    sync(base, kept)
    shutil.rmtree(base / "step_1")
    write(base, **{"step_2__meta.json": "2", "step_2__model": "new"})

    def cut(source, target):
        Path(target).write_text("half")
        raise OSError("the session is over")

    monkeypatch.setattr(session.shutil, "copy2", cut)
    with pytest.raises(OSError, match="over"):
        sync(base, kept)
    assert (kept / "step_1" / "model").read_text() == "old"
    assert not (kept / "step_2" / "meta.json").exists()  # nobody takes it for whole
    monkeypatch.undo()
    sync(base, kept)
    assert contents(kept) == contents(base)


def test_syncing_a_folder_with_itself_or_with_nothing_does_nothing(tmp_path):
    write(tmp_path, a="1")
    assert sync(tmp_path, tmp_path) == 0
    assert sync(tmp_path / "nothing", tmp_path) == 0
    assert contents(tmp_path) == {"a": "1"}


def test_a_run_is_stopped_in_time_and_what_it_left_is_saved(capsys):
    saved = []
    deadline = time.monotonic() + session.RESERVE_SECONDS + 1.0
    code = run_until([sys.executable, "-c", STOPPABLE], deadline, {}, lambda: saved.append(1))
    assert code == STOPPED == EXIT_STOPPED
    assert saved
    said = capsys.readouterr().out
    assert "training" in said
    assert "nearly over" in said


def test_the_stop_button_saves_too():
    """The second call of save stands for the moment of the KeyboardInterrupt."""
    calls = []

    def save():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_until([sys.executable, "-c", STOPPABLE], float("inf"), {}, save, every_seconds=1.0)
    assert len(calls) == 2


def test_a_finished_run_gives_its_exit_code_and_output(capsys):
    code = run_until(
        [sys.executable, "-c", "import os; print(os.environ['X']); exit(3)"], float("inf"), {"X": "é"}, list
    )
    assert code == 3
    assert capsys.readouterr().out == "é\n"


# --- the notebook ----------------------------------------------------------------------------------------------------


def test_a_question_that_was_interrupted_is_not_asked_again(tmp_path, monkeypatch):
    """The stop button ends the answer: neither the conversation nor the server is hurt."""
    write(tmp_path, scripts__chat_web=SERVER)
    (tmp_path / "scripts" / "chat_web").rename(tmp_path / "scripts" / "chat_web.py")
    (tmp_path / "scripts" / "__init__.py").touch()  # goes before the project's own, wherever that is
    chat = Chat(sys.executable, tmp_path, {}).wait()
    try:
        assert os.getpgid(chat.process.pid) != os.getpgid(0)
        with monkeypatch.context() as stopped:
            stopped.setattr(session.urllib.request, "urlopen", interrupt)
            with pytest.raises(KeyboardInterrupt):
                chat.say("first")
        assert chat.say("second") == "second"
        assert chat.say("third") == "second | second | third"
    finally:
        chat.close()


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_hold_no_output(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            compile(cell.source, path.name, "exec")
