"""The same tokenizer without a compiler: the classic rustbpe of PyPI learns the merges, tiktoken encodes.

`bash setup_env.sh` installs that package into `.venv/portable` where Rust cannot be installed. Merges and ids are the
same as those of the compiled crate; encoding is slower, and training holds all of the text that it counts in memory.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FOLDER = Path(sys.prefix) / "portable" / "rustbpe"


def is_installed() -> bool:
    """True if the classic package lies where set-up puts it."""
    return next(FOLDER.glob("rustbpe*.*"), None) is not None


def _classic_trainer() -> Any:
    # By path: under its own name this project's package would be found, and loading it as "rustbpe" would put it in
    # that one's place for every later `import rustbpe`.
    (path,) = [path for path in FOLDER.glob("rustbpe*.*") if path.suffix in (".so", ".pyd")]
    spec = importlib.util.spec_from_file_location("classic.rustbpe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Tokenizer()


def _strings(array: Any) -> Iterator[str]:
    """The texts of an Arrow array, of a chunked one, or of an iterable of these; a null is an empty text."""
    if hasattr(array, "to_pylist"):
        for chunk in getattr(array, "chunks", [array]):
            yield from (text or "" for text in chunk.to_pylist())
    else:
        for item in array:
            yield from _strings(item)


class PortableTokenizer:
    """Stands in for `rustbpe.Tokenizer`, with the same methods."""

    def __init__(self, pattern: str, stats: Callable[..., Any]) -> None:
        self._pattern, self._stats = pattern, stats
        self._ranks = [(bytes([byte]), byte) for byte in range(256)]
        self._made: Any = None
        self.training_stats: Any = None

    def fill(self, pattern: str, ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]]) -> "PortableTokenizer":
        """Take these tokens and ids; returns itself."""
        pairs = ranks.items() if isinstance(ranks, Mapping) else ranks
        self._pattern, self._made = pattern, None
        self._ranks = sorted(((bytes(token), rank) for token, rank in pairs), key=lambda pair: pair[1])
        missing = {bytes([byte]) for byte in range(256)} - {token for token, _ in self._ranks}
        if missing or len({rank for _, rank in self._ranks}) < len(self._ranks):
            raise ValueError("the ranks must have every single byte, and no id twice")
        return self

    def train_from_arrow(self, arrays: Any, vocab_size: int, pattern: str | None = None, **limits: Any) -> None:
        """Train on Arrow string arrays; see `rustbpe.Tokenizer.train_from_arrow`."""
        self.train_from_iterator(_strings(arrays), vocab_size, pattern=pattern, **limits)

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        doc_cap: int | None = None,
        max_chars: int | None = None,
        num_threads: int | None = None,
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> None:
        """Train on strings; `num_threads` is the classic package's own affair."""
        documents = chars = text_bytes = 0

        def texts() -> Iterator[str]:
            nonlocal documents, chars, text_bytes
            for text in iterator:
                text = text[:doc_cap].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                documents, chars, text_bytes = documents + 1, chars + len(text), text_bytes + len(text.encode())
                if progress is not None and documents % 1000 == 0:
                    progress("count", text_bytes, None)
                yield text
                if max_chars is not None and chars >= max_chars:
                    return

        trainer, pattern = _classic_trainer(), self._pattern if pattern is None else pattern
        trainer.train_from_iterator(texts(), vocab_size, buffer_size=buffer_size, pattern=pattern)
        if text_bytes == 0:
            raise ValueError("the corpus is empty: there is no text to train on")
        self.fill(pattern, trainer.get_mergeable_ranks())
        self.training_stats = self._stats(documents, text_bytes, 0)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; 256 before training."""
        return len(self._ranks)

    def get_pattern(self) -> str:
        """The regular expression that splits the text."""
        return self._pattern

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """The bytes and the id of every token, in the order of the ids."""
        return list(self._ranks)

    def _encoding(self) -> Any:
        if self._made is None:
            import tiktoken  # lazy: a trainer does without

            ranks = dict(self._ranks)
            self._made = tiktoken.Encoding("portable", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={})
        return self._made

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self._encoding().encode_ordinary(text)

    def batch_encode(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """Ids of each text, encoded on several threads."""
        return self._encoding().encode_ordinary_batch(list(texts), num_threads=num_threads or 8)

    def encode_arrow(
        self, array: Any, num_threads: int | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Ids of all texts one after the other, and where each text's begin; a null has none."""
        encoded = self.batch_encode([text or "" for text in array.to_pylist()], num_threads)
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        dtype = np.uint16 if self._ranks[-1][1] < 1 << 16 else np.uint32
        return np.fromiter(itertools.chain.from_iterable(encoded), dtype=dtype, count=offsets[-1]), offsets

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the tokens, joined."""
        table = {rank: token for token, rank in self._ranks}
        return b"".join(table[int(i)] for i in ids)

    def decode(self, ids: Sequence[int], errors: str = "replace") -> str:
        """The text of the tokens; what is not UTF-8 becomes U+FFFD, or whatever `errors` says."""
        return self.decode_bytes(ids).decode("utf-8", errors)
