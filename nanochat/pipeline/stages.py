"""The stages of the pipeline: which commands a profile stands for, and what each result depends on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint.format import DAMAGED, META_FILE, read_meta, saved_steps, step_folder, weights_hash
from nanochat.data.shards import MANIFEST, load_manifest
from nanochat.data.text_files import COMPRESSIONS, KINDS
from nanochat.files import sha256_file
from nanochat.pipeline.profiles import MID_HOURS, SFT_HOURS, Profile, Settings
from nanochat.recipe import DEFAULT_RECIPE
from nanochat.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Why is the sky blue?"
SMALL_FILE_BYTES = 1_000_000
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
READY_SHARDS = 8  # as many as the tokenizer reads; the others arrive while it learns and the base model trains
TEXT_SUFFIXES = (*KINDS, *COMPRESSIONS, ".py")
HOURS_SHARE = {"base_train": 1.0, "mid_train": MID_HOURS, "chat_sft": SFT_HOURS}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process of the pipeline."""

    name: str
    about: str
    module: str
    flags: tuple[str, ...] = ()
    unmarked_flags: tuple[str, ...] = ()
    """Flags that don't change the result: they don't count for the mark."""
    nproc: int = 1
    needs: tuple[str, ...] = ()
    """The stages it builds on."""
    inputs: tuple[str, ...] = ()
    """Whatever else its result depends on, as text."""
    output: str | None = None
    """A glob under the base dir that its result must match."""
    trains: bool = False
    """Whether it can go on with an unfinished run of itself."""

    @property
    def key(self) -> str:
        """A hash of all that the result depends on."""
        parts = [self.module, self.nproc, self.flags, self.inputs]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def command(self, resume: bool = False) -> list[str]:
        """What to run. A training stage goes on with its unfinished run if `resume`, else it starts over."""
        runner = ["-m", self.module]
        if self.nproc > 1:
            # Without `--` torchrun takes our --run for an abbreviation of its own --run-path.
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
            runner = [*torchrun, "-m", "--", self.module]
        resuming = [f"--resume={'auto' if resume else 'never'}"] if self.trains else []
        return [sys.executable, *runner, *self.flags, *self.unmarked_flags, *resuming]

    def result(self, base_dir: Path) -> str | None:
        """A hash of what it has left, "" if it leaves nothing; None if that is not there, or not finished."""
        if self.output is None:
            return ""
        found = sorted(base_dir.glob(self.output))
        if not found:
            return None
        if found[-1].name == META_FILE:
            return _checkpoint_hash(found[-1].parent.parent)
        if found[-1].name == MANIFEST:
            return _corpus_hash(found[-1].parent)
        lines = [f"{path.relative_to(base_dir)} {_content_hash(path)}\n" for path in found]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _checkpoint_hash(folder: Path) -> str | None:
    """The hash of a finished run's weights. Weights only: the time that a run took does not matter to later stages."""
    try:
        newest = step_folder(folder, saved_steps(folder)[-1])
        return weights_hash(newest) if read_meta(newest)["complete"] else None
    except (*DAMAGED, IndexError):
        return None


def _corpus_hash(folder: Path) -> str | None:
    """The hash of a corpus's list of shards, the same while they arrive; None if those of a start are not there."""
    try:
        manifest = load_manifest(folder)
    except ValueError:
        return None
    if manifest is None:
        return None
    needed = [*manifest.validation, *manifest.train[:READY_SHARDS]]
    if not all((folder / entry.name).exists() for entry in needed):
        return None
    return hashlib.sha256(manifest.identity().encode()).hexdigest()


