"""The pretraining stream: every token once and in order, the same for every world size, and exact resume."""

import gc
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset
from nanochat.background import Prefetch
from nanochat.dataloader import PretrainLoader, chunk_order, insert_bos
from nanochat.dataset import Corpus, open_corpus
from nanochat.tokenizer import RustBPETokenizer

BOS = 256
BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])  # a token is a byte: easy to foretell

documents = st.one_of(st.just(""), st.text(max_size=12), st.text(alphabet="ab", min_size=40, max_size=90))
shard_texts = st.lists(st.lists(documents, max_size=5), min_size=1, max_size=3)  # row groups of documents
corpora = st.lists(shard_texts, min_size=1, max_size=3)


def make_corpus(folder: Path, shards: list[list[list[str]]]) -> Corpus:
    """These shards of row groups of documents, on disk."""
    schema = pa.schema([("text", pa.string())])
    for i, groups in enumerate(shards):
        with pq.ParquetWriter(folder / f"shard_{i:05d}.parquet", schema) as writer:
            for texts in groups:
                writer.write_table(pa.table([texts], schema=schema))
    return open_corpus(folder)


def slow_stream(corpus: Corpus, split: str) -> Iterator[int]:
    """The obvious way to write down the stream."""
    chunks = corpus.chunks(split)
    epoch = 0
    while True:
        for number in chunk_order(len(chunks), epoch):
            for _, texts in chunks[number].read():
                for text in texts.to_pylist():
                    if text:
                        yield from [BOS, *text.encode()]
        epoch += 1
        if split == "val":
            return


def rows(loaders: list[PretrainLoader], steps: int) -> list[tuple[list[int], list[int]]]:
    """(x, y) of all rows of the next global batches."""
    out = []
    for _ in range(steps):
        for loader in loaders:
            x, y = next(loader)
            assert x.dtype == y.dtype == torch.int64
            out += list(zip(x.tolist(), y.tolist(), strict=True))
    return out


@dataclass
class Case:
    """A way to read a corpus."""

    world_size: int
    B: int
    T: int

    def loaders(self, corpus: Corpus, split: str = "train", state: dict | None = None) -> list[PretrainLoader]:
        state = json.loads(json.dumps(state))
        return [
            PretrainLoader(corpus, BYTES, self.B, self.T, split, rank=r, world_size=self.world_size, state=state)
            for r in range(self.world_size)
        ]


cases = st.builds(Case, st.integers(1, 4), st.integers(1, 3), st.integers(1, 17))


def usable(corpus_texts: list[list[list[str]]], folder: Path) -> Corpus | None:
    """The corpus if it has text to train on."""
    try:
        corpus = make_corpus(folder, corpus_texts)
    except ValueError:
        return None
    return corpus if any(corpus.documents("train")) else None


@given(texts=corpora, case=cases, read=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_order_equals_the_obvious_concatenation(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[list[str]]], case: Case, read: int
) -> None:
    corpus = usable(texts, tmp_path_factory.mktemp("corpus"))
    if corpus is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "ROWS_PER_READ", read)
        got = rows(case.loaders(corpus), 5)
        expected = list(islice(slow_stream(corpus, "train"), len(got) * case.T + 1))
    for i, (x, y) in enumerate(got):
        assert x == expected[i * case.T : (i + 1) * case.T]
        assert y == expected[i * case.T + 1 : (i + 1) * case.T + 1]


@given(texts=corpora, first=cases, second=cases, steps=st.integers(0, 6), read=st.tuples(*[st.integers(1, 6)] * 2))
@settings(max_examples=40, deadline=None)
def test_resume_continues_the_stream_with_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[list[str]]],
    first: Case,
    second: Case,
    steps: int,
    read: tuple[int, int],
) -> None:
    corpus = usable(texts, tmp_path_factory.mktemp("corpus"))
    if corpus is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "ROWS_PER_READ", read[0])
        loaders = first.loaders(corpus)
        seen = len(rows(loaders, steps)) * first.T
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        for loader in loaders:
            loader.close()
        patch.setattr(dataset, "ROWS_PER_READ", read[1])
        resumed = second.loaders(corpus, state=states[0])
        assert resumed[0].tokens_seen == seen
        assert resumed[0].epoch == loaders[0].epoch
        got = rows(resumed, 3)
        expected = list(islice(slow_stream(corpus, "train"), seen, seen + len(got) * second.T + 1))
    for i, (x, y) in enumerate(got):
        assert x == expected[i * second.T : (i + 1) * second.T]
        assert y == expected[i * second.T + 1 : (i + 1) * second.T + 1]


@given(texts=corpora, case=cases)
@settings(max_examples=40, deadline=None)
def test_validation_predicts_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[list[str]]], case: Case
) -> None:
    try:
        corpus = make_corpus(tmp_path_factory.mktemp("corpus"), texts)
        corpus.chunks("val")
    except ValueError:
        return
    batches = [list(loader) for loader in case.loaders(corpus, "val")]
    assert len({len(of_rank) for of_rank in batches}) == 1
    n = len(batches[0])
    expected = list(slow_stream(corpus, "val"))
    xs = [int(v) for i in range(n) for of_rank in batches for v in of_rank[i][0].flatten()]
    ys = [int(v) for i in range(n) for of_rank in batches for v in of_rank[i][1].flatten()]
    assert [y for y in ys if y >= 0] == expected[1:]
    assert xs[: max(0, len(expected) - 1)] == expected[:-1]


def test_train_and_validation_share_no_document(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[[f"<{i}>" for i in range(100)]]])
    loader = PretrainLoader(corpus, BYTES, 1, 16)
    seen = BYTES.decode([int(v) for _ in range(60) for v in next(loader)[0].flatten()])
    assert loader.epoch >= 1
    for text in corpus.documents("val"):
        assert text not in seen
    for text in corpus.documents("train"):
        assert text in seen


