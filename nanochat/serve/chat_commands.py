"""The /commands of the terminal chat. Those of the page (ui/commands.js) are the same words."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from nanochat.files import write_text
from nanochat.generate.sampling import Sampling
from nanochat.serve.chat import Conversation

HELP = {
    "/help": "this list",
    "/clear": "start a new conversation",
    "/retry": "answer the last message again",
    "/undo": "take back the last message and its answer",
    "/system TEXT": "what the model is told first; without a text: nothing",
    "/settings": "show how answers are chosen",
    "/temperature X": "0 takes the likeliest token every time; higher is more varied",
    "/top_k N": "choose among the N likeliest tokens; 0: among all",
    "/top_p X": "choose among the likeliest that together reach this probability; 1: among all",
    "/repetition_penalty X": "above 1 makes tokens that occurred already less likely",
    "/max_tokens N": "the longest answer",
    "/save FILE": "write the conversation to a JSON file, or to a new file in a folder",
    "/quit": "end (also Ctrl-D)",
}
NAMES = [usage.split()[0] for usage in HELP]
ALONE = {usage for usage in HELP if " " not in usage}
PLAIN = {"clear": "/clear", "quit": "/quit", "exit": "/quit"}  # the classic words, without a slash
ALIASES = {"/exit": "/quit", "/new": "/clear", "/topk": "/top_k", "/topp": "/top_p", "/regenerate": "/retry"}
# A word alone, or with a number, was meant as a command; "/path what is this?" is a question.
MISTYPED = re.compile(r"/[a-z_]+(\s+[-+]?[\d.]+)?", re.IGNORECASE)


class Quit(Exception):
    """Raised when the user wants to end."""


def is_command(line: str) -> bool:
    """True if a line is for the program, not for the model."""
    word = line.split(maxsplit=1)[0].lower() if line.startswith("/") else ""
    return word in NAMES or word in ALIASES or line.lower() in PLAIN or MISTYPED.fullmatch(line) is not None


def as_message(line: str) -> str:
    """What a line that is no command says to the model: of two slashes at its beginning one is taken away."""
    return line[1:] if re.match(r"//\S", line) else line


def run_command(line: str, conversation: Conversation, say: Callable[[str], None]) -> str | None:
    """Carry out a command; return the question that must be asked now, if any.

    Raises:
        ValueError: there is no such command, or its value is not possible.
        OSError: a file can't be written.
        Quit: the program shall end.
    """
    word, *rest = PLAIN.get(line.lower(), line).split(maxsplit=1)
    word, value = ALIASES.get(word.lower(), word.lower()), "".join(rest).strip()
    if word in ALONE and value:
        raise ValueError(f"{word} stands alone: to say this to the model, write /{line}")
    if word == "/quit":
        raise Quit
    if word == "/help":
        width = max(map(len, HELP))
        say("\n".join(f"{usage:{width}}  {meaning}" for usage, meaning in HELP.items()))
    elif word == "/clear":
        conversation.clear()
        say("(new conversation)")
    elif word in ("/retry", "/undo"):
        question = conversation.undo()
        if question is None:
            raise ValueError("nothing was said yet")
        if word == "/retry":
            return question
        say("(taken back)")
    elif word == "/system":
        conversation.system = value
        say("(the model is told this first)" if value else "(no system message)")
    elif word == "/settings":
        say(_show_settings(conversation.settings))
    elif word == "/save":
        if not value:
            raise ValueError("/save needs the name of a file or folder")
        say(_save(conversation, value))
    elif word in NAMES:
        conversation.settings = _change(conversation.settings, word[1:], value)
        say(_show_settings(conversation.settings))
    else:
        raise ValueError(f"there is no command {word}: /help lists them; to say it to the model, write /{line}")
    return None


def _save(conversation: Conversation, name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir() or name.endswith("/"):
        names = (time.strftime(f"chat-%Y%m%d-%H%M%S{more}.json") for more in ("", *(f"-{i}" for i in range(2, 1000))))
        path = next(path / name for name in names if not (path / name).exists())
    replaced = ", in place of what it held" if path.exists() else ""
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    messages = [*system, *conversation.messages]
    write_text(path, json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n")
    return f"({len(messages)} messages written to {path}{replaced})"


def _change(settings: Sampling, name: str, value: str) -> Sampling:
    try:
        number = int(value) if name in ("top_k", "max_tokens") else float(value)
    except ValueError:
        raise ValueError(
            f"/{name} needs a {'whole ' if name in ('top_k', 'max_tokens') else ''}number, got {value!r}"
        ) from None
    if name == "max_tokens" and number < 1:
        raise ValueError(f"/max_tokens must be at least 1, got {value}")
    return dataclasses.replace(settings, **{name: number})  # type: ignore[arg-type]


def _show_settings(settings: Sampling) -> str:
    # Those that a command changes, and the seed. What is said instead of a guess, the start has told.
    shown = {name: value for name, value in vars(settings).items() if f"/{name}" in NAMES or name == "seed"}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
