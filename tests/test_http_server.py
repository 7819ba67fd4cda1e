"""The sockets of the chat server: who is slow, silent or one too many keeps nobody else out, and fills no log."""

import contextlib
import json
import logging
import socket
from asyncio.selector_events import _SelectorSocketTransport
from types import SimpleNamespace

import httpx
import pytest
from web_server import HELLO, ScriptedEngine, serve, tiny_app, tiny_chat_model, wait_until

import nanochat.serve.answers as answers
import nanochat.serve.http_server as http_server
from nanochat.serve.http_server import RepeatFilter, connection_limit, listen

BODY = json.dumps({"messages": HELLO}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def client(tiny_tokenizer):
    app, engine = tiny_app(tiny_chat_model(tiny_tokenizer), tiny_tokenizer, ScriptedEngine)
    with serve(app) as client:
        client.engine = engine
        yield client


@pytest.fixture
def impatient(monkeypatch):
    """Limits that a test can wait for."""
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(http_server, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(http_server, "BODY_BYTES_PER_SECOND", 1e6)


@contextlib.contextmanager
def connect(client, data=b""):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
        raw.sendall(data)
        yield raw


def everything(raw):
    """What comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while data := raw.recv(65536):
            received += data
    return received


def closed(raw):
    """True if the server has closed the connection."""
    raw.setblocking(False)
    try:
        return not raw.recv(1)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_a_short_request_costs_one_write_and_no_thread(client, monkeypatch):
    """Each would cost a millisecond of a machine that computes; an answer of one token takes a few."""
    written = []
    write = _SelectorSocketTransport.write
    monkeypatch.setattr(
        _SelectorSocketTransport, "write", lambda self, data: [written.append(bytes(data)), write(self, data)]
    )
    threads = []
    run = answers.run_in_threadpool
    monkeypatch.setattr(answers, "run_in_threadpool", lambda *work: [threads.append(work), run(*work)][1])
    for text, used in (("Hi", 0), ("word " * 2000, 1)):  # a long one must not stop the event loop
        body = {"messages": [{"role": "user", "content": text}], "truncation": "auto"}
        client.post("/v1/chat/completions", json=body)
        assert len(threads) == used
    answer = next(data for data in written if data.startswith(b"HTTP/1.1 200"))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["object"] == "chat.completion"


def test_small_packets_are_sent_at_once(client):
    assert client.get("/health").status_code == 200
    server_side = [c.transport.get_extra_info("socket") for c in client.server.server_state.connections]
    assert server_side
    assert all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in server_side)


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"", b""),
        (HEAD, b"408"),  # the header does not end
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"408"),  # the body does not come
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he", b"200"),  # the second header does not end
    ],
)
def test_who_takes_too_long_is_sent_away(client, impatient, data, answer):
    with connect(client, data) as raw:
        received = everything(raw)
    assert answer in received.partition(b"\r\n")[0]
    if answer == b"408":
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
    wait_until(lambda: client.get("/health").json()["available_workers"] == 1)


def test_a_request_may_come_in_pieces_and_an_answer_may_take_its_time(client, impatient):
    engine = client.engine
    engine.script, engine.delay = [("text", "a")] * 20, 0.1
    try:
        with connect(client, HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY)) as raw:
            for byte in BODY[:10]:
                raw.sendall(bytes([byte]))
            raw.sendall(BODY[10:])
            received = b""
            while b'"usage"' not in received:
                received += raw.recv(65536)
        assert b"a" * 20 in received
    finally:
        engine.script, engine.delay = ScriptedEngine.script, ScriptedEngine.delay


def test_when_all_connections_are_taken_the_silent_ones_make_room(tiny_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(http_server, "connection_limit", lambda: 20)
    app, engine = tiny_app(tiny_chat_model(tiny_tokenizer), tiny_tokenizer, ScriptedEngine)
    engine.script, engine.delay = [("text", "a")] * 60, 0.05
    with serve(app) as client, contextlib.ExitStack() as stack:
        body = {"messages": HELLO, "stream": True}
        answers = [stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body)) for _ in range(3)]
        for i in range(100):
            stack.enter_context(connect(client, b"GET / HT"[: i % 8]))
        assert httpx.get(f"{client.base_url}/health", timeout=10).status_code == 200
        assert len(client.server.server_state.connections) <= 20
        for answer in answers:  # who is being answered is not disturbed
            assert "".join(answer.iter_lines()).endswith("[DONE]")
        # All at once, while the loop of the server can do nothing else: not more of them go than must.
        raws = [stack.enter_context(connect(client)) for _ in range(15)]
        assert client.get("/health").status_code == 200
        assert sum(not closed(raw) for raw in raws) > 5
    assert len([r for r in caplog.records if "connections are taken" in r.message]) == 1


def test_when_all_are_being_answered_one_more_is_told_to_come_back(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(http_server, "connection_limit", lambda: 3)
    app, engine = tiny_app(tiny_chat_model(tiny_tokenizer), tiny_tokenizer, ScriptedEngine)
    engine.script, engine.delay = [("text", "a")] * 100, 0.05
    with serve(app) as client, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(client.stream("POST", "/chat/completions", json={"messages": HELLO}))
        response = httpx.get(f"{client.base_url}/health", timeout=10)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["type"] == "server_error"


def test_who_does_not_read_the_answer_is_given_up(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(http_server, "SEND_SECONDS", 0.2)
    app, engine = tiny_app(tiny_chat_model(tiny_tokenizer), tiny_tokenizer, ScriptedEngine)
    engine.script, engine.delay = [("text", "a" * 100_000)] * 200, 0.0
    request = HEAD.replace(b"/v1", b"") + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    with serve(app) as client, connect(client, request):
        wait_until(lambda: any(c._paused_since for c in client.server.server_state.connections))
        wait_until(lambda: not client.server.server_state.connections)


def test_the_number_of_connections_leaves_room_for_files(monkeypatch):
    resource = pytest.importorskip("resource")
    for files, least, most in ((1024, 500, 900), (256, 8, 150), (10, 8, 8), (10**6, 1024, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))  # noqa: B023
        assert least <= connection_limit() <= most
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert connection_limit() == http_server.MAX_CONNECTIONS


def test_the_log_says_each_kind_of_thing_once_a_minute(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(http_server, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = logging.getLogger("nanochat.serve.test")
    log.addFilter(RepeatFilter())
    for i in range(500):
        log.warning("bad request from %s", i)
        log.error("something else")
    now[0] += 61
    log.warning("bad request from %s", 7)
    assert [r.getMessage() for r in caplog.records] == [
        "bad request from 0",
        "something else",
        "bad request from 7 (and 499 more like this before)",
    ]


def test_garbage_fills_no_log(client, caplog):
    for _ in range(50):
        with connect(client, b"\x16\x03\x01 this is no HTTP\r\n\r\n") as raw:
            assert b"400" in everything(raw)
    assert len(caplog.records) <= 1


def test_a_taken_port_is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"port {port}.*--port"):
            listen("127.0.0.1", port)
