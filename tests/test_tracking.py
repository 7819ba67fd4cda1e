"""Metrics reach the tracker that was asked for, and nothing is imported or written when none was."""

import errno
import sys
import threading
from types import SimpleNamespace

import pytest

from nanochat.common import DummyWandb
from nanochat.train.tracking import TensorBoard, init_tracker

RECORDS = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5, "note": "text is no point"}]


def test_no_run_means_no_tracker(monkeypatch):
    for name in ("wandb", "tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
        assert isinstance(init_tracker(name, "dummy", "nanochat", {}), DummyWandb)


def test_only_rank_0_tracks(monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert isinstance(init_tracker("wandb", "night", "nanochat", {}), DummyWandb)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RuntimeError, match="pip install trackio"):
        init_tracker("trackio", "night", "nanochat", {})


def test_tensorboard_holds_the_points(monkeypatch, tmp_path):
    event_file_loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tracker = init_tracker("tensorboard", "night", "nanochat", {"depth": 4})
    for record in RECORDS:
        tracker.log(record)
    tracker.finish()
    (path,) = (tmp_path / "tensorboard" / "nanochat" / "night").iterdir()
    events = event_file_loader.EventFileLoader(str(path)).Load()
    points = [(e.step, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value if v.tag == "loss"]
    assert points == [(1, "loss", 2.5), (2, "loss", 1.5)]


def test_wandb_gets_the_records(monkeypatch, tmp_path):
    """wandb's offline mode: a run folder appears, nothing leaves the machine."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = init_tracker("wandb", "night", "nanochat", {"depth": 4})
    for record in RECORDS:
        tracker.log(record)
    tracker.finish()
    assert list(tmp_path.rglob("*.wandb"))


def test_trackio_keeps_the_points(monkeypatch, tmp_path):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    import trackio

    got = []
    monkeypatch.setattr(trackio, "init", lambda **settings: got.append(settings))
    monkeypatch.setattr(trackio, "log", lambda numbers, step: got.append((step, numbers)))
    monkeypatch.setattr(trackio, "finish", lambda: got.append("finished"))
    tracker = init_tracker("trackio", "night", "nanochat", {"depth": 4})
    for record in RECORDS:
        tracker.log(record)
    tracker.finish()
    assert got[0] == {"project": "nanochat", "name": "night", "config": {"depth": 4}}
    assert got[1] == (1, {"loss": 2.5})
    assert got[-1] == "finished"


def test_a_full_disk_costs_the_curves_and_not_the_run(tmp_path, capsys):
    """TensorBoard's own thread meets the full disk; its error comes with the next record."""
    tracker = TensorBoard.__new__(TensorBoard)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker._folder, tracker._lost = tmp_path, False
    tracker._writer = SimpleNamespace(add_scalar=full, close=full)
    for step in (1, 2):
        tracker.log({"step": step, "loss": 1.0})
    tracker.finish()
    said = capsys.readouterr().out
    assert said.count("no more curves") == 1
    assert str(tmp_path) in said
    assert "free some space" in said


def test_the_error_of_tensorboards_own_thread_is_no_traceback(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard")
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    TensorBoard(tmp_path, {}).finish()
    full, other = OSError(errno.ENOSPC, "No space left on device"), KeyError("x")
    theirs = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary"})()
    for thread, error in ((theirs, full), (theirs, other), (threading.current_thread(), full)):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, thread)))
    assert [(args.thread, args.exc_value) for args in told] == [(theirs, other), (threading.current_thread(), full)]
