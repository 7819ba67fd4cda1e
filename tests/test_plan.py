"""The plan against arithmetic by hand, and what a user sees of it."""

import json
import re
import time

import pytest
import torch

from nanochat.cards import CARDS as CARDS_OF_THE_TABLE
from nanochat.cards import DeviceInfo, find_card
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.pipeline.chosen import profile_for
from nanochat.pipeline.profiles import Settings, choose_profile
from nanochat.plan.card_names import parse_card
from nanochat.plan.local_speed import LocalMachine, random_tokens
from nanochat.plan.memory import MicroBatch, estimate_training_memory
from nanochat.plan.planning import Budget, card_speed, measured_speed, plan, plan_row
from nanochat.plan.roofline import CardRoofline, best_dtype, step_operations, tokens_per_second
from nanochat.plan.scaling_law import ERROR
from nanochat.precision import DTYPES, Precision
from nanochat.recipe import CLASSIC, PRESETS, parameter_groups
from scripts import plan as script

CARDS = ("p100", "t4", "v100", "rtx 3060", "rtx 3090", "rtx 4090", "a100", "h100")


def planned(capsys, *flags: str) -> dict:
    """What the script prints with --json."""
    script.run_script(script.main, script.Config, ["--json", *flags])
    return json.loads(capsys.readouterr().out)


def test_a_p100_in_eight_hours_by_hand(capsys):
    (row,) = planned(capsys, "--card=p100", "--hours=8", "--depth=12", "--recipe=classic")["rows"]
    # d12: 12 layers of 4 matrices of 768² and 2 of 768 × 3072; embedding and lm_head of 65536 × 768.
    blocks, table = 12 * (4 * 768**2 + 2 * 4 * 768**2), 65536 * 768
    assert row["parameters"] == blocks + 2 * table == 185_597_952
    # 6 per weight that is multiplied, and 12·H·D·T for each layer's attention
    flops = 6 * (blocks + table) + 12 * 12 * 768 * 2048
    assert row["flops_per_token"] == flops
    # Weights and gradients 4 bytes, Muon 4 (one moment), AdamW 8 (two): what no batch can avoid.
    static = 8 * row["parameters"] + 4 * blocks + 8 * 2 * table
    # Per token and layer at least: q, k, v, the attention's output, two inputs, relu² and its root of 4C, 2 bytes each.
    least = static + row["micro_batch"]["rows"] * 2048 * 12 * 768 * 2 * (4 + 2 + 8)
    assert least < row["memory_bytes"] <= 0.92 * 16 * 2**30
    # No faster than the matmul anyone measured (8.4 TFLOP/s), nor slower than half of it.
    fastest = 8.4e12 / flops
    assert 0.5 * fastest < row["tokens_per_second"] < fastest
    assert row["tokens"] == pytest.approx(row["tokens_per_second"] * 8 * 3600)
    assert row["steps"] == int(row["tokens"] / 524288)
    assert row["tokens_per_parameter"] == pytest.approx(row["tokens"] / row["parameters"])
    # 20 tokens per parameter are 3.9e18 FLOPs: 135 hours at 8 TFLOP/s.
    assert 20 * row["parameters"] * flops == pytest.approx(3.9e18, rel=0.02)
    hours_at_8_tflops = 20 * row["parameters"] * flops / 8e12 / 3600
    assert hours_at_8_tflops == pytest.approx(135, rel=0.02)
    assert row["chinchilla_hours"] == pytest.approx(hours_at_8_tflops * 8e12 / flops / row["tokens_per_second"])


def test_the_default_recipe_by_hand(capsys):
    (row,) = planned(capsys, "--card=p100", "--hours=8", "--depth=12")["rows"]
    # The classic d12, a value embedding of 65536 × 768 in every other layer, and a few scalars and gates.
    assert 0 <= row["parameters"] - (185_597_952 + 6 * 65536 * 768) < 1000
    assert row["memory_bytes"] <= 0.92 * 16 * 2**30
    assert row["total_batch_size"] == 32768  # 174 million tokens: 4096 · 174^0.383 = 29,500
    assert row["steps"] == int(row["tokens"] / 32768)


