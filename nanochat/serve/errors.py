"""Errors of the chat server: all have the shape of OpenAI's API, and name the field as the client wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

CLIENT_GONE = 499  # nobody reads this; the number is the one nginx logs

UNREADABLE = "There was an error parsing the body"  # FastAPI, of what is no text or exhausts the parser
# What pydantic calls a body that is missing or no JSON object.
NO_OBJECT = ("missing", "model_attributes_type", "dict_type", "model_type")


class AsciiJSON(JSONResponse):
    """JSON in ASCII: no client takes a character for the end of a line, and half a surrogate pair can be written."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return json.dumps(content, allow_nan=False).encode()


class RequestError(HTTPException):
    """A request that can't be served: an error in the shape of OpenAI's API."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=headers)
        self.body = error_body(message, kind=kind, code=code, param=param)


def error_body(
    message: str, *, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of every error this server answers with."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def explain_problems(problems: Iterable[dict[str, Any]], body: Any = None) -> tuple[str, str | None]:
    """Summarize validation errors as (message, first wrong field), without repeating the request's content.

    Args:
        problems: as pydantic lists them.
        body: what the client sent; shows which parts of a problem's place are names of its fields.
    """
    said: dict[str, list[str]] = {}
    for problem in problems:
        if len(problem["loc"]) < 2 and problem["type"] in NO_OBJECT:
            return "the body must be a JSON object", None
        message = str(problem["msg"]).removeprefix("Value error, ")
        said.setdefault(field_name(problem["loc"], body, problem["type"] == "missing"), []).append(message)
    # A field that may be of several types has a problem for each of them: one sentence for the field.
    sentences = [
        f"{name}: {' or: '.join(dict.fromkeys(messages))}" if name else "; ".join(dict.fromkeys(messages))
        for name, messages in said.items()
    ]
    return "; ".join(sentences[:5]), next(iter(said), None) or None


def field_name(place: Sequence[str | int], body: Any, is_missing: bool = False) -> str:
    """A problem's place as the client would write it: `messages[1].content`.

    Pydantic's places also hold names of alternatives ("constrained-str"), which no client knows: they are left out. The
    last name in the place of a field that `is_missing` stays, though the body has none.
    """
    name, value = "", body
    for i, part in enumerate(place):
        if i == 0 and part == "body":
            continue
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            name, value = f"{name}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (is_missing and i == len(place) - 1)):
            name, value = f"{name}.{part}" if name else str(part), value.get(str(part))
    return name


def add_error_handlers(app: FastAPI, headers: Mapping[str, str]) -> None:
    """Give every error the shape of `error_body`; a failure of the server reveals no details and gets `headers`."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and not (sent == "application/json" or sent.endswith("+json")):
            said = f"got {sent!r:.80}" if sent else "the request has none"
            message = f"send the body as JSON with the header Content-Type: application/json ({said})"
            return AsciiJSON(error_body(message, code="invalid_content_type", param="Content-Type"), 400)
        broken = next((p for p in error.errors() if p["type"] == "json_invalid"), None)
        if broken is not None:  # its place is a number of characters, and error.body the text
            reason = str(broken.get("ctx", {}).get("error", broken["msg"]))
            where = f", at character {broken['loc'][-1]}" if isinstance(broken["loc"][-1], int) else ""
            return AsciiJSON(error_body(f"the body is not valid JSON: {reason}{where}", code="invalid_json"), 400)
        message, param = explain_problems(error.errors(), error.body)
        return AsciiJSON(error_body(message, param=param), 400)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)  # RequestError is one too
        if isinstance(error, RequestError):
            body = error.body
        elif error.status_code == 404:
            body = error_body("there is nothing here; OpenAI's API is at /v1, the page at /", code="not_found")
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            body = error_body(f"{request.method} is not allowed here: use {allowed}", code="method_not_allowed")
        elif error.detail == UNREADABLE:
            message = "the body can't be read: JSON in UTF-8 is expected, nested fewer than a thousand levels deep"
            body = error_body(message, code="invalid_json")
        else:
            body = error_body(str(error.detail))
        return AsciiJSON(body, error.status_code, headers=error.headers)

    async def failed(request: Request, error: Exception) -> JSONResponse:
        message = "the server failed; its log says why"
        return AsciiJSON(error_body(message, kind="server_error"), 500, headers=headers)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(StarletteHTTPException, http_error)
    app.add_exception_handler(Exception, failed)
