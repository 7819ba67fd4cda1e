"""Questions that only the conversation makes clear: "and Spain?", "where do they live?", "why?".

They are derived from the tables by rule. A question of a fact names its topic; with a pronoun in its place it follows
any other fact of the topic. Two topics that are asked for in the same words ("What is the capital of {}?") follow each
other by name alone. A fact that is asked for by "Why ...?" is the reason of another one that has the words of that
question. "Tell me more" is answered by the next fact of the topic.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from tasks.demo.phrasings import FUNCTION_WORDS
from tasks.demo.world import Fact, Topic, World, words_of

WHY_FORMS = ("Why?", "Why is that?", "why", "But why?", "And why?", "Why is it so?", "Why so?", "What is the reason?")
WHY_NOT_FORMS = ("Why not?", "why not", "And why not?", "But why not?")
HELD_OUT_WHY_FORMS = ("Can you say why?", "Why is that so?")
OTHER_FORMS = (
    "And {of}?", "And {of}?", "and {of}?", "What about {x}?", "And what about {x}?", "And {x}?", "and {x}?", "{of}?",
    "How about {x}?", "Now {x}.", "And the same for {x}?",
)  # fmt: skip
HELD_OUT_OTHER_FORMS = ("Then {of}?", "And how is it with {x}?")
MORE_FORMS = (
    "Tell me more.", "Tell me more about it.", "What else?", "What else do you know?", "more", "And what else?",
    "Can you tell me more?", "Go on.",
)  # fmt: skip
HELD_OUT_MORE_FORMS = ("Is there more to know?", "I would like to hear more.")
_BEFORE_A_NAME = frozenset(
    words_of(
        "do does did is are was were can could has have of in on at to for from by with about around than like between "
        "into inside under over near through off make call see use eat need give keep when why how where and"
    )
)
_BEFORE_A_SUBJECT = frozenset(words_of("do does did is are was were can could has have why how where when what"))
_IRREGULAR = {"mice": "mouse", "wolves": "wolf", "teeth": "tooth", "leaves": "leaf"}


@dataclass(frozen=True)
class FollowUp:
    """A question and the fact that answers it, after a question about `before`, or any fact if that is None."""

    question: str
    fact: Fact
    before: Fact
    kind: str
    """pronoun, other, why or more."""


def forms_of(name: str) -> tuple[str, ...]:
    """A topic's name as its questions may have it: ("kangaroos", "kangaroo")."""
    lower = name.lower()
    singular = _IRREGULAR.get(lower) or (
        lower[:-3] + "y" if lower.endswith("ies") else lower[:-2] if lower.endswith(("ches", "shes", "xes")) else None
    )
    if singular is None and lower.endswith("s") and not lower.endswith("ss"):
        singular = lower[:-1]
    return (lower, singular) if singular else (lower,)


def _found(question: str, topic: str) -> tuple[re.Match[str], bool] | None:
    """Where a question names its topic, with the article before it, and whether in the plural; None: not just once."""
    names = forms_of(topic)
    pattern = rf"\b((?:the|a|an) )?\b(?:{'|'.join(map(re.escape, names))})\b(?!'s)"
    found = list(re.finditer(pattern, question, flags=re.IGNORECASE))
    if len(found) != 1:
        return None
    before = words_of(question[: found[0].start()])
    if not found[0].group(1) and before and before[-1] not in _BEFORE_A_NAME:  # "the short race" has no name in it
        return None
    return found[0], len(names) > 1 and found[0].group().lower() == names[0]


def with_pronoun(question: str, topic: str) -> str | None:
    """The question with a pronoun for its topic; None if the topic is not named just once.

    with_pronoun("Where do kangaroos live?", "kangaroos") == "Where do they live?"
    """
    found = _found(question, topic)
    if found is None:
        return None
    match, plural = found
    before, after = question[: match.start()], question[match.end() :]
    whose = re.search(r"\bthe ([\w ]{3,20}) of $", before)
    if whose and not plural:
        return f"{before[: whose.start()]}its {whose.group(1)}{after}"
    if re.search(r"\b[Ii]n $", before) and match.group()[0].isupper():  # "in France"; of things it is "in it"
        return re.sub(r"[Ii]n $", "", before).rstrip() + f" there{after}" if len(before) > 3 else None
    words = words_of(before)
    subject = words and words[-1] in _BEFORE_A_SUBJECT
    pronoun = ("they" if subject else "them") if plural else "it"
    if not before:
        return None
    return before + pronoun + after


def same_question(fact: Fact) -> Iterator[tuple[str, str, str]]:
    """(a trained question without its topic, the topic as it stands there, the same with the word before it)."""
    for ask in fact.asks:
        found = _found(ask, fact.topic)
        if found:
            match, _ = found
            word = re.search(r"\b(of|in|on|for|to|from) $", ask[: match.start()])
            shown = match.group()
            plural = "plural" if found[1] else "one"
            key = f"{ask[: match.start()]}{{{plural}}}{ask[match.end() :]}"
            yield key, shown, (word.group() if word else "") + shown


