"""What clients of other servers send, and what they mean by it: messages, numbers, other fields, paths, methods."""

import json
import threading

import httpx
import pytest
from web_server import HELLO, INFO, ScriptedEngine, serve, tiny_app, tiny_chat_model, wait_until

from nanochat.generate.sampling import Sampling
from nanochat.serve.answer_form import AnswerForm
from nanochat.serve.batch_engine import BatchEngine
from nanochat.serve.guard import Access
from nanochat.serve.tools import read_tools

QUESTION, ANSWER, SYSTEM = (
    {"role": role, "content": content}
    for role, content in (("user", "The sky"), ("assistant", "is blue"), ("system", "Be brief."))
)
CALL = {"id": "1", "type": "function", "function": {"name": "python", "arguments": '{"expression": "7*6"}'}}


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    return tiny_chat_model(tiny_tokenizer)


@pytest.fixture(scope="module")
def client(model, tiny_tokenizer):
    with serve(tiny_app(model, tiny_tokenizer)[0]) as client:
        yield client


@pytest.fixture
def prompts(monkeypatch):
    """The prompts that reach the engine."""
    seen = []
    submit = BatchEngine.submit
    monkeypatch.setattr(BatchEngine, "submit", lambda self, request: seen.append(request) or submit(self, request))
    return seen


def chat(client, messages=HELLO, **fields):
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def fine(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, param):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    return error["message"]


