"""The loop that generates: sequences join, read their prompt in chunks, get a token per step, call the tool, and leave.

Every sequence has a slot: a row of one key/value cache that is allocated once. A sequence is ready when its slot holds
the keys of all its tokens but the last, and all ready ones take a decode step together. One that has more to read (a
prompt, a tool's result, what remains after forgetting) first reads a chunk of it by itself. A slot's content stays when
its sequence has left, and a new one whose tokens begin alike continues from there: samples of one prompt read it once,
and a conversation goes on where it stopped.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from nanochat.generate.calculator import use_calculator
from nanochat.generate.kv_cache import KVCache
from nanochat.generate.sampling import NOT_FINITE, Sampling, penalize, sample
from nanochat.gpt import GPT
from nanochat.precision import Precision

FinishReason = Literal["stop", "length", "cancelled", "error"]
NewTokens = list[tuple[int, int]]  # (token, mask): 1 where the model chose it, 0 where it was forced
Forward = Callable[[Tensor, KVCache], Tensor]  # a token per sequence (B, 1) and the cache -> logits (B, V)


class Tokenizer(Protocol):
    """The part of a tokenizer that generation uses (nanochat.tokenizer.RustBPETokenizer)."""

    def encode(self, text: str) -> Any:
        """The ids of an ordinary text."""

    def decode(self, ids: Any) -> str:
        """The text of ids."""

    def encode_special(self, name: str) -> int:
        """The id of a special token."""

    def get_bos_token_id(self) -> int:
        """The id that starts every document."""


class RowState:
    """A sequence that is being written.

    Args:
        tokens: the prompt.
        limit: the most new tokens.
        sampling: how they are chosen; its seed and limit don't count here.
        seed: of this sequence's random numbers.
        keep: None: the sequence ends when the context is full. Otherwise it then forgets the older half of it, except
            this many tokens at the start.
    """

    def __init__(
        self, tokens: list[int], limit: int, sampling: Sampling, seed: int | str, keep: int | None = None
    ) -> None:
        self.context = list(tokens)  # what the model sees, the new tokens included
        self.limit, self.keep = limit, keep
        # A generator of its own: with a shared one, what a sequence draws would depend on how many others draw beside
        # it, and a request with a seed would be answered differently on a busy server.
        self.random = random.Random(seed)
        # What sequences must have in common to be sampled in one call; seed and limit are each one's own.
        self.sampling = dataclasses.replace(sampling, seed=0, max_tokens=None)
        # The repetition penalty asks for every token so far, also for those that a sliding context has forgotten.
        self.seen = set(tokens) if sampling.repetition_penalty != 1.0 else None
        self.count = 0  # new tokens
        self.reused: int | None = None  # prompt tokens found in the cache; None: nothing was read yet
        self.expression: list[int] | None = None  # tokens since python_start; None: outside
        self.finish_reason: FinishReason | None = "length" if limit <= 0 else None
        self.error: Exception | None = None


class ToolMachine:
    """Takes in what was sampled: watches for the end, and answers what stands between python_start and python_end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        special = tokenizer.encode_special
        # bos ends an answer too: a model that begins another document has nothing more to say in this one.
        self.stop_tokens = {special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
        self._python_start, self._python_end = special("<|python_start|>"), special("<|python_end|>")
        self._output_start, self._output_end = special("<|output_start|>"), special("<|output_end|>")

    def accept(self, row: RowState, token: int) -> NewTokens:
        """The sequence's new (token, mask): the sampled one, mask 1, then what it forces, mask 0."""
        new = [(token, 1)]
        if token in self.stop_tokens:
            row.finish_reason = "stop"
        elif token == self._python_start:
            row.expression = []
        elif token == self._python_end and row.expression is not None:
            result = use_calculator(self.tokenizer.decode(row.expression))
            row.expression = None
            # The result is forced: the calculator's tokens are appended as if the model had said them, so that it never
            # gets to make a result up. Mask 0 tells training (RL) that they were not its choice. An expression that the
            # calculator doesn't know gets no result, and the model goes on by itself, as in nanochat.
            if result is not None:
                forced = [self._output_start, *self.tokenizer.encode(result), self._output_end]
                new += [(t, 0) for t in forced]
        elif row.expression is not None:
            row.expression.append(token)
        new = new[: row.limit - row.count]  # forced tokens count: they take room in the context like any other
        row.count += len(new)
        row.context += [t for t, _ in new]
        if row.seen is not None:
            row.seen.update(t for t, _ in new)
        if row.count >= row.limit and row.finish_reason is None:
            row.finish_reason = "length"
        return new


class _Slot:
    """A row of the cache: the sequence it belongs to, and the tokens whose keys and values it holds."""

    def __init__(self) -> None:
        self.row: RowState | None = None
        self.tokens: list[int] = []  # stays when the sequence leaves: a later one may begin alike
        self.used_at = 0  # the scheduler's clock when a sequence last came or left

    def unread(self) -> int:
        """How many tokens of the sequence have no keys yet; 0 without one."""
        return len(self.row.context) - len(self.tokens) if self.row is not None else 0

    def is_ready(self) -> bool:
        """Whether only the last token of the sequence, still running, has no keys."""
        row = self.row
        # Before the first read (`reused` is None) the slot holds the tokens of whoever had it last.
        return row is not None and row.finish_reason is None and row.reused is not None and self.unread() == 1


class Scheduler:
    """Runs sequences through a model.

    Args:
        model: what to generate with.
        tokenizer: its tokenizer.
        precision: how to compute; None: in the dtype of the model's weights.
        slots: sequences that can run together.
        seq_len: positions of each slot; at most the model's context.
        prefill_chunk: tokens read between two decode steps, at most.
        decode: a faster way to run one token per sequence than the model itself; gives the same logits.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        precision: Precision | None,
        slots: int,
        seq_len: int,
        prefill_chunk: int,
        decode: Forward | None = None,
    ) -> None:
        self.model, self.precision, self.prefill_chunk = model, precision, prefill_chunk
        self.tools = ToolMachine(tokenizer)
        self.decode = decode or self._decode_by_model
        dtype = precision.dtype if precision is not None else model.lm_head.weight.dtype
        self.cache = KVCache.for_model(model, slots, seq_len, dtype)
        self._slots = [_Slot() for _ in range(slots)]
        self._clock = 0

    @property
    def rows(self) -> list[RowState]:
        """The sequences that have a slot."""
        return [slot.row for slot in self._slots if slot.row is not None]

    @property
    def free(self) -> int:
        """How many more sequences can be added."""
        return sum(slot.row is None for slot in self._slots)

    def add(self, row: RowState) -> None:
        """Give a sequence a slot: the one whose content helps it most, else the one that was left longest ago."""
        free = [slot for slot in self._slots if slot.row is None]
        if not free:
            raise RuntimeError(f"all {len(self._slots)} slots are taken")
        slot = max(free, key=lambda s: (_worth_keeping(s.tokens, row.context), -s.used_at))
        self._clock += 1
        slot.row, slot.used_at = row, self._clock

    def remove(self, row: RowState) -> None:
        """Free a sequence's slot. No memory is returned: the cache stays, and its content until the place is needed."""
        for slot in self._slots:
            if slot.row is row:
                self._clock += 1
                slot.row, slot.used_at = None, self._clock

    @torch.inference_mode()
    def step(self) -> list[tuple[RowState, NewTokens]]:
        """Read some, then give every ready sequence a token. Those that end leave.

        Returns:
            (sequence, new tokens) of each that got some or ended; one that ended has a finish_reason.
        """
        try:
            return self._step()
        except Exception:
            for slot in self._slots:  # rows may have been half exchanged: what the cache holds isn't known any more
                slot.tokens = []
            raise

    def _step(self) -> list[tuple[RowState, NewTokens]]:
        # Prefill, then decode. Reading runs many tokens of one sequence at once (matrix products, limited by
        # arithmetic); decoding runs one token of many sequences at once (limited by reading the weights, which all
        # share). One pass for both would pad every sequence to the longest chunk. The chunk is what a running answer
        # has to wait for between two of its tokens.
        logits: list[Tensor] = []
        rows = self._read(logits)
        rows += self._decode_ready(rows, logits)
        new: dict[int, NewTokens] = {}
        if logits:
            together = logits[0] if len(logits) == 1 else torch.cat(logits)  # (B, V)
            for row, token in zip(rows, self._choose(rows, together), strict=True):
                new[id(row)] = self._accept(row, token)
        result = [(row, new.get(id(row), [])) for row in self.rows if id(row) in new or row.finish_reason]
        for row, _ in result:
            if row.finish_reason:
                self.remove(row)
        return result

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, logits: list[Tensor]) -> list[RowState]:
        """Let sequences read, first come first served, within the budget; add the logits (1, V) of those through.

        Returns:
            The sequences that are through.
        """
        budget, through = self.prefill_chunk, []
        for index, slot in sorted(enumerate(self._slots), key=lambda item: item[1].used_at):
            row = slot.row
            if row is None or row.finish_reason is not None:
                continue
            try:
                self._make_room(index, row)
                if row.reused is None:
                    if budget <= 0:
                        continue  # its turn has not come: more of its beginning may have been read by then
                    self._reuse(index, row)
                if budget > 0 and slot.unread() > 1:
                    count = min(budget, slot.unread())
                    budget -= count
                    last = self._read_chunk(index, slot, row.context[len(slot.tokens) :][:count])
                    if last is not None:
                        logits.append(last)
                        through.append(row)
            except Exception as error:
                # One bad sequence (a poisoned prompt, a full card) ends alone; the others never hear of it.
                self._invalidate(index, row, error)
        return through

    def _make_room(self, index: int, row: RowState) -> None:
        """When the context is full: forget the older half of what comes after the tokens to keep."""
        if len(row.context) <= self.cache.max_seq_len or row.keep is None:
            return
        # Half of it, not one token: keys know their position (rotary embedding), so what is kept of the newer tokens
        # must be read anew at its new place. This way that happens once per half a context, not at every token.
        recent = max(1, (self.cache.max_seq_len - row.keep) // 2)
        row.context = row.context[: row.keep] + row.context[-recent:]
        self._rewind(index, index, row.keep)

    def _reuse(self, index: int, row: RowState) -> None:
        """Start from the slot whose content has the longest beginning in common with the sequence's tokens."""
        # Any slot may serve, also that of a sequence still running: a key depends on the tokens before it only. Between
        # equals its own slot comes first, which copies nothing.
        shared, source = max(
            ((_common(slot.tokens, row.context), i) for i, slot in enumerate(self._slots)),
            key=lambda item: (item[0], item[1] == index),
        )
        row.reused = min(shared, len(row.context) - 1)  # the last token must run: its logits are wanted
        self._rewind(source, index, row.reused)

    def _rewind(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` tokens of slot `source`."""
        self._slots[target].tokens = self._slots[source].tokens[:length]
        self.cache.copy(source, target, length)

    def _read_chunk(self, index: int, slot: _Slot, tokens: list[int]) -> Tensor | None:
        """Run tokens of one sequence; return the logits (1, V) of what follows if they were its last."""
        self._select(index, index + 1)
        idx = torch.tensor([tokens], device=self.model.get_device())  # (1, T)
        with self._autocast():
            x = self.model.hidden(idx, kv_cache=self.cache)  # (1, T, C)
            # lm_head for the last position only: logits of a whole prompt would be T × V numbers that nobody asks for.
            last = self.model.logits_at(x[:, -1]) if len(tokens) == slot.unread() else None
        slot.tokens += tokens  # after the pass: had it failed, the slot would hold no keys for them
        return last

    # --- decoding -----------------------------------------------------------------------------------------------------

    def _decode_ready(self, through: list[RowState], logits: list[Tensor]) -> list[RowState]:
        """Run the last token of every ready sequence; add the logits (B, V) and return the sequences."""
        skip = {id(row) for row in through}  # these have logits already, from the last token of their prompt
        ready = [slot.is_ready() and id(slot.row) not in skip for slot in self._slots]
        count = self._gather(ready)
        try:
            if count:
                logits.append(self._decode_rows(0, count))
            return self._rows_of(0, count)
        except Exception:
            # Something failed for all (out of memory?): find out whose fault it is, one sequence at a time.
            rows = []
            for index, row in enumerate(self._rows_of(0, count)):
                try:
                    logits.append(self._decode_rows(index, index + 1))
                    rows.append(row)
                except Exception as error:
                    self._invalidate(index, row, error)
            return rows

    def _decode_rows(self, start: int, stop: int) -> Tensor:
        self._select(start, stop)
        last = [row.context[-1] for row in self._rows_of(start, stop)]
        idx = torch.tensor(last, device=self.model.get_device()).unsqueeze(1)  # (B, 1)
        logits = self.decode(idx, self.cache)  # (B, V)
        for slot, token in zip(self._slots[start:stop], last, strict=True):
            slot.tokens.append(token)
        return logits

    def _rows_of(self, start: int, stop: int) -> list[RowState]:
        return [slot.row for slot in self._slots[start:stop] if slot.row is not None]

    def _select(self, start: int, stop: int) -> None:
        """Run on these slots next; the slots' tokens say how long each is, also after a pass that failed halfway."""
        self.cache.select(start, stop)
        self.cache.set_lengths([len(slot.tokens) for slot in self._slots[start:stop]])

    def _decode_by_model(self, idx: Tensor, cache: KVCache) -> Tensor:
        with self._autocast():
            logits: Tensor = self.model(idx, kv_cache=cache)  # (B, 1, V)
            return logits[:, -1]

    def _gather(self, chosen: list[bool]) -> int:
        """Move the chosen slots to the front; return how many they are."""
        # A pass runs on neighbouring rows of the cache, as a view. Only as many rows are exchanged as stand in the
        # wrong place, which between two steps is rarely more than one.
        count = sum(chosen)
        strays = (i for i in range(count, len(chosen)) if chosen[i])
        for gap in (i for i in range(count) if not chosen[i]):
            stray = next(strays)
            self.cache.swap(gap, stray)
            self._slots[gap], self._slots[stray] = self._slots[stray], self._slots[gap]
        return count

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _choose(self, rows: list[RowState], logits: Tensor) -> list[int]:
        """A token for each sequence from its logits (B, V); those with the same settings are sampled together."""
        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.sampling, []).append(i)
        tokens = [NOT_FINITE] * len(rows)
        for settings, members in groups.items():
            part = logits if len(groups) == 1 else logits[torch.tensor(members, device=logits.device)]  # (n, V)
            if settings.repetition_penalty != 1.0:
                part = penalize(part, [rows[i].seen or () for i in members], settings.repetition_penalty)
            uniform = None
            if not settings.greedy:  # a greedy sequence draws nothing
                uniform = torch.tensor([rows[i].random.random() for i in members], device=logits.device)  # (n,)
            chosen: list[int] = sample(part, settings, uniform).tolist()  # here the CPU waits for the card
            for i, token in zip(members, chosen, strict=True):
                tokens[i] = token
        return tokens

    def _accept(self, row: RowState, token: int) -> NewTokens:
        """The sequence's new tokens with their masks; an error is its own."""
        try:
            if token == NOT_FINITE:
                raise RuntimeError("the model's output is not a number (try --dtype float32)")
            return self.tools.accept(row, token)
        except Exception as error:
            self._invalidate(next(i for i, slot in enumerate(self._slots) if slot.row is row), row, error)
            return []

    def _invalidate(self, index: int, row: RowState, error: Exception) -> None:
        """End a sequence with an error, and discard what its slot holds: nobody may continue from it."""
        row.finish_reason, row.error = "error", error
        self._slots[index].tokens = []
        self.cache.wipe(index)  # NaN would survive: a masked position is multiplied by 0, and 0 · NaN is NaN

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.precision.autocast() if self.precision is not None else contextlib.nullcontext()


def _worth_keeping(content: list[int], tokens: list[int]) -> int:
    """The tokens of a slot's content that a sequence can continue from, if they are most of it; else 0."""
    # A short common beginning (bos, a system message) is copied out of this slot instead, and the rest of it saved for
    # the conversation that may come back to it.
    common = _common(content, tokens)
    return common if 2 * common > len(content) else 0


def _common(a: list[int], b: list[int]) -> int:
    """The number of tokens that two lists have in common at the start."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:  # the usual case, compared in C
        return length
    return next(i for i in range(length) if a[i] != b[i])
