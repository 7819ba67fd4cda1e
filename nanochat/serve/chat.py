"""A conversation with a model: fitting it into the context, asking, and remembering what was said."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

from nanochat.generate.sampling import Sampling
from nanochat.messages import check_messages
from nanochat.serve.answer_events import Event, join_events
from nanochat.serve.batch_engine import BatchEngine, Generation, GenerationRequest
from nanochat.tokenizer import RustBPETokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": ...} as in RustBPETokenizer


class Conversation:
    """A conversation: the messages so far, and the settings for the next answer.

    Args:
        engine: runs the model.
        tokenizer: the model's.
        settings: how answers are generated; may be replaced between two questions.
        notice: called with a sentence when old messages no longer fit into the context.
    """

    def __init__(
        self,
        engine: BatchEngine,
        tokenizer: RustBPETokenizer,
        settings: Sampling,
        notice: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.engine, self.tokenizer, self.settings, self.notice = engine, tokenizer, settings, notice
        self.system = ""
        self.plain = False
        """The model has learned no chats: it continues the text of the conversation."""
        self.messages: list[Message] = []
        self.stopped = False  # set by `stop`, cleared by the caller before the next question
        self._answering: Generation | None = None
        self._asked = 0

    def clear(self) -> None:
        """Start a new conversation; the system message stays."""
        self.messages = []

    def undo(self) -> str | None:
        """Remove the last question and its answer; return the question, or None if there is none."""
        if not self.messages:
            return None
        question: str = self.messages[-2]["content"]
        del self.messages[-2:]
        return question

    def stop(self) -> None:
        """End the answer that is being written; what was said is kept. Takes no lock: a signal handler may call it."""
        self.stopped = True
        if self._answering is not None:
            self._answering.cancel()

    def ask(self, question: str) -> Generator[Event, None, None]:
        """Stream the answer to `question`; stopping early (`stop`, or closing this) keeps what was said.

        When the context is full in the middle of an answer, the model goes on with the newer half of it.

        Raises:
            ValueError: the question does not fit into the model's context; it is forgotten.
            RuntimeError: the model failed.
        """
        context, settings = self.engine.context_length, self.settings
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*self.messages, {"role": "user", "content": question}]
        room = context - answer_room(context, settings.max_tokens)
        prompt, left_out = (continued_text if self.plain else fit_context)(self.tokenizer, [*system, *messages], room)
        if left_out:
            self.notice(f"context full: the {left_out} oldest messages are forgotten")
        kept = (
            2 + len(self.tokenizer.encode(self.system)) if system and not self.plain else 1
        )  # bos, user_start, the system message
        request = GenerationRequest(
            tokens=prompt,
            sampling=replace(
                settings,
                seed=settings.seed + self._asked,  # asking again gives another answer
                min_answer_p=0.0 if self.plain else settings.min_answer_p,  # a text goes on, it answers nothing
            ),
            slide=True,
            keep=min(kept, context // 2),
        )
        self._asked += 1
        generation = self._answering = self.engine.submit(request)
        if self.stopped:  # Ctrl-C came before there was anything to cancel
            generation.cancel()
        said: list[Event] = []
        try:
            for event in generation.events():
                if event.kind == "error":
                    raise RuntimeError(event.text)
                if event.kind != "done":
                    said.append(event)
                    yield event
        finally:
            self._answering = None
            generation.cancel()
            self.messages = [*messages[left_out:], {"role": "assistant", "content": join_events(said)}]


def answer_room(context_length: int, max_tokens: int | None) -> int:
    """The part of the context that is reserved for an answer: what was asked for, at most a quarter."""
    return max(1, min(max_tokens or context_length, context_length // 4))


def question_of(messages: list[Message]) -> list[Message]:
    """The messages of a request, so that somebody asks something.

    Without a user, instructions are what the user says; an assistant's text alone is continued after an empty question.
    """
    roles = {str(m.get("role")) if isinstance(m, dict) else "" for m in messages}
    if not messages or not roles <= {"system", "developer", "assistant"}:
        return messages
    if "assistant" in roles and len(roles) == 1:
        return [{"role": "user", "content": ""}, *messages]
    return [m if m["role"] == "assistant" else {**m, "role": "user"} for m in messages]


def continued_text(tokenizer: RustBPETokenizer, messages: list[Message], room: int) -> tuple[list[int], int]:
    """The prompt for a base model, which knows no marks of a chat: what was said as one text, its newest `room` tokens.

    Returns:
        (tokens, 1 if the beginning was left out, else 0).
    """
    text = ""
    for message in messages:
        content = message["content"]
        said = content if isinstance(content, str) else "".join(part["text"] for part in content)
        # An answer went on where its question ended.
        text += said if message["role"] == "assistant" or not text else f"\n{said}"
    ids = tokenizer.encode(text)
    return [tokenizer.get_bos_token_id(), *ids[max(0, len(ids) - room + 1) :]], int(len(ids) >= room)


def fit_context(
    tokenizer: RustBPETokenizer, messages: list[Message], room: int, new_turn: bool = False
) -> tuple[list[int], int]:
    """Render the prompt of a conversation, in at most `room` tokens.

    The oldest exchanges are left out as needed; a system message stays. An assistant's message that stands last is
    continued; with `new_turn` it ends, and another one begins.

    Returns:
        (tokens, number of messages left out).

    Raises:
        ValueError: the messages are malformed, or the last question is too long by itself.
    """
    check_messages(messages)
    continues = messages[-1]["role"] == "assistant" and not new_turn
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    # A turn has two marks at least: those before the last room / 2 can't fit, and need not be read to know it.
    early = max(0, len(turns) - max(2, room // 2)) // 2 * 2
    turns = turns[early:]
    sizes = [len(ids) for ids, _ in tokenizer.render_turns({"messages": [*system, *turns]})]
    system_size = len(tokenizer.encode(system[0]["content"])) if system else 0
    left_out, size = 0, sum(sizes)
    while True:
        # The first turn's size holds bos and the system message; without it the next one gets them.
        extra = 0 if left_out == 0 else 1 + system_size
        if size + extra <= room + 1:
            kept = {"messages": [*system, *turns[left_out:]]}
            tokens = [token for ids, _ in tokenizer.render_turns(kept) for token in ids]
            tokens = tokens[:-1] if continues else [*tokens, tokenizer.encode_special("<|assistant_start|>")]
            if len(tokens) <= room:
                return tokens, early + left_out
        last = size + extra
        size -= sum(sizes[left_out : left_out + 2])
        left_out += 2
        if left_out >= len(turns):
            raise ValueError(
                f"the message is too long: with {last} tokens it does not fit into the {room} tokens "
                "the model's context has for it; shorten it"
            )
