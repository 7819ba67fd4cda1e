"""Answers to a few fixed prompts, so that a person sees what training changed."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat.common import Compute
from nanochat.data.corpus import Corpus
from nanochat.data.script import own_prompts
from nanochat.engine import Engine
from nanochat.env import print0
from nanochat.gpt import GPT
from nanochat.messages import Message
from nanochat.tokenizer import RustBPETokenizer

BASE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
CHAT_PROMPTS = ("Hello!", "Who are you?", "Why is the sky blue?", "What is 12 + 34?")
MAX_TOKENS = 24


def sample_texts(model: GPT, tokenizer: RustBPETokenizer, compute: Compute, prompts: tuple[str, ...]) -> list[str]:
    """Greedy continuations of plain text prompts, prompt included."""
    rows = [tokenizer.encode(p, prepend=tokenizer.get_bos_token_id()) for p in prompts]
    return _complete(model, tokenizer, compute, rows, keep_prompt=True)


def sample_answers(model: GPT, tokenizer: RustBPETokenizer, compute: Compute, prompts: tuple[str, ...]) -> list[str]:
    """Greedy answers of the assistant to one-message conversations."""
    rows = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": p}]}) for p in prompts]
    return _complete(model, tokenizer, compute, rows, keep_prompt=False)


def answer_greedily(
    model: GPT, tokenizer: RustBPETokenizer, compute: Compute, prompts: Sequence[list[Message]], max_tokens: int
) -> list[str]:
    """Greedy answers to conversations that end with the user, each asked by itself."""
    rows = [tokenizer.render_for_completion({"messages": messages}) for messages in prompts]
    answers = (_complete(model, tokenizer, compute, [row], keep_prompt=False, max_tokens=max_tokens) for row in rows)
    return [answer for (answer,) in answers]


def _complete(
    model: GPT,
    tokenizer: RustBPETokenizer,
    compute: Compute,
    rows: list[list[int]],
    keep_prompt: bool,
    max_tokens: int = MAX_TOKENS,
) -> list[str]:
    model.eval()
    engine = Engine(model, tokenizer, compute.precision)
    room = model.config.sequence_len - 1  # what is longer keeps its end: a sample must never end a run
    rows = [r if len(r) <= room else r[:1] + r[len(r) - room + 1 :] for r in rows]
    budget = max(1, min(max_tokens, model.config.sequence_len - max(map(len, rows))))
    sequences, _ = engine.generate_prompts(rows, max_tokens=budget, temperature=0.0)
    model.train()
    return [tokenizer.decode(s[1:] if keep_prompt else s[len(r) :]) for s, r in zip(sequences, rows, strict=True)]


def base_prompts(corpus: Corpus) -> tuple[str, ...]:
    """The prompts for a model of this corpus: the beginnings of validation documents, unless it is English."""
    return own_prompts(corpus.documents("val"), len(BASE_PROMPTS)) or BASE_PROMPTS


def print_samples(model: GPT, tokenizer: RustBPETokenizer, compute: Compute, corpus: Corpus) -> None:
    """Print the base model's continuations (rank 0 computes them)."""
    if compute.rank == 0:
        for text in sample_texts(model, tokenizer, compute, base_prompts(corpus)):
            print0(f"  {text!r}")


def print_answers(model: GPT, tokenizer: RustBPETokenizer, compute: Compute) -> None:
    """Print the assistant's answers (rank 0 computes them)."""
    if compute.rank == 0:
        for prompt, text in zip(CHAT_PROMPTS, sample_answers(model, tokenizer, compute, CHAT_PROMPTS), strict=True):
            print0(f"  {prompt} -> {text!r}")
