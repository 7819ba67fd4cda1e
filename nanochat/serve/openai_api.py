"""The routes that clients of OpenAI's API know: /v1/chat/completions, /v1/completions and /v1/models.

Beyond that API a request may set `top_k`, `repetition_penalty` and `truncation`, and an answer that used the calculator
says so: a message has `parts` beside its `content`, and a streamed delta has `part`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response

from nanochat.serve.answer_events import Event, Usage, join_events
from nanochat.serve.answers import AnswerFailed, AnswerResponse, AnswerStream, Service
from nanochat.serve.batch_engine import GenerationRequest
from nanochat.serve.errors import RequestError, error_body
from nanochat.serve.schemas import CompletionRequest, OpenAIChatRequest, OpenAIRequest

CLIENT_GONE = 499  # nobody reads this; the number is the one nginx logs


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Add the /v1 routes."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(service, model)
        return _model(service)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: OpenAIChatRequest, request: Request) -> Response:
        _check_request(service, body)
        tokens, _ = await service.chat_prompt(body.messages, body.max_tokens, forget=body.truncation == "auto")
        asked = service.generations(tokens, body, body.n)
        said = [[message.to_message() for message in body.messages]] * body.n
        return await _Completion(service, "chat.completion", len(tokens)).respond(body, request, asked, said)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _check_request(service, body)
        prompts = await run_in_threadpool(_encode, service, body.prompts)
        asked = [request for tokens in prompts for request in service.generations(tokens, body, body.n)]
        completion = _Completion(service, "text_completion", sum(map(len, prompts)))
        texts = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in body.prompts]
        said = [text for text in texts for _ in range(body.n)]
        completion.echo = said if body.echo else []
        return await completion.respond(body, request, asked, said)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "nanochat"}


def _check_model(service: Service, model: str | None) -> None:
    if model not in (None, service.model_id):
        raise RequestError(
            404,
            f"there is no model of that name here: this server has {service.model_id}",
            code="model_not_found",
            param="model",
        )


def _check_request(service: Service, body: OpenAIRequest) -> None:
    _check_model(service, body.model)
    unsupported = body.unsupported()
    if unsupported is not None:
        raise RequestError(
            400, f"{unsupported} is not supported: leave it out", code="unsupported_parameter", param=unsupported
        )
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options needs stream to be true", param="stream_options")


def _encode(service: Service, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """The token ids of every prompt; texts begin with bos."""
    bos, context = service.tokenizer.get_bos_token_id(), service.pool.context_length
    encoded = [[bos, *service.tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]
    longest = max(map(len, encoded))
    if longest >= context:
        raise RequestError(
            400,
            f"a prompt of {longest} tokens leaves no room in the model's context of {context} tokens: shorten it",
            code="context_length_exceeded",
            param="prompt",
        )
    vocab_size = service.tokenizer.get_vocab_size()
    if any(max(tokens) >= vocab_size for tokens in encoded):
        raise RequestError(400, f"token ids must be below {vocab_size}", param="prompt")
    return encoded


class _Completion:
    """One request on its way to an answer, whole or streamed, of either kind."""

    def __init__(self, service: Service, kind: str, prompt_tokens: int) -> None:
        self.service, self.kind, self.prompt_tokens = service, kind, prompt_tokens
        self.is_chat = kind == "chat.completion"
        self.echo: list[str] = []
        self.head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": service.model_id,
        }

    async def respond(
        self, body: OpenAIRequest, request: Request, asked: Sequence[GenerationRequest], prompts: Sequence[Any]
    ) -> Response:
        """Start the generations and answer with what they write."""
        answer = AnswerStream(self.service, asked, prompts)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return AnswerResponse(answer, self._stream(answer, len(asked), usage))
        try:
            collected = await answer.collect_for(request)
        except AnswerFailed as error:
            raise RequestError(500, str(error), kind="server_error") from error
        if collected is None:
            return Response(status_code=CLIENT_GONE)
        choices = [self._choice(i, events) for i, events in enumerate(collected)]
        usages = [events[-1].usage for events in collected]
        return JSONResponse({**self.head, "choices": choices, "usage": count_usage(self.prompt_tokens, usages)})

    def _choice(self, i: int, events: Sequence[Event]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": i, "logprobs": None, "finish_reason": events[-1].finish_reason}
        parts = join_events(events)
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        if not self.is_chat:
            return {**choice, "text": (self.echo[i] if self.echo else "") + text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if any(part["type"] != "text" for part in parts):
            message["parts"] = parts
        return {**choice, "message": message}

    async def _stream(self, answer: AnswerStream, n: int, include_usage: bool) -> AsyncIterator[str]:
        for i in range(n if self.is_chat else len(self.echo)):
            first = {"role": "assistant", "content": ""} if self.is_chat else self.echo[i]
            yield self._chunk(i, first, None, include_usage)
        usages: list[Usage | None] = []
        try:
            async for i, event in answer.events():
                if event.kind == "done":
                    usages.append(event.usage)
                    yield self._chunk(i, {} if self.is_chat else "", event.finish_reason, include_usage)
                elif event.kind == "text":
                    yield self._chunk(i, {"content": event.text} if self.is_chat else event.text, None, include_usage)
                elif self.is_chat:
                    part = {"type": event.kind, "text": event.text}
                    yield self._chunk(i, {"content": "", "part": part}, None, include_usage)
        except AnswerFailed as error:
            yield json.dumps(error_body(str(error), kind="server_error"))
        else:
            if include_usage:
                usage = count_usage(self.prompt_tokens, usages)
                yield json.dumps({**self._stream_head(), "choices": [], "usage": usage})
        yield "[DONE]"

    def _stream_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.is_chat else self.kind}

    def _chunk(self, i: int, new: Any, finish_reason: str | None, include_usage: bool) -> str:
        key = "delta" if self.is_chat else "text"
        choice = {"index": i, key: new, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if include_usage else {}
        return json.dumps({**self._stream_head(), "choices": [choice], **usage}, ensure_ascii=False)


def count_usage(prompt_tokens: int, usages: Sequence[Usage | None]) -> dict[str, Any]:
    """The `usage` object of OpenAI's API."""
    written = sum(usage.completion_tokens for usage in usages if usage is not None)
    cached = max((usage.cached_tokens for usage in usages if usage is not None), default=0)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
