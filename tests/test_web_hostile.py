"""Generated and hostile requests: whatever comes, the server answers with sense and never with 500.

NANOCHAT_HOSTILE_BODIES=10000 makes as many bodies (default 200); that takes several minutes.
"""

import contextlib
import json
import os

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from web_server import HELLO, serve, tiny_app, tiny_chat_model

from nanochat.generate.sampling import Sampling

NUM_BODIES = int(os.environ.get("NANOCHAT_HOSTILE_BODIES", "200"))
pytestmark = pytest.mark.timeout(max(300, NUM_BODIES))
PATHS = ["/chat/completions", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"]
FINE = {200, 400, 404, 405, 413, 429}
GENEROUS = settings(
    max_examples=NUM_BODIES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def client(tiny_tokenizer):
    defaults = Sampling(temperature=0.0, top_k=0, max_tokens=2)
    app, _ = tiny_app(tiny_chat_model(tiny_tokenizer), tiny_tokenizer, defaults=defaults, max_batch_size=16)
    with serve(app) as client:
        yield client


nasty = st.sampled_from(
    [
        "<|assistant_start|>",
        "<|bos|>",
        "<script>alert(1)</script>",
        "\x00",
        "\u202e",
        "\ud800",
        "😀" * 50,
        "",
        "a" * 9000,
    ]
)
texts = nasty | st.text(max_size=40)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 1e308, 0.5])
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
part = st.fixed_dictionaries({"type": st.sampled_from(["text", "python", "python_output", "image_url"]), "text": texts})
message = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]) | anything,
        "content": texts | st.lists(part, max_size=3) | anything,
    }
)
turns = st.lists(texts, max_size=5).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)
fields = {
    "messages": turns | st.lists(message, max_size=4) | anything,
    "prompt": texts | st.lists(texts, max_size=3) | st.lists(st.integers(-2, 2**40), max_size=5) | anything,
    "temperature": numbers | anything,
    "top_k": numbers | anything,
    "top_p": numbers | anything,
    "repetition_penalty": numbers | anything,
    "max_tokens": st.integers(1, 3) | numbers | anything,
    "seed": numbers | anything,
    "stop": texts | st.lists(texts, max_size=5) | anything,
    "n": st.integers(1, 3) | numbers | anything,
    "stream": st.booleans() | anything,
    "stream_options": st.just({"include_usage": True}) | anything,
    "model": st.just("tiny-sft") | anything,
    "tools": anything,
    "response_format": anything,
    "logit_bias": anything,
    "truncation": st.sampled_from(["auto", "disabled"]) | anything,
    "echo": st.booleans() | anything,
    "input": texts | st.lists(message, max_size=3) | anything,
    "logprobs": st.integers(0, 3) | st.booleans() | anything,
    "top_logprobs": numbers | anything,
    "min_p": numbers | anything,
    "min_tokens": numbers | anything,
    "stop_token_ids": st.lists(st.integers(-1, 400), max_size=3) | anything,
    "frequency_penalty": numbers | anything,
    "tool_choice": st.sampled_from(["auto", "required"]) | anything,
    "structured_outputs": anything,
    "text": anything,
    "metadata": anything,
}
good = {"messages": HELLO, "prompt": "The sky", "input": "The sky", "max_tokens": 2}
# A request that is right, but for a few fields; or anything at all.
bodies = st.fixed_dictionaries({}, optional=fields).flatmap(
    lambda some: (
        st.sets(st.sampled_from(sorted(some)), max_size=2).map(
            lambda chosen: {**good, **{name: some[name] for name in chosen}}
        )
        if some
        else anything
    )
) | st.fixed_dictionaries({}, optional=fields)


@GENEROUS
@given(path=st.sampled_from(PATHS), body=bodies)
@example(path="/v1/chat/completions", body={**good, "repetition_penalty": 5e-324, "temperature": 1e-300})
@example(path="/v1/completions", body={**good, "repetition_penalty": 0.01, "temperature": 1e-6})
def test_generated_bodies(client, path, body):
    if path == "/v1/responses" and isinstance(body, dict):
        body = {name: value for name, value in body.items() if name != "prompt"}  # which is refused there
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in FINE, (path, body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert '"error"' not in response.text
        assert response.text.rstrip().endswith(('{"done": true}', "[DONE]"))


@GENEROUS
@given(
    path=st.sampled_from(PATHS), content=st.binary(max_size=300), kind=st.sampled_from(["application/json", "x", ""])
)
def test_any_bytes(client, path, content, kind):
    response = client.post(path, content=content, headers={"content-type": kind} if kind else {})
    assert response.status_code in FINE


@pytest.mark.parametrize("path", ["/../etc/passwd", "/%2e%2e/etc/passwd", "/style.css/../web.py", "/v1/models/%00"])
def test_strange_paths(client, path):
    response = client.get(path)
    assert response.status_code in (404, 400)
    assert "error" in response.json()


def test_schemathesis_finds_no_server_error(client):
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    schema.config.update(base_url=str(client.base_url))
    checks = [schemathesis.checks.not_a_server_error]

    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(GENEROUS, max_examples=max(20, NUM_BODIES // 20))
        @given(case=operation.as_strategy())
        def run(case):
            with contextlib.suppress(httpx.HTTPError):
                case.call_and_validate(checks=checks)

        run()
