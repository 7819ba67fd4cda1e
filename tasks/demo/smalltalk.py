"""Greetings, thanks, goodbyes and made-up things: requests that do not ask for a fact."""

from __future__ import annotations

import random

Keys = tuple[tuple[str, ...], ...]

HELLO = "Hello! What would you like to know?"
WELCOME = "You are welcome!"
GOODBYE = "Goodbye! See you soon."
HOW_ARE_YOU = "I am ready to help. What would you like to know?"
GOOD = "I am glad to hear that."
SORRY = "I am sorry. Please ask me in other words."
UNKNOWN_ANSWER = "I am sorry, I do not know that."

# (messages, the reply, the words that a right reply has)
SMALL_TALK: tuple[tuple[tuple[str, ...], str, Keys], ...] = (
    (("Hi!", "Hello!", "Hi", "Hello.", "Hey!", "Hi there!", "Hello there!", "Good morning!", "Good evening!",
      "Good day!", "Hi nanochat!", "Hello nanochat!", "Hey nanochat!"), HELLO, (("hello",),)),
    (("Thanks!", "Thank you!", "Thank you very much!", "Many thanks!", "Thanks a lot!", "Thank you, nanochat.",
      "Okay, thanks.", "Thanks, that was good."), WELCOME, (("welcome",),)),
    (("Bye!", "Goodbye!", "Bye bye!", "See you!", "See you later!", "Good night!", "Goodbye, nanochat!",
      "I have to go.", "I must go now."), GOODBYE, (("goodbye",),)),
    (("How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?", "Hi, how are you?",
      "Hello, how are you?"), HOW_ARE_YOU, (("ready",),)),
    (("That is great!", "Great!", "I like that.", "Nice!", "That is nice.", "Wow!", "What a great answer!"),
     GOOD, (("glad",),)),
    (("That is wrong.", "This is not right.", "You are wrong.", "No, that is not right.", "I do not understand.",
      "That makes no sense.", "That is a bad answer."), SORRY, (("sorry",),)),
)  # fmt: skip
SMALL_TALK_TEST: tuple[tuple[tuple[str, ...], str, Keys], ...] = (
    (("Good afternoon!", "Hey there!", "Hello my friend!"), HELLO, (("hello",),)),
    (("Thank you so much!", "Thanks for your help!", "Great, thank you!"), WELCOME, (("welcome",),)),
    (("Bye for now!", "See you tomorrow!", "Goodbye then!"), GOODBYE, (("goodbye",),)),
    (("How are you doing?", "Hey, how are you today?"), HOW_ARE_YOU, (("ready",),)),
)

_UNKNOWN_FRAMES = (
    "What is a {x}?", "Who is {X}?", "Where is {X}?", "What does a {x} eat?", "Why do {x}s glow?", "Tell me about {X}.",
    "What is the capital of {X}?", "How many legs does a {x} have?", "Who invented the {x}?", "What color is a {x}?",
    "Where do {x}s live?", "What is {x} made of?", "Do you know {X}?", "How old is {X}?", "Explain {x}.",
)  # fmt: skip
_HELD_OUT_UNKNOWN_FRAMES = (
    "Have you heard of {X}?", "What can a {x} do?", "What do people use a {x} for?", "Can you tell me about {X}?",
)  # fmt: skip
_UNKNOWABLE = (
    "What time is it?", "What day is it today?", "What is my name?", "Where am I?", "What is your phone number?",
    "How will the weather be tomorrow?", "What is the news today?", "Who will win the game?", "What am I thinking?",
    "What did I eat today?", "How old am I?", "What is in my pocket?", "What will happen tomorrow?",
)  # fmt: skip
_HELD_OUT_UNKNOWABLE = ("What is the time now?", "Do you know my name?", "What will the weather be like tomorrow?")


def made_up_word(rng: random.Random, *, held_out: bool) -> str:
    """A made-up word; those for evaluation end in syllables that never occur in training."""
    syllables = [rng.choice("bcdfgklmnpqrtvz") + rng.choice(("a", "e", "i", "o", "u", "oo", "ee")) for _ in range(2)]
    return "".join(syllables) + rng.choice(
        ("zix", "quon", "vark") if held_out else ("x", "zz", "bin", "gle", "wub", "nk", "zo")
    )


def unknown_question(rng: random.Random, *, held_out: bool) -> str:
    """A question without an answer: about a made-up thing, or about something the model can't see."""
    if rng.random() < 0.3:
        return rng.choice(_HELD_OUT_UNKNOWABLE if held_out else _UNKNOWABLE)
    word = made_up_word(rng, held_out=held_out)
    frame = rng.choice(_HELD_OUT_UNKNOWN_FRAMES if held_out else _UNKNOWN_FRAMES)
    return frame.format(x=word, X=word.capitalize())
