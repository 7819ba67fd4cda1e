"""Loss scaling: every optimizer steps or none does; the forward pass of the MLP survives float16."""

import copy

import pytest
import torch

from nanochat.gpt import GPT, MLP, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.precision import MAX_SKIPS_IN_A_ROW, LossScaler, NonFiniteError, Precision, first_nonfinite_module
from nanochat.recipe import parameter_groups


def make(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, 70, 2, 2, 1, 64))
    model.init_weights()
    groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
    return model, MuonAdamW(groups)


def batch():
    x = torch.randint(0, 70, (2, 32), generator=torch.Generator().manual_seed(1))
    return x[:, :-1], x[:, 1:]


def test_scaler_follows_torchs_own():
    ours = LossScaler(True, init_scale=8.0, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for finite in [True, True, True, True, False, True, True, False, True, True, True]:
        p.grad = torch.tensor([1.0 if finite else float("inf")])
        theirs.scale(torch.zeros(1))
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.scale == theirs.get_scale()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_gradient_stops_every_parameter_and_halves_the_scale(bad):
    model, optimizer = make()
    precision = Precision("cpu", torch.float16)
    before = copy.deepcopy(model.state_dict())
    with precision.autocast():
        loss = model(*batch())
    precision.backward(loss)
    model.transformer["h"][1].mlp.c_fc.weight.grad[3, 3] = bad
    scale = precision.scaler.scale
    result = precision.step([optimizer])
    assert result.skipped
    assert precision.skipped == 1
    assert precision.scaler.scale == scale / 2
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_scaled_step_equals_the_unscaled_one():
    steps = []
    for scale in (1.0, 2.0**12):
        model, optimizer = make()
        precision = Precision("cpu", torch.float32)
        precision.scaler.scale = scale
        precision.backward(model(*batch()))
        precision.step([optimizer], grad_clip=0.1)
        steps.append(model.state_dict())
    for k in steps[0]:
        torch.testing.assert_close(steps[0][k], steps[1][k], rtol=1e-5, atol=1e-6)


def test_endless_skips_stop_the_run():
    model, optimizer = make()
    precision = Precision("cpu", torch.float16)
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        precision.step([optimizer])
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(NonFiniteError):
        precision.step([optimizer])


def test_state_survives_a_checkpoint():
    a, b = Precision("cpu", torch.float16), Precision("cpu", torch.float16)
    a.scaler.update(False)
    a.skipped = 3
    b.load_state_dict(a.state_dict())
    assert (b.scaler.scale, b.skipped) == (a.scaler.scale, 3)


def test_first_nonfinite_module_is_named():
    model, _ = make()
    with torch.no_grad():
        model.transformer["h"][1].attn.c_v.weight.fill_(float("inf"))
    assert first_nonfinite_module(model, lambda: model(batch()[0])) == "transformer.h.1.attn.c_v"
    model, _ = make()
    assert first_nonfinite_module(model, lambda: model(batch()[0])) is None


@pytest.mark.parametrize("size", [1.0, 300.0, 5000.0])
def test_squared_relu_is_right_in_float16_far_beyond_its_range(size):
    torch.manual_seed(0)
    mlp = MLP(GPTConfig(8, 64, 1, 1, 1, 64))
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        mlp.c_fc.weight.mul_(size / mlp.c_fc(x).abs().max())
        expected = mlp.double()(x.double())
        got = mlp.half()(x.half())
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert torch.isfinite(got).all()
    assert error < 3e-3


def test_gradient_through_the_rescaled_square_is_right():
    torch.manual_seed(0)
    mlp = MLP(GPTConfig(8, 64, 1, 1, 1, 64))
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        mlp.c_fc.weight.mul_(2000 / mlp.c_fc(x).abs().max())
    grads = []
    for dtype in (torch.float64, torch.float16):
        m = copy.deepcopy(mlp).to(dtype)
        (m(x.to(dtype)).double().sum() * 1e-6).backward()
        grads.append(m.c_proj.weight.grad.double())
    assert (grads[0] - grads[1]).abs().max() / grads[0].abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_training_follows_float32(dtype):
    finals = []
    for chosen in (torch.float32, dtype):
        model, optimizer = make()
        precision = Precision("cpu", chosen)
        for _ in range(12):
            with precision.autocast():
                loss = model(*batch())
            precision.backward(loss)
            precision.step([optimizer], grad_clip=1.0)
            optimizer.zero_grad()
        finals.append(loss.item())
    assert finals[0] < 4.0
    assert abs(finals[0] - finals[1]) < 0.02 * finals[0]
