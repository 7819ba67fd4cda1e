"""Arithmetic, spelling and letter counting: the questions, and answers in a form that a tiny model can copy.

All three are done by the calculator; the model has to see what is asked for and to copy numbers and words into the
call. So the forms follow the tokenizer: a word is written into a call with the space before it that it has in the
question and behind a parenthesis, `"-".join(" river".strip())`, and is then made of the same tokens. A model of this
size learns to copy tokens, also of words that it has never seen, in minutes; which letters a token has it would have to
learn one by one.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.generate.calculator import use_calculator
from tasks.demo import stories

Parts = list[dict[str, str]]
MARK = "\0"  # beside a word that must stay as it is
Number = int | float

SYMBOLS = {"+": ("+",), "-": ("-",), "*": ("*", "x", "×"), "/": ("/", "÷")}
OPERATOR_WORDS = {"+": ("plus",), "-": ("minus",), "*": ("times", "multiplied by"), "/": ("divided by",)}
PERCENT = ("{a}% of {b}", "{a} % of {b}", "{a} percent of {b}")
OF_ONE: dict[tuple[str, Number], tuple[str, ...]] = {
    ("*", 2): (
        "double {a}",
        "twice {a}",
        "the double of {a}",
        "Double {a}.",
        "Can you double {a}?",
        "Double the number {a}.",
    ),
    ("/", 2): ("half of {a}", "half {a}", "one half of {a}", "Halve {a}.", "Cut {a} in half.", "Can you halve {a}?"),
    ("/", 4): ("a quarter of {a}", "one quarter of {a}"),
}
SQUARED = ("{a} squared", "the square of {a}")

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
    "{e}?",
    "{e} = ?",
    "{e} =",
    "{e}=?",
    "{e}=",
    "{e}",
    "What is {e}?",
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
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {a} to {b}.", "Add {b} to {a}.", "{a} and {b}?",
          "What do {a} and {b} add up to?"),
    "-": ("Take {a} minus {b}.", "What is the difference of {a} and {b}?", "Start with {a} and take away {b}.",
          "Subtract {b} from {a}.", "Take {b} away from {a}.", "What is the difference between {a} and {b}?",
          "What remains if I take {b} from {a}?", "What is left if you take {b} from {a}?"),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}.", "{a} by {b}?",
          "What do you get if you multiply {a} by {b}?"),
    "/": ("Divide {a} by {b}.", "How many times does {b} go into {a}?", "Split {a} into {b} equal parts.",
          "How often does {b} fit into {a}?", "What do you get if you divide {a} by {b}?", "{a} over {b}?"),
}  # fmt: skip
# After a sum, about its result.
SUM_FOLLOWUPS = {
    "+": ("Add {n}.", "Add {n} to that.", "Now add {n} to it.", "And if I add {n}?", "And {n} more?"),
    "-": (
        "Subtract {n}.",
        "Take {n} away from that.",
        "Now take away {n}.",
        "Now subtract {n} from it.",
        "And {n} less?",
    ),
    "*": ("Multiply that by {n}.", "Now multiply it by {n}.", "And {n} times that?", "And that {n} times?"),
    "/": ("Divide that by {n}.", "Now divide it by {n}.", "And divided by {n}?", "And if {n} people share that?"),
}
REMAINDERS = (
    "{a} divided by {b} with remainder",
    "What is the remainder of {a} divided by {b}?",
    "Divide {a} by {b} with remainder.",
    "How much is {a} / {b}, and what is the remainder?",
)
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

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
    "Which letters form {w}?",
    "Which letters does {w} consist of?",
    "Which letters give the word {w}?",
    "What letters do I need to write {w}?",
    "What are the letters in the word {w}?",
    "Show me how {w} is written.",
    "Show me how to spell {w}.",
    "Show me how one writes the word {w}.",
    "Show me the spelling of {w}.",
    "Tell me how {w} is spelled.",
    "Tell me how to spell {w}.",
    "Say how {w} is spelled.",
    "Explain how {w} is written.",
    "Do you know how to spell {w}?",
    "Do you know how {w} is spelled?",
    "I forgot how {w} is written.",
    "I forgot the spelling of {w}.",
    "I want to know how to spell {w}.",
    "I have to write {w}. How do you spell it?",
    "Remind me how to spell {w}.",
    "How would you spell {w}?",
    "How would one write the word {w}?",
    "How can I spell {w}?",
    "How must I write {w}?",
    "Could you spell out {w}?",
    "Can you spell out {w} for me?",
    "Please spell out the word {w}.",
    "Could you tell me the letters of the word {w}?",
    "Give me the spelling of {w}.",
    "Give me all the letters of the word {w}.",
    "spell {w}",
    "spelling of {w}",
    "letters of {w}",
    "{w}, letter by letter.",
    "Break {w} into letters.",
    "Take the word {w} apart into its letters.",
    "Name all letters of {w}.",
    "List the letters in {w}.",
    "What does {w} look like letter by letter?",
    "What letters make {w}?",
    "What letters are in {w}?",
    "Write down the letters of {w}.",
    "How do I write {w} correctly?",
    "How is {w} written?",
    "Can you write {w} one letter at a time?",
    "I need to write {w}. Please spell it.",
    "how to spell {w}",
    "how do u spell {w}",
    "spell out {w}",
    "the letters of the word {w}",
)
HELD_OUT_SPELL_REQUESTS = (
    "How would I spell {w}?",
    "Show me how {w} is spelled.",
    "Which letters make up {w}?",
    "Could you spell out the word {w}?",
    "Give me the spelling of the word {w}.",
    "I forgot how to spell {w}.",
)
LENGTH_REQUESTS = (
    "How many letters does {w} have?",
    "How many letters are in {w}?",
    "How many letters are there in the word {w}?",
    "How long is the word {w}?",
    "Count the letters of {w}.",
    "What number of letters has the word {w}?",
    "How many letters has {w}?",
    "How many letters has the word {w} got?",
    "How many letters does the word {w} have?",
    "number of letters in {w}",
    "how many letters in {w}",
    "letters in {w}: how many?",
    "What is the length of {w}?",
    "Count the letters in the word {w}.",
    "How many letters do I need to write {w}?",
    "How many letters make up {w}?",
    "The word {w} has how many letters?",
    "Can you count the letters of the word {w}?",
    "Tell me how many letters {w} has.",
    "With how many letters is {w} written?",
)

# {l} is the letter, {w} the word.
COUNT_REQUESTS = (
    "How many {l} are in {w}?",
    "How many {l} are in the word {w}?",
    "How many {l} are there in {w}?",
    "How many {l}'s are in {w}?",
    "How many {l}s are in {w}?",
    "How many {l}'s are there in the word {w}?",
    "How many times is {l} in {w}?",
    "How many times is the letter {l} in the word {w}?",
    "How often is {l} in {w}?",
    "Count the letter {l} in {w}.",
    "Count the {l} in {w}.",
    "Please count the letter {l} in the word {w}.",
    "How many letters {l} does {w} have?",
    "How many {l} does {w} have?",
    "How many {l} in {w}?",
    "Tell me how many {l} are in {w}.",
    "How often can you see {l} in {w}?",
    "Could you count the {l} in {w}?",
    "In {w}, how many {l} are there?",
    "Find out how many {l} are in {w}.",
    "What number of {l} does {w} have?",
    "How many times does {w} have the letter {l}?",
    "Show me how many {l} are in {w}.",
    "Can you find {l} in {w} and count it?",
    "How many times does {l} occur in {w}?",
    "How many times does the letter {l} come in {w}?",
    "How many times does {l} stand in the word {w}?",
    "How many times can you see {l} in {w}?",
    "How many times do you find {l} in {w}?",
    "How often does {l} occur in {w}?",
    "How often does the letter {l} come in the word {w}?",
    "How often do you find {l} in {w}?",
    "How often is the letter {l} in the word {w}?",
    "How many of the letters in {w} are {l}?",
    "How many of the letters of {w} are {l}?",
    "How many letters of {w} are {l}?",
    "How many letters {l} are in {w}?",
    "How many letters {l} do you see in {w}?",
    "How many {l} can you find in {w}?",
    "How many {l} can you see in the word {w}?",
    "How many {l} does the word {w} have?",
    "How many {l}s does {w} have?",
    "how many {l} in {w}",
    "how many {l}s in the word {w}",
    "number of {l} in {w}",
    "count {l} in {w}",
    "Can you count the {l}s in {w}?",
    "Can you tell me how many {l} {w} has?",
    "Please tell me how many times {l} is in {w}.",
    "In {w}, how often is the letter {l}?",
    "In {w}, how many times does {l} come?",
    "In {w}, what is the number of {l}?",
    "What is the number of {l} in {w}?",
    "Look at {w}. How many {l} do you see?",
    "The word {w} has how many {l}?",
    "Take the word {w}. How many {l} does it have?",
    "I want to know how many {l} {w} has.",
)
HELD_OUT_COUNT_REQUESTS = (
    "How many times does {l} appear in {w}?",
    "How many of the letter {l} does the word {w} have?",
    "Can you count the letter {l} in {w}?",
    "In the word {w}, how many {l} are there?",
    "How often do you see the letter {l} in {w}?",
    "How many letters {l} can you find in {w}?",
)

# {w} are words.
REPEAT_REQUESTS = (
    'Say "{w}".',
    "Say after me: {w}",
    "Repeat after me: {w}",
    "Repeat: {w}",
    'Please repeat "{w}".',
    "Write: {w}",
    'Could you say "{w}"?',
    "Copy these words: {w}",
    "Tell me these words again: {w}",
)
SMALL_LETTER_REQUESTS = (
    "In small letters: {w}",
    "Write in small letters: {w}",
    "{w} in small letters",
    "Please write this in small letters: {w}",
    "Make these letters small: {w}",
)
DIGIT_REQUESTS = (
    "In digits: {w}",
    "Write these numbers in digits: {w}",
    "{w} in digits",
    "{w}: which numbers are these?",
)
CORRECTION_REQUESTS = (
    "Correct: {w}",
    "Correct these words: {w}",
    "Please correct the mistakes: {w}",
    "Write this without mistakes: {w}",
    "{w} without mistakes",
)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """`a op b`, with op one of + - * /, "percent" (a % of b) or "remainder" (a divided by b); maybe `then` a third."""

    a: Number
    op: str
    b: Number
    then: tuple[str, Number] | None = None

    @property
    def calls(self) -> tuple[str, ...]:
        """The expressions for the calculator, one after the other."""
        if self.op == "percent":
            return (f"{self.a}*{self.b}/100",)
        if self.op == "remainder":
            return (f"{self.a}//{self.b}", f"{self.a}%{self.b}")
        return (f"{self.a}{self.op}{self.b}" + "".join(map(str, self.then or ())),)

    @property
    def results(self) -> tuple[str, ...]:
        """What the calculator answers to each."""
        return tuple(result for call in self.calls if (result := use_calculator(call)) is not None)


def is_held_out_pair(a: Number, b: Number) -> bool:
    """True if sums of these numbers, in either order and with any operator, are held out for evaluation (1 in 10)."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % 10 == 0


