"""Whatever a model would like to say, an answer that must have a form has it, however little room there is."""

import json
import os
import random
import re
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_schemas import schemas
from reference_generation import ToolModel, make_model

from nanochat.generate.grammar import Grammars
from nanochat.generate.grammar.characters import ANY, json_character, plain_character, without
from nanochat.generate.grammar.language import Languages
from nanochat.generate.grammar.numbers import Bounds, decimals, integers
from nanochat.generate.grammar.patterns import PatternError, pattern_language, writer
from nanochat.generate.sampling import Sampling
from nanochat.serve.batch_engine import BatchEngine, GenerationRequest

jsonschema = pytest.importorskip("jsonschema")
SCHEMAS = int(os.environ.get("NANOCHAT_SCHEMAS", "100"))  # 2000 take 3 min 21 s of CPU time


@pytest.fixture(scope="module")
def grammars(tiny_tokenizer):
    return Grammars(tiny_tokenizer)


@pytest.fixture(scope="module")
def engine(tiny_tokenizer):
    with BatchEngine(make_model(tiny_tokenizer, ToolModel), tiny_tokenizer, max_batch_size=8) as engine:
        yield engine


def ask(engine, constraint, room, seed=0, temperature=1.0, **knobs):
    sampling = Sampling(constraint=constraint, max_tokens=room, seed=seed, temperature=temperature, **knobs)
    return engine.submit(GenerationRequest(tokens=[256, 65, 66], sampling=sampling))


def answer(generation):
    """(text, last event); the answer must be nothing but text."""
    events = list(generation.events())
    assert all(e.kind == "text" for e in events[:-1])
    return "".join(e.text for e in events[:-1]), events[-1]


def check(schema, text, last, room):
    assert last.finish_reason == "stop", (schema, text, last.text)
    assert last.usage.completion_tokens <= room
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.timeout(0 if SCHEMAS > 100 else 300)
def test_random_schemas_are_satisfied_by_every_answer(engine, grammars):
    seen, passed, refused = [], [], []

    @settings(max_examples=SCHEMAS, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(schemas())
    def satisfied(schema):
        seen.append(schema)
        try:
            constraint = grammars.json_schema(schema)
        except ValueError as error:
            refused.append(str(error))
            return
        least = constraint.least_tokens
        if least > 100:
            return
        asked = [(max(least, 32), 1.0), (max(least, 32), 2.0), (least + len(seen) % 3, 2.0)]
        generations = [ask(engine, constraint, room, len(seen) + room, t) for room, t in asked]
        for (room, _), generation in zip(asked, generations, strict=True):
            check(schema, *answer(generation), room)
            passed.append(schema)
        if least > 1:
            with pytest.raises(ValueError, match=f"takes {least} tokens, but there is room for {least - 1}"):
                ask(engine, constraint, least - 1)

    satisfied()
    assert len(passed) > 2 * len(seen)  # most schemas were supported and fit
    assert not [
        e
        for e in refused
        if not re.search("satisfies all|back to itself|multipleOf|formats .* at once|minProperties", e)
    ]


SATISFIABLE = {
    "the words of any object": ({"type": "object"}, 60),
    "a list that is recursive": (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "v": {"type": "integer"},
                        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                    },
                    "required": ["v", "next"],
                }
            },
            "$ref": "#/$defs/node",
        },
        60,
    ),
    "options that differ in a constant": (
        {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"const": kind}, "x": {"type": t}}, "required": ["kind", "x"]}
                for kind, t in (("a", "string"), ("b", "boolean"))
            ]
        },
        40,
    ),
    "all of several": (
        {
            "allOf": [
                {"type": "object", "properties": {"n": {"type": "number", "minimum": 3}}, "required": ["n"]},
                {"properties": {"n": {"type": "integer", "exclusiveMaximum": 5}, "m": {"type": "null"}}},
            ]
        },
        40,
    ),
    "more properties than are named": (
        {"type": "object", "minProperties": 3, "additionalProperties": {"type": "null"}},
        90,
    ),
    "a set of an enum's values": (
        {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "uniqueItems": True, "minItems": 2},
        60,
    ),
    "a key that differs from those named": (
        {"properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}, "minProperties": 2},
        40,
    ),
    "a schema with a name": ({"$id": "https://example.org/flag.json", "type": "boolean"}, 9),
    "a small multiple": ({"type": "integer", "multipleOf": 7, "minimum": 700, "maximum": 713}, 9),
    "a number between two that are near": ({"exclusiveMinimum": 0.1, "exclusiveMaximum": 0.1000002}, 20),
    "patterns with bounds": ({"type": "string", "pattern": "^(ab|c)*$", "minLength": 5, "maxLength": 6}, 20),
    "two patterns": (
        {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "^[a-c]{2,4}$"}, {"pattern": "b$"}]},
        20,
    ),
    "values of an enum that the rest allows": ({"enum": ["a", 3, "bb", None], "type": "string", "minLength": 2}, 9),
}


