"""Own texts to shards: every form is read, nothing is lost silently, and twice gives the same."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset
from nanochat.config import run_script
from nanochat.data import json_text, shards, split, text_import
from nanochat.data.corpus import open_corpus
from nanochat.data.inventory import Inventory
from nanochat.data.shards import load_manifest
from nanochat.data.text_files import TextReader, file_of
from nanochat.data.text_import import import_path, import_texts
from nanochat.data.text_look import look_at_texts
from nanochat.data.text_walk import ReadOptions, find_texts
from nanochat.dataset import prepare_corpus


def documents_of(file: Path, column: str | None = None) -> list[str]:
    """What is read of a file."""
    return [text for _, text in TextReader(ReadOptions(column), Inventory("test")).read(file_of(file))]


def all_documents(folder: Path) -> list[str]:
    """Train and validation of an imported folder."""
    corpus = open_corpus(folder)
    return [*corpus.documents("train"), *(corpus.documents("val") if corpus.val else [])]


def hashes_of(folder: Path) -> dict[str, str]:
    """Every shard with its hash."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.parquet")}


def test_jsonl_and_txt_become_shards_once(tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own"
    (own / "deeper").mkdir(parents=True)
    (own / ".hidden").mkdir()
    (own / ".hidden" / "a.txt").write_text("hidden")
    lines: list[Any] = [{"text": f"document {i}", "id": i} for i in range(50)] + ["a plain string", {"text": "\ud800"}]
    (own / "a.jsonl").write_text("\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    (own / "deeper" / "b.txt").write_bytes("zwölf".encode() * 40 + b" \xff\r\n")
    (own / "c.txt").write_bytes("zwölf".encode() * 40 + b" \xff\r\n")
    (own / "blank.txt").write_text(" \n")
    (own / "program.py").write_text("not read")
    folder = prepare_corpus(data_dir=own)
    said = capsys.readouterr().out
    assert folder.parent == base_dir / "base_data"
    assert sorted(all_documents(folder)) == sorted(
        [f"document {i}" for i in range(50)] + ["a plain string", "\ufffd", "zwölf" * 40 + " \ufffd\n"]
    )
    assert "1 jsonl, 3 txt" in said.replace("3 txt, 1 jsonl", "1 jsonl, 3 txt")
    assert "not read: 1 .py: source code (SOURCE_CODE=1" in said
    assert "1 folder: hidden" in said
    assert "documents: 53" in said
    assert "exact duplicates left out: 1, blank documents left out: 1" in said
    assert "3 characters were no valid UTF-8 and became U+FFFD: a.jsonl (1), c.txt (1), deeper/b.txt (1)" in said
    assert "sample: document " in said
    times = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert prepare_corpus(data_dir=own) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == times
    assert prepare_corpus(data_dir=own / "c.txt") != folder
    (own / "c.txt").write_text("changed and longer")
    assert prepare_corpus(data_dir=own) != folder


# Without the letters with which text that was encoded twice begins: that is mended (test_text_forms.py).
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="".join(map(chr, range(0xC2, 0xF5))))


@given(texts=st.lists(st.text(LETTERS, max_size=20), max_size=60), cut=st.integers(0, 60), buckets=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_every_document_once_in_an_order_that_only_the_content_decides(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int, buckets: int
) -> None:
    folder = tmp_path_factory.mktemp("import")

    def write(name: str, part: list[str]) -> Path:
        (folder / name).write_text("".join(json.dumps(text) + "\n" for text in part))
        return folder / name

    expected = {text for text in texts if text.strip()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_import, "BUCKET_BYTES", max(1, sum(map(len, texts)) // buckets))
        patch.setattr(text_import, "PENDING_BYTES", 50)
        patch.setattr(shards, "SHARD_CHARS", 100)
        patch.setattr(shards, "ROW_GROUP_DOCUMENTS", 3)
        files = [write("a.jsonl", texts[:cut]), write("b.jsonl", texts[cut:])]
        if not expected:
            with pytest.raises(ValueError, match="no text in"):
                import_texts(files, folder)
            return
        first = import_texts(files, folder)
        assert sorted(all_documents(first)) == sorted(expected)
        again = import_texts([write("c.jsonl", texts[::-1])], folder)
        assert hashes_of(again) == hashes_of(first)
        assert again != first
    if len(expected) > 1:
        assert open_corpus(first).num_documents("val") >= 1
    manifest = load_manifest(first)
    assert manifest is not None
    assert sum(entry.rows or 0 for entry in manifest.entries) == manifest.facts["documents"] == len(expected)
    assert manifest.facts["duplicates"] + manifest.facts["blank"] + len(expected) == len(texts)
    assert {e.name: (e.digest or "").removeprefix("sha256:") for e in manifest.entries} == hashes_of(first)


def test_validation_is_a_twentieth_and_stays_when_documents_are_added(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(3000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts[:2000]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    few, more = (open_corpus(import_texts([tmp_path / name], tmp_path / "out")) for name in ("a.jsonl", "b.jsonl"))
    val = set(few.documents("val"))
    assert 70 <= len(val) <= 130
    assert val <= set(more.documents("val"))
    train = list(few.documents("train"))
    assert train != sorted(train, key=texts.index)  # shuffled


def test_many_documents_make_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_CHARS", 1000)
    monkeypatch.setattr(shards, "ROW_GROUP_DOCUMENTS", 7)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(f"document {i:04d}") for i in range(400)))
    folder = import_path(tmp_path / "a.jsonl", tmp_path / "out")
    corpus = open_corpus(folder)
    assert sorted(all_documents(folder)) == [f"document {i:04d}" for i in range(400)]
    assert len({chunk.shard for chunk in corpus.train}) == 5
    assert max(chunk.stop for chunk in corpus.train) == 7
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *(f"shard_0000{i}.parquet" for i in range(6))]
    assert {chunk.shard.name for chunk in corpus.val} == {"shard_00005.parquet"}
    assert import_path(tmp_path / "a.jsonl", tmp_path / "out") == folder
    (tmp_path / "b.jsonl").write_text('"other"')
    with pytest.raises(ValueError, match="holds something else"):
        import_path(tmp_path / "b.jsonl", tmp_path / "out")


# --- the forms --------------------------------------------------------------------------------------------------------


def test_packed_files_and_tables(tmp_path: Path) -> None:
    line = json.dumps({"text": "wörd", "content": "other"}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()) + gzip.compress(line.encode()))
    with pa.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as out:
        out.write(line.encode() * 3)
    (tmp_path / "c.csv").write_text('id,text\n1,"with ""quotes"",\nand lines"\n\n2,plain\n')
    (tmp_path / "d.tsv.gz").write_bytes(gzip.compress(b"text\tid\none\t1\n"))
    (tmp_path / "e.csv").write_text("content\nonly column\n")
    pq.write_table(pa.table({"id": [1, 2], "body": ["a", None]}), tmp_path / "f.parquet")
    assert documents_of(tmp_path / "a.jsonl.gz") == ["wörd"] * 2
    assert documents_of(tmp_path / "a.jsonl.gz", "content") == ["other"] * 2
    assert documents_of(tmp_path / "b.jsonl.zst") == ["wörd"] * 3
    assert documents_of(tmp_path / "c.csv") == ['with "quotes",\nand lines', "plain"]
    assert documents_of(tmp_path / "d.tsv.gz") == ["one"]
    assert documents_of(tmp_path / "e.csv") == ["only column"]
    assert documents_of(tmp_path / "f.parquet") == ["a", ""]
    assert len(find_texts(tmp_path, ReadOptions(), Inventory("test"))) == 6
    assert sorted(all_documents(import_path(tmp_path))) == sorted(
        ["wörd", 'with "quotes",\nand lines', "plain", "one", "only column", "a"]
    )


def test_invalid_utf8_in_a_parquet_file_is_repaired(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"bad \xff\xfe"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())}), tmp_path / "a.parquet")
    reader = TextReader(ReadOptions(), Inventory("test"))
    assert [t for _, t in reader.read(file_of(tmp_path / "a.parquet"))] == ["fine", "bad \ufffd\ufffd"]
    assert reader.repairs.characters == 2


