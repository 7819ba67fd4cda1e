"""Export to and import from transformers' format: same logits, same ids, same conversations, same answers."""

import dataclasses
import json
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanochat.checkpoint_manager import load_model, save_checkpoint
from nanochat.common import get_base_dir
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.hf_format import is_classic, own_config, read_hf_folder, write_hf_folder
from nanochat.interop.hf_tokenizer import byte_characters, from_hf_json, to_hf_json
from nanochat.ops import recall
from nanochat.recipe import recipe_of
from nanochat.tokenizer import RustBPETokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 12345 times too lazy.",
    "Größe, naïve café, 你好世界, привет мир, 🙂🙃 and\ttabs\r\nand lines\n\n  with  spaces   ",
    "def f(x):\n    return x ** 2  # squares\n" * 3,
] * 4
FEW_IDS = 4


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(TEXT), 400)


def few_ids(ids):
    """Four ids, and now and then a rarer one: of these a model with a text recalls something almost everywhere."""
    return torch.where(ids % 8 == 7, 10 + ids // 8, ids % FEW_IDS)


def text_to_carry(tokenizer, size):
    """Tokens of texts that the tests ask for, and few ones, which match themselves and each other often."""
    known = [i for text in TEXT[:3] for i in tokenizer.encode(text, prepend="<|bos|>")]
    few = few_ids(torch.randint(300, (size,), generator=torch.Generator().manual_seed(5))).tolist()
    return np.array((known + few)[:size], dtype=np.int32)


@pytest.fixture(scope="module", autouse=True)
def rarer_ids_say_what_a_short_text_is_about():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "COMMON", 20)
        patch.setitem(recall.FORM, "recall_common", 20)
        yield


