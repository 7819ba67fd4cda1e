"""The optimizer: equal to torch's AdamW, to a float64 SVD picture of Muon, and to itself on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanochat import muon, optim
from nanochat.checkpoint_manager import merge_shards
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import POLAR_EXPRESS, equalize_rows, newton_schulz_coefficients, normalize_neurons, orthogonalize
from nanochat.optim import MuonAdamW
from nanochat.recipe import PRESETS, Schedule, parameter_groups

COEFFICIENTS = ["quintic", "polar"]
EVERYTHING = {"beta2": 0.9, "row_equalize": True, "cautious": True, "weight_decay": 0.3, "coefficients": "polar"}


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def polynomial_by_svd(x: Tensor, name: str, steps: int) -> Tensor:
    """What orthogonalize() computes, said in singular values: U p(...p(S / norm)) V^T, in float64."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() * (1.01 if name == "polar" else 1.0))
    for a, b, c in newton_schulz_coefficients(name, steps):
        s = a * s + b * s**3 + c * s**5
    return u * s[..., None, :] @ vh


# --- AdamW


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("multiplier", [1.0, 0.25, torch.tensor(0.25)])
def test_adamw_equals_torch(dtype, tolerance, multiplier):
    ours = parameters((33, 7), (5,), (), (64, 40), dtype=dtype)
    theirs = copies(ours)
    settings_ = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    a, b = MuonAdamW([{"kind": "adamw", "params": ours, **settings_}]), torch.optim.AdamW(theirs, **settings_)
    for step in range(15):
        set_gradients(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad * multiplier
        if step % 4 == 0:  # a parameter without gradient has no update, no decay, and its bias correction waits
            ours[0].grad = theirs[0].grad = None
        a.reduce_gradients()
        a.step(grad_multiplier=multiplier)
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= tolerance * (1 + q.abs().max())


def test_adamw_keeps_float32_moments_for_16_bit_parameters():
    params = parameters((20, 10), dtype=torch.bfloat16)
    before = params[0].detach().clone()
    optimizer = MuonAdamW([{"kind": "adamw", "params": params, "lr": 0.1}])
    set_gradients(params, 0)
    optimizer.step()
    assert {x.dtype for x in optimizer.flat_state().values()} == {torch.float32}
    torch.testing.assert_close(before - params[0], 0.1 * params[0].grad.sign(), rtol=0, atol=0.02)


# --- Muon


def test_polar_express_coefficients_are_the_minimax_polynomials():
    """Remez: p is best on [low, high] when its error takes its largest value four times with changing sign."""
    low, high, cushion, safety = 1e-3, 1.0, 0.02407327424182761, 1.01
    derived = []
    for _ in range(len(POLAR_EXPRESS) - 1):
        start = max(low, cushion * high)  # a cushion: a polynomial too steep at 0 is worse in the middle
        if start / high > 1 - 5e-6:
            abc = np.array([15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5])
        else:
            points = np.linspace(start, high, 4)
            for _ in range(50):
                system = np.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
                a, b, c, _error = np.linalg.solve(system, np.ones(4))
                root = math.sqrt(9 * b * b - 20 * a * c)  # p'(x) = a + 3 b x^2 + 5 c x^4 = 0
                points[1:3] = np.sqrt(np.sort([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)]))
            abc = np.array([a, b, c])
        power = np.array([1, 3, 5])
        abc *= 2 / (abc @ low**power + abc @ high**power)  # centre the image of [low, high] around 1
        low = float(abc @ low**power)
        high = 2 - low
        derived.append(abc)
    np.testing.assert_allclose(POLAR_EXPRESS[:-1], derived, rtol=2e-6)
    safe = [abc / safety**power for abc in derived]
    np.testing.assert_allclose(newton_schulz_coefficients("polar", 7), safe, rtol=2e-6)
    assert newton_schulz_coefficients("polar", 9)[7:] == [(1.875, -1.25, 0.375)] * 2


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 4),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    name=st.sampled_from(COEFFICIENTS),
    scale=st.sampled_from([1e-8, 1.0, 1e6]),
)
def test_orthogonalize_equals_the_svd_picture(n, rows, cols, name, scale):
    x = torch.randn(n, rows, cols, generator=torch.Generator().manual_seed(rows * 41 + cols)) * scale
    kept = x.clone()
    out = orthogonalize(x, name, 5)
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert torch.equal(x, kept)
    assert (out - polynomial_by_svd(x, name, 5)).abs().max() < 1e-4
    one_by_one = torch.cat([orthogonalize(x[i : i + 1], name, 5) for i in range(n)])
    assert (out - one_by_one).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16)])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_move_towards_one(name, shape):
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = torch.linalg.svdvals(x / torch.linalg.matrix_norm(x, keepdim=True))
    distances = [(start - 1).abs().max()]
    for steps in (2, 5, 8):
        distances.append((torch.linalg.svdvals(orthogonalize(x, name, steps)) - 1).abs().max())
    assert distances[1] < distances[0]
    assert distances[2] < 0.35
    assert distances[3] < (1e-6 if name == "polar" else 0.35)  # the quintic stays in its band, the other converges
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    assert ((orthogonalize(x, name, 5) * (u @ vh)).sum((-2, -1)) > 0.8 * min(shape)).all()  # along the polar factor


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e9, 1e15])
def test_float16_newton_schulz_does_not_overflow(name, scale):
    x = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    x[1] = x[1, :1]  # rank one: its singular value equals the norm, the largest there can be
    out = orthogonalize(x * scale, name, 5, torch.float16)
    assert out.dtype == torch.float16
    assert out.isfinite().all()
    assert (out[0] - polynomial_by_svd(x[0], name, 5)).abs().max() < 0.02


