"""Checkpoints of nanochat itself are taken over safely."""

import json

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint, load_model
from nanochat.gpt import GPT, NANOCHAT_2026, GPTConfig
from nanochat.interop.nanochat_pt import classic_steps, import_classic, read_classic


@pytest.fixture
def classic(tmp_path, tiny_model):
    """A folder as nanochat writes it: a compiled model's names, bfloat16 embedding, padded vocabulary."""
    folder = tmp_path / "d2"
    folder.mkdir()
    weights = {f"_orig_mod.{k}": v.clone() for k, v in tiny_model.state_dict().items()}
    name = "_orig_mod.transformer.wte.weight"
    weights[name] = torch.cat([weights[name], torch.zeros(20, weights[name].shape[1])]).bfloat16()
    config = {k: v for k, v in tiny_model.config.to_dict().items() if k in GPTConfig.__dataclass_fields__}
    for step in (9, 100):
        torch.save(weights, folder / f"model_{step:06d}.pt")
        (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}))
    torch.save({}, folder / "model_000200.pt")  # no meta: never finished
    return folder


def test_the_imported_model_computes_the_same(classic, tiny_model, tiny_tokenizer, base_dir):
    tiny_tokenizer.save(base_dir / "tokenizer")
    import_classic(classic, "base", "d2", tiny_tokenizer)
    model, _, meta = load_model("base", torch.device("cpu"))
    assert meta["step"] == 100
    tiny_model.transformer["wte"].weight.data = tiny_model.transformer["wte"].weight.data.bfloat16().float()
    x = torch.arange(12).view(1, 12)
    assert torch.equal(model(x), tiny_model(x))
    assert not list((base_dir / "base_checkpoints" / "d2").glob("*.pt"))
    with pytest.raises(ValueError, match="already"):
        import_classic(classic, "base", "d2", tiny_tokenizer)


def test_steps_are_numbers_and_strays_are_ignored(classic):
    assert classic_steps(classic) == [9, 100]
    with pytest.raises(FileNotFoundError, match="step 7"):
        read_classic(classic, 7)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file was run",))


@pytest.mark.parametrize("content", [{"x": Evil()}, {"lm_head.weight": torch.zeros(3, 3)}])
def test_foreign_files_are_refused_and_run_no_code(classic, content, capsys):
    torch.save(content, classic / "model_000100.pt")
    with pytest.raises(ValueError, match=r"model_000100\.pt"):
        read_classic(classic)
    assert "was run" not in capsys.readouterr().out


def test_another_vocabulary_is_refused(classic, base_dir):
    from nanochat.tokenizer import RustBPETokenizer

    other = RustBPETokenizer.train_from_iterator(iter(["another text for another tokenizer " * 9]), 270)
    with pytest.raises(ValueError, match="import the tokenizer"):
        import_classic(classic, "base", "d2", other)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(base_dir / "base_checkpoints" / "d2")


def test_the_models_of_both_have_the_same_names():
    """The names in nanochat's files, as its specification lists them."""
    with torch.device("meta"):
        names = set(GPT(GPTConfig(64, 300, 1, 1, 1, 64)).state_dict())
    block = [f"attn.{n}" for n in ("c_q", "c_k", "c_v", "c_proj")] + ["mlp.c_fc", "mlp.c_proj"]
    expected = {f"transformer.h.0.{n}.weight" for n in block} | {"transformer.wte.weight", "lm_head.weight"}
    assert names == expected


def test_a_model_of_2026_is_recognised_by_its_names(tiny_tokenizer, base_dir, tmp_path):
    """Its config says nothing of the switches; a model from before all of them were there is refused."""
    rows = tiny_tokenizer.get_vocab_size()
    shape = {"sequence_len": 64, "vocab_size": rows, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 64}
    model = GPT(GPTConfig(**shape, **NANOCHAT_2026))
    model.init_weights()
    folder = tmp_path / "d2"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model_000005.pt")
    meta = {"step": 5, "model_config": shape | {"window_pattern": "L"}}
    (folder / "meta_000005.json").write_text(json.dumps(meta))
    tiny_tokenizer.save(base_dir / "tokenizer")
    import_classic(folder, "base", "d2", tiny_tokenizer)
    again, _, _ = load_model("base", torch.device("cpu"))
    x = torch.arange(30).view(1, 30)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    half = {k: v for k, v in model.state_dict().items() if "smear" not in k}
    torch.save(half, folder / "model_000005.pt")
    with pytest.raises(ValueError, match="between the classic and the one of 2026"):
        import_classic(folder, "base", "other", tiny_tokenizer)
