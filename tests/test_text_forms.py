"""Files of every form that people bring: each becomes readable documents, or is named with the reason."""

from __future__ import annotations

import bz2
import email.message
import gzip
import io
import json
import lzma
import os
import stat
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.config import run_script
from nanochat.data import documents, text_files, text_walk
from nanochat.data.corpus import open_corpus
from nanochat.data.inventory import Inventory, UnusableInputError, check_inventories
from nanochat.data.json_text import CHATS
from nanochat.data.packed import LINK_INSIDE
from nanochat.data.script import own_prompts
from nanochat.data.text_files import TextReader, file_of
from nanochat.data.text_import import import_path, inventory_of
from nanochat.data.text_look import look_at_texts
from nanochat.data.text_walk import ReadOptions
from nanochat.pipeline import stages
from nanochat.pipeline.inputs import language_advice, look_at_inputs
from nanochat.pipeline.profiles import Settings, choose_profile
from nanochat.pipeline.stages import QUESTION, Stage, ask_instead, chats_identity, fingerprint, texts_fingerprint
from scripts import data_check

SENTENCE = "The cat sat on the mat and looked at the rain for a long while. "


def read(file: Path, column: str | None = None) -> list[str]:
    """What is read of one file; NotReadError's reasons are refused."""
    inventory = Inventory("test")
    found = [text for _, text in TextReader(ReadOptions(column), inventory).read(file_of(file))]
    assert not inventory.left_out, inventory.left_out_line()
    return found


def all_documents(folder: Path) -> set[str]:
    """Train and validation of an imported folder."""
    corpus = open_corpus(folder)
    return {*corpus.documents("train"), *(corpus.documents("val") if corpus.val else [])}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_of_a_saved_dataset_only_the_rows_are_text(tmp_path: Path, base_dir: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"{SENTENCE} {i}" for i in range(3)]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "many").mkdir()  # as it is written for many files: in the order of its keys
    state = {"_data_files": [{"filename": f"data-{i:05}-of-00200.arrow"} for i in range(200)], "_fingerprint": "f"}
    (tmp_path / "many" / "state.json").write_text(json.dumps(state, indent=2))
    (tmp_path / "state.json").write_text(json.dumps({"text": f"{SENTENCE} of a state"}))  # a name that others take too
    found = import_path(tmp_path)
    assert all_documents(found) == {text.strip() for text in [*rows["text"], f"{SENTENCE} of a state"]}
    inventory = inventory_of(found)
    assert inventory is not None
    assert {reason: entry.count for reason, entry in inventory.left_out.items()} == {"of a saved dataset, no text": 4}


def test_source_code_stops_and_is_learned_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    for i in range(40):
        (tmp_path / "src" / f"m{i}.py").write_text(f"def f{i}():\n    return {i}\n")
    (tmp_path / "README.md").write_text("# My project\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    with pytest.raises(UnusableInputError, match=r"more is left out than read .*40 \.py: source code \(SOURCE_CODE=1"):
        import_path(tmp_path)
    monkeypatch.setenv("SOURCE_CODE", "0")  # left out on purpose: the run goes on
    assert len(all_documents(import_path(tmp_path))) == 2
    monkeypatch.setenv("SOURCE_CODE", "1")
    inventory = inventory_of(import_path(tmp_path))
    assert inventory is not None
    assert inventory.read == {"py": 40, "md": 1, "txt": 1}
    assert not inventory.left_out
    assert inventory.facts["documents"] == 42


def test_parquet_hides_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"top {i}" for i in range(5)]}), tmp_path / "a.parquet")
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": [f"sub {i}" for i in range(5)]}), tmp_path / "data" / "b.PARQUET")
    (tmp_path / "book.txt").write_text("a book")
    (tmp_path / "more.jsonl").write_text('{"text": "json doc"}\n')
    documents = all_documents(import_path(tmp_path))
    assert documents == {*(f"top {i}" for i in range(5)), *(f"sub {i}" for i in range(5)), "a book", "json doc"}


def test_parquet_sorted_by_topic_is_shuffled_and_has_no_duplicate_in_validation(tmp_path: Path) -> None:
    texts = [f"{topic} {i}" for topic in ("law", "sports") for i in range(400)]
    pq.write_table(pa.table({"text": [*texts, *texts[:100]]}), tmp_path / "train-00000-of-00001.parquet")
    corpus = open_corpus(import_path(tmp_path))
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert {text.split()[0] for text in val} == {"law", "sports"}
    assert len({*train}) == len(train)
    assert not {*train} & {*val}
    assert train[:50] != sorted(train[:50])


def test_prepared_shards_stay_in_place(tmp_path: Path) -> None:
    from nanochat.dataset import prepare_corpus

    for i in range(2):
        pq.write_table(pa.table({"text": [f"{i} {j}" for j in range(9)]}), tmp_path / f"shard_{i:05d}.parquet")
    assert prepare_corpus(data_dir=tmp_path) == tmp_path
    (tmp_path / "book.txt").write_text("beside the shards")
    assert "beside the shards" in all_documents(prepare_corpus(data_dir=tmp_path))


def test_links_hidden_and_own_folders(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    for name in ("texts", ".git", "node_modules", "runs/base_data", "elsewhere"):
        (own / name).mkdir(parents=True)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(own / "runs"))
    monkeypatch.setenv("CHAT_DATA", str(own / "chats.jsonl"))
    for name in (
        "texts/a.txt",
        ".git/b.txt",
        "node_modules/c.txt",
        "runs/base_data/d.txt",
        "texts/._a.txt",
        "chats.jsonl",
    ):
        (own / name).write_text(f"text of {name}")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far.TXT").write_text("behind a link")
    (own / "linked").symlink_to(outside)
    (own / "again").symlink_to(outside)
    (own / "texts" / "loop").symlink_to(own)
    (own / "texts" / "nothing.txt").symlink_to(own / "gone.txt")
    os.mkfifo(own / "pipe.txt")
    inventory = look_at_texts(own)
    assert inventory.read == {"txt": 2}
    line = inventory.left_out_line()
    for said in ("hidden", "1 folder: of a tool", "1 folder: the run's own", "given as CHAT_DATA", "a link to nothing"):
        assert said in line
    assert "2 folders: a link to what is read already" in line
    assert "no ordinary file" in line
    assert not inventory.stop


def test_a_link_to_what_nobody_reads_is_read(tmp_path: Path) -> None:
    targets = ("node_modules/a.txt", "b.bak", "c.txt~", ".d.txt", "e.py", "f.7z", "README", "g.txt", "h.1")
    (tmp_path / "node_modules").mkdir()
    for i, name in enumerate(targets):
        (tmp_path / name).write_text(f"text of {name}")
        (tmp_path / f"link{i}.txt").symlink_to(name)
    inventory = look_at_texts(tmp_path, ReadOptions(source_code=False))
    links = inventory.left_out["a link to what is read already"]
    assert links.examples == ["link6.txt", "link7.txt", "link8.txt"]
    assert (links.count, inventory.facts["documents"]) == (3, 9)
    assert "exact duplicates left out" not in inventory.facts
    inventory = look_at_texts(tmp_path, ReadOptions(source_code=True))
    assert (inventory.left_out["a link to what is read already"].count, inventory.facts["documents"]) == (4, 9)


