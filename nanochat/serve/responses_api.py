"""POST /v1/responses, the API that current OpenAI clients use by default.

Nothing is stored here: a request brings its whole conversation, and `previous_response_id` is refused.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import Field, model_validator

from nanochat.serve.answer_events import Event, Usage, join_events
from nanochat.serve.answers import AnswerFailed, AnswerResponse, AnswerStream, Service
from nanochat.serve.errors import AsciiJSON, RequestError
from nanochat.serve.logprob_shapes import chat_logprobs
from nanochat.serve.openai_api import chat_generations, check_request, count_usage
from nanochat.serve.other_fields import unsupported
from nanochat.serve.schemas import OpenAIRequest, Text, TokenLimit
from nanochat.serve.tools import CallReader, ToolCall, read_tools

# What this server has no means for, and the values with which these fields ask for nothing.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "context_management": ([],),
}
LOGPROBS = "message.output_text.logprobs"  # asks for them, in `include`


class ResponsesRequest(OpenAIRequest):
    """POST /v1/responses."""

    input: Text | list[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: TokenLimit = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: list[str] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    metadata: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _check_numbers(self) -> ResponsesRequest:
        # These are repeated in the answer. Python reads NaN and Infinity where JSON has none.
        json.dumps([self.text, self.tools, self.tool_choice, self.metadata], allow_nan=False)
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens asked for."""
        return super().limit if self.max_output_tokens is None else self.max_output_tokens

    @property
    def format(self) -> tuple[dict[str, Any] | None, str]:
        """See the base class."""
        return (self.text or {}).get("format"), "text.format"

    @property
    def top_logprobs_asked(self) -> int | None:
        """See `include`."""
        wanted = self.top_logprobs or LOGPROBS in (self.include or [])
        return (self.top_logprobs or 0) if wanted else None


def add_responses_route(app: FastAPI, service: Service) -> None:
    """Add the route."""

    @app.post("/v1/responses", response_model=None)
    @app.post("/responses", response_model=None, include_in_schema=False)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        _refuse_storage(body)
        warnings = check_request(service, body)
        tools = read_tools(body.tools, body.tool_choice)
        messages = to_messages(body)
        tokens, _, notes = await service.chat_prompt(messages, body.limit, forget=body.truncation == "auto")
        generations = await chat_generations(service, body, tools, tokens, request)
        answer = AnswerStream(service, generations, [messages], ends_with=tools.call_of)
        written = _Response(service, body, CallReader(tools), len(tokens), warnings + notes + tools.warnings())
        if body.stream:
            return AnswerResponse(answer, _stream(answer, written))
        collected = await answer.collect_for(request)
        for event in collected[0]:
            written.take(event)
        return AsciiJSON(written.state())


def _refuse_storage(body: ResponsesRequest) -> None:
    extra = body.model_extra or {}
    for name, nothing in NOT_HERE.items():
        if extra.pop(name, None) not in (None, *nothing):
            raise unsupported(name, "nothing is stored here, so send the whole conversation as input")
    if body.n != 1:
        raise unsupported("n")