class TestMessages:
    @pytest.mark.parametrize(
        ("messages", "same_as"),
        [
            ([QUESTION, QUESTION], [{"role": "user", "content": "The sky\n\nThe sky"}]),
            ([SYSTEM, SYSTEM, QUESTION], [{"role": "system", "content": "Be brief.\n\nBe brief."}, QUESTION]),
            ([QUESTION, ANSWER, SYSTEM], [QUESTION, ANSWER, {"role": "user", "content": "Be brief."}]),
            ([SYSTEM], [{"role": "user", "content": "Be brief."}]),
            ([{**SYSTEM, "role": "developer"}, QUESTION], [SYSTEM, QUESTION]),
            ([ANSWER, QUESTION], [QUESTION]),
            (
                [QUESTION, {"role": "assistant", "content": None}, QUESTION],
                [QUESTION, {**ANSWER, "content": ""}, QUESTION],
            ),
            ([QUESTION, {"role": "assistant"}, QUESTION], [QUESTION, {**ANSWER, "content": ""}, QUESTION]),
            (
                [{"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "sky"}]}],
                [QUESTION],
            ),
        ],
    )
    def test_are_normalised(self, client, prompts, tiny_tokenizer, messages, same_as):
        for path in ("/v1/chat/completions", "/chat/completions", "/tokenize"):
            response = client.post(path, json={"messages": messages, "max_tokens": 1})
            assert response.status_code == 200, (path, response.text)
        expected = tiny_tokenizer.render_for_completion({"messages": same_as})
        assert [request.tokens for request in prompts] == [expected, expected]
        assert response.json()["tokens"] == expected

    def test_an_answer_that_stands_last_is_continued(self, client, prompts, tiny_tokenizer):
        special = tiny_tokenizer.encode_special
        for flag in (None, True):
            fine(chat(client, [QUESTION, ANSWER], continue_final_message=flag, max_tokens=1))
        fine(chat(client, [QUESTION, ANSWER], continue_final_message=False, max_tokens=1))
        asked = tiny_tokenizer.render_for_completion({"messages": [QUESTION]})
        begun = [*asked, *tiny_tokenizer.encode("is blue")]
        ended = [*begun, special("<|assistant_end|>"), special("<|assistant_start|>")]
        assert [request.tokens for request in prompts] == [begun, begun, ended]
        refused(chat(client, continue_final_message=True), "continue_final_message")
        prompts.clear()
        for messages in ([SYSTEM, ANSWER], [ANSWER]):  # nobody asked
            fine(chat(client, messages, max_tokens=1))
        instructed = tiny_tokenizer.render_for_completion(
            {"messages": [{"role": "user", "content": SYSTEM["content"]}]}
        )
        nothing = tiny_tokenizer.render_for_completion({"messages": [{"role": "user", "content": ""}]})
        said = tiny_tokenizer.encode("is blue")
        assert [request.tokens for request in prompts] == [[*instructed, *said], [*nothing, *said]]

    def test_calls_of_tools_and_their_results_come_back(self, client, prompts, tiny_tokenizer):
        history = [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]
        fine(chat(client, history, max_tokens=1))
        parts = [{"type": "python", "text": "7*6"}, {"type": "python_output", "text": "42"}]
        fine(chat(client, [QUESTION, {"role": "assistant", "content": parts}], max_tokens=1))
        assert prompts[0].tokens == prompts[1].tokens
        assert prompts[0].tokens[-1] == tiny_tokenizer.encode_special("<|output_end|>")

    def test_what_was_changed_is_said(self, client):
        assert "left out" in " ".join(fine(chat(client, [ANSWER, QUESTION], max_tokens=1))["warnings"])
        assert "warnings" not in fine(chat(client, max_tokens=1))

    @pytest.mark.parametrize(
        "messages",
        [
            [{"role": "root", "content": "x"}],
            [{"content": "x"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            [QUESTION, {"role": "tool", "tool_call_id": "7", "content": "42"}],
            [],
        ],
    )
    def test_what_makes_no_sense_is_refused(self, client, messages):
        refused(chat(client, messages), "messages")


class TestNumbers:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, {"max_tokens": 20, "top_k": 0, "top_p": None, "min_p": 0.0, "stop": ()}),
            ({"max_tokens": -1}, {"max_tokens": None}),
            ({"max_tokens": None}, {"max_tokens": 20}),
            ({"max_tokens": 10**12}, {"max_tokens": 10**12}),
            ({"max_completion_tokens": 3, "max_tokens": 5}, {"max_tokens": 3}),
            ({"n_predict": 3}, {"max_tokens": 3}),
            ({"top_k": -1}, {"top_k": 0}),
            ({"top_k": 10**6}, {"top_k": 10**6}),
            ({"top_p": 1}, {"top_p": 1.0}),
            ({"top_p": 0, "temperature": 1}, {"temperature": 0.0, "top_p": None}),
            ({"stop": ""}, {"stop": ()}),
            ({"stop": ["a", "", "b", "c", "d", "e"]}, {"stop": ("a", "b", "c", "d", "e")}),
            ({"seed": 7}, {"seed": 7}),
            ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
            ({"min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1}, {"min_p": 0.1, "presence_penalty": 1.0}),
            ({"logit_bias": {"5": -100}}, {"logit_bias": ((5, -100.0),)}),
            ({"logit_bias": [[5, False], [6, 2]]}, {"logit_bias": ((5, -100.0), (6, 2.0))}),
            ({"min_tokens": 3, "stop_token_ids": [4]}, {"min_tokens": 3, "stop_tokens": (4,)}),
            ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
            ({"logprobs": True}, {"logprobs": 0}),
        ],
    )
    def test_mean_what_clients_mean(self, client, prompts, fields, expected):
        fine(chat(client, **fields))
        (request,) = prompts
        for name, value in expected.items():
            assert (request.stop if name == "stop" else getattr(request.sampling, name)) == value

    def test_seed_minus_one_is_another_each_time(self, client, prompts):
        for _ in range(2):
            fine(chat(client, seed=-1, max_tokens=1))
        assert prompts[0].sampling.seed != prompts[1].sampling.seed

    def test_no_token_at_all(self, client):
        answer = fine(chat(client, max_tokens=0))
        assert answer["choices"][0]["message"]["content"] == ""
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 0

    def test_more_than_there_is_room_for(self, client):
        for limit in (10**9, -1):
            answer = fine(chat(client, max_tokens=limit))
            assert answer["usage"]["total_tokens"] == 128
            assert answer["choices"][0]["finish_reason"] == "length"

    def test_ignore_eos_and_min_tokens_hold_the_end_back(self, client, tiny_tokenizer):
        bias = {str(tiny_tokenizer.encode_special("<|assistant_end|>")): 100}
        assert fine(chat(client, logit_bias=bias))["usage"]["completion_tokens"] == 1
        assert fine(chat(client, logit_bias=bias, min_tokens=5))["usage"]["completion_tokens"] == 6
        ignoring = fine(chat(client, logit_bias=bias, ignore_eos=True))
        assert (ignoring["usage"]["completion_tokens"], ignoring["choices"][0]["finish_reason"]) == (20, "length")

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"max_tokens": -2}, "max_tokens"),
            ({"max_completion_tokens": "many"}, "max_completion_tokens"),
            ({"top_p": 1.5}, "top_p"),
            ({"n": 0}, "n"),
            ({"stop": [1]}, "stop"),
            ({"stop": {"a": 1}}, "stop"),
            ({"logit_bias": {"sky": 1}}, "logit_bias"),
            ({"logit_bias": {"5": 1000}}, "logit_bias"),
            ({"logit_bias": {"99999": 1}}, "logit_bias"),
            ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
            ({"presence_penalty": 3}, "presence_penalty"),
            ({"stream": "perhaps"}, "stream"),
            ({"tools": [{"type": "function"}]}, "tools[0].name"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ],
    )
    def test_what_cannot_be_meant_is_refused_by_name(self, client, fields, param):
        message = refused(chat(client, **fields), param)
        assert "constrained" not in message
        assert "function-after" not in message