def test_what_several_links_lead_to_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    (own / "chats").mkdir(parents=True)
    (own / "chats" / "a.txt").write_text("a chat")
    (tmp_path / "far.txt").write_text("outside")
    (own / "near.bak").write_text("inside")
    for name, target in (("a.bak", "../far.txt"), ("b.txt", "../far.txt"), ("c.txt", "../far.txt")):
        (own / name).symlink_to(target)
    for name, target in (("d.txt", "near.bak"), ("e.txt", "near.bak"), ("f.txt", "chats/a.txt")):
        (own / name).symlink_to(target)
    inventory = look_at_texts(own, ReadOptions(chat_data=str(own / "chats")))
    assert (inventory.read, inventory.facts["documents"]) == ({"txt": 2}, 2)
    assert "exact duplicates left out" not in inventory.facts
    assert inventory.left_out["a link to what is read already"].examples == ["c.txt", "e.txt"]
    assert inventory.left_out["given as CHAT_DATA"].kinds == {"folder": 1, "file": 1}


def test_what_can_not_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "secret").mkdir()
    scan = os.scandir

    def denied(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(text_walk.os, "scandir", denied)
    assert "1 folder: permission denied (secret)" in look_at_texts(tmp_path).left_out_line()


def test_lfs_pointers_images_and_unknown_kinds(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
    (tmp_path / "book.txt").write_text(pointer)
    assert "git lfs pull" in look_at_texts(tmp_path).stop
    (tmp_path / "notes.txt").write_text("notes " * 100)
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG" + bytes(5000))
    (tmp_path / "table.xlsx").write_bytes(b"PK\3\4")
    (tmp_path / "odd.foo").write_text("text of an unknown kind")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "README").write_text("a name without a suffix")
    inventory = look_at_texts(tmp_path)
    assert inventory.read == {"txt": 1, "no suffix": 1}
    line = inventory.left_out_line()
    for said in ("5 .png: no text", "1 .xlsx: save as .csv", "1 .foo: unknown kind (rename to .txt", "1 .txt: empty"):
        assert said in line


def test_archives_are_read_like_folders(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One\n")
    (tmp_path / "b.py").write_text("code")
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        for name in ("a.md", "b.py"):
            archive.write(tmp_path / name, f"x/{name}")
        archive.writestr("__MACOSX/._a.md", b"\0\5")
        archive.writestr("x/latin.txt", "Äpfel und Öl sind schön".encode("cp1252"))
    with tarfile.open(tmp_path / "pack.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "a.md", "y/other.txt")
    assert read_archive(tmp_path / "pack.zip") == ["# One\n", "Äpfel und Öl sind schön"]
    assert read_archive(tmp_path / "pack.tar.xz") == ["# One\n"]
    (tmp_path / "b.py").unlink()
    inventory = look_at_texts(tmp_path)
    assert "1 .py: source code (SOURCE_CODE=1" in inventory.left_out_line()
    assert inventory.samples == [
        "(a.md) # One\n",
        "(pack.zip) Äpfel und Öl sind schön",
    ]  # one of every kind, none twice
    (tmp_path / "bad.zip").write_bytes((tmp_path / "pack.zip").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"bad\.zip can't be unpacked"):
        read_archive(tmp_path / "bad.zip")


def test_archives_in_archives_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("innermost")
    with tarfile.open(tmp_path / "inner.tgz", "w:gz") as tar:
        tar.add(tmp_path / "a.txt", "a.txt")
    for name, inner in (("middle.zip", "inner.tgz"), ("outer.zip", "middle.zip")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / inner, inner)
            archive.writestr("b.txt", f"beside {inner}")
    assert read_archive(tmp_path / "outer.zip") == ["innermost", "beside inner.tgz", "beside middle.zip"]
    (tmp_path / "middle.zip").write_bytes((tmp_path / "middle.zip").read_bytes()[:-30])
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.write(tmp_path / "middle.zip", "middle.zip")
    with pytest.raises(ValueError, match=r"bad\.zip, middle\.zip can't be unpacked"):
        read_archive(tmp_path / "bad.zip")


IN_FOLDERS = ("x/node_modules/a.txt", "x/c.doc", "x/d.XLSX", "e.foo", "venv.txt", "files.txt", "README", "LICENSE.1")


def test_archives_are_judged_like_folders(tmp_path: Path) -> None:
    for name in IN_FOLDERS:
        file = tmp_path / "one" / "folder" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"text of {name}")
    (tmp_path / "one" / "folder" / "data.bin").write_bytes(bytes(40))
    (tmp_path / "one" / "folder" / "tar").write_bytes(bytes(40))
    two = tmp_path / "two"
    two.mkdir()
    with zipfile.ZipFile(two / "a.zip", "w") as archive:
        for file in sorted((tmp_path / "one").rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(tmp_path / "one"))
    folder, packed = look_at_texts(tmp_path / "one"), look_at_texts(two)
    assert packed.facts == folder.facts
    assert packed.facts["documents"] == 4
    assert packed.read == {"zip": 0, **{f"{kind} in zip": count for kind, count in folder.read.items()}}
    assert packed.num_bytes == folder.num_bytes
    line = packed.left_out_line()
    assert line == folder.left_out_line().replace("folder/", "a.zip/folder/").replace("1 folder: of", "1 file: of")
    for said in (
        "1 .doc: save as .docx or .txt (a.zip/folder/x/c.doc)",
        "1 .xlsx: save as .csv",
        "1 .foo: unknown kind",
    ):
        assert said in line
    assert not packed.stop
    with zipfile.ZipFile(two / "a.zip", "a") as archive:
        archive.writestr("g.ppt", "slides" * 20)
    stop = look_at_texts(two).stop
    assert "more is left out than read (4 files" in stop
    with pytest.raises(UnusableInputError, match="more is left out than read"):
        import_path(two)


def test_an_archive_beside_files_to_convert_counts_with_its_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"{i}.txt", f"text {i} " * 200)
        archive.writestr("x\\VENV\\b.txt", "of a tool")
    for i in range(3):
        (tmp_path / f"{i}.doc").write_text("old " * 100)
    assert len(all_documents(import_path(tmp_path))) == 4
    assert look_at_texts(tmp_path).left_out["of a tool, no texts"].examples == ["a.zip/x\\VENV\\b.txt"]


def test_links_in_archives_are_told_and_their_targets_no_texts(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("x/link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16  # as `zip -y` writes it: its content is the path
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "../a.txt")
        archive.writestr("a.txt", "a text")
    for kind, name in ((tarfile.SYMTYPE, "b.tar"), (tarfile.LNKTYPE, "c.tar")):
        entry = tarfile.TarInfo("y/link.txt")
        entry.type, entry.linkname = kind, "a.txt"
        with tarfile.open(tmp_path / name, "w") as tar:
            tar.add(__file__, "y/a.txt")
            tar.addfile(entry)
    inventory = look_at_texts(tmp_path)
    assert inventory.read | {"zip": 0, "tar": 0} == {"zip": 0, "tar": 0, "txt in zip": 1, "txt in tar": 2}
    assert inventory.left_out[LINK_INSIDE].kinds == {"file": 3}
    assert "../a.txt" not in inventory.samples


def test_documents_in_a_tar_are_read(tmp_path: Path) -> None:
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    runs = "<w:p><w:r><w:t>From Word.</w:t></w:r></w:p>"
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("word/document.xml", f"<w:document {word}><w:body>{runs}</w:body></w:document>")
    (tmp_path / "b.eml").write_text("Subject: Hi\n\nFrom a mail.\n")
    (tmp_path / "c.mbox").write_text("From x\nSubject: One\n\nfirst\n\nFrom x\nSubject: Two\n\nsecond\n")
    with tarfile.open(tmp_path / "d.tar.gz", "w:gz") as tar:
        for name in ("a.docx", "b.eml", "c.mbox"):
            tar.add(tmp_path / name, name)
    expected = ["From Word.", "Hi\n\nFrom a mail.\n", "One\n\nfirst\n\n", "Two\n\nsecond\n"]
    assert read_archive(tmp_path / "d.tar.gz") == expected
    (tmp_path / "e.docx.xz").write_bytes(lzma.compress((tmp_path / "a.docx").read_bytes()))
    assert read(tmp_path / "e.docx.xz") == ["From Word."]


def test_what_unpacks_to_more_than_is_held_is_left_out_and_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail = b"Subject: Hi\n\nHello there.\n"
    (tmp_path / "a.eml.gz").write_bytes(gzip.compress(mail))
    (tmp_path / "b.eml.gz").write_bytes(gzip.compress(mail + b"More.\n"))
    (tmp_path / "c.mbox.gz").write_bytes(gzip.compress(b"From x\n" + mail + b"\nFrom x\nSubject: Two\n\nLast.\n"))
    monkeypatch.setattr(text_files, "MAX_BINARY_BYTES", len(mail))
    inventory = look_at_texts(tmp_path)
    assert inventory.left_out["more than 26 bytes when unpacked (unpack it)"].examples == ["b.eml.gz"]
    assert inventory.facts["documents"] == 3  # a mailbox is read however long it is
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    with zipfile.ZipFile(tmp_path / "d.docx", "w") as file:
        file.writestr("word/document.xml", f"<w:document {word}><w:body/></w:document>" + " " * 1000)
    monkeypatch.setattr(documents, "MAX_PART_BYTES", 1000)
    assert "1 file: more than 1.0 kB in one part (save as .txt) (d.docx)" in look_at_texts(tmp_path).left_out_line()


def read_archive(file: Path) -> list[str]:
    """What is read of an archive."""
    return [text for _, text in TextReader(ReadOptions(), Inventory("test")).read(file_of(file))]


def test_what_holds_no_text_is_told_as_it_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [["one"], ["two"]]}), tmp_path / "a.parquet")
    assert "a.parquet has no column of text, only others (text): save" in look_at_texts(tmp_path).stop
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(UnusableInputError, match="there is no text in it"):
        check_inventories([look_at_texts(tmp_path)])
    for name, table in (("columns", {"text": {"0": "one", "1": "two"}}), ("index", {"0": {"text": "one"}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    (tmp_path / "split.json").write_text(json.dumps({"columns": ["id", "text"], "data": [[1, "one"], [2, "three"]]}))
    assert [read(tmp_path / f"{name}.json") for name in ("columns", "index", "split")] == [
        ["one", "two"],
        ["one"],
        ["one", "three"],
    ]
    (tmp_path / "a.log").write_text("\x1b[31mERROR\x1b[0m no such ship\n" * 20)
    assert "full of colours of a terminal" in "".join(look_at_texts(tmp_path).warnings)


def test_an_index_of_pandas_strings_and_one_long_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = "".join(f'{i},"{SENTENCE}, {i}"\n' for i in range(4))
    (tmp_path / "a.csv").write_text(f",0\n{rows}")
    assert read(tmp_path / "a.csv") == [f"{SENTENCE}, {i}" for i in range(4)]
    (tmp_path / "b.json").write_text(json.dumps([SENTENCE, f"{SENTENCE} Two."]))
    (tmp_path / "c.json").write_text(json.dumps({"text": f"{SENTENCE} " * 400}))
    (tmp_path / "d.txt").write_text(f"{SENTENCE}It rained until the evening, and nobody went out.")
    for name in ("b.json", "c.json", "d.txt"):  # data_check says what a run does
        run_script(data_check.main, data_check.Config, [str(tmp_path / name)])
        assert len(all_documents(import_path(tmp_path / name))) == 2
        assert "documents: " in capsys.readouterr().out


def test_tables_of_lists_and_records_deep_in_a_file(tmp_path: Path) -> None:
    texts = [f"{SENTENCE} {i}" for i in range(3)]
    columns, records = {"id": [0, 1, 2], "text": texts}, [{"text": text} for text in texts]
    deep = {"answer": {"count": 3, "rows": records, "links": {"next": "/2"}}}
    titles = [{"title": "T", "paragraphs": [{"context": text, "qas": []} for text in texts]}]
    for whole, wanted in (
        (columns, None),
        (columns, "text"),
        ({"data": columns}, None),
        (deep, None),
        ({"a": titles}, "context"),
    ):
        (tmp_path / "a.json").write_text(json.dumps(whole))
        assert read(tmp_path / "a.json", wanted) == texts
    (tmp_path / "a.json").write_text(json.dumps({"summary": SENTENCE * 9, "set": {"items": records}}))
    assert read(tmp_path / "a.json") == [SENTENCE * 9]
    for other in ({"a": records, "b": records}, {"a": titles}):  # which of them is the text?
        (tmp_path / "a.json").write_text(json.dumps(other))
        with pytest.raises(AssertionError, match="TEXT_COLUMN names it"):
            read(tmp_path / "a.json")


def test_an_export_of_chats_is_not_refused_as_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = {"chat_messages": [{"sender": "human", "text": "Hi"}, {"sender": "assistant", "text": "Hello!"}]}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in (("conversations", [chat, chat]), ("users", [{"uuid": "1"}]), ("projects", [])):
            archive.writestr(f"{name}.json", json.dumps(content))
    run_script(data_check.main, data_check.Config, [str(tmp_path / "a.zip")])
    assert "2 conversations (2 claude export)" in capsys.readouterr().out


# --- books and other documents ----------------------------------------------------------------------------------------


def test_books_and_office_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as book:
        root = '<container><rootfiles xmlns="urn:c"><rootfile full-path="O/b.opf"/></rootfiles></container>'
        book.writestr("META-INF/container.xml", root)
        items = "".join(f'<item id="{i}" href="c{i}.xhtml"/>' for i in (2, 1))
        spine = '<spine><itemref idref="1"/><itemref idref="2"/></spine>'
        book.writestr("O/b.opf", f'<package xmlns="urn:p"><manifest>{items}</manifest>{spine}</package>')
        for i in (1, 2):
            book.writestr(f"O/c{i}.xhtml", f"<html><head><title>t</title></head><body><p>chapter {i}</p></body></html>")
    assert read(tmp_path / "a.epub") == ["chapter 1", "chapter 2"]
    word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as file:
        runs = (
            "<w:p><w:r><w:t>First </w:t></w:r><w:r><w:t>line</w:t></w:r></w:p><w:p><w:r><w:t>Second</w:t></w:r></w:p>"
        )
        file.writestr("word/document.xml", f"<w:document {word}><w:body>{runs}</w:body></w:document>")
    assert read(tmp_path / "a.docx") == ["First line\n\nSecond"]
    name = "urn:oasis:names:tc:opendocument:xmlns:text:1.0"
    with zipfile.ZipFile(tmp_path / "a.odt", "w") as file:
        body = "<t:h>Title</t:h><t:p>one<t:s t:c='2'/>two</t:p>"
        file.writestr("content.xml", f"<o:d xmlns:o='urn:o' xmlns:t='{name}'>{body}</o:d>")
    assert read(tmp_path / "a.odt") == ["Title\n\none  two"]
    (tmp_path / "b.docx").write_bytes(b"\xd0\xcf\x11\xe0 old or protected")
    (tmp_path / "c.epub").write_bytes(b"no zip")
    line = look_at_texts(tmp_path).left_out_line()
    assert "save it as .docx" in line
    assert "damaged" in line


def test_pdf_and_its_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pypdf = pytest.importorskip("pypdf", reason="the library for PDF is not installed")
    stream = b"BT /F1 12 Tf 72 700 Td (Text of a page) Tj ET"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    content, table = b"%PDF-1.4\n", b"xref\n0 6\n0000000000 65535 f \n"
    for i, body in enumerate(objects):
        table += b"%010d 00000 n \n" % len(content)
        content += b"%d 0 obj\n%s\nendobj\n" % (i + 1, body)
    end = b"trailer<</Root 1 0 R/Size 6>>\nstartxref\n%d\n%%%%EOF" % len(content)
    (tmp_path / "a.pdf").write_bytes(content + table + end)
    assert [text.strip() for text in read(tmp_path / "a.pdf")] == ["Text of a page"]
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "scan.pdf")
    assert "1 file: a scan without text (run OCR" in look_at_texts(tmp_path).left_out_line()
    monkeypatch.setattr(text_walk, "missing_library", lambda kind: "pypdf")
    assert "[documents]" in look_at_texts(tmp_path).stop


def test_notebooks_subtitles_and_mails(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "x = 1", "outputs": [1]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    assert read(tmp_path / "a.ipynb") == ["# Title\nwords\n\n```python\nx = 1\n```\n"]
    (tmp_path / "a.srt").write_text(
        "1\n00:00:01,000 --> 00:00:02,000\n<i>Hello</i>\n\n2\n00:00:03,000 --> 00:00:04,000\nthere\n"
    )
    assert read(tmp_path / "a.srt") == ["Hello\nthere\n"]
    time = "00:00:01,000 --> 00:00:02,000"
    (tmp_path / "b.srt").write_text(f"1\n{time}\n{{\\an8}}<font color=red>5 < 6</font> and 7 > 3<00:01.5>\n")
    assert read(tmp_path / "b.srt") == ["5 < 6 and 7 > 3\n"]
    (tmp_path / "c.sbv").write_text("0:00:01.000,0:00:03.000\nHello\n\n0:00:04.000,0:00:05.000\nthere\n")
    ass = "[Events]\nFormat: Layer, Start, Text\n" + "Dialogue: 0,0:00:01.00,0:00:02.00,A,,0,0,0,,{\\i1}Hello\\Nthere\n"
    (tmp_path / "d.ass").write_text(f"[Script Info]\nTitle: T\n\n{ass}")
    (tmp_path / "e.lrc").write_text("[ar:Somebody]\n[00:01.00][00:09.00]Hello\n[00:02]there\n")
    (tmp_path / "f.srt").write_text(f"1\n{time}\n[man: low] Come in.\n[10:30] is the time\n")
    assert read(tmp_path / "f.srt") == ["[man: low] Come in.\n[10:30] is the time\n"]
    drawn = "Dialogue: 0,0:00:03.00,0:00:04.00,A,,0,0,0,,{\\p1}m 0 0 l 100 0{\\p0}\n\n"
    (tmp_path / "g.ass").write_text(f"[Events]\n{drawn}{ass.splitlines()[-1]}\n")
    for name in ("c.sbv", "d.ass", "e.lrc", "g.ass"):
        assert read(tmp_path / name) == ["Hello\nthere\n"]
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\n\nNOTE x\n\n00:01.000 --> 00:02.000 align:start\nHi\n\n00:02.000 --> 00:03.000\nHi\n"
    )
    assert read(tmp_path / "a.vtt") == ["Hi\n"]
    mail = email.message.EmailMessage()
    mail["Subject"] = "Grüße"
    mail.set_content("Körper\n")
    (tmp_path / "a.eml").write_bytes(mail.as_bytes())
    assert read(tmp_path / "a.eml") == ["Grüße\n\nKörper\n"]


def test_a_mailbox_is_read_mail_by_mail(tmp_path: Path) -> None:
    mails = []
    for i, text in enumerate(["Dear Bob,\n\n>From here it looks fine.\n", "Only <b>one</b> line, grüße.\n", ""]):
        mail = email.message.EmailMessage()
        mail["Subject"], mail["From"] = f"Letter {i}", "ann@example.org"
        mail.set_content(text, subtype="html" if "<b>" in text else "plain")
        mail.add_attachment(b"\0\1" * 500, maintype="image", subtype="png")
        mails.append(b"From ann@example.org Mon Jan  1 10:00:00 2024\n" + mail.as_bytes() + b"\n")
    (tmp_path / "all.mbox").write_bytes(b"".join(mails))
    (tmp_path / "Inbox").write_bytes(mails[0])  # as Thunderbird calls it
    found = read(tmp_path / "all.mbox")
    assert [text.strip() for text in found] == [
        "Letter 0\n\nDear Bob,\n\nFrom here it looks fine.",
        "Letter 1\n\nOnly one line, grüße.",
        "",
    ]
    inventory = look_at_texts(tmp_path)
    assert inventory.read == {"mbox": 1, "no suffix": 1}
    assert (inventory.facts["documents"], inventory.facts["blank documents left out"]) == (2, 1)


def test_letters_that_were_encoded_twice_are_mended_where_that_is_sure(tmp_path: Path) -> None:
    german = "Die Straße – „wirklich“ schön. Größe, Maß, Café, 5 €.\n" * 9
    twice = "".join(
        letter if letter.isascii() else bytes([byte]).decode("cp1252", "ignore") or chr(byte)
        for letter in german
        for byte in letter.encode()
    )
    (tmp_path / "twice.txt").write_text(twice, encoding="utf-8")
    (tmp_path / "thrice.txt").write_text(twice.encode().decode("latin-1"), encoding="utf-8")
    assert read(tmp_path / "twice.txt") == read(tmp_path / "thrice.txt") == [german]
    spaced = "10\u00a0€ und Ánimo\n"  # a no-break space, and a byte that Windows-1252 does not have
    (tmp_path / "spaced.txt").write_text(spaced.encode().decode("latin-1").encode().decode("latin-1"), encoding="utf-8")
    assert read(tmp_path / "spaced.txt") == [spaced]
    (tmp_path / "spaced.txt").unlink()
    kept = {
        "right.txt": german + "NÃO, SÃO PAULO, Â, 中文, naïve\n",
        "brand.txt": "The CAFÉ™ is open.\n",
        "control.txt": "a pad Â\x80 b, a pad Â\x80 b, a pad Â\x80 b\n",
        "quoted.txt": "Wer ‚StraÃŸe‘ schreibt, meint Straße.\n",
        "mixed.txt": twice + "Ölmühle\n",
    }
    for name, text in kept.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert read(tmp_path / name) == [text]
    notes = "\n".join(look_at_texts(tmp_path).notes)
    assert (
        f"letters that were encoded twice, mended: thrice.txt ({sum(not c.isascii() for c in german)}), twice" in notes
    )
    assert "left as it is: control.txt (3), mixed.txt (" in notes  # letters that only a computer would mean
    assert "right.txt" not in notes


def test_menus_and_footers_of_a_page_are_left_out_and_counted(tmp_path: Path) -> None:
    around = "<header>Logo</header><nav><ul><li>Home<li>Contact</ul></nav>"
    page = f"<body>{around}<main><article><header><h1>Title</h1></header><p>Text.</p></article></main>"
    (tmp_path / "a.html").write_text(f"{page}<aside>More</aside><footer>Imprint</footer><script>x</script></body>")
    (tmp_path / "all_nav.html").write_text("<body><nav>Only a list of names</nav></body>")
    (tmp_path / "open.html").write_text("<body><nav><p>A menu that never ends.<p>And the text after it.")
    assert read(tmp_path / "a.html") == ["Title\n\nText."]
    assert read(tmp_path / "all_nav.html") == ["Only a list of names"]
    assert "And the text after it." in read(tmp_path / "open.html")[0]
    notes = look_at_texts(tmp_path).notes
    assert notes == ["menus, headers, footers, banners and asides left out: a.html (26 characters)"]


def test_json_of_every_shape(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for value, expected in (
        ({"title": "t", "text": "one"}, ["one"]),
        ([{"id": 1, "content": "one"}, {"id": 2, "content": "two"}], ["one", "two"]),
        (["one", "two"], ["one", "two"]),
        ({"data": [{"text": "one"}, {"text": None}]}, ["one", ""]),
        ([{"name": "x", "what": SENTENCE}, {"name": "y", "what": SENTENCE * 2}], [SENTENCE, SENTENCE * 2]),
    ):
        for indent in (None, 2):
            file.write_text(json.dumps(value, indent=indent))
            assert read(file) == expected
    file.write_text('{"text": "a"}\n{"text": "b"}\n')  # JSON lines under another name
    assert read(file) == ["a", "b"]
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json, line 1: nested too deeply"):
        read(file)
    file.write_text('[{"text": "a"}, {"text": ')
    with pytest.raises(ValueError, match=r"a\.json, item 2: not valid JSON"):
        read(file)
    (tmp_path / "b.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "hi"}]}]))
    file.write_text('"fine"')
    assert (
        "1 file: conversations, not texts (give them as CHAT_DATA) (b.json)" in look_at_texts(tmp_path).left_out_line()
    )


def test_a_json_file_of_one_long_line_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.data.json_stream.BLOCK", 64)
    texts = [f'text {i} with [brackets], {{braces}} and "quotes" {"x" * (i % 200)}' for i in range(300)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text, "n": 12} for text in texts]))
    assert read(tmp_path / "a.json") == texts


# --- tables -----------------------------------------------------------------------------------------------------------


def test_tables_with_stray_quotation_marks(tmp_path: Path) -> None:
    rows = ['"Hello, he said.', "next row", 'another "quoted" row', '"Bye" she said', '"last row', "end"]
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{row}\n" for i, row in enumerate(rows)))
    assert read(tmp_path / "a.tsv") == rows
    lines = ['"open quote never closed', *(f"row {i}" for i in range(20))]
    (tmp_path / "b.csv").write_text("text\n" + "\n".join(lines) + "\n")
    assert read(tmp_path / "b.csv") == lines


@pytest.mark.parametrize(
    "content",
    [
        "id,text\n" + "".join(f"{i},fine row\n" for i in range(600)) + '600,"open\n' + "601,x\n" * 5,
        "id,text\n" + "".join(f"{i},fine row\n" for i in range(600)) + '600,"open\n601,lost\n602,also lost"\n603,x\n',
        "id,text\n1,fine\n2,too,many\n",
    ],
)
def test_rows_that_would_be_joined_are_refused_with_their_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=r"a\.csv, line (602|3): "):
        read(tmp_path / "a.csv")


