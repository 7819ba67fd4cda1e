"""Byte pair encoding: train a vocabulary, encode and decode. The work is done in Rust (src/); this module calls it.

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_arrow(table["text"], vocab_size=32768)
    ids, offsets = tokenizer.encode_arrow(table["text"])  # document i: ids[offsets[i] : offsets[i + 1]]

Arrow arrays are read in place and ids arrive in NumPy arrays; the GIL is released meanwhile. This module knows no
special tokens: text is only text, whatever it looks like.
"""

import codecs
import ctypes
import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rustbpe import portable

__all__ = ["GPT2_PATTERN", "GPT4_PATTERN", "NANOCHAT_PATTERN", "RUNTIMES_PATTERN", "Tokenizer", "TrainingStats"]

logger = logging.getLogger(__name__)

# The patterns that the hand-written splitters know (cl100k_base's, as tiktoken spells it, is one more).
_GPT4_STYLE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT4_PATTERN = _GPT4_STYLE % 3  # the default, as in the classic rustbpe
NANOCHAT_PATTERN = _GPT4_STYLE % 2  # digits in groups of two: better for small vocabularies
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# That of llama.cpp's pre-tokenizer `qwen35`, letter for letter: marks belong to the letters, digits stand alone.
RUNTIMES_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NO_LIMIT = 2**64 - 1

# Called with the phase ("count" or "merge"), what is done (bytes of text, or merges) and the total (None if unknown).
Progress = Callable[[str, int, "int | None"], None]


class _Documents(ctypes.Structure):
    """`RawDocuments` of src/abi.rs."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("data_len", ctypes.c_size_t),
        ("offsets", ctypes.c_void_p),
        ("offset_width", ctypes.c_size_t),
        ("num_documents", ctypes.c_size_t),
        ("validity", ctypes.c_void_p),
        ("validity_first", ctypes.c_size_t),
    )
    buffers: Any  # keeps the memory alive as long as this points to it


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)


def _load_library() -> ctypes.CDLL | None:
    """The compiled crate, which the build puts beside this file; None where PyPI's package stands in for it."""
    folder = Path(__file__).parent
    found = [path for ending in (".so", ".pyd", ".dylib", ".dll") for path in sorted(folder.glob(f"_rustbpe*{ending}"))]
    if not found and portable.is_installed():
        return None
    if not found:
        raise ImportError(f"the compiled part of rustbpe is missing in {folder}: run `bash setup_env.sh`")
    # After an upgrade of Python an older build may lie beside the new one.
    library = ctypes.CDLL(str(max(found, key=lambda path: path.stat().st_mtime)))
    handle, size, u64, pointer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64, ctypes.POINTER
    documents = pointer(_Documents)
    functions: dict[str, tuple[Any, ...]] = {
        "counter_new": (ctypes.c_char_p, size, u64, u64, size, pointer(handle)),
        "counter_feed": (handle, documents, _Callback, pointer(ctypes.c_int)),
        "counter_totals": (handle, pointer(u64)),
        "train": (handle, ctypes.c_char_p, size, u64, _Callback, pointer(handle)),
        "from_ranks": (ctypes.c_char_p, size, ctypes.c_char_p, size, handle, handle, size, pointer(handle)),
        "sizes": (handle, pointer(u64)),
        "ranks": (handle, handle, handle, handle),
        "encode": (handle, documents, size, pointer(u64), pointer(u64), pointer(handle)),
        "encoded_take": (handle, handle, size, handle, size),
        "decode": (handle, handle, size, handle, size, pointer(u64)),
    }
    for name, arguments in functions.items():
        function = getattr(library, f"rustbpe_{name}")
        function.argtypes, function.restype = arguments, ctypes.c_int
    for name in ("counter_free", "tokenizer_free"):
        function = getattr(library, f"rustbpe_{name}")
        function.argtypes, function.restype = (handle,), None
    library.rustbpe_last_error.argtypes, library.rustbpe_last_error.restype = (handle, size), size
    return library


_loaded = _load_library()
_lib: Any = _loaded  # None only where no instance of the classes below is ever made


def _library_with(part: str, version: int) -> Any:
    """The library, if a part of it has this version; None without the compiled crate, or where it is of another."""
    version_of = getattr(_lib, f"rustbpe_{part}_version", None)
    return _lib if version_of is not None and version_of() == version else None


def _check(status: int) -> None:
    """Raises what the library has just failed with, on this thread."""
    if status != 0:
        buffer = ctypes.create_string_buffer(4096)
        length = _lib.rustbpe_last_error(buffer, len(buffer))
        message = buffer.raw[: min(length, len(buffer))].decode("utf-8", "replace")
        raise (RuntimeError if message.startswith("internal error") else ValueError)(message)


