"""Checks before every route of the chat server: the key, the origin, the size of a body; and the security headers."""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.errors import RequestError
from nanochat.serve.schemas import MAX_BODY_BYTES

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of access to the server."""

    api_key: str | None = None
    """The key that a client must send as `Authorization: Bearer ...`; None: no key is needed."""
    open_paths: frozenset[str] = frozenset({"/health"})
    """Paths that need no key (the page's files are added)."""
    cors_origins: tuple[str, ...] = ()
    """Other sites whose pages may call this server."""
    local_only: bool = False
    """Refuse requests that were sent to a host name other than this machine's: a web page elsewhere can point a name
    of its own at 127.0.0.1 (DNS rebinding) and then read what the server answers."""

    def opened(self, paths: Iterable[str]) -> Access:
        """A copy with more paths that need no key."""
        return dataclasses.replace(self, open_paths=self.open_paths | frozenset(paths))


class Guard:
    """Middleware that refuses requests against the rules, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = RequestError(413, f"the request is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
        received = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise too_large
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        headers = Headers(scope=scope)
        refusal = self._refusal(scope["path"], scope["method"], headers)
        announced = headers.get("content-length", "0")
        if refusal is None and announced.isdecimal() and len(announced) < 20 and int(announced) > MAX_BODY_BYTES:
            refusal = too_large
        if refusal is not None:
            response = JSONResponse(refusal.body, refusal.status_code, headers=refusal.headers)
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, limited_receive, send_with_headers)

    def _refusal(self, path: str, method: str, headers: Headers) -> RequestError | None:
        access = self.access
        host = host_name(headers.get("host", ""))
        if access.local_only and host not in LOCAL_HOSTS:
            return RequestError(403, f"this server answers on {', '.join(LOCAL_HOSTS)} only", code="wrong_host")
        origin = headers.get("origin")
        same_site = origin is None or origin.split("://", 1)[-1].lower() == headers.get("host", "").lower()
        if not same_site and origin not in access.cors_origins:
            # Another site's page. Without this check it could not read the answers, but it could ask.
            message = "pages of other sites may not call this server: allow them with --cors_origins"
            return RequestError(403, message, code="wrong_origin")
        preflight = method == "OPTIONS"  # a browser's question whether it may ask; it carries no key
        if access.api_key is None or path in access.open_paths or preflight:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(key.strip().encode("utf-8", "replace"), access.api_key.encode("utf-8"))
        if scheme.lower() == "bearer" and same:
            return None
        return RequestError(
            401,
            "this server wants an API key: send it as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def host_name(host: str) -> str:
    """The name in a Host header: `[::1]:8000` is ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
