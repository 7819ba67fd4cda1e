"""A recorded decode step gives the tokens of the step itself; here by a recording made of torch's operations.

`Tape` repeats what a CUDA graph does: every operation again, on the same tensors at the same addresses. Whatever Python
decided while it was recorded stays as it was, so a number that should have been a tensor gives wrong tokens here too.
"""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from reference_generation import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from nanochat.engine import Engine
from nanochat.generate import fast_decode, graph_step
from nanochat.generate.decode_linear import PlainLinear
from nanochat.generate.fast_decode import FastDecoder, make_decoder
from nanochat.generate.graph_step import CHECKED, MOST_ROWS, GraphSteps
from nanochat.generate.kv_cache import KVCache
from nanochat.gpt import NANOCHAT_2026, NORM_EPS
from nanochat.precision import Precision


def storages(values):
    return {t.untyped_storage().data_ptr() for t in tree_flatten(values)[0] if isinstance(t, torch.Tensor)}


class Tape(TorchDispatchMode):
    """The operations of a step, to be run again into the tensors that they have made."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, made))
        return made

    def repeat(self):
        for func, args, kwargs, made in self.operations:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not storages(made) & storages((args, kwargs)):  # a view stays what it is
                again = func(*args, **kwargs)
                for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def record(step, device):
    step()
    tape = Tape()
    with tape:
        result = step()

    def repeat():
        tape.repeat()
        repeat.count += 1
        return result

    repeat.count = 0
    recorded.append(repeat)
    return repeat


recorded: list = []
EAGER_STEPS = 4


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Steps by torch's operators, few before a recording, and few positions, so that answers grow past them."""
    recorded.clear()
    monkeypatch.setattr(fast_decode, "supports", lambda model, dtype: False)
    monkeypatch.setattr(graph_step, "LEAST_LENGTH", 16)
    monkeypatch.setattr(graph_step, "EAGER_STEPS", EAGER_STEPS)
    monkeypatch.setattr(fast_decode, "best_form", lambda rows, device, dtype: PlainLinear)  # as on a card
    # For one row a CPU's norm takes a number to Python, which no card does.
    monkeypatch.setattr(FastDecoder, "_norm", staticmethod(lambda x: torch.rms_norm(x, x.shape[-1:], eps=NORM_EPS)))


def graph_engine(model, tokenizer, precision=None, record=record):
    engine = Engine(model, tokenizer, precision)
    engine._decoder.graphs = GraphSteps(engine._decoder._decode, record)
    return engine


def answers(engine, prompts, tokens=60):
    return engine.generate_prompts(prompts, tokens)[0]


PROMPTS = [[65], list(range(1, 20)), [9, 8, 7], list(range(40, 75))]
SWITCHES = [
    {},
    {"n_layer": 3, **NANOCHAT_2026},
    {"n_layer": 3, **NANOCHAT_2026, "key_offset": True},
]


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_recorded_steps_give_the_tokens_of_the_step_itself(tiny_tokenizer, switches, prompts):
    model = make_model(tiny_tokenizer, n_head=4, n_kv_head=2, **switches)
    engine = graph_engine(model, tiny_tokenizer)
    assert answers(engine, prompts) == answers(Engine(model, tiny_tokenizer), prompts)
    assert engine._decoder.graphs.why_off == ""
    assert sum(repeat.count for repeat in recorded) > 2 * CHECKED  # and most were not even compared


def test_logits_and_cache_are_those_of_the_step_in_half_precision(tiny_tokenizer):
    model, precision = make_model(tiny_tokenizer, n_head=4, n_kv_head=2), Precision("cpu", torch.bfloat16)
    decoder = make_decoder(model, precision).refresh()
    graphs = GraphSteps(decoder._decode, record)
    ours, theirs = (KVCache.for_model(model, 3, 128, torch.bfloat16) for _ in range(2))
    for cache in (ours, theirs):
        cache.set_lengths([3, 7, 1])
    for step in range(40):
        idx = torch.arange(3).unsqueeze(1) + 7 * step
        with torch.inference_mode():
            torch.testing.assert_close(graphs(idx, ours), decoder._decode(idx, theirs), atol=0.1, rtol=0.1)
    assert ours.cache_seqlens.tolist() == theirs.cache_seqlens.tolist() == [43, 47, 41]
    torch.testing.assert_close(ours.k_cache.float(), theirs.k_cache.float(), atol=0.1, rtol=0.1)


def broken(step, device):
    raise RuntimeError("operation not permitted when stream is capturing")


def stale(step, device):
    """A recording that repeats its first result, as one would that depends on a number of Python's."""
    result = step().clone()
    return lambda: result


@pytest.mark.parametrize(("record", "said"), [(broken, "stream is capturing"), (stale, "other logits")])
def test_what_fails_or_differs_is_turned_off_and_said_once(tiny_tokenizer, caplog, record, said):
    model = make_model(tiny_tokenizer, n_head=4, n_kv_head=2)
    engine = graph_engine(model, tiny_tokenizer, record=record)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert answers(engine, PROMPTS) == answers(Engine(model, tiny_tokenizer), PROMPTS)
    assert said in engine._decoder.graphs.why_off
    (line,) = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert said in line


def test_short_answers_and_many_sequences_are_not_recorded(tiny_tokenizer):
    model = make_model(tiny_tokenizer, n_head=2, n_kv_head=2)
    engine = graph_engine(model, tiny_tokenizer, record=broken)
    answers(engine, [[65]], EAGER_STEPS)
    engine.generate_prompts([[65 + i] for i in range(MOST_ROWS + 1)], 12, max_batch_tokens=10_000)
    assert engine._decoder.graphs.why_off == ""


@torch.no_grad()
def test_what_is_recorded_goes_with_the_cache_and_with_the_weights(tiny_tokenizer):
    model = make_model(tiny_tokenizer, n_head=2, n_kv_head=2)
    decoder = make_decoder(model, None).refresh()
    decoder.graphs = GraphSteps(decoder._decode, record)
    cache = KVCache.for_model(model, 1, 64)
    for _ in range(EAGER_STEPS + 1):
        decoder.graphs(torch.tensor([[65]]), cache)
    assert len(decoder.graphs._shapes) == 1
    model.lm_head.weight.mul_(2.0)
    decoder.refresh()
    assert len(decoder.graphs._shapes) == 0
    for _ in range(EAGER_STEPS + 1):
        decoder.graphs(torch.tensor([[65]]), cache)
    del cache
    recorded.clear()
    gc.collect()
    assert len(decoder.graphs._shapes) == 0


def test_what_a_card_cannot_record_is_left_to_the_model(tiny_tokenizer, monkeypatch, caplog):
    model = make_model(tiny_tokenizer, recall=64)
    assert make_decoder(model, None) is not None
    monkeypatch.setattr(model, "get_device", lambda: torch.device("cuda"))
    for _ in range(2):
        assert make_decoder(model, None) is None
    (record,) = caplog.records
    assert "slower: recall looks up its text on the CPU" in record.getMessage()
    with pytest.raises(ValueError, match="weights=bfloat16 works on a CPU only for models with recall"):
        make_decoder(model, None, "bfloat16")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_a_card_records_and_gives_the_same_tokens(tiny_tokenizer):
    model = make_model(tiny_tokenizer, n_head=4, n_kv_head=2).to("cuda")
    engine, plain = Engine(model, tiny_tokenizer), Engine(model, tiny_tokenizer)
    plain._decoder.graphs = None
    assert answers(engine, PROMPTS) == answers(plain, PROMPTS)
    assert engine._decoder.graphs.why_off == ""
