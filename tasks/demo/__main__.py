"""Write the demo corpus for pretraining, or check a world.

python -m tasks.demo                       write the corpus into base_data/demo of the base folder
python -m tasks.demo --check [--world DIR] count what a world holds, and name every mistake in it
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from nanochat.env import missing_packages

if missing_packages():  # before an import that fails without them
    sys.exit(missing_packages())

from nanochat.config import run_script
from tasks.demo.corpus import write_corpus
from tasks.demo.world import World, load_world, read_world, words_of, world_spec

FOR_EXAMPLE = "a question that it answers: "  # the pipeline looks for this line


@dataclass(frozen=True, kw_only=True)
class Config:
    """The demo world."""

    check: bool = False
    """Only check the world: print its counts and every mistake."""
    show: int = 0
    """With --check: print this many facts, with their questions, as they are trained and evaluated."""
    world: str | None = None
    """A folder of tables, "nanochat" for the world that comes with it ("nanochat:500": its first 500 topics), or
    several with commas between; default: $NANOCHAT_WORLD_DIR, else that of the base folder's corpus, else nanochat."""
    out: str | None = None
    """Folder for the shards; default: base_data/demo in the base folder."""
    chars: int | None = None
    """Number of characters of training text; default: 8 million, or more for more than 1,300 facts."""


def counts(world: World) -> str:
    """What a world holds, in one line."""
    left = f" ({len(world.untaught)} more topics with more HOURS)" if world.untaught else ""
    numbers = {"topic": len(world.topics), "fact": len(world.facts)}
    return ", ".join(f"{number:,} {name}{'s' * (number != 1)}" for name, number in numbers.items()) + left


def show(world: World, number: int) -> None:
    """Print `number` facts, spread over the world, with all that is made of them."""
    for fact in world.facts[:: max(1, len(world.facts) // number)][:number] if number > 0 else ():
        print(f"\n[{fact.topic}] {fact.place}\n{fact.text}")
        print("\n".join([*(f"    trained:   {ask}" for ask in fact.trained), f"    evaluated: {fact.held_out}"]))
        print(f"    trained:   Can you tell me {fact.tell}?" if fact.language is None else "")
        print(f"    right with {' and '.join(' or '.join(map(repr, group)) for group in fact.keys)}")


def check(spec: str, number: int = 0) -> None:
    """Print the content of a world, and `number` of its facts.

    Raises:
        ValueError: it has mistakes; each is printed first.
    """
    world, problems = read_world(spec)
    facts = (*world.facts, *world.identity)
    vocabulary = {word for fact in facts for text in (fact.text, fact.also, *fact.trained) for word in words_of(text)}
    questions = sum(len(fact.trained) + 1 for fact in facts)
    print(f"world {spec}: {counts(world)}, {questions:,} questions,")
    print(f"{len(world.identity)} facts about the assistant, {len(vocabulary):,} different words in all,")
    print(f"{len(world.words)} words to spell and {len(world.unseen_words)} unseen ones")
    show(world, number)
    for problem in problems:
        print(problem)
    if problems:
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ValueError(f"{count} in {spec}: fix what is named above")
    print(f"no mistakes\n{FOR_EXAMPLE}{world.facts[0].asks[0]}")


def main(cfg: Config) -> None:
    """Check the world or write the corpus."""
    spec = world_spec(cfg.world)
    if cfg.check:
        check(spec, cfg.show)
        return
    folder, written = write_corpus(cfg.out, cfg.chars, spec)
    print(f"world {spec}: {counts(load_world(spec))}")
    print(f"demo corpus {'written to' if written else 'is up to date in'} {folder}")


if __name__ == "__main__":
    run_script(main, Config)
