"""The weights of a run's best evaluation, kept until its end: the finished model has them, whatever came after."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from nanochat.checkpoint.writer import host_copy
from nanochat.env import print0
from nanochat.train.tracking import TrainState

PREFIX = "best."  # of their names in an unfinished checkpoint, beside the optimizer's state


class BestWeights:
    """A copy of the best weights in host memory; the same on all ranks, as the weights themselves are.

    A copy, not a checkpoint for each better evaluation: while a run goes well every evaluation is the best so far.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def take(self, model: nn.Module) -> None:
        """Remember the weights of now."""
        self._weights = host_copy(model.state_dict())

    def finish(self, model: nn.Module, state: TrainState, label: str, val_name: str) -> None:
        """Training has ended: put the remembered weights into the model, and their value into the state."""
        if not self._weights or state.best_step == state.step:
            return
        model.load_state_dict(self._weights)
        print0(
            f"{label}: the finished model has the weights of step {state.best_step} ({val_name} {state.best_val:.4f}); "
            f"those of step {state.step} have {state.val:.4f}"
        )
        state.val, state.val_step = state.best_val, state.best_step

    def state(self) -> dict[str, Tensor]:
        """What an unfinished checkpoint holds of them."""
        return {PREFIX + name: value for name, value in self._weights.items()}

    def resume(self, tensors: Mapping[str, Tensor], state: TrainState) -> None:
        """Take them from a checkpoint's tensors; if it was made without, the best is sought from here on."""
        self._weights = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        if not self._weights:
            state.best_val = state.best_step = None