def test_utf16_is_told_by_its_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("zwölf".encode("utf-16"))
    assert documents_of(tmp_path / "a.txt") == ["zwölf"]


def test_html_shows_what_a_browser_shows(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<html><head><title>T</title><style>p {}</style></head><body><script>if (a < b) {}</script>"
        "<h1>A &amp; B</h1><p>one\n two <b>three</b></p><ul><li>x</li><li>y</li></ul></body></html>"
    )
    assert documents_of(tmp_path / "a.html") == ["A & B\n\none two three\n\nx\ny"]


def test_html_may_leave_out_the_ends_of_head_and_body(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<!DOCTYPE html><head><title>T</title><meta charset=utf-8><p>Visible <b>too</b>")
    (tmp_path / "b.html").write_text("<!DOCTYPE html><title>T</title><p>Visible")
    assert documents_of(tmp_path / "a.html") == ["Visible too"]
    assert documents_of(tmp_path / "b.html") == ["Visible"]


def test_tables_of_excel_and_capital_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id;text\n1;"one; two, three"\n2;four\n')
    assert documents_of(tmp_path / "a.csv") == ["one; two, three", "four"]
    (tmp_path / "A.TSV").write_text("id\ttext\n1\tone, two\n")
    assert documents_of(tmp_path / "A.TSV") == ["one, two"]
    (tmp_path / "b.csv").write_text("text\nno comma at all\n")
    assert documents_of(tmp_path / "b.csv") == ["no comma at all"]
    (tmp_path / "c.csv").write_text("")
    assert documents_of(tmp_path / "c.csv") == []


def test_a_null_is_blank_and_other_things_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "b"}\n')
    assert documents_of(tmp_path / "a.jsonl") == ["", "b"]
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="found a int in 'text'"):
        documents_of(tmp_path / "b.jsonl")


