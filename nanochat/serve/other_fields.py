"""Fields of requests that other servers know (llama.cpp, vLLM, text-generation-webui) and this one does not.

None is dropped without a word: a field that would change the answer is refused by name unless it asks for nothing; one
that changes no answer is fine; of any other, the answer's `warnings` say that it was not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanochat.serve.errors import RequestError

# Fields that would change the answer, and the values with which they ask for nothing (null always does).
REFUSED: dict[str, tuple[Any, ...]] = {
    # What an answer may be, in languages that are not spoken here (JSON schemas, choices and regular expressions are).
    **dict.fromkeys(("grammar", "guided_grammar", "regex", "ebnf", "format"), ("",)),
    **dict.fromkeys(("structural_tag", "functions", "documents", "bad_words"), ([], "")),
    **dict.fromkeys(("allowed_token_ids", "custom_token_bans", "banned_tokens"), ([], "")),
    "function_call": ("auto", "none"),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "web_search_options", "chat_template", "truncate_prompt_tokens", "lora"), ([],)),
    "suffix": ("",),
    # Searching for the likeliest answer instead of sampling one.
    "use_beam_search": (False,),
    "num_beams": (0, 1),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "do_sample": (True,),
    # Other ways to sample.
    **dict.fromkeys(
        ("mirostat", "mirostat_mode", "dynatemp_range", "xtc_probability", "dry_multiplier", "top_a"), (0,)
    ),
    **dict.fromkeys(
        ("smoothing_factor", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "no_repeat_ngram_size"), (0,)
    ),
    **dict.fromkeys(("tfs_z", "tfs", "typical_p", "typ_p", "typical", "guidance_scale"), (0, 1)),
    "encoder_repetition_penalty": (1,),
    "top_n_sigma": (-1, 0),
    "dynamic_temperature": (False,),
    # What is written down of the answer.
    "n_probs": (0,),
    "prompt_logprobs": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
}

# Fields that change no answer.
HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "moderation", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls"),
    *("request_id", "priority", "cache_prompt", "id_slot", "slot_id", "timings_per_token", "return_progress"),
    *("spaces_between_special_tokens", "add_special_tokens", "guided_decoding_backend"),
}


def check_other_fields(fields: Mapping[str, Any]) -> list[str]:
    """Sentences about fields that were not used, for `warnings`.

    Raises:
        RequestError: 400, a field would change the answer in a way this server can't.
    """
    warnings = []
    for name, value in fields.items():
        if value is None or name in HARMLESS:
            continue
        if name not in REFUSED:
            warnings.append(f"the field {name[:80]!r} is not known here and was not used")
        elif not any(
            value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in REFUSED[name]
        ):
            raise unsupported(name)
    return warnings


def unsupported(name: str, remedy: str = "leave it out") -> RequestError:
    """The error about a field that asks for something this server can't do."""
    return RequestError(400, f"{name} is not supported: {remedy}", code="unsupported_parameter", param=name)
