"""Who may ask the chat server: its own page, also behind any proxy, and the pages of allowed origins; nobody else's."""

import re

import pytest
from web_server import HELLO, serve, tiny_app, tiny_chat_model

import scripts.chat_web as chat_web
from nanochat.config import parse_config
from nanochat.serve.app import UI_FOLDER
from nanochat.serve.guard import Access, parse_origin, parse_public_url, parse_root_path

PUBLIC = "https://chat.example.org"
FILES = ["/", *(f"/{p.name}" for p in UI_FOLDER.iterdir() if p.name != "index.html")]


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return tiny_chat_model(tiny_tokenizer)


@pytest.fixture
def served(model, tiny_tokenizer):
    """A function that serves with rules of access, and asks once."""

    def ask(access, method="POST", path="/chat/completions", **headers):
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        with serve(tiny_app(model, tiny_tokenizer, access=access)[0]) as client:
            body = {"messages": HELLO, "max_tokens": 2} if method == "POST" else None
            return client.request(method, path, json=body, headers=sent)

    return ask


def access(*argv):
    return parse_config(chat_web.Config, list(argv)).access(None)


def test_the_pages_own_files_are_nobodys_secret(model, tiny_tokenizer):
    with serve(tiny_app(model, tiny_tokenizer, access=Access(api_key="key"))[0]) as client:
        for path in FILES:
            assert client.get(path, headers={"origin": PUBLIC}).status_code == 200, path
        assert client.get("/stats", headers={"origin": PUBLIC, "authorization": "Bearer key"}).status_code == 403


def test_the_page_names_nothing_from_the_root():
    html = (UI_FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?:/|http)[^"]*"', html)
    scripts = "".join(p.read_text(encoding="utf-8") for p in UI_FOLDER.glob("*.js"))
    assert not re.findall(r'(?:request|fetch)\("/', scripts)


@pytest.mark.parametrize(
    ("rules", "headers", "status"),
    [
        # A proxy that passes the Host on; one that names itself as browsers don't; nginx's default, three ways.
        (Access(), {"host": "chat.example.org"}, 200),
        (Access(), {"host": "chat.example.org:443"}, 200),
        (Access(), {"x_forwarded_host": "chat.example.org"}, 200),
        (Access(), {"x_forwarded_host": "Chat.Example.org, inner"}, 200),
        (Access(), {"sec_fetch_site": "same-origin"}, 200),
        (Access(public_url=PUBLIC), {}, 200),
        (Access(public_url=f"{PUBLIC}/chat"), {}, 200),
        # Other sites.
        (Access(), {}, 403),
        (Access(), {"sec_fetch_site": "cross-site"}, 403),
        (Access(), {"x_forwarded_host": "other.example.org"}, 403),
        (Access(public_url="https://other.example.org"), {"sec_fetch_site": "same-site"}, 403),
        # A name that points here (DNS rebinding) is refused whatever else the page says.
        (Access(local_only=True), {"host": "chat.example.org", "x_forwarded_host": "chat.example.org"}, 403),
        (Access(local_only=True), {"host": "chat.example.org", "sec_fetch_site": "same-origin"}, 403),
        (Access(local_only=True, public_url=PUBLIC), {"host": "chat.example.org"}, 200),
        (Access(local_only=True, public_url=PUBLIC), {"host": "evil.example.org"}, 403),
    ],
)
def test_the_own_page_behind_a_proxy_and_others(served, rules, headers, status):
    response = served(rules, origin=PUBLIC, **headers)
    assert response.status_code == status
    if status == 403:
        assert "--public_url" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("allowed", "yes", "no"),
    [
        ("*", ["https://a.example", "null", "app://x", "tauri://localhost"], []),
        (
            "https://a.example",
            ["https://a.example"],
            ["http://a.example", "https://a.example.evil", "https://xa.example"],
        ),
        ("https://a.example/", ["https://a.example"], ["null"]),
        ("HTTPS://A.example", ["https://a.example"], []),
        ("http://localhost:*", ["http://localhost:3000"], ["http://localhost.evil.example:1", "http://localhost"]),
        ("https://*.example.org", ["https://a.example.org"], ["https://a.example.org.evil", "https://example.org"]),
        ("app://", ["app://obsidian.md", "app://-"], ["apps://x", "https://app"]),
        ("tauri://localhost", ["tauri://localhost"], ["tauri://other"]),
        ("chrome-extension://*", ["chrome-extension://abcdef"], ["https://abcdef"]),
        ("null", ["null"], ["https://a.example"]),
    ],
)
def test_allowed_origins(model, tiny_tokenizer, allowed, yes, no):
    with serve(tiny_app(model, tiny_tokenizer, access=access(f"--cors_origins={allowed}"))[0]) as client:
        for origin in yes:
            asked = {"origin": origin, "access-control-request-method": "POST"}
            preflight = client.options("/v1/chat/completions", headers=asked)
            assert (preflight.status_code, origin) == (200, origin)
            response = client.get("/stats", headers={"origin": origin})
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] in (origin, "*")
        for origin in no:
            response = client.get("/stats", headers={"origin": origin})
            assert (response.status_code, origin) == (403, origin)
            assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("text", ["", "x.org", "https://a.example/path", "://x", "https://a b", "nul"])
def test_what_is_no_origin_is_refused(text):
    with pytest.raises(ValueError, match="cors_origins"):
        parse_origin(text)


@pytest.mark.parametrize("text", ["chat.example.org", "ftp://x", "https://", "https://u:p@x", "https://x/?a=1"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match="public_url"):
        parse_public_url(text)


def test_paths():
    assert [parse_root_path(p) for p in ("", "/", "chat", "/chat/", "/a/b")] == ["", "", "/chat", "/chat", "/a/b"]
    for text in ("https://x", "/a?b", "/a b", "/a//b"):
        with pytest.raises(ValueError, match="root_path"):
            parse_root_path(text)
    assert access("--public_url=https://x.org/chat/").root_path == "/chat"
    assert access("--public_url=https://x.org/chat", "--root_path=/").root_path == ""


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("root", ["/chat", "/v1", "/a/b"])
def test_under_a_path_whether_or_not_the_proxy_takes_it_away(model, tiny_tokenizer, root, strip):
    before = "" if strip else root
    with serve(tiny_app(model, tiny_tokenizer, access=Access(root_path=root))[0]) as client:
        for path in (*FILES, "/stats", "/v1/models"):
            assert client.get(before + path).status_code == 200, path
        for path in ("/chat/completions", "/v1/chat/completions"):
            body = {"messages": HELLO, "max_tokens": 2}
            assert client.post(before + path, json=body).status_code == 200, path
        if not strip:
            slashless = client.get(root, follow_redirects=False)
            assert slashless.headers["location"] == f"{root}/"
            assert client.get(f"{root}//v1/models/").status_code == 200
        assert client.get("/nothing").status_code == 404
        assert client.get(f"{root}/nothing").status_code == 404


def test_a_path_takes_no_key_away(model, tiny_tokenizer):
    with serve(tiny_app(model, tiny_tokenizer, access=Access(api_key="k", root_path="/chat"))[0]) as client:
        assert client.get("/chat/").status_code == 200
        for path in ("/stats", "/chat/stats", "/chat/v1/models", "/chat/chat/completions"):
            assert client.get(path).status_code == 401
