"""Which conversations mid-training and SFT learn from: the user's own, the demo world's, or nanochat's mixtures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanochat.chat_data import load_conversations
from nanochat.common import download_file_with_lock

IDENTITY_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
# Every 50th of the user's conversations is kept for validation.
VAL_STRIDE = 50


def conversations(stage: str, chat_data: str | None) -> tuple[Sequence[Any], Sequence[Any], str]:
    """(training, validation, name) for a stage, "mid" or "sft".

    Args:
        stage: which mixture.
        chat_data: "demo", a file of conversations, or None for nanochat's mixture from the hub.
    """
    if chat_data == "demo":
        return *_demo(stage), "demo"
    if chat_data is not None:
        return *_own(chat_data), chat_data
    return *(_nanochat_mid() if stage == "mid" else _nanochat_sft()), "nanochat"


def _own(path: str) -> tuple[Sequence[Any], Sequence[Any]]:
    rows = load_conversations(path)
    if len(rows) < 2:
        raise ValueError(f"--chat_data={path} has {len(rows)} conversations: at least 2 are needed, one for validation")
    stride = min(VAL_STRIDE, len(rows))
    train = [row for i, row in enumerate(rows) if i % stride]
    return train, rows[::stride]


def _demo(stage: str) -> tuple[Sequence[Any], Sequence[Any]]:
    from tasks.common import TaskMixture
    from tasks.demo.chat import demo_eval_tasks, demo_mid_mixture, demo_sft_mixture

    train = demo_mid_mixture() if stage == "mid" else demo_sft_mixture()
    # Validation asks in phrasings that are never trained on; only its loss is read, nothing is chosen by it.
    return train, TaskMixture(list(demo_eval_tasks().values()))


def _identity() -> Any:
    from tasks.customjson import CustomJSON

    return CustomJSON(download_file_with_lock(IDENTITY_URL, "identity_conversations.jsonl"))


def _nanochat_mid() -> tuple[Sequence[Any], Sequence[Any]]:
    from tasks.common import TaskMixture
    from tasks.gsm8k import GSM8K
    from tasks.mmlu import MMLU
    from tasks.smoltalk import SmolTalk
    from tasks.spellingbee import SimpleSpelling, SpellingBee

    train = TaskMixture(
        [
            SmolTalk(split="train"),
            MMLU(subset="auxiliary_train", split="train"),
            GSM8K(subset="main", split="train"),
            _identity(),
            _identity(),
            SimpleSpelling(size=200_000, split="train"),
            SpellingBee(size=80_000, split="train"),
        ]
    )
    val = TaskMixture(
        [
            SmolTalk(split="test"),
            MMLU(subset="all", split="test", stop=5200),
            GSM8K(subset="main", split="test", stop=420),
        ]
    )
    return train, val


def _nanochat_sft() -> tuple[Sequence[Any], Sequence[Any]]:
    from tasks.arc import ARC
    from tasks.common import TaskMixture
    from tasks.gsm8k import GSM8K
    from tasks.smoltalk import SmolTalk
    from tasks.spellingbee import SimpleSpelling, SpellingBee

    train = TaskMixture(
        [
            ARC(subset="ARC-Easy", split="train"),
            ARC(subset="ARC-Challenge", split="train"),
            GSM8K(subset="main", split="train"),
            SmolTalk(split="train", stop=10_000),
            _identity(),
            SimpleSpelling(size=300, split="train"),
            SpellingBee(size=300, split="train"),
        ]
    )
    return train, SmolTalk(split="test")
