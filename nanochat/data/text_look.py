"""A look at texts before anything is learned from them: counts, what was found out, and what must stop a run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from nanochat.data.inventory import Inventory, format_bytes, shortened
from nanochat.data.script import writing_of
from nanochat.data.text_files import TextReader
from nanochat.data.text_walk import ReadOptions, find_texts

MAX_BROKEN = 0.01  # of the characters may be replaced or NUL
BYTES_PER_TOKEN = 4.0  # about, of a tokenizer that is trained on the text
SAMPLE_TEXTS, SAMPLE_CHARS = 300, 1000  # looked at for the language and for escapes
NUM_SHOWN = 20  # samples that an inventory keeps


ESCAPE_EVERY = 60  # characters: more than one in so many is more than a text about them has
ESCAPES = {
    "HTML's entities (&uuml;)": re.compile(r"&(?:[A-Za-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});"),
    "HTML's tags (<p>)": re.compile(r"</?[a-z][a-z0-9]{0,9}(?: [a-z-]+=[^<>]*)?/?>"),
    "quoted-printable (=C3=BC)": re.compile(r"(?:=[0-9A-F]{2}){2}"),
    "JSON's escapes (\\u00fc)": re.compile(r"\\u[0-9a-fA-F]{4}"),
    "percent signs for letters (%C3%BC)": re.compile(r"(?:%[0-9A-F]{2}){2}"),
    "colours of a terminal (\\x1b[31m)": re.compile(r"\x1b\[[0-9;]*m"),
}


class Tally:
    """Counts of the documents of an import, or of a look."""

    def __init__(self) -> None:
        self.documents = self.characters = self.num_bytes = self.duplicates = self.blank = 0
        self.broken: dict[str, int] = {}
        """Characters that were replaced or NUL, by file."""
        self.samples: dict[bytes, str] = {}
        """The beginnings of some documents by hash: the largest hashes, so that they are a fair draw."""
        self._border = b""

    def sample(self, digest: bytes, text: str) -> None:
        """Keep the document as a sample if its hash is among the largest."""
        if digest > self._border:
            self.samples[digest] = text[:SAMPLE_CHARS]
            if len(self.samples) >= 2 * SAMPLE_TEXTS:
                kept = sorted(self.samples, reverse=True)[:SAMPLE_TEXTS]
                self.samples, self._border = {d: self.samples[d] for d in kept}, kept[-1]

    def into(self, inventory: Inventory, reader: TextReader) -> None:
        """Write facts, notes, warnings, samples and the reason to stop into an inventory."""
        texts = [self.samples[d] for d in sorted(self.samples, reverse=True)[:SAMPLE_TEXTS]]
        writing = writing_of(texts)
        inventory.facts |= {
            "documents": self.documents,
            "characters": self.characters,
            "tokens, about": round(self.num_bytes / BYTES_PER_TOKEN),
            "script": str(writing),
        }
        inventory.facts |= {"exact duplicates left out": self.duplicates} if self.duplicates else {}
        inventory.facts |= {"blank documents left out": self.blank} if self.blank else {}
        for what, names in reader.found.items():
            inventory.notes.append(f"{what}: {shortened(names)}")
        inventory.samples = texts[:NUM_SHOWN]
        inventory.warnings += escape_warnings(texts, "documents")

    def check_broken(self, inventory: Inventory, reader: TextReader) -> None:
        """Warn of characters that are broken; stop if they are more than MAX_BROKEN."""
        if not self.broken:
            return
        worst = sorted(self.broken, key=lambda name: -self.broken[name])
        names = shortened([f"{name} ({self.broken[name]:,})" for name in worst], 5)
        count = sum(self.broken.values())
        said = {"characters were no valid UTF-8 and became U+FFFD": reader.repairs.characters}
        said["NUL characters were left out"] = reader.repairs.nul
        text = ", ".join(f"{number:,} {what}" for what, number in said.items() if number)
        if inventory.stop:
            return
        if count > MAX_BROKEN * max(1, self.characters):
            inventory.stop = (
                f"{inventory.name}: {count:,} of {self.characters:,} characters are broken ({text}: {names}): set "
                "ENCODING to what the files are saved in (for example ENCODING=cp1251), or repair or remove them"
            )
        else:
            inventory.warnings.append(f"{text}: {names}")


def escape_warnings(texts: Sequence[str], noun: str) -> list[str]:
    """What to say of texts, called `noun`, that are full of what a program writes in place of letters."""
    warnings = []
    for what, pattern in ESCAPES.items():
        if odd := sum(len(pattern.findall(text)) > len(text) / ESCAPE_EVERY for text in texts):
            warnings.append(
                f"{odd:,} of {len(texts):,} {noun} looked at are full of {what}, which are learned as they "
                "stand: convert the files if you did not mean this"
            )
    return warnings


def stop_if_too_little(inventory: Inventory) -> None:
    """Make the inventory stop the run if nothing is read, or more is left out than read, by number or by bytes."""
    if inventory.stop:
        return
    left_out = inventory.left_out_line(matters_only=True)
    if not inventory.num_read:
        reason = f"not read: {inventory.left_out_line()}" if inventory.left_out else "it is empty"
        holds = inventory.name.removeprefix("texts in ")
        inventory.stop = f"{holds} holds no .parquet, .jsonl, .txt, .md, .csv, .html or other file of text ({reason})"
    elif inventory.num_left_out > inventory.num_read or inventory.left_out_bytes > inventory.num_bytes:
        inventory.stop = (
            f"{inventory.name}: more is left out than read ({inventory.num_left_out:,} files, "
            f"{format_bytes(inventory.left_out_bytes)}; read are {inventory.num_read:,}, "
            f"{format_bytes(inventory.num_bytes)}). Not read: {left_out}. Do what is said "
            "there, or move these files away"
        )


def look_at_texts(path: Path, options: ReadOptions | None = None) -> Inventory:
    """Read all texts of a file or folder, learn nothing; what an import would refuse is the inventory's `stop`.

    Raises:
        FileNotFoundError: there is no such file or folder.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    options = options or ReadOptions.from_env()
    inventory, tally, seen = Inventory(f"texts in {path}"), Tally(), set[bytes]()
    reader, firsts, met = TextReader(options, inventory), dict[str, str](), set[str]()
    for file in find_texts(path, options, inventory):
        new_kind = file.label not in met
        met.add(file.label)
        inventory.count(file.label, 1, file.size)
        before = reader.repairs.characters + reader.repairs.nul
        try:
            for _, document in reader.read(file):
                if not document.strip():
                    tally.blank += 1
                    continue
                content = document.encode()
                digest = hashlib.blake2b(content, digest_size=16).digest()
                if digest in seen:
                    tally.duplicates += 1
                    continue
                seen.add(digest)
                tally.documents += 1
                tally.characters += len(document)
                tally.num_bytes += len(content)
                tally.sample(digest, document)
                if new_kind:  # one sample of every kind, so that a person sees how each is read
                    firsts[document[:SAMPLE_CHARS]] = file.name
                    new_kind = False
        except ValueError as error:
            inventory.stop = inventory.stop or str(error)
        if broken := reader.repairs.characters + reader.repairs.nul - before:
            tally.broken[file.name] = broken
    tally.into(inventory, reader)
    others = [text for text in inventory.samples if text not in firsts]
    inventory.samples = [*(f"({name}) {text}" for text, name in firsts.items()), *others[:NUM_SHOWN]]
    tally.check_broken(inventory, reader)
    stop_if_too_little(inventory)
    return inventory
