"""The routes that clients of OpenAI's API know: /v1/chat/completions, /v1/completions and /v1/models.

They answer without /v1 too, the commonest mistake in a base URL. Beyond that API a request may set what llama.cpp and
vLLM know (`top_k`, `min_p`, `repetition_penalty`, `guided_json`, ...) and `truncation`. An answer that used the
server's own calculator says so: a message has `parts` beside its `content`, and a streamed delta has `part`. Of fields
that were not used, and of what was changed in the messages, `warnings` tells.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response

from nanochat.generate.logprobs import TokenLogprob
from nanochat.generate.sampling import Constraint
from nanochat.serve.answer_events import Event, Usage, join_events
from nanochat.serve.answer_form import AnswerForm, wanted_form
from nanochat.serve.answers import AnswerFailed, AnswerResponse, AnswerStream, Service
from nanochat.serve.batch_engine import GenerationRequest
from nanochat.serve.errors import CLIENT_GONE, AsciiJSON, RequestError, error_body
from nanochat.serve.logprob_shapes import CompletionLogprobs, chat_logprobs
from nanochat.serve.other_fields import check_other_fields, unsupported
from nanochat.serve.schemas import CompletionRequest, OpenAIChatRequest, OpenAIRequest
from nanochat.serve.tools import NO_TOOLS, CallReader, ToolCall, Tools, read_tools


def add_openai_routes(app: FastAPI, service: Service) -> None:
    """Add the /v1 routes."""

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: OpenAIChatRequest, request: Request) -> Response:
        return await chat_completion(service, body, request)

    @app.post("/v1/completions", response_model=None)
    @app.post("/completions", response_model=None, include_in_schema=False)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await text_completion(service, body, request)

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe_model(service)]}

    @app.get("/v1/models/{model:path}")
    @app.get("/models/{model:path}", include_in_schema=False)
    async def model(model: str) -> dict[str, Any]:
        if not model:  # /v1/models/
            return await models()
        if model != service.model_id:
            message = f"there is no model of that name here: this server has {service.model_id}"
            raise RequestError(404, message, code="model_not_found", param="model")
        return describe_model(service)


def describe_model(service: Service) -> dict[str, Any]:
    """The model, with the length of its context by the names that vLLM, llama.cpp and OpenRouter have for it."""
    context = service.pool.context_length
    return {
        "id": service.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "nanochat",
        "max_model_len": context,
        "context_length": context,
        "meta": {
            "n_ctx_train": context,
            "n_vocab": service.tokenizer.get_vocab_size(),
            "n_params": service.model_info.get("params"),
        },
    }


async def chat_completion(service: Service, body: OpenAIChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    warnings = check_request(service, body)
    if body.top_logprobs and not body.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    tools = read_tools(body.tools, body.tool_choice)
    continues = body.messages[-1].get("role") == "assistant"
    if body.continue_final_message and not continues:
        raise RequestError(
            400,
            "continue_final_message: the last message is not the assistant's, so there is nothing to continue",
            param="continue_final_message",
        )
    if body.add_generation_prompt is False and not continues:
        raise unsupported("add_generation_prompt", "false needs an assistant's message last, to continue it")
    tokens, _, notes = await service.chat_prompt(
        body.messages, body.limit, forget=body.truncation == "auto", new_turn=body.continue_final_message is False
    )
    asked = await chat_generations(service, body, tools, tokens, request)
    completion = _Completion(service, "chat.completion", len(tokens), warnings + notes + tools.warnings(), tools)
    return await completion.respond(body, request, asked, [body.messages] * body.n)


async def text_completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    """Go on with texts."""
    warnings = check_request(service, body)
    if body.best_of not in (None, body.n):
        raise unsupported("best_of")
    wants_prompt_logprobs = body.echo and body.top_logprobs_asked is not None
    room = 0 if wants_prompt_logprobs and body.limit == 0 else 1
    prompts = await run_in_threadpool(_encode, service, body, room)
    constraint = await compiled_form(service, wanted_form(body), request)
    asked = [
        dataclasses.replace(generation, prompt_logprobs=wants_prompt_logprobs)
        for tokens in prompts
        for generation in service.generations(tokens, body, body.n, constraint, answers=False)
    ]
    completion = _Completion(service, "text_completion", sum(map(len, prompts)), warnings)
    texts = [p if isinstance(p, str) else service.text_of(p) for p in body.prompts]
    said = [text for text in texts for _ in range(body.n)]
    completion.echo = said if body.echo else []
    return await completion.respond(body, request, asked, said)


def check_request(service: Service, body: OpenAIRequest) -> list[str]:
    """What a client should know about its request, for `warnings`.

    Raises:
        RequestError: 400, a field asks for something this server can't do.
    """
    warnings = check_other_fields(body.model_extra or {})
    vocab_size = service.tokenizer.get_vocab_size()
    pieces = [t for t in body.stop_token_ids or [] if t < vocab_size and t not in service.special_tokens]
    if pieces:  # ids of another model, most likely
        names = ", ".join(f"{token} is {service.tokenizer.id_to_token(token)!r}" for token in pieces[:5])
        warnings.append(f"stop_token_ids are taken as this model's: {names}, which stays in the answer")
    if body.model and body.model != service.model_id:
        warnings.append(f"there is one model here, {service.model_id}: it answers for {body.model[:100]!r}")
    return warnings


async def chat_generations(
    service: Service, body: OpenAIRequest, tools: Tools, tokens: list[int], request: Request
) -> list[GenerationRequest]:
    """The generations that answer a conversation: a required call of a tool, a form, or any text.

    Raises:
        RequestError: 400, naming the field that can't be followed.
    """
    form = wanted_form(body)
    if form is not None and tools.required:
        message = f"{form.param} and tool_choice both say what the answer must be: leave one out"
        raise RequestError(400, message, param=form.param)
    if tools.schema is not None:
        form = AnswerForm("json", tools.schema, "tools")
    if tools.expression_of is None:
        constraint = await compiled_form(service, form, request)
        return service.generations(tokens, body, body.n, constraint, answers=not tools.parameters)
    # The call is begun, and the model goes on with it: what it writes up to the end of the call is the expression.
    begun = [*tokens, service.tokenizer.encode_special("<|python_start|>")]
    ends = (service.tokenizer.encode_special("<|python_end|>"),)
    return [
        dataclasses.replace(asked, sampling=dataclasses.replace(asked.sampling, stop_tokens=ends))
        for asked in service.generations(begun, body, body.n, answers=False)
    ]


async def compiled_form(service: Service, form: AnswerForm | None, request: Request) -> Constraint | None:
    """The form of an answer as the engine needs it; it is made in another thread, which may take a moment."""
    if form is None:
        return None
    async with service.compiling:  # one at a time: those that wait must not hold all threads meanwhile
        if await request.is_disconnected():
            raise RequestError(CLIENT_GONE, "the client has gone")
        return await run_in_threadpool(form.compile, service.grammars)


def _encode(service: Service, body: CompletionRequest, room: int) -> list[list[int]]:
    """The token ids of every prompt; texts begin with bos."""
    context = service.pool.context_length
    first = [service.tokenizer.get_bos_token_id()] if body.add_special_tokens is not False else []
    encoded = [[*first, *service.tokenizer.encode(p)] if isinstance(p, str) else p for p in body.prompts]
    longest = max(map(len, encoded))
    if longest > context - room:
        raise RequestError(
            400,
            f"a prompt of {longest} tokens leaves no room in the model's context of {context} tokens: shorten it",
            code="context_length_exceeded",
            param="prompt",
        )
    if not all(encoded):
        raise RequestError(400, "an empty prompt needs add_special_tokens", param="prompt")
    vocab_size = service.tokenizer.get_vocab_size()
    if any(max(tokens) >= vocab_size for tokens in encoded):
        raise RequestError(400, f"token ids must be below {vocab_size}", param="prompt")
    return encoded


class _Completion:
    """One request on its way to an answer, whole or streamed, of either kind."""

    def __init__(
        self, service: Service, kind: str, prompt_tokens: int, warnings: list[str], tools: Tools = NO_TOOLS
    ) -> None:
        self.service, self.kind, self.prompt_tokens, self.tools = service, kind, prompt_tokens, tools
        self.is_chat = kind == "chat.completion"
        self.echo: list[str] = []
        self.warnings = {"warnings": warnings} if warnings else {}
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
        answer = AnswerStream(self.service, asked, prompts, ends_with=self.tools.call_of)
        choices = [_Choice(self, i, body.top_logprobs_asked is not None) for i in range(len(asked))]
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return AnswerResponse(answer, self._stream(answer, choices, body.n, include_usage))
        collected = await answer.collect_for(request)
        whole = [choice.whole(events) for choice, events in zip(choices, collected, strict=True)]
        usage = count_usage(self.prompt_tokens, [events[-1].usage for events in collected], body.n)
        return AsciiJSON({**self.head, "choices": whole, "usage": usage, **self.warnings})

    async def _stream(
        self, answer: AnswerStream, choices: Sequence[_Choice], n: int, include_usage: bool
    ) -> AsyncIterator[str]:
        head = {**self.head, "object": "chat.completion.chunk" if self.is_chat else self.kind}
        nothing: dict[str, Any] = {"usage": None} if include_usage else {}

        def chunk(choice: dict[str, Any], more: dict[str, Any] = nothing) -> str:
            return json.dumps({**head, "choices": [choice], **more})

        more = {**nothing, **self.warnings}  # the warnings come once, with what is said first
        usages: list[Usage | None] = [None] * len(choices)
        for choice in choices:
            for piece in choice.beginning():
                yield chunk(piece, more)
                more = nothing
        try:
            async for i, event in answer.events():
                if event.kind == "done":
                    usages[i] = event.usage
                for piece in choices[i].pieces(event):
                    yield chunk(piece, more)
                    more = nothing
        except AnswerFailed as error:
            yield json.dumps(error_body(str(error), kind="server_error"))
        else:
            if include_usage:
                usage = count_usage(self.prompt_tokens, usages, n)
                yield json.dumps({**head, "choices": [], "usage": usage})
        yield "[DONE]"


class _Choice:
    """One of the answers to a request."""

    def __init__(self, completion: _Completion, index: int, wants_logprobs: bool) -> None:
        self.index, self.is_chat = index, completion.is_chat
        self._echo = completion.echo[index] if completion.echo else ""
        self._echo_logprobs = wants_logprobs and bool(completion.echo)
        self._special = completion.service.special_tokens
        self._wants_logprobs, self._logprobs = wants_logprobs, CompletionLogprobs(self._special)
        self._calls = CallReader(completion.tools)
        self._num_calls = 0

    def beginning(self) -> list[dict[str, Any]]:
        """What a stream says before the first event."""
        if self.is_chat:
            return [self._piece({"role": "assistant", "content": ""})]
        # With log-probabilities the prompt is repeated when those are known.
        return [self._piece(self._echo)] if self._echo and not self._echo_logprobs else []

    def pieces(self, event: Event) -> list[dict[str, Any]]:
        """What a stream says because of an event."""
        found = []
        for new in self._calls.read(event):
            if isinstance(new, ToolCall):
                found.append(self._piece({"tool_calls": [{"index": self._num_calls, **describe_call(new)}]}))
                self._num_calls += 1
            elif new.kind == "done":
                reason = self._reason(new)
                found.append(self._piece({} if self.is_chat else "", self._shown(new), finish_reason=reason))
            elif new.kind == "prompt":
                found.append(self._piece(self._echo, self._shown(new)))
            elif new.kind == "text":
                found.append(self._piece({"content": new.text} if self.is_chat else new.text, self._shown(new)))
            elif self.is_chat:
                found.append(self._piece({"content": "", "part": {"type": new.kind, "text": new.text}}))
        return found

    def whole(self, events: Sequence[Event]) -> dict[str, Any]:
        """The answer at once."""
        read = [new for event in events for new in self._calls.read(event)]
        calls = [new for new in read if isinstance(new, ToolCall)]
        said = [new for new in read if isinstance(new, Event)]
        parts = join_events(said)
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        tokens = [token for new in said for token in self._shown(new)]
        choice = {"index": self.index, "logprobs": self._shape(tokens), "finish_reason": self._reason(events[-1])}
        if not self.is_chat:
            return {**choice, "text": self._echo + text}
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if calls:
            message["tool_calls"] = [describe_call(call) for call in calls]
        if any(part["type"] != "text" for part in parts):
            message["parts"] = parts
        return {**choice, "message": message}

    def _piece(self, new: Any, tokens: Sequence[TokenLogprob] = (), finish_reason: str | None = None) -> dict[str, Any]:
        key = "delta" if self.is_chat else "text"
        logprobs = self._shape(tokens) if tokens else None
        return {"index": self.index, key: new, "logprobs": logprobs, "finish_reason": finish_reason}

    def _shown(self, event: Event) -> Sequence[TokenLogprob]:
        """The tokens of an event that are told of."""
        if event.kind in ("prompt", "text"):
            return event.logprobs
        # The last tokens may be half a character or the end itself, or else a stop text: no part of the answer.
        is_cut = event.finish_reason == "stop" and event.tokens and event.tokens[-1] not in self._special
        return event.logprobs if event.kind == "done" and not is_cut else ()

    def _shape(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        if not self.is_chat:
            return self._logprobs.of(tokens)
        return {"content": chat_logprobs(t for t in tokens if t.token not in self._special), "refusal": None}

    def _reason(self, done: Event) -> str | None:
        return "tool_calls" if self._calls.called and done.finish_reason == "stop" else done.finish_reason


def describe_call(call: ToolCall) -> dict[str, Any]:
    """A call as in an assistant's message."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def count_usage(prompt_tokens: int, usages: Sequence[Usage | None], n: int = 1) -> dict[str, Any]:
    """The `usage` object of OpenAI's API; `n` answers in a row share a prompt."""
    written = sum(usage.completion_tokens for usage in usages if usage is not None)
    cached = [usage.cached_tokens if usage is not None else 0 for usage in usages]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": sum(max(cached[i : i + n]) for i in range(0, len(cached), n))},
    }
