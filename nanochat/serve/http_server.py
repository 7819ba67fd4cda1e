"""The sockets of the chat server: uvicorn, with limits on time and on the number of connections.

A client that says nothing, or says it too slowly, must not keep others out. So every connection has until HEAD_SECONDS
for its header, its body must come at BODY_BYTES_PER_SECOND or faster, and an answer that nobody reads is given up after
SEND_SECONDS. There are fewer connections than the process may have open files; when all are taken, those that have been
waiting longest without a request make room. A flood of any kind writes a line a minute into the log, not thousands.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from typing import Any, cast

import h11
import psutil
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.serve.errors import error_body

HEAD_SECONDS = 10.0  # from the first byte (of a new connection: from its beginning) to the end of the header
BODY_SECONDS = 10.0  # a body may take this long in any case, and longer if it comes fast enough
BODY_BYTES_PER_SECOND = 1024
IDLE_SECONDS = 75  # between two requests; longer than the 60 s after which proxies close their side
SEND_SECONDS = 60.0  # without a byte of an answer being taken
MAX_CONNECTIONS = 1024  # more clients than one model can serve
ACCEPTS_AT_ONCE = 32  # asyncio accepts so many before it looks at any of them
SPARE_FILES = 4 * ACCEPTS_AT_ONCE + 64  # for those, and for the files of checkpoints, logs and the page
LISTEN_QUEUE = 1024
LOG_SECONDS = 60.0
LOGGERS = ("uvicorn.error", "asyncio", "nanochat.serve")
logger = logging.getLogger("nanochat.serve")


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket, before the model is loaded: so a port that is taken shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise RuntimeError(f"can't listen on {host}, port {port} ({error.strerror}): choose another --port") from error


def make_server(app: Any, drain_seconds: float) -> LimitedServer:
    """A server of `app` for `run(sockets=[...])`; when it stops, answers have `drain_seconds` to finish."""
    config = ServerConfig(
        app,
        http=LimitedConnection,
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=int(drain_seconds),
        # asyncio takes this for the number it accepts in one go, uvicorn for the queue of the kernel: see `startup`.
        backlog=ACCEPTS_AT_ONCE,
    )
    config.max_connections = connection_limit()
    for name in LOGGERS:
        log = logging.getLogger(name)
        log.filters = [each for each in log.filters if not isinstance(each, RepeatFilter)]
        log.addFilter(RepeatFilter())
    return LimitedServer(config)


def connection_limit() -> int:
    """The number of connections that leaves room for the other files of this process."""
    try:
        import resource  # lazy: Windows has none
    except ImportError:
        return MAX_CONNECTIONS
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, files - psutil.Process().num_fds() - SPARE_FILES))


class ServerConfig(uvicorn.Config):
    """uvicorn's settings, and how many connections there may be."""

    max_connections = MAX_CONNECTIONS


