"""A model folder in the format of Hugging Face transformers, written and read, in one of two forms.

qwen3: a `Qwen3ForCausalLM`, which every common runtime knows, for a model that can be written as one
(nanochat/interop/qwen3.py). native: the classic model is transformers' own `NanoChatForCausalLM`, the same function
under other names; a model with modern switches has no class there, so its folder brings one along
(nanochat/interop/hf_code), loaded with `trust_remote_code=True`.

    config.json  generation_config.json  model.safetensors     the model
    tokenizer.json  tokenizer_config.json                       the tokenizer, with the chat template
    nanochat.json                                               our own record: tokenizer and config, to import exactly
    nanochat.npz                                                qwen3: what its weights do not tell of ours
    README.md                                                   the model card
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochat.files import atomic_folder, write_json, write_text
from nanochat.gpt import GPT, LOGIT_SOFTCAP, NORM_EPS, ROPE_BASE, SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig
from nanochat.interop.foreign import (
    MALFORMED,
    WEIGHTS_FILE,
    check_config,
    check_finite,
    check_ids,
    check_shapes,
    check_text,
    in_float32,
    one_line,
    read_json_object,
    read_remainder,
    read_weights,
)
from nanochat.interop.hf_tokenizer import CHAT_TEMPLATE, from_hf_json, to_hf_json
from nanochat.interop.qwen3 import ULPS, check_folds, config_of, fold_weights, qwen3_config, remainder, unfold
from nanochat.ops.recall import FORM, OTHER_FORM
from nanochat.tokenizer import RustBPETokenizer

OWN_FILE = "nanochat.json"
REMAINDER_FILE = "nanochat.npz"
Form = Literal["qwen3", "native"]
PARAMETER_NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.h.": "model.layers.",
    ".attn.c_q.": ".self_attn.q_proj.",
    ".attn.c_k.": ".self_attn.k_proj.",
    ".attn.c_v.": ".self_attn.v_proj.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
MODERN_TYPE = "nanochat_modern"
MODERN_CODE = Path(__file__).parent / "hf_code"
MODERN_FILES = ("configuration_nanochat_modern.py", "modeling_nanochat_modern.py")
# All that a folder of ours can hold.
EXPORT_FILES = {WEIGHTS_FILE, OWN_FILE, REMAINDER_FILE, "README.md", *MODERN_FILES} | {
    f"{name}.json" for name in ("config", "generation_config", "tokenizer", "tokenizer_config")
}
# The fields that any classic model may set; `init` is how it began, not what it computes.
CLASSIC_FIELDS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "init", "logit_softcap")
# What chat_cli uses when it is not told otherwise, and what of it other programs know.
SAMPLING = {"temperature": 0.6, "top_k": 50}
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def hf_name(name: str) -> str:
    """Return transformers' name of one of our parameters."""
    for ours, theirs in PARAMETER_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def own_name(name: str) -> str:
    """Return our name of one of transformers' parameters."""
    for ours, theirs in PARAMETER_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def is_classic(config: GPTConfig) -> bool:
    """Return true if every switch is off: then transformers has a class for the model."""
    plain = GPTConfig(**{name: getattr(config, name) for name in CLASSIC_FIELDS})
    return plain == config


def has_a_row_per_token(name: str) -> bool:
    """Return true if the rows of this parameter of ours are token ids, padded to a multiple of 64."""
    tables = ("transformer.wte.weight", "lm_head.weight", "recall.followers.weight")
    return name in tables or name.startswith("value_embeds.")


# --- writing ---------------------------------------------------------------------------------------------------------


def hf_config(config: GPTConfig, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """The content of config.json. The vocabulary is the tokenizer's: the padding rows stay behind."""
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS,
        "final_logit_softcapping": config.logit_softcap,
        "tie_word_embeddings": False,
        "use_cache": True,
        **special_ids(tokenizer),
    }
    return shape | (_classic_config(config) if is_classic(config) else _modern_config(config))


def _classic_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "intermediate_size": 4 * config.n_embd,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
    }


