"""Where a run's metrics go besides its own metrics.jsonl: wandb, TensorBoard or trackio, or nowhere (the default).

All three take the same record: numbers by name, "step" among them.
"""

from __future__ import annotations

from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

from nanochat.common import DummyWandb
from nanochat.env import get_base_dir, get_dist_info

TrackerName = Literal["wandb", "tensorboard", "trackio"]
NO_RUN = "dummy"


class Tracker(Protocol):
    """What the training loop asks of a tracker."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record of metrics."""

    def finish(self) -> None:
        """Write what is left and close."""


class TensorBoard:
    """Event files under the base dir: `tensorboard --logdir <base dir>/tensorboard`."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # lazy: an optional package

        self._writer = SummaryWriter(str(folder))
        self._writer.add_text("config", "\n".join(f"- {k}: {v}" for k, v in config.items()))

    def log(self, record: dict[str, Any]) -> None:
        """One point for every number, at the record's step."""
        for name, value in record.items():
            if name != "step" and isinstance(value, Real):
                self._writer.add_scalar(name, float(value), record.get("step"))

    def finish(self) -> None:
        """Flush and close the files."""
        self._writer.close()


class Trackio:
    """trackio: wandb's interface, kept in a local database, with its own dashboard."""

    def __init__(self, project: str, run: str, config: dict[str, Any]) -> None:
        import trackio  # lazy: an optional package

        self._trackio = trackio
        trackio.init(project=project, name=run, config=config)

    def log(self, record: dict[str, Any]) -> None:
        """Hand the numbers over."""
        numbers = {name: value for name, value in record.items() if name != "step"}
        self._trackio.log(numbers, step=record.get("step"))

    def finish(self) -> None:
        """Wait until they are stored."""
        self._trackio.finish()


def init_tracker(tracker: TrackerName, run: str, project: str, config: dict[str, Any]) -> Tracker:
    """The tracker of this run; one that ignores everything if `run` is "dummy", and on every rank but 0.

    Args:
        tracker: which one.
        run: the run's name.
        project: nanochat, nanochat-mid, nanochat-sft or nanochat-rl.
        config: the run's settings.

    Raises:
        RuntimeError: the tracker's package is not installed; names the command that does it.
    """
    if run == NO_RUN or get_dist_info()[1] != 0:
        return DummyWandb()
    try:
        if tracker == "tensorboard":
            return TensorBoard(get_base_dir() / "tensorboard" / project / run, config)
        if tracker == "trackio":
            return Trackio(project, run, config)
        import wandb  # lazy: a second to start, and most runs do without
    except ImportError as error:
        raise RuntimeError(
            f"--tracker={tracker} needs a package that is missing ({error}): pip install {tracker}, or leave --run out"
        ) from error
    return wandb.init(project=project, name=run, config=config)
