"""OpenAI's own Python client talks to the server: chats, streams, stops, lists models, and understands its errors."""

import json

import pytest
import torch
from web_server import HELLO, INFO, ScriptedEngine, SlowEngine, serve, tiny_app, tiny_chat_model, wait_until

from nanochat.engine import Engine
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
    with pytest.raises(openai.AuthenticationError):
        chat(client.with_options(api_key="other"))  # not closed: it shares the connections


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


def model_logprobs(model, tokens):
    """The log-probability of every token but the first, from the model itself."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]))[0].float()  # (T, V)
    table = logits.log_softmax(dim=-1)
    return [table[i, token].item() for i, token in enumerate(tokens[1:])], table


def test_logprobs_of_a_chat(client, model, tiny_tokenizer):
    whole = chat(client, logprobs=True, top_logprobs=3, max_tokens=8)
    content = whole.choices[0].logprobs.content
    assert len(content) == 8
    written = b"".join(bytes(entry.bytes) for entry in content)
    assert written.decode("utf-8", "ignore") == whole.choices[0].message.content
    prompt = tiny_tokenizer.render_for_completion({"messages": HELLO})
    sequences, _ = Engine(model, tiny_tokenizer).generate_batch(prompt, max_tokens=8, temperature=0.0)
    values, _ = model_logprobs(model, sequences[0])
    assert [entry.logprob for entry in content] == pytest.approx(values[len(prompt) - 1 :], abs=1e-3)
    for entry in content:  # greedy: the token is the likeliest
        assert entry.top_logprobs[0].token == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
    chunks = [c.choices[0] for c in chat(client, logprobs=True, top_logprobs=3, max_tokens=8, stream=True)]
    streamed = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in content]
    assert chat(client).choices[0].logprobs is None


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_a_prompt_is_scored(client, model, tiny_tokenizer, max_tokens):
    """As lm_eval's local-completions does it: echo, logprobs, and the ids of the prompt."""
    ids = [tiny_tokenizer.get_bos_token_id(), *tiny_tokenizer.encode("The sky is blue.")]
    settings = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "temperature": 0}
    both = client.completions.create(model=MODEL, prompt=[ids, ids[:4]], **settings)
    for choice, prompt in zip(both.choices, (ids, ids[:4]), strict=True):
        scores = choice.logprobs
        values, table = model_logprobs(model, prompt)
        assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(prompt) + max_tokens
        assert scores.token_logprobs[0] is None
        assert scores.top_logprobs[0] is None
        assert scores.token_logprobs[1 : len(prompt)] == pytest.approx(values, abs=1e-3)
        best = [max(top.values()) for top in scores.top_logprobs[1 : len(prompt)]]
        assert best == pytest.approx(table.amax(dim=-1)[:-1].tolist(), abs=1e-3)
        text = choice.text
        starts = scores.text_offset[1 : len(prompt)]
        pieces = [text[a:b] for a, b in zip(starts, scores.text_offset[2 : len(prompt) + 1], strict=False)]
        assert all(piece == token for piece, token in zip(pieces, scores.tokens[1:], strict=False))
    from_text = client.completions.create(model=MODEL, prompt="The sky is blue.", **settings).choices[0]
    assert from_text.logprobs.token_logprobs[1:] == pytest.approx(both.choices[0].logprobs.token_logprobs[1:], abs=1e-3)
    chunks = list(client.completions.create(model=MODEL, prompt=ids, stream=True, **settings))
    streamed = [value for c in chunks if c.choices[0].logprobs for value in c.choices[0].logprobs.token_logprobs]
    assert streamed[1:] == pytest.approx(both.choices[0].logprobs.token_logprobs[1:], abs=1e-3)
    assert "".join(c.choices[0].text for c in chunks) == both.choices[0].text


def test_a_prompt_that_fills_the_context_can_be_scored(client, tiny_tokenizer):
    ids = ([tiny_tokenizer.get_bos_token_id(), *tiny_tokenizer.encode("The sky is blue. ")] * 50)[:128]
    answer = client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=1, max_tokens=0)
    assert len(answer.choices[0].logprobs.tokens) == 128
    with pytest.raises(openai.BadRequestError, match="no room"):
        client.completions.create(model=MODEL, prompt=ids, echo=True, logprobs=1, max_tokens=1)


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "grey"]}, "depth": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "depth"],
    "additionalProperties": False,
}


def is_sky(text):
    value = json.loads(text)
    return set(value) == {"colour", "depth"} and value["colour"] in ("blue", "grey") and 0 <= value["depth"] <= 99


