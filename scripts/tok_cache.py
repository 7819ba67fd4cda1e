"""Tokenize a corpus once, for many runs with --token_cache.

python -m scripts.tok_cache --dataset=climbmix
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.config import run_script
from nanochat.data.token_cache import TokenCache
from nanochat.dataset import open_corpus, prepare_corpus
from nanochat.env import print0
from nanochat.tokenizer import get_tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tokenize a corpus once, for many runs with --token_cache."""

    data_dir: str | None = None
    """Folder (or file) of texts of any kind (txt, jsonl, csv, html, pdf, parquet …); default: what the dataset
    step prepared."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo."""
    num_threads: int = 2
    """Threads of the tokenizer."""


def main(cfg: Config) -> None:
    """Tokenize what is not cached yet."""
    corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir, cfg.text_column))
    cache = TokenCache(get_tokenizer())
    tokens = cache.build(corpus, cfg.num_threads)
    size = tokens * cache.tokenizer.dtype.itemsize / 1e9
    print0(f"{tokens:,} tokens of {corpus.name} ({size:.2f} GB) are cached in {cache.folder}")


if __name__ == "__main__":
    run_script(main, Config)
