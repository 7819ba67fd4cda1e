"""Kill a small base -> mid -> SFT pipeline at random moments, resume it each time, compare with an undisturbed run.

    python dev/chaos.py                          20 × SIGKILL, 5 × SIGTERM on the pipeline, 6 failing disks
    python dev/chaos.py --ranks 2 --kills 6      two gloo ranks, one of which is killed
    python dev/chaos.py --move                   each launch on another machine, with a copy of the folder

Final weights, position in the data, loss scale, counters and the loss log (loss, gradient norm and learning rate of
every step) must be the same bit for bit; a SIGTERM must lose no step and exit with 75; a dead rank must end the other.

A failing disk: while a run writes checkpoints every few steps, the size of the files it may write is limited to a
random number of bytes (RLIMIT_FSIZE, from outside), so that a write stops in the middle of a file; as root, a tmpfs
fills up as well. The newest checkpoint that loads must be at most one interval old, and the run must end with the same
weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanochat.config import run_script  # noqa: E402
from nanochat.pipeline.session import sync  # noqa: E402
from nanochat.stages import STAGES  # noqa: E402

TRAINED = {name: STAGES[name].folder for name in ("base_train", "mid_train", "chat_sft")}
COMPARED = ("step", "tokens", "loss", "smooth_loss", "grad_norm", "lr_multiplier", "skipped", "scale", "val_bpb")
COMPARED += ("val_loss",)
SAVE_EVERY = 5
# For one launch: of computing (on a busy machine the clock says nothing), and without any.
LONGEST_CPU_SECONDS, LONGEST_REST_SECONDS = 300.0, 300.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the test."""

    kills: int = 20
    """Number of SIGKILLs, spread over the stages."""
    terms: int = 5
    """Number of SIGTERMs."""
    tears: int = 6
    """Number of failing disks, in base training (and one tmpfs, as root)."""
    ranks: int = 1
    """Processes of torchrun; with more than one, each SIGKILL hits one of them."""
    steps: int = 120
    """Optimizer steps of each stage."""
    only: str | None = None
    """Only the stages up to this one: base_train, mid_train or chat_sft."""
    seed: int = 1
    """Seed of the random moments."""
    pause: float = 4.0
    """A signal comes up to this many seconds after its step; 0: as soon as the step is in the log."""
    move: bool = False
    """What a run leaves is copied to a fresh folder, as the notebook does between two sessions, and goes on there."""
    folder: str | None = None
    """Working folder; default: a temporary one, removed at the end."""
    child: bool = False
    """(For internal use: run the pipeline in $NANOCHAT_BASE_DIR.)"""

    @property
    def stages(self) -> list[str]:
        """The training stages that are run."""
        names = list(TRAINED)
        return names[: names.index(self.only) + 1] if self.only else names


def run_pipeline(cfg: Config) -> None:
    """The child: the stages up to SFT, without the evaluations."""
    from nanochat.pipeline.profiles import TINY, Settings
    from nanochat.pipeline.run import Pipeline, only_one
    from nanochat.pipeline.stage_server import StageServer
    from nanochat.pipeline.stages import make_stages

    save = f"--save_every={SAVE_EVERY}"
    profile = replace(
        TINY,
        max_seq_len=64,
        base_batch_size=512,
        mid_batch_size=512,
        sft_batch_size=512,
        nproc=cfg.ranks,
        steps=dict.fromkeys(TRAINED, cfg.steps),
        flags={
            "data": ("--chars=100000",),
            "base_train": ("--eval_every=30", "--eval_tokens=1024", "--sample_every=0", save),
            "mid_train": ("--eval_every=30", "--eval_batches=1", save),
            "chat_sft": ("--eval_every=30", "--eval_batches=1", save),
        },
    )
    base_dir = Path(os.environ["NANOCHAT_BASE_DIR"])
    names = ["data", "tok_train", *cfg.stages]
    stages = [
        replace(s, needs=tuple(n for n in s.needs if n in names))
        for s in make_stages(profile, Settings(), base_dir)
        if s.name in names
    ]
    with StageServer() as server:
        pipeline = Pipeline(stages, base_dir, profile, server=server)
        with only_one(pipeline.folder):
            pipeline.run(os.environ)


