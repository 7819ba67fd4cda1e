"""The crate's part of a training step gives torch's values and gradients, for any size, dtype and number of threads."""

import contextlib

import pytest
import torch

from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig
from nanochat.muon import MUON_DEFAULTS, MuonStack, newton_schulz, newton_schulz_coefficients
from nanochat.ops import native
from nanochat.ops.attention import attend, plan_attention, segment_starts
from nanochat.ops.collectives import Ranks
from nanochat.ops.loss import linear_cross_entropy
from nanochat.ops.pointwise import add, add_norm, relu_squared, rms_norm, rotary_norm, rotary_tables
from rustbpe import between

pytestmark = pytest.mark.skipif(between.kernels() is None, reason="rustbpe was not compiled here")

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
BY_TILES = pytest.mark.skipif(between.kernels() is None or not between.kernels().has_tiles, reason="no AMX here")


def draw(*shape, dtype=FLOAT32, seed=0, size=1.0):
    x = size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def check(function, *inputs, bfloat16=False):
    """`function` has the values and gradients that it has in float64, where torch computes it."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, theirs = function(*inputs), function(*exact)
    ours, theirs = (y if isinstance(y, tuple) else (y,) for y in (ours, theirs))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    grads = [draw(*y.shape, dtype=y.dtype, seed=10 + i) for i, y in enumerate(ours)]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, **tolerance)
    a = torch.autograd.grad(ours, inputs, [g.detach() for g in grads])
    b = torch.autograd.grad(theirs, exact, [g.detach().double() for g in grads])
    for x, y, z in zip(a, b, inputs, strict=True):
        assert x.dtype == z.dtype
        torch.testing.assert_close(x.double(), y, **tolerance)


def took_the_kernel(y):
    return type(y.grad_fn).__name__ in {"_AddNormBackward", "_RotaryNormBackward"}


@pytest.mark.parametrize("shape", [(3, 5, 64), (1, 1), (2, 17), (700, 33), (2, 3, 1000)])
@DTYPES
def test_the_residual_stream_and_its_norm(dtype, shape):
    narrow = dtype == BFLOAT16
    x, delta = draw(*shape), draw(*shape, dtype=dtype, seed=1)
    x_of = {FLOAT32: x, BFLOAT16: draw(*shape, dtype=dtype)}[dtype]
    assert took_the_kernel(rms_norm(x, 1e-6))
    check(lambda x: rms_norm(x, 1e-6), x_of, bfloat16=narrow)
    check(lambda x: add_norm(x, None, 1e-6, None), x_of, bfloat16=narrow)
    check(lambda x, delta: add_norm(x, delta, 1e-6, None), x_of, delta, bfloat16=narrow)
    # As in "medium": a stream in float32, products in bfloat16.
    check(lambda x, delta: add_norm(x, delta, 1e-6, dtype), x, delta, bfloat16=narrow)
    check(add, x, delta, bfloat16=narrow)
    stream, y = add_norm(x, delta, 1e-6, dtype)
    assert (stream.dtype, y.dtype) == (FLOAT32, dtype)


def test_gradients_where_only_one_of_the_results_is_used():
    x, delta = draw(4, 32), draw(4, 32, dtype=BFLOAT16)
    stream, y = add_norm(x, delta, 1e-6, BFLOAT16)
    a, b = torch.autograd.grad(stream.sum(), (x, delta))
    assert (a == 1).all()
    assert (b == 1).all()
    stream, y = add_norm(x, delta, 1e-6, BFLOAT16)
    assert torch.autograd.grad(y.sum(), delta)[0].abs().sum() > 0


def test_the_given_gradient_of_the_stream_is_not_overwritten():
    x, g = draw(4, 32), torch.ones(4, 32)
    stream, y = add_norm(x, None, 1e-6, None)
    torch.autograd.grad((stream, y), x, (g, torch.randn(4, 32)))
    assert (g == 1).all()
    torch.testing.assert_close(stream, x)


@pytest.mark.parametrize("size", [1, 15, 5000, 4096 * 3])
@DTYPES
def test_squared_relu(dtype, size):
    check(relu_squared, draw(size, dtype=dtype), bfloat16=dtype == BFLOAT16)
    y = relu_squared(torch.tensor([float("nan"), -1.0, float("inf")], requires_grad=True))
    assert y[0].isnan()  # a model that is broken says so
    assert y[1:].tolist() == [0.0, float("inf")]


@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize("heads", [(3, 7, 2, 8), (1, 33, 1, 54), (2, 5, 3, 128)])
@DTYPES
def test_rotated_heads(dtype, heads, own_positions):
    B, T, _, D = heads
    positions = torch.randint(0, 50, (B, T)) if own_positions else torch.arange(T)[None]
    cos, sin = (table[positions].unsqueeze(2) for table in rotary_tables(50, D, 100.0))
    x = draw(*heads, dtype=dtype)
    assert took_the_kernel(rotary_norm(x, cos, sin, 1e-6, dtype))

    def function(x):
        double = x.dtype == torch.float64
        tables = (cos.double(), sin.double()) if double else (cos, sin)
        return rotary_norm(x, *tables, 1e-6, torch.float64 if double else dtype)

    check(function, x, bfloat16=dtype == BFLOAT16)


@pytest.mark.parametrize("plan", ["causal", "window", "segments"])
@pytest.mark.parametrize("T", [1, 19, 150])
@DTYPES
def test_attention(dtype, T, plan):
    q, k, v = (draw(2, T, 2, 16, dtype=dtype, seed=i) for i in range(3))
    segments = (torch.arange(T)[None] >= torch.tensor([[T // 3], [T // 2]])).long()
    starts = segment_starts(segments) if plan == "segments" else None
    pieces = plan_attention(T, T, q.device, 7 if plan == "window" else None, starts)
    check(lambda q, k, v: attend(q, k, v, pieces, 0.3), q, k, v, bfloat16=dtype == BFLOAT16)


@BY_TILES
@pytest.mark.parametrize(
    "shape", [(2, 32, 1, 1, 32), (3, 160, 4, 2, 96), (1, 512, 2, 2, 128), (1, 64, 3, 1, 64)], ids=str
)
def test_attention_in_tiles(shape):
    B, T, H, K, D = shape
    q, k = (draw(B, n, T, D, dtype=BFLOAT16, seed=i) for i, n in enumerate((H, K)))
    v, pieces = draw(B, T, 2 * K, D, dtype=BFLOAT16, seed=2), plan_attention(T, T, q.device)

    def function(q, k, v):
        return attend(q.transpose(1, 2), k.transpose(1, 2), v[:, :, :K], pieces, 0.1)

    assert type(function(q, k, v).grad_fn).__name__ == "_CausalAttentionBackward"
    check(function, q, k, v, bfloat16=True)
    q.data[0, 0, T // 2, 3] = float("nan")
    assert function(q, k, v)[0, :, 0].isnan().any(dim=-1).tolist() == [t == T // 2 for t in range(T)]


@pytest.mark.parametrize("cap", [15.0, None])
@pytest.mark.parametrize("size", [1.0, 30.0], ids=["usual", "large logits"])
@DTYPES
def test_loss(dtype, size, cap):
    x, w = draw(70, 8, dtype=dtype, size=size), draw(64, 8, seed=1)
    targets = torch.randint(-1, 50, (70,), generator=torch.Generator().manual_seed(0))
    targets[:2] = torch.tensor([-1, 49])

    def function(x, w):
        return linear_cross_entropy(x, w, targets, 50, cap, "sum", None, 16 << 10)

    exact = [t.detach().double().requires_grad_() for t in (x, w.to(dtype))]
    ours, theirs = function(x, w), function(*exact)
    narrow = dtype == BFLOAT16
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-2 if narrow else 1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(theirs, exact), strict=True):
        assert (a.double() - b).norm() <= (3e-2 if narrow else 1e-4) * b.norm()
    assert torch.autograd.grad(function(x, w), w)[0][50:].count_nonzero() == 0  # padding rows


def test_a_loss_without_a_target_has_no_gradient():
    x, w = draw(5, 8), draw(64, 8, seed=1)
    loss = linear_cross_entropy(x, w, torch.full((5,), -1), 50, 15.0, "sum")
    assert loss == 0
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss, (x, w)))


def test_what_a_kernel_cannot_take_goes_to_torch():
    x = draw(6, 8)
    assert native.kernels_for(x) is not None
    for other in (x.t(), x.double(), x.half(), x[:0], x.to("meta")):
        assert native.kernels_for(other) is None
    with torch.no_grad():
        assert native.kernels_for(x) is None
    with native.reference_only():
        assert native.kernels_for(x) is None
        assert not took_the_kernel(rms_norm(x, 1e-6))
    check(lambda x: rms_norm(x.t(), 1e-6), x)
    check(lambda x: relu_squared(x[:, ::2]), x)


def gradients(mode, settings, reference=False, double=False):
    """The loss and the gradients of a small model's parameters."""
    generator = torch.Generator().manual_seed(1)
    shape = {"sequence_len": 40, "vocab_size": 250, "n_layer": 2, "n_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**shape | settings))
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)  # what begins as zero would hide mistakes
    x = torch.randint(0, 250, (2, 3, model.max_seq_len), generator=generator)
    model.set_product_dtype(BFLOAT16 if mode == "medium" else None)
    if double:
        model.double()
    with native.reference_only() if reference else contextlib.nullcontext():
        with torch.autocast("cpu", BFLOAT16, enabled=mode == "bfloat16"):
            loss = model(x[0], x[1])
        loss.backward()
    return loss.detach(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "settings",
    [
        {"n_kv_head": 2},
        {"n_kv_head": 1, **NANOCHAT_2026},
        {"n_kv_head": 2, "residual_factors": True, "key_offset": True, "logit_softcap": None, "window_pattern": "SL"},
        # What attention's tiles take, by itself and together with its products.
        {"n_kv_head": 1, "sequence_len": 64, "key_offset": True},
        {"n_kv_head": 1, "sequence_len": 64, "qk_scale": 1.2},
    ],
    ids=["classic", "2026", "portable", "tiles", "block"],
)
@pytest.mark.parametrize("mode", ["strict", "medium", "bfloat16"])
def test_a_model_learns_the_same(mode, settings):
    exact, (loss, ours), (_, reference) = (
        gradients("strict", settings, double=True)[1],
        gradients(mode, settings),
        gradients(mode, settings, reference=True),
    )
    assert not torch.equal(ours, reference)
    ours_off, reference_off = ((g - exact).norm() / exact.norm() for g in (ours, reference))
    assert torch.isfinite(loss)
    if mode == "strict":
        assert ours_off < 1e-5
    # Rounded no more than torch's operations round.
    assert ours_off < 1.2 * reference_off + 1e-6


