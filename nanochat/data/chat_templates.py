"""Conversations that are written out as one text with the marks of a chat template: ChatML, Llama, Vicuna and so on."""

from __future__ import annotations

import re
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
ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}


class Template(NamedTuple):
    """A way to write turns in a text."""

    name: str
    header: re.Pattern[str]
    """What begins a turn; its first group that matches is the role."""
    end: re.Pattern[str]
    """Marks that only end turns."""


def _template(name: str, header: str, end: str = r"$^") -> Template:
    return Template(name, re.compile(header), re.compile(end))


# Marks that no other text has come first; words at the beginning of a line last.
TEMPLATES = (
    _template("chatml", r"<\|im_start\|>[ ]*(\w+)[^\n]*\n?", r"<\|im_end\|>|<\|endoftext\|>"),
    _template(
        "llama 3", r"<\|start_header_id\|>(\w+)<\|end_header_id\|>", r"<\|eo[tm]_id\|>|<\|(begin|end)_of_text\|>"
    ),
    _template("gemma", r"<start_of_turn>(\w+)\n?", r"<end_of_turn>|<bos>|<eos>"),
    _template("nanochat", r"<\|(user|assistant)_start\|>", r"<\|(user|assistant)_end\|>|<\|bos\|>"),
    _template("zephyr", r"<\|(system|user|assistant|tool)\|>", r"</s>|<\|end\|>|<\|endoftext\|>|<\|eot\|>"),
    _template("llama 2", r"\[(/?INST)\]", r"</?s>"),
    _template("deepseek", "<｜(User|Assistant)｜>", "<｜(begin|end)▁of▁sentence｜>"),
    _template("baize", r"\[\|(Human|AI)\|\]"),
    _template("alpaca text", r"(?m)^###[ ]*(Instruction|Input|Response)[ ]*:?", r"</s>|<\|endoftext\|>"),
    _template("guanaco", r"###[ ]*(Human|Assistant|User|System|Bot)[ ]*:", r"</s>|<\|endoftext\|>"),
    _template("vicuna", r"(?:^|(?<=\s)|(?<=</s>))(USER|ASSISTANT|SYSTEM):", r"</?s>"),
    _template(
        "role: text",
        r"(?m)^[ ]*(Human|Assistant|AI|User|System|Bot|Chatbot|GPT|Customer|Agent|Question|Answer|Q|A)[ ]?:",
        r"</?s>|<\|endoftext\|>",
    ),
)
AROUND = re.compile(r"\A[ ]?\n*|\s+\Z")  # a turn that begins in the line of its mark
SYSTEM_IN_TURN = re.compile(r"<<SYS>>(.*?)<</SYS>>", re.DOTALL)


def read_template(text: str, whole: bool = False) -> tuple[str, list[Message]] | None:
    """(name of the template, messages) of a text that has turns of the user and of the assistant, else None.

    What stands before the first turn is not part of any, and left out: templates begin with a fixed sentence. With
    `whole` there must be nothing before it.
    """
    for template in TEMPLATES:
        found = list(template.header.finditer(text))
        roles = [ROLE_OF.get(match[1].lower()) for match in found]
        if "user" not in roles or "assistant" not in roles or (whole and text[: found[0].start()].strip()):
            continue
        ends = [match.start() for match in found[1:]] + [len(text)]
        messages = []
        for match, role, end in zip(found, roles, ends, strict=True):
            body = template.end.sub("", text[match.end() : end])
            if template.name == "llama 2" and (system := SYSTEM_IN_TURN.search(body)):
                messages.append({"role": "system", "content": system[1].strip()})
                body = SYSTEM_IN_TURN.sub("", body)
            body = body.rstrip() if match[0].endswith("\n") else AROUND.sub("", body)
            if role != "assistant" or body or end != len(text):  # a prompt may end where the answer begins
                messages.append({"role": role or match[1].lower(), "content": body})
        return template.name, messages
    return None