def test_texts_with_line_breaks_and_commas_are_no_swallowed_rows(tmp_path: Path) -> None:
    text = "Dear Ann,\nthank you, and see you soon,\nBob"
    (tmp_path / "a.csv").write_text("id,text,n\n" + "".join(f'{i},"{text}",7\n' for i in range(20)))
    assert read(tmp_path / "a.csv") == [text] * 20
    (tmp_path / "b.csv").write_text("id|text\n1|a, b\n2|c\n")
    assert read(tmp_path / "b.csv") == ["a, b", "c"]
    (tmp_path / "c.csv").write_text('id,text\n1,"say \\"hi\\", then go"\n2,x\n')
    assert read(tmp_path / "c.csv") == ['say "hi", then go', "x"]
    (tmp_path / "d.csv").write_text("sep=;\nid;text\n1;a, b\n2;c\n")  # as Excel is told what is between the fields
    assert read(tmp_path / "d.csv") == ["a, b", "c"]
    (tmp_path / "e.csv").write_text("sep=value is how\nit goes on\nand on\n")
    assert read(tmp_path / "e.csv") == ["sep=value is how", "it goes on", "and on"]
    (tmp_path / "d.csv").write_text("sep=;\nid;text\n1;a, b\n2;c;d\n")
    with pytest.raises(ValueError, match=r"d\.csv, line 4: 3 fields, but the first line has 2"):
        read(tmp_path / "d.csv")


