"""Train the tokenizer on the training documents of a corpus.

python -m scripts.tok_train --vocab_size=65536 --max_chars=2000000000
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import rustbpe
from nanochat.checkpoint_manager import keep_replaced_tokenizer
from nanochat.common import get_base_dir, print0
from nanochat.config import Runtime, run_script
from nanochat.dataset import open_corpus, prepare_corpus
from nanochat.progress import format_seconds, progress
from nanochat.report import get_report
from nanochat.tokenizer import PATTERNS, TOKENIZER_FOLDER, RustBPETokenizer, mergeable_size

DOC_CAP = 10_000  # characters
SMALL_CORPUS_BYTES = 100_000_000  # below this a tokenizer sees all of the text, however long its documents are


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the tokenizer's training."""

    runtime: Runtime = field(default_factory=Runtime)
    """Taken as by every script; a tokenizer counts, so device and precision change nothing here."""
    max_chars: int = 2_000_000_000
    """Read at most this many characters."""
    doc_cap: int | None = None
    """Of each document take only this many characters, so that no long one dominates; default 10,000, and all of a
    corpus below 100 MB."""
    vocab_size: int = 65536
    """Tokens in all: 256 bytes, merges, 9 special tokens."""
    pattern: Literal["auto", "nanochat", "runtimes"] = "auto"
    """The cuts between which bytes merge: nanochat (digits in twos), runtimes (llama.cpp's qwen35: digits one by one,
    combining marks with their letters); auto takes nanochat, and runtimes for scripts whose vowels are marks (Hindi,
    Thai …): from 1 % of the characters on."""
    data_dir: str | None = None
    """Folder (or file) of texts of any kind (txt, md, html, jsonl, csv, docx, pdf, parquet …)."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo."""

    def __post_init__(self) -> None:
        mergeable_size(self.vocab_size)  # raises if it is too small
        if self.max_chars < 1 or (self.doc_cap is not None and self.doc_cap < 1):
            raise ValueError("--max_chars and --doc_cap must be at least 1")


# Vowel signs and accents that are code points of their own: from this share of the characters on, the pattern that
# keeps them with their letters saves more tokens than it costs. English, German or Chinese have next to none.
MARKS_SHARE = 0.01
MARKS_SAMPLE = 20_000_000  # characters that are looked at


def share_of_marks(arrays: Iterator[pa.Array], doc_cap: int, max_chars: int = MARKS_SAMPLE) -> float:
    """The share of combining marks among the first `max_chars` characters, each document cut as for training."""
    chars = marks = 0
    for texts in arrays:
        cut = pc.utf8_slice_codeunits(texts, 0, doc_cap)
        chars += pc.sum(pc.utf8_length(cut)).as_py() or 0
        marks += pc.sum(pc.count_substring_regex(cut, r"\p{M}")).as_py() or 0
        if chars >= max_chars:
            break
    return marks / max(1, chars)


def choose_pattern(cfg: Config, arrays: Iterator[pa.Array]) -> str:
    """The name of the pattern for these texts, one of PATTERNS; says so where it is not nanochat's."""
    if cfg.pattern == "nanochat":
        return cfg.pattern
    digits = (
        "one digit is a token, and combining marks stay with their letters (--pattern=nanochat: nanochat's own cuts)"
    )
    if cfg.pattern == "runtimes":
        print0(f"pattern runtimes, as asked for: {digits}")
        return cfg.pattern
    share = share_of_marks(arrays, cfg.doc_cap or DOC_CAP, min(cfg.max_chars, MARKS_SAMPLE))
    if share < MARKS_SHARE:
        return "nanochat"
    print0(f"pattern runtimes, since {share:.1%} of the characters are combining marks: {digits}")
    return "runtimes"


@dataclass
class Reading:
    """Documents and characters read so far."""

    documents: int = 0
    chars: int = 0


