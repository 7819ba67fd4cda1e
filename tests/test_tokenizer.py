"""The tokenizer: same ids as tiktoken, exact round trips, safe storage, and the chat format token by token."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.checkpoint_manager import checkpoint_folder, load_model, save_checkpoint
from nanochat.config import run_script
from nanochat.gpt import GPT
from nanochat.messages import check_messages
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    TiktokenEncoder,
    get_token_bytes,
    get_tokenizer,
)
from scripts import tok_eval, tok_train

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


@pytest.fixture(scope="module")
def oracle(tokenizer: RustBPETokenizer) -> TiktokenEncoder:
    return TiktokenEncoder(SPLIT_PATTERN, {token: i for i, token in enumerate(tokenizer.ranks)})


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
def test_same_ids_as_tiktoken_and_exact_round_trip(
    tokenizer: RustBPETokenizer, oracle: TiktokenEncoder, text: str
) -> None:
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
    for wrong in (400, -1):
        with pytest.raises(ValueError, match=f"below 400, got {wrong}"):
            tokenizer.decode([wrong])


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


def test_the_same_bytes_twice_are_harmless() -> None:
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"abc", b"ab"]
    ids = RustBPETokenizer.from_ranks(ranks).encode("ab abc xab")
    assert ids == TiktokenEncoder(SPLIT_PATTERN, {token: i for i, token in enumerate(ranks)}).encode("ab abc xab")
    assert RustBPETokenizer.from_ranks(ranks).decode(ids) == "ab abc xab"


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


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [json.dumps({"text": f"{text} {i}"}) for i in range(30) for text in TEXT] + ['{"text": ""}']
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


def test_tok_train_and_tok_eval_scripts(
    own_data: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_script(tok_train.main, tok_train.Config, [f"--data_dir={own_data}", "--vocab-size", "300", "--doc_cap=50"])
    trained = get_tokenizer()
    assert trained.get_vocab_size() == 300
    assert "tokenizer of 300 tokens" in capsys.readouterr().out
    assert "300" in (base_dir / "report" / "tokenizer-training.md").read_text()

    def offline(name: str) -> RustBPETokenizer:
        if name == "gpt2":
            raise ConnectionError
        return trained

    monkeypatch.setattr(RustBPETokenizer, "from_pretrained", offline)
    run_script(tok_eval.main, tok_eval.Config, [f"--data_dir={own_data}"])
    printed = capsys.readouterr().out
    assert "no comparison with gpt2" in printed
    for name in ("train", "val", *tok_eval.SAMPLES):
        assert f"| {name} " in printed
    assert "+0.0%" in printed
    assert "Not compared with GPT-2" in (base_dir / "report" / "tokenizer-evaluation.md").read_text()


def test_a_tokenizer_that_models_need_is_kept_when_another_is_trained(
    own_data: Path, base_dir: Path, tiny_model: GPT, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(vocab_size: int) -> RustBPETokenizer:
        tok_train.main(tok_train.Config(data_dir=str(own_data), vocab_size=vocab_size))
        return get_tokenizer()

    first = train(300)
    train(310)  # no model needs the first
    assert "need the tokenizer" not in capsys.readouterr().out
    first = train(300)
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": first.hash}
    for source, tag in (("base", "d4"), ("sft", "d4.old")):
        save_checkpoint(checkpoint_folder(source, tag), 1, tiny_model.state_dict(), None, meta)
    train(300)  # the same again: nothing to keep
    assert "need the tokenizer" not in capsys.readouterr().out
    train(310)
    kept = base_dir / "tokenizer" / f"{first.hash[:8]}.json"
    assert f"base d4, sft d4.old need the tokenizer that was there, of 300 tokens. It is kept as {kept}" in (
        capsys.readouterr().out
    )
    assert load_model("base", torch.device("cpu"))[1].hash == first.hash  # it answers as before
    assert f"takes the tokenizer that it was trained with, {kept}" in capsys.readouterr().out
    kept.write_text(kept.read_text().replace('"hash"', '"hush"'))
    with pytest.raises(ValueError, match=f"{kept} is damaged"):
        load_model("base", torch.device("cpu"))
    kept.unlink()
    with pytest.raises(RuntimeError, match="put that tokenizer back or train again"):
        load_model("base", torch.device("cpu"))


def test_tok_train_stops_at_what_the_text_supports(own_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tok_train.main(tok_train.Config(data_dir=str(own_data), vocab_size=5000))
    assert get_tokenizer().get_vocab_size() < 5000
    assert "supports only" in capsys.readouterr().out


def test_tok_train_names_a_corpus_without_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["", None, ""]}), tmp_path / "shard_00000.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "shard_00001.parquet")
    with pytest.raises(ValueError, match=r"training documents of .* are all empty"):
        tok_train.main(tok_train.Config(data_dir=str(tmp_path)))


def test_tok_train_reads_no_more_than_asked(own_data: Path) -> None:
    texts = [pa.array(["abcde", None, "äöüß", "x" * 100]), pa.array(["never read"])]
    for max_chars, documents, chars in ((1, 1, 1), (5, 1, 5), (6, 3, 6), (9, 3, 9), (10, 4, 10), (19, 4, 19)):
        reading = tok_train.Reading()
        got = list(tok_train.read(iter(texts), tok_train.Config(max_chars=max_chars, doc_cap=10), reading))
        assert (reading.documents, reading.chars) == (documents, chars)
        assert sum(len(array) for array in got) == documents


def test_tok_train_bad_settings_exit_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--vocab_size=264"], ["--max_chars=0"], ["--nope"]):
        with pytest.raises(SystemExit) as stop:
            run_script(tok_train.main, tok_train.Config, flags)
        assert stop.value.code == 2
    assert "265" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run_script(tok_train.main, tok_train.Config, ["--data_dir=/nowhere"])
    assert stop.value.code == 1
