"""The chat page in headless Chromium: streams, stops, edits, regenerates, remembers, and shows nothing but text."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from web_server import ScriptedEngine, reverse_proxy, serve, tiny_app, tiny_chat_model

from nanochat.data.chat_loader import load_conversations
from nanochat.messages import normalise
from nanochat.serve.app import UI_FOLDER
from nanochat.serve.guard import Access

HTML = (UI_FOLDER / "index.html").read_text(encoding="utf-8")
SCRIPTS = "\n".join(p.read_text(encoding="utf-8") for p in sorted(UI_FOLDER.glob("*.js")))
HOSTILE = """<script>window.pwned = 1</script> <img src=x onerror="window.pwned = 2">
[click](javascript:window.pwned=3) [data](data:text/html,x) ![pic](https://evil.example/p.png) <|assistant_start|>
[ok](https://example.org/a?b=c) https://example.org/bare. `<b>code</b>`

```html
<script>window.pwned = 4</script>
```"""


@pytest.fixture(scope="module")
def client(site):
    return site[0]


@pytest.fixture(scope="module")
def site(tiny_tokenizer):
    """(client, engine) of a server whose answers are written by the tests."""
    app, engine = tiny_app(tiny_chat_model(tiny_tokenizer, 2048), tiny_tokenizer, ScriptedEngine)
    with serve(app) as client:
        yield client, engine


class TestFiles:
    """What can be checked without a browser."""

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/", "text/html"),
            ("/style.css", "text/css"),
            ("/app.js", "text/javascript"),
            ("/logo.svg", "image/svg+xml"),
        ],
    )
    def test_headers(self, client, path, kind):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert "access-control-allow-origin" not in response.headers

    def test_every_file_the_page_names_is_there(self, client):
        named = ["/" + name for name in re.findall(r'(?:src|href)="([^"#]+)"', HTML)]
        named += ["/" + name for name in re.findall(r'from "\./([^"]+)"', SCRIPTS)]
        assert len(set(named)) > 8
        for path in set(named):
            assert client.get(path).status_code == 200, path

    def test_nothing_from_elsewhere_and_no_inline_script(self):
        assert "http" not in re.sub(r"<meta[^>]*>", "", HTML)
        assert not re.search(r"\son\w+=|style=|<script(?![^>]*src=)", HTML)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", SCRIPTS)
        assert ElementTree.fromstring((UI_FOLDER / "logo.svg").read_text(encoding="utf-8")).tag.endswith("svg")
        assert set(re.findall(r'byId\("([^"]+)"\)', SCRIPTS)) <= set(re.findall(r'id="([^"]+)"', HTML))


@pytest.fixture
def engine(site):
    site[1].script, site[1].delay = [("text", "Hello "), ("text", "there.")], 0.005
    return site[1]


@pytest.fixture
def page(browser, site, engine):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(20000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(str(site[0].base_url))
    page.wait_for_selector("#dot.ready")
    yield page
    context.close()
    assert not [p for p in problems if "status of 401" not in p]


def say(page, text, wait=True):
    page.fill("#input", text)
    page.keyboard.press("Enter")
    if wait:
        finished(page)


def finished(page):
    page.wait_for_selector(".message.assistant:last-child:not(.waiting)")
    page.wait_for_selector("#send:not([hidden])")


def messages(page):
    return page.eval_on_selector_all(".message", "all => all.map(m => m.querySelector('.content').innerText.trim())")


def test_an_answer_streams_in(page, engine):
    engine.script, engine.delay = [("text", f"word{i} ") for i in range(40)], 0.05
    say(page, "Hi", wait=False)
    page.wait_for_function("() => document.querySelector('.assistant .content').innerText.includes('word3')")
    assert "word39" not in messages(page)[1]  # shown before it was complete
    finished(page)
    assert messages(page) == ["Hi", " ".join(f"word{i}" for i in range(40))]
    assert "40 tokens" in page.inner_text(".assistant .stats")


def test_the_end_of_a_long_answer_is_in_sight(page, engine):
    engine.script = [("text", f"Paragraph {i}.\n\n") for i in range(60)]
    say(page, "Hi")
    assert page.evaluate("log.scrollHeight - log.clientHeight") > 500
    assert page.evaluate("log.scrollHeight - log.clientHeight - log.scrollTop") < 2


def test_stop_keeps_what_was_written(page, engine):
    engine.script, engine.delay = [("text", "a ")] * 1000, 0.02
    for stop in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        say(page, "Go on", wait=False)
        page.wait_for_function("() => [...document.querySelectorAll('.assistant')].at(-1).innerText.includes('a a')")
        stop()
        finished(page)
        assert "stopped" in page.inner_text(".assistant:last-child .stats")
    assert 2 < len(messages(page)[-1]) < 500
    engine.script = [("text", "Yes.")]
    say(page, "Still there?")
    assert messages(page)[-1] == "Yes."


def test_edit_forgets_what_followed(page, engine):
    say(page, "One")
    say(page, "Two")
    page.hover(".message.user >> nth=0")
    page.click(".message.user >> nth=0 >> button[aria-label=Edit]")
    page.fill(".editing textarea", "Uno")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.message').length === 2")
    finished(page)
    assert messages(page) == ["Uno", "Hello there."]
    page.focus("#input")
    page.keyboard.press("ArrowUp")
    page.fill(".editing textarea", "Never sent")
    page.keyboard.press("Escape")
    assert messages(page) == ["Uno", "Hello there."]


def test_regenerate_asks_again(page, engine):
    say(page, "One")
    engine.script = [("text", "Another answer.")]
    page.click("button[aria-label=Regenerate]")
    page.wait_for_function("() => document.querySelector('.assistant').innerText.includes('Another')")
    assert messages(page) == ["One", "Another answer."]


def test_a_reload_keeps_the_history(page, engine):
    say(page, "First chat")
    page.click("#new-chat")
    assert messages(page) == []
    say(page, "Second chat")
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert messages(page) == ["Second chat", "Hello there."]
    page.click("#chats .chat >> text=First chat")
    assert messages(page) == ["First chat", "Hello there."]
    page.click("button[aria-label='Delete the chat First chat']")
    assert page.locator("#chats .chat").all_inner_texts() == ["Second chat"]
    page.click("#open-settings")
    page.click("#forget-all")
    page.click("#forget-all")
    assert page.locator("#chats .chat").count() == 0
    assert page.evaluate("Object.keys(localStorage).filter(k => k.includes('chat.'))") == []


def test_hostile_answers_and_questions_stay_text(page, engine):
    engine.script = [("text", HOSTILE[i : i + 7]) for i in range(0, len(HOSTILE), 7)]
    say(page, HOSTILE)
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None
    for kind in ("user", "assistant"):
        text = page.inner_text(f".{kind} .content")
        assert "<script>window.pwned = 1</script>" in text
        assert "<|assistant_start|>" in text
        assert "javascript:" in text
    assert page.locator(".message script, .message img").count() == 0
    links = page.eval_on_selector_all(".message a", "all => all.map(a => [a.getAttribute('href'), a.rel])")
    assert {href for href, _ in links} == {
        "https://evil.example/p.png",
        "https://example.org/a?b=c",
        "https://example.org/bare",
    }
    assert all("noopener" in rel for _, rel in links)


def test_markdown_is_drawn(page, engine):
    engine.script = [
        ("text", "## Title\n\n1. **one**\n2. *two*\n   - inner\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n> said\n\n")
    ]
    engine.script += [("text", "```python\nprint('hi')  # note\n```\n\n2 * 3 * 4 and snake_case_name")]
    say(page, "Show all")
    for selector, text in {
        "h4": "Title",
        "ol > li > strong": "one",
        "ol > li > em": "two",
        "ol ul > li": "inner",
        "td.end": "2",
        "blockquote p": "said",
        "pre code .s": "'hi'",
        "pre code .c": "# note",
        "div.code + p": "2 * 3 * 4 and snake_case_name",
    }.items():
        assert page.inner_text(f".assistant .content {selector}") == text, selector


def test_markdown_never_makes_other_elements_whatever_the_text(page):
    allowed = "P STRONG EM DEL CODE A UL OL LI BLOCKQUOTE HR H3 H4 H5 H6 DIV SPAN PRE BUTTON svg use"
    allowed += " TABLE THEAD TBODY TR TH TD"
    found = page.evaluate(
        """async () => {
            const { renderMarkdown } = await import("./markdown.js");
            const pieces = ["<b>", "*", "**", "_", "`", "```", "~~", "[", "](", ")",
              "javascript:a", "https://a.b", "\\n", "\\n\\n", "- ", "1. ", "  ", "> ", "# ", "| ", "|-|", "a", " ",
              "\\\\", "!", "<img src=x onerror=a>", "\\ue000", "---"];
            let state = 1;
            const next = () => (state = (state * 48271) % 2147483647);
            const names = new Set();
            for (let i = 0; i < 2000; i += 1) {
              const text = Array.from({ length: next() % 40 }, () => pieces[next() % pieces.length]).join("");
              for (const node of renderMarkdown(text).querySelectorAll("*")) {
                names.add(node.tagName);
                for (const { name, value } of node.attributes) {
                  const bad = name.startsWith("on") || (name === "href" && !/^(https:|#i-)/.test(value));
                  if (bad) names.add(`${name}=${value}`);
                }
              }
            }
            const start = performance.now();
            for (const piece of pieces) renderMarkdown(piece.repeat(8000 / piece.length));
            return [[...names], performance.now() - start];
        }"""
    )
    assert set(found[0]) <= set(allowed.split())
    assert {"STRONG", "A", "PRE", "LI"} <= set(found[0])
    assert found[1] < 20000  # a pathological text would take minutes


def test_tool_calls_are_shown(page, engine):
    engine.script = [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
    say(page, "6 times 7?")
    assert page.inner_text(".chip") == "6*7 = 42"
    assert messages(page)[1].endswith("42.")


@pytest.mark.parametrize(
    ("script", "shown", "work"),
    [
        ([("python", "6*7"), ("python_output", "42"), ("text", "It is 42.")], "It is 42.", "6*7 = 42"),
        (
            [
                ("text", "Count r in ribbon: r1 i1 … Check: "),
                ("python", '"ribbon".count("r")'),
                ("python_output", "1"),
                *[("text", piece) for piece in ("\n", "##", "## 1")],
            ],
            "1",
            'Count r in ribbon: r1 i1 … Check: "ribbon".count("r") = 1',
        ),
        ([("text", "3 and 4 are 7.\n#### 7")], "7", "3 and 4 are 7."),
        ([("text", "#### Title\n\nText")], "Title\n\nText", None),  # a heading, as ever
        ([("text", "Is it 7?\n####")], "Is it 7?", None),
    ],
)
def test_what_an_answer_was_worked_out_with_is_folded(page, engine, script, shown, work):
    engine.script = script
    say(page, "Well?")
    said = page.locator(".assistant .content").first
    assert (
        said.evaluate("n => [...n.children].filter(c => !c.matches('.work')).map(c => c.innerText).join('\\n\\n')")
        == shown
    )
    assert "####" not in said.inner_text()
    assert page.locator(".work").count() == (work is not None)
    if work:
        assert not page.locator(".work > div").is_visible()
        page.click(".work summary")
        assert re.sub(r"\s+", " ", page.inner_text(".work > div")) == work
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".assistant button[aria-label=Copy]")
    assert "####" not in page.evaluate("navigator.clipboard.readText()").removeprefix("#### Title")


def test_chats_are_searched_and_renamed(page, engine):
    for question in ("Where do whales live?", "Second"):
        page.click("#new-chat")
        say(page, question)
    engine.script = [("text", "It is Ulaanbaatar.")]
    say(page, "And the capital of Mongolia?")
    page.fill("#search", "ulaanBAATAR")
    assert page.locator("#chats .chat").all_inner_texts() == ["Second"]
    page.fill("#search", "<nothing>")
    assert "No chat has these words" in page.inner_text("#chats")
    page.fill("#search", "")
    for title, key in (("<b>Animals</b>", "Enter"), ("not this", "Escape"), ("  ", "Enter")):
        page.hover("#chats li >> nth=1")
        page.click("#chats li >> nth=1 >> button[aria-label^=Rename]")
        page.fill("#chats li input", title)
        page.keyboard.press(key)
        assert page.locator("#chats .chat").all_inner_texts() == ["Second", "<b>Animals</b>"]
    page.click("#chats button[aria-label^=Rename] >> nth=0")
    page.fill("#chats li input", "Travels")
    page.focus("#input")  # leaving the box keeps the name as well
    say(page, "More")
    page.reload()
    assert page.locator("#chats .chat").all_inner_texts() == ["Travels", "<b>Animals</b>"]


def test_how_full_the_context_is(page, engine):
    assert not page.is_visible("#room")
    say(page, "Hi")
    assert page.inner_text("#room") == "7 of 2,048 tokens of context"  # 5 of the prompt, 2 of the answer
    engine.script = [("text", "a")] * 1700
    engine.delay = 0
    say(page, "Hi")
    assert page.inner_text("#room").startswith("1,705 of 2,048 tokens of context: when it is full")
    page.reload()
    page.wait_for_selector("#room:not([hidden])")
    assert page.get_attribute("#meter", "max") == "2048"
    page.click("#new-chat")
    assert not page.is_visible("#room")


def test_the_welcome_says_what_the_model_knows(browser, site, engine):
    stats = site[0].get("/stats").json()
    assert stats["limits"]["max_tokens"] == 2048  # no answer is longer than the context
    scores = [["arithmetic", 0.99], ["spelling unseen", 0.0]]
    stats["model"] |= {"scores": scores, "suggestions": ["<b>What</b> is 3 + 4?"], "name": "d4 sft", "n_layer": 4}
    page = browser.new_page()
    page.add_init_script("localStorage.setItem('nanochat.settings', JSON.stringify({max_tokens: 3000}))")
    page.route("**/stats", lambda route: route.fulfill(json=stats))
    page.goto(str(site[0].base_url))
    page.wait_for_selector("#dot.ready")
    # no-break spaces: no number is torn from its sign
    assert "good at arithmetic (99\u00a0%). It often fails at spelling unseen (0\u00a0%)." in page.inner_text("#knows")
    about = page.get_attribute("#open-model", "title")
    assert "d4 sft: a model of 4 layers, finetuned to answer. 12K: it has 12,345 parameters" in about
    with page.expect_request("**/chat/completions") as sent:
        page.click("#suggestions button")
    assert sent.value.post_data_json == {"messages": [{"role": "user", "content": "<b>What</b> is 3 + 4?"}]}
    page.close()


def test_commands_and_settings(page, engine):
    for text, answer in {
        "/temperature 0.5": "Temperature is now 0.5.",
        "/temperature 3": "from 0 to 2",
        "/topk 7": "Top-k is now 7.",
        "/top_p 0.9": "Top-p is now 0.9.",
        "/repetition_penalty 1.1": "Repetition penalty is now 1.1.",
        "/max_tokens 99": "Longest answer is now 99.",
        "/max_tokens 1e9": "from 1 to 2048",
        "/system Be brief.": "told this first",
        "/quit": "Close this tab",
        "/undo": "Nothing was said",
        "/clear the table": "write //clear the table",
        "/nonsense": "no command",
    }.items():
        say(page, text, wait=False)
        assert answer in page.inner_text(".note:last-child")
    with page.expect_request("**/chat/completions") as sent:
        say(page, "Hi")
    assert sent.value.post_data_json == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "max_tokens": 99,
    }
    say(page, "/help", wait=False)
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    page.click("#open-settings")
    assert page.inner_text("#out-temperature") == "0.5"
    page.click("#reset-settings")
    assert page.inner_text("#out-temperature") == "0"  # the server's
    page.keyboard.press("Escape")
    say(page, "/clear", wait=False)
    assert messages(page) == []


def test_the_model_card(page):
    page.click("#open-model")
    facts = page.inner_text("#card")
    for fact in ("tiny sft", "12,345", "float32", "1.234", "cpu"):
        assert fact in facts


def test_a_failing_answer_can_be_tried_again(page, engine):
    engine.script = [("error", "secret")]
    say(page, "Hi", wait=False)
    page.wait_for_selector(".note.error")
    assert "secret" not in page.inner_text("#log")
    engine.script = [("text", "Fine now.")]
    page.click("text=Try again")
    page.wait_for_selector(".message.assistant")
    finished(page)
    assert messages(page) == ["Hi", "Fine now."]


def test_a_server_with_a_key_asks_for_it(browser, tiny_tokenizer):
    app, _ = tiny_app(
        tiny_chat_model(tiny_tokenizer), tiny_tokenizer, ScriptedEngine, access=Access(api_key="opensesame")
    )
    with serve(app) as client:
        context = browser.new_context()
        page = context.new_page()
        page.goto(str(client.base_url))
        page.wait_for_selector("#key[open]")
        page.fill("#key-input", "opensesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#dot.ready")
        say(page, "Hi")
        assert messages(page) == ["Hi", "Hello."]
        context.close()


# What a finger is to hit, in the page and in what lies over it.
TOO_SMALL = """() => [...document.querySelectorAll("button, input, summary, textarea")]
    .filter((node) => node.checkVisibility({visibilityProperty: true}))
    .map((node) => [node.id || node.className, node.getBoundingClientRect()])
    .filter(([, box]) => box.width < 44 || box.height < 44).map(([name]) => name)"""


def test_light_dark_and_phone(browser, site, engine):
    colors = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True)
        page = context.new_page()
        page.goto(str(site[0].base_url))
        page.wait_for_selector("#dot.ready")
        engine.script = [("text", "```\n" + "long " * 100 + "\n```\n\n" + "x" * 300)]
        say(page, "wide " * 30)
        colors[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
        assert not page.is_visible("#sidebar")
        assert page.evaluate(TOO_SMALL) == []
        page.click("#open-sidebar")
        page.wait_for_selector("#chats .chat", state="visible")
        assert page.evaluate(TOO_SMALL) == []
        page.click("#open-help")
        overlapping = page.evaluate("""() => [...document.querySelectorAll("#help dt")].filter((dt) => {
            const text = document.createRange();
            text.selectNodeContents(dt);
            const [a, b] = [text.getBoundingClientRect(), dt.nextElementSibling.getBoundingClientRect()];
            return a.right > b.left && a.bottom > b.top + 1;
        }).map((dt) => dt.textContent)""")
        assert overlapping == []
        page.keyboard.press("Escape")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != colors[scheme]
        context.close()
    assert colors["light"] != colors["dark"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, engine, scheme, accessible):
    page.emulate_media(color_scheme=scheme)
    engine.script = [
        ("text", f"# Title\n\n- item\n\n```python\nx = 1  # note\n```\n\n[link](https://a.b)\n\n{HOSTILE}")
    ]
    engine.script += [("python", "6*7"), ("python_output", "42")]
    say(page, "Hi")
    engine.script = [("python", "6*7"), ("python_output", "42"), ("text", "It is 42.")]
    say(page, "And so?")
    page.click(".work summary")
    say(page, "/temperature 9", wait=False)
    for opener, dialog in [
        (None, None),
        ("#open-settings", "#settings"),
        ("#open-model", "#card"),
        ("#open-help", "#help"),
    ]:
        if opener:
            page.click(opener)
            page.wait_for_selector(f"{dialog}[open]")
        page.wait_for_timeout(200)  # colours change slowly
        accessible(page)
        if opener:
            page.keyboard.press("Escape")


def test_behind_a_proxy_under_a_path(browser, site, engine):
    with serve(reverse_proxy(str(site[0].base_url), "/chat")) as proxy:
        page = browser.new_page()
        page.goto(f"{proxy.base_url}/chat/")
        page.wait_for_selector("#dot.ready")
        say(page, "Hi")
        assert messages(page) == ["Hi", "Hello there."]
        assert page.evaluate("getComputedStyle(document.body).display") == "flex"  # the style has come too
        page.close()


def test_a_page_whose_script_does_not_load_says_so(browser, site):
    page = browser.new_page()
    page.route("**/api.js", lambda route: route.abort())
    page.goto(str(site[0].base_url))
    page.wait_for_selector("#unscripted", state="visible")
    assert "--root_path" in page.inner_text("#unscripted")
    page.close()


def test_commands_that_change_the_conversation(page, engine):
    say(page, "One")
    say(page, "Two")
    engine.script = [("text", "Again.")]
    say(page, "/retry", wait=False)
    page.wait_for_function("() => document.querySelector('#log').innerText.includes('Again.')")
    finished(page)
    assert messages(page) == ["One", "Hello there.", "Two", "Again."]
    say(page, "/undo", wait=False)
    assert messages(page) == ["One", "Hello there."]
    say(page, "/undo", wait=False)
    assert messages(page) == []
    assert page.is_visible("#welcome")
    assert page.locator("#chats .chat").count() == 0
    say(page, "//help what is this?")
    say(page, "/path what is this?")
    assert messages(page)[::2] == ["/help what is this?", "/path what is this?"]


@pytest.mark.parametrize(
    "kept",
    [
        '{"temperature": "hot", "top_k": 3.5, "top_p": 7, "max_tokens": [1], "system": {"a": 1}, "tokens": 1}',
        "[1, 2]",
        '"text"',
        "17",
        "not json",
    ],
)
def test_nonsense_in_the_storage_is_not_sent(page, kept):
    page.evaluate("kept => localStorage.setItem('nanochat.settings', kept)", kept)
    page.evaluate("localStorage.setItem('nanochat.theme', 'pink')")
    page.evaluate("""() => {
        const chats = [{id: "x", messages: {}}, {id: "y", title: {}, messages: []}, {id: "z", messages: [null]}, 17];
        for (const chat of chats)
            localStorage.setItem("nanochat.serve.chat." + chat.id, JSON.stringify(chat));
    }""")
    page.reload()
    page.wait_for_selector("#dot.ready")
    with page.expect_request("**/chat/completions") as sent:
        say(page, "Hi")
    assert sent.value.post_data_json == {"messages": [{"role": "user", "content": "Hi"}]}
    assert page.locator("#chats .chat").all_inner_texts() == ["Hi"]
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_full_context_is_said_once_and_where(page, site):
    exchanges = []
    page.route("**/chat/completions", lambda route: answer(route))

    def answer(route):
        left_out = max(0, 2 * (len(exchanges) - 2))
        exchanges.append(left_out)
        events = [{"left_out": left_out}] * bool(left_out) + [
            {"token": "Yes."},
            {"finish_reason": "stop"},
            {"done": True},
        ]
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    for i in range(6):
        say(page, f"Question {i}")
    assert page.locator(".horizon").count() == 1
    assert "full" in page.inner_text(".horizon")
    assert page.inner_text(".horizon + .message").startswith("Question 3")  # six messages are above, four below


def test_a_long_paste_says_that_it_is_cut(page):
    page.focus("#input")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("text => navigator.clipboard.writeText(text)", "x" * 9000)
    page.keyboard.press("Control+V")
    page.wait_for_selector("#cut", state="visible")
    assert "8,000" in page.inner_text("#cut")
    assert "1,000 are left out" in page.inner_text("#cut")
    assert len(page.input_value("#input")) == 8000
    page.keyboard.press("Backspace")
    assert not page.is_visible("#cut")


def test_chats_travel_as_files(page, engine, tmp_path):
    engine.script = [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
    say(page, "/system Be brief.", wait=False)
    say(page, "6 times 7? ü \u2028")
    with page.expect_download() as one:
        say(page, "/save mine.json", wait=False)
    assert one.value.suggested_filename == "mine.json"
    page.click("#new-chat")
    say(page, "Second")
    page.click("#open-settings")
    with page.expect_download() as all_of_them:
        page.click("#export-chats")
    path = tmp_path / "chats.jsonl"
    all_of_them.value.save_as(path)
    assert len(load_conversations(path)) == 2  # what training reads
    saved = json.loads(Path(one.value.path()).read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"][1] == {"type": "python", "text": "6*7"}

    page.set_input_files("#import-file", path)
    page.wait_for_function("() => document.querySelector('#chats-moved').innerText.includes('imported')")
    assert "2 chats left out: here already" in page.inner_text("#chats-moved")
    page.click("#forget-all")
    page.click("#forget-all")
    others = tmp_path / "others.json"
    others.write_text(
        '\ufeff[{"messages": [{"role": "user", "content": "<b>Bold?</b>"}, {"role": "assistant", "content": "No."}]},'
        ' {"messages": "none"}, [{"role": "user", "content": [{"type": "text", "text": "%s"}]}], null]' % ("y" * 9000),
        encoding="utf-8",
    )
    page.click("#open-settings")
    page.set_input_files("#import-file", [path, others])
    page.wait_for_function("() => document.querySelector('#chats-moved').innerText.includes('4 chats')")
    said = page.inner_text("#chats-moved")
    assert "4 chats imported" in said
    assert "2 lines left out" in said
    assert "1 message longer than 8000" in said
    page.keyboard.press("Escape")
    page.click("#chats .chat >> text=Bold")
    assert messages(page) == ["<b>Bold?</b>", "No."]
    page.click("#chats .chat >> text=6 times 7")
    assert page.inner_text(".chip") == "6*7 = 42"

    call = {"id": "1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "3+4"}'}}
    messages_of_openai = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
        {"role": "user", "content": "And 3 + 4?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "It is 7."}]},
    ]
    others.write_text(json.dumps({"messages": messages_of_openai}), encoding="utf-8")
    page.click("#open-settings")
    page.set_input_files("#import-file", others)
    page.wait_for_function("() => document.querySelector('#chats-moved').innerText.startsWith('1 chat imported')")
    page.keyboard.press("Escape")
    page.click("#chats .chat >> text=And 3 + 4")
    assert messages(page)[0] == "And 3 + 4?"
    assert page.text_content(".chip") == "3+4 = 7"
    assert "It is 7." in page.inner_text(".message.assistant")


READ = """
import { readFileSync } from "node:fs";
const { readChats } = await import(process.argv[1]);
process.stdout.write(JSON.stringify(readChats(readFileSync(0, "utf8"), () => ({ messages: [] }))));
"""


def read_chats(*chats):
    """What the page makes of a file with these lists of messages."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    module = (UI_FOLDER / "transfer.js").as_uri()
    run = ["node", "--input-type=module", "-e", READ, module]
    given = "\n".join(json.dumps({"messages": messages}) for messages in chats)
    done = subprocess.run(run, input=given, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def joined(content):
    """A message's parts without empty ones, neighbouring texts as one."""
    found = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if found and found[-1]["type"] == part["type"] == "text":
            found[-1] = {"type": "text", "text": found[-1]["text"] + part["text"]}
        elif part["text"]:
            found.append(part)
    return found


def test_chats_of_other_programs_are_read_as_training_reads_them():
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    look = {"name": "look", "arguments": {"at": ["Ω", 1], "deep": {"x": None}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": i, "function": look} for i in (0, 1)]}
    bare = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "look"}}]}
    results = [{"role": "tool", "tool_call_id": i, "content": text} for i, text in ((1, "b"), (0, None))]
    old = {"role": "assistant", "content": None, "function_call": {"name": "python", "arguments": '{"code": "1+1"}'}}
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    chats = [
        [user, answer, answer, user],
        [user, calls, *results, answer, answer],
        [user, bare, answer],
        [user, old, {"role": "function", "name": "python", "content": "2"}, answer],
        [user, refusal],
    ]
    found = read_chats(*chats)
    assert found["unreadable"] == 0
    for chat, messages in zip(found["chats"], chats, strict=True):
        expected = [(m["role"], joined(m["content"])) for m in normalise(messages)[0]]
        assert [(m["role"], joined(m["parts"])) for m in chat["messages"]] == expected


def test_messages_in_parts_are_read_and_those_without_content_are_counted():
    def said(role, *parts):
        return {"role": role, "parts": list(parts)}

    text, step = {"type": "text", "text": "Hi"}, {"type": "step-start"}
    found = read_chats([said("user", text), said("assistant", step, text)])
    assert [joined(m["parts"]) for m in found["chats"][0]["messages"]] == [[text], [text]]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "look"}}]}
    user, result = {"role": "user", "content": "Hi"}, {"role": "tool", "tool_call_id": "a", "content": "2"}
    unreadable = [
        [user, {"role": "assistant", "content": None}],
        [user, {"role": "assistant", "tool_calls": []}],
        [{"role": "user"}, {"role": "assistant", "content": "Yes."}],
        [said("user", text), said("assistant", step)],
        [said("user", text), said("assistant", {"type": "tool-look", "input": {}}, text)],
        [user, call, user, {"role": "assistant", "content": "Yes."}, result],  # too late: nothing waits for it
    ]
    assert read_chats(*unreadable) == {"chats": [], "unreadable": len(unreadable)}


