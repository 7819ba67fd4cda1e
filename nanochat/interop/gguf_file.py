"""A model as one GGUF file: llama.cpp reads it, and so does what is built on llama.cpp.

The file holds the weights of a Qwen3 model (see nanochat.interop.qwen3), the tokenizer, the chat template, the settings
of an answer, and the facts that programs show. Beside it comes a Modelfile, from which Ollama takes what it does not
read from the file.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat.files import atomic_path
from nanochat.gpt import GPT
from nanochat.interop.hf_format import SAMPLING
from nanochat.interop.hf_tokenizer import PLAIN_TEMPLATE, to_hf_json
from nanochat.interop.model_card import STAGES
from nanochat.interop.qwen3 import check_folds
from nanochat.tokenizer import RUNTIMES_PATTERN, SPLIT_PATTERN, RustBPETokenizer

# No float16: relu² activations reach 1e5, beyond its 65,504, and runtimes compute in the type that the file is stored
# in where their card does so fast.
GGUFType = Literal["f32", "bf16", "q8_0", "q4_0"]
BYTES_PER_WEIGHT = {"f32": 4, "bf16": 2, "q8_0": 34 / 32, "q4_0": 18 / 32}
BLOCK = 32  # neighbouring weights that share a scale in q8_0 and q4_0
MAGIC = b"GGUF"
# A GGUF file names the pattern that cuts text into words, it cannot carry one. llama.cpp's names:
PRE_TOKENIZERS = {RUNTIMES_PATTERN: "qwen35"}
NEAREST = {SPLIT_PATTERN: "bailingmoe"}  # the same but for numbers, of which it takes one digit at a time


@dataclass(frozen=True, kw_only=True)
class GGUFCard:
    """What the file says about the model."""

    name: str
    description: str
    license: str
    chat: bool
    """It was trained on conversations: the file gets the chat template. Otherwise texts begin with the bos token."""
    sampling: Mapping[str, float | int] = field(default_factory=lambda: SAMPLING)
    """How programs draw answers unless they are told otherwise: temperature and top_k."""

    @classmethod
    def of(
        cls, name: str, model: GPT, source: str, license: str, sampling: Mapping[str, float | int] | None = None
    ) -> GGUFCard:
        """The card of a stage's model; `sampling` is what its checkpoint records, if anything."""
        description = f"A nanochat model of {model.num_params():,} parameters, {STAGES[source]}."
        chat = source != "base"
        if chat:
            description += " Its sums need a program that computes what stands between python_start and python_end."
        drawn = SAMPLING | dict(sampling or {})
        return cls(name=name, description=description, license=license, chat=chat, sampling=drawn)


def refuse_other_file(path: Path) -> None:
    """Only a GGUF file may be replaced by one.

    Raises:
        ValueError: the path is a folder, another kind of file, or has another ending.
    """
    if path.suffix != ".gguf":
        raise ValueError(f"--output={path} must end in .gguf, which programs go by: --output={path}.gguf")
    if path.is_dir():
        raise ValueError(f"--output={path} is a folder: choose another name")
    if path.exists():
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"--output={path} is there and is no GGUF file: choose another name")


def check_exact(model: GPT, tokenizer: RustBPETokenizer, approximate: bool) -> list[str]:
    """Return in sentences what programs will compute otherwise than we do; none where they compute the same.

    Raises:
        ValueError: they will, and `approximate` does not allow it, or they cannot compute such a model at all.
    """
    softcap = model.config.logit_softcap
    check_folds(model.config, without_softcap=softcap is not None)
    notes = []
    if softcap is not None:
        notes.append(
            "this model has a logit softcap, which the file cannot hold: greedy answers stay the same, sampled ones "
            "differ (export_hf --format=qwen3 measures by how much)"
        )
    if tokenizer_fields(tokenizer, nearest=True).pre not in PRE_TOKENIZERS.values():
        notes.append(
            "this model's tokenizer reads two digits at a time, and the nearest pattern that programs know reads one: "
            "texts with numbers get other tokens than the model was trained on"
        )
    if notes and not approximate:
        raise ValueError(f"{'; and '.join(notes)}. --approximate exports it so; a model of --recipe=portable is exact")
    return notes


