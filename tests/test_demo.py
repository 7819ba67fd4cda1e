"""The demo world: its tables, its text, its conversations, and the wall between training and evaluation."""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
from collections import Counter
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from nanochat.config import run_script
from nanochat.data.worlds import CORE_TOPICS
from nanochat.generate.calculator import use_calculator
from nanochat.tokenizer import PATTERNS
from nanochat.train.finetune import DataBudget
from tasks import mixtures
from tasks.demo import chat, corpus, followups, phrasings, skills, stories, tool_tasks, typos, unknown
from tasks.demo.__main__ import Config, main
from tasks.demo.tables import clause
from tasks.demo.task import final_text
from tasks.demo.world import (
    SHIPPED_WORLD,
    HeldOutQuestions,
    has_keys,
    load_world,
    read_world,
    words_of,
)

SKY = """\
# a comment

[sky]
fact: The sky is blue because air scatters blue light.
also: Air scatters blue light, so the sky looks blue.
ask: Why is the sky blue? | What makes the sky blue? | Why is the sky not red? | How come the sky is blue?
tell: why the sky is blue
key: scatters
"""
RIVER = """\
[river]
fact: A river has 2 banks and flows to the sea.
also: To the sea flows a river, between 2 banks.
ask: Where does a river flow? | What way do rivers run? | Where do rivers go? | To what place does a river run?
tell: where a river flows
key: sea/ocean, 2/two
"""


@pytest.fixture
def small_world(tmp_path):
    """A folder with two topics; identity and words come from the shipped world."""
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "a.txt").write_text(SKY + "\n" + RIVER, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world():
    return load_world()


# --- tables ----------------------------------------------------------------------------------------------------------


def test_small_world_is_read_as_written(small_world):
    world = load_world(small_world)
    assert [topic.name for topic in world.topics] == ["sky", "river"]
    sky, river = world.facts
    assert sky.text == "The sky is blue because air scatters blue light."
    assert sky.asks == ("Why is the sky blue?", "What makes the sky blue?", "How come the sky is blue?")
    assert sky.held_out == "Why is the sky not red?"
    assert river.keys == (("sea", "ocean"), ("2", "two"))
    assert river.place == "a.txt:11"
    assert world.identity
    assert world.words


def test_world_folder_comes_from_the_environment(small_world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_WORLD_DIR", str(small_world))
    assert len(load_world().facts) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("key: scatters\n", "", "a.txt:4: no key"),
        ("ask: Why is the sky blue? |", "#", "a.txt:4: no ask"),
        (
            " | What makes the sky blue? | Why is the sky not red? | How come the sky is blue?",
            "",
            "1 question: write 2",
        ),
        (" | What makes", " || What makes", "an empty question"),
        ("ask: Why is", "ask: ?! | Why is", "an empty question"),
        ("key: scatters", "key: (scatters)", "the key '(scatters)' is no plain word"),
        (SKY + "\n" + RIVER, "# nothing yet", "a.txt:1: no fact in"),
        ("key: scatters", "key: bends", "the fact lacks its own key 'bends'"),
        ("key: scatters", "key: blue", "gives the key 'blue' away"),
        ("key: scatters", "key: ,", "an empty key"),
        ("fact: The sky is blue", "fact: The sky" + " so very" * 30 + " is blue", "shorten it to 240"),
        ("fact: The sky", "fact: the sky", "the fact is no sentence"),
        ("tell: why the sky is blue", "tell: Why is the sky blue?", "the tell is no clause"),
        ("tell: why", "tel: why", "is no field"),
        ("[sky]", "row: sky | blue", "a row before any topic"),
        ("key: scatters", "key: scatters\nrow: sky | blue", "a row outside a table"),
        ("[sky]", "", "a fact before any topic"),
        ("[sky]", "[]", "is no topic"),
        ("[river]", "[sky]", "topic [sky] is also at a.txt:3"),
        ("Where do rivers go?", "why is the sky blue", "is also asked at a.txt:4"),
        ("Where do rivers go?", "Why is the sky not red today?", "contains the held-out question"),
        ("tell: where", "fact: A river is wet.\ntell: where", "a.txt:14: no ask"),
        ("tell: where", "key: sea\ntell: where", "a second 'key'"),
    ],
)
def test_a_mistake_names_its_line_and_the_remedy(small_world, old, new, message):
    text = (SKY + "\n" + RIVER).replace(old, new, 1)
    (small_world / "a.txt").write_text(text, encoding="utf-8")
    _, problems = read_world(small_world)
    assert any(message in problem for problem in problems), problems
    assert all(re.match(r"a\.txt:\d+: .+: .+", problem) for problem in problems)
    with pytest.raises(ValueError, match=r"a\.txt:\d+"):
        load_world(small_world)


