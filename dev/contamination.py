"""Count how much of the evaluation data occurs in the training text, by shared n-grams of words.

    python dev/contamination.py --dataset=climbmix
    python dev/contamination.py --data_dir=FOLDER --eval_bundle=FOLDER --tasks GSM8K HumanEval --json=found.json

Reads all training shards and compares them with the validation documents, the CORE tasks and the chat tasks. Words are
runs of letters and digits; case (of a to z) and punctuation are ignored. An item counts as touched if at least one of
its n-grams (13 words by default, as in GPT-3's report, arXiv:2005.14165, appendix C) occurs in a training document, and
as covered if at least half of them do. Items with fewer than n words can't be judged; they are counted separately.

Every n-gram becomes a 64-bit hash, computed for millions of words at once with NumPy: each word gets a polynomial hash,
from differences of a running sum, and n words are hashed the same way once more. Equal n-grams have equal hashes, so
none is missed; two different ones practically never share a hash (1 in 2^64 if hashes were random).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nanochat.config import run_script
from nanochat.core_eval import get_bundle_folder, load_bundle, load_items
from nanochat.data.corpus import Corpus, open_corpus
from nanochat.dataset import prepare_corpus
from nanochat.files import write_json
from nanochat.progress import progress
from tasks.common import Task
from tasks.registry import CLASSIC_TASKS, load_available

U64 = npt.NDArray[np.uint64]
BASE, NGRAM_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd, so that they have an inverse modulo 2^64
FILTER_BITS = 24
BLOCK_BYTES = 4_000_000

_byte = np.arange(256, dtype=np.uint8)
LOWER = np.where((_byte >= ord("A")) & (_byte <= ord("Z")), _byte + 32, _byte).astype(np.uint64) + np.uint64(1)
IS_WORD = ((ord("a") + 1 <= LOWER) & (ord("z") + 1 >= LOWER)) | ((_byte >= 48) & (_byte <= 57)) | (_byte >= 128)


def powers(base: int, count: int) -> U64:
    """1, base, base², ... modulo 2^64."""
    out = np.full(count, base, dtype=np.uint64)
    out[0] = 1
    return np.cumprod(out, dtype=np.uint64)


UP = powers(BASE, 1)
DOWN = powers(pow(BASE, -1, 1 << 64), 1)


def mix(hashes: U64) -> U64:
    """Spread every bit over all bits (Source: the finalizer of MurmurHash3)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(33))


