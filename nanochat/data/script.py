"""The writing of a text: its scripts, whether it is English, how many of its characters are combining marks."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The words that every English text is full of; other languages in Latin letters have few of them.
_ENGLISH = "the of and to in is that it was for on with as be at by this from are have not but you"
ENGLISH_WORDS = frozenset(_ENGLISH.split())
ENGLISH_SHARE = 0.12  # of the words; English prose has about 0.3, German, French and the like below 0.05
NAMES = {"CJK": "Chinese characters", "HIRAGANA": "Kana", "KATAKANA": "Kana", "HALFWIDTH": "Kana", "FULLWIDTH": "Latin"}
SHOWN_SHARE = 0.01
ENGLISH_DOCUMENTS, ENGLISH_CHARS = 50, 2000  # looked at to tell whether a corpus is English
PROMPT_WORDS, PROMPT_CHARS = 5, 12
MEAN_WORD = 15  # characters: where words are longer on average, no spaces stand between them


@dataclass(frozen=True)
class Writing:
    """How some texts are written."""

    scripts: dict[str, float]
    """Shares of the letters, the largest first."""
    english: bool

    def __str__(self) -> str:
        parts = [f"{name} {share:.0%}" for name, share in self.scripts.items() if share >= SHOWN_SHARE] or [
            "no letters"
        ]
        if next(iter(self.scripts), "") == "Latin":
            parts[0] += ", English" if self.english else ", probably not English"
        return "; ".join(parts)


def writing_of(texts: Sequence[str]) -> Writing:
    """The scripts of these texts."""
    characters = Counter[str]()
    for text in texts:
        characters.update(text)
    scripts = Counter[str]()
    for character, count in characters.items():
        if unicodedata.category(character)[0] == "L":
            name = unicodedata.name(character, "OTHER").split()[0].split("-")[0]
            scripts[NAMES.get(name, name.capitalize())] += count
    total = max(1, scripts.total())
    words = re.findall(r"[^\W\d_]+", " ".join(texts).lower())
    common = sum(word in ENGLISH_WORDS for word in words) / max(1, len(words))
    return Writing({name: count / total for name, count in scripts.most_common()}, common >= ENGLISH_SHARE)


def own_prompts(documents: Iterable[str], count: int) -> tuple[str, ...]:
    """The first words of some documents, to see how a model continues them; none if the documents are English.

    Args:
        documents: those of validation, which no model has learned.
        count: how many prompts.
    """
    texts = [text.strip()[:ENGLISH_CHARS] for text in itertools.islice(documents, ENGLISH_DOCUMENTS) if text.strip()]
    if not texts or writing_of(texts).english:
        return ()
    return tuple(dict.fromkeys(map(opening, texts)))[:count]


def opening(text: str) -> str:
    """The first words of a text, or where words are not set apart, its first characters."""
    line = next((line.strip(" #*>-\t") for line in text.splitlines() if line.strip(" #*>-\t")), "")
    words = line.split()[:PROMPT_WORDS]
    return " ".join(words) if len(line) <= MEAN_WORD * len(line.split()) else line[:PROMPT_CHARS]
