"""What the tests of the chat server share: a real server on a free port, and a tiny model behind it."""

import contextlib
import json
import threading
import time

import httpx
import torch
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse
from starlette.routing import Route

from nanochat.generate.sampling import Sampling
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve.answer_events import Event, Usage
from nanochat.serve.app import create_app
from nanochat.serve.batch_engine import BatchEngine, EngineClosed, Generation
from nanochat.serve.http_server import listen, make_server

HELLO = [{"role": "user", "content": "The sky"}]
INFO = {"id": "tiny-sft", "name": "tiny sft", "params": 12345, "dtype": "float32", "bpb": 1.234, "step": 7}


@contextlib.contextmanager
def serve(app, drain_seconds=5):
    """A client of a real server on a free port."""
    server, sock = make_server(app, drain_seconds), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = sock.getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            client.server = server
            yield client
    finally:
        server.should_exit = True
        thread.join()


def tiny_chat_model(tokenizer, sequence_len=128):
    """Random weights: it writes nonsense, always the same, and never a special token, so it never stops by itself."""
    torch.manual_seed(1234)
    model = GPT(GPTConfig(sequence_len, tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=64))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
        for name in tokenizer.get_special_tokens():
            model.lm_head.weight[tokenizer.encode_special(name)] = 0.0
    return model.eval()


class SlowEngine(BatchEngine):
    """Its answers take their time."""

    def _row(self, request):
        row = super()._row(request)
        row.by_step = True  # a round for every token
        return row

    def _round(self, start):
        time.sleep(0.01)
        super()._round(start)


class ScriptedEngine(BatchEngine):
    """Says what it is told: `script` is a list of (kind, text), one every `delay` seconds."""

    script = (("text", "Hello."),)
    delay = 0.005

    def submit(self, request):
        with self._lock:
            if self._closing:
                raise EngineClosed("closed")
        generation = Generation(request)
        threading.Thread(target=self._play, args=(generation, list(self.script)), daemon=True).start()
        return generation

    def _play(self, generation, script):
        for count, (kind, text) in enumerate(script):
            time.sleep(self.delay)
            if generation._cancelled or self._closing:
                generation._emit(Event("done", finish_reason="cancelled", usage=Usage(5, count)))
                return
            generation._emit(Event(kind, text, finish_reason="error" if kind == "error" else None))
            if kind == "error":
                return
        generation._emit(Event("done", finish_reason="stop", usage=Usage(5, len(script))))


def tiny_app(model, tokenizer, engine_class=BatchEngine, defaults=None, access=None, log_path=None, **settings):
    """The application with one engine, and that engine."""
    settings = {"max_batch_size": 4, "max_queue": 16, **settings}
    engine = engine_class(model, tokenizer, **settings)
    defaults = defaults or Sampling(temperature=0.0, top_k=0, max_tokens=20)
    return create_app([engine], tokenizer, defaults, INFO, access, log_path), engine


def events_of(lines):
    """The objects of a stream's `data:` lines."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


def wait_until(condition, seconds=20.0):
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.01)


def reverse_proxy(target, path):
    """An application that passes requests under `path` on to `target`, which sees its own Host and no such path."""

    async def forward(request):
        kept = {k: v for k, v in request.headers.items() if k not in ("host", "connection", "accept-encoding")}
        inner = request.url.path.removeprefix(path)
        client = httpx.AsyncClient(base_url=target, timeout=60)
        asked = client.build_request(request.method, inner, headers=kept, content=await request.body())
        response = await client.send(asked, stream=True)
        told = {k: v for k, v in response.headers.items() if k not in ("transfer-encoding", "connection", "date")}
        return StreamingResponse(
            response.aiter_raw(), response.status_code, told, background=BackgroundTask(client.aclose)
        )

    return Starlette(routes=[Route(path + "{rest:path}", forward, methods=["GET", "POST", "OPTIONS", "HEAD"])])
