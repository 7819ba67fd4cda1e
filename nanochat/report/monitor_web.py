"""The monitor as a page for this machine's browser, which takes what is new into it every few seconds."""

from __future__ import annotations

import threading

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanochat.report.html import TEMPLATES, template
from nanochat.report.monitor import StageCurve, Watcher
from nanochat.report.plots import Line, Plotter
from nanochat.stages import TRAINED

LOCAL_HOSTS = ["127.0.0.1", "localhost"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def monitor_app(watcher: Watcher, interval: float) -> FastAPI:
    """The server of the page."""
    app = FastAPI(title="nanochat monitor", docs_url=None, redoc_url=None, openapi_url=None)
    # A page elsewhere that rebinds its name to 127.0.0.1 gets nothing.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_HOSTS)

    pictures = Pictures()

    @app.get("/")
    def page() -> HTMLResponse:
        frame = watcher.look()
        plots = [pictures.plot(curve) for curve in frame.curves]
        html = template("monitor.html").render(frame=frame, seconds=max(1, round(interval)), plots=plots)
        return HTMLResponse(html, headers=HEADERS)

    @app.get("/monitor.js")
    def script() -> FileResponse:
        return FileResponse(TEMPLATES / "monitor.js", media_type="text/javascript; charset=utf-8", headers=HEADERS)

    @app.get("/report")
    def report() -> Response:
        path = watcher.look().report
        if path is None:
            return HTMLResponse("The report is not written yet.", 404, headers=HEADERS)
        return FileResponse(path, media_type="text/html; charset=utf-8", headers=HEADERS)

    return app


class Pictures:
    """The curves as SVG. What has not changed since it was asked for last is not drawn again: that takes a tenth of a
    second of a machine that trains.
    """

    def __init__(self) -> None:
        self._plotter = Plotter()
        self._lock = threading.Lock()  # matplotlib's settings are the process's
        self._drawn: dict[tuple[str, str], tuple[StageCurve, str]] = {}

    def plot(self, curve: StageCurve) -> tuple[str, str, str]:
        """(title, last value, SVG)."""
        what = curve.unit.split(",")[0]
        with self._lock:
            known, svg = self._drawn.get((curve.stage, curve.unit), (None, ""))
            if known != curve:
                color = [names.name for names in TRAINED.values()].index(curve.stage)
                lines = [Line("training text", curve.steps, curve.losses, color)]
                if curve.new_text is not None:
                    lines.append(Line("new text", *curve.new_text, color + 1))
                svg = self._plotter.lines(f"{curve.title}: {what}", lines, unit=curve.unit.split(", ")[-1])
                self._drawn[curve.stage, curve.unit] = curve, svg
        return curve.title, f"last: {curve.losses[-1]:.4g}", svg
