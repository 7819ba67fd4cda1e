"""The monitor as a page for this machine's browser: the page asks for a new look every few seconds."""

from __future__ import annotations

from typing import Any

from nanochat.report.html import TEMPLATES, template
from nanochat.report.monitor import Watcher
from nanochat.report.monitor_terminal import headline, machine_facts, training_facts

LOCAL_HOSTS = ["127.0.0.1", "localhost"]
WIDTH, HEIGHT = 640.0, 200.0  # of the curve, in its own units
POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(watcher: Watcher, interval: float) -> Any:
    """A FastAPI app with the page, its script, and `/frame`, the part that changes."""
    from fastapi import FastAPI, Response
    from fastapi.responses import HTMLResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(title="nanochat monitor", docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere that rebinds its name to 127.0.0.1 gets nothing.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}

    @app.get("/", response_class=HTMLResponse)
    def page() -> Response:
        html = template("monitor.html").render(frame=render_frame(watcher), milliseconds=round(interval * 1000))
        return HTMLResponse(html, headers=headers)

    @app.get("/frame", response_class=HTMLResponse)
    def frame() -> Response:
        return HTMLResponse(render_frame(watcher), headers=headers)

    @app.get("/monitor.js")
    def script() -> Response:
        return Response((TEMPLATES / "monitor.js").read_bytes(), media_type="text/javascript", headers=headers)

    return app


def render_frame(watcher: Watcher) -> str:
    """The part of the page that changes."""
    frame = watcher.look()
    training = frame.training
    return template("monitor_frame.html").render(
        frame=frame,
        headline=headline(frame),
        facts=training_facts(training) if training else [],
        machine=machine_facts(frame.cards, frame.load),
        points=svg_points(*training.curve) if training and len(training.curve[0]) > 1 else None,
        first=training.curve[0][0] if training and training.curve[0] else 0,
        highest=max(training.curve[1], default=0.0) if training else 0.0,
        lowest=min(training.curve[1], default=0.0) if training else 0.0,
        width=WIDTH,
        height=HEIGHT,
    )


def svg_points(x: Any, y: Any) -> str:
    """A curve as the points of an SVG polyline that fills WIDTH × HEIGHT."""
    wide, tall = (max(x) - min(x)) or 1.0, (max(y) - min(y)) or 1.0
    points = (((a - min(x)) / wide * WIDTH, HEIGHT - (b - min(y)) / tall * HEIGHT) for a, b in zip(x, y, strict=True))
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
