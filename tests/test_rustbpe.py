"""rustbpe: merges by the definition, splitting and ids as in tiktoken's, clear errors for bad input."""

from __future__ import annotations

import collections
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe

ROOT = Path(__file__).resolve().parents[1]
CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
PATTERNS = {
    "nanochat": rustbpe.NANOCHAT_PATTERN,
    "gpt4": rustbpe.GPT4_PATTERN,
    "gpt2": rustbpe.GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "runtimes": rustbpe.RUNTIMES_PATTERN,
}
WORDS = (
    "the quick brown fox jumps over a lazy dog while 12 or 345 birds sing; it's we'll THEY'RE naïve Ünïcödé 漢字かな"
)


def corpus(num_documents: int = 400, seed: int = 0) -> list[str]:
    """Sentences of random words, with punctuation, blank lines and numbers."""
    rng = random.Random(seed)
    words = WORDS.split()
    joints = [" "] * 8 + ["  ", "\n", ".\n\n", ", ", "\t"]
    return [
        "".join(rng.choice(words) + rng.choice(joints) for _ in range(rng.randrange(60))) + str(rng.randrange(10**6))
        for _ in range(num_documents)
    ]


def train(texts: list[str], vocab_size: int = 700, **options: object) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def as_tiktoken(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding(name="t", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


def slow_ranks(texts: list[str], vocab_size: int, pattern: str) -> list[tuple[bytes, int]]:
    """The definition: count all pairs, merge the most frequent one (of equals the smaller), again and again."""
    counts = collections.Counter(piece.encode() for text in texts for piece in regex.findall(pattern, text))
    words = [(list(piece), count) for piece, count in counts.items()]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        pairs: collections.Counter[tuple[int, int]] = collections.Counter()
        for ids, count in words:
            for pair in itertools.pairwise(ids):
                pairs[pair] += count
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for ids, _ in words:
            i = 0
            while i + 1 < len(ids):
                if ids[i] == left and ids[i + 1] == right:
                    ids[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[left] + tokens[right])
    return [(token, i) for i, token in enumerate(tokens)]


@pytest.fixture(scope="module")
def tokenizer() -> rustbpe.Tokenizer:
    return train(corpus(), pattern=rustbpe.NANOCHAT_PATTERN)


# Training


@pytest.mark.parametrize("name", ["nanochat", "gpt4", "gpt2"])
def test_merges_are_those_of_the_definition(name: str) -> None:
    texts = corpus(60)
    trained = train(texts, 420, pattern=PATTERNS[name])
    assert trained.get_mergeable_ranks() == slow_ranks(texts, 420, PATTERNS[name])
    assert trained.get_pattern() == PATTERNS[name]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("aab c\n'1é"), max_size=30), min_size=1, max_size=6))
def test_merges_are_those_of_the_definition_on_small_texts(texts: list[str]) -> None:
    if not any(texts):
        return
    expected = slow_ranks(texts, 280, rustbpe.GPT4_PATTERN)
    assert train(texts, len(expected)).get_mergeable_ranks() == expected


def test_the_number_of_threads_changes_nothing() -> None:
    texts = corpus(3000)
    runs = [train(texts, 900, num_threads=n).get_mergeable_ranks() for n in (1, 2, 8)]
    assert runs[0] == runs[1] == runs[2]
    arrow = rustbpe.Tokenizer()
    arrow.train_from_arrow(pa.chunked_array([texts[:1000], texts[1000:]]), 900)
    assert arrow.get_mergeable_ranks() == runs[0]


def test_training_again_replaces_the_vocabulary() -> None:
    trained = train(["aaaa"], 258)
    trained.train_from_iterator(["bbbb"], 257, pattern=rustbpe.GPT2_PATTERN)
    assert trained.get_mergeable_ranks()[256:] == [(b"bb", 256)]
    assert trained.encode("aabb") == [97, 97, 256]
    assert trained.get_pattern() == rustbpe.GPT2_PATTERN


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "string_view", "dictionary"])
def test_arrow_arrays_of_every_kind_train_the_same(kind: str) -> None:
    texts = [None if i % 7 == 0 else text for i, text in enumerate(corpus(100))]
    array = pa.array(texts, pa.string())
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(kind)
    trained = rustbpe.Tokenizer()
    trained.train_from_arrow([array.slice(3, 50), array.slice(53)], 500)
    expected = train([text for text in texts[3:] if text is not None], 500)
    assert trained.get_mergeable_ranks() == expected.get_mergeable_ranks()