def test_the_p100_is_not_promised_the_float16_of_its_data_sheet():
    p100 = CardRoofline(find_card("p100"))
    assert p100.matmul_tflops("float16") < 8.6 < find_card("p100").float16
    assert CardRoofline(find_card("GTX 1080 Ti")).matmul_tflops("float16") < 11.3
    assert [best_dtype(find_card(name)) for name in ("p100", "t4", "v100", "a100")] == [
        "float16",
        "float16",
        "float16",
        "bfloat16",
    ]


@pytest.mark.parametrize("card", CARDS)
def test_a_card_is_no_faster_than_its_matmuls_and_the_table_is_the_same_everywhere(card, capsys, monkeypatch):
    flags = (f"--card={card}", "--depth=8")
    (row,) = planned(capsys, *flags)["rows"]
    known = find_card(card)
    limit = CardRoofline(known).matmul_tflops(best_dtype(known)) * 1e12 / row["flops_per_token"]
    assert 0.2 * limit < row["tokens_per_second"] < limit
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # another machine
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert planned(capsys, *flags)["rows"] == [row]


def test_the_whole_table_marks_one_best_choice(capsys):
    script.run_script(script.main, script.Config, ["--card=p100", "--hours=8", "--markdown", "--vocab_size=16384"])
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 17
    assert len([line for line in lines if "**" in line]) == 1
    assert "guesses" in text
    assert "python -m scripts.base_train --depth=" in text


def test_a_table_for_people(capsys):
    script.run_script(script.main, script.Config, ["--card=p100", "--depth=6", "--recipe=classic"])
    text = capsys.readouterr().out
    assert "P100, 16 GB: 8 hours" in text
    assert "60.9M" in text


def test_more_hours_more_cards_and_the_modern_recipe(capsys):
    eight = ("--card=t4", "--depth=8")
    (one,) = planned(capsys, *eight, "--recipe=classic")["rows"]
    (longer,) = planned(capsys, *eight, "--recipe=classic", "--hours=16")["rows"]
    (two,) = planned(capsys, *eight, "--recipe=classic", "--num_cards=2")["rows"]
    (modern,) = planned(capsys, *eight, "--recipe=modern")["rows"]
    assert longer["tokens"] == pytest.approx(2 * one["tokens"])
    assert longer["bpb"] < one["bpb"]
    assert one["tokens_per_second"] < two["tokens_per_second"] < 2 * one["tokens_per_second"]
    assert modern["bpb"] < one["bpb"]
    (short,) = planned(capsys, "--card=p100", "--depth=8", "--recipe=modern", "--hours=1")["rows"]
    assert short["total_batch_size"] < modern["total_batch_size"]  # by the horizon


def test_a_model_that_does_not_fit_is_said_not_to(capsys):
    script.run_script(script.main, script.Config, ["--card=GTX 1050", "--depth=20"])
    text = capsys.readouterr().out
    assert "none" in text
    assert "None of these fits" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--card=rtx 309"], "did you mean RTX 3090"),
        (["--card=T4 x2", "--num_cards=4"], "different numbers"),
        (["--card=tesla k80"], "no torch that this project supports has kernels"),
        (["--card=banana"], "is not in nanochat/cards.py"),
        (["--card=,"], "names no card"),
        *((["--card=p100", f"--hours={hours}"], "--hours must be above 0") for hours in ("0", "nan", "inf", "1e308")),
        (["--card=p100", "--num_cards=0"], "--num_cards must be at least 1"),
        (["--card=p100", "--depth=0"], "--depth must be at least 1"),
    ],
)
def test_nonsense_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        script.run_script(script.main, script.Config, flags)
    assert message in capsys.readouterr().err


