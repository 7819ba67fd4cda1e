"""Checks before every route of the chat server: the key, the origin, the size of a body; and the security headers."""

from __future__ import annotations

import dataclasses
import hmac
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.errors import RequestError
from nanochat.serve.schemas import MAX_BODY_BYTES

CODINGS = ("gzip", "x-gzip", "deflate")  # of a request's body
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
    """Origins whose pages may call this server: `https://example.org`, `http://localhost:*`, `app://` (every origin of
    that scheme), `null` (pages from files), `*` (all)."""
    local_only: bool = False
    """Refuse requests that were sent to a host name other than this machine's: a web page elsewhere can point a name
    of its own at 127.0.0.1 (DNS rebinding) and then read what the server answers."""
    public_url: str | None = None
    """The address under which a proxy makes this server known, such as `https://example.org/chat`."""
    root_path: str = ""
    """The path under which it does, such as `/chat`; proxies may or may not take it away from what they pass on."""

    def opened(self, paths: Iterable[str]) -> Access:
        """A copy with more paths that need no key."""
        return dataclasses.replace(self, open_paths=self.open_paths | frozenset(paths))

    @property
    def public_host(self) -> str:
        """The host of `public_url`, with its port if that is not the usual one; "" without one."""
        return without_usual_port(urlsplit(self.public_url or "").netloc)

    @property
    def origin_pattern(self) -> str | None:
        """A regular expression that matches the allowed origins and no other; None if there are none."""
        if not self.cors_origins:
            return None
        # What a `*` stands for ends at a slash, so that `https://*.example.org` is that site's only.
        named = (re.escape(origin).replace(r"\*", "[^/]*") for origin in self.cors_origins)
        return "|".join(".*" if name == "[^/]*" else name for name in named)


def parse_origin(text: str) -> str:
    """The origin, or pattern of origins, that a user has named with --cors_origins.

    Raises:
        ValueError: it is none.
    """
    origin = text.strip().rstrip("/").lower() if not text.strip().endswith("://") else f"{text.strip().lower()}*"
    if origin in ("*", "null") or re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+", origin):
        return origin
    raise ValueError(f"--cors_origins takes origins such as https://example.org, app://, null or *, got {text!r}")


def parse_public_url(text: str) -> str:
    """The address that a user has named with --public_url, without a slash at its end.

    Raises:
        ValueError: it is none.
    """
    parts = urlsplit(text.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ValueError(f"--public_url takes an address such as https://example.org/chat, got {text!r}")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def parse_root_path(text: str) -> str:
    """The path that a user has named with --root_path: with a slash at its beginning, without one at its end.

    Raises:
        ValueError: it is no path.
    """
    path = "/" + text.strip().strip("/")
    if not re.fullmatch(r"/|(/[\w.~%+@:-]+)+", path, re.ASCII):
        raise ValueError(f"--root_path takes a path such as /chat, got {text!r}")
    return "" if path == "/" else path


def add_guard(app: FastAPI, access: Access) -> None:
    """Put the checks before every route of `app`, and answer the questions of browsers about other sites' pages."""
    app.add_middleware(Guard, access=access)
    if access.cors_origins:  # outermost, so that a page of an allowed origin can read the guard's refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=["*"] if "*" in access.cors_origins else [],
            allow_origin_regex=access.origin_pattern,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )


