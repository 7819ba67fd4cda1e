"""The chunked loss is the plain loss: value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.ops import loss as loss_module
from nanochat.ops import native
from nanochat.ops.loss import linear_cross_entropy, softcap

CAP = 15.0


def plain(x, weight, targets, vocab, reduction, cap=CAP):
    logits = softcap(x @ weight.t(), cap)[..., :vocab]
    losses = F.cross_entropy(logits.reshape(-1, vocab), targets.reshape(-1), ignore_index=-1, reduction=reduction)
    return losses.view(targets.shape) if reduction == "none" else losses


def inputs(dtype, n=(3, 50), c=24, vocab=90, rows=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*n, c, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(rows, c, generator=g, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, n, generator=g)
    targets[0, :20] = -1
    return x, weight, targets, vocab


@pytest.mark.parametrize("cap", [CAP, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_plain_loss(monkeypatch, reduction, dtype, tolerance, cap):
    monkeypatch.setattr(loss_module, "chunk_tokens", lambda *_: (37, 10))  # several uneven chunks and parts
    x, weight, targets, vocab = inputs(dtype)
    seed = torch.rand(targets.shape, dtype=dtype) if reduction == "none" else torch.tensor(3.0, dtype=dtype)
    ours = linear_cross_entropy(x, weight, targets, vocab, cap, reduction)
    theirs = plain(x, weight, targets, vocab, reduction, cap)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    a = torch.autograd.grad(ours, (x, weight), seed)
    b = torch.autograd.grad(theirs, (x, weight), seed)
    for got, expected in zip(a, b, strict=True):
        torch.testing.assert_close(got, expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


def test_an_evaluation_forms_no_gradients(monkeypatch):
    x, weight, targets, vocab = inputs(torch.float32)
    expected = linear_cross_entropy(x, weight, targets, vocab, CAP, "sum").detach()
    monkeypatch.setattr(loss_module, "_gradient", None)  # calling one of these would fail
    monkeypatch.setattr(native, "cross_entropy_", None)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, vocab, CAP, "sum"), expected)


def test_without_gradients_none_gives_zero_where_ignored():
    x, weight, targets, vocab = inputs(torch.float32)
    with torch.no_grad():
        losses = linear_cross_entropy(x, weight, targets, vocab, CAP, "none")
    assert losses.shape == targets.shape
    assert (losses[targets < 0] == 0).all()
    assert (losses[targets >= 0] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_and_the_weights_gradient_is_float32(dtype):
    x, weight, targets, vocab = inputs(torch.float32)
    ours = linear_cross_entropy(x, weight, targets, vocab, CAP, "mean", dtype)
    theirs = plain(x, weight, targets, vocab, "mean")
    assert ours.item() == pytest.approx(theirs.item(), rel=0.02)
    a = torch.autograd.grad(ours * 65536, weight)[0] / 65536
    b = torch.autograd.grad(theirs, weight)[0]
    assert a.dtype == torch.float32
    assert (a - b).norm() / b.norm() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_a_softcap_large_logits_neither_overflow_nor_lose_the_gradient(dtype):
    """exp(90) is beyond float32, exp(12) beyond float16."""
    x, targets = torch.eye(3, 8).requires_grad_(), torch.tensor([0, 1, -1])
    weight = torch.full((64, 8), -90.0)
    weight[0, 0], weight[1, 1], weight[2, 1] = 90.0, 90.0, 91.0
    value = linear_cross_entropy(x, weight.requires_grad_(), targets, 50, None, "sum", dtype)
    value.backward()
    assert value.item() == pytest.approx(torch.tensor([-1.0, 0.0]).logsumexp(0).item() + 1, rel=1e-3)
    share = torch.tensor([0.0, 1.0]).softmax(0)  # of the two large logits of the second token
    assert weight.grad[1, 1].item() == pytest.approx(share[0].item() - 1, rel=1e-2)
    assert weight.grad[2, 1].item() == pytest.approx(share[1].item(), rel=1e-2)
    assert weight.grad[50:].count_nonzero() == 0
    assert torch.isfinite(x.grad).all()


def test_confident_logits_do_not_overflow():
    x = torch.full((4, 8), 100.0, requires_grad=True)
    weight = torch.cat([torch.full((1, 8), 100.0), torch.full((63, 8), -100.0)]).requires_grad_()
    value = linear_cross_entropy(x, weight, torch.tensor([0, 0, 1, -1]), 64, CAP, "sum")
    value.backward()
    assert value.item() == pytest.approx(30.0, abs=0.01)
    assert torch.isfinite(x.grad).all()


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("vocab", [512, 2048, 8192])
def test_memory_is_flat_in_the_vocabulary(vocab):
    chunk = 64 * 4 * 8192
    x = torch.randn(1024, 8, requires_grad=True)  # plain logits of the smallest vocabulary would be a chunk already
    weight = torch.randn(vocab, 8, requires_grad=True)
    with LargestTensor() as largest:
        linear_cross_entropy(x, weight, torch.randint(0, vocab, (1024,)), vocab, CAP, chunk_bytes=chunk).backward()
    assert largest.size == chunk


class LogitRows(TorchDispatchMode):
    """How many tokens get logits of a vocabulary of 512."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.addmm_.default and args[2].shape == (8, 512):
            self.count += len(args[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("supervised", "computed"), [(0, 1024), (1, 128), (128, 128), (400, 512), (950, 1024), (1024, 1024)]
)
def test_on_a_cpu_only_tokens_with_a_target_get_logits(supervised, computed):
    """Of few sizes: for each new one oneDNN compiles its products."""
    x, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    targets = torch.full((1024,), -1)
    targets[torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:supervised]] = 7
    with LogitRows() as rows:
        value = linear_cross_entropy(x, weight, targets, 512, CAP, "sum")
    value.backward()
    assert rows.count == computed
    assert torch.equal(x.grad.abs().sum(1) > 0, targets >= 0)


@pytest.mark.parametrize("learned", [1, 127, 128, 129, 299])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_with_a_target_are_rounded_up_without_an_effect(learned, dtype):
    """The loss and its gradients are those of the tokens that count."""
    torch.manual_seed(learned)
    x, weight = torch.randn(300, 32), torch.randn(64, 32)
    targets = torch.full((300,), -1)
    targets[torch.randperm(300)[:learned]] = torch.randint(0, 60, (learned,))
    found, wanted = [], []
    for given, rows, results in (
        (targets, torch.arange(300), found),
        (targets[targets >= 0], (targets >= 0).nonzero()[:, 0], wanted),
    ):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(a[rows], w, given, 60, 15.0, dtype=dtype)
        loss.backward()
        with torch.no_grad():
            results += [loss, a.grad, w.grad, linear_cross_entropy(a[rows], w, given, 60, 15.0, "sum", dtype)]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert found[1][targets < 0].abs().sum() == 0
