"""Measure a base model on text: bits per byte on training and validation text, and samples of what it writes.

python -m scripts.base_loss
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

from nanochat.checkpoint_manager import load_model
from nanochat.common import Compute, print0, print_banner, setup_compute
from nanochat.config import Runtime, run_script, short
from nanochat.dataset import Corpus, open_corpus, prepare_corpus
from nanochat.generate.fast_decode import Weights
from nanochat.generate.rounding import Decoded
from nanochat.gpt import GPT
from nanochat.loss_eval import corpus_bpb
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.samples import base_prompts, sample_texts

DECODED_TOKENS, DECODED_ROWS = 16384, 4  # a token at a time is slow; a cache for more rows may be large


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of a loss evaluation."""

    runtime: Runtime = field(default_factory=Runtime)
    device_batch_size: int = 32
    """Sequences per forward pass and process."""
    eval_tokens: int = 20 * 524288
    """Most tokens of each split to read (all of it when it is smaller)."""
    data_dir: str | None = None
    """Folder (or file) of texts of any kind (txt, jsonl, csv, html, pdf, parquet …); default: what the dataset
    step prepared."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo."""
    weights: Literal["auto", "int8", "int4"] = "auto"
    """Measure also what decoding with such weights (CPU only) costs, on the first part of the validation text."""
    model_tag: Annotated[str | None, short("-g")] = None
    """Name of the checkpoint folder; default: the deepest model."""
    step: Annotated[int | None, short("-s")] = None
    """Step of the checkpoint; default: the last."""

    def __post_init__(self) -> None:
        if self.device_batch_size < 1:
            raise ValueError(f"--device_batch_size must be at least 1, got {self.device_batch_size}")


def split_bpb(
    cfg: Config, split: str, model: GPT, corpus: Corpus, tokenizer: RustBPETokenizer, compute: Compute
) -> float:
    """Bits per byte on the first tokens of a split, the same for every batch size and number of ranks."""
    sequence_len = model.config.sequence_len
    rows = cfg.eval_tokens // sequence_len
    if rows < 1:
        raise ValueError(
            f"--eval_tokens={cfg.eval_tokens} is less than one sequence of {sequence_len} tokens: raise it"
        )
    if split == "train":
        # The training stream never ends: read about as much of it as the split holds, at most.
        rows = min(rows, max(1, corpus.num_bytes(split) // (4 * sequence_len)))
    return corpus_bpb(model, corpus, tokenizer, compute, split=split, rows=cfg.device_batch_size, max_rows=rows)


def decoded_bpb(decoded: Decoded, corpus: Corpus, tokenizer: RustBPETokenizer, compute: Compute) -> float:
    """Bits per byte of a decoder on the first tokens of the validation text."""
    rows = max(1, DECODED_TOKENS // decoded.config.sequence_len)
    stand_in = cast(GPT, decoded)
    return corpus_bpb(stand_in, corpus, tokenizer, compute, split="val", rows=DECODED_ROWS, max_rows=rows)


def main(cfg: Config) -> None:
    """Measure both splits, print samples, report."""
    print_banner()
    with setup_compute(cfg.runtime) as compute:
        model, tokenizer, meta = load_model("base", compute.device, "eval", cfg.model_tag, cfg.step)
        kinds: tuple[Weights, ...] = (cfg.weights, "auto") if cfg.weights != "auto" else ()
        decoded = [Decoded(model, compute.precision, kind) for kind in kinds]  # a model that cannot is refused first
        corpus = open_corpus(prepare_corpus(cfg.dataset, cfg.data_dir, cfg.text_column))
        bpb = {}
        for split in ("train", "val"):
            bpb[f"{split} bpb"] = split_bpb(cfg, split, model, corpus, tokenizer, compute)
            print0(f"{split} bpb: {bpb[f'{split} bpb']:.4f}")
        if cfg.weights != "auto":
            rounded, exact = (decoded_bpb(part, corpus, tokenizer, compute) for part in decoded)
            cost = rounded - exact
            bpb[f"val bpb that {cfg.weights} weights cost"] = cost
            print0(f"{cfg.weights} weights cost {cost:+.4f} bpb on the first tokens of val, {DECODED_TOKENS:,} at most")
        if compute.rank == 0:
            samples = sample_texts(model, tokenizer, compute, base_prompts(corpus))
            for text in samples:
                print0(f"  {text!r}")
            get_report().log(
                section="Base model loss",
                data=[
                    {"step": meta["step"], "corpus": corpus.name, "most tokens per split": cfg.eval_tokens},
                    bpb,
                    "Samples (greedy):",
                    "```\n" + "\n".join(repr(text).replace("```", "'''") for text in samples) + "\n```",
                ],
                metrics=bpb,
            )


if __name__ == "__main__":
    run_script(main, Config)