# --- watching a run --------------------------------------------------------------------------------------------------


class Run:
    """One launch of the pipeline in `base_dir`."""

    def __init__(self, cfg: Config, base_dir: Path) -> None:
        self.cfg, self.base_dir = cfg, base_dir
        self.log = base_dir.with_name(base_dir.name + ".log")
        self.cpu: dict[int, float] = {}
        self.computed, self.next_look, self.moved = 0.0, 0.0, time.monotonic()
        command = [sys.executable, str(Path(__file__).resolve()), "--child", f"--ranks={cfg.ranks}"]
        command += [f"--steps={cfg.steps}", *([f"--only={cfg.only}"] if cfg.only else [])]
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=ROOT)

    def step(self, stage: str) -> int:
        """The last step in a stage's loss log."""
        try:
            lines = (self.base_dir / TRAINED[stage] / "d1" / "metrics.jsonl").read_bytes().splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, ValueError, IndexError):
            return 0

    def wait_for(self, happened: Callable[[], bool]) -> bool:
        """Wait until `happened()`; False if the run ended before."""
        while not happened():
            if self.process.poll() is not None:
                return False
            self.check_alive()
            time.sleep(0.005)
        return True

    def wait(self) -> int:
        """Its exit code."""
        while self.process.poll() is None:
            self.check_alive()
            time.sleep(0.02)
        return self.process.returncode

    def check_alive(self) -> None:
        """Raise RuntimeError, and kill it, if it computes for ever or not at all."""
        import psutil

        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + 1
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self.cpu[process.pid] = times.user + times.system
        if sum(self.cpu.values()) > self.computed:
            self.computed, self.moved = sum(self.cpu.values()), now
        if self.computed > LONGEST_CPU_SECONDS or now - self.moved > LONGEST_REST_SECONDS:
            self.kill()
            raise RuntimeError(f"no end after {self.computed:.0f} s of computing: see {self.log}")

    def workers(self) -> list[Any]:
        """The processes that train."""
        import psutil

        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
            return [p for p in children if any(a.startswith("scripts.") for a in p.cmdline()) and not p.children()]
        return []

    def kill(self) -> None:
        """SIGKILL for all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def expect(self, code: int, *allowed: int) -> None:
        """Wait for the end; any other exit code is an error."""
        found = self.wait()
        if found not in (code, *allowed):
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"exit code {found}, expected {code}:\n{tail}")


def newest_step(base_dir: Path, stage: str) -> int | None:
    """The step of the newest checkpoint that loads, optimizer included; None if there is none."""
    from nanochat.checkpoint_manager import load_checkpoint

    try:
        folder = base_dir / TRAINED[stage] / "d1"
        return int(load_checkpoint(folder, with_optimizer=True).meta["step"])
    except (FileNotFoundError, RuntimeError):
        return None


# --- disturbing it ---------------------------------------------------------------------------------------------------


def moved(base_dir: Path, number: int) -> Path:
    """A copy of what the notebook keeps of a session, in another place; the session's own machine is lost."""
    fresh = base_dir.with_name(f"session-{number}")
    sync(base_dir, fresh)
    shutil.rmtree(base_dir)
    return fresh


