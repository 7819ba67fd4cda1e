"""Typing errors as people make them: common misspellings, letters left out, doubled, swapped or hit beside."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Set

from tasks.demo.skills import MARK

# How people write the words that nearly every question has.
MISSPELLED = {
    "the": ("teh", "hte", "th"), "which": ("wich", "whitch", "whcih"), "what": ("waht", "wat", "wht", "whta"),
    "where": ("were", "wher", "whre"), "who": ("hwo", "woh"), "why": ("wy", "hwy"), "how": ("hw", "ohw"),
    "when": ("wen", "whne"), "does": ("dose", "deos", "doess"), "many": ("manny", "mny", "meny"), "is": ("si", "iss"),
    "called": ("caled", "calld"), "name": ("naem", "nmae"), "biggest": ("bigest", "biggset"), "because": ("becuase",),
    "people": ("peple", "poeple", "peopel"), "from": ("form", "fom"), "make": ("mak", "maek"), "made": ("mad", "maed"),
    "water": ("watter", "wter", "watr"), "world": ("wrold", "wolrd", "worl"), "their": ("thier", "there"),
    "animal": ("anmal", "animl", "aminal"), "capital": ("captal", "capitol", "capitel"), "color": ("colr", "coler"),
    "language": ("langauge", "languge"), "invented": ("inveted", "invnted"),
    "first": ("frist", "firts"), "with": ("wiht", "wih"), "have": ("hav", "ahve"), "give": ("giv", "gve"),
    "live": ("liv", "lve"), "know": ("knwo", "kno"), "can": ("cna",), "you": ("yuo", "yu"), "and": ("adn",),
    "your": ("yor", "yuor"), "are": ("aer", "ar"), "this": ("tihs", "ths"), "used": ("usd", "ued"), "tell": ("tel",),
    "about": ("abuot", "abot"), "please": ("pleas", "plese"), "would": ("woud", "wuld"), "could": ("coud", "cud"),
    "large": ("larg", "lrage"), "longest": ("logest", "longst"), "highest": ("higest", "heighest"), "sun": ("sn",),
    "country": ("contry", "coutry"), "planet": ("planit", "plnet"), "things": ("thigns", "tings"), "one": ("oen",),
    "between": ("betwen", "beetween"), "around": ("arround", "aroud"), "before": ("befor",),
    "discovered": ("discoverd", "discoverred"), "beautiful": ("beutiful",), "different": ("diffrent",),
    "temperature": ("temprature", "temperture"), "spell": ("spel",), "letters": ("leters", "lettres"), "for": ("fro",),
}  # fmt: skip
BESIDE = {
    "a": "sq", "b": "vn", "c": "xv", "d": "sf", "e": "rw", "f": "dg", "g": "fh", "h": "gj", "i": "ou", "j": "hk",
    "k": "jl", "l": "k", "m": "n", "n": "bm", "o": "ip", "p": "o", "q": "w", "r": "et", "s": "ad", "t": "ry",
    "u": "yi", "v": "cb", "w": "qe", "x": "zc", "y": "tu", "z": "x",
}  # fmt: skip
_SOUNDS = (("ph", "f"), ("ck", "k"), ("gh", ""), ("ing", "in"), ("ie", "ei"), ("ea", "ee"), ("ould", "uld"))
MIN_LETTERS = 4  # of a word in which a letter is changed; in shorter ones two are swapped


def _swapped(rng: random.Random, word: str) -> str:
    at = rng.randrange(0 if rng.random() < 0.15 else 1, len(word) - 1)  # people rarely miss a word's first letter
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _left_out(rng: random.Random, word: str) -> str:
    at = rng.randrange(1, len(word))
    return word[:at] + word[at + 1 :]


def _vowel_left_out(rng: random.Random, word: str) -> str:
    places = [m.start() for m in re.finditer("[aeiou]", word) if m.start()]
    at = rng.choice(places) if places else len(word) - 1
    return word[:at] + word[at + 1 :]


def _doubled(rng: random.Random, word: str) -> str:
    at = rng.randrange(1, len(word))
    return word[: at + 1] + word[at:]


def _halved(rng: random.Random, word: str) -> str:
    return re.sub(r"(\w)\1", r"\1", word, count=1)


def _beside(rng: random.Random, word: str) -> str:
    at = rng.randrange(1, len(word))
    return word[:at] + rng.choice(BESIDE.get(word[at].lower(), "e")) + word[at + 1 :]


def _by_sound(rng: random.Random, word: str) -> str:
    found = [(right, wrong) for right, wrong in _SOUNDS if right in word[1:]]
    right, wrong = rng.choice(found) if found else (word[-1], "" if word[-1] == "e" else word[-1])
    head, _, tail = word.rpartition(right)
    return head + wrong + tail


_SLIPS: tuple[Callable[[random.Random, str], str], ...] = (
    _swapped, _swapped, _swapped, _left_out, _vowel_left_out, _vowel_left_out, _doubled, _halved, _halved, _beside,
    _by_sound, _by_sound,
)  # fmt: skip


def _places(text: str, least: int) -> Iterator[re.Match[str]]:
    """The words of at least so many letters that stand beside no MARK."""
    for found in re.finditer(r"[^\W\d_]+", text):
        if len(found.group()) >= least and MARK not in text[max(0, found.start() - 1) : found.end() + 1]:
            yield found


def mistyped(rng: random.Random, text: str, known: Set[str]) -> str:
    """The text with an error in one of its words, if it has one that is long enough.

    Numbers and words beside a MARK stay as they are. But for the misspellings above no word becomes one of `known`: a
    question must not turn into another one.
    """
    common = [place for place in _places(text, 2) if place.group().lower() in MISSPELLED]
    if common and rng.random() < 0.4:
        place = rng.choice(common)
        word = place.group()
        wrong = rng.choice(MISSPELLED[word.lower()])
        wrong = wrong.capitalize() if word[0].isupper() else wrong
    else:
        places = list(_places(text, MIN_LETTERS if rng.random() < 0.8 else 3))
        if not places:
            return text
        place = rng.choice(places)
        word = place.group()
        wrong = rng.choice(_SLIPS)(rng, word) if len(word) >= MIN_LETTERS else _swapped(rng, word)
        if wrong == word:  # it has no letter of this kind
            wrong = _swapped(rng, word)
        if wrong.lower() in known:
            return text
    return text[: place.start()] + wrong + text[place.end() :]
