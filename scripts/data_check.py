"""Look at your own texts and chats before you train on them: what is read, as what, and what is not.

    python -m scripts.data_check my_texts/ my_chats.jsonl
    python -m scripts.data_check my_texts/ --show 5
    python -m scripts.data_check --copies
    python -m scripts.data_check --forget

It says the same as the pipeline before its first stage, and learns nothing. The exit code is 2 if a run would refuse
what is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat.config import run_script
from nanochat.data.chat_files import HUB
from nanochat.data.chat_forms import STRINGS
from nanochat.data.chats import ChatSource, look_at_chats
from nanochat.data.copies import copies_lines, find_copies, forget
from nanochat.data.inventory import Inventory, UnusableInputError, check_inventories
from nanochat.data.json_text import CHATS
from nanochat.data.text_look import look_at_texts
from nanochat.data.text_walk import ReadOptions
from nanochat.env import get_base_dir, print0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Look at texts and chats: what would be learned of them, and what not."""

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files or folders."""
    show: int = 0
    """Print so many samples of what would be learned."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    copies: bool = False
    """List every place that your texts and chats were copied to: imports, token caches, logs, reports."""
    forget: bool = False
    """Delete these copies, all but models and tokenizers."""

    def __post_init__(self) -> None:
        if not self.paths and not self.copies and not self.forget:
            raise ValueError("give at least one file or folder, or --copies")
        if self.paths and (self.copies or self.forget):
            raise ValueError("--copies and --forget go through the base folder: give no paths with them")
        if self.show < 0:
            raise ValueError("--show must be at least 0")


def look(path: str, options: ReadOptions) -> Inventory:
    """The inventory of one path: of chats if it holds any, else of texts."""
    folder = Path(path).expanduser()
    chats = look_at_chats(ChatSource.from_env(path)) if path.startswith(HUB) or folder.exists() else None
    others = (
        0 if chats is None else sum(entry.kinds.get("file", 0) for entry in chats.left_out.values() if entry.matters)
    )
    good = chats is not None and chats.num_read and not chats.stop and not others
    if chats is not None and (path.startswith(HUB) or (good and set(chats.read) != {STRINGS})):
        return chats
    texts = look_at_texts(folder, options)
    # Where a run would stop for the texts, what is in the conversations, or wrong with them, helps more.
    if chats is not None and texts.stop and (good or CHATS in texts.left_out or (chats.num_read and folder.is_file())):
        return chats
    return texts


def main(cfg: Config) -> None:
    """Print the inventories; stop as a run would."""
    if cfg.copies or cfg.forget:
        copies = find_copies(get_base_dir(), Path.cwd())
        print0("\n".join(forget(copies) if cfg.forget else copies_lines(copies)))
        return
    options = ReadOptions.from_env(cfg.text_column)
    inventories = [look(path, options) for path in cfg.paths]
    for inventory in inventories:
        print0("\n".join(inventory.lines(cfg.show)))
    try:
        check_inventories(inventories)
    except UnusableInputError as error:
        print0(f"a run would stop here: {error}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    run_script(main, Config)
