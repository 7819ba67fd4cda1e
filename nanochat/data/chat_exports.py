"""What programs for chatting with models export, and data sets that wrap their records: taken apart into known forms.

Read are ChatGPT, Claude, Gemini (Takeout and AI Studio), LM Studio, Open WebUI, SillyTavern, text-generation-webui,
Character.AI, DeepSeek, Grok, LibreChat, Copilot in VS Code, logs of OpenAI's API; and SQuAD, intents, Self-Instruct,
pairs of an arena, Label Studio, Argilla, the viewer of data sets.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nanochat.data.chat_templates import ROLE_OF, THOUGHT_LEFT_OUT
from nanochat.data.markup import visible_text
from nanochat.messages import BETWEEN, Message

FILE_LEFT_OUT = "an image or file, left out"
NO_WINNER = "two answers of which neither is said to be the better, left out"
OTHER_ANSWER = "another answer or branch beside the one that is learned, left out"
TO_TOOL, OF_TOOL = "a message to a tool, left out", "a message of a tool or system, left out"
# Around the record itself in exports of tools that label or show data.
WRAPPERS = ("data", "fields", "chat", "record", "row", "example", "json", "payload", "chunkedPrompt")
BEGIN_CHAT = "<|BEGIN-VISIBLE-CHAT|>"  # text-generation-webui's for a greeting that nobody asked for
_THOUGHT = re.compile(r"<details type=\"reasoning\".*?</details>\s*", re.DOTALL)
# In the name of one of two answers: the worse one must not be learned, so such a record is left to the user.
_OF_PAIR = re.compile(
    r"(.*_)?(rejected|bad|worse|wrong|negative|loser|losing|dispreferred)(_.*)?|(model|response|answer|output|side)_?[ab12]",
    re.IGNORECASE,
)
_PROMPTED = re.compile(r"(Prompted|Asked|Gefragt|Demande|Preguntaste)\s+(?P<text>.*)", re.DOTALL)


def is_export(record: dict[str, Any]) -> bool:
    """True of a record, or a message of one, that only `read_export` understands."""
    return isinstance(record.get("versions"), list) or {"candidates", "author"} <= record.keys()


def unwrapped(record: Any, notes: Counter[str]) -> Iterator[Any]:
    """The records inside one that wraps them; itself if it wraps none. `notes` counts what was left out."""
    if not isinstance(record, dict):
        yield record
    elif isinstance(record.get("paragraphs"), list):  # SQuAD
        for paragraph in filter(_is_object, record["paragraphs"]):
            for question in filter(_is_object, paragraph.get("qas") or []):
                answers = [a.get("text") for a in question.get("answers") or [] if isinstance(a, dict)]
                asked = {"context": paragraph.get("context"), "question": question.get("question")}
                yield {**asked, "answers": {"text": answers}} if answers else {**asked, "answer": ""}
    elif isinstance(record.get("intents"), list):
        for intent in filter(_is_object, record["intents"]):
            patterns, responses = intent.get("patterns") or [], intent.get("responses") or []
            notes[OTHER_ANSWER] += max(0, len(responses) - len(patterns))
            for i, pattern in enumerate(patterns):
                yield {"question": pattern, "answer": responses[i % len(responses)] if responses else ""}
    elif isinstance(inner := record.get("histories"), dict) and isinstance(inner.get("histories"), list):
        yield from inner["histories"]  # Character.AI
    elif key := next((key for key in ("instances", "Instances") if isinstance(record.get(key), list)), None):
        # Self-Instruct, Super-NaturalInstructions: inputs and outputs of one instruction.
        yield from ({**record, key: None, **one} for one in filter(_is_object, record[key]))
    elif isinstance(record.get("conversation"), dict) and isinstance(record.get("responses"), list):  # Grok
        said = [r["response"] for r in filter(_is_object, record["responses"]) if isinstance(r.get("response"), dict)]
        yield {"messages": _of_grok(said, notes)}
    elif isinstance(record.get("requests"), list) and "responderUsername" in record:
        yield {
            "messages": [message for r in filter(_is_object, record["requests"]) for message in _of_editor(r, notes)]
        }
    elif isinstance(record.get("conversation_a"), list) and isinstance(record.get("conversation_b"), list):
        sides = {"model_a": "ab", "model_b": "ba"}.get(str(record.get("winner")))
        if sides is None:
            notes[NO_WINNER] += 1
        else:
            yield dict(zip(("chosen", "rejected"), (record[f"conversation_{side}"] for side in sides), strict=True))
    elif isinstance(record.get("chats"), list):
        yield from record["chats"]
    elif isinstance(record.get("request"), dict) and isinstance(record.get("response"), dict):
        yield _of_api(record["request"], record["response"], notes)
    elif isinstance(record.get("title"), str) and isinstance(record.get("safeHtmlItem"), list):
        yield _of_activity(record)
    else:
        wrapper = next((name for name in WRAPPERS if isinstance(record.get(name), dict)), None)
        if record and all(map(_is_talk, record.values())) and not any(map(_OF_PAIR.fullmatch, record)):
            yield from record.values()  # conversations by their names
        elif wrapper is None or "messages" in record:
            yield record
        else:
            inside = record[wrapper]
            taken = {wrapper} | {name for name, value in inside.items() if value not in (None, "", [], {})}
            # Of two of one name the inner one, unless it is empty.
            yield {**inside, **{name: value for name, value in record.items() if name not in taken}}


def _is_talk(value: Any) -> bool:
    inner = value.get("messages", value.get("conversations")) if isinstance(value, dict) else value
    roles = {"role", "from"}
    return isinstance(inner, list) and bool(inner) and all(_is_object(m) and not roles.isdisjoint(m) for m in inner)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _of_api(request: dict[str, Any], response: dict[str, Any], notes: Counter[str]) -> dict[str, Any]:
    """A logged call of OpenAI's API and its answer."""
    choices = response.get("choices")
    notes[OTHER_ANSWER] += len(choices) - 1 if isinstance(choices, list) and choices else 0
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    answer = first.get("message") or {"role": "assistant", "content": first.get("text")}
    asked = request.get("messages") or [{"role": "user", "content": request.get("prompt")}]
    return {"messages": [*asked, answer]}


