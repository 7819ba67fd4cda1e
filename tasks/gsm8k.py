"""GSM8K: grade-school word problems whose answers end in "#### <number>".

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168
Data set: openai/gsm8k on the hub, or gsm8k/<split>.jsonl under NANOCHAT_TASK_DIR.
The calculator annotations of the reference answers, <<48/2=24>>, become calls of the calculator tool.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

from nanochat.generate.calculator import use_calculator
from tasks.common import Conversation, Task
from tasks.sources import load_rows

_CALCULATOR_NOTE = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
# What ends the final answer: its line, its sentence, or a comma before a word ("10, because …"), but not before
# another answer ("3, or 4", "x = 3, y = 4").
_ANSWER_END = re.compile(
    r"[\r\n]|[.!?](?=\s|$)|[,;](?=\s*$|\s+(?!(?i:or|and|to|maybe|perhaps|possibly)\b|\w+\s*=)[^\s\d$€£-])|<\|"
)
_EQUATIONS = re.compile(r"=.*[,;]\s+\w+\s*=")
# Marks that say nothing about the number: of markdown, of LaTeX, of an approximation. Not between digits: 2*3.
_MARKS = r"*_`{}\\~≈"
_DECORATION = re.compile(
    rf"\\(?:boxed|text|mathrm|mathbf|[()\[\]])|[“”\"]|(?<![\d{_MARKS}])[{_MARKS}]+|[{_MARKS}]+(?![{_MARKS}]|\s*\d)"
)
_MINUS = ("-", "\u2212", "\u2013")
# A sign and a currency sign in either order; digits alone, or in groups of three with commas or spaces; an exponent.
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212\u2013+]?)\s*[$€£¥₹₩₽₪₺₫₦]?\s*(?P<sign2>[-\u2212\u2013+]?)\s*"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d{1,3}(?:[ '\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?P<exponent>[eE][-+]?\d{1,2}(?![\w.]))?"
)
# What behind the digits makes another number of them, or a second one.
_NOT_ALL = re.compile(
    r"\s*(?:(?i:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?|[kKMB]|bn|mn|mil|mio|squared|cubed)\b|"
    r"\s*(?i:four|fif|six|seven|eigh|nin|ten|hundred|thousand)ths?\b|"
    r".*(?:\b(?i:half|halves|thirds?|quarter|or)\b|[\d\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u215f])"
)


def extract_answer(text: str) -> Decimal | None:
    """The one number of the final answer, which follows the last "####" of `text`; None if there is not exactly one.

    Of an equation ("5 - 10 = -5") it is the number after the last "=". A unit or a remark without digits may follow.
    No answer is what names several numbers ("3 or 4", "5 - 10", "12:30"), a fraction ("1/2"), a power ("10²") or a
    scale in words ("1.5 million"), and what has digits that are no number ("2.5.3", "10,50"). For "#### N" it is the
    public rule.

    >>> extract_answer("5 + 5 = 10 #### $10."), extract_answer("#### 1,000"), extract_answer("#### 3 or 4")
    (Decimal('10'), Decimal('1000'), None)
    """
    _, marker, after = text.rstrip(" \t\r\n#").rpartition("####")
    if not marker:
        return None
    after = after.replace("{,}", ",").replace("\u066c", ",").replace("\u066b", ".")  # of LaTeX, of Arabic
    answer = _DECORATION.sub("", after).lstrip(" \t\r\n:")
    answer = _ANSWER_END.split(answer, maxsplit=1)[0]
    several, answer = _EQUATIONS.search(answer), answer.rpartition("=")[2].strip()
    match = _NUMBER.match(answer)
    if several or match is None or _NOT_ALL.match(answer, match.end()):
        return None
    negative = (match["sign"] in _MINUS) != (match["sign2"] in _MINUS)
    value = Decimal(re.sub(r"[^\d.]", "", match["digits"]) + (match["exponent"] or ""))
    return -value if negative and value else value


# The two rules by which lm-evaluation-harness reads an answer to its task gsm8k, under its names for them. Both give
# the text of a number, compared after `normalized`. Source: EleutherAI/lm-evaluation-harness, lm_eval/tasks/gsm8k.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def strict_match(text: str) -> str | None:
    """The harness's rule "strict-match": the first number directly after "#### "."""
    match = _STRICT.search(text)
    return normalized(match[1]) if match else None


def flexible_extract(text: str) -> str | None:
    """The harness's rule "flexible-extract": the last run of digits, dots, commas and dollar signs anywhere."""
    found = _FLEXIBLE.findall(text)
    return normalized(found[-1]) if found else None


def normalized(number: str) -> str:
    """A number's text as the harness compares it: without commas, dollar signs and a full stop at the end."""
    return re.sub(r",|\$|\.$", "", number)


def split_tool_calls(answer: str) -> list[dict[str, str]]:
    """The answer as message parts, with each calculator note as a tool call and its output.

    The output is the calculator's own, where it knows the expression: what is learned is what a chat will show. A note
    that was rounded or mistaken stands in the text that follows it.
    """
    parts: list[dict[str, str]] = []
    position = 0
    for note in _CALCULATOR_NOTE.finditer(answer):
        parts.append({"type": "text", "text": answer[position : note.start()]})
        parts.append({"type": "python", "text": note[1]})
        parts.append({"type": "python_output", "text": use_calculator(note[1]) or note[2]})
        position = note.end()
    parts.append({"type": "text", "text": answer[position:]})
    return [part for part in parts if part["text"]]


class GSM8K(Task):
    """Word problems; an answer is right if the number after its last "####" equals the reference."""

    name = "GSM8K"
    eval_type = "generative"

    def __init__(
        self,
        split: Literal["train", "test"],
        *,
        subset: Literal["main", "socratic"] = "main",
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        if subset not in ("main", "socratic"):
            raise ValueError(f"GSM8K has the subsets main and socratic, not {subset!r}")
        super().__init__(start=start, stop=stop, step=step)
        local_file = f"gsm8k/{split}.jsonl" if subset == "main" else f"gsm8k/{split}_socratic.jsonl"
        self.rows = load_rows("openai/gsm8k", subset, split, local_file, ("question", "answer"))

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": split_tool_calls(row["answer"])},
            ]
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        reference = extract_answer(problem["messages"][-1]["content"][-1]["text"])
        return reference is not None and extract_answer(completion) == reference

    def other_verdicts(self, problem: Conversation, completion: str) -> dict[str, bool]:
        """Whether an answer is right by each of lm-evaluation-harness's rules."""
        reference = strict_match(problem["messages"][-1]["content"][-1]["text"])
        rules = {"strict-match": strict_match, "flexible-extract": flexible_extract}
        return {name: reference is not None and rule(completion) == reference for name, rule in rules.items()}