@pytest.mark.parametrize("name", SATISFIABLE)
def test_what_people_ask_for_works(engine, grammars, name):
    schema, room = SATISFIABLE[name]
    constraint = grammars.json_schema(schema)
    generations = [(r, ask(engine, constraint, r, r, 1.5)) for r in (constraint.least_tokens, room, room + 1)]
    for r, generation in generations:
        check(schema, *answer(generation), r)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "patternProperties": {"^x": {}}}, "patternProperties"),
        ({"type": "array", "contains": {"type": "null"}}, "contains"),
        ({"not": {"type": "null"}}, "'not'"),
        ({"properties": {"a": {"properties": {"b": {"if": True}}}}}, "'if'"),
        ({"type": "string", "nullable": True}, "nullable"),
        ({"type": "string", "maxLenght": 3}, "maxLenght"),
        ({"type": "string", "format": "iri"}, "iri"),
        ({"type": "string", "pattern": "(?=a)b"}, r"\(\?="),
        ({"type": "string", "pattern": "(a"}, "wrong at #/pattern"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "number", "multipleOf": 0.01}, "multipleOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "https://example.org/schema"}, "example.org"),
        ({"$ref": "#/$defs/missing"}, "leads nowhere"),
        ({"type": "objekt"}, "wrong at #/type"),
        ({"properties": {"a": {"minLength": "3"}}}, "wrong at #/properties/a/minLength"),
        ({"type": "string", "minLength": 10**9}, "bytes"),
        ({"minimum": 3, "maximum": 2, "type": "integer"}, "satisfies all"),
        ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "satisfies all"),
        ({"type": "integer", "multipleOf": 100, "minimum": 1, "maximum": 99}, "satisfies all"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "satisfies all"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "satisfies all"),
        ({"$ref": "#"}, "back to itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "back to itself"),
        ({"enum": []}, "satisfies all"),
        (False, "satisfies all"),
        ([], "object, true or false"),
    ],
)
def test_what_cannot_be_met_is_refused_by_name(grammars, schema, named):
    with pytest.raises(ValueError, match=named):
        grammars.json_schema(schema)


