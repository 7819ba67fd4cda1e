"""SmolTalk: general conversations written by larger models, in the smaller mix for models under 1 B parameters.

Data set: HuggingFaceTB/smol-smoltalk on the hub (460K train, 24K test), or smoltalk/<split>.jsonl under
NANOCHAT_TASK_DIR with one {"messages": [...]} per line.
"""

from __future__ import annotations

from typing import Literal

from tasks.common import Conversation, Task
from tasks.sources import load_rows


class SmolTalk(Task):
    """Conversations for training only."""

    name = "SmolTalk"

    def __init__(
        self, split: Literal["train", "test"], *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"SmolTalk has the splits train and test, not {split!r}")
        super().__init__(start=start, stop=stop, step=step)
        self.rows = load_rows("HuggingFaceTB/smol-smoltalk", None, split, f"smoltalk/{split}.jsonl", ("messages",))

    def get_example(self, index: int) -> Conversation:
        messages = self.rows[index]["messages"]
        return {"messages": [{"role": message["role"], "content": message["content"]} for message in messages]}
