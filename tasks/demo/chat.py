"""The demo world as conversations: training mixtures, and evaluation in phrasings that training never used.

Example `i` of a task depends only on its split, its seed and `i`. `split="train"` and `split="test"` share facts, words
and tools, but no wording: test examples ask held-out questions, in held-out wrappers, about held-out pairs of numbers.
The text that the model generates is judged, including tool calls between the tokenizer's special tokens, as in
`<|python_start|>12+34<|python_end|>`.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, Literal

from tasks.common import Conversation, Task, TaskMixture
from tasks.demo import skills
from tasks.demo.phrasings import ask_fact, drop_words, typed, wrap_fact, wrap_request
from tasks.demo.smalltalk import SMALL_TALK, SMALL_TALK_TEST, UNKNOWN_ANSWER, unknown_question
from tasks.demo.world import Fact, World, has_keys, load_world, words_of
from tasks.gsm8k import extract_answer

Split = Literal["train", "test"]
HeldOut = Literal["both", "wrapper", "rewording"]
Content = str | list[dict[str, str]]


def conversation(*turns: tuple[str, Content], **extra: Any) -> Conversation:
    """A conversation of (question, answer) turns; `extra` holds what the judge needs."""
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **extra}


def final_text(completion: str) -> str:
    """The assistant's text after its last tool result, without special tokens."""
    text = completion.split("<|output_end|>")[-1]
    return re.sub(r"<\|[a-z_]+\|>", " ", text.split("<|assistant_end|>")[0]).strip()


def tool_calls(completion: str) -> list[str]:
    """The finished tool calls of a completion."""
    return re.findall(r"<\|python_start\|>(.*?)<\|python_end\|>", completion, flags=re.DOTALL)


class DemoTask(Task):
    """`size` examples from a world; the module's docstring explains the splits."""

    eval_type = "generative"

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"{type(self).__name__} has the splits train and test, not {split!r}")
        super().__init__(start=start, stop=stop, step=step)
        self.size = size
        self.split: Split = split
        self.world = world if isinstance(world, World) else load_world(world)
        self.seed = seed

    @property
    def held_out(self) -> bool:
        """True if examples use what training never shows."""
        return self.split == "test"

    def num_examples(self) -> int:
        return self.size

    def random(self, index: int) -> random.Random:
        """The random generator of example `index`; text seeds give the same numbers everywhere."""
        return random.Random(f"{type(self).__name__} {self.split} {self.seed} {index}")


