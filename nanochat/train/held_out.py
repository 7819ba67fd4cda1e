"""The user's held-out chats as a table of the report: question, answer before and after training, what the chat says.

Before is the model that the first stage of chats starts from; its answers are kept beside the report, for the table of
the stage after.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nanochat.common import Compute
from nanochat.env import print0
from nanochat.files import read_json, write_record
from nanochat.gpt import GPT
from nanochat.messages import Conversation, Message
from nanochat.report import get_report
from nanochat.report.text import to_markdown
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.samples import answer_greedily

SECTION = "Your chats before and after"
BEFORE_FILE = "held_out_chats.json"  # in the report's folder; a new report begins without it
QUESTIONS = 8
ANSWER_TOKENS = 64
CELL_CHARS = 240


class HeldOutChats:
    """The first questions of some conversations, asked before and after training.

    Args:
        conversations: held out from training; empty: nothing is asked.
        tag: of the model.
    """

    def __init__(self, conversations: Sequence[Conversation], tag: str) -> None:
        self.tag = tag
        self.before: list[str] = []
        self.prompts: list[list[Message]] = []
        self.expected: list[str] = []
        for number in range(min(QUESTIONS, len(conversations))):  # of a Rows, which has no slices
            messages = conversations[number]["messages"]
            at = next((i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0), None)
            if at is not None:
                self.prompts.append(messages[:at])
                self.expected.append(_text(messages[at]["content"]))

    @property
    def _key(self) -> list[Any]:
        return [self.tag, json.loads(json.dumps(self.prompts))]

    def ask_before(self, model: GPT, tokenizer: RustBPETokenizer, compute: Compute, resumed: bool) -> None:
        """Keep the answers of a model that has not trained on chats; those of the stage before stay."""
        if not self.prompts or compute.rank != 0:
            return
        path = get_report().folder / BEFORE_FILE
        known = read_json(path)
        if known.get("key") == self._key:
            self.before = known["before"]
        elif not resumed:
            self.before = answer_greedily(model, tokenizer, compute, self.prompts, ANSWER_TOKENS)
            write_record(path, {"key": self._key, "before": self.before})

    def report(self, model: GPT, tokenizer: RustBPETokenizer, compute: Compute) -> None:
        """Ask again, and put the table into the report."""
        if not self.prompts or compute.rank != 0:
            return
        after = answer_greedily(model, tokenizer, compute, self.prompts, ANSWER_TOKENS)
        before = self.before or ["(not known: the run was resumed)"] * len(after)
        questions = [_text(prompt[-1]["content"]) for prompt in self.prompts]
        rows = [[_cell(text) for text in row] for row in zip(questions, before, after, self.expected, strict=True)]
        table = to_markdown([["question", "answer before", "answer after", "the chat says"], *rows])
        table[1] = "|---" * 4 + "|"  # texts, no numbers
        get_report().log(section=SECTION, data="\n".join(table))
        print0(f"the report shows the answers to {len(rows)} held-out chats, before and after")


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _cell(text: str) -> str:
    """A text as one cell of a table."""
    text = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return text if len(text) <= CELL_CHARS else text[:CELL_CHARS] + " …"