@BY_TILES
@pytest.mark.parametrize("mode", ["medium", "bfloat16"])
def test_query_key_and_value_are_one_product(mode, monkeypatch):
    found, block = [], native.attention_by_tiles
    monkeypatch.setattr(native, "attention_by_tiles", lambda *args: found.append(block(*args)) or found[-1])
    gradients(mode, {"n_kv_head": 2, "sequence_len": 64})
    assert [y.grad_fn.name() for y in found] == ["_AttentionBlockBackward"] * 2
    gradients(mode, {"n_kv_head": 2, "sequence_len": 40})
    assert found[2:] == [None] * 2


@BY_TILES
def test_the_backward_pass_takes_the_tables_that_autograd_has_kept():
    def gradient(overwrite):
        x, w = draw(1, 64, 64, dtype=BFLOAT16), [draw(n, 64, seed=n + 1, size=0.1) for n in (64, 32, 32)]
        cos, sin = (draw(1, 64, 1, 32, seed=seed).detach() for seed in (5, 6))
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
            y = native.attention_by_tiles(between.kernels(), x, w, cos, sin, 1e-6, 0.1)
        if overwrite:
            cos.zero_(), sin.zero_()
        return torch.autograd.grad(y, [x, *w], draw(*y.shape, dtype=BFLOAT16, seed=9).detach())

    assert all(map(torch.equal, gradient(overwrite=True), gradient(overwrite=False)))


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, g = draw(900, 256), draw(900, 256, seed=1).detach()
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = rms_norm(x, 1e-6)
            loss = linear_cross_entropy(x, draw(64, 256, seed=2), torch.arange(900) % 60, 60, 15.0, "sum")
            results.append((y, *torch.autograd.grad(y, x, g), loss))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0][:2], other[:2], strict=True))
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-6, atol=0)  # torch's product is in it