def test_newton_schulz_dtype_follows_the_device(monkeypatch):
    x = torch.zeros(1, 2, 2)
    assert muon.newton_schulz_dtype(x) == torch.float32
    assert muon.newton_schulz_dtype(x.double()) == torch.float64

    class OnCuda:
        dtype, device = torch.float32, torch.device("cuda", 0)

    for capability, expected in [((6, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert muon.newton_schulz_dtype(OnCuda()) == expected


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(12, 12), (10, 30), (30, 10)])
def test_muon_step_equals_the_formula(name, shape):
    (p,) = params = parameters(shape)
    expected, momentum = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = MuonAdamW(
        [{"kind": "muon", "params": params, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.2, "coefficients": name}]
    )
    lr = 0.1 * math.sqrt(max(1.0, shape[0] / shape[1]))
    for step in range(4):
        set_gradients(params, step)
        momentum = 0.9 * momentum + 0.1 * p.grad
        nesterov = 0.1 * p.grad + 0.9 * momentum
        expected = expected * (1 - lr * 0.2) - lr * polynomial_by_svd(nesterov, name, 5)
        optimizer.step()
        assert (p - expected).abs().max() < 1e-10


def test_refinements_do_what_their_names_say():
    x = torch.randn(3, 20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(equalize_rows(x).norm(dim=-1), torch.ones(3, 20, dtype=torch.float64))
    second_moment = torch.zeros(3, 1, 50, dtype=torch.float64)
    out = normalize_neurons(x, second_moment, 0.9)
    torch.testing.assert_close(out.norm(dim=(-2, -1)), x.norm(dim=(-2, -1)))  # the step stays as long
    columns = out.norm(dim=-2)  # and each neuron has an equal part in it
    torch.testing.assert_close(columns, columns.mean(-1, keepdim=True).expand_as(columns))
    torch.testing.assert_close(second_moment, 0.1 * x.square().mean(-2, keepdim=True))
    assert not normalize_neurons(torch.zeros(1, 4, 4), torch.zeros(1, 4, 1), 0.9).any()


def test_cautious_decay_spares_weights_that_the_update_enlarges():
    plain, cautious = parameters((16, 16)), parameters((16, 16))
    still = copies(plain)
    for params, extra in [(still, {}), (plain, {"weight_decay": 0.5}), (cautious, EVERYTHING | {"weight_decay": 0.5})]:
        group = {"kind": "muon", "params": params, "lr": 0.1, **extra, "beta2": None, "row_equalize": False}
        optimizer = MuonAdamW([group | {"coefficients": "quintic"}])
        set_gradients(params, 0)
        optimizer.step()
    start = parameters((16, 16))[0].detach()
    update = start - still[0].detach()
    agrees = update * start >= 0
    assert 0 < agrees.sum() < agrees.numel()
    torch.testing.assert_close(cautious[0][agrees], plain[0][agrees])
    torch.testing.assert_close(cautious[0][~agrees], still[0][~agrees])


@pytest.mark.parametrize("extra", [{}, EVERYTHING], ids=["classic", "everything"])
def test_batched_equals_one_by_one(extra, monkeypatch):
    shapes = [(12, 20), (20, 12), (12, 20), (12, 20), (20, 12), (8, 8)]
    together, alone, split = (parameters(*shapes) for _ in range(3))
    optimizers = [MuonAdamW([{"kind": "muon", "params": together, **extra}])]
    optimizers += [MuonAdamW([{"kind": "muon", "params": [p], **extra}]) for p in alone]
    monkeypatch.setattr(optim, "STACK_ELEMENTS", 2 * 12 * 20)
    optimizers.append(MuonAdamW([{"kind": "muon", "params": split, **extra}]))
    assert len(optimizers[0].buckets) == 3
    assert len(optimizers[-1].buckets) == 4
    for step in range(6):
        for params in (together, alone, split):
            set_gradients(params, step)
            params[step % 3].grad = None  # no gradient: this matrix and its state stay
        for optimizer in optimizers:
            optimizer.step(0.5)
    for a, b, c in zip(together, alone, split, strict=True):
        assert (a - b).abs().max() < 1e-12
        assert (a - c).abs().max() < 1e-12


@pytest.mark.parametrize("extra", [{}, EVERYTHING | {"weight_decay": 0.0}], ids=["classic", "everything"])
def test_a_gradient_of_exactly_zero_moves_nothing(extra):
    """Orthogonalised momentum is as long after a step without a signal as with one: it must not be applied."""
    still, alone = parameters((12, 20), (12, 20)), parameters((12, 20), (12, 20))
    optimizers = [MuonAdamW([{"kind": "muon", "params": params, **extra}]) for params in (still, alone)]
    for step in range(5):
        for params in (still, alone):
            set_gradients(params, step)
        if step in (2, 3):
            still[0].grad.zero_()
            alone[0].grad = None  # the same as no gradient at all: momentum and second moment stay, too
        before = [p.detach().clone() for p in still]
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(still[0], before[0]) == (step in (2, 3))
        assert not torch.equal(still[1], before[1])
    for a, b in zip(still, alone, strict=True):
        assert (a - b).abs().max() < 1e-12


class Rewritten:
    """The recipes' optimizer once more, tensor by tensor from the formulas, with orthogonalisation by SVD."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        self.params = {name: p.detach().clone() for name, p in params.items()}
        self.memory: dict[str, list[Tensor]] = {}
        self.steps = 0

    def step(self, groups: dict[str, dict[str, Any]], grads: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, p in self.params.items():
            update = self.muon if groups[name]["kind"] == "muon" else self.adamw
            self.params[name] = update(name, p, grads[name], groups[name])

    def adamw(self, name: str, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        mean, square = self.memory.get(name, [torch.zeros_like(p), torch.zeros_like(p)])
        mean, square = beta1 * mean + (1 - beta1) * grad, beta2 * square + (1 - beta2) * grad**2
        self.memory[name] = [mean, square]
        p = p - group["lr"] * group["weight_decay"] * p
        rooted = (square / (1 - beta2**self.steps)).sqrt() + group["eps"]
        return p - group["lr"] * mean / (1 - beta1**self.steps) / rooted

    def muon(self, name: str, p: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        rows, cols = p.shape
        over = 1 if rows >= cols else 0  # neurons lie along the longer side
        momentum, second = self.memory.get(name, [torch.zeros_like(p), torch.zeros_like(p).mean(over, keepdim=True)])
        u = torch.zeros_like(p)
        if grad.any():
            momentum = group["momentum"] * momentum + (1 - group["momentum"]) * grad
            u = (1 - group["momentum"]) * grad + group["momentum"] * momentum
            if group["row_equalize"]:
                u = u / u.norm(dim=1, keepdim=True)
            u = polynomial_by_svd(u, group["coefficients"], group["ns_steps"])
            if group["beta2"] is not None:
                second = group["beta2"] * second + (1 - group["beta2"]) * (u**2).mean(over, keepdim=True)
                u, length = u / second.sqrt(), u.norm()
                u = u * length / u.norm()
        self.memory[name] = [momentum, second]
        lr = group["lr"] * max(1.0, rows / cols) ** 0.5
        decays = (u * p >= 0) if group["cautious"] else torch.ones_like(p)
        return p - lr * u - lr * group["weight_decay"] * decays * p


@pytest.mark.parametrize("recipe", PRESETS)
def test_every_recipe_equals_a_rewrite_in_float64_with_a_reload_in_the_middle(recipe):
    preset = PRESETS[recipe]
    config = GPTConfig(32, 60, n_layer=2, n_head=2, n_kv_head=1, n_embd=64, **preset.switches)

    def build() -> tuple[dict[str, torch.nn.Parameter], MuonAdamW]:
        torch.manual_seed(1)
        model = GPT(config).double()
        model.init_weights()
        rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.1}
        return dict(model.named_parameters()), MuonAdamW(parameter_groups(model, **rates, preset=preset))

    params, optimizer = build()
    schedule = Schedule(num_iterations=8, momentum=preset.momentum, decay_to_zero=preset.decay_to_zero)
    other = Rewritten(params)
    for step in range(8):
        if step == 4:  # as a resume does: new tensors, the weights by name, the state by name
            saved, weights = {k: v.clone() for k, v in optimizer.flat_state().items()}, params
            params, optimizer = build()
            for name, p in params.items():
                p.data.copy_(weights[name].data)
            optimizer.load_flat_state(saved)
        schedule.apply(optimizer.param_groups, step, 0.0)
        generator = torch.Generator().manual_seed(step)
        grads = {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) * 0.1 for n, p in params.items()}
        if step in (0, 5):  # as in the first step of a model whose outputs begin at 0
            grads["transformer.h.0.attn.c_q.weight"].zero_()
        name_of = {id(p): name for name, p in params.items()}
        groups = {name_of[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
        other.step(groups, grads)
        for name, p in params.items():
            p.grad = grads[name].clone()
        optimizer.step()
    for name, p in params.items():
        assert (p - other.params[name]).abs().max() < 1e-8, name  # an SVD rounds otherwise than products


# --- the class


def test_grad_norm_is_global_and_sees_non_finite_values():
    params = parameters((8, 8), (8, 8), (9,), dtype=torch.float32)
    groups = [{"kind": "muon", "params": params[:2]}, {"kind": "adamw", "params": params[2:]}]
    optimizer = MuonAdamW(groups)
    assert optimizer.grad_norm() == 0
    set_gradients(params, 0)
    expected = torch.cat([p.grad.flatten() for p in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm(), expected)
    for bad in (math.inf, -math.inf, math.nan):
        for p in params:
            set_gradients(params, 0)
            p.grad.view(-1)[3] = bad
            assert not optimizer.grad_norm().isfinite()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def run_steps(optimizer: MuonAdamW, params: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.param_groups[0]["momentum"] = 0.85 + 0.005 * step
        optimizer.step()


def test_state_survives_a_checkpoint(tmp_path):
    shapes = [(12, 20), (12, 20), (20, 12), (30, 6), (4,)]

    def build() -> tuple[list[torch.nn.Parameter], MuonAdamW]:
        params = parameters(*shapes, dtype=torch.float32)
        return params, MuonAdamW(
            [
                {"kind": "muon", "params": params[:3], "names": ["h.0", "h.1", "h.2"], **EVERYTHING},
                {"kind": "adamw", "params": params[3:], "names": ["wte", "scalars"]},
            ]
        )

    params, optimizer = build()
    assert optimizer.flat_state() == {}
    run_steps(optimizer, params, range(5))
    flat, whole = optimizer.flat_state(), optimizer.state_dict()
    assert flat["h.2.momentum_buffer"].shape == (20, 12)
    assert flat["wte.exp_avg"].shape == (30, 6)
    save_file(flat, tmp_path / "optim.safetensors")
    torch.save(whole, tmp_path / "optim.pt")
    weights = copies(params)
    run_steps(optimizer, params, range(5, 10))
    for load in (
        lambda o: o.load_flat_state(load_file(tmp_path / "optim.safetensors")),
        lambda o: o.load_state_dict(torch.load(tmp_path / "optim.pt", weights_only=True)),
    ):
        others, other = build()
        load(other)
        torch._foreach_copy_([p.data for p in others], [w.data for w in weights])
        run_steps(other, others, range(5, 10))
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_load_state_dict_brings_the_hyperparameters_back():
    params = parameters((4, 4))
    first = MuonAdamW([{"kind": "muon", "params": params, "lr": 0.3}])
    first.param_groups[0]["lr"] = 0.1
    second = MuonAdamW([{"kind": "muon", "params": params}])
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.1
    assert second.param_groups[0]["initial_lr"] == 0.3
    assert second.param_groups[0]["params"] == params


def test_wrong_state_is_refused():
    def build(kind: str, *shapes: tuple[int, ...]) -> MuonAdamW:
        params = parameters(*shapes)
        optimizer = MuonAdamW([{"kind": kind, "params": params}])
        run_steps(optimizer, params, range(1))
        return optimizer

    target = build("muon", (4, 6), (4, 6))
    with pytest.raises(ValueError, match="other parameter groups"):
        target.load_state_dict(build("adamw", (4, 6), (4, 6)).state_dict())
    with pytest.raises(ValueError, match=r"state of 1 is .*\(6, 4\)"):
        target.load_state_dict(build("muon", (4, 6), (6, 4)).state_dict())
    with pytest.raises(ValueError, match="state of 1 is missing"):
        target.load_flat_state(build("muon", (4, 6)).flat_state())
    with pytest.raises(ValueError, match=r"2\.momentum_buffer.* belongs to no parameter"):
        target.load_flat_state(build("muon", (4, 6), (4, 6), (4, 6)).flat_state())


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"kind": "sgd"}, 'expected "muon" or "adamw"'),
        ({"kind": "muon", "beta_2": 0.9}, "unknown keys in a muon group"),
        ({"kind": "muon", "coefficients": "cubic"}, 'expected "quintic" or "polar"'),
        ({"kind": "muon", "shape": (3,)}, "put these into an adamw group"),
        ({"kind": "adamw", "names": ["a", "b"]}, "1 params but 2 names"),
    ],
)
def test_wrong_groups_are_refused(group: dict[str, Any], message):
    shape = group.pop("shape", (3, 3))
    with pytest.raises(ValueError, match=message):
        MuonAdamW([{"params": parameters(shape), **group}])


def test_distributed_needs_a_process_group():
    with pytest.raises(RuntimeError, match="torchrun"):
        MuonAdamW([{"kind": "adamw", "params": parameters((3,))}], distributed=True)


# --- several ranks: every result below is computed by one spawn of three gloo processes

SHAPES = [(24, 24)] * 4 + [(24, 56)] + [(56, 24)] * 2 + [(67, 31), (1024,), (5,)]  # 67 * 31 divides by neither 2 nor 3
MATRICES = 7
MICRO_BATCHES = 6


def build_ranked() -> tuple[list[torch.nn.Parameter], MuonAdamW]:
    params = parameters(*SHAPES)
    halves = [
        {"kind": "muon", "params": params[:2], "lr": 0.02},
        {"kind": "muon", "params": params[2:MATRICES], "lr": 0.03, **EVERYTHING},
        {"kind": "adamw", "params": params[MATRICES:], "lr": 0.01, "weight_decay": 0.1},
    ]
    return params, MuonAdamW(halves)


def train(params: list[torch.nn.Parameter], optimizer: MuonAdamW, steps: range, rank: int, world: int) -> list[float]:
    """Steps with clipping on a toy loss, MICRO_BATCHES micro-batches divided over the ranks; returns the norms."""
    norms = []
    for step in steps:
        for micro_batch in range(rank, MICRO_BATCHES, world):
            targets = parameters(*SHAPES, seed=1000 + step * MICRO_BATCHES + micro_batch)
            loss = sum(
                ((p - t.detach()) ** 2).sum() * (i + 1) for i, (p, t) in enumerate(zip(params, targets, strict=True))
            )
            (loss * world / MICRO_BATCHES).backward()
        if step % 5 == 3:
            params[0].grad = params[-2].grad = None
        optimizer.reduce_gradients()
        norm = optimizer.grad_norm()
        norms.append(float(norm))
        optimizer.step((50.0 / norm).clamp(max=1.0))
        optimizer.zero_grad()
    return norms


def result(params: list[torch.nn.Parameter], optimizer: MuonAdamW, norms: list[float]) -> dict[str, Any]:
    weights = [p.detach().clone() for p in params]
    flat, own = optimizer.flat_state(), clone(optimizer.own_flat_state())
    return {"weights": weights, "state": optimizer.state_dict(), "flat": flat, "own": own, "norms": norms}


def continue_from(saved: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    params, optimizer = build_ranked()
    torch._foreach_copy_([p.data for p in params], saved["weights"])
    optimizer.load_state_dict(saved["state"])
    return result(params, optimizer, train(params, optimizer, range(10, 20), rank, world))


def bad_gradients(rank: int) -> list[bool]:
    """Whether grad_norm() is finite when one gradient is bad, on the last rank only; nothing may hang."""
    finite = []
    for position in (0, MATRICES, len(SHAPES) - 1):
        for bad in (math.inf, math.nan):
            params, optimizer = build_ranked()
            set_gradients(params, 0)
            if rank == dist.get_world_size() - 1:
                params[position].grad.view(-1)[-1] = bad
            optimizer.reduce_gradients()
            finite.append(bool(optimizer.grad_norm().isfinite()))
            optimizer.zero_grad()
    return finite


def step_without_reduce() -> str:
    params, optimizer = build_ranked()
    set_gradients(params, 0)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in (2, 3):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/group{world}", rank=rank, world_size=world)
            outcome: dict[str, Any] = {"error": step_without_reduce(), "finite": bad_gradients(rank)}
            params, optimizer = build_ranked()
            norms = train(params, optimizer, range(10), rank, world)
            outcome["half"] = result(params, optimizer, norms)
            outcome["full"] = result(params, optimizer, norms + train(params, optimizer, range(10, 20), rank, world))
            if world == 3:
                outcome["from 2"] = continue_from(torch.load(f"{folder}/2.0.pt")["half"], rank, world)
                params, optimizer = build_ranked()
                optimizer.ranks.has_reduce_scatter = False  # as a gloo without reduce_scatter sets it
                outcome["fallback"] = result(params, optimizer, train(params, optimizer, range(10), rank, world))
            torch.save(outcome, f"{folder}/{world}.{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[tuple[int, int], dict[str, Any]]:
    """Outcomes by (world size, rank)."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=3)
    return {(w, r): torch.load(folder / f"{w}.{r}.pt") for w in (2, 3) for r in range(w)}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    params, optimizer = build_ranked()
    half = result(params, optimizer, norms := train(params, optimizer, range(10), 0, 1))
    half = {"weights": half["weights"], "state": clone(half["state"])}
    return {"half": half, "full": result(params, optimizer, norms + train(params, optimizer, range(10, 20), 0, 1))}


def clone(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: clone(value) for key, value in x.items()}
    return x.clone() if isinstance(x, Tensor) else x


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    for p, q in zip(a["weights"], b["weights"], strict=True):
        assert (p - q).abs().max() <= tolerance
    assert a["flat"].keys() == b["flat"].keys()
    for key, value in a["flat"].items():
        assert (value - b["flat"][key]).abs().max() <= tolerance * (1 + value.abs().max()), key


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_a_single_process(ranks, alone, world):
    for rank in range(world):
        assert_same(ranks[world, rank]["full"], ranks[world, 0]["full"], 0.0)  # bit-identical between ranks
    assert_same(ranks[world, 0]["full"], alone["full"], 1e-10)
    assert ranks[world, 0]["full"]["norms"] == pytest.approx(alone["full"]["norms"][-20:], rel=1e-12)


def test_world_size_may_change_in_the_middle(ranks, alone):
    for rank in range(3):
        assert_same(ranks[3, rank]["from 2"], alone["full"], 1e-10)
    assert_same(continue_from(ranks[3, 0]["half"], 0, 1), alone["full"], 1e-10)
    assert_same(continue_from(alone["half"], 0, 1), alone["full"], 0.0)


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_own_parts_make_up_the_whole_state(ranks, world):
    parts = [ranks[world, rank]["half"]["own"] for rank in range(world)]
    assert all(sum(x.numel() for x in part.values()) < 0.8 * state_size(ranks[world, 0]) for part in parts)
    _, optimizer = build_ranked()
    optimizer.load_flat_state(merge_shards(parts, rank=0))
    whole = ranks[world, 0]["half"]["flat"]
    loaded = optimizer.flat_state()
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], value) for name, value in whole.items())


def state_size(outcome: dict[str, Any]) -> int:
    return sum(x.numel() for x in outcome["half"]["flat"].values())


def test_all_reduce_replaces_a_missing_reduce_scatter(ranks):
    assert_same(ranks[3, 2]["fallback"], ranks[3, 2]["half"], 1e-10)


@pytest.mark.parametrize("world", [2, 3])
def test_a_bad_gradient_on_one_rank_is_seen_by_all(ranks, world):
    for rank in range(world):
        assert ranks[world, rank]["finite"] == [False] * 6
        assert "reduce_gradients()" in ranks[world, rank]["error"]
