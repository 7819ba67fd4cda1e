"""When a run can't go on: the message that names the first layer whose numbers are not finite, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from nanochat.common import Compute
from nanochat.data.loader import Batch
from nanochat.gpt import GPT
from nanochat.precision import NonFiniteError, first_nonfinite_module


def explained(
    error: NonFiniteError, model: GPT, compute: Compute, batches: Sequence[Batch], step: int, saved: Sequence[int]
) -> NonFiniteError:
    """The error with the first layer that is not finite and what to do; passes the last batches through again.

    Args:
        error: what `Precision.step` raised.
        model: as it was left.
        compute: device, ranks and precision.
        batches: the step's micro-batches on this rank.
        step: the last one that was made.
        saved: the steps of the run's checkpoints.
    """

    def forward() -> None:
        with compute.precision.autocast():
            for batch in batches:
                x = model.hidden(batch.x, segments=batch.segments, found=batch.found)
                model.logits_at(x[:, -1])

    # Hidden states and the logits of one position are enough: what is not finite at the end was so in a layer.
    found = [first_nonfinite_module(model, forward)]
    if compute.ddp:  # all ranks stopped at this step, but only one may have met the batch
        mine, found = found[0], [None] * compute.world_size
        dist.all_gather_object(found, mine)
    where = next((name for name in found if name), None)
    layer = f"the first layer with non-finite activations is {where}" if where else "all activations are finite"
    doubt = " or --dtype=float32" if compute.precision.scaler.is_enabled() else ""
    left = f"the checkpoint of step {saved[-1]} stays" if saved else "there is no checkpoint of this run yet"
    return NonFiniteError(
        f"training stopped at step {step}: {error}; {layer}. Lower the learning rates (--matrix_lr, --embedding_lr), "
        f"set --grad_clip=1.0{doubt}; {left}"
    )
