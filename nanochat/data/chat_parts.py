"""Messages as Gemini, LangChain and the AI SDK have them, with their parts in the shapes that are read elsewhere."""

from __future__ import annotations

import json
from typing import Any

_CALLS, _RESULTS = ("functionCall", "function_call"), ("functionResponse", "function_response")  # Gemini's


def usual_message(value: dict[str, Any]) -> dict[str, Any]:
    """A message with its role beside its text, its calls as OpenAI's, and the parts of its content as Anthropic's."""
    inner = value.get("data", value.get("kwargs"))
    if isinstance(inner, dict) and "content" in inner and "type" in value:  # LangChain, of either version
        value = {**inner, "type": inner.get("type", value["type"])}
    if "content" in value and "role" not in value and value.get("type") in ("human", "ai", "system", "tool"):
        value = {**value, "role": value["type"]}
    if isinstance(calls := value.get("tool_calls"), list) and all(isinstance(c, dict) and "args" in c for c in calls):
        functions = [{"name": call.get("name"), "arguments": call["args"]} for call in calls]
        value = {**value, "tool_calls": [{**c, "function": f} for c, f in zip(calls, functions, strict=True)]}
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
    return [{"role": role, "content": value}] if value and is_parts and "role" not in value[0] else value


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