def _of_editor(request: dict[str, Any], notes: Counter[str]) -> list[Message]:
    """A question to Copilot in an editor, and its answer, whose pieces that are no text are left out."""
    asked, texts = request.get("message") or {}, list[str]()
    for part in filter(_is_object, request.get("response") or []):
        kind, value = str(part.get("kind")), part.get("value")
        if kind == "inlineReference":  # a file or a name in the code, shown as a link
            at = part.get("inlineReference")
            known: dict[str, Any] = at if isinstance(at, dict) else {}
            inner = known.get("uri")
            uri = inner if isinstance(inner, dict) else known
            name = part.get("name") or known.get("name") or str(uri.get("path") or "").rpartition("/")[2]
            texts.append(f"`{name}`" if name else "")
        elif kind == "thinking":
            notes[THOUGHT_LEFT_OUT] += 1
        elif isinstance(value, str):
            texts.append(value)
        elif kind not in ("undoStop", "codeblockUri"):  # these only say where something is
            notes[TO_TOOL if "tool" in kind.lower() else FILE_LEFT_OUT] += 1
    question = asked if isinstance(asked, str) else asked.get("text")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "".join(texts)}]


def _of_grok(said: list[dict[str, Any]], notes: Counter[str]) -> list[Message]:
    """The branch of Grok's messages that ends with the last; one that names none before it follows the one above."""
    values: list[dict[str, Any]] = []
    names = [str(value.get("_id") or i) for i, value in enumerate(said)]
    for i, value in enumerate(said):
        role = str(value.get("sender")).lower()
        role = "assistant" if role.startswith("grok") else role
        before = str(value.get("parent_response_id"))
        before = before if before in names[:i] else names[i - 1] if i else ""
        node = {"messageId": names[i], "parentMessageId": before, "text": value.get("message")}
        values.append({**node, "isCreatedByUser": ROLE_OF.get(role) == "user", "role": role})
    return _read_replies(values, notes) if values else []