def flops_by_kind(config: GPTConfig, rows: int, passes: int) -> dict[str, float]:
    """FLOPs of a step, by kind of operation."""
    result: dict[str, float] = {}
    for op in step_operations(config, rows, config.sequence_len, passes, "float32", CLASSIC):
        result[op.kind] = result.get(op.kind, 0.0) + op.count * op.flops
    return result


def test_the_operations_are_those_that_estimate_flops_counts():
    config = GPTConfig.from_depth(6, 8192, 512)
    with torch.device("meta"):
        model = GPT(config)
    kinds = flops_by_kind(config, 4, 3)
    tokens = 4 * 512 * 3
    matmuls = 6 * model.num_matmul_params()
    assert kinds["linear"] + kinds["loss"] == pytest.approx(tokens * matmuls)
    # The estimate counts 12·H·D·T; a causal kernel computes half of that, and its backward pass one product more.
    assert kinds["attention"] == pytest.approx(tokens * (model.estimate_flops() - matmuls) * 14 / 24)
    blocks = list(model.blocks.parameters())
    assert kinds["muon"] == sum(5 * (4 * min(p.shape) * p.numel() + 2 * min(p.shape) ** 3) for p in blocks)


def test_a_step_takes_as_long_as_its_parts_and_more_passes_take_longer():
    card = CardRoofline(find_card("p100"))
    config = GPTConfig.from_depth(4, 8192, 512)
    parts = [op.count * card.seconds(op) for op in step_operations(config, 8, 512, 2, "float16", CLASSIC)]
    speed = tokens_per_second(card, config, 8, 512, 2, "float16", CLASSIC)
    assert speed == pytest.approx(8 * 512 * 2 / sum(parts))
    assert tokens_per_second(card, config, 8, 512, 16, "float16", CLASSIC) > speed  # the update is shared by more


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_timed_here_and_only_once(tmp_path, recipe, dtype, monkeypatch):
    preset = PRESETS[recipe]
    config = GPTConfig.from_depth(1, 256, 32, window_pattern="SL", **preset.switches)
    machine = LocalMachine(torch.device("cpu"), Precision("cpu", DTYPES[dtype]), preset, tmp_path / "speeds.json")
    small = machine.tokens_per_second(config, MicroBatch(2, 1 << 20, True), 2)
    assert small > 0
    monkeypatch.setattr(LocalMachine, "_measure", lambda *_: pytest.fail("was known"))
    again = LocalMachine(torch.device("cpu"), Precision("cpu", DTYPES[dtype]), preset, tmp_path / "speeds.json")
    assert again.tokens_per_second(config, MicroBatch(2, 1 << 20, True), 2) == small


def test_a_pass_over_few_tokens_stands_for_many_and_the_update_for_any_number_of_passes(monkeypatch):
    machine = LocalMachine(torch.device("cpu"), Precision("cpu", torch.float32), CLASSIC)
    timed = []
    monkeypatch.setattr(
        machine, "_measure", lambda config, micro: (timed.append(micro.rows), (1.0 * micro.rows, 4.0))[1]
    )
    config = GPTConfig.from_depth(4, 256, 1024)
    assert machine.tokens_per_second(config, MicroBatch(1), 1) == pytest.approx(1024 / 5)
    assert machine.tokens_per_second(config, MicroBatch(20), 1) == pytest.approx(20 * 1024 / 24)
    assert machine.tokens_per_second(config, MicroBatch(2), 8) == pytest.approx(16 * 1024 / 20)
    assert timed == [1, 2, 2]  # 2048 tokens are enough


def test_the_prediction_is_what_training_reaches():
    """A real step of two micro-batches; the machine may be busy, so within a factor of three."""
    precision = Precision("cpu", torch.float32)
    config = GPTConfig.from_depth(2, 512, 128)
    predicted = LocalMachine(torch.device("cpu"), precision, CLASSIC).tokens_per_second(config, MicroBatch(4), 2)
    model = GPT(config)
    model.init_weights()
    rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "matrix_lr": 0.02, "weight_decay": 0.0}
    optimizer = MuonAdamW(parameter_groups(model, **rates))
    idx = random_tokens(512, 4, 128, torch.device("cpu"))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(2):
            precision.backward(model(idx[:, :-1], idx[:, 1:].contiguous()) / 2)
        precision.step([optimizer], 1.0)
        seconds.append(time.perf_counter() - start)
    assert 1 / 3 < predicted / (2 * 4 * 128 / min(seconds)) < 3


