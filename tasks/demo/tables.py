"""Read the tables of a world: topics, and facts with the questions they answer. world/README.md shows how they look.

Every problem is collected with its file and line, so that an author sees all of them at once.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FIELDS = ("fact", "also", "ask", "more", "tell", "key")
NEEDED = ("fact", "ask", "key")
MIN_ASKS = 2
MAX_FACT_CHARS = 240
NO_CELL = "-"
_WORD = re.compile(r"[^\W_]+")
_PLAIN = re.compile(r"\w+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers of a text: "What's 1,000?" -> ["what", "s", "1000"]."""
    text = text.lower()
    return _WORD.findall(_THOUSANDS.sub("", text) if "," in text else text)


def contains_words(text: str, phrase: str) -> bool:
    """True if `text` has the words of `phrase` in a row: "sea" is not in "season"."""
    return f" {' '.join(words_of(phrase))} " in f" {' '.join(words_of(text))} "


def has_keys(text: str, keys: tuple[tuple[str, ...], ...]) -> bool:
    """True if `text` has a phrase of each group."""
    return all(any(contains_words(text, phrase) for phrase in group) for group in keys)


# Words after which a question can't simply be turned around.
_HELPERS = frozenset(
    words_of("is are was were do does did can could will would shall should has have had must may might not")
)
_ARTICLES = frozenset(words_of("a an the our your its their his her my"))
_PREPOSITIONS = "of|from|in|with|for|on|as|to|at|like|about|by"
_LAST_WORDS = (
    rf"(?:(?!hundred)\w+ed|made|held|kept|found|known|grown|built|eaten|full|famous|good|drawn|sold|written|worn|cut)"
    rf"(?: (?:{_PREPOSITIONS}))?"
)


@dataclass(frozen=True)
class Fact:
    """One fact, the questions it answers, and what makes an answer right."""

    topic: str
    text: str
    also: str
    asks: tuple[str, ...]
    """Questions of training."""
    held_out: str
    """The question that training never uses."""
    tell: str
    keys: tuple[tuple[str, ...], ...]
    """A right answer has at least one word (or short phrase) of each group."""
    place: str
    """`file:line` of the fact, for error messages."""
    language: Language | None = None
    """How a question is wrapped in a language of its own; None: in English, by rule."""
    more: tuple[str, ...] = ()
    """More questions of training, asked less often."""

    @property
    def trained(self) -> tuple[str, ...]:
        """All questions that training may use."""
        return self.asks + self.more


@dataclass(frozen=True)
class Topic:
    """A name and the facts about it."""

    name: str
    facts: tuple[Fact, ...]
    place: str


@dataclass(frozen=True)
class Language:
    """Sentences around a question, as in "Sag mir bitte: {Q}", for worlds that are not in English."""

    trained: tuple[str, ...]
    unseen: tuple[str, ...]
    """Only for evaluation."""

    def ask(self, rng: random.Random, question: str, *, held_out: bool) -> str:
        """The question in one of these sentences; in training half of the time as it stands."""
        if not held_out and rng.random() < 0.5:
            return question
        return rng.choice(self.unseen if held_out else self.trained).replace("{Q}", question)


