"""The stages of the pipeline: which commands a profile stands for, and what each result depends on."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat.checkpoint.format import DAMAGED, META_FILE, read_meta, saved_steps, step_folder, weights_hash
from nanochat.data.chat_files import CHATS_VERSION, HUB, is_unread
from nanochat.data.chats import ChatSource, is_own_chats
from nanochat.data.inventory import Inventory
from nanochat.data.shards import MANIFEST, load_manifest
from nanochat.data.text_walk import NO_TEXT, ReadOptions, files_below, find_texts, fingerprint_of
from nanochat.data.worlds import shipped_topics
from nanochat.env import is_system_error
from nanochat.files import sha256_file
from nanochat.pipeline.profiles import Profile, Settings
from nanochat.recipe import DEFAULT_RECIPE
from nanochat.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Why is the sky blue?"
SMALL_FILE_BYTES = 1_000_000
# Of 60 reworded questions about 200 own chats a model that went on from the demo's base answered 55 right after 50
# steps (20 passes), 43 after 310 (124 passes): dev/LOG.md, "what strangers bring, third round". What it had known
# before was not asked.
GOING_ON_EPOCHS = 20
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
READY_SHARDS = 8  # as many as the tokenizer reads; the others arrive while it learns and the base model trains


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
    except (*DAMAGED, IndexError) as error:
        if is_system_error(error):  # the run may be whole: hours must not be trained again for it
            raise
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
    """Changes when a file, or one in a folder, changes (small files by content, large ones by size and time).

    Folders are gone through as they are read: linked ones too, without hidden files.
    """
    digest = hashlib.sha256()
    found = [(".", path)]
    if path.is_dir():
        found = [(f.shown, Path(f.path)) for f in files_below(path, Inventory(""), unread=is_unread)]
    for name, file in found:
        if file.is_file() and file.suffix.lower() not in NO_TEXT:
            stat = file.stat()
            large = stat.st_size > SMALL_FILE_BYTES
            content = f"{stat.st_size} {stat.st_mtime_ns}".encode() if large else file.read_bytes()
            digest.update(f"{name}\n".encode("utf-8", "surrogateescape") + hashlib.sha256(content).digest())
    return digest.hexdigest()


def texts_fingerprint(path: Path) -> str:
    """The same of the texts that are read of a file or folder, and of how they are read."""
    options = ReadOptions.from_env()
    return fingerprint_of(find_texts(path, options, Inventory(str(path))), options)


def chats_identity(chat_data: str) -> tuple[str, ...]:
    """What the user's conversations depend on: the files, what was said about them, and how they are read."""
    files = chat_data if chat_data.startswith(HUB) else fingerprint(Path(chat_data))
    return (files, json.dumps(ChatSource.from_env(chat_data).key()), f"version {CHATS_VERSION}")


def world_identity(world: str) -> tuple[str, ...]:
    """What the demo's texts and conversations depend on: the code that draws them, and the tables of the world."""
    names = world.split(",")
    own = [name if shipped_topics(name) is not None else fingerprint(Path(name)) for name in names]
    return (fingerprint(ROOT / "tasks" / "demo"), *own)


# --- from a profile to stages ----------------------------------------------------------------------------------------


def make_stages(profile: Profile, settings: Settings, base_dir: Path, num_shards: int = 0) -> list[Stage]:
    """The stages in their order; `num_shards` is for a public dataset."""
    maker = _Maker(profile, settings)
    stages = [*maker.tokenizer_stages(num_shards), *maker.base_stages(base_dir), *maker.chat_stages()]
    return [*stages, *maker.closing_stages([stage.name for stage in stages])]