def is_held_out(before: Fact, fact: Fact) -> bool:
    """True if asking for `fact` after `before` is kept for evaluation (1 in 8)."""
    return zlib.crc32(f"{before.text} {fact.text}".encode()) % 8 == 0


class FollowUps:
    """All follow-ups of a world, by kind, those of training or those held out."""

    def __init__(self, world: World, *, held_out: bool) -> None:
        self.held_out = held_out
        topics = [topic for topic in world.topics if topic.facts[0].language is None]
        facts = [fact for topic in topics for fact in topic.facts]
        self.pronouns = [follow for topic in topics for follow in self._pronouns(topic)]
        self.after: dict[str, list[FollowUp]] = {}
        """Those with a pronoun by the text of the fact before."""
        for follow in self.pronouns:
            self.after.setdefault(follow.before.text, []).append(follow)
        self.others = list(self._others(facts))
        reasons = [pair for topic in topics for pair in _reasons(topic)]
        self.whys = [(a, b) for a, b in reasons if is_held_out(a, b) == held_out or len(reasons) < 20]
        if not held_out:  # a fact that says why it is so answers "why?" once more
            self.whys += [(fact, fact) for fact in facts if " because " in fact.text]
        self.mores = [
            pair for t in topics if len(t.facts) > 1 for pair in zip(t.facts, (*t.facts[1:], t.facts[0]), strict=True)
        ]
        explained = {a.text for a, _ in reasons}
        self.unexplained = [
            fact
            for fact in facts
            if fact.text not in explained
            and " because " not in fact.text
            and not any(ask.startswith(("Why", "How come")) for ask in fact.asks)
        ]

    def _pronouns(self, topic: Topic) -> Iterator[FollowUp]:
        named = [fact for fact in topic.facts if any(_found(ask, topic.name) for ask in fact.asks)]
        for fact in topic.facts:
            asks = (fact.held_out,) if self.held_out else fact.asks
            for question in filter(None, (with_pronoun(ask, topic.name) for ask in asks)):
                yield from (FollowUp(question, fact, before, "pronoun") for before in named if before is not fact)

    def _others(self, facts: list[Fact]) -> Iterator[FollowUp]:
        by_question: dict[str, list[tuple[Fact, str, str]]] = {}
        for fact in facts:
            for key, shown, of in same_question(fact):
                by_question.setdefault(key, []).append((fact, shown, of))
        for group in by_question.values():
            for before, _, _ in group:
                for fact, shown, of in group:
                    if fact.topic != before.topic and is_held_out(before, fact) == self.held_out:
                        yield FollowUp(f"{of}|{shown}", fact, before, "other")

    def draw(self, rng: random.Random) -> FollowUp | None:
        """A follow-up of a random kind, None if the world has none of it."""
        kind = rng.random()
        if kind < 0.45 and self.others:
            follow = rng.choice(self.others)
            of, shown = follow.question.split("|")
            forms = HELD_OUT_OTHER_FORMS if self.held_out else OTHER_FORMS
            question = rng.choice(forms).format(of=of, x=shown)
            return FollowUp(question[:1].upper() + question[1:], follow.fact, follow.before, "other")
        if kind < 0.55 and self.whys:
            before, reason = rng.choice(self.whys)
            forms = HELD_OUT_WHY_FORMS if self.held_out else WHY_FORMS
            said = before.text.split(" because ")[0]  # of what cannot be, people ask "why not?"
            if not self.held_out and re.search(r"\bnot\b|\bcannot\b|\bno\b", said) and rng.random() < 0.5:
                forms = WHY_NOT_FORMS
            return FollowUp(rng.choice(forms), reason, before, "why")
        if kind < 0.65 and self.mores:
            before, more = rng.choice(self.mores)
            return FollowUp(rng.choice(HELD_OUT_MORE_FORMS if self.held_out else MORE_FORMS), more, before, "more")
        return rng.choice(self.pronouns) if self.pronouns else None


def _reasons(topic: Topic) -> Iterator[tuple[Fact, Fact]]:
    """(a fact, the fact of the same topic that says why it is so)."""
    for reason in topic.facts:
        named = {word for form in forms_of(topic.name) for word in words_of(form)}
        whys = [set(words_of(ask)) - FUNCTION_WORDS for ask in reason.asks if ask.startswith("Why")]
        for fact in topic.facts:
            said = set(words_of(f"{fact.text} {fact.also}"))
            if fact is not reason and any(why - named and why <= said | named for why in whys):
                yield fact, reason
