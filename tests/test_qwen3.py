"""A model as a Qwen3 model: the same logits in transformers, the same weights when it comes back, or a reason."""

import json

import pytest
import torch

from nanochat.engine import Engine
from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig
from nanochat.interop.hf_format import REMAINDER_FILE, read_hf_folder, write_hf_folder
from nanochat.interop.qwen3 import fold, fold_weights, obstacles, unfold
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.lora import add_lora, lora_tensors, merged_weights

FACTORS = {"qk_scale": 1.2, "rope_base": 100000.0, "residual_factors": True, "init": "modern"}
MODELS = {
    "classic": {},
    "GQA": {"n_layer": 4, "n_kv_head": 2, **FACTORS},
    "MQA": {"n_kv_head": 1, "residual_factors": True},
    "one layer": {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "qk_scale": 1.5},
    # 8 of 8 layers in windows that cover the context: these are none.
    "windows": {"n_layer": 8, "window_pattern": "SSSL"},
    "a reach of the whole context": {"reach": 1000},
}


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(["The quick brown fox jumps over 12345 lazy dogs. " * 9]), 300)


def random_model(vocab_size=300, **changes):
    shape = {"sequence_len": 96, "n_layer": 3, "n_head": 4, "n_kv_head": 4, "n_embd": 64, "logit_softcap": None}
    model = GPT(GPTConfig(**{**shape, "vocab_size": vocab_size, **changes}))
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "resid_logs":
                p.normal_(0.0, 0.4, generator=generator)
            elif p.abs().mean() < 0.02:  # the start has zeros, which would hide mistakes
                p.normal_(0.0, 0.05, generator=generator)
        model.wte.weight[:50] *= 0.01  # rows of other sizes: it is only a scale
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tokenizer, tmp_path_factory):
    model = random_model(tokenizer.get_vocab_size(), **MODELS[request.param])
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    write_hf_folder(folder, model.state_dict(), model.config, tokenizer, "# card\n", form="qwen3")
    return model, folder


def load_theirs(folder, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | settings).eval()


def test_logits_are_those_of_transformers_qwen3(exported):
    model, folder = exported
    theirs = load_theirs(folder)
    assert type(theirs).__module__ == "transformers.models.qwen3.modeling_qwen3"
    ids = torch.randint(model.config.vocab_size, (3, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids)
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=0)
    assert ours.std() > 0.1  # logits of nothing would be equal too


def test_greedy_answers_are_equal(exported, tokenizer):
    model, folder = exported
    prompt = tokenizer.encode("The quick", prepend="<|bos|>")
    ours, _ = Engine(model, tokenizer).generate_batch(prompt, num_samples=1, max_tokens=24, temperature=0.0)
    with torch.no_grad():
        theirs = load_theirs(folder).generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0].tolist()
    ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    assert ours[0] == theirs[: len(theirs) - (theirs[-1] in ends)]


