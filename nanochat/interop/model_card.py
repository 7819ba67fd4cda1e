"""The README.md of an exported model: what it is, how it was made, what it scored, what not to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.gpt import GPT
from nanochat.interop.hf_format import is_classic
from nanochat.progress import format_seconds
from nanochat.report import environment
from nanochat.report.sections import render_summary

STAGES = {
    "base": "pretrained on text; it continues text and knows no conversation",
    "mid": "pretrained, then trained on conversations",
    "sft": "pretrained, trained on conversations, then finetuned on answers",
    "rl": "pretrained, trained on conversations, finetuned, then trained by reinforcement on problems",
}
# `trust`: transformers has a class for the classic model only; the folder brings the code of any other along.
CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: text-generation
tags: [nanochat]
---

# {name}

A nanochat model of {parameters} parameters, {stage}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs)[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## The model

- layers {config.n_layer}, width {config.n_embd}, heads {config.n_head} (key/value {config.n_kv_head})
- context {config.sequence_len} tokens, vocabulary {config.vocab_size}
- weights stored in {dtype}

## How it was trained

{training}

## Scores

{scores}

## Limits

A small model: it states wrong things with confidence, knows only what its data held, and was not made safe for any
use. Texts longer than its context are cut. Tools (the calculator between `<|python_start|>` and `<|python_end|>`) are
run by nanochat's engine; elsewhere the caller must run them. A special token written in a message's text is read as
that token by transformers; nanochat itself treats it as ordinary characters.

Made with nanochat (MIT, after Andrej Karpathy's nanochat).
"""


def model_card(
    name: str, source: str, model: GPT, meta: Mapping[str, Any], records: Sequence[Mapping[str, Any]], dtype: str
) -> str:
    """The markdown of the card.

    Args:
        name: what the model is called.
        source: the stage it comes from: base, mid, sft or rl.
        model: the model.
        meta: its checkpoint's record.
        records: the sections of the run's report (see nanochat.report); may be empty.
        dtype: what the weights are stored in.
    """
    settings, state = meta.get("config") or {}, meta.get("state") or {}
    facts = {
        "data": settings.get("data_dir") or settings.get("dataset") or settings.get("chat_data"),
        "optimizer steps of the last stage": meta.get("step"),
        "tokens of the last stage": state.get("tokens"),
        "time of the last stage": format_seconds(state["seconds"]) if state.get("seconds") else None,
        "computed in": meta.get("dtype"),
        "validation bits per byte": meta.get("val_bpb"),
        **{key: value for key, value in environment().items() if key in ("GPU", "CPU", "torch")},
    }
    return CARD.format(
        name=name,
        trust="" if is_classic(model.config) else ", trust_remote_code=True",
        parameters=f"{model.num_params():,}",
        stage=STAGES[source],
        config=model.config,
        dtype=dtype,
        training="\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        scores="\n".join(render_summary(records) if records else ["No report was found beside the checkpoint."]),
    )
