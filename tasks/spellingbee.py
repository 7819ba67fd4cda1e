"""Spelling and letter counting, for models that see tokens instead of letters.

SimpleSpelling: "Spell the word: apple" -> "apple:a,p,p,l,e". Short, so that many words fit in training.
SpellingBee: "How many p are in apple?" -> spell the word, count along, check with the calculator tool, "#### 2".

Both are made on the fly from a list of English words, and depend only on the split and the index: any number of
examples, the same on every machine. Train and test draw from the same words with different seeds: test examples are
mostly new pairs of word and letter, not new words.

Words: words_alpha.txt of https://github.com/dwyl/english-words (370 K words, Unlicense): words/words_alpha.txt under
NANOCHAT_TASK_DIR, else downloaded once.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Literal

from nanochat.common import download_file_with_lock
from tasks.common import Conversation, Task
from tasks.gsm8k import extract_answer
from tasks.sources import task_dir

WORD_LIST_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"
Split = Literal["train", "test"]

# {w} is the word and {l} the letter. SpellingBee.get_example adds noise, because people rarely type tidy questions.
QUESTIONS = (
    "How many {l} are in {w}",
    "How many {l} are in the word {w}",
    "How many {l}'s are there in {w}",
    "How many times does {l} appear in {w}",
    "How many times does the letter {l} occur in {w}",
    "How often is {l} used in {w}",
    "Count the {l} in {w}",
    "Count how many {l} are in the word {w}",
    "Count the letter {l} in {w}",
    "What is the number of {l} in {w}",
    "In {w}, how many {l} are there",
    "In the word {w}, how many times do you see {l}",
    "Tell me how many {l} {w} has",
    "{w} has how many {l}",
    "number of {l} in {w}",
    "Find the number of {l} in the word {w}",
    "Please count the {l} of {w}",
    "The word {w}: how many {l} does it contain",
    "Does {w} contain {l}, and how many times",
    "If I write {w}, how many {l} do I write",
    "Wie viele {l} hat das Wort {w}",
    "Wie oft kommt {l} in {w} vor",
    "Combien de {l} y a-t-il dans {w}",
    "Combien de fois trouve-t-on {l} dans {w}",
    "Cuantas {l} hay en {w}",
    "Cuantas veces aparece {l} en {w}",
    "Quante {l} ci sono in {w}",
)


@cache
def load_words() -> tuple[str, ...]:
    """All words of the list, in file order.

    Raises:
        FileNotFoundError: NANOCHAT_TASK_DIR has no words/words_alpha.txt, or it is unset and the download failed.
        ValueError: the file holds no words.
    """
    folder = task_dir()
    if folder is not None:
        path = folder / "words" / "words_alpha.txt"
        if not path.is_file():
            raise FileNotFoundError(f"no word list {path}. Put words_alpha.txt there (from {WORD_LIST_URL}).")
    else:
        try:
            path = download_file_with_lock(WORD_LIST_URL, "words_alpha.txt")
        except RuntimeError as error:
            raise FileNotFoundError(f"no word list: {error}") from error
    words = tuple(path.read_text(encoding="utf-8").split())
    if not words:
        raise ValueError(f"word list {path} is empty: remove it, and it will be downloaded again")
    return words


def spell(word: str) -> str:
    """The letters of a word, separated by commas: "apple" -> "a,p,p,l,e"."""
    return ",".join(word)


def count_answer(word: str, letter: str) -> list[dict[str, str]]:
    """The worked answer to "how many `letter` are in `word`", as message parts: by hand, then by the calculator."""
    lines = [f'Count of "{letter}" in "{word}". The letters are {word}:{spell(word)}\n']
    count = 0
    for number, character in enumerate(word, 1):
        count += character == letter
        lines.append(f"{number}:{character} hit, {count}\n" if character == letter else f"{number}:{character}\n")
    lines.append(f"By hand the count is {count}. The calculator says ")
    total = str(word.count(letter))
    return [
        {"type": "text", "text": "".join(lines)},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": total},
        {"type": "text", "text": f"\n#### {total}"},
    ]


class _WordTask(Task):
    """Examples made from the word list; `size` says how many."""

    def __init__(
        self, size: int = 1000, split: Split = "train", *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"{type(self).__name__} has the splits train and test, not {split!r}")
        super().__init__(start=start, stop=stop, step=step)
        self.size = size
        self.split = split
        self.words = load_words()

    def num_examples(self) -> int:
        return self.size

    def _random(self, index: int) -> random.Random:
        return random.Random(f"{self.name} {self.split} {index}")  # a text seed gives the same numbers everywhere


class SimpleSpelling(_WordTask):
    """Spell a word, letter by letter."""

    name = "SimpleSpelling"
    eval_type = "generative"

    def get_example(self, index: int) -> Conversation:
        word = self._random(index).choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": f"{word}:{spell(word)}"},
            ]
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        return completion.strip() == problem["messages"][-1]["content"]


class SpellingBee(_WordTask):
    """Count a letter in a word; the number after the last "####" must be right."""

    name = "SpellingBee"
    eval_type = "generative"

    def get_example(self, index: int) -> Conversation:
        rng = self._random(index)
        word = rng.choice(self.words)
        # Mostly letters of the word, because the answer for any other is always 0.
        letter = rng.choice(word if rng.random() < 0.9 else ALPHABET)
        question = rng.choice(QUESTIONS)
        if rng.random() < 0.3:
            question = question.lower()
        letter_quote, word_quote = rng.choice(("", "'", '"')), rng.choice(("", "'", '"'))
        question = question.format(
            l=f"{letter_quote}{letter}{letter_quote}", w=f"{word_quote}{word}{word_quote}"
        ) + rng.choice(("", "?"))
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": count_answer(word, letter)},
            ]
        }

    def evaluate(self, problem: Conversation, completion: str) -> bool:
        reference = extract_answer(problem["messages"][-1]["content"][-1]["text"])
        return reference is not None and extract_answer(completion) == reference