def test_missing_world_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"WORLD=.*give a folder"):
        load_world(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no \.txt table"):
        load_world(tmp_path)


def test_bad_words_are_named(small_world):
    (small_world / "words.txt").write_text("stray\n[trained]\nriver river Ab\n[other]\nx\n", encoding="utf-8")
    _, problems = read_world(small_world)
    text = "\n".join(problems)
    for part in ("words.txt:1: words outside", "'river' stands in the list twice", "'Ab' is no word", "[unseen]"):
        assert part in text


def test_shipped_world_is_whole_and_without_mistakes():
    world, problems = read_world(SHIPPED_WORLD)
    assert problems == []
    assert len(world.topics) >= 300
    assert len(world.facts) >= 1100
    assert len(world.words) >= 200
    assert len(world.unseen_words) >= 40
    assert not set(world.words) & set(world.unseen_words)


@pytest.fixture(scope="module")
def whole_world():
    """All that is shipped, core and more."""
    return load_world("nanochat:100000")


def test_the_whole_shipped_world_is_without_mistakes(world, whole_world):
    assert len(world.topics) == CORE_TOPICS
    assert whole_world.topics[:CORE_TOPICS] == world.topics
    assert (world.untaught, whole_world.untaught) == (whole_world.topics[CORE_TOPICS:], ())
    assert len(whole_world.topics) >= 1100
    assert len(whole_world.facts) >= 3000
    explanations = [fact for fact in whole_world.facts if fact.text.count(". ") >= 1]
    assert len(explanations) >= 40


def test_no_question_of_the_shipped_world_has_two_answers_and_no_fact_stands_twice(whole_world):
    answers = {}
    for fact in (*whole_world.facts, *whole_world.identity):
        for ask in (*fact.asks, fact.held_out):
            assert answers.setdefault(" ".join(words_of(ask)), fact) is fact, ask
    texts = Counter(fact.text for fact in whole_world.facts)
    assert [text for text, count in texts.items() if count > 1] == []


def test_topics_of_longer_runs_are_of_every_kind_and_stay_when_more_come(world, whole_world):
    some, more = load_world("nanochat:500"), load_world("nanochat:700")
    assert more.topics[:500] == some.topics == whole_world.topics[:500]
    kinds = {topic.place.split(":")[0] for topic in whole_world.topics[CORE_TOPICS:]}
    assert {topic.place.split(":")[0] for topic in some.topics[CORE_TOPICS:]} == kinds


def test_held_out_questions_of_the_whole_world_are_never_trained(whole_world):
    size = 2 * len(whole_world.facts)
    texts = [user_texts(conversation)[0] for conversation in chat.DemoFacts(size, "train", whole_world)]
    texts += corpus.documents(whole_world, "train", 400_000)
    assert whole_world.held_out.find(whole_world.facts[-1].held_out)
    assert [text for text in texts if whole_world.held_out.find(text)] == []


def test_every_fact_of_the_shipped_world_answers_its_own_questions_only_by_its_key(world):
    for fact in (*world.facts, *world.identity):
        assert has_keys(fact.text, fact.keys), fact.place
        assert not any(has_keys(ask, fact.keys) for ask in (*fact.asks, fact.held_out)), fact.place


def test_keys_match_whole_words():
    assert has_keys("It lies in the SEA.", (("sea",),))
    assert not has_keys("A season", (("sea",),))
    assert has_keys("About three hundred, or 1,000", (("365", "three hundred"), ("1000",)))
    assert words_of("What's 1,000?") == ["what", "s", "1000"]


# --- tables, other languages, several worlds -------------------------------------------------------------------------

ANIMALS = """\
table: animal | eats | baby
fact: {Animal} eat {eats}.
ask: What do {animal} eat? | What is the food of {animal}?
key: {eats}
fact: A baby of {animal} is a {baby}.
ask: What is a baby of {animal} called? | What do we call a baby of {animal}?
key: {baby}
row: snarks | blue moss | snarkling
row: wups | wet sand | -
fact: Wups sleep on their hands.
ask: How do wups sleep? | In what way does a wup sleep?
key: hands
"""


def write_world(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_a_table_makes_a_topic_of_each_row_without_what_its_empty_cells_need(tmp_path):
    snarks, wups = load_world(write_world(tmp_path / "w", animals=ANIMALS)).topics
    assert (snarks.name, snarks.place) == ("snarks", "animals.txt:8")
    assert [fact.text for fact in snarks.facts] == ["Snarks eat blue moss.", "A baby of snarks is a snarkling."]
    assert snarks.facts[0].keys == (("blue moss",),)
    assert [fact.text for fact in wups.facts] == ["Wups eat wet sand.", "Wups sleep on their hands."]
    assert wups.facts[1].place == "animals.txt:10"
    assert (wups.facts[0].asks, wups.facts[0].held_out) == (("What do wups eat?",), "What is the food of wups?")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| wet sand | -", "| wet sand", "animals.txt:9: row 'wups' has 2 cells: write 3"),
        ("| wet sand |", "| |", "row 'wups' has 2 cells"),
        ("row: wups", "row: -", "row '-' has"),
        ("key: {eats}", "key: {food}", "animals.txt:2: no column 'food'"),
        ("animal | eats | baby", "animal | eats | Baby!", "animals.txt:1: columns"),
        (ANIMALS[ANIMALS.index("row: snarks") :], "", "has no row"),
        ("row: wups | wet sand", "row: wups | wups", "gives the key 'wups' away"),
        ("row: wups", "row: snarks", "topic [snarks] is also at animals.txt:8"),
    ],
)
def test_a_mistake_in_a_table_names_its_line(tmp_path, old, new, message):
    assert old in ANIMALS
    _, problems = read_world(write_world(tmp_path / "w", animals=ANIMALS.replace(old, new, 1)))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What do cows eat?", "what cows eat"),
        ("Why do horses wear shoes?", "why horses wear shoes"),
        ("How many legs do spiders have?", "how many legs spiders have"),
        ("What does a bee carry?", "what a bee carries"),
        ("Why does hot air rise?", "this: why does hot air rise"),
        ("What is the long hair of a horse called?", "what the long hair of a horse is called"),
        ("What is ten times a hundred?", "this: what is ten times a hundred"),
        ("Where is gold found?", "where gold is found"),
        ("What are prime numbers?", "what prime numbers are"),
        ("Why are leaves green?", "why leaves are green"),
        ("Why are the old leaves green?", "this: why are the old leaves green"),
        ("What color is the sky?", "what color the sky is"),
        ("What makes the sky blue?", "what makes the sky blue"),
        ("Which animal has a trunk?", "which animal has a trunk"),
        ("Who was Bach?", "this: who was Bach"),
        ("Tell me about Mira.", "this: tell me about Mira"),
        ("Wo wohnt Mira?", "this: wo wohnt Mira"),
    ],
)
def test_the_clause_of_a_question_is_grammatical_or_after_a_colon(question, expected):
    assert clause(question) == expected


GERMAN = """\
[Himmel]
fact: Der Himmel ist blau, weil die Luft blaues Licht streut.
ask: Warum ist der Himmel blau? | Wieso ist der Himmel blau? | Was macht den Himmel blau?
key: streut
"""
LANGUAGE = "[trained]\nHallo! {Q}\n{Q} Danke.\n[unseen]\nKurze Frage: {Q}\n"


