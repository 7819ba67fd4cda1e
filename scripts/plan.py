"""What your hours buy: a table of depths with memory, speed, tokens and predicted quality; marks the best choice.

python -m scripts.plan                                this machine, 8 hours
python -m scripts.plan --card p100 --hours 8          a card that is not here, from its data sheet
python -m scripts.plan --card t4 --num_cards 2 --recipe modern --depth 12
python -m scripts.plan --card "rtx 3060" --markdown   the table for documents; --json for programs
python -m scripts.plan --card t4 --vocab_size auto    the vocabulary, too
python -m scripts.plan --card "t4, t4 x2, p100, 3090" one line per card, at one depth and at the best
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from nanochat.common import autodetect_device_type, get_base_dir, setup_compute
from nanochat.config import MOST, Runtime, run_script
from nanochat.hardware import free_memory, inspect_machine, speeds_key
from nanochat.plan.card_names import card_table, parse_card
from nanochat.plan.local_speed import SPEEDS_FILE, LocalMachine
from nanochat.plan.memory import MicroBatch
from nanochat.plan.planning import (
    DEPTHS,
    MEASURED_DEPTHS,
    MEASURED_DEPTHS_DEFAULT,
    VOCAB_SIZES,
    Budget,
    Row,
    SpeedModel,
    best_row,
    card_speed,
    measured_speed,
    on_card,
    plan,
)
from nanochat.plan.roofline import ATTENTION_SHARE, BANDWIDTH_SHARE, GEMM_SHARE
from nanochat.plan.scaling_law import ERROR
from nanochat.recipe import DEFAULT_RECIPE
from nanochat.tokenizer import get_tokenizer

VOCAB_SIZE = 65536
# Fewer steps than this are said to be few. A guess.
FEW_STEPS = 500
# Of the memory that is free here. The rest is for what other programs do meanwhile. A guess.
FREE_MEMORY_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Config:
    """Plan a base training."""

    hours: float = 8.0
    """Time of base training (mid-training and SFT come on top)."""
    depth: int | None = None
    """Only this depth; default: 4 to 20."""
    vocab_size: int | Literal["auto"] | None = None
    """Default: that of the tokenizer here, for another card 65536; auto: of a --card the planner's best."""
    max_seq_len: int = 2048
    """Context length in tokens."""
    recipe: Literal["small", "portable", "classic", "modern"] = DEFAULT_RECIPE  # type: ignore[assignment]
    """Model and optimizer, see base_train."""
    card: str | None = None
    """A card by its name (p100, 3090, "T4 x2", "P100 12GB"; list shows all), or several with commas between them, to be
    compared; default: this machine, measured."""
    num_cards: int | None = None
    """How many of them train together; default: as many as --card says, else 1."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """The precision: auto is what training would take."""
    dataset: Literal["climbmix", "fineweb_edu"] = "climbmix"
    """The text, which the predicted quality depends on."""
    refresh: bool = False
    """Measure this machine again."""
    markdown: bool = False
    """Print the table for a document."""
    json: bool = False
    """Print JSON and nothing else."""

    def __post_init__(self) -> None:
        if not 0 < self.hours < MOST:
            raise ValueError(f"--hours must be above 0 and below {MOST:g}, got {self.hours}")
        if self.depth is not None and self.depth < 1:
            raise ValueError(f"--depth must be at least 1, got {self.depth}")
        if self.vocab_size == "auto" and self.card is None:
            raise ValueError("--vocab_size=auto plans from data sheets: name a --card, or set --vocab_size to a number")
        if self.num_cards is not None and self.num_cards < 1:
            raise ValueError(f"--num_cards must be at least 1, got {self.num_cards}")
        for name in ("max_seq_len", "vocab_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Target:
    """Where the run is to happen, and what is asked of it."""

    name: str
    budget: Budget
    speed: SpeedModel
    how: str
    """Where the speed comes from."""


def target_card(cfg: Config) -> Target:
    """A card from its data sheet; the same on every machine."""
    try:
        card, named = parse_card(cfg.card or "")
    except ValueError as error:
        raise ValueError(f"--card={error}") from None
    if cfg.num_cards is not None and named not in (1, cfg.num_cards):
        raise ValueError(f"--card={cfg.card} and --num_cards={cfg.num_cards} say different numbers: leave one out")
    budget, roofline = on_card(
        card,
        hours=cfg.hours,
        recipe=cfg.recipe,
        vocab_size=cfg.vocab_size if isinstance(cfg.vocab_size, int) else VOCAB_SIZE,
        sequence_len=cfg.max_seq_len,
        num_cards=cfg.num_cards or named,
        dtype=cfg.dtype,
        fineweb=cfg.dataset == "fineweb_edu",
    )
    tflops = roofline.matmul_tflops(budget.dtype)
    known = roofline.measured
    how = (
        f"Speed: roofline of {tflops:.1f} TFLOP/s in {budget.dtype} matmuls through PyTorch (× {GEMM_SHARE} in "
        f"training, × {ATTENTION_SHARE} in attention) and {card.bandwidth_gbs:g} GB/s × {BANDWIDTH_SHARE}, "
        f"{'compiled' if roofline.compiled else 'eager'}; the factors are guesses."
    )
    if known is not None:
        how = (
            f"Speed: matmuls of {tflops:.1f} TFLOP/s in {budget.dtype} and {len(known.steps)} training steps, measured "
            "on such a card (docs/cards.md)."
        )
    return Target(f"{card.name}, {card.memory_gb:g} GB", budget, card_speed(roofline, budget), how)


def target_here(cfg: Config) -> Target:
    """This machine, measured."""
    device_type = autodetect_device_type()
    present = torch.cuda.device_count() if device_type == "cuda" else 1
    if (cfg.num_cards or 1) > present:
        raise ValueError(f"--num_cards={cfg.num_cards}, but this machine has {present}: use fewer, or name a --card")
    with contextlib.redirect_stdout(sys.stderr):  # its line would stand in the JSON
        compute = setup_compute(Runtime(device_type=device_type, dtype=cfg.dtype, compile="off"))  # type: ignore[arg-type]
    path = get_base_dir() / SPEEDS_FILE
    if cfg.refresh:
        path.unlink(missing_ok=True)
    vocab_size = cfg.vocab_size
    if not isinstance(vocab_size, int):
        try:
            vocab_size = get_tokenizer().get_vocab_size()
        except FileNotFoundError:
            vocab_size = VOCAB_SIZE
    memory = free_memory(compute.device) * FREE_MEMORY_SHARE
    budget = Budget(
        hours=cfg.hours,
        recipe=cfg.recipe,
        vocab_size=vocab_size,
        sequence_len=cfg.max_seq_len,
        dtype=compute.precision.name,
        num_cards=cfg.num_cards or 1,
        memory_bytes=int(memory),
        fineweb=cfg.dataset == "fineweb_edu",
        device_type=device_type,
    )
    machine = LocalMachine(compute.device, compute.precision, budget.preset, path)
    depths = (cfg.depth,) if cfg.depth else MEASURED_DEPTHS.get(device_type, MEASURED_DEPTHS_DEFAULT)
    how = "Speed: a training step on this machine, timed, eager."
    if cfg.depth is None:
        how += f" Timed at depths {', '.join(map(str, depths))}; between and beyond them by FLOP/s."
    key = speeds_key(compute.device, compute.precision.product_dtype)
    return Target(key, budget, measured_speed(machine.tokens_per_second, budget, depths), how)


COLUMNS = (
    "depth",
    "parameters",
    "FLOPs/token",
    "rows",
    "memory",
    "tokens/s",
    "tokens",
    "steps",
    "per param",
    "bits/byte",
    "disk",
    "h to 20/param",
)


CARD_COLUMNS = (
    "card",
    "precision",
    "model",
    "memory",
    "tokens",
    "bits/byte",
    "h to 20/param",
    "best depth",
    "bits/byte there",
)
COMPARED_DEPTH = 12  # of the guide's night


def planned(cfg: Config, target: Target, depths: Iterable[int]) -> tuple[list[Row], list[Row]]:
    """The rows of these depths with the best vocabulary, and the best row of each one that was asked for."""
    sizes = VOCAB_SIZES if cfg.vocab_size == "auto" else (target.budget.vocab_size,)
    rows = plan(depths, target.budget, target.speed, sizes)
    best = best_row(rows)
    taken = best.vocab_size if best else sizes[0]
    each = [best_row(row for row in rows if row.vocab_size == size) for size in sizes]
    return [row for row in rows if row.vocab_size == taken], [row for row in each if row]


def card_cells(cfg: Config, name: str) -> list[str]:
    """One card's line of a comparison: its run at one depth, and the depth that the planner finds best."""
    target = target_card(replace(cfg, card=name))
    depth = cfg.depth or COMPARED_DEPTH
    rows, _ = planned(cfg, target, sorted({*DEPTHS, depth}))
    row = next(row for row in rows if row.depth == depth)
    best = next((row for row in rows if row.best), None)
    cards = f"{target.budget.num_cards} × " if target.budget.num_cards > 1 else ""
    tokens, bpb, hours = (cells(row)[i] for i in (6, 9, 11))
    auto = ("none fits", "-") if best is None else (f"d{best.depth}", f"{best.bpb:.3f}")
    return [f"{cards}{target.name}", target.budget.dtype, f"d{depth}", cells(row)[4], tokens, bpb, hours, *auto]


