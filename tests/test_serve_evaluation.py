"""What the page says of a model before anybody has asked it: from its own evaluation, and never a bad example."""

from __future__ import annotations

import json

import pytest

from nanochat.serve.evaluation import read_evaluation


def right(question: str, answer: str, **more: object) -> dict[str, object]:
    return {"index": 0, "question": question, "answer": answer, "passed": True, "completions": [answer]} | more


SUM = "<|python_start|>3*4<|python_end|><|output_start|>12<|output_end|>The answer is 12."
SKY = right("Why is the sky blue?", "Because of air.")


def test_scores_and_good_questions(tmp_path):
    tasks = {
        "demofacts": [right("Say it.", "No."), SKY, {**right("Q?", "x"), "passed": False}],
        "demoarithmetic": [right("What is 3 * 4?", SUM)],
        "gsm8k": [right("Four?", "4", num_correct=1, num_samples=4)],  # below half of the answers
    }
    for name, records in tasks.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "broken.jsonl").write_text("{torn")
    found = read_evaluation(tmp_path)
    assert found["scores"] == [("sums", 1.0), ("facts", 0.6667), ("gsm8k", 0.25)]
    assert found["suggestions"] == ["What is 3 * 4?", "Why is the sky blue?"]
    assert read_evaluation(tmp_path / "none") == {"scores": []}


def test_a_question_within_a_conversation_is_not_suggested(tmp_path):
    asked = ["And in Spain?", "How high is it?", "Then in Germany?", "Can you say why?"]  # the last one looks whole
    records = [right(question, "Because of air.") for question in asked]
    (tmp_path / "demochat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "demofacts.jsonl").write_text(json.dumps(SKY) + "\n")
    found = read_evaluation(tmp_path)
    assert found["suggestions"] == ["Why is the sky blue?"]
    assert found["scores"][0] == ("following a conversation", 1.0)


@pytest.mark.parametrize(
    "record",
    [
        right("How many n are in ribbon?", "Count n in ribbon: r0 i0 b0 b0 o0 n1.\n#### 1"),
        right("Spell ribbon.", "The word ribbon is spelled r i b b o n."),
        right("Spell ribbon.", "It is spelled r-i-b-b-o-n."),
        right("What is 4 * 4?", SUM),  # right by chance: it has computed something else
        right("How often is n in ribbon?", '<|python_start|>"month".count("n")<|python_end|>1 time.'),
        right("And where does it live?", "In the sea."),
        right("Who is the king of Mars?", "I do not know that."),
        right("x" * 61, "Yes."),
        right("WHY IS THE SKY BLUE?", "Because of air.", group="typed"),
        right("Two\nlines?", "Yes."),
        {**right("Which letter?", ""), "completions": []},
    ],
)
def test_what_is_no_example_is_not_suggested(tmp_path, record):
    (tmp_path / "demofacts.jsonl").write_text(json.dumps(record) + "\n")
    assert "suggestions" not in read_evaluation(tmp_path)
