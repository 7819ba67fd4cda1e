"""What both loaders share: the batch that a training step reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What a loader hands out, each (B, T) on the device; a loader may leave out the last ones."""

    x: Tensor
    y: Tensor
    """The next tokens; −1 is not supervised."""
    segments: Tensor | None = None
    """Which conversation of its row a token belongs to; None: a row is one text."""
    extras: dict[str, Tensor] | None = None
    """What an `objective` of its own needs, by name."""

    def pieces(self, rows: int) -> Iterator[Batch]:
        """The same rows in their order, at most `rows` at a time."""
        for i in range(0, len(self.x), rows):
            part = slice(i, i + rows)
            yield Batch(
                self.x[part],
                self.y[part],
                None if self.segments is None else self.segments[part],
                None if self.extras is None else {name: value[part] for name, value in self.extras.items()},
            )

    def shorter_rows(self, split: int) -> Batch:
        """The same tokens in `split` times as many rows: (B, T) -> (split·B, T / split)."""
        rows = split * len(self.x)
        segments = None if self.segments is None else self.segments.reshape(rows, -1)
        return self._replace(x=self.x.reshape(rows, -1), y=self.y.reshape(rows, -1), segments=segments)
