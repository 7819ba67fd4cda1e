"""Device, dtype and downloads."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from nanochat import common
from nanochat.config import Runtime


class FakeCards:
    """Pretends that torch sees these CUDA cards."""

    def __init__(self, monkeypatch, *capabilities, arches=("sm_50", "sm_60", "sm_70", "sm_80", "sm_90")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: capabilities[getattr(i, "index", i)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i=0: "a card")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(arches))


@pytest.mark.parametrize(
    ("card", "capability", "dtype"),
    [
        ("P100", (6, 0), torch.float16),
        ("GTX 1080", (6, 1), torch.float16),
        ("A100", (8, 0), torch.bfloat16),
        ("RTX 3090", (8, 6), torch.bfloat16),
        ("RTX 4090", (8, 9), torch.bfloat16),
        ("H100", (9, 0), torch.bfloat16),
        ("RTX 5090", (12, 0), torch.bfloat16),
    ],
)
def test_dtype_by_capability(monkeypatch, card, capability, dtype):
    FakeCards(monkeypatch, capability)
    assert common.autodetect_dtype("cuda") == dtype


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
@pytest.mark.parametrize(("half", "brain", "best"), [(90.0, 10.0, torch.float16), (10.0, 12.0, torch.bfloat16)])
def test_volta_and_turing_are_measured(monkeypatch, capability, half, brain, best):
    FakeCards(monkeypatch, capability)
    speed = {torch.float16: half, torch.bfloat16: brain}
    monkeypatch.setattr(common, "measure_matmul", lambda dtype, device: speed[dtype])
    assert common.autodetect_dtype("cuda") == best


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


@pytest.mark.parametrize("device_type", ["cpu", "mps"])
def test_cpu_and_mps_are_float32(device_type):
    assert common.autodetect_dtype(device_type) == torch.float32


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


def test_cuda_asked_for_but_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device_type=cpu"):
        common.setup_compute(Runtime(device_type="cuda"))


def test_a_checkpoints_dtype_wins_over_auto_but_not_over_the_flag():
    auto = common.setup_compute(Runtime(device_type="cpu"), dtype="bfloat16")
    assert auto.dtype == torch.bfloat16
    asked = common.setup_compute(Runtime(device_type="cpu", dtype="float32"), dtype="bfloat16")
    assert asked.dtype == torch.float32


def test_matmul_speed_is_a_positive_number():
    assert 0 < common.measure_matmul(torch.float32, "cpu", n=64, seconds=0.01) < 100


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
