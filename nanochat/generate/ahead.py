"""How many tokens may be made in one call: those between which nobody has to look, and few enough that nobody waits."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.generate.sequence import RowState

# The longest that one call may take, so that nobody who arrives or reads along notices; and the most tokens in one.
AHEAD_SECONDS, MOST_AHEAD = 0.01, 32


def steps_ahead(rows: Sequence[RowState], positions: int, step_seconds: float) -> int:
    """The tokens that all of these sequences may get at once; below 2: one by one.

    Args:
        rows: the sequences, which have read all but their last token.
        positions: of their slots in the cache.
        step_seconds: how long a step takes.
    """
    if any(row.by_step or row.rules is not None or row.top_logprobs is not None for row in rows):
        return 0
    room = min((min(row.limit - row.count, positions + 1 - len(row.context)) for row in rows), default=0)
    return min(room, MOST_AHEAD, int(AHEAD_SECONDS / step_seconds))


def draws(rows: Sequence[RowState], steps: int) -> list[tuple[float, ...]]:
    """Random numbers in [0, 1): of each step one for each sequence."""
    return list(zip(*(row.draws(steps) for row in rows), strict=True))
