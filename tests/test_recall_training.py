"""Recall in training: no document finds itself, every rank and resume sees the same, and a run goes on where it was."""

import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.data import token_stream
from nanochat.data.corpus import Corpus, open_corpus
from nanochat.dataloader import PretrainLoader, first_tokens
from nanochat.gpt import GPT, GPTConfig
from nanochat.ops.recall import FOLLOWERS, KINDS, LEVELS, Ints, Recall
from nanochat.tokenizer import RustBPETokenizer

BOS = 256
BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])
# Each with a word of its own, said twice: only in itself it could be found.
TEXTS = [f"{word} and sea: the sea has a {word} too" for word in ("whale", "stone", "light", "house", "mouse")]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for i, texts in enumerate((TEXTS, ["kite and hill: the hill has a whale and the sea has a kite"])):
        pq.write_table(pa.table({"text": texts}), tmp_path / f"shard_{i:05d}.parquet")
    return open_corpus(tmp_path)


@pytest.fixture
def recall(corpus: Corpus) -> Recall:
    text = first_tokens(corpus, BYTES, 10_000)
    found = Recall(len(text), 257, 8)
    found.carry(text)
    return found


def documents_of(corpus: Corpus, split: str) -> list[list[int]]:
    return [[BOS, *text.encode()] for text in corpus.documents(split)]


def test_the_text_is_whole_documents_from_the_beginning(corpus: Corpus) -> None:
    documents = documents_of(corpus, "train")
    two = documents[0] + documents[1]
    assert first_tokens(corpus, BYTES, len(two)).tolist() == two
    assert first_tokens(corpus, BYTES, len(two) + 5).tolist() == two
    for few, whole in ((5, 0), (len(documents[0]), 1)):
        with pytest.raises(ValueError, match=f"--recall={few}: the training text begins with {whole} whole documents"):
            first_tokens(corpus, BYTES, few)


def test_no_document_is_found_in_itself(corpus: Corpus, recall: Recall) -> None:
    """A word that only its own document has is found nowhere; in a new text it is."""
    bounds = np.cumsum([0, *(len(d) for d in documents_of(corpus, "train"))]).astype(np.int32)
    text = recall.text.numpy()
    found, itself = recall.elsewhere()(text, bounds), recall.look_up(recall.text[None])[0].numpy()
    for word, (a, b) in zip(("whale", "stone", "light"), pairwise(bounds.tolist()), strict=False):
        at = a + bytes(text[a + 1 : b].tolist()).rindex(word.encode()) + 1
        inside = slice(at + 2, at + 4)  # behind "wha" and "whal": what follows is in this document alone
        lengths = found[inside, 0] % KINDS // LEVELS
        assert (lengths <= 2).all(), (word, lengths)
        assert (itself[inside, 0] // KINDS == text[at + 3 : at + 5]).all()
    # What other documents say too is found in them.
    shared = bytes(text[: bounds[1]].tolist()[1:]).index(b"sea has a") + 7
    assert found[shared, 0] > 0


@pytest.mark.parametrize("mode", ["stream", "bestfit"])
def test_batches_have_what_is_found_for_each_of_their_tokens(corpus: Corpus, recall: Recall, mode: str) -> None:
    """Whatever the order of an epoch, the sequence a token is in, and where the document was cut."""
    bounds = np.cumsum([0, *(len(d) for d in documents_of(corpus, "train"))]).astype(np.int32)
    text, look_up = recall.text.numpy(), recall.elsewhere()
    expected = {}
    for a, b in pairwise(bounds.tolist()):
        rows = look_up(text[a:b], np.array([0, b - a], np.int32)).tolist()
        expected |= {tuple(text[a : i + 1].tolist()): rows[i - a] for i in range(a, b)}
    loader = PretrainLoader(corpus, BYTES, 2, 16, mode=mode, look_up=look_up)  # type: ignore[arg-type]
    checked, stream = 0, list[int]()
    for batch in islice(loader, 40):
        assert batch.found.shape == (2, 16, FOLLOWERS)
        for x, y, found in zip(batch.x.tolist(), batch.y.tolist(), batch.found.tolist(), strict=True):
            stream = stream if mode == "stream" else []
            for token, target, row in zip(x, y, found, strict=True):
                stream = [token] if token == BOS else [*stream, token]
                if target >= 0 and tuple(stream) in expected:
                    assert row == expected[tuple(stream)]
                    checked += 1
    loader.close()
    assert checked > 500


def test_ranks_and_a_resume_see_the_same(corpus: Corpus, recall: Recall) -> None:
    look_up = recall.elsewhere()
    one = PretrainLoader(corpus, BYTES, 4, 8, look_up=look_up)
    ranks = [PretrainLoader(corpus, BYTES, 2, 8, rank=r, world_size=2, look_up=look_up) for r in range(2)]
    for _ in range(3):
        together = [torch.cat(parts) for parts in zip(*((b.x, b.found) for b in map(next, ranks)), strict=True)]
        batch = next(one)
        assert all(torch.equal(a, b) for a, b in zip((batch.x, batch.found), together, strict=True))
    resumed = PretrainLoader(corpus, BYTES, 4, 8, state=json.loads(json.dumps(one.state_dict())), look_up=look_up)
    for a, b in islice(zip(one, resumed, strict=False), 30):  # over the end of an epoch
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.found, b.found)


