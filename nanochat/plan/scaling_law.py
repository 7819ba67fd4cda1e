"""How good a model gets: bits per byte from its size, its vocabulary and its text, and how far off that is.

    bpb = (E + A / N^α + H / V^γ + B / D^β) · (1.09 for the classic recipe) · (1.04 on FineWeb-Edu)

N are the weights of the blocks that a token is multiplied with, V those of lm_head (vocabulary × channels), D is bytes
of text, so that vocabularies compare. The form is that of Tao et al. 2024 (arXiv 2407.13623), which has an optimum of
the vocabulary that grows with compute; γ = 1.5·α is theirs, too. All other numbers are fitted to published runs of
nanochat's own code and to own runs (dev/fit_scaling_law.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

ALPHA, GAMMA, BETA = 0.16, 0.24, 0.24
# Units of N, V and D in the law.
PARAMS, BYTES = 1e8, 1e9
# Bytes per token of our tokenizer, trained on 34 MB of English Wikipedia and tried on other 5.3 MB (see dev/LOG.md).
BYTES_PER_TOKEN = {4096: 3.41, 8192: 3.85, 16384: 4.24, 32768: 4.54, 65536: 4.76}


@dataclass(frozen=True)
class Law:
    """The fitted numbers, with N and V in units of PARAMS and D in units of BYTES."""

    floor: float
    blocks: float
    head: float
    text: float
    classic: float
    fineweb: float
    wikipedia: float
    older: float
    """An older recipe, with which some own runs were made."""

    def bpb(self, block_params: float, head_params: float, text_bytes: float, factors: Iterable[str] = ()) -> float:
        """Predicted validation bits per byte; `factors` are names of fields."""
        loss = self.floor + self.blocks * (block_params / PARAMS) ** -ALPHA
        loss += self.head * (head_params / PARAMS) ** -GAMMA + self.text * (text_bytes / BYTES) ** -BETA
        return loss * math.prod(getattr(self, name) for name in factors)


# What `python -m dev.fit_scaling_law` prints; tests/test_scaling_law.py fits again.
LAW = Law(
    floor=0.4085,
    blocks=0.2267,
    head=0.02457,
    text=0.2897,
    classic=1.0880,
    fineweb=1.0361,
    wikipedia=0.9385,
    older=1.0557,
)
# Root mean square error of each published run's prediction by a law fitted to all the others, as a share; the largest
# was 10 %, for the run of 200 steps.
ERROR = 0.039


def bytes_per_token(vocab_size: int) -> float:
    """Bytes of English text in a token of our tokenizer; linear in the logarithm of the vocabulary."""
    known = sorted(BYTES_PER_TOKEN.items())
    pairs = list(itertools.pairwise(known))
    (v0, b0), (v1, b1) = next((pair for pair in pairs if vocab_size <= pair[1][0]), pairs[-1])
    share = math.log(vocab_size / v0) / math.log(v1 / v0)
    return max(1.0, b0 + share * (b1 - b0))


def predict_bpb(
    block_params: int, head_params: int, tokens: float, vocab_size: int, classic: bool, fineweb: bool = False
) -> float:
    """Predicted validation bits per byte of a run over web text, ± ERROR.

    Args:
        block_params: `GPT.num_matmul_params()` without those of lm_head.
        head_params: those of lm_head.
        tokens: of the whole run, none seen twice.
        vocab_size: of the tokenizer.
        classic: the recipe.
        fineweb: trained on FineWeb-Edu; else on ClimbMix.
    """
    factors = [name for name, applies in (("classic", classic), ("fineweb", fineweb)) if applies]
    return LAW.bpb(block_params, head_params, tokens * bytes_per_token(vocab_size), factors)
