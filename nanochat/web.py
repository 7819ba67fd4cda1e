"""The chat server: a page, and answers streamed as server-sent events.

    GET  /                   the page (with /style.css, /app.js, /logo.svg)
    POST /chat/completions   {"messages": [...], "temperature", "top_k", "max_tokens", "seed"} -> events
                             data: {"token": "text"}, {"python": "6*7"}, {"python_output": "42"}, {"error": "..."},
                             {"left_out": 2} when the oldest messages did not fit, and last {"done": true}
    GET  /health, /stats     is it ready, what has it done

Every model has a thread of its own that answers one request at a time; the event loop never waits for it. Requests
wait in a bounded queue, and a client that goes away frees its place. Conversations are neither stored nor logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, Field, model_validator
from sse_starlette import EventSourceResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.chat import AnswerSettings, Part, answer, answer_room, fit_context
from nanochat.engine import Engine
from nanochat.tokenizer import RustBPETokenizer

UI_FOLDER = Path(__file__).with_name("ui")
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8000
MAX_CONVERSATION_CHARS = 32000
# The longest allowed conversation with every character written as \uXXXX\uXXXX, and its braces.
MAX_BODY_BYTES = 12 * MAX_CONVERSATION_CHARS + 100 * MAX_MESSAGES
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
logger = logging.getLogger("nanochat.web")


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str = Field(max_length=MAX_MESSAGE_CHARS)


class ChatRequest(BaseModel):
    """What a client asks."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_k: int | None = Field(None, ge=0, le=200)
    max_tokens: int | None = Field(None, ge=1, le=4096)
    seed: int | None = Field(None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_total(self) -> ChatRequest:
        total = sum(len(message.content) for message in self.messages)
        if total > MAX_CONVERSATION_CHARS:
            raise ValueError(f"the conversation has {total} characters, the limit is {MAX_CONVERSATION_CHARS}")
        return self


class Job:
    """A request on its way through a worker: its parts arrive in `events`, then None, or an exception."""

    def __init__(self, prompt: list[int], settings: AnswerSettings) -> None:
        self.prompt, self.settings = prompt, settings
        self.cancelled = threading.Event()
        self.events: asyncio.Queue[Part | Exception | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, event: Part | Exception | None) -> None:
        """Hand an event from the worker's thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is waiting any more
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class QueueFullError(Exception):
    """There are too many waiting requests."""


@dataclass
class Worker:
    """A model, and what it has done."""

    engine: Engine
    job: Job | None = None
    answered: int = 0
    tokens: int = 0
    seconds: float = 0.0


class WorkerPool:
    """One thread per engine, and one queue for all of them."""

    def __init__(self, engines: Sequence[Engine], tokenizer: RustBPETokenizer, queue_size: int) -> None:
        self.workers = [Worker(engine) for engine in engines]
        self._tokenizer, self._queue_size = tokenizer, queue_size
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        self._closing = False
        self._threads = [threading.Thread(target=self._work, args=(w,), daemon=True) for w in self.workers]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Cancel everything and end the threads."""
        with self._changed:
            self._closing = True
            for job in [*self._waiting, *(w.job for w in self.workers if w.job is not None)]:
                job.cancelled.set()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, job: Job) -> None:
        """Queue a job. Raises QueueFullError."""
        with self._changed:
            # Jobs that a free worker is about to take don't count as waiting.
            if len(self._waiting) >= self._queue_size + self.available:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Stop a job wherever it is; a finished one is left as it is."""
        job.cancelled.set()
        with self._changed, contextlib.suppress(ValueError):
            self._waiting.remove(job)

    @property
    def available(self) -> int:
        """Workers with nothing to do."""
        return sum(worker.job is None for worker in self.workers)

    @property
    def waiting(self) -> int:
        """Requests nobody works on yet."""
        return len(self._waiting)

    def retry_after_seconds(self) -> int:
        """About how long an answer takes: when to try again."""
        answered = sum(w.answered for w in self.workers)
        return max(1, math.ceil(sum(w.seconds for w in self.workers) / answered)) if answered else 5

    def _work(self, worker: Worker) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                job = worker.job = self._waiting.popleft()
            start = time.monotonic()
            try:
                self._answer(worker, job)
                job.put(None)
            except Exception as error:  # whatever goes wrong is this request's, and the next one is answered
                logger.exception("an answer failed")
                job.put(error)
            finally:
                worker.answered += 1
                worker.seconds += time.monotonic() - start
                worker.job = None

    def _answer(self, worker: Worker, job: Job) -> None:
        def stopped() -> bool:
            worker.tokens += 1
            return job.cancelled.is_set()

        if not job.cancelled.is_set():
            for part in answer(worker.engine, self._tokenizer, job.prompt, job.settings, stopped):
                job.put(part)


class AnswerResponse(EventSourceResponse):
    """The events of a job; whichever way the response ends, the job ends with it."""

    def __init__(self, job: Job, pool: WorkerPool, left_out: int) -> None:
        self._job, self._pool = job, pool
        super().__init__(self._events(left_out), headers={"Cache-Control": "no-store"}, sep="\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pool.cancel(self._job)

    async def _events(self, left_out: int) -> AsyncIterator[dict[str, str]]:
        if left_out:
            yield {"data": json.dumps({"left_out": left_out})}
        while (event := await self._job.events.get()) is not None:
            if isinstance(event, Exception):
                yield {"data": json.dumps({"error": "the answer failed; the server's log says why"})}
                break
            key = "token" if event.type == "text" else event.type
            yield {"data": json.dumps({key: event.text}, ensure_ascii=False)}
        yield {"data": json.dumps({"done": True})}


class Shield:
    """Adds the security headers to every response and refuses bodies that are too large, announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = HTTPException(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise too_large
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
            await JSONResponse({"detail": too_large.detail}, 413)(scope, receive, send_with_headers)
            return
        await self.app(scope, limited_receive, send_with_headers)


async def explain_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a request, in words, without repeating its content."""
    assert isinstance(error, RequestValidationError)
    problems = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"] if part != "body")
        problems.append(f"{place}: {problem['msg']}" if place else problem["msg"])
    return JSONResponse({"detail": "; ".join(problems[:5])}, 422)


def create_app(
    engines: Sequence[Engine],
    tokenizer: RustBPETokenizer,
    defaults: AnswerSettings,
    model_info: dict[str, Any] | None = None,
    queue_size: int = 16,
) -> FastAPI:
    """The application that serves these engines.

    Args:
        engines: one per device, all with the same model.
        tokenizer: the model's.
        defaults: used where a request leaves a setting out (its seed is not: each request gets its own).
        model_info: shown by /stats and on the page (name, step, params, dtype).
        queue_size: how many requests may wait; more get 429.
    """
    pool = WorkerPool(engines, tokenizer, queue_size)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool.start()
        try:
            yield
        finally:
            await run_in_threadpool(pool.close)

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Shield)
    app.add_exception_handler(RequestValidationError, explain_invalid_request)
    app.state.pool = pool
    add_page(app)

    @app.post("/chat/completions", response_class=AnswerResponse)
    async def chat_completions(request: ChatRequest) -> AnswerResponse:
        settings = AnswerSettings(
            temperature=defaults.temperature if request.temperature is None else request.temperature,
            top_k=defaults.top_k if request.top_k is None else request.top_k,
            max_tokens=request.max_tokens or defaults.max_tokens,
            seed=secrets.randbits(31) if request.seed is None else request.seed,
        )
        messages = [message.model_dump() for message in request.messages]
        context = engines[0].context_length
        room = context - answer_room(context, settings.max_tokens)
        try:
            prompt, left_out = await run_in_threadpool(fit_context, tokenizer, messages, room)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        job = Job(prompt, settings)
        try:
            pool.submit(job)
        except QueueFullError:
            wait = str(pool.retry_after_seconds())
            detail = f"{pool.waiting} requests are waiting already: try again in {wait} s"
            raise HTTPException(429, detail, headers={"Retry-After": wait}) from None
        return AnswerResponse(job, pool, left_out)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "ready": True, "workers": len(pool.workers), "available_workers": pool.available}

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {
            "model": model_info or {},
            "defaults": {
                "temperature": defaults.temperature,
                "top_k": defaults.top_k,
                "max_tokens": defaults.max_tokens,
            },
            "total_workers": len(pool.workers),
            "available_workers": pool.available,
            "waiting": pool.waiting,
            "workers": [
                {
                    "device": str(worker.engine.model.get_device()),
                    "busy": worker.job is not None,
                    "answered": worker.answered,
                    "tokens_per_second": round(worker.tokens / worker.seconds, 1) if worker.seconds else None,
                }
                for worker in pool.workers
            ],
        }

    return app


def add_page(app: FastAPI) -> None:
    """The routes of the page's files."""

    def serve(path: str, name: str, media_type: str) -> None:
        async def file() -> FileResponse:
            return FileResponse(UI_FOLDER / name, media_type=media_type, headers={"Cache-Control": "no-cache"})

        app.add_api_route(path, file, response_class=FileResponse, include_in_schema=False)

    serve("/", "index.html", "text/html; charset=utf-8")
    serve("/style.css", "style.css", "text/css; charset=utf-8")
    serve("/app.js", "app.js", "text/javascript; charset=utf-8")
    serve("/logo.svg", "logo.svg", "image/svg+xml")
