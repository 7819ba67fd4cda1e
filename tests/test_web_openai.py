"""OpenAI's own Python client talks to the server: chats, streams, stops, lists models, and understands its errors."""

import json

import pytest
from web_server import HELLO, INFO, ScriptedEngine, SlowEngine, serve, tiny_app, tiny_chat_model, wait_until

from nanochat.generate.sampling import Sampling
from nanochat.serve.app import create_app
from nanochat.serve.batch_engine import BatchEngine
from nanochat.serve.guard import Access

openai = pytest.importorskip("openai")
MODEL = "tiny-sft"


def client_of(http):
    return openai.OpenAI(base_url=f"{str(http.base_url).rstrip('/')}/v1", api_key="key", max_retries=0)


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return tiny_chat_model(tiny_tokenizer)


@pytest.fixture(scope="module")
def client(model, tiny_tokenizer):
    with serve(tiny_app(model, tiny_tokenizer, access=Access(api_key="key"))[0]) as http, client_of(http) as client:
        yield client


def chat(client, **settings):
    return client.chat.completions.create(model=MODEL, messages=HELLO, **settings)


def test_lists_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_streamed_chat_says_the_same_as_a_whole_one(client, tiny_tokenizer):
    whole = chat(client)
    choice = whole.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert whole.object == "chat.completion"
    prompt = len(tiny_tokenizer.render_for_completion({"messages": HELLO}))
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, 20, prompt + 20)

    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20


def test_options_that_are_null_are_not_set(client):
    answer = chat(client, n=None, stream=None, extra_body={"stop": None})
    assert len(answer.choices) == 1
    assert (
        client.completions.create(model=MODEL, prompt="The sky", echo=None, max_tokens=2).usage.completion_tokens == 2
    )


def test_a_model_named_like_its_hub_folder(model, tiny_tokenizer):
    info = INFO | {"id": "owner/name"}
    engine = BatchEngine(model, tiny_tokenizer, max_batch_size=1)
    with serve(create_app([engine], tiny_tokenizer, Sampling(), info)) as http, client_of(http) as client:
        assert client.models.retrieve("owner/name").id == "owner/name"


def test_settings(client):
    text = chat(client).choices[0].message.content
    assert chat(client, temperature=2, seed=3) != chat(client, temperature=2, seed=4)
    assert chat(client, max_tokens=3).usage.completion_tokens == 3
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3
    stopped = chat(client, stop=[text[3:5]]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(text[3:5])], "stop")
    parts = [{"type": "text", "text": HELLO[0]["content"]}]
    same = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert same.choices[0].message.content == text


def test_several_answers(client):
    whole = chat(client, n=3, temperature=1.5, seed=1)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1.5, seed=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_completions(client, tiny_tokenizer):
    ids = [tiny_tokenizer.get_bos_token_id(), *tiny_tokenizer.encode("The sky")]
    text = client.completions.create(model=MODEL, prompt="The sky").choices[0].text
    assert client.completions.create(model=MODEL, prompt=ids).choices[0].text == text
    assert client.completions.create(model=MODEL, prompt="The sky", echo=True).choices[0].text == "The sky" + text
    both = client.completions.create(model=MODEL, prompt=["The sky", "Rivers"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text != both.choices[2].text
    assert both.usage.completion_tokens == 80
    chunks = client.completions.create(model=MODEL, prompt="The sky", stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The sky" + text


@pytest.mark.parametrize(
    ("settings", "kind", "param"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "z" * 500}]}, openai.BadRequestError, "messages"),
        ({"tools": [{"type": "web_search"}]}, openai.BadRequestError, "tools[0].type"),
        ({"response_format": {"type": "grammar"}}, openai.BadRequestError, "response_format"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"frequency_penalty": 2.5}, openai.BadRequestError, "frequency_penalty"),
        ({"n": 129}, openai.BadRequestError, "n"),
    ],
)
def test_errors_are_understood(client, settings, kind, param):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **settings})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert "too long" in caught.value.message or caught.value.code != "context_length_exceeded"


def test_what_asks_for_nothing_is_accepted(client):
    chat(client, tools=[], presence_penalty=0, logit_bias={}, response_format={"type": "text"}, user="me", store=False)


def test_a_long_conversation_is_refused_unless_it_may_be_cut(client):
    exchange = [{"role": "user", "content": "z" * 20}, {"role": "assistant", "content": "z" * 20}]
    messages = exchange * 6 + HELLO
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.code == "context_length_exceeded"
    cut = client.chat.completions.create(model=MODEL, messages=messages, extra_body={"truncation": "auto"})
    assert cut.choices[0].message.content


def test_a_wrong_key(client):
    with pytest.raises(openai.AuthenticationError), client.with_options(api_key="other") as other:
        chat(other)


def test_a_full_server_and_a_closed_stream(model, tiny_tokenizer):
    defaults = Sampling(temperature=0.0, max_tokens=100)
    app, engine = tiny_app(model, tiny_tokenizer, SlowEngine, defaults, max_batch_size=1, max_queue=0)
    with serve(app) as http, client_of(http) as client:
        stream = chat(client, stream=True)
        next(iter(stream))
        wait_until(lambda: engine.stats()["running"] == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            chat(client, n=2)
        stream.close()
        wait_until(lambda: engine.stats()["cancelled"] == 1)
        # The client's own retries get through when there is room.
        assert chat(client.with_options(max_retries=2)).choices[0].message.content


def test_tool_calls_and_failures(model, tiny_tokenizer):
    app, engine = tiny_app(model, tiny_tokenizer, ScriptedEngine)
    engine.script = [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
    with serve(app) as http, client_of(http) as client:
        message = chat(client).choices[0].message
        assert message.content == "It is 42."
        assert message.parts[1] == {"type": "python", "text": "6*7"}
        deltas = [chunk.choices[0].delta for chunk in chat(client, stream=True)]
        assert "".join(delta.content or "" for delta in deltas) == "It is 42."
        assert {"type": "python_output", "text": "42"} in [getattr(delta, "part", None) for delta in deltas]
        engine.script = [("text", "It is "), ("error", "secret")]
        with pytest.raises(openai.InternalServerError) as caught:
            chat(client)
        assert "secret" not in json.dumps(caught.value.body)
        with pytest.raises(openai.APIError, match="log says why"):
            list(chat(client, stream=True))
