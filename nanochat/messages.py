"""Conversations: {"messages": [{"role": "user", "content": "..."}, ...]}, and the check that they are well formed.

Messages as OpenAI's chat API has them (https://platform.openai.com/docs/api-reference/chat) are read too: a developer
message is a system message, and tool calls and their results become parts of the assistant's answer.
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


def to_conversation(record: Any, other_tools: Counter[str] | None = None) -> Conversation:
    """The conversation in a record of a file: {"messages": [...]}, or the list of messages itself.

    Args:
        record: a value of JSON; other keys than "messages" are ignored.
        other_tools: counts the calls of tools that are not the calculator.

    Raises:
        ValueError: it is none; names the message and what is wrong with it.
    """
    messages = from_openai(record.get("messages") if isinstance(record, dict) else record, other_tools)
    check_messages(messages)
    return {"messages": messages}


def from_openai(messages: Any, other_tools: Counter[str] | None = None) -> Any:
    """Messages in OpenAI's form as ours; those that are ours already, or malformed, come back as they are.

    Args:
        messages: a list of messages.
        other_tools: counts the calls of tools that are not the calculator; these are written as name(arguments).

    Raises:
        ValueError: a tool call or result is malformed; names the message.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return messages
    if not any(_is_openai(m) for m in messages):
        return messages
    result: list[dict[str, Any]] = []
    calls: dict[str, dict[str, str]] = {}  # the parts of calls that wait for a result, by id
    after_tool = False
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "tool":
            call = calls.pop(str(message.get("tool_call_id")), None)
            if call is None:
                raise ValueError(f"message {i} is the result of a tool call that no message before it makes")
            parts = result[-1]["content"]
            at = next(n for n, part in enumerate(parts) if part is call)
            parts.insert(at + 1, {"type": "python_output", "text": _text(i, message.get("content"))})
        elif role == "assistant":
            parts = _assistant_parts(i, message, calls, other_tools)
            if after_tool:
                result[-1]["content"] += parts
            else:
                result.append({"role": role, "content": parts})
        else:
            calls.clear()  # a result can only follow the message that called
            content = message.get("content")
            content = _text(i, content) if isinstance(content, list) else content
            result.append({"role": "system" if role == "developer" else role, "content": content})
        after_tool = role == "tool"
    return result


def _is_openai(message: dict[str, Any]) -> bool:
    """True if a message has something that only OpenAI's form has."""
    role, content = message.get("role"), message.get("content")
    texts_only = role != "assistant" and isinstance(content, list)
    return bool(message.get("tool_calls")) or role in ("tool", "developer") or texts_only


def _text(i: int, content: Any) -> str:
    """The text of a content that may be a list of texts."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(c, dict) and c.get("type") == "text" for c in content):
        return "".join(str(c.get("text", "")) for c in content)
    raise ValueError(f"message {i}: only text can be learned from, got the content {content!r:.80}")


def _assistant_parts(
    i: int, message: dict[str, Any], calls: dict[str, dict[str, str]], other_tools: Counter[str] | None
) -> list[dict[str, str]]:
    content = message.get("content")
    if isinstance(content, list):
        parts = [dict(part) if isinstance(part, dict) else part for part in content]
    else:
        text = _text(i, content)
        parts = [{"type": "text", "text": text}] if text else []
    for call in message.get("tool_calls") or []:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f'message {i}: a tool call must have a "function" with a "name"')
        part = {"type": "python", "text": _call_text(function["name"], function.get("arguments"))}
        if function["name"] not in CALCULATOR_NAMES and other_tools is not None:
            other_tools[function["name"]] += 1
        calls[str(call.get("id"))] = part
        parts.append(part)
    return parts


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