def test_epochs_have_their_own_orders_of_the_same_chunks() -> None:
    assert chunk_order(20, 0) == list(range(20))
    assert len({tuple(chunk_order(20, epoch)) for epoch in range(10)}) == 10
    assert all(sorted(chunk_order(20, epoch)) == list(range(20)) for epoch in range(10))
    assert chunk_order(6, 1) == [2, 3, 5, 0, 4, 1]  # pinned: old checkpoints must find their place


def test_no_text_is_an_error_not_an_endless_loop(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["", ""], [""]], [["text"]]])
    with pytest.raises(ValueError, match="all documents are empty"):
        next(PretrainLoader(corpus, BYTES, 1, 4))
    assert list(PretrainLoader(make_corpus(tmp_path, [[["a"]], [[""]]]), BYTES, 1, 4, "val")) == []


def test_more_ranks_than_row_groups(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abc"]], [["d"]]])
    got = rows(Case(8, 1, 2).loaders(corpus), 1)
    assert [x for x, _ in got] == [[BOS, 97], [98, 99]] * 4


def test_shards_that_arrive_do_not_move_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [[[f"{name}{i}" for i in range(10)]] for name in "abz"]
    make_corpus(tmp_path, texts)
    (tmp_path / "shard_00002.parquet").rename(tmp_path / "shard_00009.parquet")
    (tmp_path / "shard_00001.parquet").rename(tmp_path / "shard_00005.parquet")
    before = open_corpus(tmp_path)
    loader = PretrainLoader(before, BYTES, 2, 8)
    for _ in range(2):
        next(loader)
    state, expected = loader.state_dict(), next(loader)[0]
    assert state["shard"] == "shard_00005.parquet"
    schema = pa.schema([("text", pa.string())])
    pq.write_table(pa.table([["new"]], schema=schema), tmp_path / "shard_00001.parquet")
    resumed = PretrainLoader(open_corpus(tmp_path), BYTES, 2, 8, state=state)
    assert torch.equal(next(resumed)[0], expected)
    assert "changed" in capsys.readouterr().out
    (tmp_path / "shard_00005.parquet").unlink()
    with pytest.raises(ValueError, match=r"no longer has row group 0 of shard_00005\.parquet"):
        PretrainLoader(open_corpus(tmp_path), BYTES, 2, 8, state=state)


def test_state_of_another_tokenizer_or_split_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abc"]], [["d"]]])
    state = PretrainLoader(corpus, BYTES, 1, 2).state_dict()
    with pytest.raises(ValueError, match="another tokenizer"):
        PretrainLoader(corpus, BYTES, 1, 2, state={**state, "tokenizer": "x"})
    with pytest.raises(ValueError, match="train split"):
        PretrainLoader(corpus, BYTES, 1, 2, split="val", state=state)


def test_bad_shapes_are_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abc"]], [["d"]]])
    for arguments in ({"batch_size": 0}, {"sequence_len": 0}, {"rank": 2, "world_size": 2}):
        with pytest.raises(ValueError, match=r"must be positive|not below"):
            PretrainLoader(corpus, BYTES, **{"batch_size": 1, "sequence_len": 1, **arguments})  # type: ignore[arg-type]


def test_damaged_shard_stops_training_with_its_name(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abc" * 100]], [["d"]]])
    (tmp_path / "shard_00000.parquet").write_bytes(b"")
    loader = PretrainLoader(corpus, BYTES, 1, 2)
    with pytest.raises(ValueError, match=r"shard_00000\.parquet"):
        next(loader)
    with pytest.raises(StopIteration):  # and does not hang when asked again
        next(loader)


@given(texts=st.lists(st.text(max_size=5), max_size=8))
@settings(max_examples=40, deadline=None)
def test_insert_bos(texts: list[str]) -> None:
    ids, offsets = BYTES.encode_arrow(pa.array(texts, pa.string()))
    expected = [i for text in texts if text for i in (BOS, *text.encode())]
    assert insert_bos(ids, offsets, BOS).tolist() == expected


def test_vocabularies_above_65536_keep_their_ids(tmp_path: Path) -> None:
    ranks = [bytes([i]) for i in range(256)] + [b"%05d" % i for i in range(65530 - 256)]
    large = RustBPETokenizer.from_ranks(ranks)
    corpus = make_corpus(tmp_path, [[["abc"]], [["d"]]])
    assert next(PretrainLoader(corpus, large, 1, 4))[0].tolist() == [[65530, 97, 98, 99]]


# --- the thread -------------------------------------------------------------------------------------------------------


def test_thread_ends_with_the_loader(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abc"]], [["d"]]])
    before = threading.active_count()
    loaders = [PretrainLoader(corpus, BYTES, 1, 2) for _ in range(3)]
    for loader in loaders:
        next(loader)
    loaders[0].close()
    assert list(loaders[0]) == []
    del loaders, loader
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_prefetch_keeps_order_measures_waiting_and_passes_errors_on() -> None:
    def make() -> Iterator[int]:
        yield 0
        time.sleep(0.05)
        yield 1
        raise ValueError("broken")

    items = Prefetch(make)
    assert [next(items), next(items)] == [0, 1]
    assert items.wait_seconds > 0.01
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_batches_are_independent_arrays(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abcdefgh"]], [["d"]]])
    loader = PretrainLoader(corpus, BYTES, 1, 4)
    x, _ = next(loader)
    kept = x.clone()
    next(loader)
    next(loader)
    assert torch.equal(x, kept)
    assert x.numpy().dtype == np.int64