def hash_ngrams(texts: pa.Array, n: int) -> tuple[U64, npt.NDArray[np.int64]]:
    """(hash, number of its text) of every n-gram of words of these texts; none crosses from one text to the next."""
    global UP, DOWN
    # A zero byte between the texts keeps the last word of one and the first of the next apart.
    contents = [(text or "").encode("utf-8", "replace") for text in texts.to_pylist()]
    data = np.frombuffer(b"\0".join(contents) + b"\0", dtype=np.uint8)
    if len(UP) < len(data) + 1:
        UP, DOWN = powers(BASE, len(data) + 1), powers(pow(BASE, -1, 1 << 64), len(data) + 1)
    edges = np.flatnonzero(np.diff(IS_WORD[data], prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    running = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(LOWER[data] * UP[: len(data)], out=running[1:])
    words = mix((running[ends] - running[starts]) * DOWN[starts])
    if len(words) < n:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    count = len(words) - n + 1
    ngrams = np.zeros(count, dtype=np.uint64)
    for k, factor in enumerate(powers(NGRAM_BASE, n)):
        ngrams += words[k : k + count] * factor
    borders = np.cumsum([len(content) + 1 for content in contents])
    owner = np.searchsorted(borders, starts, side="right")
    whole = owner[:count] == owner[n - 1 :]
    return mix(ngrams[whole]), owner[:count][whole]


@dataclass
class EvalSet:
    """Items whose n-grams are searched for."""

    name: str
    items: list[str]
    hashes: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    owners: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass
class Found:
    """The counts of one evaluation set."""

    name: str
    items: int
    too_short: int
    touched: int
    """Items with at least one n-gram in the training text."""
    covered: int
    """Items with at least half of their n-grams in it."""
    ngrams: int
    """Distinct n-grams of the set."""
    ngrams_found: int
    training_documents: int
    """Training documents with at least one n-gram of the set."""
    examples: list[str]


def scan(train: Iterator[pa.Array], sets: list[EvalSet], n: int, total_bytes: int, num_examples: int) -> list[Found]:
    """Search the training texts for the n-grams of all sets."""
    for s in sets:
        s.hashes, s.owners = hash_ngrams(pa.array(s.items, pa.string()), n)
    keys = np.unique(np.concatenate([s.hashes for s in sets]))  # sorted
    belongs = [np.isin(keys, s.hashes) for s in sets]
    maybe = np.zeros(1 << FILTER_BITS, dtype=bool)  # most training n-grams are discarded here
    maybe[keys >> np.uint64(64 - FILTER_BITS)] = True
    found = np.zeros(len(keys), dtype=bool)
    documents = [0] * len(sets)
    with progress(max(1, total_bytes), "scanning") as bar:
        for texts in blocks(train):
            hashes, owners = hash_ngrams(texts, n)
            kept = np.flatnonzero(maybe[hashes >> np.uint64(64 - FILTER_BITS)])
            at = np.minimum(np.searchsorted(keys, hashes[kept]), max(0, len(keys) - 1))
            hit = keys[at] == hashes[kept] if len(keys) else np.zeros(0, bool)
            found[at[hit]] = True
            for i, mine in enumerate(belongs):
                documents[i] += len(np.unique(owners[kept][hit][mine[at[hit]]]))
            bar.advance(texts.nbytes)
    return [summary(s, keys, found, documents[i], num_examples) for i, s in enumerate(sets)]


def blocks(arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
    """The same texts, at most about BLOCK_BYTES at a time: a longer array is halved."""
    for array in arrays:
        if array.nbytes > BLOCK_BYTES and len(array) > 1:
            half = len(array) // 2
            yield from blocks(iter([pa.concat_arrays([array[:half]]), pa.concat_arrays([array[half:]])]))
        else:
            yield array


def summary(s: EvalSet, keys: U64, found: npt.NDArray[np.bool_], documents: int, num_examples: int) -> Found:
    """Counts of one set."""
    hit = found[np.searchsorted(keys, s.hashes)] if len(s.hashes) else np.zeros(0, bool)
    totals = np.bincount(s.owners, minlength=len(s.items))
    hits = np.bincount(s.owners[hit], minlength=len(s.items))
    own = np.unique(s.hashes)
    worst = np.argsort(-hits / np.maximum(totals, 1), kind="stable")[:num_examples]
    return Found(
        s.name,
        len(s.items),
        int((totals == 0).sum()),
        int((hits > 0).sum()),
        int(((hits > 0) & (2 * hits >= totals)).sum()),
        len(own),
        int(found[np.searchsorted(keys, own)].sum()) if len(own) else 0,
        documents,
        [f"{hits[i]} of {totals[i]} n-grams: {s.items[i][:200]!r}" for i in worst if hits[i]],
    )


# --- evaluation sets --------------------------------------------------------------------------------------------------


def core_sets(folder: Path) -> tuple[list[EvalSet], list[str]]:
    """(the CORE tasks with their right answers, the labels of those without data)."""

    def text(item: dict[str, Any]) -> str:
        if "choices" in item:
            return f"{item['query']} {item['choices'][item['gold']]}"
        context = item["context_options"][item["gold"]] if "context_options" in item else item["context"]
        return f"{context} {item['continuation']}"

    bundle = load_bundle(folder)
    return [EvalSet(f"CORE {t.label}", [text(item) for item in load_items(t)]) for t in bundle.tasks], bundle.missing


def conversation_text(conversation: dict[str, Any]) -> str:
    """The text of all messages."""
    contents = [message["content"] for message in conversation["messages"]]
    return " ".join(c if isinstance(c, str) else " ".join(part["text"] for part in c) for c in contents)


def task_set(name: str, task: Task) -> EvalSet:
    """A chat task with its answers."""
    return EvalSet(f"chat {name}", [conversation_text(conversation) for conversation in task])


@dataclass(frozen=True, kw_only=True)
class Config:
    """Count the n-grams that training text and evaluation share."""

    data_dir: str | None = None
    """Folder (or file) of texts of any kind (txt, jsonl, csv, html, pdf, parquet …); default: what the dataset
    step prepared."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo."""
    n: int = 13
    """Words per n-gram."""
    validation: bool = True
    """Search for the validation documents."""
    core: bool = True
    """Search for the CORE tasks."""
    eval_bundle: str | None = None
    """Folder of the CORE bundle; default: the one in the base folder, downloaded when missing."""
    tasks: tuple[str, ...] = tuple(CLASSIC_TASKS)
    """Chat tasks to search for."""
    examples: int = 1
    """Number of items to print of each set, those with the largest share found."""
    json: str | None = None
    """File for all counts."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"--n must be at least 1, got {self.n}")


def eval_sets(cfg: Config, corpus: Corpus) -> tuple[list[EvalSet], list[str]]:
    """(The sets to search for, one line for each that is unavailable)."""
    sets = [EvalSet("validation", list(corpus.documents("val")))] if cfg.validation else []
    absent: list[str] = []
    if cfg.core:
        core, missing = core_sets(get_bundle_folder(cfg.eval_bundle))
        sets, absent = [*sets, *core], [f"CORE {label}: no data in the bundle" for label in missing]
    tasks, unavailable = load_available(list(cfg.tasks))
    sets += [task_set(name, task) for name, task in tasks.items()]
    return sets, [*absent, *(f"chat {name}: {why}" for name, why in unavailable.items())]


def main(cfg: Config) -> None:
    """Read, count, print."""
    corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir, cfg.text_column))
    sets, absent = eval_sets(cfg, corpus)
    for line in absent:
        print(f"left out: {line}")
    if not sets:
        raise ValueError("nothing to search for: every evaluation set is switched off or missing")
    found = scan(corpus.arrays("train"), sets, cfg.n, corpus.num_bytes("train"), cfg.examples)
    print(f"{cfg.n}-grams of words shared with the training documents of {corpus.name}")
    print(f"{'':36} {'items':>7} {'short':>7} {'touched':>8} {'%':>6} {'covered':>8} {'n-grams':>9} {'train docs':>10}")
    for f in found:
        share = 100 * f.touched / max(1, f.items - f.too_short)
        print(
            f"{f.name:36} {f.items:7,} {f.too_short:7,} {f.touched:8,} {share:6.2f} {f.covered:8,} "
            f"{f.ngrams_found:9,} {f.training_documents:10,}"
        )
        for example in f.examples:
            print(f"    {example}")
    if cfg.json:
        write_json(cfg.json, {"corpus": corpus.name, "n": cfg.n, "sets": [asdict(f) for f in found], "absent": absent})


if __name__ == "__main__":
    run_script(main, Config)
