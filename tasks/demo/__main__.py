"""Write the demo corpus for pretraining, or check a world.

python -m tasks.demo                       write the corpus into base_data/demo of the base folder
python -m tasks.demo --check [--world DIR] count what a world holds, and name every mistake in it
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import run_script
from tasks.demo.corpus import DEFAULT_CHARS, write_corpus
from tasks.demo.world import read_world, words_of, world_folder


@dataclass(frozen=True, kw_only=True)
class Config:
    """The demo world."""

    check: bool = False
    """Only check the world: print its counts and every mistake."""
    world: str | None = None
    """Folder of the world's tables; default: $NANOCHAT_WORLD_DIR, else the world that comes with nanochat."""
    out: str | None = None
    """Folder for the shards; default: base_data/demo in the base folder."""
    chars: int = DEFAULT_CHARS
    """Number of characters of training text."""


def check(folder: str | None) -> None:
    """Print the content of a world.

    Raises:
        ValueError: it has mistakes; each is printed first.
    """
    world, problems = read_world(world_folder(folder))
    facts = (*world.facts, *world.identity)
    vocabulary = {word for fact in facts for text in (fact.text, fact.also, *fact.asks) for word in words_of(text)}
    questions = sum(len(fact.asks) + 1 for fact in facts)
    print(f"{world_folder(folder)}: {len(world.topics)} topics, {len(world.facts)} facts, {questions} questions,")
    print(f"{len(world.identity)} facts about the assistant, {len(vocabulary)} different words in all,")
    print(f"{len(world.words)} words to spell and {len(world.unseen_words)} unseen ones")
    for problem in problems:
        print(problem)
    if problems:
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{count} in {world_folder(folder)}: fix what is named above")
    print("no mistakes")


def main(cfg: Config) -> None:
    """Check the world or write the corpus."""
    if cfg.check:
        check(cfg.world)
        return
    folder, written = write_corpus(cfg.out, cfg.chars, cfg.world)
    print(f"demo corpus {'written to' if written else 'is up to date in'} {folder}")


if __name__ == "__main__":
    run_script(main, Config)
