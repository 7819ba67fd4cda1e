"""Your own conversations from a file with one JSON list of messages, or one {"messages": [...]}, per line.

The whole file is read and checked first, so that a mistake in line 900 stops the run before it starts.
"""

from __future__ import annotations

from pathlib import Path

from nanochat.data.chat_loader import load_conversations
from tasks.common import Conversation, Task


class CustomJSON(Task):
    """Conversations of a .jsonl (or .parquet) file, in file order; for training only."""

    def __init__(self, filepath: str | Path, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        """Raises FileNotFoundError or ValueError, naming the file and a bad line."""
        self.name = Path(filepath).stem
        super().__init__(start=start, stop=stop, step=step)
        self.rows = load_conversations(Path(filepath))

    def get_example(self, index: int) -> Conversation:
        return self.rows[index]
