"""Sums told as small stories: who has what, what happens, and what is asked.

The operation is in a word or two of a story ("buys", "gives away", "each"); everything else is drawn, so that only that
word can tell it. A form is a text with fields, choices "[buys|finds]" and endings "<now>".
"""

from __future__ import annotations

import random
import re

NAMES = (
    "Tom", "Anna", "Ben", "Lisa", "Max", "Mia", "Sam", "Emma", "Paul", "Nora", "Leo", "Julia", "Tim", "Eva", "Grandma",
    "Mum", "my brother", "my sister", "my friend", "the baker", "the farmer", "our neighbour",
)  # fmt: skip
ONE_AND_MANY = (
    *((one, one + "s") for one in (
        "apple", "book", "pen", "ball", "egg", "card", "stone", "cake", "lamp", "car", "toy", "bird", "flower", "doll",
        "star", "hat", "marble", "picture", "stamp", "sweet", "orange", "pencil", "cookie", "coin", "ticket", "shirt",
        "plate", "balloon", "sticker", "banana", "carrot", "candle",
    )),
    ("fish", "fish"), ("box", "boxes"), ("glass", "glasses"), ("cherry", "cherries"),
)  # fmt: skip
PEOPLE = ("children", "kids", "people", "players", "students", "friends", "girls", "boys")
FOOD = ("apples", "cookies", "sweets", "cherries", "carrots", "eggs", "bananas")
ANIMALS = ("birds", "pigeons", "ducks", "cats", "bees")
MONEY = ("dollars", "euros", "coins", "pounds", "cents")

