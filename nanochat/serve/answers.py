"""From a request to its answer: prompt and settings, the engines, events as they arrive, and a log if wanted.

An engine's thread puts its events into a box and wakes the server's event loop, which so never waits for an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from nanochat.generate.sampling import Sampling
from nanochat.serve.answer_events import Event, join_events
from nanochat.serve.batch_engine import BatchEngine, EngineClosed, Generation, GenerationRequest, QueueFull
from nanochat.serve.chat import answer_room, fit_context
from nanochat.serve.errors import RequestError
from nanochat.serve.schemas import ChatMessage, SamplingFields
from nanochat.tokenizer import RustBPETokenizer

DRAIN_SECONDS = 30.0  # how long a stopping server lets answers finish
logger = logging.getLogger("nanochat.serve")


class EnginePool:
    """One engine per card; a request goes to the one with the least to do."""

    def __init__(self, engines: Sequence[BatchEngine]) -> None:
        self.engines = list(engines)

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have."""
        return self.engines[0].context_length

    def submit(self, request: GenerationRequest) -> Generation:
        """Start or queue a request.

        Raises:
            ValueError: the request can't be served by this model.
            QueueFull: too many wait, at every engine.
            EngineClosed: the server is stopping.
        """
        *others, busiest = sorted(self.engines, key=lambda engine: engine.load)
        for engine in others:
            with contextlib.suppress(QueueFull):
                return engine.submit(request)
        return busiest.submit(request)

    def stats(self) -> list[dict[str, Any]]:
        """The counters of every engine."""
        return [engine.stats() for engine in self.engines]

    def close(self) -> None:
        """Stop every engine at once; whatever still runs is cancelled."""
        for engine in self.engines:
            engine.close(drain=False)


class ConversationLog:
    """Appends one line of JSON per answer to a file that only its owner can read."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
        self._lock = threading.Lock()

    def write(self, prompt: Any, events: Sequence[Event]) -> None:
        """Add a question and its answer."""
        answer = join_events(events)
        reason = events[-1].finish_reason
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
        defaults: Sampling,
        model_info: dict[str, Any],
        log: ConversationLog | None = None,
    ) -> None:
        self.pool, self.tokenizer, self.defaults, self.model_info, self.log = pool, tokenizer, defaults, model_info, log
        self.created = int(time.time())

    @property
    def model_id(self) -> str:
        """The name by which clients know the model."""
        return str(self.model_info.get("id", "nanochat"))

    def generations(self, tokens: list[int], asked: SamplingFields, n: int = 1) -> list[GenerationRequest]:
        """`n` requests that continue `tokens`, with the server's defaults where a client says nothing."""
        # Without a seed each request gets a random one: the server's own would answer everybody alike.
        sampling = asked.over(dataclasses.replace(self.defaults, seed=secrets.randbits(31)))
        each = [dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**63) for i in range(n)]
        return [GenerationRequest(tokens=tokens, sampling=s, stop=asked.stop_texts) for s in each]

    async def chat_prompt(
        self, messages: Sequence[ChatMessage], max_tokens: int | None, forget: bool
    ) -> tuple[list[int], int]:
        """(tokens of a conversation, messages left out because they don't fit).

        With `forget`, the oldest messages are left out as needed, and room for an answer is reserved; without it,
        everything must fit.

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


class AnswerFailed(Exception):
    """An answer that failed inside the engine, or was stopped. Clients are told no more; the log says what happened."""


class AnswerStream:
    """One or several generations that belong to one request of a client, started together.

    Args:
        service: its engines write the answer; its log, if there is one, keeps it.
        requests: one for each generation.
        prompts: the question of each request, for the log.

    Raises:
        RequestError: 429 when too many wait, 503 when the server stops, 400 when the model can't do it.
    """

    def __init__(self, service: Service, requests: Sequence[GenerationRequest], prompts: Sequence[Any]) -> None:
        self._log, self._prompts = service.log, prompts
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._box: deque[tuple[int, Event]] = deque()
        self._filled = asyncio.Event()
        self._generations: list[Generation] = []
        try:
            for request in requests:
                self._generations.append(service.pool.submit(request))
        except (QueueFull, EngineClosed, ValueError) as error:
            self.cancel()
            raise _refusal(error) from error
        for i, generation in enumerate(self._generations):
            generation.add_listener(lambda event, i=i: self._put(i, event))  # type: ignore[misc]

    def cancel(self) -> None:
        """Stop what still runs."""
        for generation in self._generations:
            generation.cancel()

    def _put(self, i: int, event: Event) -> None:
        with self._lock:
            self._box.append((i, event))
            first = len(self._box) == 1  # the loop was woken already for what lies there, and takes all of it
        if first:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
                self._loop.call_soon_threadsafe(self._filled.set)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of the generation, event) up to the last event of each.

        Pieces of text that arrived meanwhile come as one, so that a busy loop has less to do.

        Raises:
            AnswerFailed: a generation failed or was cut short; the others are cancelled.
        """
        unfinished = len(self._generations)
        said: list[list[Event]] = [[] for _ in self._generations]
        try:
            while unfinished:
                await self._filled.wait()
                with self._lock:
                    arrived = list(self._box)
                    self._box.clear()
                    self._filled.clear()
                for i, event in _join_texts(arrived):
                    if event.kind == "error" or event.finish_reason == "cancelled":
                        self.cancel()
                        logger.error("an answer failed: %s", event.text or "cancelled")
                        raise AnswerFailed("the answer failed; the server's log says why")
                    unfinished -= event.kind == "done"
                    if self._log is not None:
                        said[i].append(event)
                    yield i, event
        finally:  # also when the client has gone: then with what was said until then
            for prompt, events in zip(self._prompts, said, strict=True):
                if self._log is not None and events:
                    self._log.write(prompt, events)

    async def collect(self) -> list[list[Event]]:
        """Wait for the end; return all events of every generation."""
        collected: list[list[Event]] = [[] for _ in self._generations]
        async for i, event in self.events():
            collected[i].append(event)
        return collected

    async def collect_for(self, request: Request) -> list[list[Event]] | None:
        """Like `collect`, but None as soon as the client has gone away; then the generations are cancelled."""
        work = asyncio.ensure_future(self.collect())
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            self.cancel()
            work.cancel()
            gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _join_texts(arrived: list[tuple[int, Event]]) -> Iterator[tuple[int, Event]]:
    texts: dict[int, list[str]] = {}
    for i, event in arrived:
        if event.kind == "text":
            texts.setdefault(i, []).append(event.text)
            continue
        if i in texts:
            yield i, Event("text", "".join(texts.pop(i)))
        yield i, event
    for i, pieces in texts.items():
        yield i, Event("text", "".join(pieces))


def _refusal(error: Exception) -> RequestError:
    if isinstance(error, QueueFull):
        wait = str(error.retry_after_seconds)
        return RequestError(429, str(error), kind="rate_limit_error", code="queue_full", headers={"Retry-After": wait})
    if isinstance(error, EngineClosed):
        return RequestError(503, "the server is stopping", kind="server_error", headers={"Retry-After": "30"})
    return RequestError(400, str(error))


class AnswerResponse(EventSourceResponse):
    """Server-sent events of an answer; whichever way the response ends, the answer ends with it.

    When the server stops, answers that are being written have DRAIN_SECONDS to finish.
    """

    def __init__(self, answer: AnswerStream, data: AsyncIterator[str]) -> None:
        self._answer = answer
        super().__init__(data, sep="\n", shutdown_grace_period=DRAIN_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
