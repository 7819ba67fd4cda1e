"""Ask one model the same questions in every program it is exported to, and print a table.

npm install --prefix dev --ignore-scripts        node-llama-cpp (llama.cpp) and wllama (llama.cpp in a browser)
NANOCHAT_BASE_DIR=... python -m dev.check_runtimes

Greedy answers to 60 questions of the demo world, in held-out phrasings. Our engine runs the calculator by itself, and
so does the page; for the others `answer_with_tools` below does, a loop that any program around them can have. The
score without it is what such a program shows as it is.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.config import run_script, short
from nanochat.engine import Engine
from nanochat.generate.calculator import use_calculator
from nanochat.gpt import GPT
from nanochat.interop.gguf_file import GGUFCard, GGUFType, write_gguf
from nanochat.interop.hf_format import write_hf_folder
from nanochat.interop.qwen3 import fold
from nanochat.messages import PARTS
from nanochat.serve.static_page import MODEL_FILE, WLLAMA_FILES, add_page, page_facts
from nanochat.tokenizer import RustBPETokenizer
from tasks.demo.chat import demo_eval_tasks

HERE = Path(__file__).resolve().parent
CHROMIUM = os.environ.get("NANOCHAT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# Sixty of what `chat_eval` asks, of each kind of question that needs one answer.
QUESTIONS = {"facts": 20, "identity": 6, "arithmetic": 16, "spelling": 8, "counting": 10}
MAX_TOKENS = 120

Answers = list[str]  # completions, special tokens included, as tasks judge them
Generate = Callable[[list[int], int, Sequence[int]], list[int]]  # (prompt, limit, stops) -> new ids, the stop included


def node_folder() -> Path:
    """The folder with node_modules: $NANOCHAT_NODE, else this one."""
    return Path(os.environ.get("NANOCHAT_NODE") or HERE)


def missing_llama() -> str | None:
    """Why llama.cpp cannot be run here, or None."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (node_folder() / "node_modules" / "node-llama-cpp").is_dir():
        return "node-llama-cpp is not installed: npm install --prefix dev --ignore-scripts"
    return None


class LlamaCpp:
    """llama.cpp in a process of its own, for GGUF files.

    Args:
        context: positions of each file's cache of keys and values.
        cache: what that holds: F32 as our engine's, or llama.cpp's own choice, F16.
    """

    def __init__(self, context: int, cache: str = "F32") -> None:
        command = ["node", str(HERE / "llama.mjs"), str(node_folder()), str(context), cache]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def __call__(self, op: str, path: Path, **arguments: Any) -> Any:
        """The answer to a request of dev/llama.mjs about a file."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"op": op, "path": str(path), **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with {self.process.wait()} at a request for {op!r}")
        return json.loads(line)

    def generate(self, path: Path) -> Generate:
        """The function that continues prompts with a file's model, greedily."""

        def write(prompt: list[int], limit: int, stops: Sequence[int]) -> list[int]:
            return self("generate", path, tokens=prompt, limit=limit, stops=list(stops))

        return write


def answer_with_tools(generate: Generate, tokenizer: RustBPETokenizer, prompt: list[int], limit: int) -> list[int]:
    """An answer whose calculations are done: stops at <|python_end|> and appends the calculator's result."""
    special = tokenizer.encode_special
    start, end = special("<|python_start|>"), special("<|python_end|>")
    last = [special("<|assistant_end|>"), tokenizer.get_bos_token_id()]
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        new = generate(ids, limit - (len(ids) - len(prompt)), [*last, end])
        ids += new
        if not new or new[-1] != end:
            break
        if start in ids[len(prompt) :]:
            begin = len(ids) - 1 - ids[::-1].index(start)
            result = use_calculator(tokenizer.decode(ids[begin + 1 : -1]))
            if result is not None:
                ids += [special("<|output_start|>"), *tokenizer.encode(result), special("<|output_end|>")]
    return ids[len(prompt) :][:limit]


# --- the programs ----------------------------------------------------------------------------------------------------


def each(generate: Generate, tokenizer: RustBPETokenizer, prompts: list[list[int]], tools: bool = True) -> Answers:
    """Answer prompts one by one, with or without the calculator."""
    stops = [tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()]
    answers = []
    for prompt in prompts:
        ids = (
            answer_with_tools(generate, tokenizer, prompt, MAX_TOKENS) if tools else generate(prompt, MAX_TOKENS, stops)
        )
        answers.append(tokenizer.decode(ids[:-1] if ids[-1:] and ids[-1] in stops else ids))
    return answers


def of_transformers(folder: Path) -> Generate:
    """Greedy generation of an exported folder in transformers."""
    from transformers import AutoModelForCausalLM  # lazy: a second to start

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def write(prompt: list[int], limit: int, stops: Sequence[int]) -> list[int]:
        options = {"max_new_tokens": limit, "do_sample": False, "eos_token_id": list(stops), "pad_token_id": stops[0]}
        options |= {
            "temperature": None,
            "top_k": None,
            "top_p": None,
        }  # of the folder's generation_config: for sampling
        given = torch.tensor([prompt])
        ids: list[int] = model.generate(given, attention_mask=torch.ones_like(given), **options)[
            0, len(prompt) :
        ].tolist()
        return ids

    return write


def wllama_package() -> dict[str, bytes]:
    """The files of the npm package, where it is installed."""
    package = node_folder() / "node_modules" / "@wllama" / "wllama"
    return {name: (package / name).read_bytes() for name in WLLAMA_FILES.values()}


