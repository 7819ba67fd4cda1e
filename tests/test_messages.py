"""One shape for every conversation: what is repaired, what is counted, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat import messages as m
from nanochat.messages import check_messages, normalise


def talk(text: str) -> list[dict[str, Any]]:
    """ "u:Hi a:Hello" as messages; s is the system, d the developer."""
    roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
    return [{"role": roles[t[0]], "content": t[2:].replace("_", "\n\n")} for t in text.split()]


@pytest.mark.parametrize(
    ("given", "becomes", "notes"),
    [
        ("u:Hi a:Yes", "u:Hi a:Yes", {}),
        ("s:S u:Hi a:Yes u:bye", "s:S u:Hi a:Yes u:bye", {}),
        ("u:Hi u:there a:Yes", "u:Hi_there a:Yes", {m.JOINED: 1}),
        ("u:Hi a:Yes a:sure a:really", "u:Hi a:Yes_sure_really", {m.JOINED: 2}),
        ("s:A s:B u:Hi a:Yes", "s:A_B u:Hi a:Yes", {m.JOINED: 1}),
        ("d:S u:Hi a:Yes", "s:S u:Hi a:Yes", {}),
        ("u:Hi a:Yes s:Brief u:2+2 a:4", "u:Hi a:Yes u:Brief_2+2 a:4", {m.SYSTEM_MERGED: 1}),
        ("u:Hi s:Brief a:Yes", "u:Hi_Brief a:Yes", {m.SYSTEM_MERGED: 1}),
        ("a:Help? u:2+2 a:4", "u:2+2 a:4", {m.LEADING: 1}),
        ("s:S a:Help? a:Well? u:2+2 a:4", "s:S u:2+2 a:4", {m.LEADING: 1, m.JOINED: 1}),
    ],
)
def test_shape_is_repaired_and_counted(given: str, becomes: str, notes: dict[str, int]) -> None:
    result, counted = normalise(talk(given))
    assert result == talk(becomes)
    assert counted == notes
    check_messages(result)


def test_content_in_parts_or_missing() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    result, notes = normalise([{"role": "user", "content": parts}, {"role": "assistant"}])
    assert [t["content"] for t in result] == ["abc", ""]
    assert notes == {m.NO_TEXT: 1}
    result, notes = normalise([{"role": "user", "content": None}, {"role": "assistant", "content": "x"}])
    assert result[0]["content"] == ""
    assert notes == {m.NO_TEXT: 1}


def test_tools_in_every_form_are_rendered_alike() -> None:
    question, answer = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5!"}
    function = {"name": "calculator", "arguments": '{"expression": "2+3"}'}
    forms = [
        [{"role": "assistant", "content": None, "function_call": function}, {"role": "function", "content": "5"}],
        [{"role": "assistant", "tool_calls": [{"function": function}]}, {"role": "tool", "content": "5"}],
        [
            {"role": "assistant", "tool_calls": [{"id": "x", "function": function}]},
            {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "5"}]},
        ],
        [
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "..."},
                    {"type": "tool_use", "id": "t", "name": "calculator", "input": {"expression": "2+3"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "5"}]},
        ],
    ]
    for form in forms:
        result, notes = normalise([question, *form, answer])
        assert result == [
            question,
            {
                "role": "assistant",
                "content": [
                    {"type": "python", "text": "2+3"},
                    {"type": "python_output", "text": "5"},
                    {"type": "text", "text": "5!"},
                ],
            },
        ]
        assert set(notes) <= {m.THOUGHTS}
        check_messages(result)


def test_a_mark_survives_and_wins_when_turns_are_joined() -> None:
    result, _ = normalise([*talk("u:q a:one"), {"role": "assistant", "content": "two", "weight": 0, "id": 7}])
    assert result[1] == {"role": "assistant", "content": "one\n\ntwo", "weight": 0}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "non-empty list"),
        ("Hi", "non-empty list"),
        (["Hi"], "message 0 must be an object"),
        ([{"content": "Hi"}], "message 0 must be an object"),
        ([*talk("u:q"), {"role": "narrator", "content": "x"}], "message 1 has role 'narrator'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0: only text"),
        ([{"role": "user", "content": 4}], "message 0: only text"),
        ([*talk("u:q"), {"role": "tool", "content": "4"}], "message 1 is the result of a tool call"),
        ([*talk("u:q a:x u:y"), {"role": "tool", "content": "4"}], "message 3 is the result of a tool call"),
        ([*talk("u:q"), {"role": "assistant", "tool_calls": ["x"]}], 'must have a "function"'),
        (talk("s:S a:Hi"), "needs a message of the user"),
        (talk("s:S"), "needs a message of the user"),
    ],
)
def test_what_cannot_be_understood_is_named(given: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        normalise(given)
