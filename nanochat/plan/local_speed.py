"""What this machine needs for the operations of a training step, each measured alone.

Every kind of `nanochat.plan.roofline.Operation` is run here with its gradient, through the project's own functions and
at its own width, but on few tokens; time is proportional to the tokens beyond that. The training step itself is never
timed. Results are kept in the base dir, since a machine does not change.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.files import write_json
from nanochat.gpt import LOGIT_SOFTCAP, norm
from nanochat.hardware import speeds_key, synchronize
from nanochat.ops.attention import attend, plan_attention
from nanochat.ops.linear import linear, training_product_dtype
from nanochat.ops.loss import linear_cross_entropy
from nanochat.ops.pointwise import apply_rotary, relu_squared, rotary_tables
from nanochat.optim import MuonAdamW
from nanochat.plan.roofline import Operation
from nanochat.precision import DTYPES, Precision
from nanochat.recipe import Preset

MAX_TOKENS = 4096
MAX_MATRICES = 2
REPEATS = 5
OPERATIONS_FILE = "operation_speeds.json"


@dataclass
class LocalMachine:
    """Measures operations of this dtype on `device`. `path`: where results are kept; None: nowhere."""

    device: torch.device
    precision: Precision
    preset: Preset
    path: Path | None = None
    repeats: int = REPEATS
    _known: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._key = speeds_key(self.device, self.precision.product_dtype)
        if self.path is not None:
            with contextlib.suppress(OSError, ValueError):
                self._known = json.loads(self.path.read_text(encoding="utf-8")).get(self._key, {})

    def seconds(self, operation: Operation) -> float:
        """Time of one operation with its gradient."""
        small, factor = _shrink(operation)
        name = f"{small.kind} {'×'.join(map(str, small.shape))} {small.dtype} {self.preset.muon}"
        if name not in self._known:
            self._known[name] = self._measure(small)
            self._save()
        return factor * self._known[name]

    def _save(self) -> None:
        if self.path is None:
            return
        everything: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            everything = json.loads(self.path.read_text(encoding="utf-8"))
        write_json(self.path, everything | {self._key: self._known})

    def _measure(self, operation: Operation) -> float:
        run = _RUNS[operation.kind](self, operation)
        run()
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            run()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
        """Random numbers of a generator of their own, whose gradient is wanted."""
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(*shape, device=self.device, generator=generator).to(dtype)
        return x.requires_grad_(grad)


def _shrink(op: Operation) -> tuple[Operation, float]:
    """The same operation on few tokens, and how many times as long the whole takes."""
    if op.kind in ("attention", "rotary"):
        rows = max(1, min(op.shape[0], MAX_TOKENS // op.shape[1]))
        shape, factor = (rows, *op.shape[1:]), op.shape[0] / rows
    elif op.kind in ("linear", "norm", "relu2", "add", "loss", "embedding"):
        n = min(op.shape[0], MAX_TOKENS)
        shape, factor = (n, *op.shape[1:]), op.shape[0] / n
    else:
        shape, factor = op.shape, 1.0
    return Operation(op.kind, shape, 1, op.flops / factor, op.bytes / factor, op.dtype), factor


def _with_gradient(machine: LocalMachine, function: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    """Forward under autocast, and the gradients of `leaves`."""
    autocast = machine.precision.autocast
    with autocast():
        y = function()
    upstream = torch.ones_like(y)

    def run() -> None:
        with autocast():
            y = function()
        torch.autograd.grad(y, leaves, upstream)

    return run


def _stream_dtype(dtype: str) -> torch.dtype:
    """Of the residual stream."""
    return DTYPES["bfloat16" if dtype == "bfloat16" else "float32"]


def _linear(m: LocalMachine, op: Operation) -> Callable[[], None]:
    n, inputs, outputs = op.shape
    x, w = m.random(n, inputs, dtype=_stream_dtype(op.dtype)), m.random(outputs, inputs)
    return _with_gradient(m, lambda: linear(x, w, m.precision.product_dtype), x, w)


def _norm(m: LocalMachine, op: Operation) -> Callable[[], None]:
    x = m.random(*op.shape, dtype=_stream_dtype(op.dtype))
    return _with_gradient(m, lambda: norm(x), x)


def _rotary(m: LocalMachine, op: Operation) -> Callable[[], None]:
    dtype = DTYPES[op.dtype]
    x = m.random(*op.shape, dtype=dtype)
    cos, sin = (t.to(m.device)[None, :, None] for t in rotary_tables(op.shape[1], op.shape[3], 10000.0))
    return _with_gradient(m, lambda: norm(apply_rotary(x, cos, sin)).to(dtype), x)


def _relu2(m: LocalMachine, op: Operation) -> Callable[[], None]:
    x = m.random(*op.shape, dtype=DTYPES[op.dtype])
    return _with_gradient(m, lambda: relu_squared(x), x)


def _add(m: LocalMachine, op: Operation) -> Callable[[], None]:
    """x + f(x): the sum, and the sum of both gradients."""
    x, y = (m.random(*op.shape, dtype=_stream_dtype(op.dtype), grad=False) for _ in range(2))

    def run() -> None:
        x + y
        x + y

    return run


def _attention(m: LocalMachine, op: Operation) -> Callable[[], None]:
    rows, T, heads, kv_heads, size, window = op.shape
    q, k, v = (m.random(rows, T, h, size, dtype=DTYPES[op.dtype]) for h in (heads, kv_heads, kv_heads))
    pieces = plan_attention(T, T, m.device, window or None)

    def run() -> Tensor:
        return attend(q, k, v, pieces, product_dtype=m.precision.product_dtype).reshape(rows, T, heads * size)

    return _with_gradient(m, run, q, k, v)


def _embedding(m: LocalMachine, op: Operation) -> Callable[[], None]:
    n, rows, width = op.shape
    idx = torch.randint(0, rows, (n,), device=m.device, generator=torch.Generator(m.device).manual_seed(0))
    table = m.random(rows, width)
    return _with_gradient(m, lambda: F.embedding(idx, table).to(_stream_dtype(op.dtype)), table)


def _loss(m: LocalMachine, op: Operation) -> Callable[[], None]:
    n, width, vocab = op.shape
    x, w = m.random(n, width, dtype=_stream_dtype(op.dtype)), m.random(vocab, width)
    targets = torch.randint(0, vocab, (n,), device=m.device, generator=torch.Generator(m.device).manual_seed(0))

    def loss() -> Tensor:
        dtype = training_product_dtype(x, m.precision.product_dtype)
        return linear_cross_entropy(x, w, targets, vocab, LOGIT_SOFTCAP, "sum", dtype)

    return _with_gradient(m, loss, x, w)


def _muon(m: LocalMachine, op: Operation) -> Callable[[], None]:
    group = {"kind": "muon", "lr": 0.02, "ns_dtype": m.precision.muon_dtype, **m.preset.muon}
    return _optimizer(m, group, op.shape)


def _adamw(m: LocalMachine, op: Operation) -> Callable[[], None]:
    return _optimizer(m, {"kind": "adamw", "lr": 0.02}, op.shape)


def _optimizer(m: LocalMachine, group: dict[str, Any], shape: tuple[int, ...]) -> Callable[[], None]:
    parameter = torch.nn.Parameter(m.random(*shape, grad=False))
    optimizer = MuonAdamW([group | {"params": [parameter]}], distributed=False)
    gradient = m.random(*shape, grad=False)

    def run() -> None:
        parameter.grad = gradient
        optimizer.step(0.5)

    return run


def _accumulate(m: LocalMachine, op: Operation) -> Callable[[], None]:
    total, part = (m.random(*op.shape, grad=False) for _ in range(2))

    def run() -> None:
        total.add_(part)

    return run


def _grad_norm(m: LocalMachine, op: Operation) -> Callable[[], None]:
    x = m.random(*op.shape, grad=False)

    def run() -> None:
        torch.linalg.vector_norm(x)

    return run


_RUNS: dict[str, Callable[[LocalMachine, Operation], Callable[[], None]]] = {
    "linear": _linear,
    "norm": _norm,
    "rotary": _rotary,
    "relu2": _relu2,
    "add": _add,
    "attention": _attention,
    "embedding": _embedding,
    "loss": _loss,
    "muon": _muon,
    "adamw": _adamw,
    "accumulate": _accumulate,
    "grad_norm": _grad_norm,
}
