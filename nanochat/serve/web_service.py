"""What the routes of the chat server share: prompts, settings, and the log of conversations for those who want one."""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi.concurrency import run_in_threadpool

from nanochat.serve.answers import Answer, EnginePool
from nanochat.serve.batch_engine import Event, GenerationRequest, Usage
from nanochat.serve.chat import AnswerSettings, answer_room, fit_context
from nanochat.serve.schemas import ChatMessage, RequestError, Sampling
from nanochat.tokenizer import RustBPETokenizer


class ConversationLog:
    """Appends one line of JSON per answer to a file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
        self._lock = threading.Lock()

    def write(self, prompt: Any, events: Sequence[Event]) -> None:
        """Add a question and its answer."""
        answer = join_events(events)
        reason = events[-1].finish_reason if events else None
        row = {"time": round(time.time(), 3), "prompt": prompt, "answer": answer, "finish_reason": reason}
        with self._lock:
            os.write(self._file, (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Service:
    """The engines, the tokenizer and the settings behind the routes."""

    def __init__(
        self,
        pool: EnginePool,
        tokenizer: RustBPETokenizer,
        defaults: AnswerSettings,
        model_info: dict[str, Any],
        log: ConversationLog | None = None,
    ) -> None:
        self.pool, self.tokenizer, self.defaults, self.model_info, self.log = pool, tokenizer, defaults, model_info, log
        self.created = int(time.time())

    @property
    def model_id(self) -> str:
        """What clients call the model."""
        return str(self.model_info.get("id", "nanochat"))

    def generation(self, tokens: list[int], sampling: Sampling, max_tokens: int | None = None) -> GenerationRequest:
        """What a client asks, with the server's defaults where it says nothing. Without a seed each gets its own."""
        asked, defaults = sampling, self.defaults
        return GenerationRequest(
            tokens=tokens,
            max_tokens=max_tokens or asked.max_tokens or defaults.max_tokens,
            temperature=defaults.temperature if asked.temperature is None else asked.temperature,
            top_k=defaults.top_k if asked.top_k is None else asked.top_k,
            top_p=asked.top_p,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            seed=secrets.randbits(31) if asked.seed is None else asked.seed,
            stop=asked.stop_texts,
        )

    async def chat_prompt(
        self, messages: Sequence[ChatMessage], max_tokens: int | None, forget: bool
    ) -> tuple[list[int], int]:
        """(tokens of a conversation, messages left out because they don't fit).

        With `forget`, the oldest messages are left out as needed, and room for an answer is kept; without, everything
        must fit.

        Raises:
            RequestError: 400, the messages make no conversation, or they don't fit.
        """
        context = self.pool.context_length
        room = context - (answer_room(context, max_tokens or self.defaults.max_tokens) if forget else 1)
        try:
            tokens, left_out = await run_in_threadpool(
                fit_context, self.tokenizer, [message.to_message() for message in messages], room
            )
        except ValueError as error:
            code = "context_length_exceeded" if "too long" in str(error) else None
            raise RequestError(400, str(error), code=code, param="messages") from error
        if left_out and not forget:
            raise RequestError(
                400,
                f"the conversation is longer than the model's context of {context} tokens: leave out its oldest "
                'messages, or send "truncation": "auto" to have that done',
                code="context_length_exceeded",
                param="messages",
            )
        return tokens, left_out

    def written(self, prompts: Sequence[Any], answers: Mapping[int, Sequence[Event]]) -> None:
        """Log answers and the prompt of each, if that was asked for."""
        if self.log is not None:
            for i, events in answers.items():
                self.log.write(prompts[i], events)

    async def events(self, answer: Answer, prompts: Sequence[Any]) -> AsyncIterator[tuple[int, Event]]:
        """The events of an answer, logged if that was asked for; `prompts` has one for each of its generations."""
        collected: dict[int, list[Event]] = {}
        try:
            async for i, event in answer.events():
                if self.log is not None:
                    collected.setdefault(i, []).append(event)
                yield i, event
        finally:
            self.written(prompts, collected)


def join_events(events: Sequence[Event]) -> list[dict[str, str]]:
    """The parts of an answer, neighbouring texts joined."""
    parts: list[dict[str, str]] = []
    for event in events:
        if event.kind == "text" and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += event.text
        elif event.kind in ("text", "python", "python_output"):
            parts.append({"type": event.kind, "text": event.text})
    return parts


def joined_text(events: Sequence[Event]) -> str:
    """What an answer says, without its tool calls."""
    return "".join(event.text for event in events if event.kind == "text")


def count_usage(prompt_tokens: int, usages: Sequence[Usage | None]) -> dict[str, Any]:
    """Usage as OpenAI's API reports it."""
    written = sum(usage.completion_tokens for usage in usages if usage is not None)
    cached = max((usage.cached_tokens for usage in usages if usage is not None), default=0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
