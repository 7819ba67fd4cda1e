"""Muon: momentum whose singular values are all moved to 1 before it becomes an update, for matrices of weights.

The polynomials, the refinements (NorMuon, MuonEq, cautious decay; all switches), and MuonStack, which updates many
matrices of one shape at once and works on its own share of them when there are several ranks.

Letters in shapes: N matrices of one shape, R rows, C columns; K <= N of them belong to this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat.ops import native
from nanochat.ops.collectives import Ranks
from nanochat.precision import DTYPES

MUON_DEFAULTS: dict[str, Any] = {
    "lr": 0.02,
    "momentum": 0.95,
    "ns_steps": 5,
    "weight_decay": 0.0,
    "coefficients": "quintic",  # or "polar"
    "beta2": None,  # NorMuon: decay of the second moment, e.g. 0.9
    "row_equalize": False,  # MuonEq: rows of equal length before the orthogonalisation
    "cautious": False,  # decay a weight only where the update shrinks it too
    "ns_dtype": None,  # dtype of the Newton-Schulz products, e.g. Precision.muon_dtype; None: newton_schulz_dtype()
}

# p(x) = a*x + b*x^3 + c*x^5, made steep at 0 rather than exact at 1: singular values land in about [0.7, 1.2].
# Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
QUINTIC = (3.4445, -4.7750, 2.0315)

# The best p for each step in turn (minimax on the interval where the singular values are by then, from [0.001, 1] on).
# Source: Polar Express, arXiv 2505.16932; tests/test_optim.py derives the same numbers with the Remez algorithm.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749518, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),  # the fixed point: exact at 1, repeated for any further step
)
# Widen the polynomials by 1 %, so that rounding lifts no singular value out of the interval.
POLAR_SAFETY = 1.01


def newton_schulz_coefficients(name: str, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of every Newton-Schulz step, for name "quintic" or "polar". Raises ValueError for another name."""
    if name == "quintic":
        return [QUINTIC] * steps
    if name != "polar":
        raise ValueError(f'coefficients is {name!r}, expected "quintic" or "polar"')
    s = POLAR_SAFETY
    safe = [(a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return safe[:steps] + [POLAR_EXPRESS[-1]] * (steps - len(safe))


def newton_schulz_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a card multiplies this tensor fast without overflow (never float16); elsewhere float32."""
    if x.dtype == torch.float64:
        return torch.float64
    fast = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return DTYPES["bfloat16" if fast else "float32"]


def orthogonalize(x: Tensor, coefficients: str = "quintic", steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Move all singular values of every matrix of x (N, R, C) towards 1; returns (N, R, C) in `dtype`, x is kept.

    x = U S V^T becomes U p(...p(S / norm)) V^T, by products only. Source: Jordan et al. 2024.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # work on the smaller side: the Gram matrix below is (C, C) instead of (R, R)
        x = x.mT
    # The Frobenius norm bounds the largest singular value. Divide before the cast: float16 ends at 65504.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)  # (N, 1, 1)
    if coefficients == "polar":
        norm = norm * POLAR_SAFETY
    x = newton_schulz((x / norm.clamp_min(1e-20)).to(dtype or newton_schulz_dtype(x)), coefficients, steps)
    return x.mT if tall else x


def newton_schulz(x: Tensor, coefficients: str, steps: int) -> Tensor:
    """The products of `orthogonalize`, for wide matrices x (N, R, C) whose singular values are at most 1."""
    for a, b, c in newton_schulz_coefficients(coefficients, steps):
        gram = x @ x.mT  # (N, R, R), eigenvalues S^2
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b S^2 + c S^4
        x = torch.baddbmm(x, poly, x, beta=a)  # a S + b S^3 + c S^5
    return x


def equalize_rows(x: Tensor) -> Tensor:
    """Scale every row of x (N, R, C) to length 1. Source: MuonEq (variant R), arXiv 2603.28254."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-20)


def normalize_neurons(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """Divide update (N, R, C) by the root of each neuron's running mean square; its Frobenius norm stays.

    second_moment, changed in place, is (N, R, 1) for tall matrices and (N, 1, C) for wide ones: along the shorter side
    orthogonalisation has equalised the norms already. Source: NorMuon, arXiv 2510.05491 (there: always by rows).
    """
    update = update.to(second_moment.dtype)
    over = -1 if second_moment.shape[-1] == 1 else -2
    square = update.square().mean(over, keepdim=True)  # (N, R, 1) or (N, 1, C)
    # A matrix without an update (see `MuonStack.look_ahead`) keeps its moment, too.
    alive = (square.amax((-2, -1), keepdim=True) != 0).to(square.dtype)  # (N, 1, 1)
    averaged = second_moment.lerp(square, (1 - beta2) * alive)
    scale = averaged.clamp_min(1e-10).rsqrt()
    before = square.sum((-2, -1), keepdim=True)  # (N, 1, 1), squared norm up to a constant
    after = (square * scale.square()).sum((-2, -1), keepdim=True).clamp_min(1e-10)
    scaled = update * (scale * (before / after).sqrt())
    second_moment.copy_(averaged)  # last: memory may run out before, and then all of this is done again
    return scaled


def state_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others: moments in 16 bits lose small updates."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class MuonStack:
    """Matrices of one shape, updated as one stack; each rank owns a run of whole matrices."""

    def __init__(self, group: dict[str, Any], params: list[Tensor], indices: list[int], ranks: Ranks) -> None:
        self.group, self.params, self.indices, self.ranks = group, params, indices, ranks
        self.own = params[ranks.own(len(params))]
        self.active: list[int] = []  # which of self.own have a gradient
        self.reduced: Tensor | None = None  # (K, R, C)
        self.state: dict[str, Tensor] = {}
        # (K, R, C), the parts of a step that are done already when it runs out of memory and is made again:
        self.looked_ahead: Tensor | None = None
        self.update: Tensor | None = None

    def reduce(self) -> Callable[[], None]:
        """Begin to average the gradients over the ranks; the result waits for the end."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        self.active = [i for i, p in enumerate(self.own) if p.grad is not None]
        wait = self.ranks.reduce_scatter(torch.stack(grads))  # (N, R, C) -> (K, R, C)
        for p in self.params:
            p.grad = None  # its content lives on in the stack

        def finish() -> None:
            self.reduced = wait()

        return finish

    def own_grads(self) -> list[Tensor]:
        """The averaged gradients of this rank's matrices."""
        if self.ranks.world == 1:
            return [p.grad for p in self.own if p.grad is not None]
        return [] if self.reduced is None else [self.reduced[i] for i in self.active]

    def clear(self) -> None:
        """Forget the averaged gradients."""
        self.reduced = self.looked_ahead = self.update = None

    def state_shapes(self, p: Tensor) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a parameter's optimizer state."""
        rows, cols = p.shape
        shapes: dict[str, tuple[int, ...]] = {"momentum_buffer": (rows, cols)}
        if self.group["beta2"] is not None:
            shapes["second_moment"] = (rows, 1) if rows >= cols else (1, cols)
        return shapes

    def init_state(self) -> None:
        """Begin with state of zeros."""
        p, count = self.params[0], len(self.own)
        self.state = {
            key: torch.zeros(count, *shape, dtype=state_dtype(p), device=p.device)  # (K, ...)
            for key, shape in self.state_shapes(p).items()
        }

    def step(self, multiplier: Tensor | float) -> None:
        """Update this rank's part, with gradients times `multiplier`."""
        if not self.state:
            self.init_state()
        if self.ranks.world == 1:
            self.active = [i for i, p in enumerate(self.own) if p.grad is not None]
        if not self.active:
            return
        everything = len(self.active) == len(self.own)
        if everything and (kernels := self._kernels()) is not None:
            self._step_natively(kernels, float(multiplier))
            return
        state = self.state if everything else {key: value[self.active] for key, value in self.state.items()}
        if self.looked_ahead is None:
            x = self.reduced if self.reduced is not None and everything else torch.stack(self.own_grads())
            x = x.to(state["momentum_buffer"].dtype)  # (K, R, C), ours to overwrite
            if isinstance(multiplier, Tensor) or multiplier != 1.0:
                x.mul_(multiplier)
            self.looked_ahead = self.look_ahead(x, state["momentum_buffer"])
            if not everything:
                self.state["momentum_buffer"][self.active] = state["momentum_buffer"]
        if self.update is None:
            self.update = self.direction(self.looked_ahead, state)
            if not everything and "second_moment" in state:
                self.state["second_moment"][self.active] = state["second_moment"]
        self.apply([self.own[i] for i in self.active], self.update)

    def _kernels(self) -> Any:
        """The crate's kernels for this stack, or None."""
        dtype = self.group["ns_dtype"] or newton_schulz_dtype(self.own[0])
        tensors = *self.own_grads(), *self.own, *self.state.values()
        # Parameters in 16 bits are rounded once, after all of the update: that stays with torch.
        if dtype not in native.CODES or any(t.dtype != DTYPES["float32"] for t in tensors):
            return None
        return native.kernels_for(*tensors, gradients=False)

    def _step_natively(self, kernels: Any, multiplier: float) -> None:
        """`look_ahead`, `direction` and `apply` in one pass before the products, and one after them."""
        group, (rows, cols) = self.group, self.own[0].shape
        if self.looked_ahead is None:
            safety = POLAR_SAFETY if group["coefficients"] == "polar" else 1.0
            dtype = group["ns_dtype"] or newton_schulz_dtype(self.own[0])
            settings = group["momentum"], group["row_equalize"], safety, dtype
            grads, momentum = self.own_grads(), self.state["momentum_buffer"]
            self.looked_ahead = native.muon_look_ahead(kernels, grads, momentum, multiplier, *settings)
        if self.update is None:
            how, tall = (group["coefficients"], group["ns_steps"]), rows > cols
            x = native.muon_products(kernels, self.looked_ahead, newton_schulz_coefficients(*how))
            if x is None:
                x = newton_schulz(self.looked_ahead.mT if tall else self.looked_ahead, *how)
                x = (x.mT if tall else x).contiguous()
            self.update = x
        rate = group["lr"] * max(1.0, rows / cols) ** 0.5
        moment, decay = self.state.get("second_moment"), rate * group["weight_decay"]
        beta2, cautious = group["beta2"] or 0.0, group["cautious"]
        native.muon_apply(kernels, self.own, self.update, moment, beta2, rate, decay, cautious)

    def look_ahead(self, grad: Tensor, momentum: Tensor) -> Tensor:
        """Nesterov's momentum (K, R, C); overwrites grad and the momentum, and needs no memory.

        A matrix whose gradient is exactly 0 keeps its momentum, and gets no update: 0.
        """
        # Orthogonalised momentum has the same size however small it is: without a signal it would go on moving the
        # matrix as far as before, for ever. As numbers, and not as a choice of matrices: no host sync.
        alive = (torch.linalg.vector_norm(grad, float("inf"), dim=(-2, -1), keepdim=True) != 0).to(grad.dtype)  # K,1,1
        # Before orthogonalising, not after: the average of gradients is what has meaningful singular directions; a mean
        # of orthogonal matrices would not be orthogonal any more.
        momentum.lerp_(grad, (1 - self.group["momentum"]) * alive)
        return grad.lerp_(momentum, self.group["momentum"] * alive)

    def direction(self, update: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The orthogonalised update (K, R, C); overwrites the second moment when all else is done."""
        group = self.group
        if group["row_equalize"]:
            update = equalize_rows(update)
        update = orthogonalize(update, group["coefficients"], group["ns_steps"], group["ns_dtype"])
        if group["beta2"] is not None:
            update = normalize_neurons(update, state["second_moment"], group["beta2"])
        return update

    def apply(self, params: list[Tensor], update: Tensor) -> None:
        """p -= lr * (update + weight_decay * p), lr scaled by the shape; cautious: decay only where update * p >= 0."""
        rows, cols = update.shape[-2:]
        # An orthogonal (R, C) with R > C keeps the length of its C-dim input but spreads it over R outputs: the factor
        # makes each of them move as in a square matrix.
        lr = self.group["lr"] * max(1.0, rows / cols) ** 0.5
        updates = list(update.to(params[0].dtype).unbind())
        decay = lr * self.group["weight_decay"]
        if decay and self.group["cautious"]:
            decayed = [torch.where(u * p >= 0, p, 0.0) for p, u in zip(params, updates, strict=True)]
            torch._foreach_sub_(params, decayed, alpha=decay)
        elif decay:
            torch._foreach_mul_(params, 1 - decay)
        torch._foreach_add_(params, updates, alpha=-lr)

    def share_params(self) -> Callable[[], None]:
        """Begin to gather the updated parts from all ranks; the result waits for the end."""
        empty = self.params[0].new_empty(0, *self.params[0].shape)
        wait = self.ranks.all_gather(torch.stack(self.own) if self.own else empty, len(self.params))

        def finish() -> None:
            torch._foreach_copy_(self.params, list(wait().unbind()))

        return finish

    def export_state(self) -> dict[int, dict[str, Tensor]]:
        """The state of all matrices, by index in the optimizer; all ranks take part."""
        whole = {key: self.ranks.collect(value, len(self.params)) for key, value in self.state.items()}
        return {index: {key: x[i] for key, x in whole.items()} for i, index in enumerate(self.indices) if whole}

    def export_own_state(self) -> dict[int, dict[str, Tensor]]:
        """The state of this rank's matrices."""
        own = self.indices[self.ranks.own(len(self.params))]
        return {index: {key: x[i] for key, x in self.state.items()} for i, index in enumerate(own) if self.state}

    def import_state(self, states: dict[int, dict[str, Tensor]]) -> None:
        """Take this rank's part of an exported state."""
        self.init_state()
        for i, index in enumerate(self.indices[self.ranks.own(len(self.params))]):
            for key, value in self.state.items():
                value[i].copy_(states[index][key])
