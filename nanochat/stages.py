"""The stages of a run in their order: what each is called in commands, marks, folders and the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageNames:
    """One stage."""

    name: str
    """In the pipeline, whose marks and logs are `<base dir>/pipeline/<name>.json` and `.log`."""
    section: str = ""
    """Its section of the report."""
    source: str = ""
    """The model that it makes or evaluates, as `--source` names it; in the report's table a column."""
    folder: str = ""
    """Of a stage that trains: where its checkpoints are, below the base dir."""
    title: str = ""
    """Of a stage that trains: for people."""
    optional: bool = False
    """Started by hand, or only where a run goes on from a model (BASE)."""


STAGES = {
    stage.name: stage
    for stage in (
        StageNames("report_reset"),
        StageNames("data"),
        StageNames("base_import", optional=True),
        StageNames("tok_train", "Tokenizer training"),
        StageNames("tok_eval", "Tokenizer evaluation"),
        StageNames("base_train", "Base model training", "base", "base_checkpoints", "Base training"),
        StageNames("base_loss", "Base model loss", "base"),
        StageNames("base_eval", "Base model evaluation", "base"),
        StageNames("mid_train", "Midtraining", "mid", "mid_checkpoints", "Mid-training"),
        StageNames("chat_eval_mid", "Chat evaluation mid", "mid"),
        StageNames("chat_sft", "SFT", "sft", "chatsft_checkpoints", "Finetuning (SFT)"),
        StageNames("chat_eval_sft", "Chat evaluation sft", "sft"),
        StageNames("chat_rl", "RL", "rl", "chatrl_checkpoints", "Reinforcement learning (RL)", optional=True),
        StageNames("chat_eval_rl", "Chat evaluation rl", "rl", optional=True),
        StageNames("report"),
        StageNames("answer"),
    )
}


# Beside the marks: what the pipeline is about to run, in which folder, and how long each stage should take.
PLAN_FILE = "plan.json"


def pending_name(tag: str) -> str:
    """The folder, beside that of `tag`, in which a fresh start trains while an older run still has the tag's."""
    return f".{tag}.new"


# The stages that train, by the source of their models: base, mid, sft, rl.
TRAINED = {stage.source: stage for stage in STAGES.values() if stage.folder}
