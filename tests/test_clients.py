"""Real clients talk to a served model: each says what the engine says to the same conversation, whole and streamed.

The clients have an environment of their own, which `bash tests/clients/setup.sh` makes (CI does it); without it the
tests are skipped. The model is of random weights: a message lost, doubled or out of order gives another text.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from web_server import serve, tiny_app, tiny_chat_model

from nanochat.engine import Engine
from nanochat.messages import normalise

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = Path(os.environ.get("NANOCHAT_CLIENTS", ROOT / ".clients"))
PYTHON, MODULES = CLIENTS / "venv" / "bin" / "python", CLIENTS / "node_modules"
SETUP = "run `bash tests/clients/setup.sh`"
NAMES = ["langchain", "litellm", "pydantic_ai", "instructor", "llm"]
SYSTEM, SKY, BLUE, SEA = (
    {"role": role, "content": content}
    for role, content in [("system", "Be brief."), ("user", "The sky"), ("assistant", "is blue"), ("user", "And sea")]
)
TALK = [SYSTEM, SKY, BLUE, SEA]
SPLIT = [SYSTEM, SKY, BLUE, {"role": "user", "content": "And"}, {"role": "user", "content": "sea"}]
KIND = {"role": "system", "content": "Be kind."}
PARAMETERS = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Server:
    """A served model, and what it must say."""

    def __init__(self, url, model, tokenizer):
        self.url, self.tokenizer, self.engine = url, tokenizer, Engine(model, tokenizer)

    def chat(self, messages, max_tokens=12):
        """The answer to a conversation."""
        turns, _ = normalise(messages)
        return self._text(self.tokenizer.render_for_completion({"messages": turns}), max_tokens)

    def text(self, prompt, max_tokens=5):
        """How a text goes on."""
        return self._text([self.tokenizer.get_bos_token_id(), *self.tokenizer.encode(prompt)], max_tokens)

    def _text(self, prompt, max_tokens):
        sequences, _ = self.engine.generate_batch(prompt, max_tokens=max_tokens, temperature=0.0)
        return self.tokenizer.decode_bytes(sequences[0][len(prompt) :]).decode("utf-8", "ignore")

    def run(self, command, folder):
        """The results that a program of clients prints."""
        env = {**os.environ, "NO_PROXY": "127.0.0.1", "PYTHONPATH": "", "OPENAI_API_KEY": "key"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def server(tiny_tokenizer):
    model = tiny_chat_model(tiny_tokenizer, sequence_len=256)
    with serve(tiny_app(model, tiny_tokenizer)[0]) as http:
        yield Server(f"{str(http.base_url).rstrip('/')}/v1", model, tiny_tokenizer)


@pytest.fixture(scope="module")
def python_clients(server):
    if not PYTHON.exists():
        pytest.skip(f"no environment with the clients: {SETUP}")
    folder = ROOT / "tests" / "clients"
    return server.run([str(PYTHON), "run.py", server.url, *NAMES], folder)


@pytest.fixture(scope="module")
def js_clients(server, tmp_path_factory):
    if not MODULES.exists() or shutil.which("node") is None:
        pytest.skip(f"no node or no modules with the clients: {SETUP}")
    folder = tmp_path_factory.mktemp("js")  # node looks for modules beside the program
    (folder / "node_modules").symlink_to(MODULES)
    shutil.copy(ROOT / "tests" / "clients" / "js_clients.mjs", folder)
    return server.run(["node", "js_clients.mjs", server.url, json.dumps(PARAMETERS)], folder)


def results_of(clients, name):
    results = clients[name]
    if "missing" in results:
        pytest.skip(f"{results['missing']}: {SETUP}")
    return results


def is_person(value):
    return (
        set(value) == {"name", "age"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
    )


def test_langchain(server, python_clients):
    found = results_of(python_clients, "langchain")
    call = {"name": "calculator", "arguments": '{"expression": "6*7"}'}
    calling = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": call}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "42"}
    turns, _ = normalise([SKY, calling, result])
    history = [t for ids, _ in server.tokenizer.render_turns({"messages": turns}) for t in ids][:-1]
    structured = [found.pop(name) for name in ("json schema", "function")]
    assert found == {
        **dict.fromkeys(["chat", "stream", "responses", "responses stream"], server.chat(SPLIT)),
        "system last": server.chat([SKY, SYSTEM]),
        "tool message": server._text(history, 12),
        "batch": [server.chat([{"role": "user", "content": f"The sky {i}"}]) for i in range(8)],
        **dict.fromkeys(["text", "text stream"], server.text("The sky")),
        "20 prompts": [server.text(f"The sky {i}") for i in range(20)],
        "logprobs": 12,
    }
    assert all(map(is_person, structured)), structured


def test_litellm(server, python_clients):
    found = results_of(python_clients, "litellm")
    tool = found.pop("tool")
    assert found == {
        **dict.fromkeys(["chat", "stream"], server.chat(TALK)),
        **dict.fromkeys(["text", "text stream"], server.text("The sky")),
        "two prompts": [server.text("The sky"), server.text("Rivers")],
        "responses": server.chat([SKY], 20),
    }
    assert is_person(json.loads(tool))


def test_pydantic_ai(server, python_clients):
    found = results_of(python_clients, "pydantic_ai")
    first = server.chat([SYSTEM, KIND, SKY])
    talk = [first, server.chat([SYSTEM, KIND, SKY, {"role": "assistant", "content": first}, SEA])]
    structured = {name: found.pop(name) for name in list(found) if " by a " in f" {name}"}
    assert found == {
        **dict.fromkeys(["chat", "responses"], talk),
        **dict.fromkeys(["stream", "responses stream"], first),
    }
    assert len(structured) == 4
    assert all(map(is_person, structured.values())), structured


def test_instructor(python_clients):
    found = results_of(python_clients, "instructor")
    assert set(found) == {"tools", "json schema", "partial"}
    assert all(map(is_person, found.values())), found


def test_llm(server, python_clients):
    found = results_of(python_clients, "llm")
    first = server.chat([SYSTEM, SKY])
    schema = json.loads(found.pop("schema"))
    assert found == {
        **dict.fromkeys(["stream", "whole"], first),
        "goes on": server.chat([SYSTEM, SKY, {"role": "assistant", "content": first}, SEA]),
        "text": server.text("The sky"),
    }
    assert isinstance(schema["age"], int)


def test_openai_for_javascript(server, js_clients):
    found = js_clients["openai"]
    structured = found.pop("json schema")
    assert found == {
        **dict.fromkeys(["chat", "stream", "responses", "responses stream"], server.chat(SPLIT)),
        "text": server.text("The sky"),
        "models": 1,
    }
    assert is_person(structured)


@pytest.mark.parametrize("way", ["responses", "chat", "compatible"])
def test_the_ai_sdk(server, js_clients, way):
    found = js_clients[f"ai sdk, {way}"]
    assert {name: found.pop(name) for name in ("chat", "stream")} == dict.fromkeys(
        ["chat", "stream"], server.chat(SPLIT)
    )
    assert set(found) == {"json schema", "tool", "tool stream"}
    assert all(map(is_person, found.values())), found
