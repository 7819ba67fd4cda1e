"""What the tests of exports share: a tokenizer with the runtimes' pattern, and two tiny models that fold."""

import itertools

import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RUNTIMES_PATTERN, RustBPETokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 12345 times too lazy.",
    "Größe, naïve café, 你好世界, привет мир, हिन्दी भाषा, ภาษาไทย, 🙂🙃 and\ttabs\r\nand lines\n\n  with  spaces   ",
    "What is 12 * 34? <tool> 12*34 = 408. def f(x):\n    return x ** 2  # squares\n" * 3,
] * 4


def portable_tokenizer(vocab_size=400):
    """A tokenizer that llama.cpp has too."""
    return RustBPETokenizer.train_from_iterator(iter(TEXT), vocab_size, RUNTIMES_PATTERN)


def portable_model(tokenizer, **changes):
    """Random weights: it writes nonsense, always the same."""
    shape = {"sequence_len": 128, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 64}
    settings = {**shape, "logit_softcap": None, "qk_scale": 1.2, **changes}
    model = GPT(GPTConfig(vocab_size=tokenizer.get_vocab_size(), **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.08, generator=generator)
    return model.eval()


def scripted_model(tokenizer, *chain):
    """A model that writes `chain`: pieces of text and names of special tokens, each after the one before.

    Its layers add nothing, so that a token's successor depends on the token alone: none may be there twice.
    """
    model = portable_model(tokenizer, n_embd=128)
    special = tokenizer.get_special_tokens()
    pieces = [[tokenizer.encode_special(part)] if part in special else tokenizer.encode(part) for part in chain]
    ids = [i for piece in pieces for i in piece]
    assert len(set(ids)) == len(ids)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                p.zero_()
        table = torch.nn.functional.normalize(model.transformer.wte.weight, dim=1)
        model.lm_head.weight.zero_()
        for before, after in itertools.pairwise(ids):
            model.lm_head.weight[after] = table[before]
    return model


CALCULATION = (
    *("<|assistant_start|>", "Let", "<|python_start|>", "6*7", "<|python_end|>"),  # "42" is the calculator's
    *("<|output_end|>", ":ok", "<|assistant_end|>"),
)


def odd_histories(user, answer):
    """Calls and results with ids that are numbers, the same twice, or missing, and calls as they were until 2023."""

    def called(*ids):
        function = {"name": "look", "arguments": {"at": "Ω"}}
        return {"role": "assistant", "content": None, "tool_calls": [{"id": i, "function": function} for i in ids]}

    def result(content, **more):
        return {"role": "tool", "content": content, **more}

    old = {"name": "calculator", "arguments": {"expression": "6*7"}}
    return [
        [user, called(0, 1), result("b", tool_call_id=1), result("a", tool_call_id=0), answer],
        [user, called("x", "x"), result("a", tool_call_id="x"), result("b", tool_call_id="x"), answer],
        [user, called("x", "y"), result("b", tool_call_id="y"), result("a"), answer],
        [user, called(None, None), result("a", tool_call_id="x"), result("b", tool_call_id=None), user, answer],
        [user, called("x", "y"), result(None, tool_call_id="y"), answer, user],
        [user, called("x"), result("a", tool_call_id="x"), called("x"), result("b", tool_call_id="x"), user],
        [user, {"role": "assistant", "content": None, "function_call": old}, user],
        [user, {"role": "assistant", "content": None, "function_call": old}, {"role": "function", "content": "42"}],
        [
            user,
            {"role": "assistant", "content": "So ", "function_call": old},
            {"role": "function", "name": "calculator", "content": "42"},
            answer,
        ],
    ]
