"""A run that reads little text many times: how often, and what it does against learning by heart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.data.corpus import BadShardError, Corpus
from nanochat.data.inventory import format_bytes
from nanochat.env import print0
from nanochat.gpt import GPT, MLP, Attention
from nanochat.progress import format_seconds
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.pretrain_config import PretrainConfig
from nanochat.train.tracking import TrainState

# Up to here text read again teaches about as much as new text. Source: arXiv 2305.16264.
MANY_EPOCHS = 4.0
TOKENS_PER_BYTE = 0.25  # where not even the first documents can be read
SAMPLE_BYTES = 1_000_000  # of text that is tokenized to count the tokens of all


@dataclass(frozen=True)
class TextSize:
    """The training text."""

    num_bytes: int
    tokens: int
    """In one epoch, with the one that begins each document."""

    @classmethod
    def of(cls, corpus: Corpus, tokenizer: RustBPETokenizer) -> TextSize:
        """Counted where the corpus is small, else estimated from its first megabyte.

        Raises:
            BadShardError: a shard can't be read, unless the corpus passes over such.
        """
        documents: list[str] = []
        num_bytes, complete = 0, False
        try:
            for text in corpus.documents("train"):
                documents.append(text[:SAMPLE_BYTES])
                num_bytes += len(text[:SAMPLE_BYTES].encode())
                if num_bytes >= SAMPLE_BYTES:
                    break
            else:
                complete = True
        except BadShardError:
            if not corpus.skip_bad_shards:
                raise
        tokens = sum(len(ids) + 1 for ids in tokenizer.encode(documents))
        if complete:
            return cls(max(1, num_bytes), max(1, tokens))
        whole = max(num_bytes, corpus.num_bytes("train"))
        return cls(whole, round(whole * (tokens / num_bytes if num_bytes else TOKENS_PER_BYTE)))

    def describe(self, epochs: float | None, seconds: float | None) -> str:
        """How much it is, and how often a run of so many seconds, if it follows the clock, reads it."""
        size = f"text: {format_bytes(self.num_bytes)}, about {self.tokens:,} tokens"
        if epochs is None:
            return f"{size} in an epoch"
        return f"{size}: {epochs:.1f} epochs" + (f" in {format_seconds(seconds)}" if seconds else "")

    def progress(self, state: TrainState) -> dict[str, float]:
        """Beside a validation value: the bits per byte of the latest training steps, and how often all was read."""
        nats_per_byte = state.average_loss * self.tokens / self.num_bytes  # with dropout, as it was trained
        return {"train_bpb": nats_per_byte / math.log(2), "epoch": state.tokens / self.tokens}

    def facts(self, state: TrainState) -> dict[str, float]:
        """For the report of a finished run."""
        epochs = state.tokens / self.tokens
        return {"epochs": epochs, "epoch of the minimum": epochs * (state.best_step or 0) / state.step}


def kept_weights(cfg: PretrainConfig, epochs: float | None) -> tuple[bool, bool]:
    """Whether a run keeps its best weights, and whether a mean of the latest ones may be these; says the latter."""
    repeats = epochs is None or epochs > 1 or bool(cfg.mean_weights)
    best = repeats if cfg.keep_best is None else cfg.keep_best
    mean = best and epochs is not None and epochs > MANY_EPOCHS
    mean = mean if cfg.mean_weights is None else cfg.mean_weights
    if mean:
        print0("the finished model has the best weights, those of a step or a mean of the latest (--mean_weights)")
    return best, mean


def add_dropout(model: GPT, share: float) -> None:
    """Zero this share of what every attention and MLP adds to the stream while `model` trains, and scale up the rest.

    The layers' own code knows nothing of it, nor does the config: a saved model has no dropout. Its random numbers
    are torch's, which checkpoints hold. Source: arXiv 1207.0580; where it stands, GPT-2.
    """

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, share, module.training)

    for module in model.blocks.modules():
        if isinstance(module, Attention | MLP):
            module.register_forward_hook(drop)
