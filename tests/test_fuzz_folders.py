"""Model folders of others: what is wrong with one is said in a sentence, before anything is built by it."""

import json
import shutil

import numpy as np
import pytest
import torch

from dev.fuzz_folders import fuzz, originals
from nanochat.interop.hf_format import read_hf_folder
from nanochat.interop.nanochat_pt import read_classic


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    originals(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def test_sixty_changed_folders_are_read_or_refused_in_a_sentence():
    counts = fuzz(60, seed=1)
    assert sum(counts.values()) == 60
    assert counts["ValueError"] > 20
    assert counts["read"] > 10


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_hidden_layers", 10**9, "1000000000 layers"),
        ("num_hidden_layers", 1, "unknown"),
        ("max_position_embeddings", 10**9, "context of 1000000000"),
        ("vocab_size", 10**9, "rows for 1000000000"),
        ("hidden_size", 64, "intermediate_size"),
        ("num_attention_heads", "2", "TypeError"),
        ("num_key_value_heads", True, "n_kv_head of its config is True"),
    ],
)
def test_sizes_are_compared_with_the_weights_before_anything_is_built(folder, field, value, named):
    path = folder / "classic_without" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=named):
        read_hf_folder(path.parent)


def test_files_outside_the_folder_are_not_read(folder):
    shutil.copy(folder / "classic" / "model.safetensors", folder / "outside.safetensors")
    for name in ("../outside.safetensors", str(folder / "outside.safetensors")):
        index = folder / "classic" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="no file of this folder"):
            read_hf_folder(folder / "classic")


def test_an_id_of_a_billion_and_a_remainder_that_unpacks_to_megabytes_are_refused(folder):
    path = folder / "classic_without" / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["added_tokens"][0]["id"] = 10**10
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="has the id 10000000000"):
        read_hf_folder(path.parent)
    np.savez_compressed(folder / "qwen3" / "nanochat.npz", wte_rms=np.zeros(1 << 21))
    with pytest.raises(ValueError, match="more than the weights"):
        read_hf_folder(folder / "qwen3")


def test_a_classic_checkpoint_that_claims_more_than_its_file_holds_is_refused(folder):
    path = folder / "pt" / "model_000001.pt"
    weights = torch.load(path, weights_only=True)
    name = "transformer.h.0.attn.c_q.weight"
    for value, named in (
        (torch.zeros(1).expand(1 << 40), r"c_q\.weight is \(1099511627776"),  # 4 TB by 4 bytes
        (torch.full_like(weights[name], float("nan")), "no finite numbers"),
    ):
        torch.save(weights | {name: value}, path)
        with pytest.raises(ValueError, match=named):
            read_classic(path.parent)
    record = {"sequence_len": 32, "vocab_size": 280, "n_layer": 10**9, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    (folder / "pt" / "meta_000001.json").write_text(json.dumps({"model_config": record}))
    with pytest.raises(ValueError, match="1000000000 layers"):
        read_classic(path.parent)