class _Maker:
    """Makes the stages of a profile."""

    def __init__(self, profile: Profile, settings: Settings) -> None:
        self.profile, self.settings = profile, settings
        self.tag = f"--model_tag={profile.tag}"
        self.data = f"--data_dir={settings.data_dir}" if settings.data_dir else f"--dataset={profile.dataset}"
        self.has_texts = settings.data_dir is not None or profile.dataset is not None

    def stage(self, name: str, about: str, *flags: str, module: str = "", **more: Any) -> Stage:
        """A stage with these flags; the profile's come after them, so that they win."""
        flags = (*flags, *self.profile.flags.get(name, ()))
        return Stage(name=name, about=about, module=module or f"scripts.{name}", flags=flags, **more)

    def ranked(self, name: str, about: str, *flags: str, **more: Any) -> Stage:
        """A stage of as many processes as the profile has."""
        return self.stage(name, about, *flags, nproc=self.profile.nproc, **more)

    def training(self, name: str, about: str, *flags: str, **more: Any) -> Stage:
        """A stage that leaves checkpoints, and can resume an unfinished run of itself."""
        run, saved = f"--run={self.settings.wandb_run}", f"{STAGES[name].folder}/{self.profile.tag}/step_*/{META_FILE}"
        return self.ranked(name, about, *flags, unmarked_flags=(run,), output=saved, trains=True, **more)

    def horizon(self, stage: str) -> tuple[str, ...]:
        """How long a stage trains; nothing leaves it to the script."""
        hours = self.profile.stage_hours(stage)
        if hours is not None:
            return (f"--hours={hours:.4g}",)
        return (f"--num_iterations={self.profile.steps[stage]}",) if stage in self.profile.steps else ()

    def rows(self, rows: int) -> str:
        """Sequences per forward pass of a stage that trains: on a card what fits into it."""
        return f"--device_batch_size={'auto' if self.profile.needs_cards else rows}"

    def data_stage(self, num_shards: int) -> Stage | None:
        """The stage that brings the text, None where the user has brought it."""
        dataset, needs = self.profile.dataset, ("report_reset",)
        if dataset is None:
            return None
        if dataset == "demo":
            about, output = f"writes the texts of the world {self.profile.world}", "base_data/demo/*.parquet"
            world = world_identity(self.profile.world)
            return self.stage("data", about, module="tasks.demo", needs=needs, inputs=world, output=output)
        return self.stage(
            "data",
            f"downloads {num_shards} shards of {dataset}, and one for validation",
            *(f"--num_files={num_shards}", f"--source={dataset}"),
            module="nanochat.dataset",
            unmarked_flags=(f"--ready={READY_SHARDS}",),
            needs=needs,
            output=f"base_data/{dataset}/{MANIFEST}",
        )

    def tokenizer_stages(self, num_shards: int) -> list[Stage]:
        """New report, data, tokenizer."""
        profile, own = self.profile, self.settings.data_dir
        data = self.data_stage(num_shards)
        train = self.stage(
            "tok_train",
            f"trains a tokenizer of {profile.vocab_size:,} tokens",
            *(f"--vocab_size={profile.vocab_size}", self.data),
            *(["--pattern=runtimes"] if profile.recipe == "portable" else []),  # what other programs know by name
            needs=("report_reset", *(["data"] if data else [])),
            inputs=(texts_fingerprint(own),) if own else (),
            output="tokenizer/tokenizer.json",  # the lengths of its tokens follow from it
        )
        first = [*([data] if data else []), self.import_stage() if profile.base else train]
        # A reset forgets every section of the report, so it must come only when all stages run again: its key follows
        # from those of the first stages, on which every other builds.
        keys, module = tuple(stage.key for stage in first), "nanochat.report"
        reset = self.stage("report_reset", "starts a new report", "reset", module=module, inputs=keys, output="report")
        about = "measures how well the tokenizer compresses"
        measure = self.stage("tok_eval", about, self.data, needs=(first[-1].name,))
        return [reset, *first, *([measure] if self.has_texts else [])]

    def import_stage(self) -> Stage:
        """The stage that copies the model to go on from, with its tokenizer; without texts it has the run's own tag."""
        base = self.profile.base
        assert base is not None
        tag = base.tag if self.has_texts else self.profile.tag
        return self.stage(
            "base_import",
            f"takes the model {base.given}, with its tokenizer",
            *(f"--path={base.given}", "--source=base", f"--model_tag={tag}", "--replace"),
            module="scripts.import_hf",
            needs=("report_reset",),
            inputs=(base.fingerprint,),
            output=f"{STAGES['base_train'].folder}/{tag}/step_*/{META_FILE}",
        )

    def base_stages(self, base_dir: Path) -> list[Stage]:
        """Base training and its two evaluations."""
        profile, base = self.profile, self.profile.base
        if not self.has_texts:
            return []
        shape = [f"--depth={profile.depth}", f"--max_seq_len={profile.max_seq_len}"]
        shape += [] if profile.aspect_ratio == 64 else [f"--aspect_ratio={profile.aspect_ratio}"]
        shape += [f"--{name}={value}" for name, value in profile.switches.items()]
        # A bundle that is named is never downloaded: the demo stays offline by naming the default place.
        bundle = (f"--eval_bundle={base_dir / 'eval_bundle'}",) if profile.dataset == "demo" else ()
        train = self.training(
            "base_train",
            f"teaches {f'a model of {profile.depth} layers' if base is None else base.given} to continue text",
            *(shape if base is None else (f"--init_from={base.tag}",)),
            self.rows(profile.device_batch_size),
            *([] if profile.base_batch_size is None else [f"--total_batch_size={profile.base_batch_size}"]),
            *(self.data, *self.horizon("base_train"), f"--dtype={profile.dtype}", self.tag),
            *([] if profile.recipe == DEFAULT_RECIPE else [f"--recipe={profile.recipe}"]),
            needs=("tok_train" if base is None else "base_import",),
        )
        loss = self.ranked(
            "base_loss",
            "measures bits per byte on training and validation text",
            *(f"--device_batch_size={profile.device_batch_size}", self.data, self.tag),
            needs=("base_train",),
        )
        core = self.ranked(
            "base_eval",
            "measures CORE, the benchmark of base models",
            *("--skip_if_missing", *bundle, self.tag),
            needs=("base_train",),
        )
        return [train, loss, core]

    def chat_stages(self) -> list[Stage]:
        """Mid-training, SFT, and an evaluation after each."""
        profile, chats = self.profile, self.profile.chat_data
        data: tuple[str, ...] = (f"--chat_data={chats}",) if chats else ()
        if profile.base and is_own_chats(chats):
            data += (f"--max_epochs={GOING_ON_EPOCHS}",)
        if chats == "none":
            return []
        inputs = (
            world_identity(profile.world) if chats == "demo" else chats_identity(chats) if is_own_chats(chats) else ()
        )

        def train(name: str, about: str, rows: int, tokens: int, needs: str) -> Stage:
            flags = (self.rows(rows), f"--total_batch_size={tokens}", *data, *self.horizon(name), self.tag)
            return self.training(name, about, *flags, needs=(needs,), inputs=inputs)

        def evaluate(source: str, needs: str) -> Stage:
            name, about = f"chat_eval_{source}", f"measures how well the {source} model answers"
            return self.ranked(name, about, "-i", source, self.tag, module="scripts.chat_eval", needs=(needs,))

        mid_rows, mid_tokens = profile.device_batch_size, profile.mid_batch_size
        if not self.has_texts:  # straight to the answers
            name, rows, tokens = "chat_sft", profile.sft_rows, profile.sft_batch_size
            sft = train(name, "teaches it to answer", rows, tokens, "base_import")
            return [replace(sft, flags=(*sft.flags, "--source=base")), evaluate("sft", name)]
        return [
            train("mid_train", "teaches it conversations and tools", mid_rows, mid_tokens, "base_train"),
            evaluate("mid", "mid_train"),
            train("chat_sft", "teaches it to answer", profile.sft_rows, profile.sft_batch_size, "mid_train"),
            evaluate("sft", "chat_sft"),
        ]

    def closing_stages(self, before: list[str]) -> list[Stage]:
        """The report, and a question to the finished model."""
        report = self.stage(
            "report",
            "writes the report of all stages",
            "generate",
            module="nanochat.report",
            needs=tuple(before),
            output="report/report.md",
        )
        source, newest = ("sft", "chat_sft") if "chat_sft" in before else ("base", "base_train")
        ask = ("-i", source, "-p", QUESTION, "-t", "0", self.tag)
        about = f"asks the model: {QUESTION}"
        return [report, self.stage("answer", about, *ask, module="scripts.chat_cli", needs=(newest,))]


def ask_instead(stage: Stage, question: str) -> Stage:
    """The stage that asks the finished model, with another question; other stages as they are."""
    if stage.name != "answer":
        return stage
    flags = tuple(question if flag == QUESTION else flag for flag in stage.flags)
    return replace(stage, flags=flags, about=f"asks the model: {question}")


def expected_seconds(profile: Profile, stage: str) -> float | None:
    """How long a stage will take: by the clock it gets, else as measured, else None (not known)."""
    hours = profile.stage_hours(stage)
    return profile.seconds.get(stage) if hours is None else hours * 3600