class TestOtherFields:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("grammar", 'root ::= "yes"'),
            ("guided_grammar", "root"),
            ("bad_words", ["yes"]),
            ("mirostat", 2),
            ("use_beam_search", True),
            ("functions", [{"name": "f"}]),
            ("chat_template", "{{ x }}"),
            ("typical_p", 0.5),
        ],
    )
    def test_that_would_change_the_answer_are_refused(self, client, name, value):
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
            body = {"messages": HELLO, "prompt": "The sky", "input": "The sky", name: value}
            if path == "/v1/responses":
                del body["prompt"]
            refused(client.post(path, json=body), name)

    def test_are_never_dropped_without_a_word(self, client):
        answer = fine(chat(client, max_tokens=1, reasoning_effort="high", unheard_of=1, user="me", mirostat=0))
        assert [
            word in " ".join(answer["warnings"]) for word in ("reasoning_effort", "unheard_of", "user", "mirostat")
        ] == [
            True,
            True,
            False,
            False,
        ]

    def test_any_name_of_a_model_is_accepted_with_a_note(self, client):
        answer = fine(chat(client, model="gpt-4o", max_tokens=1))
        assert answer["model"] == INFO["id"]
        assert "gpt-4o" in answer["warnings"][0]
        assert "warnings" not in fine(chat(client, model=INFO["id"], max_tokens=1))


class TestPaths:
    def test_without_v1_the_body_says_which_protocol(self, client):
        classic = client.post("/chat/completions", json={"messages": HELLO, "temperature": 0, "seed": 1})
        assert classic.headers["content-type"].startswith("text/event-stream")
        assert '{"done": true}' in classic.text
        for more in ({"model": "x"}, {"stream": False}, {"n": 1}, {"tools": []}):
            answer = fine(client.post("/chat/completions", json={"messages": HELLO, "max_tokens": 1, **more}))
            assert answer["object"] == "chat.completion"
        streamed = client.post("/chat/completions", json={"messages": HELLO, "max_tokens": 1, "stream": True})
        assert streamed.text.rstrip().endswith("[DONE]")
        assert fine(client.post("/completions", json={"prompt": "a", "max_tokens": 1}))["object"] == "text_completion"
        assert fine(client.post("/responses", json={"input": "a"}))["object"] == "response"
        assert fine(client.get("/models"))["data"][0]["id"] == INFO["id"]

    def test_the_model_and_its_context(self, client):
        for path in ("/v1/models", "/v1/models/"):
            (model,) = fine(client.get(path))["data"]
            assert model["max_model_len"] == model["context_length"] == model["meta"]["n_ctx_train"] == 128
        assert fine(client.get(f"/v1/models/{INFO['id']}")) == model
        assert client.get("/v1/models/gpt-4").status_code == 404

    def test_head_and_options_everywhere(self, client):
        for path in ("/", "/app.js", "/health", "/v1/health", "/stats", "/metrics", "/v1/models", "/v1/models/"):
            head = client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
            options = client.options(path)
            assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD, OPTIONS"), path
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/chat/completions", "/tokenize"):
            assert client.options(path).headers["allow"] == "OPTIONS, POST"
            wrong = client.get(path)
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
            assert wrong.json()["error"]["message"]
            assert client.head(path).status_code == 405
        assert client.options("/nothing").status_code == 404

    def test_a_missing_content_type_is_named(self, client):
        for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
            response = client.post("/v1/chat/completions", content=b'{"messages": []}', headers=headers)
            assert "Content-Type: application/json" in refused(response, "Content-Type")

    def test_broken_json_is_placed(self, client):
        for path in ("/v1/chat/completions", "/chat/completions"):
            response = client.post(path, content=b'{"a": 1,}', headers={"content-type": "application/json"})
            assert "character" in refused(response, None)
        for content in (b"[]", b"null", b'"text"', b""):
            response = client.post(
                "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
            )
            assert response.status_code == 400

    def test_tokenize_and_back(self, client, tiny_tokenizer):
        ids, bos = tiny_tokenizer.encode("The sky"), tiny_tokenizer.get_bos_token_id()
        assert fine(client.post("/tokenize", json={"content": "The sky"}))["tokens"] == ids
        assert fine(client.post("/tokenize", json={"content": "The sky", "add_special": True}))["tokens"] == [bos, *ids]
        vllm = fine(client.post("/tokenize", json={"prompt": "The sky", "return_token_strs": True}))
        assert (vllm["tokens"], vllm["count"], vllm["max_model_len"]) == ([bos, *ids], len(ids) + 1, 128)
        assert "".join(vllm["token_strs"][1:]) == "The sky"
        pieces = fine(client.post("/tokenize", json={"content": "The sky", "with_pieces": True}))["tokens"]
        assert [piece["id"] for piece in pieces] == ids
        info = fine(client.get("/tokenizer_info"))
        assert fine(client.post("/tokenize", json={"prompt": info["bos_token"], "add_special_tokens": False}))[
            "tokens"
        ] == [bos]
        spelled = fine(client.post("/tokenize", json={"content": info["bos_token"], "parse_special": False}))["tokens"]
        assert len(spelled) > 1
        answer = fine(client.post("/detokenize", json={"tokens": ids}))
        assert answer["content"] == answer["prompt"] == "The sky"
        refused(client.post("/detokenize", json={"tokens": [99999]}), "tokens")
        refused(client.post("/tokenize", json={}), "content")


