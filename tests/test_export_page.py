"""The page that any static host serves: its calculator, its files, and a real model in a real browser."""

import contextlib
import json
import random
import re
import shutil
import subprocess

import pytest
from portable_model import CALCULATION, TEXT, portable_model, portable_tokenizer, scripted_model

from dev.check_runtimes import node_folder, static_host, wllama_package
from nanochat.engine import Engine
from nanochat.env import get_base_dir
from nanochat.generate.calculator import use_calculator
from nanochat.interop.gguf_file import GGUFCard, write_gguf
from nanochat.interop.qwen3 import fold
from nanochat.serve.static_page import (
    FACTS_FILE,
    MODEL_FILE,
    STATIC_FOLDER,
    WLLAMA_VERSION,
    add_page,
    page_facts,
    refuse_other_page,
    wllama_tarball,
)
from nanochat.tokenizer import RustBPETokenizer

NODE = shutil.which("node")
ANSWER = """
import { readFileSync } from "node:fs";
const { useCalculator } = await import(process.argv[1]);
const expressions = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(expressions.map(useCalculator)));
"""


def run_node(code, module, given):
    """The JSON that a program writes which imports a module of the page, given JSON."""
    if NODE is None:
        pytest.skip("node is not installed")
    run = [NODE, "--input-type=module", "-e", code, (STATIC_FOLDER / module).as_uri()]
    done = subprocess.run(run, input=json.dumps(given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def number(rng):
    kind = rng.randrange(8)
    if kind == 0:
        return f"{rng.randrange(10 ** rng.randrange(1, 16)):,}"
    if kind == 1:
        return repr(rng.random() * 10 ** rng.randrange(-12, 20))
    if kind == 2:
        return str(rng.randrange(10 ** rng.randrange(1, 60)))
    if kind == 3:
        return rng.choice(["0", "00", "1", "2", "007", "0.0", ".5", "5.", "1e3", "1E-7", "1e22", "2.5e-320", "0,123"])
    return str(rng.randrange(100))


def text(rng):
    quote = rng.choice("'\"")
    letters = "".join(rng.choice("aabrAÉ ,1é👍\x0b") for _ in range(rng.randrange(7)))
    whole = f"{quote}{letters}{quote}"
    if rng.random() < 0.2:
        whole += rng.choice([".strip()", ".lower()", " .strip ( )", ".lower().strip()"])
    whole = f"({whole})" if rng.random() < 0.1 else whole
    return f"{whole}.join({text(rng)})" if rng.random() < 0.1 else whole


def expression(rng, depth):
    kind = rng.randrange(10) if depth else 0
    if kind < 3:
        return number(rng)
    if kind == 3:
        return f"{text(rng)}.count({text(rng)})"
    if kind == 4 and rng.random() < 0.5:
        return f"{text(rng)}.join({text(rng)})"
    if kind == 4:
        return f"len({text(rng)}{text(rng) if rng.random() < 0.2 else ''})"
    if kind == 5:
        return f"({expression(rng, depth - 1)})"
    if kind == 6:
        return rng.choice("-+") + expression(rng, depth - 1)
    sign = rng.choice(["+", "-", "*", "/", "//", "%", "**"])
    space = rng.choice(["", " ", "  "])
    return f"{expression(rng, depth - 1)}{space}{sign}{space}{expression(rng, depth - 1)}"


def damaged(rng, whole):
    """An expression with a character lost, doubled, or from nowhere."""
    at = rng.randrange(len(whole) + 1)
    return rng.choice(
        [
            whole[:at] + whole[at + 1 :],
            whole[:at] + rng.choice("()+-*/%.,'\"0 len\t\nx\u00a0\ufeff\0") + whole[at:],
            whole[:at] + whole[at - 1 : at] + whole[at:],
            f"\u2003{whole}\x1f",
        ]
    )


def test_the_page_calculates_like_python():
    rng = random.Random(7)
    whole = [expression(rng, 4) for _ in range(3000)]
    small = [f"{rng.randrange(1, 99)}{'.' * (i % 2)}{rng.choice(' *+-/%')}{rng.randrange(9)}" for i in range(500)]
    powers = [f"{rng.uniform(0, 50):.3g} ** {rng.choice(['-3', '0.5', '2.7', '17', '1/3', '100'])}" for _ in range(500)]
    halves = [f"{rng.randrange(10**9, 10**10)} + {rng.randrange(8)}/8" for _ in range(200)]  # between two of 12 digits
    joins = [f"{text(rng)}.join({text(rng)})" for _ in range(500)]
    every = [
        *joins,
        *(damaged(rng, e) for e in joins),
        *whole,
        *small,
        *powers,
        *halves,
        *(damaged(rng, e) for e in whole),
    ]
    expected = [use_calculator(e) for e in every]
    wrong = [
        (e, a, b) for e, a, b in zip(every, run_node(ANSWER, "calculator.js", every), expected, strict=True) if a != b
    ]
    assert not wrong, (len(wrong), wrong[:5])
    assert sum(answer is not None for answer in expected) > 2000


# --- answers, with a model that says what it is told -----------------------------------------------------------------

PLAY = """
import { readFileSync } from "node:fs";
const { writeAnswer, fitContext } = await import(process.argv[1]);
const { script, special, context, messages, settings } = JSON.parse(readFileSync(0, "utf8"));
// Tokens are single bytes; the special ones come behind them.
const model = {
  context, special,
  tokenize: async (text) => [...new TextEncoder().encode(text)],
  piece: (id) => new Uint8Array([id]),
  next: async () => script.shift(),
};
const events = [];
let failure = null;
try {
  const { signal } = new AbortController();
  await writeAnswer(model, { messages, ...settings }, {}, signal, (event) => events.push(event));
} catch (error) {
  failure = error.message;
}
const fitted = await fitContext(model, messages, context - 1).then(({ tokens }) => tokens, () => null);
process.stdout.write(JSON.stringify({ events, failure, fitted }));
"""


@pytest.fixture(scope="module")
def byte_tokenizer():
    return RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])


