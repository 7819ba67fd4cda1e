"""The generator of identity conversations against a local server that answers as OpenAI's API does."""

import importlib.util
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nanochat.data.chat_loader import load_conversations

pytest.importorskip("openai")
spec = importlib.util.spec_from_file_location("gen", Path(__file__).parents[1] / "dev" / "gen_synthetic_data.py")
gen = importlib.util.module_from_spec(spec)
sys.modules["gen"] = gen
spec.loader.exec_module(gen)

GOOD = {"messages": [{"role": "user", "content": "Who are you? ü"}, {"role": "assistant", "content": "I am Bob."}]}


class Server:
    """Answers every third request badly, one with an error; remembers the prompts."""

    def __init__(self):
        self.prompts = []
        self.broken = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.prompts.append(body["messages"][0]["content"])
                n = len(outer.prompts)
                status = 400 if outer.broken else 503 if n == 2 else 200
                text = "I would rather not." if n % 3 == 0 else f"```json\n{json.dumps(GOOD)}\n```"
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                reply = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                data = json.dumps(reply if status == 200 else {"error": {"message": "no such model"}}).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_it_writes_conversations_that_can_be_trained_on_and_goes_on(server, base_dir, tmp_path):
    about = tmp_path / "about.txt"
    about.write_text("The assistant is called Bob.")
    gen.main(gen.Config(base_url=server.url, model="m", about=str(about), num=5, workers=2))
    path = base_dir / "identity_conversations.jsonl"
    assert load_conversations(path) == [GOOD] * 5
    assert all("called Bob" in prompt for prompt in server.prompts)
    assert len(set(server.prompts)) > 3
    with open(path, "a") as f:
        f.write('{"number": 5, "mess')  # torn by a kill
    asked = len(server.prompts)
    gen.main(gen.Config(base_url=server.url, model="m", about=str(about), num=7, workers=1))
    assert len(load_conversations(path)) == 7
    assert 2 <= len(server.prompts) - asked <= 4


def test_the_shipped_identity_is_the_default(server, tmp_path):
    gen.main(gen.Config(base_url=server.url, model="m", num=1, workers=1, out=str(tmp_path / "o.jsonl")))
    assert "My name is nanochat." in server.prompts[0]


def test_errors_are_one_sentence(server, tmp_path):
    server.broken = True
    with pytest.raises(RuntimeError, match="no such model"):
        gen.main(gen.Config(base_url=server.url, model="m", num=1, out=str(tmp_path / "o.jsonl")))
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
        gen.main(gen.Config(base_url=server.url, model="m", about="nothing.txt"))
