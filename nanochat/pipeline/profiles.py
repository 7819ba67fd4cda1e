"""Which run fits this machine: the table of profiles, and the settings that a user may change by the environment.

A profile is the whole set of sizes of one run, from tokenizer to SFT. `nanochat.pipeline` turns it into commands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat.config import MOST
from nanochat.data.chat_files import HUB
from nanochat.data.chats import is_own_chats
from nanochat.data.sources import SOURCES
from nanochat.data.worlds import SHIPPED, world_by_hours, world_names
from nanochat.gpt import GPTConfig
from nanochat.ops.recall import in_rust
from nanochat.precision import cpu_has_bf16
from nanochat.recipe import DEFAULT_RECIPE, PRESETS

# Mid-training and SFT get these shares of the hours that base training has, up to these hours.
STAGE_HOURS = {"mid_train": (1 / 3, 1 / 2), "chat_sft": (1 / 6, 1 / 3)}


@dataclass(frozen=True)
class BaseModel:
    """The model that a run goes on from."""

    given: str
    """By the user: a tag, a folder, or a repository of the hub."""
    name: str
    fingerprint: str
    """Changes when its files do."""

    @property
    def tag(self) -> str:
        """Of its copy, from which the run starts."""
        return f"{self.name}-start"


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The sizes of one run. Batches count tokens, padding included."""

    name: str
    about: str
    depth: int
    vocab_size: int
    max_seq_len: int
    device_batch_size: int
    base_batch_size: int | None = None
    """Of base training; None: its recipe's, which may follow from the horizon."""
    mid_batch_size: int
    sft_batch_size: int
    nproc: int = 1
    dataset: str | None
    chat_data: str | None
    """The user's conversations (see data/chats.py), "demo", None for nanochat's own mixture from the hub, or "none"."""
    world: str = SHIPPED
    """What is learned where `dataset` or `chat_data` is "demo": worlds with commas between (see data/worlds.py)."""
    hours: float | None = None
    """Time of base training, mid-training and SFT come on top (`stage_hours`); with `minutes`, of everything."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """Optimizer steps by stage, where the clock does not count; a stage without them takes its script's default."""
    recipe: str = DEFAULT_RECIPE
    """Of base training: model, optimizer and schedule."""
    aspect_ratio: int = 64
    """Channels per layer."""
    switches: Mapping[str, Any] = field(default_factory=dict)
    """More of the model's switches than its recipe's."""
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More flags by stage."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """How long a stage took where it was measured, on 2 CPU cores."""
    step_seconds: float = 0.0
    """How long a step of base training took there."""
    minutes: float | None = None
    """Time of the whole run on a CPU: a faster one takes more `steps` (see chosen.fit_steps), a slower one more time.
    Then HOURS is this time. None: HOURS are those of base training, by the clock."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More environment of the stages (what the user has set goes before)."""
    needs_cards: bool = False
    bfloat16_on_cpu: bool = False
    """Train in bfloat16 on a CPU that multiplies it in hardware: 1.4 times as fast as float32 (see dev/LOG.md)."""
    dtype: str = "auto"
    """The precision of base training; later stages take their model's."""
    base: BaseModel | None = None
    """What it goes on from; then depth, vocabulary and context are those of this model."""

    @property
    def model_config(self) -> GPTConfig:
        """The shape of its model, with the switches of its recipe."""
        switches = {**PRESETS[self.recipe].switches, **self.switches}
        return GPTConfig.from_depth(self.depth, self.vocab_size, self.max_seq_len, self.aspect_ratio, **switches)

    @property
    def tag(self) -> str:
        """Name of the model's checkpoint folders."""
        return f"d{self.depth}" if self.base is None else f"{self.base.name}-own"

    def stage_hours(self, stage: str) -> float | None:
        """How long a stage trains by the clock; None for other stages, and where no hours are set or steps count."""
        if self.hours is None or self.minutes is not None or stage not in ("base_train", *STAGE_HOURS):
            return None
        share, most = STAGE_HOURS.get(stage, (1.0, math.inf))
        return min(self.hours * share, most)

    @property
    def sft_rows(self) -> int:
        """Rows per forward pass of SFT: on cards half as many as before, and no more than its batch has."""
        rows_per_step = self.sft_batch_size // self.max_seq_len // self.nproc
        return max(1, min(self.device_batch_size // (2 if self.needs_cards else 1), rows_per_step))


# The demo: a small world that ships with nanochat, learned in minutes on a CPU. Each stage hands a high learning rate
# to the next, and SFT ends at zero. In this time a narrow model that reads more is better than a wide one.
DEMO = Profile(
    name="demo",
    about="the small world that ships with nanochat, on this CPU, nothing is downloaded",
    depth=4,
    aspect_ratio=32,
    switches={"head_size": 64},
    vocab_size=4096,
    max_seq_len=256,
    device_batch_size=32,
    base_batch_size=8192,
    mid_batch_size=8192,
    sft_batch_size=8192,
    dataset="demo",
    chat_data="demo",
    bfloat16_on_cpu=True,
    recipe="portable",  # what people show around should open anywhere
    steps={"base_train": 120, "mid_train": 350, "chat_sft": 330},
    flags={
        "tok_eval": ("--no-compare",),
        "base_train": (
            "--eval_every=0",
            "--eval_tokens=8192",
            "--sample_every=0",
            "--warmdown_ratio=0.2",
            "--final_lr_frac=0.3",
            "--lr_scale=1.4",  # the rates were found with half the batch
        ),
        "base_loss": ("--eval_tokens=16384",),
        "base_eval": ("--max_per_task=5",),  # of a bundle that is there: the demo downloads nothing
        # Only the answers: how people type their questions can't be foretold, and half of the tokens are theirs.
        "mid_train": (
            "--eval_every=0",
            "--eval_batches=2",
            "--warmdown_ratio=0.3",
            "--final_lr_frac=0.4",
            "--supervise=assistant",
            "--isolate_conversations",
            "--init_lr_frac=1.4",
        ),
        "chat_sft": ("--eval_every=0", "--eval_batches=2", "--init_lr_frac=0.7"),
        "chat_eval_mid": ("--max_problems=12", "--max_new_tokens=96"),
        "chat_eval_sft": ("--max_new_tokens=96",),
    },
    minutes=5,
    step_seconds=0.205,  # two cores of an AMD EPYC (Zen 5), torch 2.13 (dev/LOG.md)
    seconds={
        "report_reset": 1,
        "data": 4,
        "tok_train": 1,
        "tok_eval": 1,
        "base_train": 21,
        "base_loss": 2,
        "base_eval": 1,
        "mid_train": 63,
        "chat_eval_mid": 2,
        "chat_sft": 60,
        "chat_eval_sft": 6,
        "report": 1,
        "answer": 1,
    },
)

# The same chain in about a minute, for tests: it shows that everything fits together, not that anything is learned.
TINY = Profile(
    name="tiny",
    about="the whole chain at a size for tests; the model learns next to nothing",
    depth=1,
    vocab_size=600,
    max_seq_len=128,
    device_batch_size=4,
    base_batch_size=512,
    mid_batch_size=512,
    sft_batch_size=512,
    dataset="demo",
    chat_data="demo",
    steps={"base_train": 10, "mid_train": 5, "chat_sft": 5},
    flags={
        "data": ("--chars=200000",),
        "tok_eval": ("--no-compare",),
        "base_train": ("--eval_every=0", "--eval_tokens=1024", "--sample_every=0"),
        "base_loss": ("--eval_tokens=1024",),
        "base_eval": ("--max_per_task=1",),
        "mid_train": ("--eval_every=0", "--eval_batches=1"),
        "chat_sft": ("--eval_every=0", "--eval_batches=1"),
        "chat_eval_mid": ("--max_problems=2", "--max_new_tokens=8"),
        "chat_eval_sft": ("--max_problems=2", "--max_new_tokens=8"),
        "answer": ("--max_tokens=16",),
    },
    seconds={
        "report_reset": 1,
        "data": 4,
        "tok_train": 4,
        "tok_eval": 2,
        "base_train": 8,
        "base_loss": 5,
        "base_eval": 1,
        "mid_train": 7,
        "chat_eval_mid": 4,
        "chat_sft": 11,
        "chat_eval_sft": 8,
        "report": 3,
        "answer": 4,
    },
)

# Your own texts, or a public corpus, without a card.
CPU = Profile(
    name="cpu",
    about="your own data on this CPU",
    depth=4,
    vocab_size=8192,
    max_seq_len=512,
    device_batch_size=8,
    mid_batch_size=8192,
    sft_batch_size=8192,
    dataset=None,
    chat_data="demo",
    hours=0.5,
    bfloat16_on_cpu=True,
    flags={
        "base_train": ("--eval_every=100", "--eval_tokens=262144", "--sample_every=0"),
        "base_loss": ("--eval_tokens=262144",),
        "base_eval": ("--max_per_task=20",),
        "mid_train": ("--eval_every=100", "--eval_batches=8"),
        "chat_sft": ("--eval_every=0", "--eval_batches=8", "--init_lr_frac=0.1"),
        "chat_eval_mid": ("--max_problems=20", "--max_new_tokens=128"),
        "chat_eval_sft": ("--max_problems=20", "--max_new_tokens=128"),
    },
    env={"NANOCHAT_DOWNLOAD_ATTEMPTS": "1"},  # what is downloaded here (the CORE bundle) is only for evaluation
)

# One P100, one night. Not yet run on a physical card.
P100 = Profile(
    name="p100",
    about="a CUDA card of 16 GB or more",
    depth=12,
    vocab_size=65536,
    max_seq_len=2048,
    device_batch_size=8,
    mid_batch_size=32768,
    sft_batch_size=32768,
    dataset="climbmix",
    chat_data=None,
    hours=8.0,
    flags={
        "base_train": ("--eval_tokens=1048576",),
        "base_loss": ("--eval_tokens=2097152",),
        "base_eval": ("--max_per_task=200",),
        "chat_eval_mid": ("--max_problems=200",),
        "chat_eval_sft": ("--max_problems=200",),
    },
    needs_cards=True,
)

D20 = Profile(
    name="d20",
    about="nanochat's d20 on 8 large CUDA cards",
    depth=20,
    vocab_size=65536,
    max_seq_len=2048,
    device_batch_size=32,
    mid_batch_size=524288,
    sft_batch_size=32768,
    nproc=8,
    dataset="climbmix",
    chat_data=None,
    recipe="classic",
    needs_cards=True,
)

# Hours from which on: channels for a layer, and for a head. In little time a narrow model learns most (dev/LOG.md).
WIDTHS = ((1.0, 64, 128), (0.25, 48, 96), (0.0, 32, 128))
PROFILES = {profile.name: profile for profile in (DEMO, TINY, CPU, P100, D20)}
# Rows per forward pass that are meant to fit into a P100's 16 GB at 2048 tokens, up to this depth.
P100_DEVICE_BATCH = ((8, 16), (12, 8), (16, 4), (20, 2))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user set by the environment; None leaves it to the profile."""

    profile: str = "auto"
    depth: int | None = None
    auto_depth: bool = False
    """Take the depth that the planner finds best for the cards and hours."""
    vocab_size: int | None = None
    auto_vocab: bool = False
    """The same for the vocabulary."""
    hours: float | None = None
    recipe: str | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    chat_data: str | None = None
    world: str | None = None
    base: str | None = None
    nproc: int | None = None
    wandb_run: str = "dummy"

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Read PROFILE DEPTH VOCAB_SIZE HOURS RECIPE DATASET DATA_DIR CHAT_DATA WORLD BASE NPROC WANDB_RUN; "": none.

        Raises:
            ValueError: a value makes no sense; names the variable.
            FileNotFoundError: DATA_DIR, CHAT_DATA or WORLD is not there.
        """
        auto_depth, auto_vocab = (env.get(name, "").lower() == "auto" for name in ("DEPTH", "VOCAB_SIZE"))
        settings = cls(
            profile=env.get("PROFILE") or "auto",
            depth=None if auto_depth else _number(env, "DEPTH", int, 1),
            auto_depth=auto_depth,
            vocab_size=None if auto_vocab else _number(env, "VOCAB_SIZE", int, 265),
            auto_vocab=auto_vocab,
            hours=_number(env, "HOURS", float, 0.0),
            recipe=env.get("RECIPE") or None,
            dataset=env.get("DATASET") or None,
            data_dir=Path(env["DATA_DIR"]).expanduser().absolute() if env.get("DATA_DIR") else None,
            chat_data=env.get("CHAT_DATA") or None,
            world=",".join(world_names(env.get("WORLD") or env.get("NANOCHAT_WORLD_DIR") or "")) or None,
            base=env.get("BASE") or None,
            nproc=_number(env, "NPROC", int, 1),
            wandb_run=env.get("WANDB_RUN") or "dummy",
        )
        if settings.profile not in ("auto", *PROFILES):
            raise ValueError(f"PROFILE={settings.profile}: there are auto, {', '.join(PROFILES)}")
        if settings.recipe not in (None, *PRESETS):
            raise ValueError(f"RECIPE={settings.recipe}: there are {', '.join(PRESETS)}")
        if settings.dataset not in (None, "demo", *SOURCES):
            raise ValueError(f"DATASET={settings.dataset}: there are demo, {', '.join(SOURCES)}; own data is DATA_DIR")
        if settings.dataset and settings.data_dir:
            raise ValueError("DATASET and DATA_DIR are both set: unset one of them")
        if settings.base and (given := next(filter(env.get, ("DEPTH", "VOCAB_SIZE", "RECIPE")), None)):
            raise ValueError(f"{given} and BASE are both set: the model of BASE has its own, unset one of them")
        if settings.data_dir and not settings.data_dir.exists():
            raise FileNotFoundError(f"DATA_DIR={settings.data_dir}: there is no such file or folder")
        if is_own_chats(settings.chat_data) and not settings.chat_data.startswith(HUB):
            path = Path(settings.chat_data).expanduser().absolute()
            if not path.exists():
                raise FileNotFoundError(
                    f"CHAT_DATA={path}: there is no such file or folder; give conversations in a file or folder, "
                    f'{HUB}owner/name, "demo", "nanochat" for its mixture from the hub, or "none"'
                )
            return replace(settings, chat_data=str(path))
        return settings


def _number(env: Mapping[str, str], name: str, kind: type[Any], smallest: float) -> Any:
    """The number in an environment variable, or None; for floats `smallest` itself is too small."""
    if not (text := env.get(name)):
        return None
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"{name}={text}: must be {'a whole number' if kind is int else 'a number'}") from None
    if value < smallest if kind is int else not (smallest < value < MOST):
        bounds = f"at least {smallest:.0f}" if kind is int else f"more than {smallest:.0f} and below {MOST:g}"
        raise ValueError(f"{name}={text}: must be {bounds}")
    return value


def choose_profile(settings: Settings, num_cards: int) -> Profile:
    """The profile for these settings with `num_cards` CUDA cards to train on, the user's changes applied.

    Raises:
        ValueError: the profile needs cards that are not there.
    """
    own_data = bool(settings.data_dir or settings.base) or settings.dataset not in (None, "demo")
    if settings.profile != "auto":
        profile = PROFILES[settings.profile]
    elif num_cards:
        profile = P100
    else:
        profile = CPU if own_data else DEMO
    if profile.name == "p100" and settings.depth is not None:
        fitting = [rows for depth, rows in P100_DEVICE_BATCH if settings.depth <= depth]
        profile = replace(profile, device_batch_size=fitting[0] if fitting else 1)
    dataset = None if settings.data_dir else settings.dataset or (None if settings.base else profile.dataset)
    chat_data = settings.chat_data or ("demo" if dataset == "demo" else profile.chat_data)
    carries = profile.name == "cpu" and dataset in SOURCES and in_rust()
    if carries and not (settings.base or settings.depth or settings.recipe):
        ratio, head = next(shape for least, *shape in WIDTHS if (settings.hours or profile.hours or 0.0) >= least)
        switches = {"head_size": head, "window_pattern": "SSSL", "reach": 1024, "recall": 16_000_000}
        flags = {**profile.flags, "base_train": (*profile.flags["base_train"], "--separate_documents=True")}
        profile = replace(profile, about="a public corpus; the model carries text (DEPTH=4: none)", aspect_ratio=ratio)
        profile = replace(profile, switches=switches, flags=flags, max_seq_len=2048, device_batch_size=2)
    profile = replace(
        profile,
        depth=settings.depth or profile.depth,
        vocab_size=settings.vocab_size or profile.vocab_size,
        hours=settings.hours or profile.hours,
        minutes=None if num_cards else profile.minutes,
        recipe=settings.recipe or profile.recipe,
        nproc=settings.nproc or (num_cards if profile.needs_cards and num_cards else profile.nproc),
        dataset=dataset,
        chat_data=None if chat_data == "nanochat" else chat_data,
        world=settings.world or profile.world,
        dtype="bfloat16" if profile.bfloat16_on_cpu and not num_cards and cpu_has_bf16() else profile.dtype,
    )
    if settings.base and not (dataset or settings.data_dir or settings.chat_data not in (None, "none")):
        raise ValueError(
            f"BASE={settings.base} needs something to learn: set DATA_DIR=/your/texts, CHAT_DATA=/your/chats, or both"
        )
    if dataset is None and settings.data_dir is None and settings.base is None:
        raise ValueError(
            f"PROFILE={profile.name} needs data: set DATA_DIR=/your/texts or DATASET={'|'.join([*SOURCES, 'demo'])}"
        )
    if settings.world and "demo" not in (profile.dataset, profile.chat_data):
        raise ValueError(f"WORLD={settings.world}: PROFILE={profile.name} learns no world here: set PROFILE=demo")
    profile = replace(profile, world=world_by_hours(profile.world, profile.hours if dataset == "demo" else None))
    if profile.needs_cards and num_cards < profile.nproc:
        raise ValueError(
            f"PROFILE={profile.name} needs {profile.nproc} CUDA cards (one per process), but torch sees {num_cards}: "
            + ("set NPROC" if num_cards else "run `bash verify_p100_setup.sh`, or take PROFILE=demo")
        )
    return fit_batches(profile)


def fit_batches(profile: Profile) -> Profile:
    """Batches that this many processes can share evenly, as near to the profile's as whole rows allow."""
    if profile.nproc == 1 and profile.base is None:
        return profile

    def whole(tokens: int, rows: int) -> int:
        unit = rows * profile.max_seq_len * profile.nproc
        return max(1, round(tokens / unit)) * unit

    rows = max(1, min(profile.device_batch_size, profile.mid_batch_size // profile.max_seq_len // profile.nproc))
    profile = replace(profile, device_batch_size=rows, mid_batch_size=whole(profile.mid_batch_size, rows))
    if profile.base_batch_size is not None:
        profile = replace(profile, base_batch_size=whole(profile.base_batch_size, rows))
    return replace(profile, sft_batch_size=whole(profile.sft_batch_size, profile.sft_rows))