def play(tokenizer, script, messages, context=200, **settings):
    """What the page makes of the ids that a model samples."""
    special = {name: tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    ids = [i for part in script for i in ([special[part]] if part in special else part.encode())]
    given = {"script": ids, "special": special, "context": context, "messages": messages, "settings": settings}
    return run_node(PLAY, "answer.js", given)


QUESTION = [{"role": "user", "content": "6*7?"}]


def test_the_page_calls_the_calculator(byte_tokenizer):
    script = ["It is ", "<|python_start|>", "6*7", "<|python_end|>", ", né.", "<|assistant_end|>", "more"]
    events = play(byte_tokenizer, script, QUESTION)["events"]
    assert "".join(event.get("token", "") for event in events) == "It is , né."
    assert [event for event in events if "python" in event or "python_output" in event] == [
        {"python": "6*7"},
        {"python_output": "42"},
    ]
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion"] == len("It is 6*7, né.".encode()) + 2 + len("<42>") + 1


def test_the_page_forces_no_result_of_what_is_no_expression(byte_tokenizer):
    script = ["<|python_start|>", "import os", "<|python_end|>", "Well.", "<|bos|>"]
    events = play(byte_tokenizer, script, QUESTION)["events"]
    assert {"python": "import os"} in events
    assert not any("python_output" in event for event in events)
    assert events[-1]["finish_reason"] == "stop"


def test_the_page_ends_an_answer_at_its_limit(byte_tokenizer):
    script = ["ab", "<|python_start|>", "6*7", "<|python_end|>", "never"]
    events = play(byte_tokenizer, script, QUESTION, max_tokens=8)["events"]
    assert events[-1]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion"] == 8


def test_the_page_renders_as_our_tokenizer_does(byte_tokenizer):
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    messages = [
        {"role": "system", "content": "Be brief <|user_end|>"},
        {"role": "user", "content": "1+1? <|assistant_end|>"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": "ü?"},
    ]
    assert play(byte_tokenizer, [], messages)["fitted"] == byte_tokenizer.render_for_completion({"messages": messages})


def test_the_page_forgets_the_oldest_messages(byte_tokenizer):
    turn = [{"role": "user", "content": "u" * 40}, {"role": "assistant", "content": "a" * 40}]
    messages = [{"role": "system", "content": "sys"}, *turn * 3, {"role": "user", "content": "last"}]
    played = play(byte_tokenizer, ["ok", "<|assistant_end|>"], messages, context=200)
    assert played["events"][0] == {"left_out": 4}
    shorter = [messages[0], *turn, messages[-1]]
    assert played["events"][-1]["usage"]["prompt"] == len(byte_tokenizer.render_for_completion({"messages": shorter}))
    assert "too long" in play(byte_tokenizer, [], [{"role": "user", "content": "u" * 500}])["failure"]


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return portable_tokenizer()


def wllama():
    """The npm package's files, of the version that exports use; skips where it is not installed."""
    package = node_folder() / "node_modules" / "@wllama" / "wllama" / "package.json"
    if not package.is_file():
        pytest.skip("wllama is not installed: npm install --prefix dev --ignore-scripts")
    assert json.loads(package.read_text(encoding="utf-8"))["version"] == WLLAMA_VERSION
    return wllama_package()


def write_page(folder, model, tokenizer, files):
    """A page with a model in float32."""
    folder.mkdir()
    pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    card = GGUFCard.of("My <model>", model, "sft", "mit")
    write_gguf(folder / MODEL_FILE, *fold(model), tokenizer, card, "f32")
    add_page(folder, page_facts("My <model>", model, tokenizer, {"step": 7}, "f32"), files)
    return folder


@pytest.fixture(scope="module")
def scripted_page(tmp_path_factory, tokenizer):
    """The page of a model that calls the calculator."""
    model = scripted_model(tokenizer, *CALCULATION)
    return write_page(tmp_path_factory.mktemp("pages") / "scripted", model, tokenizer, wllama())


class TestFolder:
    """What lies in it."""

    def test_it_works_in_any_folder_of_any_host(self, tmp_path, tokenizer):
        folder = write_page(tmp_path / "page", portable_model(tokenizer), tokenizer, {"esm/index.js": b"//"})
        page = (folder / "index.html").read_text(encoding="utf-8")
        named = re.findall(r'(?:src|href)="([^"#]*)"', page)
        assert len(named) > 4
        assert all(not name.startswith(("/", "http")) and (folder / name).is_file() for name in named)
        scripts = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.js"))
        assert all((folder / name).is_file() for name in re.findall(r'from "\./([^"]+)"', scripts))
        assert set(re.findall(r"https?://\w[\w.]+", page + scripts)) == {"http://www.w3.org"}  # of SVG's names
        assert "<title>My &lt;model&gt;</title>" in page
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        assert facts["bytes"] == (folder / MODEL_FILE).stat().st_size
        assert facts["model"]["context_length"] == 128
        assert facts["wllama"]["module"] == "./wllama/esm/index.js"

    def test_other_files_other_cache(self, tmp_path, tokenizer):
        model = portable_model(tokenizer)
        names = set()
        for i, changed in enumerate([{}, {}, {"esm/index.js": b"// another"}]):
            folder = write_page(tmp_path / str(i), model, tokenizer, {"esm/index.js": b"//", **changed})
            names.add(re.search(r'"(nanochat-\w{16})"', (folder / "sw.js").read_text(encoding="utf-8"))[1])
        assert len(names) == 2

    def test_a_delivery_network_is_named_where_it_must_be(self, tmp_path, tokenizer):
        folder = write_page(tmp_path / "page", portable_model(tokenizer), tokenizer, None)
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        assert facts["wllama"]["module"].startswith(f"https://cdn.jsdelivr.net/npm/@wllama/wllama@{WLLAMA_VERSION}/")
        assert (folder / "index.html").read_text(encoding="utf-8").count("https://cdn.jsdelivr.net") == 2
        assert not (folder / "wllama").exists()

    def test_replaces_nothing_else(self, tmp_path, tokenizer):
        page = write_page(tmp_path / "page", portable_model(tokenizer), tokenizer, {"esm/index.js": b"//"})
        refuse_other_page(page)
        refuse_other_page(tmp_path / "new")
        (page / "thesis.txt").write_text("mine")
        with pytest.raises(ValueError, match=r"also thesis\.txt, which would be lost"):
            refuse_other_page(page)
        with pytest.raises(ValueError, match="holds no exported page"):
            refuse_other_page(tmp_path)

    def test_only_the_known_package_is_taken(self, tmp_path, monkeypatch):
        other = tmp_path / "other.tgz"
        other.write_bytes(b"something else")
        with pytest.raises(ValueError, match=r"other\.tgz is not @wllama/wllama"):
            wllama_tarball(other)
        with pytest.raises(RuntimeError, match="is no file"):
            wllama_tarball(tmp_path / "missing.tgz")
        kept = get_base_dir() / "wllama" / f"wllama-{WLLAMA_VERSION}.tgz"
        kept.parent.mkdir()
        kept.write_bytes(b"damaged")  # it is downloaded anew
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match=r"npm is not installed.*--wllama.*--cdn"):
            wllama_tarball(None)


# --- a browser -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def visit(browser, address, **settings):
    """A page of a fresh profile, greedy; fails on any error in it and on any request to another host."""
    context = browser.new_context(**settings)
    context.add_init_script(
        "localStorage.setItem('nanochat.settings', JSON.stringify({temperature: 0, max_tokens: 60}))"
    )
    context.add_init_script("Object.defineProperty(navigator, 'hardwareConcurrency', { get: () => 4 })")
    page = context.new_page()
    page.set_default_timeout(60000)
    problems, asked = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page, asked
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith((address, "blob:"))] == []


