"""What the machine is said to be: nvidia-smi's answers, wheels against cards, measured speed, throttling."""

import json
import time
from pathlib import Path

import pytest
import torch

from nanochat import hardware
from nanochat.hardware import ThrottleWatcher, free_memory, query_nvidia_smi

CARD = {
    "uuid": "GPU-1234",
    "name": "Tesla P100-PCIE-16GB",
    "compute_cap": "6.0",
    "memory.total": "16280",
    "memory.free": "15900",
    "driver_version": "570.86.15",
    "temperature.gpu": "89",
    "power.draw": "118.21",
    "clocks.sm": "987",
    "clocks.max.sm": "1328",
}


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Installs a nvidia-smi that answers with these values and refuses every other field, as the real one does."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def install(**changes: str) -> Path:
        values = {name: value for name, value in (CARD | changes).items() if value is not None}
        lines = ["#!/usr/bin/env bash", f'echo "$*" >> {folder}/calls', 'query="${1#--query-gpu=}"', 'line=""', "bad=0"]
        lines.append('for field in ${query//,/ }; do case "$field" in')
        lines += [f"'{name}') line+=', {value}' ;;" for name, value in values.items()]
        lines.append("""*) echo "Field \\"$field\\" is not a valid field to query."; bad=1 ;;""")
        lines.append('esac; done; [ "$bad" = 1 ] && exit 2; echo "${line#, }"')
        path = folder / "nvidia-smi"
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
        return folder / "calls"

    return install


def answer(watcher: ThrottleWatcher) -> str | None:
    """Poll until an nvidia-smi that runs has answered (at most 20 s)."""
    message, end = watcher.poll(), time.monotonic() + 20
    while message is None and watcher._query is not None and time.monotonic() < end:
        time.sleep(0.01)
        message = watcher.poll()
    return message


def test_a_card_that_torch_can_not_see_is_still_reported(smi, monkeypatch, tmp_path):
    smi()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (card,) = hardware.inspect_machine(tmp_path)["cards"]
    assert (card["name"], card["capability"], card["driver"]) == ("Tesla P100-PCIE-16GB", (6, 0), "570.86.15")
    assert (card["total_bytes"], card["free_bytes"]) == (16280 << 20, 15900 << 20)
    assert not card["usable"]


def test_an_old_driver_that_does_not_tell_the_capability(smi, monkeypatch, tmp_path):
    smi(compute_cap=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (card,) = hardware.inspect_machine(tmp_path)["cards"]
    assert card["capability"] == (6, 0)  # from the data sheet


def test_this_machine_is_described_and_goes_into_json(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = hardware.inspect_machine(tmp_path)
    assert machine["wheel"]["version"] == torch.__version__
    assert machine["cpu"]["cores"] >= 1
    assert 0 < machine["ram_free_bytes"] <= machine["ram_total_bytes"]
    assert machine["disk_free_bytes"] > 0
    assert json.loads(json.dumps(machine)) == machine | {"cpu": machine["cpu"]}


def test_a_broken_nvidia_smi_is_no_card(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert query_nvidia_smi(["name"]) == []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert query_nvidia_smi(["name"]) == []


@pytest.mark.parametrize(
    ("capability", "arches", "runs"),
    [
        ((6, 0), ["sm_50", "sm_60", "sm_70"], True),
        ((6, 1), ["sm_60", "sm_70"], True),
        ((6, 0), ["sm_61", "sm_70"], False),
        ((6, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((9, 0), ["sm_90a"], True),
        ((6, 0), [], True),
    ],
)
def test_wheel_against_card(capability, arches, runs):
    assert hardware.wheel_runs(capability, arches) == runs


def test_matmul_speed_is_a_positive_number():
    assert 0 < hardware.measure_matmul(torch.float32, "cpu", n=64, seconds=0.01) < 100


@pytest.mark.parametrize("field", hardware.REASON_FIELDS)
def test_heat_is_reported_once_by_new_and_old_drivers(smi, field):
    calls = smi(**{field: "0x0000000000000020"})
    watcher = ThrottleWatcher("cpu", every_seconds=0.0, uuid="GPU-1234")
    message = answer(watcher)
    assert "because of heat: 89 °C, 118.21 W, 987 of 1328 MHz; improve its cooling" in message
    assert answer(watcher) is None  # the same reason is no news
    assert calls.read_text().splitlines()[0].endswith("-i GPU-1234")


def test_idling_and_a_clock_set_on_purpose_are_no_slowdown(smi):
    smi(**{"clocks_event_reasons.active": "0x0000000000000003"})
    watcher = ThrottleWatcher("cpu", every_seconds=0.0, uuid="GPU-1234")
    assert answer(watcher) is None


def test_a_reason_that_comes_back_is_reported_again(smi):
    watcher = ThrottleWatcher("cpu", every_seconds=0.0, uuid=None)
    assert watcher.poll() is None  # a CPU is not watched
    smi(**{"clocks_event_reasons.active": "0x04"})
    watcher = ThrottleWatcher("cpu", every_seconds=0.0, uuid="GPU-1234")
    assert "its power limit" in answer(watcher)
    smi(**{"clocks_event_reasons.active": "0x00"})
    assert answer(watcher) is None
    smi(**{"clocks_event_reasons.active": "0x44"})
    assert "its power limit, heat, in hardware" in answer(watcher)


def test_polling_starts_nvidia_smi_only_once_in_a_while(smi):
    calls = smi(**{"clocks_event_reasons.active": "0x00"})
    watcher = ThrottleWatcher("cpu", every_seconds=3600.0, uuid="GPU-1234")
    answer(watcher)
    for _ in range(1000):
        assert watcher.poll() is None
    assert len(calls.read_text().splitlines()) == 1


def test_free_memory_is_below_what_the_machine_has():
    import psutil

    assert 0 < free_memory("cpu") <= psutil.virtual_memory().total
