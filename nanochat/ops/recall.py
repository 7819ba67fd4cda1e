"""Recall: what followed the longest earlier matches of the last tokens, in a text that the model carries along.

    the cat sat on the ...      <- a context; its last tokens are looked up
    ... a dog lay on the mat    <- 2 tokens match: "mat" followed
    ... she sat on the floor    <- 3 tokens match, the longest: "floor" followed

The text is a row of tokens with its positions in the order of what stands before them, read backwards, so that the
longest matches of a context are its neighbours in that order (a suffix array, as in infini-gram, arXiv 2401.17377).
Long matches are few and right, short ones many and vague, and any is worth more where the text before it has rare
tokens in common with the context: a model learns how much to trust each length and each such level, and the mean of
what followed, weighed by that, is an input of it (`GPT.embed`). It costs no product. In training a document is never
found in itself, else a model would learn to copy what no new text has.

Shapes: N tokens of text, n tokens that are looked up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.ops.linear import embedding

LONGEST, SHORTEST = 8, 2  # tokens of a match: more are not told apart, fewer do not count
FOLLOWERS = 64  # matches that are taken, at most
NEIGHBOURS = 96  # how far to look for them in either direction, past those that do not count
WINDOW = 128  # tokens before a match, and of the context, that are compared for their subject
LEVELS, LEVEL = 12, 8  # how alike two subjects are, and the weight of the tokens in common for each level
KINDS = (LONGEST + 1) * LEVELS  # of a match, by its length and its level
MOST_IDS = 2**31 // KINDS  # a token and a kind are one number
COMMON = 200  # a token that is one of so many or more of a text says nothing of a subject
SURENESS = (LONGEST - SHORTEST + 1, 4, 4)  # how good the best matches are: length, number of these, level in 4 grades

# How matches are found and told apart, as an export's config.json says it: its own code goes by that, ours does not.
FORM = {
    "recall_lengths": [SHORTEST, LONGEST],
    "recall_followers": FOLLOWERS,
    "recall_neighbours": NEIGHBOURS,
    "recall_window": WINDOW,
    "recall_levels": [LEVELS, LEVEL],
    "recall_common": COMMON,
    "recall_sureness": [*SURENESS[1:]],
}
NONE = -1e4  # finite: a softmax of nothing else has gradients, too

Ints = npt.NDArray[np.int32]


def _crate() -> Any:
    try:
        from rustbpe import matches  # lazy: a model runs without the crate
    except ImportError:
        return None
    return None if matches.library() is None else matches


def in_rust() -> bool:
    """Whether a text is looked up in Rust: numpy takes longer for a token than a small model's training step."""
    return _crate() is not None


def keys(text: Ints, at: npt.NDArray[np.int64], start: npt.NDArray[np.int64] | int = 0) -> Ints:
    """The tokens up to positions `at` (n,), backwards, (n, LONGEST); −1 before `start`, where a text begins."""
    back = at[:, None] - np.arange(LONGEST)
    return np.where(back >= np.reshape(start, (-1, 1)), text[np.maximum(back, 0)], -1)


def order_of(text: Ints) -> Ints:
    """The positions that a token follows, 0 … N − 2, in the order of their keys; equal ones as in the text."""
    order, few = np.arange(len(text) - 1), text.max() < 0xFFFF
    for distance in reversed(range(LONGEST)):  # a stable sort by the last part of the key first
        before = order - distance
        part = np.where(before >= 0, text[np.maximum(before, 0)] + 1, 0)
        # 16 bits are sorted by counting, several times as fast.
        order = order[np.argsort(part.astype(np.uint16) if few else part, kind="stable")]
    return order.astype(np.int32)


def _less(a: Ints, b: Ints) -> npt.NDArray[np.bool_]:
    """Whether keys a come before keys b, (n, LONGEST) each."""
    first = (a != b).argmax(1)[:, None]  # where they part; 0 where they do not
    return np.take_along_axis(a, first, 1)[:, 0] < np.take_along_axis(b, first, 1)[:, 0]


def places(text: Ints, order: Ints, wanted: Ints) -> npt.NDArray[np.int64]:
    """How many positions of the text have smaller keys than each of `wanted` (n, LONGEST)."""
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(order))
    while (open_ := low < high).any():
        middle = (low + high) // 2
        smaller = _less(keys(text, order[np.minimum(middle, len(order) - 1)].astype(np.int64)), wanted) & open_
        low, high = np.where(smaller, middle + 1, low), np.where(open_ & ~smaller, middle, high)
    return low


def weights_of(text: Ints) -> Ints:
    """What each token says of the subject of a text: 0 for a frequent one, + 1 for each time it is half as frequent."""
    ratio = len(text) // (COMMON * np.maximum(np.bincount(text), 1))
    return np.frexp(ratio)[1].astype(np.int32)  # the bits of a whole number


