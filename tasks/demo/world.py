"""Read the tables of a world: topics with facts, the assistant's identity, words to spell.

A world is a folder of text files. Every `*.txt` is a table of facts, except for two names: `identity.txt` (in the same
form, about the assistant itself) and `words.txt` (sections [trained] and [unseen]); if one of these is missing, the one
that comes with nanochat is used. Blank lines and lines that begin with `#` are ignored. A topic:

    [sky]
    fact: The sky is blue because air scatters blue light more than red light.
    also: Air scatters blue light the most, so the sky looks blue.
    ask: Why is the sky blue? | What makes the sky blue? | Why is the sky not red? | How come the sky is blue?
    tell: why the sky is blue
    key: scatters

`fact` is the answer that is taught, `also` the same in other words. One `ask` is never trained on, only evaluated. It
is never the first one, and a hash of the fact chooses it; if it were always the last, then those forms of question that
authors think of last would be held out everywhere. `tell` is the question in the form that follows "Can you tell me".
`key` lists the words that make an answer right: a comma between words that are all needed, a slash between
alternatives.
"""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHIPPED_WORLD = Path(__file__).parent / "world"
IDENTITY_FILE = "identity.txt"
WORDS_FILE = "words.txt"
FIELDS = ("fact", "also", "ask", "tell", "key")
ASKS_PER_FACT = 4
MIN_IDENTITY_ASKS = 4
MAX_FACT_CHARS = 100


@dataclass(frozen=True)
class Fact:
    """One fact, the questions it answers, and what makes an answer right."""

    topic: str
    text: str
    also: str
    asks: tuple[str, ...]
    """Questions that training may use."""
    held_out: str
    """The question that training never uses."""
    tell: str
    keys: tuple[tuple[str, ...], ...]
    """A right answer has at least one word (or short phrase) of each group."""
    place: str
    """`file:line` of the fact, for error messages."""


@dataclass(frozen=True)
class Topic:
    """A name and the facts about it."""

    name: str
    facts: tuple[Fact, ...]
    place: str


@dataclass(frozen=True)
class World:
    """Everything that the demo teaches."""

    topics: tuple[Topic, ...]
    identity: tuple[Fact, ...]
    words: tuple[str, ...]
    """Words whose spelling is trained."""
    unseen_words: tuple[str, ...]
    """Words that are never spelled in training."""

    @functools.cached_property
    def facts(self) -> tuple[Fact, ...]:
        """The facts of all topics, in order."""
        return tuple(fact for topic in self.topics for fact in topic.facts)

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


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text: "What's 1,000?" -> ["what", "s", "1000"]."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=\d),(?=\d{3})", "", text.lower()))


def contains_words(text: str, phrase: str) -> bool:
    """True if `text` has the words of `phrase` in a row: "sea" is not in "season"."""
    return f" {' '.join(words_of(phrase))} " in f" {' '.join(words_of(text))} "


def has_keys(text: str, keys: tuple[tuple[str, ...], ...]) -> bool:
    """True if `text` has a phrase of each group."""
    return all(any(contains_words(text, phrase) for phrase in group) for group in keys)


def load_world(folder: str | Path | None = None) -> World:
    """The world in `folder`, else in $NANOCHAT_WORLD_DIR, else the one that comes with nanochat.

    Raises:
        FileNotFoundError: no such folder, or no table in it.
        ValueError: a table is wrong; names file, line and remedy.
    """
    path = world_folder(folder)
    tables, identity, words = world_files(path)
    stats = [(file, file.stat()) for file in (*tables, identity, words)]
    return _load_world(str(path), tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats))


def world_folder(folder: str | Path | None = None) -> Path:
    """The folder that `load_world(folder)` reads."""
    return Path(folder or os.environ.get("NANOCHAT_WORLD_DIR") or SHIPPED_WORLD)


@functools.lru_cache(maxsize=4)
def _load_world(folder: str, versions: tuple[tuple[str, int, int], ...]) -> World:
    """Load a world; `versions` invalidates the cache when its files have changed."""
    world, problems = read_world(folder)
    if problems:
        more = f" (and {len(problems) - 1} more: python -m tasks.demo --check)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return world


