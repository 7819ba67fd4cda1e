"""The bodies of requests to the chat server: what each field means, and the limits.

Numbers mean what clients of OpenAI, llama.cpp and vLLM mean by them: -1 or null is "not set", more than the model has
is all it has.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nanochat.generate.sampling import Sampling

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8000
MAX_CONVERSATION_CHARS = 32000
MAX_TOKENS = 4096  # what the page offers; a request may ask for more and gets what the context has room for
MAX_ANSWERS = 1024  # prompts of one request times answers of each; they take their turns
MAX_STOPS = 100
MAX_REGEX = 5000  # characters
NO_END = 2**31  # tokens before an answer may end: more than any context has
MAX_BODY_BYTES = 4 * 2**20  # 256 prompts of 2048 tokens, written as numbers

# OpenAI's clients may write an option that is not set as null.
NullIsFalse = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
NullIsOne = Annotated[int, BeforeValidator(lambda value: 1 if value is None else value)]
Text = Annotated[str, Field(max_length=MAX_BODY_BYTES)]
StopText = Annotated[str, Field(max_length=1000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=MAX_BODY_BYTES)]
# -1: as many as the context has room for.
TokenLimit = Annotated[int, Field(ge=-1)] | None
# Logits are divided by it: less could overflow.
Penalty = Annotated[float, Field(ge=0.01, le=10.0)] | None


class SamplingFields(BaseModel):
    """How tokens are chosen; fields left out take the server's defaults."""

    # Fields that are not declared are kept: `nanochat.serve.other_fields` says what becomes of them.
    model_config = ConfigDict(extra="allow")

    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, ge=0.0, le=1.0)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: Penalty = None
    repeat_penalty: Penalty = None
    presence_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(None, ge=-2.0, le=2.0)
    logit_bias: dict[str, float] | list[tuple[int, float | bool]] | None = None
    max_tokens: TokenLimit = None
    max_completion_tokens: TokenLimit = None
    n_predict: TokenLimit = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: NullIsFalse = False

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)

    @property
    def limit(self) -> int | None:
        """The most tokens asked for, by the newest of its names; None: not said; -1: as many as there is room for."""
        return next((n for n in (self.max_completion_tokens, self.max_tokens, self.n_predict) if n is not None), None)

    @property
    def top_logprobs_asked(self) -> int | None:
        """How many alternatives of each token to tell, beside its log probability; None: nothing about it."""
        return None

    def biases(self) -> dict[int, float]:
        """What `logit_bias` adds to the logits, by token.

        Raises:
            ValueError: a key is no token id, or a value is out of range.
        """
        if not self.logit_bias:
            return {}
        items = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        biases: dict[int, float] = {}
        for key, value in items:
            if not str(key).isdecimal():
                raise ValueError(f"the keys of logit_bias must be token ids, got {str(key)[:40]!r}")
            biases[int(key)] = -100.0 if value is False else float(value)  # false: never, as llama.cpp has it
        if any(not -100.0 <= value <= 100.0 for value in biases.values()):
            raise ValueError("the values of logit_bias must be between -100 and 100")
        return biases

    def over(self, defaults: Sampling) -> Sampling:
        """The defaults, overridden by what this request says."""
        said: dict[str, Any] = {}
        for field in dataclasses.fields(Sampling):
            # Declared ones only: of a request's other fields nobody has checked the type.
            value = getattr(self, field.name) if field.name in type(self).model_fields else None
            if value is not None and field.name not in ("logit_bias", "logprobs"):
                said[field.name] = value
        if self.repetition_penalty is None and self.repeat_penalty is not None:
            said["repetition_penalty"] = self.repeat_penalty
        said["top_k"] = max(0, self.top_k) if self.top_k is not None else defaults.top_k
        if self.top_p == 0.0:  # no share of the probability: the likeliest alone, as llama.cpp does it
            said |= {"temperature": 0.0, "top_p": None}
        if self.seed == -1:
            said.pop("seed")
        limit = self.limit
        said["max_tokens"] = defaults.max_tokens if limit is None else None if limit == -1 else limit
        if self.ignore_eos:
            said["min_tokens"] = limit if limit is not None and limit > 0 else NO_END
        return dataclasses.replace(
            defaults,
            **said,
            logit_bias=tuple(self.biases().items()),
            stop_tokens=tuple(self.stop_token_ids or ()),
            logprobs=self.top_logprobs_asked,
        )


class ChatFields(SamplingFields):
    """Fields of whatever asks with messages."""

    messages: list[dict[str, Any]] = Field(min_length=1)

    @property
    def chars(self) -> list[int]:
        """The number of characters in each message's text."""
        return [_count_chars(message.get("content")) for message in self.messages]


def _count_chars(content: Any) -> int:
    if isinstance(content, list):
        return sum(_count_chars(part.get("text")) for part in content if isinstance(part, dict))
    return len(content) if isinstance(content, str) else 0


class ChatRequest(ChatFields):
    """POST /chat/completions by nanochat's page: messages, always answered as a stream of events."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    logprobs: int | None = Field(None, ge=0, le=20)
    """Tell of each token its log probability and this many alternatives."""

    @property
    def top_logprobs_asked(self) -> int | None:
        """See `logprobs`."""
        return self.logprobs

    @model_validator(mode="after")
    def _check_chars(self) -> ChatRequest:
        chars = self.chars
        if max(chars) > MAX_MESSAGE_CHARS:
            raise ValueError(f"a message may have {MAX_MESSAGE_CHARS} characters, one has {max(chars)}")
        if sum(chars) > MAX_CONVERSATION_CHARS:
            raise ValueError(f"the conversation has {sum(chars)} characters, the limit is {MAX_CONVERSATION_CHARS}")
        return self


class StreamOptions(BaseModel):
    """Extras of a stream."""

    include_usage: NullIsFalse = False


class OpenAIRequest(SamplingFields):
    """The fields that both kinds of completions share."""

    model: Annotated[str, Field(max_length=500)] | None = None
    stream: NullIsFalse = False
    stream_options: StreamOptions | None = None
    n: NullIsOne = Field(1, ge=1, le=128)
    response_format: dict[str, Any] | None = None
    json_schema: dict[str, Any] | bool | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_choice: list[str] | None = None
    guided_regex: Annotated[str, Field(max_length=MAX_REGEX)] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def format(self) -> tuple[dict[str, Any] | None, str]:
        """(what the answer must be, the name of the field that says so)."""
        return self.response_format, "response_format"


class OpenAIChatRequest(OpenAIRequest, ChatFields):
    """POST /v1/chat/completions."""

    logprobs: NullIsFalse = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    continue_final_message: bool | None = None
    """Of an assistant's message that stands last: go on with it (the default), or begin another (false)."""
    add_generation_prompt: bool | None = None
    truncation: Literal["disabled", "auto"] | None = None
    """Of a conversation that is longer than the model's context: refuse it, or forget its oldest messages."""

    @property
    def top_logprobs_asked(self) -> int | None:
        """See `top_logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions: goes on with a text, or with token ids."""

    prompt: (
        Text | Annotated[list[Text], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    )
    echo: NullIsFalse = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
    """Begin a text with bos, as every text of the training began; null: yes."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def top_logprobs_asked(self) -> int | None:
        """See `logprobs`; true is 1, false is not set."""
        return None if self.logprobs is False or self.logprobs is None else int(self.logprobs)

    @model_validator(mode="after")
    def _check_total(self) -> CompletionRequest:
        if len(self.prompts) * self.n > MAX_ANSWERS:
            raise ValueError(f"{len(self.prompts)} prompts with n={self.n} are more than {MAX_ANSWERS} answers")
        return self
