"""How two heads begin that find what followed an earlier occurrence of the current token.

A head of the first layer looks at the token before and writes its embedding into the stream; a head of the second layer
compares that with the current token. A model learns such a pair by itself, but a short run may end before it has
(Olsson et al. 2022, arXiv 2209.11895, "induction heads"). Only the weights' beginning differs: training moves them as
all others, and the model stays the same function of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nanochat.ops.pointwise import apply_rotary, rotary_tables, split_key

FAST_PAIRS = 4  # pairs of channels that tell neighbours apart: those that rotate fastest
SHARE = 0.1  # of an embedding's square that its constant channel has
CONSTANT, CONTENT = 3.0, 0.3  # size of what is the same for every token in a query or key, and of what is not
WRITTEN = 1.5  # size of the token before in the stream, relative to the token's own embedding
OTHER = 0.1  # what remains of the random weights of the second layer's head


@torch.no_grad()
def start_induction(
    embedding: Tensor,
    blocks: Iterable[Any],
    head_dim: int,
    rope_base: float,
    generator: torch.Generator | None = None,
) -> None:
    """Change fresh weights in place: the first heads of the first two layers become such a pair.

    A model of one layer only gets the head that looks back.

    Args:
        embedding: (V, C); its last channel becomes the same for every token.
        blocks: the first two layers, each with `attn.c_q`, `c_k`, `c_v` and `c_proj`.
        head_dim: D.
        rope_base: of the rotary frequencies.
        generator: of the random directions.
    """
    first, *later = (block.attn for block in blocks)
    _look_back(embedding, first.c_q.weight[:head_dim], first.c_k.weight[:head_dim], rope_base)
    for attn in later:
        read, written = _write_seen(first.c_v.weight[:head_dim], first.c_proj.weight[:, :head_dim], generator)
        _match(attn.c_q.weight[:head_dim], attn.c_k.weight[:head_dim], read, written)


def _look_back(embedding: Tensor, query: Tensor, key: Tensor, rope_base: float) -> None:
    """A head with these queries and keys, (D, C) each, attends to the position before, whatever the tokens are."""
    channels, head_dim = embedding.size(1), query.size(0)
    # The embedding is normalised before it is used: the size is relative to that of the other channels.
    others = embedding[:, :-1].square().sum(1).mean()
    embedding[:, -1] = (others * SHARE / (1 - SHARE)).sqrt()
    seen = math.sqrt(SHARE * channels)  # the constant channel, behind the norm
    # The same vector is every token's query; turned by one position it is every token's key. Rotated by where they
    # stand they agree where the query stands one further, and fast rotations disagree everywhere else.
    constant = torch.zeros(head_dim, device=query.device)
    constant[: min(FAST_PAIRS, head_dim // 2)] = 1.0
    constant *= CONSTANT * math.sqrt(head_dim) / constant.norm() / seen
    cos, sin = (table[1].to(query.device) for table in rotary_tables(2, head_dim, rope_base))
    for rows, wanted in ((query, constant), (key, apply_rotary(constant, cos, sin))):
        rows *= CONTENT
        rows[:, -1] = wanted


def _write_seen(value: Tensor, output: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The first layer's head, value (D, C) and output (C, D), writes what it sees; returns what is read and written."""
    head_dim, channels = value.shape
    draw = torch.randn(channels, channels, generator=generator, device=value.device)
    directions = torch.linalg.qr(draw)[0]
    # What is read of a token, and where it is written: apart from each other where the stream is wide enough.
    read = directions[:head_dim]
    written = directions[head_dim : 2 * head_dim] if channels >= 2 * head_dim else read.roll(1, 0)
    value.copy_(read)
    output.copy_(WRITTEN * written.T)
    return read, written


def _match(query: Tensor, key: Tensor, read: Tensor, written: Tensor) -> None:
    """The next layer's head, (D, C) each, looks with its own token for positions whose token before is the same."""
    # Both heads' positions must not matter here: only the slow half of each half rotates hardly at all.
    slow = split_key(torch.arange(query.size(0)))[1].flatten()
    for rows, wanted in ((query, read), (key, written)):
        rows *= OTHER
        rows[slow] += wanted[: len(slow)]
