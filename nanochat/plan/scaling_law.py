"""How good a model gets: bits per byte from its size and its text, and how far off that is.

    bpb = (E + A / N^α + B / D^β) · (1.10 for the classic recipe) · (1.06 on FineWeb-Edu)

The form and its exponents are Chinchilla's (Hoffmann et al. 2022, arXiv 2203.15556, approach 3); the other numbers are
fitted to published runs of nanochat's own code (dev/fit_scaling_law.py). N counts the weights a token is multiplied
with (blocks and lm_head: with these nanochat's author found the most regular laws); D is bytes of text, so that
vocabularies compare.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

ALPHA, BETA = 0.34, 0.28
# Units of N and D in the law.
PARAMS, BYTES = 1e8, 1e9
# Bytes per token of our tokenizer, trained on 34 MB of English Wikipedia and tried on other 5.3 MB (see dev/LOG.md).
BYTES_PER_TOKEN = {4096: 3.41, 8192: 3.85, 16384: 4.24, 32768: 4.54, 65536: 4.76}


@dataclass(frozen=True)
class Law:
    """The fitted numbers, with N in units of PARAMS and D in units of BYTES."""

    floor: float
    size: float
    text: float
    classic: float
    fineweb: float

    def bpb(self, matmul_params: float, text_bytes: float, classic: bool = False, fineweb: bool = False) -> float:
        """Predicted validation bits per byte."""
        loss = self.floor + self.size * (matmul_params / PARAMS) ** -ALPHA + self.text * (text_bytes / BYTES) ** -BETA
        return loss * (self.classic if classic else 1.0) * (self.fineweb if fineweb else 1.0)


# What `python -m dev.fit_scaling_law` prints; tests/test_scaling_law.py fits again.
LAW = Law(floor=0.5540, size=0.1379, text=0.2460, classic=1.0968, fineweb=1.0649)
# Root mean square error of each run's prediction by a law fitted to all the others, as a share; the largest was
# 11 %, for the run of 200 steps.
ERROR = 0.050


def bytes_per_token(vocab_size: int) -> float:
    """Bytes of English text in a token of our tokenizer; linear in the logarithm of the vocabulary."""
    known = sorted(BYTES_PER_TOKEN.items())
    pairs = list(itertools.pairwise(known))
    (v0, b0), (v1, b1) = next((pair for pair in pairs if vocab_size <= pair[1][0]), pairs[-1])
    share = math.log(vocab_size / v0) / math.log(v1 / v0)
    return max(1.0, b0 + share * (b1 - b0))


def predict_bpb(matmul_params: int, tokens: float, vocab_size: int, classic: bool, fineweb: bool = False) -> float:
    """Predicted validation bits per byte of a run over web text, ± ERROR.

    Args:
        matmul_params: `GPT.num_matmul_params()`.
        tokens: of the whole run, none seen twice.
        vocab_size: of the tokenizer.
        classic: the recipe.
        fineweb: trained on FineWeb-Edu; else on ClimbMix.
    """
    return LAW.bpb(matmul_params, tokens * bytes_per_token(vocab_size), classic, fineweb)
