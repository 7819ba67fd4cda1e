"""Pre-tokenized shards, for many runs over the same text: the tokens on disk, memory-mapped, 2 or 4 bytes each.

    python -m scripts.tok_cache --dataset=climbmix

A cached shard is a folder `<base dir>/token_cache/<tokenizer>/<shard>-<key>` with ids.bin (the tokens of all documents
one after the other, uint16 or uint32, without bos), offsets.bin (int64: where each document begins, and the end) and
meta.json. The tokenizer is named by its hash and the shard by its size, its time, and the end of the file, which holds
the sizes and statistics of all its columns: another tokenizer or another shard never matches.

A loader with a cache gives the very same batches in the same order, and its state fits a loader without one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nanochat.data.corpus import Chunk, Corpus, shard_chunks
from nanochat.env import get_base_dir
from nanochat.files import atomic_folder, write_json
from nanochat.progress import progress
from nanochat.tokenizer import Bounds, RustBPETokenizer, Tokens

FOOTER_BYTES = 1 << 16


class TokenCache:
    """The cached shards of one tokenizer.

    Args:
        tokenizer: whose tokens they are.
        folder: where they are kept; default `<base dir>/token_cache`.
    """

    def __init__(self, tokenizer: RustBPETokenizer, folder: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.folder = (folder or get_base_dir() / "token_cache") / tokenizer.hash[:16]
        self._open: dict[Path, tuple[Tokens, Bounds] | None] = {}

    def path(self, shard: Path) -> Path:
        """The folder for the tokens of a shard."""
        stat = shard.stat()  # no hash of the content: every start would have to read the whole corpus
        with open(shard, "rb") as f:
            f.seek(max(0, stat.st_size - FOOTER_BYTES))
            footer = f.read()
        key = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + footer).hexdigest()[:16]
        return self.folder / f"{shard.stem}-{key}"

    def get(self, chunk: Chunk, row: int, num_rows: int) -> tuple[Tokens, Bounds] | None:
        """Like `RustBPETokenizer.encode_arrow` of these rows of the chunk, None if they are not cached."""
        if chunk.shard not in self._open:
            self._open[chunk.shard] = self._map(chunk.shard)
        mapped = self._open[chunk.shard]
        if mapped is None:
            return None
        ids, offsets = mapped
        # offsets count the documents of the shard; a chunk's rows count from its row group.
        bounds = offsets[chunk.first_row + row : chunk.first_row + row + num_rows + 1]
        return ids[bounds[0] : bounds[-1]], bounds - bounds[0]

    def _map(self, shard: Path) -> tuple[Tokens, Bounds] | None:
        path = self.path(shard)
        if not path.exists():
            return None
        offsets = np.fromfile(path / "offsets.bin", dtype=np.int64)
        if offsets[-1] == 0:  # mmap refuses an empty file
            return np.empty(0, self.tokenizer.dtype), offsets
        return np.memmap(path / "ids.bin", dtype=self.tokenizer.dtype, mode="r"), offsets

    def build(self, corpus: Corpus, num_threads: int = 1) -> int:
        """Tokenize every shard of the corpus that is not cached yet; returns how many tokens are cached in all.

        Can be killed: a shard appears whole, and finished ones are kept.
        """
        corpus.wait_for_all("train")
        chunks = [*corpus.train, *corpus.val]
        shards = list(dict.fromkeys(chunk.shard for chunk in chunks))
        total = 0
        with progress(sum(chunk.num_bytes for chunk in chunks), "tokenizing") as bar:
            for shard in shards:
                path = self.path(shard)
                path.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{path}.lock"):  # of several processes one builds it, the others find it done
                    if not path.exists():
                        self._build_shard(shard, corpus.column, path, num_threads)
                self._open.pop(shard, None)
                total += int(np.fromfile(path / "offsets.bin", dtype=np.int64)[-1])
                bar.advance(sum(chunk.num_bytes for chunk in chunks if chunk.shard == shard), shard.name)
        return total

    def _build_shard(self, shard: Path, column: str, path: Path, num_threads: int) -> None:
        lengths = [np.zeros(1, dtype=np.int64)]
        with atomic_folder(path) as tmp:
            with open(tmp / "ids.bin", "wb") as out:
                for chunk in shard_chunks(shard, column):
                    for _, texts in chunk.read():
                        ids, offsets = self.tokenizer.encode_arrow(texts, num_threads)
                        ids.tofile(out)
                        lengths.append(np.diff(offsets))
            offsets = np.concatenate(lengths).cumsum()
            offsets.tofile(tmp / "offsets.bin")
            meta: dict[str, Any] = {"shard": shard.name, "documents": len(offsets) - 1, "tokens": int(offsets[-1])}
            meta |= {"dtype": str(self.tokenizer.dtype), "tokenizer": self.tokenizer.hash}
            write_json(tmp / "meta.json", meta)