def _of_activity(record: dict[str, Any]) -> dict[str, Any]:
    """A question to Gemini and its answer, as Google's Takeout has them."""
    asked = _PROMPTED.fullmatch(record["title"])
    pages = [str(item.get("html", "")) for item in record["safeHtmlItem"] if isinstance(item, dict)]
    return {"question": asked["text"] if asked else record["title"], "answer": visible_text("".join(pages))}


def read_export(record: dict[str, Any], notes: Counter[str], used: set[str]) -> tuple[str, list[Message]] | None:
    """(form, messages) of a record that a program exported, None if it is none; `used` gets its keys.

    Args:
        record: a conversation.
        notes: counts what was left out.
        used: the keys that were understood.
    """
    if isinstance(record.get("mapping"), dict):
        used |= {"mapping", "current_node"}
        return "chatgpt export", _read_chatgpt(record, notes)
    if isinstance(record.get("chat_messages"), list):
        used |= {"chat_messages", "account", "summary"}
        return "claude export", [_claude_message(m, notes) for m in record["chat_messages"]]
    if isinstance(record.get("internal"), list) and isinstance(record.get("visible"), list):
        used |= {"internal", "visible"}
        return "text-generation-webui", _read_webui(record["internal"])
    history = record.get("history")
    if isinstance(history, dict) and isinstance(history.get("messages"), dict):
        used |= {"history", "messages", "models", "params", "system"}
        params = record.get("params")
        system = record.get("system") or (params.get("system") if isinstance(params, dict) else None)
        return "open webui", [*_system_message(system), *_read_branch(history, notes)]
    if isinstance(record.get("chunks"), list):
        used |= {"chunks", "pendingInputs", "systemInstruction"}
        chunks = [c for c in record["chunks"] if isinstance(c, dict)]
        said = [c for c in chunks if not c.get("isThought")]
        notes[THOUGHT_LEFT_OUT] += len(chunks) - len(said)
        notes[FILE_LEFT_OUT] += sum("text" not in c for c in said)
        turns = [{"role": ROLE_OF.get(str(c.get("role")), "user"), "content": c["text"]} for c in said if "text" in c]
        system = record.get("systemInstruction")
        text = system.get("text") if isinstance(system, dict) else system
        return "ai studio", [*_system_message(text), *turns]
    for key in ("messages", "turns", "msgs"):
        values = record.get(key)
        if isinstance(values, list) and values and all(map(_is_librechat, values)):
            used |= {key, "endpoint", "exportAt", "branches", "recursive", "options"}
            return "librechat", _read_replies(values, notes)
        if isinstance(values, list) and values and isinstance(values[0], dict) and _is_of_program(values[0]):
            used |= {key, "systemPrompt", "preset", "pinned", "usePerChatPredictionConfig"}
            turns = [_program_message(value, notes) for value in values]
            form = "lm studio" if "versions" in values[0] else "character.ai"
            return form, [*_system_message(record.get("systemPrompt")), *turns]
    return None


def _system_message(text: Any) -> list[Message]:
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _is_of_program(value: dict[str, Any]) -> bool:
    return is_export(value) or (isinstance(value.get("src"), dict) and "is_human" in value["src"])