def _utf8(text: str) -> bytes:
    """UTF-8 of a string; half a surrogate pair becomes U+FFFD, as in tiktoken."""
    if not isinstance(text, str):
        raise TypeError(f"expected str, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _from_strings(texts: Sequence[str]) -> _Documents:
    encoded = [_utf8(text) for text in texts]
    offsets = np.fromiter(itertools.accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)
    data = b"".join(encoded)
    address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
    documents = _Documents(address, len(data), offsets.ctypes.data, 8, len(encoded), None, 0)
    documents.buffers = (data, offsets)
    return documents


def _from_arrow(array: Any) -> _Documents:
    """Points to the buffers of an Arrow array of strings (or of bytes that hold UTF-8)."""
    kind = str(array.type)
    if kind in ("string_view", "binary_view", "null") or kind.startswith("dictionary<values=string"):
        array = array.cast("string" if kind == "null" else "large_string")
        kind = str(array.type)
    if kind not in ("string", "large_string", "binary", "large_binary"):
        raise TypeError(f"expected an Arrow array of strings, got {kind}")
    validity, offsets, data = array.buffers()
    width = 8 if kind.startswith("large") else 4
    if len(array) == 0:
        return _from_strings([])
    if offsets is None or offsets.size < (array.offset + len(array) + 1) * width:
        raise ValueError("the Arrow array is broken: its offsets buffer is too short")
    if validity is not None and validity.size * 8 < array.offset + len(array):
        raise ValueError("the Arrow array is broken: its validity bitmap is too short")
    documents = _Documents(
        data.address if data is not None else None,
        data.size if data is not None else 0,
        offsets.address + array.offset * width,
        width,
        len(array),
        validity.address if validity is not None else None,
        array.offset,
    )
    documents.buffers = array
    return documents


def _arrow_chunks(arrays: Any) -> Iterator[Any]:
    """The plain arrays of an array, a chunked array, or an iterable of these."""
    if hasattr(arrays, "buffers"):
        yield arrays
    elif hasattr(arrays, "chunks"):
        yield from arrays.chunks
    else:
        for item in arrays:
            if not hasattr(item, "buffers") and not hasattr(item, "chunks"):
                raise TypeError(f"expected Arrow arrays, got {type(item).__name__}")
            yield from _arrow_chunks(item)


@dataclass(frozen=True)
class TrainingStats:
    """Counts of a training run, and its memory, which grows with the distinct pieces, not with the text."""

    documents: int
    text_bytes: int
    table_bytes: int  # held by the tables of counted pieces, before they were put together


class _Vocabulary:
    """A `Tokenizer` of the library, freed with the last reference to this: a call in another thread keeps it alive."""

    def __init__(self, handle: ctypes.c_void_p) -> None:
        self.handle = handle
        weakref.finalize(self, _lib.rustbpe_tokenizer_free, handle)
        sizes = (ctypes.c_uint64 * 3)()
        _check(_lib.rustbpe_sizes(handle, sizes))
        self.num_tokens, self.num_ids, self.num_bytes = sizes

    @functools.cached_property
    def ranks(self) -> list[tuple[bytes, int]]:
        data = ctypes.create_string_buffer(max(1, self.num_bytes))
        offsets = np.empty(self.num_tokens + 1, dtype=np.int64)
        ids = np.empty(self.num_tokens, dtype=np.uint32)
        _check(_lib.rustbpe_ranks(self.handle, data, offsets.ctypes.data, ids.ctypes.data))
        joined = data.raw
        cuts = itertools.pairwise(offsets.tolist())
        return [(joined[start:end], rank) for (start, end), rank in zip(cuts, ids.tolist(), strict=True)]

    def encode(self, documents: _Documents, num_threads: int | None) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Ids of all documents, and where those of each start."""
        total, width, out = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_void_p()
        results = (ctypes.byref(total), ctypes.byref(width), ctypes.byref(out))
        _check(_lib.rustbpe_encode(self.handle, ctypes.byref(documents), _threads(num_threads), *results))
        ids = np.empty(total.value, dtype=np.uint16 if width.value == 2 else np.uint32)
        offsets = np.empty(documents.num_documents + 1, dtype=np.int64)
        _check(_lib.rustbpe_encoded_take(out, ids.ctypes.data, len(ids), offsets.ctypes.data, len(offsets)))
        return ids, offsets


def _threads(requested: int | None) -> int:
    if requested is not None and requested < 1:
        raise ValueError(f"num_threads must be at least 1, or None for one on each processor, got {requested}")
    return requested or 0


class _Watch:
    """The bridge from the library's progress to Python's: an exception in the callback stops the work and is raised."""

    def __init__(self, progress: Progress | None, phase: str) -> None:
        self.phase, self.progress, self.done_before = phase, progress, 0
        self.error: BaseException | None = None
        # Also without a callback of the user's: this is where Python notices Ctrl-C.
        self.callback = _Callback(self._hear)

    def _hear(self, done: int, total: int) -> int:
        try:
            if self.progress is not None:
                self.progress(self.phase, self.done_before + done, total if self.phase == "merge" else None)
        except BaseException as error:
            self.error = error
        return self.error is not None

    def check(self, status: int) -> None:
        """Raises what stopped the work."""
        if self.error is not None:
            raise self.error
        _check(status)


def _count(counter: ctypes.c_void_p, batches: Iterator[_Documents], progress: Progress | None) -> TrainingStats:
    """Feeds the batches to the counter."""
    watch, more = _Watch(progress, "count"), ctypes.c_int(1)
    totals = (ctypes.c_uint64 * 3)()
    for documents in batches:
        watch.check(_lib.rustbpe_counter_feed(counter, ctypes.byref(documents), watch.callback, ctypes.byref(more)))
        _check(_lib.rustbpe_counter_totals(counter, totals))
        watch.done_before = totals[1]
        if not more.value:
            break
    return TrainingStats(*totals)


class Tokenizer:
    """A trained vocabulary without special tokens; several threads may encode with it at once."""

    def __new__(cls) -> Any:
        """A tokenizer; without the compiled crate, its portable stand-in."""
        return super().__new__(cls) if _lib is not None else portable.PortableTokenizer(GPT4_PATTERN, TrainingStats)

    def __init__(self) -> None:
        self._vocabulary: _Vocabulary | None = None
        self._pattern = GPT4_PATTERN
        self.training_stats: TrainingStats | None = None

    @classmethod
    def from_ranks(cls, pattern: str, ranks: Mapping[bytes, int] | Iterable[tuple[bytes, int]]) -> "Tokenizer":
        """A tokenizer with given tokens and ids, such as `get_mergeable_ranks` returns or tiktoken keeps.

        Raises: ValueError if a single byte is missing, an id occurs twice or the pattern is not supported.
        """
        if _lib is None:
            return cls().fill(pattern, ranks)  # type: ignore[attr-defined]
        pairs = list(ranks.items() if isinstance(ranks, Mapping) else ranks)
        for token, rank in pairs:
            if not isinstance(token, bytes) or isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"ranks must map bytes to int, got {token!r}: {rank!r}")
            if not 0 <= rank < 2**32:
                raise ValueError(f"token id {rank} is out of range")
        tokens = [token for token, _ in pairs]
        offsets = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.cumsum([len(token) for token in tokens], out=offsets[1:])
        ids = np.array([rank for _, rank in pairs], dtype=np.uint32)
        data, regex, out = b"".join(tokens), _utf8(pattern), ctypes.c_void_p()
        arguments = (data, len(data), offsets.ctypes.data, ids.ctypes.data, len(pairs))
        _check(_lib.rustbpe_from_ranks(regex, len(regex), *arguments, ctypes.byref(out)))
        tokenizer = cls()
        tokenizer._vocabulary, tokenizer._pattern = _Vocabulary(out), pattern
        return tokenizer

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
        progress: Progress | None = None,
    ) -> None:
        """Trains on strings, taking `buffer_size` of them at a time. The rest is as in `train_from_arrow`."""
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
        source = iter(iterator)
        buffers = iter(lambda: list(itertools.islice(source, buffer_size)), [])
        batches = map(_from_strings, buffers)
        self._train(batches, vocab_size, pattern, doc_cap, max_chars, num_threads, progress)

    def train_from_arrow(
        self,
        arrays: Any,
        vocab_size: int,
        pattern: str | None = None,
        doc_cap: int | None = None,
        max_chars: int | None = None,
        *,
        num_threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Trains on Arrow string arrays (one, chunked, or an iterable of them), read in place; nulls are skipped.

        Args:
            vocab_size: tokens to end with, the 256 bytes included; fewer if the text has no more pairs (logged).
            pattern: how text is split, one of this module's patterns or cl100k_base's; None for GPT4_PATTERN.
            doc_cap: characters to read of each document.
            max_chars: stop after the document that passes this many characters.
            num_threads: None for one on each processor; the result is always the same.
            progress: called about ten times a second with ("count" | "merge", done, total | None).
        Raises: ValueError for an empty corpus, vocab_size < 256, invalid UTF-8 or an unknown pattern.
        """
        batches = map(_from_arrow, _arrow_chunks(arrays))
        self._train(batches, vocab_size, pattern, doc_cap, max_chars, num_threads, progress)

    def _train(
        self,
        batches: Iterator[_Documents],
        vocab_size: int,
        pattern: str | None,
        doc_cap: int | None,
        max_chars: int | None,
        num_threads: int | None,
        progress: Progress | None,
    ) -> None:
        if vocab_size < 256:
            raise ValueError(f"vocab_size must be at least 256 (one token for each byte), got {vocab_size}")
        for name, limit in (("doc_cap", doc_cap), ("max_chars", max_chars)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {limit}")
        pattern = GPT4_PATTERN if pattern is None else pattern
        regex = _utf8(pattern)
        limits = [NO_LIMIT if limit is None else limit for limit in (doc_cap, max_chars)]
        counter = ctypes.c_void_p()
        _check(_lib.rustbpe_counter_new(regex, len(regex), *limits, _threads(num_threads), ctypes.byref(counter)))
        try:
            stats = _count(counter, batches, progress)
            if stats.text_bytes == 0:
                raise ValueError("the corpus is empty: there is no text to train on")
            owned, counter = counter, ctypes.c_void_p()  # rustbpe_train ends the counter
            out, watch = ctypes.c_void_p(), _Watch(progress, "merge")
            watch.check(_lib.rustbpe_train(owned, regex, len(regex), vocab_size, watch.callback, ctypes.byref(out)))
        finally:
            _lib.rustbpe_counter_free(counter)
        self._vocabulary, self._pattern, self.training_stats = _Vocabulary(out), pattern, stats
        if self.vocab_size < vocab_size:
            logger.warning(
                "the text has no more pairs to merge: the vocabulary has %d tokens instead of %d",
                self.vocab_size,
                vocab_size,
            )

    @property
    def vocab_size(self) -> int:
        """Number of tokens; 256 before training."""
        return self._vocabulary.num_tokens if self._vocabulary else 256

    def get_pattern(self) -> str:
        """The regular expression that splits the text."""
        return self._pattern

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """The bytes and the id of every token, in the order of the ids."""
        return list(self._ready().ranks)

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self._ready().encode(_from_strings([text]), 1)[0].tolist()

    def batch_encode(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """Ids of each text, encoded on several threads."""
        ids, offsets = self._ready().encode(_from_strings(texts), num_threads)
        flat = ids.tolist()
        return [flat[start:end] for start, end in itertools.pairwise(offsets.tolist())]

    def encode_arrow(
        self, array: Any, num_threads: int | None = None
    ) -> tuple[npt.NDArray[np.uint16] | npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Encodes an Arrow string array (plain or chunked), read in place; a null has no ids.

        Returns: ids of all documents, uint16 if all ids of the vocabulary fit, else uint32; and offsets, one more than
            documents: document i is ids[offsets[i]:offsets[i + 1]].
        Raises: TypeError for other arrays, ValueError for invalid UTF-8.
        """
        vocabulary = self._ready()
        parts = [vocabulary.encode(_from_arrow(chunk), num_threads) for chunk in _arrow_chunks(array)]
        if len(parts) == 1:
            return parts[0]
        parts.append(vocabulary.encode(_from_strings([]), 1))  # for the dtype, if there is no chunk at all
        starts = itertools.accumulate((len(ids) for ids, _ in parts), initial=0)
        offsets = [offsets[:-1] + start for (_, offsets), start in zip(parts, starts, strict=False)]
        ids = np.concatenate([ids for ids, _ in parts])
        return ids, np.concatenate([*offsets, np.array([len(ids)], dtype=np.int64)])

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """The bytes of the tokens, joined. Raises: ValueError for an id that is not in the vocabulary."""
        vocabulary, numbers = self._ready(), np.asarray(ids)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers below {vocabulary.num_ids}, got {numbers.dtype}")
        if numbers.ndim != 1:
            raise ValueError(f"ids must be a flat list, got {numbers.ndim} dimensions")
        wrong = numbers[(numbers < 0) | (numbers >= vocabulary.num_ids)]
        if wrong.size:
            raise ValueError(f"id {wrong[0]} is not in the vocabulary of {vocabulary.num_ids} ids")
        numbers = np.ascontiguousarray(numbers, dtype=np.uint32)
        out, needed = ctypes.create_string_buffer(8 * len(numbers) + 1), ctypes.c_uint64()
        while True:
            arguments = (numbers.ctypes.data, len(numbers), out, len(out), ctypes.byref(needed))
            _check(_lib.rustbpe_decode(vocabulary.handle, *arguments))
            if needed.value <= len(out):
                return out.raw[: needed.value]
            out = ctypes.create_string_buffer(needed.value)

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]], errors: str = "replace") -> str:
        """The text of the tokens; what is not UTF-8 becomes U+FFFD, or whatever `errors` says (see bytes.decode)."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as the ids arrive, never half a character: that waits for the next id. Joined, it equals `decode`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if text := decoder.decode(self.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def _ready(self) -> _Vocabulary:
        if self._vocabulary is None:  # untrained: every byte is a token
            self._vocabulary = Tokenizer.from_ranks(self._pattern, [(bytes([b]), b) for b in range(256)])._vocabulary
        assert self._vocabulary is not None
        return self._vocabulary