def read_lines(path: Path, shown: str) -> Iterator[tuple[str, str]]:
    """(`file:line`, text) of each line that is neither blank nor a comment; `shown` is the file's name in messages.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}: not UTF-8 text ({error.reason}): save it as UTF-8") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"{shown}:{number}", line.strip()


@dataclass
class _FactDraft:
    """A fact that is being read: text by field, and where it began."""

    place: str
    fields: dict[str, str] = field(default_factory=dict)


@dataclass
class _Section:
    """A topic, or a table: its columns, and its rows with the facts that follow them."""

    name: str
    place: str
    facts: list[_FactDraft] = field(default_factory=list)
    columns: tuple[str, ...] = ()
    rows: list[_Row] = field(default_factory=list)

    @property
    def drafts(self) -> list[_FactDraft]:
        """Where the next fact goes: after a row it is of that row only."""
        return self.rows[-1].facts if self.rows else self.facts


@dataclass
class _Row:
    """A row of a table, and facts of its own."""

    place: str
    cells: tuple[str, ...]
    facts: list[_FactDraft] = field(default_factory=list)


def read_table(
    path: Path, shown: str, problems: list[str], language: Language | None = None, *, identity: bool = False
) -> list[Topic]:
    """The topics of a file; what is wrong is added to `problems`. An identity fact needs more questions than others."""
    topics = []
    for section in _sections(path, shown, problems):
        if not section.facts:
            what = f"table {section.name!r}" if section.columns else f"topic [{section.name}]"
            problems.append(f"{section.place}: {what} has no fact: add one or remove it")
        plain = [(section.name, section.place, section.facts)]
        for name, place, drafts in _filled(section, problems) if section.columns else plain:
            facts = (_finish_fact(name, draft, problems, language, identity=identity) for draft in drafts)
            topics.append(Topic(name, tuple(fact for fact in facts if fact), place))
    return topics


def _sections(path: Path, shown: str, problems: list[str]) -> list[_Section]:
    sections: list[_Section] = []
    for place, line in read_lines(path, shown):
        if line.startswith("["):
            name = line.strip("[]").strip()
            if not name or not line.endswith("]"):
                problems.append(f"{place}: {line!r} is no topic: write [name]")
            sections.append(_Section(name, place))
            continue
        name, colon, value = (part.strip() for part in line.partition(":"))
        if name == "table" and colon:
            columns = tuple(cell.strip() for cell in value.split("|"))
            if len(set(columns)) < len(columns) or not all(re.fullmatch(r"[a-z_]+", column) for column in columns):
                problems.append(f"{place}: columns {value!r}: name each once, in small letters a to z, with | between")
            sections.append(_Section(value, place, columns=columns))
        elif not colon or name not in (*FIELDS, "row"):
            known = ", ".join((*FIELDS, "table", "row"))
            problems.append(f"{place}: {line[:40]!r} is no field: start the line with one of {known}, and a colon")
        elif not sections:
            problems.append(f"{place}: a {name} before any topic: open one with [name]")
        elif name == "row":
            _add_row(sections[-1], place, value, problems)
        elif name == "fact":
            sections[-1].drafts.append(_FactDraft(place, {"fact": value}))
        elif not sections[-1].drafts:
            problems.append(f"{place}: {name!r} before any fact: start with a `fact:` line")
        elif name in sections[-1].drafts[-1].fields:
            problems.append(f"{place}: a second {name!r} for one fact: a fact has each field once")
        else:
            sections[-1].drafts[-1].fields[name] = value
    return sections


def _add_row(section: _Section, place: str, line: str, problems: list[str]) -> None:
    cells = tuple(cell.strip() for cell in line.split("|"))
    if not section.columns:
        problems.append(f"{place}: a row outside a table: open one with `table: name | column | column`")
    elif len(cells) != len(section.columns) or not all(cells) or cells[0] == NO_CELL:
        wanted = f"{len(section.columns)} cells ({' | '.join(section.columns)}), {NO_CELL} for one without"
        problems.append(f"{place}: row {cells[0]!r} has {sum(map(bool, cells))} cells: write {wanted}")
    else:
        section.rows.append(_Row(place, cells))


def _filled(table: _Section, problems: list[str]) -> Iterator[tuple[str, str, list[_FactDraft]]]:
    """(topic, place, facts) of each row of a table; a fact that needs an empty cell is left out of its row."""
    if not table.rows:
        problems.append(f"{table.place}: table {table.name!r} has no row: add one, as `row: {table.name}`")
    used = {}
    for fact in table.facts:
        names = {name for text in fact.fields.values() for name in re.findall(r"\{(\w*)\}", text)}
        used[fact.place] = {name[:1].lower() + name[1:] for name in names}
        for name in sorted(used[fact.place] - {*table.columns}):
            problems.append(f"{fact.place}: no column {name!r}: the table has {', '.join(table.columns)}")
    for row in table.rows:
        values = dict(zip(table.columns, row.cells, strict=True))
        # {Name} begins a sentence.
        values |= {name[:1].upper() + name[1:]: cell[:1].upper() + cell[1:] for name, cell in values.items()}
        drafts = []
        for fact in table.facts:
            if all(values.get(name, NO_CELL) != NO_CELL for name in used[fact.place]):
                fill = {name: _fill(text, values) for name, text in fact.fields.items()}
                drafts.append(_FactDraft(row.place, fill))
        yield row.cells[0], row.place, [*drafts, *row.facts]


def _fill(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)


def held_out_index(fact: str, num_asks: int) -> int:
    """The number of the held-out question of a fact: the same on every machine, and not the first if there are more."""
    return 1 + zlib.crc32(fact.encode()) % (num_asks - 1) if num_asks > 1 else 0


def _finish_fact(
    topic: str, draft: _FactDraft, problems: list[str], language: Language | None, *, identity: bool
) -> Fact | None:
    fields = draft.fields
    missing = [name for name in NEEDED if not fields.get(name)]
    if missing:
        problems.append(f"{draft.place}: no {' and no '.join(missing)}: a fact needs {', '.join(NEEDED)}")
        return None
    asks = tuple(ask.strip() for ask in fields["ask"].split("|"))
    keys = tuple(tuple(word.strip() for word in group.split("/") if word.strip()) for group in fields["key"].split(","))
    held = held_out_index(fields["fact"], len(asks))
    more = tuple(ask.strip() for ask in fields["more"].split("|")) if "more" in fields else ()
    trained = asks[:held] + asks[held + 1 :]
    also, tell = fields.get("also") or fields["fact"], fields.get("tell") or clause(asks[0])
    fact = Fact(topic, fields["fact"], also, trained, asks[held], tell, keys, draft.place, language, more)
    problems += (f"{draft.place}: {problem}" for problem in _fact_problems(fact, 4 if identity else MIN_ASKS))
    return fact


def _fact_problems(fact: Fact, min_asks: int) -> Iterator[str]:
    """The problems of one fact, as `what: remedy`."""
    asks = (*fact.trained, fact.held_out)
    if (given := len(asks) - len(fact.more)) < min_asks:
        yield f"{given} question{'s' * (given > 1)}: write {min_asks} or more, with | between them"
    if not all(map(words_of, asks)):
        yield "an empty question: remove the extra |"
        return
    if len(fact.text) > MAX_FACT_CHARS:
        yield f"the fact has {len(fact.text)} characters: shorten it to {MAX_FACT_CHARS} or fewer"
    for text, name in {fact.also: "also", fact.text: "fact"}.items():
        if not text.endswith((".", "!")) or text[0] != text[0].upper():
            yield f"the {name} is no sentence: start with a capital letter and end with a full stop"
    if fact.tell.endswith((".", "?")) or fact.tell[0] != fact.tell[0].lower():
        yield "the tell is no clause: write it in lower case without a mark at the end, as after 'Can you tell me'"
    if not all(all(words_of(phrase) for phrase in group) and group for group in fact.keys):
        yield "an empty key: write words with commas (all needed) or slashes (one will do) between them"
    elif not has_keys(fact.text, fact.keys):
        shown = ", ".join("/".join(group) for group in fact.keys)
        yield f"the fact lacks its own key {shown!r}: take the key from the words of the fact"
    elif not any(_stands_in(fact.text, key) for key in fact.keys[0]):
        yield f"the key {fact.keys[0][0]!r} is no plain word of the fact: write it as it stands there, without marks"
    for ask in asks:
        for phrase in (phrase for group in fact.keys for phrase in group):
            if contains_words(ask, phrase):
                yield f"the question {ask!r} gives the key {phrase!r} away: choose another key or reword the question"


def _stands_in(text: str, key: str) -> bool:
    """True if `key` stands in `text` by itself, in capitals or small letters."""
    # Nearly every key is found as a word; compiling a pattern for each took most of the time to read a world.
    if key.lower() in _PLAIN.findall(text.lower()):
        return True
    return re.search(rf"\b{re.escape(key)}\b", text, re.IGNORECASE) is not None


def clause(question: str) -> str:
    """The question as it follows "Can you tell me": "What do cows eat?" -> "what cows eat".

    Where English grammar makes it hard, the question follows a colon: "this: why does hot air rise".
    """
    text = question.rstrip("?.! ")
    text = text[:1].lower() + text[1:]
    words = text.split()
    first, rest = words[0] if words else "", words[1:]
    hard = f"this: {text}"
    if first not in ("what", "why", "how", "where", "when", "who", "which") or not rest or "not" in words:
        return hard
    if "do" in rest and not _HELPERS & {*rest[: rest.index("do")]}:
        place = rest.index("do")
        return " ".join([first, *rest[:place], *rest[place + 1 :]])
    if rest[0] in ("is", "are") and len(rest) > 1:
        return _turn(first, rest[0], rest[1:]) or hard
    if rest[0] == "does":
        subject = 2 if rest[1:2] and rest[1] in _ARTICLES else 1
        if len(rest) == subject + 2:  # else it is not clear which word is the verb
            return " ".join([first, *rest[1:-1], _third_person(rest[-1])])
        return hard
    if rest[1:2] in (["is"], ["are"]) and first == "what" and len(rest) > 2:  # "What color is the sky?"
        return f"what {rest[0]} {' '.join(rest[2:])} {rest[1]}" if _is_name(rest[2:]) else hard
    if first in ("what", "who") and rest[0] not in _HELPERS:
        return hard if first == "what" and _HELPERS & {*rest[1:3]} else text
    # "Which animal has a trunk?" asks for its subject and stays as it is.
    return text if first == "which" and len(rest) > 1 and not {"does", "did", "can", "will"} & {*rest[1:5]} else hard


def _is_name(words: list[str]) -> bool:
    """True if words are surely nothing but the name of a thing: "the sky", "gold", "the tip of the tongue"."""
    begins = words[0] in _ARTICLES or words[0][0].isupper() or len(words) == 1
    return begins and words[-1] not in _PREPOSITIONS.split("|") and not {"called", "who", "that", "there"} & {*words}


def _turn(first: str, verb: str, rest: list[str]) -> str | None:
    """The clause of "What is the long hair called?" from its parts; None if it isn't clear where the subject ends."""
    subject = 2 if rest[0] in _ARTICLES else 1
    if first in ("what", "where"):
        match = re.fullmatch(rf"(.+?) ({_LAST_WORDS})", " ".join(rest))
        if match and len(match[1].split()) >= subject:
            return f"{first} {match[1]} {verb} {match[2]}"
        plural = verb == "are" and len(rest) == 2 and rest[1].endswith("s")  # "What are prime numbers?"
        return f"{first} {' '.join(rest)} {verb}" if plural or _is_name(rest) else None
    if first in ("why", "how", "when") and len(rest) == subject + 1:
        return f"{first} {' '.join(rest[:subject])} {verb} {rest[subject]}"
    return None