def _program_message(value: dict[str, Any], notes: Counter[str]) -> Message:
    """A message of LM Studio or Character.AI: of several answers to one question the chosen one."""
    if isinstance(value.get("src"), dict):
        return {
            "role": "user" if value["src"].get("is_human") else "assistant",
            "content": str(value.get("text") or ""),
        }
    if "candidates" in value:
        chosen = value.get("primary_candidate_id")
        found = [c for c in value["candidates"] if isinstance(c, dict)]
        notes[OTHER_ANSWER] += max(0, len(found) - 1)
        best = next((c for c in found if c.get("candidate_id") == chosen), found[0] if found else {})
        human = isinstance(value["author"], dict) and value["author"].get("is_human")
        return {"role": "user" if human else "assistant", "content": str(best.get("raw_content") or "")}
    versions = value.get("versions") or [{}]
    at = value.get("currentlySelected") or 0
    version = versions[at] if isinstance(at, int) and 0 <= at < len(versions) else versions[-1]
    blocks = [version, *(step for step in version.get("steps") or [] if isinstance(step, dict))]
    said = [b for b in blocks if not (isinstance(b.get("style"), dict) and b["style"].get("type") == "thinking")]
    notes[OTHER_ANSWER] += len(versions) - 1
    notes[THOUGHT_LEFT_OUT] += len(blocks) - len(said)
    parts = [part for block in said for part in block.get("content") or [] if isinstance(part, dict)]
    texts = [str(part.get("text") or "") for part in parts if part.get("type", "text") == "text"]
    notes[FILE_LEFT_OUT] += len(parts) - len(texts)
    return {"role": ROLE_OF.get(str(version.get("role")), "user"), "content": "".join(texts)}


def read_mes(record: dict[str, Any], notes: Counter[str]) -> Message | None:
    """A line of SillyTavern's chats, None if it is none; lines of the program have no content."""
    if not isinstance(record.get("mes"), str) or "is_user" not in record:
        return None
    text = "" if record.get("is_system") else record["mes"]
    notes[OTHER_ANSWER] += max(0, len(record.get("swipes") or []) - 1)
    return {"role": "user" if record["is_user"] else "assistant", "content": text}


def _is_librechat(value: Any) -> bool:
    return isinstance(value, dict) and {"isCreatedByUser", "messageId", "parentMessageId"} <= value.keys()


def _read_replies(values: list[dict[str, Any]], notes: Counter[str]) -> list[Message]:
    """The branch that ends with the last message, of messages that name the one before."""
    nodes, name, branch = {v["messageId"]: v for v in values}, values[-1]["messageId"], list[dict[str, Any]]()
    while name in nodes:
        branch.append(nodes.pop(name))
        name = branch[-1]["parentMessageId"]
    notes[OTHER_ANSWER] += sum(not node["isCreatedByUser"] for node in nodes.values())

    def role(value: dict[str, Any]) -> str:
        return str(value.get("role") or ("user" if value["isCreatedByUser"] else "assistant"))

    return [{"role": role(value), "content": _reply_text(value, notes)} for value in branch[::-1]]


def _reply_text(value: dict[str, Any], notes: Counter[str]) -> str:
    """What a message of LibreChat says: its text, or the pieces of its content that are text."""
    if value.get("text"):
        return str(value["text"])
    if isinstance(value.get("content"), str):
        return str(value["content"])
    texts = list[str]()
    for part in filter(_is_object, value.get("content") or []):
        kind, text = str(part.get("type")), part.get("text")
        if kind == "text":
            texts.append(str(text.get("value") if isinstance(text, dict) else text or ""))
        else:
            notes[THOUGHT_LEFT_OUT if kind == "think" else TO_TOOL if "tool" in kind else FILE_LEFT_OUT] += 1
    return "".join(texts)


def _read_webui(pairs: list[Any]) -> list[Message]:
    messages: list[Message] = []
    for pair in pairs:
        asked, answer = (*pair, "", "")[:2] if isinstance(pair, list) else ("", "")
        if asked != BEGIN_CHAT:
            messages.append({"role": "user", "content": html.unescape(str(asked))})
        messages.append({"role": "assistant", "content": html.unescape(str(answer))})
    return messages


