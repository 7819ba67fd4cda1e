"""Measure the speed of the loader alone, compared with a plain one made of pyarrow and tiktoken.

    python dev/bench/dataloader.py --data FOLDER_OF_PARQUET_FILES

All of them use the same text, tokenizer and threads: they read the training shards from disk and return (x, y) of 32
sequences of 2048 tokens until the first epoch ends. The plain peer reads a row group, encodes it with
`encode_ordinary_batch`, and cuts sequences from one growing list. They take turns in every round. Prints the best
speed of each, and the median of its ratio to the peer, by the clock and by the processor time of all threads, which
other work on the machine affects less. A difference between the batches of `stream` and of the peer is an error. Then
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nanochat.data.corpus import Corpus, open_corpus
from nanochat.data.token_cache import TokenCache
from nanochat.dataloader import PretrainLoader
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer, mergeable_size

B, T = 32, 2048
Batch = tuple[np.ndarray, np.ndarray]


def train_tokenizer(corpus: Corpus, vocab_size: int, max_chars: int) -> RustBPETokenizer:
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_arrow(
        corpus.arrays("train"), mergeable_size(vocab_size), pattern=SPLIT_PATTERN, max_chars=max_chars
    )
    return RustBPETokenizer.from_trainer(trainer)


def plain(corpus: Corpus, tokenizer: RustBPETokenizer, threads: int) -> Iterator[Batch]:
    """The obvious loader."""
    import tiktoken

    ranks = {token: i for i, token in enumerate(tokenizer.ranks)}
    encoding = tiktoken.Encoding(name="bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    bos, held = tokenizer.get_bos_token_id(), list[int]()
    for chunk in corpus.train:
        table = pq.ParquetFile(chunk.shard).read_row_group(chunk.row_group, columns=["text"])
        for ids in encoding.encode_ordinary_batch(table["text"].to_pylist(), num_threads=threads):
            held += [bos, *ids]
        while len(held) > B * T:
            tokens = np.array(held[: B * T + 1], dtype=np.int64)
            del held[: B * T]
            yield tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T)


def ours(loader: PretrainLoader) -> Iterator[Batch]:
    """Our batches until the end of the first epoch."""
    for x, y in loader:
        if loader.epoch > 0:
            break
        yield x.numpy(), y.numpy()
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; without it one is trained first")
    parser.add_argument("--no-peer", action="store_true", help="leave the (slow) peer out")
    args = parser.parse_args()
    corpus = open_corpus(args.data)
    if args.tokenizer:
        tokenizer = RustBPETokenizer.from_directory(args.tokenizer)
    else:
        tokenizer = train_tokenizer(corpus, args.vocab_size, 50_000_000)
    with tempfile.TemporaryDirectory() as folder:
        cache = TokenCache(tokenizer, Path(folder))
        cache.build(corpus)

        def load(**settings: object) -> Iterator[Batch]:
            return ours(PretrainLoader(corpus, tokenizer, B, T, num_threads=args.threads, **settings))  # type: ignore[arg-type]

        runs: dict[str, Callable[[], Iterator[Batch]]] = {
            "stream": load,
            "bestfit": lambda: load(mode="bestfit"),
            "stream, token cache": lambda: load(cache=cache),
            "pyarrow + tiktoken": lambda: plain(corpus, tokenizer, args.threads),
        }
        if args.no_peer:
            del runs["pyarrow + tiktoken"]
        race(runs, args.rounds, args.threads)


def race(runs: dict[str, Callable[[], Iterator[Batch]]], rounds: int, threads: int) -> None:
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    cpu_speeds: dict[str, list[float]] = {name: [] for name in runs}
    sums: dict[str, list[int]] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            start, cpu_start, batches = time.perf_counter(), time.process_time(), 0
            first: list[int] = []
            for x, y in run():
                batches += 1
                if batches <= 3:
                    first += [hash(x.tobytes()), hash(y.tobytes())]
            speeds[name].append(batches * B * T / (time.perf_counter() - start))
            cpu_speeds[name].append(batches * B * T / (time.process_time() - cpu_start))
            sums[name] = first
    peer = list(runs)[-1]
    same = [name for name in runs if name != "bestfit"]
    if any(sums[name] != sums[same[0]] for name in same):
        raise SystemExit("the batches differ")
    print(f"{threads} threads, {rounds} rounds; times {peer}")
    print(f"  {'':22} {'M tokens/s':>10} {'per CPU s':>10} {'by clock':>9} {'by CPU':>9}")
    result = {}
    for name in runs:
        clock, cpu = (
            statistics.median(a / b for a, b in zip(measured[name], measured[peer], strict=True))
            for measured in (speeds, cpu_speeds)
        )
        best, best_cpu = max(speeds[name]) / 1e6, max(cpu_speeds[name]) / 1e6
        result[name] = {"m_tokens_per_s": round(best, 2), "per_cpu_s": round(best_cpu, 2), "times": round(clock, 2)}
        print(f"  {name:22} {best:10.2f} {best_cpu:10.2f} {clock:9.2f} {cpu:9.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
