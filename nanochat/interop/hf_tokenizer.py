"""Our tokenizer as the `tokenizer.json` of Hugging Face's tokenizers, and back.

The same ids: byte-level BPE whose merges are every way to cut a token into two others, in the order of its rank. Our
encoder (like tiktoken) merges whatever two neighbours make a token; a merge list that holds only the pair that training
happened to join would give other ids for some texts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.tokenizer import RustBPETokenizer

# What render_for_completion writes: bos, user and assistant in turn, a leading system message at the head of the first
# user message, an assistant's parts (text, tool call, tool output) in their brackets.
CHAT_TEMPLATE = (Path(__file__).parent / "hf_code" / "chat_template.jinja").read_text(encoding="utf-8")
# The same for programs that do not know transformers' marks of what is learned.
PLAIN_TEMPLATE = re.sub(r"{% (end)?generation %}", "", CHAT_TEMPLATE)


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE files: GPT-2's table.

    Bytes that print (in Latin-1) stand for themselves; the others take the code points from 256 on, in order.
    """
    prints = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    spare = itertools.count(256)
    return [chr(byte) if byte in prints else chr(next(spare)) for byte in range(256)]


def merge_pairs(ranks: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that together are a token, ordered by the rank of what they make."""
    rank_of = {token: i for i, token in enumerate(ranks)}
    # (rank of the whole, of the left part, of the right part): sorted, the earliest merge comes first.
    pairs = [
        (i, rank_of[token[:cut]], rank_of[token[cut:]])
        for token, i in rank_of.items()
        for cut in range(1, len(token))
        if token[:cut] in rank_of and token[cut:] in rank_of
    ]
    return [(ranks[left], ranks[right]) for _, left, right in sorted(pairs)]


def to_hf_json(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """The content of a `tokenizer.json` with the same ids."""
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    # Training can make the same bytes twice; the higher id is the one in use (a later entry replaces an earlier one).
    vocabulary = {written(token): i for i, token in enumerate(tokenizer.ranks)}
    specials = sorted((tokenizer.encode_special(name), name) for name in tokenizer.get_special_tokens())
    bos = tokenizer.id_to_token(tokenizer.get_bos_token_id())
    # A text begins with bos, as every document of training does (unless add_special_tokens=False).
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.get_bos_token_id()], "tokens": [bos]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, name in specials
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": template,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [[written(left), written(right)] for left, right in merge_pairs(tokenizer.ranks)],
        },
    }


def from_hf_json(stored: dict[str, Any], bos_token: str) -> RustBPETokenizer:
    """Our tokenizer from the content of a byte-level BPE `tokenizer.json`.

    Raises:
        ValueError: it is of another kind, or cuts text in a way that is not ours; names the field.
    """
    model = stored.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"the tokenizer's model is {model.get('type')!r}: only byte-level BPE can be imported")
    if stored.get("normalizer") is not None:
        raise ValueError("the tokenizer normalizes text before it cuts it: that can't be imported")
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    added = {token["content"]: int(token["id"]) for token in stored.get("added_tokens", [])}
    try:
        tokens = {
            int(i): bytes(byte_of[character] for character in written)
            for written, i in model["vocab"].items()
            if written not in added
        }
    except KeyError as error:
        raise ValueError(f"the vocabulary holds {error}, which stands for no byte: it is not byte-level BPE") from error
    # A token's id is its rank, so a gap would shift the merges behind it.
    if sorted(tokens) != list(range(len(tokens))):
        raise ValueError("the ids of the vocabulary are not 0, 1, 2 …: it can't be imported")
    ranks = [tokens[i] for i in range(len(tokens))]
    return RustBPETokenizer(_split_pattern(stored.get("pre_tokenizer")), ranks, added, bos_token)


def _split_pattern(pre_tokenizer: Any) -> str:
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    patterns = [
        part["pattern"]["Regex"] for part in parts if part.get("type") == "Split" and "Regex" in part["pattern"]
    ]
    if len(patterns) != 1 or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        raise ValueError("the tokenizer's pre_tokenizer must be one Split by a regular expression, then ByteLevel")
    return str(patterns[0])