def test_no_room_for_more_chats_is_said(page):
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    page.click("#open-settings")
    file = {"name": "many.jsonl", "mimeType": "", "buffer": "\n".join([json.dumps(chat)] * 203).encode()}
    page.set_input_files("#import-file", file)
    page.wait_for_function("() => document.querySelector('#chats-moved').innerText.includes('imported')")
    assert page.inner_text("#chats-moved") == "200 chats imported. 3 chats left out: no room. Delete some first."
    page.keyboard.press("Escape")
    say(page, "One more")
    assert "oldest chat was deleted" in page.inner_text("#log .note")
    assert page.locator("#chats .chat").count() == 200


def test_the_learners_window(page):
    def answer(route):
        rivals = [{"token": " blue", "logprob": -0.2}, {"token": " red", "logprob": -2.0}]
        tokens = [
            {"token": "It", "logprob": -0.01, "top_logprobs": [{"token": "It", "logprob": -0.01}]},
            {"token": " red", "logprob": -2.0, "top_logprobs": rivals},
        ]
        events = [{"token": "It red", "logprobs": tokens}, {"finish_reason": "stop"}, {"done": True}]
        route.fulfill(
            status=200,
            content_type="text/event-stream",
            body="".join(f"data: {json.dumps(event)}\n\n" for event in events),
        )

    page.route("**/chat/completions", answer)
    page.click("#open-settings")
    page.check("#set-tokens")
    page.keyboard.press("Escape")
    with page.expect_request("**/chat/completions") as sent:
        say(page, "Hi")
    assert sent.value.post_data_json["logprobs"] == 5
    assert page.locator(".token").all_inner_texts() == ["It", " red"]
    page.hover(".token >> nth=1")
    rows = [re.sub(r"\s+", " ", row) for row in page.locator("#peek tr").all_inner_texts()]
    assert rows == ["␣blue 82 %", "␣red 14 %"]
    assert page.inner_text("#peek tr.chosen td") == "␣red"
    page.focus(".tokens")
    page.mouse.move(0, 0)
    page.keyboard.press("ArrowRight")
    assert "99 %" in page.inner_text("#peek")
    page.click(".assistant button[aria-pressed=true]")
    assert page.locator(".token").count() == 0
    assert messages(page)[1] == "It red"