def world_files(folder: Path) -> tuple[list[Path], Path, Path]:
    """(fact tables, identity table, word list) of a world.

    Raises:
        FileNotFoundError: no such folder, or no table in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no world folder {folder}: give --world or NANOCHAT_WORLD_DIR a folder of .txt tables")
    tables = [path for path in sorted(folder.glob("*.txt")) if path.name not in (IDENTITY_FILE, WORDS_FILE)]
    if not tables:
        raise FileNotFoundError(
            f"world folder {folder} has no .txt table of facts: write one (see tasks/demo/world.py)"
        )
    extra = [
        folder / name if (folder / name).is_file() else SHIPPED_WORLD / name for name in (IDENTITY_FILE, WORDS_FILE)
    ]
    return tables, extra[0], extra[1]


def read_world(folder: str | Path) -> tuple[World, list[str]]:
    """The world in `folder`, and every problem found in its tables, as `file:line: what is wrong: remedy`.

    Raises:
        FileNotFoundError: no such folder, or no table in it.
    """
    tables, identity_file, words_file = world_files(Path(folder))
    problems: list[str] = []
    topics = [topic for path in tables for topic in _read_table(path, problems, identity=False)]
    identity = [fact for topic in _read_table(identity_file, problems, identity=True) for fact in topic.facts]
    trained, unseen = _read_words(words_file, problems)
    world = World(tuple(topics), tuple(identity), trained, unseen)
    problems += _clashes(world)
    return world, problems


@dataclass
class _Draft:
    """A fact that is being read: text by field, and where it began."""

    place: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass
class _TopicDraft:
    name: str
    place: str
    facts: list[_Draft] = field(default_factory=list)


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of each line that is not ignored."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: not UTF-8 text ({error.reason}): save it as UTF-8") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{path.name}:{number}", line.strip()


def _read_table(path: Path, problems: list[str], *, identity: bool) -> list[Topic]:
    drafts: list[_TopicDraft] = []
    for place, line in _read_lines(path):
        if line.startswith("["):
            name = line.strip("[]").strip()
            if not name or not line.endswith("]"):
                problems.append(f"{place}: {line!r} is no topic: write [name]")
            drafts.append(_TopicDraft(name, place))
            continue
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or name not in FIELDS:
            problems.append(f"{place}: {line[:40]!r} is no field: start the line with one of {', '.join(FIELDS)}")
        elif not drafts:
            problems.append(f"{place}: a fact before any topic: open one with [name]")
        elif name == "fact":
            drafts[-1].facts.append(_Draft(place, {"fact": value}))
        elif not drafts[-1].facts:
            problems.append(f"{place}: {name!r} before any fact: start with a `fact:` line")
        elif name in drafts[-1].facts[-1].fields:
            problems.append(f"{place}: a second {name!r} for one fact: a fact has each field once")
        else:
            drafts[-1].facts[-1].fields[name] = value
    topics = []
    for draft in drafts:
        facts = [_finish_fact(draft.name, fact, problems, identity=identity) for fact in draft.facts]
        if not facts:
            problems.append(f"{draft.place}: topic [{draft.name}] has no fact: add one or remove the topic")
        topics.append(Topic(draft.name, tuple(fact for fact in facts if fact), draft.place))
    return topics


def held_out_index(fact: str, num_asks: int) -> int:
    """The number of the held-out question of a fact: the same on every machine, and not the first if there are more."""
    return 1 + zlib.crc32(fact.encode()) % (num_asks - 1) if num_asks > 1 else 0


def _finish_fact(topic: str, draft: _Draft, problems: list[str], *, identity: bool) -> Fact | None:
    fields = draft.fields
    missing = [name for name in FIELDS if not fields.get(name)]
    if missing:
        problems.append(f"{draft.place}: no {' and no '.join(missing)}: a fact needs {', '.join(FIELDS)}")
        return None
    asks = tuple(ask.strip() for ask in fields["ask"].split("|"))
    keys = tuple(tuple(word.strip() for word in group.split("/") if word.strip()) for group in fields["key"].split(","))
    held = held_out_index(fields["fact"], len(asks))
    trained = asks[:held] + asks[held + 1 :]
    fact = Fact(topic, fields["fact"], fields["also"], trained, asks[held], fields["tell"], keys, draft.place)
    problems += (f"{draft.place}: {problem}" for problem in _fact_problems(fact, identity=identity))
    return fact


def _fact_problems(fact: Fact, *, identity: bool) -> Iterator[str]:
    """The problems of one fact, as `what: remedy`."""
    asks = (*fact.asks, fact.held_out)
    if identity and len(asks) < MIN_IDENTITY_ASKS:
        yield f"{len(asks)} questions: an identity fact needs {MIN_IDENTITY_ASKS} or more, with | between them"
    if not identity and len(asks) != ASKS_PER_FACT:
        yield f"{len(asks)} questions: write exactly {ASKS_PER_FACT}, with | between them"
    if not all(asks):
        yield "an empty question: remove the extra |"
    if len(fact.text) > MAX_FACT_CHARS:
        yield f"the fact has {len(fact.text)} characters: shorten it to {MAX_FACT_CHARS} or fewer"
    for name, text in (("fact", fact.text), ("also", fact.also)):
        if not text.endswith((".", "!")) or text[0] != text[0].upper():
            yield f"the {name} is no sentence: start with a capital letter and end with a full stop"
    if fact.tell.endswith((".", "?")) or not fact.tell[0].islower():
        yield "the tell is no clause: write it in lower case without a mark at the end, as after 'Can you tell me'"
    if not all(all(words_of(phrase) for phrase in group) and group for group in fact.keys):
        yield "an empty key: write words with commas (all needed) or slashes (one will do) between them"
    elif not has_keys(fact.text, fact.keys):
        yield f"the fact lacks its own key {_show_keys(fact.keys)}: take the key from the words of the fact"
    for ask in asks:
        for phrase in (phrase for group in fact.keys for phrase in group):
            if contains_words(ask, phrase):
                yield f"the question {ask!r} gives the key {phrase!r} away: choose another key or reword the question"


def _show_keys(keys: tuple[tuple[str, ...], ...]) -> str:
    return repr(", ".join("/".join(group) for group in keys))


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
        for ask in (*fact.asks, fact.held_out):
            question = " ".join(words_of(ask))
            if question in seen:
                problems.append(f"{fact.place}: {ask!r} is also asked at {seen[question]}: reword one of them")
            seen.setdefault(question, fact.place)
    for fact in everything:
        for text in (fact.text, fact.also, fact.tell, *fact.asks):
            found = world.held_out.find(text)
            if found and found != " ".join(words_of(text)):  # the same question twice is reported above
                where = f"the held-out question {found!r} of {seen[found]}"
                problems.append(f"{fact.place}: {text!r} contains {where}: reword one of them")
    return problems


def _read_words(path: Path, problems: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(trained words, unseen words): sections [trained] and [unseen], words separated by spaces."""
    sections: dict[str, list[str]] = {"trained": [], "unseen": []}
    current: list[str] | None = None
    seen: set[str] = set()
    for place, line in _read_lines(path):
        if line.startswith("["):
            current = sections.get(line.strip("[]"))
            if current is None:
                problems.append(f"{place}: {line!r} is no section: write [trained] or [unseen]")
            continue
        if current is None:
            problems.append(f"{place}: words outside a section: open one with [trained] or [unseen]")
            continue
        for word in line.split():
            if not re.fullmatch(r"[a-z]{2,12}", word):
                problems.append(f"{place}: {word!r} is no word to spell: use 2 to 12 letters a to z")
            elif word in seen:
                problems.append(f"{place}: {word!r} stands in the list twice: remove one")
            else:
                seen.add(word)
                current.append(word)
    for name, words in sections.items():
        if not words:
            problems.append(f"{path.name}:1: no word in section [{name}]: add some")
    return tuple(sections["trained"]), tuple(sections["unseen"])