HOSTILE = {
    "references that multiply": {
        "properties": {"x": {"allOf": [{"$ref": "#"}, {"$ref": "#/$defs/b"}]}, "y": {"allOf": [{"$ref": "#/$defs/b"}]}},
        "required": ["x"],
        "$defs": {"b": {"properties": {"x": {"$ref": "#"}, "z": {"allOf": [{"$ref": "#"}, {"$ref": "#/$defs/b"}]}}}},
    },
    "alternatives that multiply": {"allOf": [{"anyOf": [{"minLength": i} for i in range(20)]}] * 5},
    "a thousand levels": json.loads('{"items":' * 300 + "{}" + "}" * 300),
    "an enum of beginnings": {"enum": ["a" * n for n in range(1500)]},
    "a thousand properties": {"properties": {f"p{i}": {} for i in range(400)}, "minProperties": 300},
    "repetitions of repetitions": {"type": "string", "pattern": "^(?:(?:a{1,2000}){1,2000}b?){1,2000}$"},
    "a pattern with exponentially many states": {"type": "string", "pattern": "^[ab]*a[ab]{60}$", "minLength": 90},
    "a long bounded pattern": {"type": "string", "pattern": "(?:.*x){40}", "minLength": 900, "maxLength": 1000},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_cost_little_and_stop_nobody_else(engine, grammars, name):
    """Each is either refused, or answered, or ends alone."""
    start = time.process_time()
    schema = HOSTILE[name]
    try:
        generation = ask(engine, grammars.json_schema(schema), 100, temperature=2.0)
    except ValueError:
        generation = None
    if generation is not None:
        *_, last = generation.events()
        assert last.finish_reason == "stop" or "too complex" in last.text
    assert time.process_time() - start < 10
    text, last = answer(ask(engine, grammars.choice(["fine"]), 9))
    assert (text, last.finish_reason) == ("fine", "stop")


def test_a_schema_is_compiled_once_and_any_thread_s_answers_share_it(grammars):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert grammars.json_schema(schema) is grammars.json_schema(dict(schema))


def test_choices_and_patterns(engine, grammars):
    for seed in range(4):
        assert answer(ask(engine, grammars.choice(["yes", "no", "nobody"]), 10, seed))[0] in ("yes", "no", "nobody")
        text, last = answer(ask(engine, grammars.regex("[A-Z]{2}-[0-9]+(?:é|日)"), 10, seed, 2.0))
        assert re.fullmatch("[A-Z]{2}-[0-9]+(?:é|日)", text)
        assert last.finish_reason == "stop"
    with pytest.raises(ValueError, match="choice"):
        grammars.choice(["a", ""])


def test_neither_tools_nor_marks_come_within_an_answer(engine, grammars, tiny_tokenizer):
    """The model likes to call the calculator more than anything else: its tokens are not among those it may write."""
    start = tiny_tokenizer.encode_special("<|python_start|>")
    generations = [
        ask(engine, grammars.json_schema({"type": "string", "minLength": 20}), 60, seed, logit_bias=((start, 50.0),))
        for seed in range(3)
    ]
    for generation in generations:
        text, last = answer(generation)
        assert len(json.loads(text)) >= 20
        assert last.finish_reason == "stop"


def test_greedy_answers_do_not_depend_on_the_company(engine, grammars, tiny_tokenizer):
    constraint = grammars.json_schema({"type": "object"})
    with BatchEngine(engine.model, tiny_tokenizer, max_batch_size=1) as alone:
        expected = answer(ask(alone, constraint, 40, temperature=0.0))[0]
    plain = [ask(engine, None, 40, seed) for seed in range(3)]
    assert answer(ask(engine, constraint, 40, temperature=0.0))[0] == expected
    for generation in plain:
        list(generation.events())


# --- the parts --------------------------------------------------------------------------------------------------------


def accepts(language, text):
    for byte in text.encode():
        language = next((rest for mask, rest in language.edges if mask >> byte & 1), None)
        if language is None:
            return False
    return language.nullable


def random_words(language, count, seed=0, longest=30):
    """Texts of a language: at random at first, then the nearest way to an end."""
    draw = random.Random(seed)
    for _ in range(count):
        written, rest, free = bytearray(), language, draw.randrange(longest)
        while not (rest.nullable and (len(written) >= free or not rest.edges)):
            edges = [(m, after) for m, after in rest.edges if after.least < 1 << 30]
            if len(written) >= free:
                edges = [min(edges, key=lambda edge: edge[1].least)]
            mask, rest = draw.choice(edges)
            written.append(draw.choice([b for b in range(256) if mask >> b & 1]))
        yield written.decode()


def test_integers_are_those_within_the_bounds():
    draw, space = random.Random(0), Languages()
    for _ in range(40):
        low, high = sorted(draw.choices(range(-130, 1300), k=2))
        kinds = [Bounds(low, high), Bounds(above=low, below=high), Bounds(low - 0.5, high + 0.5), Bounds(minimum=low)]
        multiple = draw.choice([1, 1, 2, 7, 13])
        for bounds, (first, last) in zip(
            kinds, ((low, high), (low + 1, high - 1), (low, high), (low, 10**9)), strict=True
        ):
            language = integers(space, bounds, multiple)
            for value in (*range(low - 2, low + 3), *range(high - 2, high + 3), *draw.choices(range(-200, 1400), k=20)):
                assert accepts(language, str(value)) == (first <= value <= last and value % multiple == 0), (value, low)
            assert not any(accepts(language, text) for text in ("", "-", "-0", "007", "1.0", "+1", "1e2"))


def test_decimals_are_within_the_bounds_and_as_near_as_their_digits_allow():
    draw, space = random.Random(1), Languages()
    for _ in range(30):
        low, high = sorted(round(draw.uniform(-30, 300), draw.choice([0, 1, 3])) for _ in range(2))
        inside, open_ = decimals(space, Bounds(low, high)), decimals(space, Bounds(above=low, below=high))
        for _ in range(40):
            value = round(draw.choice([low, high]) + draw.choice([0, 0, 1e-6, -1e-6, 0.5, -3, 77]), 6)
            text = f"{value:.6f}" if draw.random() < 0.5 or "e" in repr(value) else repr(value)
            if text.startswith("-0.000000") or text == "-0.0":
                continue
            assert accepts(inside, text) == (low <= float(text) <= high), (text, low, high)
            assert accepts(open_, text) == (low < float(text) < high), (text, low, high)
    for text in random_words(decimals(space, Bounds()), 40):
        assert isinstance(json.loads(text), int | float)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("a|bc", ["xay", "bc"], ["b", "", "cb"]),
        ("^a|b$", ["ax", "xb"], ["xa", "bx"]),
        ("^(?:a|b){2,3}$", ["ab", "bba"], ["a", "abab"]),
        ("^[^a-c]+?$", ["xyz", "é日"], ["", "b", "xa"]),
        (r"^\d+\.\w\s?$", ["12.x", "1._ "], ["1.", "x.1"]),
        (r"^\u00e9\x41$", ["éA"], ["eA"]),
        (r"^[\w.-]+@[\]a]$", ["a.b-c@]"], ["@a", "a@b"]),
        ("^x{0,2}y*$", ["", "xxy", "yy"], ["xxx"]),
        (r"^.$", ["a", "日", "😀"], ["", "\n", "ab"]),
        ("{", ["a{b"], ["a"]),
        ("a{,2}", ["a{,2}"], ["a"]),
        (r"^[\D]$", ["x"], ["3"]),
    ],
)
def test_patterns_are_read_as_by_re(pattern, inside, outside):
    space = Languages()
    language = pattern_language(space, pattern, writer(space, plain_character))
    assert all(accepts(language, text) and re.search(pattern, text) for text in inside)
    assert not any(accepts(language, text) for text in outside)
    for text in random_words(language, 30):
        assert re.search(pattern, text)
    for text in random_words(pattern_language(space, pattern, writer(space, json_character)), 30):
        assert re.search(pattern, json.loads(f'"{text}"'))


