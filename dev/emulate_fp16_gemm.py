"""Emulate on a CPU how a model learns with products that are accumulated in float16 (--fp16_gemm, for a P100).

    python dev/emulate_fp16_gemm.py --data FOLDER --steps 1000

Trains the same model on the same batches twice, with the factors and results of the blocks' products rounded to
float16: once accumulated in float32, as PyTorch does it, and once with every multiply-add of y and dx rounded to
float16, term by term, as a P100's fused half-precision multiply-add does, in the parts of nanochat/ops/fp16_gemm.py.
Everything else is float32 (a step in float16 takes a CPU minutes). Prints both losses and their difference, and the
error of one product. Needs a C++ compiler and a CPU with F16C and FMA. The text is read as bytes, so no tokenizer is
needed.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanochat.config import run_script
from nanochat.gpt import GPT, GPTConfig
from nanochat.ops.fp16_gemm import PART, HalfGemm, add_parts, layer_shapes, parts_of
from nanochat.ops.linear import Linear
from nanochat.optim import MuonAdamW
from nanochat.precision import DTYPES
from nanochat.recipe import parameter_groups

HALF = DTYPES["float16"]
LOSS_SCALE = 1024.0  # keeps the gradients within the range of float16

SOURCE = r"""
#include <immintrin.h>
#include <torch/extension.h>

