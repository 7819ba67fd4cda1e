"""Loss scaling: every optimizer steps or none does; the forward pass of the MLP survives float16."""

import ast
import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat import common, precision
from nanochat.common import setup_compute
from nanochat.config import Runtime
from nanochat.gpt import GPT, MLP, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.precision import (
    DTYPES,
    MAX_SKIPS_IN_A_ROW,
    LossScaler,
    NonFiniteError,
    Precision,
    dtype_cost,
    first_nonfinite_module,
)
from nanochat.recipe import parameter_groups

ROOT = Path(__file__).resolve().parent.parent


def make(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(32, 70, 2, 2, 1, 64))
    model.init_weights()
    groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
    return model, MuonAdamW(groups)


def batch():
    x = torch.randint(0, 70, (2, 32), generator=torch.Generator().manual_seed(1))
    return x[:, :-1], x[:, 1:]


def test_the_scaler_follows_torchs_own_rule_and_works_as_torchs_own():
    """Told by Precision.step; used as in torch's examples; and torch's own: the same scales and weights throughout."""
    finite = [True, True, True, True, False, True, True, False, True, True, True]
    told = LossScaler(True, init_scale=8.0, growth_interval=3)
    scalers = [told, LossScaler(True, 8.0, 3), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)]
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in scalers[1:]]
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in weights]
    for good in finite:
        told.found_inf(not good)
        told.update()
        for scaler, p, optimizer in zip(scalers[1:], weights, optimizers, strict=True):
            scaler.scale((p * p).sum() * (1.0 if good else float("inf"))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert len({scaler.get_scale() for scaler in scalers}) == 1
        assert torch.equal(*weights)
    assert isinstance(told, torch.amp.GradScaler)
    assert json.loads(json.dumps(told.state_dict())) == scalers[-1].state_dict()


def test_a_disabled_scaler_does_nothing_as_torchs_own():
    scaler, loss = LossScaler(False), torch.ones(())
    scaler.found_inf(True)
    scaler.update()
    assert (scaler.is_enabled(), scaler.get_scale(), scaler.state_dict()) == (False, 1.0, {})
    assert scaler.scale(loss) is loss


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_gradient_stops_every_optimizer_and_halves_the_scale(bad):
    model, whole = make()
    optimizers = [MuonAdamW([{**group, "names": None}]) for group in whole.param_groups]
    precision = Precision("cpu", torch.float16)
    before = copy.deepcopy(model.state_dict())
    scale = precision.scaler.get_scale()
    for poisoned in (True, False):
        with precision.autocast():
            loss = model(*batch())
        precision.backward(loss)
        if poisoned:
            model.transformer["h"][1].mlp.c_fc.weight.grad[3, 3] = bad
        result = precision.step(optimizers, 1.0, loss)
        unchanged = [torch.equal(before[name], value) for name, value in model.state_dict().items()]
        if poisoned:
            assert (result.skipped, result.retry, precision.skipped) == (True, True, 1)
            assert precision.scaler.get_scale() == scale / 2
            assert all(unchanged)
        else:  # the same batch goes through at the next attempt
            assert not result.skipped
            assert not all(unchanged)
        for optimizer in optimizers:
            optimizer.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_loss_is_noticed_in_every_dtype(dtype, bad):
    model, optimizer = make()
    precision = Precision("cpu", dtype)
    scale = precision.scaler.get_scale()
    model(*batch()).backward()
    before = copy.deepcopy(model.state_dict())
    result = precision.step([optimizer], None, torch.tensor(bad))
    assert result.skipped
    assert not result.retry  # a smaller scale can't mend the loss
    assert precision.scaler.get_scale() == scale
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def rank_main(rank, folder):
    """Rank 1 meets an infinite gradient at step 1 and an infinite loss at step 3; the ranks' own dtypes differ."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    agreed = common._agree_on_dtype((torch.float16, torch.float32)[rank], torch.device("cpu"))
    model, optimizer = make()
    precision = Precision("cpu", agreed)
    record = []
    for step in range(5):
        x = torch.randint(0, 70, (2, 32), generator=torch.Generator().manual_seed(10 * step + rank))
        with precision.autocast():
            loss = model(x[:, :-1], x[:, 1:])
        precision.backward(loss)
        if rank == 1 and step == 1:
            model.lm_head.weight.grad[5, 5] = float("inf")
        if rank == 1 and step == 3:
            loss = loss * float("inf")
        before = copy.deepcopy(model.state_dict())
        result = precision.step([optimizer], 1.0, loss)
        optimizer.zero_grad()
        same = all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        record.append((result.skipped, result.retry, same, precision.scaler.get_scale()))
    torch.save({"record": record, "weights": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_what_one_rank_meets_both_ranks_skip_and_stay_identical(tmp_path):
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["record"] == second["record"]
    scale = 2.0**16
    assert first["record"] == [
        (False, False, False, scale),
        (True, True, True, scale / 2),
        (False, False, False, scale / 2),
        (True, False, True, scale / 2),
        (False, False, False, scale / 2),
    ]
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())


@pytest.mark.parametrize(("steps", "interval"), [(20, 10), (300, 30), (3000, 300), (50_000, 1000)])
def test_growth_is_fitted_to_the_run(steps, interval):
    precision = Precision("cpu", torch.float16)
    precision.plan_steps(steps)
    for _ in range(interval - 1):
        good(precision)
    assert precision.scaler.get_scale() == 2.0**16
    good(precision)
    assert precision.scaler.get_scale() == 2.0**17


def test_a_shorter_interval_is_not_stepped_over():
    precision = Precision("cpu", torch.float16)
    for _ in range(50):
        good(precision)
    precision.plan_steps(300)  # a resume with fewer steps: 30 good ones are enough, 50 there are
    good(precision)
    assert precision.scaler.get_scale() == 2.0**17


def good(precision):
    precision.scaler.found_inf(False)
    precision.scaler.update()


def test_scaled_step_equals_the_unscaled_one():
    steps = []
    for scale in (1.0, 2.0**12):
        model, optimizer = make()
        precision = Precision("cpu", torch.float32)
        precision.scaler = LossScaler(scale > 1, scale)
        precision.backward(model(*batch()))
        precision.step([optimizer], grad_clip=0.1)
        steps.append(model.state_dict())
    for k in steps[0]:
        torch.testing.assert_close(steps[0][k], steps[1][k], rtol=1e-5, atol=1e-6)


def test_endless_skips_stop_the_run():
    model, optimizer = make()
    precision = Precision("cpu", torch.float16)
    for _ in range(MAX_SKIPS_IN_A_ROW - 1):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        precision.step([optimizer])
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    with pytest.raises(NonFiniteError):
        precision.step([optimizer])


def test_state_survives_a_checkpoint():
    a, b = Precision("cpu", torch.float16), Precision("cpu", torch.float16)
    a.scaler.found_inf(True)
    a.scaler.update()
    good(a)
    a.skipped = 3
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert (b.state_dict(), b.skipped) == (a.state_dict(), 3)


def test_the_scaler_of_an_older_checkpoint_is_understood():
    state = {"dtype": "float16", "scaler": {"scale": 2.0**14, "good_steps": 29}, "skipped": 2, "skipped_in_a_row": 0}
    precision = Precision("cpu", torch.float16)
    precision.plan_steps(300)
    precision.load_state_dict(state)
    assert (precision.scaler.get_scale(), precision.skipped) == (2.0**14, 2)
    good(precision)  # the 30th
    assert precision.scaler.get_scale() == 2.0**15
    full = Precision("cpu", torch.float32)
    full.load_state_dict(state | {"dtype": "float32", "scaler": {"scale": 1.0, "good_steps": 0}})
    assert full.scaler.get_scale() == 1.0


def test_the_scale_of_another_dtype_is_not_taken_over():
    full, half = Precision("cpu", torch.float32), Precision("cpu", torch.float16)
    half.load_state_dict(full.state_dict())
    assert half.scaler.get_scale() == 2.0**16


def test_a_scale_below_one_stops_the_run():
    model, optimizer = make()
    precision = Precision("cpu", torch.float16)
    precision.scaler.update(1.0)
    model(*batch()).backward()
    model.lm_head.weight.grad[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="loss scale of 1"):
        precision.step([optimizer])


def test_first_nonfinite_module_is_named():
    model, _ = make()
    with torch.no_grad():
        model.transformer["h"][1].attn.c_v.weight.fill_(float("inf"))
    assert first_nonfinite_module(model, lambda: model(batch()[0])) == "transformer.h.1.attn.c_v"
    model, _ = make()
    assert first_nonfinite_module(model, lambda: model(batch()[0])) is None


@pytest.mark.parametrize("size", [1.0, 300.0, 5000.0])
def test_squared_relu_is_right_in_float16_far_beyond_its_range(size):
    torch.manual_seed(0)
    mlp = MLP(GPTConfig(8, 64, 1, 1, 1, 64))
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        mlp.c_fc.weight.mul_(size / mlp.c_fc(x).abs().max())
        expected = mlp.double()(x.double())
        got = mlp.half()(x.half())
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert torch.isfinite(got).all()
    assert error < 3e-3


def test_gradient_through_the_rescaled_square_is_right():
    torch.manual_seed(0)
    mlp = MLP(GPTConfig(8, 64, 1, 1, 1, 64))
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        mlp.c_fc.weight.mul_(2000 / mlp.c_fc(x).abs().max())
    grads = []
    for dtype in (torch.float64, torch.float16):
        m = copy.deepcopy(mlp).to(dtype)
        (m(x.to(dtype)).double().sum() * 1e-6).backward()
        grads.append(m.c_proj.weight.grad.double())
    assert (grads[0] - grads[1]).abs().max() / grads[0].abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_training_follows_float32(dtype):
    finals = []
    for chosen in (torch.float32, dtype):
        model, optimizer = make()
        precision = Precision("cpu", chosen)
        for _ in range(12):
            with precision.autocast():
                loss = model(*batch())
            precision.backward(loss)
            precision.step([optimizer], grad_clip=1.0)
            optimizer.zero_grad()
        finals.append(loss.item())
    assert finals[0] < 4.0
    assert abs(finals[0] - finals[1]) < 0.02 * finals[0]


@pytest.mark.slow
def test_three_hundred_steps_in_float16_end_where_float32_does():
    """A d2 of 64 channels on text it can learn; compared by the loss of the trained model on the same 4,096 bytes."""
    world = sorted((ROOT / "tasks" / "demo" / "world").glob("*.txt"))
    text = torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in world)[:100_000]), dtype=torch.uint8
    ).long()
    finals = {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = GPT(GPTConfig(32, 256, 2, 1, 1, 64))
        model.init_weights()
        groups = parameter_groups(model, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0)
        optimizer, precision = MuonAdamW(groups), Precision("cpu", dtype)
        precision.plan_steps(300)
        offsets = torch.Generator().manual_seed(1)
        for step in range(300):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, (300 - step) / 100)
            rows = torch.randint(len(text) - 33, (8, 1), generator=offsets) + torch.arange(33)
            retry = True
            while retry:
                with precision.autocast():
                    loss = model(text[rows[:, :-1]], text[rows[:, 1:]])
                precision.backward(loss)
                retry = precision.step([optimizer], 1.0, loss).retry
                optimizer.zero_grad()
        rows = torch.arange(0, 4096, 32)[:, None] + torch.arange(33)
        with torch.no_grad(), precision.autocast():
            finals[dtype] = float(model(text[rows[:, :-1]], text[rows[:, 1:]]))
    assert finals[torch.float32] < 0.5 * math.log(256)
    assert abs(finals[torch.float16] / finals[torch.float32] - 1) < 0.01


@pytest.mark.parametrize(
    ("device_type", "dtype", "capability", "card", "word"),
    [
        ("cpu", torch.float16, (0, 0), "", "tests"),
        ("mps", torch.float16, (0, 0), "", "not tested"),
        ("cuda", torch.bfloat16, (6, 0), "Tesla P100-PCIE-16GB", "emulates"),
        ("cuda", torch.bfloat16, (7, 0), "Tesla V100-SXM2-16GB", "emulates"),
        ("cuda", torch.bfloat16, (7, 5), "Tesla T4", "emulates"),
        ("cuda", torch.float16, (6, 0), "Tesla P100-PCIE-16GB", "no faster"),
        ("cuda", torch.float32, (6, 0), "Tesla P100-PCIE-16GB", "twice the memory"),
        ("cuda", torch.float32, (7, 5), "Tesla T4", "8.1 instead of 65"),
        ("cuda", torch.float32, (8, 0), "NVIDIA A100-SXM4-40GB", "156 instead of 312"),
        ("cuda", torch.float32, (8, 6), "an unknown card", "half the matmul speed"),
        ("cuda", torch.float16, (9, 0), "NVIDIA H100 80GB HBM3", "loss scaling"),
        ("cuda", torch.float16, (7, 0), "Tesla V100-SXM2-16GB", None),
        ("cuda", torch.bfloat16, (8, 0), "NVIDIA A100-SXM4-40GB", None),
        ("cpu", torch.float32, (0, 0), "", None),
        ("mps", torch.float32, (0, 0), "", None),
    ],
)
def test_an_unfavourable_dtype_says_what_it_costs(device_type, dtype, capability, card, word):
    cost = dtype_cost(device_type, dtype, capability, card)
    assert cost is None if word is None else word in cost


@pytest.mark.parametrize(
    ("dtype", "fast_cpu", "expected"),
    [
        (torch.float32, True, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
        (torch.float16, True, torch.float32),
    ],
)
def test_muon_multiplies_in_bfloat16_where_the_cpu_is_fast_at_it(monkeypatch, dtype, fast_cpu, expected):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: fast_cpu)
    optimizer = MuonAdamW([{"kind": "muon", "params": [torch.nn.Parameter(torch.zeros(2, 2))]}])
    optimizer.set_product_dtype(Precision("cpu", dtype).muon_dtype)
    assert optimizer.param_groups[0]["ns_dtype"] == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_float32_products_are_exact_outside_a_training_step(monkeypatch, dtype, device_type):
    """Evaluation and chat must not depend on how a batch is cut, on any CPU: torch's switch stays where it was."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    if device_type == "cpu":
        with setup_compute(Runtime(device_type="cpu", dtype=dtype)):
            assert torch.get_float32_matmul_precision() == "highest"
    chosen = Precision(device_type, DTYPES[dtype])
    assert torch.get_float32_matmul_precision() == "highest"
    with chosen.training():
        tf32 = device_type == "cuda" and dtype == "float32"
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_16_bit_dtype_is_hard_coded_outside_the_one_table():
    """In code torch's 16-bit dtypes come from DTYPES; their names stand there, in the flag and in the data sheets."""
    found = []
    for path in sorted(p for folder in ("nanochat", "scripts", "tasks", "dev") for p in (ROOT / folder).rglob("*.py")):
        # A file format knows every dtype; hf_code leaves the project and stands alone; a bench sets up its peers.
        if path.name == "precision.py" or path.match("checkpoint/writer.py") or {"hf_code", "bench"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            of_torch = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch"
            if of_torch and node.attr in ("float16", "bfloat16", "half"):
                found.append(f"{path.name}:{node.lineno}: torch.{node.attr}")
            method = node.func if isinstance(node, ast.Call) else None
            if isinstance(method, ast.Attribute) and method.attr in ("half", "bfloat16"):
                found.append(f"{path.name}:{node.lineno}: .{method.attr}()")
            text = node.value if isinstance(node, ast.Constant) else None
            if text in ("float16", "bfloat16", "fp16", "bf16") and path.name not in NAMES_DTYPES:
                found.append(f"{path.name}:{node.lineno}: {text!r}")
    assert found == []


# The flags' choices; the data sheets and speeds by dtype; which of DTYPES a CPU's matrix iteration or a profile takes.
NAMES_DTYPES = {
    "config.py",
    "cards.py",
    "muon.py",
    "profiles.py",
    "roofline.py",
    "plan.py",
    "export_hf.py",
    "nanochat_pt.py",
    "emulate_fp16_gemm.py",
    "gpu_check.py",
    "fast_decode.py",
    "decode_linear.py",
    "import_hf.py",
    "import_classic.py",
    "card_session.py",
    *("native.py", "graph_step.py"),  # the crate's numbers for dtypes; how far each may round
    # of a GGUF file
    *("gguf_file.py", "export_gguf.py", "check_runtimes.py"),
}


COMPUTES_NOTHING = ("__init__", "monitor", "tok_cache", "data_check", "export_gguf", "export_page")
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem not in COMPUTES_NOTHING)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_dtype_and_its_help_says_so(script, capsys):
    import importlib

    from nanochat.config import parse_config

    config = importlib.import_module(f"scripts.{script}").Config
    required = [f"--{f.name}=x" for f in dataclasses.fields(config) if f.default is f.default_factory]
    for name in DTYPES:
        cfg = parse_config(config, [*required, f"--dtype={name}"])
        # What moves or converts a model has a dtype of its own; all others share the Runtime.
        assert cfg.dtype == name if hasattr(cfg, "dtype") else cfg.runtime == Runtime(dtype=name)
    with pytest.raises(SystemExit):
        parse_config(config, ["--help_all"])
    assert re.search(r"--dtype \{(auto,)?float32,float16,bfloat16\}", capsys.readouterr().out)


def test_no_script_that_computes_is_without_a_precision():
    """Whoever builds or loads a model gets its device and dtype from setup_compute."""
    for path in sorted((ROOT / "scripts").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        # An export computes nothing; the worker of a bench is told its device and dtype.
        exempt = path.name.startswith("export_")
        if not exempt and ("load_model" in text or "GPT(" in text):
            assert "setup_compute(" in text, path.name
            assert "autocast(dtype" not in text.replace("torch.", ""), path.name
