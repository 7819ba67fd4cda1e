"""The training data of each stage: your own conversations, the demo world's, or nanochat's mixtures; and RL's tasks.

nanochat's mixtures are cut to what a run can read (see `mid_sizes`): a short run, or a tiny model, gets fewer tasks and
sees them more often, instead of a little of everything.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanochat.data.chat_loader import load_conversations
from nanochat.env import get_base_dir, print0
from nanochat.messages import Conversation
from nanochat.train.finetune import Conversations, DataBudget
from nanochat.train.rl import RLTasks
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence
from tasks.customjson import CustomJSON
from tasks.demo.chat import DemoIdentity, demo_eval_tasks, demo_mid_mixture, demo_sft_mixture
from tasks.demo.unknown import DO_NOT_KNOW
from tasks.demo.wordsums import DemoWordSums
from tasks.demo.world import load_world
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.sources import Rows
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
# The demo's mixtures are made for about this many facts, and have about so many tokens. A run that reads more gets more
# of them, drawn anew; each takes seconds to make, so after some it reads them again.
DEMO_FACTS, DEMO_TOKENS, MOST_DEMO_DRAWS = 1400, 560_000, 12


def conversations(stage: str, chat_data: str | None, budget: DataBudget) -> Conversations:
    """The training and validation conversations of a stage, "mid" or "sft".

    Args:
        stage: which mixture.
        chat_data: "demo", a file or folder of conversations, "nanochat" for its mixture from the hub, or None for what
            the model to start from has learned from, else that mixture.
        budget: how much will be read, and by which model.
    """
    chat_data = chat_data or budget.chat_data or "nanochat"
    if chat_data == "demo":
        return _demo(stage, budget.tokens)
    if chat_data != "nanochat":
        return _own(chat_data, budget.fits)
    return _nanochat_mid(budget) if stage == "mid" else _nanochat_sft(budget)


def _own(path: str, fits: Callable[[Conversation], bool] = lambda conversation: True) -> Conversations:
    """The user's conversations: one in VAL_STRIDE is held out, of those that fit and are not in training as well.

    One that is given several times is learned several times; so it is only held out if there is no other.
    """
    rows = load_conversations(path)
    copies = Counter(map(rows.digest, range(len(rows))))
    held_out = _hold_out(rows, fits, lambda i: copies[rows.digest(i)] == 1) or _hold_out(rows, fits, lambda i: True)
    if not held_out:
        raise ValueError(
            f"none of the conversations of {path} has an answer that fits into the context: shorten the longest ones, "
            "or train a base model with a larger --max_seq_len"
        )
    validated = {rows.digest(i) for i in held_out}
    train = [i for i in range(len(rows)) if rows.digest(i) not in validated]
    if len(copies) < len(rows):
        print0(
            f"{path}: {len(rows) - len(copies):,} conversations are repeated: each is learned as often as it is given"
        )
    if not train:
        print0(f"warning: {path} has only one conversation that fits: it is learned and validated as well")
        train = list(range(len(rows)))
    return Conversations(Rows(rows, train), Rows(rows, held_out), path, own=True)


def _hold_out(
    rows: Sequence[Conversation], fits: Callable[[Conversation], bool], may: Callable[[int], bool]
) -> list[int]:
    """The first that may and fits of every VAL_STRIDE conversations; of few, the one of median length."""
    if len(rows) > VAL_STRIDE:
        blocks = (range(start, min(start + VAL_STRIDE, len(rows))) for start in range(0, len(rows), VAL_STRIDE))
        found = [next((i for i in block if may(i) and fits(rows[i])), None) for block in blocks]
        return [i for i in found if i is not None]
    # The first may be the longest: begin in the middle and go to both sides.
    by_length = sorted((i for i in range(len(rows)) if may(i)), key=lambda i: len(json.dumps(rows[i])))
    middle = len(by_length) // 2
    nearest = sorted(range(len(by_length)), key=lambda place: (abs(place - middle), place))
    chosen = next((by_length[place] for place in nearest if fits(rows[by_length[place]])), None)
    return [] if chosen is None else [chosen]


def _demo(stage: str, tokens: int | None) -> Conversations:
    world = load_world()
    draw, seed = (demo_mid_mixture, 1) if stage == "mid" else (demo_sft_mixture, 2)
    # A larger world gets as many conversations about each fact: more draws, with other seeds.
    number = max(-(-len(world.facts) // DEMO_FACTS), min(MOST_DEMO_DRAWS, -(-(tokens or 0) // DEMO_TOKENS)))
    draws = [draw(world=world, seed=seed + 2 * i) for i in range(number)]
    train = TaskMixture([task for mixture in draws for task in mixture.tasks])
    # Validation uses phrasings that are never trained on. By it SFT chooses how answers are drawn and withheld.
    unsure = DO_NOT_KNOW if world.in_english else ""
    return Conversations(train, TaskMixture(list(demo_eval_tasks().values())), "demo", unsure=unsure)


def mid_sizes(budget: DataBudget, identity: int = 2 * IDENTITY_SIZE) -> dict[str, int]:
    """Conversations of each task for mid-training. All shrink by the same factor to what can be read once; tasks that a
    small model can't learn are left out, and `identity` keeps its size up to a tenth of the budget."""
    tasks = {name: n for name, n in MID_TASKS.items() if budget.depth >= SMALL_DEPTH or name in SMALL_TASKS}
    if budget.tokens is None:
        return {**tasks, "identity": identity}
    identity = max(1, min(identity, budget.tokens // 10 // TOKENS_EACH["identity"]))
    full = sum(n * TOKENS_EACH[name] for name, n in tasks.items())
    share = min(1.0, (budget.tokens - identity * TOKENS_EACH["identity"]) / full)
    return {**{name: max(1, round(share * n)) for name, n in tasks.items()}, "identity": identity}


def _own_identity() -> Task | None:
    """The user's own identity conversations, all of them; None: those that come with nanochat are taken."""
    path = get_base_dir() / IDENTITY_FILE
    return CustomJSON(path) if path.is_file() else None


def _identities(size: int, own: Task | None = None) -> list[Task]:
    """`size` identity conversations, in passes over the user's `own` or over IDENTITY_SIZE of those that come along.

    A file with more than IDENTITY_SIZE is read to its end; where only a part of a pass is wanted, it is spread over it.
    """
    own = own or _own_identity()
    whole = max(IDENTITY_SIZE, len(own or ()))
    sizes = [min(whole, size - done) for done in range(0, size, whole)]
    if own is None:
        return [DemoIdentity(n, "train") for n in sizes]
    steps = [max(1, len(own) // n) if len(own) > IDENTITY_SIZE else 1 for n in sizes]
    return [TaskSequence([own], stop=n * step, step=step) for n, step in zip(sizes, steps, strict=True)]


def _nanochat_mid(budget: DataBudget) -> Conversations:
    own = _own_identity()
    sizes = mid_sizes(budget, 2 * max(IDENTITY_SIZE, len(own or ())))
    build: Mapping[str, Callable[[int], Task]] = {
        "smoltalk": lambda n: SmolTalk(split="train", stop=n),
        "mmlu": lambda n: MMLU(subset="auxiliary_train", split="train", stop=n),
        "gsm8k": lambda n: GSM8K(subset="main", split="train", stop=n),
        "spelling": lambda n: SimpleSpelling(size=n, split="train"),
        "spelling_bee": lambda n: SpellingBee(size=n, split="train"),
    }
    train = TaskMixture(
        [*(build[name](n) for name, n in sizes.items() if name != "identity"), *_identities(sizes["identity"], own)]
    )
    val: list[Task] = [SmolTalk(split="test")]
    if "mmlu" in sizes:
        val += [MMLU(subset="all", split="test", stop=5200), GSM8K(subset="main", split="test", stop=420)]
    return Conversations(train, TaskMixture(val), "nanochat")


def _nanochat_sft(budget: DataBudget) -> Conversations:
    smoltalk = SmolTalk(split="train", stop=10_000)
    own = _own_identity()
    identities = _identities(max(IDENTITY_SIZE, len(own or ())), own)
    train: list[Task] = [smoltalk, *identities, SimpleSpelling(size=300, split="train")]
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
    "DemoWordSums": lambda: RLTasks(DemoWordSums(10_000, "train"), DemoWordSums(400, "test"), lr_frac=0.1),
}


def rl_tasks(name: str | None, meta: Mapping[str, Any]) -> RLTasks:
    """The problems of a task in RL_TASKS; by default those that suit the model with this metadata."""
    return RL_TASKS[name or ("DemoWordSums" if meta.get("chat_data") == "demo" else "GSM8K")]()