def find(
    text: Ints,
    order: Ints,
    weights: Ints,
    tokens: Ints,
    bounds: Ints | None = None,
    rank: Ints | None = None,
    begins: Ints | None = None,
    skip: int = 0,
) -> Ints:
    """What followed the longest matches of each of `tokens` and those before it.

    Args:
        text: (N,) tokens, at least two. Its first is what documents begin with: no context reaches beyond such a one.
        order: `order_of(text)`.
        weights: `weights_of(text)`.
        tokens: (n,); −1 where there is none.
        bounds: document i is tokens[bounds[i]:bounds[i+1]], and no context reaches beyond its beginning; None: one.
        rank: the inverse of `order`, in training.
        begins: with `rank`: where each document stands in the text, in which it is not found then; −1: nowhere.
        skip: so many of the first tokens are context only.

    Returns:
        (n − skip, FOLLOWERS), the longest matches first: token that followed × KINDS + length × LEVELS + level, 0 where
        there are no more.
    """
    ends = np.array([0, len(tokens)], np.int32) if bounds is None else bounds
    if (crate := _crate()) is not None:
        return np.asarray(crate.find(text, order, weights, tokens, ends, rank, begins, skip))
    at, lengths = np.arange(len(tokens)), np.diff(ends)
    start = np.repeat(ends[:-1], lengths).astype(np.int64)
    opens = np.where(tokens == text[0], at, 0)
    start = np.maximum(start, np.maximum.accumulate(opens)) if len(tokens) else start
    wanted = keys(tokens, at, start)  # (n, LONGEST)
    place = np.full(len(tokens), -1)
    own = np.zeros((len(tokens), 2), np.int64)  # of the text: what is not looked at
    if rank is not None and begins is not None:
        for (a, b), stands in zip(pairwise(ends.tolist()), begins.tolist(), strict=True):
            if stands >= 0:
                own[a:b] = stands, stands + b - a
                place[a : min(b, a + len(rank) - stands)] = rank[stands : stands + b - a]  # the last one has none
    unknown = place < 0
    place[unknown] = places(text, order, wanted[unknown])
    out = np.zeros((len(tokens), FOLLOWERS), np.int32)
    # By turns the next above and the next below; a stable sort leaves the nearer first.
    steps = np.stack([np.arange(NEIGHBOURS), -1 - np.arange(NEIGHBOURS)], axis=1).ravel()
    for i in range(skip, len(tokens)):
        beside = place[i] + steps
        found = order[beside[(beside >= 0) & (beside < len(order))]].astype(np.int64)
        found = found[(found < own[i, 0]) | (found >= own[i, 1])]
        same = (keys(text, found) == wanted[i]) & (wanted[i] >= 0)
        length = np.cumprod(same, axis=1).sum(1)
        best = np.argsort(-length, kind="stable")[:FOLLOWERS]
        best = best[length[best] >= SHORTEST]
        found, length = found[best], length[best]
        level = levels(text, weights, found - length, tokens[max(start[i], i + 1 - WINDOW) : i + 1])
        out[i, : len(found)] = text[found + 1] * KINDS + length * LEVELS + level
    return out[skip:]


