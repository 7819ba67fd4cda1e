"""The report as a page: whole, small, alone, and safe from what models write."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import run_script
from nanochat.files import read_json, write_record
from nanochat.report import Report
from nanochat.report.__main__ import Config, main, open_run
from nanochat.report.plots import MAX_POINTS, Line, Plotter, thin
from nanochat.report.run_data import PRICES, cost_line, readable, verdict

HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>$x_{$ ![p](http://evil.example/p.png)"
MEGABYTES = 2_000_000


def metrics(steps: int, **more: float) -> str:
    """A loss log; the scale halves and a step is skipped on the way."""
    lines = []
    for i in range(1, steps + 1):
        record = {"step": i, "seconds": i * 0.5, "tokens": i * 100, "loss": 1 + math.sin(i) / 9 + 8 / i}
        record |= {"smooth_loss": 1 + 8 / i, "lr_multiplier": 1 - i / steps, "grad_norm": 1 / i, "peak_memory_gb": 1.5}
        record |= {"skipped": i * 5 // steps, "scale": 2.0 ** (16 - i * 5 // steps), "tokens_per_second": 900.0 + i % 7}
        lines.append(json.dumps(record | {"share_of_matmul_speed": 0.3 + i % 7 / 100} | more))
        if i % 50 == 0:
            lines.append(json.dumps({"step": i, "seconds": i * 0.5, "val_bpb": 1 / i}))
    return "\n".join(lines) + '\n{"torn'


def make_run(folder: Path, steps: int = 120) -> Report:
    """The base dir of a whole run, with hostile texts wherever a model or a user writes."""
    report = Report(folder / "report")
    report.reset()
    path = folder / "report" / "_header.json"
    header = read_json(path)
    header["environment"]["GPU"] = "Tesla P100-PCIE-16GB, 16 GiB, 6.0"
    write_record(path, header | {"time": "2026-01-01T10:00:00+00:00"})
    report.log("Tokenizer training", [{"vocab_size": 4096}, {"documents": 10}])
    report.log("Tokenizer evaluation", ["Bytes per token:\n\n| text | ours |\n|---|---|\n| val | 4.0 |", HOSTILE])
    facts = {"parameters": 5_242_880, "FLOPs per token": 28_000_000, "tokens": 12_000, "dtype": "float16"}
    report.log("Base model training", [{"depth": 4, "run": HOSTILE}, facts], metrics={"val bpb": 0.9})
    report.log("Base model loss", ["Samples (greedy):", f"```\n{HOSTILE!r}\n'two'\n```"], metrics={"train bpb": 0.8})
    report.log("Midtraining", [{"model_tag": "d4"}, {"steps": steps}], metrics={"val loss": 1.5})
    report.log("Chat evaluation mid", [], metrics={"GSM8K": 0.1, HOSTILE: 0.4, "ChatCORE": 0.2})
    report.log("SFT", [{"model_tag": "d4"}, {"steps": steps}], metrics={"val loss": 1.2})
    report.log("Chat evaluation sft", [], metrics={"GSM8K": 0.3, "ChatCORE": 0.4})
    for name in ("base", "mid", "chatsft"):
        log = folder / f"{name}_checkpoints" / "d4" / "metrics.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text(metrics(steps))
    for source in ("mid", "sft"):
        answers = folder / "chat_eval" / f"{source}_d4_000120" / "gsm8k.jsonl"
        answers.parent.mkdir(parents=True)
        record = {"index": 0, "question": HOSTILE, "answer": "42", "passed": source == "sft", "completions": [HOSTILE]}
        answers.write_text(json.dumps(record) + "\n")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "base_train.json").write_text('{"state": "done", "seconds": 61.5}')
    return report


@pytest.fixture
def report(base_dir) -> Report:
    return make_run(base_dir)


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    """The page of a whole run, made once."""
    return make_run(tmp_path_factory.mktemp("run")).generate().with_suffix(".html")


@pytest.fixture(scope="module")
def html(page_path) -> str:
    return page_path.read_text(encoding="utf-8")


def page_of(report: Report) -> str:
    return report.generate().with_suffix(".html").read_text(encoding="utf-8")


def assert_alone(html: str) -> None:
    """Nothing in the page is taken from elsewhere."""
    assert not re.search(r"<(script|iframe|object|embed|base|form)\b", html)
    assert not re.search(
        r"""(src|href|action|data)\s*=\s*["']?(?!#|data:)[^"'\s>#]""", re.sub(r"data-\w+=", "", tags(html))
    )
    assert not re.search(r"@import|url\((?!#)", tags(html))
    assert "default-src 'none'" in html