def test_an_id_outside_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match=r"target 60 .* 50"):
        linear_cross_entropy(draw(5, 8), draw(64, 8), torch.full((5,), 60), 50, 15.0, "sum")


MUON_SETTINGS = {
    "classic": {},
    "decay": {"weight_decay": 0.1},
    # A weight whose update is nearly 0 may decay in one and not in the other: by less than the tolerance of bfloat16.
    "modern": {"coefficients": "polar", "beta2": 0.9, "row_equalize": True, "cautious": True, "weight_decay": 0.05},
}


@pytest.mark.parametrize("settings", MUON_SETTINGS.values(), ids=MUON_SETTINGS)
@pytest.mark.parametrize("shape", [(24, 24), (17, 40), (40, 17), (32, 32), (32, 96), (96, 32)], ids=str)
@DTYPES
def test_muons_steps(monkeypatch, dtype, shape, settings):
    apply = native.muon_apply

    def train(reference):
        calls = []
        monkeypatch.setattr(native, "muon_apply", lambda *args: calls.append(args) or apply(*args))
        params = [draw(*shape, seed=i).detach() for i in range(3)]
        stack = MuonStack({**MUON_DEFAULTS, "ns_dtype": dtype, **settings}, params, [0, 1, 2], Ranks(False))
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = draw(*shape, seed=10 * step + i).detach()
            if step == 2:
                params[1].grad.zero_()  # no signal: nothing moves it, and its state stays
                before = params[1].clone()
            with torch.no_grad(), native.reference_only() if reference else contextlib.nullcontext():
                stack.step(0.5 if step else 1.0)
            stack.clear()
            if step == 2 and not settings:
                assert torch.equal(params[1], before)
        assert len(calls) == (0 if reference else 4)
        return [*params, *stack.state.values()]

    # Newton-Schulz in bfloat16 carries a difference in the last digit through all steps.
    tolerance = {"rtol": 0, "atol": 1e-5} if dtype == FLOAT32 else {"rtol": 0, "atol": 4e-3}
    for ours, theirs in zip(train(False), train(True), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@BY_TILES
@pytest.mark.parametrize("shape", [(64, 64), (96, 352), (352, 96), (256, 32)], ids=str)
@pytest.mark.parametrize("coefficients", ["quintic", "polar"])
@pytest.mark.parametrize("digits", [0.0, 1.0, 6.0])
def test_muons_products(shape, coefficients, digits):
    """As near to float64's as torch's in bfloat16, from singular values that span so many powers of ten."""
    u, s, v = torch.linalg.svd(draw(3, *shape, dtype=torch.float64).detach(), full_matrices=False)
    s = torch.logspace(0, -digits, s.size(1), dtype=torch.float64).expand_as(s) if digits else s
    x = (u * s[:, None] @ v / s.norm(dim=1)[:, None, None] / 1.05).to(BFLOAT16)
    x[1] = 0.0  # a matrix without a signal stays without an update

    def torchs(x):
        return (
            newton_schulz(x.mT, coefficients, 5).mT if shape[0] > shape[1] else newton_schulz(x, coefficients, 5)
        ).double()

    steps, exact = newton_schulz_coefficients(coefficients, 5), torchs(x.double())
    ours, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 6):
            torch.set_num_threads(threads)
            ours.append(native.muon_products(between.kernels(), x, steps))
        torch.set_num_threads(7)
        assert native.muon_products(between.kernels(), x, steps) is None  # too few matrices for so many threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, ours[0]) for y in ours)
    assert not ours[0][1].any()
    assert (ours[0] - exact).norm() < 1.01 * (torchs(x) - exact).norm()
