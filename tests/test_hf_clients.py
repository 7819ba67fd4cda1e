"""What programs that build on transformers expect of an export: tokenizer settings, caches, losses, the card."""

import dataclasses
import json
import re
import stat
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from portable_model import odd_histories

from nanochat.checkpoint_manager import load_model, save_checkpoint
from nanochat.common import get_base_dir
from nanochat.interop.hf_format import read_hf_folder, write_hf_folder
from nanochat.interop.hf_model import CACHE_NAMES
from nanochat.interop.hf_tokenizer import PLAIN_TEMPLATE
from nanochat.messages import normalise
from nanochat.ops import recall as ops_recall
from nanochat.ops.recall import KINDS, LEVELS, WINDOW, Recall
from nanochat.tokenizer import RustBPETokenizer
from tests.test_hf import (
    MODELS,
    TEXT,
    few_ids,
    load_theirs,
    random_model,
    rarer_ids_say_what_a_short_text_is_about,  # noqa: F401 (for every test here)
)

LOOK_BACK = [
    "small",
    "windows and recall",
    "reach and recall",
    "modern d4 GQA",
]  # their caches hold more than keys and values


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(TEXT), 400)


def export(tokenizer, folder, name="small", form="native", **changes):
    model = random_model(tokenizer, **MODELS[name] | changes)
    write_hf_folder(folder, model.state_dict(), model.config, tokenizer, "# card\n", form=form)
    return model


@pytest.fixture(scope="module", params=["native", "qwen3"])
def their_tokenizer(request, tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tok") / "model"
    export(tokenizer, folder, "d2", request.param)
    return AutoTokenizer.from_pretrained(folder)


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def test_plain_text_begins_with_bos_and_a_chat_has_one(tokenizer, their_tokenizer):
    bos, plain = tokenizer.get_bos_token_id(), tokenizer.encode("hello")
    assert their_tokenizer("hello")["input_ids"] == [bos, *plain]
    assert their_tokenizer("hello", add_special_tokens=False)["input_ids"] == plain
    assert their_tokenizer("hello", "hello")["input_ids"] == [bos, *plain, *plain]
    chat = their_tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat.count(bos) == 1
    assert their_tokenizer.padding_side == "left"
    assert their_tokenizer(["a", "hello"], padding=True)["attention_mask"][0][0] == 0


def test_texts_as_parts_and_a_system_message_alone(tokenizer, their_tokenizer):
    def written(*messages):
        return their_tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    system = {"role": "system", "content": "Say no"}
    assert written(USER | {"content": parts}) == written(USER)
    assert written(system | {"content": [{"type": "text", "text": "Say no"}]}, USER) == written(system, USER)
    assert written(system) == "<|bos|><|user_start|>Say no<|user_end|><|assistant_start|>"
    with pytest.raises(Exception, match="part of type image"):
        written(USER | {"content": [{"type": "image"}]})


def test_a_history_with_tools_is_written_as_training_writes_it(tokenizer, their_tokenizer):
    def calls(*made):
        return [
            {"id": str(i), "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(made)
        ]

    def result(i, content):
        return {"role": "tool", "tool_call_id": str(i), "content": content}

    two = calls(("calculator", {"expression": "6*7"}), ("look", {"at": "Ω", "n": 2}))
    for history in (
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls(("python", {"code": "1+1"}))},
            result(0, "2"),
        ],
        [USER, {"role": "assistant", "content": "So ", "tool_calls": two}, result(1, "b"), result(0, "a"), ANSWER],
        [USER, {"role": "assistant", "tool_calls": two}, result(0, [{"type": "text", "text": "a"}]), ANSWER, USER],
        [USER, {"role": "assistant", "content": "", "tool_calls": two}, USER, ANSWER],
        [{"role": "developer", "content": "Be brief."}, USER, ANSWER],
        *odd_histories(USER, ANSWER),
    ):
        turns, _ = normalise(history)
        whole, mask = tokenizer.render_conversation({"messages": turns}, max_tokens=None)
        theirs = their_tokenizer.apply_chat_template(history, return_dict=True, return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == whole
        assert theirs["assistant_masks"] == mask
        asked = their_tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
        if history[-1]["role"] in ("tool", "function"):  # the model goes on where the result ends
            assert asked == whole[:-1]
        else:
            assert asked == [*whole, tokenizer.encode_special("<|assistant_start|>")]
    called = [USER, {"role": "assistant", "content": None, "tool_calls": two}]
    for wrong in (
        [USER, result(0, "2")],
        [USER, ANSWER, result(0, "2")],
        [*called, result(7, "of no call"), ANSWER],
        [*called, result(0, "a"), result(0, "again"), ANSWER],
        [*called, result(0, "a"), USER, result(1, "too late")],
    ):
        with pytest.raises(Exception, match="must follow its call"):
            their_tokenizer.apply_chat_template(wrong)
        with pytest.raises(ValueError, match="result of a tool call"):
            normalise(wrong)


def test_without_the_marks_of_what_is_learned_the_template_writes_the_same(their_tokenizer):
    tool = [{"type": "text", "text": "so"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    messages = [USER, ANSWER, USER, {"role": "assistant", "content": tool}, USER]
    assert "generation %}" not in PLAIN_TEMPLATE
    for settings in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}):
        plain = their_tokenizer.apply_chat_template(messages, chat_template=PLAIN_TEMPLATE, **settings)
        assert plain == their_tokenizer.apply_chat_template(messages, **settings)


def test_the_mask_of_what_is_learned_is_that_of_training(tokenizer, their_tokenizer):
    """For TRL's assistant_only_loss: the answer, a tool's call and the end; not the tool's result."""
    kinds = {"text": "so ", "python": "1+1", "python_output": "2"}
    tool = {"role": "assistant", "content": [{"type": k, "text": t} for k, t in kinds.items()]}
    messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, tool]
    ids, mask = tokenizer.render_conversation({"messages": messages}, max_tokens=None)
    theirs = their_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == mask