def test_records_without_text_are_counted_and_only_many_stop(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f'{{"text": "text number {i}"}}' for i in range(8)]
    rows[4:4] = ['{"meta": "no text"}', '{"text": 3}', '{"text": {"value": "x"}}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert documents_of(tmp_path / "a.jsonl") == [f"text number {i}" for i in range(8)]
    (tmp_path / "b.json").write_text(f"[{','.join(rows)}]")
    notes = look_at_texts(tmp_path).notes
    assert notes == [
        "records without text in 'text', left out: a.jsonl (3, the first at line 5), b.json (3, the first at item 5)"
    ]
    (tmp_path / "c.jsonl").write_text("\n".join([*rows[:7], '{"body": "b"}']))
    with pytest.raises(ValueError, match=r"c\.jsonl, line 5: expected .* with meta .*; 4 of 8 records have none"):
        documents_of(tmp_path / "c.jsonl")
    (tmp_path / "e.json").write_text(json.dumps([*map(json.loads, rows[:7]), {"body": "b"}]))
    assert len(documents_of(tmp_path / "e.json")) == 4  # it may be no text at all: a few of them stop no folder
    with monkeypatch.context() as patch:
        patch.setattr(json_text, "TRIED", 4)
        with pytest.raises(ValueError, match=r"e\.json, item 5: expected .* with meta .*; 4 of 8 records have none"):
            documents_of(tmp_path / "e.json")
    (tmp_path / "e.json").write_text("[1, 2, 3]")
    assert documents_of(tmp_path / "e.json") == []
    monkeypatch.setattr(json_text, "TRIED", 3)
    monkeypatch.setattr(json_text, "SAMPLE_RECORDS", 5)
    (tmp_path / "d.jsonl").write_text("\n".join([*rows[1:7], "{is not read"]))
    with pytest.raises(ValueError, match=r"d\.jsonl, line 4: .*; 3 of 6 records have none"):
        documents_of(tmp_path / "d.jsonl")


def test_markdown_is_cut_at_headings_but_not_in_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "SECTION_CHARS", 20)
    parts = ["# One\n\ntext text text text\n", "## Two\n```\n# no heading, a comment\n```\n### Three\n", "# Four\n"]
    (tmp_path / "a.md").write_text("".join(parts))
    assert documents_of(tmp_path / "a.md") == parts
    (tmp_path / "a.txt").write_text("".join(parts))
    assert documents_of(tmp_path / "a.txt") == ["".join(parts)]


