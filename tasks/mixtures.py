"""The training data of each stage: your own conversations, the demo world's, or nanochat's mixtures; and RL's tasks.

nanochat's mixtures are cut to what a run can read (see `mid_sizes`): a short run, or a tiny model, gets fewer tasks and
sees them more often, instead of a little of everything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from nanochat.data.chat_loader import load_conversations
from nanochat.env import get_base_dir
from nanochat.train.finetune import Conversations, DataBudget
from nanochat.train.rl import RLTasks
from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.demo.chat import DemoIdentity, demo_eval_tasks, demo_mid_mixture, demo_sft_mixture
from tasks.demo.wordsums import DemoWordSums
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

# Written by dev/gen_synthetic_data.py. Without it the assistant's identity is tasks/demo/world/identity.txt.
IDENTITY_FILE = "identity_conversations.jsonl"
IDENTITY_SIZE = 1000
# Every 50th of the user's conversations is held out for validation.
VAL_STRIDE = 50
# The mixture of mid-training (source: nanochat), and the approximate tokens per conversation, vocabulary 65536.
MID_TASKS = {"smoltalk": 460_341, "mmlu": 99_842, "gsm8k": 7_473, "spelling": 200_000, "spelling_bee": 80_000}
TOKENS_EACH = {"smoltalk": 800, "mmlu": 180, "gsm8k": 220, "spelling": 40, "spelling_bee": 150, "identity": 250}
# Below this depth a model learns nothing from multiple choice and word problems: they are left out.
SMALL_DEPTH = 8
SMALL_TASKS = ("smoltalk", "spelling")


def conversations(stage: str, chat_data: str | None, budget: DataBudget) -> Conversations:
    """The training and validation conversations of a stage, "mid" or "sft".

    Args:
        stage: which mixture.
        chat_data: "demo", a file of conversations, or None for nanochat's mixture from the hub.
        budget: how much will be read, and by which model.
    """
    if chat_data == "demo":
        return _demo(stage)
    if chat_data is not None:
        return _own(chat_data)
    return _nanochat_mid(budget) if stage == "mid" else _nanochat_sft(budget)


def _own(path: str) -> Conversations:
    rows = load_conversations(path)
    if len(rows) < 2:
        raise ValueError(f"--chat_data={path} has {len(rows)} conversations: at least 2 are needed, one for validation")
    chosen = set(range(0, len(rows), VAL_STRIDE))
    if len(chosen) == 1:  # few conversations: one of median length, since the first may be the longest
        by_length = sorted(range(len(rows)), key=lambda i: len(json.dumps(rows[i])))
        chosen = {by_length[len(rows) // 2]}
    train = [row for i, row in enumerate(rows) if i not in chosen]
    return Conversations(train, [rows[i] for i in sorted(chosen)], path)


def _demo(stage: str) -> Conversations:
    train = demo_mid_mixture() if stage == "mid" else demo_sft_mixture()
    # Validation uses phrasings that are never trained on. Only its loss is reported; nothing is chosen by it.
    return Conversations(train, TaskMixture(list(demo_eval_tasks().values())), "demo")


def mid_sizes(budget: DataBudget) -> dict[str, int]:
    """Conversations of each task for mid-training. All shrink by the same factor to what can be read once; tasks that a
    small model can't learn are left out, and identity keeps its size up to a tenth of the budget."""
    tasks = {name: n for name, n in MID_TASKS.items() if budget.depth >= SMALL_DEPTH or name in SMALL_TASKS}
    identity = 2 * IDENTITY_SIZE
    if budget.tokens is None:
        return {**tasks, "identity": identity}
    identity = max(1, min(identity, budget.tokens // 10 // TOKENS_EACH["identity"]))
    full = sum(n * TOKENS_EACH[name] for name, n in tasks.items())
    share = min(1.0, (budget.tokens - identity * TOKENS_EACH["identity"]) / full)
    return {**{name: max(1, round(share * n)) for name, n in tasks.items()}, "identity": identity}


def _identity(size: int) -> Task:
    """The assistant's identity: the user's own file, else the one that comes with nanochat."""
    path = get_base_dir() / IDENTITY_FILE
    return CustomJSON(path, stop=size) if path.is_file() else DemoIdentity(size, "train")


def _nanochat_mid(budget: DataBudget) -> Conversations:
    sizes = mid_sizes(budget)
    build: Mapping[str, Callable[[int], Task]] = {
        "smoltalk": lambda n: SmolTalk(split="train", stop=n),
        "mmlu": lambda n: MMLU(subset="auxiliary_train", split="train", stop=n),
        "gsm8k": lambda n: GSM8K(subset="main", split="train", stop=n),
        "spelling": lambda n: SimpleSpelling(size=n, split="train"),
        "spelling_bee": lambda n: SpellingBee(size=n, split="train"),
    }
    train = TaskMixture(
        [*(build[name](n) for name, n in sizes.items() if name != "identity"), *_identities(sizes["identity"])]
    )
    val: list[Task] = [SmolTalk(split="test")]
    if "mmlu" in sizes:
        val += [MMLU(subset="all", split="test", stop=5200), GSM8K(subset="main", split="test", stop=420)]
    return Conversations(train, TaskMixture(val), "nanochat")


def _identities(size: int) -> list[Task]:
    """`size` identity conversations in passes of at most IDENTITY_SIZE."""
    return [_identity(min(IDENTITY_SIZE, size - done)) for done in range(0, size, IDENTITY_SIZE)]


def _nanochat_sft(budget: DataBudget) -> Conversations:
    smoltalk = SmolTalk(split="train", stop=10_000)
    train: list[Task] = [smoltalk, _identity(IDENTITY_SIZE), SimpleSpelling(size=300, split="train")]
    if budget.depth >= SMALL_DEPTH:
        train += [
            ARC(subset="ARC-Easy", split="train"),
            ARC(subset="ARC-Challenge", split="train"),
            GSM8K(subset="main", split="train"),
            SpellingBee(size=300, split="train"),
        ]
    return Conversations(TaskMixture(train), SmolTalk(split="test"), "nanochat")


# --- reinforcement learning -------------------------------------------------------------------------------------------


RL_TASKS: Mapping[str, Callable[[], RLTasks]] = {
    "GSM8K": lambda: RLTasks(GSM8K("train"), GSM8K("test")),
    "SpellingBee": lambda: RLTasks(SpellingBee(size=10_000, split="train"), SpellingBee(size=256, split="test")),
    "DemoWordSums": lambda: RLTasks(DemoWordSums(10_000, "train"), DemoWordSums(400, "test")),
}


def rl_tasks(name: str | None, meta: Mapping[str, Any]) -> RLTasks:
    """The problems of a task in RL_TASKS; by default those that suit the model with this metadata."""
    return RL_TASKS[name or ("DemoWordSums" if meta.get("chat_data") == "demo" else "GSM8K")]()
