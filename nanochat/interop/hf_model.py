"""A Hugging Face causal language model behind the interface that scoring uses, to compare our models with others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.env import is_system_error
from nanochat.gpt import GPT
from nanochat.interop.foreign import MALFORMED, check_finite, check_transformers_folder, one_line
from nanochat.interop.hf_format import OWN_FILE, load_nanochat_folder
from nanochat.tokenizer import RustBPETokenizer

# Tokens known to start a document, whatever a tokenizer's settings say; nanochat looks for the same.
DOCUMENT_STARTS = ("<|bos|>", "<|endoftext|>")
# What transformers calls a cache of keys and values, in arguments and results: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
NO_TRANSFORMERS = "--hf_path needs the `transformers` package: pip install transformers"


class HFPrefixCache:
    """Keys and values of a Hugging Face model; slot j of a row counts when its mask says so."""

    def __init__(self, cache: Any = None, mask: Tensor | None = None, lengths: Sequence[int] | None = None) -> None:
        self.cache, self.mask, self.lengths = cache, mask, lengths

    def repeated(self, rows: Sequence[int], lengths: Sequence[int], room: int) -> HFPrefixCache:
        """See scoring.PrefixCache; the keys grow by themselves, so there is no need of `room`."""
        # Rows that share a prefix read it once: the cache's rows are copied for each continuation.
        self.cache.batch_select_indices(torch.tensor(rows, device=self.device))
        size = int(self.cache.get_seq_length())
        slots = torch.arange(size, device=self.device)
        mask = slots < torch.tensor(lengths, device=self.device).unsqueeze(1)  # (rows, size)
        return HFPrefixCache(self.cache, mask, lengths)

    @property
    def device(self) -> torch.device:
        """The device of the keys."""
        device: torch.device = self.cache.layers[0].keys.device
        return device


class HuggingFaceModel:
    """Adapter of a transformers model with a decoder and a linear head.

    Raises:
        ValueError: its logits are not its head's of its last hidden states, so that it can't be scored this way.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        config = model.config.get_text_config()
        self.max_seq_len: int = getattr(config, "max_position_embeddings", None) or 2048
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.cache_name = CACHE_NAMES[0]
        idx = torch.arange(8, device=self.get_device()).unsqueeze(0)
        with torch.no_grad():
            if not torch.allclose(self.logits_at(self.hidden(idx)), model(idx).logits.float(), rtol=1e-2, atol=1e-2):
                raise ValueError(f"{type(model).__name__}'s logits are not a linear head's: it can't be scored here")

    def get_device(self) -> torch.device:
        """Return the device of its parameters."""
        device: torch.device = self.model.get_output_embeddings().weight.device
        return device

    def new_prefix_cache(self, rows: int, n_tokens: int) -> HFPrefixCache:
        """An empty cache."""
        return HFPrefixCache()

    def hidden(self, idx: Tensor, kv_cache: HFPrefixCache | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C), behind the cache's content where there is one."""
        body = self.model.base_model
        if kv_cache is None:
            return body(input_ids=idx, use_cache=False).last_hidden_state
        if kv_cache.mask is None or kv_cache.lengths is None:
            output = body(input_ids=idx, use_cache=True)
            self.cache_name = next(name for name in CACHE_NAMES if name in output)
            kv_cache.cache = output[self.cache_name]
            return output.last_hidden_state
        lengths = torch.tensor(kv_cache.lengths, device=idx.device).unsqueeze(1)  # (B, 1)
        new = torch.arange(idx.size(1), device=idx.device)
        # The slots between a row's own prefix and the longest one are masked, and positions continue at its own end.
        mask = torch.cat((kv_cache.mask, torch.ones_like(idx, dtype=torch.bool)), dim=1).long()
        before = {self.cache_name: kv_cache.cache}
        return body(input_ids=idx, attention_mask=mask, position_ids=lengths + new, **before).last_hidden_state

    def logits_at(self, x: Tensor) -> Tensor:
        """float32 logits of hidden states: (N, C) -> (N, V)."""
        logits = self.model.get_output_embeddings()(x).float()
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class HuggingFaceTokenizer:
    """Adapter of a transformers tokenizer. What stood between the documents of pretraining starts every text.

    That is not always the bos token: chat models often name the start of a message there.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        vocab = tokenizer.get_vocab()
        named = [vocab[token] for token in DOCUMENT_STARTS if token in vocab]
        starts = [*named, tokenizer.bos_token_id, tokenizer.eos_token_id]
        start = next((token for token in starts if token is not None), None)
        if start is None:
            raise ValueError("this tokenizer has neither a bos nor an eos token to start a text with")
        self.bos = int(start)

    def get_bos_token_id(self) -> int:
        """The token that starts a document."""
        return self.bos

    def encode(self, text: list[str], prepend: int | None = None) -> list[list[int]]:
        """Ids of each text, `prepend` first."""
        rows: list[list[int]] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [[prepend, *row] if prepend is not None else row for row in rows]


def check_hf_model(name: str) -> None:
    """Ask whether a folder, or the hub, has a model of this name; of the hub only its config is downloaded.

    Raises:
        FileNotFoundError: there is none, or `transformers` is not installed.
    """
    if Path(name).expanduser().is_dir():
        return
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise FileNotFoundError(NO_TRANSFORMERS) from error
    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if is_system_error(error):
            raise
        raise FileNotFoundError(
            f"--hf_path {name}: there is no such folder, and the hub gives no model of this name ({one_line(error)})"
        ) from error


def load_hf_model(
    name: str, device: torch.device
) -> tuple[HuggingFaceModel | GPT, HuggingFaceTokenizer | RustBPETokenizer]:
    """Load model and tokenizer from a folder (safetensors, or a single .gguf file) or the hub.

    A folder that export_hf wrote gives our own model: code that comes with a folder is never run.

    Raises:
        FileNotFoundError: there is none, or `transformers` is not installed.
        ValueError: a folder's files do not fit each other, lack weights, or hold values that are no numbers.
    """
    folder = Path(name).expanduser()
    if (folder / OWN_FILE).is_file():
        own, own_tokenizer, _ = load_nanochat_folder(str(folder), device)
        return own, own_tokenizer
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise FileNotFoundError(NO_TRANSFORMERS) from error
    options: dict[str, Any] = {}
    if folder.is_dir():
        name = str(folder)
        gguf = sorted(folder.glob("*.gguf"))
        if len(gguf) == 1 and not list(folder.glob("*.safetensors")):
            options["gguf_file"] = gguf[0].name
        else:
            check_transformers_folder(folder)
    options["trust_remote_code"] = False  # else transformers asks at the terminal whether to run the folder's code
    logging.set_verbosity_error()  # what it only warns of, such as missing weights, is an error below
    try:
        if folder.is_dir() and "gguf_file" not in options:
            check_transformers_folder(folder, AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict())
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        both: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **options)
        model, loaded = both
    except BaseException as error:  # Rust's panics in the tokenizers package are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or is_system_error(error):
            raise
        if isinstance(error, ValueError) and str(folder) in str(error) and "\n" not in str(error):
            raise  # a sentence of check_transformers_folder
        raise FileNotFoundError(
            f"--hf_path {name}: no Hugging Face model can be loaded from it ({one_line(error)})"
        ) from error
    if missing := sorted(loaded["missing_keys"]):  # transformers draws them at random, and only warns
        raise ValueError(f"--hf_path {name} lacks weights of its model: {', '.join(map(str, missing[:3]))}")
    check_finite(dict(model.named_parameters()), f"--hf_path {name}")
    rows, largest = model.get_input_embeddings().weight.size(0), max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise ValueError(f"--hf_path {name}: its tokenizer has the id {largest}, its model {rows} rows of embeddings")
    try:
        return HuggingFaceModel(model.to(torch.device(device))), HuggingFaceTokenizer(tokenizer)
    except MALFORMED as error:
        raise ValueError(f"--hf_path {name}: its model does not compute ({one_line(error)})") from error
