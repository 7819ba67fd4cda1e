"""JSON Schema read: references followed, combinations multiplied out, contradictions found.

`SchemaReader.alternatives` turns a schema into flat ones (without $ref, allOf, anyOf and oneOf) of which a value must
satisfy any. The flat ones are what nanochat.generate.grammar.values writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from nanochat.generate.grammar.language import TooComplex
from nanochat.generate.grammar.numbers import MOST_BOUND, MOST_MULTIPLE
from nanochat.generate.grammar.strings import FORMATS

Schema = dict[str, Any]

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")
# The keywords that are followed, by the type they speak of. "patterns" is our own: several `pattern`s, joined.
KEYWORDS = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "patterns", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
GENERAL = ("type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf")
# These say nothing about what is valid.
REMARKS = {
    *("$schema", "$comment", "$defs", "definitions", "title", "description", "default", "example", "examples"),
    *("deprecated", "readOnly", "writeOnly", "discriminator", "contentEncoding", "contentMediaType"),
}
KNOWN = {*GENERAL, *REMARKS, *(name for names in KEYWORDS.values() for name in names)}
SUPPORTED = ", ".join([*GENERAL, *(name for names in KEYWORDS.values() for name in names if name != "patterns")])
MOST_ALTERNATIVES = 200
MOST_READ = 20_000  # schemas within each other, those that references lead to again and again included
MOST_CHARACTERS = 100_000
_UPPER = {"minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum"}
_LOWER = {"maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum"}


class BadSchema(ValueError):
    """Raised when a schema is wrong, asks for something that is not supported, or can't be satisfied."""


