"""Talk to a model in the terminal, or ask it one thing.

python -m scripts.chat_cli                                  the newest chat model, a conversation
python -m scripts.chat_cli -p "Why is the sky blue?"        one answer; standard output holds nothing else
python -m scripts.chat_cli -p - < question.txt              the same, asked by a file

In a conversation `/help` lists the commands, Alt-Enter starts a new line, Ctrl-C stops an answer, Ctrl-D ends.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat.common import get_base_dir, setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.generate.fast_decode import Weights
from nanochat.generate.rounding import rounding_notice
from nanochat.generate.sampling import Sampling
from nanochat.serve.answer_events import Event
from nanochat.serve.batch_engine import BatchEngine
from nanochat.serve.chat import Conversation
from nanochat.serve.chat_commands import NAMES, Quit, as_message, is_command, run_command
from nanochat.serve.choose_model import BASE_NOTICE, choose_drawing, find_model, load_chosen
from nanochat.serve.plain_answer import plain_answer

USUAL = {"temperature": 0.6, "top_k": 50}
PREFILL_CHUNK = 1024  # nobody else waits, but Ctrl-C does
BYTE_ORDER_MARK = "\ufeff"  # at the beginning of what some programs write; no part of a question
NO_TEXT = re.compile(r"[\x00-\x07\x0b\x0e-\x1a\x1c-\x1f]")  # control characters that texts do not have


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a chat."""

    runtime: Runtime = field(default_factory=Runtime)
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """Which stage's model to talk to."""
    prompt: Annotated[str | None, short("-p")] = None
    """Ask this, print the answer and stop; "-" reads it from standard input. Default: a conversation."""
    temperature: Annotated[float | None, short("-t")] = None
    """0 takes the likeliest token every time; higher is more varied. Default: what SFT found to suit the model, else
    0.6."""
    top_k: Annotated[int | None, short("-k")] = None
    """Choose among the k likeliest tokens; 0: among all. Default: what SFT found to suit the model, else 50."""
    min_answer_p: float | None = None
    """Instead of an answer that the model finds less likely than this, say that it does not know; 0: let it guess.
    Default: what SFT found to suit the model."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together reach this probability; default: among all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred already less likely."""
    max_tokens: Annotated[int, short("-m")] = 512
    """The longest answer, in tokens."""
    system: str = ""
    """What the model is told first."""
    weights: Weights = "auto"
    """What the weights are read as while generating: bfloat16, int8 and int4 (both CPU) are faster and less exact, the
    last most. What int8 or int4 costs this model is measured and said at the start."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""
    hf_path: str | None = None
    """Talk to a nanochat in the format of transformers instead: a folder, or a hub repository (owner/name)."""

    def __post_init__(self) -> None:
        self.sampling({})  # checks itself
        if self.max_tokens < 1:
            raise ValueError(f"--max_tokens must be at least 1, got {self.max_tokens}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty: ask something, or leave it out for a conversation")

    def sampling(self, meta: Mapping[str, Any], tell: Callable[[str], None] = lambda text: None) -> Sampling:
        """The settings of answers by a model with this meta, checked; `tell` hears where they come from."""
        drawing, why = choose_drawing(meta, self.temperature, self.top_k, USUAL, self.min_answer_p)
        tell(why)
        return Sampling(
            **drawing,
            max_tokens=self.max_tokens,
            seed=self.runtime.seed,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )


def say(text: str) -> None:
    """Tell the user something that is not part of an answer."""
    print(text, file=sys.stderr, flush=True)


def show(parts: Iterable[Event], terminal: bool) -> None:
    """Print an answer as it comes, without the marker of its result; on a terminal also what it was worked out with,
    dimmed.
    """
    for part in plain_answer(parts):
        text = printable(part.text) if terminal else part.text
        if part.kind == "text":
            print(text, end="", flush=True)
        elif terminal:
            sign, end = {"python": ("[", ""), "python_output": (" = ", "]")}.get(part.kind, ("", "\n"))
            print(f"\033[2m{sign}{text}{end}\033[0m", end="", flush=True)
    print(flush=True)


def printable(text: str) -> str:
    """Text without control characters: a model must not be able to steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def prompt_reader(history: Path) -> Callable[[], str]:
    """A function that reads messages from a terminal: history, editing, several lines with Alt-Enter or by pasting."""
    from prompt_toolkit import PromptSession  # lazy: only a terminal needs it
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    history.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(history, os.O_CREAT | os.O_WRONLY, 0o600))  # what was typed is nobody else's business
    session: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)),
        auto_suggest=AutoSuggestFromHistory(),
        completer=WordCompleter(NAMES, sentence=True),
        complete_while_typing=False,
        multiline=True,
        key_bindings=keys,
        prompt_continuation="     ",
    )
    return lambda: session.prompt("\nYou: ")


