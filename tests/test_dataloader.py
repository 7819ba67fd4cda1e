"""The pretraining stream: every token once and in order, the same for every world size, and exact resume."""

import gc
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.data import corpus as corpus_module
from nanochat.data import text_rows
from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.prefetch import DeviceFeed, Prefetch
from nanochat.data.shards import FIRST_USE
from nanochat.data.text_rows import pack_window
from nanochat.data.token_stream import chunk_order, document_order, insert_bos, reorder
from nanochat.dataloader import Mode, PretrainLoader
from nanochat.env import get_base_dir
from nanochat.tokenizer import RustBPETokenizer

BOS = 256
BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])  # a token is a byte: easy to predict

documents = st.one_of(st.just(""), st.text(max_size=12), st.text(alphabet="ab", min_size=40, max_size=90))
shard_texts = st.lists(st.lists(documents, max_size=5), min_size=1, max_size=3)  # row groups of documents
corpora = st.lists(shard_texts, min_size=1, max_size=3)


def forget_first_use() -> None:
    """What is in folders is changed on purpose."""
    shutil.rmtree(get_base_dir() / FIRST_USE, ignore_errors=True)


def make_corpus(folder: Path, shards: list[list[list[str]]]) -> Corpus:
    """These shards of row groups of documents, on disk."""
    forget_first_use()
    schema = pa.schema([("text", pa.string())])
    for i, groups in enumerate(shards):
        with pq.ParquetWriter(folder / f"shard_{i:05d}.parquet", schema) as writer:
            for texts in groups:
                writer.write_table(pa.table([texts], schema=schema))
    return open_corpus(folder)


