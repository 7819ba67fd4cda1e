"""JSON values as a language: what a model may write for a schema.

Not everything that satisfies a schema is in it, but all that is in it does: properties come in the schema's order and
each once, a space may follow a comma and a colon and nothing else, numbers have at most 15 digits, and values are
nested at most MAX_DEPTH deep (validators are recursive).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.generate.grammar.language import NEVER, Language, Languages
from nanochat.generate.grammar.numbers import Bounds, decimals, integers
from nanochat.generate.grammar.patterns import PatternError
from nanochat.generate.grammar.schema import KEYWORDS, TYPES, BadSchema, Schema, SchemaReader, same, types_of
from nanochat.generate.grammar.strings import JsonStrings

MAX_DEPTH = 24
MOST_ITEMS = 10_000
MOST_MANDATORY = 26  # unnamed properties that minProperties asks for: each begins with a letter of its own
MOST_UNIQUE = 100  # values of an enum whose subsets an array with uniqueItems holds


class JsonValues:
    """Makes the languages of one document's schemas.

    Args:
        space: where.
        reader: of the document.
    """

    def __init__(self, space: Languages, reader: SchemaReader) -> None:
        self._space, self._reader = space, reader
        self._strings = JsonStrings(space)
        self._made: dict[tuple[str, int], Language] = {}
        self._comma, self._colon = (
            space.then(space.text(mark), space.optional(space.text(b" "))) for mark in (b",", b":")
        )

    def value(self, schema: Schema | bool, depth: int = 0) -> Language:
        """The values that satisfy a schema, `depth` levels within the answer.

        Raises:
            BadSchema: something in it is not supported.
        """
        if depth > MAX_DEPTH:
            return self._space.nothing
        key = json.dumps(schema), depth
        if key not in self._made:
            self._made[key] = self._space.either(
                [self._flat(flat, depth) for flat in self._reader.alternatives(schema)]
            )
            _ = self._made[key].least  # now, from the innermost to the outermost: so that no recursion gets deep
        return self._made[key]

    def _flat(self, flat: Schema, depth: int) -> Language:
        if "enum" in flat:
            return self._space.texts(_written(value) for value in self._reader.values(flat))
        types = types_of(flat)
        if "type" not in flat:
            # Keywords speak of their type only: {"minLength": 3} allows 7. Who writes it means strings.
            meant = [name for name in TYPES if any(k in flat for k in KEYWORDS.get(name, ()))]
            language = self._of_types(flat, meant, depth)
            if language.least < NEVER:
                return language
        return self._of_types(flat, types, depth)

    def _of_types(self, flat: Schema, types: Sequence[str], depth: int) -> Language:
        makers: dict[str, Callable[[Schema, int], Language]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._number,
            "number": self._number,
        }
        plain = {"boolean": (b"true", b"false"), "null": (b"null",)}
        options = [self._space.texts(plain[name]) for name in types if name in plain]
        for name in types:
            if name in makers and not (name == "integer" and "number" in types):
                options.append(makers[name]({**flat, "type": name}, depth))
        return self._space.either(options)

    # --- what has no parts --------------------------------------------------------------------------------------------

    def _string(self, flat: Schema, depth: int) -> Language:
        try:
            return self._strings.string(
                int(flat.get("minLength", 0)),
                _whole(flat.get("maxLength")),
                flat.get("patterns", ()),
                flat.get("format"),
            )
        except PatternError as error:
            raise BadSchema(str(error)) from None

    def _number(self, flat: Schema, depth: int) -> Language:
        names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
        bounds = Bounds(*(flat.get(name) for name in names))
        multiple = int(flat.get("multipleOf", 1))
        if flat["type"] == "integer" or "multipleOf" in flat:
            return integers(self._space, bounds, multiple)
        return decimals(self._space, bounds)

    # --- arrays -------------------------------------------------------------------------------------------------------

    def _array(self, flat: Schema, depth: int) -> Language:
        space = self._space
        least, most = int(flat.get("minItems", 0)), _whole(flat.get("maxItems"))
        if least > MOST_ITEMS:
            raise BadSchema(f"minItems {least} is not supported: it must be at most {MOST_ITEMS}")
        if flat.get("uniqueItems") and (most is None or most > 1):
            return self._unique_array(flat, least, most)
        first = [self.value(schema, depth + 1) for schema in flat.get("prefixItems", ())]
        item = self.value(flat.get("items", True), depth + 1)
        if item.least >= NEVER:
            item = space.nothing
        end = space.text(b"]")
        # From the last place to the first: what may follow when `place` items are written.
        head = max(1, len(first))
        more = space.repeat(
            space.then(self._comma, item), max(0, least - head), None if most is None else max(0, most - head)
        )
        rest = space.then(more, end)
        for place in reversed(range(head)):
            element = first[place] if place < len(first) else item
            options = [end] if place >= least else []
            if most is None or place < most:
                options.append(space.then(self._comma if place else space.empty, element, rest))
            rest = space.either(options)
            _ = rest.least
        return space.then(space.text(b"["), rest)

    def _unique_array(self, flat: Schema, least: int, most: int | None) -> Language:
        """Arrays whose items are values of an enum, each at most once, in the enum's order."""
        flats = self._reader.alternatives(flat.get("items", True))
        if flat.get("prefixItems") or not flats or any("enum" not in option for option in flats):
            raise BadSchema("uniqueItems is supported only for arrays of an enum's values, and with maxItems 1")
        values: list[Any] = []
        for value in (value for option in flats for value in self._reader.values(option)):
            if not any(same(value, other) for other in values):
                values.append(value)
        if len(values) > MOST_UNIQUE:
            raise BadSchema(
                f"uniqueItems is supported for enums of at most {MOST_UNIQUE} values, this has {len(values)}"
            )
        members = [(self._space.text(_written(value)), False) for value in values]

        def ending(count: int) -> Language:
            return self._space.text(b"]") if count >= least else self._space.nothing

        return self._space.then(self._space.text(b"["), self._chain(members, least, most, ending))

    # --- objects ------------------------------------------------------------------------------------------------------

    def _object(self, flat: Schema, depth: int) -> Language:
        space = self._space
        properties = dict(flat.get("properties", {}))
        required = flat.get("required", ())
        least, most = int(flat.get("minProperties", 0)), _whole(flat.get("maxProperties"))
        others = flat.get("additionalProperties", True)
        for name in required:
            properties.setdefault(name, others)
        members = []
        for name, schema in properties.items():
            value = self.value(schema, depth + 1)
            if value.least < NEVER or name in required:
                member = space.then(space.text(_written(name)), self._colon, value)
                members.append((member if value.least < NEVER else space.nothing, name in required))
        # Where a schema names properties and doesn't speak of others, none are written: nobody waits for them.
        wanted = "additionalProperties" in flat or not properties or least > len(members)
        other = self.value(others, depth + 1) if wanted else space.nothing
        names = [_written(name)[1:-1] for name in properties]

        def ending(count: int) -> Language:
            return self._other_properties(names, other, least, most, count)

        return space.then(space.text(b"{"), self._chain(members, least, most, ending))

    def _chain(
        self,
        members: Sequence[tuple[Language, bool]],
        least: int,
        most: int | None,
        ending: Callable[[int], Language],
    ) -> Language:
        """Some of the members in their order, with commas between them.

        Args:
            members: (what it is, whether it must be there) of each.
            least: how many there must be, those of the ending included.
            most: how many there may be; None: any number.
            ending: what may follow when so many are written.
        """
        # From the last member to the first: what may follow when `count` of those before it are written. Beyond `cap`
        # it makes no difference how many.
        cap = max(1, min(least, len(members)), 0 if most is None else min(most, len(members)))
        rests = [ending(count) for count in range(cap + 1)]
        for i, (member, needed) in reversed(list(enumerate(members))):
            before = []
            for count in range(min(cap, i) + 1):
                options = [] if needed else [rests[count]]
                if most is None or count < most:
                    comma = self._comma if count else self._space.empty
                    options.append(self._space.then(comma, member, rests[min(count + 1, cap)]))
                before.append(self._space.either(options))
                _ = before[-1].least
            rests = before
        return rests[0]

    def _other_properties(
        self, names: list[bytes], value: Language, least: int, most: int | None, count: int
    ) -> Language:
        """Properties that the schema doesn't name, when `count` others are written, and the end of the object."""
        space, end = self._space, self._space.text(b"}")
        if value.least >= NEVER:
            return end if count >= least else space.nothing
        missing = max(0, least - count)
        if missing > MOST_MANDATORY:
            raise BadSchema(f"minProperties is supported up to {MOST_MANDATORY} more properties than the schema names")

        def member(place: int, **key: int) -> Language:
            comma = self._comma if count + place else space.empty
            return space.then(comma, self._strings.key_but(names, **key), self._colon, value)

        # The same key twice would count once: so those that must be there, where they are several, begin differently.
        several = missing > 1
        asked = [member(i, **({"first": 97 + i} if several else {})) for i in range(missing)]
        room = None if most is None else most - count - missing
        if room is not None and room < 0:
            return space.nothing
        apart = {"apart_from": missing} if several else {}
        more = space.repeat(member(1, **apart), 0, room)
        if count + missing == 0:
            first = space.then(member(0), space.repeat(member(1), 0, None if room is None else max(0, room - 1)))
            more = space.optional(first) if room != 0 else space.empty
        return space.then(*asked, more, end)


def _written(value: Any) -> bytes:
    """A value as JSON; half a surrogate pair, which UTF-8 can't hold, as its escape."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)
