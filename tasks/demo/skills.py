"""Arithmetic, spelling and letter counting: the questions, and answers in a form that a tiny model can copy.

The forms follow the tokenizer. It cuts numbers into pairs of digits from the left, so numbers up to 99 are one token
each, and sums are copied token by token. It attaches one leading space to a word, so in "r i v e r" after a space each
letter is one token, the same one at every position.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

Parts = list[dict[str, str]]

SYMBOLS = {"+": ("+",), "-": ("-",), "*": ("*", "x", "×")}
OPERATOR_WORDS = {"+": "plus", "-": "minus", "*": "times"}

# {e} is the sum in symbols or words ("12 + 34", "12 plus 34").
SUM_REQUESTS = (
    "What is {e}?",
    "How much is {e}?",
    "Calculate {e}.",
    "Compute {e}.",
    "Please calculate {e}.",
    "Can you calculate {e}?",
    "Tell me {e}.",
    "What do you get for {e}?",
    "Solve {e}.",
    "{e}",
    "{e} = ?",
    "{e} =",
    "What is the answer to {e}?",
    "Find {e}.",
    "What comes out of {e}?",
    "I want to know {e}.",
    "Give me the result of {e}.",
    "Please do {e} for me.",
    "Calculate {e} for me.",
    "I need the answer to {e}.",
    "Help me with {e}.",
    "Use your calculator: {e}",
    "If you calculate {e}, what do you get?",
    "What does {e} give?",
    "Show me {e}.",
    "Could you do {e}?",
    "My homework is {e}.",
    "The teacher asks for {e}.",
    "What is the result of {e}?",
    "Work this out: {e}",
    "Work on {e}, please.",
    "Here is a sum for you: {e}",
    "Please do this sum: {e}",
)
HELD_OUT_SUM_REQUESTS = (
    "What does {e} make?",
    "Work out {e} for me.",
    "I need the result of {e}.",
    "Can you find {e} for me?",
    "If I compute {e}, what comes out?",
    "Do the sum {e} please.",
)
SUM_PHRASES = {
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {a} to {b}."),
    "-": ("Take {a} minus {b}.", "What is the difference of {a} and {b}?", "Start with {a} and take away {b}."),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}."),
}

# {w} is the word.
SPELL_REQUESTS = (
    "Spell {w}.",
    "Spell the word {w}.",
    "Please spell {w}.",
    "Please spell the word {w}.",
    "How do you spell {w}?",
    "How do you spell the word {w}?",
    "How is {w} spelled?",
    "How is the word {w} spelled?",
    "Can you spell {w}?",
    "What are the letters of {w}?",
    "Tell me the spelling of {w}.",
    "spell {w}",
    "Write {w} letter by letter.",
    "What letters does {w} have?",
    "Which letters are in {w}?",
    "Which letters do I need for {w}?",
    "Show me the letters of {w}.",
    "Could you spell {w}?",
    "Can you spell the word {w} for me?",
    "Spell out {w}.",
    "How should I spell {w}?",
    "How do I write {w}?",
    "I do not know how to spell {w}.",
    "Give me the letters of {w}.",
    "Help me spell {w}.",
    "How does one spell {w}?",
    "My friend cannot spell {w}.",
    "What is the spelling of {w}?",
    "I want to write the word {w}.",
    "Which letters are used to write {w}?",
    "I can never spell {w}.",
)
HELD_OUT_SPELL_REQUESTS = (
    "How would I spell {w}?",
    "Show me how {w} is spelled.",
    "Which letters make up {w}?",
    "Could you spell out the word {w}?",
    "Give me the spelling of the word {w}.",
    "I forgot how to spell {w}.",
)

# {l} is the letter, {w} the word.
COUNT_REQUESTS = (
    "How many {l} are in {w}?",
    "How many {l} are in the word {w}?",
    "How many {l} are there in {w}?",
    "How many {l}'s are in {w}?",
    "How many times is {l} in {w}?",
    "How many times is the letter {l} in the word {w}?",
    "How often is {l} in {w}?",
    "Count the letter {l} in {w}.",
    "Count the {l} in {w}.",
    "Please count the letter {l} in the word {w}.",
    "How many letters {l} does {w} have?",
    "How many {l} does {w} have?",
    "how many {l} in {w}",
    "Tell me how many {l} are in {w}.",
    "How often can you see {l} in {w}?",
    "Could you count the {l} in {w}?",
    "In {w}, how many {l} are there?",
    "Find out how many {l} are in {w}.",
    "What number of {l} does {w} have?",
    "How many times does {w} have the letter {l}?",
    "Show me how many {l} are in {w}.",
    "Can you find {l} in {w} and count it?",
)
HELD_OUT_COUNT_REQUESTS = (
    "How many times does {l} appear in {w}?",
    "How many of the letter {l} does the word {w} have?",
    "Can you count the letter {l} in {w}?",
    "In the word {w}, how many {l} are there?",
    "How often do you see the letter {l} in {w}?",
    "How many letters {l} can you find in {w}?",
)


@dataclass(frozen=True)
class Sum:
    """`a op b`, with op one of + - *."""

    a: int
    op: str
    b: int

    @property
    def expression(self) -> str:
        """The expression for the calculator."""
        return f"{self.a}{self.op}{self.b}"

    @property
    def result(self) -> int:
        """The answer."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]