def slow_epochs(corpus: Corpus, split: str) -> Iterator[list[list[int]]]:
    """The documents of epoch after epoch, written down the obvious way."""
    chunks = corpus.chunks(split)
    epoch = 0
    while True:
        epoch_documents = []
        for number in chunk_order(len(chunks), epoch):
            chunk = chunks[number]
            rows = pq.ParquetFile(chunk.shard).read_row_group(chunk.row_group)["text"].to_pylist()
            starts = sorted({chunk.start, *range(0, len(rows), corpus_module.BLOCK_ROWS)})
            for start in [s for s in starts if chunk.start <= s < chunk.stop]:
                stop = min(chunk.stop, (start // corpus_module.BLOCK_ROWS + 1) * corpus_module.BLOCK_ROWS)
                texts = [text for text in rows[start:stop] if text]
                order = document_order(len(texts), epoch, chunk, start)
                epoch_documents += [[BOS, *texts[i].encode()] for i in order]
        yield epoch_documents
        epoch += 1
        if split == "val":
            return


def slow_stream(corpus: Corpus, split: str) -> Iterator[int]:
    """Their tokens one after the other."""
    return (token for epoch in slow_epochs(corpus, split) for document in epoch for token in document)


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

    def loaders(
        self, corpus: Corpus, split: str = "train", state: dict | None = None, mode: Mode = "stream"
    ) -> list[PretrainLoader]:
        state = json.loads(json.dumps(state))
        W = self.world_size
        return [
            PretrainLoader(corpus, BYTES, self.B, self.T, split, rank=r, world_size=W, state=state, mode=mode)
            for r in range(W)
        ]


cases = st.builds(Case, st.integers(1, 8), st.integers(1, 3), st.integers(1, 17))
modes = st.sampled_from(["stream", "bestfit"])


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
        patch.setattr(corpus_module, "BLOCK_ROWS", read)
        got = rows(case.loaders(corpus), 5)
        expected = list(islice(slow_stream(corpus, "train"), len(got) * case.T + 1))
    for i, (x, y) in enumerate(got):
        assert x == expected[i * case.T : (i + 1) * case.T]
        assert y == expected[i * case.T + 1 : (i + 1) * case.T + 1]


@given(texts=corpora, first=cases, second=cases, steps=st.integers(0, 6), read=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_resume_continues_the_stream_with_any_shape(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[list[str]]],
    first: Case,
    second: Case,
    steps: int,
    read: int,
) -> None:
    corpus = usable(texts, tmp_path_factory.mktemp("corpus"))
    if corpus is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_ROWS", read)
        loaders = first.loaders(corpus)
        seen = len(rows(loaders, steps)) * first.T
        states = [loader.state_dict() for loader in loaders]
        assert all(state == states[0] for state in states)
        for loader in loaders:
            loader.close()
        resumed = second.loaders(corpus, state=states[0])
        assert resumed[0].tokens_seen == seen
        assert resumed[0].epoch == loaders[0].epoch
        got = rows(resumed, 3)
        expected = list(islice(slow_stream(corpus, "train"), seen, seen + len(got) * second.T + 1))
    for i, (x, y) in enumerate(got):
        assert x == expected[i * second.T : (i + 1) * second.T]
        assert y == expected[i * second.T + 1 : (i + 1) * second.T + 1]


@given(texts=corpora, case=cases, second_world=st.integers(1, 8), mode=modes, read=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_the_state_of_every_step_continues_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[list[list[str]]],
    case: Case,
    second_world: int,
    mode: Mode,
    read: int,
) -> None:
    corpus = usable(texts, tmp_path_factory.mktemp("corpus"))
    if corpus is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_ROWS", read)
        patch.setattr(text_rows, "WINDOW_ROWS", 3)
        all_rows = rows(case.loaders(corpus, mode=mode), 6)
        loaders, others = case.loaders(corpus, mode=mode), Case(second_world, 1, case.T)
        for step in range(6):
            if step:
                rows(loaders, 1)
            states = [loader.state_dict() for loader in loaders]
            assert all(state == states[0] for state in states)
            resumed = others.loaders(corpus, state=states[-1], mode=mode)
            behind = all_rows[step * case.world_size * case.B :]
            n = min(2, len(behind) // second_world)
            assert rows(resumed, n) == behind[: n * second_world]


@given(texts=corpora, case=cases, read=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_every_token_of_an_epoch_comes_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[list[str]]], case: Case, read: int
) -> None:
    corpus = usable(texts, tmp_path_factory.mktemp("corpus"))
    if corpus is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_ROWS", read)
        first, second = islice(slow_epochs(corpus, "train"), 2)
        assert sorted(second) == sorted(first)  # the orders differ, the documents don't
        loaders = case.loaders(corpus)
        tokens = 2 * sum(map(len, first))
        got = rows(loaders, -(-tokens // (case.world_size * case.B * case.T)))
    stream = [token for x, _ in got for token in x]
    assert Counter(stream[:tokens]) == Counter(2 * [token for document in first for token in document])
    assert loaders[0].counts.tokens == len(stream)
    assert loaders[0].counts.cropped == loaders[0].counts.padding == 0


@given(texts=corpora, case=cases, read=st.integers(1, 6), window=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_bestfit_rows_are_beginnings_of_documents_and_use_each_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[list[str]]], case: Case, read: int, window: int
) -> None:
    corpus = usable(texts, tmp_path_factory.mktemp("corpus"))
    if corpus is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK_ROWS", read)
        patch.setattr(text_rows, "WINDOW_ROWS", window)
        documents = next(slow_epochs(corpus, "train"))
        loaders = case.loaders(corpus, mode="bestfit")
        got = []
        while loaders[0].epoch == 0:
            got += rows(loaders, 1)
        counts = loaders[0].counts
    left = Counter(map(tuple, documents))
    for x, y in got:
        row = [*x[:1], *(token for token in y if token >= 0)]
        assert row[: case.T] == x[: len(row)]
        assert row[0] == BOS
        for piece in split_at_bos(row):
            whole = next((d for d in left if list(d[: len(piece)]) == piece and left[d] > 0), None)
            if whole is None:  # the batch has gone on into the next epoch
                assert any(d[: len(piece)] == piece for d in documents)
            elif piece == list(whole) or len(row) == case.T + 1:  # whole, or cropped at the end of a full row
                left[whole] -= 1
    assert counts.rows == len(got)
    assert counts.tokens + counts.padding == len(got) * (case.T + 1)
    assert counts.tokens + counts.cropped >= sum(map(len, documents))  # nothing is lost without being counted


def split_at_bos(row: list[int]) -> list[list[int]]:
    """The documents of a row."""
    starts = [i for i, token in enumerate(row) if token == BOS]
    return [row[a:b] for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]


@given(lengths=st.lists(st.integers(1, 60), max_size=40), capacity=st.integers(2, 30))
@settings(max_examples=100, deadline=None)
def test_packing_uses_every_document_once_and_fills_rows(lengths: list[int], capacity: int) -> None:
    packed = pack_window(lengths, capacity)
    assert sorted(i for row in packed for i, _ in row) == list(range(len(lengths)))
    for row in packed[:-1]:
        assert sum(taken for _, taken in row) == capacity
    for row in packed:
        assert sum(taken for _, taken in row) <= capacity
        assert all(taken == lengths[i] for i, taken in row[:-1])  # only the last one of a row is cropped


def test_longest_that_fits_goes_first_and_the_shortest_is_cropped() -> None:
    assert pack_window([4, 9, 3, 5], 10) == [[(1, 9), (2, 1)], [(3, 5), (0, 4)]]
    assert pack_window([25, 12], 10) == [[(1, 10)], [(0, 10)]]


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_max_rows_ends_at_the_same_row_for_every_shape(tmp_path: Path, split: str) -> None:
    corpus = make_corpus(tmp_path, [[[f"<{i}>" * 9 for i in range(100)]]])
    seen = []
    for world_size, batch_size in ((1, 1), (1, 4), (1, 50), (3, 2)):
        loaders = [
            PretrainLoader(corpus, BYTES, batch_size, 8, split, rank=r, world_size=world_size, max_rows=7)
            for r in range(world_size)
        ]
        batches = [list(loader) for loader in loaders]
        assert len({len(of_rank) for of_rank in batches}) == 1
        rows_there = [y.tolist() for step in zip(*batches, strict=True) for _, ys in step for y in ys]
        seen.append([y for y in rows_there if y != [-1] * 8])
    assert len(seen[0]) == 7
    assert all(other == seen[0] for other in seen)


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
    forget_first_use()
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
    forget_first_use()
    with pytest.raises(ValueError, match=r"no longer has row group 0 of shard_00005\.parquet"):
        PretrainLoader(open_corpus(tmp_path), BYTES, 2, 8, state=state)


def test_state_of_another_tokenizer_or_split_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abc"]], [["d"]]])
    state = PretrainLoader(corpus, BYTES, 1, 2).state_dict()
    with pytest.raises(ValueError, match="another tokenizer"):
        PretrainLoader(corpus, BYTES, 1, 2, state={**state, "tokenizer": "x"})
    with pytest.raises(ValueError, match="train split"):
        PretrainLoader(corpus, BYTES, 1, 2, split="val", state=state)
    with pytest.raises(ValueError, match="in the stream mode, not in bestfit"):
        PretrainLoader(corpus, BYTES, 1, 2, state=state, mode="bestfit")
    with pytest.raises(ValueError, match="another version"):
        PretrainLoader(corpus, BYTES, 1, 2, state={k: v for k, v in state.items() if k != "version"})
    state = PretrainLoader(corpus, BYTES, 1, 2, mode="bestfit").state_dict()
    with pytest.raises(ValueError, match="sequences of 2 tokens, not of 3"):
        PretrainLoader(corpus, BYTES, 1, 3, state=state, mode="bestfit")
    with pytest.raises(ValueError, match="stream or bestfit"):
        PretrainLoader(corpus, BYTES, 1, 2, mode="other")  # type: ignore[arg-type]


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


def test_bad_shards_are_skipped_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_corpus(tmp_path, [[["aaa"], ["bbb"]], [["ccc" * 100], ["ddd"]], [["eee"]], [["val"]]])
    corpus = open_corpus(tmp_path)
    (tmp_path / "shard_00001.parquet").unlink()
    loader = PretrainLoader(corpus, BYTES, 3, 4)
    with pytest.raises(ValueError, match=r"shard_00001\.parquet"):
        next(loader)
    loader = PretrainLoader(corpus, BYTES, 3, 4, skip_bad_shards=True)
    assert [bytes(row[1:]) for row in next(loader)[0].tolist()] == [b"aaa", b"bbb", b"eee"]
    assert "warning: skipping the rest of row group 0 of shard_00001.parquet" in capsys.readouterr().out
    (tmp_path / "shard_00001.parquet").write_bytes(b"")
    for first in (False, True):
        with pytest.raises(ValueError, match=r"shard_00001\.parquet is not a readable" if first else r"has 0 bytes"):
            open_corpus(tmp_path)
        forget_first_use()
    loader = PretrainLoader(open_corpus(tmp_path, skip_bad_shards=True), BYTES, 3, 4)
    assert [bytes(row[1:]) for row in next(loader)[0].tolist()] == [b"aaa", b"bbb", b"eee"]


def test_a_new_epoch_is_announced_with_a_new_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{i:02d}" for i in range(50)]
    corpus = make_corpus(tmp_path, [[texts], [["val"]]])  # one row group: the order inside it changes
    loader = PretrainLoader(corpus, BYTES, 50, 3)
    epochs = [["".join(map(chr, row[1:])) for row in next(loader)[0].tolist()] for _ in range(3)]
    assert epochs[0] == texts
    assert epochs[1] != texts
    assert epochs[2] not in epochs[:2]
    assert all(sorted(epoch) == texts for epoch in epochs)
    assert capsys.readouterr().out.count("begins") == 3  # the next batch begins epoch 3


def test_a_document_longer_than_many_rows_is_read_whole(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(5000))
    corpus = make_corpus(tmp_path, [[[text]], [["val"]]])
    loader = PretrainLoader(corpus, BYTES, 2, 100)
    got = [token for _ in range(25) for token in next(loader)[0].flatten().tolist()]
    assert got == [BOS, *text.encode()][:5000]


@given(texts=st.lists(st.text(max_size=5), max_size=8))
@settings(max_examples=40, deadline=None)
def test_insert_bos(texts: list[str]) -> None:
    ids, offsets = BYTES.encode_arrow(pa.array(texts, pa.string()))
    expected = [[BOS, *text.encode()] for text in texts if text]
    tokens, bounds = insert_bos(ids, offsets, BOS)
    assert tokens.tolist() == [i for document in expected for i in document]
    assert [tokens[a:b].tolist() for a, b in pairwise(bounds)] == expected
    order = list(range(len(expected)))[::-1]
    tokens, bounds = reorder(tokens, bounds, order)
    assert [tokens[a:b].tolist() for a, b in pairwise(bounds)] == expected[::-1]


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


def test_prefetch_keeps_order_and_passes_errors_on() -> None:
    def make() -> Iterator[int]:
        yield 0
        yield 1
        raise ValueError("broken")

    items = Prefetch(make)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_next_if_ready_never_waits_and_keeps_the_end_for_later() -> None:
    items = Prefetch(lambda: iter([1]))
    items._thread.join()  # it is ready, and so is the end
    assert [items.next_if_ready() for _ in range(3)] == [1, None, None]
    assert list(items) == []


def test_device_feed_hands_over_items_with_their_arrays() -> None:
    feed = DeviceFeed(Prefetch(lambda: iter([1, 2])), lambda i: np.full((2,), i), torch.device("cpu"))
    assert [(item, tensor.tolist()) for item, tensor in feed] == [(1, [1, 1]), (2, [2, 2])]


def test_batches_are_independent_arrays(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, [[["abcdefgh"]], [["d"]]])
    loader = PretrainLoader(corpus, BYTES, 1, 4)
    x, _ = next(loader)
    kept = x.clone()
    next(loader)
    next(loader)
    assert torch.equal(x, kept)
    assert x.numpy().dtype == np.int64
