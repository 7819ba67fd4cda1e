"""Downloads from a hub: what is asked for, what faults do to it, what is kept, and what the scripts then read."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from local_hub import COMMIT, Gate, Hub, write_shard

from nanochat import dataset
from nanochat.config import run_script
from nanochat.data.corpus import list_shards, open_corpus
from nanochat.data.download import Download, RemoteFile, download_file_with_lock
from nanochat.data.shards import LOCK, Entry, load_manifest
from nanochat.data.sources import SOURCES, Source, choose_shards, source_folder
from nanochat.dataset import download_shards, prepare_corpus

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    for i in (0, 1, 2, 9):
        write_shard(tmp_path / "made.parquet", [[f"text {i}, {random.Random(i).random()}"] * 50])
        server.files[f"shard_{i:05d}.parquet"] = (tmp_path / "made.parquet").read_bytes()
    (tmp_path / "made.parquet").unlink()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_TIMEOUT", "0.5")
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_BACKOFF", "0.01")
    monkeypatch.setitem(SOURCES, "climbmix", Source("someone/texts", 9))
    yield server
    server.stop()


def files_asked_for(hub: Hub, start: int = 0) -> list[str]:
    return [request.rsplit("/", 1)[-1] for request in hub.requests[start:] if "/resolve/" in request]


def test_download_gets_validation_and_first_shards_once(hub: Hub, base_dir: Path) -> None:
    folder = download_shards("climbmix", 2, workers=1)
    assert folder == base_dir / "base_data" / "climbmix"
    assert f"GET /datasets/someone/texts/resolve/{COMMIT}/shard_00009.parquet" in hub.requests
    assert files_asked_for(hub) == [f"shard_0000{i}.parquet" for i in (9, 0, 1)]
    assert hub.tokens[0] == "Bearer hf_secret"
    corpus = open_corpus(folder)
    assert {text[:6] for text in corpus.documents("val")} == {"text 9"}
    assert corpus.num_documents("train") == 100
    done = len(hub.requests)
    assert prepare_corpus("climbmix") == folder
    assert download_shards("climbmix", 1) == folder
    assert len(hub.requests) == done
    download_shards("climbmix", 3)
    assert files_asked_for(hub, done) == ["shard_00002.parquet"]
    assert {text[:6] for text in open_corpus(folder).documents("val")} == {"text 9"}  # pinned while shards arrive


def test_the_manifest_keeps_commit_rows_and_hashes(hub: Hub) -> None:
    folder = download_shards("climbmix", 2)
    manifest = load_manifest(folder)
    assert manifest is not None
    assert (manifest.source, manifest.revision) == ("climbmix", COMMIT)
    assert [(entry.name, entry.rows) for entry in manifest.entries] == [
        (f"shard_0000{i}.parquet", 50) for i in (9, 0, 1)
    ]
    assert all(len((entry.digest or "").removeprefix("sha256:")) == 64 for entry in manifest.entries)


@pytest.mark.parametrize("fault", ["drop", "truncate", "429", "500", "wrong", "hang", "whole"])
def test_faults_end_with_the_right_files(hub: Hub, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "3")
    hub.faults = {"shard_00000.parquet": ["truncate", fault], "shard_00009.parquet": [fault, "truncate"]}
    folder = download_shards("climbmix", 1)
    for name in ("shard_00000.parquet", "shard_00009.parquet"):
        assert (folder / name).read_bytes() == hub.files[name]
    assert hub.ranges  # after the truncation only the rest was asked for


def test_many_faults_in_a_row_end_as_long_as_bytes_arrive(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "2")
    hub.faults = {"shard_00000.parquet": ["truncate", "500"] * 5}
    folder = download_shards("climbmix", 1)
    assert (folder / "shard_00000.parquet").read_bytes() == hub.files["shard_00000.parquet"]


@pytest.mark.parametrize("fault", ["drop", "429", "500", "wrong", "hang"])
def test_lasting_faults_name_the_shard_and_leave_no_file_under_its_name(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "2")
    hub.faults = {"shard_00001.parquet": [fault] * 20}
    with pytest.raises(SystemExit) as stop:
        run_script(dataset.main, dataset.Config, ["-n", "2"])
    assert stop.value.code == 1
    assert "1 of 3 shards failed: shard_00001.parquet" in capsys.readouterr().err
    folder = source_folder("climbmix")
    assert [shard.name for shard in list_shards(folder)] == ["shard_00000.parquet", "shard_00009.parquet"]
    hub.faults = {}
    run_script(dataset.main, dataset.Config, ["-n", "2"])
    assert "3 shards" in capsys.readouterr().out
    assert [p for p in folder.iterdir() if p.suffix == ".part"] == []


def test_failed_shards_are_all_named(hub: Hub) -> None:
    hub.faults = {f"shard_0000{i}.parquet": ["404"] for i in (0, 1)}
    hub.files["shard_00002.parquet"] = b"<html>quota exceeded</html>"  # with the right hash, but no parquet file
    with pytest.raises(RuntimeError, match=r"3 of 4 shards failed: .*0\.parquet, .*1\.parquet, .*2\.parquet\. First"):
        download_shards("climbmix", 3)
    folder = source_folder("climbmix")
    assert [p.name for p in folder.iterdir() if p.name not in (LOCK, "manifest.json")] == ["shard_00009.parquet"]


def test_a_partial_file_of_an_earlier_run_is_continued(hub: Hub) -> None:
    hub.faults = {"shard_00000.parquet": ["truncate", "404"]}
    with pytest.raises(RuntimeError, match="shard_00000"):
        download_shards("climbmix", 1)
    half = len(hub.files["shard_00000.parquet"]) // 2
    folder = download_shards("climbmix", 1)
    assert hub.ranges == [f"bytes={half}-"]
    assert (folder / "shard_00000.parquet").read_bytes() == hub.files["shard_00000.parquet"]


def test_wrong_files_are_found_by_size_and_with_verify_by_hash(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = download_shards("climbmix", 2)
    for name, content in (("shard_00000.parquet", b"short"), ("shard_00001.parquet", None)):
        (folder / name).write_bytes(content or bytes(len(hub.files[name])))
    download_shards("climbmix", 2)
    assert (folder / "shard_00000.parquet").read_bytes() == hub.files["shard_00000.parquet"]
    assert (folder / "shard_00001.parquet").read_bytes() != hub.files["shard_00001.parquet"]
    assert "shard_00000.parquet is not the source's file" in capsys.readouterr().out
    download_shards("climbmix", 2, verify=True)
    assert (folder / "shard_00001.parquet").read_bytes() == hub.files["shard_00001.parquet"]


def test_a_full_disk_is_noticed_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(RuntimeError, match="downloading 2 files needs"):
        download_shards("climbmix", 1)
    assert files_asked_for(hub) == []


def test_a_hub_that_can_not_be_listed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults = {"api": ["401"]}
    with pytest.raises(RuntimeError, match=r"can't list the data set someone/texts .*HF_TOKEN"):
        download_shards("climbmix", 1)
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "3")
    hub.faults = {"api": ["500", "429"]}
    download_shards("climbmix", 1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download_shards("climbmix", 1) == source_folder("climbmix")  # nothing to ask for
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE is set"):
        download_shards("climbmix", 2)


# --- other sources ----------------------------------------------------------------------------------------------------


def test_any_data_set_of_the_hub(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = hub.files["shard_00000.parquet"]
    hub.files = {
        "README.md": b"about",
        "data/train-00000-of-00002.parquet": content,
        "data/train-00001-of-00002.parquet": hub.files["shard_00001.parquet"],
        "data/validation-00000-of-00001.parquet": hub.files["shard_00009.parquet"],
        "data/test-00000-of-00001.parquet": hub.files["shard_00002.parquet"],
    }
    run_script(dataset.main, dataset.Config, ["--source", "hf:someone/texts"])
    assert "--dataset=hf:someone/texts" in capsys.readouterr().out
    corpus = open_corpus(prepare_corpus("hf:someone/texts"))
    assert {text[:6] for text in corpus.documents("train")} == {"text 0", "text 1"}
    assert {text[:6] for text in corpus.documents("val")} == {"text 9"}
    hub.files = {"small.parquet": content}  # not in LFS: git's own hash
    folder = download_shards("hf:someone/other", None)
    assert (folder / "small.parquet").read_bytes() == content
    assert open_corpus(folder).num_documents("val") == 5
    hub.files = {"README.md": b"about"}
    with pytest.raises(ValueError, match=r"no \.parquet file"):
        download_shards("hf:someone/third", 1)


def test_another_text_column_is_said_once(hub: Hub, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("a", "b"):
        pq.write_table(pa.table({"content": [name] * 3}), tmp_path / "made")
        hub.files[f"{name}.parquet"] = (tmp_path / "made").read_bytes()
    hub.files = {name: hub.files[name] for name in ("a.parquet", "b.parquet")}
    with pytest.raises(RuntimeError, match=r"has no column 'text' \(it has: content\)"):
        download_shards("hf:someone/texts", None)
    folder = download_shards("hf:someone/more", None, text_column="content")
    assert set(open_corpus(folder).documents("train")) == {"a"}
    assert set(open_corpus(folder).documents("val")) == {"b"}


@pytest.mark.parametrize(
    ("paths", "train", "validation"),
    [
        (["a", "b", "c"], ["a", "b"], ["c"]),
        (["a"], ["a"], []),
        (["train-0", "test-0"], ["train-0"], []),
        (["train-0", "train-1", "test-0"], ["train-0"], ["train-1"]),
        (["x/train/0", "x/val/0"], ["x/train/0"], ["x/val/0"]),
        (["trainer-0", "valley-0"], ["trainer-0"], ["valley-0"]),
    ],
)
def test_which_files_are_validation(paths: list[str], train: list[str], validation: list[str]) -> None:
    entries = [Entry(path.replace("/", "--"), path=path) for path in paths]
    assert tuple([e.path for e in part] for part in choose_shards(entries)) == (train, validation)


def test_a_list_of_urls(hub: Hub, tmp_path: Path) -> None:
    import hashlib

    digest = hashlib.sha256(hub.files["shard_00009.parquet"]).hexdigest()
    lines = ["# a comment", f"{hub.url}/shard_00001.parquet", "", f"{hub.url}/shard_00009.parquet {digest}"]
    hub.files["list.txt"] = "\n".join(lines).encode()
    (tmp_path / "list.txt").write_text("\n".join(lines))
    for source in (f"urls:{tmp_path}/list.txt", f"urls:{hub.url}/list.txt"):
        hub.faults = {"shard_00001.parquet": ["truncate", "404"]}
        with pytest.raises(RuntimeError, match=r"00000-shard_00001\.parquet"):
            download_shards(source, None)
        hub.ranges.clear()
        corpus = open_corpus(download_shards(source, None))  # continued, because its ETag is the same
        assert hub.ranges
        assert {text[:6] for text in corpus.documents("train")} == {"text 1"}
        assert {text[:6] for text in corpus.documents("val")} == {"text 9"}
    hub.faults = {"shard_00009.parquet": ["wrong"]}
    (tmp_path / "two.txt").write_text("\n".join(lines))
    with pytest.raises(RuntimeError, match="size or hash differ"):
        download_shards(f"urls:{tmp_path}/two.txt", None)
    one = open_corpus(download_shards(f"{hub.url}/shard_00002.parquet", None))
    assert one.num_documents("val") == 5
    for line, complaint in (("ftp://x/a.parquet", "line 1"), ("https://x/a.txt", "line 1"), ("# none", "no URL")):
        (tmp_path / "bad.txt").write_text(line)
        with pytest.raises(ValueError, match=complaint):
            download_shards(f"urls:{tmp_path}/bad.txt", None)


def test_a_list_that_grows_never_trains_on_what_validated(hub: Hub, tmp_path: Path) -> None:
    urls = [f"{hub.url}/shard_{i:05d}.parquet" for i in (0, 1, 2, 9)]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(urls[:2]))
    first = load_manifest(download_shards(f"urls:{listed}", 1))
    listed.write_text("\n".join(urls))
    later = load_manifest(download_shards(f"urls:{listed}", 3))
    assert [entry.name for entry in later.validation] == [entry.name for entry in first.validation]
    assert len(later.train) == 3
    assert not {entry.name for entry in later.train} & {entry.name for entry in later.validation}


def test_local_folders_and_unknown_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.parquet", [[f"text {i}" for i in range(20)]])
    run_script(dataset.main, dataset.Config, ["--source", str(tmp_path)])
    said = capsys.readouterr().out
    assert "1 parquet" in said
    assert re.search(r"1\d documents to train on, \d for validation", said)
    for flags, message in (
        (["--source", "pile"], "unknown source 'pile'"),
        (["--source", "hf:pile"], "unknown source"),
        (["--import", str(tmp_path / "nowhere")], "no such file"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_script(dataset.main, dataset.Config, flags)
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
    for flags in (["-n", "0"], ["-w", "0"], ["--ready", "0"]):
        with pytest.raises(SystemExit) as stop:
            run_script(dataset.main, dataset.Config, flags)
        assert stop.value.code == 2


def test_what_prepare_corpus_refuses(tmp_path: Path, base_dir: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        prepare_corpus("demo", tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'pile': choose climbmix"):
        prepare_corpus("pile")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        prepare_corpus(data_dir=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no \.parquet, \.jsonl, \.txt"):
        prepare_corpus(data_dir=empty)
    (empty / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="no text in"):
        prepare_corpus(data_dir=empty)
    with pytest.raises(FileNotFoundError, match=r"python -m tasks\.demo"):
        prepare_corpus("demo")
    with pytest.raises(FileNotFoundError, match=r"python -m nanochat\.dataset -n 8 --source climbmix"):
        prepare_corpus("climbmix")
    with pytest.raises(FileNotFoundError, match="--data_dir"):
        prepare_corpus()
    write_shard(base_dir / "base_data" / "a.parquet", [["a", "b"]])
    assert prepare_corpus() == base_dir / "base_data"


# --- while the rest arrives, and kills --------------------------------------------------------------------------------


def test_ready_returns_early_and_the_rest_arrives_in_the_background(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The other process knows the public sources only: a data set by its name.
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_TIMEOUT", "20")
    run_script(dataset.main, dataset.Config, ["--source", "hf:someone/texts", "--ready", "1"])
    folder = source_folder("hf:someone/texts")
    assert "in the background" in capsys.readouterr().out
    corpus = open_corpus(folder)
    assert len(list(corpus.documents("train"))) == 150  # waits for the shards that are still to come
    assert dataset._background[-1].wait(60) == 0
    assert {entry.rows for entry in load_manifest(folder).entries} == {50}  # type: ignore[union-attr]


KILLED = """
import os, sys
import huggingface_hub.hf_api, huggingface_hub.utils  # here, so that not every child imports them
from nanochat.dataset import download_shards
print("ready", flush=True)
for line in sys.stdin:
    if not (pid := os.fork()):
        os.dup2(2, 1)
        try:
            download_shards("hf:someone/texts", None, 3)
        finally:
            os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def kill_downloads(hub: Hub, kills: int) -> None:
    """Kill the download after a random number of bytes; every file under its final name must be the right one."""
    rng = random.Random(7)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_DOWNLOAD_TIMEOUT": "60"}  # the gate makes them wait
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=ROOT,
        env=env,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    folder = source_folder("hf:someone/texts")
    for kill in range(kills):
        missing = sum(map(len, hub.files.values())) - sum(p.stat().st_size for p in list_shards(folder))
        missing -= sum(p.stat().st_size for p in folder.glob(".*.part"))  # these are gone on with
        hub.gate = Gate(missing - 1 if kill == 0 else rng.randrange(missing))
        process.stdin.write("\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        assert hub.gate.reached.wait(60)
        while kill == 0 and not list_shards(folder):  # all but one have all of their bytes, and get their names
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        assert int(process.stdout.readline()) == signal.SIGKILL
        hub.gate.opened.set()
        for shard in list_shards(folder):
            assert shard.read_bytes() == hub.files[shard.name]
            if rng.random() < 0.5:
                shard.unlink()  # so that there is always something to do
        if (folder / "manifest.json").exists():
            json.loads((folder / "manifest.json").read_text())
    process.stdin.close()
    process.stdout.close()
    process.wait()
    hub.gate = None
    download_shards("hf:someone/texts", None)
    assert {p.name: p.read_bytes() for p in list_shards(folder)} == hub.files
    assert [p for p in folder.iterdir() if p.suffix == ".part"] == []


def test_a_kill_never_leaves_a_bad_file(hub: Hub) -> None:
    kill_downloads(hub, 6)


@pytest.mark.slow
def test_fifty_kills_never_leave_a_bad_file(hub: Hub) -> None:
    kill_downloads(hub, 50)


# --- single files -----------------------------------------------------------------------------------------------------


def test_a_file_without_hash_or_etag_is_never_pieced_together(hub: Hub, tmp_path: Path) -> None:
    hub.files["x"] = b"abcdefgh"
    hub.faults = {"x": ["truncate", "404"]}
    with pytest.raises(RuntimeError, match="could not download"):
        download_file_with_lock(f"{hub.url}/x", tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []
    hub.files["x"] = b"ABCDEFGH"
    assert download_file_with_lock(f"{hub.url}/x", tmp_path / "x").read_bytes() == b"ABCDEFGH"
    assert hub.ranges == []


def test_a_file_that_changes_between_attempts_is_not_mixed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "2")
    hub.files["x"] = b"abcdefgh"
    hub.faults = {"x": ["truncate"]}
    file = RemoteFile(f"{hub.url}/x", tmp_path / "x")
    seen: list[int] = []

    def on_bytes(n: int) -> None:
        seen.append(n)
        hub.files["x"] = b"ABCDEFGH"

    Download(file, on_bytes).run()
    assert (tmp_path / "x").read_bytes() == b"ABCDEFGH"
    assert hub.ranges == ["bytes=4-"]
    assert sum(seen) == 8  # what was thrown away does not count


def test_retry_after_is_respected(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    from nanochat.data.download import retry_after

    response = httpx.Response(429, headers={"Retry-After": "7"}, request=httpx.Request("GET", "http://x"))
    error = httpx.HTTPStatusError("", request=response.request, response=response)
    assert retry_after(error) == 7
    response.headers["Retry-After"] = "100000"
    assert retry_after(error) == 300
    in_a_minute = datetime.now(timezone.utc) + timedelta(seconds=60)
    response.headers["Retry-After"] = format_datetime(in_a_minute, usegmt=True)
    assert 50 < retry_after(error) <= 60
    for nonsense in ("soon", "Wed, 99 Oct"):
        response.headers["Retry-After"] = nonsense
        assert retry_after(error) == 0
    del response.headers["Retry-After"]
    response.headers["RateLimit"] = '"resolvers";r=0;t=35'  # as the Hugging Face hub says it
    assert retry_after(error) == 35
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_BACKOFF", "soon")
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "2")
    hub.faults = {"x": ["500"]}
    with pytest.raises(RuntimeError, match="NANOCHAT_DOWNLOAD_BACKOFF=soon is not a number"):
        download_file_with_lock(f"{hub.url}/x", tmp_path / "x")