def test_limits_cut_documents_and_the_corpus_by_characters() -> None:
    texts = ["ñandú" * 9, "x" * 30, "never read"]
    limited = train(texts, 300, doc_cap=10, max_chars=11)
    assert limited.get_mergeable_ranks() == train(["ñandúñandú", "x" * 10], 300).get_mergeable_ranks()
    stats = limited.training_stats
    assert stats is not None
    assert (stats.documents, stats.text_bytes) == (2, 24)
    assert stats.table_bytes > 0
    exact = train(texts, 300, doc_cap=10, max_chars=20)  # just reached is not passed
    assert exact.training_stats is not None
    assert exact.training_stats.documents == 3


def test_a_small_text_gives_a_small_vocabulary_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rustbpe"):
        trained = train(["ab ab"], 1000)
    assert trained.vocab_size == 258
    assert "258 tokens instead of 1000" in caplog.text


def test_progress_is_told_and_can_stop_the_work() -> None:
    heard: list[tuple[str, int, int | None]] = []
    texts = [f"{i} {i * i}" for i in range(2000)] * 2000

    def hear(phase: str, done: int, total: int | None) -> None:
        heard.append((phase, done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rustbpe.Tokenizer().train_from_arrow(pa.array(texts), 300, num_threads=1, progress=hear)
    assert len(heard) == 1
    assert heard[0][0] == "count"
    assert heard[0][1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "corpus is empty"),
        ({"texts": ["", ""]}, "corpus is empty"),
        ({"vocab_size": 255}, "at least 256"),
        ({"pattern": r"\w+"}, r"not supported.*GPT-2"),
        ({"pattern": "\ud800"}, "not supported"),
        ({"doc_cap": 0}, "doc_cap must be at least 1"),
        ({"max_chars": -1}, "max_chars must be at least 1"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
        ({"buffer_size": 0}, "buffer_size must be at least 1"),
    ],
)
def test_bad_training_input_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(**{"texts": ["text"], **arguments})


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="expected str, got int"):
        train(["text", 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected an Arrow array of strings, got int64"):
        rustbpe.Tokenizer().train_from_arrow(pa.array([1]), 300)
    with pytest.raises(TypeError, match="expected Arrow arrays, got str"):
        rustbpe.Tokenizer().train_from_arrow(["text"], 300)
    with pytest.raises(ValueError, match="document 1 is not valid UTF-8: bad byte at 2"):
        rustbpe.Tokenizer().train_from_arrow(pa.array([b"fine", b"ab\xff"]), 300)
    assert rustbpe.Tokenizer().encode("é") == [0xC3, 0xA9]


# Encoding


ODD_PARTS = [
    *(
        "'s",
        "'LL",
        "'ſ",
        "'",
        " ",
        "  ",
        "\r\n",
        "\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\u0085",
        "\x00",
        "\x1f",
    ),  # space, line ends
    *("12", "٣", "½", "Ⅻ", "𝟘𝟙", "the", " the", "é", "e\u0301", "ǅ", "ªº", "漢字"),  # numbers, letters, marks
    *("👩\u200d👩\u200d👧", "🇺🇳", "👍🏽", "!?", "...", "<|bos|>", "\u200b", "\ufeff"),  # symbols, formats
    *("\u0378", "\ue000", "\U000e0fff", "\U0010ffff"),  # unassigned, private use
]


@st.composite
def odd_texts(draw: st.DrawFn) -> str:
    """Texts of what splitters get wrong: every Unicode category, emoji sequences, line ends, digits, apostrophes."""
    parts = st.one_of(
        st.sampled_from(ODD_PARTS),
        st.characters(exclude_categories=["Cs"]),
        st.text(st.characters(min_codepoint=48, max_codepoint=57), min_size=1, max_size=9),
        st.text(st.sampled_from("abcdefgh ABC"), min_size=1, max_size=20),
    )
    return "".join(draw(st.lists(parts, max_size=14)))


@settings(max_examples=int(os.environ.get("RUSTBPE_EXAMPLES", "300")), deadline=None)
@given(odd_texts())
def test_ids_are_those_of_tiktoken(text: str) -> None:
    for ours, theirs in oracles():
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text)
        assert ours.decode(ids) == text
        assert "".join(ours.decode_stream(ids)) == text


_ORACLES: list[tuple[rustbpe.Tokenizer, tiktoken.Encoding]] = []


def oracles() -> list[tuple[rustbpe.Tokenizer, tiktoken.Encoding]]:
    if not _ORACLES:
        ranks = train(corpus(), 800).get_mergeable_ranks()
        for pattern in PATTERNS.values():
            ours = rustbpe.Tokenizer.from_ranks(pattern, ranks)
            _ORACLES.append((ours, as_tiktoken(ours)))
    return _ORACLES


def test_every_code_point_splits_as_in_tiktoken() -> None:
    """Each code point between letters, digits and spaces: this is where its class shows."""
    for start in range(0, 0x110000, 0x8000):
        codes = [c for c in range(start, start + 0x8000) if not 0xD800 <= c < 0xE000]
        text = "".join(f"a{chr(c)} {chr(c)}b1{chr(c)}2\n" for c in codes[:: 1 if start < 0x30000 else 29])
        for ours, theirs in oracles()[:1] if start >= 0x30000 else oracles():
            assert ours.encode(text) == theirs.encode_ordinary(text), hex(start)


def test_encoding_does_not_depend_on_how_it_is_called(tokenizer: rustbpe.Tokenizer) -> None:
    texts = [*corpus(500, seed=5), "", "x" * 5000, "\ud800 half", None]
    strings = [text for text in texts if text is not None]
    one_by_one = [tokenizer.encode(text) for text in strings]
    assert tokenizer.batch_encode(strings) == one_by_one
    assert tokenizer.batch_encode(strings, num_threads=7) == one_by_one
    clean = [None if text is None else text.replace("\ud800", "\ufffd") for text in texts]
    for kind in ("string", "large_string"):
        array = pa.array(clean, kind)
        for arrow in (array, pa.chunked_array([array[:3], array[3:3], array[3:]])):
            ids, offsets = tokenizer.encode_arrow(arrow, num_threads=3)
            assert ids.dtype == np.uint16
            assert offsets.dtype == np.int64
            assert len(offsets) == len(texts) + 1
            found = [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
            assert found == [*one_by_one, []]
    ids, offsets = tokenizer.encode_arrow(pa.chunked_array([], pa.string()))
    assert (ids.dtype, len(ids), offsets.tolist()) == (np.uint16, 0, [0])
    assert tokenizer.batch_encode([]) == []


def test_lone_surrogates_are_what_tiktoken_makes_of_them(tokenizer: rustbpe.Tokenizer) -> None:
    for text in ("\ud800", "a\udc00b", "\ud83d\ude42", "\ud83d \ude42", "\udfff\ud800"):
        assert tokenizer.encode(text) == as_tiktoken(tokenizer).encode_ordinary(text)


def test_special_tokens_are_not_parsed(tokenizer: rustbpe.Tokenizer) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode("<|bos|>")) == b"<|bos|>"
    assert max(tokenizer.encode("<|bos|>")) < tokenizer.vocab_size


def test_ids_beyond_16_bits_come_as_uint32() -> None:
    ranks = {bytes([b]): b for b in range(256)} | {b"ab": 65536}
    ids, _ = rustbpe.Tokenizer.from_ranks(rustbpe.GPT4_PATTERN, ranks).encode_arrow(pa.array(["ab c"]))
    assert ids.dtype == np.uint32
    assert ids.tolist() == [65536, 32, 99]


def test_ranks_make_the_same_tokenizer_again(tokenizer: rustbpe.Tokenizer) -> None:
    ranks = tokenizer.get_mergeable_ranks()
    for given_ranks in (ranks, dict(ranks), iter(ranks)):
        again = rustbpe.Tokenizer.from_ranks(tokenizer.get_pattern(), given_ranks)
        assert again.get_mergeable_ranks() == ranks
        assert again.encode("the quick dog's 12345") == tokenizer.encode("the quick dog's 12345")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"a": None}, "0x61 has no token"),
        ({b"xy": 97}, "id 97 is given twice"),
        ({b"": 256}, "token 256 is empty"),
        ({b"xy": 2**32}, "out of range"),
        ({b"xy": -1}, "out of range"),
        ({b"xy": 2**30}, "too large"),
    ],
)
def test_broken_ranks_are_refused(change: dict, message: str) -> None:
    ranks = {bytes([b]): b for b in range(256)} | change
    with pytest.raises(ValueError, match=message):
        rustbpe.Tokenizer.from_ranks(rustbpe.GPT4_PATTERN, {k: v for k, v in ranks.items() if v is not None})