def short_micro_batch(micro: MicroBatch) -> str:
    """Rows, and c for activation checkpointing, l for smaller chunks of the loss."""
    return f"{micro.rows}{'l' if micro.loss_chunk_bytes else ''}{'c' if micro.activation_checkpointing else ''}"


def cells(row: Row) -> list[str]:
    """A line of the table."""
    head = [f"d{row.depth}", f"{row.parameters / 1e6:.1f}M", f"{row.flops_per_token:.3g}"]
    if row.micro_batch is None:
        return [*head, "none", f"{row.memory_bytes / 2**30:.1f} GiB", *["-"] * 7]
    assert row.tokens is not None  # and so is everything else
    return [
        *head,
        short_micro_batch(row.micro_batch),
        f"{row.memory_bytes / 2**30:.1f} GiB",
        f"{row.tokens_per_second:,.0f}",
        f"{row.tokens / 1e6:,.0f}M",
        f"{row.steps:,}",
        f"{row.tokens_per_parameter:.1f}",
        f"{row.bpb:.3f}",
        f"{row.disk_bytes / 1e9:.1f} GB",
        f"{row.chinchilla_hours:,.0f}",
    ]


def markdown(columns: Sequence[str], rows: list[list[str]]) -> str:
    """The table for a document."""
    lines = [f"| {' | '.join(row)} |" for row in [list(columns), *rows]]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def show(title: str, columns: Sequence[str], rows: list[list[str]], styles: Sequence[str]) -> None:
    """The table for a terminal, each row in its style."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*row, style=style)
    console = Console()
    Console(width=max(console.width, 140)).print(table)


def notes(cfg: Config, target: Target, rows: list[Row]) -> list[str]:
    """What the table means, and how sure it is."""
    best = next((row for row in rows if row.best), None)
    micro = best.micro_batch if best else None
    lines = [
        target.how + " Communication, evaluation and checkpoints are not counted.",
        f"Bits per byte: nanochat/plan/scaling_law.py, for {cfg.dataset}, ± {ERROR:.0%} (root mean square over "
        "published runs that the law had not seen); a run of a few hundred steps ends about 10 % higher."
        + {
            "small": " For the small recipe the law of modern stands in.",
            "portable": " For portable the law of modern stands in, some of whose switches it lacks.",
        }.get(cfg.recipe, ""),
    ]
    if best is None or micro is None:
        return [
            *lines,
            f"None of these fits into {target.budget.memory_bytes / 2**30:.1f} GiB: lower --depth or --vocab_size.",
        ]
    if (best.steps or 0) < FEW_STEPS:
        lines.append(
            f"d{best.depth} makes only {best.steps} steps of {best.total_batch_size:,} tokens: a smaller "
            "--total_batch_size, or --recipe=small, which chooses it by the horizon, makes more of the time."
        )
    if len(rows) > 1:
        flags = f"--depth={best.depth} --hours={cfg.hours:g} --dataset={cfg.dataset} --recipe={cfg.recipe}"
        flags += " --activation_checkpointing" if micro.activation_checkpointing else ""
        pattern = " --pattern=runtimes" if cfg.recipe == "portable" else ""
        tokenizer = f"--dataset={cfg.dataset} --vocab_size={best.vocab_size}{pattern}"
        first = f"python -m scripts.tok_train {tokenizer}, then " if cfg.vocab_size == "auto" else ""
        lines.append(f"Best for {cfg.hours:g} hours: d{best.depth}. {first}python -m scripts.base_train {flags}")
    return lines


def main(cfg: Config) -> None:
    """Plan and print."""
    if cfg.card == "list":
        print(card_table())
        return
    if "," in (cfg.card or ""):
        compare_cards(cfg)
        return
    target = target_card(cfg) if cfg.card is not None else target_here(cfg)
    budget = target.budget
    rows, of_vocabularies = planned(cfg, target, [cfg.depth] if cfg.depth else DEPTHS)
    budget = replace(budget, vocab_size=rows[0].vocab_size)
    if cfg.json:
        result = {"target": target.name, "budget": asdict(budget), "rows": [asdict(row) for row in rows]}
        if cfg.card is None:
            result["machine"] = inspect_machine()
        print(json.dumps(result))
        return
    cards = f"{budget.num_cards} × " if budget.num_cards > 1 else ""
    title = f"{cards}{target.name}: {setting(cfg, budget.vocab_size)}, {budget.dtype}"
    if cfg.markdown:
        marked = [[f"**{cell}**" for cell in cells(row)] if row.best else cells(row) for row in rows]
        print(f"{title}\n\n{markdown(COLUMNS, marked)}\n")
    else:
        styles = ["bold green" if row.best else "dim" if row.micro_batch is None else "" for row in rows]
        show(title, COLUMNS, [cells(row) for row in rows], styles)
    print("\n".join(notes(cfg, target, rows)))
    if cfg.vocab_size == "auto":
        others = "; ".join(f"{row.vocab_size:,} d{row.depth} {row.bpb:.3f}" for row in of_vocabularies)
        print(f"The best depth and bits per byte of each vocabulary: {others or 'none fits'}.")


def setting(cfg: Config, vocab_size: int | str) -> str:
    """What all rows of a table share."""
    return f"{cfg.hours:g} hours, {cfg.recipe} recipe, vocabulary {vocab_size}, context {cfg.max_seq_len}"


def compare_cards(cfg: Config) -> None:
    """Print one line per card."""
    if cfg.json:
        raise ValueError("--json plans one --card: leave out the others")
    names = [name.strip() for name in (cfg.card or "").split(",") if name.strip()]
    if not names:
        raise ValueError(f"--card={cfg.card} names no card: --card=list shows all")
    rows = [card_cells(cfg, name) for name in names]
    title = setting(cfg, cfg.vocab_size or VOCAB_SIZE)
    if cfg.markdown:
        print(f"{title}\n\n{markdown(CARD_COLUMNS, rows)}\n")
    else:
        show(title, CARD_COLUMNS, rows, [""] * len(rows))
    print(f"Planned from data sheets, not measured; bits per byte ± {ERROR:.0%}. How one is planned: --card t4.")


if __name__ == "__main__":
    run_script(main, Config)
