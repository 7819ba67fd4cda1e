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

Parts = list[dict[str, str]]
MARK = "\0"  # beside a word that must stay as it is
Number = int | float

SYMBOLS = {"+": ("+",), "-": ("-",), "*": ("*", "x", "×"), "/": ("/", "÷")}
OPERATOR_WORDS = {"+": ("plus",), "-": ("minus",), "*": ("times", "multiplied by"), "/": ("divided by",)}
PERCENT = ("{a}% of {b}", "{a} % of {b}", "{a} percent of {b}")
OF_ONE = {("*", 2): ("double {a}", "twice {a}"), ("/", 2): ("half of {a}", "half {a}"), ("/", 4): ("a quarter of {a}",)}
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
    "+": (
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Add {a} to {b}.",
        "{N} has {a} {things} and gets {b} more. How many {things} does {N} have now?",
        "I have {a} {things} and buy {b} more. How many {things} do I have?",
        "If I have {a} {things} and find {b}, how many do I have in all?",
        "There were {a} {things}. Then came {b} more. How many are there now?",
    ),
    "-": (
        "Take {a} minus {b}.",
        "What is the difference of {a} and {b}?",
        "Start with {a} and take away {b}.",
        "{N} has {a} {things} and gives {b} away. How many {things} are left?",
        "I had {a} {things} and lost {b}. How many do I still have?",
        "{N} had {a} {things} and ate {b} of them. How many {things} does {N} have now?",
        "If there are {a} {things} and {b} go away, how many stay?",
        "Subtract {b} from {a}.",
        "Take {b} away from {a}.",
        "I have {a} coins and spend {b}. How many coins are left?",
        "A book has {a} pages and {N} has read {b}. How many pages are left?",
        "{N} needs {a} {things} and has {b}. How many {things} are missing?",
    ),
    "*": (
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "Multiply {a} and {b}.",
        "There are {a} boxes with {b} {things} in each. How many {things} are there?",
        "{N} buys {a} bags of {b} {things}. How many {things} is that?",
        "If {a} children have {b} {things} each, how many {things} do they have?",
        "{N} buys {a} {things} for {b} coins each. How much does {N} pay?",
        "One of the {things} costs {a} coins. How much do {b} of them cost?",
        "There are {a} rows with {b} chairs in each. How many chairs are there?",
        "{N} reads {a} pages a day. How many pages is that in {b} days?",
        "Each of {a} tables has {b} {things} on it. How many {things} are there in all?",
    ),
    "/": (
        "Divide {a} by {b}.",
        "{N} shares {a} {things} among {b} friends. How many does each one get?",
        "If {b} children share {a} {things}, how many does each child get?",
        "How many times does {b} go into {a}?",
        "{a} {things} are put into {b} boxes. How many are in each box?",
        "There are {a} {things} for {b} children. How many does each child get?",
        "{N} pays {a} coins for {b} {things}. What does one cost?",
        "Split {a} into {b} equal parts.",
    ),
}
NAMES = ("Tom", "Anna", "Ben", "Lisa", "Max", "Mia", "Sam", "Emma", "Paul", "Nora", "Leo", "Julia", "Tim", "Eva")
THINGS = (
    "apples", "books", "pens", "balls", "eggs", "cards", "stones", "cakes", "lamps", "cars", "toys", "fish", "birds",
    "flowers", "dolls", "stars", "hats", "marbles", "pictures", "stamps", "sweets", "oranges",
)  # fmt: skip
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


def random_sum(rng: random.Random, *, held_out: bool) -> Sum:
    """A sum of numbers with one to five digits, mostly two or three; `held_out` selects the pairs for evaluation."""
    while True:
        op = rng.choice(("+", "-", "*", "/", "+", "-", "*", "/", "percent", "remainder"))
        a: Number = _number(rng, (1, 1, 2, 2, 2, 3, 3, 4, 5))
        b: Number = _number(rng, (1, 1, 2, 2, 2, 3, 3, 4))
        then = None
        if op == "/":
            b = _number(rng, (1, 1, 1, 2))
            a = a if rng.random() < 0.3 else b * _number(rng, (1, 1, 2, 2, 3))  # mostly without a remainder
        elif op == "remainder":
            b = rng.randint(2, 30)
        elif op == "percent":
            a, b = rng.choice((5, 10, 15, 20, 25, 30, 50, 75, rng.randint(1, 99))), _number(rng, (2, 2, 3, 4))
        elif rng.random() < 0.08:
            a = rng.choice((a, a + rng.randint(1, 9) / 10, a + 0.5))
            b = rng.choice((b + rng.randint(1, 9) / 10, b + 0.25))
        elif rng.random() < 0.08:
            then = (rng.choice("+-*"), _number(rng, (1, 2)))
        elif op == "-" and a < b and rng.random() < 0.6:
            a, b = b, a
        if is_held_out_pair(a, b) == held_out:
            return Sum(a, op, b, then)


def makes_a_story(problem: Sum) -> bool:
    """True if things can be counted as the sum does: whole ones, more than one, and nothing negative or in parts."""
    a, op, b = problem.a, problem.op, problem.b
    if not (isinstance(a, int) and isinstance(b, int) and a > 1 and b > 1):
        return False
    return a >= b if op == "-" else a % b == 0 if op == "/" else True


def tells_a_story(phrase: str) -> bool:
    """True if a wording of SUM_PHRASES speaks of things, and not of numbers alone."""
    return "{things}" in phrase or "{N}" in phrase or "coins" in phrase or "chairs" in phrase


def number_word(number: int) -> str:
    """A whole number below 100 in words: 42 -> "forty-two"."""
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def ask_sum(rng: random.Random, problem: Sum, *, held_out: bool) -> str:
    """A request to work out `problem`, in symbols or words."""
    a, op, b = problem.a, problem.op, problem.b
    requests = HELD_OUT_SUM_REQUESTS if held_out else SUM_REQUESTS
    if op == "remainder":
        phrase = rng.choice(REMAINDERS[:1] if held_out else REMAINDERS)
        return rng.choice(requests).format(e=phrase.format(a=a, b=b)) if phrase[0] == "{" else phrase.format(a=a, b=b)
    if op == "percent":
        return rng.choice(requests).format(e=rng.choice(PERCENT).format(a=a, b=b))
    if not held_out and not problem.then and rng.random() < 0.3:
        if b in (2, 4) and (op, b) in OF_ONE:
            return rng.choice(requests).format(e=rng.choice(OF_ONE[op, int(b)]).format(a=a))
        if op == "*" and a == b:
            return rng.choice(requests).format(e=rng.choice(SQUARED).format(a=a))
        phrases = [phrase for phrase in SUM_PHRASES[op] if makes_a_story(problem) or not tells_a_story(phrase)]
        return rng.choice(phrases).format(a=a, b=b, N=rng.choice(NAMES), things=rng.choice(THINGS))
    in_words = rng.random() < 0.3
    space = "" if not in_words and rng.random() < 0.3 else " "
    numbers = [a, b, *([problem.then[1]] if problem.then else [])]
    shown = [str(number) for number in numbers]
    if in_words and all(isinstance(number, int) and number < 100 for number in numbers) and rng.random() < 0.5:
        shown = [number_word(int(number)) for number in numbers]
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