def test_threads_may_share_a_tokenizer(tokenizer: rustbpe.Tokenizer) -> None:
    texts = corpus(300, seed=9)
    expected = tokenizer.batch_encode(texts, 1)
    results: list[list[list[int]]] = []
    threads = [threading.Thread(target=lambda: results.append(tokenizer.batch_encode(texts, 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


# Decoding


def test_decoding_says_which_id_is_wrong(tokenizer: rustbpe.Tokenizer) -> None:
    for wrong in (tokenizer.vocab_size, -1, 2**31, 2**40, 2**63, 2**70):
        with pytest.raises(ValueError, match=r"id|integer"):
            tokenizer.decode_bytes([1, wrong])
    with pytest.raises(ValueError, match=str(tokenizer.vocab_size)):
        tokenizer.decode([1, tokenizer.vocab_size])
    with pytest.raises(ValueError, match="integers"):
        tokenizer.decode_bytes([1.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="flat"):
        tokenizer.decode_bytes(np.zeros((2, 2), dtype=np.int64))
    assert tokenizer.decode_bytes([]) == b""
    assert tokenizer.decode_bytes(np.array([104, 105], dtype=np.uint16)) == b"hi"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 699), max_size=20))
def test_any_ids_decode_and_streaming_agrees(ids: list[int]) -> None:
    trained = oracles()[0][0]
    whole = trained.decode(ids)
    assert whole == trained.decode_bytes(ids).decode("utf-8", "replace")
    pieces = list(trained.decode_stream(ids))
    assert "".join(pieces) == whole
    assert all(pieces)


def test_streaming_never_shows_half_a_character() -> None:
    text = "é漢🙂"
    pieces = list(rustbpe.Tokenizer().decode_stream(text.encode()))
    assert pieces == list(text)


# Size and speed


@pytest.mark.parametrize("case", ["one letter", "latin-1", "empty documents", "white space", "digits"])
def test_degenerate_texts_take_no_time(case: str, tokenizer: rustbpe.Tokenizer) -> None:
    texts = {
        "one letter": ["a" * 1_000_000],
        "latin-1": [np.random.default_rng(0).bytes(1_000_000).decode("latin-1")],
        "empty documents": [""] * 10_000 + ["x"],
        "white space": [" " * 500_000 + "\n" + "\t " * 250_000],
        "digits": ["7" * 1_000_000],
    }[case]
    for run in (lambda: train(texts, 400), lambda: tokenizer.batch_encode(texts)):
        start = time.process_time()
        run()
        assert time.process_time() - start < 1


def test_a_vocabulary_of_very_long_tokens_is_usable() -> None:
    trained = train(["a" * 300_000], 300)
    assert len(trained.get_mergeable_ranks()[-1][0]) > 30_000
    assert trained.decode_bytes(trained.encode("a" * 100_001)) == b"a" * 100_001


# Packaging


def test_a_missing_library_is_explained(tmp_path: Path) -> None:
    package = tmp_path / "rustbpe"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "rustbpe" / "__init__.py").read_text())
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.prefix = 'nowhere'; import rustbpe"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "bash setup_env.sh" in run.stderr
    assert "ImportError" in run.stderr


def test_the_unicode_tables_are_tiktokens() -> None:
    script = ROOT / "dev" / "gen_unicode_tables.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