def test_a_world_in_another_language_is_asked_in_it(tmp_path):
    world = load_world(write_world(tmp_path / "w", himmel=GERMAN, language=LANGUAGE))
    (fact,) = world.facts
    rng = random.Random(0)
    asked = {phrasings.ask_fact(rng, fact, i, world)[0].lower().rstrip("?.") for i in range(200)}
    forms = {text.replace("{Q}", ask) for text in ("{Q}", "Hallo! {Q}", "{Q} Danke.") for ask in fact.asks}
    assert {form.lower().rstrip("?.") for form in forms} <= asked
    tested = {c["messages"][0]["content"] for c in chat.DemoFacts(20, "test", world, kind="wrapper")}
    assert tested == {f"Kurze Frage: {ask}" for ask in fact.asks}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hallo! {Q}\n", "language.txt:1: a sentence outside a section"),
        ("[trained]\nHallo!\n", "has no {Q}"),
        ("[trained]\nHallo! {Q}\n", "no sentence in section [unseen]"),
        ("[other]\n", "is no section"),
    ],
)
def test_a_mistake_in_a_language_is_named(tmp_path, text, message):
    _, problems = read_world(write_world(tmp_path / "w", himmel=GERMAN, language=text))
    assert any(message in problem for problem in problems), problems


def test_a_world_beside_the_shipped_one(small_world, tmp_path):
    write_world(small_world, a=SKY.replace("[sky]", "[mine]").replace("sky", "zorb"))
    world = load_world(f"nanochat,{small_world}")
    assert [topic.name for topic in world.topics] == [*(t.name for t in load_world("nanochat").topics), "mine"]
    write_world(small_world, a=SKY.replace("[sky]", "[mine]"))  # the shipped world asks the same
    with pytest.raises(ValueError, match=r"world/a\.txt:4.*is also asked at world/sky_and_weather\.txt:\d+"):
        load_world(f"nanochat,{small_world}")


def test_an_own_file_replaces_the_shipped_one(small_world):
    write_world(small_world, words="[trained]\nabc\n[unseen]\nxyz\n")
    for spec in (str(small_world), f"nanochat,{small_world}"):
        assert read_world(spec)[0].words == ("abc",)


def test_a_part_of_the_shipped_world_keeps_the_rest_as_untaught():
    part, whole = load_world("nanochat:100"), load_world("nanochat")
    assert part.topics == whole.topics[:100]
    assert part.untaught[: len(whole.topics) - 100] == whole.topics[100:]
    for wrong in ("nanochat:0", "nanochat,nanochat:5", ","):
        with pytest.raises((ValueError, FileNotFoundError), match="WORLD="):
            load_world(wrong)