def test_patterns_that_are_wrong_or_not_supported_are_named():
    space = Languages()
    for pattern in ("a**", "*a", "(a", "a)", "[a", "[b-a]", "a{3,2}", "(?<=a)b", "(?!a)", "a^b", "(a$)", r"\1",
                    r"\p{L}", r"\bword", "a{9999}", "\\", "[]a]", "a++", r"\u12", "[a&&x]", "(" * 99):  # fmt: skip
        with pytest.raises(PatternError, match="the pattern"):
            pattern_language(space, pattern, writer(space, plain_character))


def test_sets_of_characters_are_their_utf_8():
    draw, space = random.Random(0), Languages()
    edges = [0, 0x7F, 0x80, 0x7FF, 0x800, 0xFFF, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x3FFFF, 0x10FFFF]
    for _ in range(60):
        low, high = sorted((draw.choice([draw.choice(edges), draw.randrange(0x3000)]), draw.choice(edges)))
        language = plain_character(space, ((low, high),))
        for code in (*edges, low, high, low - 1, high + 1, draw.randrange(0x110000)):
            if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
                assert accepts(language, chr(code)) == (low <= code <= high), (low, high, code)
    assert without(((0, 10), (20, 30)), ((5, 22),)) == ((0, 4), (23, 30))


def test_white_space_and_nesting_are_bounded(grammars):
    words = list(random_words(grammars.json_schema({"type": "object"})._masks.start, 60, longest=80))
    assert not any(re.search(r"[{\[,:] {2}|\n", re.sub(r'"(?:[^"\\]|\\.)*"', '""', word)) for word in words)
    state = grammars.json_schema({"type": "object"}).start()
    state._masks.step(state._left, state._masks.tree.by_bytes[b"{"])
    depth = 0
    state.take(state._masks.tree.by_bytes[b"{"])
    for text in (b'"', b"a", b'"', b":"):
        state.take(state._masks.tree.by_bytes[text])
    opening = state._masks.tree.by_bytes[b"["]
    while state.allowed(500)[opening]:
        state.take(opening)
        depth += 1
    assert 10 < depth < 40


def test_any_character_may_be_in_a_string_and_json_reads_it_back():
    space = Languages()
    character = json_character(space, ANY)
    for text in ("a", "é", "日", "😀", '\\"', "\\\\", "\\n", "/", "\x7f"):
        assert accepts(character, text)
    for text in ('"', "\\", "\n", "\\u0041", "\x00"):
        assert not accepts(character, text)


def test_masks_are_a_vocabulary_s(grammars, tiny_tokenizer):
    state = grammars.json_schema({"enum": [True]}).start()
    allowed = state.allowed(9)
    assert allowed.dtype == torch.bool
    assert allowed.shape == (tiny_tokenizer.get_vocab_size(),)
    texts = {tiny_tokenizer.decode_bytes([t]) for t in allowed.nonzero()[:, 0].tolist()}
    assert texts == {t for t in (b"t", b"tr", b"tru", b"true") if t in state._masks.tree.by_bytes}
