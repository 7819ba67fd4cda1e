"""Compression of the tokenizer in bytes per token, beside GPT-2's and GPT-4's, on several kinds of text.

python -m scripts.tok_eval

GPT-2's and GPT-4's vocabularies come through tiktoken (downloaded once, or from $TIKTOKEN_CACHE_DIR); without them the
tokenizer is measured alone.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.config import Runtime, run_script
from nanochat.dataset import Corpus, open_corpus, prepare_corpus
from nanochat.env import get_base_dir, print0
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}
DOWNLOAD_SECONDS = 60.0

TEXTS = Path(__file__).with_name("tok_eval_texts")
SAMPLES = ("English", "code", "maths", "German", "Japanese")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the tokenizer's evaluation."""

    runtime: Runtime = field(default_factory=Runtime)
    """Taken as by every script; a tokenizer counts, so device and precision change nothing here."""
    data_dir: str | None = None
    """Folder (or file) of texts of any kind (txt, jsonl, csv, html, pdf, parquet …): both of its splits are
    measured too."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo, in place of data_dir."""
    num_documents: int = 500
    """Documents to take from each split."""
    compare: bool = True
    """Compare with GPT-2's and GPT-4's tokenizers (downloaded once)."""

    def __post_init__(self) -> None:
        if self.num_documents < 1:
            raise ValueError("--num_documents must be at least 1")


def load_reference(tiktoken_name: str) -> RustBPETokenizer | None:
    """One of tiktoken's tokenizers, or None if its file can't be downloaded in DOWNLOAD_SECONDS."""
    found: list[RustBPETokenizer | Exception] = []

    def load() -> None:
        try:
            found.append(RustBPETokenizer.from_pretrained(tiktoken_name))
        except Exception as error:  # whatever the network or the cache does wrong
            found.append(error)

    thread = threading.Thread(target=load, daemon=True)  # tiktoken's download has no timeout of its own
    thread.start()
    thread.join(DOWNLOAD_SECONDS)
    if found and isinstance(found[0], RustBPETokenizer):
        return found[0]
    reason = type(found[0]).__name__ if found else f"no answer in {DOWNLOAD_SECONDS:.0f} s"
    print0(f"no comparison with {tiktoken_name}: its file is unavailable ({reason})")
    return None


def own_texts(cfg: Config) -> dict[str, str]:
    """The beginning of the corpus's two splits; nothing if there is no corpus and none was asked for."""
    try:
        corpus: Corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir, cfg.text_column))
    except FileNotFoundError as error:
        if cfg.dataset or cfg.data_dir:
            raise
        print0(f"no texts of your own are measured: {error}")
        return {}
    splits = {"train": corpus.train, "val": corpus.val}
    return {
        split: "\n".join(itertools.islice(corpus.documents(split), cfg.num_documents))
        for split, chunks in splits.items()
        if chunks
    }


def bytes_per_token(tokenizer: RustBPETokenizer, text: str) -> float:
    """Compression of `text`.

    Raises:
        RuntimeError: decoding does not give the text back.
    """
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise RuntimeError(
            "the tokenizer does not give this text back: train it again with `python -m scripts.tok_train`"
        )
    return len(text.encode()) / len(ids)


def table(tokenizers: dict[str, RustBPETokenizer], texts: dict[str, str]) -> list[str]:
    """A markdown table: bytes per token, and how much more (or less) ours packs into a token than the others."""
    others = [name for name in tokenizers if name != "ours"]
    head = ["text", "bytes", *tokenizers, *(f"ours vs {name}" for name in others)]
    rows = []
    for name, text in texts.items():
        values = {which: bytes_per_token(tokenizer, text) for which, tokenizer in tokenizers.items()}
        gains = [f"{100 * (values['ours'] / values[other] - 1):+.1f}%" for other in others]
        rows.append([name, f"{len(text.encode()):,}", *(f"{v:.3f}" for v in values.values()), *gains])
    sizes = [f"{tokenizer.get_vocab_size():,}" for tokenizer in tokenizers.values()]
    rows.append(["(vocabulary)", "", *sizes, *("" for _ in others)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]


def main(cfg: Config) -> None:
    """Measure and report."""
    tokenizers = {"ours": get_tokenizer()}
    print0(f"tokenizer in {get_base_dir()}")
    for name, tiktoken_name in REFERENCES.items() if cfg.compare else ():
        reference = load_reference(tiktoken_name)
        if reference is not None:
            tokenizers[name] = reference
    samples = {name: (TEXTS / f"{name}.txt").read_text(encoding="utf-8") for name in SAMPLES}
    texts = {name: text for name, text in {**own_texts(cfg), **samples}.items() if text}
    lines = table(tokenizers, texts)
    print0("bytes per token\n" + "\n".join(lines))
    missing = [name for name in REFERENCES if cfg.compare and name not in tokenizers]
    note = f"Not compared with {' and '.join(missing)}: the vocabulary is unavailable." if missing else None
    get_report().log(section="Tokenizer evaluation", data=["Bytes per token:\n\n" + "\n".join(lines), note])


if __name__ == "__main__":
    run_script(main, Config)
