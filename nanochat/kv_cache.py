"""The key/value cache: what attention has computed for the tokens so far, so that a new token costs one position.

Shapes: L layers, B rows, T positions, H key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every position so far, allocated once.

    Rows may have different lengths: each is aligned to the left and hides what lies behind its own length.

    Args:
        batch_size: rows B.
        num_heads: key/value heads H.
        seq_len: positions there is room for.
        head_dim: D.
        num_layers: L.
        device: where the model is.
        dtype: what its attention computes in.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        seq_len: int,
        head_dim: int,
        num_layers: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch_size, self.max_seq_len = batch_size, seq_len
        # Zeros, not empty: a masked position is multiplied by 0, and 0 · NaN would be NaN.
        self.k_cache = torch.zeros(num_layers, batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype)
        self.v_cache = torch.zeros_like(self.k_cache)  # (L, B, T, H, D)
        self.tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device=device)  # for previous_tokens
        self.set_lengths([0] * batch_size)

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many positions of each row count; what lies behind is overwritten later."""
        self._lengths = list(lengths)
        self.cache_seqlens = torch.tensor(self._lengths, dtype=torch.int32, device=self.k_cache.device)  # (B,)
        self._planned: int | None = None

    def get_pos(self) -> int:
        """Length of the longest row."""
        return max(self._lengths)

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of one layer, (B, T, H, D) each, written and unwritten positions."""
        return self.k_cache[layer, : self.batch_size], self.v_cache[layer, : self.batch_size]

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.set_lengths([0] * self.batch_size)

    def advance(self, n: int) -> None:
        """Count the `n` positions that `update` has written in every layer."""
        self._lengths = [length + n for length in self._lengths]
        self.cache_seqlens += n
        self._planned = None

    def prefill(self, other: KVCache) -> None:
        """Start from `other`'s content; a single row of it is repeated in every row of this one."""
        if other.batch_size not in (1, self.batch_size):
            raise ValueError(f"can't fill {self.batch_size} rows from a cache of {other.batch_size} rows")
        used = other.get_pos()
        self._check_room(used)
        self.k_cache[:, : self.batch_size, :used] = other.k_cache[:, : other.batch_size, :used]
        self.v_cache[:, : self.batch_size, :used] = other.v_cache[:, : other.batch_size, :used]
        self.tokens[: self.batch_size, :used] = other.tokens[: other.batch_size, :used]
        self.set_lengths(other._lengths * (self.batch_size // other.batch_size))

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Remove rows: the last row moves into each gap. Returns, for each row that stays, which one it was."""
        order = list(range(self.batch_size))
        used = self.get_pos()
        for gap in sorted(rows, reverse=True):
            last = len(order) - 1
            if gap != last:
                self.k_cache[:, gap, :used] = self.k_cache[:, last, :used]
                self.v_cache[:, gap, :used] = self.v_cache[:, last, :used]
                self.tokens[gap, :used] = self.tokens[last, :used]
                order[gap] = order[last]
            order.pop()
        self.batch_size = len(order)
        self.set_lengths([self._lengths[row] for row in order])
        return order

    # --- what the model calls -----------------------------------------------------------------------------------------

    def positions(self, n_tokens: int) -> Tensor:
        """Positions of the next `n_tokens`: (1, n) when all rows are equally long, else (B, n)."""
        self._plan(n_tokens)
        return self._positions

    def attention_mask(self) -> Tensor | None:
        """What the tokens just stored may see, (B, 1, n, all) bool; None: causal, as when all rows are equally long."""
        return self._mask

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the next keys and values (B, n, H, D) of a layer; return all of it so far (B, all, H, D).

        Raises:
            ValueError: there is no room for them.
        """
        n = k.size(1)
        self._plan(n)
        keys, values = self.get_layer_cache(layer)
        if self._mask is None:
            start = self.get_pos()
            keys[:, start : start + n] = k
            values[:, start : start + n] = v
        else:
            keys[self._rows, self._positions] = k.to(keys.dtype)
            values[self._rows, self._positions] = v.to(values.dtype)
        end = self.get_pos() + n
        return keys[:, :end].to(k.dtype), values[:, :end].to(v.dtype)

    def previous_tokens(self, idx: Tensor) -> Tensor:
        """Remember the next tokens (B, n); return the token before each, −1 where there is none: (B, n)."""
        self._plan(idx.size(1))
        rows = torch.arange(self.batch_size, device=idx.device).unsqueeze(1)
        self.tokens[rows, self._positions] = idx
        before = self.tokens[rows, (self._positions - 1).clamp(min=0)]
        return before.masked_fill(self._positions == 0, -1)

    def _plan(self, n: int) -> None:
        """Positions and mask of the next `n` tokens, worked out once for all layers."""
        if self._planned == n:
            return
        longest, device = self.get_pos(), self.k_cache.device
        self._check_room(longest + n)
        self._mask: Tensor | None = None
        if min(self._lengths) == longest:
            self._positions = torch.arange(longest, longest + n, device=device).unsqueeze(0)  # (1, n)
        else:
            self._positions = self.cache_seqlens.long().unsqueeze(1) + torch.arange(n, device=device)  # (B, n)
            self._rows = torch.arange(self.batch_size, device=device).unsqueeze(1)  # (B, 1)
            keys = torch.arange(longest + n, device=device)
            self._mask = keys <= self._positions[:, None, :, None]  # (B, 1, n, all)
        self._planned = n

    def _check_room(self, needed: int) -> None:
        if needed > self.max_seq_len:
            raise ValueError(
                f"{needed} tokens are more than the {self.max_seq_len} this cache has room for: "
                "shorten the prompt or ask for fewer tokens"
            )