def test_answers_with_a_form(client):
    form = {"type": "json_schema", "json_schema": {"name": "sky", "schema": SCHEMA, "strict": True}}
    assert is_sky(chat(client, response_format=form, max_tokens=60).choices[0].message.content)
    streamed = chat(client, response_format=form, max_tokens=60, stream=True)
    assert is_sky("".join(chunk.choices[0].delta.content or "" for chunk in streamed))
    answer = chat(client, response_format={"type": "json_object"}, max_tokens=40).choices[0]
    assert isinstance(json.loads(answer.message.content), dict)
    for fields in ({"json_schema": SCHEMA}, {"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}):
        assert is_sky(chat(client, extra_body=fields, max_tokens=60).choices[0].message.content)
    assert chat(client, extra_body={"guided_choice": ["yes", "no"]}).choices[0].message.content in ("yes", "no")
    regex = {"structured_outputs": {"regex": "[0-9]{3}"}}
    assert len(chat(client, extra_body=regex).choices[0].message.content) == 3
    assert is_sky(
        client.completions.create(model=MODEL, prompt="a", max_tokens=60, extra_body={"json_schema": SCHEMA})
        .choices[0]
        .text
    )
    with pytest.raises(openai.BadRequestError, match="shortest answer"):
        chat(client, response_format=form, max_tokens=3)
    with pytest.raises(openai.BadRequestError, match="response_format") as caught:
        chat(
            client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "unknown"}}}
        )
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="both say"):
        chat(client, response_format=form, extra_body={"guided_choice": ["a"]})


FUNCTIONS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "measure")]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_that_is_required(client, choice):
    settings = {"tools": FUNCTIONS, "tool_choice": choice, "max_tokens": 90}
    whole = chat(client, **settings).choices[0]
    assert whole.finish_reason == "tool_calls"
    assert whole.message.content is None
    (call,) = whole.message.tool_calls
    assert call.function.name in (("look", "measure") if choice == "required" else ("look",))
    assert is_sky(call.function.arguments)
    chunks = list(chat(client, **settings, stream=True))
    deltas = [c.choices[0].delta.tool_calls[0] for c in chunks if c.choices[0].delta.tool_calls]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert deltas[0].function.name == call.function.name
    assert deltas[0].id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


class TestResponses:
    def test_a_conversation(self, client, tiny_tokenizer):
        same = client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": "Be brief."},
                *HELLO,
                {"role": "assistant", "content": "is"},
                *HELLO,
            ],
        )
        talk = [*HELLO, {"role": "assistant", "content": [{"type": "output_text", "text": "is"}]}, *HELLO]
        answer = client.responses.create(model=MODEL, input=talk, instructions="Be brief.")
        assert answer.output_text == same.choices[0].message.content
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (same.usage.prompt_tokens, 20)
        with client.responses.stream(model=MODEL, input=talk, instructions="Be brief.") as stream:
            events = list(stream)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == answer.output_text == events[-1].response.output[0].content[0].text

    def test_calls_forms_and_logprobs(self, client):
        tool = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}
        settings = {"model": MODEL, "input": "The sky", "max_output_tokens": 60}
        answer = client.responses.create(**settings, tools=[tool], tool_choice="required")
        (call,) = answer.output
        assert (call.type, call.name, answer.status) == ("function_call", "look", "completed")
        assert is_sky(call.arguments)
        history = [*HELLO, call, {"type": "function_call_output", "call_id": call.call_id, "output": "42"}]
        assert client.responses.create(**{**settings, "input": history}).output_text
        with client.responses.stream(**settings, tools=[tool], tool_choice="required") as stream:
            assert is_sky(stream.get_final_response().output[0].arguments)
        form = {"format": {"type": "json_schema", "name": "sky", "schema": SCHEMA}}
        assert is_sky(client.responses.create(**settings, text=form).output_text)
        known = client.responses.create(
            **{**settings, "max_output_tokens": 5}, include=["message.output_text.logprobs"], top_logprobs=2
        )
        entries = known.output[0].content[0].logprobs
        assert "".join(entry.token for entry in entries) == known.output_text
        assert len(entries[0].top_logprobs) == 2

    @pytest.mark.parametrize("settings", [{"previous_response_id": "resp_1"}, {"background": True}, {"temperature": 9}])
    def test_errors(self, client, settings):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model=MODEL, input="The sky", **settings)
        assert caught.value.param == next(iter(settings))

    def test_the_servers_own_calculator_and_a_failure(self, model, tiny_tokenizer):
        app, engine = tiny_app(model, tiny_tokenizer, ScriptedEngine)
        engine.script = [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
        with serve(app) as http, client_of(http) as client:
            answer = client.responses.create(model=MODEL, input="The sky")
            assert answer.output_text == "It is 42."
            assert answer.output[0].parts[1] == {"type": "python", "text": "6*7"}
            engine.script = [("text", "It is "), ("error", "secret")]
            *_, last = client.responses.create(model=MODEL, input="The sky", stream=True)
            assert (last.type, last.response.error.code) == ("response.failed", "server_error")
            assert "secret" not in last.response.model_dump_json()
