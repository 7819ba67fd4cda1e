"""Continuous batching: many requests share one model; each joins and leaves the running batch at any step.

A thread per `BatchEngine` runs the model. Each of its rounds reads at most `prefill_chunk` tokens of waiting prompts
and then gives every running answer one token, so a long prompt never delays the others for long. Requests wait in the
order of arrival. An answer does not depend on which others are written beside it.

    engine = BatchEngine(model, tokenizer, precision, max_batch_size=16)
    generation = engine.submit(GenerationRequest(tokens=prompt, sampling=Sampling(max_tokens=100)))
    for event in generation.events():
        print(event.text, end="")
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nanochat.engine import check_prompt, check_sampling
from nanochat.generate.fast_decode import Weights, make_decoder
from nanochat.generate.logprobs import answer_logprob
from nanochat.generate.sampling import Sampling
from nanochat.generate.scheduler import Scheduler
from nanochat.generate.sequence import FinishReason, RowState
from nanochat.gpt import GPT
from nanochat.ops.cpu import release_workers
from nanochat.precision import Precision
from nanochat.serve.answer_events import AnswerReader, Event, StopTexts, Usage
from nanochat.tokenizer import RustBPETokenizer

# Prompt tokens read between two steps of the running answers: few enough that nobody sees them pause.
PREFILL_CHUNK = {"cpu": 128, "cuda": 1024}
RATE_WINDOW_SECONDS = 30.0  # how far back stats() looks for the speed


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt and how to continue it."""

    tokens: list[int]
    """The prompt, rendered: not empty, with room for an answer in the model's context."""
    sampling: Sampling
    """How the answer is chosen. More tokens than the context has room for are cut to it."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer where they would begin."""
    slide: bool = False
    """When the context is full: False ends the answer ("length"); True forgets the older half and goes on, so that
    the limit may be more than the context has room for."""
    prompt_logprobs: bool = False
    """Report the prompt's log-probabilities too, in a "prompt" event before all others. It is then read as a whole."""
    keep: int = 1
    """With `slide`: tokens at the start that are never forgotten (bos, a system message)."""