@given(
    paragraphs=st.lists(st.text(alphabet="ab é\n#", max_size=30), max_size=20),
    target=st.integers(1, 40),
    longest=st.integers(41, 60),
    suffix=st.sampled_from([".txt", ".md"]),
)
@settings(max_examples=60, deadline=None)
def test_long_texts_are_cut_without_losing_a_character(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[str], target: int, longest: int, suffix: str
) -> None:
    file = tmp_path_factory.mktemp("txt") / f"a{suffix}"
    text = "\n\n".join(paragraphs)
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "DOCUMENT_CHARS", target)
        patch.setattr(split, "SECTION_CHARS", target)
        patch.setattr(split, "LIMIT_CHARS", longest)
        patch.setattr(split, "LONGEST_CHARS", longest)
        documents = documents_of(file)
    assert "".join(documents) == text
    assert all(len(document) < 2 * longest for document in documents)


def test_end_of_text_lines_separate_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    assert documents_of(tmp_path / "a.txt") == ["one\n", "two\n"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{bad", "line 2: not JSON"),
        ('{"content": "a"}', "line 2: expected .* found an object with content .*--text_column"),
        ("3", "line 2: expected .* found int"),
    ],
)
def test_bad_lines_are_named_and_nothing_is_left(tmp_path: Path, base_dir: Path, line: str, complaint: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=f"a.jsonl, {complaint}"):
        prepare_corpus(data_dir=tmp_path / "a.jsonl")
    assert [p for p in (base_dir / "base_data").iterdir() if p.is_dir()] == []


def test_bad_files_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(b'"text"\n' * 1000)
    bad: dict[str, tuple[bytes, str]] = {
        "a.jsonl.gz": (packed[:-10], "can't be unpacked"),
        "b.jsonl.zst": (b"\x28\xb5\x2f\xfdno zstd", "can't be unpacked"),
        "c.csv": (
            b"name,title\ny,x\n",
            r"no column 'text' \(it has: name, title\): say which one with TEXT_COLUMN or --text",
        ),
        "d.csv": (b"id,text\n1\n", "line 2: 1 fields, but the first line has 2"),
        "e.parquet": (b"", "not a readable parquet"),
    }
    for name, (content, complaint) in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=complaint) as error:
            documents_of(tmp_path / name)
        assert name in str(error.value)
    pq.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "f.parquet")
    with pytest.raises(ValueError, match=r"f\.parquet has no column 'text' \(it has: a, b\)"):
        documents_of(tmp_path / "f.parquet")
    with pytest.raises(ValueError, match="no column of text 'c'"):
        documents_of(tmp_path / "f.parquet", "c")
    assert documents_of(tmp_path / "f.parquet", "b") == ["y"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text("body,title\n" + "".join(f"text {i},x\n" for i in range(40)))
    flags = ["--import", str(tmp_path / "in.csv"), "--text_column", "body", "--out", str(tmp_path / "out")]
    run_script(dataset.main, dataset.Config, flags)
    said = capsys.readouterr().out
    assert "documents: 40" in said
    assert "column 'body'" in said
    assert f"--data_dir={tmp_path / 'out'}" in said
    assert sorted(all_documents(tmp_path / "out")) == sorted(f"text {i}" for i in range(40))