def read(arrays: Iterator[pa.Array], cfg: Config, reading: Reading) -> Iterator[pa.Array]:
    """Pass arrays on until `max_chars` characters (capped per document) have been read; counts them."""
    for texts in arrays:
        lengths = pc.fill_null(pc.utf8_length(texts), 0).to_numpy(zero_copy_only=False)
        total = np.cumsum(np.minimum(lengths, cfg.doc_cap or DOC_CAP)) + reading.chars
        keep = min(len(texts), int(np.searchsorted(total, cfg.max_chars)) + 1)  # with the one that reaches the limit
        reading.documents += keep
        reading.chars = min(int(total[keep - 1]), cfg.max_chars)
        yield texts.slice(0, keep)
        if reading.chars >= cfg.max_chars:
            return


def main(cfg: Config) -> None:
    """Read, train, save, report."""
    corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir, cfg.text_column))
    folder = get_base_dir() / TOKENIZER_FOLDER
    num_bytes = max(1, min(corpus.num_bytes("train"), cfg.max_chars))
    if cfg.doc_cap is None:
        cfg = replace(cfg, doc_cap=DOC_CAP if corpus.num_bytes("train") > SMALL_CORPUS_BYTES else cfg.max_chars)
    print0(f"training a tokenizer of {cfg.vocab_size:,} tokens on about {num_bytes / 1e6:,.0f} MB of {corpus.name}")
    pattern = choose_pattern(cfg, corpus.arrays("train"))
    trainer, reading = rustbpe.Tokenizer(), Reading()
    logging.getLogger("rustbpe").setLevel(logging.ERROR)  # its warning is given below, counting special tokens
    start = time.perf_counter()
    with progress(2, "training the tokenizer") as bar:

        def show(phase: str, done: int, total: int | None) -> None:
            first, share = (0, done / num_bytes) if phase == "count" else (1, done / max(1, total or 0))
            bar.set(first + min(1.0, share), "(reading)" if phase == "count" else "(merging)")

        try:
            trainer.train_from_arrow(
                read(corpus.arrays("train"), cfg, reading),
                mergeable_size(cfg.vocab_size),
                pattern=PATTERNS[pattern],
                doc_cap=cfg.doc_cap or DOC_CAP,
                max_chars=cfg.max_chars,
                progress=show,
            )
        except ValueError as error:
            if reading.chars == 0:
                raise ValueError(f"the training documents of {corpus.name} are all empty: nothing to learn") from error
            raise
    seconds = time.perf_counter() - start
    tokenizer = RustBPETokenizer.from_trainer(trainer)
    keep_replaced_tokenizer(tokenizer)
    tokenizer.save(folder)
    size = tokenizer.get_vocab_size()
    if size < cfg.vocab_size:
        print0(
            f"warning: this text supports only {size:,} of {cfg.vocab_size:,} tokens (no pair of tokens is left to "
            f"merge); the tokenizer has {size:,}"
        )
    print0(
        f"tokenizer of {size:,} tokens from {reading.documents:,} documents, {reading.chars / 1e6:,.1f} M characters "
        f"in {format_seconds(seconds)} ({reading.chars / 1e6 / seconds:,.1f} M characters/s), in {folder}"
    )
    lengths = tokenizer.token_lengths()
    lengths = lengths[lengths > 0]
    facts = {
        "cuts by the pattern": pattern,
        "tokens": size,
        "special tokens": len(tokenizer.get_special_tokens()),
        "documents": reading.documents,
        "characters": reading.chars,
        "training time (seconds)": round(seconds, 2),
        "characters per second": round(reading.chars / seconds),
        "bytes per token, mean": round(float(lengths.mean()), 2),
        "bytes per token, longest": int(lengths.max()),
        "hash": tokenizer.hash,
    }
    get_report().log(section="Tokenizer training", data=[asdict(cfg), facts])


if __name__ == "__main__":
    run_script(main, Config)
