"""The monitor: follows the files of a run as they grow, and shows what stands in them."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from web_server import serve

from nanochat.config import run_script
from nanochat.pipeline.profiles import PROFILES, Settings
from nanochat.pipeline.run import only_one
from nanochat.pipeline.stages import make_stages
from nanochat.progress import PROGRESS_FILE, progress
from nanochat.report.metrics_log import MetricsLog
from nanochat.report.monitor import QUIET_SECONDS, MetricsTail, Watcher, machine_facts
from nanochat.report.monitor_terminal import progress_line
from nanochat.report.monitor_web import monitor_app
from nanochat.stages import STAGES
from scripts.monitor import Config, main


def record(step: int, total: int = 100, **more: float) -> dict[str, float]:
    """A step as the trainer logs it."""
    return {
        "step": step,
        "seconds": 2.0 * step,
        "progress": step / total,
        "loss": 5.0,
        "smooth_loss": 5 - step / 50,
    } | more


def mark(base_dir: Path, stage: str, state: str, ago: float = 0.0, **more: object) -> None:
    """A mark of the pipeline, written some seconds ago."""
    path = base_dir / "pipeline" / f"{stage}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"state": state, "flags": ["--model_tag=d4"], **more}))
    at(path, ago)


def at(path: Path, ago: float) -> None:
    """Let the file be some seconds old."""
    os.utime(path, (time.time() - ago,) * 2)


def log_steps(base_dir: Path, folder: str, records: list[dict[str, float]], ago: float = 0.0) -> Path:
    path = base_dir / folder / "d4" / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    at(path, ago)
    return path


@pytest.fixture
def running(base_dir) -> Path:
    """A base dir in which base training is at step 25 of 100."""
    mark(base_dir, "report_reset", "done", 90, seconds=1.0)
    mark(base_dir, "tok_train", "done", 80, seconds=1.0)
    mark(base_dir, "base_train", "started", 60)
    (base_dir / "pipeline" / "base_train.log").write_text("device cpu\nbase: step 20 val_bpb 1.5000\n")
    steps = [record(i, skipped=min(i // 20, 1), scale=2.0**15, tokens_per_second=1234.5) for i in range(1, 26)]
    log_steps(base_dir, "base_checkpoints", [*steps, {"step": 25, "seconds": 50.0, "val_bpb": 1.5}])
    return base_dir


def test_every_stage_of_the_pipeline_is_known_in_its_order(base_dir):
    names = [stage.name for stage in make_stages(PROFILES["demo"], Settings.from_env({}), base_dir)]
    assert [name for name in STAGES if not STAGES[name].optional] == names


def test_a_running_stage(running):
    frame = Watcher(running).look()
    assert (frame.current, frame.progress, frame.eta) == ("base_train", 0.25, "2m30s")
    facts = dict(frame.facts)
    assert (facts["step"], facts["skipped steps"], facts["loss scale"]) == ("25", "1", "32768")
    assert facts["val bpb"] == "1.5000"
    assert [(c.stage, list(c.steps)) for c in frame.curves] == [("base_train", list(range(1, 26)))]
    states = dict(frame.stages)
    assert (states["tok_train"], states["base_train"], states["mid_train"]) == ("done", "now", "waiting")
    assert not {"data", "chat_rl"} & set(states)  # this pipeline has no such stages
    assert frame.log[-1] == "base: step 20 val_bpb 1.5000"
    assert not frame.is_quiet


def test_it_follows_what_is_appended_and_goes_on_to_the_next_stage(running):
    watcher = Watcher(running)
    assert dict(watcher.look().facts)["step"] == "25"
    path = running / "base_checkpoints" / "d4" / "metrics.jsonl"
    whole = json.dumps(record(26)) + "\n"
    with open(path, "a") as f:
        f.write(whole[:20])
        f.flush()
        assert dict(watcher.look().facts)["step"] == "25"  # the line is torn
        f.write(whole[20:])
        f.flush()
        assert dict(watcher.look().facts)["step"] == "26"
    mark(running, "base_train", "done", 3, seconds=200.0)
    at(path, 3)
    mark(running, "base_loss", "started")
    (running / "pipeline" / "base_loss.progress.json").write_text('{"share": 0.4, "eta_seconds": 12.3}')
    frame = watcher.look()
    assert (frame.current, frame.facts, frame.progress, frame.eta) == ("base_loss", (), 0.4, "12s")
    assert [c.summary for c in frame.curves] == ["Base training: loss 4.98 to 4.48 in 26 steps, 52s"]  # it stays


def test_a_bar_keeps_its_file_whole_and_takes_it_away(base_dir, monkeypatch):
    """What is not worth a loss log (evaluations, downloads) is followed by the file of its bar."""
    mark(base_dir, "base_eval", "started")
    path = base_dir / "pipeline" / "base_eval.progress.json"
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    monkeypatch.setattr("nanochat.progress.SECONDS_BETWEEN_FILES", 0.0)
    with progress(8, "evaluating") as bar:
        assert Watcher(base_dir).look().progress is None
        bar.advance(2)
        assert Watcher(base_dir).look().progress == 0.25
        path.write_text("{torn")
        assert Watcher(base_dir).look().progress is None
        bar.advance(4)
        frame = Watcher(base_dir).look()
        assert (frame.progress, frame.eta, frame.current) == (0.75, "0s", "base_eval")
        monkeypatch.setattr("nanochat.progress.SECONDS_BETWEEN_FILES", 60.0)
        bar.advance(1)
        assert Watcher(base_dir).look().progress == 0.75  # not at every count
    assert list(path.parent.iterdir()) == [path.with_name("base_eval.json")]


def test_a_bar_that_cannot_write_goes_on(base_dir, monkeypatch):
    monkeypatch.setenv(PROGRESS_FILE, str(base_dir / "no such folder" / "a.progress.json"))
    with progress(2, "x") as bar:
        bar.advance()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(PROGRESS_FILE, str(base_dir / "b.progress.json"))
    with progress(2, "x") as bar:
        bar.advance()
        assert not list(base_dir.rglob("*.progress.json"))  # only rank 0 says how far it is


def test_figures_of_a_run_before_are_not_shown(running):
    log_steps(running, "mid_checkpoints", [record(99)], ago=1000)
    mark(running, "base_train", "done", 3, seconds=200.0)
    at(running / "base_checkpoints" / "d4" / "metrics.jsonl", 3)
    mark(running, "mid_train", "started")
    frame = Watcher(running).look()
    assert (frame.current, frame.facts) == ("mid_train", ())


def test_a_run_without_the_pipeline(base_dir):
    log_steps(base_dir, "chatrl_checkpoints", [record(50, reward=0.5)])
    frame = Watcher(base_dir).look()
    assert (frame.current, frame.progress, frame.stages) == ("chat_rl", 0.5, [("chat_rl", "now")])


def test_a_stage_that_writes_nothing_is_pointed_out(running, capsys):
    for path in running.rglob("*"):
        if path.is_file():
            at(path, QUIET_SECONDS + 60)
    mark(running, "base_train", "started", QUIET_SECONDS + 60)
    assert Watcher(running).look().is_quiet
    run_script(main, Config, ["--base_dir", str(running), "--once"])
    assert "nothing written for 3m0" in " ".join(capsys.readouterr().out.split())


@settings(deadline=None, max_examples=40)
@given(data=st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.integers(0, 40)), max_size=12))
def test_a_tail_knows_what_is_in_the_file_whatever_was_cut(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log, tail, written = MetricsLog(path), MetricsTail(path), []
    for count, cut, keep in data:
        if cut:
            keep = min(keep, len(written))
            position = written[keep - 1][1] if keep else 0
            log.cut(position, keep)
            del written[keep:]
        for _ in range(count):
            log.append({"step": len(written) + 1, "loss": float(len(written) * 7 % 5), "at": len(written) + count})
            written.append(({"step": len(written) + 1}, log.position))
        tail.poll()
    expected = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    assert tail.poll() == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{torn",
        b"\xff\xfe\n[1]\n{}\n",
        b'{"step": "x"}\n',
        b'{"step": 1, "loss": 2, "smooth_loss": 2, "state": "started", "time": "x", "seconds": [], "folder": 7}\n',
        b'{"step": 1, "loss": 2, "smooth_loss": NaN, "state": "done", "seconds": {"base_train": "x"}, "flags": 3}\n',
    ],
)
def test_broken_files_are_no_reason_to_stop(base_dir, capsys, content):
    names = ("base_train.json", "base_train.log", "plan.json")
    for name in (*(f"pipeline/{name}" for name in names), "base_checkpoints/d4/metrics.jsonl"):
        (base_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / name).write_bytes(content)
    run_script(main, Config, ["--once"])
    assert "nanochat" in capsys.readouterr().out


def test_one_frame_in_the_terminal(running, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PATH", "")
    run_script(main, Config, ["--base_dir", str(running), "--once"])
    text = capsys.readouterr().out
    for fact in ("base_train", "25.0%", "2m30s left", "1,23", "skipped steps 1", "loss scale 32768", "no card", "┤"):
        assert fact in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_nothing_has_run_yet(base_dir, capsys):
    run_script(main, Config, ["--once"])
    assert "nothing has run here yet" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_script(main, Config, ["--base_dir", str(base_dir / "no such"), "--once"])
    assert "name the base dir" in capsys.readouterr().err


def plan(base_dir: Path, folder: str | None = None, **seconds: float | None) -> None:
    """What the pipeline has said that it would do."""
    record = {"folder": folder or str(base_dir), "seconds": seconds}
    (base_dir / "pipeline" / "plan.json").write_text(json.dumps(record))


def test_whether_it_runs_is_said_by_its_lock(running):
    """A killed run must not seem to run, nor a run that writes nothing for long seem to have stopped."""
    for path in running.rglob("*.json*"):
        at(path, 10 * QUIET_SECONDS)
    for folder, name in (("pipeline", ".lock"), ("base_checkpoints", ".d4.lock")):
        lock = FileLock(str(running / folder / name))
        with lock:
            frame = Watcher(running).look()
            assert (frame.running, frame.headline, dict(frame.stages)["base_train"]) == (True, "base_train", "now")
        frame = Watcher(running).look()
        assert (frame.running, frame.eta, dict(frame.stages)["base_train"]) == (False, None, "stopped")
        assert "has ended before it was finished" in frame.headline
    plan(running, folder="/elsewhere/run")
    assert "this is a copy of /elsewhere/run" in Watcher(running).look().headline


def test_a_lock_by_hand_is_seen_and_nothing_is_held_by_looking(running):
    log_steps(running, "chatrl_checkpoints", [record(50, reward=0.5)])
    with FileLock(str(running / "chatrl_checkpoints" / ".d4.lock")):
        assert Watcher(running).look().current == "chat_rl"
    second = only_one(running / "pipeline")
    with only_one(running / "pipeline"), pytest.raises(RuntimeError, match="another pipeline is running"), second:
        pass


def test_the_time_of_all_stages_is_told(running):
    plan(running, tok_train=0.5, base_train=100.0, base_loss=10.0, mid_train=50.0, report=None)
    frame = Watcher(running).look()
    # This machine took twice as long as expected so far; of the running stage its own record knows better.
    assert frame.total_left == "4m30s for 4 stages, 1 of which the time is not known"
    assert [name for name, state in frame.stages if state == "waiting"] == ["base_loss", "mid_train", "report"]
    (running / "base_checkpoints" / "d4" / "metrics.jsonl").unlink()
    frame = Watcher(running).look()
    assert frame.total_left.startswith("4m20s")  # 200 s, of which 60 have passed, and 120
    assert (
        str(progress_line(frame, 80)) == f"all that is left: about {frame.total_left}"
    )  # of this stage nothing is known


def test_a_finished_pipeline(running, capsys, monkeypatch):
    for i, name in enumerate(STAGES):
        mark(running, name, "done", 5 + i * 7 % 4, seconds=1.0)  # a copy's files have the times of its making
    log_steps(running, "mid_checkpoints", [record(i) for i in range(1, 101)])
    page = running / "report" / "report.html"
    page.parent.mkdir()
    page.write_text("<!doctype html><title>the report</title>")
    frame = Watcher(running).look()
    assert (frame.finished, frame.current, frame.report) == (True, None, page)
    assert [curve.stage for curve in frame.curves] == ["base_train", "mid_train"]
    monkeypatch.setenv("COLUMNS", "130")
    run_script(main, Config, ["--base_dir", str(running), "--once"])
    text = capsys.readouterr().out
    assert text.count("nats per token learned") == 2
    assert "scripts.chat_web -i rl -g d4" in text
    with serve(monitor_app(Watcher(running), 2.0)) as client:
        first, again, report = client.get("/"), client.get("/"), client.get("/report")
    assert report.text.endswith("<title>the report</title>")
    pictures = re.findall(r'<svg class="plot".*?</svg>', first.text, flags=re.DOTALL)
    assert pictures == re.findall(r'<svg class="plot".*?</svg>', again.text, flags=re.DOTALL)  # not drawn again
    for picture, last in zip(pictures, ("25", "100"), strict=True):
        assert f"step 1 to {last}" in picture
        assert re.findall(r">([\d.]+)<", picture)  # ticks
        assert ">nats per token learned<" in picture
        assert ">step<" in picture
    assert 'href="report"' in first.text


def test_the_page_has_the_same_figures_and_escapes_the_log(running, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (running / "pipeline" / "base_train.log").write_text("<script>alert(1)</script>\n")
    with serve(monitor_app(Watcher(running), 2.0)) as client:
        page = client.get("/")
        elsewhere = client.get("/", headers={"host": "evil.example"})
    assert elsewhere.status_code == 400
    assert page.status_code == 200
    for part in ("25.0 %, 2m30s left", "&lt;script&gt;alert(1)", "step 1 to 25", "base_train", "no card"):
        assert part in page.text
    assert re.findall("<script[^>]*>", page.text) == ['<script src="monitor.js" defer>']
    assert '<noscript><meta http-equiv="refresh" content="2"></noscript>' in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(running, scheme, browser, accessible):
    with serve(monitor_app(Watcher(running), 1.0)) as client:
        page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme, bypass_csp=True)
        problems = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(str(client.base_url))
        for finished in (False, True):
            if finished:
                page.evaluate("window.stayed = true")
                for name in STAGES:
                    mark(running, name, "done", seconds=1.0)
                page.wait_for_selector("h1:text('all stages are finished')")
                assert page.evaluate("window.stayed") is True  # what is new came into the page
                assert page.locator("svg.plot").count() == 1
            assert page.evaluate("document.documentElement.scrollWidth") == 360
            accessible(page)
        assert problems == []
        page.close()


def test_cards_as_nvidia_smi_prints_them(tmp_path, monkeypatch):
    lines = [
        "Tesla P100-PCIE-16GB, 61, 8192, 16384, 171.25, 250.00, 98",
        "Tesla K80, [N/A], 1024, 11441, [N/A], ERR!, 3",
    ]
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in [*lines, "torn"]))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    *cards, machine = machine_facts()
    assert cards == [
        ("card 0", "Tesla P100-PCIE-16GB: 61 °C, 8.0 of 16.0 GiB, 171 of 250 W, 98 % busy"),
        ("card 1", "Tesla K80: ? °C, 1.0 of 11.2 GiB, ? of ? W, 3 % busy"),
    ]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine[0] == "machine"
    assert machine_facts()[0] == ("card", "no card")
