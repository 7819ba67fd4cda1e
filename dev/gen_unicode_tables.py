"""Write rustbpe/src/unicode_tables.rs: the code points that are letters, numbers, white space or combining marks.

The classes come from tiktoken's own regular expression engine, one code point at a time, so that rustbpe splits exactly
as tiktoken does, even for code points that newer Unicode versions have assigned and tiktoken does not know yet.

    python dev/gen_unicode_tables.py            # rewrite the table
    python dev/gen_unicode_tables.py --check    # exit 1 if the table in the tree differs
"""

import argparse
import sys
from pathlib import Path

import tiktoken

OUTPUT = Path(__file__).resolve().parents[1] / "rustbpe" / "src" / "unicode_tables.rs"
NUM_CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)  # never occur in UTF-8
BLOCK = 128  # code points that share one row of the table; 2 bits each, so a row is four u64
OTHER, LETTER, NUMBER, SPACE = range(4)

# One code point that each Unicode version added as a letter, newest first: names the version that tiktoken knows.
# Source: DerivedAge.txt and UnicodeData.txt of the Unicode Character Database.
FIRST_SEEN = {"17.0": 0xA7D2, "16.0": 0x1C8A, "15.1": 0x2EBF0, "15.0": 0x11F02, "14.0": 0x0870}


def members(regex: str) -> set[int]:
    """Code points that `regex` (one character class) matches in tiktoken's engine."""
    byte_ranks = {bytes([b]): b for b in range(256)}
    encoding = tiktoken.Encoding(name="probe", pat_str=regex, mergeable_ranks=byte_ranks, special_tokens={})
    # tiktoken leaves out what the pattern does not match, so the bytes that come back are those of the members.
    found: set[int] = set()
    for start in range(0, NUM_CODE_POINTS, 0x1000):
        text = "".join(map(chr, (c for c in range(start, start + 0x1000) if c not in SURROGATES)))
        found.update(map(ord, bytes(encoding.encode_ordinary(text)).decode()))
    return found


def render() -> str:
    """The Rust source of the table."""
    classes = bytearray(NUM_CODE_POINTS)
    letters = members(r"\p{L}")
    for regex, kind in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)):
        for code in letters if kind == LETTER else members(regex):
            if classes[code]:
                raise RuntimeError(f"U+{code:04X} is in two classes")
            classes[code] = kind
    marks = members(r"\p{M}")
    if any(classes[code] for code in marks):
        raise RuntimeError("a mark is in another class too")
    ends = [code for code in sorted(marks) if code + 1 not in marks]
    spans = list(zip((code for code in sorted(marks) if code - 1 not in marks), ends, strict=True))
    rows: dict[tuple[int, ...], int] = {}
    index = []
    for start in range(0, NUM_CODE_POINTS, BLOCK):
        row = tuple(sum(classes[start + word + i] << (2 * i) for i in range(32)) for word in range(0, BLOCK, 32))
        index.append(rows.setdefault(row, len(rows)))
    if len(rows) > 256:
        raise RuntimeError("more than 256 distinct rows: the index no longer fits u8")
    version = next((v for v, code in FIRST_SEEN.items() if code in letters), "older than 14.0")
    lines = [
        f"//! Letters, numbers, white space and marks of Unicode {version}.",
        "//! Written by dev/gen_unicode_tables.py: do not edit.",
        "",
        f"/// Row of `ROWS` for each block of {BLOCK} code points.",
        "#[rustfmt::skip]",
        f"pub static INDEX: [u8; {len(index)}] = [",
    ]
    lines += ["    " + ", ".join(map(str, index[i : i + 20])) + "," for i in range(0, len(index), 20)]
    lines += [
        "];",
        "",
        "/// Two bits for each code point: 0 other, 1 letter, 2 number, 3 white space.",
        "#[rustfmt::skip]",
        f"pub static ROWS: [[u64; {BLOCK // 32}]; {len(rows)}] = [",
    ]
    lines += ["    [" + ", ".join(f"0x{word:016x}" for word in row) + "]," for row in rows]
    lines += [
        "];",
        "",
        "/// First and last code point of each run of combining marks; all of them are of the class other.",
        "#[rustfmt::skip]",
        f"pub static MARKS: [(u32, u32); {len(spans)}] = [",
    ]
    lines += [
        "    " + ", ".join(f"(0x{a:x}, 0x{b:x})" for a, b in spans[i : i + 6]) + "," for i in range(0, len(spans), 6)
    ]
    return "\n".join([*lines, "];", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the tree, write nothing")
    args = parser.parse_args()
    source = render()
    if args.check:
        if OUTPUT.read_text(encoding="utf-8") != source:
            sys.exit(
                f"{OUTPUT.name} differs from what tiktoken {tiktoken.__version__} gives: run {Path(__file__).name}"
            )
        print(f"{OUTPUT.name} agrees with tiktoken {tiktoken.__version__}")
        return
    OUTPUT.write_text(source, encoding="utf-8")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