def test_depths_between_the_measured_ones_take_their_flops_per_second():
    budget = Budget(
        hours=1.0,
        recipe="classic",
        vocab_size=4096,
        sequence_len=512,
        dtype="float16",
        num_cards=1,
        memory_bytes=8 << 30,
        fineweb=False,
    )
    known = card_speed(CardRoofline(find_card("p100")), budget)
    speed, micro = measured_speed(known, budget, (4, 8)), MicroBatch(4)
    assert speed(budget.config(8), micro, 2) == pytest.approx(known(budget.config(8), micro, 2))
    low, middle, high = (plan_row(depth, budget, speed) for depth in (4, 6, 8))
    rates = [row.tokens_per_second * row.flops_per_token for row in (low, middle, high)]
    assert min(rates[0], rates[2]) <= rates[1] <= max(rates[0], rates[2])
    beyond = plan_row(12, budget, speed)
    assert beyond.tokens_per_second < high.tokens_per_second
    assert plan_row(6, budget, known).tokens_per_second == pytest.approx(middle.tokens_per_second, rel=0.1)


def test_only_what_fits_is_timed():
    budget = Budget(
        hours=1.0,
        recipe="classic",
        vocab_size=4096,
        sequence_len=512,
        dtype="float32",
        num_cards=1,
        memory_bytes=800 << 20,
        fineweb=False,
        device_type="cpu",
    )
    timed = []

    def measure(config, micro, passes):
        memory = estimate_training_memory(config, micro, 512, budget.setup)
        assert memory.total <= budget.memory_bytes
        timed.append((config.n_layer, micro.rows * passes))
        return 1000.0

    rows = plan([4, 6, 8, 10, 12], budget, measured_speed(measure, budget, (4, 8, 12)))
    assert [row.depth for row in rows if row.micro_batch is None] == [10, 12]
    assert {depth for depth, _ in timed} == {4, 8}
    assert {tokens for _, tokens in timed} == {1024}  # every depth in steps of the same 524,288 tokens


# --- the depth that a card gets by itself ----------------------------------------------------------------------------

P100_CARD, T4_CARD = DeviceInfo("Tesla P100-PCIE-16GB", (6, 0), 16280), DeviceInfo("Tesla T4", (7, 5), 15360)


def test_a_card_that_holds_it_gets_the_guides_d12_and_hears_what_auto_would_take(capsys):
    (own,) = planned(capsys, "--card=p100", "--hours=8", "--depth=12")["rows"]
    best = next(row for row in planned(capsys, "--card=p100", "--hours=8", "--vocab_size=auto")["rows"] if row["best"])
    profile = profile_for(Settings(), [P100_CARD])
    assert (profile.depth, profile.vocab_size, profile.hours) == (12, 65536, 8.0)
    assert profile.about == (
        f"depth 12, vocabulary 65,536; DEPTH=auto VOCAB_SIZE=auto would take depth {best['depth']}, vocabulary "
        f"{best['vocab_size']:,}: {best['bpb']:.3f} instead of {own['bpb']:.3f} bits per byte, planned for 8 hours on "
        f"{P100_CARD.name}, ± {ERROR:.0%}"
    )
    chosen = profile_for(Settings.from_env({"DEPTH": "auto", "VOCAB_SIZE": "Auto"}), [P100_CARD])
    assert (chosen.depth, chosen.vocab_size) == (best["depth"], best["vocab_size"])
    assert f"{best['bpb']:.3f} bits per byte" in chosen.about