class SchemaReader:
    """Reads one document.

    Args:
        document: the schema; a dictionary or a boolean.

    Raises:
        BadSchema: it is no JSON Schema of draft 2020-12, or too large.
    """

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict | bool):
            raise BadSchema(f"a JSON schema is an object, true or false, not {type(document).__name__}")
        try:
            size = len(json.dumps(document, allow_nan=False))
        except (ValueError, TypeError, RecursionError) as error:
            raise BadSchema(f"the JSON schema is no JSON: {error}") from None
        if size > MOST_CHARACTERS:
            raise BadSchema(f"the JSON schema has {size} characters, the most is {MOST_CHARACTERS}")
        try:
            Draft202012Validator.check_schema(document)
        except SchemaError as error:
            where = "/".join(map(str, error.absolute_path))
            raise BadSchema(f"the JSON schema is wrong at #/{where}: {error.message[:300]}") from None
        except RecursionError:
            raise BadSchema("the JSON schema is nested too deeply") from None
        self._document = document
        self._read = 0
        self._validator = Draft202012Validator(document)

    def alternatives(self, schema: Schema | bool, following: frozenset[str] = frozenset()) -> list[Schema]:
        """Flat schemas of which a value must satisfy any; none: nothing satisfies it.

        Args:
            schema: what to read.
            following: the references that led here without a step into the value.

        Raises:
            BadSchema: something in it is not supported.
        """
        if isinstance(schema, bool):
            return [{}] if schema else []
        self._read += 1
        if self._read > MOST_READ:
            raise TooComplex
        self._check(schema)
        own = {k: v for k, v in schema.items() if k not in REMARKS and k not in ("$ref", "allOf", "anyOf", "oneOf")}
        if "const" in own:
            own.setdefault("enum", [own["const"]])
            own["enum"] = [value for value in own["enum"] if same(value, own["const"])]
            del own["const"]
        if "pattern" in own:
            own["patterns"] = [own.pop("pattern")]
        groups = [[own]]
        if "$ref" in schema:
            target = schema["$ref"]
            if target in following:  # draft 2020-12 leaves open what that means, and validators never end
                raise BadSchema(f"the reference {target!r} leads back to itself without a step into the value")
            groups.append(self.alternatives(self._find(target), following | {target}))
        groups += [self.alternatives(part, following) for part in schema.get("allOf", ())]
        for name in ("anyOf", "oneOf"):
            if name in schema:
                options = [self.alternatives(part, following) for part in schema[name]]
                if name == "oneOf":
                    self._check_apart(options)
                groups.append([flat for option in options for flat in option])
        found = groups[0]
        for group in groups[1:]:
            found = [merged for a in found for b in group if (merged := merge(a, b)) is not None]
            if len(found) > MOST_ALTERNATIVES:
                raise BadSchema(f"allOf, anyOf and oneOf make more than {MOST_ALTERNATIVES} combinations")
        return found

    def values(self, flat: Schema) -> list[Any]:
        """Those values of its `enum` that satisfy the rest of a flat schema."""
        rest = {name: value for name, value in flat.items() if name not in ("enum", "patterns")}
        rest["allOf"] = [{"pattern": pattern} for pattern in flat.get("patterns", ())]
        validator = self._validator.evolve(schema=rest)
        try:
            return [value for value in flat["enum"] if validator.is_valid(value)]
        except RecursionError:
            raise BadSchema("a reference in the JSON schema leads back to itself") from None

    def _check(self, schema: Schema) -> None:
        for name, value in schema.items():
            if name not in KNOWN and not name.startswith("x-"):
                raise BadSchema(f"the JSON schema keyword {name!r} is not supported; these are: {SUPPORTED}")
            if name == "format" and value not in FORMATS:
                raise BadSchema(f"the format {value!r} is not supported; these are: {', '.join(FORMATS)}")
            if name in KEYWORDS["number"] and not (math.isfinite(value) and abs(value) <= MOST_BOUND):
                raise BadSchema(f"{name} {value} is not supported: it must be between -1e50 and 1e50")
            if name == "multipleOf" and not (value == int(value) and value <= MOST_MULTIPLE):
                raise BadSchema(f"multipleOf {value} is not supported: it must be an integer up to {MOST_MULTIPLE}")

    def _find(self, reference: str) -> Any:
        if not reference.startswith("#"):
            raise BadSchema(f"the reference {reference!r} leads out of the schema; only #/... is supported")
        place: Any = self._document
        for step in filter(None, unquote(reference[1:]).split("/")):
            name = step.replace("~1", "/").replace("~0", "~")
            try:
                place = place[int(name)] if isinstance(place, list) else place[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise BadSchema(f"the reference {reference!r} leads nowhere") from None
        if not isinstance(place, dict | bool):
            raise BadSchema(f"the reference {reference!r} leads to something that is no schema")
        return place

    def _check_apart(self, options: list[list[Schema]]) -> None:
        """Refuse oneOf where a value might satisfy two of its options."""
        for i, first in enumerate(options):
            for second in options[i + 1 :]:
                if any(not self.apart(a, b) for a in first for b in second):
                    raise BadSchema(
                        "oneOf is supported only where its options exclude each other by their types, by the values of "
                        "an enum or const, or by those of a required property: use anyOf, or add such a property"
                    )

    def apart(self, a: Schema, b: Schema, depth: int = 0) -> bool:
        """True if it is certain that no value satisfies both flat schemas."""
        merged = merge(a, b)
        if merged is None or ("enum" in merged and not self.values(merged)):
            return True
        if depth > 3 or set(merged.get("type", ())) != {"object"}:
            return False
        for name in merged.get("required", ()):
            one, other = (flat.get("properties", {}).get(name, True) for flat in (a, b))
            if all(self.apart(x, y, depth + 1) for x in self.alternatives(one) for y in self.alternatives(other)):
                return True
        closed = merged.get("additionalProperties") is False
        return closed and any(name not in merged.get("properties", {}) for name in merged.get("required", ()))


def types_of(flat: Schema) -> list[str]:
    """The types that a flat schema allows; without `type` all."""
    types = flat.get("type", list(TYPES))
    return [types] if isinstance(types, str) else types


def same(a: Any, b: Any) -> bool:
    """True if two JSON values are equal: 1 is 1.0, but not true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(a == b)


def merge(a: Schema, b: Schema) -> Schema | None:
    """One flat schema that asks for what both ask for; None: they exclude each other."""
    merged = {**a, **b}
    if "type" in a and "type" in b:
        merged["type"] = list(_common_types(types_of(a), types_of(b)))
        if not merged["type"]:
            return None
    elif "type" in merged:
        merged["type"] = types_of(merged)
    for name in merged.keys() & a.keys() & b.keys():
        if name in _UPPER:
            merged[name] = max(a[name], b[name])
        elif name in _LOWER:
            merged[name] = min(a[name], b[name])
    if "enum" in a and "enum" in b:
        merged["enum"] = [value for value in a["enum"] if any(same(value, other) for other in b["enum"])]
        if not merged["enum"]:
            return None
    if "required" in a and "required" in b:
        merged["required"] = list(dict.fromkeys([*a["required"], *b["required"]]))
    if "patterns" in a and "patterns" in b:
        merged["patterns"] = list(dict.fromkeys([*a["patterns"], *b["patterns"]]))
    if "multipleOf" in a and "multipleOf" in b:
        merged["multipleOf"] = math.lcm(int(a["multipleOf"]), int(b["multipleOf"]))
        if merged["multipleOf"] > MOST_MULTIPLE:
            raise BadSchema(f"two multipleOf have no common multiple up to {MOST_MULTIPLE}, which is not supported")
    if a.get("format", b.get("format")) != b.get("format", a.get("format")):
        raise BadSchema(f"the formats {a['format']!r} and {b['format']!r} at once are not supported")
    if a.get("uniqueItems") or b.get("uniqueItems"):
        merged["uniqueItems"] = True
    _merge_objects(a, b, merged)
    _merge_arrays(a, b, merged)
    return merged


def _common_types(first: Iterable[str], second: Iterable[str]) -> Iterator[str]:
    allowed = {*second, *(["integer"] if "number" in second else [])}
    for name in first:
        if name in allowed:
            yield name
        elif name == "number" and "integer" in allowed:
            yield "integer"


def _merge_objects(a: Schema, b: Schema, merged: Schema) -> None:
    both = [flat for flat in (a, b) if "properties" in flat or "additionalProperties" in flat]
    if len(both) < 2:
        return
    # What one names, and the other does not, must satisfy what the other says of all that it does not name.
    properties = {}
    for name in dict.fromkeys(name for flat in both for name in flat.get("properties", {})):
        asked = [flat.get("properties", {}).get(name, flat.get("additionalProperties", True)) for flat in both]
        properties[name] = _all_of(asked)
    merged["properties"] = properties
    if any("additionalProperties" in flat for flat in both):
        merged["additionalProperties"] = _all_of([flat.get("additionalProperties", True) for flat in both])


def _merge_arrays(a: Schema, b: Schema, merged: Schema) -> None:
    both = [flat for flat in (a, b) if "items" in flat or "prefixItems" in flat]
    if len(both) < 2:
        return
    length = max(len(flat.get("prefixItems", ())) for flat in both)
    at = [[*flat.get("prefixItems", ()), *[flat.get("items", True)] * length][:length] for flat in both]
    if length:
        merged["prefixItems"] = [_all_of(asked) for asked in zip(*at, strict=True)]
    merged["items"] = _all_of([flat.get("items", True) for flat in both])


def _all_of(schemas: Iterable[Any]) -> Any:
    """A schema that asks for all of these."""
    asked = [schema for schema in schemas if schema is not True]
    if any(schema is False for schema in asked):
        return False
    if len(asked) == 2 and asked[0] == asked[1]:
        del asked[1]
    return {"allOf": asked} if len(asked) > 1 else (asked[0] if asked else True)
