"""Bits per byte: the loss in a unit that does not depend on the tokenizer.

A larger vocabulary makes each token harder to guess and the text shorter, so mean losses per token can't be compared
between tokenizers. Bits per byte of text can: bpb = Σ nats / (ln 2 · Σ bytes), both sums over the same tokens.
Tokens without bytes (special tokens, ignored targets) count in neither sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import Compute
from nanochat.data.corpus import Corpus
from nanochat.data.loader import Batch
from nanochat.dataloader import PretrainLoader
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer


@torch.no_grad()
def evaluate_bpb(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor] | Batch],
    steps: int | None,
    token_bytes: Tensor,
    autocast: AbstractContextManager[object] | None = None,
) -> float:
    """Bits per byte of `model` on the first `steps` batches (all there are if fewer), over all ranks together.

    Args:
        model: called as model(x, y, loss_reduction="none") -> (B, T) nats, 0 where y is -1; and with a batch's `found`.
        batches: yields x and y, both (B, T) int64, or a `Batch`. Each rank passes its own share.
        steps: the most batches to read on each rank; None reads finite `batches` to their end.
        token_bytes: (vocab,) bytes of each token, 0 for special tokens.
        autocast: the context to run the model in.

    Raises:
        ValueError: `steps` is below 1, or the batches hold no bytes.
    """
    if steps is not None and steps < 1:
        raise ValueError(
            f"{steps} evaluation batches: fewer tokens were asked for than one batch holds. "
            "Raise the number of evaluation tokens or lower the device batch size"
        )
    was_training = model.training
    model.eval()
    device = token_bytes.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
    nats = torch.zeros((), dtype=exact, device=device)
    num_bytes = torch.zeros((), dtype=torch.int64, device=device)
    with autocast if autocast is not None else nullcontext():
        # islice never asks for the batch after the last one, which a loader would prepare in vain.
        for batch in islice(batches, steps):
            x, y, *_ = batch
            found = batch.found if isinstance(batch, Batch) else None
            losses = model(x, y, loss_reduction="none", **({} if found is None else {"found": found}))  # (B, T)
            lengths = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)  # (B, T)
            nats += torch.where(lengths > 0, losses, 0.0).to(exact).sum()
            num_bytes += lengths.sum()
    model.train(was_training)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(nats)
        dist.all_reduce(num_bytes)
    if int(num_bytes) == 0:
        raise ValueError("the evaluation batches hold no bytes of text: there is nothing to measure")
    return float(nats) / (math.log(2) * int(num_bytes))


def corpus_bpb(
    model: GPT,
    corpus: Corpus,
    tokenizer: RustBPETokenizer,
    compute: Compute,
    *,
    split: str,
    rows: int,
    max_rows: int,
    skip_bad_shards: bool = False,
) -> float:
    """Bits per byte on the first sequences of a split, the same for every batch size and number of ranks.

    Args:
        model: in any mode, which it keeps.
        corpus: the text.
        tokenizer: the model's.
        compute: where it runs.
        split: "train" or "val".
        rows: sequences per forward pass and process.
        max_rows: sequences in all (fewer when the split ends before).
        skip_bad_shards: pass over shards that can't be read.
    """
    loader = PretrainLoader(
        corpus,
        tokenizer,
        rows,
        model.config.sequence_len,
        split=split,
        device=compute.device,
        rank=compute.rank,
        world_size=compute.world_size,
        max_rows=max_rows,
        skip_bad_shards=skip_bad_shards,
        # Text that the model was trained on stands in what it carries, and must not be found in itself.
        look_up=model.recall.elsewhere() if split == "train" and model.config.recall else None,
    )
    token_bytes = torch.from_numpy(tokenizer.token_lengths()).to(compute.device)
    return evaluate_bpb(model, loader, None, token_bytes, compute.precision.autocast())