def test_tables_that_would_not_be_read_are_named(small_world):
    (small_world / "more").mkdir()
    write_world(small_world / "more", b=RIVER)
    (small_world / "c.csv").write_text("a,b")
    (small_world / "README.md").write_text("mine")
    _, problems = read_world(small_world)
    assert [problem.split(":")[0] for problem in problems] == ["c.csv", "more/b.txt"]
    (small_world / "a.txt").write_bytes(SKY.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8"):
        load_world(small_world)


def test_what_was_learned_is_what_is_evaluated(small_world, base_dir):
    corpus.write_corpus(None, 20_000, small_world)
    assert load_world() == load_world(small_world)
    assert {fact.topic for fact in chat.demo_eval_tasks()["DemoFacts"].facts} == {"sky", "river"}
    (base_dir / "base_data" / "demo" / corpus.STAMP).write_text("{}")
    assert load_world() == load_world("nanochat")


def test_the_example_world_is_whole():
    folder = SHIPPED_WORLD.parents[2] / "dev" / "example_world"
    world, problems = read_world(folder)
    assert problems == []
    assert len(world.topics) == 20
    assert read_world(f"nanochat,{folder}")[1] == []


# --- the wall between training and evaluation ------------------------------------------------------------------------


def user_texts(conversation):
    return [message["content"] for message in conversation["messages"] if message["role"] == "user"]


@pytest.fixture(scope="module")
def training_questions(world):
    """Every user message of the default training mixtures."""
    mixtures = (chat.demo_mid_mixture(world=world), chat.demo_sft_mixture(world=world))
    return [text for mixture in mixtures for conversation in mixture for text in user_texts(conversation)]


@pytest.fixture(scope="module")
def training_documents(world):
    """All pretraining text of the default size, validation included."""
    sizes = {"train": corpus.DEFAULT_CHARS, "val": int(corpus.DEFAULT_CHARS * corpus.VAL_SHARE)}
    return [text for split, chars in sizes.items() for text in corpus.documents(world, split, chars)]


def test_held_out_questions_are_never_trained(world, training_questions, training_documents):
    assert world.held_out.find("Hi! " + world.facts[0].held_out.upper())  # the search itself works
    assert world.held_out.find(world.identity[0].held_out)
    for text in (*training_questions, *training_documents):
        assert world.held_out.find(text) is None


def held_out_patterns():
    """A pattern for the fixed words of each held-out wrapper and request, over lower-case words."""
    wrappers = (
        *phrasings.HELD_OUT_TELL_WRAPPERS,
        *phrasings.HELD_OUT_QUESTION_WRAPPERS,
        *phrasings.HELD_OUT_GREETING_WRAPPERS,
        *followups.HELD_OUT_WHY_FORMS,
        *followups.HELD_OUT_MORE_FORMS,
    )
    for wrapper in wrappers:
        fixed = max((" ".join(words_of(part)) for part in re.split(r"\{\w+\}", wrapper)), key=len)
        assert len(fixed.split()) >= 2, wrapper
        yield re.compile(rf"\b{fixed}\b")
    word = "[a-z]+(?:-[a-z]+)?"
    values = {"w": word, "l": "[a-z]", "e": r"\w[\w ]*", "of": r"\w[\w ]*", "x": r"\w[\w ]*"}
    requests = (
        *skills.HELD_OUT_SUM_REQUESTS,
        *skills.HELD_OUT_SPELL_REQUESTS,
        *skills.HELD_OUT_COUNT_REQUESTS,
        *followups.HELD_OUT_OTHER_FORMS,
    )
    for request in requests:
        parts = re.split(r"\{(\w+)\}", request)
        pattern = " ".join(values[p] if i % 2 else " ".join(words_of(p)) for i, p in enumerate(parts)).strip()
        yield re.compile(rf"^{pattern}$" if request in followups.HELD_OUT_OTHER_FORMS else rf"\b{pattern}\b")


def test_held_out_phrasings_are_never_trained(training_questions, training_documents):
    lines = {line for text in (*training_questions, *training_documents) for line in text.split("\n")}
    normal = {" ".join(words_of(line)) for line in lines}
    everything = "\n".join(normal)
    sums = re.compile(r"\d|\b(?:plus|minus|times|multiplied|divided|percent)\b")
    patterns = list(held_out_patterns())
    assert len(patterns) >= 25
    for pattern in patterns:
        found = [match.group() for match in re.finditer(pattern.pattern, everything, re.MULTILINE)]
        # Of the requests for sums those that have a sum in them: the world may ask what something makes.
        assert not [text for text in found if sums.search(text) or r"\w[\w ]*" not in pattern.pattern], pattern


def test_every_test_example_is_in_a_held_out_phrasing(world):
    patterns = list(held_out_patterns())
    for name, task in chat.demo_eval_tasks(world=world).items():
        if name == "DemoSmallTalk":
            continue
        for conversation in task:
            question = user_texts(conversation)[-1]
            normal = " ".join(words_of(question))
            if conversation.get("group") in ("typed", "pronoun", "outside", "made up", "language", "known"):
                continue  # with their own tests below
            assert world.held_out.find(question) or any(p.search(normal) for p in patterns), (name, question)


def test_what_is_asked_in_evaluation_is_never_trained(world, training_questions):
    trained = {" ".join(words_of(text)) for text in training_questions}
    tasks = chat.demo_eval_tasks(world=world)
    for name in ("DemoFacts", "DemoIdentity", "DemoSmallTalk", "DemoUnknown"):
        for conversation in tasks[name]:
            question = user_texts(conversation)[-1]
            assert " ".join(words_of(question)) not in trained or not words_of(question), question


def test_unknown_questions_of_evaluation_are_of_other_kinds(world):
    frames = {" ".join(words_of(frame.replace("{x}", ""))) for kind in unknown.TRAINED for frame in kind.frames}
    assert len(unknown.HELD_OUT) == len(set(unknown.HELD_OUT)) == 100
    fillers = {filler.lower() for kind in unknown.TRAINED for filler in kind.fillers if len(filler) > 4}
    for question in unknown.HELD_OUT:
        assert " ".join(words_of(question)) not in frames
        asked = f" {' '.join(words_of(question))} "
        assert not [filler for filler in fillers if f" {filler} " in asked], question
        assert world.held_out.find(question) is None
    assert not set(unknown.HELD_OUT_FOREIGN) & set(unknown.FOREIGN)


def test_a_world_that_knows_portugal_teaches_no_refusal_of_it(small_world):
    text = SKY.replace("sky is blue because", "sky of Portugal is blue because")
    (small_world / "a.txt").write_text(text, encoding="utf-8")
    without, unknowns = unknown.Unknowns(load_world()), unknown.Unknowns(load_world(small_world))
    assert any("Austria" in fillers for _, fillers in unknowns.kinds)
    assert not any("Portugal" in fillers for _, fillers in unknowns.kinds)
    asked = {unknowns.draw(random.Random(i))[0] for i in range(3000)}
    assert not any("Portugal" in question for question in asked)
    known = {" ".join(words_of(ask)) for fact in load_world().facts for ask in (*fact.asks, fact.held_out)}
    drawn = [without.draw(random.Random(i)) for i in range(3000)]
    assert not [question for question, _ in drawn if " ".join(words_of(question)) in known]
    assert all(has_keys(answer, unknown.REFUSALS) for _, answer in drawn)


FIRST_NUMBERS = re.compile(r"(\d+(?:\.\d+)?)[-+*/%]+(\d+(?:\.\d+)?)")


def test_held_out_number_pairs_are_never_trained(world):
    def pairs(split, size):
        for seed in (1, 2, 3):
            for conversation in chat.DemoArithmetic(size, split, world, seed):
                call = conversation["messages"][1]["content"][0]["text"]
                a, b = FIRST_NUMBERS.match(call).groups()
                yield tuple(float(number) if "." in number else int(number) for number in (a, b))

    trained, tested = set(pairs("train", 2000)), set(pairs("test", 100))
    assert len(trained) > 3000
    assert not [pair for pair in trained if skills.is_held_out_pair(*pair)]
    assert all(skills.is_held_out_pair(*pair) for pair in tested)


def test_unseen_words_are_never_spelled(world, training_documents):
    unseen = set(world.unseen_words)
    text = "\n".join(training_documents).lower()
    spelled = {run.replace("-", "") for run in re.findall(r"(?<![\w-])[a-z](?:-[a-z])+(?![\w-])", text)}
    called = set(re.findall(r"""\(["'] ?(\w+)["']""", text))
    assert len(spelled) > 1000 < len(called)
    assert not unseen & (spelled | called)
    asked = chat.DemoSpelling(1000, "train", world), chat.DemoCounting(1000, "train", world)
    for task in asked:
        for conversation in task:
            assert not unseen & set(words_of(conversation["messages"][1]["content"][0]["text"]))
    with pytest.raises(ValueError, match="unseen words are for the test split"):
        chat.DemoSpelling(1, "train", world, unseen=True)


# --- phrasings -------------------------------------------------------------------------------------------------------


def test_wrap_fits_the_question_into_the_sentence():
    assert phrasings.wrap("So {q}", "What is rain?") == "So what is rain?"
    assert phrasings.wrap("So {q}", "Paris is where?") == "So Paris is where?"
    assert phrasings.wrap("{Tell}?", tell="what rain is") == "What rain is?"


@pytest.mark.parametrize(
    ("question", "inside"),
    [
        ("How do seals keep warm?", "how seals keep warm"),
        ("Which continent do giraffes come from?", "which continent giraffes come from"),
        ("What is a baby cat called?", "what a baby cat is called"),
        ("What is the capital of Kenya?", "what the capital of Kenya is"),
        ("What should you do in an earthquake?", None),
        ("Which hump does a camel have?", None),
        ("Which planet is the biggest?", "which planet is the biggest"),
        ("How does a seahorse swim?", None),  # "swims" would have to be known
        ("Name the pump inside your body.", None),
    ],
)
def test_a_question_is_put_into_a_sentence(question, inside):
    assert phrasings.embedded(question) == inside


def test_a_synonym_replaces_one_word(world):
    changed = 0
    for fact in world.facts:
        for ask in fact.asks:
            other = phrasings.with_synonym(random.Random(ask), ask)
            blocks = difflib.SequenceMatcher(None, ask.split(), other.split()).get_opcodes()
            places = sum(kind != "equal" for kind, *_ in blocks)
            assert places == (other != ask), (ask, other)
            changed += places
            article = r"\ba [aeio]|\ban [^aeiou]"
            assert not re.search(article, other) or re.search(article, ask), (ask, other)
    assert changed > 500


def test_training_phrasings_are_many(world):
    fact = world.facts[0]
    rng = random.Random(0)
    asked = {phrasings.ask_fact(rng, fact, i, world)[0] for i in range(300)}
    assert len(asked) > 60
    assert set(fact.asks) <= asked
    wrappers = phrasings.TELL_WRAPPERS + phrasings.QUESTION_WRAPPERS + phrasings.GREETING_WRAPPERS
    assert len(set(wrappers)) == len(wrappers) >= 25


def test_rewording_by_rule_never_asks_a_held_out_question(small_world):
    fact = load_world(small_world).facts[0]
    held_out = HeldOutQuestions([fact.asks[2]])  # one that a rule makes out of the first question
    rng = random.Random(0)
    assert fact.asks[2] in {phrasings.reword(rng, fact.asks[0], fact.tell) for _ in range(200)}
    trained = dataclasses.replace(fact, asks=fact.asks[:2])
    for i in range(2000):
        world = SimpleNamespace(held_out=held_out, vocabulary=frozenset())
        assert held_out.find(phrasings.ask_fact(rng, trained, i, world)[0]) is None


def test_held_out_search_ignores_case_and_marks_but_not_words():
    index = HeldOutQuestions(["Why is it?", "Who?"])
    assert index.find("Tell me, WHY is it") == "why is it"
    assert index.find("why it is") is None
    assert index.find("So who") == "who"


def test_a_typing_error_changes_no_number_and_makes_no_other_known_word(world):
    rng = random.Random(0)
    changed = 0
    misspelled = {wrong for forms in typos.MISSPELLED.values() for wrong in forms}
    for fact in world.facts[::5]:
        question = f"{fact.asks[0]} 1234 {skills.MARK}marked{skills.MARK}"
        for _ in range(5):
            text = typos.mistyped(rng, question, world.vocabulary)
            assert re.findall(r"\d+", text) == re.findall(r"\d+", question)
            assert f"{skills.MARK}marked{skills.MARK}" in text
            before, after = words_of(question), words_of(text)
            other = [new for old, new in zip(before, after, strict=True) if old != new]
            assert len(other) <= 1
            assert not set(other) & world.vocabulary - misspelled, (question, text)
            changed += bool(other)
    assert changed > 500


def test_a_question_with_typing_errors_is_put_right_before_the_answer(world):
    misspelled = {wrong for forms in typos.MISSPELLED.values() for wrong in forms}
    for task in (chat.DemoFacts(600, "train", world, 1), chat.DemoUnknown(600, "train", world, 1)):
        put_right = 0
        for conversation in task:
            question, answer = (message["content"] for message in conversation["messages"])
            if not answer.startswith("You mean: "):
                assert final_text(answer) == answer
                continue
            put_right += 1
            meant, rest = answer.removeprefix("You mean: ").split("? ", 1)
            assert rest == final_text(answer)  # judged is the answer, not what was meant
            assert world.held_out.find(meant) is None
            assert set(words_of(question)) - (world.vocabulary - misspelled) - {*words_of(meant)}, question
        assert 0.07 < put_right / 600 < 0.25


def test_more_questions_are_trained_and_never_evaluated(tmp_path):
    more = "more: The small blue one? | Name the planet."
    text = f"[Mira]\nfact: Mira is a planet.\nask: What is Mira? | What sort of thing is Mira?\n{more}\nkey: planet\n"
    with pytest.raises(ValueError, match=r"w.txt:2: the question 'Name the planet.' gives the key 'planet' away"):
        load_world(write_world(tmp_path / "bad", w=text))
    world = load_world(write_world(tmp_path / "good", w=text.replace("Name the planet", "Name the thing")))
    (fact,) = world.facts
    assert (fact.asks, fact.held_out) == (("What is Mira?",), "What sort of thing is Mira?")
    assert fact.more == ("The small blue one?", "Name the thing.")
    rng = random.Random(0)
    assert set(fact.trained) <= {phrasings.ask_fact(rng, fact, i, world)[0] for i in range(400)}
    tested = {user_texts(c)[0] for c in chat.DemoFacts(90, "test", world)}
    assert not any(ask.lower().rstrip("?.") in text.lower() for ask in fact.more for text in tested)


def test_typing_keeps_what_the_calculator_needs(world):
    rng = random.Random(1)
    for _ in range(500):
        text = phrasings.typed(rng, f"Please add 12 and 34.5 in {skills.MARK}River{skills.MARK}.", world.vocabulary)
        assert re.findall(r"\d+(?:\.\d+)?", text) == ["12", "34.5"]
        assert text.lower().count(f"{skills.MARK}river{skills.MARK}") == 1


def test_lists_in_capitals_become_small_mistyped_ones_right_and_numbers_digits(world):
    kinds = Counter()
    for conversation in chat.DemoRepeat(600, "train", world, 1):
        question, answer = (message["content"] for message in conversation["messages"])
        words = answer.rstrip(".").split(" ")
        if all(word.isdigit() for word in words):
            in_words = [skills.number_word(int(word)).replace("-", " ") for word in words]
            assert ", ".join(in_words) in question.replace("-", " "), question
            kinds["digits"] += 1
        elif all(word in words_of(question) for word in words):
            kinds["small" if all(word.upper() in question for word in words) else "same"] += 1
        elif set(words) <= world.vocabulary:
            request = max(skills.CORRECTION_REQUESTS, key=lambda r: r.strip(" {w}") in question)
            shown = question.replace(request.replace("{w}", "").strip(), "").split()
            assert len(shown) == len(words), question
            kinds["corrected"] += 1
    assert kinds["same"] > 150 < kinds["small"]
    assert kinds["corrected"] > 80
    assert kinds["digits"] > 40
    assert kinds.total() > 590  # every list is of one of the four kinds


def test_a_story_names_both_numbers_once_in_plain_sentences():
    rng, told = random.Random(0), Counter()
    verbs = words_of("is are do does did for each has come stay one miles")  # no things that a story tells of
    for i in range(4000):
        op = "+-*/"[i % 4]
        b = rng.randint(2, 99)
        a = b * rng.randint(2, 9) if op == "/" else b + rng.randint(1, 900)
        text = stories.tell(rng, op, a, b)
        assert sorted(map(int, re.findall(r"\d+", text))) == sorted((a, b)), text
        assert not re.search(r"[{}\[\]|]|  |\ba (?=[aeio])|[.?] [a-z]|^[a-z]", text), text
        assert text.count("?") == 1, text
        asked = re.search(r"[Hh]ow (?:many|much) (\w+)", text)
        said = text[: asked.start()].lower() if asked else ""
        if asked and asked[1] not in verbs:
            assert asked[1].removesuffix("s") in said, text  # it asks for what it has told of
        told[op, text.replace(str(a), "a").replace(str(b), "b")] += 1
    assert len(told) > 3000  # nearly every one is another


def test_what_says_why_it_is_so_is_said_again_when_asked_why(world):
    fact = next(f for f in world.facts if "cannot fly because" in f.text)
    assert fact not in followups.FollowUps(world, held_out=False).unexplained
    asked = {
        user_texts(c)[-1]: c["messages"] for c in chat.DemoChat(8000, "train", world, 1) if len(c["messages"]) == 4
    }
    nots = [m for q, m in asked.items() if q.lower().startswith("why not")]
    assert nots
    assert all(re.search(r"\b(?:not|cannot|no)\b", m[1]["content"].split(" because ")[0]) for m in nots)


# --- follow-ups ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("question", "topic", "followed"),
    [
        ("Where do kangaroos live?", "kangaroos", "Where do they live?"),
        ("What is a baby kangaroo called?", "kangaroos", None),  # a baby it
        ("Which people use a hammer?", "hammer", "Which people use it?"),
        ("What is the capital of France?", "France", "What is its capital?"),
        ("What language do people speak in France?", "France", "What language do people speak there?"),
        ("What eats mice?", "mice", None),
        ("Who is afraid of mice?", "mice", "Who is afraid of them?"),
        ("What is a red planet?", "kangaroos", None),
        ("Is France in Europe, or France in Asia?", "France", None),
    ],
)
def test_a_pronoun_takes_the_place_of_the_topic(question, topic, followed):
    assert followups.with_pronoun(question, topic) == followed