def to_messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The request's instructions and input as messages of a chat.

    Raises:
        RequestError: 400, an item is of a kind that can't be used.
    """
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            calls = messages[-1].setdefault("tool_calls", [])
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
        elif kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
        elif kind != "reasoning":  # thoughts that another model had
            raise unsupported(f"input[{i}].type", f"{str(kind)[:80]!r} can't be used here")
    if not messages:
        raise RequestError(400, "input holds no message", param="input")
    return messages


async def _stream(answer: AnswerStream, written: _Response) -> AsyncIterator[dict[str, str]]:
    for kind in ("response.created", "response.in_progress"):
        yield written.event(kind, response=written.state())
    try:
        async for _, event in answer.events():
            for sent in written.take(event):
                yield sent
    except AnswerFailed as error:
        yield written.fail(str(error))


class _Response:
    """The state of an answer, and the events that tell how it changes."""

    def __init__(
        self, service: Service, body: ResponsesRequest, calls: CallReader, prompt_tokens: int, warnings: list[str]
    ) -> None:
        self._body, self._calls, self._prompt_tokens = body, calls, prompt_tokens
        self._special = service.special_tokens
        self._status = "in_progress"
        self._error: dict[str, str] | None = None
        self._usage: Usage | None = None
        self._output: list[dict[str, Any]] = []
        self._message: dict[str, Any] | None = None  # the last of the output, while text is added to it
        self._parts: list[Event] = []
        self._count = 0
        self._head = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model_id,
        }
        self._warnings = {"warnings": warnings} if warnings else {}

    def state(self) -> dict[str, Any]:
        """The response object."""
        body = self._body
        usage = None if self._usage is None else _responses_usage(self._prompt_tokens, self._usage)
        return {
            **self._head,
            "status": self._status,
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.limit,
            "metadata": body.metadata or {},
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": usage,
            **self._warnings,
        }

    def event(self, kind: str, **fields: Any) -> dict[str, str]:
        """One event of the stream."""
        number = self._count
        self._count += 1
        return {"event": kind, "data": json.dumps({"type": kind, "sequence_number": number, **fields})}

    def fail(self, message: str) -> dict[str, str]:
        """The last event of an answer that failed."""
        self._status, self._error = "failed", {"code": "server_error", "message": message}
        return self.event("response.failed", response=self.state())

    def take(self, event: Event) -> list[dict[str, str]]:
        """Go on by what the model did."""
        sent: list[dict[str, str]] = []
        for new in self._calls.read(event):
            if isinstance(new, ToolCall):
                sent += [*self._end_message("completed"), *self._add_call(new)]
            elif new.kind == "text":
                sent += [*self._begin_message(), *self._add_text(new)]
            elif new.kind == "done":
                sent += self._end(new)
            elif new.kind in ("python", "python_output"):
                self._parts.append(new)
        return sent

    def _begin_message(self) -> list[dict[str, str]]:
        if self._message is not None:
            return []
        self._message = {"id": f"msg_{secrets.token_hex(16)}", "type": "message", "status": "in_progress"}
        self._message |= {"role": "assistant", "content": []}
        self._output.append(self._message)
        added = self.event("response.output_item.added", output_index=len(self._output) - 1, item=self._message)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._message["content"] = [part]
        return [added, self.event("response.content_part.added", **self._place(), part=part)]

    def _place(self) -> dict[str, Any]:
        assert self._message is not None
        return {"item_id": self._message["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _add_text(self, new: Event) -> list[dict[str, str]]:
        assert self._message is not None
        self._parts.append(new)
        part = self._message["content"][0]
        logprobs = chat_logprobs(token for token in new.logprobs if token.token not in self._special)
        part["text"] += new.text
        part["logprobs"] += logprobs
        return [self.event("response.output_text.delta", **self._place(), delta=new.text, logprobs=logprobs)]

    def _end_message(self, status: str) -> list[dict[str, str]]:
        if self._message is None:
            return []
        message, place = self._message, self._place()
        part = message["content"][0]
        message["status"] = status
        if any(event.kind != "text" for event in self._parts):
            message["parts"] = join_events(self._parts)
        sent = [
            self.event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]),
            self.event("response.content_part.done", **place, part=part),
            self.event("response.output_item.done", output_index=place["output_index"], item=message),
        ]
        self._message, self._parts = None, []
        return sent

    def _add_call(self, call: ToolCall) -> list[dict[str, str]]:
        item = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "status": "in_progress"}
        item |= {"call_id": call.id, "name": call.name, "arguments": ""}
        self._output.append(item)
        index = len(self._output) - 1
        place = {"item_id": item["id"], "output_index": index}
        added = self.event("response.output_item.added", output_index=index, item=item)
        item |= {"arguments": call.arguments, "status": "completed"}
        return [
            added,
            self.event("response.function_call_arguments.delta", **place, delta=call.arguments),
            self.event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments),
            self.event("response.output_item.done", output_index=index, item=item),
        ]

    def _end(self, done: Event) -> list[dict[str, str]]:
        self._usage = done.usage or Usage(self._prompt_tokens, 0)
        self._status = "incomplete" if done.finish_reason == "length" else "completed"
        # Clients look for a message, even where the model ended the answer at once.
        sent = self._begin_message() if not self._output else []
        sent += self._end_message(self._status)
        return [*sent, self.event(f"response.{self._status}", response=self.state())]


def _responses_usage(prompt_tokens: int, usage: Usage) -> dict[str, Any]:
    counted = count_usage(prompt_tokens, [usage])
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {**counted["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
    }
