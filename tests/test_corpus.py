"""Corpora: which documents are validation, what is waited for, and what is said about bad data."""

import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_hub import write_shard

from nanochat.data import corpus as corpus_module
from nanochat.data.corpus import BadShardError, open_corpus
from nanochat.data.shards import DEMO_STAMP, Entry, Manifest, ShardWriter, find_damage, name_shards, writing
from nanochat.dataloader import PretrainLoader
from nanochat.files import sha256_file, write_json
from nanochat.tokenizer import RustBPETokenizer

BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])


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
        patch.setattr(corpus_module, "BLOCK_ROWS", read)
        train = list(corpus.documents("train"))
        if len(documents) == 1:
            assert train == documents
            with pytest.raises(ValueError, match="at least two documents"):
                corpus.chunks("val")
            return
        val = list(corpus.documents("val"))
        first = corpus.val[0]
        for row in range(first.start, first.stop):  # entered anywhere, it goes on to its end in the same blocks
            assert list(first.read())[-len(list(first.read(row))) :] == list(first.read(row))
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
    with pytest.raises(ValueError, match=r"row group 0 of .*a\.parquet is not a readable parquet"):
        list(corpus.documents("train"))
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(ValueError, match=r"row group 0 of .*b\.parquet"):
        list(corpus.documents("val"))


def test_fingerprint_changes_with_the_shards(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [["a"], ["b"]])
    before = open_corpus(tmp_path).fingerprint
    assert open_corpus(tmp_path).fingerprint == before
    write_shard(tmp_path / "b.parquet", [["c"]])
    assert open_corpus(tmp_path).fingerprint != before


# --- a manifest -------------------------------------------------------------------------------------------------------


def listed(folder: Path, train: list[str], validation: list[str]) -> Manifest:
    """A manifest of these shards, with the sizes of those that are there."""

    def entry(name: str) -> Entry:
        path = folder / name
        return Entry(name, path.stat().st_size if path.exists() else None)

    manifest = Manifest("urls:x", [entry(n) for n in train], [entry(n) for n in validation])
    manifest.save(folder)
    return manifest


def test_the_manifest_decides_the_split_and_the_order(tmp_path: Path) -> None:
    for name in "abc":
        write_shard(tmp_path / f"{name}.parquet", [[name]])
    listed(tmp_path, ["c.parquet", "a.parquet"], ["b.parquet"])
    corpus = open_corpus(tmp_path)
    assert list(corpus.documents("train")) == ["c", "a"]
    assert list(corpus.documents("val")) == ["b"]
    fingerprint = corpus.fingerprint
    (tmp_path / "a.parquet").rename(tmp_path / "away")  # still to come: it is the same corpus
    assert open_corpus(tmp_path).fingerprint == fingerprint


def test_a_shard_of_another_size_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [["a"]])
    write_shard(tmp_path / "b.parquet", [["b"]])
    listed(tmp_path, ["a.parquet"], ["b.parquet"])
    write_shard(tmp_path / "a.parquet", [["another text"]])
    with pytest.raises(BadShardError, match=r"a\.parquet has \d+ bytes, but is listed with"):
        open_corpus(tmp_path)


def test_a_broken_manifest_is_named(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": 2}', '{"version": 1, "train": [{"file": 1}], "validation": []}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json can't be understood"):
            open_corpus(tmp_path)


def test_training_begins_with_what_is_there_and_waits_for_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "val"):
        write_shard(tmp_path / f"{name}.parquet", [[name * 5]])
    listed(tmp_path, ["a.parquet", "b.parquet", "c.parquet"], ["val.parquet"])
    write_shard(tmp_path / "hidden", [["bbbbb"]])
    write_shard(tmp_path / "hidden2", [["ccccc"]])
    corpus = open_corpus(tmp_path)
    with writing(tmp_path):
        loader = PretrainLoader(corpus, BYTES, 1, 5)
        state = loader.state_dict()
        assert next(loader)[0].tolist() == [[256, *b"aaaa"]]
        arrive = threading.Timer(0.3, lambda: [(tmp_path / f).rename(tmp_path / t) for f, t in PAIRS])
        arrive.start()
        assert next(loader)[0].tolist() == [[*b"a", 256, *b"bbb"]]
        arrive.join()
    assert next(loader)[0].tolist() == [[*b"bb", 256, *b"cc"]]
    assert "waiting for b.parquet" in capsys.readouterr().out
    loader.close()
    resumed = PretrainLoader(open_corpus(tmp_path), BYTES, 1, 5, state=state)  # the list is the same: no warning
    assert next(resumed)[0].tolist() == [[256, *b"aaaa"]]
    assert "changed" not in capsys.readouterr().out


PAIRS = (("hidden", "b.parquet"), ("hidden2", "c.parquet"))


def test_a_shard_that_will_not_come_is_an_error_not_a_wait(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [["aaaaa"]])
    listed(tmp_path, ["a.parquet", "b.parquet"], ["val.parquet"])
    loader = PretrainLoader(open_corpus(tmp_path), BYTES, 1, 4)
    next(loader)
    with pytest.raises(FileNotFoundError, match=r"b\.parquet is listed in manifest\.json but is not there"):
        next(loader)
    with pytest.raises(FileNotFoundError, match=r"val\.parquet"):
        open_corpus(tmp_path).chunks("val")


def test_a_loader_that_waits_can_be_closed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [["aaaaa"]])
    listed(tmp_path, ["a.parquet", "b.parquet"], ["a.parquet"])
    with writing(tmp_path):
        loader = PretrainLoader(open_corpus(tmp_path), BYTES, 1, 3)
        next(loader)
        time.sleep(0.3)  # the thread waits for b
        loader.close()