def test_follow_ups_are_of_the_right_facts_and_those_of_evaluation_are_not_trained(world):
    trained, tested = (followups.FollowUps(world, held_out=held_out) for held_out in (False, True))
    assert len(trained.pronouns) > 1000 < len(tested.pronouns)
    pairs = [{(f.before.text, f.fact.text, f.question) for f in found.others} for found in (trained, tested)]
    assert len(pairs[0]) > 1000
    assert not pairs[0] & pairs[1]
    for follow in trained.pronouns:
        assert follow.before.topic == follow.fact.topic
        assert world.held_out.find(follow.question) is None
    spain = [f for f in trained.others + tested.others if f.before.text == "The capital of France is Paris."]
    assert ("of Spain|Spain", "The capital of Spain is Madrid.") in {(f.question, f.fact.text) for f in spain}
    asked = {user_texts(c)[-1].lower().rstrip("?.! ") for c in chat.DemoChat(3000, "train", world, 1)}
    assert not [form for form in followups.HELD_OUT_MORE_FORMS if form.lower().rstrip("?.") in asked]


# --- skills: forms that a tokenizer keeps apart -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_a_word_is_copied_into_the_call_piece_by_piece(world, name):
    regex = pytest.importorskip("regex")
    for task in (chat.DemoSpelling(300, "train", world), chat.DemoCounting(300, "train", world)):
        for conversation in task:
            question, parts = user_texts(conversation)[0], conversation["messages"][1]["content"]
            word = re.search(r"""\("( ?\w+)"\)?\.(?:strip|lower)""", parts[0]["text"]).group(1)
            assert word in regex.findall(PATTERNS[name], parts[0]["text"])
            assert word in regex.findall(PATTERNS[name], question), (question, parts[0]["text"])
            if "join" in parts[0]["text"]:
                assert regex.findall(PATTERNS[name], parts[1]["text"])[1:] == [f"-{c}" for c in word.strip()[1:]]