def is_held_out_pair(a: int, b: int) -> bool:
    """True if sums of these numbers, in either order and with any operator, are held out for evaluation (1 in 10)."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 10 == 0


def random_sum(rng: random.Random, *, held_out: bool) -> Sum:
    """A sum of numbers with one to three digits, mostly two; `held_out` selects the pairs for evaluation."""
    while True:
        op = rng.choice("+-*")
        top_a, top_b = rng.choice(((99, 99), (99, 99), (99, 99), (99, 20), (9, 9), (999, 99), (999, 999)))
        a, b = rng.randint(1, top_a), rng.randint(1, top_b)
        if op == "-" and a < b and rng.random() < 0.9:  # few negative results
            a, b = b, a
        if is_held_out_pair(a, b) == held_out:
            return Sum(a, op, b)


def ask_sum(rng: random.Random, problem: Sum, *, held_out: bool) -> str:
    """A request to work out `problem`, in symbols or words."""
    if not held_out and rng.random() < 0.2:
        return rng.choice(SUM_PHRASES[problem.op]).format(a=problem.a, b=problem.b)
    operator = rng.choice((*SYMBOLS[problem.op], OPERATOR_WORDS[problem.op]))
    space = "" if operator in "+-*" and rng.random() < 0.25 else " "
    expression = f"{problem.a}{space}{operator}{space}{problem.b}"
    return rng.choice(HELD_OUT_SUM_REQUESTS if held_out else SUM_REQUESTS).format(e=expression)


def sum_answer(problem: Sum) -> Parts:
    """The calculator call, its result, and the result in a sentence."""
    return [
        {"type": "python", "text": problem.expression},
        {"type": "python_output", "text": str(problem.result)},
        {"type": "text", "text": f"The answer is {problem.result}."},
    ]


def spelled(word: str) -> str:
    """ "river" -> "r i v e r"."""
    return " ".join(word)


def spelling_answer(word: str) -> str:
    """The sentence that spells `word`."""
    return f"The word {word} is spelled {spelled(word)}."


def running_count(word: str, letter: str) -> str:
    """Each letter with the count so far: ("river", "r") -> "r1 i1 v1 e1 r2"."""
    return " ".join(f"{c}{word[: i + 1].count(letter)}" for i, c in enumerate(word))


def count_answer(word: str, letter: str) -> Parts:
    """SpellingBee's protocol in short: spell the word with a running count, check with the calculator, "#### n"."""
    total = str(word.count(letter))
    return [
        {"type": "text", "text": f"Count {letter} in {word}: {running_count(word, letter)}. Check: "},
        {"type": "python", "text": f'"{word}".count("{letter}")'},
        {"type": "python_output", "text": total},
        {"type": "text", "text": f"\n#### {total}"},
    ]


def random_letter(rng: random.Random, word: str) -> str:
    """A letter to count in `word`: mostly one of its own, because the count of any other is always 0."""
    return rng.choice(word if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz")
