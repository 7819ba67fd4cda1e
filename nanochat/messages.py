"""What a conversation is: {"messages": [{"role": "user", "content": "..."}, ...]}, and the check that it is one."""

from __future__ import annotations

from typing import Any

# The kinds of parts an assistant message may hold: (token before, token after, 1 if the model must learn to write it).
PARTS: dict[str, tuple[str | None, str | None, int]] = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}

Conversation = dict[str, Any]  # {"messages": [{"role": ..., "content": ...}, ...]}


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