def test_a_table_of_conversations_is_no_text(tmp_path: Path) -> None:
    said = pa.array([[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]] * 4)
    pq.write_table(
        pa.table({"prompt": [SENTENCE * 3] * 4, "prompt_id": ["x"] * 4, "messages": said}), tmp_path / "a.parquet"
    )
    (tmp_path / "b.csv").write_text("Question,Answer\n" + f"Why?,{SENTENCE * 3}\n" * 4)
    inventory = look_at_texts(tmp_path)
    assert inventory.left_out_line() == f"2 files: {CHATS} (a.parquet, b.csv)"
    assert "give them as CHAT_DATA" in inventory.stop
    assert read(tmp_path / "b.csv", "Answer") == [SENTENCE * 3] * 4  # who asks for a column gets it
    (tmp_path / "c.csv").write_text("question,answer,Text\n" + f"Why?,So,{SENTENCE}\n" * 4)
    assert read(tmp_path / "c.csv") == [SENTENCE] * 4


def test_names_that_say_something_else_than_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_text("Größe, unpacked by the browser")
    (tmp_path / "b.jsonl").write_text('[\n{"text": "one"},\n{"text": "two"}\n]\n')
    (tmp_path / "c.ndjson").write_text('[{"text": "three"},\n{"text": "four"}]\n')
    (tmp_path / "d.jsonl").write_text('{\n "text": "five"\n}\n{\n "text": "six"\n}\n')
    (tmp_path / "e.jsonl").write_text('["seven"]\n["eight"]\n')  # one value a line, as it should be
    assert read(tmp_path / "a.txt.gz") == ["Größe, unpacked by the browser"]
    for name, texts in (("b.jsonl", ["one", "two"]), ("c.ndjson", ["three", "four"]), ("d.jsonl", ["five", "six"])):
        assert read(tmp_path / name) == texts
    assert read(tmp_path / "e.jsonl") == ["seven", "eight"]
    with tarfile.open(tmp_path / "f.tar.gz", "w:") as tar:  # without gz
        tar.add(tmp_path / "e.jsonl", "e.jsonl")
    assert read_archive(tmp_path / "f.tar.gz") == ["seven", "eight"]
    (tmp_path / "h.tar.bz2").write_bytes(bz2.compress((tmp_path / "f.tar.gz").read_bytes(), 1))
    assert read_archive(tmp_path / "h.tar.bz2") == ["seven", "eight"]
    with zipfile.ZipFile(tmp_path / "g.txt.gz", "w") as archive:
        archive.writestr("a.txt", "nine")
    said = "\n".join(look_at_texts(tmp_path).lines())
    assert ".zip by its content (rename it, or unpack it) (g.txt.gz)" in said
    assert "not packed, in spite of .gz in its name: a.txt.gz" in said
    assert "one JSON value over many lines, not one a line: b.jsonl, c.ndjson, d.jsonl" in said


