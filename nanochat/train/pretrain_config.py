"""The settings of a pretraining run: its flags, their help texts, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_type_hints

from nanochat.config import positive
from nanochat.dataloader import Mode
from nanochat.gpt import HEAD_SIZE, GPTConfig
from nanochat.recipe import DEFAULT_RECIPE
from nanochat.train.stage import RunConfig


def _with_flags_of_the_model(cls: type) -> type:
    """Give a class every switch of `GPTConfig` as an optional field, with its type and help text."""
    types, switches = get_type_hints(GPTConfig), [f for f in fields(GPTConfig) if f.metadata]
    optional = [(f.name, types[f.name] | None, field(default=None, metadata=f.metadata)) for f in switches]
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return make_dataclass(cls.__name__, optional, bases=(cls,), namespace=names, frozen=True, kw_only=True)


@_with_flags_of_the_model
class Architecture:
    """The model's switches; each is the recipe's unless it is given."""

    recall: int | None

    def given(self) -> dict[str, Any]:
        """The settings that are not left to the recipe."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """The model, the text, the horizon and the rates of a pretraining run."""

    architecture: Architecture = field(default_factory=Architecture)
    recipe: Literal["small", "portable", "classic", "modern"] = DEFAULT_RECIPE  # type: ignore[assignment]
    """Preset of model and optimizer: small is for one card or a CPU and some hours, portable the same without what
    llama.cpp and others lack, classic is nanochat of December 2025, modern of July 2026; given flags go before it."""
    init_from: str | None = None
    """Go on from this model: the tag of a base model, or the folder of a checkpoint. Its shape and context stay."""
    depth: int = 20
    """Layers; the width follows: aspect_ratio × depth channels, rounded up to whole heads."""
    aspect_ratio: int = 64
    """Channels per layer."""
    head_size: int = HEAD_SIZE
    """Channels of an attention head."""
    max_seq_len: int = 2048
    """Context length in tokens."""
    vocab_size: int | None = None
    """Vocabulary to plan for with --dry_run before a tokenizer exists; a run takes its tokenizer's."""
    data_dir: str | None = None
    """Folder or file of texts of any kind; default: what the dataset step prepared."""
    text_column: str | None = None
    """Column or field with the text; default $TEXT_COLUMN, else found by itself."""
    dataset: str | None = None
    """Public source (climbmix, fineweb_edu, hf:owner/name) or demo."""
    packing: Mode = "stream"
    """Documents to sequences: stream (one after the other, as in classic), bestfit (each begins one, ends cropped)."""
    separate_documents: bool | None = None
    """Attention stays inside a document, where a sequence holds several; default: False."""
    skip_bad_shards: bool = False
    """Pass over shards that can't be read, with a warning, instead of stopping."""
    token_cache: bool = False
    """Use the shards that `python -m scripts.tok_cache` has tokenized before."""
    target_flops: float | None = None
    """Train for this many FLOPs."""
    target_param_data_ratio: float | None = None
    """Train on this many tokens per parameter; default: 20 per parameter (classic, Chinchilla), 12 per parameter of
    matrices and lm_head (small, modern)."""
    total_batch_size: int | None = None
    """Tokens per optimizer step, over all processes and micro-batches; default: 524288 (classic), by the horizon
    (small, modern)."""
    embedding_lr: float | None = None
    """Learning rate of the embedding (AdamW), × (width/768)^-½; default: 0.2 (small, classic), 0.3 by batch
    (modern)."""
    unembedding_lr: float | None = None
    """Learning rate of lm_head (AdamW), × (width/768)^-½; default: 0.004 (small, classic), 0.008 by batch
    (modern)."""
    matrix_lr: float | None = None
    """Learning rate of the blocks' matrices (Muon); default: 0.03 (small), 0.02 (classic), 0.02 by batch (modern)."""
    scalar_lr: float | None = None
    """Learning rate of the switches' scalars (AdamW); default: 0.1 (small), 0.5 (classic), 0.5 by batch (modern)."""
    weight_decay: float | None = None
    """Decoupled weight decay; default: 0 (small, classic), 0.28 by batch and horizon (modern)."""
    dropout: float | None = None
    """Share of what attentions and MLPs add to the stream that is zeroed in training; default: 0."""
    keep_best: bool | None = None
    """Give the finished model the weights of the best evaluation; default: where text is read more than once, or where
    it isn't known how often."""
    mean_weights: bool | None = None
    """Evaluate a mean of the latest weights too, and keep it where it is better; default: where the best weights are
    kept and text is read more than four times."""
    lr_scale: float | None = None
    """Factor on all learning rates; default: 1, with --init_from 0.3."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises; default: 0 (small, classic), 40 (modern; fewer in a short
    run)."""
    warmdown_ratio: float | None = None
    """Share of the run in which the learning rate falls to its end; default: 0.2 (classic), 0.65 (small, modern)."""
    final_lr_frac: float | None = None
    """Learning rate at the end, as a share of the full one; default: 0 (small, classic), 0.05 (modern)."""
    short_rows_ratio: float = 0.0
    """Share of the run in which sequences are cut into shorter ones: first quarters, then halves."""
    activation_checkpointing: bool = False
    """Keep no activations inside the layers but compute them again: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig, PretrainSettings):
    """Settings of a pretraining run (in this order: --help begins with the model)."""

    eval_every: int = 250
    """Steps between evaluations of the validation set (0: only at the end)."""
    eval_tokens: int = 20 * 524288
    """Validation tokens per evaluation (fewer when the validation set is smaller)."""
    sample_every: int = 2000
    """Steps between printed samples (0: only at the end)."""
    model_tag: str | None = None
    """Name of the checkpoint folder; default d<depth>, or that of the model it goes on from and -more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"--depth must be at least 1, got {self.depth}")
        if self.num_iterations == 0:
            raise ValueError("--num_iterations must be positive, got 0 (leave it out, or -1, for another horizon)")
        if self.target_param_data_ratio is not None and self.target_param_data_ratio == 0:
            raise ValueError("--target_param_data_ratio must be positive, got 0")
        if self.mean_weights and self.keep_best is False:
            raise ValueError("--mean_weights is for the weights that --keep_best keeps: leave --keep_best=False out")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.short_rows_ratio <= 1:
            raise ValueError(f"--short_rows_ratio must be from 0 to 1, got {self.short_rows_ratio}")
        if self.short_rows_ratio and self.max_seq_len % 4:
            raise ValueError(
                f"--short_rows_ratio cuts sequences into quarters, and --max_seq_len={self.max_seq_len} has none"
            )

    @property
    def tag(self) -> str:
        """Name of the checkpoint folder."""
        return self.model_tag or f"d{self.depth}"

    @property
    def seconds(self) -> float | None:
        """The time to train in, where that is the horizon: a number of steps goes before it."""
        return None if self.hours is None or positive(self.num_iterations) else self.hours * 3600
