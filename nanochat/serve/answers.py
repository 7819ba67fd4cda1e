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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse
from starlette.types import Receive, Scope, Send

from nanochat.generate.grammar import Grammars
from nanochat.generate.sampling import Constraint, Sampling
from nanochat.messages import normalise
from nanochat.serve.answer_events import Event, join_events
from nanochat.serve.batch_engine import BatchEngine, EngineClosed, Generation, GenerationRequest, QueueFull
from nanochat.serve.chat import answer_room, continued_text, fit_context, question_of
from nanochat.serve.errors import CLIENT_GONE, RequestError
from nanochat.serve.metrics import ServerMetrics
from nanochat.serve.schemas import SamplingFields
from nanochat.tokenizer import RustBPETokenizer

DRAIN_SECONDS = 30.0  # how long a stopping server lets answers finish
SHORT_CHARS = 4000  # of messages that are read on the spot: another thread takes longer to start than they do
RETRY_SECONDS = 0.05  # how soon a request looks again whether the queue has a place for the next of its prompts
logger = logging.getLogger("nanochat.serve")


class EnginePool:
    """One engine per card; a request goes to the one with the least to do."""

    def __init__(self, engines: Sequence[BatchEngine]) -> None:
        self.engines = list(engines)

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have."""
        return self.engines[0].context_length

    @property
    def places(self) -> int:
        """How many answers can be written at the same time, by all engines together."""
        return sum(engine.max_batch_size for engine in self.engines)

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
        """Add a question and its answer; of a client that left it is what was said until then, perhaps nothing."""
        answer = join_events(events)
        reason = events[-1].finish_reason if events else None
        row = {"time": round(time.time(), 3), "prompt": prompt, "answer": answer, "finish_reason": reason}
        with self._lock:
            os.write(self._file, (json.dumps(row) + "\n").encode())

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
        self.metrics = ServerMetrics(pool.stats)
        self.grammars, self.compiling = Grammars(tokenizer), asyncio.Lock()
        self.created = int(time.time())
        self.special_tokens = frozenset(tokenizer.encode_special(name) for name in tokenizer.get_special_tokens())

    @property
    def model_id(self) -> str:
        """The name by which clients know the model."""
        return str(self.model_info.get("id", "nanochat"))

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens; special ones are none."""
        return self.tokenizer.decode([token for token in tokens if token not in self.special_tokens])

    def generations(
        self,
        tokens: list[int],
        asked: SamplingFields,
        n: int = 1,
        constraint: Constraint | None = None,
        *,
        answers: bool = True,
    ) -> list[GenerationRequest]:
        """`n` requests that continue `tokens`, with the server's defaults where a client says nothing.

        With `answers`, a guess may be replaced (see `Sampling.min_answer_p`): of an answer from its beginning on, in a
        form of its own.

        Raises:
            RequestError: 400, `logit_bias` names what is no token.
        """
        # Without a seed each request gets a random one: the server's own would answer everybody alike.
        try:
            sampling = asked.over(dataclasses.replace(self.defaults, seed=secrets.randbits(31)))
            unknown = [token for token, _ in sampling.logit_bias if token >= self.tokenizer.get_vocab_size()]
            if unknown:
                raise ValueError(f"token ids must be below {self.tokenizer.get_vocab_size()}, got {unknown[0]}")
        except ValueError as error:
            raise RequestError(400, str(error), param="logit_bias") from error
        begins = tokens[-1:] == [self.tokenizer.encode_special("<|assistant_start|>")]
        least = sampling.min_answer_p if answers and begins and constraint is None else 0.0
        sampling = dataclasses.replace(sampling, constraint=constraint, min_answer_p=least)
        each = [dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**63) for i in range(n)]
        return [GenerationRequest(tokens=tokens, sampling=s, stop=asked.stop_texts) for s in each]

    async def chat_prompt(
        self, messages: list[dict[str, Any]], limit: int | None, *, forget: bool, new_turn: bool = False
    ) -> tuple[list[int], int, list[str]]:
        """(tokens of a conversation, messages left out because they don't fit, what was changed in the messages).

        With `forget`, the oldest messages are left out as needed, and room for an answer is reserved; without it,
        everything must fit. An assistant's message that stands last is continued, or ended with `new_turn`.

        Raises:
            RequestError: 400, the messages make no conversation, or they don't fit.
        """
        context = self.pool.context_length
        room = context - (
            answer_room(context, limit if limit is not None and limit >= 0 else self.defaults.max_tokens)
            if forget
            else 1
        )

        def fit() -> tuple[list[int], int, list[str]]:
            turns, notes = normalise(question_of(messages))
            if self.model_info.get("plain"):
                tokens, left_out = continued_text(self.tokenizer, turns, room)
            else:
                tokens, left_out = fit_context(self.tokenizer, turns, room, new_turn)
            return tokens, left_out, [f"messages: {count} × {note}" for note, count in notes.items() if count]

        try:
            is_short = len(str(messages)) <= SHORT_CHARS
            tokens, left_out, notes = fit() if is_short else await run_in_threadpool(fit)
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
        return tokens, left_out, notes


class AnswerFailed(Exception):
    """An answer that failed inside the engine, or was stopped. Clients are told no more; the log says what happened."""