def _modern_config(config: GPTConfig) -> dict[str, Any]:
    configuration, modeling = (name.removesuffix(".py") for name in MODERN_FILES)
    return {
        "architectures": ["NanoChatModernForCausalLM"],
        "model_type": MODERN_TYPE,
        "auto_map": {
            "AutoConfig": f"{configuration}.NanoChatModernConfig",
            "AutoModelForCausalLM": f"{modeling}.NanoChatModernForCausalLM",
        },
        **{name: value for name, value in config.to_dict().items() if name not in CLASSIC_FIELDS},  # every switch
        "windows": config.windows,
        "value_embedding_layers": [i for i in range(config.n_layer) if config.has_value_embedding(i)],
        "value_gate_channels": VALUE_GATE_CHANNELS,
        "smear_gate_channels": SMEAR_GATE_CHANNELS,
        **FORM,
    }


def special_ids(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """Return the ids of bos, of what ends an answer, and of padding, by their names in transformers' files."""
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    return {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": bos}


def generation_config(config: GPTConfig, tokenizer: RustBPETokenizer, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The content of generation_config.json; an answer gets half of the context unless a program asks for more."""
    known = {name: sampling[name] for name in SAMPLING_FIELDS if sampling.get(name)}
    drawn = {"do_sample": True, **known} if "temperature" in known else {"do_sample": False}
    return drawn | {"max_new_tokens": config.sequence_len // 2} | special_ids(tokenizer)


def tokenizer_config(config: GPTConfig, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    bos = tokenizer.id_to_token(tokenizer.get_bos_token_id())
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": "<|assistant_end|>",
        "pad_token": bos,
        "additional_special_tokens": sorted(tokenizer.get_special_tokens() - {bos, "<|assistant_end|>"}),
        "add_bos_token": True,
        "padding_side": "left",  # an answer goes on where its prompt ends
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.sequence_len,
        "chat_template": CHAT_TEMPLATE,
    }


def write_hf_folder(
    folder: Path,
    state: dict[str, Tensor],
    config: GPTConfig,
    tokenizer: RustBPETokenizer,
    card: str,
    dtype: torch.dtype = torch.float32,
    form: Form = "native",
    sampling: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> None:
    """Write a model as a folder that transformers loads; it appears whole, replacing an older one.

    Args:
        folder: where.
        state: our state dict.
        config: our model config.
        tokenizer: the one it was trained with.
        card: the text of README.md.
        dtype: what the weights are stored in; float32 loses nothing.
        form: qwen3 or native. As qwen3 a softcapped model is written without its softcap.
        sampling: how answers are drawn unless a program says otherwise, by the names of `generate.sampling.Sampling`.
        recipe: of its base model; later stages follow it after an import too.

    Raises:
        ValueError: the tokenizer has another number of ids than the model, or the model has something that Qwen3 lacks.
    """
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(
            f"the model was trained with {config.vocab_size} token ids, the tokenizer has {tokenizer.get_vocab_size()}"
        )
    if form == "qwen3":
        check_folds(config, without_softcap=True)
        weights, settings = fold_weights(state, config), qwen3_config(config) | special_ids(tokenizer)
    else:
        weights, settings = _native_weights(state, config), hf_config(config, tokenizer)
    # A clone each: safetensors refuses two tensors in one memory. Token ids stay whole numbers.
    kinds = {name: dtype if value.is_floating_point() else value.dtype for name, value in weights.items()}
    weights = {name: value.detach().to("cpu", kinds[name]).contiguous().clone() for name, value in weights.items()}
    with atomic_folder(folder, sum(value.nbytes for value in weights.values())) as tmp:
        save_file(weights, tmp / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(tmp / "config.json", settings | {"dtype": str(dtype).removeprefix("torch.")})
        (tmp / WEIGHTS_FILE).chmod((tmp / "config.json").stat().st_mode)  # safetensors lets nobody else read it
        write_json(tmp / "generation_config.json", generation_config(config, tokenizer, sampling or SAMPLING))
        write_json(tmp / "tokenizer.json", to_hf_json(tokenizer))
        write_json(tmp / "tokenizer_config.json", tokenizer_config(config, tokenizer))
        record = {"recipe": recipe, "sampling": None if sampling is None else dict(sampling)}
        write_json(tmp / OWN_FILE, {"model_config": config.to_dict(), "tokenizer": tokenizer.to_dict(), **record})
        write_text(tmp / "README.md", card)
        if form == "qwen3":
            # The last bits are of use only where all others are stored.
            kept = {n: v for n, v in remainder(state, config).items() if dtype == torch.float32 or ULPS not in n}
            rest: dict[str, Any] = {name: value.numpy() for name, value in kept.items()}
            np.savez_compressed(tmp / REMAINDER_FILE, **rest)
        elif not is_classic(config):
            for name in MODERN_FILES:
                write_text(tmp / name, (MODERN_CODE / name).read_text(encoding="utf-8"))


def _native_weights(state: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    weights = {}
    for name, value in state.items():
        # (padded vocabulary, C) -> (vocabulary, C): the padding is ours, transformers' tokenizer knows nothing of it.
        rows = value[: config.vocab_size] if has_a_row_per_token(name) else value
        weights[hf_name(name) if is_classic(config) else name] = rows
    return weights


# --- reading ---------------------------------------------------------------------------------------------------------


def read_hf_folder(folder: Path) -> tuple[dict[str, Tensor], GPTConfig, RustBPETokenizer]:
    """Read (weights, config, tokenizer) from a folder with a nanochat model in either form, whoever wrote it.

    Raises:
        FileNotFoundError: a file is missing; names it.
        ValueError: the model is of another kind, or computes something ours doesn't; names the field.
    """
    # Nothing of a folder that somebody else made is trusted: a field of the wrong kind is named wherever it is met.
    try:
        return _read_checked(folder)
    except MALFORMED as error:
        raise ValueError(f"{folder} holds no model that can be read ({one_line(error)})") from None


def _read_checked(folder: Path) -> tuple[dict[str, Tensor], GPTConfig, RustBPETokenizer]:
    stored = read_json_object(folder / "config.json")
    own = read_json_object(folder / OWN_FILE) if (folder / OWN_FILE).exists() else None
    weights = read_weights(folder)
    recorded_facts(folder)
    if stored.get("model_type") == "qwen3":
        config = GPTConfig.from_dict(own["model_config"]) if own else config_of(stored, weights)
        check_config(config, weights, str(folder))
        there, size = (folder / REMAINDER_FILE).exists(), 4 * sum(map(Tensor.numel, weights.values())) + (1 << 20)
        weights = unfold(weights, config, read_remainder(folder / REMAINDER_FILE, size) if there else {})
    else:
        config = GPTConfig.from_dict(own["model_config"]) if own else own_config(stored)
        if config.recall and any(stored.get(name) != value for name, value in FORM.items()):
            raise ValueError(f"{folder}: {OTHER_FORM}")
        check_config(config, weights, str(folder))
    check_ids(own["tokenizer"]["special_tokens"].values() if own else _added_ids(folder), config, folder)
    if own:
        tokenizer = RustBPETokenizer.from_dict(own["tokenizer"])
    else:
        tokenizer = from_hf_json(read_json_object(folder / "tokenizer.json"), bos_token(folder))
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.get_vocab_size()} ids, the model only {config.vocab_size}"
        )
    # float32 whatever they were stored in: that is what checkpoints hold and training updates.
    state = {own_name(name): value for name, value in in_float32(weights).items()}
    for name in state:
        if has_a_row_per_token(name):
            if len(state[name]) < config.vocab_size:
                raise ValueError(f"{folder}: {name} has {len(state[name])} rows for {config.vocab_size} token ids")
            # (vocabulary, C) -> (padded vocabulary, C), cut first if another program padded further.
            missing = max(0, config.padded_vocab_size - len(state[name]))
            state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, missing))[: config.padded_vocab_size]
    check_shapes(state, config, str(folder))
    check_finite(state, str(folder))
    check_text(state, config, str(folder))
    return state, config, tokenizer


def _added_ids(folder: Path) -> list[Any]:
    return [token["id"] for token in read_json_object(folder / "tokenizer.json").get("added_tokens", [])]


def recorded_facts(folder: Path) -> dict[str, Any]:
    """Return what an export of ours says of its checkpoint besides the model: the recipe and the sampling, if known."""
    own = read_json_object(folder / OWN_FILE) if (folder / OWN_FILE).exists() else {}
    for name, kind in (("recipe", str), ("sampling", dict)):
        if own.get(name) and not isinstance(own[name], kind):
            raise ValueError(f"{folder / OWN_FILE}: {name} is {own[name]!r}")
    for name, value in (own.get("sampling") or {}).items():
        if not isinstance(value, str if name == "unsure" else (int, float, type(None))):
            raise ValueError(f"{folder / OWN_FILE}: {name} of sampling is {value!r}")
    return {name: own[name] for name in ("recipe", "sampling") if own.get(name)}


def load_nanochat_folder(path_or_repo: str, device: torch.device) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """Load (model, tokenizer, meta) from such a folder, or a hub repository "owner/name", ready to chat with.

    Raises:
        FileNotFoundError, ValueError, RuntimeError: see `read_hf_folder` and `model_folder`.
    """
    folder = model_folder(path_or_repo)
    state, config, tokenizer = read_hf_folder(folder)
    model = GPT(config)
    model.load_state_dict(state)
    meta = {"step": 0, "model_config": config.to_dict(), "imported_from": path_or_repo}
    return model.to(device).eval(), tokenizer, meta | recorded_facts(folder)


def own_config(stored: dict[str, Any]) -> GPTConfig:
    """Our config from config.json in the native form; ValueError names a setting that ours has no switch for."""
    n_head = stored.get("num_attention_heads")
    shape = {
        "sequence_len": stored.get("max_position_embeddings"),
        "vocab_size": stored.get("vocab_size"),
        "n_layer": stored.get("num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": stored.get("num_key_value_heads") or n_head,
        "n_embd": stored.get("hidden_size"),
        "logit_softcap": stored.get("final_logit_softcapping", LOGIT_SOFTCAP),
    }
    if missing := [name for name, value in shape.items() if value is None and name != "logit_softcap"]:
        raise ValueError(f"config.json does not say {', '.join(missing)}")
    if stored.get("model_type") == MODERN_TYPE:
        switches = {f.name for f in fields(GPTConfig)} - set(shape)
        return GPTConfig(**shape, **{name: stored[name] for name in switches if name in stored})
    if stored.get("model_type") != "nanochat":
        raise ValueError(
            f"config.json: model_type is {stored.get('model_type')!r}; only 'nanochat', or what export_hf wrote, can "
            "be imported"
        )
    rope = stored.get("rope_parameters") or {}
    fixed = {
        "hidden_act": ("relu2", stored.get("hidden_act", "relu2")),
        "intermediate_size": (4 * stored["hidden_size"], stored["intermediate_size"]),
        "rms_norm_eps": (NORM_EPS, stored.get("rms_norm_eps", NORM_EPS)),
        "attention_bias": (False, stored.get("attention_bias", False)),
        "tie_word_embeddings": (False, stored.get("tie_word_embeddings", False)),
        "rope_type": ("default", rope.get("rope_type", "default")),
        "rope_theta": (ROPE_BASE, rope.get("rope_theta", stored.get("rope_theta", ROPE_BASE))),
    }
    for name, (expected, found) in fixed.items():
        if found != expected:
            raise ValueError(f"config.json: {name} is {found!r}, this model can only be imported with {expected!r}")
    return GPTConfig(**shape)


def bos_token(folder: Path) -> str:
    """Return the token that starts a document, by tokenizer_config.json."""
    value = read_json_object(folder / "tokenizer_config.json").get("bos_token")
    name = value["content"] if isinstance(value, dict) else value
    if not name:
        raise ValueError(f"{folder / 'tokenizer_config.json'} names no bos_token")
    return str(name)


# --- the hub ---------------------------------------------------------------------------------------------------------


def model_folder(path_or_repo: str) -> Path:
    """A local folder as it is, or the downloaded files of a hub repository "owner/name".

    Raises:
        FileNotFoundError: it is neither.
        RuntimeError: the repository cannot be downloaded; says why.
    """
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if path_or_repo.count("/") != 1 or path_or_repo.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path_or_repo} is no folder, and no hub repository (owner/name) either")
    from huggingface_hub import snapshot_download  # lazy: most runs never touch the hub

    with _hub_errors(
        f"could not get {path_or_repo} from the hub",
        "check the name and the network, set HF_TOKEN for a private repository, or give the folder of a copy",
    ):
        # No Python files: our own model stands in for code that a repository brings along.
        return Path(
            snapshot_download(path_or_repo, allow_patterns=["*.json", "*.safetensors", REMAINDER_FILE, "README.md"])
        )


def push_folder(folder: Path, repo: str, private: bool) -> str:
    """Upload a folder to the repository `repo`, made when it is missing; returns its address.

    Raises:
        RuntimeError: the hub refused, or can't be reached; the folder stays.
    """
    from huggingface_hub import HfApi  # lazy: most runs never touch the hub

    with _hub_errors(
        f"could not push to {repo}",
        f"check HF_TOKEN (or `hf auth login`), the name and the network; the export itself is in {folder}",
    ):
        url = HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Export from nanochat")
        return str(url)


@contextlib.contextmanager
def _hub_errors(problem: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises many kinds; each means the same to the user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"{problem} ({reason}): {remedy}") from error