ENDINGS = {
    "now": (
        "How many {things} does {N} have now?", "How many {things} has {N} got now?", "How many does {N} have now?",
        "How many {things} does {N} have?", "What does {N} have now?",
    ),
    "I now": (
        "How many {things} do I have now?", "How many do I have?", "How many {things} have I got now?",
        "How many is that?",
    ),
    "left": (
        "How many are left?", "How many {things} are left?", "How many {things} does {N} have now?",
        "How many does {N} have left?", "How many {things} has {N} got left?", "How many does {N} still have?",
    ),
    "come": ("How many are there now?", "How many {people} are there now?", "How many is that?"),
    "times": ("How many is that?", "How many {things} is that?", "How many {things} are there in all?"),
    "I left": (
        "How many are left?", "How many do I have left?", "How many do I still have?",
        "How many {things} do I have now?", "What is left?",
    ),
    "stay": ("How many are left?", "How many stay?", "How many are still there?", "How many are there now?"),
    "each": (
        "How many does each one get?", "How many for each?", "How many {things} does each get?",
        "How many {things} is that for each one?",
    ),
    "price": ("How much is that?", "What do I pay?", "How much does it cost?", "What is the price?"),
    "money left": ("What is left?", "What's left?", "How much is left?", "How many {money} are left?"),
    "one": ("What does one cost?", "How much is one {thing}?", "What is the price of one?"),
}  # fmt: skip
FORMS = {
    "+": (
        "{N} has {a} {things} and [gets|buys|finds|picks|wins|collects|is given] {b} more. <now>",
        "{N} has {a} {things}. [A friend gives {N}|Then {N} gets|Later {N} finds|Today {N} buys] {b} more. <now>",
        "I have {a} {things} and [buy|get|find|win|pick] {b} more. <I now>",
        "I had {a} {things}. [My friend gave me|Then I got|Today I bought|I found] {b} more. <I now>",
        "If I have {a} {things} and [find|get|buy] {b}[| more], how many [do I have|is that]?",
        "There are {a} {things} [on the table|in a bag] and {b} [in the next room|on the floor]. <times>",
        "There are {a} {people} [in a room|on a bus|in the park]. [Then {b}|{b}] more come. <come>",
        "{a} {animals} [are|sit] [on a roof|in a tree] and {b} more come. How many [{animals}|] are there now?",
        "{N} has {a} {things}, {M} has {b}. How many do [they|both] have in all?",
        "{N} [read|wrote] {a} pages yesterday and {b} today. How many pages is that?",
        "A {thing} costs {a} {money} and another one {b}. [How much do both cost?|What do I pay for both?]",
    ),
    "-": (
        "{N} has {a} {things} and [gives {b} away|loses {b}|sells {b}|breaks {b}|drops {b}]. <left>",
        "{N} has {a} {things} and gives [{b} to {M}|away {b}|{b} to a friend|{M} {b} of them]. <left>",
        "{N} had {a} {things} and [lost {b}|gave {b} away|sold {b} of them|gave {M} {b}]. <left>",
        "I had {a} {things} and [lost {b}|gave {b} away|sold {b}|gave {b} to my friend]. <I left>",
        "I have {a} {things} and [lose {b}|give {b} away|give {b} to my [sister|brother|mother]]. <I left>",
        "[I|{N}] had {a} {food} and ate {b}[| of them]. How many [{food}|] are left?",
        "[I|{N}] had {a} {money} and spent {b}. <money left>",
        "If there are {a} {things} and {b} go away, how many stay?",
        "There are {a} {people} [in a room|on a bus|in the park]. {b} [go home|leave|get off|go away]. <stay>",
        "{a} {animals} [are|sit] [on a roof|in a tree|in the garden] and {b} [leave|go away|fly off]. <stay>",
        "A book has {a} pages and {N} has read {b}. How many pages are left?",
        "{N} needs {a} {things} and has {b}. How many {things} are missing?",
        "There are {a} {things} and {b} of them are red. How many are not red?",
    ),
    "*": (
        "There are {a} [bags|plates|shelves] with {b} {things} [on|in] each. <times>",
        "[A|One|Each] [box|bag] holds {a} {food}. How many {food} are in {b} of them?",
        "A box holds {a} {food}. How many {food} are in {b} boxes?",
        "{N} buys {a} [bags|packs] of {b} {things}. How many {things} is that?",
        "If {a} {people} have {b} {things} each, how many {things} do they have?",
        "{a} {people} have {b} {things} each. <times>",
        "{N} buys {a} {things} for {b} {money} each. <price>",
        "{a} {things} for {b} {money} each[. What do I pay?|: how much is that?|. How much is it?]",
        "[A|One] {thing} costs {a} {money}. [How much do|What do] {b} [|{things}] cost?",
        "There are {a} rows with {b} [chairs|{things}] in each. [How many are there?|How many is that?]",
        "{N} [reads {a} pages|walks {a} miles] a day. How many is that in {b} days?",
        "There are {a} [teams|groups] of {b} {people}. How many {people} is that?",
        "{N} has {a} {things}, and {M} has {b} times as many. How many does {M} have?",
    ),
    "/": (
        "{N} shares {a} {things} among {b} [friends|children|people]. <each>",
        "If {b} [children|friends|kids] share {a} {things}, how many does each [child|one|of them] get?",
        "{b} [children|friends|kids] share {a} {things}. <each>",
        "{a} {food} are [put into|shared between] {b} boxes. How many [are|come] in each[| box]?",
        "{N} puts {a} {food} into {b} [equal|] [boxes|bags|groups]. How many are in each?",
        "There are {a} {things} for {b} [children|friends|people]. <each>",
        "{N} pays {a} {money} for {b} {things}. <one>",
        "{b} {things} cost {a} {money}. <one>",
        "There are {a} {people} in {b} [equal teams|teams|groups of the same size]. How many are in each?",
        "{a} {people} make {b} [equal teams|equal groups]. How many {people} are [in one|in each]?",
        "{N} has {a} {food} and puts {b} in each bag. How many bags does {N} need?",
        "{N} reads {b} pages a day. How many days are needed for {a} pages?",
    ),
}


def tell(rng: random.Random, op: str, a: int, b: int) -> str:
    """A story whose answer is `a op b`, with op one of + - * /."""
    text = re.sub("<(.*)>", lambda found: rng.choice(ENDINGS[found[1]]), rng.choice(FORMS[op]))
    while "[" in text:
        text = re.sub(r"\[([^\[\]]*)\]", lambda found: rng.choice(found[1].split("|")), text)
    thing, things = rng.choice(ONE_AND_MANY)
    first, second = rng.sample(NAMES, 2)
    kinds = {"people": PEOPLE, "food": FOOD, "animals": ANIMALS, "money": MONEY}
    fields = {name: rng.choice(words) for name, words in kinds.items()}
    text = text.format(a=a, b=b, N=first, M=second, thing=thing, things=things, **fields).replace("  ", " ")
    text = re.sub(r"(?:^|[.?] )[a-z]", lambda found: found[0].upper(), text)
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)