class AnswerStream:
    """One or several generations that belong to one request of a client.

    They start together as far as the engines have places, the others as those end: a request of 256 prompts takes its
    turns, and doesn't fill the queue for everybody else.

    Args:
        service: its engines write the answer; its log, if there is one, keeps it.
        requests: one for each generation.
        prompts: the question of each request, for the log.
        ends_with: an answer ends with a call of the tool of which this is true.

    Raises:
        RequestError: 429 when too many wait, 503 when the server stops, 400 when the model can't do it.
    """

    def __init__(
        self,
        service: Service,
        requests: Sequence[GenerationRequest],
        prompts: Sequence[Any],
        *,
        ends_with: Callable[[str], Any] = lambda call: False,
    ) -> None:
        self._service, self._prompts, self._ends_with = service, prompts, ends_with
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._box: deque[tuple[int, Event]] = deque()
        self._filled = asyncio.Event()
        self._generations: list[Generation] = []
        self._waiting = deque(requests)
        self._running = 0
        self._written = [0] * len(requests)  # tokens so far
        self._ended: dict[int, int] = {}  # tokens of answers that ended with a call
        self._said: list[list[Event]] = []  # what the log does not have yet
        self._began = time.monotonic()
        try:
            self._start_waiting()
        except (QueueFull, EngineClosed, ValueError) as error:
            self.cancel()
            raise _refusal(error) from error
        self._said = [[] for _ in requests]

    def cancel(self) -> None:
        """Stop what still runs; the log gets what was said."""
        self._waiting.clear()
        for generation in self._generations:
            generation.cancel()
        self._log()

    def _log(self) -> None:
        said, self._said = self._said, []
        if self._service.log is not None:
            for prompt, events in zip(self._prompts, said, strict=bool(said)):
                self._service.log.write(prompt, events)

    def _start_waiting(self) -> None:
        """Start as many of the generations that wait as there are places for."""
        while self._waiting and self._running < self._service.pool.places:
            i = len(self._generations)
            try:
                generation = self._service.pool.submit(self._waiting[0])
            except QueueFull:
                if i == 0:
                    raise
                return  # its turn comes
            self._waiting.popleft()
            self._running += 1
            self._generations.append(generation)
            generation.add_listener(lambda event, i=i: self._put(i, event))  # type: ignore[misc]

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
        unfinished, first = len(self._prompts), True
        try:
            while unfinished:
                # Nothing of this request runs, and the queue was full: the next look is soon.
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._filled.wait(), None if self._running else RETRY_SECONDS)
                with self._lock:
                    arrived = list(self._box)
                    self._box.clear()
                    self._filled.clear()
                if first and arrived:
                    first = False
                    self._service.metrics.first_token.observe(time.monotonic() - self._began)
                for i, event in self._read(arrived):
                    unfinished -= event.kind == "done"
                    if self._said and self._service.log is not None:
                        self._said[i].append(event)
                    yield i, event
                self._start_more()
            self._service.metrics.answer.observe(time.monotonic() - self._began)
        finally:  # at once, so that the line is there when the client has its answer
            self._log()

    def _read(self, arrived: list[tuple[int, Event]]) -> Iterator[tuple[int, Event]]:
        """What the client may know of what arrived."""
        for i, event in _join_texts(arrived):
            ended = self._ended.get(i)
            self._written[i] += len(event.tokens)
            if event.kind == "error" or (event.finish_reason == "cancelled" and ended is None):
                self._fail(event.text or "cancelled")
            if event.kind == "done":
                self._running -= 1
                if ended is not None:
                    usage = event.usage and dataclasses.replace(event.usage, completion_tokens=ended)
                    event = Event("done", finish_reason="stop", usage=usage)
                yield i, event
            elif ended is None:
                yield i, event
                if event.kind == "python" and self._ends_with(event.text):
                    # The client answers this call: what the engine writes after it is not asked for.
                    self._ended[i] = self._written[i]
                    self._generations[i].cancel()

    def _start_more(self) -> None:
        try:
            self._start_waiting()
        except (EngineClosed, ValueError) as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> NoReturn:
        self.cancel()
        logger.error("an answer failed: %s", reason)
        raise AnswerFailed("the answer failed; the server's log says why")

    async def collect(self) -> list[list[Event]]:
        """Wait for the end; return all events of every generation."""
        collected: list[list[Event]] = [[] for _ in self._prompts]
        async for i, event in self.events():
            collected[i].append(event)
        return collected

    async def collect_for(self, request: Request) -> list[list[Event]]:
        """Like `collect`, but only while the client is there; when it has gone, the generations are cancelled.

        Raises:
            RequestError: the client has gone, or a generation failed.
        """
        work = asyncio.ensure_future(self.collect())
        gone = asyncio.ensure_future(_disconnect(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise RequestError(CLIENT_GONE, "the client has gone")
            return work.result()
        except AnswerFailed as error:
            raise RequestError(500, str(error), kind="server_error") from error
        finally:
            self.cancel()
            work.cancel()
            gone.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _join_texts(arrived: list[tuple[int, Event]]) -> Iterator[tuple[int, Event]]:
    texts: dict[int, list[Event]] = {}

    def joined(i: int) -> Event:
        pieces = texts.pop(i)
        return Event(
            "text",
            "".join(piece.text for piece in pieces),
            tokens=tuple(token for piece in pieces for token in piece.tokens),
            logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        )

    for i, event in arrived:
        if event.kind == "text":
            texts.setdefault(i, []).append(event)
            continue
        if i in texts:
            yield i, joined(i)
        yield i, event
    for i in list(texts):
        yield i, joined(i)


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

    def __init__(self, answer: AnswerStream, data: AsyncIterator[str] | AsyncIterator[dict[str, str]]) -> None:
        self._answer = answer
        super().__init__(data, sep="\n", shutdown_grace_period=DRAIN_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