def levels(text: Ints, weights: Ints, at: npt.NDArray[np.int64], subject: Ints) -> npt.NDArray[np.int64]:
    """How much the tokens up to positions `at` (n,), before matches, have in common with `subject`, each once: (n,)."""
    back = at[:, None] - np.arange(-1, WINDOW)  # the match's first token, too: nothing is before a document
    before = np.where(back >= 0, text[np.maximum(back, 0)], text[0])
    inside = np.logical_and.accumulate(before != text[0], axis=1)[:, 1:]
    before = before[:, 1:]  # (n, WINDOW)
    before = np.sort(np.where(inside & np.isin(before, subject), before, -1), axis=1)
    first = np.diff(before, axis=1, prepend=-1) != 0
    return np.minimum((weights[before] * first).sum(1) // LEVEL, LEVELS - 1)


def first_trust() -> Tensor:
    """What a model trusts before it has learned: each token more of a match, or each level of its subject."""
    return torch.cat([0.7 * torch.arange(LONGEST + 1), 0.2 * torch.arange(LEVELS)])


OTHER_FORM = (
    "the model looks up its text as another version does (until November 2026: the mean of four followers): use the "
    "version that trained it, or train it again"
)


def _refuse_other_forms(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    if f"{prefix}scale" in state and f"{prefix}trust" not in state:
        raise ValueError(OTHER_FORM)


class Recall(nn.Module):
    """The text that a model carries, and what it makes of what it finds there.

    Args:
        size: N, tokens of the text; two or more.
        vocab_size: V, of the embedding of what followed.
        channels: C.
    """

    text: Tensor
    order: Tensor

    def __init__(self, size: int, vocab_size: int, channels: int) -> None:
        super().__init__()
        self.followers = embedding(vocab_size, channels)
        self.trust = nn.Parameter(torch.empty(LONGEST + 1 + LEVELS))  # by length, and by level
        self.scale = nn.Parameter(torch.ones(math.prod(SURENESS), channels))
        # In the model's checkpoints: without its text it is another model.
        self.register_buffer("text", torch.zeros(size, dtype=torch.int32))
        self.register_buffer("order", torch.zeros(size - 1, dtype=torch.int32))
        self.register_load_state_dict_pre_hook(_refuse_other_forms)
        self._copied: tuple[list[tuple[int, int]], tuple[Ints, Ints, Ints]] | None = None

    def carry(self, text: Ints) -> None:
        """Take a text of `size` tokens."""
        self.text.copy_(torch.from_numpy(text))
        self.order.copy_(torch.from_numpy(order_of(text)))

    def token_weights(self) -> Tensor:
        """`weights_of` the text."""
        return torch.from_numpy(self._on_host()[2])

    def _on_host(self) -> tuple[Ints, Ints, Ints]:
        """Text, order and weights where `find` can read them; copied from a card once."""
        now = [(tensor.data_ptr(), tensor._version) for tensor in (self.text, self.order)]
        if self._copied is None or self._copied[0] != now:
            text = self.text.cpu().numpy()
            self._copied = now, (text, self.order.cpu().numpy(), weights_of(text))
        return self._copied[1]

    def elsewhere(self) -> Callable[[Ints, Ints], Ints]:
        """For training: what followed each token's match in another document, from (tokens, bounds), see `find`."""
        text, order, weights = self._on_host()
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order), dtype=np.int32)
        # Of equal documents the last one: the others are texts that were read elsewhere, too.
        starts = [*np.flatnonzero(text == text[0]).tolist(), len(text)]
        stands = {hash(text[a:b].tobytes()): a for a, b in pairwise(starts)}

        def look_up(tokens: Ints, bounds: Ints) -> Ints:
            begins = [stands.get(hash(tokens[a:b].tobytes()), -1) for a, b in pairwise(bounds.tolist())]
            return find(text, order, weights, tokens, bounds, rank, np.array(begins, np.int32))

        return look_up

    def nothing(self, idx: Tensor) -> Tensor:
        """What `look_up` returns where it finds nothing: to time a pass without it."""
        return idx.new_zeros(*idx.shape, FOLLOWERS)

    def look_up(self, idx: Tensor, n: int = 0, first: Tensor | None = None) -> Tensor:
        """What followed tokens like the last ones of each row, see `find`: (B, n + T) -> (B, T, FOLLOWERS).

        The first `n` tokens are context only; `first` (B, T) is true where a document begins.
        """
        text, order, weights = self._on_host()
        rows = []
        for i, row in enumerate(idx.to("cpu", torch.int32).numpy()):
            starts = [] if first is None else (first[i].nonzero()[:, 0].cpu() + n).tolist()
            bounds = np.array([0, *starts, len(row)], np.int32)
            rows.append(find(text, order, weights, row, bounds, skip=n))
        return torch.from_numpy(np.stack(rows)).to(idx.device)

    def forward(self, found: Tensor) -> Tensor:
        """(B, T, FOLLOWERS) -> (B, T, C): a mean embedding of what followed, × a factor by how good the matches are."""
        kinds, ids = found % KINDS, found // KINDS  # (B, T, FOLLOWERS)
        lengths, levels = kinds // LEVELS, kinds % LEVELS
        none = lengths == 0
        by_length, by_level = self.trust.float().split([LONGEST + 1, LEVELS])
        trust = by_length[lengths] + by_level[levels]
        share = trust.masked_fill(none, NONE).softmax(-1).masked_fill(none, 0)  # all 0 where nothing was found
        weights = share.reshape(-1, FOLLOWERS).to(self.followers.weight.dtype)
        mean = F.embedding_bag(
            ids.reshape(-1, FOLLOWERS), self.followers.weight, mode="sum", per_sample_weights=weights
        ).view(*found.shape[:-1], -1)
        longest = lengths[..., 0]
        _, many, grades = SURENESS
        number = (lengths == longest[..., None]).sum(-1).clamp(max=many) - 1
        grade = levels.amax(-1) * grades // LEVELS
        sureness = ((longest - SHORTEST).clamp(min=0) * many + number) * grades + grade
        return mean * F.embedding(sureness, self.scale)