class DemoFacts(DemoTask):
    """Questions about the world. In the test split, even examples ask a trained question in a held-out wrapper, and odd
    ones a held-out rewording; `kind` selects one of the two."""

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
        kind: HeldOut = "both",
        **slice_arguments: Any,
    ) -> None:
        super().__init__(size, split, world, seed, **slice_arguments)
        if kind not in ("both", "wrapper", "rewording"):
            raise ValueError(f"kind is both, wrapper or rewording, not {kind!r}")
        self.kind: HeldOut = kind
        self.facts = list(self.known_facts())
        random.Random(f"facts {self.split}").shuffle(self.facts)

    def known_facts(self) -> tuple[Fact, ...]:
        """The facts to ask for."""
        return self.world.facts

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        if self.split == "train":
            round_number, position = divmod(index, len(self.facts))
            fact = self.facts[position]
            question = ask_fact(rng, fact, self.seed + round_number + position, self.world.held_out)
            return conversation((question, fact.text))
        reworded = self.kind == "rewording" or (self.kind == "both" and index % 2 == 1)
        fact = self.facts[(index if self.kind != "both" else index // 2) % len(self.facts)]
        question = fact.held_out
        if not reworded:
            question = rng.choice(fact.asks)
            if fact.language is None:
                question = wrap_fact(rng, question, fact.tell, held_out=True)
            else:
                question = fact.language.ask(rng, question, held_out=True)
        return conversation((question, fact.text), keys=fact.keys, group="rewording" if reworded else "wrapper")

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the answer has the key words of the fact."""
        return int(has_keys(final_text(completion), problem["keys"]))


class DemoIdentity(DemoFacts):
    """Questions about the assistant itself, split as in DemoFacts."""

    def known_facts(self) -> tuple[Fact, ...]:
        return self.world.identity


class DemoArithmetic(DemoTask):
    """Sums for the calculator; the test split has other pairs of numbers and other phrasings."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        problem = skills.random_sum(rng, held_out=self.held_out)
        question = skills.ask_sum(rng, problem, held_out=self.held_out)
        if not self.held_out:
            question = _maybe_wrapped(rng, question)
        return conversation((question, skills.sum_answer(problem)), expected=problem.result)

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the calculator was used and the last number of the answer is right."""
        numbers = re.findall(r"-?\d+", final_text(completion).replace(",", ""))
        return int(bool(tool_calls(completion)) and bool(numbers) and int(numbers[-1]) == problem["expected"])


class WordTask(DemoTask):
    """A task about words; `unseen` selects the words that training never spells."""

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
        unseen: bool = False,
        **slice_arguments: Any,
    ) -> None:
        super().__init__(size, split, world, seed, **slice_arguments)
        if unseen and split == "train":
            raise ValueError("unseen words are for the test split: training never spells them")
        self.words = list(self.world.unseen_words if unseen else self.world.words)
        random.Random(f"words {self.split}").shuffle(self.words)


class DemoSpelling(WordTask):
    """Spell a word."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        word = self.words[index % len(self.words)]
        requests = skills.HELD_OUT_SPELL_REQUESTS if self.held_out else skills.SPELL_REQUESTS
        question = rng.choice(requests).format(w=word)
        if not self.held_out:
            question = _maybe_wrapped(rng, question)
        return conversation((question, skills.spelling_answer(word)), word=word)

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the last run of single letters spells the word ("r i v e r", "r-i-v-e-r", "r, i, v, e, r")."""
        runs: list[list[str]] = [[]]
        for word in words_of(final_text(completion)):
            if len(word) == 1:
                runs[-1].append(word)
            elif runs[-1]:
                runs.append([])
        runs = [run for run in runs if run]
        return int(bool(runs) and "".join(runs[-1]) == problem["word"])


class DemoCounting(WordTask):
    """Count a letter in a word, by SpellingBee's protocol."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        word = self.words[index % len(self.words)]
        letter = skills.random_letter(rng, word)
        requests = skills.HELD_OUT_COUNT_REQUESTS if self.held_out else skills.COUNT_REQUESTS
        question = rng.choice(requests).format(l=letter, w=word)
        if not self.held_out:
            question = _maybe_wrapped(rng, question)
        answer = skills.count_answer(word, letter)
        return conversation((question, answer), expected=word.count(letter), word=word, letter=letter)

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the calculator was asked for this letter of this word, and the number after the last "####" is right."""
        return int(asked_to_count(problem, completion) and extract_answer(completion) == problem["expected"])


def asked_to_count(problem: Conversation, completion: str) -> bool:
    """True if a call of the calculator counts the problem's letter in its word; of a problem without them, always."""
    if "word" not in problem:
        return True
    asked = rf"""\s*(['"]){re.escape(problem["word"])}\1\.count\((['"]){re.escape(problem["letter"])}\2\)\s*"""
    return any(re.fullmatch(asked, call) for call in tool_calls(completion))


class DemoSmallTalk(DemoTask):
    """Greetings, thanks, goodbyes, and an honest "I do not know" for made-up things."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        if index % 3 == 2:
            return conversation((unknown_question(rng, held_out=self.held_out), UNKNOWN_ANSWER), keys=(("not know",),))
        questions, answer, keys = rng.choice(SMALL_TALK_TEST if self.held_out else SMALL_TALK)
        question = rng.choice(questions)
        return conversation((question if self.held_out else typed(rng, question), answer), keys=keys)

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the reply has the right words."""
        return int(has_keys(final_text(completion), problem["keys"]))


class DemoChat(DemoTask):
    """Conversations of two or three turns: small talk around questions, or several questions.

    The second question is mostly about the topic of the first. In the test split only the last question is held out,
    and only its answer is judged.
    """

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
        **slice_arguments: Any,
    ) -> None:
        super().__init__(size, split, world, seed, **slice_arguments)
        many = 10**9
        self.others = [
            DemoIdentity(many, "train", self.world, seed),
            DemoArithmetic(many, "train", self.world, seed),
            DemoSpelling(many, "train", self.world, seed),
            DemoSmallTalk(many, "train", self.world, seed),
        ]

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        topic = self.world.topics[index % len(self.world.topics)]
        first, second = rng.sample(topic.facts, 2) if len(topic.facts) > 1 else (topic.facts[0], topic.facts[0])
        opening = (
            conversation(self._ask(rng, first))
            if rng.random() < 0.6
            else rng.choice(self.others).get_example(rng.randrange(10**6))
        )
        messages = opening["messages"]
        if self.held_out:
            last = conversation((second.held_out, second.text))
            return {"messages": messages + last["messages"], "keys": second.keys}
        last = conversation(self._ask(rng, second))
        if rng.random() < 0.3:
            closing = rng.choice(self.others).get_example(rng.randrange(10**6))
            return {"messages": messages + last["messages"] + closing["messages"]}
        return {"messages": messages + last["messages"]}

    def _ask(self, rng: random.Random, fact: Fact) -> tuple[str, Content]:
        return ask_fact(rng, fact, rng.randrange(len(fact.asks)), self.world.held_out), fact.text

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the last answer has the key words of its fact."""
        return int(has_keys(final_text(completion), problem["keys"]))


def _maybe_wrapped(rng: random.Random, request: str) -> str:
    """A training request: plain, wrapped or without its function words, and typed as people do."""
    kind = rng.random()
    if kind < 0.25:
        request = wrap_request(rng, request, held_out=False)
    elif kind < 0.35:
        request = drop_words(rng, request)
    return typed(rng, request)


def demo_mid_mixture(
    *,
    facts: int = 10000,
    identity: int = 1800,
    arithmetic: int = 2400,
    spelling: int = 1600,
    counting: int = 1600,
    small_talk: int = 700,
    chat: int = 1200,
    seed: int = 1,
    world: World | str | Path | None = None,
) -> TaskMixture:
    """The mixture for mid-training: all tasks together, about 0.57 M tokens at a vocabulary of 4096."""
    loaded = world if isinstance(world, World) else load_world(world)
    return TaskMixture(
        [
            DemoFacts(facts, "train", loaded, seed),
            DemoIdentity(identity, "train", loaded, seed),
            DemoArithmetic(arithmetic, "train", loaded, seed),
            DemoSpelling(spelling, "train", loaded, seed),
            DemoCounting(counting, "train", loaded, seed),
            DemoSmallTalk(small_talk, "train", loaded, seed),
            DemoChat(chat, "train", loaded, seed),
        ]
    )


def demo_sft_mixture(
    *,
    facts: int = 9000,
    identity: int = 2400,
    arithmetic: int = 1600,
    spelling: int = 800,
    counting: int = 800,
    small_talk: int = 400,
    chat: int = 800,
    seed: int = 2,
    world: World | str | Path | None = None,
) -> TaskMixture:
    """The mixture for SFT: the tasks of mid-training with other random draws and more of the facts."""
    return demo_mid_mixture(
        facts=facts,
        identity=identity,
        arithmetic=arithmetic,
        spelling=spelling,
        counting=counting,
        small_talk=small_talk,
        chat=chat,
        seed=seed,
        world=world,
    )


def demo_eval_tasks(
    *,
    facts: int = 600,
    identity: int = 68,
    arithmetic: int = 100,
    spelling: int = 80,
    counting: int = 80,
    small_talk: int = 30,
    chat: int = 40,
    unseen: int = 40,
    world: World | str | Path | None = None,
) -> dict[str, Task]:
    """Evaluation tasks by name, all in held-out phrasings; half of `facts` goes to each of its two kinds."""
    loaded = world if isinstance(world, World) else load_world(world)
    tasks: dict[str, Task] = {
        "DemoFacts": DemoFacts(facts, "test", loaded),
        "DemoIdentity": DemoIdentity(identity, "test", loaded),
        "DemoArithmetic": DemoArithmetic(arithmetic, "test", loaded),
        "DemoSpelling": DemoSpelling(spelling, "test", loaded),
        "DemoCounting": DemoCounting(counting, "test", loaded),
        "DemoSmallTalk": DemoSmallTalk(small_talk, "test", loaded),
        "DemoChat": DemoChat(chat, "test", loaded),
        "DemoSpelling-Unseen": DemoSpelling(unseen, "test", loaded, unseen=True),
        "DemoCounting-Unseen": DemoCounting(unseen, "test", loaded, unseen=True),
    }
    for name, task in tasks.items():
        task.name = name
    return tasks