@contextlib.contextmanager
def static_host(folder: Path) -> Iterator[str]:
    """The address of a folder on a static host that sends no special headers and writes no log."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


LAST_PARTS = """() => {
  const chats = Object.keys(localStorage).filter((key) => key.startsWith("nanochat.serve.chat."));
  const [chat] = chats.map((key) => JSON.parse(localStorage.getItem(key))).sort((a, b) => b.updated - a.updated);
  return chat.messages.at(-1).parts;
}"""


def of_page(folder: Path, questions: list[str]) -> Answers:
    """Type the questions into an exported page in Chromium, each in a new chat."""
    from playwright.sync_api import sync_playwright  # lazy: only this program needs it

    settings = json.dumps({"temperature": 0, "max_tokens": MAX_TOKENS})
    answers = []
    with static_host(folder) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(service_workers="block")
        context.add_init_script(f"localStorage.setItem('nanochat.settings', {json.dumps(settings)})")
        page = context.new_page()
        page.goto(address)
        page.click("#load button")
        page.wait_for_selector("body.loaded", timeout=300_000)
        for question in questions:
            page.click("#new-chat")
            page.fill("#input", question)
            page.keyboard.press("Enter")
            page.wait_for_selector(".message.assistant:last-child:not(.waiting)", timeout=300_000)
            page.wait_for_selector("#send:not([hidden])")
            parts = [(PARTS[part["type"]], part["text"]) for part in page.evaluate(LAST_PARTS)]
            answers.append("".join(f"{before or ''}{text}{after or ''}" for (before, after, _), text in parts))
        browser.close()
    return answers


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison."""

    source: Annotated[Literal["mid", "sft", "rl"], short("-i")] = "sft"
    """The stage whose model to ask."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""


def run_all(
    model: GPT, tokenizer: RustBPETokenizer, tmp: Path, prompts: list[list[int]], questions: list[str]
) -> Iterator[tuple[str, Answers]]:
    """Yield (name, answers) of each program that is here; says which are not."""
    ours, _ = Engine(model, tokenizer).generate_prompts(prompts, max_tokens=MAX_TOKENS)
    yield "our engine", [tokenizer.decode(ids[len(p) :]) for ids, p in zip(ours, prompts, strict=True)]
    config, state = fold(model)
    card = GGUFCard.of("asked", model, "sft", "mit")
    write_hf_folder(tmp / "hf", model.state_dict(), model.config, tokenizer, "", form="qwen3")
    theirs = of_transformers(tmp / "hf")
    yield "transformers, float32", each(theirs, tokenizer, prompts)
    files: dict[GGUFType, Path] = {"f32": tmp / "f32.gguf", "bf16": tmp / "bf16.gguf", "q8_0": tmp / "q8_0.gguf"}
    files["q4_0"] = tmp / "q4_0.gguf"
    for kind, path in files.items():
        write_gguf(path, config, state, tokenizer, card, kind)
    if reason := missing_llama():
        print(f"llama.cpp is not asked: {reason}")
    else:
        with LlamaCpp(model.config.sequence_len) as llama:
            for kind, path in files.items():
                yield f"llama.cpp, {kind}", each(llama.generate(path), tokenizer, prompts)
            yield "llama.cpp, bf16, no calculator", each(llama.generate(files["bf16"]), tokenizer, prompts, tools=False)
        with LlamaCpp(model.config.sequence_len, cache="F16") as llama:
            yield "llama.cpp, bf16, cache f16", each(llama.generate(files["bf16"]), tokenizer, prompts)
    if CHROMIUM is None or missing_llama():
        print("the page is not asked: chromium or the npm packages are not installed")
        return
    for kind in ("bf16", "q8_0"):
        folder = tmp / f"page-{kind}"
        folder.mkdir()
        shutil.copyfile(files[kind], folder / MODEL_FILE)
        add_page(folder, page_facts("asked", model, tokenizer, {}, kind), wllama_package())
        yield f"page in Chromium, {kind}", of_page(folder, questions)


def main(cfg: Config) -> None:
    """Ask, judge, print."""
    model, tokenizer, _ = load_model(cfg.source, torch.device("cpu"), "eval", cfg.model_tag)
    others: Any = dict.fromkeys(("small_talk", "chat", "unseen"), 1)
    tasks = {name: task for name, task in demo_eval_tasks(**QUESTIONS, **others).items() if is_asked(name)}
    problems = [(name, task, task[i]) for name, task in tasks.items() for i in range(len(task))]
    prompts = [tokenizer.render_for_completion(problem) for _, _, problem in problems]
    questions = [problem["messages"][-2]["content"] for _, _, problem in problems]
    print(f"{len(problems)} questions to {model.num_params():,} parameters")
    print("| program | " + " | ".join(tasks) + " | right | as our engine |")
    print("|---|" + "---|" * (len(tasks) + 2))
    first: Answers = []
    with tempfile.TemporaryDirectory() as tmp:
        for program, answers in run_all(model, tokenizer, Path(tmp), prompts, questions):
            first = first or answers
            right = dict.fromkeys(tasks, 0)
            for (name, task, problem), answer in zip(problems, answers, strict=True):
                right[name] += bool(task.evaluate(problem, answer))
            same = sum(a == b for a, b in zip(first, answers, strict=True))
            counts = " | ".join(f"{right[name]}/{len(task)}" for name, task in tasks.items())
            print(f"| {program} | {counts} | {sum(right.values())} | {same}/{len(answers)} |", flush=True)


def is_asked(name: str) -> bool:
    """True for the tasks of QUESTIONS: each has one question and one answer."""
    return name.removeprefix("Demo").lower() in QUESTIONS


if __name__ == "__main__":
    run_script(main, Config)