def test_metrics_count_what_happened(model, tiny_tokenizer):
    with serve(tiny_app(model, tiny_tokenizer)[0]) as client:
        fine(chat(client, max_tokens=3))
        refused(chat(client, top_p=9), "top_p")
        client.get("/v1/models/nothing")
        client.get("/no/such/path")
        client.head("/v1/models")
        client.options("/v1/models")
        wait_until(lambda: 'nanochat_finished_total{worker="0"} 1.0' in client.get("/metrics").text)
        response = client.get("/metrics")
        lines = response.text.splitlines()
    assert response.headers["content-type"].startswith("text/plain; version=")
    for line in [
        'nanochat_http_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'nanochat_http_requests_total{path="/v1/chat/completions",status="400"} 1.0',
        'nanochat_http_requests_total{path="/v1/models/{model:path}",status="404"} 1.0',
        'nanochat_http_requests_total{path="other",status="404"} 1.0',
        'nanochat_http_requests_total{path="/v1/models",status="200"} 1.0',
        'nanochat_http_requests_total{path="/v1/models",status="204"} 1.0',
        'nanochat_generated_tokens_total{worker="0"} 3.0',
        'nanochat_max_batch_size{worker="0"} 4.0',
        'nanochat_max_queue{worker="0"} 16.0',
        'nanochat_running{worker="0"} 0.0',
        "nanochat_time_to_first_token_seconds_count 1.0",
        "nanochat_answer_seconds_count 1.0",
    ]:
        assert line in lines


def test_a_locked_server_shows_its_metrics_to_those_with_the_key(model, tiny_tokenizer):
    with serve(tiny_app(model, tiny_tokenizer, access=Access(api_key="secret"))[0]) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers={"authorization": "Bearer secret"}).status_code == 200


