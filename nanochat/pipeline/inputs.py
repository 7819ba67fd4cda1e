"""The texts and chats that a user gave, looked at before the first stage: what is learned of them, what stops a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nanochat.data.chats import ChatSource, is_own_chats, look_at_chats
from nanochat.data.corpus import is_prepared, list_shards, open_corpus
from nanochat.data.inventory import Inventory, check_inventories, format_bytes
from nanochat.data.script import own_prompts
from nanochat.data.text_import import inventory_of
from nanochat.data.worlds import shipped_topics
from nanochat.dataset import prepare_own
from nanochat.interop.start_model import StartModel
from nanochat.pipeline.profiles import Profile, Settings
from nanochat.pipeline.stages import ROOT
from nanochat.report import get_report

SECTION = "Your data"


def look_at_inputs(profile: Profile, settings: Settings) -> list[Inventory]:
    """The inventories of DATA_DIR and CHAT_DATA, printed; the texts are imported on the way.

    Raises:
        UnusableInputError: they can't be learned from as they are; names the remedy.
        ValueError: a file is malformed; names the place.
    """
    inventories = []
    for look in (lambda: _chats(profile.chat_data), lambda: _texts(settings.data_dir)):
        inventory = look()
        if inventory is not None:
            print("\n".join(inventory.lines()), flush=True)
            check_inventories([inventory])
            inventories.append(inventory)
    return inventories


def _chats(chat_data: str | None) -> Inventory | None:
    return look_at_chats(ChatSource.from_env(chat_data)) if is_own_chats(chat_data) else None


def _texts(path: Path | None) -> Inventory | None:
    if path is None:
        return None
    if is_prepared(path):
        shards = list_shards(path)
        size = sum(shard.stat().st_size for shard in shards)
        inventory = Inventory(f"texts in {path}")
        inventory.count("parquet", len(shards), size)
        inventory.notes.append(
            f"prepared shards are used in place, the last of them for validation ({format_bytes(size)})"
        )
        return inventory
    return inventory_of(prepare_own(path, show=False))


def look_at_world(profile: Profile) -> str:
    """Check the user's own world, print what it holds, and return a question of it; empty without one of their own.

    Raises:
        ValueError: its tables have mistakes, which are printed first.
    """
    names = [shipped_topics(name) for name in profile.world.split(",")]
    if "demo" not in (profile.dataset, profile.chat_data) or None not in names:
        return ""
    command = [sys.executable, "-m", "tasks.demo", "--check", f"--world={profile.world}"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    *lines, last = done.stdout.splitlines() or [""]
    print("\n".join(lines if done.returncode == 0 else [*lines, last]), flush=True)
    if done.returncode:
        raise ValueError(f"WORLD={profile.world} can't be learned as it is: see above; nothing was trained")
    return last.partition(": ")[2] if names[0] is None else ""


def own_question(settings: Settings) -> str:
    """The question to the finished model if the texts of DATA_DIR are not English, their first words; else empty."""
    if settings.data_dir is None:
        return ""
    corpus = open_corpus(prepare_own(settings.data_dir, show=False))
    return next(iter(own_prompts(corpus.documents("val"), 1)), "") if corpus.val else ""


def base_lines(profile: Profile, start: StartModel) -> list[str]:
    """What to know of the model that a run goes on from; `profile` is the one without it."""
    lines = [f"goes on from {start}; its tokenizer stays"]
    if start.config.sequence_len != profile.max_seq_len:
        lines.append(
            f"context: {start.config.sequence_len:,} tokens, as that model has it, not the profile's "
            f"{profile.max_seq_len:,}; longer chats are cut after an answer, and said"
        )
    return lines


def language_advice(profile: Profile) -> list[str]:
    """What to know where the texts are in another language than the chats that come with this project."""
    chats = {"demo": "the demo's English chats", None: "nanochat's English chats"}.get(profile.chat_data)
    if chats is None:
        return []
    return [
        f"your texts do not look English, but without CHAT_DATA the model learns to answer from {chats}: "
        "CHAT_DATA=/your/chats teaches it yours, CHAT_DATA=none talks to the base model"
    ]


def report_inputs(inventories: list[Inventory]) -> None:
    """Write the inventories into the report."""
    if inventories:
        text = "\n".join(f"```\n{chr(10).join(inventory.lines())}\n```" for inventory in inventories)
        get_report().log(section=SECTION, data=text)
