"""The monitor as a page for this machine's browser, which loads it anew every few seconds: no script."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanochat.report.html import template
from nanochat.report.monitor import Watcher

LOCAL_HOSTS = ["127.0.0.1", "localhost"]
WIDTH, HEIGHT = 640.0, 200.0  # of the curve, in its own units
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def monitor_app(watcher: Watcher, interval: float) -> FastAPI:
    """The server of the page."""
    app = FastAPI(title="nanochat monitor", docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere that rebinds its name to 127.0.0.1 gets nothing.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)

    @app.get("/")
    def page() -> HTMLResponse:
        frame = watcher.look()
        x, y = frame.curve
        points = svg_points(x, y) if len(x) > 1 else None
        html = template("monitor.html").render(
            frame=frame, seconds=max(1, round(interval)), points=points, size=(WIDTH, HEIGHT)
        )
        return HTMLResponse(html, headers=HEADERS)

    return app


def svg_points(x: Sequence[float], y: Sequence[float]) -> str:
    """A curve as the points of an SVG polyline that fills WIDTH × HEIGHT."""
    wide, tall = (max(x) - min(x)) or 1.0, (max(y) - min(y)) or 1.0
    points = (((a - min(x)) / wide * WIDTH, HEIGHT - (b - min(y)) / tall * HEIGHT) for a, b in zip(x, y, strict=True))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
