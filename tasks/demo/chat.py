"""The demo world as conversations: training mixtures, and evaluation in phrasings that training never used.

Example `i` of a task depends only on its split, its seed and `i`. `split="train"` and `split="test"` share facts, words
and tools, but no wording: test examples ask held-out questions, in held-out wrappers, about held-out pairs of numbers.
The text that the model generates is judged, including tool calls between the tokenizer's special tokens, as in
`<|python_start|>12+34<|python_end|>`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from nanochat.generate.calculator import use_calculator
from tasks.common import Conversation, Task, TaskMixture
from tasks.demo import skills, unknown
from tasks.demo.followups import WHY_FORMS, FollowUp, FollowUps
from tasks.demo.phrasings import ask_about, ask_fact, badly_typed, put_right, typed, wrap_fact
from tasks.demo.smalltalk import SMALL_TALK, SMALL_TALK_TEST
from tasks.demo.task import Content, DemoTask, Split, conversation, final_text
from tasks.demo.tool_tasks import DemoArithmetic, DemoCounting, DemoRepeat, DemoSpelling
from tasks.demo.world import Fact, World, has_keys, load_world

HeldOut = Literal["all", "wrapper", "rewording", "typed"]
FACT_GROUPS = ("wrapper", "rewording", "typed")


class DemoFacts(DemoTask):
    """Questions about the world. The test split takes turns with three groups, or asks one of them, `kind`: a trained
    question in a held-out wrapper; a held-out rewording; and such a wrapped question in capitals, in lower case or with
    a typing error ("typed")."""

    def __init__(
        self,
        size: int,
        split: Split = "train",
        world: World | str | Path | None = None,
        seed: int = 0,
        kind: HeldOut = "all",
    ) -> None:
        super().__init__(size, split, world, seed)
        if kind not in ("all", *FACT_GROUPS):
            raise ValueError(f"kind is all or one of {', '.join(FACT_GROUPS)}, not {kind!r}")
        self.groups = FACT_GROUPS if kind == "all" else (kind,)
        self.facts = list(self.known_facts())
        random.Random(f"facts {self.split}").shuffle(self.facts)
        self.first_facts = {t.facts[0].text: t.name for t in self.world.topics if t.facts[0].language is None}

    def known_facts(self) -> tuple[Fact, ...]:
        """The facts to ask for."""
        return self.world.facts

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        if self.split == "train":
            round_number, position = divmod(index, len(self.facts))
            fact = self.facts[position]
            topic = self.first_facts.get(fact.text)
            if topic and rng.random() < 0.12:
                return conversation((ask_about(rng, topic, self.world), fact.text))
            return conversation(ask_fact(rng, fact, self.seed + round_number + position, self.world))
        number, group = index // len(self.groups), self.groups[index % len(self.groups)]
        fact = self.facts[number % len(self.facts)]
        question = fact.held_out
        if group != "rewording" and fact.language is not None:
            question = fact.language.ask(rng, rng.choice(fact.asks), held_out=True)
        elif group != "rewording":
            question = wrap_fact(rng, rng.choice(fact.asks), fact.tell, held_out=True)
        if group == "typed":
            question = badly_typed(rng, question, self.world.vocabulary)
        return conversation((question, fact.text), keys=fact.keys, group=group)


class DemoIdentity(DemoFacts):
    """Questions about the assistant itself, split as in DemoFacts."""

    def known_facts(self) -> tuple[Fact, ...]:
        return self.world.identity


class DemoSmallTalk(DemoTask):
    """Greetings, thanks, goodbyes, moods and jokes."""

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        questions, answer, keys = rng.choice(SMALL_TALK_TEST if self.held_out else SMALL_TALK)
        question = rng.choice(questions)
        return conversation((question if self.held_out else self.as_typed(rng, question, 0), answer), keys=keys)


class DemoUnknown(DemoTask):
    """Questions that the world has no answer to, and other languages: an honest answer says so.

    The test split has four groups: questions of kinds that training has none of ("outside"), made-up things, sentences
    in other languages, and as many questions that the world does answer, which must not be refused ("known").
    """

    def __init__(
        self, size: int, split: Split = "train", world: World | str | Path | None = None, seed: int = 0
    ) -> None:
        super().__init__(size, split, world, seed)
        self.known = DemoFacts(size, "test", self.world, seed)
        self.unknowns = unknown.Unknowns(self.world)

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        if not self.held_out:
            if rng.random() < 0.12 and self.world.in_english:
                return conversation((typed(rng, rng.choice(unknown.FOREIGN)), unknown.ENGLISH_ONLY))
            question, answer = self.unknowns.draw(rng)
            text, unclear = self.as_hand_typed(rng, question)
            if unclear and question.endswith("?"):
                answer = put_right(question, answer)
            return conversation((text, answer))
        number, place = divmod(index, 5)
        foreign = number % 2 == 0 and self.world.in_english
        group = ("outside", "outside", "known", "known", "language" if foreign else "made up")[place]
        if group == "known":
            known = self.known[2 * number + place - 2]
            return {**known, "keys": (), "group": group}
        if group == "outside":
            question, answer = unknown.HELD_OUT[(2 * number + place) % len(unknown.HELD_OUT)], unknown.DO_NOT_KNOW
        elif group == "made up":
            question, answer = self.unknowns.draw_held_out(rng)
        else:
            question = unknown.HELD_OUT_FOREIGN[number // 2 % len(unknown.HELD_OUT_FOREIGN)]
            answer = unknown.ENGLISH_ONLY
        return conversation((question, answer), keys=unknown.REFUSALS, group=group)

    def evaluate(self, problem: Conversation, completion: str) -> int:
        """1 if the answer says that this is not known; of a question that the world answers, if it does not."""
        text = final_text(completion)
        refused = has_keys(text, unknown.REFUSALS)
        return int(refused if problem["keys"] else bool(text) and not refused)


class DemoChat(DemoTask):
    """Conversations of two or three turns: small talk around questions, several questions, and questions that only the
    conversation makes clear: "and in Spain?", "where do they live?", "why?", "times 2".

    The test split asks such a question last (group "pronoun", "other", "why" or "more"), or a held-out one in full
    ("topic"). Only the last answer is judged.
    """

    def __init__(
        self, size: int, split: Split = "train", world: World | str | Path | None = None, seed: int = 0
    ) -> None:
        super().__init__(size, split, world, seed)
        many = 10**9
        self.others = [
            DemoIdentity(many, "train", self.world, seed),
            DemoArithmetic(many, "train", self.world, seed),
            DemoSpelling(many, "train", self.world, seed),
            DemoSmallTalk(many, "train", self.world, seed),
            DemoUnknown(many, "train", self.world, seed),
        ]
        self.follow_ups = FollowUps(self.world, held_out=self.held_out)

    def get_example(self, index: int) -> Conversation:
        rng = self.random(index)
        if self.held_out:
            return self._test_example(rng, index)
        kind = rng.random()
        if kind < 0.1:
            return self._sums(rng)
        if kind < 0.17 and self.follow_ups.unexplained:
            fact = rng.choice(self.follow_ups.unexplained)
            why = typed(rng, rng.choice(WHY_FORMS))
            return conversation(self._ask(rng, fact), (why, unknown.NO_REASON))
        opening = self._other(rng) if rng.random() < 0.2 else []
        follow = self.follow_ups.draw(rng) if kind < 0.8 else None
        if follow is not None:
            messages = self._turns(rng, follow)
            after = self.follow_ups.after.get(follow.fact.text, [])
            if after and rng.random() < 0.4:
                more = rng.choice(after)
                messages += conversation((typed(rng, more.question, self.world.vocabulary), more.fact.text))["messages"]
            return {"messages": opening + messages}
        topic = self.world.topics[index % len(self.world.topics)]
        last = conversation(self._ask(rng, rng.choice(topic.facts)))["messages"]
        return {"messages": (opening or self._other(rng)) + last + (self._other(rng) if rng.random() < 0.4 else [])}

    def _test_example(self, rng: random.Random, index: int) -> Conversation:
        follow = self.follow_ups.draw(rng)
        if follow is None or index % 5 == 4:
            topic = self.world.topics[index % len(self.world.topics)]
            first, second = topic.facts[0], topic.facts[-1]
            turns = conversation(self._ask(rng, first), (second.held_out, second.text))
            return {**turns, "keys": second.keys, "group": "topic"}
        turns = conversation((rng.choice(follow.before.asks), follow.before.text), (follow.question, follow.fact.text))
        return {**turns, "keys": follow.fact.keys, "group": follow.kind}

    def _turns(self, rng: random.Random, follow: FollowUp) -> list[dict[str, Any]]:
        question = typed(rng, follow.question, self.world.vocabulary)
        return conversation(self._ask(rng, follow.before), (question, follow.fact.text))["messages"]

    def _other(self, rng: random.Random) -> list[dict[str, Any]]:
        return list(rng.choice(self.others).get_example(rng.randrange(10**6))["messages"])

    def _sums(self, rng: random.Random) -> Conversation:
        """A sum, and another one that begins with its result: "times 2"."""
        first = skills.random_sum(rng, held_out=False)
        while first.op == "remainder":  # has two results
            first = skills.random_sum(rng, held_out=False)
        result = first.results[-1]
        sign = rng.choice("+-*/")
        number = rng.choice([n for n in range(2, 13) if "." in result or not skills.is_held_out_pair(int(result), n)])
        if rng.random() < 0.5:
            question = rng.choice(skills.SUM_FOLLOWUPS[sign]).format(n=number)
        else:
            words = rng.choice((*skills.OPERATOR_WORDS[sign], *skills.SYMBOLS[sign]))
            question = rng.choice(
                ("And {o} {n}?", "and {o} {n}", "{o} {n}", "Now {o} {n}.", "That {o} {n}?", "What is that {o} {n}?")
            ).format(o=words, n=number)
        question = typed(rng, question)
        call = f"{result}{sign}{number}"
        second = skills.worked([call], f"The answer is {use_calculator(call)}.")
        asked = self.as_typed(rng, skills.ask_sum(rng, first, held_out=False), dropped=0)
        return conversation((asked, skills.sum_answer(first)), (question, second))

    def _ask(self, rng: random.Random, fact: Fact) -> tuple[str, Content]:
        return ask_fact(rng, fact, rng.randrange(len(fact.asks)), self.world)


def demo_mid_mixture(
    *,
    facts: int = 9000,
    identity: int = 2000,
    arithmetic: int = 2900,
    repeat: int = 1200,
    spelling: int = 1350,
    counting: int = 750,
    small_talk: int = 650,
    unknown: int = 2300,
    chat: int = 1000,
    seed: int = 1,
    world: World | str | Path | None = None,
) -> TaskMixture:
    """The mixture for mid-training: all tasks together, about 0.7 M tokens at a vocabulary of 4096."""
    loaded = world if isinstance(world, World) else load_world(world)
    return TaskMixture(
        [
            DemoFacts(facts, "train", loaded, seed),
            DemoIdentity(identity, "train", loaded, seed),
            DemoArithmetic(arithmetic, "train", loaded, seed),
            DemoRepeat(repeat, "train", loaded, seed),
            DemoSpelling(spelling, "train", loaded, seed),
            DemoCounting(counting, "train", loaded, seed),
            DemoSmallTalk(small_talk, "train", loaded, seed),
            DemoUnknown(unknown, "train", loaded, seed),
            DemoChat(chat, "train", loaded, seed),
        ]
    )


def demo_sft_mixture(*, seed: int = 2, world: World | str | Path | None = None) -> TaskMixture:
    """The mixture for SFT: the tasks of mid-training with other random draws."""
    return demo_mid_mixture(
        facts=7500,
        identity=1700,
        arithmetic=2300,
        repeat=850,
        spelling=1050,
        counting=600,
        small_talk=550,
        unknown=2200,
        chat=900,
        seed=seed,
        world=world,
    )


def demo_eval_tasks(
    *,
    facts: int = 300,
    identity: int = 51,
    arithmetic: int = 120,
    spelling: int = 40,
    counting: int = 40,
    small_talk: int = 40,
    unknown: int = 250,
    chat: int = 120,
    unseen: int = 80,
    world: World | str | Path | None = None,
) -> dict[str, Task]:
    """Evaluation tasks by name, all in held-out phrasings; a third of `facts` goes to each of its three groups."""
    loaded = world if isinstance(world, World) else load_world(world)
    tasks: dict[str, Task] = {
        "DemoFacts": DemoFacts(facts, "test", loaded),
        "DemoIdentity": DemoIdentity(identity, "test", loaded),
        "DemoArithmetic": DemoArithmetic(arithmetic, "test", loaded),
        "DemoSpelling": DemoSpelling(spelling, "test", loaded),
        "DemoCounting": DemoCounting(counting, "test", loaded),
        "DemoSpelling-Unseen": DemoSpelling(unseen, "test", loaded, unseen=True),
        "DemoCounting-Unseen": DemoCounting(unseen, "test", loaded, unseen=True),
        "DemoSmallTalk": DemoSmallTalk(small_talk, "test", loaded),
        "DemoUnknown": DemoUnknown(unknown, "test", loaded),
        "DemoChat": DemoChat(chat, "test", loaded),
    }
    for name, task in tasks.items():
        task.name = name
    return tasks