def _number(rng: random.Random, lengths: Sequence[int]) -> int:
    """A whole number with one of these numbers of digits, each of them equally likely."""
    digits = rng.choice(lengths)
    if digits > 1 and rng.random() < 0.12:  # "1000", "77", "4004": digits that are hard to keep apart
        pair = rng.choice("123456789") + rng.choice("0123456789")
        return int(pair[0] + "".join(rng.choice(pair) for _ in range(digits - 1)))
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _repeating(rng: random.Random, number: int) -> int:
    """A number of as many digits, some of which stand twice or more in a row: 24227."""
    digits = list(str(number))
    for i in range(1, len(digits)):
        digits[i] = digits[i - 1] if rng.random() < 0.5 else digits[i]
    return int("".join(digits))


def random_sum(rng: random.Random, *, held_out: bool) -> Sum:
    """A sum of numbers with one to five digits, mostly two or three; `held_out` selects the pairs for evaluation."""
    while True:
        op = rng.choice(("+", "-", "*", "/") * 3 + ("percent", "percent", "remainder"))
        a: Number = _number(rng, (1, 1, 2, 2, 2, 3, 3, 4, 5))
        b: Number = _number(rng, (1, 1, 2, 2, 2, 3, 3, 4))
        then = None
        if op == "/":
            b = _number(rng, (1, 1, 1, 2)) if rng.random() < 0.85 else rng.choice((2, 2, 4))
            a = a if rng.random() < 0.3 else b * _number(rng, (1, 1, 2, 2, 3))  # mostly without a remainder
        elif op == "remainder":
            b = rng.randint(2, 30)
        elif op == "percent":
            a, b = rng.choice((5, 10, 15, 20, 25, 30, 50, 75, rng.randint(1, 99))), _number(rng, (2, 2, 3, 4))
        elif op == "*" and rng.random() < 0.1:
            b = 2
        elif rng.random() < 0.08:
            a = rng.choice((a, a + rng.randint(1, 9) / 10, a + 0.5))
            b = rng.choice((b + rng.randint(1, 9) / 10, b + 0.25))
        elif rng.random() < 0.08:
            then = (rng.choice("+-*"), _number(rng, (1, 2)))
        elif op == "-" and a < b and rng.random() < 0.6:
            a, b = b, a
        if not held_out and isinstance(a, int) and isinstance(b, int):  # whose digits are easily lost or doubled
            if op == "/" and rng.random() < 0.12:
                a, b = _number(rng, (3, 4, 5)), rng.choice((3, 6, 9, 11, 12, 27, 33))
            elif op in "+-*" and rng.random() < 0.25:
                a, b = _repeating(rng, a), _repeating(rng, b)
        if is_held_out_pair(a, b) == held_out:
            return Sum(a, op, b, then)