def tags(html: str) -> str:
    """What a browser reads as tags and style, without the texts between."""
    return " ".join(re.findall(r"<style>.*?</style>|<[a-zA-Z][^>]*>", html, flags=re.DOTALL))


def test_the_page_says_everything_and_needs_nothing(html):
    assert_alone(html)
    assert len(html.encode()) < MEGABYTES / 4
    for text in ("d4, 5.24M parameters", "Base training", "Finetuning (SFT)", "Loss scale", "Skipped steps", "MFU"):
        assert text in html
    for text in ("Validation bits per byte", "Gradient norm", "Tokens per second", "GSM8K", "1m02s", "Tesla P100"):
        assert text in html
    assert "The same at every step: peak memory 1.5." in html.replace("Peak", "peak")
    assert html.count('<svg class="plot"') >= 3 * 7
    ids = re.findall(r'\bid="([^"]+)"', tags(html))
    assert len(ids) == len(set(ids))


def test_what_a_model_writes_stays_text(html):
    assert "<script" not in html
    assert not re.search(r"<img|onerror=(?!&)", tags(html))
    assert html.count("&lt;script&gt;window.pwned") > 5


def test_missing_stages_are_named(base_dir):
    html = page_of(Report(base_dir / "report"))
    assert_alone(html)
    assert "Not in this report:" in html
    assert "Tokenizer training, Tokenizer evaluation, Base model training" in html
    for text in ("No stage has logged a score yet", "No stage of training has run yet", "No samples have been written"):
        assert text in html


def test_a_stage_that_has_not_finished_shows_its_curves(base_dir):
    log = base_dir / "base_checkpoints" / "d4" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text(metrics(30))
    html = page_of(Report(base_dir / "report"))
    assert "This stage has not finished: 30 steps so far." in html
    assert 'aria-label="Loss: 9 to 1.267' in html


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": 1}\n{"step": 2, "loss": NaN}\n', '{"step": 1, "loss": "x"}\n']
)
def test_broken_files_are_left_out(report, base_dir, content):
    for path in [
        *base_dir.glob("*_checkpoints/*/*.jsonl"),
        *base_dir.glob("chat_eval/*/*"),
        *base_dir.glob("pipeline/*"),
    ]:
        path.write_text(content)
    assert "GSM8K" in page_of(report)


def test_a_long_run_stays_small(base_dir):
    report = make_run(base_dir, steps=20_000)
    assert len(page_of(report).encode()) < MEGABYTES / 2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_thin_keeps_ends_and_extremes(y):
    x = [float(i) for i in range(len(y))]
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MAX_POINTS or len(y) <= MAX_POINTS
    assert (thin_x[0], thin_x[-1]) == (x[0], x[-1])
    assert (min(thin_y), max(thin_y)) == (min(y), max(y))
    assert thin_x == sorted(set(thin_x))
    assert all(y[int(a)] == b for a, b in zip(thin_x, thin_y, strict=True))


@pytest.mark.parametrize("label", ["$", "a$b$c", "_hidden", "<b>", "x" * 200, '" onload="1'])
def test_any_label_can_be_drawn(label):
    svg = Plotter().lines(label, [Line(label, [1, 2], [3, 4]), Line("other", [1], [2], color=1)])
    assert svg.startswith("<svg")
    assert not re.search(r"<b>|onload=\"", tags(svg))
    assert "http" not in svg


def test_cost(report, base_dir):
    run = open_run(base_dir)
    hours = run.wall_seconds / 3600
    assert cost_line(run).startswith(f"about ${hours * 1.46:.2f}: ")
    assert "2026-10-04" in cost_line(run)
    assert cost_line(run, 3.0).startswith(f"${hours * 3:.2f}: ")
    path = report.folder / "_header.json"
    header = read_json(path)
    header["environment"]["GPU"] = "GeForce 256, 32 MiB, 1.0"
    write_record(path, header)
    assert cost_line(open_run(base_dir)).startswith("unknown: there is no price of GeForce 256")


