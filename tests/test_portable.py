"""Without a compiler: the classic rustbpe learns the same merges, and tiktoken gives the same ids."""

import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import rustbpe
from rustbpe import portable

TEXTS = [
    "नदी की नदी, the cat sat on the mat, 1234 times\n",
    "the hat of the cat: Grüße, 你好 😀",
    "",
    "that cat\u2028" * 9,
]


class Classic:
    """The classic package's trainer, played by the compiled one: a real one is checked where it is installed."""

    def __init__(self):
        self.inner = rustbpe.Tokenizer()

    def train_from_iterator(self, iterator, vocab_size, buffer_size=8192, pattern=None):
        self.inner.train_from_iterator(iterator, vocab_size, buffer_size, pattern)

    def get_mergeable_ranks(self):
        return [(list(token), rank) for token, rank in reversed(self.inner.get_mergeable_ranks())]


@pytest.fixture
def without_a_compiler(monkeypatch):
    """Returns a tokenizer made as on a machine where rustbpe could not be compiled."""
    if not portable.is_installed():
        ours = rustbpe.Tokenizer
        classic = Classic()
        assert isinstance(classic.inner, ours)
        monkeypatch.setattr(portable, "_classic_trainer", lambda: classic)

    def tokenizer():
        return portable.PortableTokenizer(rustbpe.GPT4_PATTERN, rustbpe.TrainingStats)

    return tokenizer


@pytest.mark.parametrize("pattern", [rustbpe.NANOCHAT_PATTERN, rustbpe.RUNTIMES_PATTERN], ids=["nanochat", "runtimes"])
@pytest.mark.parametrize("limits", [{}, {"doc_cap": 20}, {"max_chars": 40}])
def test_the_same_merges_and_the_same_ids(without_a_compiler, limits, pattern):
    ours, theirs = rustbpe.Tokenizer(), without_a_compiler()
    column = pa.chunked_array([TEXTS[:2], [None, *TEXTS[2:]]])
    for tokenizer in (ours, theirs):
        tokenizer.train_from_arrow(column, 290, pattern=pattern, **limits)
    assert theirs.get_mergeable_ranks() == ours.get_mergeable_ranks()
    assert theirs.get_pattern() == ours.get_pattern()
    assert (theirs.training_stats.documents, theirs.training_stats.text_bytes) == (
        ours.training_stats.documents,
        ours.training_stats.text_bytes,
    )
    assert theirs.batch_encode(TEXTS) == ours.batch_encode(TEXTS)
    for mine, other in zip(ours.encode_arrow(column), theirs.encode_arrow(column), strict=True):
        assert mine.dtype == other.dtype
        assert np.array_equal(mine, other)
    ids = theirs.encode(TEXTS[1])
    assert theirs.decode(ids) == TEXTS[1]


@pytest.mark.skipif(not portable.is_installed(), reason="PyPI's rustbpe is missing: bash setup_env.sh --dev")
def test_the_package_of_pypi_does_not_take_the_place_of_ours():
    trainer = portable._classic_trainer()
    assert not isinstance(trainer, rustbpe.Tokenizer)
    assert sys.modules["rustbpe"] is rustbpe
    portable._classic_trainer()  # a second tokenizer in one process


def test_the_module_takes_it_where_the_crate_is_missing(without_a_compiler, monkeypatch):
    ranks = rustbpe.Tokenizer().get_mergeable_ranks()
    without_a_compiler()  # its trainer is made while the crate is still there
    monkeypatch.setattr(rustbpe, "_lib", None)
    tokenizer = rustbpe.Tokenizer.from_ranks(rustbpe.NANOCHAT_PATTERN, ranks)
    assert isinstance(tokenizer, portable.PortableTokenizer)
    assert tokenizer.encode("é") == [195, 169]
    with pytest.raises(ValueError, match="every single byte"):
        rustbpe.Tokenizer.from_ranks(rustbpe.NANOCHAT_PATTERN, ranks[1:])


def test_a_machine_without_either_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(rustbpe, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(portable, "FOLDER", tmp_path)
    monkeypatch.setitem(rustbpe._load_library.__globals__, "Path", lambda _: SimpleNamespace(parent=tmp_path))
    with pytest.raises(ImportError, match=r"bash setup_env\.sh"):
        rustbpe._load_library()
    (tmp_path / "rustbpe.cpython-311.so").touch()
    assert rustbpe._load_library() is None
