"""Tools that a client offers: the calls a model makes of them, and calls that the client requires.

The model has learned one tool, a calculator: it writes an expression between two marks. Without tools in the request
the engine answers that by itself. A client that offers the calculator gets the call instead, and sends the result back.
A call of another tool looks the same inside the marks, name({"argument": ...}), as training data is rendered
(nanochat.messages). A required call is the whole answer, in JSON that fits the tool's parameters.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat.generate.grammar.schema import REMARKS
from nanochat.messages import CALCULATOR_NAMES
from nanochat.serve.answer_events import Event
from nanochat.serve.errors import RequestError
from nanochat.serve.other_fields import unsupported

# Where the expression goes among the parameters of a client's calculator, if there are several texts.
EXPRESSION_NAMES = ("expression", "expr", "code", "input", "query", "formula", "__arg1")
# What a schema of a function without arguments may hold: none of it describes an argument.
NO_ARGUMENTS = {"type", "properties", "required", "additionalProperties", "$id", *REMARKS}


@dataclass(frozen=True)
class ToolCall:
    """A call of a client's tool."""

    name: str
    arguments: str
    """JSON."""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Tools:
    """What a client offers, and whether it must be called."""

    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The JSON schema of each function's arguments, by its name."""
    required: tuple[str, ...] = ()
    """Functions of which one must be called; empty: the model decides."""

    @property
    def expression_of(self) -> str | None:
        """The parameter of a required calculator that takes the expression, if that is all it takes.

        The model then writes the expression as it has learned to; JSON it has not. None: not such a call.
        """
        if len(self.required) != 1 or self.required[0] not in CALCULATOR_NAMES:
            return None
        schema = self.parameters[self.required[0]]
        name, needed = _text_parameter(schema), schema.get("required")
        return name if not isinstance(needed, list) or set(map(str, needed)) <= {name} else None

    @property
    def schema(self) -> dict[str, Any] | None:
        """What a required call must fit; None: none is required, or it is an expression."""
        if not self.required or self.expression_of is not None:
            return None
        if len(self.required) == 1:
            return self.parameters[self.required[0]]
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": self.parameters[name]},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name in self.required
        ]
        return {"anyOf": calls}

    def call_of(self, text: str) -> ToolCall | None:
        """The call that `text`, written between the marks of a tool, makes; None: of none of these tools."""
        name, bracket, rest = text.partition("(")
        if name.strip() in self.parameters and bracket and rest.rstrip().endswith(")"):
            return ToolCall(name.strip(), _as_arguments(rest.rstrip()[:-1], self.parameters[name.strip()]))
        calculator = next((name for name in self.parameters if name in CALCULATOR_NAMES), None)
        if calculator is None:
            return None
        return ToolCall(calculator, json.dumps({_text_parameter(self.parameters[calculator]): text}))

    def required_call(self, text: str) -> ToolCall:
        """The call in an answer that had to be one."""
        if len(self.required) == 1:
            name = self.expression_of
            return ToolCall(self.required[0], text if name is None else json.dumps({name: text}))
        try:
            call = json.loads(text)
            return ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False))
        except (ValueError, KeyError, TypeError):  # the answer was cut
            return ToolCall("", text)

    def warnings(self) -> list[str]:
        """What a client should know about these tools."""
        others = [name for name in self.parameters if name not in CALCULATOR_NAMES]
        if not others or self.required:
            return []
        return [
            f"models here learn to call a calculator (named {', '.join(CALCULATOR_NAMES)}); of the tools, "
            f"{', '.join(others)[:200]} will be called if tool_choice requires it, or by a model trained to do so"
        ]


NO_TOOLS = Tools()


def read_tools(tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None) -> Tools:
    """The tools of a request, in the form of either of OpenAI's APIs.

    Raises:
        RequestError: 400, naming the field.
    """
    parameters = {}
    for i, tool in enumerate(tools or []):
        function = tool.get("function", tool) if tool.get("type", "function") == "function" else None
        if function is None:
            raise unsupported(f"tools[{i}].type", "only functions can be called")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RequestError(400, f"tools[{i}] must be a function with a name", param=f"tools[{i}].name")
        schema = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(schema, dict):
            raise RequestError(400, f"the parameters of {name} must be a JSON schema", param=f"tools[{i}].parameters")
        bare = not schema.get("required") and schema.keys() <= NO_ARGUMENTS
        if bare and schema.get("properties") == {}:  # a function without arguments is called without any
            schema = {"additionalProperties": False, **schema}
        parameters[name] = schema
    if choice in (None, "auto", ""):
        return Tools(parameters)
    if choice == "none":
        return NO_TOOLS
    if not parameters:
        raise RequestError(400, "tool_choice needs tools", param="tool_choice")
    if choice in ("required", "any"):
        return Tools(parameters, tuple(parameters))
    function = choice.get("function", choice) if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if name is None:
        raise unsupported("tool_choice", 'it may be "auto", "none", "required" or a function')
    if name not in parameters:
        raise RequestError(
            400, f"tool_choice names {str(name)[:80]!r}, which is none of the tools", param="tool_choice"
        )
    return Tools(parameters, (name,))


class CallReader:
    """Turns the events of one answer into events and calls of the client's tools.

    An answer ends with the first call that the model makes by itself: `AnswerStream` sees to that.
    """

    def __init__(self, tools: Tools) -> None:
        self._tools, self._held = tools, ""
        self.called = False
        """True when a call was made."""

    def read(self, event: Event) -> Iterator[Event | ToolCall]:
        """What the client is told because of an event: the event itself, a call, or nothing yet."""
        if self._tools.required:
            if event.kind == "text":
                self._held += event.text  # a call is told whole
                return
            if event.kind == "done" and self._held:
                yield self._call(self._tools.required_call(self._held))
        elif event.kind == "python" and (call := self._tools.call_of(event.text)) is not None:
            yield self._call(call)
            return
        yield event

    def _call(self, call: ToolCall) -> ToolCall:
        self.called = True
        return call


def _text_parameter(schema: dict[str, Any]) -> str:
    """The name of the parameter that takes an expression."""
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    texts = [name for name, kind in properties.items() if isinstance(kind, dict) and kind.get("type") == "string"]
    return next((name for name in (*EXPRESSION_NAMES, *texts) if name in texts), "expression")


def _as_arguments(text: str, schema: dict[str, Any]) -> str:
    """What stands in the brackets of a call, as a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return json.dumps(value if isinstance(value, dict) else {_text_parameter(schema): text}, ensure_ascii=False)
