"""What small weights cost: how much worse a model predicts when its matrices are rounded to 8 or 4 bits.

Both ways run the decoder that will be used, and are in bits per byte. `Decoded` measures a validation loss, where there
is text. `rounding_cost` needs none: the model writes some itself, and at each token the two distributions p, of the
exact weights, and q, of the rounded ones, are compared. On text drawn from p the loss of q exceeds that of p by
KL(p ‖ q) = Σ p · (ln p − ln q) nats, on average.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.generate.fast_decode import Weights, make_decoder
from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import GPT
from nanochat.precision import Precision
from nanochat.tokenizer import RustBPETokenizer

ROWS, TOKENS = 16, 64  # texts, and the length of each


class Decoded(nn.Module):
    """Stands for a model where its losses are measured, and takes them from its decoder, a token at a time.

    Args:
        model: one that could have weights in integers.
        precision: of the run.
        weights: what the decoder reads the weights as.

    Raises:
        ValueError: the model cannot have such weights.
    """

    def __init__(self, model: GPT, precision: Precision, weights: Weights) -> None:
        super().__init__()
        self.config, self._model, self._dtype = model.config, model, precision.dtype
        decoder = make_decoder(model, precision, weights)
        assert decoder is not None  # whoever can have weights in integers has one
        self._decode = decoder.refresh()

    def forward(self, x: Tensor, y: Tensor, loss_reduction: str = "none") -> Tensor:
        """Losses (B, T) in nats of the tokens y after x, both (B, T); 0 where y is −1."""
        cache = KVCache.for_model(self._model, x.size(0), x.size(1), self._dtype)
        losses = [
            F.cross_entropy(self._decode(x[:, t : t + 1], cache), y[:, t], ignore_index=-1, reduction=loss_reduction)
            for t in range(x.size(1))
        ]
        return torch.stack(losses, dim=1)


@torch.inference_mode()
def rounding_cost(model: GPT, tokenizer: RustBPETokenizer, precision: Precision, weights: Weights) -> float:
    """Bits per byte that decoding with `weights` loses against "auto", on text that the model writes itself.

    The same for every call. Only for weights in integers, thus on a CPU.

    Raises:
        ValueError: the model cannot have such weights.
    """
    exact, rounded = (make_decoder(model, precision, kind) for kind in ("auto", weights))
    assert exact is not None  # as above
    assert rounded is not None
    length = min(TOKENS, model.config.sequence_len)
    caches = [KVCache.for_model(model, ROWS, length, precision.dtype) for _ in range(2)]
    token_bytes = torch.from_numpy(tokenizer.token_lengths())
    generator = torch.Generator().manual_seed(0)
    idx = torch.full((ROWS, 1), tokenizer.get_bos_token_id())
    nats = num_bytes = 0.0
    for _ in range(length):
        p, q = (
            decoder.refresh()(idx, cache).float().log_softmax(dim=-1)  # (B, V)
            for decoder, cache in zip((exact, rounded), caches, strict=True)
        )
        idx = torch.multinomial(p.exp(), 1, generator=generator)
        lengths = token_bytes[idx[:, 0]]
        divergence = (p.exp() * (p - q)).sum(dim=-1)  # (B,)
        nats += divergence[lengths > 0].sum().item()  # as in bits per byte, special tokens do not count
        num_bytes += lengths.sum().item()
    return nats / (math.log(2) * max(num_bytes, 1))


def rounding_notice(model: GPT, tokenizer: RustBPETokenizer, precision: Precision, weights: Weights) -> str:
    """A sentence that says what `weights` cost this model; empty unless they are integers."""
    if not weights.startswith("int"):
        return ""
    cost = rounding_cost(model, tokenizer, precision, weights)
    return f"{weights} weights cost {cost:.4f} bits per byte, measured on {ROWS * TOKENS:,} tokens of the model's own"