def test_what_the_user_set_stays_and_the_rest_is_chosen():
    def chosen(**env):
        profile = profile_for(Settings.from_env(env), [P100_CARD])
        return profile.depth, profile.vocab_size

    assert chosen(DEPTH="8", VOCAB_SIZE="auto")[0] == 8
    assert chosen(VOCAB_SIZE="auto")[0] == 12
    assert chosen(DEPTH="auto")[1] == 65536
    assert chosen(DEPTH="auto", VOCAB_SIZE="8192")[1] == 8192
    assert chosen(VOCAB_SIZE="8192") == (12, 8192)


def test_an_hour_of_a_slow_card_takes_a_smaller_vocabulary_than_a_day_of_a_fast_one():
    def vocab_size(card, hours):
        return profile_for(Settings(auto_depth=True, auto_vocab=True, hours=hours), [card]).vocab_size

    fast = DeviceInfo("NVIDIA GeForce RTX 3090", (8, 6), 24576)
    assert vocab_size(P100_CARD, 1.0) < vocab_size(fast, 24.0)


@pytest.mark.parametrize("name", ["DEPTH", "VOCAB_SIZE"])
def test_auto_where_the_planner_can_not_say(name):
    settings = Settings.from_env({name: "auto"})
    with pytest.raises(ValueError, match=f"{name}=auto: the planner has no data sheet of Radiant.*: set {name} to a"):
        profile_for(settings, [DeviceInfo("Radiant Z9000", (9, 0), 40960)])
    with pytest.raises(ValueError, match=f"{name}=auto plans for CUDA cards, not for PROFILE=demo: set {name} to a"):
        profile_for(settings, [])


def test_a_depth_that_no_vocabulary_makes_fit():
    settings = Settings.from_env({"DEPTH": "20", "VOCAB_SIZE": "auto"})
    with pytest.raises(ValueError, match="nothing that was planned fits"):
        profile_for(settings, [DeviceInfo("NVIDIA GeForce GTX 1050 Ti", (6, 1), 4096)])


def test_the_script_says_what_each_vocabulary_gives(capsys):
    script.run_script(script.main, script.Config, ["--card=p100", "--hours=1", "--vocab_size=auto", "--depth=4"])
    assert re.search(r"each vocabulary: 4,096 d4 [\d.]+; 8,192 d4 .*; 65,536 d4 [\d.]+\.", capsys.readouterr().out)
    with pytest.raises(ValueError, match="--card"):
        script.Config(vocab_size="auto")
    cfg = script.Config(card="p100", hours=1, vocab_size="auto")
    target = script.target_card(cfg)
    rows, _ = script.planned(cfg, target, (2, 3))
    tokenizer = f"python -m scripts.tok_train --dataset=climbmix --vocab_size={rows[0].vocab_size}"
    trains = f"{tokenizer}, then python -m scripts.base_train --d"
    assert trains in script.notes(cfg, target, rows)[-1]


def test_the_guides_night_takes_nine_hours():
    profile = profile_for(Settings(), [P100_CARD])
    hours = [profile.stage_hours(stage) for stage in ("base_train", "mid_train", "chat_sft", "chat_eval_sft")]
    assert hours == [8.0, pytest.approx(0.5), pytest.approx(1 / 3), None]
    assert profile_for(Settings(hours=0.6), [P100_CARD]).stage_hours("mid_train") == pytest.approx(0.2)


def test_more_hours_more_cards_and_faster_cards_make_deeper_models():
    def depth(*cards, **settings):
        return profile_for(Settings(auto_depth=True, **settings), cards).depth

    assert depth(P100_CARD, hours=1.0) < depth(P100_CARD) < depth(P100_CARD, hours=24.0)
    assert depth(P100_CARD) <= depth(T4_CARD) < depth(T4_CARD, T4_CARD)
    assert depth(P100_CARD, T4_CARD) == depth(P100_CARD, P100_CARD)  # the slower one sets the pace