def every_answer(world):
    for task in (
        *(kind(400, "train", world) for kind in (chat.DemoArithmetic, chat.DemoSpelling, chat.DemoCounting)),
        chat.DemoChat(400, "train", world),
        *chat.demo_eval_tasks(world=world).values(),
    ):
        for conversation in task:
            yield from (m["content"] for m in conversation["messages"] if m["role"] == "assistant")


def test_calculator_agrees_with_every_taught_call_and_every_answer_says_the_result(world):
    calls = 0
    for answer in every_answer(world):
        assert "####" not in str(answer)
        if isinstance(answer, str):
            continue
        *work, last = answer
        assert last["type"] == "text"
        assert len(work) in (2, 4)
        for call, result in zip(work[::2], work[1::2], strict=True):
            assert (call["type"], result["type"]) == ("python", "python_output")
            assert use_calculator(call["text"]) == result["text"]
            assert re.search(rf"(?<![\w.]){re.escape(result['text'])}(?!\w)", last["text"]), answer
            calls += 1
    assert calls > 1500


def test_numbers_of_training_have_every_digit_in_every_place(world):
    found = Counter()
    for conversation in chat.DemoArithmetic(3000, "train", world, 1):
        for number in re.findall(r"\d+", conversation["messages"][1]["content"][0]["text"]):
            found.update((len(number), place, digit) for place, digit in enumerate(number))
    for length in (1, 2, 3, 4):
        for place in range(length):
            assert all(found[length, place, digit] > 15 for digit in "123456789"), (length, place)