def test_headers_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"First sentence of my corpus"\n"Second sentence"\n"Third sentence"\n')
    assert read(tmp_path / "a.csv") == ["First sentence of my corpus", "Second sentence", "Third sentence"]
    (tmp_path / "b.csv").write_text("review\n" + (SENTENCE + "\n") * 3)
    assert read(tmp_path / "b.csv") == [SENTENCE] * 3
    (tmp_path / "c.csv").write_text(f"1,{SENTENCE},good\n2,{SENTENCE},bad\n")
    assert read(tmp_path / "c.csv") == [SENTENCE] * 2
    (tmp_path / "d.csv").write_text("who,what\nann,tea\nbob,rum\n")
    with pytest.raises(ValueError, match="TEXT_COLUMN"):
        read(tmp_path / "d.csv")
    assert read(tmp_path / "d.csv", "what") == read(tmp_path / "d.csv", "2") == ["tea", "rum"]


# --- html and long texts ----------------------------------------------------------------------------------------------


def test_html_keeps_lines_of_code_and_survives_open_tags(tmp_path: Path) -> None:
    code = "def f():\n    if x:\n        return 1"
    (tmp_path / "a.html").write_text(f"<h1>Head</h1><p>a  b</p><pre>\n{code}\n</pre><p>End</p>")
    assert read(tmp_path / "a.html") == [f"Head\n\na b\n\n{code}\n\nEnd"]
    for tag in ("noscript", "style", "script", "template"):
        (tmp_path / "b.html").write_text(f"<body><p>one</p><{tag}><p>two</p><p>three</p></body>")
        (text,) = read(tmp_path / "b.html")
        assert text.split() == ["one", "two", "three"], tag
    (tmp_path / "c.html").write_text("<p>one<noscript>enable js</noscript><style>p{}</style><p>two")
    assert read(tmp_path / "c.html") == ["one\n\ntwo"]


