"""An answer as people read it: what it was worked out with is told apart from what it says.

SpellingBee and GSM8K teach to write how, then "####" and the result. The page does the same (ui/messages.js).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator

from nanochat.serve.answer_events import Event

MARKER = re.compile(r"\s*####[ \t]*(?=[-+$€£]?\d)")  # before anything but a number it is a heading, or a comment
# What may turn out to be the beginning of one: blank space, and up to four of its signs.
HALF_MARKER = re.compile(r"(?:^|\s+)#{0,4}[ \t]*[-+$€£]?$")
# How a walk through a word, letter by letter, begins in today's SpellingBee and in an older one; ? is a letter.
WALKS = ('Count of "?" in ', "Count ? in ")


def plain_answer(parts: Iterable[Event]) -> Iterator[Event]:
    """The events of an answer without the marker of its result, which begins a new line instead.

    What goes through a word letter by letter waits for its end, and comes as one event of the kind "work" if there is a
    result, else as it was.
    """
    held: list[Event] = []  # of a walk through a word
    text = ""  # what may be the beginning of something
    begun = False  # whether it is known how the answer begins
    for part in parts:
        if held:
            held.append(part)
            continue
        if part.kind != "text":
            if text:
                yield Event("text", text)
            begun, text = True, ""
            yield part
            continue
        text += part.text
        start = text.lstrip()
        if not begun and any(_begins(walk, start) for walk in WALKS):
            if any(_begins(walk, start) and len(start) >= len(walk) for walk in WALKS):
                held = [Event("text", text)]
            continue  # else the next letters tell, so that no answer that begins with "Countries" waits for its end
        begun = True
        shown, text = _split(text)
        if shown:
            yield dataclasses.replace(part, text=shown)
    if held:
        yield from _walked(held)
    elif text := re.sub(r"\s*####\s*$", "", text):
        yield Event("text", text)


def _begins(walk: str, text: str) -> bool:
    """True if the text begins like this walk, as far as either goes."""
    return all(a == b or (a == "?" and b.isalpha()) for a, b in zip(walk, text, strict=False))


def _split(text: str) -> tuple[str, str]:
    """(what can be shown, what must wait for what follows)."""
    half = HALF_MARKER.search(text)
    end = half.start() if half else len(text)
    return MARKER.sub("\n", text[:end]), text[end:]


def _walked(held: list[Event]) -> Iterator[Event]:
    last = "".join(event.text for event in held if event.kind == "text")
    found = MARKER.search(last)
    if found is None:
        yield from (event for event in held if event.text)
        return
    signs = {"python": "[{}", "python_output": " = {}]"}
    whole = "".join(signs.get(event.kind, "{}").format(event.text) for event in held)
    yield Event("work", MARKER.split(whole)[0])
    yield Event("text", last[found.end() :].strip())