class QueueFull(RuntimeError):
    """Raised when too many requests wait already."""

    def __init__(self, waiting: int, retry_after_seconds: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds


class EngineClosed(RuntimeError):
    """Raised when the engine takes no more requests: it is closing or closed."""


class Generation:
    """The answer to one request while it is written; every method may be called from any thread."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        # A lock by itself, not a condition: Ctrl-C can't come between taking it and the block that gives it back.
        self._lock = threading.Lock()
        self._cancelled = False

    def events(self) -> Iterator[Event]:
        """Yield every event from the first to the last ("done" or "error"), blocking until the next arrives."""
        arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.add_listener(arrived.put)
        while True:
            event = arrived.get()
            yield event
            if event.finish_reason is not None:
                return

    def add_listener(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` for every event, those that have already happened first, in order.

        Later ones are called from the engine's thread: be quick, don't raise, and add no listener (with asyncio:
        `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`).
        """
        with self._lock:
            for event in self._events:
                callback(event)
            self._listeners.append(callback)

    def cancel(self) -> None:
        """Stop it: after the round in progress its slot is free for the next request. Does nothing when it has ended.

        The last event is "done" with finish_reason "cancelled". Takes no lock, so that signal handlers and event loops
        may call it: the engine is awake as long as anything runs or waits, and looks before every round.
        """
        self._cancelled = True

    @property
    def finished(self) -> bool:
        """True when the last event has happened."""
        return bool(self._events) and self._events[-1].finish_reason is not None

    def _emit(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            for listener in self._listeners:
                # A listener whose event loop is closed has gone: that is no reason to stop the others.
                with contextlib.suppress(Exception):
                    listener(event)


class _Job:
    """A request on its way: its sequence in the scheduler, and the reader of what that says."""

    def __init__(self, generation: Generation, row: RowState, reader: AnswerReader) -> None:
        self.generation, self.row, self.reader = generation, row, reader
        self.prompt_tokens = len(row.context)
        self.stop = StopTexts(generation.request.stop)
        self.held: list[int] = []  # tokens that have not been in an event
        self.told = 0  # tokens that have
        self.told_prompt = False
        # Whether an answer is a guess is known when it has ended: until then its events wait.
        asked = generation.request.sampling
        self.least_logprob = math.log(asked.min_answer_p) if asked.min_answer_p else None
        self.waiting: list[Event] = []

    @property
    def is_guess(self) -> bool:
        """True if the model finds what it has written less likely than was asked for."""
        if self.least_logprob is None:
            return False
        return answer_logprob((t.bytes, t.logprob) for t in self.row.logprobs) < self.least_logprob

    def take(self, new: list[tuple[int, int]]) -> None:
        """Turn new tokens into events, up to a stop text."""
        known = tuple(self.row.prompt_logprobs or ())
        if len(known) == self.prompt_tokens and not self.told_prompt:
            self.told_prompt = True
            self.generation._emit(Event("prompt", tokens=tuple(t.token for t in known), logprobs=known))
        for token, _ in new:
            # A token may make no text yet (half a character, or the beginning of a stop text): the next event has it.
            self.held.append(token)
            part = self.reader.read(token)
            if part is None:
                continue
            if part.kind != "text":
                self._flush()
                self._emit(part)
            elif text := self.stop.feed(part.text):
                self._emit(Event("text", text))
            if self.stop.found:
                self.row.finish_reason = "stop"
                return

    def end(self, reason: FinishReason) -> None:
        if reason != "error":
            self._flush()
            if self.is_guess:
                self.waiting = [Event("text", self.generation.request.sampling.unsure)]
                self.held.clear()
                reason = "stop" if reason == "length" else reason  # nothing is missing
        for event in self.waiting:
            self.generation._emit(event)
        self.least_logprob = None
        text = "" if self.row.error is None else str(self.row.error) or type(self.row.error).__name__
        usage = Usage(self.prompt_tokens, self.row.count, self.row.reused or 0)
        self._emit(Event("error" if reason == "error" else "done", text, finish_reason=reason, usage=usage))

    def _flush(self) -> None:
        if text := self.stop.flush():
            self._emit(Event("text", text))

    def _emit(self, event: Event) -> None:
        """Pass an event on, with the tokens that no event has had yet."""
        end = self.told + len(self.held)
        wanted = self.generation.request.sampling.logprobs is not None
        logprobs = tuple(self.row.logprobs[self.told : end]) if wanted else ()
        # Not dataclasses.replace, which takes twice as long, for every token of every answer.
        tokens = tuple(self.held)
        told = Event(event.kind, event.text, tokens, logprobs, event.finish_reason, event.usage)
        if self.least_logprob is None:
            self.generation._emit(told)
        else:
            self.waiting.append(told)
        self.told = end
        self.held.clear()


class BatchEngine:
    """Runs a model for many requests at once, in a background thread.

    Args:
        model: what to generate with; nobody else may change it meanwhile.
        tokenizer: its tokenizer.
        precision: how to compute; None: in the dtype of the model's weights.
        max_batch_size: requests that run together; each has its slot in the key/value cache, allocated now.
        max_queue: requests that may wait for a slot.
        prefill_chunk: the most prompt tokens read between two steps of the running answers; None: what suits the
            device.
        weights: what the weights are read as while decoding (see nanochat.generate.fast_decode).
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
        weights: Weights = "auto",
    ) -> None:
        device = model.get_device().type
        if prefill_chunk is None:
            prefill_chunk = PREFILL_CHUNK.get(device, PREFILL_CHUNK["cuda"])
        if max_batch_size < 1 or max_queue < 0 or prefill_chunk < 1:
            raise ValueError(
                "max_batch_size and prefill_chunk must be at least 1 and max_queue at least 0, "
                f"got {max_batch_size}, {prefill_chunk} and {max_queue}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        decoder = make_decoder(model, precision, weights)
        decode = decoder.refresh() if decoder is not None else None
        seq_len = self.context_length
        self._scheduler = Scheduler(model, tokenizer, precision, max_batch_size, seq_len, prefill_chunk, decode)
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._closing = self._drop = False
        self._counts = dict.fromkeys(
            ("submitted", "finished", "cancelled", "failed", "generated_tokens", "prompt_tokens", "cached_tokens"), 0
        )
        # (when, seconds, tokens, steps, answers that got some) of the last rounds
        self._rate: deque[tuple[float, float, int, int, int]] = deque()
        # OpenMP's idle threads belong to the thread that started them; from here on the model runs in another.
        release_workers()
        self._thread = threading.Thread(target=self._work, name="batch-engine", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        """The most tokens a sequence may have, prompt and answer together."""
        return self.model.config.sequence_len

    @property
    def load(self) -> int:
        """The number of requests that run or wait."""
        return len(self._running) + len(self._waiting)

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request in the queue; returns at once.

        Raises:
            ValueError: the prompt is empty or leaves no room in the context, or a setting is out of range.
            QueueFull: too many wait.
            EngineClosed: `close` was called.
        """
        generation = Generation(request)
        job = _Job(generation, self._row(request), AnswerReader(self.tokenizer))
        with self._lock:
            if self._closing:
                raise EngineClosed("the engine is closed: it takes no more requests")
            room = self.max_batch_size - len(self._running) + self.max_queue
            if len(self._waiting) >= room:
                raise QueueFull(len(self._waiting), self._retry_after())
            self._waiting.append(job)
            self._counts["submitted"] += 1
            self._changed.notify()
        return generation

    def stats(self) -> dict[str, Any]:
        """Counters, JSON-ready: running, waiting, max_batch_size, max_queue, submitted, finished, cancelled, failed,
        generated_tokens, prompt_tokens, cached_tokens, device, and tokens_per_second while answers ran lately or None.
        """
        with self._lock:
            speed = self._speed()
            return {
                "running": len(self._running),
                "waiting": len(self._waiting),
                "max_batch_size": self.max_batch_size,
                "max_queue": self.max_queue,
                **self._counts,
                "device": str(self.model.get_device()),
                "tokens_per_second": None if speed is None else round(speed, 1),
            }

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests; with `drain` finish those running and waiting, else cancel them; stop the thread.

        After `timeout` seconds of draining the rest is cancelled.
        """
        with self._lock:
            self._closing = True
            self._drop = self._drop or not drain
            self._changed.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout if drain else None)
        if self._thread.is_alive():
            self.close(drain=False)

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(drain=False)

    def _row(self, request: GenerationRequest) -> RowState:
        # A prompt that is only to be judged may fill the context.
        only_read = request.prompt_logprobs and request.sampling.max_tokens == 0
        check_prompt(self.model, request.tokens, room=0 if only_read else 1)
        if not 0 <= request.keep <= self.context_length // 2:
            raise ValueError(f"keep must be 0 to half the context ({self.context_length // 2}), got {request.keep}")
        if any(not stop for stop in request.stop):
            raise ValueError("a stop text must not be empty")
        room, sampling = self.context_length - len(request.tokens), request.sampling
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        if not request.slide:
            limit = min(room, limit)
        elif request.prompt_logprobs:
            raise ValueError("prompt_logprobs and slide exclude each other: the prompt must stay as it is")
        check_sampling(self.model, sampling, limit)
        keep = request.keep if request.slide else None
        row = RowState(request.tokens, limit, sampling, sampling.seed, keep, request.prompt_logprobs)
        if sampling.min_answer_p and not sampling.unsure:
            raise ValueError("min_answer_p needs `unsure`, what is said instead of a guess")
        if sampling.min_answer_p and row.top_logprobs is None:
            row.top_logprobs = 0  # how likely the answer is
        row.by_step = bool(request.stop)  # nothing is written, nor counted, behind a stop text
        return row

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """The thread: rounds, as long as there is work."""
        while True:
            cancelled, running = self._prepare()
            for job in cancelled:
                self._end(job, "cancelled")
            if running:
                start = time.perf_counter()
                self._round(start)
            elif not cancelled:
                return

    def _prepare(self) -> tuple[list[_Job], bool]:
        """Wait for something to do, take out what was cancelled, fill the free slots.

        Returns:
            (what was cancelled, whether anything runs); nothing at all when the engine is closed and through.
        """
        with self._lock:
            while True:
                cancelled = [job for job in [*self._running, *self._waiting] if self._drop or job.generation._cancelled]
                for job in cancelled:
                    self._scheduler.remove(job.row)
                if cancelled:
                    self._running = [job for job in self._running if job not in cancelled]
                    self._waiting = deque(job for job in self._waiting if job not in cancelled)
                while self._waiting and len(self._running) < self.max_batch_size:
                    self._running.append(self._waiting.popleft())
                    self._scheduler.add(self._running[-1].row)
                if cancelled or self._running or self._closing:
                    return cancelled, bool(self._running)
                self._changed.wait()

    def _round(self, start: float) -> None:
        """Take one step of all running answers; it began at `start`. Counted before its events are sent."""
        jobs = {id(job.row): job for job in self._running}
        try:
            step = self._scheduler.step()
        except Exception as error:  # not of one sequence: all that run have failed, but those that wait may succeed
            step = [(job.row, []) for job in self._running]
            for row, _ in step:
                row.finish_reason, row.error = "error", error
                self._scheduler.remove(row)
        # A forced token (mask 0) comes along with a chosen one, without a step of its own.
        chosen = [sum(mask for _, mask in new) for _, new in step]
        self._measure(time.perf_counter() - start, sum(len(new) for _, new in step), max([1, *chosen]), len(step))
        for row, new in step:
            job = jobs[id(row)]
            try:
                job.take(new)
            except Exception as error:
                row.finish_reason, row.error = "error", error
            if row.finish_reason is not None:
                self._scheduler.remove(row)
                with self._lock:
                    self._running.remove(job)
                self._end(job, row.finish_reason)

    def _end(self, job: _Job, reason: FinishReason) -> None:
        count = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        with self._lock:
            self._counts[count] += 1
            if job.row.reused is not None:
                self._counts["prompt_tokens"] += job.prompt_tokens
                self._counts["cached_tokens"] += job.row.reused
        job.end(reason)

    # --- estimates ----------------------------------------------------------------------------------------------------

    def _measure(self, seconds: float, tokens: int, steps: int, answers: int) -> None:
        now = time.perf_counter()
        with self._lock:
            self._counts["generated_tokens"] += tokens
            self._rate.append((now, seconds, tokens, steps, answers))
            while self._rate[0][0] < now - RATE_WINDOW_SECONDS:
                self._rate.popleft()

    def _speed(self) -> float | None:
        """Tokens per second over the last rounds."""
        seconds = sum(s for _, s, *_ in self._rate)
        return sum(n for _, _, n, *_ in self._rate) / seconds if seconds > 0 else None

    def _retry_after(self) -> int:
        """Seconds until a place in the queue should be free: when the first running answer ends at the latest."""
        # A step takes longer the more places are taken, but not in proportion: only the fullest ones say how long now.
        most = max((answers for *_, answers in self._rate), default=0)
        full = [seconds / steps for _, seconds, _, steps, answers in self._rate if answers >= 0.75 * most]
        if not most or not self._running:
            return 1
        left = min(job.row.limit - job.row.count for job in self._running)
        return max(1, min(60, math.ceil(left * sum(full) / len(full))))