@pytest.mark.parametrize("kind", ["txt", "html", "json", "csv", "docx"])
def test_long_texts_without_blank_lines_are_cut_at_sentences(tmp_path: Path, kind: str) -> None:
    text = "".join(f"{i}. {SENTENCE}" for i in range(1800)).strip()
    if kind == "docx":
        word = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
        with zipfile.ZipFile(tmp_path / "a.docx", "w") as file:
            file.writestr("word/document.xml", f"<w:d {word}><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:d>")
    else:
        forms = {"txt": text, "html": f"<p>{text}</p>", "json": json.dumps({"text": text}), "csv": f'text\n"{text}"\n'}
        (tmp_path / f"a.{kind}").write_text(forms[kind])
    documents = read(tmp_path / f"a.{kind}")
    assert "".join(documents) == text
    assert all(4_000 <= len(document) <= 10_000 for document in documents[:-1])
    assert all(document.endswith(". ") for document in documents[:-1])


def test_a_pipeline_stops_before_its_first_stage_when_there_is_too_little(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too short to be cut in two")
    settings = Settings(data_dir=tmp_path)
    with pytest.raises(UnusableInputError, match="at least two are needed"):
        look_at_inputs(choose_profile(replace(settings, chat_data="demo"), 0), settings)
    (tmp_path / "b.txt").write_text("another short text")
    (inventory,) = look_at_inputs(choose_profile(replace(settings, chat_data="demo"), 0), settings)
    assert inventory.facts["documents"] == 2


def test_one_text_alone_gives_two_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCE * 40)
    corpus = open_corpus(import_path(tmp_path / "a.txt"))
    (train,), (val,) = list(corpus.documents("train")), list(corpus.documents("val"))
    assert train + val == SENTENCE * 40
    assert len(train) > 5 * len(val)


def test_an_exported_chat_is_cut_between_days(tmp_path: Path) -> None:
    days = [f"{d:02d}/03/2025, 1{i}:30 - Ann: are you coming tonight?\n" for d in range(1, 29) for i in range(9)]
    (tmp_path / "WhatsApp Chat with Ann.txt").write_text("".join(days))
    documents = read(tmp_path / "WhatsApp Chat with Ann.txt")
    assert len(documents) > 2
    assert "".join(documents) == "".join(days)
    assert all("1" + str(0) + ":30" in document.splitlines()[0] for document in documents)  # each begins with a morning


# --- imports and the command ------------------------------------------------------------------------------------------


