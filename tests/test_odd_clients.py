"""Requests as curl, old libraries, proxies and people's mistakes make them: an answer, or a sentence that helps."""

from __future__ import annotations

import gzip
import json
import socket
import zlib

import pytest
from web_server import serve, tiny_app, tiny_chat_model

from nanochat.generate.sampling import Sampling
from nanochat.serve.guard import Access, plain_path
from nanochat.serve.schemas import MAX_BODY_BYTES

ASKED = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
BODY = json.dumps(ASKED).encode()
CHAT = "/v1/chat/completions"
BOMB = gzip.compress(b'{"messages": "' + b"a" * (2 * MAX_BODY_BYTES) + b'"}')


@pytest.fixture(scope="module")
def client(tiny_tokenizer):
    defaults = Sampling(temperature=0.0, top_k=0, max_tokens=2)
    app, _ = tiny_app(
        tiny_chat_model(tiny_tokenizer), tiny_tokenizer, defaults=defaults, access=Access(local_only=True)
    )
    with serve(app) as client:
        yield client


def request(path=CHAT, body=BODY, method="POST", version="1.1", host="localhost", close=True, **headers):
    """The bytes of a request; a header that is None is left out."""
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {"Connection": "close"} if close and version == "1.1" else {}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/{version}\r\n{head}\r\n".encode() + body


def exchange(client, data):
    """All that the server sends up to its end of the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as raw:
        raw.sendall(data)
        received = b""
        while part := raw.recv(65536):
            received += part
    return received


def chunked(*chunks, extension=b"", trailer=b""):
    parts = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    return parts + b"0\r\n" + trailer + b"\r\n"


CHUNKED = {"Content_Length": None, "Transfer_Encoding": "chunked"}
ANSWERED = {
    "HTTP/1.0": request(version="1.0"),
    "HTTP/1.0 without a Host": request(version="1.0", host=None),
    "in chunks": request(body=chunked(BODY[:9], BODY[9:]), **CHUNKED),
    "in chunks, with an extension and a trailer": request(
        body=chunked(BODY, extension=b";a=b", trailer=b"X-Sum: 1\r\n"), **CHUNKED
    ),
    "lines end in LF": request(body=b"").replace(b"\r\n", b"\n").replace(b"Length: 0", b"Length: %d" % len(BODY))
    + BODY,
    "a folded header": request(X_Note="one\r\n two"),
    "the whole address": request(path=f"http://localhost:8000{CHAT}"),
    "two slashes": request(path="/v1//chat/completions"),
    "a slash before": request(path=f"/{CHAT}"),
    "a slash at the end": request(path=f"{CHAT}/"),
    "a query": request(path=f"{CHAT}?api-version=2024-06-01"),
    "gzip": request(body=gzip.compress(BODY), Content_Encoding="gzip"),
    "x-gzip, in chunks": request(
        body=chunked(gzip.compress(BODY)[:11], gzip.compress(BODY)[11:]), Content_Encoding="X-GZIP", **CHUNKED
    ),
    "deflate": request(body=zlib.compress(BODY), Content_Encoding="deflate"),
    "identity": request(Content_Encoding="identity"),
    "a byte order mark": request(body=b"\xef\xbb\xbf" + BODY),
    "UTF-16": request(body=BODY.decode().encode("utf-16")),
    "a charset": request(Content_Type="application/json; charset=utf-8"),
    "a type in capitals": request(Content_Type="APPLICATION/JSON"),
    "another type of JSON": request(Content_Type="application/vnd.api+json"),
    "a name to its end": request(host="localhost.:8000"),
    "a name in capitals": request(host="LOCALHOST"),
    "IPv6": request(host="[::1]:8000"),
    "an upgrade": request(Upgrade="h2c", HTTP2_Settings="AAMAAABkAAQAAP__"),
    "an empty key": request(Authorization="Bearer"),
    "long cookies": request(Cookie="a=" + "b" * 8000),
    "Accept of a stream only": request(Accept="text/event-stream"),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_it_is_answered(client, name):
    head, _, body = exchange(client, ANSWERED[name]).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), (head, body)
    assert json.loads(body)["choices"][0]["message"]["role"] == "assistant"


REFUSED = {
    "br": (request(Content_Encoding="br"), 415, "encoded as 'br': send it as it is, or as gzip"),
    "no gzip": (request(Content_Encoding="gzip"), 400, "not what its Content-Encoding says"),
    "half of a gzip": (request(body=gzip.compress(BODY)[:-9], Content_Encoding="gzip"), 400, "not what its Content"),
    "more behind a gzip": (request(body=gzip.compress(BODY) + b"x" * 99, Content_Encoding="gzip"), 400, "not what its"),
    "a bomb": (request(body=BOMB, Content_Encoding="gzip"), 413, "larger than"),
    "Latin-1": (request(body=BODY.replace(b"Hi", b"caf\xe9")), 400, "JSON in UTF-8"),
    "too deep": (request(body=b"[" * 50_000 + b"]" * 50_000), 400, "nested"),
    "GET": (request(method="GET", body=b""), 405, "GET is not allowed here: use POST"),
    "text": (request(Content_Type="text/plain"), 400, "application/json"),
    "a form": (request(Content_Type="application/x-www-form-urlencoded"), 400, "application/json"),
    "another name": (request(host="evil.example"), 403, "--public_url"),
    "another name, over HTTP/1.0": (request(host="evil.example", version="1.0"), 403, "--public_url"),
    "another path": (request(path="/v1/v1/chat/completions"), 404, "OpenAI's API is at /v1"),
    "no body": (request(body=b""), 400, "JSON object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_sentence(client, name):
    data, status, said = REFUSED[name]
    head, _, body = exchange(client, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status), (head, body)
    assert said in json.loads(body)["error"]["message"]


def test_expect_100_continue_is_answered_before_the_body_comes(client):
    data = request(Expect="100-continue")
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as raw:
        raw.sendall(data[: -len(BODY)])
        assert raw.recv(100).startswith(b"HTTP/1.1 100")
        raw.sendall(BODY)
        assert raw.recv(100).startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_their_order(client):
    bodies = [json.dumps(ASKED | {"max_tokens": n}).encode() for n in (1, 2, 1)]
    data = b"".join(request(body=body, close=i == 2) for i, body in enumerate(bodies))
    answers = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in exchange(client, data).split(b"HTTP/1.1 200")[1:]]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [1, 2, 1]


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 200), ("/", 200), ("/health", 200), (CHAT, 405)])
def test_head_has_no_body(client, path, status):
    head, _, body = exchange(client, request(path=path, method="HEAD", body=b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert body == b""


def test_paths_as_they_were_meant():
    assert plain_path("/") == plain_path("//") == plain_path("http://localhost:8000") == "/"
    assert (
        plain_path("/v1/models/") == plain_path("//v1//models") == plain_path("https://a.b/v1/models") == "/v1/models"
    )
    assert plain_path("/v1/http://x") == "/v1/http:/x"