def test_one_listed_shard_is_split_as_if_it_stood_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [[str(i) for i in range(20)]])
    alone = open_corpus(tmp_path)
    listed(tmp_path, ["a.parquet"], [])
    corpus = open_corpus(tmp_path)
    for split in ("train", "val"):
        assert list(corpus.documents(split)) == list(alone.documents(split))


# --- damage ----------------------------------------------------------------------------------------------------------


def finished(folder: Path, kind: str) -> list[Path]:
    """Two training shards and one for validation, listed with their hashes as an import or the demo lists them."""
    folder.mkdir()
    writers = [ShardWriter(folder, name, one=True) for name in "abv"]
    for i, writer in enumerate(writers):
        for j in range(60):
            writer.add(f"shard {i}, document {j}: {'word ' * (j % 7)}")
    entries = [entry for writer in writers for entry in writer.close()]
    name_shards(folder, "texts", entries[:2], entries[2:], {"import": "0"} if kind == "import" else {})
    shards = sorted(folder.glob("*.parquet"))
    if kind in ("demo", "unlisted"):
        (folder / "manifest.json").unlink()
    if kind == "demo":
        write_json(folder / DEMO_STAMP, {"fingerprint": "", "sha256": {p.name: sha256_file(p) for p in shards}})
    return shards


def read_all(folder: Path) -> None:
    corpus = open_corpus(folder)
    assert [*corpus.documents("train"), *corpus.documents("val")]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("import", "delete the folder"),
        ("demo", "tasks.demo"),
        ("download", "nanochat.dataset"),
        ("unlisted", "first_use"),
    ],
)
def test_a_flipped_bit_a_swap_and_a_loss_are_found_and_say_the_remedy(kind: str, remedy: str, tmp_path: Path) -> None:
    shards = finished(tmp_path / "x", kind)
    read_all(tmp_path / "x")
    right = {shard: shard.read_bytes() for shard in shards}
    for number, shard in enumerate(shards):
        stat = shard.stat()
        for at in range(number, len(right[shard]), len(right[shard]) // 9):
            flipped = bytearray(right[shard])
            flipped[at] ^= 1 << at % 8
            shard.write_bytes(flipped)
            os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time alone says nothing
            with pytest.raises(BadShardError, match=rf"{shard.name}.*{remedy}"):
                read_all(tmp_path / "x")
        shard.write_bytes(right[shards[number - 1]])
        with pytest.raises(BadShardError, match=rf"{shard.name}.*{remedy}"):
            read_all(tmp_path / "x")
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{shard.name}.*{remedy}"):
            read_all(tmp_path / "x")
        shard.write_bytes(right[shard])
        read_all(tmp_path / "x")


def test_a_bit_that_flips_after_opening_is_found_where_it_is_read(tmp_path: Path) -> None:
    shard = finished(tmp_path / "x", "import")[0]
    corpus, right = open_corpus(tmp_path / "x"), shard.read_bytes()
    texts = list(corpus.documents("train"))
    first, size, found = 4, pq.ParquetFile(shard).metadata.row_group(0).column(0).total_compressed_size, 0
    tries = range(first, first + size, 11)
    for at in tries:
        shard.write_bytes(right[:at] + bytes([right[at] ^ 1]) + right[at + 1 :])
        try:
            assert list(corpus.documents("train")) == texts
        except BadShardError as error:
            found += str(shard) in str(error)
    assert found > len(tries) * 0.8  # the others are in statistics, which no text depends on


def test_a_hash_is_compared_once(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = finished(tmp_path / "x", "demo")
    read_all(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr("nanochat.data.shards.matches", lambda *args: pytest.fail("the content was read again"))
        read_all(tmp_path / "x")
    assert find_damage(shards[0], Entry(shards[0].name, digest="sha256:0")) is not None
    (base_dir / ".verified_shards.json").write_text("[damaged")
    read_all(tmp_path / "x")
    write_json(tmp_path / "x" / DEMO_STAMP, [])
    with pytest.raises(ValueError, match=r"corpus\.json can't be understood.*tasks\.demo"):
        open_corpus(tmp_path / "x")


def test_a_folder_without_a_list_is_compared_with_its_first_use(
    tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = finished(folder := tmp_path / "x", "unlisted")
    late = shards.pop(0).rename(tmp_path / "late")
    read_all(folder)
    (record,) = (base_dir / ".first_use").iterdir()
    late.rename(folder / "shard_00000.parquet")  # more of them may come
    read_all(folder)
    assert len(json.loads(record.read_text())["shards"]) == 3
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(BadShardError, match=f"delete {record} if you have changed it on purpose"):
        open_corpus(folder)
    assert len({chunk.shard for chunk in open_corpus(folder, skip_bad_shards=True).train}) == 1
    shards[0].rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=f"in the record of what {folder} held.*{record}"):
        open_corpus(folder)
    assert len({chunk.shard for chunk in open_corpus(folder, skip_bad_shards=True).train}) == 1
    assert "going on without 1 of 3 shards" in capsys.readouterr().out
    record.unlink()
    read_all(folder)
    record.write_text(record.read_text().replace("sha256:", "sha256:0", 1))
    read_all(folder)
    assert "was changed before can't be known" in capsys.readouterr().out
    read_all(shards[1])  # a file alone has a record of its own
    assert len([*record.parent.iterdir()]) == 2


def test_what_cannot_be_recorded_is_said(tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(tmp_path / "x", "unlisted")
    (base_dir / ".first_use").write_text("in the way")
    read_all(tmp_path / "x")
    assert "that can't be known" in capsys.readouterr().out
