"""An inventory: what was found in the texts or chats that a user gave, said before anything is learned from them.

Both readers, of texts and of conversations, fill one in while they look; the pipeline, the report and
`scripts.data_check` print it. Nothing that was given disappears without a line here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nanochat.data.split import MIN_SPLIT_CHARS

NUM_EXAMPLES = 3
SHOWN_CHARS = 300


class UnusableInputError(ValueError):
    """What was given can't be learned from as it is; the message names it and the remedy."""


class NotReadError(ValueError):
    """A file from which nothing is learned; the message is the reason, without the file's name."""


@dataclass
class LeftOut:
    """Things that were given and are not learned, for one reason."""

    kinds: dict[str, int] = field(default_factory=dict)
    """How many, by kind: {".py": 40}, {"folder": 1}, {"conversation": 12}."""
    num_bytes: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few by name."""
    matters: bool = True
    """False for what nobody would learn from (images, hidden files): it never stops a run."""

    @property
    def count(self) -> int:
        """Of all kinds."""
        return sum(self.kinds.values())


@dataclass
class Inventory:
    """What was looked at, what of it is learned, and what is not."""

    name: str
    """What was looked at: "texts in /my/folder", "chats in /my/chats.json"."""
    read: dict[str, int] = field(default_factory=dict)
    """What is read, by kind: {"txt": 12, "jsonl.gz": 1}, or {"sharegpt": 12000}."""
    noun: str = "file"
    """What `read` counts."""
    num_bytes: int = 0
    """Of what is read."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """What is not read, by reason."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Documents, characters, turns and the like by name, in the order of printing."""
    notes: list[str] = field(default_factory=list)
    """What was found out or guessed: encodings, columns, forms."""
    warnings: list[str] = field(default_factory=list)
    """What the user should look at, with the remedy; the run goes on."""
    stop: str = ""
    """Why nothing may be learned from this as it is, with the remedy; empty: it may."""
    samples: list[str] = field(default_factory=list)
    """Some of what would be learned."""

    def count(self, kind: str, number: int = 1, num_bytes: int = 0) -> None:
        """Note `number` more things of a kind as read."""
        self.read[kind] = self.read.get(kind, 0) + number
        self.num_bytes += num_bytes

    def leave_out(
        self, reason: str, kind: str = "file", example: str = "", num_bytes: int = 0, *, matters: bool = True
    ) -> None:
        """Note one more thing as left out for this reason."""
        entry = self.left_out.setdefault(reason, LeftOut(matters=matters))
        entry.kinds[kind] = entry.kinds.get(kind, 0) + 1
        entry.num_bytes += num_bytes
        if example and len(entry.examples) < NUM_EXAMPLES:
            entry.examples.append(example)

    @property
    def num_read(self) -> int:
        """Things read, of all kinds."""
        return sum(self.read.values())

    @property
    def num_left_out(self) -> int:
        """Things left out that somebody might have wanted to be learned."""
        return sum(entry.count for entry in self.left_out.values() if entry.matters)

    @property
    def left_out_bytes(self) -> int:
        """Their size."""
        return sum(entry.num_bytes for entry in self.left_out.values() if entry.matters)

    def left_out_line(self, matters_only: bool = False) -> str:
        """What is not read and why, as one line; the most frequent reason first."""
        entries = [(reason, e) for reason, e in self.left_out.items() if e.matters or not matters_only]
        entries.sort(key=lambda item: (-item[1].matters, -item[1].count))
        return "; ".join(_left_out_text(reason, entry) for reason, entry in entries)

    def lines(self, samples: int = 0) -> list[str]:
        """The inventory for people, line by line, with this many samples of what would be learned."""
        kinds = ", ".join(
            f"{count:,} {kind}" for kind, count in sorted(self.read.items(), key=lambda item: -item[1]) if count
        )
        if self.noun != "file" and kinds:
            kinds = f"{plural(self.num_read, self.noun)} ({kinds})"
        read = kinds + (f", {format_bytes(self.num_bytes)}" if kinds and self.num_bytes else "")
        lines = [f"{self.name}: {read or 'nothing that can be read'}"]
        if self.left_out:
            lines.append(f"  not read: {self.left_out_line()}")
        if self.facts:
            lines.append("  " + ", ".join(f"{name}: {_value(value)}" for name, value in self.facts.items()))
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        for text in self.samples[:samples]:
            lines.append("  sample: " + "\n    ".join(text[:SHOWN_CHARS].strip().splitlines() or [""]))
        return lines

    def record(self) -> dict[str, Any]:
        """The inventory for JSON, without the samples: `Inventory.from_record` reads it back."""
        return {**asdict(self), "samples": []}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Inventory:
        """The inventory that `record` was made from."""
        left_out = {reason: LeftOut(**entry) for reason, entry in record["left_out"].items()}
        return cls(**{**record, "left_out": left_out})


def check_inventories(inventories: Iterable[Inventory]) -> None:
    """Refuse what must not be learned.

    Raises:
        UnusableInputError: one of the inventories says stop; the message is that of all of these.
    """
    inventories = list(inventories)
    for inventory in inventories:
        facts = inventory.facts
        if not inventory.stop and facts.get("documents", 2) < 2 and facts.get("characters", 0) < MIN_SPLIT_CHARS:
            little = "a single short document is too little, at least two are needed (one to validate with)"
            inventory.stop = f"{inventory.name}: {little if facts['documents'] else 'there is no text in it'}"
    stops = [inventory.stop for inventory in inventories if inventory.stop]
    if stops:
        raise UnusableInputError("; ".join(stops))


def shortened(names: Sequence[str], limit: int = NUM_EXAMPLES) -> str:
    """The first names and how many more there are: "a.txt, b.txt and 5 more"."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def plural(count: int, noun: str) -> str:
    """A number and its noun: "1 file", "2 files"; suffixes stay as they are: "2 .py"."""
    fixed = noun.startswith(".") or not noun[-1:].isalpha()
    return f"{count:,} {noun}" + ("" if count == 1 or fixed else "s")


def format_bytes(size: float) -> str:
    """A size for people: "12 bytes", "3.4 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _left_out_text(reason: str, entry: LeftOut) -> str:
    kinds = ", ".join(plural(n, kind) for kind, n in sorted(entry.kinds.items(), key=lambda item: -item[1]))
    # Names help where there are few; of forty .py files nobody wants three.
    names = f" ({', '.join(entry.examples)})" if entry.count <= len(entry.examples) and entry.matters else ""
    return f"{kinds}: {reason}{names}"


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else str(value)