def test_an_import_gives_back_every_bit(exported, tokenizer):
    model, folder = exported
    state, config, imported = read_hf_folder(folder)
    assert config == model.config
    assert imported.hash == tokenizer.hash
    assert set(state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        rows = config.vocab_size if value.shape[0] == config.padded_vocab_size else None
        assert torch.equal(state[name][:rows], value[:rows]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_export_comes_back_close(tokenizer, tmp_path, dtype):
    model = random_model(tokenizer.get_vocab_size(), **MODELS["GQA"])
    write_hf_folder(tmp_path / "m", model.state_dict(), model.config, tokenizer, "", dtype, "qwen3")
    state, config, _ = read_hf_folder(tmp_path / "m")
    torch.testing.assert_close(state["resid_logs"], model.resid_logs.detach())
    torch.testing.assert_close(
        state["transformer.wte.weight"][:300], model.wte.weight.detach()[:300], rtol=0.01, atol=1e-4
    )
    again = GPT(config)
    again.load_state_dict(state)
    ids = torch.randint(config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (again.eval()(ids) - model(ids)).std()
        assert difference < 0.02 * model(ids).std()


def test_a_folder_that_transformers_wrote_again_is_taken_back(exported, tokenizer, tmp_path):
    """No file of ours in it; then the embedding is normalised, and the factors are in the weights."""
    from transformers import AutoTokenizer

    model, folder = exported
    load_theirs(folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    state, config, _ = read_hf_folder(tmp_path)
    assert not config.residual_factors
    again = GPT(config)
    again.load_state_dict(state)
    ids = torch.randint(config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids), model(ids), atol=1e-4, rtol=0)


def test_without_the_remainder_the_function_is_the_same(exported, tmp_path):
    model, folder = exported
    hidden = tmp_path / "hidden"
    (folder / REMAINDER_FILE).rename(hidden)
    try:
        state, config, _ = read_hf_folder(folder)
    finally:
        hidden.rename(folder / REMAINDER_FILE)
    again = GPT(config)
    again.load_state_dict(state)
    ids = torch.randint(config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids), model(ids), atol=1e-4, rtol=0)


def test_a_damaged_remainder_is_named(tokenizer, tmp_path):
    model = random_model(tokenizer.get_vocab_size(), n_layer=1)
    write_hf_folder(tmp_path / "m", model.state_dict(), model.config, tokenizer, "", form="qwen3")
    for damage in (b"", b"PK\x03\x04 no zip", (tmp_path / "m" / REMAINDER_FILE).read_bytes()[:-99]):
        (tmp_path / "m" / REMAINDER_FILE).write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{REMAINDER_FILE} is damaged .*without it"):
            read_hf_folder(tmp_path / "m")


def test_weights_that_were_trained_on_elsewhere_are_refused():
    model = random_model()
    weights = fold_weights(model.state_dict(), model.config)
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight"):
        with pytest.raises(ValueError, match=f"^{name.replace('.', '[.]')} .*trained on since"):
            unfold(weights | {name: weights[name] + 0.3}, model.config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"smear": True}, "smear=True"),
        ({"key_offset": True}, "key_offset=True"),
        ({"recall": 100}, "recall=100"),
        ({"reach": 50}, "reach=50"),
        ({"residual_scalars": True}, "residual_scalars=True"),
        ({"sequence_len": 600, "window_pattern": "SL"}, "window_pattern=SL"),
        ({"logit_softcap": 15.0}, "logit_softcap=15.0"),
    ],
)
def test_what_does_not_fold_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=rf"it has {named}; .*--recipe=portable"):
        fold(random_model(**changes))


def test_a_modern_model_is_refused_with_every_reason():
    config = GPTConfig(n_layer=2, **NANOCHAT_2026)
    assert [reason.partition("=")[0] for reason in obstacles(config)] == [
        *("residual_scalars", "value_embeddings", "smear", "backout", "logit_softcap")
    ]


@torch.no_grad()
def test_a_lora_is_merged_before_the_export(tokenizer, tmp_path):
    """What SFT with --lora_rank saves is the merged model: its export computes what the LoRA did."""
    model = random_model(tokenizer.get_vocab_size(), n_kv_head=2)
    add_lora(model, 4)
    for p in lora_tensors(model).values():
        p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(5))
    write_hf_folder(tmp_path / "m", merged_weights(model), model.config, tokenizer, "", form="qwen3")
    ids = torch.randint(model.config.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(load_theirs(tmp_path / "m")(ids).logits, model(ids), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_softcapped_model_folds_on_request_and_lacks_only_the_softcap():
    model = random_model(logit_softcap=3.0)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings, weights = fold(model, without_softcap=True)
    theirs = Qwen3ForCausalLM(Qwen3Config(**settings)).eval()
    theirs.load_state_dict(weights)
    ids = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(3 * torch.tanh(theirs(ids).logits / 3), model(ids), atol=1e-4, rtol=0)


def test_config_settings_that_no_folded_model_has_are_named(exported, tmp_path):
    _, folder = exported
    stored = json.loads((folder / "config.json").read_text())
    for file in folder.iterdir():
        if file.name not in ("nanochat.json", "config.json"):
            (tmp_path / file.name).symlink_to(file)
    for name, value in (("hidden_act", "gelu"), ("attention_bias", True), ("rms_norm_eps", 1e-5)):
        (tmp_path / "config.json").write_text(json.dumps(stored | {name: value}))
        with pytest.raises(ValueError, match=rf"config\.json: {name} is {value!r}"):
            read_hf_folder(tmp_path)