class Guard:
    """Middleware that refuses requests against the rules, and adds the security headers to every response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access
        self._origins = re.compile(access.origin_pattern or "(?!)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = RequestError(413, f"the request is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
        received = 0
        headers = Headers(scope=scope)
        coding = headers.get("content-encoding", "").strip().lower()
        inflate = zlib.decompressobj(47) if coding in CODINGS else None  # 32 + 15: zlib's form or gzip's

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            sent = len(message.get("body", b""))
            if inflate is not None and message["type"] == "http.request":
                message = {**message, "body": _inflated(inflate, message)}
            received += max(sent, len(message.get("body", b"")))  # compressed bytes may stand for none
            if received > MAX_BODY_BYTES:
                raise too_large
            return message

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        root = self.access.root_path
        # In place: the metrics look for the route in this scope.
        scope["path"], slash = plain_path(scope["path"]), scope["path"].endswith("/")
        if root and scope["path"] == root and not slash:  # the page's own files are named relative to root/
            await RedirectResponse(f"{root}/")(scope, receive, send_with_headers)
            return
        # A path that is a route already came through a proxy that takes the root away: under /chat, that of the page's
        # question is /chat/completions either way.
        if root and f"{scope['path']}/".startswith(f"{root}/") and not _is_route(scope):
            scope["path"] = scope["path"][len(root) :] or "/"
        refusal = self._refusal(scope, headers)
        announced = headers.get("content-length", "0")
        if refusal is None and announced.isdecimal() and len(announced) < 20 and int(announced) > MAX_BODY_BYTES:
            refusal = too_large
        if refusal is None and coding not in ("", "identity", *CODINGS):
            message = f"the body is encoded as {coding!r:.40}: send it as it is, or as gzip or deflate"
            refusal = RequestError(415, message, code="unsupported_encoding", param="Content-Encoding")
        if refusal is not None:
            response = JSONResponse(refusal.body, refusal.status_code, headers=refusal.headers)
            await response(scope, receive, send_with_headers)
            return
        await self.app(scope, limited_receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> RequestError | None:
        access, path, method = self.access, scope["path"], scope["method"]
        host = headers.get("host", "").lower()
        # No browser leaves the name out; a program that speaks HTTP/1.0 may.
        unnamed = not host and scope["http_version"] == "1.0"
        if (
            access.local_only
            and not unnamed
            and host_name(host) not in (*LOCAL_HOSTS, host_name(access.public_host) or LOCAL_HOSTS[0])
        ):
            return RequestError(
                403,
                f"this server answers on {', '.join(LOCAL_HOSTS)} only: start it with --public_url=ADDRESS if a proxy "
                "makes it known under another name",
                code="wrong_host",
            )
        is_file = path in access.open_paths and method in ("GET", "HEAD")  # of the page: no secret, and harmless
        origin = headers.get("origin")
        if origin is not None and not is_file and not self._may_ask(origin.lower(), host, headers):
            # Another site's page. Without this check it could not read the answers, but it could ask.
            message = (
                f"pages of other sites may not call this server: allow them with --cors_origins={origin}, or, if this "
                f"is the server's own page behind a proxy, start it with --public_url={origin}"
            )
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

    def _may_ask(self, origin: str, host: str, headers: Headers) -> bool:
        """True for the server's own page, and for those of the allowed origins."""
        # Behind a proxy Host may be the name of this machine; what the browser has asked for is in a header that other
        # sites' pages can't set without a preflight, or in one that no page can set.
        forwarded = headers.get("x-forwarded-host", "").partition(",")[0].strip().lower()
        own = {without_usual_port(name) for name in (host, forwarded, self.access.public_host) if name}
        return (
            without_usual_port(origin.partition("://")[2]) in own
            or headers.get("sec-fetch-site") == "same-origin"
            or self._origins.fullmatch(origin) is not None
        )


def host_name(host: str) -> str:
    """The name in a Host header: `[::1]:8000` is ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower().removesuffix(".")  # `localhost.` is the same name, written to its end


def plain_path(path: str) -> str:
    """The path that was meant: `//v1//models/` is /v1/models, and so is `http://localhost:8000/v1/models`.

    Joined addresses have two slashes where one is meant, or one at the end, and a client that thinks it
    talks to a proxy sends the whole address. A redirect would lose the body of a request with most clients.
    """
    return re.sub(r"/+", "/", re.sub(r"^https?://[^/]*", "", path)).rstrip("/") or "/"


def _inflated(inflate: Any, message: Message) -> bytes:
    """The next part of a body that comes compressed; at most one byte more than a body may have."""
    broken = RequestError(400, "the body is not what its Content-Encoding says", param="Content-Encoding")
    try:
        body: bytes = inflate.decompress(message.get("body", b""), MAX_BODY_BYTES + 1)
    except zlib.error:
        raise broken from None
    ends_early = not message.get("more_body") and not inflate.eof and len(body) <= MAX_BODY_BYTES
    if ends_early or inflate.unused_data:  # something stands behind its end: not even a second body is read
        raise broken
    return body


def _is_route(scope: Scope) -> bool:
    return any(route.matches(scope)[0] is not Match.NONE for route in scope["app"].routes)


def without_usual_port(host: str) -> str:
    """`example.org:443` is example.org: browsers leave the usual port out, some proxies put it in."""
    return host.lower().removesuffix(":443").removesuffix(":80")