@pytest.mark.parametrize(
    ("name", "capability", "gb"),
    [("NVIDIA GeForce GTX 1050 Ti", (6, 1), 4), ("NVIDIA GeForce RTX 2060", (7, 5), 6), ("Tesla P4", (6, 1), 8)],
)
def test_a_small_card_gets_a_depth_that_fits_into_it(capsys, name, capability, gb):
    profile = profile_for(Settings(), [DeviceInfo(name, capability, gb * 1024)])
    depth = profile.depth
    assert depth < 12
    assert "depth 12 does not fit" in profile.about
    (row,) = planned(capsys, f"--card={name}", "--hours=8", f"--depth={depth}")["rows"]
    assert row["micro_batch"]["rows"] >= 1
    assert row["memory_bytes"] < gb * 2**30


def test_the_users_depth_and_unknown_cards_and_other_profiles_keep_theirs():
    unknown = DeviceInfo("Radiant Z9000", (9, 0), 40960)
    assert profile_for(Settings(depth=12), [P100_CARD]).depth == 12
    assert profile_for(Settings(), [unknown]) == choose_profile(Settings(), 1)
    assert profile_for(Settings(profile="demo"), [P100_CARD]) == choose_profile(Settings(profile="demo"), 1)
    assert profile_for(Settings(), []) == choose_profile(Settings(), 0)
    for cards in ([unknown], []):
        with pytest.raises(ValueError, match="DEPTH=auto"):
            profile_for(Settings(auto_depth=True), cards)


# --- how a card is named ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "gb", "count"),
    [
        ("T4 x2", "T4", 16, 2),
        ("t4x2", "T4", 16, 2),
        ("2x T4", "T4", 16, 2),
        ("2 × Tesla T4", "T4", 16, 2),
        ("rtx 4090 x8", "RTX 4090", 24, 8),
        ("P100 12GB", "P100-PCIE-12GB", 12, 1),
        ("p100 16 GB", "P100", 16, 1),
        ("v100 32gb", "V100-PCIE-32GB", 32, 1),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB", 32, 1),
        ("A100 80GB x8", "A100 80GB PCIe", 80, 8),
        ("NVIDIA H100 80GB HBM3", "H100", 80, 1),
        ("3060", "RTX 3060", 12, 1),
        ("rtx3060", "RTX 3060", 12, 1),
        ("rtx3060ti", "RTX 3060 Ti", 8, 1),
        ("rtx 3060 8GB", "RTX 3060 8GB", 8, 1),
        ("1080ti", "GTX 1080 Ti", 11, 1),
        ("gtx970", "GTX 970", 4, 1),
        ("m40", "Tesla M40", 12, 1),
        ("tesla m40 24gb", "Tesla M40 24GB", 24, 1),
        ("GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER", 16, 1),
    ],
)
def test_a_card_as_people_write_it(text, name, gb, count):
    card, number = parse_card(text)
    assert (card.name, card.memory_gb, number) == (name, gb, count)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("T4 turbo", 'T4 is known, but not what "turbo" means'),
        ("T4 + P100", "not what"),
        ("T4 3GB", "a T4 has 16 GB, not 3"),
        ("P100 x0", "0 cards"),
        ("100", "did you mean P100"),
        ("rtx 3080 laptop", "is not in nanochat/cards.py"),
        ("GTX 780 Ti", "no torch that this project supports"),
        ("", "--card=list"),
    ],
)
def test_what_is_not_understood_is_named(text, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_card(text)


def test_every_card_of_the_table_is_understood_by_its_own_name():
    for card in CARDS_OF_THE_TABLE:
        assert parse_card(card.name) == (card, 1)


def test_the_count_in_the_name_is_planned(capsys):
    (two,) = planned(capsys, "--card=T4 x2", "--depth=8")["rows"]
    (also,) = planned(capsys, "--card=t4", "--num_cards=2", "--depth=8")["rows"]
    assert two == also


def test_the_list_of_cards(capsys):
    script.run_script(script.main, script.Config, ["--card", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CARDS_OF_THE_TABLE)
    assert any(line.startswith("P100 ") and "16 GB" in line for line in lines)