def from_pipe(read: Callable[[], str]) -> str:
    """Return what `read` reads from standard input: UTF-8, or UTF-16 where its byte order mark says so (PowerShell).

    Raises:
        ValueError: it is neither, or holds control characters, as UTF-16 without that mark does.
    """
    peek = getattr(getattr(sys.stdin, "buffer", None), "peek", None)
    if peek is not None and codecs.lookup(sys.stdin.encoding).name == "utf-8":  # not set yet
        utf16 = peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        sys.stdin.reconfigure(encoding="utf-16" if utf16 else "utf-8-sig", errors="strict")  # type: ignore[union-attr]
    try:
        text = read()
    except UnicodeError as error:
        raise ValueError(
            f"standard input is not UTF-8 text ({error}): convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    if found := NO_TEXT.search(text):
        raise ValueError(
            f"standard input holds control characters (U+{ord(found.group()):04X}), as UTF-16 without a byte order "
            "mark does: if it is that, convert it, for example with iconv -f utf-16le -t utf-8, otherwise remove them, "
            r"for example with tr -d '\000-\007\013\016-\032\034-\037'"
        )
    return text


class Interrupts:
    """Inside this context Ctrl-C interrupts reading, and stops an answer.

    Python's own KeyboardInterrupt may come between any two instructions, also while this thread holds a lock that the
    engine's thread waits for, or between two messages. So only reading is interrupted; an answer is asked to stop.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._conversation, self._reading = conversation, False

    def __enter__(self) -> Interrupts:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def read(self, read: Callable[[], str]) -> str:
        """Return what `read` returns. From then on Ctrl-C stops the answer to it.

        Raises:
            KeyboardInterrupt: Ctrl-C came meanwhile.
        """
        self._reading = True
        self._conversation.stopped = False
        try:
            return read()
        finally:
            self._reading = False

    def _handle(self, signum: int, frame: object) -> None:
        if self._reading:
            self._reading = False  # one interruption is enough
            raise KeyboardInterrupt
        self._conversation.stop()


def converse(conversation: Conversation, read: Callable[[], str], terminal: bool) -> None:
    """Read messages and answer them until the end of input or `/quit`."""
    while True:
        try:
            line = read().strip().lstrip(BYTE_ORDER_MARK).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            say("(Ctrl-D or /quit ends the program)")
            continue
        question: str | None = as_message(line)
        if is_command(line):
            try:
                question = run_command(line, conversation, say)
            except Quit:
                return
            except (ValueError, OSError) as error:
                say(f"({error})")
                continue
        if question:
            reply(conversation, question, terminal)


def reply(conversation: Conversation, question: str, terminal: bool) -> None:
    """Answer one message; Ctrl-C ends the answer only, a question that is too long is refused."""
    if terminal:
        print("\nAssistant: ", end="", flush=True)
    try:
        # Closing tells the conversation that the answer is over, also when printing failed.
        with contextlib.closing(conversation.ask(question)) as parts:
            show(parts, terminal)
        if conversation.stopped:
            say("(stopped)")
    except BrokenPipeError:
        raise
    except (ValueError, RuntimeError) as error:
        say(f"({error})")


def answer_once(conversation: Conversation, prompt: str, read: Callable[[], str]) -> None:
    """Answer one prompt; standard output holds nothing but the answer. Ctrl-C ends it and the program."""
    if prompt == "-":
        prompt = read()
    prompt = prompt.lstrip(BYTE_ORDER_MARK)
    if not prompt.strip():
        raise ValueError("there is no question: standard input, or the text of --prompt, is empty")
    with contextlib.closing(conversation.ask(prompt)) as parts:
        show(parts, terminal=sys.stdout.isatty())
    if conversation.stopped:
        raise KeyboardInterrupt


def main(cfg: Config) -> None:
    """Load the model, then answer one prompt or hold a conversation."""
    if sys.stdin is None and cfg.prompt in (None, "-"):
        raise ValueError("standard input is closed, so no question can come: give one with --prompt=TEXT")
    if sys.stdout is None:
        raise ValueError("standard output is closed, so no answer can be shown: leave it open")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - else `print` would take standard output instead
    # Standard output belongs to the answer; everything said on the way goes to standard error.
    with contextlib.redirect_stdout(sys.stderr):
        name = find_model(cfg.source, cfg.model_tag, cfg.hf_path)
        compute = setup_compute(cfg.runtime)
        model, tokenizer, meta = load_chosen(cfg.source, cfg.model_tag, cfg.step, cfg.hf_path, compute.device)
        print(f"{name}, step {meta['step']}, {model.num_params() / 1e6:.1f}M parameters")
        if notice := rounding_notice(model, tokenizer, compute.precision, cfg.weights):
            print(notice)
    with BatchEngine(
        model, tokenizer, compute.precision, max_batch_size=1, prefill_chunk=PREFILL_CHUNK, weights=cfg.weights
    ) as engine:
        conversation = Conversation(engine, tokenizer, cfg.sampling(meta, say), lambda text: say(f"({text})"))
        conversation.system, conversation.plain = cfg.system, cfg.source == "base"
        if conversation.plain:
            say(BASE_NOTICE)
        try:
            with Interrupts(conversation) as interrupts:
                if cfg.prompt is not None:
                    answer_once(conversation, cfg.prompt, lambda: interrupts.read(lambda: from_pipe(sys.stdin.read)))
                elif sys.stdin.isatty() and sys.stdout.isatty():
                    say("Type a message; Alt-Enter starts a line, Ctrl-C stops an answer, /help lists the commands.")
                    read = prompt_reader(get_base_dir() / "chat_history")
                    converse(conversation, lambda: interrupts.read(read), terminal=True)
                else:
                    converse(conversation, lambda: interrupts.read(lambda: from_pipe(input)), terminal=False)
        except BrokenPipeError:
            # Whoever read the answer has gone. Python would complain about it once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main, Config)