def say(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant:last-child:not(.waiting)")
    page.wait_for_selector("#send:not([hidden])")
    return page.inner_text(".message.assistant:last-child .content").strip()


def test_without_headers_and_service_worker_it_runs_in_one_thread(browser, scripted_page):
    with static_host(scripted_page) as address, visit(browser, address, service_workers="block") as (page, asked):
        page.wait_for_selector("#load button")
        size = (scripted_page / MODEL_FILE).stat().st_size / 1e6
        assert page.inner_text("#load button") == f"Load the model ({size:.1f} MB, and 3.1 MB of program)"
        assert not any(url.endswith((".gguf", ".wasm")) for url in asked)  # nobody has asked for it yet
        page.click("#load button")
        page.wait_for_selector("body.loaded")
        assert "1 thread" in page.inner_text("#model")
        assert say(page, "6*7?") == "Let6*7 = 42:ok"
        assert say(page, "And again? <|assistant_end|>") == "Let6*7 = 42:ok"
        page.click("#open-model")
        assert "1 thread" in page.inner_text("#facts")


def test_with_its_service_worker_it_runs_in_threads_and_without_a_network(browser, scripted_page):
    with visit_cached(browser, scripted_page) as page:
        assert page.evaluate("crossOriginIsolated")
        page.reload()  # the host is gone
        page.wait_for_selector("#load button")
        assert say(page, "6*7?") == "Let6*7 = 42:ok"
        assert "2 threads" in page.inner_text("#model")


IN_CACHE = """async () => {
  const [name] = await caches.keys();
  const requests = name ? await (await caches.open(name)).keys() : [];
  return requests.some(({ url }) => url.endsWith(".gguf"));
}"""


@contextlib.contextmanager
def visit_cached(browser, folder):
    """A page that was loaded whole, and whose host then went away."""
    with contextlib.ExitStack() as stack:
        with static_host(folder) as address:
            page, _ = stack.enter_context(visit(browser, address))
            page.wait_for_function("() => crossOriginIsolated")
            page.click("#load button")
            page.wait_for_selector("body.loaded")
            page.wait_for_function(IN_CACHE)
        yield page


def test_a_new_export_takes_the_place_of_the_old_one(browser, tmp_path, tokenizer):
    model, files = portable_model(tokenizer), {"esm/index.js": b"//"}
    page_folder = write_page(tmp_path / "page", model, tokenizer, files)
    with static_host(page_folder) as address, visit(browser, address) as (page, _):
        page.wait_for_function("() => crossOriginIsolated")
        page.wait_for_selector("#load button")
        (page_folder / "model.json").unlink()
        page.reload()  # the service worker answers, from its cache
        page.wait_for_selector("#load button")
        add_page(page_folder, page_facts("Newer", model, tokenizer, {}, "f32"), None)
        page.reload()
        page.wait_for_function("() => document.title === 'Newer'")


def test_a_delivery_network_may_hold_the_program(browser, tmp_path, tokenizer):
    folder = write_page(tmp_path / "page", scripted_model(tokenizer, *CALCULATION), tokenizer, None)
    files = wllama()
    cdn = f"https://cdn.jsdelivr.net/npm/@wllama/wllama@{WLLAMA_VERSION}/"

    def answer(route):
        name = route.request.url.removeprefix(cdn)
        kind = "text/javascript" if name.endswith(".js") else "application/wasm"
        route.fulfill(body=files[name], content_type=kind, headers={"Access-Control-Allow-Origin": "*"})

    with static_host(folder) as address, browser.new_context(service_workers="block") as context:
        page = context.new_page()
        page.route(f"{cdn}**", answer)
        page.goto(address)
        assert say(page, "6*7?").startswith("Let")


def test_it_says_what_is_missing(browser, tmp_path, tokenizer):
    folder = write_page(tmp_path / "page", portable_model(tokenizer), tokenizer, wllama())
    (folder / MODEL_FILE).write_bytes(b"GGUF")
    with static_host(folder) as address, visit(browser, address, service_workers="block") as (page, _):
        page.click("#load button")
        page.wait_for_selector("#load p:text('has 4 bytes')")
        page.fill("#input", "Hello")
        page.keyboard.press("Enter")
        page.wait_for_selector(".note.error:has-text('has 4 bytes')")
        page.wait_for_selector("#load button", state="attached")


def test_it_writes_what_our_engine_writes(browser, tmp_path, tokenizer):
    model = portable_model(tokenizer)
    folder = write_page(tmp_path / "page", model, tokenizer, wllama())
    question = TEXT[1][:60]
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
    ours, _ = Engine(model, tokenizer).generate_prompts([prompt], max_tokens=60)
    ids = [i for i in ours[0][len(prompt) :] if tokenizer.id_to_token(i) not in tokenizer.get_special_tokens()]
    with static_host(folder) as address, visit(browser, address, service_workers="block") as (page, _):
        say(page, question)
        found = page.evaluate(
            "JSON.parse(localStorage.getItem(Object.keys(localStorage).find((k) => k.includes('serve.chat'))))"
        )
        parts = found["messages"][-1]["parts"]
    assert "".join(part["text"] for part in parts) == tokenizer.decode_bytes(ids).decode("utf-8", errors="ignore")


def test_a_page_draws_answers_as_the_checkpoint_says(tiny_model, tiny_tokenizer):
    for recorded, expected in ((None, (0.8, 50)), ({"temperature": 0.3, "top_k": 20}, (0.3, 20))):
        defaults = page_facts("x", tiny_model, tiny_tokenizer, {"sampling": recorded}, "f32")["defaults"]
        assert (defaults["temperature"], defaults["top_k"]) == expected
        assert defaults["max_tokens"] == min(512, tiny_model.config.sequence_len)