def kill_at_random(cfg: Config, base_dir: Path, rng: random.Random) -> tuple[Path, float]:
    """Kill and resume, then run to the end.

    Returns:
        (where the run ended, the longest time that a rank outlived a killed one).
    """
    kinds = ["KILL"] * cfg.kills + ["TERM"] * cfg.terms
    rng.shuffle(kinds)
    # A moment: when this stage has come to this step, and a little later.
    moments = sorted((rng.randrange(len(cfg.stages)), rng.randint(0, cfg.steps)) for _ in kinds)
    slowest = 0.0
    for number, (kind, (at, step)) in enumerate(zip(kinds, moments, strict=True), 1):
        stage = cfg.stages[at]
        run = Run(cfg, base_dir)
        # If an earlier launch has got this far already, the kill comes while the run starts.
        if run.wait_for(lambda run=run, stage=stage, step=step: run.step(stage) >= step):  # type: ignore[misc]
            time.sleep(rng.uniform(0, min(0.3, cfg.pause)) if rng.random() < 0.7 else rng.uniform(0, cfg.pause))
        reached = run.step(stage)
        if kind == "TERM":
            os.kill(run.process.pid, signal.SIGTERM)
            # -SIGTERM: it came while Python was starting, before there was a handler or anything to save.
            run.expect(75, 0, -signal.SIGTERM, 1 if cfg.ranks > 1 else 75)
            kept = newest_step(base_dir, stage)
            if run.step(stage) > reached and kept != run.step(stage):  # it was training
                raise RuntimeError(f"SIGTERM lost steps: step {run.step(stage)} was made, {kept} is saved")
        elif cfg.ranks > 1 and (workers := run.workers()):
            start = time.monotonic()
            with contextlib.suppress(Exception):
                rng.choice(workers).kill()
            run.expect(1, 0)
            slowest = max(slowest, time.monotonic() - start)
        else:
            run.kill()
        print(f"  {number}/{len(kinds)} SIG{kind} in {stage} at step {reached}", flush=True)
        if cfg.move:
            base_dir = moved(base_dir, number)
    Run(cfg, base_dir).expect(0)
    return base_dir, slowest


