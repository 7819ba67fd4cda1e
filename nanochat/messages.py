"""Conversations: {"messages": [{"role": "user", "content": "..."}, ...]}, and how other people's become like that.

`normalise` is the one way in, for training, the API, the page and the command line: what a model is asked has the shape
of what it has learned. Messages as OpenAI's chat API has them (https://platform.openai.com/docs/api-reference/chat) or
Anthropic's are read too: calls of tools and their results become parts of the assistant's answer.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

# The kinds of parts an assistant message may hold: (token before, token after, 1 if the model must learn to write it).
PARTS: dict[str, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}

# The one tool of the engine, by the names that people give it.
CALCULATOR_NAMES = ("python", "calculator", "calculate")

Conversation = dict[str, Any]  # {"messages": [{"role": ..., "content": ...}, ...]}
Message = dict[str, Any]

# What `normalise` may have to change, as it is counted and told.
JOINED = "two turns of one role in a row, joined"
SYSTEM_MERGED = "a system message after the start, made part of the user's turn"
LEADING = "a first turn that is the assistant's, left out"
NO_TEXT = "a message without text"
THOUGHTS = "hidden thoughts, left out"
BETWEEN = "\n\n"  # what stands between two texts that become one turn

TEXT_TYPES = ("text", "input_text", "output_text", None)
THOUGHT_TYPES = ("thinking", "redacted_thinking", "reasoning")


def normalise(messages: Any) -> tuple[list[Message], Counter[str]]:
    """Messages in the one shape that is rendered: an optional system message, then user and assistant in turn.

    Turns of one role in a row are joined. A system message after the start is said by the user, as the tokenizer does
    with the first one. An assistant's turn that nobody asked for is left out. Well-formed messages stay as they are; of
    other keys than role and content only `weight` is kept, where it is 0: such an answer is read, not learned.

    Returns:
        (messages, how often each change was made).

    Raises:
        ValueError: they can't be understood; names the message (counted from 0) and what is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    notes: Counter[str] = Counter()
    turns: list[Message] = []
    pending: list[tuple[Any, dict[str, str]]] = []  # calls that wait for a result: (id, part)
    after_result = merged = False
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str):
            raise ValueError(f'message {i} must be an object with "role" and "content"')
        content = message.get("content")
        if role in ("tool", "function"):
            _add_result(i, turns, pending, message.get("tool_call_id"), _text(i, content, notes))
            after_result = True
        elif role == "assistant":
            said = _assistant_content(i, message, pending, notes)
            _append(turns, role, said, "" if after_result else BETWEEN, notes)
            if message.get("weight") == 0:
                turns[-1]["weight"] = 0  # of joined ones too: what must not be learned is not learned
            after_result = merged = False
        elif role in ("system", "developer", "user"):
            if isinstance(content, list) and any(map(_is_result, content)):  # Anthropic's: in the user's name
                for part in filter(_is_result, content):
                    _add_result(i, turns, pending, part.get("tool_use_id"), _text(i, part.get("content"), notes))
                content = [part for part in content if not _is_result(part)]
                after_result = not content
                if after_result:
                    continue
            text = _text(i, content, notes)
            pending.clear()  # a result can only follow the message that called
            after_result = False
            at_start = all(turn["role"] == "system" for turn in turns)
            if role != "user" and at_start:
                _append(turns, "system", text, BETWEEN, notes)
                continue
            # What follows a merged system message is joined to it, which was counted already.
            _append(turns, "user", text, BETWEEN, Counter() if role != "user" or merged else notes)
            merged = role != "user"
            if merged:
                notes[SYSTEM_MERGED] += 1
        else:
            raise ValueError(f"message {i} has role {role!r}, expected system, user, assistant or tool")
    first = 1 if turns[0]["role"] == "system" else 0
    if turns[first:] and turns[first]["role"] == "assistant":
        notes[LEADING] += 1
        del turns[first]
    if len(turns) <= first:
        raise ValueError("a conversation needs a message of the user")
    return turns, notes


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "tool_result"


def _append(turns: list[Message], role: str, content: Any, between: str, notes: Counter[str]) -> None:
    """Add a turn, or its content to the last one if that is of the same role."""
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": content})
        return
    before = turns[-1]["content"]
    if between:
        notes[JOINED] += 1
    if isinstance(before, str) and isinstance(content, str):
        turns[-1]["content"] = before + (between if before and content else "") + content
        return
    separator = [{"type": "text", "text": between}] if between and before and content else []
    turns[-1]["content"] = [*_as_parts(before), *separator, *_as_parts(content)]


