"""The chat server: a page, answers streamed as server-sent events, and OpenAI's API (nanochat.serve.openai_api).

    GET  /                   the page and its files
    POST /chat/completions   {"messages": [...], "temperature", "top_k", "max_tokens", "seed", ...} -> events
                             data: {"token": "text"}, {"python": "6*7"}, {"python_output": "42"}, {"error": "..."},
                             {"left_out": 2} when the oldest messages did not fit, {"warnings": [...]},
                             with {"logprobs": 5} each token's and its alternatives' "logprobs": [...]
                             {"finish_reason", "usage", "seconds"}, and last {"done": true}
    GET  /health, /stats     is it ready; the model, and what it has done
    GET  /metrics            the same for Prometheus
    POST /tokenize, /detokenize

Every card has an engine with a thread of its own (nanochat.serve.batch_engine); the event loop never waits for it.
Requests wait in a bounded queue, and the place of a client that goes away becomes free. Conversations are logged only
on request.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from prometheus_client import CONTENT_TYPE_LATEST as METRICS_TYPE
from pydantic import Discriminator, Tag

from nanochat.generate.sampling import Sampling
from nanochat.serve.answers import AnswerFailed, AnswerResponse, AnswerStream, ConversationLog, EnginePool, Service
from nanochat.serve.batch_engine import BatchEngine
from nanochat.serve.errors import AsciiJSON, add_error_handlers
from nanochat.serve.guard import SECURITY_HEADERS, Access, add_guard
from nanochat.serve.logprob_shapes import chat_logprobs
from nanochat.serve.methods import AnyMethod
from nanochat.serve.metrics import CountRequests
from nanochat.serve.openai_api import add_openai_routes, chat_completion
from nanochat.serve.other_fields import HARMLESS, REFUSED, check_other_fields
from nanochat.serve.responses_api import add_responses_route
from nanochat.serve.schemas import (
    MAX_CONVERSATION_CHARS,
    MAX_MESSAGE_CHARS,
    MAX_MESSAGES,
    MAX_TOKENS,
    ChatRequest,
    OpenAIChatRequest,
)
from nanochat.serve.tokenize_api import add_tokenize_routes
from nanochat.tokenizer import RustBPETokenizer

UI_FOLDER = Path(__file__).with_name("ui")
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
LIMITS = {
    "messages": MAX_MESSAGES,
    "message_chars": MAX_MESSAGE_CHARS,
    "conversation_chars": MAX_CONVERSATION_CHARS,
    "max_tokens": MAX_TOKENS,
}

# A body with one of these fields is not the page's.
CLASSIC_FIELDS = {
    "messages",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_tokens",
    "seed",
    "stop",
}
OPENAI_FIELDS = {*OpenAIChatRequest.model_fields, *HARMLESS, *REFUSED} - CLASSIC_FIELDS - {"logprobs"}


def create_app(
    engines: Sequence[BatchEngine],
    tokenizer: RustBPETokenizer,
    defaults: Sampling,
    model_info: dict[str, Any] | None = None,
    access: Access | None = None,
    log_path: Path | None = None,
) -> FastAPI:
    """Build the application that serves these engines; it closes them when it ends.

    Args:
        engines: one per device, all with the same model.
        tokenizer: the model's.
        defaults: used where a request leaves a setting out (its seed is not: each request gets its own).
        model_info: shown by /stats and on the page (name, step, params, dtype, ...); `id` is its name in /v1.
        access: who may use it; None: everybody who can reach it.
        log_path: append conversations to this file; None: they are forgotten.
    """
    files = {"/" if p.name == "index.html" else f"/{p.name}": p for p in UI_FOLDER.iterdir() if p.suffix in MEDIA_TYPES}
    access = access or Access()
    log = ConversationLog(log_path) if log_path is not None else None
    service = Service(EnginePool(engines), tokenizer, defaults, model_info or {}, log)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await run_in_threadpool(service.pool.close)
            if log is not None:
                log.close()

    servers = [{"url": access.root_path}] if access.root_path else None
    app = FastAPI(
        title="nanochat",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        servers=servers,
        default_response_class=AsciiJSON,
    )
    app.add_middleware(AnyMethod, routes=app.routes)
    add_guard(app, access.opened(files))
    app.add_middleware(CountRequests, metrics=service.metrics)
    add_error_handlers(app, SECURITY_HEADERS)
    # Routes are tried in their order: those that are asked most come first, the files of the page last.
    add_openai_routes(app, service)
    _add_chat_routes(app, service)
    add_responses_route(app, service)
    add_tokenize_routes(app, service)
    for path, file in files.items():
        _add_file(app, path, file)
    return app


def _dialect(body: Any) -> str:
    """Which of two protocols a body speaks, that of nanochat's page or OpenAI's, to whoever left /v1 out."""
    asked = body.keys() if isinstance(body, dict) else set()
    is_openai = bool(asked & OPENAI_FIELDS) or (isinstance(body, dict) and isinstance(body.get("logprobs"), bool))
    return "openai" if is_openai else "classic"


EitherRequest = Annotated[
    Annotated[ChatRequest, Tag("classic")] | Annotated[OpenAIChatRequest, Tag("openai")], Discriminator(_dialect)
]


def _add_chat_routes(app: FastAPI, service: Service) -> None:
    pool, defaults = service.pool, service.defaults
    started = time.monotonic()

    @app.post("/chat/completions", response_model=None)
    async def chat_completions(body: EitherRequest, request: Request) -> Response:
        if isinstance(body, OpenAIChatRequest):
            return await chat_completion(service, body, request)
        warnings = check_other_fields(body.model_extra or {})
        tokens, left_out, notes = await service.chat_prompt(body.messages, body.limit, forget=True)
        answer = AnswerStream(service, service.generations(tokens, body), [body.messages])
        return AnswerResponse(answer, _stream(answer, left_out, warnings + notes, service.special_tokens))

    @app.get("/health")
    @app.get("/v1/health", include_in_schema=False)
    async def health() -> dict[str, Any]:
        stats = pool.stats()
        return {
            "status": "ok",
            "ready": True,
            "num_gpus": len(stats),
            "available_workers": sum(s["running"] < s["max_batch_size"] for s in stats),
        }

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        workers = pool.stats()
        available = sum(s["running"] < s["max_batch_size"] for s in workers)
        return {
            "model": service.model_info,
            "defaults": {
                "temperature": defaults.temperature,
                "top_k": defaults.top_k,
                "max_tokens": min(defaults.max_tokens or pool.context_length, pool.context_length, MAX_TOKENS),
            },
            "limits": {**LIMITS, "context": pool.context_length, "max_tokens": min(MAX_TOKENS, pool.context_length)},
            "uptime_seconds": round(time.monotonic() - started, 1),
            "total_workers": len(workers),
            "available_workers": available,
            "busy_workers": len(workers) - available,
            "running": sum(s["running"] for s in workers),
            "waiting": sum(s["waiting"] for s in workers),
            "workers": [{"gpu_id": i, **s} for i, s in enumerate(workers)],
        }


async def _stream(
    answer: AnswerStream, left_out: int, warnings: list[str], special: frozenset[int]
) -> AsyncIterator[str]:
    if left_out:
        yield json.dumps({"left_out": left_out})
    if warnings:
        yield json.dumps({"warnings": warnings})
    began: float | None = None
    try:
        async for _, event in answer.events():
            began = began or time.monotonic()
            if event.kind == "done":
                usage = event.usage
                yield json.dumps(
                    {
                        "finish_reason": event.finish_reason,
                        "usage": usage and {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens},
                        "seconds": round(time.monotonic() - began, 3),
                    }
                )
            else:
                key = "token" if event.kind == "text" else event.kind
                known = [token for token in event.logprobs if token.token not in special]
                logprobs = {"logprobs": chat_logprobs(known)} if known and key == "token" else {}
                yield json.dumps({key: event.text, **logprobs})
    except AnswerFailed as error:
        yield json.dumps({"error": str(error)})
    yield json.dumps({"done": True})


def _add_file(app: FastAPI, path: str, file: Path) -> None:
    async def send() -> FileResponse:
        return FileResponse(file, media_type=MEDIA_TYPES[file.suffix], headers={"Cache-Control": "no-cache"})

    app.add_api_route(path, send, methods=["GET"], response_class=FileResponse, include_in_schema=False)