def makes_a_story(problem: Sum) -> bool:
    """True if things can be counted as the sum does: whole, some, not too many, nothing negative or in parts."""
    a, op, b = problem.a, problem.op, problem.b
    if not (isinstance(a, int) and isinstance(b, int) and 1 < a < 5000 and 1 < b < 5000):
        return False
    return a > b if op == "-" else a % b == 0 if op == "/" else True


def number_word(number: int, joint: str = "-") -> str:
    """A whole number below 100 in words: 42 -> "forty-two", or "forty two" with a space for its `joint`."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"{joint}{ONES[ones]}" if ones else "")


def ask_sum(rng: random.Random, problem: Sum, *, held_out: bool) -> str:
    """A request to work out `problem`, in symbols or words."""
    a, op, b = problem.a, problem.op, problem.b
    requests = HELD_OUT_SUM_REQUESTS if held_out else SUM_REQUESTS
    if op == "remainder":
        phrase = rng.choice(REMAINDERS[:1] if held_out else REMAINDERS)
        return rng.choice(requests).format(e=phrase.format(a=a, b=b)) if phrase[0] == "{" else phrase.format(a=a, b=b)
    if op == "percent":
        return rng.choice(requests).format(e=rng.choice(PERCENT).format(a=a, b=b))
    if not held_out and not problem.then and (op, b) in OF_ONE and rng.random() < 0.6:
        phrase = rng.choice(OF_ONE[op, int(b)]).format(a=a)
        return phrase if phrase[0].isupper() else rng.choice(requests).format(e=phrase)
    if not held_out and not problem.then and rng.random() < 0.4:
        if op == "*" and a == b:
            return rng.choice(requests).format(e=rng.choice(SQUARED).format(a=a))
        if makes_a_story(problem) and rng.random() < 0.7:
            return stories.tell(rng, op, int(a), int(b))
        return rng.choice(SUM_PHRASES[op]).format(a=a, b=b)
    numbers = [a, b, *([problem.then[1]] if problem.then else [])]
    small = all(isinstance(number, int) and number < 100 for number in numbers)
    in_words = rng.random() < (0.6 if small and not held_out else 0.3)
    space = "" if not in_words and rng.random() < 0.3 else " "
    shown = [str(number) for number in numbers]
    if in_words and small and rng.random() < (0.5 if held_out else 0.65):
        joint = rng.choice("- ")
        shown = [number_word(int(number), joint) for number in numbers]
    expression = shown[0]
    for sign, number in zip([op, *([problem.then[0]] if problem.then else [])], shown[1:], strict=True):
        expression += f"{space}{rng.choice((OPERATOR_WORDS if in_words else SYMBOLS)[sign])}{space}{number}"
    return rng.choice(requests).format(e=expression)


def worked(calls: Sequence[str], sentence: str) -> Parts:
    """Calls of the calculator with their results, then the sentence."""
    parts = []
    for call in calls:
        result = use_calculator(call)
        if result is None:
            raise ValueError(f"the calculator has no answer to {call!r}")
        parts += [{"type": "python", "text": call}, {"type": "python_output", "text": result}]
    return [*parts, {"type": "text", "text": sentence}]


def sum_answer(problem: Sum) -> Parts:
    """The calculator call, its result, and the result in a sentence."""
    return worked(problem.calls, f"The answer is {' remainder '.join(problem.results)}.")


# --- words -----------------------------------------------------------------------------------------------------------


def made_up_word(rng: random.Random, words: Sequence[str]) -> str:
    """A word that nobody knows: the beginning of one word and the end of another, sometimes repeated, or letters."""
    kind = rng.random()
    if kind < 0.15:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))
    first, last = rng.choice(words), rng.choice(words)
    word = first[: rng.randint(1, len(first))] + last[rng.randrange(len(last)) :]
    if kind < 0.35:  # like "banana" and "mississippi": what comes next is not clear from one letter
        part = word[: rng.randint(2, 3)]
        word = word[:4] + part * rng.randint(1, 2)
    return word[:12]


def dressed(rng: random.Random, word: str) -> str:
    """The word as people write it in a request: mostly plain, else in quotes, with a capital, or in capitals. It stands
    between two MARKs, so that it is found again whatever becomes of the request."""
    kind = rng.random()
    word = word if kind < 0.7 else word.capitalize() if kind < 0.85 else word.upper()
    quote = rng.choice(("", "", "", '"', "'"))
    return f"{quote}{MARK}{word}{MARK}{quote}"


def without_marks(question: str) -> tuple[str, str]:
    """(the question without MARKs, the word that stood between them with the space before it, if there is one)."""
    before, word, after = question.split(MARK)
    return before + word + after, (" " if before.endswith(" ") else "") + word


def spelling_answer(shown: str) -> Parts:
    """The call and the sentence that spell a word, `shown` as it stands in the question."""
    call = f'"-".join("{shown}".strip())'
    return worked([call], f"It is spelled {use_calculator(call)}.")


def length_answer(shown: str) -> Parts:
    """The call and the sentence that say how many letters the word has."""
    return worked([f'len("{shown}".strip())'], f"It has {len(shown.strip())} letters.")


def count_answer(shown: str, letter: str) -> Parts:
    """The call and the sentence that count `letter` in the word, in any case."""
    count = shown.lower().count(letter)
    sentence = f"The letter {letter} is in it {count} time{'' if count == 1 else 's'}."
    return worked([f'("{shown}").lower().count("{letter}")'], sentence)


def same_call(call: str, wanted: str) -> bool:
    """True if two calls ask the calculator for the same thing: the same numbers, or texts, and the same result.

    Of "12+34" it is "34 + 12", but not "40+6"; of `"river".count("r")` it is `' river'.count('r')`.
    """

    def things(text: str) -> list[str]:
        texts = re.findall(r""""([^"]*)"|'([^']*)'""", text)
        numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r""""[^"]*"|'[^']*'""", "", text).replace(",", ""))
        return sorted([*(a.strip().lower() or b.strip().lower() for a, b in texts), *numbers])

    result = use_calculator(call)
    wanted_result = use_calculator(wanted)
    return (
        result is not None and wanted_result is not None and result == wanted_result and things(call) == things(wanted)
    )


def random_letter(rng: random.Random, word: str) -> str:
    """A letter to count in `word`: mostly one of its own, because the count of any other is always 0."""
    kind = rng.random()
    if kind < 0.3:
        return max(word, key=word.count)
    return rng.choice(word if kind < 0.85 else "abcdefghijklmnopqrstuvwxyz")
