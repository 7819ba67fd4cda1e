"""Random JSON schemas of the supported subset. (hypothesis-jsonschema 0.23 fails with hypothesis 6.170.)"""

from __future__ import annotations

from hypothesis import strategies as st

from nanochat.generate.grammar.strings import FORMATS

COUNT = st.integers(0, 12)
NUMBER = st.floats(-1e6, 1e6) | st.integers(-20, 20)
PATTERNS = [
    "^[a-z]{2,5}$",
    "[0-9]+",
    "^(?:yes|no|\\w+!)$",
    "x.y",
    "^[^\\d\\s]*$",
    "\\.txt$",
    "^\\S+@\\S+$",
    "é+|ü?",
    "^.{3}",
]
NAMES = ["a", "b", "name", 'quote"d', "ümläut", "a b", ""]
VALUES = [None, True, 0, 1, -2.5, 1e20, "", "a", 'say "hi"\n', "日本", [], [1, "x"], {}, {"k": [None]}]


def keywords(types, **optional):
    """Schemas of some types with some of these keywords."""
    return st.fixed_dictionaries({"type": st.sampled_from(types)}, optional=optional)


LEAVES = st.one_of(
    keywords(["string"], minLength=COUNT, maxLength=COUNT, pattern=st.sampled_from(PATTERNS)),
    keywords(["string"], format=st.sampled_from(sorted(FORMATS))),
    keywords(
        ["integer", "number"],
        minimum=NUMBER,
        maximum=NUMBER,
        exclusiveMinimum=NUMBER,
        exclusiveMaximum=st.integers(-20, 20),
    ),
    keywords(["integer"], multipleOf=st.integers(1, 40), minimum=st.integers(-500, 500)),
    keywords(["boolean", "null", "array", "object", "string", ["string", "null"], ["integer", "boolean"]]),
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    st.sampled_from(VALUES).map(lambda value: {"const": value}),
    st.booleans(),
    st.just({"$ref": "#/$defs/leaf"}),
    st.just({"$ref": "#"}),
)


def _larger(inner):
    names = st.lists(st.sampled_from(NAMES), unique=True, max_size=4)
    count = st.none() | st.integers(0, 4)
    objects = st.builds(
        lambda names, schemas, needed, others, least, most: _without_none(
            type="object",
            properties=dict(zip(names, schemas, strict=False)),
            required=[name for name, wanted in zip(names, needed, strict=False) if wanted],
            additionalProperties=others,
            minProperties=least,
            maxProperties=most,
        ),
        names,
        st.lists(inner, min_size=3, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
        st.none() | st.booleans() | inner,
        count,
        count,
    )
    arrays = st.builds(
        lambda items, first, least, most: _without_none(
            type="array", items=items, prefixItems=first, minItems=least, maxItems=most
        ),
        st.none() | inner,
        st.none() | st.lists(inner, min_size=1, max_size=2),
        count,
        count,
    )
    combined = st.builds(
        lambda name, schemas: {name: schemas},
        st.sampled_from(["anyOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=3),
    )
    return objects | objects | arrays | combined


def _without_none(**keywords_):
    return {name: value for name, value in keywords_.items() if value is not None}


@st.composite
def schemas(draw):
    """A whole document."""
    schema = draw(st.recursive(LEAVES, _larger, max_leaves=6))
    if isinstance(schema, bool):
        return schema
    return {**schema, "$defs": {"leaf": {"type": "string", "maxLength": 5}}}
