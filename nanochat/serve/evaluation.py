"""What a checkpoint has shown in its evaluation, for the page's welcome: scores, and questions that it answers well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nanochat.files import read_jsonl

SUGGESTIONS, LONGEST_QUESTION = 4, 60
GOOD_ENOUGH = 0.5  # of a task, for a question of it to be suggested
# Where a larger share of a task's questions follows on from others, it asks in conversations: none stands alone.
FOLLOWING = 0.4
# The demo's tasks, as what a model can do.
PLAIN_NAMES = {
    "arithmetic": "sums",
    "chat": "following a conversation",
    "counting": "counting letters",
    "counting unseen": "counting letters of new words",
    "identity": "questions about itself",
    "smalltalk": "small talk",
    "spelling unseen": "spelling new words",
    "unknown": "saying that it does not know",
}
CALL = re.compile(r"<\|python_start\|>(.*?)<\|python_end\|>", re.DOTALL)
# What is no answer for people: the marker of a result, a word letter by letter, not to know.
TRACE = re.compile(r"####|(?:\b\w\d? ?[-, ] ?){3}|\bnot know\b")
# A question that goes on from another one, which nobody has asked here.
FOLLOWS = re.compile(
    r"^(?:and|but|then|what about|how about)\b|\b(?:it|its|there|they|them|he|she|that one)\b", re.IGNORECASE
)


def read_evaluation(folder: Path) -> dict[str, Any]:
    """The results in a folder of scripts.chat_eval: `scores`, a list of (task, share right), and `suggestions`.

    What is missing or broken is left out: a welcome is no reason not to serve.
    """
    scores: list[tuple[str, float]] = []
    found: list[str] = []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            records = [record for record in read_jsonl(path) if isinstance(record.get("passed"), bool)]
        except (OSError, ValueError):
            continue
        if not records:
            continue
        share = sum(r.get("num_correct", r["passed"]) / (r.get("num_samples") or 1) for r in records) / len(records)
        task = path.stem.removeprefix("demo").replace("-", " ")
        scores.append((PLAIN_NAMES.get(task, task), round(share, 4)))
        following = sum(bool(FOLLOWS.search(str(record.get("question", "")))) for record in records)
        if share >= GOOD_ENOUGH and following <= FOLLOWING * len(records):
            good = [str(record["question"]) for record in records if _shows_well(record)]
            found += sorted(good, key=lambda question: not question.endswith("?"))[:1]
    return {"scores": scores, **({"suggestions": found[:SUGGESTIONS]} if found else {})}


def _shows_well(record: dict[str, Any]) -> bool:
    """True if a question stands alone and its answer is right, for the right reason, and says so plainly."""
    question, said = str(record.get("question", "")), record.get("completions")
    if not record["passed"] or not isinstance(said, list) or not said or record.get("group") == "typed":
        return False
    answer = str(said[0])
    asked = [piece for call in CALL.findall(answer) for piece in re.findall(r"\d+|(?<=[\"']).+?(?=[\"'])", call)]
    plain = re.sub(r"<\|.*\|>", "", answer, flags=re.DOTALL)
    return (
        0 < len(question) <= LONGEST_QUESTION
        and question.isprintable()
        and not FOLLOWS.search(question)
        and not TRACE.search(plain)
        and all(piece.strip() in question for piece in asked)
    )
