"""The README.md of an exported model: what it is, how it was made, what it scored, what not to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.gpt import GPT
from nanochat.interop.hf_format import Form, is_classic
from nanochat.progress import format_seconds
from nanochat.report import environment
from nanochat.report.sections import render_summary

STAGES = {
    "base": "pretrained on text; it continues text and knows no conversation",
    "mid": "pretrained, then trained on conversations",
    "sft": "pretrained, trained on conversations, then finetuned on answers",
    "rl": "pretrained, trained on conversations, finetuned, then trained by reinforcement on problems",
}
FORMS = {
    "qwen3": "written as a Qwen3 model (`Qwen3ForCausalLM`), which computes the same; not for float16, whose range the "
    "squares in its layers leave: bfloat16 or float32",
    "classic": "transformers' own `NanoChatForCausalLM`",
    "own": "a class of its own, in this folder",
}
NO_SOFTCAP = (
    "; nanochat bounds its logits by a tanh at {}, Qwen3 does not: greedy answers are the same, sampled ones a little "
    "less varied"
)
CARRIES = (
    "it carries {:,} tokens of its training text, in which it looks up its last tokens: whoever has it can read them"
)
# A base model knows no conversation.
PROMPTS = {
    True: (
        'messages = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")"
    ),
    False: 'inputs = tokenizer("The sky is blue because", return_tensors="pt")',
}
CARD = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")


def model_card(
    name: str,
    source: str,
    model: GPT,
    meta: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    dtype: str,
    form: Form = "native",
) -> str:
    """The markdown of the card.

    Args:
        name: what the model is called.
        source: the stage it comes from: base, mid, sft or rl.
        model: the model.
        meta: its checkpoint's record.
        records: the sections of the run's report (see nanochat.report); may be empty.
        dtype: what the weights are stored in.
        form: qwen3 or native, see nanochat/interop/hf_format.py.
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
        # Qwen3 and the classic model have classes in transformers; the folder brings the code of any other along.
        trust="" if form == "qwen3" or is_classic(model.config) else ", trust_remote_code=True",
        prompt=PROMPTS[source != "base"],
        form=FORMS[form if form == "qwen3" else "classic" if is_classic(model.config) else "own"]
        + (NO_SOFTCAP.format(model.config.logit_softcap) if form == "qwen3" and model.config.logit_softcap else ""),
        parameters=f"{model.num_params():,}",
        stage=STAGES[source],
        config=model.config,
        dtype=dtype + (f"\n- {CARRIES.format(model.config.recall)}" if model.config.recall else ""),
        training="\n".join(f"- {key}: {value}" for key, value in facts.items() if value is not None),
        scores="\n".join(render_summary(records) if records else ["No report was found beside the checkpoint."]),
    )
