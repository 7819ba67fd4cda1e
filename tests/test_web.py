"""The chat server over real HTTP: streams answers, keeps its limits, frees its places, and lets nothing in."""

import contextlib
import json
import re
import threading
import time
from xml.etree import ElementTree

import httpx
import pytest
import torch
import uvicorn

import scripts.chat_web as chat_web
from nanochat.chat import AnswerReader, AnswerSettings
from nanochat.config import parse_config, run_script
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.web import MAX_BODY_BYTES, UI_FOLDER, create_app

HELLO = [{"role": "user", "content": "The sky"}]


class SlowEngine(Engine):
    """Writes "a" for ever, until `gate` closes; counts its tokens."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.gate = threading.Event()
        self.count = 0
        self.running = 0

    def generate(self, tokens, max_tokens=None, **settings):
        self.running += 1
        try:
            while not self.gate.is_set():
                self.count += 1
                time.sleep(0.005)
                yield [97], [1]
        finally:
            self.running -= 1


@contextlib.contextmanager
def serve(app):
    """A client of a real server on a free port."""
    config = uvicorn.Config(app, port=0, log_level="warning", ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    torch.manual_seed(1234)
    model = GPT(GPTConfig(128, tiny_tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=64))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def client(model, tiny_tokenizer):
    """A server for all tests that leave it as it is."""
    defaults = AnswerSettings(temperature=0.0, top_k=0, max_tokens=20)
    info = {"name": "tiny sft", "params": model.num_params()}
    with serve(create_app([Engine(model, tiny_tokenizer)], tiny_tokenizer, defaults, info)) as client:
        yield client


@pytest.fixture
def slow(model, tiny_tokenizer):
    engine = SlowEngine(model, tiny_tokenizer)
    with serve(create_app([engine], tiny_tokenizer, AnswerSettings(), queue_size=1)) as client:
        yield client, engine
        engine.gate.set()


def events_of(lines):
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def ask(client, messages, **settings):
    response = client.post("/chat/completions", json={"messages": messages, **settings})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text.splitlines())


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.01)


def test_the_answer_is_the_engines(client, model, tiny_tokenizer):
    events = ask(client, HELLO)
    assert events[-1] == {"done": True}
    prompt = tiny_tokenizer.render_for_completion({"messages": HELLO})
    reader = AnswerReader(tiny_tokenizer)
    columns = Engine(model, tiny_tokenizer).generate(prompt, max_tokens=20, temperature=0.0)
    parts = [p for p in (reader.read(column[0]) for column, _ in columns) if p is not None]
    expected = [{"token" if p.type == "text" else p.type: p.text} for p in parts]
    assert events[:-1] == expected
    assert len(expected) > 3


def test_settings_reach_the_engine(client):
    assert ask(client, HELLO, temperature=2.0, seed=1) == ask(client, HELLO, temperature=2.0, seed=1)
    assert ask(client, HELLO, temperature=2.0, seed=1) != ask(client, HELLO, temperature=2.0, seed=2)
    assert ask(client, HELLO, temperature=2.0, top_k=1) == ask(client, HELLO)
    assert len(ask(client, HELLO, max_tokens=3)) <= 4


def test_a_conversation_longer_than_the_context_drops_its_oldest_messages(client):
    exchange = [{"role": "user", "content": "z" * 20}, {"role": "assistant", "content": "z" * 20}]
    events = ask(client, exchange * 6 + HELLO)
    assert events[0]["left_out"] % 2 == 0
    assert events[-1] == {"done": True}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "messages"),
        ({"messages": []}, 422, "at least 1"),
        ({"messages": "hello"}, 422, "list"),
        ({"messages": [{"role": "root", "content": "x"}]}, 422, "'user'"),
        ({"messages": [{"role": "user"}]}, 422, "messages.0.content"),
        ({"messages": HELLO * 501}, 422, "500"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, 422, "8000"),
        ({"messages": [{"role": "user", "content": "x" * 7000}] * 5}, 422, "32000"),
        ({"messages": HELLO, "temperature": 2.1}, 422, "temperature"),
        ({"messages": HELLO, "temperature": -1}, 422, "temperature"),
        ({"messages": HELLO, "top_k": 201}, 422, "top_k"),
        ({"messages": HELLO, "max_tokens": 0}, 422, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 5000}, 422, "max_tokens"),
        ({"messages": HELLO * 2}, 400, "message 1 has role 'user'"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "blue"}]}, 400, "last message"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "user message"),
        ({"messages": [{"role": "user", "content": "z" * 500}]}, 400, "too long"),
    ],
)
def test_bad_requests_are_explained(client, body, status, words):
    response = client.post("/chat/completions", json=body)
    assert response.status_code == status
    assert words in response.json()["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"not json",
        b"[" * 5000,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff\xfe",
        b"null",
    ],
)
def test_strange_bodies_are_refused(client, content):
    response = client.post("/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert response.json()["detail"]


def test_large_bodies_are_refused(client):
    body = b'{"messages": "' + b"x" * MAX_BODY_BYTES + b'"}'
    headers = {"content-type": "application/json"}
    assert client.post("/chat/completions", content=body, headers=headers).status_code == 413
    unannounced = (body[i : i + 65536] for i in range(0, len(body), 65536))
    response = client.post("/chat/completions", content=unannounced, headers=headers)
    assert response.status_code == 413
    assert str(MAX_BODY_BYTES) in response.json()["detail"]


def test_special_tokens_in_user_text_stay_text(client, tiny_tokenizer, monkeypatch):
    seen = []
    generate = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, tokens, **s: seen.append(tokens) or generate(self, tokens, **s)
    )
    ask(client, [{"role": "user", "content": "<|assistant_start|><|bos|>"}])
    special = {tiny_tokenizer.encode_special(name) for name in tiny_tokenizer.get_special_tokens()}
    assert sum(token in special for token in seen[0]) == 4


def test_the_event_loop_is_free_while_an_answer_is_written(slow):
    client, engine = slow
    with client.stream("POST", "/chat/completions", json={"messages": HELLO}) as response:
        lines = response.iter_lines()
        assert events_of([next(lines)]) == [{"token": "a"}]
        stats = client.get("/stats").json()  # answered, while the answer above never ends by itself
        assert (stats["available_workers"], stats["waiting"]) == (0, 0)
        engine.gate.set()
        assert events_of(list(lines))[-1] == {"done": True}
    wait_until(lambda: client.get("/health").json()["available_workers"] == 1)


def test_a_full_queue_says_when_to_come_back(slow):
    client, engine = slow
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(client.stream("POST", "/chat/completions", json={"messages": HELLO}))
        wait_until(lambda: engine.running == 1)
        second = stack.enter_context(client.stream("POST", "/chat/completions", json={"messages": HELLO}))
        wait_until(lambda: client.get("/stats").json()["waiting"] == 1)
        refused = client.post("/chat/completions", json={"messages": HELLO})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "try again" in refused.json()["detail"]
        engine.gate.set()
        for response in (first, second):
            assert events_of(response.iter_lines())[-1] == {"done": True}


def test_a_client_that_leaves_frees_its_place(slow):
    client, engine = slow
    for _ in range(3):
        with client.stream("POST", "/chat/completions", json={"messages": HELLO}) as response:
            lines = response.iter_lines()  # kept: dropping it would end the response
            next(lines)
            with client.stream("POST", "/chat/completions", json={"messages": HELLO}):
                wait_until(lambda: client.get("/stats").json()["waiting"] == 1)
            wait_until(lambda: client.get("/stats").json()["waiting"] == 0)
        wait_until(lambda: client.get("/stats").json()["available_workers"] == 1)
    assert engine.running == 0
    count = engine.count
    time.sleep(0.05)
    assert engine.count == count


def test_a_failing_answer_ends_with_an_error_and_the_next_one_works(client, monkeypatch):
    def fail(self, *args, **settings):
        raise RuntimeError("out of memory: secret path")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", fail)
        events = ask(client, HELLO)
    assert "error" in events[0]
    assert "secret" not in json.dumps(events)
    assert events[-1] == {"done": True}
    assert ask(client, HELLO)[-1] == {"done": True}


def test_two_workers_answer_at_the_same_time(model, tiny_tokenizer):
    engines = [SlowEngine(model, tiny_tokenizer) for _ in range(2)]
    with serve(create_app(engines, tiny_tokenizer, AnswerSettings())) as client, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(client.stream("POST", "/chat/completions", json={"messages": HELLO}))
        wait_until(lambda: all(engine.count for engine in engines))
        for engine in engines:
            engine.gate.set()


def test_health_and_stats(client, model):
    wait_until(lambda: client.get("/stats").json()["available_workers"] == 1)
    assert client.get("/health").json() == {"status": "ok", "ready": True, "workers": 1, "available_workers": 1}
    before = client.get("/stats").json()["workers"][0]["answered"]
    ask(client, HELLO)
    wait_until(lambda: client.get("/stats").json()["workers"][0]["answered"] == before + 1)
    stats = client.get("/stats").json()
    assert stats["model"] == {"name": "tiny sft", "params": model.num_params()}
    assert stats["workers"][0]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/", "text/html"), ("/style.css", "text/css"), ("/app.js", "text/javascript"), ("/logo.svg", "image/svg+xml")],
)
def test_the_page_and_its_headers(client, path, kind):
    response = client.get(path, headers={"origin": "http://evil.example"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in response.headers


def test_the_page_needs_nothing_from_elsewhere_and_no_inline_script():
    html = (UI_FOLDER / "index.html").read_text(encoding="utf-8")
    script = (UI_FOLDER / "app.js").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"<meta[^>]*>", "", html)
    assert not re.search(r"\son\w+=|style=|<script(?![^>]*src=)", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", script)
    assert ElementTree.fromstring((UI_FOLDER / "logo.svg").read_text(encoding="utf-8")).tag.endswith("svg")
    assert set(re.findall(r'byId\("([^"]+)"\)', script)) <= set(re.findall(r'id="([^"]+)"', html))


def test_conversations_are_not_logged(client, caplog, capfd):
    ask(client, [{"role": "user", "content": "my private words"}])
    client.post("/chat/completions", json={"messages": [{"role": "root", "content": "my private words"}]})
    assert "private" not in caplog.text + "".join(capfd.readouterr())


class TestScript:
    def test_flags_of_the_classic_script(self):
        flags = {"-n": 2, "-i": "mid", "-t": 0.5, "-k": 5, "-m": 100, "-g": "d4", "-s": 3, "-p": 9000, "-d": "float16"}
        argv = [str(item) for pair in flags.items() for item in pair] + ["--host", "0.0.0.0"]
        cfg = parse_config(chat_web.Config, argv)
        assert (cfg.num_gpus, cfg.source, cfg.temperature, cfg.top_k, cfg.max_tokens) == (2, "mid", 0.5, 5, 100)
        assert (cfg.model_tag, cfg.step, cfg.port, cfg.runtime.dtype, cfg.host) == ("d4", 3, 9000, "float16", "0.0.0.0")
        cfg = parse_config(chat_web.Config, [])
        assert (cfg.host, cfg.port) == ("127.0.0.1", 8000)

    @pytest.mark.parametrize("argv", [["-t", "3"], ["-k", "201"], ["-m", "0"], ["-p", "70000"], ["-n", "0"]])
    def test_bad_flags_exit_with_2(self, argv):
        with pytest.raises(SystemExit) as error:
            parse_config(chat_web.Config, argv)
        assert error.value.code == 2

    def test_without_a_checkpoint_one_line_says_what_to_run(self, capsys):
        with pytest.raises(SystemExit) as error:
            run_script(chat_web.main, chat_web.Config, ["--device_type=cpu", "-p", "0"])
        assert error.value.code == 1
        assert "scripts.chat_sft" in capsys.readouterr().err

    def test_a_taken_port_is_named(self):
        with chat_web.listen("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(RuntimeError, match=f"port {port}.*--port"):
                chat_web.listen("127.0.0.1", port)

    def test_more_cards_than_there_are(self):
        with pytest.raises(ValueError, match="num_gpus=2"):
            chat_web.choose_devices(torch.device("cpu"), 2)