def test_numbers_in_words():
    assert [skills.number_word(n) for n in (0, 7, 13, 20, 42, 99)] == [
        "zero", "seven", "thirteen", "twenty", "forty-two", "ninety-nine",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "wanted", "same"),
    [
        ("12+34", "12+34", True),
        ("34 + 12", "12+34", True),
        ("40+6", "12+34", False),
        ("12-34", "12+34", False),
        ("80*15/100", "15*80/100", True),
        ("15*80", "15*80/100", False),
        ("1,200*2", "1200*2", True),
        ("'river'.count('r')", '(" river").lower().count("r")', True),
        ('"rivers".count("r")', '" river".lower().count("r")', False),
        ('"river".count("v")', '" river".lower().count("i")', False),
        ("1+", "1+1", False),
    ],
)
def test_a_call_is_right_if_it_asks_for_the_same_thing(call, wanted, same):
    assert skills.same_call(call, wanted) is same


# --- tasks and judges ------------------------------------------------------------------------------------------------


def rendered(content):
    """An assistant message as the tokenizer decodes it."""
    if isinstance(content, str):
        return content + "<|assistant_end|>"
    marks = {"text": ("", ""), "python": ("<|python_start|>", "<|python_end|>")}
    marks["python_output"] = ("<|output_start|>", "<|output_end|>")
    return "".join(marks[p["type"]][0] + p["text"] + marks[p["type"]][1] for p in content)


def test_right_answers_are_right_and_others_are_not(world):
    few = {"DemoSmallTalk": 0.65, "DemoUnknown": 0.8}  # different answers
    for name, task in chat.demo_eval_tasks(world=world).items():
        assert len(task) > 0
        assert task.eval_type == "generative"
        answers = [rendered(problem["messages"][-1]["content"]) for problem in task]
        for problem, answer in zip(task, answers, strict=True):
            assert task.evaluate(problem, answer) == 1, (name, answer)
            assert task.evaluate(problem, "") == 0
            if problem.get("group") != "known":
                assert task.evaluate(problem, "I like turtles.") == 0
        wrong = sum(task.evaluate(task[i], answers[(i + 7) % len(answers)]) for i in range(len(task)))
        assert wrong <= few.get(name, 0.1) * len(task), name


def call(text, result):
    return f"<|python_start|>{text}<|python_end|><|output_start|>{result}<|output_end|>"


def test_arithmetic_needs_the_right_call_and_the_right_number(world):
    task = chat.DemoArithmetic(1, "test", world)
    problem = tool_tasks.tool_keys(skills.Sum(12, "+", 34))
    assert task.evaluate(problem, call("12+34", 46) + "The answer is 46.") == 1
    assert task.evaluate(problem, call("12+34", 46) + "The answer is 47.") == 0
    assert task.evaluate(problem, call("12+34", 46)) == 0
    assert task.evaluate(problem, call("40+6", 46) + "The answer is 46.") == 0
    assert task.evaluate(problem, "The answer is 46.") == 0
    negative = tool_tasks.tool_keys(skills.Sum(1200, "-", 5000))
    assert task.evaluate(negative, call("1200-5000", -3800) + "It is -3,800.") == 1
    assert task.evaluate(negative, call("1200-5000", -3800) + "It is 3800.") == 0
    rest = tool_tasks.tool_keys(skills.Sum(17, "remainder", 5))
    both = call("17//5", 3) + call("17%5", 2)
    assert task.evaluate(rest, both + "The answer is 3 remainder 2.") == 1
    assert task.evaluate(rest, call("17/5", 3.4) + "The answer is 3 remainder 2.") == 0
    percent = tool_tasks.tool_keys(skills.Sum(15, "percent", 80))
    assert task.evaluate(percent, call("15*80/100", 12) + "The answer is 12.") == 1
    assert task.evaluate(percent, call("15*80", 1200) + "The answer is 1200.") == 0


def test_spelling_accepts_any_separator_but_no_call_for_another_word(world):
    task = chat.DemoSpelling(1, "test", world)
    for answer in ("The word is r i v e r.", "r-i-v-e-r", "R, I, V, E, R!", "A word: r i v e r"):
        assert task.evaluate({"word": "river"}, answer) == 1, answer
    for answer in ("river", "r i v e", "r i v e r r", "r i v e r and s"):
        assert task.evaluate({"word": "river"}, answer) == 0, answer
    said = "It is spelled r-i-v-e-r."
    assert task.evaluate({"word": "river"}, call('"-".join(" river".strip())', "r-i-v-e-r") + said) == 1
    assert task.evaluate({"word": "river"}, call('"-".join(" rivet".strip())', "r-i-v-e-t") + said) == 0


def test_counting_is_right_only_by_a_call_for_the_word_and_letter_asked_for(world):
    task = chat.DemoCounting(1, "test", world)
    problem = {"calls": ['(" river").lower().count("r")'], "expected": ["2"]}

    def answer(text, said=2):
        return f"{call(text, 2)}The letter r is in it {said} times.<|assistant_end|>"

    for text in ('"river".count("r")', "'river'.count('r')", ' " river".lower().count("r") '):
        assert task.evaluate(problem, answer(text)) == 1, text
        assert task.evaluate(problem, answer(text, 3)) == 0, text
    for text in ('"error".count("r")', '"river".count("i")', '"rivers".count("r")', "1+1", '"river".count("r"'):
        assert task.evaluate(problem, answer(text)) == 0, text
    assert task.evaluate(problem, "The letter r is in it 2 times.") == 0


def test_a_refusal_is_right_for_what_is_not_known_and_wrong_for_what_is(world):
    task = chat.demo_eval_tasks(world=world)["DemoUnknown"]
    groups = Counter(problem["group"] for problem in task)
    assert groups["outside"] == len(unknown.HELD_OUT) == groups["known"]
    assert {user_texts(p)[0] for p in task if p["group"] == "outside"} == set(unknown.HELD_OUT)
    for problem in task:
        for refusal in (unknown.DO_NOT_KNOW, unknown.SORRY_UNKNOWN, unknown.NOT_LEARNED, unknown.ENGLISH_ONLY):
            assert task.evaluate(problem, refusal) == (problem["group"] != "known")
        assert task.evaluate(problem, "The sky is blue.") == (problem["group"] == "known")


