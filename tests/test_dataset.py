"""Corpora: which documents are validation, own texts to shards, downloads, and what is said about bad data."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset, text_import
from nanochat.dataset import Source, download_shards, open_corpus, prepare_corpus
from nanochat.text_import import import_texts


def write_shard(path: Path, groups: list[list[str | None]], kind: pa.DataType | None = None) -> None:
    """A parquet file with these row groups of texts."""
    schema = pa.schema([("id", pa.int64()), ("text", kind or pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for texts in groups:
            writer.write_table(pa.table([list(range(len(texts))), texts], schema=schema))


def test_last_shard_is_validation_and_never_trained_on(tmp_path: Path) -> None:
    for i in range(3):
        write_shard(tmp_path / f"shard_{i:05d}.parquet", [[f"{i}a", f"{i}b"], [f"{i}c"]])
    (tmp_path / "shard_00009.parquet.tmp").write_bytes(b"half a download")
    corpus = open_corpus(tmp_path)
    assert list(corpus.documents("train")) == ["0a", "0b", "0c", "1a", "1b", "1c"]
    assert list(corpus.documents("val")) == ["2a", "2b", "2c"]
    assert corpus.num_documents("train") == 6
    with pytest.raises(ValueError, match="train or val"):
        corpus.chunks("test")


@given(sizes=st.lists(st.integers(0, 25), min_size=1, max_size=25), read=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_one_shard_is_split_without_overlap(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], read: int
) -> None:
    path = tmp_path_factory.mktemp("one") / "only.parquet"
    documents = [f"document {i}" for i in range(sum(sizes))]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    write_shard(path, [documents[a : a + n] for a, n in zip(starts, sizes, strict=True)])
    if not documents:
        with pytest.raises(ValueError, match="no documents"):
            open_corpus(path)
        return
    corpus = open_corpus(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "ROWS_PER_READ", read)
        train = list(corpus.documents("train"))
        if len(documents) == 1:
            assert train == documents
            with pytest.raises(ValueError, match="at least two documents"):
                corpus.chunks("val")
            return
        val = list(corpus.documents("val"))
        first = corpus.val[0]
        assert [start for start, _ in first.read(first.start + 1)][:1] in ([], [first.start + 1])
    assert train + val == documents
    assert len(val) >= 1


def test_all_arrow_string_types_and_nulls(tmp_path: Path) -> None:
    for i, kind in enumerate([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]):
        write_shard(tmp_path / f"{i}.parquet", [["a", None, "ü"]], kind)
    assert list(open_corpus(tmp_path).documents("train")) == ["a", "", "ü"] * 2
    assert list(open_corpus(tmp_path).documents("val")) == ["a", "", "ü"]


def test_size_estimate_is_close(tmp_path: Path) -> None:
    texts: list[str | None] = [f"{i} " * 200 for i in range(200)]
    write_shard(tmp_path / "a.parquet", [texts])
    true = sum(len(text or "") for text in texts)
    corpus = open_corpus(tmp_path)
    assert corpus.num_bytes("train") + corpus.num_bytes("val") == pytest.approx(true, rel=0.05)


def test_bad_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no \.parquet file"):
        open_corpus(tmp_path)
    good, bad = tmp_path / "a.parquet", tmp_path / "b.parquet"
    write_shard(good, [["text " * 1000] * 500])
    for content in (b"", b"PAR1 nonsense", good.read_bytes()[:-20]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.parquet is not a readable parquet"):
            open_corpus(tmp_path)
    pq.write_table(pa.table({"content": ["a"]}), bad)
    with pytest.raises(ValueError, match=r"b\.parquet has no column 'text' \(it has: content\)"):
        open_corpus(tmp_path)
    pq.write_table(pa.table({"text": [1]}), bad)
    with pytest.raises(ValueError, match="must hold strings"):
        open_corpus(tmp_path)


def test_shard_damaged_or_gone_after_opening_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.parquet", [[f"text {i} " * 100 for i in range(500)]])
    corpus = open_corpus(tmp_path)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\xff" * (len(content) // 2 - len(content) // 4)
    (tmp_path / "a.parquet").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"can't read row group 0 of .*a\.parquet"):
        list(corpus.documents("train"))
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(ValueError, match=r"can't read row group 0 of .*b\.parquet"):
        list(corpus.documents("val"))


def test_fingerprint_changes_with_the_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [["a"], ["b"]])
    before = open_corpus(tmp_path).fingerprint
    assert open_corpus(tmp_path).fingerprint == before
    write_shard(tmp_path / "b.parquet", [["c"]])
    assert open_corpus(tmp_path).fingerprint != before


# --- own texts --------------------------------------------------------------------------------------------------------


def test_jsonl_and_txt_become_shards_once(tmp_path: Path, base_dir: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    lines: list[Any] = [{"text": f"document {i}", "id": i} for i in range(50)] + ["a plain string", {"text": "\ud800"}]
    (own / "a.jsonl").write_text("\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    (own / "b.txt").write_bytes("zwölf".encode() + b" \xff\r\n")
    (own / "notes.md").write_text("not read")
    folder = prepare_corpus(data_dir=own)
    assert folder.parent == base_dir / "base_data"
    corpus = open_corpus(folder)
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert val == ["document 19", "document 39"]
    assert sorted(train + val) == sorted(
        [f"document {i}" for i in range(50)] + ["a plain string", "\ufffd", "zwölf \ufffd\n"]
    )
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare_corpus(data_dir=own) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    assert prepare_corpus(data_dir=own / "b.txt") != folder
    (own / "b.txt").write_text("changed and longer")
    assert prepare_corpus(data_dir=own) != folder


@given(
    paragraphs=st.lists(st.text(alphabet="ab é\n", max_size=30), max_size=20),
    target=st.integers(1, 40),
    longest=st.integers(41, 60),
)
@settings(max_examples=60, deadline=None)
def test_long_txt_is_cut_without_losing_a_character(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str], target: int, longest: int
) -> None:
    file = tmp_path_factory.mktemp("txt") / "a.txt"
    text = "\n\n".join(paragraphs)
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_import, "TXT_DOCUMENT_CHARS", target)
        patch.setattr(text_import, "TXT_LONGEST_CHARS", longest)
        documents = [document for _, document in text_import.read_documents(file)]
    assert "".join(documents) == text
    assert all(len(document) < 2 * longest for document in documents)


def test_end_of_text_lines_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert [d for _, d in text_import.read_documents(tmp_path / "a.txt")] == ["one\n", "two\n"]


def test_many_documents_make_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_import, "SHARD_CHARS", 1000)
    monkeypatch.setattr(text_import, "ROW_GROUP_DOCUMENTS", 7)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(f"document {i:04d}") for i in range(400)))
    corpus = open_corpus(import_texts([tmp_path / "a.jsonl"], tmp_path / "out"))
    assert list(corpus.documents("train")) == [f"document {i:04d}" for i in range(400) if i % 20 != 19]
    assert list(corpus.documents("val")) == [f"document {i:04d}" for i in range(19, 400, 20)]
    assert len({chunk.shard for chunk in corpus.train}) == 5
    assert max(chunk.stop for chunk in corpus.train) == 7


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{bad", "line 2: not JSON"),
        ('{"content": "a"}', "line 2: expected .* found an object with content"),
        ("3", "line 2: expected .* found int"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_left(tmp_path: Path, base_dir: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl, {complaint}"):
        prepare_corpus(data_dir=tmp_path / "a.jsonl")
    assert [p for p in (base_dir / "base_data").iterdir() if p.is_dir()] == []


def test_what_prepare_corpus_refuses(tmp_path: Path, base_dir: Path) -> None:
    with pytest.raises(ValueError, match="not both"):
        prepare_corpus("demo", tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'pile': choose climbmix"):
        prepare_corpus("pile")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        prepare_corpus(data_dir=tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.parquet, \.jsonl or \.txt"):
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


# --- downloads --------------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """A hub on this machine: serves `files` by name, each request by the next of its `faults`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else "none"
        content = self.server.files.get(name)
        if content is None or fault.isdigit():
            self.send_error(int(fault) if fault.isdigit() else 404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    for i in (0, 1, 2, 9):
        write_shard(tmp_path / "made.parquet", [[f"text {i}"] * 50])
        server.files[f"shard_{i:05d}.parquet"] = (tmp_path / "made.parquet").read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setitem(dataset.SOURCES, "climbmix", Source("someone/texts", 9, shard_bytes=1000))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_gets_validation_and_first_shards_once(hub: Hub, base_dir: Path) -> None:
    folder = download_shards("climbmix", 2, workers=1)
    assert folder == base_dir / "base_data" / "climbmix"
    assert hub.requests[0] == "/datasets/someone/texts/resolve/main/shard_00009.parquet"
    assert [shard.name for shard in dataset.list_shards(folder)] == [f"shard_0000{i}.parquet" for i in (0, 1, 9)]
    corpus = open_corpus(folder)
    assert set(corpus.documents("val")) == {"text 9"}
    done = len(hub.requests)
    assert prepare_corpus("climbmix") == folder
    assert prepare_corpus("climbmix", num_shards=1) == folder
    assert len(hub.requests) == done
    prepare_corpus("climbmix", num_shards=3)
    assert hub.requests[done:] == ["/datasets/someone/texts/resolve/main/shard_00002.parquet"]
    assert set(open_corpus(folder).documents("val")) == {"text 9"}  # pinned while shards arrive


def test_faults_are_retried(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DOWNLOAD_ATTEMPTS", "2")
    hub.faults = {"shard_00000.parquet": ["truncate"], "shard_00009.parquet": ["500"]}
    folder = download_shards("climbmix", 1)
    for name in ("shard_00000.parquet", "shard_00009.parquet"):
        assert (folder / name).read_bytes() == hub.files[name]


def test_failed_shards_are_named_and_leave_nothing(hub: Hub) -> None:
    del hub.files["shard_00001.parquet"]
    hub.files["shard_00002.parquet"] = b"<html>quota exceeded</html>"
    hub.faults = {"shard_00000.parquet": ["truncate"]}
    with pytest.raises(
        RuntimeError, match=r"3 of 4 shards failed: .*00000\.parquet, .*00001\.parquet, .*00002\.parquet"
    ):
        download_shards("climbmix", 3)
    folder = dataset.get_base_dir() / "base_data" / "climbmix"
    assert [p.name for p in folder.iterdir() if p.suffix != ".lock"] == ["shard_00009.parquet"]
    with pytest.raises(FileNotFoundError, match="lacks shards"):
        prepare_corpus("climbmix")


def test_command_line_exits_with_an_error(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanochat.config import run_script

    run_script(dataset.main, dataset.Config, ["-n", "1", "-w", "2", "--source", "climbmix"])
    assert "2 shards" in capsys.readouterr().out
    hub.files.clear()
    with pytest.raises(SystemExit) as stop:
        run_script(dataset.main, dataset.Config, ["-n", "2"])
    assert stop.value.code == 1
    assert "shard_00001.parquet" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run_script(dataset.main, dataset.Config, ["-n", "0"])
    assert stop.value.code == 2