class LimitedServer(uvicorn.Server):
    """A uvicorn server that closes connections which are over their limits."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        for sock in sockets or []:
            sock.listen(LISTEN_QUEUE)  # `backlog` was smaller

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                cast(LimitedConnection, connection).check(now)
        return await super().on_tick(counter)


class TogetherTransport:
    """A transport that sends in one go what is written during one turn of the event loop: a header and its body."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send the data before the event loop waits again."""
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def close(self) -> None:
        """Send what was written, then close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._written:
            self._transport.write(b"".join(self._written))
            self._written.clear()


class LimitedConnection(H11Protocol):
    """A connection with limits.

    It is in one of three phases: "head" (a request has not come, or not its whole header), "body" (of a request), or
    "answer" (it is the server's turn). A kept-alive connection between two requests is in "head" too, but nothing of
    the next one has come: uvicorn closes it after IDLE_SECONDS.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        self._paused_since: float | None = None
        super().connection_made(cast(asyncio.Transport, TogetherTransport(transport, self.loop)))
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            # Without this what is written later (the next event of a stream) waits 40 ms for the client's delayed
            # acknowledgement of the first. (asyncio does it only for sockets that name their protocol.)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._since, self._received, self._seen = time.monotonic(), 0, self._state()
        self._make_room(cast(ServerConfig, self.config).max_connections)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        self._count(len(data))

    def on_response_complete(self) -> None:
        """Called by uvicorn."""
        super().on_response_complete()
        if begun := self.conn.trailing_data[0]:  # of the next request, which came with this one
            self._count(len(begun))

    def pause_writing(self) -> None:
        """Called by asyncio when the client does not take what is sent."""
        self._paused_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Called by asyncio when it does again."""
        self._paused_since = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Close the connection if its client has used up its time."""
        if self._paused_since is not None and now - self._paused_since > SEND_SECONDS:
            self.transport.abort()
        if self._seen != self._state() or self.transport.is_closing():
            return
        waited = now - self._since
        if self._seen[1] == "head" and waited > HEAD_SECONDS:
            self._close("408 Request Timeout", f"the request's header did not come within {HEAD_SECONDS:.0f} s")
        elif self._seen[1] == "body" and waited > BODY_SECONDS + self._received / BODY_BYTES_PER_SECOND:
            self._close(
                "408 Request Timeout", f"the request's body came slower than {BODY_BYTES_PER_SECOND} bytes per second"
            )

    def _count(self, received: int) -> None:
        if self._seen != self._state():
            self._since, self._received, self._seen = time.monotonic(), 0, self._state()
        self._received += received

    def _state(self) -> tuple[object, str]:
        """The request and its phase."""
        if self.cycle is None or self.cycle.response_complete:
            return self.cycle, "head"
        return self.cycle, "body" if self.cycle.more_body else "answer"

    def _standing(self) -> tuple[int, float]:
        """The order in which connections make room for others: the lowest first."""
        if self.cycle is None:
            return 0, self._since  # it has never asked for anything
        return (1 if self._state()[1] == "body" else 2), self._since

    def _make_room(self, limit: int) -> None:
        if len(self.connections) <= limit:
            return
        # Those that were closed a moment ago are still listed.
        others = [cast(LimitedConnection, c) for c in self.connections if c is not self]
        others = [c for c in others if not c.transport.is_closing()]
        if len(others) < limit:
            return
        waiting = [c for c in others if c._state()[1] != "answer"]
        logger.warning("all %d connections are taken: those without a request make room for new ones", limit)
        if not waiting:
            self._close("503 Service Unavailable", f"all {limit} connections are in use: try again")
        # Several at once, so that not every new one has to look at all of them.
        for connection in sorted(waiting, key=LimitedConnection._standing)[: 1 + limit // 16]:
            connection.transport.abort()

    def _close(self, status: str, message: str) -> None:
        """Close; with an answer if nothing of another one was sent. Who has said nothing hears nothing."""
        unanswered = self.cycle is None or self.conn.their_state is h11.IDLE or not self.cycle.response_started
        if unanswered and (self._received or status.startswith("503")):
            body = json.dumps(error_body(message, kind="server_error" if status[0] == "5" else "invalid_request_error"))
            head = [f"HTTP/1.1 {status}", "Connection: close", "Retry-After: 5", "Content-Type: application/json"]
            self.transport.write("\r\n".join([*head, f"Content-Length: {len(body)}", "", body]).encode())
        self.transport.close()


class RepeatFilter(logging.Filter):
    """Lets each kind of message through once in LOG_SECONDS, with the number of those that were left out before it."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[Any, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record; two are of a kind if they differ in their values only."""
        kind = (record.levelno, record.msg, record.exc_info and record.exc_info[0])
        now = time.monotonic()
        when, left_out = self._last.get(kind, (float("-inf"), 0))
        if now - when < LOG_SECONDS:
            self._last[kind] = (when, left_out + 1)
            return False
        if len(self._last) > 1000:  # messages that are put together before they are logged
            self._last.clear()
        self._last[kind] = (now, 0)
        if left_out:
            record.msg = f"{record.getMessage()} (and {left_out} more like this before)"
            record.args = ()
        return True