def _content_hash(path: Path) -> str:
    """The hash of a file, of a large one by its size and SAMPLES blocks of it; a folder only has to be there."""
    if path.is_dir():
        return "folder"
    size = path.stat().st_size
    if size <= SAMPLES * SAMPLE_BYTES:
        return sha256_file(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for i in range(SAMPLES):
            f.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Changes when a file, or a text in a folder, changes (small files by content, large ones by size and time)."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix in TEXT_SUFFIXES:
            stat = file.stat()
            large = stat.st_size > SMALL_FILE_BYTES
            content = f"{stat.st_size} {stat.st_mtime_ns}".encode() if large else file.read_bytes()
            digest.update(f"{file.name}\n".encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def demo_world() -> tuple[str, ...]:
    """What the demo's texts and conversations depend on: the code that draws them, and the tables of the world."""
    code = ROOT / "tasks" / "demo"
    return (fingerprint(code), fingerprint(Path(os.environ.get("NANOCHAT_WORLD_DIR") or code / "world").expanduser()))


# --- from a profile to stages ----------------------------------------------------------------------------------------


def make_stages(profile: Profile, settings: Settings, base_dir: Path, num_shards: int = 0) -> list[Stage]:
    """The stages in their order; `num_shards` is for a public dataset."""
    tokenizer = tokenizer_stages(profile, settings, num_shards)
    stages = [*tokenizer, *base_stages(profile, settings, base_dir), *chat_stages(profile, settings)]
    return [*stages, *closing_stages(profile, stages)]


def data_flags(profile: Profile, settings: Settings) -> tuple[str, ...]:
    """Which corpus the scripts read."""
    return (f"--data_dir={settings.data_dir}",) if settings.data_dir else (f"--dataset={profile.dataset}",)


def horizon(profile: Profile, stage: str) -> tuple[str, ...]:
    """How long a stage trains; nothing leaves it to the script."""
    if profile.hours is not None:
        return (f"--hours={profile.hours * HOURS_SHARE[stage]:.4g}",)
    return (f"--num_iterations={profile.steps[stage]}",) if stage in profile.steps else ()


def checkpoint_glob(profile: Profile, stage: str) -> str:
    """What a finished training stage has left."""
    return f"{STAGES[stage].folder}/{profile.tag}/step_*/{META_FILE}"


def data_stage(profile: Profile, num_shards: int) -> Stage | None:
    """The stage that brings the text, None where the user has brought it."""
    if profile.dataset is None:
        return None
    if profile.dataset == "demo":
        return Stage(
            name="data",
            about="writes the texts of the demo world",
            module="tasks.demo",
            flags=profile.flags.get("data", ()),
            needs=("report_reset",),
            inputs=demo_world(),
            output="base_data/demo/*.parquet",
        )
    return Stage(
        name="data",
        about=f"downloads {num_shards} shards of {profile.dataset}, and one for validation",
        module="nanochat.dataset",
        flags=(f"--num_files={num_shards}", f"--source={profile.dataset}"),
        unmarked_flags=(f"--ready={READY_SHARDS}",),
        needs=("report_reset",),
        output=f"base_data/{profile.dataset}/{MANIFEST}",
    )


def tokenizer_stages(profile: Profile, settings: Settings, num_shards: int) -> list[Stage]:
    """New report, data, tokenizer."""
    data = data_stage(profile, num_shards)
    train = Stage(
        name="tok_train",
        about=f"trains a tokenizer of {profile.vocab_size:,} tokens",
        module="scripts.tok_train",
        flags=(
            f"--vocab_size={profile.vocab_size}",
            *data_flags(profile, settings),
            *profile.flags.get("tok_train", ()),
        ),
        needs=("report_reset", *(["data"] if data else [])),
        inputs=(fingerprint(settings.data_dir),) if settings.data_dir else (),
        output="tokenizer/*",
    )
    first = [*([data] if data else []), train]
    reset = Stage(
        name="report_reset",
        about="starts a new report",
        module="nanochat.report",
        flags=("reset",),
        # A reset forgets every section, so it comes only when all stages run again.
        inputs=tuple(stage.key for stage in first),
        output="report",
    )
    evaluate = Stage(
        name="tok_eval",
        about="measures how well the tokenizer compresses",
        module="scripts.tok_eval",
        flags=(*data_flags(profile, settings), *profile.flags.get("tok_eval", ())),
        needs=("tok_train",),
    )
    return [reset, *first, evaluate]


def base_stages(profile: Profile, settings: Settings, base_dir: Path) -> list[Stage]:
    """Base training and its two evaluations."""
    data, tag = data_flags(profile, settings), f"--model_tag={profile.tag}"
    rows = f"--device_batch_size={profile.device_batch_size}"
    # A bundle that is named is never downloaded: the demo stays offline by naming the default place.
    bundle = (f"--eval_bundle={base_dir / 'eval_bundle'}",) if profile.dataset == "demo" else ()
    train = Stage(
        name="base_train",
        about=f"teaches a model of {profile.depth} layers to continue text",
        module="scripts.base_train",
        flags=(
            f"--depth={profile.depth}",
            f"--max_seq_len={profile.max_seq_len}",
            f"--device_batch_size={'auto' if profile.needs_cards else profile.device_batch_size}",
            *([] if profile.base_batch_size is None else [f"--total_batch_size={profile.base_batch_size}"]),
            *data,
            *horizon(profile, "base_train"),
            f"--dtype={profile.dtype}",
            tag,
            *([] if profile.recipe == DEFAULT_RECIPE else [f"--recipe={profile.recipe}"]),
            *profile.flags.get("base_train", ()),
        ),
        unmarked_flags=(f"--run={settings.wandb_run}",),
        nproc=profile.nproc,
        needs=("tok_train",),
        output=checkpoint_glob(profile, "base_train"),
        trains=True,
    )
    loss = Stage(
        name="base_loss",
        about="measures bits per byte on training and validation text",
        module="scripts.base_loss",
        flags=(rows, *data, tag, *profile.flags.get("base_loss", ())),
        nproc=profile.nproc,
        needs=("base_train",),
    )
    core = Stage(
        name="base_eval",
        about="measures CORE, the benchmark of base models",
        module="scripts.base_eval",
        flags=("--skip_if_missing", *bundle, tag, *profile.flags.get("base_eval", ())),
        nproc=profile.nproc,
        needs=("base_train",),
    )
    return [train, loss, core]


def chat_stages(profile: Profile, settings: Settings) -> list[Stage]:
    """Mid-training, SFT, and an evaluation after each."""
    tag = f"--model_tag={profile.tag}"
    data = (f"--chat_data={profile.chat_data}",) if profile.chat_data else ()
    inputs: tuple[str, ...] = ()
    if profile.chat_data is not None:
        inputs = demo_world() if profile.chat_data == "demo" else (fingerprint(Path(profile.chat_data)),)

    def train(name: str, about: str, rows: int | str, tokens: int, needs: str) -> Stage:
        return Stage(
            name=name,
            about=about,
            module=f"scripts.{name}",
            flags=(
                f"--device_batch_size={rows}",
                f"--total_batch_size={tokens}",
                *data,
                *horizon(profile, name),
                tag,
                *profile.flags.get(name, ()),
            ),
            unmarked_flags=(f"--run={settings.wandb_run}",),
            nproc=profile.nproc,
            needs=(needs,),
            inputs=inputs,
            output=checkpoint_glob(profile, name),
            trains=True,
        )

    def evaluate(name: str, source: str, needs: str) -> Stage:
        return Stage(
            name=name,
            about=f"measures how well the {source} model answers",
            module="scripts.chat_eval",
            flags=("-i", source, tag, *profile.flags.get(name, ())),
            nproc=profile.nproc,
            needs=(needs,),
        )

    mid_about, sft_about = "teaches it conversations and tools", "teaches it to answer"
    rows: int | str = "auto" if profile.needs_cards else profile.device_batch_size
    sft_rows: int | str = "auto" if profile.needs_cards else profile.sft_rows
    return [
        train("mid_train", mid_about, rows, profile.mid_batch_size, "base_train"),
        evaluate("chat_eval_mid", "mid", "mid_train"),
        train("chat_sft", sft_about, sft_rows, profile.sft_batch_size, "mid_train"),
        evaluate("chat_eval_sft", "sft", "chat_sft"),
    ]


def closing_stages(profile: Profile, stages: list[Stage]) -> list[Stage]:
    """The report, and a question to the finished model."""
    report = Stage(
        name="report",
        about="writes the report of all stages",
        module="nanochat.report",
        flags=("generate",),
        needs=tuple(stage.name for stage in stages),
        output="report/report.md",
    )
    answer = Stage(
        name="answer",
        about=f"asks the model: {QUESTION}",
        module="scripts.chat_cli",
        flags=("-i", "sft", "-p", QUESTION, "-t", "0", f"--model_tag={profile.tag}", *profile.flags.get("answer", ())),
        needs=("chat_sft",),
    )
    return [report, answer]


def expected_seconds(profile: Profile, stage: str) -> float | None:
    """How long a stage will take: by the clock it gets, else as measured, else None (not known)."""
    if stage in HOURS_SHARE and profile.hours is not None:
        return profile.hours * 3600 * HOURS_SHARE[stage]
    return profile.seconds.get(stage)