def test_every_price_has_a_card_a_source_and_a_date():
    from nanochat.cards import CARDS

    rows = read_json(PRICES)["prices"]
    assert len({row["card"] for row in rows}) == len(rows) > 10
    for row in rows:
        assert row["card"] in {card.name for card in CARDS}
        assert row["usd_per_hour"] > 0
        assert row["source"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])


def test_only_what_is_right_for_the_right_reason_is_ticked():
    def judged(asked: str, passed: bool = True, reference: str = '"ribbon".count("n")') -> str:
        answer = [{"type": "python", "text": reference}, {"type": "python_output", "text": "1"}]
        return verdict({"answer": answer, "passed": passed, "completions": [f"<|python_start|>{asked}<|python_end|>1"]})

    assert judged("'ribbon' .count('n')") == "right"
    assert judged('"month".count("n")') == "by another way"  # the right number of another word
    assert judged('"ribbon".count("n")', passed=False) == "wrong"
    assert verdict({"answer": "Paris.", "passed": True, "completions": ["It is Paris."]}) == "right"


def test_the_report_opens_with_before_and_after(base_dir):
    html = page_of(make_run(base_dir))
    top = html[: html.index('id="scores"')]
    assert all(
        text in top for text in ("Before: it continues a text", "After: it answers", "A right one of the 1 below")
    )
    assert 'aria-label="Loss of the base model: ' in top
    missing = re.search(r"Not in this report:</strong> ([^<]*)", top).group(1)
    assert missing.startswith("Base model evaluation. ")  # RL is started by hand: it is not missing


def test_tool_use_is_readable():
    text = "<|python_start|>7*6<|python_end|><|output_start|>42<|output_end|>It is 42."
    parts = [
        {"type": "python", "text": "7*6"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "It is 42."},
    ]
    assert readable(text) == readable(parts) == "⟨7*6 → 42⟩ It is 42."


def test_compare(base_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(base_dir / "a")
    other = make_run(base_dir / "b")
    other.log("Base model training", [{"depth": 8, "run": "x"}, {}], metrics={"val bpb": 0.7})
    (other.folder / "sft.json").unlink()
    run_script(main, Config, ["compare", str(base_dir / "a"), str(base_dir / "b" / "report")])
    text = capsys.readouterr().out
    assert "| val bpb (BASE) | 0.9000 | 0.7000 | -0.2000 |" in text
    assert "| GSM8K (SFT) | 0.3000 | 0.3000 | +0.0000 |" in text
    assert "| Base model training: depth | 4 | 8 |" in text
    assert "| SFT | there | not there |" in text
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert_alone(html)
    assert "lacks:" in html
    assert "A: 9 to 1.067" in html
    assert "B: 9 to 1.067" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "a"], "compare takes two runs, got 1"),
        (["generate", "a"], "generate takes no runs"),
        (["compare", "a", "b"], "no report in a"),
        (["generate", "--price=-1"], "--price must be dollars an hour"),
    ],
)
def test_wrong_use_is_explained(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run_script(main, Config, arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(page_path, scheme, browser, accessible):
    page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme, offline=True)
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(page_path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 360  # nothing sticks out
    assert page.evaluate("window.pwned") is None
    assert page.locator("h2").count() == 8
    assert page.locator("h2").first.inner_text() == "Before and after"
    torn = """() => [...document.querySelectorAll(".facts dt")].map((dt) => {
        const word = document.createRange(), text = dt.firstChild;
        word.setStart(text, 0);
        word.setEnd(text, /^\\w*/.exec(text.data)[0].length);
        return [word.getClientRects().length, dt.textContent];
    }).filter(([lines, text]) => lines > 1).map(([, text]) => text)"""
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate(torn) == []  # no label has its first word in two lines
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(250, 248, 244)") == (scheme == "light")
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert problems == []
    page.close()
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme, bypass_csp=True)
    page.goto(page_path.as_uri())
    accessible(page)
    page.close()
