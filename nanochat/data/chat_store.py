"""Conversations on disk where they are many, for random access."""

from __future__ import annotations

import hashlib
import json
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Sequence
from typing import overload

from nanochat.env import get_base_dir
from nanochat.messages import Conversation

IN_MEMORY_BYTES = 64_000_000  # conversations beyond this lie in a file without a name, which ends with the process


class Chats(Sequence[Conversation]):
    """Conversations in a file that has no name, or in memory if they are few; reading one takes about 10 µs."""

    def __init__(self, conversations: Iterable[Conversation]) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, dir=str(get_base_dir()))  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends, self._digests = array("q", [0]), array("Q")
        self._lock = threading.Lock()
        for conversation in conversations:
            line = json.dumps(conversation).encode()
            self._file.write(line)
            self._ends.append(self._ends[-1] + len(line))
            self._digests.append(digest_of(line))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        with self._lock:
            self._file.seek(self._ends[i])
            line = self._file.read(self._ends[i + 1] - self._ends[i])
        conversation: Conversation = json.loads(line)
        return conversation

    def digest(self, i: int) -> int:
        """A number that is the same for equal conversations, and for no others."""
        return self._digests[i]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def digest_of(line: bytes) -> int:
    """A number that is the same for equal conversations, written as JSON, and for no others."""
    return int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little")