def test_a_tapped_token_stays_shown(browser, site, engine):
    context = browser.new_context(viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.add_init_script("localStorage.setItem('nanochat.settings', JSON.stringify({tokens: true}))")
    token = {"token": "Hi", "logprob": -0.5, "top_logprobs": [{"token": "Hi", "logprob": -0.5}]}
    events = [{"token": "Hi", "logprobs": [token]}, {"finish_reason": "stop"}, {"done": True}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    page.route("**/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    page.goto(str(site[0].base_url))
    page.wait_for_selector("#dot.ready")
    say(page, "Hello")
    page.tap(".token")
    assert page.is_visible("#peek")
    assert "61 %" in page.inner_text("#peek")
    page.tap("header")
    assert not page.is_visible("#peek")
    context.close()


def test_a_message_that_is_refused_can_be_edited(browser, site, engine):
    page = browser.new_page()  # its console holds the refusal
    page.goto(str(site[0].base_url))
    page.wait_for_selector("#dot.ready")
    error = {"error": {"message": "the message is too long: shorten it", "type": "", "param": None, "code": None}}
    page.route("**/chat/completions", lambda route: route.fulfill(status=400, json=error))
    say(page, "Too long", wait=False)
    page.click("text=Edit the message")
    assert page.input_value(".message.user textarea") == "Too long"
    assert not page.locator("text=Try again").count()
    page.unroute("**/chat/completions")
    page.fill(".editing textarea", "Short")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelector('.message.assistant')?.innerText.includes('Hello there.')")
    finished(page)
    assert messages(page) == ["Short", "Hello there."]
    page.close()