def tear(cfg: Config, base_dir: Path, rng: random.Random) -> int:
    """Let the disk fail in base training, kill the run, repair the disk; returns the age of the newest checkpoint."""
    import psutil

    run = Run(cfg, base_dir)
    start = newest_step(base_dir, "base_train") or 0
    if not run.wait_for(lambda: run.step("base_train") >= start + 2 * SAVE_EVERY + 1 and bool(run.workers())):
        return 0
    size = sum(p.stat().st_size for p in (base_dir / TRAINED["base_train"] / "d1").glob("step_*/model.safetensors"))
    for worker in run.workers():
        psutil.Process(worker.pid).rlimit(psutil.RLIMIT_FSIZE, (rng.randrange(max(2, size)), resource.RLIM_INFINITY))
    torn_at = run.step("base_train")
    said = run.log.stat().st_size
    run.wait_for(lambda: b"WARNING" in run.log.read_bytes()[said:])
    run.kill()
    newest = newest_step(base_dir, "base_train")
    return torn_at - (newest or 0)


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[None]:
    """A tmpfs over `folder` (what is in it is copied there and back). Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        kept = folder.with_name(folder.name + ".kept")
        shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("ballast"))
        subprocess.run(["umount", str(folder)], check=True)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)


def fill_disk(cfg: Config, base_dir: Path) -> int:
    """Train on a disk that is full for a while; returns the age of the newest checkpoint when it became full."""
    folder = base_dir / TRAINED["base_train"]
    folder.mkdir(parents=True, exist_ok=True)
    with small_disk(folder, 64 << 20):
        run = Run(cfg, base_dir)
        run.wait_for(lambda: run.step("base_train") >= 2 * SAVE_EVERY + 1)
        with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as f:
            while True:
                f.write(bytes(1 << 12))
        full_at = run.step("base_train")
        run.wait_for(lambda: b"WARNING" in run.log.read_bytes())
        age = full_at - (newest_step(base_dir, "base_train") or 0)
        (folder / "ballast").unlink()
        run.expect(0)  # the same process goes on to the end
    return age


# --- comparing -------------------------------------------------------------------------------------------------------


def outcome(cfg: Config, base_dir: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions."""
    from nanochat.checkpoint.format import weights_hash
    from nanochat.checkpoint_manager import load_checkpoint

    found: dict[str, Any] = {}
    for stage in cfg.stages:
        folder = base_dir / TRAINED[stage] / "d1"
        checkpoint = load_checkpoint(folder)
        state = {
            k: v
            for k, v in checkpoint.meta["state"].items()
            if k not in ("seconds", "waited", "clock", "metrics_bytes", "metrics_crc")
        }
        found[f"{stage}: weights"] = weights_hash(checkpoint.folder)
        found[f"{stage}: position in the data"] = checkpoint.meta["loader"]
        found[f"{stage}: counters"] = (state, checkpoint.meta["precision"], checkpoint.meta["complete"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found[f"{stage}: loss log"] = [[json.loads(line).get(name) for name in COMPARED] for line in lines]
    return found


def compare(cfg: Config, wanted: dict[str, Any], base_dir: Path) -> None:
    """Raise RuntimeError with the names of what differs."""
    found = outcome(cfg, base_dir)
    if different := [name for name in wanted if wanted[name] != found[name]]:
        raise RuntimeError(f"not the same as without interruptions: {', '.join(different)} (in {base_dir})")


def main(cfg: Config) -> None:
    """Run undisturbed, then disturbed; compare."""
    if cfg.child:
        run_pipeline(cfg)
        return
    start, rng = time.monotonic(), random.Random(cfg.seed)
    with contextlib.ExitStack() as stack:
        work = Path(cfg.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos")))
        (work / "calm").mkdir(parents=True)
        Run(cfg, work / "calm").expect(0)
        wanted = outcome(cfg, work / "calm")
        print(
            f"undisturbed: {len(cfg.stages)} stages of {cfg.steps} steps in {time.monotonic() - start:.0f} s",
            flush=True,
        )
        result: dict[str, Any] = {"kills": cfg.kills, "terms": cfg.terms, "ranks": cfg.ranks}
        if cfg.kills + cfg.terms:
            (work / "killed").mkdir()
            ended, slowest = kill_at_random(cfg, work / "killed", rng)
            compare(cfg, wanted, ended)
            where = ", each time on with a copy of the folder" if cfg.move else ""
            print(f"{cfg.kills} × SIGKILL, {cfg.terms} × SIGTERM{where}: the same result bit for bit", flush=True)
            if cfg.ranks > 1:
                print(f"a killed rank ended the others within {slowest:.1f} s")
                result["seconds_to_end"] = round(slowest, 1)
        if cfg.tears:
            result["checkpoint_age_steps"] = torn_disks(cfg, work, wanted, rng)
        result["seconds"] = round(time.monotonic() - start)
        print(json.dumps(result))


def torn_disks(cfg: Config, work: Path, wanted: dict[str, Any], rng: random.Random) -> int:
    """Let disks fail; returns the greatest age of the newest good checkpoint, in steps."""
    base = replace(cfg, only="base_train")
    wanted = {name: value for name, value in wanted.items() if name.startswith("base_train")}
    ages = []
    (work / "torn").mkdir()
    for _ in range(cfg.tears):
        ages.append(tear(base, work / "torn", rng))
    Run(base, work / "torn").expect(0)
    compare(base, wanted, work / "torn")
    if os.geteuid() == 0:
        (work / "full").mkdir()
        ages.append(fill_disk(base, work / "full"))
        compare(base, wanted, work / "full")
    # A checkpoint of step n is being written while the next steps are made: one interval, and those.
    if max(ages) > 2 * SAVE_EVERY:
        raise RuntimeError(f"the newest good checkpoint was {max(ages)} steps old, saved every {SAVE_EVERY}")
    print(
        f"{len(ages)} failing or full disks: the newest good checkpoint was at most {max(ages)} steps old; same result"
    )
    return max(ages)


if __name__ == "__main__":
    run_script(main, Config)
