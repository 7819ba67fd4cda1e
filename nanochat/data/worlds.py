"""How a world is named: `WORLD=nanochat`, `WORLD=/my/folder`, or several with commas between; tasks/demo reads them."""

from __future__ import annotations

import re
from pathlib import Path

SHIPPED = "nanochat"  # the world that comes with the project; nanochat:500 is its first 500 topics
# Of it a run without HOURS learns the core; with HOURS this many topics per hour (a guess).
CORE_TOPICS = 332
TOPICS_PER_HOUR = 1600


def world_names(spec: str) -> list[str]:
    """The worlds in a comma-separated list, none if it is empty: absolute folders; "nanochat" or "nanochat:500" stays.

    Raises:
        ValueError: one is empty, given twice, or asks for no topic.
        FileNotFoundError: there is no such folder.
    """
    names: list[str] = []
    for name in (part.strip() for part in spec.split(",") if spec):
        if shipped_topics(name) is None:
            folder = Path(name).expanduser().absolute()
            if not name or not folder.is_dir():
                raise FileNotFoundError(
                    f"WORLD={spec}: there is no folder {name!r}; give a folder of .txt tables, "
                    f'"{SHIPPED}" for the world that comes with it, or both with a comma between'
                )
            name = str(folder)
        if name.split(":")[0] in [other.split(":")[0] for other in names]:
            raise ValueError(f"WORLD={spec}: {name} is given twice: give each world once")
        names.append(name)
    return names


def shipped_topics(name: str) -> int | None:
    """How many topics "nanochat:500" asks for, 0 for "nanochat"; None for any other name.

    Raises:
        ValueError: it asks for none.
    """
    match = re.fullmatch(rf"{SHIPPED}(?::(\d+))?", name)
    if match is None:
        return None
    if match[1] is not None and int(match[1]) == 0:
        raise ValueError(f"WORLD={name} has no topic: ask for one or more")
    return int(match[1] or 0)


def world_by_hours(spec: str, hours: float | None) -> str:
    """The worlds with as many of the shipped topics as can be learned in these hours."""
    topics = f"{SHIPPED}:{max(CORE_TOPICS, round(TOPICS_PER_HOUR * hours))}" if hours else SHIPPED
    return ",".join(topics if shipped_topics(name) == 0 else name for name in spec.split(","))
