"""The whole road in one command: text → tokenizer → base → mid → SFT → report → an answer.

`bash speedrun_p100.sh` calls this after the set-up; settings come from the environment (see
`nanochat.pipeline.profiles`):

    PROFILE=tiny python -m nanochat.pipeline
    python -m nanochat.pipeline --dry_run        print the stages and their commands

Every stage is a process of its own (stage_server.py). A finished one leaves a mark, `<base dir>/pipeline/<stage>.json`,
with hashes of its flags, of the results it was made from (the tokenizer, the model of the stage before, the data) and
of its own result; it is skipped as long as all of these are the same. So what was changed by hand is noticed too, and
artefacts of different tokenizers or models never meet. When a stage does run, the marks of all stages that build on it
are removed first, so they run as well.

SIGTERM, SIGUSR1 and Ctrl-C let the stage save and end with exit code 75 (signals.py): the same command goes on.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nanochat.cards import DeviceInfo, describe_choice
from nanochat.common import autodetect_device_type, print_banner
from nanochat.data.inventory import Inventory
from nanochat.env import get_base_dir, require_wandb_login
from nanochat.files import read_json, write_bytes, write_json, write_record
from nanochat.interop.start_model import keep_tokenizer, read_start_model
from nanochat.pipeline.chosen import go_on, profile_for, with_steps
from nanochat.pipeline.inputs import (
    base_lines,
    language_advice,
    look_at_inputs,
    look_at_world,
    own_question,
    report_inputs,
)
from nanochat.pipeline.machine import (
    list_devices,
    machine_env,
    shards_needed,
    step_seconds,
    take_cards,
    unused_cards,
)
from nanochat.pipeline.process import run_logged
from nanochat.pipeline.profiles import PROFILES, Profile, Settings
from nanochat.pipeline.stage_server import StageServer
from nanochat.pipeline.stages import Stage, ask_instead, expected_seconds, make_stages
from nanochat.progress import PROGRESS_FILE, format_seconds
from nanochat.signals import EXIT_STOPPED, Stopped
from nanochat.stages import PLAN_FILE

# A stage that was asked to stop: after saving, or (−n and 128 + n: by signal n) before there was anything to save.
STOPPED_CODES = {EXIT_STOPPED, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGINT, 128 + signal.SIGTERM}
STEPS_FILE = "steps.json"  # of a run whose steps follow from the machine's speed
LOCK_SECONDS = 0.5  # the monitor looks at the lock, for an instant


class Pipeline:
    """Runs stages in order, skips the finished ones, and keeps marks and logs in `folder`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        base_dir: Path,
        profile: Profile,
        inventories: Sequence[Inventory] = (),
        server: StageServer | None = None,
    ) -> None:
        self.stages, self.base_dir, self.profile = list(stages), base_dir, profile
        self.inventories = list(inventories)
        self.server = server
        self.folder = base_dir / "pipeline"

    def mark_path(self, stage: Stage) -> Path:
        """Where the state of a stage is kept."""
        return self.folder / f"{stage.name}.json"

    def log_path(self, stage: Stage) -> Path:
        """Where the output of a stage is kept."""
        return self.folder / f"{stage.name}.log"

    def progress_path(self, stage: Stage) -> Path:
        """Where a stage says how far it is, for the monitor."""
        return self.folder / f"{stage.name}.progress.json"

    def mark(self, stage: Stage) -> dict[str, Any]:
        """What is known of a stage: state ("started" or "done"), key, seconds; empty if nothing."""
        mark = read_json(self.mark_path(stage))
        return mark if mark.get("key") == stage.key else {}

    def inputs(self, stage: Stage) -> dict[str, str | None]:
        """The results that a stage is made from, as they are now."""
        return {other.name: other.result(self.base_dir) for other in self.stages if other.name in stage.needs}

    def is_done(self, stage: Stage) -> bool:
        """Whether it finished with the same settings and inputs, and its result is still what it was."""
        mark, result = self.mark(stage), stage.result(self.base_dir)
        if mark.get("state") != "done" or result is None or mark.get("inputs") != self.inputs(stage):
            return False
        # What nothing else is made from (the report) may be edited.
        return mark.get("result") == result or not any(stage.name in other.needs for other in self.stages)

    def dependents(self, stage: Stage) -> list[Stage]:
        """The stages that build on it, directly or through others."""
        names = {stage.name}
        for later in self.stages:  # in order, so one pass is enough
            if names & set(later.needs):
                names.add(later.name)
        return [other for other in self.stages if other.name in names - {stage.name}]

    def run(self, env: Mapping[str, str]) -> None:
        """Run what is not done.

        Raises:
            RuntimeError: a stage failed; names it, its log and how to go on.
            Stopped: a signal asked to stop.
        """
        seconds = {stage.name: expected_seconds(self.profile, stage.name) for stage in self.stages}
        plan = {"folder": str(self.base_dir), "seconds": seconds}
        if read_json(self.folder / PLAN_FILE) != plan:
            write_json(self.folder / PLAN_FILE, plan)
        for number, stage in enumerate(self.stages, 1):
            title = f"[{number}/{len(self.stages)}] {stage.name}"
            if self.is_done(stage):
                print(f"{title}: skipped, done before in {format_seconds(self.mark(stage)['seconds'])}", flush=True)
                continue
            expected = expected_seconds(self.profile, stage.name)
            how_long = f"expected time {format_seconds(expected)}" if expected else "how long it takes is not known yet"
            print(f"\n{title}: {stage.about} ({how_long})", flush=True)
            took = self.run_stage(stage, env)
            print(f"{title}: finished in {format_seconds(took)}", flush=True)
            if stage.name == "report_reset":
                report_inputs(self.inventories)

    def run_stage(self, stage: Stage, env: Mapping[str, str]) -> float:
        """Run one stage; returns its seconds."""
        before, inputs = self.mark(stage), self.inputs(stage)
        resume = before.get("state") == "started" and before.get("inputs") == inputs
        paths = [self.mark_path(other) for other in (stage, *self.dependents(stage))]
        old_marks = {path: path.read_bytes() for path in paths if path.exists()}
        old_result = stage.result(self.base_dir) if b'"state": "done"' in old_marks.get(paths[0], b"") else None
        for path in paths:
            path.unlink(missing_ok=True)
        flags = [*stage.flags, *stage.unmarked_flags]
        record = {"time": time.time(), "key": stage.key, "flags": flags, "inputs": inputs}
        write_record(self.mark_path(stage), {"state": "started", **record})
        start = time.monotonic()
        try:
            progress = self.progress_path(stage)
            progress.unlink(missing_ok=True)  # of a run that was killed
            told, server = {**env, PROGRESS_FILE: str(progress)}, self.server if stage.nproc == 1 else None
            code = run_logged(stage.command(resume), self.log_path(stage), told, server)
            if code in STOPPED_CODES:
                raise Stopped
        except Stopped:
            print(f"\nstopped in the stage {stage.name}; the same command goes on from here", flush=True)
            raise
        seconds = time.monotonic() - start
        if code != 0:
            reason = f"was killed by signal {-code}" if code < 0 else f"exit code {code}"
            hint = " (9 often means that the machine ran out of memory)" if code == -9 else ""
            if old_result is not None and stage.result(self.base_dir) == old_result:
                # A mistake in the settings has changed nothing: without it, all that was finished still is.
                for path, mark in old_marks.items():
                    write_bytes(path, mark)
            raise RuntimeError(
                f"the stage {stage.name} failed: {reason}{hint}. Its output is in {self.log_path(stage)}. "
                "To go on, run the same command again: finished stages are skipped"
            )
        result = stage.result(self.base_dir)
        if result is None:
            raise RuntimeError(
                f"the stage {stage.name} ended without a finished {stage.output}: see {self.log_path(stage)}, and run "
                "the same command again"
            )
        write_record(self.mark_path(stage), {"state": "done", **record, "result": result, "seconds": round(seconds, 1)})
        return seconds


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the base dir's lock: two pipelines in one folder would overwrite each other.

    Raises:
        RuntimeError: another one is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(str(folder / ".lock"), timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise RuntimeError(
            f"another pipeline is running in {folder.parent}: wait for it, or set NANOCHAT_BASE_DIR to another folder"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Run the pipeline; its settings come from the environment (bash speedrun_p100.sh -h lists them)."""

    dry_run: bool = False
    """Print the stages and their commands, run nothing."""


def closing_lines(profile: Profile, base_dir: Path, seconds: float) -> list[str]:
    """What to do with the result."""
    default = Path.home() / ".cache" / "nanochat"
    env = "" if base_dir == default else f"NANOCHAT_BASE_DIR={base_dir} "
    model = f"-i base -g {profile.tag}" if profile.chat_data == "none" else f"-g {profile.tag}"
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    peak = peak / 1024 if sys.platform == "darwin" else peak  # bytes there, KiB elsewhere
    return [
        "",
        f"done in {format_seconds(seconds)}" + (f", at most {peak:.1f} GiB in one process" if peak >= 0.1 else ""),
        f"report:       {base_dir / 'report' / 'report.html'}",
        f"talk to it:   {env}{sys.executable} -m scripts.chat_cli {model}",
        f"in a browser: {env}{sys.executable} -m scripts.chat_web {model}",
    ]


def _pretended_cards(settings: Settings) -> list[DeviceInfo]:
    """The cards that a dry run plans for where the profile needs cards and there are none."""
    profile = PROFILES.get(settings.profile)
    if profile is None or not profile.needs_cards:
        return []
    if profile.nproc > 1:
        return [DeviceInfo("NVIDIA H100 80GB HBM3", (9, 0), 81559)] * (settings.nproc or profile.nproc)
    return [DeviceInfo("Tesla P100-PCIE-16GB", (6, 0), 16280)] * (settings.nproc or 1)


def main(cfg: Config) -> None:
    """Choose the profile, run the stages."""
    start = time.monotonic()
    # The server is a copy of this process from before it has done anything.
    with contextlib.nullcontext() if cfg.dry_run else StageServer() as server:
        made = _run(cfg, server)
    if made is not None:  # and the server has ended, with what it knows of the stages' memory
        print("\n".join(closing_lines(*made, time.monotonic() - start)), flush=True)


def _run(cfg: Config, server: StageServer | None) -> tuple[Profile, Path] | None:
    """The profile and the folder of a finished run; nothing after a dry one."""
    try:
        settings = Settings.from_env(os.environ)
        devices = list_devices()
        unused, pretended = unused_cards(devices), False
        if cfg.dry_run and not take_cards(devices, None) and (cards := _pretended_cards(settings)):
            devices, pretended = cards, True
        chosen = take_cards(devices, settings.nproc)
        profile, lines = profile_for(settings, [devices[place] for place in chosen]), []
        if settings.base:
            start_model = read_start_model(settings.base)
            keep_tokenizer(start_model.tokenizer, only_ask=True)
            profile, lines = go_on(profile, start_model, settings.base), base_lines(profile, start_model)
            del start_model
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    base_dir = get_base_dir().absolute()
    if autodetect_device_type() != "cpu":
        profile = replace(profile, minutes=None)  # the time of a step is measured on a CPU only
    public = profile.dataset not in (None, "demo")

    def stages_of(profile: Profile) -> list[Stage]:
        shards = shards_needed(profile, [devices[i] for i in chosen]) if public else 0
        return make_stages(profile, settings, base_dir, shards)

    stages = stages_of(profile)
    where = f"; {unused}" if unused else ""
    print(f"profile {profile.name}: {profile.about}{where}; everything goes into {base_dir}", flush=True)
    print("".join(f"{line}\n" for line in lines), end="", flush=True)
    if pretended:
        print(f"no card here: planned for {len(devices)} × {devices[0].name}; to run it, one is needed", flush=True)
    if len(devices) > 1:
        print(f"cards: {describe_choice(devices, chosen)}", flush=True)
    if cfg.dry_run:
        if profile.minutes is not None:
            print("steps: a run takes more, or with HOURS more or fewer, by the speed of this CPU", flush=True)
        for stage in stages:
            print(f"{stage.name}: {stage.about}\n    {' '.join(['python', *stage.command()[1:]])}")
        return None
    if settings.wandb_run != "dummy":
        require_wandb_login()  # not after the hours of data and tokenizer
    print_banner()
    with only_one(base_dir / "pipeline"):
        try:
            world_question = look_at_world(profile)
            inventories = look_at_inputs(profile, settings)
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        if profile.minutes is not None:
            kept = base_dir / "pipeline" / STEPS_FILE
            profile = with_steps(profile, [stage.name for stage in stages], kept, partial(step_seconds, profile))
            steps = ", ".join(f"{number:,} of {stage}" for stage, number in profile.steps.items())
            seconds = format_seconds(sum(profile.seconds.values()))
            print(f"steps: {steps}; in all about {seconds} by this CPU's speed", flush=True)
            stages = stages_of(profile)
        if question := own_question(settings):
            print("\n".join(language_advice(profile)), flush=True)
        if question := question or world_question:
            stages = [ask_instead(stage, question) for stage in stages]
        # A stage that computes on cards starts as a new process.
        pipeline = Pipeline(stages, base_dir, profile, inventories, None if devices else server)
        told = {**machine_env(profile, devices, chosen), "NANOCHAT_WORLD_DIR": profile.world}
        pipeline.run({**profile.env, **os.environ, **told, "NANOCHAT_BASE_DIR": str(base_dir)})
    return profile, base_dir
