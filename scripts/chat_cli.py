"""Talk to a model in the terminal, or ask it one thing.

python -m scripts.chat_cli                                  the newest chat model, a conversation
python -m scripts.chat_cli -p "Why is the sky blue?"        one answer; standard output holds nothing else

In a conversation: `clear` starts a new one, `quit` or `exit` (or Ctrl-D) ends it, Ctrl-C stops an answer.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from nanochat.chat import AnswerSettings, Message, Part, answer, answer_room, fit_context, join_parts
from nanochat.checkpoint_manager import find_tag, load_model
from nanochat.common import get_base_dir, setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.engine import Engine
from nanochat.files import atomic_path
from nanochat.tokenizer import RustBPETokenizer

HISTORY_LINES = 1000


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a chat."""

    runtime: Runtime = field(default_factory=Runtime)
    source: Annotated[Literal["base", "mid", "sft", "rl"], short("-i")] = "sft"
    """Which stage's model to talk to."""
    prompt: Annotated[str | None, short("-p")] = None
    """Ask this, print the answer and stop; default: a conversation."""
    temperature: Annotated[float, short("-t")] = 0.6
    """0 takes the likeliest token every time; higher is more varied."""
    top_k: Annotated[int, short("-k")] = 50
    """Choose among the k likeliest tokens; 0: among all."""
    max_tokens: Annotated[int, short("-m")] = 512
    """The longest answer, in tokens."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"--top_k must be 0 (all tokens) or more, got {self.top_k}")
        if self.max_tokens < 1:
            raise ValueError(f"--max_tokens must be at least 1, got {self.max_tokens}")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty: ask something, or leave it out for a conversation")


class Conversation:
    """The messages so far, and how the next one is answered."""

    def __init__(self, engine: Engine, tokenizer: RustBPETokenizer, settings: AnswerSettings) -> None:
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.messages: list[Message] = []
        self._asked = 0

    def clear(self) -> None:
        """Start a new conversation."""
        self.messages = []

    def ask(self, question: str) -> Generator[Part, None, None]:
        """Stream the answer to `question`; stopping early keeps what was said.

        Raises:
            ValueError: the question does not fit into the model's context; it is forgotten.
        """
        context = self.engine.context_length
        room = context - answer_room(context, self.settings.max_tokens)
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt, left_out = fit_context(self.tokenizer, messages, room)
        if left_out:
            print(f"(context full: the {left_out} oldest messages are forgotten)", file=sys.stderr)
        settings = AnswerSettings(
            self.settings.temperature,
            self.settings.top_k,
            self.settings.max_tokens,
            self.settings.seed + self._asked,  # asking the same again gives another answer
        )
        self._asked += 1
        parts: list[Part] = []
        try:
            for part in answer(self.engine, self.tokenizer, prompt, settings):
                parts.append(part)
                yield part
        finally:
            self.messages = [*messages[left_out:], {"role": "assistant", "content": join_parts(parts)}]


def show(parts: Iterable[Part], tools: bool) -> None:
    """Print an answer as it comes; with `tools`, also what the calculator was asked, dimmed."""
    for part in parts:
        if part.type == "text":
            print(part.text, end="", flush=True)
        elif tools:
            sign = "[" if part.type == "python" else " = "
            end = "" if part.type == "python" else "]"
            print(f"\033[2m{sign}{part.text}{end}\033[0m", end="", flush=True)
    print(flush=True)


@contextlib.contextmanager
def line_history(path: Path) -> Iterator[None]:
    """Cursor keys and a history of typed lines, kept in `path` (readable only by you)."""
    try:
        import readline
    except ImportError:  # not on every system
        yield
        return
    if path.exists():
        with contextlib.suppress(OSError):
            readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError), atomic_path(path) as tmp:
            os.close(os.open(tmp, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(tmp)


def converse(conversation: Conversation) -> None:
    """Read lines and answer them until the end of input, `quit` or `exit`."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print("Type a message. `clear` starts again, `quit` ends, Ctrl-C stops an answer.")
    while True:
        try:
            line = input("\nYou: " if terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or `quit` ends the program)")
            continue
        if line.lower() in ("quit", "exit"):
            return
        if line.lower() == "clear":
            conversation.clear()
            print("(new conversation)", file=sys.stderr)
        elif line:
            reply(conversation, line, terminal)


def reply(conversation: Conversation, line: str, terminal: bool) -> None:
    """Answer one line; Ctrl-C ends the answer only, a question that is too long is refused."""
    if terminal:
        print("\nAssistant: ", end="", flush=True)
    try:
        # Closing tells the conversation that the answer is over, also when it was interrupted while printing.
        with contextlib.closing(conversation.ask(line)) as parts:
            show(parts, tools=terminal)
    except KeyboardInterrupt:
        print("\n(stopped)", file=sys.stderr)
    except ValueError as error:
        print(f"({error})", file=sys.stderr)


def main(cfg: Config) -> None:
    """Load the model, then answer one prompt or hold a conversation."""
    # Standard output belongs to the answer; everything said on the way goes to standard error.
    with contextlib.redirect_stdout(sys.stderr):
        folder = find_tag(cfg.source, cfg.model_tag)
        compute = setup_compute(cfg.runtime)
        model, tokenizer, meta = load_model(cfg.source, compute.device, "eval", cfg.model_tag, cfg.step)
        print(f"{cfg.source} model {folder.name}, step {meta['step']}, {model.num_params() / 1e6:.1f}M parameters")
    settings = AnswerSettings(cfg.temperature, cfg.top_k, cfg.max_tokens, cfg.runtime.seed)
    conversation = Conversation(Engine(model, tokenizer, compute.precision), tokenizer, settings)
    if cfg.prompt is not None:
        show(conversation.ask(cfg.prompt), tools=False)
        return
    with line_history(get_base_dir() / "chat_history"):
        converse(conversation)


if __name__ == "__main__":
    run_script(main, Config)