def _as_parts(content: str | list[dict[str, str]]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _text(i: int, content: Any, notes: Counter[str]) -> str:
    """The text of a content that may be a list of texts."""
    if isinstance(content, str):
        return content
    if content is None or content == []:
        notes[NO_TEXT] += 1
        return ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in TEXT_TYPES and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f"message {i}: only text can be used, got the content {part!r:.80}")
    return "".join(texts)


def _assistant_content(
    i: int, message: Message, pending: list[tuple[Any, dict[str, str]]], notes: Counter[str]
) -> str | list[dict[str, str]]:
    """The text of an assistant's message, or its parts if it has any but text."""
    content = message.get("content")
    calls = [(call, call.get("id") if isinstance(call, dict) else None) for call in message.get("tool_calls") or []]
    if message.get("function_call"):
        calls.append(({"function": message["function_call"]}, None))  # as OpenAI's API had it until 2023
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in THOUGHT_TYPES:
                notes[THOUGHTS] += 1
            elif kind == "tool_use":
                use = {"name": part.get("name"), "arguments": part.get("input")}
                calls.append(({"function": use}, part.get("id")))
            elif kind == "refusal" and isinstance(part.get("refusal"), str):
                parts.append({"type": "text", "text": part["refusal"]})
            elif kind in ("python", "python_output") and isinstance(part.get("text"), str):
                parts.append({"type": kind, "text": part["text"]})
            else:
                parts.append({"type": "text", "text": _text(i, [part], notes)})
    else:
        text = _text(i, content, Counter() if calls else notes)
        if not calls:
            return text
        parts = [{"type": "text", "text": text}] if text else []
    for call, number in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'message {i}: a tool call must have a "function" with a "name"')
        name = function["name"]
        part = {"type": "python", "text": _call_text(name, function.get("arguments"))}
        if name not in CALCULATOR_NAMES:
            notes[f"a call of {name}, a tool that the engine does not have, learned as text"] += 1
        pending.append((number, part))
        parts.append(part)
    return parts


def _add_result(
    i: int, turns: list[Message], pending: list[tuple[Any, dict[str, str]]], number: Any, text: str
) -> None:
    """Put the result of a call behind it; of the oldest call where it does not say of which."""
    at = next((n for n, (known, _) in enumerate(pending) if number is None or known in (number, None)), None)
    if at is None:
        raise ValueError(f"message {i} is the result of a tool call that no message before it makes")
    call = pending.pop(at)[1]
    parts = turns[-1]["content"]
    place = next(n for n, part in enumerate(parts) if part is call)
    parts.insert(place + 1, {"type": "python_output", "text": text})


def _call_text(name: str, arguments: Any) -> str:
    """The text of a call: an expression for the calculator, name(arguments) for any other tool."""
    values = arguments
    if isinstance(arguments, str):
        try:
            values = json.loads(arguments)
        except ValueError:
            values = arguments
    if name not in CALCULATOR_NAMES:
        return f"{name}({arguments if isinstance(arguments, str) else json.dumps(values, ensure_ascii=False)})"
    texts = [v for v in values.values() if isinstance(v, str)] if isinstance(values, dict) else []
    return texts[0] if len(texts) == 1 else str(arguments)


def check_messages(messages: Any) -> None:
    """Check that messages are well formed: an optional system message, then user and assistant in turn.

    Raises:
        ValueError: naming the message (counted from 0) and what is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation must be a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {i} must be an object with "role" and "content"')
        role, content = message["role"], message["content"]
        if role == "system" and i == 0:
            expected = "system"
        else:
            expected = "user" if (i - (messages[0]["role"] == "system")) % 2 == 0 else "assistant"
        if role != expected:
            raise ValueError(
                f"message {i} has role {role!r}, expected {expected!r} (user and assistant take turns, after an "
                "optional system message)"
            )
        if role != "assistant" and not isinstance(content, str):
            raise ValueError(f"message {i}: the content of a {role} message must be a string")
        if role == "assistant" and not isinstance(content, str):
            _check_parts(i, content)
    if messages[-1]["role"] == "system":
        raise ValueError("a conversation needs a user message after the system message")


def _check_parts(i: int, content: Any) -> None:
    if not isinstance(content, list):
        raise ValueError(f"message {i}: the content of an assistant message must be a string or a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
            raise ValueError(
                f'message {i}: a part must be {{"type": one of {", ".join(PARTS)}, "text": a string}}, got {part!r:.80}'
            )