def test_fact_tests_have_three_groups(world):
    every = chat.DemoFacts(99, "test", world)
    groups = [problem["group"] for problem in every]
    assert groups == ["wrapper", "rewording", "typed"] * 33
    for kind in ("wrapper", "rewording", "typed"):
        assert {problem["group"] for problem in chat.DemoFacts(20, "test", world, kind=kind)} == {kind}
    with pytest.raises(ValueError, match="kind is all or one of wrapper"):
        chat.DemoFacts(20, "test", world, kind="both")


def test_tasks_are_deterministic_and_lazy(world):
    first, again = chat.demo_mid_mixture(world=world), chat.demo_mid_mixture(world=world)
    assert [first[i] for i in range(0, 200, 7)] == [again[i] for i in range(0, 200, 7)]
    assert chat.DemoFacts(10, "train", world, seed=1)[3] != chat.DemoFacts(10, "train", world, seed=2)[3]
    huge = chat.DemoFacts(10**12, "train", world)
    assert huge[10**12 - 1]["messages"]
    with pytest.raises(ValueError, match="train and test"):
        chat.DemoFacts(1, "val", world)


def test_every_fact_is_asked_equally_often(world):
    size = 3 * len(world.facts)
    answers = [final_text(c["messages"][1]["content"]) for c in chat.DemoFacts(size, "train", world)]
    texts = [fact.text for fact in world.facts]
    assert sorted(answers) == sorted(texts * 3)


def test_conversations_alternate_and_are_short(world):
    for conversation in chat.demo_mid_mixture(world=world, facts=500, arithmetic=200, spelling=100, counting=100):
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"] for message in conversation["messages"])
        assert sum(len(str(message["content"])) for message in conversation["messages"]) < 900


# --- corpus ----------------------------------------------------------------------------------------------------------


def read_texts(path):
    return pq.read_table(path)["text"].to_pylist()


def test_corpus_is_written_once_and_again_after_a_change(small_world, tmp_path):
    out = tmp_path / "out"
    folder, written = corpus.write_corpus(out, 20_000, small_world)
    assert (folder, written) == (out, True)
    names = corpus.shard_names()
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, corpus.STAMP])
    before = {name: (out / name).read_bytes() for name in names}
    assert corpus.write_corpus(out, 20_000, small_world) == (out, False)
    (out / names[0]).write_bytes(b"harmed")
    assert corpus.write_corpus(out, 20_000, small_world)[1]
    assert {name: (out / name).read_bytes() for name in names} == before  # same world, same bytes
    (small_world / "a.txt").write_text(SKY, encoding="utf-8")
    assert corpus.write_corpus(out, 20_000, small_world)[1]
    texts = read_texts(out / names[0])
    assert any("sky" in text for text in texts)
    assert not any("between 2 banks" in text for text in texts)


def test_corpus_shards_and_split(small_world, tmp_path):
    out, _ = corpus.write_corpus(tmp_path / "out", 60_000, small_world)
    *train, val = (read_texts(out / name) for name in corpus.shard_names())
    text = "\n".join(text for shard in train for text in shard)
    assert 60_000 <= len(text) < 66_000
    assert val
    assert not set(val) & {document for shard in train for document in shard if document.count("\n") > 5}
    for fact in load_world(small_world).facts:
        assert text.count(fact.text) > 20
        assert fact.also in text
        assert any(fact.text in document for document in val)
    shard = pq.ParquetFile(out / corpus.shard_names()[0])
    assert all(shard.metadata.row_group(i).num_rows <= 1024 for i in range(shard.num_row_groups))
    assert shard.metadata.row_group(0).column(0).compression == "ZSTD"


def test_corpus_refuses_a_folder_of_other_things(small_world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        corpus.write_corpus(tmp_path / "mine", 20_000, small_world)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    with pytest.raises(ValueError, match="--chars"):
        corpus.write_corpus(tmp_path / "new", 5, small_world)


def test_every_fact_stands_often_in_the_shipped_corpus(world, training_documents):
    sentences = Counter(part for text in training_documents for part in re.split(r"(?<=[.!]) |\n", text))
    assert min(sentences[fact.text] for fact in world.facts) >= 10


def test_command_line_checks_a_world(small_world, capsys):
    run_script(main, Config, ["--check", "--world", str(small_world)])
    assert "2 topics, 2 facts" in capsys.readouterr().out
    (small_world / "a.txt").write_text(SKY.replace("key: scatters\n", ""), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        run_script(main, Config, ["--check", "--world", str(small_world)])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "a.txt:4: no key" in printed.out
    assert printed.err.startswith("error: 1 mistake in")


def test_command_line_writes_the_corpus_once(small_world, tmp_path, capsys):
    arguments = ["--world", str(small_world), "--out", str(tmp_path / "out"), "--chars", "20000"]
    run_script(main, Config, arguments)
    assert "written to" in capsys.readouterr().out
    run_script(main, Config, arguments)
    assert "up to date" in capsys.readouterr().out


def test_a_world_in_english_teaches_what_to_say_instead_of_a_guess(tmp_path, monkeypatch):
    budget = DataBudget(None, 4)
    assert mixtures.conversations("sft", "demo", budget).unsure == unknown.DO_NOT_KNOW
    german = load_world(write_world(tmp_path / "w", himmel=GERMAN, language=LANGUAGE))
    monkeypatch.setattr(mixtures, "load_world", lambda: german)
    assert mixtures.conversations("sft", "demo", budget).unsure == ""


def test_a_run_that_reads_more_gets_other_conversations_not_the_same_ones_again(world, monkeypatch):
    monkeypatch.setattr(mixtures, "load_world", lambda: world)
    sizes = {}
    for tokens in (None, 10_000, 1_100_000, 10**9):
        train = mixtures.conversations("mid", "demo", DataBudget(tokens, 4)).train
        sizes[tokens] = len(train)
    assert sizes[None] == sizes[10_000] < sizes[1_100_000] == 2 * sizes[None]
    assert sizes[10**9] == mixtures.MOST_DEMO_DRAWS * sizes[None]
    train = mixtures.conversations("mid", "demo", DataBudget(1_100_000, 4)).train
    facts = [task for task in train.tasks if type(task) is chat.DemoFacts]
    assert [user_texts(facts[0][i]) for i in range(50)] != [user_texts(facts[1][i]) for i in range(50)]
