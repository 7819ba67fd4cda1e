"""Device, dtype and downloads."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from nanochat import common, env
from nanochat.config import Runtime


class FakeCards:
    """Pretends that torch sees these CUDA cards."""

    def __init__(self, monkeypatch, *capabilities, arches=("sm_50", "sm_60", "sm_70", "sm_80", "sm_90")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[getattr(i, "index", i)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "a card")
        common._fastest_dtype.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(arches))


HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "capability", "candidates"),
    [
        ("P100", (6, 0), [HALF]),
        ("GTX 1080", (6, 1), [HALF]),
        ("V100", (7, 0), [HALF, BRAIN]),
        ("T4", (7, 5), [HALF, BRAIN]),
        ("RTX 2080 Ti", (7, 5), [HALF, BRAIN]),
        ("A100", (8, 0), [BRAIN]),
        ("RTX 3090", (8, 6), [BRAIN]),
        ("RTX 4090", (8, 9), [BRAIN]),
        ("H100", (9, 0), [BRAIN]),
        ("RTX 5090", (12, 0), [BRAIN]),
        ("cpu", None, [FULL]),
        ("mps", None, [FULL]),
    ],
)
def test_the_dtype_of_every_device(monkeypatch, device, capability, candidates):
    """Where there are two candidates the one that is measured to be faster is taken, whichever it is."""
    if capability is None:
        assert common.autodetect_dtype(device) == candidates[0]
        return
    for fastest in candidates:
        FakeCards(monkeypatch, capability)
        measured = []

        def measure(dtype, device, fastest=fastest, measured=measured):
            measured.append(dtype)
            return 90.0 if dtype == fastest else 10.0

        monkeypatch.setattr(common, "measure_matmul", measure)
        assert common.autodetect_dtype("cuda") == fastest
        assert common.autodetect_dtype("cuda") == fastest
        assert measured == (candidates if len(candidates) > 1 else [])  # once, and only where it is needed


def test_both_measurements_are_printed_once(monkeypatch, capsys):
    FakeCards(monkeypatch, (7, 0))
    monkeypatch.setattr(common, "measure_matmul", lambda dtype, device: {HALF: 94.8, BRAIN: 10.3}[dtype])
    common.autodetect_dtype("cuda")
    common.autodetect_dtype("cuda")
    assert capsys.readouterr().out == "measured matmul: float16 94.8, bfloat16 10.3 TFLOP/s\n"


@pytest.mark.parametrize("fastest", [HALF, BRAIN])
def test_an_amd_card_takes_what_is_measured_to_be_faster(monkeypatch, fastest):
    FakeCards(monkeypatch, (9, 0), arches=("gfx906", "gfx90a"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(common, "measure_matmul", lambda dtype, device: 90.0 if dtype == fastest else 10.0)
    assert common.autodetect_dtype("cuda") == fastest
    common.check_wheel()  # its kernels have other names than NVIDIA's


def test_without_a_measurement_volta_takes_bfloat16_and_says_so(monkeypatch, capsys):
    FakeCards(monkeypatch, (7, 0))

    def fail(dtype, device):
        raise RuntimeError("no probe")

    monkeypatch.setattr(common, "measure_matmul", fail)
    assert common.autodetect_dtype("cuda") == torch.bfloat16
    assert "warning" in capsys.readouterr().out


def test_the_weakest_card_decides(monkeypatch):
    FakeCards(monkeypatch, (8, 0), (6, 0))
    assert common.autodetect_dtype("cuda") == torch.float16


@pytest.mark.parametrize(
    ("capability", "arches", "fits"),
    [
        ((6, 0), ("sm_50", "sm_60", "sm_70"), True),
        ((6, 1), ("sm_50", "sm_60", "sm_70"), True),
        ((6, 0), ("sm_70", "sm_75", "sm_80"), False),
        ((7, 0), ("sm_75", "sm_80", "sm_90"), False),
        ((8, 6), ("sm_80", "sm_90"), True),
        ((12, 0), ("sm_80", "compute_90"), True),
    ],
)
def test_wheel_without_kernels_is_refused_with_the_remedy(monkeypatch, capability, arches, fits):
    FakeCards(monkeypatch, capability, arches=arches)
    if fits:
        common.check_wheel()
    else:
        with pytest.raises(RuntimeError, match=r"pip install .*cu126"):
            common.check_wheel()


def test_a_new_card_is_not_sent_to_the_wheel_for_old_ones(monkeypatch):
    FakeCards(monkeypatch, (12, 0), arches=("sm_80", "sm_90"))
    with pytest.raises(RuntimeError, match=r"pip install --force-reinstall 'torch>=2.7,<2.16'$"):
        common.check_wheel()


def test_cuda_asked_for_but_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device_type=cpu"):
        common.setup_compute(Runtime(device_type="cuda"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"build without CUDA: .*pip install"):
        common.setup_compute(Runtime(device_type="cuda"))


def test_a_cpu_build_on_a_machine_with_a_card_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(common.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert common.setup_compute(Runtime()).device_type == "cpu"
    assert "warning" in capsys.readouterr().out


def test_a_dtype_the_device_cannot_compute_in_is_refused(monkeypatch):
    def ones(*size, device):
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(RuntimeError, match="--dtype=float32"):
        common.setup_compute(Runtime(device_type="cpu", dtype="bfloat16"))


def test_a_slow_choice_says_what_it_costs_and_auto_says_nothing(capsys):
    common.setup_compute(Runtime(device_type="cpu", dtype="float16"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert "float16 on a CPU" in said[0]
    common.setup_compute(Runtime(device_type="cpu"))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wish", "capability", "compiles", "measured"),
    [
        ("auto", (6, 0), False, False),
        ("auto", (7, 0), True, True),
        ("on", (8, 0), True, False),
        ("off", (8, 0), False, False),
    ],
)
def test_compile_by_capability(monkeypatch, wish, capability, compiles, measured):
    FakeCards(monkeypatch, capability)
    assert common._compile_allowed(wish, torch.device("cuda", 0)) == compiles
    assert not common._compile_allowed("auto", torch.device("cpu"))
    assert (compiles and wish == "auto") == measured


def test_compile_on_is_refused_where_triton_is(monkeypatch):
    FakeCards(monkeypatch, (6, 1))
    with pytest.raises(ValueError, match="--compile=on"):
        common._compile_allowed("on", torch.device("cuda", 0))


def test_a_checkpoints_dtype_wins_over_auto_but_not_over_the_flag():
    auto = common.setup_compute(Runtime(device_type="cpu"), dtype="bfloat16")
    assert auto.dtype == torch.bfloat16
    asked = common.setup_compute(Runtime(device_type="cpu", dtype="float32"), dtype="bfloat16")
    assert asked.dtype == torch.float32


@pytest.mark.parametrize(("bf16_in_hardware", "taken"), [(True, BRAIN), (False, FULL)])
def test_the_dtype_of_the_stage_before_is_kept_where_it_suits_the_device(monkeypatch, bf16_in_hardware, taken):
    monkeypatch.setattr("nanochat.precision.cpu_has_bf16", lambda: bf16_in_hardware)
    cpu = Runtime(device_type="cpu")
    assert common.setup_compute(cpu, previous="bfloat16").dtype == taken
    assert common.setup_compute(cpu, previous="float16").dtype == FULL
    assert common.setup_compute(cpu, dtype="float16", previous="bfloat16").dtype == HALF  # a resume goes first
    assert common.setup_compute(Runtime(device_type="cpu", dtype="float32"), previous="bfloat16").dtype == FULL


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/good":
            body, claimed = b"hello", 5
        elif self.path == "/short":
            body, claimed = b"hel", 5
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(claimed))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    httpd = HTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_download_arrives_whole_and_once(server, base_dir):
    unpacked = []
    path = common.download_file_with_lock(f"{server}/good", "folder/x.txt", unpacked.append)
    assert path.read_bytes() == b"hello"
    common.download_file_with_lock("http://127.0.0.1:1/never-asked", "folder/x.txt", unpacked.append)
    assert unpacked == [path]


@pytest.mark.parametrize("page", ["missing", "short"])
def test_failed_download_names_url_and_place_and_leaves_nothing(server, base_dir, page):
    with pytest.raises(RuntimeError, match=page) as error:
        common.download_file_with_lock(f"{server}/{page}", "y.txt")
    assert str(base_dir / "y.txt") in str(error.value)
    assert [p.name for p in base_dir.iterdir() if p.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        (
            "0::/a/b\n",
            {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"},
            1,
        ),  # a group's limit binds its parts
        ("0::/gone\n", {"cpu.max": "50000 100000"}, 1),  # a container that sees its own group as the root
        ("1:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 8),
        ("3:memory:/\n2:cpu:/d\n", {"cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, 4),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
        (None, {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_the_cores_of_a_container_count(monkeypatch, tmp_path, own, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert env.usable_cores(tmp_path / "cgroup", tmp_path / "own") == cores


@pytest.mark.parametrize(
    ("cores", "ranks", "wish", "threads"),
    [(8, None, None, 8), (3, None, None, 3), (8, "4", None, 2), (3, None, "8", 8)],
)
def test_processes_here_have_no_more_threads_than_cores(monkeypatch, cores, ranks, wish, threads):
    chosen = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(common, "usable_cores", lambda: cores)
    monkeypatch.setattr(common, "watch_cores", lambda: None)
    for name, value in (("LOCAL_WORLD_SIZE", ranks), ("OMP_NUM_THREADS", wish)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    common.setup_compute(Runtime(device_type="cpu"))
    assert chosen[-1] == threads
