"""One model on several processes and on several machines: torchrun's rendezvous as P100_SETUP.md describes it.

Two network namespaces, joined by a virtual cable, are the two machines. Needs root and `ip`; skipped without.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
STEPS = 5
FLAGS = ["--depth=1", "--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=256", "--eval_tokens=128"]
FLAGS += [f"--num_iterations={STEPS}", "--eval_every=0", "--sample_every=0", "--device_type=cpu", "--compile=off"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADDRESSES = ["10.213.77.1", "10.213.77.2"]


@pytest.fixture
def flags(base_dir, tmp_path, tiny_tokenizer) -> list[str]:
    """A tokenizer in the base dir, some text, and the flags of a small run over it."""
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"Rain {name} {i} fills the rivers. " * 30}) for i in range(40)]
        (text / f"{name}.jsonl").write_text("\n".join(lines))
    tiny_tokenizer.save(base_dir / "tokenizer")
    return [*FLAGS, f"--data_dir={text}"]


def start(command: list[str], **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes: list[subprocess.Popen[str]]) -> str:
    """Wait for all; returns what the first printed."""
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its ranks
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-9000:]
    return said[0]


def losses(base_dir: Path, tag: str) -> list[float]:
    folder = base_dir / "base_checkpoints" / tag
    assert load_checkpoint(folder).meta["complete"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces, each with an eth0 at the end of one cable; their names."""
    names = [f"nanochat-{os.getpid()}-{side}" for side in "ab"]
    ip = shutil.which("ip")
    if ip is None:
        pytest.skip("`ip` (iproute2) is not installed")

    def run(*arguments: str) -> None:
        done = subprocess.run([ip, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(arguments)}: {done.stderr.strip()}")

    try:
        for name in names:
            run("netns", "add", name)
        run("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            run("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            run("-n", name, "link", "set", "eth0", "up")
            run("-n", name, "link", "set", "lo", "up")
        run("netns", "exec", names[0], "true")
        yield names
    finally:
        for name in names:
            subprocess.run([ip, "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_machines_train_as_two_processes_of_one_machine_do(base_dir, flags, machines):
    one = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "-m", "--", "scripts.base_train", *flags]
    finish([start([*one, "--model_tag=one"])])
    rendezvous = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=night"]
    rendezvous += [f"--rdzv_endpoint={ADDRESSES[0]}:29500"]
    processes = []
    for name, address in zip(machines, ADDRESSES, strict=True):
        own = [f"--local_addr={address}", f"--rdzv_conf=is_host={int(address == ADDRESSES[0])}"]
        command = [*TORCHRUN, *rendezvous, *own, "-m", "--", "scripts.base_train", *flags, "--model_tag=two"]
        command = ["ip", "netns", "exec", name, *command]
        processes.append(start(command, GLOO_SOCKET_IFNAME="eth0"))
    said = finish(processes)
    assert "2 processes" in said
    assert len(losses(base_dir, "two")) == STEPS
    assert losses(base_dir, "two") == losses(base_dir, "one")


def test_the_recipe_is_documented_with_the_flags_that_are_tested_here():
    text = (ROOT / "P100_SETUP.md").read_text()
    [command] = re.findall(r"torch\.distributed\.run --nnodes=2 .*(?:\n.*)*?scripts\.base_train", text)
    flags = ("--rdzv_backend=c10d", "--rdzv_id=", "--rdzv_endpoint=", "--local_addr=", "--rdzv_conf=is_host=", "-m --")
    for flag in flags:
        assert flag in command
    assert "GLOO_SOCKET_IFNAME" in text
