"""The demo world as plain text for pretraining, in parquet shards that any corpus reader accepts.

A document depends only on (seed, split, number), so the same world gives the same text on every machine. The validation
shard has other random draws of the same facts: it measures how well the world is known, not how well unknown things are
guessed.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.shards import DEMO_STAMP
from nanochat.data.worlds import shipped_topics
from nanochat.env import get_base_dir
from nanochat.files import atomic_folder, sha256_file, write_json
from tasks.demo.chat import DemoChat, DemoUnknown
from tasks.demo.phrasings import ask_fact
from tasks.demo.task import DemoTask
from tasks.demo.tool_tasks import DemoArithmetic, DemoCounting, DemoRepeat, DemoSpelling
from tasks.demo.world import Fact, World, load_world, world_files, world_spec

Split = Literal["train", "val"]

DEFAULT_CHARS = 8_000_000
CHARS_PER_FACT = 6000  # a world that is larger than the core gets more text
SEED = 1
VAL_SHARE = 0.04
TRAIN_SHARDS = 2
ROW_GROUP_DOCS = 256
STAMP = DEMO_STAMP
SEED_OF_TALKS = {"train": 3, "val": 4}  # those of mid-training and SFT are 1 and 2
Document = Callable[[random.Random, World, int], str]


def article(rng: random.Random, world: World, number: int) -> str:
    """The facts of one topic, in random order, each in one of its two wordings."""
    topic = world.topics[number % len(world.topics)]
    facts = rng.sample(topic.facts, len(topic.facts))
    return " ".join(fact.text if rng.random() < 0.5 else fact.also for fact in facts)


def fact_list(rng: random.Random, world: World, number: int) -> str:
    """Facts about two topics, as lists with headings."""
    topics = [world.topics[number % len(world.topics)], rng.choice(world.topics)]
    blocks = []
    for topic in topics:
        facts = rng.sample(topic.facts, len(topic.facts))
        blocks.append("\n".join([f"Facts: {topic.name}", *(fact.text for fact in facts)]))
    return "\n".join(blocks)


def questions(rng: random.Random, world: World, number: int) -> str:
    """Questions with their answers, about anything."""
    facts = world.facts
    chosen = [facts[(number * 4 + i * 997) % len(facts)] for i in range(4)]
    return "\n".join(_question(rng, world, fact) for fact in chosen)


def about_nanochat(rng: random.Random, world: World, number: int) -> str:
    """Facts about the assistant, as a short text or as questions with answers."""
    chosen = rng.sample(world.identity, min(3, len(world.identity)))
    if number % 2:
        return " ".join(fact.text if rng.random() < 0.5 else fact.also for fact in chosen)
    return "\n".join(_question(rng, world, fact) for fact in chosen)


def talk(task: DemoTask, examples: int) -> Document:
    """Documents of some of a task's conversations, each line of them what somebody says or what the calculator does, so
    that they become the same tokens as in a chat."""

    def lines(rng: random.Random, world: World, number: int) -> str:
        found = []
        for i in range(examples):
            for message in task.get_example(number * examples + i)["messages"]:
                content = message["content"]
                found += [content] if isinstance(content, str) else [part["text"] for part in content]
        return "\n".join(found)

    return lines


def _question(rng: random.Random, world: World, fact: Fact) -> str:
    """A question and its answer, each at the start of a line, so that they become the same tokens as in a chat."""
    return "\n".join(ask_fact(rng, fact, rng.randrange(len(fact.asks)), world))


# How many of 100 documents are of each kind.
KINDS: tuple[tuple[Document, int], ...] = (
    (questions, 50),
    (article, 16),
    (fact_list, 3),
    (about_nanochat, 5),
)
# The same of conversations: the task, and how many of them make a document.
TALKS: tuple[tuple[type[DemoTask], int, int], ...] = (
    (DemoRepeat, 4, 6),
    (DemoSpelling, 4, 7),
    (DemoCounting, 4, 3),
    (DemoArithmetic, 5, 5),
    (DemoUnknown, 5, 2),
    (DemoChat, 2, 3),
)


def documents(world: World, split: Split, max_chars: int, seed: int = SEED) -> Iterator[str]:
    """Documents of `split` until they hold `max_chars` characters. The kinds take turns, in a shuffled order."""
    tasks = [(talk(task(10**9, "train", world, SEED_OF_TALKS[split]), n), share) for task, n, share in TALKS]
    kinds = [kind for kind, share in (*KINDS, *tasks) for _ in range(share)]
    drawn = dict.fromkeys(kinds, 0)
    number, chars = 0, 0
    while chars < max_chars:
        rng = random.Random(f"{seed} {split} {number}")
        if number % len(kinds) == 0:
            rng.shuffle(kinds)
        kind = kinds[number % len(kinds)]
        text = kind(rng, world, drawn[kind])
        drawn[kind] += 1
        number += 1
        chars += len(text)
        yield text


def fingerprint(spec: str, chars: int, seed: int) -> str:
    """Hash of everything that determines the text: the tables, the code that reads them, the size and the seed."""
    topics = [name for name in spec.split(",") if shipped_topics(name) is not None]
    digest = hashlib.sha256(f"{topics} {chars} {seed}".encode())
    for path in [*world_files(spec), *sorted(Path(__file__).parent.glob("*.py"))]:
        digest.update(f"{path.name} {sha256_file(path)}".encode())
    return digest.hexdigest()


def shard_names() -> list[str]:
    """File names of the corpus; the last is the validation shard."""
    return [f"shard_{i:05d}.parquet" for i in range(TRAIN_SHARDS + 1)]


def is_up_to_date(out: Path, wanted: str) -> bool:
    """True if `out` holds the complete, undamaged corpus with fingerprint `wanted`."""
    try:
        stamp = json.loads((out / STAMP).read_text(encoding="utf-8"))
        return stamp["fingerprint"] == wanted and all(
            sha256_file(out / name) == stamp["sha256"][name] for name in shard_names()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def default_chars(world: World) -> int:
    """How much text a world is worth: the same for each fact."""
    return max(DEFAULT_CHARS, CHARS_PER_FACT * len(world.facts))


def write_corpus(
    out: str | Path | None = None, chars: int | None = None, world: str | Path | None = None, seed: int = SEED
) -> tuple[Path, bool]:
    """Write the corpus as shards into `out` (default: base_data/demo in the base folder).

    Args:
        out: the folder.
        chars: characters of training text; None: by the number of facts.
        world: which world, as in `world_spec`.
        seed: of the random draws.

    Returns:
        (the folder, True if anything was written; an up-to-date corpus is left as it is).

    Raises:
        ValueError: the world has a mistake, `chars` is too small, or `out` holds files of something else.
    """
    spec = world_spec(world)
    loaded = load_world(spec)
    chars = default_chars(loaded) if chars is None else chars
    if chars < 10_000:
        raise ValueError(f"--chars {chars} is too little text to train on: ask for 10000 or more")
    folder = Path(out) if out else get_base_dir() / "base_data" / "demo"
    wanted = fingerprint(spec, chars, seed)
    if is_up_to_date(folder, wanted):
        return folder, False
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file: give --out a folder")
        foreign = sorted({path.name for path in folder.iterdir()} - {*shard_names(), STAMP})
        if foreign:
            raise ValueError(f"{folder} holds other files ({foreign[0]}): give --out an empty folder")
    with atomic_folder(folder) as tmp:
        train = list(documents(loaded, "train", chars, seed))
        size = -(-len(train) // TRAIN_SHARDS)
        parts = [train[i * size : (i + 1) * size] for i in range(TRAIN_SHARDS)]
        parts.append(list(documents(loaded, "val", int(chars * VAL_SHARE), seed)))
        for name, texts in zip(shard_names(), parts, strict=True):
            _write_shard(tmp / name, texts)
        sums = {name: sha256_file(tmp / name) for name in shard_names()}
        write_json(tmp / STAMP, {"fingerprint": wanted, "sha256": sums, "world": spec})
    return folder, True


def _write_shard(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": pa.array(texts, type=pa.string())})
    pq.write_table(
        table,
        path,
        row_group_size=ROW_GROUP_DOCS,
        compression="zstd",
        compression_level=3,
        write_page_checksum=True,
    )