def test_the_last_batch_of_validation_is_filled_up_with_nothing_found(corpus: Corpus, recall: Recall) -> None:
    *_, last = PretrainLoader(corpus, BYTES, 4, 16, "val", look_up=recall.elsewhere())
    assert (last.y == -1).any()
    assert (last.found[last.y == -1] == 0).all()


def test_shorter_rows_and_pieces_keep_what_was_found(corpus: Corpus, recall: Recall) -> None:
    batch = next(PretrainLoader(corpus, BYTES, 2, 16, look_up=recall.elsewhere()))
    short = batch.shorter_rows(4)
    assert torch.equal(short.found.reshape(2, 16, -1), batch.found)
    assert torch.equal(torch.cat([piece.found for piece in batch.pieces(1)]), batch.found)


def test_separate_documents_are_computed_as_if_each_were_alone() -> None:
    torch.manual_seed(0)
    config = GPTConfig(
        sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=48, smear=True, document_start=BOS
    )
    model = GPT(config)
    model.init_weights()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    first, second = [torch.tensor([[BOS, *torch.randint(0, 256, (n,)).tolist()]]) for n in (9, 14)]
    with torch.no_grad():
        together = model(torch.cat([first, second], dim=1))
        alone = torch.cat([model(first), model(second)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_model_of_another_form_is_named(recall: Recall) -> None:
    state = recall.state_dict()
    state.pop("trust")
    with pytest.raises(ValueError, match=r"as another version does.*train it again"):
        recall.load_state_dict(state)


def test_blocks_are_looked_up_in_pieces_and_a_resume_looks_up_only_what_is_to_come(
    corpus: Corpus, recall: Recall, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()

    def look_up(tokens: Ints, bounds: Ints) -> Ints:
        seen.append(len(tokens))
        return recall.elsewhere()(tokens, bounds)

    def batches(**more: Any) -> Iterator[Any]:
        return iter(PretrainLoader(corpus, BYTES, 1, 8, mode=mode, look_up=look_up, **more))

    for mode in ("stream", "bestfit"):
        whole = list(islice(batches(), 60))
        with monkeypatch.context() as patch:
            patch.setattr(token_stream, "PIECE_TOKENS", 50)
            for a, b in zip(whole, batches(), strict=False):
                assert torch.equal(a.x, b.x)
                assert torch.equal(a.found, b.found)
            loader = PretrainLoader(corpus, BYTES, 1, 8, mode=mode, look_up=look_up)
            first = [next(loader) for _ in range(17)][-1]
            state = json.loads(json.dumps(loader.state_dict()))
            assert torch.equal(first.found, whole[16].found)
            for a, b in zip(whole[17:], batches(state=state), strict=False):
                assert torch.equal(a.x, b.x)
                assert torch.equal(a.found, b.found)
    assert max(seen) > 150
    assert min(n for n in seen if n) < 60