@pytest.mark.parametrize(
    ("sampling", "written"),
    [
        (None, {"do_sample": True, "temperature": 0.6, "top_k": 50}),
        (
            {"temperature": 0.4, "top_k": None, "min_p": 0.1, "seed": 3},
            {"do_sample": True, "temperature": 0.4, "min_p": 0.1},
        ),
        ({"temperature": 0.0, "top_k": 50}, {"do_sample": False}),
    ],
)
def test_generation_config_has_the_models_sampling_room_and_ends(tokenizer, tmp_path, sampling, written):
    model = random_model(tokenizer)
    write_hf_folder(tmp_path / "m", model.state_dict(), model.config, tokenizer, "", sampling=sampling)
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    ids = {"max_new_tokens": 64, "bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": bos}
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == written | ids


# --- the own class ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOK_BACK)
@torch.no_grad()
def test_beam_search_is_the_same_with_and_without_a_cache(tokenizer, tmp_path, name):
    export(tokenizer, tmp_path / "m", name)
    theirs = load_theirs(tmp_path / "m")
    settings = {"num_beams": 4, "do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
    for seed in range(4):
        ids = torch.randint(0, 250, (2, 8), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones_like(ids)
        mask[1, :3] = 0  # padded on the left
        cached = theirs.generate(ids, attention_mask=mask, **settings)
        assert torch.equal(cached, theirs.generate(ids, attention_mask=mask, use_cache=False, **settings))


@pytest.mark.parametrize("name", [*LOOK_BACK, "offset keys"])
@torch.no_grad()
def test_a_static_cache_gives_the_same_answers(tokenizer, tmp_path, name):
    export(tokenizer, tmp_path / "m", name)
    theirs = load_theirs(tmp_path / "m")
    ids = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    plain = theirs.generate(ids, pad_token_id=0, **settings)
    static = theirs.generate(ids, pad_token_id=0, cache_implementation="static", **settings)
    assert torch.equal(static, plain)


def exported_code():
    """The module that a folder brings along."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = Path(__file__).parents[1] / "nanochat" / "interop" / "hf_code"
    module = get_class_from_dynamic_module("modeling_nanochat_modern.NanoChatModernForCausalLM", folder).__module__
    return sys.modules[module]


@torch.no_grad()
def test_ids_beyond_16_bits_are_remembered_in_bfloat16():
    code = exported_code()
    ids = torch.tensor([[0, 1, 255, 256, 65535, 65536, 999_999]])
    values = torch.cat((torch.randn(1, 7, 4), code.id_digits(ids)), -1).to(torch.bfloat16)[:, None]
    cache = type("Cache", (), {"layers": [type("Layer", (), {"values": values})]})
    for past in range(1, 8):
        for n in range(1, past + 1):
            assert torch.equal(code.cached_ids(cache, past, n), ids[:, past - n : past])
        assert torch.equal(code.cached_ids(cache, past, 7)[:, 7 - past :], ids[:, :past])  # fewer than are asked for


@pytest.mark.parametrize("name", ["small", "d2"])
def test_gradient_accumulation_divides_by_all_targets(tokenizer, tmp_path, name):
    """transformers' Trainer passes num_items_in_batch: the sum of the parts' losses is that of the whole batch."""
    export(tokenizer, tmp_path / "m", name)
    theirs = load_theirs(tmp_path / "m")
    ids = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 5:] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = theirs(input_ids=ids, labels=labels).loss
    parts = [theirs(input_ids=ids[i, None], labels=labels[i, None], num_items_in_batch=count).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)


def test_what_is_not_honoured_is_no_argument(tokenizer, tmp_path):
    export(tokenizer, tmp_path / "m")
    theirs = load_theirs(tmp_path / "m")
    ids = torch.arange(5)[None]
    with pytest.raises(TypeError, match="inputs_embeds"):
        theirs(inputs_embeds=torch.zeros(1, 5, 64))
    with pytest.raises(TypeError, match="output_attentions"):
        theirs(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask"):
        theirs(ids, attention_mask=torch.ones(1, 1, 5, 5))
    output = theirs(ids, output_hidden_states=True)
    assert len(output.hidden_states) == theirs.config.num_hidden_layers + 1
    torch.testing.assert_close(
        theirs.lm_head(output.hidden_states[-1]).tanh(), (output.logits / 15).atanh().mul(15).tanh()
    )
    assert torch.equal(theirs(ids, return_dict=False)[0], output.logits)
    kept = theirs(ids, logits_to_keep=torch.tensor([1, 4])).logits
    torch.testing.assert_close(kept, output.logits[:, [1, 4]])
    torch.testing.assert_close(theirs(ids, logits_to_keep=2).logits, output.logits[:, 3:])


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_gradients_are_the_same_and_texts_can_stop_an_answer(tokenizer, tmp_path, name):
    from transformers import AutoTokenizer, DynamicCache

    export(tokenizer, tmp_path / "m", name)
    theirs = load_theirs(tmp_path / "m").train()
    ids = torch.arange(20)[None]
    gradients, kept = [], []

    def keep(tensor):
        kept[-1] += 1
        return tensor

    for checkpointed in (False, True):
        if checkpointed:
            # Its name until transformers 5.24 is the second.
            enable = getattr(theirs, "activation_checkpointing_enable", None) or theirs.gradient_checkpointing_enable
            enable()
        theirs.zero_grad()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = theirs(ids, labels=ids).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in theirs.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0]
    if theirs.config.model_type == "nanochat_modern":  # transformers' own class warns and drops it
        with pytest.raises(ValueError, match="takes no cache"):
            theirs(ids, past_key_values=DynamicCache())
    theirs.eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    free = theirs.generate(ids, do_sample=False, max_new_tokens=16)[0]
    text = their_tokenizer.decode(free[20:])
    stop = next((c for c in text if c.isascii()), text[-1])
    stopped = theirs.generate(ids, do_sample=False, max_new_tokens=16, stop_strings=[stop], tokenizer=their_tokenizer)
    assert torch.equal(stopped[0], free[: len(stopped[0])])
    assert stop in their_tokenizer.decode(stopped[0, 20:])
    assert len(stopped[0]) < len(free) or stop not in text[:-1]


# --- a text that the model carries along ------------------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 1 << 30),
    size=st.integers(2, 400),
    ids=st.integers(1, 12),
    asked=st.integers(1, 40),
)
def test_an_export_finds_in_its_text_what_we_find(seed, size, ids, asked):
    """However often something stands there: at its beginning, at its end, more often than is looked at, nowhere."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, ids, size).astype(np.int32)
    tokens = rng.integers(0, ids + 1, asked).astype(np.int32)
    # Of so few ids each says something of a subject.
    config = exported_code().NanoChatModernConfig(vocab_size=20, hidden_size=8, recall=size, recall_common=1)
    theirs, ours = exported_code().Recall(config), Recall(size, 20, 8)
    ours.carry(text)
    for p in ours.parameters():
        torch.nn.init.normal_(p)
    theirs.load_state_dict(ours.state_dict())
    padded = F.pad(torch.from_numpy(tokens).long(), (WINDOW - 1, 0), value=-1)[None]
    followers, length, level = theirs.find(padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops_recall, "COMMON", 1)
        expected = ours.look_up(padded, WINDOW - 1)
    assert torch.equal((followers * KINDS + length * LEVELS + level), expected.long())
    torch.testing.assert_close(theirs(padded), ours(expected))


def test_an_export_compares_as_long_windows_as_we_do(monkeypatch):
    """Documents longer than a window, in which a context and what is before a match have much and little in common."""
    rng = np.random.default_rng(0)
    text = np.concatenate([[0], *(rng.integers(1 + 20 * i, 61 + 20 * i, 400) for i in range(4))]).astype(np.int32)
    text[900:1100] = np.where(rng.random(200) < 0.8, text[300:500], text[900:1100])
    tokens = torch.from_numpy(text[np.r_[250:550, 0, 700:750]]).long()
    config = exported_code().NanoChatModernConfig(vocab_size=140, hidden_size=8, recall=len(text), recall_common=60)
    theirs, ours = exported_code().Recall(config), Recall(len(text), 140, 8)
    ours.carry(text)
    theirs.load_state_dict(ours.state_dict())
    padded = F.pad(tokens, (WINDOW - 1, 0), value=-1)[None]
    followers, length, level = theirs.find(padded)
    monkeypatch.setattr(ops_recall, "COMMON", 60)
    expected = ours.look_up(padded, WINDOW - 1)
    assert torch.equal((followers * KINDS + length * LEVELS + level), expected.long())
    assert len(level[0, 200:300].unique()) > 5


RECALL = ["windows and recall", "reach and recall"]


@pytest.fixture(scope="module", params=RECALL)
def recalling(request, tokenizer, tmp_path_factory):
    """(our model, transformers', a whole context of ids that recall something almost everywhere)."""
    folder = tmp_path_factory.mktemp("recall") / "model"
    model = export(tokenizer, folder, request.param, sequence_len=300)
    ids = few_ids(torch.randint(300, (2, model.config.sequence_len), generator=torch.Generator().manual_seed(2)))
    return model, load_theirs(folder), ids


@torch.no_grad()
def test_what_is_recalled_matters(recalling):
    """Else the tests below would say nothing."""
    _, theirs, ids = recalling
    with_text = theirs(ids).logits
    kept = theirs.recall.scale.clone()
    theirs.recall.scale.zero_()
    assert (theirs(ids).logits - with_text).abs().mean() > 0.02  # 200 times what the tests below allow
    theirs.recall.scale.copy_(kept)
    _, lengths, levels = theirs.recall.find(F.pad(ids, (WINDOW - 1, 0), value=-1))
    assert len(lengths.unique()) > 3
    assert len(levels.unique()) > 3


@torch.no_grad()
def test_a_text_that_is_read_in_pieces_gives_the_logits_of_the_whole(recalling):
    """With a dynamic and a static cache: single tokens, fewer and more than are looked back at, from the first on."""
    from transformers import StaticCache

    model, theirs, ids = recalling
    ids = ids[:, :140]
    expected = model(ids)
    for make in (lambda: None, lambda: StaticCache(config=theirs.config, max_cache_len=144)):
        for steps in ([1] * 140, [3, 1, 1, 5, 20, 1, 2, 107], [130, 1, 9]):
            cache, at, logits = make(), 0, []
            for n in steps:
                out = theirs(ids[:, at : at + n], past_key_values=cache, use_cache=True)
                cache, at = out[theirs_cache(out)], at + n
                logits.append(out.logits)
            torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=0)


def theirs_cache(output):
    return next(name for name in CACHE_NAMES if name in output)


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [5, 3, 1, 1, 30]], ids=["at once", "token by token", "in pieces"])
@torch.no_grad()
def test_a_padded_row_has_the_logits_that_it_has_alone(recalling, pieces):
    model, theirs, ids = recalling
    lengths = [40, 33, 3, 1]
    rows = [ids[0, :length] for length in lengths]
    # What stands in the padding would match.
    batch = torch.stack([torch.cat((ids[1, : 40 - len(row)], row)) for row in rows])
    mask = torch.stack([torch.arange(40) >= 40 - length for length in lengths]).long()
    cache, at, logits = None, 0, []
    for n in pieces:
        out = theirs(batch[:, at : at + n], attention_mask=mask[:, : at + n], past_key_values=cache, use_cache=True)
        cache, at = out[theirs_cache(out)], at + n
        logits.append(out.logits)
    together = torch.cat(logits, 1)
    for row, own in zip(rows, together, strict=True):
        torch.testing.assert_close(own[40 - len(row) :], model(row[None])[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_cache_that_was_cropped_repeated_and_reordered_goes_on_as_its_rows_do(recalling):
    model, theirs, ids = recalling
    out = theirs(ids[:, :30], use_cache=True)
    cache = out[theirs_cache(out)]
    cache.crop(-5)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    rows = torch.stack([ids[1, :25], ids[0, :25], ids[1, :25], ids[0, :25]])
    new = few_ids(torch.randint(300, (4, 4), generator=torch.Generator().manual_seed(3)))
    expected = model(torch.cat((rows, new), 1))[:, 25:]
    logits = torch.cat([theirs(new[:, i, None], past_key_values=cache, use_cache=True).logits for i in range(4)], 1)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_an_export_that_finds_in_another_way_is_named(tokenizer, tmp_path):
    export(tokenizer, tmp_path / "m", "reach and recall")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"recall_followers": 4}))
    with pytest.raises(ValueError, match=r"another version does.*or train it again"):
        read_hf_folder(tmp_path / "m")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_text_stays_whole_numbers_whatever_the_weights_are_stored_in(tokenizer, tmp_path, stored):
    """Written, loaded in half precision, saved by transformers, and brought back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = random_model(tokenizer, **MODELS["windows and recall"])
    write_hf_folder(tmp_path / "m", model.state_dict(), model.config, tokenizer, "", dtype=stored)
    for dtype in (torch.float16, torch.bfloat16):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype, trust_remote_code=True)
        assert theirs.recall.scale.dtype == dtype
        theirs.save_pretrained(tmp_path / "again")
        AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "again")
        for folder in ("m", "again"):
            state, config, _ = read_hf_folder(tmp_path / folder)
            assert config.recall == 3000
            for name in ("text", "order"):
                assert torch.equal(state[f"recall.{name}"], getattr(model.recall, name))
                assert torch.equal(getattr(theirs.recall, name), getattr(model.recall, name))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("text", lambda t: t.fill_(1 << 20), r"recall\.text holds numbers outside of 0 to"),
        ("text", lambda t: t.fill_(-1), r"recall\.text holds numbers outside of 0 to"),
        ("order", lambda t: t.add_(1), r"recall\.order holds numbers outside of 0 to 2998"),
        ("order", lambda t: t.long(), r"recall\.order holds torch\.int64"),
        ("text", lambda t: t.float(), r"recall\.text holds torch\.float32"),
        ("text", lambda t: t[1:].clone(), r"recall\.text is \(2999,\), not \(3000,\)"),
    ],
)
def test_a_damaged_text_is_refused_before_anything_is_looked_up(tokenizer, tmp_path, name, change, named):
    from safetensors.torch import load_file, save_file

    export(tokenizer, tmp_path / "m", "windows and recall")
    path = tmp_path / "m" / "model.safetensors"
    weights = load_file(path)
    weights[f"recall.{name}"] = change(weights[f"recall.{name}"])
    save_file(weights, path)
    with pytest.raises(ValueError, match=named):
        read_hf_folder(tmp_path / "m")


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tokenizer, tmp_path, monkeypatch):
    """Save models as checkpoints: base(name, tag, **changes) -> the model."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer.save(get_base_dir() / "tokenizer")

    def save(name, tag="d2", stage="chatsft", **changes):
        model = random_model(tokenizer, **MODELS[name] | changes)
        meta = {"complete": True, "model_config": model.config.to_dict(), "tokenizer_hash": tokenizer.hash}
        save_checkpoint(get_base_dir() / f"{stage}_checkpoints" / tag, 5, model.state_dict(), None, meta)
        return model

    return save