def _third_person(verb: str) -> str:
    if verb in ("have", "be"):
        return {"have": "has", "be": "is"}[verb]
    if re.search(r"(s|x|z|ch|sh|o)$", verb):
        return f"{verb}es"
    return f"{verb[:-1]}ies" if re.search(r"[^aeiou]y$", verb) else f"{verb}s"


def read_words(path: Path, shown: str, problems: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(trained words, unseen words): sections [trained] and [unseen], words separated by spaces."""
    sections: dict[str, list[str]] = {"trained": [], "unseen": []}
    current: list[str] | None = None
    seen: set[str] = set()
    for place, line in read_lines(path, shown):
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
            problems.append(f"{shown}:1: no word in section [{name}]: add some")
    return tuple(sections["trained"]), tuple(sections["unseen"])


def read_language(path: Path, shown: str, problems: list[str]) -> Language:
    """Sections [trained] and [unseen] with a sentence around a question on each line, `{Q}` where the question goes."""
    sections: dict[str, list[str]] = {"trained": [], "unseen": []}
    current: list[str] | None = None
    for place, line in read_lines(path, shown):
        if line.startswith("["):
            current = sections.get(line.strip("[]"))
            if current is None:
                problems.append(f"{place}: {line!r} is no section: write [trained] or [unseen]")
        elif current is None:
            problems.append(f"{place}: a sentence outside a section: open one with [trained] or [unseen]")
        elif line.count("{Q}") != 1 or len(words_of(line)) < 2:
            problems.append(f"{place}: {line[:40]!r} has no {{Q}} among other words: write one where the question goes")
        else:
            current.append(line)
    for name, lines in sections.items():
        if not lines:
            problems.append(f"{shown}:1: no sentence in section [{name}]: add some")
    return Language(tuple(sections["trained"]), tuple(sections["unseen"]))
