"""Test the interface between Python and rustbpe with random input, and compare with tiktoken where both are defined.

    python dev/fuzz_rustbpe.py --seconds 600 --seed 1

A round that fails prints its seed, and `--seed N --rounds 1` runs it again. With --verbose each seed is written to
standard error before its round, so that a crash of the process shows it too.
"""

import argparse
import contextlib
import itertools
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rustbpe

CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
PATTERNS = [
    rustbpe.NANOCHAT_PATTERN,
    rustbpe.GPT4_PATTERN,
    rustbpe.GPT2_PATTERN,
    rustbpe.RUNTIMES_PATTERN,
    CL100K_PATTERN,
]
PARTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "'ſ",
    "the",
    " of",
    "0",
    "1234",
    "é",
    "ñ",
    "漢",
    "🙂",
    "\u0301",
    "\u093f",
    "!",
    "--",
]


def random_text(rng: random.Random) -> str:
    """Mostly familiar parts, sometimes any code point, a long repetition or half a surrogate pair."""
    out = []
    for _ in range(rng.choice([0, 1, 3, 20, 100])):
        kind = rng.randrange(10)
        if kind < 6:
            out.append(rng.choice(PARTS))
        elif kind < 8:
            out.append("".join(rng.choice("abcdeAB") for _ in range(rng.randrange(1, 20))))
        elif kind < 9:
            code = rng.randrange(0x110000) if rng.random() < 0.5 else rng.randrange(0x3000)
            out.append(chr(code))
        else:
            out.append(rng.choice(PARTS) * rng.randrange(200))
    return "".join(out)


def well_formed(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def random_array(rng: random.Random, texts: list[str]) -> Any:
    """The texts as an Arrow array of some kind: sliced, with nulls, chunked."""
    padding = [random_text(rng) for _ in range(rng.randrange(20))]
    values: list[str | None] = [*map(well_formed, padding + texts + padding[:3])]
    kind = rng.choice(["string", "large_string", "binary", "large_binary", "string_view", "dictionary"])
    array = pa.array(values, "string")
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(kind)
    array = array.slice(len(padding), len(texts))
    if rng.random() < 0.5:
        cuts = sorted(rng.randrange(len(texts) + 1) for _ in range(rng.randrange(4)))
        chunks = [array.slice(a, b - a) for a, b in zip([0, *cuts], [*cuts, len(texts)], strict=True)]
        array = pa.chunked_array(chunks)
    return array


def check_training(rng: random.Random, texts: list[str], pattern: str) -> rustbpe.Tokenizer | None:
    """Train in two ways with different numbers of threads: equal results, or an error for an empty corpus."""
    vocab_size = 256 + rng.choice([0, 1, 10, 200, 100_000])
    limits = {"doc_cap": rng.choice([None, None, 1, 7]), "max_chars": rng.choice([None, None, 1, 100])}
    one, two = rustbpe.Tokenizer(), rustbpe.Tokenizer()
    try:
        one.train_from_iterator(iter(texts), vocab_size, rng.choice([1, 3, 8192]), pattern, num_threads=1, **limits)
    except ValueError as error:
        if "corpus is empty" not in str(error):
            raise
        return None
    threads = rng.choice([1, 2, 8])
    two.train_from_arrow(random_array(rng, texts), vocab_size, pattern, num_threads=threads, **limits)
    assert one.get_mergeable_ranks() == two.get_mergeable_ranks(), "training differs"
    return one


def check_encoding(rng: random.Random, tokenizer: rustbpe.Tokenizer, texts: list[str]) -> None:
    """Compare the ids of three ways of encoding with tiktoken's; decoding must give the text back."""
    ranks = dict(tokenizer.get_mergeable_ranks())
    theirs = tiktoken.Encoding(
        name="fuzz", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary_batch(texts, num_threads=1)
    assert tokenizer.batch_encode(texts, rng.choice([1, 3])) == theirs, "ids differ from tiktoken's"
    ids, offsets = tokenizer.encode_arrow(random_array(rng, texts), rng.choice([1, 2]))
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == theirs, "encode_arrow differs"
    for text, numbers in zip(texts, theirs, strict=True):
        assert tokenizer.decode(numbers) == well_formed(text), "decoding differs"
        assert "".join(tokenizer.decode_stream(numbers)) == well_formed(text), "streaming differs"


def may_refuse(call: Any, *arguments: Any, **options: Any) -> None:
    """Bad input may be accepted by chance, but must raise nothing except ValueError, TypeError or OverflowError."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        call(*arguments, **options)


def throw_rubbish(rng: random.Random, tokenizer: rustbpe.Tokenizer) -> None:
    """Pass invalid UTF-8, broken Arrow arrays, and impossible ids and ranks."""
    junk = rng.randbytes(rng.randrange(50))
    may_refuse(rustbpe.Tokenizer().train_from_arrow, pa.array([b"ok", junk]), 300)
    may_refuse(tokenizer.encode_arrow, pa.array([junk, None, b""], "binary"))
    offsets = np.array([rng.randrange(-5, 70) for _ in range(5)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(junk)]
    with contextlib.suppress(pa.ArrowInvalid):  # Arrow checks the first and the last offset itself
        broken = pa.Array.from_buffers(pa.string(), rng.randrange(5), buffers)
        may_refuse(tokenizer.encode_arrow, broken)
        may_refuse(rustbpe.Tokenizer().train_from_arrow, broken, 300)
    may_refuse(tokenizer.decode_bytes, [rng.choice([0, 255, 256, 2**16, -1, 2**31, 2**63, 2**70]) for _ in range(3)])
    may_refuse(tokenizer.decode_bytes, rng.choice([None, "text", [None], [[1]], [1.5], {1}, np.ones((2, 2))]))
    may_refuse(tokenizer.encode, rng.choice([None, 3, b"bytes", ["a"]]))
    may_refuse(tokenizer.batch_encode, rng.choice([None, 3, [None], [b"x"]]))
    may_refuse(rustbpe.Tokenizer().train_from_iterator, rng.choice([None, [1], ["a", None]]), 300)
    ranks = [(bytes([b]), b) for b in range(256)]
    ranks += [(rng.randbytes(rng.randrange(4)), rng.choice([255, 256, 257, 2**24, 2**32, -1])) for _ in range(2)]
    may_refuse(rustbpe.Tokenizer.from_ranks, rng.choice(PATTERNS), ranks)
    may_refuse(rustbpe.Tokenizer.from_ranks, random_text(rng), ranks[:256])


def run_round(seed: int) -> None:
    rng = random.Random(seed)
    texts = [random_text(rng) for _ in range(rng.choice([1, 2, 10, 50]))]
    tokenizer = check_training(rng, texts, rng.choice(PATTERNS)) or rustbpe.Tokenizer()
    check_encoding(rng, tokenizer, texts + [random_text(rng) for _ in range(5)])
    throw_rubbish(rng, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=10**9, help="stop after this many")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; counts up")
    parser.add_argument("--verbose", action="store_true", help="write each seed to standard error")
    args = parser.parse_args()
    logging.getLogger("rustbpe").setLevel(logging.ERROR)  # small vocabularies are intended here
    start, seed = time.monotonic(), args.seed
    while time.monotonic() - start < args.seconds and seed - args.seed < args.rounds:
        if args.verbose:
            print(seed, file=sys.stderr, flush=True)
        try:
            run_round(seed)
        except Exception:
            print(f"failed: --seed {seed} --rounds 1", file=sys.stderr)
            raise
        seed += 1
    print(f"{seed - args.seed} rounds in {time.monotonic() - start:.0f} s, nothing found")


if __name__ == "__main__":
    main()
