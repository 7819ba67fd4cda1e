"""The key/value cache: the keys and values of the tokens so far, so that a new token costs one position.

A row of it holds one sequence. All rows are allocated at once. A forward pass runs on some neighbouring rows
(`select`); rows can be exchanged (`swap`) and can share a beginning (`copy`).

Shapes: L layers, B rows, T positions, H key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.gpt import GPT, GPTConfig
from nanochat.ops.pointwise import split_key
from nanochat.precision import autocast_dtype


@dataclass(frozen=True)
class DecodeViews:
    """Views of one layer of the cache, for one new token per sequence."""

    new_key: tuple[Tensor, ...]  # (B, 1, H, D), or with an offset both parts of nanochat.ops.pointwise.split_key
    new_value: Tensor  # (B, 1, H, D)
    keys: Tensor  # (B, H, all, D), the new one included
    values: Tensor

    def put(self, k: Tensor, v: Tensor) -> None:
        """Store the new token's key and value (B, 1, H, D)."""
        parts = split_key(k) if len(self.new_key) == 2 else (k,)
        for view, part in zip(self.new_key, parts, strict=True):
            view.copy_(part)
        self.new_value.copy_(v)


def fitting_slots(config: GPTConfig, dtype: torch.dtype, most: int = 32, max_bytes: int = 4 << 30) -> int:
    """The number of whole contexts of a model that fit into `max_bytes`; at least 1, at most `most`."""
    values = 2 * config.n_layer * config.sequence_len * config.n_kv_head * config.head_dim
    return max(1, min(most, max_bytes // (values * dtype.itemsize)))


class KVCache:
    """Keys and values of every position so far, allocated once.

    Rows may have different lengths: each is aligned to the left, and attention never sees what lies behind its length.
    With `key_offset` the lent channels of a token's key are written one position ahead, into the next token's, so that
    a row of length n also holds something at position n.

    Args:
        batch_size: rows B.
        num_heads: key/value heads H.
        seq_len: positions there is room for.
        head_dim: D.
        num_layers: L.
        device: where the model is.
        dtype: what its attention computes in.
        key_offset: the model's switch, see nanochat/ops/pointwise.py.
    """

    is_fixed = False
    """True where a step may not depend on the rows' lengths but by tensors, see nanochat/generate/graph_step.py."""

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        key_offset: bool = False,
    ) -> None:
        self.batch_size, self.max_seq_len, self.key_offset = batch_size, seq_len, key_offset
        # Zeros, not empty: a masked position is multiplied by 0, and 0 · NaN would be NaN. With an offset also because
        # the first token's key has zeros where the others have what the token before has lent them.
        shape = (num_layers, batch_size, seq_len + key_offset, num_heads, head_dim)  # (L, B, T, H, D)
        self.k_cache = torch.zeros(shape, device=device, dtype=dtype)
        self.v_cache = torch.zeros_like(self.k_cache)
        self.tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)  # for with_previous
        self._lengths = [0] * batch_size  # Python numbers: reading them from a card would wait for it
        self.select(0, batch_size)

    @classmethod
    def for_model(cls, model: GPT, rows: int, seq_len: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache of the shape a model needs; `dtype`: by default what it computes in right now (autocast)."""
        c, weight = model.config, model.lm_head.weight
        dtype = dtype or autocast_dtype(weight)
        return cls(rows, c.n_kv_head, seq_len, c.head_dim, c.n_layer, weight.device, dtype, c.key_offset)

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def cache_seqlens(self) -> Tensor:
        """The length of every row, (B,) int32."""
        return torch.tensor(self._lengths, dtype=torch.int32, device=self.k_cache.device)

    def select(self, start: int, stop: int) -> None:
        """Let the next forward passes run on rows `start` to `stop` only."""
        self._start, self._stop = start, stop
        self._planned: int | None = None  # for how many new tokens positions and mask are made

    def selected(self, n_tokens: int) -> tuple[int, list[int]]:
        """The first selected row and the lengths of all of them, which have room for `n_tokens` more.

        Raises:
            ValueError: there is no room for them.
        """
        lengths = self._lengths[self._start : self._stop]
        self._check_room(max(lengths) + n_tokens)
        return self._start, lengths

    def set_lengths(self, lengths: list[int]) -> None:
        """Set the number of positions that count in each selected row; what lies behind is overwritten later."""
        self._lengths[self._start : self._stop] = lengths
        self._planned = None

    def get_pos(self) -> int:
        """Length of the longest selected row."""
        return max(self._lengths[self._start : self._stop])

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of one layer, (selected rows, T, H, D) each, written and unwritten positions; views."""
        return self.k_cache[layer, self._start : self._stop], self.v_cache[layer, self._start : self._stop]

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self._lengths = [0] * self.batch_size
        self.select(0, self.batch_size)

    def advance(self, n: int) -> None:
        """Count the `n` positions that `update` has written in every layer."""
        self.set_lengths([length + n for length in self._lengths[self._start : self._stop]])

    def prefill(self, other: KVCache) -> None:
        """Start from `other`'s content; a single row of it is repeated in every row of this one."""
        if other.batch_size not in (1, self.batch_size):
            raise ValueError(f"cannot fill {self.batch_size} rows from a cache of {other.batch_size} rows")
        if other.key_offset != self.key_offset:
            raise ValueError("cannot fill a cache from one with another key_offset")
        used = max(other._lengths)
        self._check_room(used)
        self.reset()
        self._take(other, slice(None), slice(None), used)
        self.set_lengths(other._lengths * (self.batch_size // other.batch_size))

    def repeated(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> KVCache:
        """A new cache whose row i continues the first lengths[i] tokens of this one's row rows[i], by up to `room`."""
        layers, _, _, heads, head_dim = self.k_cache.shape
        used, device, dtype = max(lengths), self.k_cache.device, self.k_cache.dtype
        wide = KVCache(len(rows), heads, used + room, head_dim, layers, device, dtype, self.key_offset)
        wide._take(self, torch.tensor(rows, device=device), slice(None), used)
        wide.set_lengths(list(lengths))
        return wide

    def copy(self, source: int, target: int, length: int) -> None:
        """Let row `target` begin with the first `length` positions of row `source`, and end there."""
        if source != target:
            self._take(self, source, target, length)
        self._lengths[target] = length
        self._planned = None

    def _take(self, other: KVCache, source: int | slice | Tensor, target: int | slice, used: int) -> None:
        """Copy the first `used` positions of rows `source` of a cache into rows `target` of this one."""
        keys = used + self.key_offset  # the last token has lent channels to the position after it
        self.k_cache[:, target, :keys] = other.k_cache[:, source, :keys]
        self.v_cache[:, target, :used] = other.v_cache[:, source, :used]
        self.tokens[target, :used] = other.tokens[source, :used]

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows, with what lies behind their lengths up to the longer of both."""
        used = max(self._lengths[a], self._lengths[b])
        for cache, end in ((self.k_cache, used + self.key_offset), (self.v_cache, used)):
            kept = cache[:, a, :end].clone()
            cache[:, a, :end] = cache[:, b, :end]
            cache[:, b, :end] = kept
        self.tokens[[a, b], :used] = self.tokens[[b, a], :used]
        self._lengths[a], self._lengths[b] = self._lengths[b], self._lengths[a]
        self._planned = None

    def wipe(self, row: int) -> None:
        """Empty a row and overwrite what it held.

        A NaN left behind would reach the row's next sequence: a masked position counts 0 times, and 0 · NaN is NaN.
        """
        self.k_cache[:, row] = 0
        self.v_cache[:, row] = 0
        self._lengths[row] = 0
        self._planned = None

    # --- called by the model ------------------------------------------------------------------------------------------

    def positions(self, n_tokens: int) -> Tensor:
        """Positions of the next `n_tokens`: (1, n) when all selected rows are equally long, else (B, n)."""
        self._plan(n_tokens)
        return self._positions

    def attention_mask(self) -> Tensor | None:
        """The positions that the next tokens may see, (B, 1, n, all) bool; None: causal, rows are equally long."""
        return self._mask

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next keys and values (B, n, H, D) of a layer; return all of it so far (B, all, H, D).

        Raises:
            ValueError: there is no room for them.
        """
        n = k.size(1)
        self._plan(n)  # a model asks for positions first, so that this costs nothing
        keys, values = self.get_layer_cache(layer)
        end = self.get_pos() + n
        self._write(values, v, end)
        if self.key_offset:
            for ahead, (cached, new) in enumerate(zip(split_key(keys), split_key(k), strict=True)):
                self._write(cached, new, end, ahead)
        else:
            self._write(keys, k, end)
        return keys[:, :end].to(k.dtype), values[:, :end].to(v.dtype)  # views, where the dtype is the cache's

    def _write(self, cached: Tensor, new: Tensor, end: int, ahead: int = 0) -> None:
        """Put new (B, n, …) into cached (B, T, …), up to position `end`, each `ahead` positions further."""
        if self._mask is None:  # all rows end at the same position: one slice
            cached[:, end - new.size(1) + ahead : end + ahead] = new
        else:
            cached[self._rows, self._positions + ahead] = new.to(cached.dtype)

    def decode_views(self) -> list[DecodeViews] | None:
        """Views for the next token of equally long rows, one of each layer; None where the rows' lengths differ.

        All layers' are made by one operation each: a view costs microseconds, and a small step has few to spend.
        """
        self._plan(1)
        if self._mask is not None:
            return None
        rows, end = slice(self._start, self._stop), self.get_pos() + 1
        k, v = self.k_cache[:, rows, :end], self.v_cache[:, rows, :end]  # (L, B, end, H, D)
        all_k, all_v = k.transpose(2, 3).unbind(), v.transpose(2, 3).unbind()  # L times (B, H, end, D)
        new_keys: tuple[Tensor, ...] = (k[:, :, -1:],)
        if self.key_offset:
            own, lent = split_key(self.k_cache[:, rows])  # the lent half goes one position ahead
            new_keys = own[:, :, end - 1 : end], lent[:, :, end : end + 1]
        by_layer = zip(*(key.unbind() for key in new_keys), strict=True)
        return [DecodeViews(*views) for views in zip(by_layer, v[:, :, -1:].unbind(), all_k, all_v, strict=True)]

    def with_previous(self, idx: Tensor, n: int) -> Tensor:
        """Remember the next tokens (B, T); return them behind the `n` before, −1 where there is none: (B, n + T)."""
        self._plan(idx.size(1))
        tokens = self.tokens[self._start : self._stop]
        rows = torch.arange(tokens.size(0), device=idx.device).unsqueeze(1)
        tokens[rows, self._positions] = idx
        at = self._positions[:, :1] + torch.arange(-n, idx.size(1), device=idx.device)  # (1 or B, n + T)
        return tokens[rows, at.clamp(min=0)].masked_fill(at < 0, -1)

    def _plan(self, n: int) -> None:
        """Make the positions and the mask of the next `n` tokens, once for all layers."""
        if self._planned == n:
            return
        lengths, device = self._lengths[self._start : self._stop], self.k_cache.device
        longest = max(lengths)
        self._check_room(longest + n)
        self._mask: Tensor | None = None
        if min(lengths) == longest:
            self._positions = torch.arange(longest, longest + n, device=device).unsqueeze(0)  # (1, n)
        else:
            new = torch.arange(n, device=device)
            self._positions = torch.tensor(lengths, device=device).unsqueeze(1) + new  # (B, n)
            self._rows = torch.arange(len(lengths), device=device).unsqueeze(1)  # (B, 1)
            # A new token sees its own row up to itself; of what shorter rows have behind their end it sees nothing.
            keys = torch.arange(longest + n, device=device)
            self._mask = keys <= self._positions[:, None, :, None]  # (B, 1, n, all)
        self._planned = n

    def _check_room(self, needed: int) -> None:
        if needed > self.max_seq_len:
            raise ValueError(
                f"{needed} tokens are more than the {self.max_seq_len} this cache has room for: "
                "shorten the prompt or ask for fewer tokens"
            )
