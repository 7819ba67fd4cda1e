"""Write conversations about who the assistant is, through any OpenAI-compatible endpoint.

python dev/gen_synthetic_data.py --base_url=http://localhost:11434/v1 --model=qwen3:8b --about=identity.txt --num=1000

The result, <base folder>/identity_conversations.jsonl, replaces the identity that comes with nanochat in the next
mid-training and SFT. The key is read from OPENAI_API_KEY (local servers need none). Run it again after an interruption,
and it resumes. Read what was written before you train on it.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import get_base_dir, print0
from nanochat.config import run_script
from nanochat.files import read_jsonl, write_text
from nanochat.messages import check_messages
from nanochat.progress import progress
from tasks.demo.world import load_world
from tasks.mixtures import IDENTITY_FILE

# One of each is drawn for every conversation, because models repeat themselves if they are always asked the same.
PEOPLE = ("a curious child", "a programmer", "a teacher", "someone in a hurry", "a sceptic", "someone who is lonely")
OPENINGS = ("a greeting", "a direct question", "a wrong belief about the assistant", "a request for help", "small talk")
TURNS = ((2, "one question and its answer"), (4, "two questions and their answers"), (6, "three of each"))
ATTEMPTS = 4  # per conversation, before giving up


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the generator."""

    base_url: str = "https://api.openai.com/v1"
    """The endpoint, including its /v1."""
    model: str
    """Name of the model to ask."""
    about: str | None = None
    """A text file that says who the assistant is; default: the identity that comes with nanochat."""
    out: str | None = None
    """File to write; default: identity_conversations.jsonl in the base folder."""
    num: int = 1000
    """Total number of conversations to write."""
    workers: int = 4
    """Simultaneous requests."""
    temperature: float = 1.0
    """Sampling temperature of that model."""
    seed: int = 42
    """Seed of the prompts."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.workers < 1:
            raise ValueError("--num and --workers must be at least 1")


def facts(about: str | None) -> str:
    """The text that says who the assistant is."""
    if about is None:
        return "\n".join(fact.text for fact in load_world(None).identity)
    path = Path(about)
    if not path.is_file():
        raise FileNotFoundError(f"--about={about}: there is no such file")
    return path.read_text(encoding="utf-8").strip()


def make_prompt(rng: random.Random, about: str) -> str:
    """The request for one conversation."""
    count, shape = rng.choice(TURNS)
    return (
        "Write a conversation between a user and an assistant. These are facts about the assistant; it never says "
        f"anything about itself that contradicts them:\n\n{about}\n\n"
        f"The user is {rng.choice(PEOPLE)} and begins with {rng.choice(OPENINGS)}. The conversation has {shape}, "
        f"{count} messages in all, in plain English and short sentences. The assistant is friendly and honest.\n\n"
        'Answer with a JSON object and nothing else: {"messages": [{"role": "user", "content": "..."}, {"role": '
        '"assistant", "content": "..."}, ...]}'
    )


def parse_conversation(text: str) -> list[dict[str, str]]:
    """The messages in a model's answer, which may be inside a code fence.

    Raises:
        ValueError: it is not a conversation that ends with the assistant.
    """
    start, end = text.find("{"), text.rfind("}")
    if start < 0 or end < start:
        raise ValueError("the answer holds no JSON object")
    value = json.loads(text[start : end + 1])
    messages = value.get("messages") if isinstance(value, dict) else None
    check_messages(messages)
    assert isinstance(messages, list)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the conversation does not end with the assistant")
    if not all(isinstance(m["content"], str) and m["content"].strip() for m in messages):
        raise ValueError("a message is empty or no text")
    return [{"role": m["role"], "content": m["content"].strip()} for m in messages]


def generate(client: Any, cfg: Config, about: str, number: int) -> list[dict[str, str]] | None:
    """Conversation `number`, or None if the model fails to write one."""
    for attempt in range(ATTEMPTS):
        prompt = make_prompt(random.Random(f"{cfg.seed}/{number}/{attempt}"), about)
        response = client.chat.completions.create(
            model=cfg.model, messages=[{"role": "user", "content": prompt}], temperature=cfg.temperature
        )
        try:
            return parse_conversation(response.choices[0].message.content or "")
        except (ValueError, KeyError, TypeError):
            continue
    return None


def generate_all(
    client: Any, cfg: Config, about: str, numbers: list[int]
) -> Iterator[tuple[int, list[dict[str, str]] | None]]:
    """(number, conversation) as they are finished."""
    with ThreadPoolExecutor(cfg.workers) as pool:
        futures = {pool.submit(generate, client, cfg, about, number): number for number in numbers}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def finished_numbers(path: Path) -> set[int]:
    """The numbers of the conversations in the file; an incomplete last line is removed from it."""
    if not path.is_file():
        return set()
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return {int(row.get("number", i)) for i, row in enumerate(read_jsonl(path))}


def main(cfg: Config) -> None:
    """Ask for the missing conversations; each is written as soon as it is finished."""
    import openai

    about = facts(cfg.about)
    path = Path(cfg.out) if cfg.out else get_base_dir() / IDENTITY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    done = finished_numbers(path)
    missing = [number for number in range(cfg.num) if number not in done]
    # The client retries by itself when the server is busy.
    client = openai.OpenAI(base_url=cfg.base_url, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=6)
    failed = 0
    try:
        with progress(len(missing), "conversations") as bar, open(path, "a", encoding="utf-8") as f:
            for number, messages in generate_all(client, cfg, about, missing):
                bar.advance()
                if messages is None:
                    failed += 1
                    continue
                f.write(json.dumps({"number": number, "messages": messages}, ensure_ascii=False) + "\n")
                f.flush()
    except openai.OpenAIError as error:
        raise RuntimeError(f"{cfg.base_url}: {error}. Everything written so far stays in {path}") from error
    print0(f"{path}: {cfg.num - failed} conversations, {failed} failed (run again for more)")


if __name__ == "__main__":
    run_script(main, Config)
