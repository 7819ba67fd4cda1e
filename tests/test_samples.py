"""Samples are for people; they must never be the reason why a training run fails."""

import pytest

from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, GPTConfig
from nanochat.train.samples import sample_answers, sample_texts


@pytest.mark.parametrize("context", [8, 16, 64])
def test_prompts_longer_than_the_context_are_cut(tiny_tokenizer, context):
    model = GPT(GPTConfig(context, tiny_tokenizer.get_vocab_size(), n_layer=1, n_head=1, n_kv_head=1, n_embd=64))
    model.init_weights()
    with setup_compute(Runtime(device_type="cpu")) as compute:
        prompts = ("a b c " * 20, "short")
        assert len(sample_texts(model, tiny_tokenizer, compute, prompts)) == 2
        assert len(sample_answers(model, tiny_tokenizer, compute, prompts)) == 2
    assert model.training
