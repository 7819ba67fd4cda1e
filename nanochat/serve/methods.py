"""HEAD and OPTIONS for every route."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send


class AnyMethod:
    """Middleware that answers HEAD like GET without the body, and OPTIONS with the methods of the path.

    Args:
        app: what is asked.
        routes: its routes.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app, self.routes = app, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and scope["method"] == "HEAD":
            # The server knows the client's method and sends no body; the routes need not know of it.
            inner = {**scope, "method": "GET"}
            try:
                await self.app(inner, receive, send)
            finally:
                scope["route"] = inner.get("route")  # which the metrics look for
            return
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and (methods := self._methods(scope)):
            await Response(status_code=204, headers={"Allow": ", ".join(methods)})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _methods(self, scope: Scope) -> list[str]:
        routes = [route for route in self.routes if route.matches(scope)[0] != Match.NONE]
        methods = {method for route in routes for method in getattr(route, "methods", None) or ()}
        if not methods:
            return []
        scope["route"] = routes[0]
        return sorted(methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set()))