def import_gguf() -> Any:
    """Return the package that writes GGUF files.

    Raises:
        RuntimeError: it is not installed, or too old; says how to get it.
    """
    try:
        import gguf
    except ImportError as error:
        raise RuntimeError("GGUF files need the package gguf (the extra [export]): pip install gguf") from error
    if not hasattr(gguf.GGUFWriter, "add_sampling_temp"):
        raise RuntimeError("the package gguf that is installed is older than 0.19: pip install --upgrade gguf")
    return gguf


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    tokenizer: RustBPETokenizer,
    card: GGUFCard,
    kind: GGUFType,
    nearest: bool = False,
) -> None:
    """Write the file; it appears whole.

    Args:
        path: where; an older file is replaced.
        config: of a Qwen3 model, with transformers' names.
        state: its weights, with transformers' names.
        tokenizer: the model's.
        card: what the file says about the model.
        kind: what the matrices are stored in. Norms are always float32; with q4_0 the table of tokens and the head are
            stored in q8_0, since they lose the most.
        nearest: where no runtime has the tokenizer's pattern, name the one that is nearest to it.

    Raises:
        RuntimeError: the package `gguf` is missing.
        ValueError: the widths do not suit `kind`, or no runtime has the tokenizer's pattern.
    """
    gguf = import_gguf()
    tokens = tokenizer_fields(tokenizer, nearest)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    types = gguf.GGMLQuantizationType
    parameters = sum(value.numel() for value in state.values())
    with atomic_path(path, int(parameters * BYTES_PER_WEIGHT[kind])) as tmp:
        writer = gguf.GGUFWriter(tmp, "qwen3")
        _add_facts(writer, gguf, config, card, kind, parameters)
        _add_tokenizer(writer, tokens, tokenizer, card)
        for name, value in state.items():
            stored = names.get_name(name, try_suffixes=(".weight",))
            chosen = types[_type_of(stored, value, kind)]
            data = value.detach().to("cpu", torch.float32).contiguous().numpy()
            writer.add_tensor(stored, gguf.quants.quantize(data, chosen), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _type_of(stored: str, value: Tensor, kind: GGUFType) -> str:
    """The type in which a tensor is stored."""
    if value.dim() == 1 or kind == "f32":
        return "F32"
    if kind == "bf16":
        return "BF16"
    if value.size(-1) % BLOCK:
        raise ValueError(
            f"--type={kind} stores {BLOCK} neighbouring weights together, and {stored} has rows of {value.size(-1)}: "
            "take --type=bf16"
        )
    return "Q8_0" if kind == "q8_0" or stored.startswith(("token_embd.", "output.")) else "Q4_0"


def _add_facts(
    writer: Any, gguf: Any, config: Mapping[str, Any], card: GGUFCard, kind: GGUFType, parameters: int
) -> None:
    file_types = {"f32": "ALL_F32", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(card.name)
    writer.add_description(card.description)
    writer.add_license(card.license)
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    writer.add_tags(["nanochat", "text-generation"])
    writer.add_file_type(gguf.LlamaFileType[file_types[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_sampling_temp(card.sampling["temperature"])
    writer.add_sampling_top_k(card.sampling["top_k"])


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerFields:
    """The tokenizer as the file holds it."""

    pre: str
    """llama.cpp's name of the pattern."""
    tokens: list[str]
    """The text of each id, its bytes written as the letters of byte-level BPE."""
    types: list[int]
    """1: a piece of text, 3: a special token, 5: an id that no text has."""
    merges: list[str]
    """Pairs "left right", the earliest first."""


def tokenizer_fields(tokenizer: RustBPETokenizer, nearest: bool = False) -> TokenizerFields:
    """Return the tokenizer as a GGUF file holds it; `nearest` accepts a pattern that gives other ids for numbers.

    Raises:
        ValueError: llama.cpp knows no such pattern, so that it would give other ids.
    """
    pre = (PRE_TOKENIZERS | NEAREST if nearest else PRE_TOKENIZERS).get(tokenizer.pattern)
    if pre is None:
        raise ValueError(
            "no runtime knows the pattern by which this model's tokenizer cuts text into words, and a GGUF file cannot "
            "carry it: train the tokenizer with --pattern=runtimes, as RECIPE=portable does"
        )
    stored = to_hf_json(tokenizer)
    size = tokenizer.get_vocab_size()
    # Training can make the same bytes twice; no text gets the lower id, and a name must be there only once.
    tokens, types = [f"[unused {i}]" for i in range(size)], [5] * size
    for text, i in stored["model"]["vocab"].items():
        tokens[i], types[i] = text, 1
    for special in stored["added_tokens"]:
        tokens[special["id"]], types[special["id"]] = special["content"], 3
    return TokenizerFields(pre, tokens, types, [" ".join(pair) for pair in stored["model"]["merges"]])


def _add_tokenizer(writer: Any, fields: TokenizerFields, tokenizer: RustBPETokenizer, card: GGUFCard) -> None:
    bos = tokenizer.get_bos_token_id()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.pre)
    writer.add_token_list(fields.tokens)
    writer.add_token_types(fields.types)
    writer.add_token_merges(fields.merges)
    writer.add_bos_token_id(bos)
    writer.add_pad_token_id(bos)
    if card.chat:
        end = tokenizer.encode_special("<|assistant_end|>")
        writer.add_eos_token_id(end)
        writer.add_eot_token_id(end)
        # bos ends an answer too (see nanochat.generate.scheduler.ToolMachine); this is the name that is left for it.
        writer.add_eom_token_id(bos)
        writer.add_add_bos_token(False)  # the template writes it
        writer.add_chat_template(PLAIN_TEMPLATE)
    else:
        writer.add_eos_token_id(bos)
        writer.add_add_bos_token(True)  # what the model learned to begin a document with


# --- Ollama ----------------------------------------------------------------------------------------------------------

# The chat template once more, in the language of Go's templates. `.System` is the system message; `.Messages` holds it
# too, with a role of its own.
OLLAMA_TEMPLATE = (
    "<|bos|>{{ $system := .System }}{{ range .Messages }}"
    '{{ if eq .Role "user" }}<|user_start|>{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
    "{{ .Content }}<|user_end|>"
    '{{ else if eq .Role "assistant" }}<|assistant_start|>{{ .Content }}<|assistant_end|>{{ end }}'
    "{{ end }}<|assistant_start|>"
)


def modelfile(gguf_name: str, card: GGUFCard, context_length: int) -> str:
    """Return the text of an Ollama Modelfile for a GGUF file beside it.

    Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
    """
    template = OLLAMA_TEMPLATE if card.chat else "{{ .Prompt }}"
    stops = ["<|assistant_end|>", "<|bos|>"] if card.chat else ["<|bos|>"]
    return "\n".join(
        [
            f"FROM ./{gguf_name}",
            f'TEMPLATE """{template}"""',
            *(f'PARAMETER stop "{stop}"' for stop in stops),
            f"PARAMETER temperature {card.sampling['temperature']}",
            f"PARAMETER top_k {card.sampling['top_k']}",
            # Ollama's own values would cut and penalize, which our engine does not.
            "PARAMETER top_p 1",
            "PARAMETER repeat_penalty 1",
            f"PARAMETER num_ctx {context_length}",
            f'LICENSE "{card.license}"',
            "",
        ]
    )


def how_to_open(path: Path, recipe: Path, chat: bool) -> list[str]:
    """Return a line for each program that opens the file; those that this project does not run itself are named so."""
    file, name = shlex.quote(str(path)), re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower())
    node = (
        '`npx node-llama-cpp chat --systemPrompt "" --repeatPenalty 1 --model'
        if chat
        else "`npx node-llama-cpp complete --model"
    )
    return [
        f"node-llama-cpp: {node} {file}`",
        f"llama.cpp: `llama-server -m {file}` (not run here; the tests run its code inside node-llama-cpp)",
        f"Ollama: `ollama create {name} -f {shlex.quote(str(recipe))} && ollama run {name}` (not run here)",
        f"LM Studio: `lms import {file}` (not run here)",
        "None of them runs the calculator: a program around them can, see answer_with_tools in dev/check_runtimes.py",
    ]
