"""The weights of a run's best evaluation, kept until its end: the finished model has them, whatever came after.

A run that reads little text many times is at its best long before its learning rate has fallen. There a mean of the
latest weights is evaluated too, and kept where it is the better one. Training itself goes on from its own weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from nanochat.checkpoint.writer import host_copy
from nanochat.env import print0
from nanochat.train.tracking import TrainState

BEST, MEAN = "best.", "mean."  # before names in an unfinished checkpoint, beside the optimizer's state
# The mean reaches back over about a quarter of the steps so far, however long the run is (polynomial-decay averaging,
# arXiv 1212.1824). The number is a guess between two that were measured: dev/LOG.md, "little text, many epochs".
MEAN_SHARE = 3.0

Values = dict[str, float]


class BestWeights:
    """A copy of the best weights in host memory, with `mean` a mean of the latest ones on the device; on all ranks.

    A copy, not a checkpoint for each better evaluation: while a run goes well every evaluation is the best so far.
    """

    def __init__(self, model: nn.Module, mean: bool = False) -> None:
        self._model, self._best = model, dict[str, Tensor]()
        self._mean = {name: value.detach().clone() for name, value in self._weights().items()} if mean else {}
        self._mean_is_better = False

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._model.named_parameters()}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(weights, strict=False)  # without the text that a model may carry

    @torch.no_grad()
    def count_step(self, step: int) -> None:
        """Take the weights after `step`, counted from 1, into the mean."""
        if self._mean:
            weights, share = self._weights(), MEAN_SHARE / (step + MEAN_SHARE - 1)
            torch._foreach_lerp_(list(self._mean.values()), [weights[name] for name in self._mean], share)

    def evaluate(self, evaluate: Callable[[], float | Values], name: str) -> float | Values:
        """The values of the model's weights or of their mean, by whichever has the lower one called `name`."""
        own = evaluate()
        if not self._mean:
            return own
        with self.in_place():
            mean = evaluate()
        own, mean = (found if isinstance(found, dict) else {name: found} for found in (own, mean))
        self._mean_is_better = mean[name] < own[name]
        return (mean if self._mean_is_better else own) | {f"own_{name}": own[name], f"mean_{name}": mean[name]}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean in place of its own weights."""
        own = host_copy(self._weights())  # not on the device, where training has left no room
        self._load(self._mean)
        try:
            yield
        finally:
            self._load(own)

    def take(self) -> None:
        """Remember the weights that the last evaluation has found to be the better ones."""
        self._best = host_copy(self._mean if self._mean_is_better else self._weights())

    def finish(self, state: TrainState, label: str, val_name: str) -> None:
        """Training has ended: put the remembered weights into the model, and their value into the state."""
        if not self._best:
            return
        self._load(self._best)
        if state.best_step != state.step:
            print0(
                f"{label}: the finished model has the weights of step {state.best_step} ({val_name} "
                f"{state.best_val:.4f}); those of step {state.step} have {state.val:.4f}"
            )
        state.val, state.val_step = state.best_val, state.best_step

    def state(self) -> dict[str, Tensor]:
        """What an unfinished checkpoint holds of them."""
        best = {BEST + name: value for name, value in self._best.items()}
        return best | host_copy({MEAN + name: value for name, value in self._mean.items()})

    def resume(self, tensors: Mapping[str, Tensor], state: TrainState) -> None:
        """Take them from a checkpoint's tensors; if it was made without, best and mean are sought from here on."""
        self._best = {name.removeprefix(BEST): t for name, t in tensors.items() if name.startswith(BEST)}
        for name, value in self._mean.items():
            value.copy_(tensors.get(MEAN + name, value))
        if not self._best:
            state.best_val = state.best_step = None
