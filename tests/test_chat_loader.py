"""Conversations in rows: nothing split, nothing twice, exact targets, exact resume, and errors that name the line."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataloader import rows as rows_of

from nanochat.data import chat_rows
from nanochat.data.chat_loader import ConversationLoader, load_conversations
from nanochat.data.chat_rows import pack_best_fit
from nanochat.gpt import GPT, GPTConfig
from nanochat.messages import normalise
from nanochat.tokenizer import RustBPETokenizer

BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])
BOS = BYTES.get_bos_token_id()

short_text = st.text(max_size=12)
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output"]), "text": short_text})
turn = st.tuples(short_text, st.one_of(short_text, st.lists(part, max_size=3)))


def make_conversation(system: str | None, turns: list[tuple[str, Any]], open_end: bool) -> dict[str, Any]:
    """A well-formed conversation; with `open_end` the last assistant message is missing."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages[:-1] if open_end else messages}


conversations = st.builds(
    make_conversation, st.one_of(st.none(), short_text), st.lists(turn, min_size=1, max_size=4), st.booleans()
)
datasets = st.lists(conversations, min_size=1, max_size=25)


def expected_pieces(conversation: dict[str, Any], capacity: int, supervise: str) -> tuple[tuple[int, int], ...] | None:
    """((id, supervised), ...) of what must be trained on, written independently of the renderer; None if dropped."""
    messages = list(conversation["messages"])
    best: tuple[tuple[int, int], ...] | None = None
    for n in range(len(messages), 0, -1):
        ids, mask = BYTES.render_conversation({"messages": messages[:n]}, max_tokens=None) if n else ([], [])
        whole = n == len(messages)
        ends_well = messages[n - 1]["role"] == "assistant"
        if len(ids) <= capacity and (whole or ends_well):
            if supervise == "all":
                mask = [0] + [1] * (len(mask) - 1)
            best = tuple(zip(ids, mask, strict=True)) if any(mask) else None
            break
        if n == 2 and messages[0]["role"] == "system":  # a system message alone can't be rendered
            break
    return best


def make_loaders(
    data: list[Any], world_size: int, B: int, T: int, supervise: Any = "assistant", state: Any = None
) -> list[ConversationLoader]:
    """One loader per rank."""
    state = json.loads(json.dumps(state))
    return [
        ConversationLoader(data, BYTES, B, T, rank=r, world_size=world_size, supervise=supervise, state=state)
        for r in range(world_size)
    ]


