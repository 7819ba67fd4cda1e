"""Conversations that are written out as one text: with the marks of a chat template, or with "User:" before a turn."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from nanochat.messages import Message

ROLES = {
    "system": ("system", "developer", "sys"),
    "user": ("user", "human", "prompter", "customer", "client", "question", "q", "instruction", "input", "inst"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard", "claude", "agent"),
        *("answer", "a", "response", "output", "/inst"),
    ),
    "tool": ("tool", "function", "observation", "ipython", "tool_response", "function_response", "environment"),
    "call": ("function_call", "tool_call"),
}
# Names that only stand before the lines of a text, in the languages that people write.
WRITTEN = {
    "user": (
        *("you", "me", "benutzer", "nutzer", "frage", "utilisateur", "usuario", "usuário", "pregunta", "pergunta"),
        *("пользователь", "вопрос", "用户", "人类", "问", "ユーザー", "사용자", "질문", "المستخدم"),
    ),
    "assistant": (
        *("gemini", "copilot", "deepseek", "assistent", "antwort", "asistente", "assistente", "respuesta", "resposta"),
        *("ассистент", "бот", "ответ", "助手", "助理", "答", "アシスタント", "어시스턴트", "답변", "المساعد"),
    ),
}
ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
WRITTEN_ROLE_OF = ROLE_OF | {alias: role for role, aliases in WRITTEN.items() for alias in aliases}
# Headers of a question that stands for itself: what follows it in a text is no longer about the one before.
ALONE = frozenset(("q", "question", "instruction", "frage", "pregunta", "pergunta", "вопрос", "问", "질문"))


class Template(NamedTuple):
    """A way to write turns in a text."""

    name: str
    header: re.Pattern[str]
    """What begins a turn; its first group that matches is the role."""
    end: re.Pattern[str]
    """Marks that only end turns."""


def _template(name: str, header: str, end: str = r"$^") -> Template:
    return Template(name, re.compile(header), re.compile(end))


_ENGLISH_NAMES = (
    "Human Assistant AI User System Bot Chatbot GPT Customer Agent Question Answer Q A ChatGPT Claude DeepSeek"
)
_NAMES = "|".join(
    (*_ENGLISH_NAMES.split(), *(name.capitalize() for aliases in WRITTEN.values() for name in aliases if name != "me"))
)

# Marks of sentences stand at the ends of a turn; inside it they are HTML that strikes out.
_SENTENCE = r"(?P<kept><s>[^<>]+</s>)|</?s>(?=\s*(?:(?:</?s>|<\|endoftext\|>)\s*)*\Z)"
THOUGHT_LEFT_OUT = "a hidden thought, left out"
_STRUCK_OUT = re.compile(r"<s>[^<>]+</s>\s*\Z")
BEFORE_TURNS = "a text before the first turn (the fixed sentence of a template, or a title), left out"
# Marks that no other text has come first; words at the beginning of a line last.
TEMPLATES = (
    _template("chatml", r"<\|im_start\|>[ ]*(\w+)[^\n]*\n?", r"<\|im_end\|>|<\|endoftext\|>"),
    _template(
        "llama 3", r"<\|start_header_id\|>(\w+)<\|end_header_id\|>", r"<\|eo[tm]_id\|>|<\|(begin|end)_of_text\|>"
    ),
    _template(
        "harmony",
        r"<\|start\|>(\w+)(?:<\|channel\|>(\w+))?[^<]*<\|message\|>",
        r"<\|(end|return|call)\|>.*?(?=<\|start|\Z)",
    ),
    _template("gemma", r"<start_of_turn>(\w+)\n?", r"<end_of_turn>|<bos>|<eos>"),
    _template("nanochat", r"<\|(user|assistant)_start\|>", r"<\|(user|assistant)_end\|>|<\|bos\|>"),
    _template("zephyr", r"<\|(system|user|assistant|tool)\|>", rf"{_SENTENCE}|<\|end\|>|<\|endoftext\|>|<\|eot\|>"),
    _template("llama 2", r"\[(/?INST)\]", _SENTENCE),
    _template("deepseek", "<｜(User|Assistant)｜>", "<｜(begin|end)▁of▁sentence｜>"),
    _template("baize", r"\[\|(Human|AI)\|\]"),
    _template("alpaca text", r"(?m)^###[ ]*(Instruction|Input|Response)[ ]*:?", rf"{_SENTENCE}|<\|endoftext\|>"),
    _template("guanaco", r"###[ ]*(Human|Assistant|User|System|Bot)[ ]*:", rf"{_SENTENCE}|<\|endoftext\|>"),
    _template("vicuna", r"(?:^|(?<=\s)|(?<=</s>))(USER|ASSISTANT|SYSTEM):", _SENTENCE),
    _template(
        "headings",
        rf"(?m)^#{{1,6}}[ ]+\*{{0,2}}({_NAMES})(?:[ ]said)?[ ]?[:：]?\*{{0,2}}[ ]*(?:\n\s*|\Z)",
        r"\n-{3,}\s*\Z",
    ),
    _template(
        "role: text",
        rf"(?m)^[ ]*\*{{0,2}}({_NAMES})(?:[ ]said)?\*{{0,2}}[ ]?[:：]\*{{0,2}}",
        rf"{_SENTENCE}|<\|endoftext\|>",
    ),
)
# A line of these between two conversations of a text.
BETWEEN_TEXTS = re.compile(r"<\|endoftext\|>|(?m:^[ ]*(?:[-=*_#][ ]?){3,}\s*$)")
AROUND = re.compile(r"\A[ ]?\n*|\s+\Z")  # a turn that begins in the line of its mark
SYSTEM_IN_TURN = re.compile(r"<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def read_template(
    text: str, whole: bool = False, notes: Counter[str] | None = None
) -> tuple[str, list[Message]] | None:
    """(name of the template, messages) of a text that has turns of the user and of the assistant, else None.

    What stands before the first turn is not part of any, and left out: templates begin with a fixed sentence. With
    `whole` there must be nothing before it. `notes` counts what was left out.
    """
    notes = Counter() if notes is None else notes
    for template in TEMPLATES:
        found = list(template.header.finditer(text))
        roles = [WRITTEN_ROLE_OF.get(match[1].lower()) for match in found]
        if "user" not in roles or "assistant" not in roles or (whole and text[: found[0].start()].strip()):
            continue
        ends = [match.start() for match in found[1:]] + [len(text)]
        messages = []
        notes[BEFORE_TURNS] += bool(template.end.sub("", text[: found[0].start()]).strip())
        for match, role, end in zip(found, roles, ends, strict=True):
            if template.name == "harmony" and match[2] == "analysis":
                notes[THOUGHT_LEFT_OUT] += 1
                continue
            body = template.end.sub(lambda mark: mark.groupdict().get("kept") or "", text[match.end() : end])
            if template.name == "llama 2" and (system := SYSTEM_IN_TURN.search(body)):
                messages.append({"role": "system", "content": system[1].strip()})
                body = SYSTEM_IN_TURN.sub("", body)
            body = body.rstrip() if match[0].endswith("\n") else AROUND.sub("", body)
            if role != "assistant" or body or end != len(text):  # a prompt may end where the answer begins
                messages.append({"role": role or match[1].lower(), "content": body})
        return template.name, messages
    return None


def without_end_of_turn(text: str, name: str) -> str:
    """An answer that stands apart from its question in the template `name`, without the marks at its end."""
    ends = next(template.end.pattern for template in TEMPLATES if template.name == name)
    last = re.compile(rf"\s*(?!<s>)(?:{ends})\s*\Z")
    while (mark := last.search(text)) and mark[0] and not _STRUCK_OUT.search(text):
        text = text[: mark.start()]
    return text


def texts_of(text: str) -> list[str]:
    """The conversations that stand one after the other in a text, with lines such as "---" between them.

    Where a part of it has no turns, such a line is a part of a conversation.
    """
    parts = [part for part in BETWEEN_TEXTS.split(text) if part.strip()]
    if len(parts) > 1 and all(read_template(part) for part in parts):
        return parts
    return [part for part in text.split("<|endoftext|>") if part.strip()]


def questions_apart(text: str, messages: list[Message]) -> list[list[Message]]:
    """The questions with their answers in a text of many, each a conversation; one where they belong together."""
    for template in TEMPLATES:
        names = [m[1].lower() for m in template.header.finditer(text)]
        asked = {name for name in names if WRITTEN_ROLE_OF.get(name) == "user"} - {"input"}
        if asked and any(WRITTEN_ROLE_OF.get(name) == "assistant" for name in names):
            if not asked <= ALONE:
                return [messages]
            break
    else:
        return [messages]
    apart: list[list[Message]] = []
    for message in messages:
        if not apart or (message["role"] == "user" and apart[-1][-1]["role"] == "assistant"):
            apart.append([])
        apart[-1].append(message)
    return apart
