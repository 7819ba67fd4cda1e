"""Sums in words: the operation must be understood from the wording, and the calculator does the rest.

This is harder than DemoArithmetic, whose requests name the operation by its sign or name. SFT has seen none of these
wordings, so its model uses the calculator but often asks for the wrong operation. Reinforcement learning can discover
the right one by trial and error. The test split uses only pairs of numbers that never occur in training.
"""

from __future__ import annotations

from tasks.common import Conversation
from tasks.demo.skills import Sum, is_held_out_pair, sum_answer
from tasks.demo.task import conversation
from tasks.demo.tool_tasks import ToolTask, tool_keys

# {a} and {b} in the order the calculator needs them.
WORDINGS = {
    "+": (
        "What is the total of {a} and {b}?",
        "Put {a} and {b} together.",
        "How much is {a} and {b} together?",
        "Please add up {a} and {b}.",
        "What is {a} more than {b}?",
        "Increase {a} by {b}.",
        "{a} and {b} more: what is that?",
    ),
    "-": (
        "What is {a} without {b}?",
        "What is left of {a} after {b}?",
        "How much more is {a} than {b}?",
        "Decrease {a} by {b}.",
        "How much is {a} less {b}?",
        "{a} and {b} less: what is that?",
    ),
    "*": (
        "Take {a} times as much as {b}.",
        "What is the price of {a} books for {b} coins each?",
        "What do you get for {a} counted {b} times?",
        "Repeat {a} for {b} days. How much is that?",
        "What is {a} groups of {b}?",
        "What is {a} rows of {b}?",
    ),
}


class DemoWordSums(ToolTask):
    """Sums of two numbers below 100, asked in words that do not name the operation."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        while True:
            op = rng.choice("+-*")
            a, b = rng.randint(11, 99), rng.randint(2, 99)
            if op == "-" and a < b:
                a, b = b, a
            if is_held_out_pair(a, b) == self.held_out:
                break
        problem = Sum(a, op, b)
        question = rng.choice(WORDINGS[op]).format(a=a, b=b)
        return conversation((question, sum_answer(problem)), **tool_keys(problem))