class TestManyPrompts:
    def test_256_prompts_take_their_turns(self, model, tiny_tokenizer):
        app, engine = tiny_app(model, tiny_tokenizer, max_batch_size=4, max_queue=2)
        prompts = [f"The sky {i}" for i in range(256)]
        with serve(app) as client:
            both = {}
            for name, sent in {
                "texts": prompts,
                "tokens": [[tiny_tokenizer.get_bos_token_id(), *tiny_tokenizer.encode(p)] for p in prompts],
            }.items():
                answer = fine(client.post("/v1/completions", json={"prompt": sent, "max_tokens": 2}))
                assert [choice["index"] for choice in answer["choices"]] == list(range(256))
                both[name] = [choice["text"] for choice in answer["choices"]]
            assert both["texts"] == both["tokens"]
            alone = fine(client.post("/v1/completions", json={"prompt": prompts[200], "max_tokens": 2}))
            assert alone["choices"][0]["text"] == both["texts"][200]
            assert answer["usage"]["completion_tokens"] == 512
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= answer["usage"]["prompt_tokens"]
        assert engine.stats()["failed"] == 0

    def test_others_get_their_turn_meanwhile(self, model, tiny_tokenizer):
        app, engine = tiny_app(model, tiny_tokenizer, max_batch_size=2, max_queue=4)
        with serve(app) as client, httpx.Client(base_url=client.base_url, timeout=60) as other:
            body = {"prompt": ["The sky"] * 60, "max_tokens": 60, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                fine(chat(other, max_tokens=1))
                assert engine.stats()["finished"] < 60
                assert any("[DONE]" in line for line in lines)

    def test_leaving_gives_all_places_back(self, model, tiny_tokenizer):
        app, engine = tiny_app(model, tiny_tokenizer, max_batch_size=2, max_queue=4)
        with serve(app) as client:
            body = {"prompt": ["The sky"] * 200, "max_tokens": 100, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
            wait_until(lambda: engine.stats()["running"] + engine.stats()["waiting"] == 0)
            assert engine.stats()["submitted"] < 100

    def test_cached_tokens_are_summed_over_prompts(self, client):
        body = {"prompt": ["aaaa bbbb cccc dddd", "eeee ffff gggg hhhh"], "n": 2, "max_tokens": 1}
        client.post("/v1/completions", json=body)
        usage = fine(client.post("/v1/completions", json=body))["usage"]
        assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_tools_of_a_client_are_called(model, tiny_tokenizer):
    app, engine = tiny_app(model, tiny_tokenizer, ScriptedEngine)
    engine.script = [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
    schema = {"type": "object", "properties": {"note": {"type": "integer"}, "expression": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": schema}}]
    with serve(app) as client:
        choice = fine(chat(client, tools=tools))["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "It is "
        (call,) = choice["message"]["tool_calls"]
        assert call["function"] == {"name": "calculator", "arguments": '{"expression": "6*7"}'}
        assert "parts" not in choice["message"]
        # Without the tool, with another, or with tool_choice none: the server's own calculator answers.
        other = [{"type": "function", "function": {"name": "get_weather"}}]
        for fields in ({}, {"tools": other}, {"tools": tools, "tool_choice": "none"}):
            answer = fine(chat(client, **fields))
            assert answer["choices"][0]["message"]["content"] == "It is 42."
            assert ("get_weather" in str(answer.get("warnings"))) == (fields.get("tools") == other)
        engine.script = [("python", 'get_weather({"city": "Rome"})'), ("text", "Sunny")]
        message = fine(chat(client, tools=other))["choices"][0]["message"]
        assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
        assert message["content"] is None


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": {}}])
def test_a_function_without_arguments_is_called_without_any(client, parameters):
    tools = [{"type": "function", "function": {"name": "ping", "parameters": parameters}}]
    choice = fine(chat(client, tools=tools, tool_choice="required", max_tokens=20))["choices"][0]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {}


@pytest.mark.parametrize(
    "more",
    [
        {"required": ["city"]},
        {"patternProperties": {"^c": {"type": "string"}}},
        {"anyOf": [{"properties": {"city": {"type": "string"}}, "required": ["city"]}]},
        {"additionalProperties": {"type": "string"}},
    ],
)
def test_arguments_that_are_described_elsewhere_than_in_properties_stay_allowed(more):
    schema = {"type": "object", "properties": {}, **more}
    tools = [{"type": "function", "function": {"name": "ping", "parameters": schema}}]
    assert read_tools(tools, "required").parameters == {"ping": schema}
    bare = {"type": "object", "properties": {}, "required": [], "title": "Ping", "description": "?"}
    for remark in ({}, {"deprecated": True}, {"$defs": {}}, {"$id": "ping"}):  # none describes an argument
        tools[0]["function"]["parameters"] = bare | remark
        assert read_tools(tools, "required").parameters == {"ping": {"additionalProperties": False, **bare, **remark}}


def test_defaults_are_the_servers(model, tiny_tokenizer, prompts):
    defaults = Sampling(temperature=0.5, top_k=7, max_tokens=3, min_p=0.2)
    with serve(tiny_app(model, tiny_tokenizer, defaults=defaults)[0]) as client:
        fine(chat(client))
        client.post("/chat/completions", json={"messages": HELLO})
        fine(client.post("/v1/responses", json={"input": "The sky"}))
    for request in prompts:
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens, sampling.min_p) == (0.5, 7, 3, 0.2)


def test_only_an_answer_in_a_chat_can_be_a_guess(model, tiny_tokenizer):
    """Texts to go on with, and answers in a form that was asked for, are not replaced."""
    defaults = Sampling(temperature=0.0, max_tokens=60, min_answer_p=1.0, unsure="Who knows?")
    form = {"type": "json_object"}
    with serve(tiny_app(model, tiny_tokenizer, defaults=defaults)[0]) as client:
        assert fine(chat(client))["choices"][0]["message"]["content"] == "Who knows?"
        assert (
            fine(client.post("/v1/responses", json={"input": "The sky"}))["output"][0]["content"][0]["text"]
            == "Who knows?"
        )
        streamed = client.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}).text
        assert streamed.count("Who knows?") == 1
        assert fine(chat(client, response_format=form))["choices"][0]["message"]["content"].startswith("{")
        begun = [*HELLO, {"role": "assistant", "content": "It is"}]
        assert "Who knows?" not in fine(chat(client, begun))["choices"][0]["message"]["content"]
        tools = [{"type": "function", "function": {"name": "ping"}}]
        assert fine(chat(client, tools=tools))["choices"][0]["message"]["content"] != "Who knows?"
        answer = fine(chat(client, min_answer_p=0.0, unsure="Buy!"))  # no fields of a request
        assert answer["choices"][0]["message"]["content"] == "Who knows?"
        text = fine(client.post("/v1/completions", json={"prompt": "The sky", "max_tokens": 5}))["choices"][0]["text"]
        assert text not in ("", "Who knows?")


def test_a_required_calculator_gets_an_expression(client, prompts, tiny_tokenizer):
    """The call is begun for the model, which goes on as it has learned to, not in JSON."""
    schema = {"type": "object", "properties": {"sum": {"type": "string"}}, "required": ["sum"]}
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": schema}}]
    special = tiny_tokenizer.encode_special
    choice = fine(chat(client, tools=tools, tool_choice="required", max_tokens=6))["choices"][0]
    asked = tiny_tokenizer.render_for_completion({"messages": HELLO})
    assert prompts[0].tokens == [*asked, special("<|python_start|>")]
    assert prompts[0].sampling.stop_tokens == (special("<|python_end|>"),)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "calculator"
    assert set(json.loads(call["function"]["arguments"])) == {"sum"}
    # More than an expression is asked for: then the arguments are JSON of the schema.
    schema["properties"]["places"] = {"type": "integer", "minimum": 0, "maximum": 9}
    schema["required"].append("places")
    choice = fine(chat(client, tools=tools, tool_choice="required", max_tokens=60))["choices"][0]
    assert 0 <= json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["places"] <= 9


def test_of_a_long_conversation_the_newest_part_is_read(client, tiny_tokenizer):
    """Sixty thousand messages are not rendered to find out that they don't fit."""
    turns = [QUESTION if i % 2 == 0 else ANSWER for i in range(60_001)]
    fitted = fine(chat(client, turns, truncation="auto", max_tokens=1))
    assert 64 < fitted["usage"]["prompt_tokens"] < 128
    continued = fine(chat(client, turns[:-1], truncation="auto", max_tokens=1))
    assert 64 < continued["usage"]["prompt_tokens"] < 128
    message = refused(chat(client, turns, max_tokens=1), "messages")
    assert "truncation" in message


def test_forms_are_made_one_at_a_time_and_not_for_those_who_have_left(model, tiny_tokenizer, monkeypatch):
    made, gate, answers = [], threading.Event(), []
    compile_form = AnswerForm.compile

    def slowly(self, grammars):
        made.append(self.value)
        gate.wait(20)
        return compile_form(self, grammars)

    monkeypatch.setattr(AnswerForm, "compile", slowly)
    with serve(tiny_app(model, tiny_tokenizer)[0]) as client:
        first = threading.Thread(target=lambda: answers.append(chat(client, guided_choice=["yes"])))
        first.start()
        wait_until(lambda: made)
        with httpx.Client(base_url=client.base_url, timeout=0.3) as other, pytest.raises(httpx.ReadTimeout):
            chat(other, guided_choice=["no"])
        assert fine(client.post("/v1/completions", json={"prompt": "The sky", "max_tokens": 1}))["choices"]
        gate.set()
        first.join()
        wait_until(lambda: 'status="499"} 1.0' in client.get("/metrics").text)
    assert fine(answers[0])["choices"][0]["message"]["content"] == "yes"
    assert made == [["yes"]]
