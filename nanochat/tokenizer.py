"""Text to token ids and back, and how a conversation is written in tokens.

The tokenizer is a byte-pair encoder in the style of GPT-4: text is cut by SPLIT_PATTERN, each piece is merged from
bytes by rank. Ids are the mergeable ranks (256 bytes, then the merges in order), followed by the special tokens.
Special tokens are only ever added by this module: `encode` treats "<|bos|>" in user text as ordinary characters.

On disk (`<base dir>/tokenizer/`) it is `tokenizer.json`, readable and safe to load, and `token_bytes.pt`, the length of
each token in bytes (for bits per byte). Pickles, nanochat's classic format, are not loaded.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanochat.env import get_base_dir
from nanochat.files import write_bytes, write_text
from nanochat.messages import PARTS, Conversation, check_messages

if TYPE_CHECKING:
    import torch

    import rustbpe

TOKENIZER_FOLDER = "tokenizer"  # under the base dir
LENGTHS_FILE = "token_bytes.pt"
# Marks that no text can contain: `encode` takes even "<|bos|>" for seven ordinary characters. Their ids follow the
# mergeable ones in this order, and every model is trained on them: a new one can only be added at the end.
SPECIAL_TOKENS = [
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # what the calculator answered
    "<|output_end|>",
]
# The cuts between which merges happen, so that "dog." and "dog!" share the token of "dog". The alternatives, in order:
#   '(?i:[sdmt]|ll|ve|re)         English contractions: 's, 'll
#   [^\r\n\p{L}\p{N}]?+\p{L}+     a word, with one character before it that is neither letter nor digit (mostly a space)
#   \p{N}{1,2}                    digits, two at a time; GPT-4's three would fill a small vocabulary with numbers
#    ?[^\s\p{L}\p{N}]++[\r\n]*    punctuation, with a space before it and line ends behind it
#   \s*[\r\n]|\s+(?!\S)|\s+      line ends and spaces; the last of several spaces is left for the word behind it
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
# What runtimes outside know by name (llama.cpp's pre-tokenizer `qwen35`): digits one at a time, and combining marks go
# with their letters. Vowel signs of Hindi, Thai or Tamil are marks: SPLIT_PATTERN cuts words at each of them, and no
# merge can cross a cut. (?i:…) is spelled out, because engines differ on whether 'ſ' is an s.
RUNTIMES_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"nanochat": SPLIT_PATTERN, "runtimes": RUNTIMES_PATTERN}
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
FORMAT = "nanochat-bpe-1"  # of tokenizer.json

# The result of encoding an Arrow array:
Tokens = npt.NDArray[Any]  # (n,) uint16 or uint32: the ids of all texts, one after the other
Bounds = npt.NDArray[np.int64]  # (texts + 1,): text i is tokens[bounds[i]:bounds[i + 1]]


class TiktokenEncoder:
    """tiktoken behind the same methods: for its pretrained vocabularies, and as the oracle of the tests."""

    def __init__(self, pattern: str, ranks: dict[bytes, int]) -> None:
        import tiktoken  # lazy: only for its own vocabularies

        self._encoding = tiktoken.Encoding(name="nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self._encoding.encode_ordinary(text)  # "ordinary": special tokens in the text are characters

    def batch_encode(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """The ids of several texts."""
        return self._encoding.encode_ordinary_batch(texts, num_threads=num_threads or 1)

    def encode_arrow(self, array: Any, num_threads: int | None = None) -> tuple[Tokens, Bounds]:
        """The ids of an Arrow array of texts, one after the other, and where each text's begin."""
        encoded = self.batch_encode([text or "" for text in array.to_pylist()], num_threads)  # a null is empty
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.uint32, count=offsets[-1]), offsets


