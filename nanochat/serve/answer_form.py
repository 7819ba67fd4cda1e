"""The form that an answer must have: JSON of a schema, one of some texts, a regular expression.

A request says so by the field of whichever server its client was written for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.generate.grammar import Grammars
from nanochat.generate.sampling import Constraint
from nanochat.serve.errors import RequestError
from nanochat.serve.other_fields import unsupported
from nanochat.serve.schemas import MAX_REGEX, OpenAIRequest

# Settings of vLLM's that forbid what is not done here anyway.
NO_FORM = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


@dataclass(frozen=True)
class AnswerForm:
    """What an answer must be."""

    kind: Literal["json", "choice", "regex"]
    value: Any
    """A JSON schema, a list of texts, or a regular expression."""
    param: str
    """The field that says so."""

    def compile(self, grammars: Grammars) -> Constraint:
        """The form as the engine needs it.

        Raises:
            RequestError: 400, it is malformed or can't be followed.
        """
        try:
            if self.kind == "json":
                return grammars.json_schema(self.value)
            return grammars.choice(self.value) if self.kind == "choice" else grammars.regex(self.value)
        except ValueError as error:
            raise RequestError(400, f"{self.param}: {error}", code="invalid_schema", param=self.param) from error


def wanted_form(body: OpenAIRequest) -> AnswerForm | None:
    """The form that a request asks for; None: any text.

    Raises:
        RequestError: 400, a field is malformed, asks for another form, or two fields ask for one.
    """
    found = list(_forms(body))
    if len(found) > 1:
        message = f"{found[0].param} and {found[1].param} both say what the answer must be: leave one out"
        raise RequestError(400, message, param=found[1].param)
    return found[0] if found else None


def _forms(body: OpenAIRequest) -> Iterator[AnswerForm]:
    wanted, param = body.format
    if wanted is not None and (schema := _format_schema(wanted, param)) is not None:
        yield AnswerForm("json", schema, param)
    for name in ("json_schema", "guided_json"):
        if (value := getattr(body, name)) is not None:
            yield AnswerForm("json", _as_schema(value, name), name)
    if body.guided_choice:
        yield AnswerForm("choice", body.guided_choice, "guided_choice")
    if body.guided_regex:
        yield AnswerForm("regex", body.guided_regex, "guided_regex")
    for key, value in (body.structured_outputs or {}).items():
        param = f"structured_outputs.{key[:40]}"
        if value is None or value is False or key in NO_FORM:
            continue
        if key in ("json", "json_object"):
            yield AnswerForm("json", {"type": "object"} if key == "json_object" else _as_schema(value, param), param)
        elif key == "choice" and isinstance(value, list) and all(isinstance(text, str) for text in value):
            yield AnswerForm("choice", value, param)
        elif key == "regex" and isinstance(value, str) and len(value) <= MAX_REGEX:
            yield AnswerForm("regex", value, param)
        else:
            raise unsupported(param)


def _format_schema(wanted: dict[str, Any], param: str) -> dict[str, Any] | bool | None:
    """The schema in a `response_format`, or in the `text.format` of /v1/responses; None: any text."""
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _as_schema(wanted.get("schema") or {"type": "object"}, param)
    if kind == "json_schema":
        inner = wanted.get("json_schema", wanted)
        if not isinstance(inner, dict) or "schema" not in inner:
            raise RequestError(400, f"{param} has no schema: put it into json_schema.schema", param=param)
        return _as_schema(inner["schema"], param)
    raise unsupported(param, "its type may be text, json_object or json_schema")


def _as_schema(value: Any, param: str) -> dict[str, Any] | bool:
    """A schema, which may be written as a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RequestError(400, f"{param} is not valid JSON: {error}", param=param) from None
    if not isinstance(value, dict | bool):
        raise RequestError(400, f"{param}: a JSON schema must be an object", param=param)
    return value
