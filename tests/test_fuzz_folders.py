"""Model folders and bundles of others: what is wrong is said in a sentence, before anything is built by them."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dev.fuzz_folders import fuzz, originals
from nanochat.core_eval import get_bundle_folder, load_bundle, load_items
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


def test_fifty_changed_folders_are_read_or_refused_in_a_sentence():
    counts = fuzz(50, seed=1)
    assert sum(counts.values()) == 50
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
    record = {"sequence_len": 32, "vocab_size": 280, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    for field, value, named in (
        ("n_layer", 10**9, "1000000000 layers"),
        ("n_embd", 10**9, "no model can have the sizes"),  # more numbers than torch can count
    ):
        changed = json.dumps({"model_config": record | {field: value}})
        (folder / "pt" / "meta_000001.json").write_text(changed)
        torch.save(weights, path)
        with pytest.raises(ValueError, match=named):
            read_classic(path.parent)


# --- transformers folders of others, for --hf_path --------------------------------------------------------------------


def theirs(folder, name="llama"):
    pytest.importorskip("transformers")
    return folder / f"{name}_theirs"


def load(path):
    from nanochat.interop.hf_model import load_hf_model

    return load_hf_model(str(path), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "field", "value", "named"),
    [
        ("llama", "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but there are 21 weights"),
        ("llama", "hidden_size", 1 << 30, "hidden_size is 1073741824, but there are 280 rows and columns"),
        ("llama", "vocab_size", 10**12, "vocab_size is 1000000000000"),
        ("llama", "vocab_size", True, "vocab_size is True"),
        ("llama", "max_position_embeddings", 1 << 40, "positions"),
        ("llama", "num_key_value_heads", -1, "num_key_value_heads is -1"),
        ("llama", "hidden_size", None, "hidden_size is 4096"),
        ("gpt2", "n_layer", "2", "n_layer is '2'"),
        ("gpt2", "n_layer", 3, "lacks weights of its model"),
    ],
)
def test_a_strangers_config_is_compared_with_the_weights(folder, name, field, value, named):
    path = theirs(folder, name) / "config.json"
    stored = json.loads(path.read_text()) | {field: value}
    if value is None:
        del stored[field]  # transformers then takes its own
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=named):
        load(path.parent)


def test_a_strangers_weights_are_whole_finite_and_their_own(folder):
    path = theirs(folder) / "model.safetensors"
    assert load(path.parent)[0].max_seq_len == 64
    weights = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: torch.full_like(weights[name], float("nan"))}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="no finite numbers"):
        load(path.parent)
    save_file({n: v for n, v in weights.items() if n != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its model: model\.layers\.0\.mlp\.up_proj"):
        load(path.parent)
    index = path.with_name("model.safetensors.index.json")
    for names, said in (
        ({"a": "../x.safetensors"}, "no file of this folder"),
        ({"a": 7}, "no weight_map"),
        ([], "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(ValueError, match=said):
            load(path.parent)


def test_a_strangers_tokenizer_has_no_ids_that_the_model_lacks(folder):
    path = theirs(folder) / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 5000, "content": "<|more|>"})
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="tokenizer has the id 280"):
        load(path.parent)


# --- evaluation bundles -----------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20)
)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("dataset_uri: multiple_choice", "dataset_uri: ../../../etc/passwd", "outside the bundle"),
        ("dataset_uri: multiple_choice", "dataset_uri: /etc/passwd", "outside the bundle"),
        ("icl_tasks:", f"{BOMB}icl_tasks:\n-\n  label: *a19", "label of a task is list, expected a text"),
        ("num_fewshot: [2]", "num_fewshot: [1000000000]", "num_fewshot"),
        ("num_fewshot: [2]", "num_fewshot: [-1]", "num_fewshot"),
        ("icl_tasks:", "[" * 500, "malformed"),
        ("icl_tasks:", "x: !!python/object/apply:os.getcwd []\nicl_tasks:", "malformed"),
    ],
)
def test_what_a_bundle_claims_is_checked(folder, before, after, named):
    path = folder / "bundle" / "core.yaml"
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ValueError, match=named) as raised:
        load_bundle(path.parent)
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"choices": []}, "choices is not what"),
        ({"choices": ["a", 1]}, "choices"),
        ({"gold": 2}, "gold"),
        ({"gold": -1}, "gold"),
        ({"query": None}, "query"),
    ],
)
def test_an_example_of_another_form_is_named(folder, change, named):
    path = folder / "bundle" / "eval_data" / "multiple_choice.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_bundle(folder / "bundle").tasks[0]
    with pytest.raises(ValueError, match=rf"multiple_choice\.jsonl, example 4: {named}"):
        load_items(task)


def test_a_bundle_that_would_fill_the_disk_is_not_unpacked(base_dir):
    with zipfile.ZipFile(base_dir / "eval_bundle.zip", "w") as bundle:
        for i in range(6):
            bundle.writestr(f"{i}", b"0")
    data, at = bytearray((base_dir / "eval_bundle.zip").read_bytes()), 0
    for _ in range(6):
        at = data.find(b"PK\1\2", at + 1)  # an entry of the directory, with its size when unpacked
        data[at + 24 : at + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    (base_dir / "eval_bundle.zip").write_bytes(data)
    with pytest.raises((FileNotFoundError, RuntimeError), match="would unpack to 26 GB"):
        get_bundle_folder()
    assert not (base_dir / "eval_bundle").exists()