def random_model(tokenizer, depth=2, **changes):
    config = GPTConfig(
        **{
            "sequence_len": 128,
            "vocab_size": tokenizer.get_vocab_size(),
            "n_layer": depth,
            "n_head": 4,
            "n_kv_head": 4,
            "n_embd": 64,
            **changes,
        }
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(7)
    model.init_weights(generator)
    if config.recall:
        model.recall.carry(text_to_carry(tokenizer, config.recall))
        torch.nn.init.uniform_(model.recall.scale, 0.5, 5.0, generator=generator)  # every kind of match another
    with torch.no_grad():
        for p in model.parameters():  # the start has zeros and tiny gates, which would hide mistakes
            if p.abs().mean() < 0.02 or p.numel() == 1:
                p.normal_(0.0, 0.3 if p.dim() == 1 else 0.05, generator=generator)
    return model.eval()


MODERN = {
    "residual_scalars": True,
    "value_embeddings": True,
    "smear": True,
    "backout": True,
    "qk_scale": 1.2,
    "rope_base": 100000.0,
    "init": "modern",
}
MODELS = {
    "d2": {"depth": 2},
    "d4": {"depth": 4},
    "d3 GQA": {"depth": 3, "n_kv_head": 2},
    "d2 MQA": {"depth": 2, "n_kv_head": 1, "init": "modern"},
    "modern d2": {"depth": 2, **MODERN},
    "modern d4 GQA": {"depth": 4, "n_kv_head": 2, **MODERN},
    "offset keys": {"depth": 2, "n_kv_head": 1, "key_offset": True},
    "small": {"depth": 4, "key_offset": True, **MODERN},
    "factors, no softcap": {"depth": 2, "residual_factors": True, "logit_softcap": None, "qk_scale": 1.2},
    "windows and recall": {"depth": 3, "sequence_len": 600, "window_pattern": "SL", "recall": 3000},
    "reach and recall": {"depth": 2, "reach": 50, "recall": 900, "smear": True, "n_kv_head": 1},
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    """(our model, the folder it was exported to)."""
    model = random_model(tokenizer, **MODELS[request.param])
    folder = tmp_path_factory.mktemp("hf") / "model"
    write_hf_folder(folder, model.state_dict(), model.config, tokenizer, "# card\n")
    return model, folder


def load_theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def test_logits_are_equal(exported):
    model, folder = exported
    theirs = load_theirs(folder)
    native = type(theirs).__module__.startswith("transformers.models.nanochat.")
    assert native == is_classic(model.config)
    ids = torch.randint(
        model.config.vocab_size, (3, model.config.sequence_len), generator=torch.Generator().manual_seed(1)
    )
    ids[1] = few_ids(ids[1])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-4, rtol=0)


def test_greedy_generation_is_equal(exported, tokenizer):
    model, folder = exported
    theirs = load_theirs(folder)
    prompt = tokenizer.encode("The quick", prepend="<|bos|>")
    ours, _ = Engine(model, tokenizer).generate_batch(prompt, num_samples=1, max_tokens=24, temperature=0.0)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    if expected[-1] in ends:  # ours leaves the ending token out
        expected = expected[:-1]
    assert ours[0] == expected


def test_import_gives_back_the_same_weights(exported, tokenizer):
    model, folder = exported
    state, config, imported = read_hf_folder(folder)
    assert config == model.config
    assert imported.hash == tokenizer.hash
    rows = config.vocab_size
    for name, value in model.state_dict().items():
        real = slice(rows) if value.shape[0] == config.padded_vocab_size else slice(None)
        assert torch.equal(state[name][real], value[real]), name
    GPT(config).load_state_dict(state)


def test_import_of_a_folder_that_transformers_wrote(exported, tokenizer, tmp_path):
    """No file of ours in it: the config and the tokenizer are read from transformers' own."""
    from transformers import AutoTokenizer

    model, folder = exported
    load_theirs(folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    state, config, imported = read_hf_folder(tmp_path)
    assert config == dataclasses.replace(model.config, init="classic")
    again = GPT(config)
    again.load_state_dict(state)
    ids = torch.randint(config.vocab_size, (2, 30))
    with torch.no_grad():
        assert torch.equal(again.eval()(ids), model(ids))
    for text in TEXT[:3]:
        assert imported.encode(text) == tokenizer.encode(text)


def test_left_padded_rows_generate_what_they_would_alone(exported, tokenizer):
    """Batched generation in transformers pads on the left: neither attention nor smear may look at the padding."""
    model, folder = exported
    if is_classic(model.config):
        pytest.skip("transformers' own class")
    theirs = load_theirs(folder)
    rows = [tokenizer.encode(text, prepend="<|bos|>") for text in ("The quick", "The quick brown fox jumps over", "a")]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        together = theirs.generate(ids, attention_mask=mask, **settings)
        for row, out in zip(rows, together, strict=True):
            alone = theirs.generate(torch.tensor([row]), **settings)[0]
            assert out[width:].tolist() == alone[len(row) :].tolist()


def test_half_precision_loads_and_stays_close(exported, tokenizer):
    """An old card would load the folder in float16."""
    from transformers import AutoModelForCausalLM

    model, folder = exported
    if is_classic(model.config):
        pytest.skip("transformers' own class")
    ids = torch.randint(model.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    ids[1] = few_ids(ids[1])
    for dtype, tolerance in ((torch.float16, 0.1), (torch.bfloat16, 0.5)):
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, model(ids), atol=tolerance, rtol=0)


def test_base_eval_reads_the_folder(exported, tokenizer):
    """--hf_path: as our own model, without the code that a modern model's folder brings along."""
    from nanochat.interop.hf_model import load_hf_model

    model, folder = exported
    theirs, _ = load_hf_model(str(folder), torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode("The quick brown fox", prepend="<|bos|>")])
    with torch.no_grad():
        torch.testing.assert_close(theirs.logits_at(theirs.hidden(ids)), model(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "./no_such_folder", "/no/such/folder"])
def test_a_mistyped_hf_path_is_told_before_anything_is_downloaded(name, base_dir, monkeypatch):
    from scripts import base_eval

    monkeypatch.setattr(base_eval, "get_bundle_folder", lambda path: pytest.fail("the bundle was asked for"))
    with pytest.raises(FileNotFoundError, match=f"--hf_path {name}: there is no such folder"):
        base_eval.main(base_eval.Config(hf_path=name))


def test_foreign_code_never_runs_by_itself(tokenizer, tmp_path):
    from nanochat.interop.hf_model import load_hf_model

    model = random_model(tokenizer, **MODERN)
    write_hf_folder(tmp_path / "model", model.state_dict(), model.config, tokenizer, "")
    with open(tmp_path / "model" / "modeling_nanochat_modern.py", "a") as f:
        f.write("\nraise SystemExit('foreign code ran')\n")
    (tmp_path / "model" / "nanochat.json").unlink()
    with pytest.raises(FileNotFoundError, match="custom code"):
        load_hf_model(str(tmp_path / "model"), torch.device("cpu"))


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def their_tokenizer(tokenizer, tmp_path_factory):
    from transformers import AutoTokenizer

    model = random_model(tokenizer)
    folder = tmp_path_factory.mktemp("tok") / "model"
    write_hf_folder(folder, model.state_dict(), model.config, tokenizer, "")
    return AutoTokenizer.from_pretrained(folder)


LETTERS = st.text(
    st.one_of(
        st.sampled_from("the quick brown fox 0123456789 .,!?'\"\n\r\t"),
        st.characters(codec="utf-8"),
    ),
    max_size=60,
)


@settings(max_examples=int(os.environ.get("HF_EXAMPLES", "400")), deadline=None)
@given(text=LETTERS)
def test_ids_are_equal(tokenizer, their_tokenizer, text):
    # Theirs reads a special token's name in a text as that token; ours never does.
    assume(not any(name in text for name in tokenizer.get_special_tokens()))
    assert their_tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_special_tokens_have_our_ids(tokenizer, their_tokenizer):
    for name in tokenizer.get_special_tokens():
        assert their_tokenizer.convert_tokens_to_ids(name) == tokenizer.encode_special(name)
    assert their_tokenizer.bos_token_id == tokenizer.get_bos_token_id()


def test_decoding_is_equal(tokenizer, their_tokenizer):
    ids = [i for text in TEXT for i in tokenizer.encode(text)]
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids)