def test_the_format_is_qwen3_where_it_is_exact(base, tmp_path, capsys):
    from scripts import export_hf

    def export_as(tag, form="auto"):
        export_hf.main(export_hf.Config(output=str(tmp_path / "out"), model_tag=tag, format=form))
        return json.loads((tmp_path / "out" / "config.json").read_text())["model_type"], capsys.readouterr().out

    base("factors, no softcap", "portable")
    base("d2", "classic")
    base("small", "small")
    base("windows and recall", "recall")
    assert export_as("portable")[0] == "qwen3"
    assert export_as("portable", "native")[0] == "nanochat_modern"
    kind, said = export_as("classic")
    assert kind == "nanochat"
    assert "logit_softcap=15.0" in said
    assert "--recipe=portable" in said
    kind, said = export_as("classic", "qwen3")  # no corpus here
    assert kind == "qwen3"
    assert "the difference is not measured" in said
    kind, said = export_as("recall")
    assert kind == "nanochat_modern"
    assert re.search(r"no Qwen3 model, since it has recall=3000, window_pattern=SL.*--recipe=portable", said)
    assert "3,000 tokens of its training text" in said
    assert "3,000 tokens of its training text" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"smear=True.*--recipe=portable"):
        export_as("small", "qwen3")
    with pytest.raises(ValueError, match=r"recall=3000.*--recipe=portable"):
        export_as("recall", "qwen3")
    float16 = export_hf.Config(output=str(tmp_path / "half"), model_tag="portable", dtype="float16")
    with pytest.raises(ValueError, match=r"--dtype=float16.*bfloat16"):
        export_hf.main(float16)
    assert not (tmp_path / "half").exists()
    export_hf.main(dataclasses.replace(float16, format="native"))


