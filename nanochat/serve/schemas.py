"""The bodies of requests to the chat server, their limits, and the shape of its errors."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from nanochat.generate.sampling import Sampling

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8000
MAX_CONVERSATION_CHARS = 32000
MAX_TOKENS = 4096
MAX_CHOICES = 8  # answers or prompts of one request: each takes a slot in the batch
# The longest allowed conversation with every character written as \uXXXX\uXXXX, and its braces.
MAX_BODY_BYTES = 12 * MAX_CONVERSATION_CHARS + 100 * MAX_MESSAGES

StopText = Annotated[str, Field(min_length=1, max_length=100)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_CONVERSATION_CHARS)
]
# OpenAI's clients may write an option that is not set as null.
NullIsFalse = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
NullIsOne = Annotated[int, BeforeValidator(lambda value: 1 if value is None else value)]
PromptText = Annotated[str, Field(max_length=MAX_CONVERSATION_CHARS)]


class MessagePart(BaseModel):
    """A piece of a message: text, or (in an answer) an expression for the calculator or its result."""

    type: Literal["text", "python", "python_output"]
    text: str = Field(max_length=MAX_MESSAGE_CHARS)


class ChatMessage(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)] | Annotated[list[MessagePart], Field(max_length=200)]

    @property
    def chars(self) -> int:
        """The number of characters."""
        return len(self.content) if isinstance(self.content, str) else sum(len(part.text) for part in self.content)

    @model_validator(mode="after")
    def _check_parts(self) -> ChatMessage:
        if self.chars > MAX_MESSAGE_CHARS:
            raise ValueError(f"a message may have {MAX_MESSAGE_CHARS} characters, this one has {self.chars}")
        parts = [] if self.role == "assistant" or isinstance(self.content, str) else self.content
        if any(part.type != "text" for part in parts):
            raise ValueError("only an assistant's message may have parts other than text")
        return self

    def to_message(self) -> dict[str, Any]:
        """The message in the form of nanochat.messages."""
        if isinstance(self.content, str):
            content: Any = self.content
        elif self.role == "assistant":
            content = [part.model_dump() for part in self.content]
        else:
            content = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class SamplingFields(BaseModel):
    """How tokens are chosen, within what a server allows; fields left out take the server's defaults."""

    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_k: int | None = Field(None, ge=0, le=200)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, ge=0.01, le=2.0)  # logits divided by less could overflow
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def over(self, defaults: Sampling) -> Sampling:
        """The defaults, overridden by what this request says."""
        # What `unsupported` refuses never gets here, but may be null, 0 or empty.
        knobs = {field.name for field in dataclasses.fields(Sampling)} - {"logit_bias", "logprobs"}
        return dataclasses.replace(defaults, **self.model_dump(include=knobs, exclude_none=True))


class ChatRequest(SamplingFields):
    """POST /chat/completions: messages, always answered as a stream of events."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)

    @model_validator(mode="after")
    def _check_total(self) -> ChatRequest:
        total = sum(message.chars for message in self.messages)
        if total > MAX_CONVERSATION_CHARS:
            raise ValueError(f"the conversation has {total} characters, the limit is {MAX_CONVERSATION_CHARS}")
        return self


class StreamOptions(BaseModel):
    """Extras of a stream."""

    include_usage: NullIsFalse = False


class OpenAIRequest(SamplingFields):
    """The fields that both kinds of completions share.

    Fields that would change the answer and that this server does not know are refused unless they ask for nothing;
    others (`user`, `metadata`, ...) are ignored.
    """

    model: str | None = Field(None, max_length=200)
    stream: NullIsFalse = False
    stream_options: StreamOptions | None = None
    n: NullIsOne = Field(1, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    logprobs: bool | int | None = None

    def unsupported(self) -> str | None:
        """The name of a field that asks for something this server can't do."""
        asked = ("presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "tools", "functions", "suffix")
        return next((name for name in asked if getattr(self, name, None)), None)


class OpenAIChatRequest(OpenAIRequest, ChatRequest):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    truncation: Literal["disabled", "auto"] = "disabled"
    """Of a conversation that is longer than the model's context: refuse it, or forget its oldest messages."""

    @model_validator(mode="after")
    def _take_new_name(self) -> OpenAIChatRequest:
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    def unsupported(self) -> str | None:
        """The name of a field that asks for something this server can't do."""
        if self.response_format is not None and self.response_format.get("type") != "text":
            return "response_format"
        return super().unsupported()


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions: goes on with a text, or with token ids."""

    prompt: (
        PromptText
        | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_CHOICES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    echo: NullIsFalse = False
    suffix: str | None = None
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @model_validator(mode="after")
    def _check_total(self) -> CompletionRequest:
        if len(self.prompts) * self.n > MAX_CHOICES:
            raise ValueError(f"{len(self.prompts)} prompts with n={self.n} are more than {MAX_CHOICES} answers")
        if sum(map(len, self.prompts)) > MAX_CONVERSATION_CHARS:
            raise ValueError(f"the prompts together are longer than {MAX_CONVERSATION_CHARS}")
        return self

    def unsupported(self) -> str | None:
        """The name of a field that asks for something this server can't do."""
        if self.best_of not in (None, self.n):
            return "best_of"
        return super().unsupported()
