"""Compare the speed of our rustbpe with PyPI's rustbpe, tiktoken and Hugging Face tokenizers: same text and threads.

    pip install --target /tmp/peer_rustbpe rustbpe    # a folder of its own: the module has the same name as ours
    python dev/bench/tokenizer.py --data FOLDER_OF_PARQUET_FILES

All contestants take turns in every round. Prints the best MB/s of each, and the median over the rounds of its ratio to
the peer: by the clock, and by the processor time of all threads, which other work on the machine affects less. Then one
JSON line. Merges and ids that should be equal are compared, and a difference is an error. Our encoder is new in every
round, so that building its tables is part of the time.
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def import_from(folder: Path) -> ModuleType:
    """Import the `rustbpe` package from exactly this folder."""
    for name in [name for name in sys.modules if name.split(".")[0] == "rustbpe"]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("rustbpe")
    finally:
        sys.path.remove(str(folder))
    if module.__file__ is None or Path(module.__file__).resolve().parents[1] != folder.resolve():
        raise RuntimeError(f"wanted the rustbpe of {folder}, got {module.__file__}")
    return module


def row_groups(folder: Path) -> Iterator[Any]:
    """The text column of every row group, as Arrow arrays."""
    import pyarrow.parquet as pq

    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no *.parquet files in {folder}")
    for file in map(pq.ParquetFile, files):
        for i in range(file.num_row_groups):
            yield from file.read_row_group(i, columns=["text"])["text"].chunks


def read(folder: Path, megabytes: float) -> tuple[list[Any], int]:
    """(Text of as many row groups as needed, its bytes)."""
    import pyarrow.compute as pc

    arrays, num_bytes = [], 0
    for array in row_groups(folder):
        arrays.append(array)
        num_bytes += pc.sum(pc.binary_length(array)).as_py()
        if num_bytes >= megabytes * 1e6:
            break
    return arrays, num_bytes


@dataclass
class Race:
    """Contestants by name; seconds of each round, and processor seconds."""

    title: str
    num_bytes: int
    runs: dict[str, Callable[[], Any]]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def round(self) -> dict[str, Any]:
        """Run each once; returns their results."""
        results = {}
        for name, run in self.runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            results[name] = run()
            self.seconds.setdefault(name, []).append(time.perf_counter() - start)
            self.cpu_seconds.setdefault(name, []).append(time.process_time() - cpu_start)
        return results

    def speed(self, name: str) -> float:
        return self.num_bytes / min(self.seconds[name]) / 1e6

    def report(self, peer: str) -> dict[str, Any]:
        print(f"\n{self.title}: {self.num_bytes / 1e6:.1f} MB, {len(self.seconds[peer])} rounds; times {peer}")
        print(f"  {'':28} {'MB/s':>8} {'by clock':>9} {'by CPU':>9}")
        result = {}
        for name in self.runs:
            clock, cpu = (
                statistics.median(b / a for a, b in zip(seconds[name], seconds[peer], strict=True))
                for seconds in (self.seconds, self.cpu_seconds)
            )
            result[name] = {
                "mb_per_s": round(self.speed(name), 1),
                "times": round(clock, 2),
                "times_cpu": round(cpu, 2),
            }
            print(f"  {name:28} {self.speed(name):8.1f} {clock:9.2f} {cpu:9.2f}")
        return result


def hugging_face(pattern: str, vocab_size: int, texts: list[str]) -> Any:
    """A byte-level BPE trained by Hugging Face tokenizers."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return tokenizer


def training_race(ours: ModuleType, peer: ModuleType, arrays: list[Any], num_bytes: int, args: Any) -> Race:
    texts = [text for array in arrays for text in array.to_pylist()]

    def train(module: ModuleType, threads: dict[str, int]) -> Any:
        tokenizer = module.Tokenizer()
        tokenizer.train_from_iterator(iter(texts), args.vocab_size, pattern=ours.NANOCHAT_PATTERN, **threads)
        return tokenizer

    def train_arrow() -> Any:
        tokenizer = ours.Tokenizer()
        tokenizer.train_from_arrow(arrays, args.vocab_size, ours.NANOCHAT_PATTERN, num_threads=args.threads)
        return tokenizer

    runs: dict[str, Callable[[], Any]] = {
        "ours train_from_arrow": train_arrow,
        "ours train_from_iterator": lambda: train(ours, {"num_threads": args.threads}),
        "PyPI rustbpe": lambda: train(peer, {}),
        "HF tokenizers": lambda: hugging_face(ours.NANOCHAT_PATTERN, args.vocab_size, texts),
    }
    return Race(f"Training, vocabulary {args.vocab_size}, {args.threads} threads", num_bytes, runs)


def encoding_race(
    ours: ModuleType, trained: dict[str, Any], arrays: list[Any], num_bytes: int, threads: int
) -> tuple[Race, list[str]]:
    import pyarrow as pa
    import tiktoken

    texts = [text for array in arrays for text in array.to_pylist()]
    whole = pa.chunked_array(arrays)
    ranks, pattern = trained["ours train_from_arrow"].get_mergeable_ranks(), ours.NANOCHAT_PATTERN
    openai = tiktoken.Encoding(name="bench", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
    fresh = [ours.Tokenizer.from_ranks(pattern, ranks) for _ in range(100)]
    runs: dict[str, Callable[[], Any]] = {
        "ours encode_arrow": lambda: fresh.pop().encode_arrow(whole, threads),
        "ours batch_encode (lists)": lambda: fresh.pop().batch_encode(texts, threads),
        "tiktoken": lambda: openai.encode_ordinary_batch(texts, num_threads=threads),
        "PyPI rustbpe": lambda: trained["PyPI rustbpe"].batch_encode(texts),
        "HF tokenizers": lambda: trained["HF tokenizers"].encode_batch_fast(texts),
    }
    return Race(f"Encoding, {threads} threads", num_bytes, runs), texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of parquet files with a column `text`")
    parser.add_argument("--peer", type=Path, default=Path("/tmp/peer_rustbpe"), help="folder with PyPI's rustbpe")
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    # Both peers use rayon, which reads this once, when it starts.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    peer, ours = import_from(args.peer), import_from(ROOT)
    print(f"ours: {ours.__file__}\nPyPI: {peer.__file__}")
    arrays, num_bytes = read(args.data, args.megabytes)

    training = training_race(ours, peer, arrays, num_bytes, args)
    for _ in range(args.rounds):
        trained = training.round()
    ranks = [trained[name].get_mergeable_ranks() for name in training.runs if "HF" not in name]
    if ranks[0] != ranks[1] or ranks[0] != ranks[2]:
        raise RuntimeError("the merges of ours and PyPI's rustbpe differ")
    result = {"training": training.report("PyPI rustbpe")}

    encoding, texts = encoding_race(ours, trained, arrays, num_bytes, args.threads)
    for _ in range(args.rounds):
        encoded = encoding.round()
    ids, offsets = encoded["ours encode_arrow"]
    lists = encoded["ours batch_encode (lists)"]
    if lists != encoded["tiktoken"] or ids.tolist() != [i for text in lists for i in text]:
        raise RuntimeError("the ids of ours and tiktoken differ")
    if len(offsets) != len(texts) + 1:
        raise RuntimeError("encode_arrow lost documents")
    result["encoding"] = encoding.report("tiktoken")
    print(f"\n{len(ids)} tokens, {num_bytes / len(ids):.3f} bytes per token; merges and ids agree")
    print(json.dumps({"bytes": num_bytes, "vocab_size": args.vocab_size, "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