def test_a_softcapped_model_says_what_its_export_lacks(base, tmp_path, capsys):
    from scripts import export_hf

    model = base("d2", logit_softcap=1.0)  # so low that the difference is plain
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(TEXT[i % 3] * 20)
    meta = {"complete": True, "model_config": model.config.to_dict(), "config": {"data_dir": str(texts)}}
    save_checkpoint(get_base_dir() / "base_checkpoints" / "d2", 5, model.state_dict(), None, meta)
    export_hf.main(export_hf.Config(output=str(tmp_path / "out"), format="qwen3"))
    said = capsys.readouterr().out
    found = re.search(r"mean KL ([\d.e+-]+) nats per token; bits per byte ([\d.]+) -> ([\d.]+); ([\d.]+)% of", said)
    assert found, said
    kl, before, after, greedy = map(float, found.groups())
    assert kl > 1e-3
    assert before != after
    assert greedy <= 1  # the tanh keeps the order
    assert "tanh at 1.0" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["small", "factors, no softcap", "d2", "windows and recall"])
def test_what_transformers_saved_again_is_imported(base, tmp_path, monkeypatch, name):
    """A native or Qwen3 export, loaded and saved by transformers: no file of ours is left."""
    from transformers import AutoTokenizer

    from scripts import export_hf, import_hf

    model = base(name)
    export_hf.main(export_hf.Config(output=str(tmp_path / "out")))
    load_theirs(tmp_path / "out").save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    import_hf.main(import_hf.Config(path=str(tmp_path / "again")))
    again, tokenizer, _ = load_model("sft", torch.device("cpu"), model_tag="imported")
    ids = torch.tensor([tokenizer.encode("The quick brown fox", prepend="<|bos|>")])
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "source"), [("small", "sft"), ("factors, no softcap", "base")])
def test_the_files_are_readable_and_the_cards_code_runs_as_printed(base, tmp_path, monkeypatch, capsys, name, source):
    from scripts import export_hf

    base(name, stage={"sft": "chatsft", "base": "base"}[source])
    export_hf.main(export_hf.Config(output=str(tmp_path / "my-model"), source=source))
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "my-model").iterdir()}
    assert len(modes) == 1
    card = (tmp_path / "my-model" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "transformers>=5" in card
    assert ("apply_chat_template" in code) == (source == "sft")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.strip()
    settings = json.loads((tmp_path / "my-model" / "generation_config.json").read_text())
    assert settings["max_new_tokens"] == 64
    assert settings["do_sample"] is True
