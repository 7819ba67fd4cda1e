"""The table of cards: names as torch prints them find the right row. Of unequal cards the fastest group trains."""

import subprocess
import sys

import pytest

from nanochat.cards import CARDS, MEASURED_MATMUL, DeviceInfo, choose_cards, describe_choice, find_card, training_speed


@pytest.mark.parametrize(
    ("name", "row", "capability"),
    [
        ("Tesla P100-PCIE-16GB", "P100", (6, 0)),
        ("Tesla P100-PCIE-12GB", "P100-PCIE-12GB", (6, 0)),
        ("Tesla P100-SXM2-16GB", "P100-SXM2", (6, 0)),
        ("Tesla P40", "P40", (6, 1)),
        ("Tesla P4", "P4", (6, 1)),
        ("NVIDIA GeForce GTX 1080", "GTX 1080", (6, 1)),
        ("NVIDIA GeForce GTX 1080 Ti", "GTX 1080 Ti", (6, 1)),
        ("GeForce GTX 1060 3GB", "GTX 1060 3GB", (6, 1)),
        ("NVIDIA TITAN Xp", "TITAN Xp", (6, 1)),
        ("NVIDIA TITAN X (Pascal)", "TITAN X", (6, 1)),
        ("NVIDIA GeForce GTX TITAN X", "GTX TITAN X", (5, 2)),
        ("Tesla V100-SXM2-16GB", "V100-SXM2", (7, 0)),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32GB", (7, 0)),
        ("Tesla V100-PCIE-16GB", "V100", (7, 0)),
        ("Tesla V100S-PCIE-32GB", "V100S", (7, 0)),
        ("NVIDIA TITAN V", "TITAN V", (7, 0)),
        ("Tesla T4", "T4", (7, 5)),
        ("NVIDIA GeForce RTX 2080 Ti", "RTX 2080 Ti", (7, 5)),
        ("NVIDIA GeForce RTX 2070 SUPER", "RTX 2070 SUPER", (7, 5)),
        ("Quadro RTX 6000", "Quadro RTX 6000", (7, 5)),
        ("NVIDIA A100-SXM4-40GB", "A100", (8, 0)),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB", (8, 0)),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", (8, 0)),
        ("NVIDIA A10", "A10", (8, 6)),
        ("NVIDIA A10G", "A10G", (8, 6)),
        ("NVIDIA RTX A6000", "RTX A6000", (8, 6)),
        ("NVIDIA GeForce RTX 3080 Ti", "RTX 3080 Ti", (8, 6)),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", (8, 6)),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", (8, 9)),
        ("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada", (8, 9)),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", (8, 9)),
        ("NVIDIA GeForce RTX 4090 D", "RTX 4090 D", (8, 9)),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER", (8, 9)),
        ("NVIDIA L40", "L40", (8, 9)),
        ("NVIDIA L40S", "L40S", (8, 9)),
        ("NVIDIA H100 80GB HBM3", "H100", (9, 0)),
        ("NVIDIA H100 PCIe", "H100 PCIe", (9, 0)),
        ("NVIDIA H200", "H200", (9, 0)),
        ("NVIDIA B200", "B200", (10, 0)),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", (12, 0)),
    ],
)
def test_torchs_names_find_their_row(name, row, capability):
    card = find_card(name)
    assert card is not None
    assert (card.name, card.capability) == (row, capability)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "NVIDIA GeForce RTX 2080 with Max-Q Design",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA T400",
        "NVIDIA GeForce RTX 9999",
        "AMD Instinct MI250X",
        "",
    ],
)
def test_slower_namesakes_and_strangers_are_unknown(name):
    assert find_card(name) is None


def test_every_row_is_found_by_its_own_name_and_is_plausible():
    assert len(CARDS) >= 40
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert find_card(f"NVIDIA {card.name}") == card
        assert card.float32 <= card.float16 <= 35 * card.float32
        assert 0 < card.memory_gb < card.bandwidth_gbs < 10_000


def test_peaks_by_dtype():
    p100, t4, a100 = (find_card(name) for name in ("Tesla P100-PCIE-16GB", "Tesla T4", "NVIDIA A100-SXM4-40GB"))
    assert [p100.peak_tflops(d) for d in ("float32", "float16", "bfloat16")] == [9.3, 18.7, None]
    assert [t4.peak_tflops(d) for d in ("float32", "float16", "bfloat16")] == [8.1, 65.0, None]
    # Float32 matmuls round to TF32 there, and Precision lets them.
    assert [a100.peak_tflops(d) for d in ("float32", "float16", "bfloat16")] == [156.0, 312.0, 312.0]
    assert [p100.tensor_cores, t4.tensor_cores] == [False, True]
    with pytest.raises(ValueError, match="float64"):
        t4.peak_tflops("float64")


# --- which cards train -----------------------------------------------------------------------------------------------


def device(name: str, memory_mib: int = 16384, capability: tuple[int, int] | None = (7, 5)) -> DeviceInfo:
    return DeviceInfo(name, capability, memory_mib)


@pytest.mark.parametrize(
    ("cards", "chosen"),
    [
        ([], []),
        ([device("Tesla T4"), device("Tesla T4")], [0, 1]),
        ([device("NVIDIA GeForce GTX 1050"), device("Tesla P100-PCIE-16GB")], [1]),
        ([device("Tesla T4")] * 4 + [device("NVIDIA A100-SXM4-40GB")], [4]),
        ([device("NVIDIA GeForce RTX 3060")] * 3 + [device("NVIDIA GeForce RTX 3090")], [0, 1, 2]),
        ([device("V100", 16160), device("V100", 32510)], [1]),
        ([device("Tesla K80", capability=(3, 7))], []),
        ([device("Tesla K80", capability=(3, 7)), device("Tesla T4")], [1]),
        ([device("a card of tomorrow", capability=None)], [0]),
    ],
)
def test_the_fastest_group_of_equal_cards_trains(cards, chosen):
    assert choose_cards(cards) == chosen


def test_idle_cards_are_named():
    cards = [device("Tesla T4"), device("GTX 1050"), device("Tesla T4")]
    assert describe_choice(cards, choose_cards(cards)) == "2 × Tesla T4; idle: GTX 1050"


def test_speeds_rank_cards_that_nobody_measured_by_their_data_sheet():
    assert training_speed("NVIDIA GeForce GTX 1080") < training_speed("NVIDIA GeForce RTX 3060")
    assert training_speed("Tesla T4") < training_speed("Tesla V100-SXM2-16GB") < training_speed("something new")


def test_every_measured_card_has_a_row():
    for name, speeds in MEASURED_MATMUL.items():
        card = find_card(name)
        assert card is not None
        assert all(speeds[dtype] <= (card.peak_tflops(dtype) or card.float32) for dtype in speeds)


def test_the_command_for_the_shell():
    lines = "NVIDIA GeForce GTX 1050,6.1,2048\nTesla T4,,15360\nTesla T4,7.5,15360\n"
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.cards"], input=lines, capture_output=True, text=True, check=True
    )
    assert done.stdout == "1 2\n2 × Tesla T4; idle: NVIDIA GeForce GTX 1050\n"