class RustBPETokenizer:
    """A byte-pair tokenizer with special tokens and the chat format.

    Args:
        pattern: the regular expression that cuts text before merging.
        ranks: the bytes of each mergeable token; its index is its id. Training may give the same bytes twice (from
            different halves); then the higher id is the one that is used.
        special_tokens: id of each special token, all above the ranks.
        bos_token: which special token starts a document.
        encoder: "rustbpe" (ours; knows PATTERNS) or "tiktoken"; both give the same ids.

    Raises:
        ValueError: an id has two meanings, or the bos token is missing.
    """

    def __init__(
        self,
        pattern: str,
        ranks: Sequence[bytes],
        special_tokens: dict[str, int],
        bos_token: str = SPECIAL_TOKENS[0],
        encoder: str = "rustbpe",
    ) -> None:
        special_ids = set(special_tokens.values())
        if len(special_ids) < len(special_tokens) or any(i < len(ranks) for i in special_ids):
            raise ValueError("the ids of special tokens must be distinct and above the mergeable ranks")
        if bos_token not in special_tokens:
            raise ValueError(f"the special tokens lack {bos_token}")
        self.pattern = pattern
        self.ranks = list(ranks)
        self._special_ids = dict(special_tokens)
        self._bos_token = bos_token
        # An id between ranks and specials may be unused, as in cl100k: it decodes to nothing.
        self._token_bytes = self.ranks + [b""] * (max(special_ids) + 1 - len(ranks))
        for name, i in special_tokens.items():
            self._token_bytes[i] = name.encode()
        # The smallest type that holds all ids: a cached corpus takes half the disk with it.
        self.dtype = np.dtype(np.uint16 if len(self._token_bytes) <= 1 << 16 else np.uint32)
        self._encoder = self._make_encoder(encoder)

    def _make_encoder(self, encoder: str) -> rustbpe.Tokenizer | TiktokenEncoder:
        if encoder == "tiktoken":
            return TiktokenEncoder(self.pattern, {token: i for i, token in enumerate(self.ranks)})
        import rustbpe  # lazy: it is compiled; what only reads a model's shape runs without it

        # Its `encode` merges by rank: always the pair whose union has the lowest id, which is the order of training.
        return rustbpe.Tokenizer.from_ranks(self.pattern, [(token, i) for i, token in enumerate(self.ranks)])

    # --- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_ranks(cls, ranks: Sequence[bytes], pattern: str = SPLIT_PATTERN) -> RustBPETokenizer:
        """A tokenizer with these mergeable tokens (index = id) and nanochat's special tokens after them."""
        # Behind the merges, not before them: so a mergeable token's id is its rank.
        return cls(pattern, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_trainer(cls, trainer: Any) -> RustBPETokenizer:
        """A tokenizer from a trained `rustbpe.Tokenizer`."""
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
        return cls.from_ranks([token for token, _ in ranks], trainer.get_pattern())

    @classmethod
    def train_from_iterator(
        cls, text_iterator: Iterable[str], vocab_size: int, pattern: str = SPLIT_PATTERN
    ) -> RustBPETokenizer:
        """Learn merges from texts. `vocab_size` counts everything: bytes, merges and special tokens.

        The result has fewer tokens if the texts hold too few different pairs.

        Raises:
            ValueError: `vocab_size` is below 265 (256 bytes and 9 special tokens).
        """
        import rustbpe  # lazy: it is compiled; what only reads a model's shape runs without it

        # Training again and again joins the most frequent pair of neighbours, of the pieces that the pattern cuts.
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(text_iterator), mergeable_size(vocab_size), pattern=pattern)
        return cls.from_trainer(trainer)

    @classmethod
    def from_pretrained(cls, tiktoken_name: str) -> RustBPETokenizer:
        """One of tiktoken's vocabularies ("gpt2", "cl100k_base"), downloaded or from its cache."""
        import tiktoken  # lazy: only for its own vocabularies

        encoding = tiktoken.get_encoding(tiktoken_name)
        # Pattern and ranks have private names only. Of our special tokens these vocabularies have bos, by another name.
        ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        specials = {name: encoding.encode_single_token(name) for name in encoding.special_tokens_set}
        return cls(encoding._pat_str, [token for token, _ in ranks], specials, "<|endoftext|>", encoder="tiktoken")

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path, name: str = "tokenizer.json") -> RustBPETokenizer:
        """Load what `save` wrote, or another file of that form in the same folder.

        Raises:
            FileNotFoundError: there is none; says how to train one.
            ValueError: the file is damaged or of another format.
        """
        path = Path(tokenizer_dir) / name
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer at {path}: train one with `python -m scripts.tok_train`")
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))  # JSON: loading it can run nothing
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            raise ValueError(f"{path} is damaged ({error}): train again with `python -m scripts.tok_train`") from error

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> RustBPETokenizer:
        """From `to_dict`'s result; ValueError or KeyError when it is of another format or was changed."""
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']!r}, expected {FORMAT!r}")
        ranks = [base64.b64decode(token, validate=True) for token in stored["ranks"]]
        tokenizer = cls(stored["pattern"], ranks, stored["special_tokens"], stored["bos_token"])
        # A token edited by hand would still load, and every model trained with the file would read other text.
        if tokenizer.hash != stored["hash"]:
            raise ValueError("its content doesn't match its hash")
        return tokenizer

    def to_dict(self) -> dict[str, Any]:
        """Everything it is, JSON-ready."""
        return {
            "format": FORMAT,
            "hash": self.hash,
            "pattern": self.pattern,
            "bos_token": self._bos_token,
            "special_tokens": self._special_ids,
            # Tokens are bytes and need not be UTF-8: a merge may end in the middle of a character.
            "ranks": [base64.b64encode(token).decode() for token in self.ranks],
        }

    def save(self, tokenizer_dir: str | Path) -> None:
        """Write `tokenizer.json` and `token_bytes.pt`, each whole, the old pair never mixed with the new."""
        folder = Path(tokenizer_dir)
        # First, so that a crash in between leaves no lengths rather than those of another vocabulary.
        (folder / LENGTHS_FILE).unlink(missing_ok=True)
        write_text(folder / "tokenizer.json", json.dumps(self.to_dict(), indent=1) + "\n")
        self.save_lengths(folder / LENGTHS_FILE)

    def save_lengths(self, path: Path) -> None:
        """Write `token_lengths()` as a tensor, unless it is there; the same bytes for the same tokenizer."""
        import torch  # lazy: seconds to load, and text becomes ids without it

        buffer = io.BytesIO()  # given a file, torch would write its (temporary) name into it
        torch.save(torch.from_numpy(self.token_lengths()), buffer)
        if not path.is_file() or path.read_bytes() != buffer.getvalue():
            write_bytes(path, buffer.getvalue())

    # --- what it is -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides the ids: two tokenizers with one hash are the same."""
        digest = hashlib.sha256(json.dumps([self.pattern, self._bos_token, sorted(self._special_ids.items())]).encode())
        for token in self.ranks:  # with their lengths, or [ab, c] would have the hash of [a, bc]
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def get_vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self._token_bytes)

    def get_bos_token_id(self) -> int:
        """The id that starts every document."""
        return self._special_ids[self._bos_token]

    def get_special_tokens(self) -> set[str]:
        """The names of the special tokens."""
        return set(self._special_ids)

    def encode_special(self, name: str) -> int:
        """The id of a special token, e.g. `<|assistant_end|>`."""
        if name not in self._special_ids:
            raise ValueError(f"this tokenizer has no special token {name}; it has {', '.join(self._special_ids)}")
        return self._special_ids[name]

    def id_to_token(self, token_id: int) -> str:
        """The text of one token (bytes that are no complete UTF-8 show as U+FFFD)."""
        return self.decode([token_id])

    def token_lengths(self) -> npt.NDArray[np.int32]:
        """Raw bytes of each token, 0 for special tokens. (vocab,)"""
        lengths = np.array([len(token) for token in self._token_bytes], dtype=np.int32)
        # No byte of the text stands behind a special token: bits per byte must not count its loss.
        lengths[list(self._special_ids.values())] = 0
        return lengths

    # --- text to ids and back ---------------------------------------------------------------------------------------

    def encode(
        self,
        text: str | list[str],
        prepend: str | int | None = None,
        append: str | int | None = None,
        num_threads: int = 8,
    ) -> Any:
        """The ids of a text (list[int]) or of each of several texts (list[list[int]]).

        Args:
            text: special tokens written in it are encoded as ordinary characters, half a surrogate pair as U+FFFD.
            prepend: a special token (name or id) to put first.
            append: a special token to put last.
            num_threads: for a list; at most this many threads.
        """
        # The marks go in as ids, never as text: nothing that a user writes can end a turn or begin another role's.
        first = [] if prepend is None else [prepend if isinstance(prepend, int) else self.encode_special(prepend)]
        last = [] if append is None else [append if isinstance(append, int) else self.encode_special(append)]
        if isinstance(text, str):
            return first + self._encoder.encode(text) + last
        if not isinstance(text, list):
            raise TypeError(f"encode takes a str or a list of str, got {type(text).__name__}")
        return [first + ids + last for ids in self._encoder.batch_encode(text, num_threads)]

    __call__ = encode

    def encode_arrow(self, texts: Any, num_threads: int = 1) -> tuple[Tokens, Bounds]:
        """Encode an Arrow array of strings (a column of a parquet file): the fast way in, without Python strings.

        Returns:
            ids of all texts one after the other, as uint16 or uint32 (`self.dtype`), and offsets (n+1,): text i is
            `ids[offsets[i]:offsets[i + 1]]`. A null counts as an empty text.
        """
        # Rust reads the strings where Arrow has them, on several threads, while Python's lock is free.
        ids, offsets = self._encoder.encode_arrow(texts, num_threads)
        return ids.astype(self.dtype, copy=False), offsets

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of the ids; the end may be an incomplete UTF-8 sequence. Special tokens give their names."""
        size = self.get_vocab_size()
        wrong = [i for i in ids if not 0 <= i < size]  # a list would take a negative index
        if wrong:
            raise ValueError(f"ids must be at least 0 and below {size}, got {wrong[0]}")
        return b"".join([self._token_bytes[i] for i in ids])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; incomplete UTF-8 shows as U+FFFD."""
        # All bytes first, then the characters: one character may be spread over several tokens.
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # --- conversations ----------------------------------------------------------------------------------------------

    def render_turns(self, conversation: Conversation) -> Iterator[tuple[list[int], list[int]]]:
        """(ids, mask) of each message in turn, bos before the first one.

        The mask is 1 where the model must learn to predict the token: what the assistant writes, and its end.
        A leading system message becomes the beginning of the first user message.

        Raises:
            ValueError: a message is malformed or out of order (see `check_messages`).
        """
        messages = conversation["messages"] if isinstance(conversation, dict) else conversation
        check_messages(messages)
        # There are marks for two roles only (as in nanochat): a system message is read as what the user says first.
        system = ""
        if messages[0]["role"] == "system":
            system = messages[0]["content"] + "\n\n"
            messages = messages[1:]
        for i, message in enumerate(messages):
            ids = [] if i else [self.get_bos_token_id()]
            if message["role"] == "user":
                text = system + message["content"] if i == 0 else message["content"]
                ids += self.encode(text, prepend="<|user_start|>", append="<|user_end|>")
                yield ids, [0] * len(ids)  # read, not learned: the model is to answer, not to ask
            else:
                ids, mask = self._render_assistant(message["content"])
                yield ids, mask if message.get("weight") != 0 else [0] * len(mask)  # marked: read, not learned

    def _render_assistant(self, content: str | list[dict[str, str]]) -> tuple[list[int], list[int]]:
        ids, mask = [self.encode_special("<|assistant_start|>")], [0]  # the engine writes it when a user has ended
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            # A call is learned with its marks. Its result is not: the calculator writes that, and a model that had
            # learned to write it would make results up.
            before, after, learned = PARTS[part["type"]]
            new = self.encode(part["text"], prepend=before, append=after)
            ids += new
            mask += [learned] * len(new)
        return [*ids, self.encode_special("<|assistant_end|>")], [*mask, 1]  # learned: this is how an answer ends

    def render_conversation(
        self, conversation: Conversation, max_tokens: int | None = 2048
    ) -> tuple[list[int], list[int]]:
        """A conversation as ids and mask (1 = the model must learn to predict this token).

        Args:
            conversation: {"messages": [...]}, roles alternating user and assistant after an optional system message;
                an assistant's content may be a list of parts {"type": "text"|"python"|"python_output", "text": ...}.
            max_tokens: keep this many from the start; None keeps all.
        """
        ids: list[int] = []
        mask: list[int] = []
        for turn_ids, turn_mask in self.render_turns(conversation):
            ids += turn_ids
            mask += turn_mask
        # Cut anywhere, even inside an answer; training cuts at the end of a turn instead (data/chat_rows.py).
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation up to where the assistant must speak next; a last assistant message is dropped."""
        messages = conversation["messages"]
        check_messages(messages)
        if messages[-1]["role"] == "assistant":  # in a task it is the reference, which the model must not see
            messages = messages[:-1]
        ids, _ = self.render_conversation({"messages": messages}, max_tokens=None)
        return [*ids, self.encode_special("<|assistant_start|>")]

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int]) -> str:
        """The tokens of a rendered conversation in one line: green ones are learned, red ones are only read."""
        colours = {0: "\033[91m", 1: "\033[92m"}  # ANSI: red, green
        return "|".join(f"{colours[m]}{self.id_to_token(i)}\033[0m" for i, m in zip(ids, mask, strict=True))


def mergeable_size(vocab_size: int) -> int:
    """Mergeable tokens (bytes and merges) in a vocabulary of `vocab_size` with the special tokens."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}, but must be at least {MIN_VOCAB_SIZE}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    return vocab_size - len(SPECIAL_TOKENS)  # so that a vocabulary of 65536 is one with the special tokens


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer of this run's base folder (FileNotFoundError says how to train one)."""
    return RustBPETokenizer.from_directory(get_base_dir() / TOKENIZER_FOLDER)


def get_token_bytes(device: torch.device | str = "cpu") -> torch.Tensor:
    """Raw bytes of each token of the base folder's tokenizer, int32 (vocab,), 0 for special tokens.

    They turn nats per token into bits per byte; nanochat's name for them, for programs outside.
    """
    import torch  # lazy: as above

    # The file is for other programs: what follows from tokenizer.json is never read from anywhere else. One that is
    # missing, damaged or of another tokenizer is made again.
    tokenizer = get_tokenizer()
    with contextlib.suppress(OSError):
        tokenizer.save_lengths(get_base_dir() / TOKENIZER_FOLDER / LENGTHS_FILE)
    return torch.from_numpy(tokenizer.token_lengths()).to(device)