// a (M, K) and bt (K, N) in float32 with float16 values, N a multiple of 8 -> (M, N), every partial sum in float16.
static inline __m256 round_half(__m256 x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

torch::Tensor half_sums(torch::Tensor a, torch::Tensor bt) {
    const int64_t M = a.size(0), K = a.size(1), N = bt.size(1);
    auto out = torch::empty({M, N}, a.options());
    const float *A = a.data_ptr<float>(), *B = bt.data_ptr<float>();
    float *C = out.data_ptr<float>();
    at::parallel_for(0, M, 8, [&](int64_t begin, int64_t end) {
        for (int64_t j = 0; j < N; j += 64) {
            const int vectors = std::min<int64_t>(64, N - j) / 8;
            for (int64_t i = begin; i < end; i++) {
                __m256 sum[8];
                for (int v = 0; v < vectors; v++) sum[v] = _mm256_setzero_ps();
                for (int64_t k = 0; k < K; k++) {
                    const __m256 x = _mm256_set1_ps(A[i * K + k]);
                    for (int v = 0; v < vectors; v++)
                        sum[v] = round_half(_mm256_fmadd_ps(x, _mm256_loadu_ps(B + k * N + j + 8 * v), sum[v]));
                }
                for (int v = 0; v < vectors; v++) _mm256_storeu_ps(C + i * N + j + 8 * v, sum[v]);
            }
        }
    });
    return out;
}
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The two runs."""

    data: str
    """Folder of parquet shards with a column `text`."""
    steps: int = 1000
    """Optimizer steps."""
    depth: int = 4
    """Layers."""
    rows: int = 2
    """Sequences per batch."""
    sequence_len: int = 256
    """Tokens per sequence."""
    part: int = PART
    """Longest sum in float16."""
    tail: int = 100
    """Number of last losses to average."""


def read_bytes(folder: str, count: int) -> Tensor:
    """The first `count` bytes of text in the first shard."""
    import pyarrow.parquet as pq

    text = bytearray()
    file = pq.ParquetFile(sorted(Path(folder).glob("*.parquet"))[0])
    for group in range(file.num_row_groups):
        for document in file.read_row_group(group, columns=["text"])["text"].to_pylist():
            text += document.encode() + b"\0"
        if len(text) >= count:
            return torch.tensor(list(text[:count]))
    raise ValueError(f"{folder} has fewer than {count} bytes of text: ask for fewer --steps")


def rounded(x: Tensor) -> Tensor:
    """x with float16's precision, in float32."""
    return x.to(HALF).float()


class EmulatedProducts(torch.autograd.Function):
    """A layer's three products as in `nanochat.ops.linear`, with float16 values in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gemm: HalfGemm) -> Tensor:
        x, weight = rounded(x), rounded(weight)
        ctx.save_for_backward(x, weight)
        ctx.gemm = gemm
        return rounded(gemm(x.flatten(0, -2), weight)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = rounded(grads[0]).flatten(0, -2)
        return rounded(ctx.gemm(grad, weight.t())).view(x.shape), rounded(grad.t() @ x.flatten(0, -2)), None


def train(cfg: Config, tokens: Tensor, name: str, gemm: HalfGemm) -> list[float]:
    """The losses of one run."""
    model = GPT(GPTConfig.from_depth(cfg.depth, 256, cfg.sequence_len))
    model.init_weights(torch.Generator().manual_seed(0))
    for layer in model.blocks.modules():
        if isinstance(layer, Linear):
            layer.forward = lambda x, w=layer.weight: EmulatedProducts.apply(x, w, gemm)  # type: ignore[method-assign]
    groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.01, weight_decay=0.0)
    optimizer = MuonAdamW(groups)
    losses: list[float] = []
    start = time.time()
    for batch in tokens.view(cfg.steps, cfg.rows, cfg.sequence_len + 1):
        loss = model(batch[:, :-1], batch[:, 1:])
        (loss * LOSS_SCALE).backward()
        norm = float(optimizer.grad_norm()) / LOSS_SCALE
        if not math.isfinite(norm):
            raise RuntimeError(f"{name}: the gradients overflowed at step {len(losses)}")
        optimizer.step(1.0 / (LOSS_SCALE * max(1.0, norm)))
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * min(1.0, 2.5 * (1 - len(losses) / cfg.steps))
        if len(losses) % 100 == 0:
            recent = sum(losses[-cfg.tail :]) / len(losses[-cfg.tail :])
            print(f"{name}: step {len(losses)}, loss {recent:.4f}, {time.time() - start:.0f} s", flush=True)
    return losses


def main(cfg: Config) -> None:
    """Run both and compare them."""
    from torch.utils.cpp_extension import load_inline

    flags = ["-O3", "-mavx2", "-mfma", "-mf16c"]
    module = load_inline("half_sums", SOURCE, functions=["half_sums"], extra_cflags=flags)

    def float16_sums(a: Tensor, b: Tensor) -> Tensor:
        count = parts_of(a.size(1), cfg.part) or 1
        pairs = zip(a.chunk(count, dim=1), b.chunk(count, dim=1), strict=True)
        return add_parts(torch.stack([module.half_sums(x.contiguous(), y.t().contiguous()) for x, y in pairs]))

    def float32_sums(a: Tensor, b: Tensor) -> Tensor:
        return a @ b.t()

    channels = GPTConfig.from_depth(cfg.depth, 256, cfg.sequence_len).n_embd
    for m, n, k in layer_shapes(channels, 64):
        a, b = rounded(torch.randn(m, k)), rounded(torch.randn(n, k) * k**-0.5)
        exact = a.double() @ b.double().t()
        errors = [float((rounded(y).double() - exact).norm() / exact.norm()) for y in (float16_sums(a, b), a @ b.t())]
        print(f"product ({m}, {k}) × ({k}, {n}): error {errors[0]:.2e}, accumulated in float32 {errors[1]:.2e}")
    tokens = read_bytes(cfg.data, cfg.steps * cfg.rows * (cfg.sequence_len + 1))
    ends = {}
    for gemm in (float32_sums, float16_sums):
        losses = train(cfg, tokens, gemm.__name__, gemm)
        ends[gemm.__name__] = sum(losses[-cfg.tail :]) / cfg.tail
    apart = ends["float16_sums"] / ends["float32_sums"] - 1
    print(f"mean loss of the last {cfg.tail} of {cfg.steps} steps: {ends}; {apart:+.2%} apart")


if __name__ == "__main__":
    run_script(main, Config)
