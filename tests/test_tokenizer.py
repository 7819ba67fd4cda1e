"""The tokenizer: same ids as tiktoken, exact round trips, safe storage, and the chat format token by token."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    TiktokenEncoder,
    check_messages,
    get_token_bytes,
    get_tokenizer,
)

TEXT = [
    "The river runs past the mill, and the miller's daughter counts 1234 ducks on the river.\n\n",
    "def add(a, b):\n    return a + b  # adds\n",
    "Über den Flüssen: größere Brücken, kältere Nächte. 東京の朝。 😀😀\r\n",
    "It's what we've said, isn't it? They'll see; I'd say so. THE END'S NEAR\t\t!!! ...   ",
]
SPECIAL_TEXT = "".join(SPECIAL_TOKENS) + "<|endoftext|>"
# Text that reaches all branches of the split pattern more often than hypothesis' own.
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*TEXT, *SPECIAL_TOKENS, " ", "\n", "'ll", "12", "é", "\u3000"]), max_size=6).map("".join),
)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(TEXT * 20, 400)


def test_vocab_size_counts_bytes_merges_and_specials(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.ranks[:256] == [bytes([i]) for i in range(256)]
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(391, 400))
    assert tokenizer.get_bos_token_id() == 391
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    with pytest.raises(ValueError, match="no special token"):
        tokenizer.encode_special("<|nope|>")


def test_too_small_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 265"):
        RustBPETokenizer.train_from_iterator(TEXT, 264)
    assert RustBPETokenizer.train_from_iterator(TEXT, 265).get_vocab_size() == 265


def test_text_too_poor_for_the_vocabulary_gives_a_smaller_one() -> None:
    small = RustBPETokenizer.train_from_iterator(["aa aa aa"], 300)
    assert 265 < small.get_vocab_size() < 300
    assert small.decode(small.encode("aa bb")) == "aa bb"


@given(text=texts)
@settings(max_examples=150, deadline=None)
def test_same_ids_as_tiktoken_and_exact_round_trip(tokenizer: RustBPETokenizer, text: str) -> None:
    oracle = TiktokenEncoder(SPLIT_PATTERN, {token: i for i, token in enumerate(tokenizer.ranks)})
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(i < 391 for i in ids)  # never a special token, whatever the text says


@given(batch=st.lists(st.one_of(texts, st.none()), max_size=8), lead=st.integers(0, 2))
@settings(max_examples=50, deadline=None)
def test_arrow_encoding_equals_encoding_one_by_one(
    tokenizer: RustBPETokenizer, batch: list[str | None], lead: int
) -> None:
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(batch, kind).slice(min(lead, len(batch)))  # a slice does not begin at offset 0
        ids, offsets = tokenizer.encode_arrow(array)
        assert ids.dtype == np.uint16
        assert offsets.dtype == np.int64
        assert len(offsets) == len(array) + 1
        for i, text in enumerate(array.to_pylist()):
            assert ids[offsets[i] : offsets[i + 1]].tolist() == tokenizer.encode(text or "")


def test_lists_prepend_and_append(tokenizer: RustBPETokenizer) -> None:
    plain = tokenizer.encode("ab")
    assert tokenizer.encode("ab", prepend="<|bos|>", append=392) == [391, *plain, 392]
    assert tokenizer(["ab", ""], prepend=391) == [[391, *plain], [391]]
    with pytest.raises(TypeError):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_special_names_in_text_are_ordinary_characters(tokenizer: RustBPETokenizer) -> None:
    assert max(tokenizer.encode(SPECIAL_TEXT)) < 391
    assert tokenizer.decode([391]) == "<|bos|>"


def test_lone_surrogates_become_replacement_characters(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def test_incomplete_utf8_and_ids_out_of_range(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.decode(list("é".encode())[:1]) == "\ufffd"
    with pytest.raises(ValueError, match="below 400"):
        tokenizer.decode([400])


def test_token_bytes_count_raw_bytes_and_zero_for_specials(tokenizer: RustBPETokenizer) -> None:
    lengths = tokenizer.token_lengths()
    assert lengths[:256].tolist() == [1] * 256  # also those that decode to the three bytes of U+FFFD
    assert lengths[391:].tolist() == [0] * 9
    text = "".join(TEXT)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_save_and_load(tokenizer: RustBPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tok_train"):
        get_tokenizer()
    with pytest.raises(FileNotFoundError, match="tok_train"):
        get_token_bytes()
    tokenizer.save(tmp_path / "tokenizer")
    loaded = get_tokenizer()
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    stored = torch.load(tmp_path / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert stored.dtype == torch.int32
    assert stored.tolist() == tokenizer.token_lengths().tolist() == get_token_bytes("cpu").tolist()
    assert sorted(p.name for p in (tmp_path / "tokenizer").iterdir()) == ["token_bytes.pt", "tokenizer.json"]


def test_damaged_file_is_named(tokenizer: RustBPETokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_text()
    stored = json.loads(whole)
    stored["ranks"][300], stored["ranks"][301] = stored["ranks"][301], stored["ranks"][300]
    for bad in (whole[: len(whole) // 2], "[]", json.dumps(stored), whole.replace("nanochat-bpe-1", "other")):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
            RustBPETokenizer.from_directory(tmp_path)


def test_hash_tells_tokenizers_apart(tokenizer: RustBPETokenizer) -> None:
    assert RustBPETokenizer.from_ranks(tokenizer.ranks).hash == tokenizer.hash
    assert RustBPETokenizer.from_ranks(tokenizer.ranks[:-1]).hash != tokenizer.hash


def names(tokenizer: RustBPETokenizer, ids: list[int], mask: list[int]) -> list[tuple[str, int]]:
    """Neighbouring ordinary tokens of the same mask as one text, special tokens by name."""
    out: list[tuple[str, int]] = []
    for i, m in zip(ids, mask, strict=True):
        text = tokenizer.id_to_token(i)
        if i < 391 and out and out[-1][1] == m and not out[-1][0].startswith("<|"):
            out[-1] = (out[-1][0] + text, m)
        else:
            out.append((text, m))
    return out


def test_conversation_with_system_and_tool(tokenizer: RustBPETokenizer) -> None:
    parts = [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "2+2"},
        {"type": "python_output", "text": "4"},
        {"type": "text", "text": "four."},
    ]
    conversation = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": parts},
            {"role": "user", "content": "ok"},
            {"role": "assistant", "content": "yes"},
        ]
    }
    ids, mask = tokenizer.render_conversation(conversation)
    assert names(tokenizer, ids, mask) == [
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("Be brief.\n\n2+2?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("So ", 1),
        ("<|python_start|>", 1),
        ("2+2", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("4", 0),
        ("<|output_end|>", 0),
        ("four.", 1),
        ("<|assistant_end|>", 1),
        ("<|user_start|>", 0),
        ("ok", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("yes", 1),
        ("<|assistant_end|>", 1),
    ]
    assert tokenizer.render_conversation(conversation, max_tokens=5) == (ids[:5], mask[:5])
    prompt = tokenizer.render_for_completion(conversation)
    assert prompt == ids[: len(ids) - len(tokenizer.encode("yes")) - 1]
    open_ended = {"messages": conversation["messages"][:-1]}
    assert tokenizer.render_for_completion(open_ended) == prompt
    assert "yes" in tokenizer.visualize_tokenization(ids, mask).replace("\033[0m|\033[92m", "")


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        (["hello"], "message 0 must be an object"),
        ([{"role": "user"}], "message 0 must be an object"),
        ([message("assistant", "hi")], "message 0 has role 'assistant', expected 'user'"),
        ([message("user", "a"), message("user", "b")], "message 1 has role 'user', expected 'assistant'"),
        ([message("user", "a"), message("system", "b")], "message 1 has role 'system'"),
        ([message("system", "a"), message("assistant", "b")], "message 1 has role 'assistant', expected 'user'"),
        ([message("system", "a")], "needs a user message"),
        ([message("user", None)], "message 0: the content of a user message must be a string"),
        ([message("user", "a"), message("assistant", 3)], "message 1: the content of an assistant message"),
        ([message("user", "a"), message("assistant", [{"type": "image", "text": ""}])], "message 1: a part must be"),
        ([message("user", "a"), message("assistant", [{"type": "text"}])], "message 1: a part must be"),
    ],
)
def test_malformed_messages_are_named(messages: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_messages(messages)
