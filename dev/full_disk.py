"""Let the disk of the base folder be full in every stage; as root, on Linux (it mounts a small file system in memory).

    python -m dev.full_disk
    python -m dev.full_disk --only=export_hf,tok_cache --free_kb=0,300

Each stage of the tiny pipeline, and each export, import and cache, runs with too little room. It must end without a
traceback, name a file or folder of the disk and what to do, and leave nothing half-written; with room again, the same
command must come to its end. Training says the same and waits with its finished model; room is made while it does.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.config import run_script
from nanochat.data.shards import ShardWriter
from nanochat.pipeline.profiles import TINY, Settings
from nanochat.pipeline.stages import make_stages

ROOT = Path(__file__).resolve().parents[1]
DISK_BYTES = 60 << 20
BALLAST = "ballast"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the tour."""

    only: str | None = None
    """Names of stages, by commas; the ones before run with room."""
    base_dir: Path | None = None
    """A finished tiny run to start from (it is copied; exports need recipe portable): only what --only names is run."""
    free_kb: str = "0,200"
    """What is free, by commas: each stage fails once with each, unless that is enough."""


@contextlib.contextmanager
def served_shards(folder: Path) -> Iterator[Path]:
    """A list of the URLs of two shards of about 2 MB, which lie in `folder` and are served from there."""
    rng = random.Random(0)
    for name in ("a", "b"):
        writer = ShardWriter(folder, name, one=True)
        for _ in range(1000):
            writer.add(" ".join(f"{rng.getrandbits(40):x}" for _ in range(300)))
        (folder / writer.close()[0].name).rename(folder / f"{name}.parquet")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    urls = [f"http://127.0.0.1:{server.server_port}/{name}.parquet\n" for name in ("a", "b")]
    (folder / "list.txt").write_text("".join(urls))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield folder / "list.txt"
    finally:
        server.shutdown()
        server.server_close()


def commands(base: Path, shards: Path) -> dict[str, list[str]]:
    """The command of every stage, in order: the pipeline's, then what is made from its models, and a download."""
    found = {}
    for stage in make_stages(replace(TINY, recipe="portable"), Settings(), base):
        found[stage.name] = stage.command()[1:]
    export, model = base / "exported", ["-i", "sft", "-g", "d1"]
    short = ["--num_iterations=2", "--device_batch_size=2", "--total_batch_size=256", "--eval_every=0"]
    train = [
        "-m",
        "scripts.base_train",
        "--dataset=demo",
        "--depth=1",
        "--max_seq_len=128",
        "--eval_tokens=256",
        *short,
    ]
    rl = [
        "--num_iterations=2",
        "--examples_per_step=2",
        "--num_samples=2",
        "--max_new_tokens=4",
        "--device_batch_size=4",
    ]
    rl += ["--eval_examples=2", "--eval_samples=2", "--model_tag=d1", "--task=DemoWordSums"]
    return found | {
        "chat_rl": ["-m", "scripts.chat_rl", *rl],
        "download": ["-m", "nanochat.dataset", f"--source=urls:{shards}"],
        "tok_cache": ["-m", "scripts.tok_cache", "--dataset=demo"],
        "tensorboard": [*train, "--model_tag=t", "--tracker=tensorboard", "--run=t"],
        "import_texts": ["-m", "scripts.tok_cache", f"--data_dir={ROOT / 'docs'}"],
        "export_hf": ["-m", "scripts.export_hf", *model, "-o", str(export / "hf")],
        "export_gguf": ["-m", "scripts.export_gguf", *model, "-o", str(export / "model.gguf")],
        "export_page": ["-m", "scripts.export_page", *model, "--cdn", "-o", str(export / "page")],
        "import_hf": ["-m", "scripts.import_hf", f"--path={export / 'hf'}", "--model_tag=imported"],
    }


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of DISK_BYTES in memory at `folder`."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full(base: Path, free_kb: int) -> Iterator[None]:
    """Leave only so much room."""
    ballast = base / BALLAST
    with open(ballast, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(1, shutil.disk_usage(base).free - (free_kb << 10)))
    try:
        yield
    finally:
        ballast.unlink(missing_ok=True)


def run(command: list[str], base: Path, ballast: Path | None = None) -> tuple[int, str]:
    """(exit code, all output); with `ballast`, what is in the way is removed once the stage says that it waits."""
    env: Mapping[str, str] = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *command], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if ballast is not None and "no checkpoint could be written" in line:
            ballast.unlink(missing_ok=True)
    return process.wait(), said


def problems(code: int, said: str, base: Path) -> list[str]:
    """What is wrong with how a stage ended on a full disk."""
    found = []
    if "Traceback" in said or "Exception in thread" in said:
        found.append("a traceback")
    warned = "no checkpoint could be written" in said  # a finished model waits for room
    if (code != 0 or warned) and not any(str(base) in line and "free some space" in line for line in said.splitlines()):
        found.append("no sentence with file and remedy")
    if code < 0:
        found.append(f"killed by signal {-code}")
    left = [path for path in base.rglob(".*") if path.suffix in (".tmp", ".old", ".part")]
    return [*found, *(f"{path} is left" for path in left)]


def main(cfg: Config) -> None:
    """Fill the disk in each stage, make room, go on."""
    failed, only = 0, cfg.only.split(",") if cfg.only else None
    with (
        tempfile.TemporaryDirectory() as tmp,
        tempfile.TemporaryDirectory() as other,
        served_shards(Path(other)) as shards,
        small_disk(Path(tmp)),
    ):
        base = Path(tmp)
        if cfg.base_dir is not None:
            shutil.copytree(cfg.base_dir, base, dirs_exist_ok=True)
        for name, command in commands(base, shards).items():
            if cfg.base_dir is not None and only is not None and name not in only:
                continue
            ends = []
            for free_kb in map(int, cfg.free_kb.split(",")) if only is None or name in only else ():
                with full(base, free_kb):
                    code, said = run(command, base, base / BALLAST)
                    wrong = problems(code, said, base)
                ends.append(f"{free_kb} KB free: exit {code}")
                if wrong:
                    failed += 1
                    ends.append(f"WRONG: {'; '.join(wrong)}")
                    print(said[-1500:])
            code, said = run(command, base)
            if code != 0:
                failed += 1
                ends.append(f"WRONG: with room again exit {code}")
                print(said[-1500:])
            print(f"{name}: {', '.join(ends)}, with room: exit {code}", flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, Config)
