"""Sharding tensors over the ranks of torch.distributed: which rank owns what, reduce-scatter, all-gather.

The optimizer's state is sharded with it, as in ZeRO stage 1 (arXiv 1910.02054). Works with NCCL and gloo, with counts
that the number of ranks does not divide, and costs nothing in a single process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The default process group, or a group of one. Its collectives start at once and return a function that waits."""

    def __init__(self, distributed: bool | None) -> None:
        ready = dist.is_available() and dist.is_initialized()
        if distributed and not ready:
            raise RuntimeError(
                "MuonAdamW(distributed=True) without a process group: start the script with torchrun and call "
                "compute_init() first, or leave distributed out"
            )
        sharded = ready if distributed is None else distributed
        self.world = dist.get_world_size() if sharded else 1
        self.rank = dist.get_rank() if sharded else 0
        self.has_reduce_scatter = True

    def share(self, count: int) -> int:
        """Number of `count` items that a rank holds; the last ranks may hold fewer."""
        return -(-count // self.world)

    def own(self, count: int) -> slice:
        """The slice of `count` items that belongs to this rank."""
        share = self.share(count)
        return slice(min(self.rank * share, count), min((self.rank + 1) * share, count))

    def _pad(self, x: Tensor, count: int) -> Tensor:
        """x (n, …) as a contiguous (count, …) with zeros at the end."""
        if x.shape[0] == count:
            return x.contiguous()
        padded = x.new_zeros(count, *x.shape[1:])
        padded[: x.shape[0]] = x
        return padded

    def reduce_scatter(self, x: Tensor) -> Callable[[], Tensor]:
        """This rank's own part of the mean over the ranks of x (n, …). x may be overwritten."""
        count, share = x.shape[0], self.share(x.shape[0])
        full = self._pad(x, share * self.world)  # collectives want equal parts
        work, out = None, full[self.own(count)]
        if self.has_reduce_scatter:
            # reduce_scatter_tensor was renamed in torch 2.13. gloo has neither in some versions.
            function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            target = full.new_empty(share, *full.shape[1:])
            try:
                work = function(target, full, async_op=True)
                out = target[: out.shape[0]]
            except RuntimeError:
                self.has_reduce_scatter = False  # the same mean by all_reduce, at twice the traffic
        if work is None:
            work = dist.all_reduce(full, async_op=True)
        return self._mean(work, out)

    def all_reduce_mean(self, x: Tensor) -> Callable[[], Tensor]:
        """Mean of x over the ranks, in place."""
        return self._mean(dist.all_reduce(x, async_op=True), x)

    def _mean(self, work: Any, out: Tensor) -> Callable[[], Tensor]:
        def finish() -> Tensor:
            work.wait()
            return out.div_(self.world)

        return finish

    def collect(self, own: Tensor, count: int) -> Tensor:
        """The (count, …) tensor for a checkpoint: `own` itself on a single rank, else a copy in host memory."""
        return own if self.world == 1 else self.all_gather(own, count)().cpu()

    def all_gather(self, own: Tensor, count: int) -> Callable[[], Tensor]:
        """The (count, …) tensor of which every rank holds its own part."""
        source = self._pad(own, self.share(count))
        full = source.new_empty(source.shape[0] * self.world, *source.shape[1:])
        function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = function(full, source, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return full[:count]

        return finish
