"""Conversations in rows: nothing split, nothing twice, exact targets, exact resume, and errors that name the line."""

import json
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

from nanochat import packing
from nanochat.chat_data import ConversationLoader, load_conversations
from nanochat.packing import pack_best_fit
from nanochat.tokenizer import RustBPETokenizer

BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])
BOS, ASSISTANT_END = BYTES.get_bos_token_id(), BYTES.encode_special("<|assistant_end|>")

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


def rows_of(loaders: list[ConversationLoader], steps: int) -> list[tuple[list[int], list[int]]]:
    """(x, y) of all rows of the next global batches."""
    out = []
    for _ in range(steps):
        for loader in loaders:
            x, y = next(loader)
            assert x.dtype == y.dtype == torch.int64
            out += list(zip(x.tolist(), y.tolist(), strict=True))
    return out


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
        patch.setattr(packing, "WINDOW", window)
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
            stats = loader.stats
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
        patch.setattr(packing, "WINDOW", window)
        first = make_loaders(data, first_world, first_B, T)
        got = rows_of(first, steps)
        states = [loader.state_dict() for loader in first]
        assert all(state == states[0] for state in states)
        second = make_loaders(data, second_world, second_B, T, state=states[0])
        assert second[0].epoch == first[0].epoch
        got += rows_of(second, 3)
        reference = make_loaders(data, 1, len(got), T)
        assert got == rows_of(reference, 1)
        assert second[0].stats == reference[0].stats


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
    assert loader.stats == loader.forecast
    assert loader.epoch == 1
    learned = [i for i in y[0].tolist() if i >= 0]
    assert sorted(BYTES.decode(learned).split("<|assistant_end|>")) == ["", "fine", "short"]
    assert "1 truncated, 2 dropped" in str(loader.stats)


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
    monkeypatch.setattr(packing, "WINDOW", 10)
    data = [conversation("q", "a" * (i % 7)) for i in range(200)]
    loader = ConversationLoader(data, BYTES, 1, 64)
    while loader.epoch == 0:
        next(loader)
    assert loader.rows_per_epoch == pytest.approx(loader.stats.rows, rel=0.1)
    assert loader.forecast.conversations == 200


def test_small_cache_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [conversation("q", f"{i}") for i in range(20)]
    expected = rows_of([ConversationLoader(data, BYTES, 1, 40)], 30)
    monkeypatch.setattr(packing, "CACHE_BYTES", 2000)
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
        ("{", "not JSON"),
        ('{"text": "a"}', "a non-empty list of messages"),
        (json.dumps(PAIR[1:]), "message 0 has role 'assistant'"),
    ]:
        path.write_text(json.dumps(PAIR) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{complaint}"):
            load_conversations(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversations"):
        load_conversations(path)


def test_bad_parquet_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet"):
        load_conversations(path)
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"no column 'messages' \(it has: text\)"):
        load_conversations(path)
    pq.write_table(pa.table({"messages": [PAIR, PAIR[:1] * 2]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: message 1 has role 'user'"):
        load_conversations(path)