def test_a_changed_folder_replaces_its_import(tmp_path: Path, base_dir: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.txt").write_text(SENTENCE * 20)
    first = import_path(own)
    stat = (own / "a.txt").stat()
    (own / "a.txt").write_text((SENTENCE * 20).replace("cat", "dog"))
    os.utime(own / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: told by its content
    second = import_path(own)
    assert second != first
    assert not first.exists()
    assert second.exists()


def test_a_changed_input_changes_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = tmp_path / "chats.json"
    chats.write_text("[1]")
    before = fingerprint(chats)
    chats.write_text("[2]")
    assert fingerprint(chats) != before
    current = chats_identity(str(chats))
    monkeypatch.setattr(stages, "CHATS_VERSION", 0)  # the readers are other ones
    assert chats_identity(str(chats)) != current
    own = tmp_path / "own"
    (own / "sub").mkdir(parents=True)
    prints = set()
    for name, text in (("a.docx", "one"), ("a.docx", "two"), ("sub/a.docx", "two"), ("b.epub", "three")):
        (own / name).write_text(text)
        prints.add(texts_fingerprint(own))
    (own / "photo.png").write_bytes(b"\x89PNG")  # not read: nothing changes
    assert texts_fingerprint(own) in prints
    assert len(prints) == 4


def test_data_check_prints_what_a_run_would_and_stops_like_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("Привет, мир! Это текст на русском языке. " * 2, encoding="cp1251")
    with pytest.raises(SystemExit) as stop:
        run_script(data_check.main, data_check.Config, [str(tmp_path)])
    assert stop.value.code == 2
    assert "a single short document is too little" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text("Второй текст, тоже на русском языке. " * 5, encoding="cp1251")
    run_script(data_check.main, data_check.Config, [str(tmp_path), "--show", "1"])
    said = capsys.readouterr().out
    for part in (
        "2 txt",
        "documents: 2",
        "script: Cyrillic 100%",
        "read as cp1251 (guessed",
        "sample: (a.txt) Привет, мир!",
    ):
        assert part in said
    for i in range(5):
        (tmp_path / f"{i}.py").write_text("code")
    with pytest.raises(SystemExit) as stop:
        run_script(data_check.main, data_check.Config, [str(tmp_path)])
    assert stop.value.code == 2
    assert "5 .py: source code (SOURCE_CODE=1" in capsys.readouterr().out


def test_prompts_come_from_a_corpus_that_is_not_english() -> None:
    german = "Die Katze saß auf der Matte und sah lange in den Regen, der nicht aufhören wollte."
    assert own_prompts([german, "# Der Hund\nschläft."], 7) == ("Die Katze saß auf der", "Der Hund")
    assert own_prompts(["昨天早上我们一家人去了乡下的老房子，因为天气很好。"], 7) == ("昨天早上我们一家人去了乡",)
    assert own_prompts([SENTENCE * 3], 7) == ()
    stage = Stage(name="answer", about="", module="m", flags=("-p", QUESTION))
    assert ask_instead(stage, "Die Katze").flags == ("-p", "Die Katze")
    advice = language_advice(choose_profile(Settings(data_dir=Path("/texts")), 0))
    assert "the demo's English chats" in advice[0]
    assert "CHAT_DATA=none" in advice[0]


def test_copies_are_listed_and_forgotten(
    tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, secret = tmp_path / "own", "my secret diary"
    own.mkdir()
    (own / "a.txt").write_text(f"{secret}. {SENTENCE * 9}")
    import_path(own)
    for name in (
        "pipeline/base_train.log",
        "report/base.md",
        "report/_header.json",
        "token_cache/x/y",
        "chat_history",
        "tokenizer/t.json",
    ):
        (base_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (base_dir / name).write_text(secret)
    (base_dir / "base_checkpoints" / "d1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.md").write_text(f"# nanochat training report\n{secret}")
    run_script(data_check.main, data_check.Config, ["--copies"])
    said = capsys.readouterr().out
    for part in (f"all texts of {own}", "base_train.log", "base.md", "token_cache", "report.md", "tokenizer"):
        assert part in said
    run_script(data_check.main, data_check.Config, ["--forget"])
    assert "kept, because they are models" in capsys.readouterr().out
    left = [file for file in base_dir.rglob("*") if file.is_file()]
    assert {file.name for file in left} == {"_header.json", "t.json"}
    assert (base_dir / "base_checkpoints" / "d1").is_dir()
    assert not (tmp_path / "report.md").exists()
    assert (own / "a.txt").exists()


# --- what strangers bring ---------------------------------------------------------------------------------------------


def word_file(path: Path, body: str, **parts: str) -> Path:
    """A Word file with this body, and parts such as footnotes."""
    head = '<w:{0} xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">{1}</w:{0}>'
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", head.format("document", f"<w:body>{body}</w:body>"))
        for name, text in parts.items():
            file.writestr(f"word/{name}.xml", head.format(name, text))
    return path


def test_word_files_have_tables_footnotes_and_tracked_changes(tmp_path: Path) -> None:
    def run(text: str) -> str:
        return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'

    changed = f"{run('Kept ')}<w:ins>{run('new ')}</w:ins><w:del><w:r><w:delText>old</w:delText></w:r></w:del>"
    moved = f"<w:moveFrom>{run('gone')}</w:moveFrom>{run('end')}"
    row = "<w:tr>" + "".join(f"<w:tc><w:p>{run(c)}</w:p></w:tc>" for c in "ab") + "</w:tr>"
    held = row.replace("<w:tc>", "<w:sdt><w:sdtContent><w:tc>", 1).replace(
        "</w:tc>", "</w:tc></w:sdtContent></w:sdt>", 1
    )
    held = f"<w:sdt><w:sdtPr/><w:sdtContent>{held}</w:sdtContent></w:sdt>"  # a content control, as forms have them
    body = f"<w:p>{changed}{moved}</w:p><w:tbl>{row}{held}</w:tbl>"
    file = word_file(tmp_path / "a.docx", body, footnotes=f"<w:footnote><w:p>{run('A note.')}</w:p></w:footnote>")
    assert read(file) == ["Kept new end\n\na\tb\na\tb\n\nA note."]
    assert "tracked deletions left out: a.docx (1)" in look_at_texts(file).notes


def test_odt_without_what_was_deleted(tmp_path: Path) -> None:
    deleted = "<t:tracked-changes><t:deletion><t:p>OLD</t:p></t:deletion></t:tracked-changes>"
    note = "<t:note><t:note-citation>1</t:note-citation><t:note-body><t:p>The note.</t:p></t:note-body></t:note>"
    box = "<w:frame xmlns:w='urn:d'><w:text-box><t:p>In a box.</t:p></w:text-box></w:frame>"
    with zipfile.ZipFile(tmp_path / "a.odt", "w") as file:
        name = "urn:oasis:names:tc:opendocument:xmlns:text:1.0"
        file.writestr("content.xml", f"<d xmlns:t='{name}'>{deleted}<t:p>Body{note}{box} goes on.</t:p></d>")
    assert read(tmp_path / "a.odt") == ["Body goes on.\n\nThe note.\n\nIn a box."]
    assert "tracked deletions left out: a.odt (1)" in look_at_texts(tmp_path).notes


def test_books_without_order_or_without_text(tmp_path: Path) -> None:
    for name, page in (("text", "<p>All of it.</p>"), ("pictures", "<img src='p.png'/>")):
        with zipfile.ZipFile(tmp_path / f"{name}.epub", "w") as book:
            book.writestr("META-INF/container.xml", "<c xmlns='urn:c'><rootfile full-path='b.opf'/></c>")
            items = "<item id='n' href='nav.xhtml' properties='nav' media-type='application/xhtml+xml'/>"
            items += "<item id='1' href='c.xhtml' media-type='application/xhtml+xml'/>"
            book.writestr("b.opf", f"<p xmlns='urn:p'><manifest>{items}</manifest><spine/></p>")
            book.writestr("c.xhtml", f"<html><body>{page}</body></html>")
            book.writestr("nav.xhtml", "<html><body>Contents</body></html>")
    assert read(tmp_path / "text.epub") == ["All of it."]
    assert "a book without text (its pages may be images)" in look_at_texts(tmp_path / "pictures.epub").left_out_line()


def test_rtf_and_words_that_a_page_has_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("striprtf", reason="the library for RTF is not installed")
    (tmp_path / "a.rtf").write_bytes(rb"{\rtf1\ansi\ansicpg1252 Gr\'fc\'dfe {\b an alle}\par Zweite Zeile\par}")
    assert read(tmp_path / "a.rtf") == ["Grüße an alle\nZweite Zeile\n"]
    assert documents.whole_words("The of\ufb01ce has exam-\nples, A-\nB and well-known ones.") == (
        "The office has examples, A-\nB and well-known ones."
    )
    assert documents.whole_words("Nord-\nund Süd, Ver-\nunden") == "Nord-\nund Süd, Verunden"
    (tmp_path / "a.rtf").write_bytes(rb"{\rtf1\ansi\ansicpg1252 " + b"Ein Satz. " * 90 + rb"\'81\par}")
    inventory = look_at_texts(tmp_path)
    assert "1 characters were no valid UTF-8 and became U+FFFD" in "".join(inventory.warnings)
    monkeypatch.setattr(documents, "MAX_PART_BYTES", 90)
    assert "RTF of more than" in look_at_texts(tmp_path).left_out_line()


def test_banners_and_menus_in_plain_containers(tmp_path: Path) -> None:
    banner = "<div class='cookie-banner'><div>We use cookies.</div><button>Accept</button></div>"
    menu = "<div role='navigation'><ul><li>Home<li>About</ul></div><div id='left-sidebar'>Links</div>"
    table = "<table><tr><th>name<th>value<tr><td>a<td>1</table>"
    body = f"<div class='content-with-sidebar'><p>{SENTENCE}</p><p>More of it<br>in two lines.</p>{table}</div>"
    (tmp_path / "a.html").write_text(f"<body>{banner}{menu}{body}<div hidden>x</div><div class='footer'>Imprint</div>")
    expected = f"{SENTENCE.strip()}\n\nMore of it\nin two lines.\n\nname\tvalue\na\t1"
    assert read(tmp_path / "a.html") == [expected]
    (tmp_path / "b.html").write_text("<div class='menu'>Soup, fish and a cake for everybody</div><p>Prices</p>")
    assert read(tmp_path / "b.html") == ["Soup, fish and a cake for everybody\n\nPrices"]


def test_files_that_are_not_what_their_name_says(tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text(f"<!DOCTYPE html><html><script>x</script><p>{SENTENCE}</p></html>")
    (tmp_path / "rows.txt").write_text("".join(json.dumps({"text": f"{SENTENCE}{i}"}) + "\n" for i in range(3)))
    (tmp_path / "one.txt").write_text('{"a brace": that is only\na text}\n')
    assert read(tmp_path / "page.txt") == [SENTENCE.strip()]
    assert read(tmp_path / "rows.txt") == [f"{SENTENCE}{i}" for i in range(3)]
    assert read(tmp_path / "one.txt") == ['{"a brace": that is only\na text}\n']
    for name, content in {"pdf": b"%PDF-1.4\n", "gz": b"\x1f\x8b\x08", "rtf": b"{\\rtf1 a"}.items():
        (tmp_path / f"{name}.md").write_bytes(content + b" " * 50)
    left_out = look_at_texts(tmp_path).left_out_line()
    for what in ("a PDF by its content (rename it, or unpack it) (pdf.md)", "a .gz by its", "an .rtf by its content"):
        assert what in left_out
    (tmp_path / "twice.txt.gz.gz").write_bytes(b"\x1f\x8b\x08")
    left_out = look_at_texts(tmp_path).left_out_line()
    assert "packed, and its name does not say it is text (unpack it) (twice.txt.gz.gz)" in left_out


def test_archives_of_a_folder_called_dot_and_locks_of_office(tmp_path: Path) -> None:
    names = {
        "./a.txt": SENTENCE,
        "../b.txt": SENTENCE + "b",
        "./.git/c.txt": "c",
        "./~$d.docx": "lock",
        "e/.f.txt": "f",
    }
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name, text in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    for name in ("~$a.docx", "b.txt~", "#c.txt#", "d.txt.part", "E.JSONL.crdownload"):
        (tmp_path / name).write_text(SENTENCE)
    inventory = look_at_texts(tmp_path)
    assert inventory.facts["documents"] == 2
    assert {reason.partition(" (")[0]: entry.count for reason, entry in inventory.left_out.items()} == {
        "hidden": 4,
        "an editor's copy of a file": 2,
        "a download that did not finish": 2,
    }


def test_what_surrounds_pages_of_wikis_and_project_gutenberg(tmp_path: Path) -> None:
    words = "A harbour is a sheltered body of water that ships come to when the wind rises. " * 4
    (tmp_path / "a.html").write_text(
        f"<body><div id=siteNotice>Donate</div><div class=noprint>From a wiki</div><h2>Old<span class=mw-editsection>"
        f"[edit]</span></h2><p>{words.strip()}<sup class=reference>[1]</sup> End, x<sup>2</sup>.</p>"
        "<div id=catlinks>Cats</div>"
        f"<section class='pg-boilerplate pgfooter'>Licence</section><p><span class=pagenum>[Pg 1]</span>Call me.</p>"
    )
    page = (tmp_path / "a.html").read_text()
    for inside in ("main", "article"):  # a wiki of today has its text in these
        (tmp_path / "b.html").write_text(f"{page.replace('<body>', f'<body><{inside}>')}</{inside}>")
        assert read(tmp_path / "b.html") == read(tmp_path / "a.html")
    assert read(tmp_path / "a.html") == [f"Old\n\n{words.strip()} End, x2.\n\nCall me."]


def test_a_chapter_with_the_number_of_its_entry_is_no_table_of_contents(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        f"<body><div class=toc>1 One</div><div id=toc_container>2</div><section id=toc0><p>{SENTENCE}</p></section>"
        f"<div id=toc-1>{SENTENCE}</div>"
    )
    assert read(tmp_path / "a.html") == [f"{SENTENCE.strip()}\n\n{SENTENCE.strip()}"]


@pytest.mark.parametrize("around", ["license.lcpl", "sinf.xml", "rights.xml", ""])
def test_books_whose_text_is_encrypted_are_named(tmp_path: Path, around: str) -> None:
    for encrypted in ("fonts/f.ttf", "a.xhtml"):
        with zipfile.ZipFile(tmp_path / "a.epub", "w") as file:
            file.writestr("META-INF/container.xml", '<c xmlns="urn:c"><rootfile full-path="c.opf"/></c>')
            items = '<item id="a" href="a.xhtml" media-type="text/html"/>'
            file.writestr("c.opf", f'<p xmlns="urn:p">{items}<itemref idref="a"/></p>')
            file.writestr("a.xhtml", f"<p>{SENTENCE}</p>")
            reference = f'<e:CipherReference xmlns:e="urn:e" URI="{encrypted}"/>'
            file.writestr("META-INF/encryption.xml", f"<encryption>{reference}</encryption>")
            if around:
                file.writestr(f"META-INF/{around}", "<x/>")
        left_out = look_at_texts(tmp_path / "a.epub").left_out
        assert ("protected by DRM" in left_out) == bool(around or encrypted == "a.xhtml")


@pytest.mark.parametrize("listed", ["", "<encryption>", "<encryption><EncryptedKey>"])
def test_a_book_is_read_though_its_list_of_what_is_encrypted_is_damaged(tmp_path: Path, listed: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as file:
        file.writestr("META-INF/container.xml", '<c xmlns="urn:c"><rootfile full-path="c.opf"/></c>')
        items = '<item id="a" href="a.xhtml" media-type="text/html"/>'
        file.writestr("c.opf", f'<p xmlns="urn:p">{items}<itemref idref="a"/></p>')
        file.writestr("a.xhtml", f"<p>{SENTENCE}</p>")
        file.writestr("META-INF/encryption.xml", listed)
    protected = "EncryptedKey" in listed
    assert ("protected by DRM" in look_at_texts(tmp_path / "a.epub").left_out) == protected
    if not protected:
        assert read(tmp_path / "a.epub") == [SENTENCE.strip()]


def test_settings_before_markdown_are_left_out_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(f"---\ntitle: A\ntags: [x]\nlist:\n  - y\n---\n# Title\n{SENTENCE}\n")
    (tmp_path / "b.md").write_text(f"---\n{SENTENCE}\n---\nNo settings.\n")
    assert read(tmp_path / "a.md") == [f"# Title\n{SENTENCE}\n"]
    assert read(tmp_path / "b.md") == [f"---\n{SENTENCE}\n---\nNo settings.\n"]
    assert "settings before the text (front matter) left out: a.md" in look_at_texts(tmp_path).notes


def test_texts_that_are_written_in_escapes_are_warned_of(tmp_path: Path) -> None:
    odd = {"entities": "Gr&uuml;&szlig;e ", "quoted-printable": "Gr=C3=BC=C3=9Fe ", "JSON's": "\\u041f\\u0440 "}
    for name, text in odd.items():
        (tmp_path / "a.txt").write_text(text * 20)
        (tmp_path / "b.txt").write_text(f"{SENTENCE}AT&amp;T, and =C3=BC and \\u0440 once.")
        (warning,) = look_at_texts(tmp_path).warnings
        assert warning.startswith("1 of 2 documents looked at are full of ")
        assert name in warning


def test_a_word_beside_data_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"type": "Feature", "geometry": {"at": list(range(20))}}] * 3))
    (tmp_path / "b.json").write_text(json.dumps([{"mapping": {"a": {}}, "current_node": "a", "title": "t" * 90}] * 3))
    left_out = look_at_texts(tmp_path).left_out
    assert {e.examples[0]: reason[:13] for reason, e in left_out.items()} == {
        "a.json": "no field that",
        "b.json": "conversations",
    }
