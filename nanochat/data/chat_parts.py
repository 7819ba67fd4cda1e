"""Messages as Gemini, LangChain and the AI SDK have them, with their parts in the shapes that are read elsewhere."""

from __future__ import annotations

import ast
import json
from typing import Any

ROLE_KEYS = ("role", "from", "author", "speaker", "sender", "user", "name")
_CALLS, _RESULTS = ("functionCall", "function_call"), ("functionResponse", "function_response")  # Gemini's


def usual_message(value: dict[str, Any]) -> dict[str, Any]:
    """A message with its role beside its text, its calls as OpenAI's, and the parts of its content as Anthropic's."""
    inner = value.get("data", value.get("kwargs"))
    if isinstance(inner, dict) and "content" in inner and "type" in value and "role" not in value:  # LangChain, older
        value = {**inner, "type": inner.get("type", value["type"])}
    if "content" in value and "role" not in value and value.get("type") in ("human", "ai", "system", "tool"):
        value = {**value, "role": value["type"]}
    if isinstance(calls := value.get("tool_calls"), list) and all(isinstance(c, dict) and "args" in c for c in calls):
        functions = [{"name": call.get("name"), "arguments": call["args"]} for call in calls]
        value = {**value, "tool_calls": [{**c, "function": f} for c, f in zip(calls, functions, strict=True)]}
        if calls and isinstance(said := value.get("content"), list):  # Claude's stand there too
            value["content"] = [p for p in said if not (isinstance(p, dict) and p.get("type") == "tool_use")]
    for key in ("content", "parts"):
        if isinstance(parts := value.get(key), list):
            known = [_as_part(part) for part in parts if not _says_nothing(part)]
            results = any(isinstance(part, dict) and part.get("type") == "tool_result" for part in known)
            return {**value, key: known, **({"role": "user"} if results else {})}
    return value


def as_messages(value: Any, role: str) -> Any:
    """The messages that stand for a question or an answer: in an object, as one message, or as parts of one."""
    if isinstance(value, dict) and isinstance(choices := value.get("choices"), list) and len(choices) == 1:
        value = choices[0]
    if isinstance(value, dict) and isinstance(inner := value.get("messages", value.get("message")), list | dict):
        value = inner
    if isinstance(value, dict) and {"role", "content"} <= value.keys():
        return [value]
    is_parts = isinstance(value, list) and all(isinstance(p, dict) and {"type", "text"} <= p.keys() for p in value)
    return [{"role": role, "content": value}] if value and is_parts and not {*ROLE_KEYS} & value[0].keys() else value


def decoded(value: Any) -> Any:
    """A list or object that a table holds as text."""
    if isinstance(value, str) and value[:1] in ("[", "{") and value.rstrip()[-1:] in ("]", "}"):
        for read in (json.loads, ast.literal_eval):  # pandas writes the second way
            try:
                return read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


class UnfinishedAnswer(ValueError):
    """A line of chat_web's log with an answer that is not whole."""


def refuse_unfinished(record: dict[str, Any]) -> None:
    """Raises UnfinishedAnswer for a line of chat_web's log that has only a part of an answer."""
    if {"prompt", "answer", "finish_reason"} <= record.keys():
        if (reason := record["finish_reason"]) in (None, "length"):
            why = "the client left" if reason is None else "it was too long"
            raise UnfinishedAnswer(f"with an answer that did not come to its end ({why})")
        said = record["prompt"]
        if isinstance(said, list) and said and isinstance(said[-1], dict) and said[-1].get("role") == "assistant":
            raise UnfinishedAnswer("with the rest of an answer that the client had begun")


def _says_nothing(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "step-start"  # the AI SDK's


def _as_part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part.get("thought") is True:
        return {"type": "thinking"}
    if isinstance(call := next((part[key] for key in _CALLS if key in part), None), dict):
        return {"type": "tool_use", "id": call.get("id"), "name": call.get("name"), "input": call.get("args", {})}
    if isinstance(said := next((part[key] for key in _RESULTS if key in part), None), dict):
        return {"type": "tool_result", "tool_use_id": said.get("id"), "content": _text(said.get("response"))}
    if part.get("type") == "tool-call":
        name, arguments = part.get("toolName"), part.get("input", part.get("args", {}))
        return {"type": "tool_use", "id": part.get("toolCallId"), "name": name, "input": arguments}
    if part.get("type") == "tool-result":
        text = _text(part.get("output", part.get("result")))
        return {"type": "tool_result", "tool_use_id": part.get("toolCallId"), "content": text}
    return part


def _text(result: Any) -> str:
    if isinstance(result, dict) and "value" in result:  # {"type": "json", "value": ...}
        result = result["value"]
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