def test_a_token_that_training_made_twice_keeps_its_higher_id():
    """The merge list must hold every way to make a token: ours merges whatever two neighbours make one."""
    ranks = [bytes([b]) for b in range(256)] + [b"ab", b"bc", b"abc", b"abc"]
    tokenizer = RustBPETokenizer.from_ranks(ranks)
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(to_hf_json(tokenizer)))
    for text in ("abc", "ab bc abcabc", "aabcc", "bcab"):
        assert theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)


def test_the_byte_table_is_gpt2s():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert dict(enumerate(byte_characters())) == bytes_to_unicode()


def conversation(rng):
    words = ["hello", "ΣΣ", "1234", "\n\n", " two  spaces", "🙂", "it's", "{{ x }}", "{% if %}", "<b>&amp;</b>"]

    def text():
        return "".join(rng.choices(words, k=rng.randint(1, 6)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.5:
            messages.append({"role": "assistant", "content": text()})
        else:
            kinds = ["text", "python", "python_output", "text"]
            messages.append({"role": "assistant", "content": [{"type": k, "text": text()} for k in kinds]})
    return messages


def test_the_chat_template_writes_what_we_render(tokenizer, their_tokenizer):
    rng = random.Random(3)
    for _ in range(200):
        messages = conversation(rng)
        whole, _ = tokenizer.render_conversation({"messages": messages}, max_tokens=None)
        assert their_tokenizer.apply_chat_template(messages, return_dict=False) == whole
        asked = their_tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == tokenizer.render_for_completion({"messages": messages})


def test_the_chat_template_refuses_messages_out_of_order(their_tokenizer):
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(Exception, match="take turns"):
        their_tokenizer.apply_chat_template(twice)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_config_settings_that_ours_lacks_are_named(exported):
    stored = json.loads((exported[1] / "config.json").read_text())
    if stored["model_type"] != "nanochat":
        assert own_config(stored) == dataclasses.replace(exported[0].config, init="classic")
        return
    assert own_config(stored | {"final_logit_softcapping": None}).logit_softcap is None
    with pytest.raises(ValueError, match="does not say n_layer"):
        own_config({name: value for name, value in stored.items() if name != "num_hidden_layers"})
    for name, value in (("hidden_act", "silu"), ("intermediate_size", 100)):
        with pytest.raises(ValueError, match=name):
            own_config(stored | {name: value})
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        own_config(stored | {"model_type": "llama"})


def test_a_tokenizer_of_another_kind_is_refused(tokenizer):
    stored = to_hf_json(tokenizer)
    with pytest.raises(ValueError, match="byte-level BPE"):
        from_hf_json(stored | {"model": {"type": "Unigram"}}, "<|bos|>")
    with pytest.raises(ValueError, match="normalizes"):
        from_hf_json(stored | {"normalizer": {"type": "NFC"}}, "<|bos|>")


def test_a_missing_file_is_named(exported, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_hf_folder(tmp_path)


# --- the scripts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer.save(get_base_dir() / "tokenizer")
    model = random_model(tokenizer)
    meta = {
        "complete": True,
        "model_config": model.config.to_dict(),
        "tokenizer_hash": tokenizer.hash,
        "val_bpb": 1.2345,
        "config": {"dataset": "demo"},
        "recipe": "portable",
        "sampling": {"temperature": 0.3, "top_k": None},
        "state": {"tokens": 1000, "seconds": 75.0},
    }
    save_checkpoint(get_base_dir() / "chatsft_checkpoints" / "d2", 5, model.state_dict(), None, meta)
    return model


def test_export_and_import_scripts(checkpoint, tmp_path, monkeypatch):
    from scripts import export_hf, import_hf

    folder = tmp_path / "out"
    export_hf.main(export_hf.Config(output=str(folder)))
    assert json.loads((folder / "generation_config.json").read_text())["temperature"] == 0.3
    card = (folder / "README.md").read_text()
    assert "1.2345" in card
    assert "data: demo" in card
    assert f"{checkpoint.num_params():,} parameters" in card
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    import_hf.main(import_hf.Config(path=str(folder)))
    model, tokenizer, meta = load_model("sft", torch.device("cpu"), model_tag="imported")
    assert (recipe_of(meta), meta["sampling"]) == ("portable", {"temperature": 0.3, "top_k": None})
    ids = torch.tensor([tokenizer.encode("The quick brown fox", prepend="<|bos|>")])
    with torch.no_grad():
        assert torch.equal(model(ids), checkpoint(ids))
    with pytest.raises(ValueError, match="holds a model already"):
        import_hf.main(import_hf.Config(path=str(folder)))


def test_export_does_not_overwrite_other_things(checkpoint, tmp_path):
    from scripts import export_hf

    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no export"):
        export_hf.main(export_hf.Config(output=str(tmp_path / "precious")))
    (tmp_path / "precious" / "config.json").write_text("{}")  # somebody else's model
    with pytest.raises(ValueError, match="holds no export"):
        export_hf.main(export_hf.Config(output=str(tmp_path / "precious")))
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # its own export it replaces
        export_hf.main(export_hf.Config(output=str(tmp_path / "export")))
    (tmp_path / "export" / ".git").mkdir()
    with pytest.raises(ValueError, match=r"also \.git, which would be lost"):
        export_hf.main(export_hf.Config(output=str(tmp_path / "export")))


def test_import_keeps_the_tokenizer_that_other_models_need(checkpoint, tmp_path):
    from scripts import export_hf, import_hf

    folder = tmp_path / "out"
    export_hf.main(export_hf.Config(output=str(folder)))
    RustBPETokenizer.train_from_iterator(iter(TEXT), 300).save(get_base_dir() / "tokenizer")
    with pytest.raises(ValueError, match="another tokenizer"):
        import_hf.main(import_hf.Config(path=str(folder)))


def test_the_text_generation_pipeline_serves_the_folder(exported):
    from transformers import pipeline

    chat = pipeline("text-generation", model=str(exported[1]), device="cpu", trust_remote_code=True)
    answer = chat([{"role": "user", "content": "The quick"}], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_a_hub_that_cannot_be_reached_is_reported(exported, monkeypatch):
    from huggingface_hub import constants

    from nanochat.interop.hf_format import model_folder, push_folder

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(RuntimeError, match="could not push to owner/name"):
        push_folder(exported[1], "owner/name", private=True)
    with pytest.raises(FileNotFoundError, match="no folder"):
        model_folder("./nowhere")
