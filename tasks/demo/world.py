"""A world: topics with facts, the assistant's identity, words to spell.

A world is a folder of text files; world/README.md shows how to write one. Every `*.txt` is a table of facts, except for
three names: `identity.txt` (in the same form, about the assistant itself), `words.txt` (sections [trained] and
[unseen]) and `language.txt` (sentences around questions in another language). Without the first two, those that come
with nanochat are used. The shipped world has a core, which the shortest run learns, and `more/`, which longer ones add.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nanochat.data.shards import DEMO_STAMP
from nanochat.data.worlds import SHIPPED, shipped_topics, world_names
from nanochat.env import get_base_dir
from tasks.demo.tables import Fact, Topic, has_keys, read_language, read_table, read_words, words_of

__all__ = ["Fact", "HeldOutQuestions", "Topic", "World", "has_keys", "load_world", "read_world", "words_of"]

SHIPPED_WORLD = Path(__file__).parent / "world"
MORE = "more"
IDENTITY_FILE = "identity.txt"
WORDS_FILE = "words.txt"
LANGUAGE_FILE = "language.txt"
SPECIAL_FILES = (IDENTITY_FILE, WORDS_FILE, LANGUAGE_FILE)
OTHER_TABLES = (".tsv", ".csv", ".toml", ".json", ".yaml", ".yml", ".jsonl", ".xlsx", ".ods")


@dataclass(frozen=True)
class World:
    """Everything that the demo teaches."""

    topics: tuple[Topic, ...]
    identity: tuple[Fact, ...]
    words: tuple[str, ...]
    """Words whose spelling is trained."""
    unseen_words: tuple[str, ...]
    """Words that are never spelled in training."""
    untaught: tuple[Topic, ...] = ()
    """Topics of the shipped world that this run does not teach: honest material for "I do not know that"."""

    @functools.cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The facts of all topics, in order."""
        return tuple(fact for topic in self.topics for fact in topic.facts)

    @functools.cached_property
    def text(self) -> str:
        """All its words in lower case, with single spaces between and around them, to look for phrases in."""
        facts = (*self.facts, *self.identity)
        texts = (" ".join((f.topic, f.text, f.also, *f.trained, f.held_out, f.tell)) for f in facts)
        return f" {' '.join(words_of(' '.join(texts)))} "

    @functools.cached_property
    def vocabulary(self) -> frozenset[str]:
        """Its words, in lower case."""
        return frozenset(self.text.split())

    @functools.cached_property
    def in_english(self) -> bool:
        """False if a part of it is in another language, which the assistant then must not refuse."""
        return all(fact.language is None for fact in (*self.facts, *self.identity))

    @functools.cached_property
    def held_out(self) -> HeldOutQuestions:
        """Finds held-out questions in text."""
        return HeldOutQuestions(fact.held_out for fact in (*self.facts, *self.identity))


class HeldOutQuestions:
    """Finds questions in running text, ignoring case and punctuation."""

    def __init__(self, questions: Iterable[str]) -> None:
        self.questions = {tuple(words_of(question)) for question in questions} - {()}
        # Few positions of a text begin with the first two words of a question, and looking those up is cheap.
        self.lengths: dict[tuple[str, ...], set[int]] = {}
        for question in self.questions:
            self.lengths.setdefault(question[:2], set()).add(len(question))

    def find(self, text: str) -> str | None:
        """The first held-out question inside `text`, in lower case without punctuation, or None."""
        words = words_of(text)
        for i in range(len(words)):
            for length in self.lengths.get(tuple(words[i : i + 2]), ()):
                if tuple(words[i : i + length]) in self.questions:
                    return " ".join(words[i : i + length])
        return None


def world_spec(world: str | Path | None = None) -> str:
    """Which world is meant by `world`, else by $NANOCHAT_WORLD_DIR, else what the base folder's demo corpus was made
    from, else the core of the one that comes with nanochat: names with commas between, folders absolute.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the list makes no sense.
    """
    return ",".join(world_names(str(world or os.environ.get("NANOCHAT_WORLD_DIR") or _recorded() or SHIPPED)))


def _recorded() -> str | None:
    """The world of the demo corpus in the base folder, so that an evaluation asks for what was learned."""
    try:
        world = json.loads((get_base_dir() / "base_data" / "demo" / DEMO_STAMP).read_text(encoding="utf-8"))["world"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return world if isinstance(world, str) else None


def load_world(world: str | Path | None = None) -> World:
    """The world called `world` (see `world_spec`).

    Raises:
        FileNotFoundError: no such folder, or no table in it.
        ValueError: a table is wrong; names file, line and remedy.
    """
    spec = world_spec(world)
    stats = [(file, file.stat()) for file in world_files(spec)]
    return _load_world(spec, tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats))


@functools.lru_cache(maxsize=4)
def _load_world(spec: str, versions: tuple[tuple[str, int, int], ...]) -> World:
    """Load a world; `versions` invalidates the cache when its files have changed."""
    world, problems = read_world(spec)
    if problems:
        more = f" (and {len(problems) - 1} more: python -m tasks.demo --check)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return world


