"""Tasks of exact copying: sums, spelling and counting letters by the calculator, repeating words.

An answer is right only if the calculator was asked for the right thing.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from tasks.common import Conversation
from tasks.demo import skills
from tasks.demo.phrasings import FUNCTION_WORDS
from tasks.demo.task import DemoTask, Split, conversation, final_text, tool_calls
from tasks.demo.typos import mistyped
from tasks.demo.world import World, words_of


def tool_keys(problem: skills.Sum) -> dict[str, Any]:
    """What ToolTask judges by: the calls that are right, and what the answer must say."""
    return {"calls": list(problem.calls), "expected": list(problem.results)}


class ToolTask(DemoTask):
    """What the calculator works out. An answer is right if the calculator was asked for the right thing, and if the
    answer says the result."""

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the calls are those of the problem, and the last numbers of the answer their results."""
        calls, wanted = tool_calls(completion), problem["calls"]
        asked = len(calls) == len(wanted) and all(map(skills.same_call, calls, wanted))
        numbers = re.findall(r"-?\d+(?:\.\d+)?", final_text(completion).replace(",", ""))
        return int(asked and numbers[-len(wanted) :] == problem["expected"])


class DemoArithmetic(ToolTask):
    """Sums for the calculator; the test split has other pairs of numbers and other phrasings."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        problem = skills.random_sum(rng, held_out=self.held_out)
        question = skills.ask_sum(rng, problem, held_out=self.held_out)
        if not self.held_out:
            question = self.as_typed(rng, question, dropped=0)  # "by", "and" and "one" are part of the sum
        return conversation((question, skills.sum_answer(problem)), **tool_keys(problem), group=problem.op)


class WordTask(ToolTask):
    """A task about words. Training takes those of the world and makes many up; `unseen` selects words that training
    never asks for."""

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
        unseen: bool = False,
    ) -> None:
        super().__init__(size, split, world, seed)
        if unseen and split == "train":
            raise ValueError("unseen words are for the test split: training never spells them")
        self.words = list(self.world.unseen_words if unseen else self.world.words)
        random.Random(f"words {self.split}").shuffle(self.words)
        unseen_words = set(self.world.unseen_words)
        known = (word for word in self.world.vocabulary if re.fullmatch("[a-z]{2,12}", word))
        self.others = sorted(word for word in known if word not in unseen_words) or list(self.world.words)

    def word(self, rng: random.Random, index: int) -> str:
        """The word of an example."""
        if self.held_out:
            return self.words[index % len(self.words)]
        while True:
            kind = rng.random()
            word = (
                skills.made_up_word(rng, self.others)
                if kind < 0.6
                else rng.choice(self.others if kind < 0.85 else self.words)
            )
            if word not in self.world.unseen_words:
                return word

    def request(self, rng: random.Random, word: str, form: str, **values: str) -> tuple[str, str]:
        """(the question, the word as it stands in it)."""
        shown = f"{skills.MARK}{word}{skills.MARK}" if self.held_out else skills.dressed(rng, word)
        question = form.format(w=shown, **values)
        return skills.without_marks(question if self.held_out else self.as_typed(rng, question))


class DemoSpelling(WordTask):
    """Spell a word; the letters come from the calculator."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        form = rng.choice(skills.HELD_OUT_SPELL_REQUESTS if self.held_out else skills.SPELL_REQUESTS)
        word = self.word(rng, index)
        question, shown = self.request(rng, word, form)
        return conversation((question, skills.spelling_answer(shown)), word=word)

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the last run of single letters spells the word ("r i v e r", "r-i-v-e-r", "r, i, v, e, r"), and if each
        call was for this word."""
        runs: list[list[str]] = [[]]
        for word in words_of(final_text(completion)):
            if len(word) == 1:
                runs[-1].append(word)
            elif runs[-1]:
                runs.append([])
        runs = [run for run in runs if run]
        asked = all(f"{problem['word']}" in words_of(call) for call in tool_calls(completion))
        return int(bool(runs) and "".join(runs[-1]) == problem["word"] and asked)


class DemoCounting(WordTask):
    """Count a letter in a word, or in one of ten examples of training all its letters, by the calculator."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        word = self.word(rng, index)
        if not self.held_out and rng.random() < 0.22:
            question, shown = self.request(rng, word, rng.choice(skills.LENGTH_REQUESTS))
            return conversation((question, skills.length_answer(shown)))
        letter = skills.random_letter(rng, word)
        form = rng.choice(skills.HELD_OUT_COUNT_REQUESTS if self.held_out else skills.COUNT_REQUESTS)
        quote = "" if self.held_out else rng.choice(("", "", "", "'", '"'))
        written = letter.upper() if not self.held_out and rng.random() < 0.1 else letter
        question, shown = self.request(rng, word, form, l=f"{quote}{written}{quote}")
        answer = skills.count_answer(shown, letter)
        return conversation((question, answer), calls=[answer[0]["text"]], expected=[answer[1]["text"]])


class DemoRepeat(WordTask):
    """Say some words again, for training only: copying is what the calls of the calculator need, and here nearly every
    token of an answer is copied. Some of the lists are in capitals, which are to become small, or mistyped, which are
    to be corrected, or numbers in words: nearly every token then teaches what a word looks like when people shout or
    hurry. Whole lists are more than the smallest models can do, so this is not evaluated."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        kind = rng.random()
        if kind < 0.3:
            words = " ".join(self.word(rng, index + i) for i in range(rng.randint(2, 8)))
            return conversation((rng.choice(skills.REPEAT_REQUESTS).format(w=words), words + "."))
        if kind < 0.4:
            numbers = [rng.randrange(100) for _ in range(rng.randint(2, 8))]
            shown = ", ".join(skills.number_word(number, rng.choice("- ")) for number in numbers)
            return conversation((rng.choice(skills.DIGIT_REQUESTS).format(w=shown), f"{' '.join(map(str, numbers))}."))
        facts = rng.choices(self.world.facts or self.world.identity, k=3)
        texts = " ".join(rng.choice((fact.text, *fact.asks)) for fact in facts)
        words = [word for word in words_of(texts) if word not in FUNCTION_WORDS] or list(self.world.words)
        words = rng.sample(words, min(len(words), rng.randint(3, 12)))
        if kind < 0.7:
            request, shown = rng.choice(skills.SMALL_LETTER_REQUESTS), " ".join(words).upper()
            request = request.upper().replace("{W}", "{w}") if rng.random() < 0.5 else request
        else:
            request = rng.choice(skills.CORRECTION_REQUESTS)
            shown = " ".join(mistyped(rng, word, self.world.vocabulary) for word in words)
        return conversation((request.format(w=shown), " ".join(words) + "."))
