"""Continuous batching: many requests share one model, each joins and leaves the running batch when it likes.

A thread per `BatchEngine` runs the model. Each of its rounds reads at most `prefill_chunk` tokens of waiting prompts
and then gives every running answer one token, so a long prompt never holds up the others for long. Requests wait in
the order they came. What a request gets does not depend on which others run beside it.

    engine = BatchEngine(model, tokenizer, precision, max_batch_size=16)
    generation = engine.submit(GenerationRequest(tokens=prompt, max_tokens=100))
    for event in generation.events():
        print(event.text, end="")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.gpt import GPT
from nanochat.precision import Precision
from nanochat.tokenizer import RustBPETokenizer

EventKind = Literal["text", "python", "python_output", "done", "error"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to write and how."""

    tokens: list[int]
    """The prompt, rendered: not empty, with room for an answer in the model's context."""
    max_tokens: int
    """The most new tokens, those of tool results included. More than the context has room for is cut to it."""
    temperature: float = 1.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    top_k: int | None = None
    """Sample among the k likeliest only; None or 0: among all."""
    top_p: float | None = None
    """Sample among the likeliest that together reach this probability, in (0, 1]; None: among all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred already less likely. Source: CTRL, arXiv 1909.05858."""
    seed: int = 42
    """Of this request's own random numbers."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer where they would begin."""
    slide: bool = False
    """When the context is full: False ends the answer ("length"); True forgets the oldest half, except `keep` tokens."""
    keep: int = 1
    """With `slide`: tokens at the start that are never forgotten (bos, a system message)."""


@dataclass(frozen=True)
class Usage:
    """What a generation cost so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt: found in the cache, not computed again


@dataclass(frozen=True)
class Event:
    """One thing that happened to a generation.

    Every generation ends with exactly one "done" or "error" event and none after it.
    """

    kind: EventKind
    """"text": a piece of the answer. "python": a whole expression sent to the calculator; "python_output": its whole
    result. "done": the answer is complete. "error": it failed, `text` says why."""
    text: str = ""
    """Whole characters only, never a special token."""
    tokens: tuple[int, ...] = ()
    """The new tokens since the last event, special and forced ones included."""
    finish_reason: FinishReason | None = None
    """Of the last event: "stop" (the model ended it, or a stop text), "length", "cancelled" or "error"."""
    usage: Usage | None = None
    """Of the last event."""


class QueueFull(RuntimeError):
    """Too many requests wait already."""

    def __init__(self, waiting: int, retry_after_seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class EngineClosed(RuntimeError):
    """The engine takes no more requests (it is closing or closed)."""


class Generation:
    """The answer to one request while it is written; every method may be called from any thread."""

    request: GenerationRequest

    def events(self) -> Iterator[Event]:
        """Every event from the first on, waiting for the next, up to the last ("done" or "error"); for threads."""
        raise NotImplementedError

    def add_listener(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` for every event, those that have already happened first, in order.

        Later ones are called from the engine's thread: be quick and don't raise (with asyncio:
        `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`).
        """
        raise NotImplementedError

    def cancel(self) -> None:
        """Stop it; its slot is free for the next request after the round in progress. Harmless when it is over.

        The last event is "done" with finish_reason "cancelled".
        """
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        """Whether the last event has happened."""
        raise NotImplementedError


class BatchEngine:
    """Runs a model for many requests at once, in a background thread.

    Args:
        model: what to generate with; nobody else may change it meanwhile.
        tokenizer: its tokenizer.
        precision: how to compute; None: in the dtype of the model's weights.
        max_batch_size: requests that run together; each has its slot in the key/value cache, allocated now.
        max_queue: requests that may wait for a slot.
        prefill_chunk: the most prompt tokens read between two steps of the running answers; None: what suits the device.
        weights: see nanochat.fast_decode.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: RustBPETokenizer,
        precision: Precision | None = None,
        *,
        max_batch_size: int = 16,
        max_queue: int = 64,
        prefill_chunk: int | None = None,
        weights: str = "auto",
    ) -> None:
        raise NotImplementedError

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""
        raise NotImplementedError

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request in the queue; returns at once.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context, or a setting is out of range.
            QueueFull: too many wait.
            EngineClosed: `close` was called.
        """
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """Counters, JSON-ready: running, waiting, max_batch_size, max_queue, submitted, finished, cancelled, failed,
        generated_tokens, prompt_tokens, cached_tokens, tokens_per_second (while answers ran), device."""
        raise NotImplementedError

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; with `drain` finish those running and waiting, else cancel them; stop the thread.

        After `timeout` seconds of draining the rest is cancelled.
        """
        raise NotImplementedError