@dataclass(frozen=True)
class _Part:
    """One of the folders that a world is made of."""

    name: str
    folder: Path

    @property
    def tables(self) -> list[Path]:
        """The tables of facts, in order."""
        return [path for path in sorted(self.folder.glob("*.txt")) if path.name not in SPECIAL_FILES]

    @property
    def more(self) -> list[Path]:
        """The tables for longer runs, of the shipped world."""
        return sorted((self.folder / MORE).glob("*.txt")) if self.folder == SHIPPED_WORLD else []

    def file(self, name: str) -> Path | None:
        """The file of this name, None if there is none."""
        path = self.folder / name
        return path if path.is_file() else None


def _parts(spec: str) -> list[_Part]:
    """The folders of a world.

    Raises:
        FileNotFoundError: there is no table in one.
    """
    names = world_names(spec)
    parts = [_Part(name, SHIPPED_WORLD if shipped_topics(name) is not None else Path(name)) for name in names]
    for part in parts:
        if not part.tables:
            raise FileNotFoundError(
                f"world folder {part.folder} has no .txt table of facts: write one (see tasks/demo/world/README.md)"
            )
    return parts


def world_files(spec: str) -> list[Path]:
    """Every file that a world is read from."""
    files = [path for part in _parts(spec) for path in (*part.tables, *part.more, *map(part.file, SPECIAL_FILES))]
    return list(dict.fromkeys([*filter(None, files), *(SHIPPED_WORLD / name for name in (IDENTITY_FILE, WORDS_FILE))]))


def read_world(world: str | Path) -> tuple[World, list[str]]:
    """The world called `world`, and every problem found in its tables, as `file:line: what is wrong: remedy`.

    Raises:
        FileNotFoundError: no such folder, or no table in it.
        ValueError: a file is not UTF-8.
    """
    parts = _parts(str(world))
    problems: list[str] = []

    def shown(path: Path) -> str:
        return path.name if len(parts) == 1 else f"{path.parent.name}/{path.name}"

    topics: list[Topic] = []
    untaught: list[Topic] = []
    for part in parts:
        path = part.file(LANGUAGE_FILE)
        language = read_language(path, shown(path), problems) if path else None
        core = [topic for path in part.tables for topic in read_table(path, shown(path), problems, language)]
        more = _take_turns([read_table(path, shown(path), problems) for path in part.more])
        number = (shipped_topics(part.name) or len(core)) if part.folder == SHIPPED_WORLD else len(core)
        topics += [*core, *more][:number]
        untaught += [*core, *more][number:]
        if not core:  # topics without facts are named where they stand
            problems.append(
                f"{shown(part.tables[0])}:1: no fact in {part.folder}: write a topic (tasks/demo/world/README.md)"
            )
        problems += _not_read(part)
    # Who gives a file of their own means it instead of the shipped one.
    own = [part for part in parts if part.folder != SHIPPED_WORLD] + [_Part(SHIPPED, SHIPPED_WORLD)]
    identity_file = next(filter(None, (part.file(IDENTITY_FILE) for part in own)))
    words_file = next(filter(None, (part.file(WORDS_FILE) for part in own)))
    language_file = identity_file.parent / LANGUAGE_FILE
    language = read_language(language_file, shown(language_file), []) if language_file.is_file() else None
    about = read_table(identity_file, shown(identity_file), problems, language, identity=True)
    trained, unseen = read_words(words_file, shown(words_file), problems)
    identity = tuple(fact for topic in about for fact in topic.facts)
    whole = World(tuple(topics), identity, trained, unseen, tuple(untaught))
    return whole, problems + _clashes(whole)


def _take_turns(files: list[list[Topic]]) -> list[Topic]:
    """The first topic of each file, then the second of each ..., so that any number of them is of every kind."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*files))
    return [topic for topic in turns if topic is not None]


def _not_read(part: _Part) -> list[str]:
    """What a user may take for a table of their world, but is not read."""
    if part.folder == SHIPPED_WORLD:
        return []
    found = [path for path in sorted(part.folder.rglob("*")) if not path.name.startswith(".") and path.is_file()]
    wrong = [path for path in found if path.suffix.lower() in OTHER_TABLES]
    deeper = [path for path in found if path.suffix == ".txt" and path.parent != part.folder]
    return [
        f"{path.relative_to(part.folder)}:1: this file is not read: write its facts into a .txt table in {part.folder}"
        for path in (*wrong, *deeper)
    ]


def _clashes(world: World) -> list[str]:
    """Report questions asked twice, held-out questions inside trained text, and repeated topics."""
    problems: list[str] = []
    seen_topics: dict[str, str] = {}
    for topic in world.topics:
        if topic.name in seen_topics:
            problems.append(f"{topic.place}: topic [{topic.name}] is also at {seen_topics[topic.name]}: merge the two")
        seen_topics.setdefault(topic.name, topic.place)
    seen: dict[str, str] = {}
    everything = (*world.facts, *world.identity)
    for fact in everything:
        for ask in (*fact.trained, fact.held_out):
            question = " ".join(words_of(ask))
            if question in seen:
                problems.append(f"{fact.place}: {ask!r} is also asked at {seen[question]}: reword one of them")
            seen.setdefault(question, fact.place)
    for fact in everything:
        for text in (fact.text, fact.also, fact.tell, *fact.trained):
            found = world.held_out.find(text)
            if found and found != " ".join(words_of(text)):  # the same question twice is reported above
                where = f"the held-out question {found!r} of {seen[found]}"
                problems.append(f"{fact.place}: {text!r} contains {where}: reword one of them")
    return problems