def _read_branch(history: dict[str, Any], notes: Counter[str]) -> list[Message]:
    """The branch of Open WebUI's tree that was shown last."""
    nodes, name, messages, seen = history["messages"], history.get("currentId"), [], set[str]()
    while isinstance(name, str) and isinstance(node := nodes.get(name), dict) and name not in seen:
        seen.add(name)
        text, thoughts = _THOUGHT.subn("", str(node.get("content") or ""))
        notes[THOUGHT_LEFT_OUT] += thoughts
        notes[FILE_LEFT_OUT] += len(node.get("files") or [])
        messages.append({"role": ROLE_OF.get(str(node.get("role")), "user"), "content": text})
        name = node.get("parentId")
    others = [node for name, node in nodes.items() if name not in seen and isinstance(node, dict)]
    notes[OTHER_ANSWER] += sum(node.get("role") == "assistant" for node in others)
    return messages[::-1]


def _read_chatgpt(record: dict[str, Any], notes: Counter[str]) -> list[Message]:
    """The branch that was shown last, of the tree that ChatGPT exports."""
    mapping = record["mapping"]
    node = record.get("current_node")
    if node not in mapping:  # the newest leaf
        node = next((name for name, n in reversed(mapping.items()) if not n.get("children")), None)
    messages: list[Message] = []
    seen: set[Any] = set()
    while node in mapping and node not in seen:
        seen.add(node)
        message = mapping[node].get("message") or {}
        node = mapping[node].get("parent")
        if isinstance(message.get("fragments"), list):  # DeepSeek
            messages += _fragments(message["fragments"], notes)[::-1]
            notes[FILE_LEFT_OUT] += len(message.get("files") or [])
            continue
        role = (message.get("author") or {}).get("role")
        content = message.get("content") or {}
        if role not in ("user", "assistant"):
            notes[OF_TOOL] += role == "tool"
            continue
        if message.get("weight") == 0 or (message.get("recipient") or "all") != "all":
            notes[TO_TOOL] += role == "assistant"
            continue
        kind = content.get("content_type")
        if kind not in ("text", "multimodal_text"):
            thought = kind in ("thoughts", "reasoning_recap")
            notes[THOUGHT_LEFT_OUT if thought else f"a message of the type {kind!r}, left out"] += kind is not None
            continue
        parts = content.get("parts") or []
        text = "\n".join(part for part in parts if isinstance(part, str) and part)
        notes[FILE_LEFT_OUT] += sum(not isinstance(part, str) for part in parts)
        if text.strip():
            messages.append({"role": role, "content": text})
    others = [n.get("message") or {} for name, n in mapping.items() if name not in seen]
    notes[OTHER_ANSWER] += sum(
        any(_is_object(part) and part.get("type") == "RESPONSE" for part in m.get("fragments") or [])
        or (
            (m.get("author") or {}).get("role") == "assistant"
            and (m.get("content") or {}).get("content_type") in ("text", "multimodal_text")
        )
        for m in others
    )
    return messages[::-1]


def _fragments(parts: list[Any], notes: Counter[str]) -> list[Message]:
    """The turns of one node of DeepSeek's tree."""
    messages: list[Message] = []
    for part in filter(_is_object, parts):
        role = {"REQUEST": "user", "RESPONSE": "assistant"}.get(str(part.get("type")))
        if role is None:
            notes[THOUGHT_LEFT_OUT if part.get("type") == "THINK" else OF_TOOL] += 1
        else:
            messages.append({"role": role, "content": str(part.get("content") or "")})
    return messages


def _claude_message(value: dict[str, Any], notes: Counter[str]) -> Message:
    parts = [p for p in value.get("content") or [] if isinstance(p, dict) and p.get("type") == "text"]
    text = BETWEEN.join(str(p.get("text", "")) for p in parts) or str(value.get("text") or "")
    attached = [str(a["extracted_content"]) for a in value.get("attachments") or [] if a.get("extracted_content")]
    notes[FILE_LEFT_OUT] += len(value.get("files") or [])
    return {"role": ROLE_OF.get(str(value.get("sender")), "user"), "content": BETWEEN.join([*attached, text])}