@given(data=datasets, T=st.integers(8, 120), supervise=st.sampled_from(["all", "assistant"]), window=st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_an_epoch_supervises_every_kept_token_exactly_once(
    data: list[dict[str, Any]], T: int, supervise: Any, window: int
) -> None:
    pieces = [piece for c in data if (piece := expected_pieces(c, T + 1, supervise)) is not None]
    expected = Counter(map(to_last_supervised, pieces))
    dropped = len(data) - sum(expected.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rows, "WINDOW", window)
        loader = ConversationLoader(data, BYTES, 1, T, supervise=supervise)
        if not pieces:
            with pytest.raises(ValueError, match="raise --max_seq_len"):
                next(loader)
            return
        for epoch in range(2):
            found: Counter[tuple[tuple[int, int], ...]] = Counter()
            while loader.epoch == epoch:
                ((x, y),) = rows_of([loader], 1)
                assert any(target >= 0 for target in y)
                found += split_row(x, y)
            assert found == expected
            stats = loader.counts
            assert stats.conversations == sum(expected.values()) * (epoch + 1)
            assert stats.rows * (T + 1) == stats.tokens + stats.padding
            assert stats.supervised == (epoch + 1) * sum(m for piece in expected.elements() for _, m in piece)
            assert stats.dropped == dropped * (epoch + 1)


def split_row(x: list[int], y: list[int]) -> Counter[tuple[tuple[int, int], ...]]:
    """The conversations in a row, by their bos; padding is bos too, but a lone one."""
    tokens = [(i, 0) for i in x[:1]] + [(i, int(t >= 0)) for i, t in zip(x[1:], y[:-1], strict=True)]
    assert all(t in (-1, i) for i, t in zip(x[1:], y[:-1], strict=True))
    if y[-1] >= 0:
        tokens.append((y[-1], 1))
    pieces: list[list[tuple[int, int]]] = []
    for token in tokens:
        if token[0] == BOS:
            pieces.append([])
        pieces[-1].append(token)
    return Counter(to_last_supervised(piece) for piece in pieces if len(piece) > 1)


def to_last_supervised(piece: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Without what follows the last supervised token: of a full row that token is neither in x nor in y."""
    return tuple(piece[: max(i for i, (_, supervised) in enumerate(piece) if supervised) + 1])


@given(
    data=datasets,
    T=st.integers(30, 80),
    shapes=st.tuples(*[st.integers(1, 4)] * 4),
    steps=st.integers(0, 5),
    window=st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_resume_and_world_size_keep_the_order(
    data: list[dict[str, Any]], T: int, shapes: tuple[int, int, int, int], steps: int, window: int
) -> None:
    if all(expected_pieces(c, T + 1, "assistant") is None for c in data):
        return
    first_world, first_B, second_world, second_B = shapes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rows, "WINDOW", window)
        first = make_loaders(data, first_world, first_B, T)
        got = rows_of(first, steps)
        states = [loader.state_dict() for loader in first]
        assert all(state == states[0] for state in states)
        second = make_loaders(data, second_world, second_B, T, state=states[0])
        assert second[0].epoch == first[0].epoch
        got += rows_of(second, 3)
        reference = make_loaders(data, 1, len(got), T)
        assert got == rows_of(reference, 1)
        assert second[0].counts == reference[0].counts


def conversation(question: str, *answers: str) -> dict[str, Any]:
    return make_conversation(None, [(question, answer) for answer in answers], False)


def test_too_long_is_cut_at_a_turn_and_counted() -> None:
    data = [
        conversation("q", "short", "x" * 100),  # the first turn fits
        conversation("q", "y" * 100),  # none fits
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        conversation("q", "fine"),
    ]
    loader = ConversationLoader(data, BYTES, 1, 40)
    assert (loader.forecast.conversations, loader.forecast.truncated, loader.forecast.dropped) == (2, 1, 2)
    assert loader.rows_per_epoch == 1
    _, y = next(loader)
    assert loader.counts == loader.forecast
    assert loader.epoch == 1
    learned = [i for i in y[0].tolist() if i >= 0]
    assert sorted(BYTES.decode(learned).split("<|assistant_end|>")) == ["", "fine", "short"]
    assert "1 truncated, 2 dropped" in str(loader.counts)


def test_supervise_all_includes_the_user_and_conversations_without_answer() -> None:
    data = [{"messages": [{"role": "user", "content": "hi"}]}]
    x, y = next(ConversationLoader(data, BYTES, 1, 8, supervise="all"))
    user_start, user_end = BYTES.encode_special("<|user_start|>"), BYTES.encode_special("<|user_end|>")
    assert x[0].tolist()[:5] == [BOS, user_start, ord("h"), ord("i"), user_end]
    assert y[0].tolist() == [user_start, ord("h"), ord("i"), user_end, -1, -1, -1, -1]


def test_tool_output_is_not_learned() -> None:
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    _, y = next(ConversationLoader([make_conversation(None, [("q", parts)], False)], BYTES, 1, 30))
    assert BYTES.decode([i for i in y[0].tolist() if i >= 0]) == "<|python_start|>1+1<|python_end|><|assistant_end|>"


def test_epochs_are_shuffled_differently() -> None:
    data = [conversation("q", f"{i}") for i in range(50)]
    loader = ConversationLoader(data, BYTES, 1, 60)
    epochs = [rows_of([loader], loader.rows_per_epoch) for _ in range(2)]
    assert loader.epoch == 2
    assert epochs[0] != epochs[1]
    assert rows_of([ConversationLoader(data, BYTES, 1, 60)], len(epochs[0])) == epochs[0]
    assert rows_of([ConversationLoader(data, BYTES, 1, 60, seed=1)], len(epochs[0])) != epochs[0]


def test_forecast_scales_the_first_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_rows, "WINDOW", 10)
    data = [conversation("q", "a" * (i % 7)) for i in range(200)]
    loader = ConversationLoader(data, BYTES, 1, 64)
    while loader.epoch == 0:
        next(loader)
    assert loader.rows_per_epoch == pytest.approx(loader.counts.rows, rel=0.1)
    assert loader.forecast.conversations == 200


def test_small_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [conversation("q", f"{i}") for i in range(20)]
    expected = rows_of([ConversationLoader(data, BYTES, 1, 40)], 30)
    monkeypatch.setattr(chat_rows, "CACHE_BYTES", 2000)
    assert rows_of([ConversationLoader(data, BYTES, 1, 40)], 30) == expected


def test_state_of_other_data_or_settings_is_refused() -> None:
    data = [conversation("q", "a")]
    state = ConversationLoader(data, BYTES, 1, 30).state_dict()
    with pytest.raises(ValueError, match="conversations was 1, is 2"):
        ConversationLoader(data * 2, BYTES, 1, 30, state=state)
    with pytest.raises(ValueError, match="sequence_len was 30, is 31"):
        ConversationLoader(data, BYTES, 1, 31, state=state)


def test_bad_conversation_is_named_by_its_number() -> None:
    data = [conversation("q", "a"), {"messages": [{"role": "assistant", "content": "a"}]}]
    with pytest.raises(ValueError, match="conversation 1: message 0 has role 'assistant'"):
        next(ConversationLoader(data, BYTES, 1, 30))
    with pytest.raises(ValueError, match="no conversations"):
        ConversationLoader([], BYTES, 1, 30)


@given(lengths=st.lists(st.integers(0, 20), max_size=60), capacity=st.integers(20, 50))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_item_whole(lengths: list[int], capacity: int) -> None:
    bins = pack_best_fit(lengths, capacity)
    assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in items) for items in bins]
    assert all(load <= capacity for load in loads)
    # Any two bins could not be one: at most one bin is at most half full.
    assert sum(2 * load <= capacity for load in loads) <= 1


def test_packing_is_tight() -> None:
    assert len(pack_best_fit([6, 5, 4, 3, 2] * 20, 10)) <= 41  # 40 would be perfect
    with pytest.raises(ValueError, match="more than the capacity"):
        pack_best_fit([11], 10)


# --- files ------------------------------------------------------------------------------------------------------------

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ü"}]


def test_jsonl_of_both_forms_and_parquet(tmp_path: Path) -> None:
    lines = [PAIR, {"messages": PAIR, "source": "x"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    assert load_conversations(tmp_path / "a.jsonl") == [{"messages": PAIR}] * 2
    pq.write_table(pa.table({"messages": [PAIR, PAIR, PAIR]}), tmp_path / "a.parquet")
    assert load_conversations(tmp_path / "a.parquet") == [{"messages": PAIR}] * 3


def test_bad_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        load_conversations(path)
    for line, complaint in [
        ("{", "not valid JSON"),
        ('{"text": "a"}', r"no known form of a conversation \(its keys: text\)"),
        (json.dumps(PAIR[1:]), "needs a message of the user"),
    ]:
        path.write_text(json.dumps(PAIR) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{complaint}"):
            load_conversations(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="nothing is in it"):
        load_conversations(path)


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet"):
        load_conversations(path)
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"row 0: no known form of a conversation \(its keys: text\)"):
        load_conversations(path)
    pq.write_table(pa.table({"messages": [PAIR, [{"role": "narrator", "content": "q"}]]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: message 0 has role 'narrator'"):
        load_conversations(path)


# --- segments: every conversation of a row is read as if it were alone ------------------------------------------------


@torch.no_grad()
def unpacked_loss(model: GPT, data: list[dict[str, Any]], T: int) -> tuple[float, int]:
    """Summed loss and number of supervised tokens, one conversation at a time, rendered by hand."""
    total, count = 0.0, 0
    for conversation in data:
        ids, mask = BYTES.render_conversation(conversation, max_tokens=None)
        assert len(ids) <= T + 1
        x, y = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
        y = torch.where(torch.tensor([mask[1:]]) == 1, y, -1)
        total += float(model(x, y, loss_reduction="sum"))
        count += int((y >= 0).sum())
    return total, count


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_loss_of_packed_conversations_is_that_of_each_alone(batch_size: int) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(96, BYTES.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=32))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            if p.count_nonzero() == 0:
                p.normal_(0.0, 0.3)
    data = [conversation("q" * (i % 9), f"{i}" * (1 + i % 5), "and ü") for i in range(24)]
    expected, count = unpacked_loss(model, data, 96)
    losses = {}
    for isolate in (True, False):
        loader = ConversationLoader(data, BYTES, batch_size, 96, isolate=isolate)
        total, seen = 0.0, 0
        while loader.epoch == 0:
            x, y, *segments = next(loader)
            if loader.epoch == 1:  # the last batch may hold rows of the next epoch
                rows = loader.rows_per_epoch % batch_size or batch_size
                x, y, segments = x[:rows], y[:rows], [s[:rows] for s in segments]
            total += float(model(x, y, loss_reduction="sum", segments=segments[0] if segments else None))
            seen += int((y >= 0).sum())
        assert seen == count
        losses[isolate] = total / seen
    assert losses[True] == pytest.approx(expected / count, rel=1e-5)
    assert losses[False] != pytest.approx(expected / count, rel=1e-3)


@given(data=datasets, T=st.integers(30, 90))
@settings(max_examples=30, deadline=None)
def test_segments_change_exactly_where_a_conversation_begins(data: list[dict[str, Any]], T: int) -> None:
    if all(expected_pieces(c, T + 1, "assistant") is None for c in data):
        return
    x, _, segments = next(ConversationLoader(data, BYTES, 2, T, isolate=True))
    for row, ids in zip(segments.tolist(), x.tolist(), strict=True):
        borders = [i for i in range(1, T) if row[i] != row[i - 1]]
        assert all(row[i] == row[i - 1] + 1 and ids[i] == BOS for i in borders)
        inside = [i for i in range(1, T) if ids[i] == BOS and row[i] == row[i - 1]]
        assert all(row[i] == row[-1] for i in inside)  # the padding behind the last conversation


# --- masks ------------------------------------------------------------------------------------------------------------

# NANOCHAT_MASK_EXAMPLES=1000 checks as many conversations.
MASK_EXAMPLES = int(os.environ.get("NANOCHAT_MASK_EXAMPLES", "200"))


@given(
    c=st.builds(
        make_conversation,
        st.one_of(st.none(), st.text(max_size=30)),
        st.lists(st.tuples(st.text(max_size=30), st.one_of(st.text(max_size=30), st.lists(part, max_size=5)))).filter(
            bool
        ),
        st.booleans(),
    )
)
@settings(max_examples=MASK_EXAMPLES, deadline=None)
def test_exactly_what_the_assistant_writes_is_supervised(c: dict[str, Any]) -> None:
    """The bytes of the supervised tokens, written down from the messages without the renderer."""
    expected = b""
    for message in c["messages"]:
        if message["role"] != "assistant":
            continue
        content = message["content"]
        for piece in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            text = piece["text"].encode("utf-8", errors="replace")
            if piece["type"] == "python":
                text = b"<|python_start|>" + text + b"<|python_end|>"
            expected += b"" if piece["type"] == "python_output" else text
        expected += b"<|assistant_end|>"
    length = len(BYTES.render_conversation(c, max_tokens=None)[0])
    if not expected:
        with pytest.raises(ValueError, match="raise --max_seq_len"):
            next(ConversationLoader([c], BYTES, 1, length, isolate=True))
        return
    x, y, _ = next(ConversationLoader([c], BYTES, 1, length, isolate=True))
    assert BYTES.decode_bytes([i for i in y[0].tolist() if i >= 0]) == expected
    assert all(t in (-1, i) for i, t in zip(x[0, 1:].tolist(), y[0, :-1].tolist(), strict=True))


# --- messages of OpenAI's form ----------------------------------------------------------------------------------------


def call(name: str, arguments: Any, number: str = "1") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_openai_messages_with_tools_become_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "12+34, "}, {"type": "text", "text": "and 5*6?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call("calculator", '{"expression": "12+34"}', "a"), call("python", {"code": "5*6"}, "b")],
        },
        {"role": "tool", "tool_call_id": "b", "content": "30"},
        {"role": "tool", "tool_call_id": "a", "content": "46"},
        {"role": "assistant", "content": "46 and 30."},
        {"role": "user", "content": "The weather?"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [call("get_weather", '{"city": "Rome"}')]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": []}) + "\n")
    (c,) = load_conversations(path)
    assert [m["role"] for m in c["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert c["messages"][1]["content"] == "12+34, and 5*6?"
    assert [(p["type"], p["text"]) for p in c["messages"][2]["content"]] == [
        ("python", "12+34"),
        ("python_output", "46"),
        ("python", "5*6"),
        ("python_output", "30"),
        ("text", "46 and 30."),
    ]
    assert c["messages"][4]["content"][1] == {"type": "python", "text": 'get_weather({"city": "Rome"})'}
    assert "1 × a call of get_weather, a tool that the engine does not have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "tool", "tool_call_id": "x", "content": "1"}, "message 1 is the result of a tool call"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, 'message 1: a tool call must have a "function"'),
        ({"role": "user", "content": [{"type": "chart"}]}, "message 1: only text"),
    ],
)
def test_bad_openai_messages_name_the_line(tmp_path: Path, message: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + json.dumps([PAIR[0], message]) + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {complaint}"):
        load_conversations(path)


@given(c=conversations)
@settings(max_examples=30, deadline=None)
def test_our_own_messages_stay_as_they_are(c: dict[str, Any]) -> None:
    assert normalise(c["messages"]) == (c["messages"], {})
