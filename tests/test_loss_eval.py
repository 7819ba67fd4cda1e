"""Bits per byte: the number itself, and that it depends on the text alone."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nanochat import loss_eval
from nanochat.loss_eval import corpus_bpb, evaluate_bpb


def batches(model, rows: int, batch_size: int, length: int = 16) -> list[tuple[Tensor, Tensor]]:
    """The same `rows` rows however they are cut into batches; some targets are ignored."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, length + 1), generator=generator)
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[::3, :5] = -1
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


@pytest.fixture
def token_bytes(tiny_tokenizer) -> Tensor:
    return torch.from_numpy(tiny_tokenizer.token_lengths())


def test_equals_the_formula_computed_token_by_token(tiny_model, token_bytes):
    data = batches(tiny_model, rows=6, batch_size=2)
    nats, num_bytes = 0.0, 0
    with torch.no_grad():
        for x, y in data:
            log_probs = tiny_model(x).double().log_softmax(dim=-1)
            for b, t in torch.cartesian_prod(torch.arange(x.size(0)), torch.arange(x.size(1))).tolist():
                target = int(y[b, t])
                if target >= 0 and token_bytes[target] > 0:
                    nats -= float(log_probs[b, t, target])
                    num_bytes += int(token_bytes[target])
    assert evaluate_bpb(tiny_model, data, 3, token_bytes) == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 12])
def test_batch_size_does_not_matter(tiny_model, token_bytes, batch_size):
    one = evaluate_bpb(tiny_model, batches(tiny_model, 12, 12), None, token_bytes)
    assert evaluate_bpb(tiny_model, batches(tiny_model, 12, batch_size), None, token_bytes) == pytest.approx(
        one, rel=1e-6
    )


def test_reads_no_more_than_the_asked_batches(tiny_model, token_bytes):
    data = batches(tiny_model, 8, 2)

    def endless():
        yield from data[:2]
        raise AssertionError("asked for a third batch")

    assert evaluate_bpb(tiny_model, endless(), 2, token_bytes) == evaluate_bpb(tiny_model, data[:2], 2, token_bytes)


def test_tokens_without_bytes_count_in_neither_sum(tiny_model, token_bytes):
    (x, y), *_ = batches(tiny_model, 2, 2)
    special = int((token_bytes == 0).nonzero()[0])
    y_special = y.clone()
    y_special[1, :] = special
    y_ignored = y.clone()
    y_ignored[1, :] = -1
    assert evaluate_bpb(tiny_model, [(x, y_special)], 1, token_bytes) == evaluate_bpb(
        tiny_model, [(x, y_ignored)], 1, token_bytes
    )


def test_too_few_tokens_are_an_error_not_infinity(tiny_model, token_bytes):
    data = batches(tiny_model, 2, 2)
    with pytest.raises(ValueError, match="fewer tokens were asked for than one batch holds"):
        evaluate_bpb(tiny_model, data, 0, token_bytes)
    with pytest.raises(ValueError, match="no bytes of text"):
        evaluate_bpb(tiny_model, [], 3, token_bytes)
    with pytest.raises(ValueError, match="no bytes of text"):
        evaluate_bpb(tiny_model, [(x, torch.full_like(y, -1)) for x, y in data], 1, token_bytes)


def test_training_mode_and_autocast(tiny_model, token_bytes):
    data = batches(tiny_model, 2, 2)
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(tiny_model.training)
        yield

    tiny_model.train()
    evaluate_bpb(tiny_model, data, 1, token_bytes, context())
    assert entered == [False]
    assert tiny_model.training
    assert all(p.grad is None for p in tiny_model.parameters())


def test_a_corpus_is_measured_with_the_tokenizer_at_hand(
    tiny_model, tiny_tokenizer, token_bytes, base_dir, monkeypatch
):
    """What lies in the base folder, a wrong `token_bytes.pt` or another tokenizer, changes no figure."""
    data = batches(tiny_model, 4, 2)
    monkeypatch.setattr(loss_eval, "PretrainLoader", lambda *args, **kwargs: iter(data))
    folder = base_dir / "tokenizer"
    folder.mkdir(exist_ok=True)
    torch.save(token_bytes + 1, folder / "token_bytes.pt")
    (folder / "tokenizer.json").write_text("{}")
    precision = SimpleNamespace(autocast=contextlib.nullcontext)
    compute = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1, precision=precision)
    found = corpus_bpb(tiny_model, None, tiny_tokenizer, compute, split="val", rows=2, max_rows=4)
    assert found == evaluate_bpb(tiny_model, data, None, token_bytes)
