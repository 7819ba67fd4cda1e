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
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.generate.ahead import draws, steps_ahead
from nanochat.generate.kv_cache import KVCache
from nanochat.generate.logprobs import TokenLogprob, describe_tokens
from nanochat.generate.sampling import NOT_FINITE, sample
from nanochat.generate.sequence import NewTokens, RowState, Tokenizer, ToolMachine, common_beginning, worth_keeping
from nanochat.gpt import GPT
from nanochat.precision import Precision

LOGIT_ROWS = 64  # positions of a prompt whose logits are computed together: 64 × V numbers
# Prompts that are to be judged are read several at a time: so many chunks together while no answer waits for its next
# token. The shortest is at least half as long as the longest, so that at most half of a pass is padding.
JUDGED_CHUNKS, LEAST_SHARE = 4, 0.5
Forward = Callable[[Tensor, KVCache], Tensor]  # a token per sequence (B, 1) and the cache -> logits (B, V)


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
        self._several_steps = getattr(decode, "ahead", None)
        self._step_seconds = float("inf")  # of the last step
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
        slot = max(free, key=lambda s: (worth_keeping(s.tokens, row.context), -s.used_at))
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
            result = self._step()
        except Exception:
            for slot in self._slots:  # rows may have been half exchanged: what the cache holds isn't known any more
                slot.tokens = []
            raise
        for row, _ in result:
            if row.finish_reason:
                self.remove(row)
        return result

    def _step(self) -> list[tuple[RowState, NewTokens]]:
        # Prefill, then decode. Reading runs many tokens of one sequence at once (matrix products, limited by
        # arithmetic); decoding runs one token of many sequences at once (limited by reading the weights, which all
        # share). One pass for both would pad every sequence to the longest chunk. The chunk is what a running answer
        # has to wait for between two of its tokens.
        logits: list[Tensor] = []
        rows = self._read(logits)
        if not rows and (several := self._decode_ahead()) is not None:
            return several
        rows += self._decode_ready(rows, logits)
        new: dict[int, NewTokens] = {}
        if logits:
            together = logits[0] if len(logits) == 1 else torch.cat(logits)  # (B, V)
            began = time.perf_counter()
            tokens = self._choose(rows, together)
            self._step_seconds += time.perf_counter() - began  # a call of several steps chooses too
            described = self._describe(rows, together, tokens)
            for row, token in zip(rows, tokens, strict=True):
                new[id(row)] = self._accept(row, token, described.get(id(row)))
        return [(row, new.get(id(row), [])) for row in self.rows if id(row) in new or row.finish_reason]

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, logits: list[Tensor]) -> list[RowState]:
        """Let sequences read, first come first served, within the budget; add the logits (1, V) of those through.

        Returns:
            The sequences that are through.
        """
        room = self.cache.max_seq_len
        if all(slot.row is None or (slot.is_ready() and len(slot.row.context) <= room) for slot in self._slots):
            return []  # as in most steps: nothing to read, nothing to forget
        through = self._read_judged(logits)
        budget = 0 if through else self.prefill_chunk
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

    def _read_judged(self, logits: list[Tensor]) -> list[RowState]:
        """Read whole prompts that are to be judged, several in one pass; add their logits (n, V), return the sequences.

        A harness sends hundreds of short ones. One by one, each pass would mostly be the cost of its many operations.
        """
        idle = not any(slot.is_ready() for slot in self._slots)
        budget = self.prefill_chunk * (JUDGED_CHUNKS if idle else 1)
        chosen: list[_Slot] = []
        for slot in sorted(self._slots, key=lambda slot: slot.used_at):
            row = slot.row
            if row is None or row.finish_reason is not None or (row.reused is not None and slot.unread() < 2):
                continue  # nothing to read
            if row.prompt_logprobs is None or row.reused is not None:
                if not chosen:
                    return []  # it came first
                continue
            lengths = [len(s.row.context) for s in [*chosen, slot] if s.row is not None]
            if len(lengths) * max(lengths) <= budget and min(lengths) >= LEAST_SHARE * max(lengths):
                chosen.append(slot)
        if len(chosen) < 2:
            return []
        count = self._gather([slot in chosen for slot in self._slots])
        rows = self._rows_of(0, count)
        for index, row in enumerate(rows):
            self._reuse(index, row)
        try:
            self._select(0, count)
            prompts = [torch.tensor(row.context) for row in rows]
            # Padding stands behind each prompt, where causal attention sees it from nowhere; its keys lie behind the
            # sequence's length, where the next tokens overwrite them.
            idx = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(self.model.get_device())  # (n, T)
            with self._autocast():
                x = self.model.hidden(idx, kv_cache=self.cache)  # (n, T, C)
                logits.append(self.model.logits_at(x[range(count), [len(p) - 1 for p in prompts]]))
                for row, hidden in zip(rows, x, strict=True):
                    self._describe_prompt(row, hidden[: len(row.context)], 0)
        except Exception as error:
            logging.getLogger(__name__).warning(
                "%d prompts are read one by one: %s: %s", count, type(error).__name__, error
            )
            for row in rows:  # which of them was it?
                row.reused, row.prompt_logprobs = None, []
            del logits[:]
            return []
        for slot, row in zip(self._slots, rows, strict=False):
            slot.tokens = list(row.context)
        return rows

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
            ((common_beginning(slot.tokens, row.context), i) for i, slot in enumerate(self._slots)),
            key=lambda item: (item[0], item[1] == index),
        )
        row.reused = min(shared, len(row.context) - 1)  # the last token must run: its logits are wanted
        if row.prompt_logprobs is not None:  # then those of every token are
            row.reused, source = 0, index
            row.prompt_logprobs = self._forced(row.context[:1])  # nothing comes before the first one
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
            if slot.row is not None:
                self._describe_prompt(slot.row, x[0], len(slot.tokens))
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

    def _decode_ahead(self) -> list[tuple[RowState, NewTokens]] | None:
        """Give every sequence several tokens in one call; None where somebody must look at each, or has to read."""
        if self._several_steps is None or not all(slot.is_ready() for slot in self._slots if slot.row is not None):
            return None
        steps = steps_ahead(self.rows, self.cache.max_seq_len, self._step_seconds)
        if steps < 2:
            return None
        count = self._gather([slot.row is not None for slot in self._slots])
        rows = self._rows_of(0, count)
        self._select(0, count)
        last, stops = [row.context[-1] for row in rows], self.tools.watched.union(*(row.stop_tokens for row in rows))
        start, found = time.perf_counter(), None
        try:
            found = self._several_steps(last, self.cache, [r.sampling for r in rows], lambda: draws(rows, steps), stops)
        except Exception as error:  # single steps find out whose fault it is
            logging.getLogger(__name__).warning("decoding step by step from now on, which is slower: %s", error)
            self._several_steps = None
        if found is None:
            return None
        self._step_seconds = (time.perf_counter() - start) / len(found)
        result = []
        for row, slot, *tokens in zip(rows, self._slots[:count], *found, strict=True):
            slot.tokens += [row.context[-1], *tokens[:-1]]
            row.spend(len(tokens))
            result.append((row, [pair for token in tokens for pair in self._accept(row, token, None)]))
        return result

    def _decode_rows(self, start: int, stop: int) -> Tensor:
        self._select(start, stop)
        last = [row.context[-1] for row in self._rows_of(start, stop)]
        idx = torch.tensor(last, device=self.cache.k_cache.device).unsqueeze(1)  # (B, 1)
        began = time.perf_counter()
        logits = self.decode(idx, self.cache)  # (B, V)
        self._step_seconds = time.perf_counter() - began
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
        ruled = [i for i, row in enumerate(rows) if row.rules is not None]
        if ruled:
            logits = logits.clone()  # the model's own are still wanted: log-probabilities are made of them
        for i in ruled:
            row = rows[i]
            try:
                if row.rules is not None:
                    row.rules.apply(logits[i], row.limit - row.count, self.tools.stop_tokens | row.stop_tokens)
            except Exception as error:
                row.error = error  # `_accept` raises it: this sequence's alone
        groups: dict[int, list[int]] = {}  # by the identity of the settings, which equal ones share
        for i, row in enumerate(rows):
            groups.setdefault(id(row.sampling), []).append(i)
        tokens = [NOT_FINITE] * len(rows)
        for members in groups.values():
            settings = rows[members[0]].sampling
            part = logits if len(groups) == 1 else logits[torch.tensor(members, device=logits.device)]  # (n, V)
            uniform = None
            if not settings.greedy:  # a greedy sequence draws nothing
                uniform = torch.tensor([rows[i].draws(1)[0] for i in members], device=logits.device)  # (n,)
                for i in members:
                    rows[i].spend(1)
            chosen: list[int] = sample(part, settings, uniform).tolist()  # here the CPU waits for the card
            for i, token in zip(members, chosen, strict=True):
                tokens[i] = token
        return tokens

    def _accept(self, row: RowState, token: int, logprob: TokenLogprob | None) -> NewTokens:
        """The sequence's new tokens with their masks; an error is its own."""
        try:
            if row.error is not None:
                raise row.error
            if token == NOT_FINITE:
                raise RuntimeError("the model's output is not a number (try --dtype float32)")
            new = self.tools.accept(row, token)
            if logprob is not None:
                row.logprobs += [logprob, *self._forced([t for t, _ in new[1:]])][: len(new)]
            return new
        except Exception as error:
            self._invalidate(next(i for i, slot in enumerate(self._slots) if slot.row is row), row, error)
            return []

    # --- log-probabilities --------------------------------------------------------------------------------------------

    def _describe(self, rows: list[RowState], logits: Tensor, tokens: list[int]) -> dict[int, TokenLogprob]:
        """The log-probabilities of the chosen tokens, by the id of the sequences that want them."""
        wanted = [i for i, row in enumerate(rows) if row.top_logprobs is not None and tokens[i] != NOT_FINITE]
        if not wanted:
            return {}
        top = max(rows[i].top_logprobs or 0 for i in wanted)
        part = logits[torch.tensor(wanted, device=logits.device)]  # (n, V)
        described = describe_tokens(part, [tokens[i] for i in wanted], top, self.tools.tokenizer.decode_bytes)
        return {
            id(rows[i]): dataclasses.replace(logprob, top=logprob.top[: rows[i].top_logprobs])
            for i, logprob in zip(wanted, described, strict=True)
        }

    def _describe_prompt(self, row: RowState, x: Tensor, start: int) -> None:
        """Describe the prompt's tokens that follow hidden states x (T, C), at position `start`, if it is asked for."""
        known = row.prompt_logprobs
        if known is None:
            return
        following = row.context[start + 1 : row.prompt_tokens][: x.size(0)]
        for i in range(0, len(following), LOGIT_ROWS):
            tokens = following[i : i + LOGIT_ROWS]
            logits = self.model.logits_at(x[i : i + len(tokens)])  # (n, V)
            described = describe_tokens(logits, tokens, row.top_logprobs or 0, self.tools.tokenizer.decode_bytes)
            known += described

    def _forced(self, tokens: list[int]) -> list[TokenLogprob]:
        """Tokens that the model did not choose."""
        return [TokenLogprob(token, self.tools.tokenizer.decode_bytes([token]), None) for token in tokens]

    def _invalidate(self, index: int, row: RowState, error: Exception) -> None:
        """End a sequence with an error, and discard what its slot holds: nobody may continue from it."""
        row.finish_reason, row.error = "error", error
        self._slots[index].tokens = []
        self.cache.wipe(index)  # NaN would survive: a masked position is multiplied by 0, and 0 · NaN is NaN

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.precision.autocast() if self.precision is not None else contextlib.nullcontext()
