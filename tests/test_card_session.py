"""The eight minutes on a card, rehearsed on the CPU at a tiny size; and what the planner makes of measured cards."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "dev"))

import card_session

from dev import card_table
from nanochat.cards import find_card
from nanochat.gpt import GPTConfig
from nanochat.plan.measured import CardRecord, measured_card, read_record, read_records
from nanochat.plan.roofline import CardRoofline, tokens_per_second
from nanochat.recipe import PRESETS

TINY = ["--device_type=cpu", "--tiny"]


@pytest.mark.parametrize("name", ["steps", "loss", "memory", "decode", "scaling", "halfgemm", "peer"])
def test_a_part_runs_at_a_tiny_size(name, tmp_path):
    result = getattr(card_session, f"part_{name}")(card_session.parse_arguments(TINY), tmp_path)
    assert result["ok"]
    json.dumps(result)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    assert card_session.part_resume(card_session.parse_arguments(TINY), tmp_path)["ok"]


def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(card_session.LIMITS, "decode", 0.01)
    out = tmp_path / "card.json"
    parts = "--parts=decode,peer,memory"
    assert card_session.main([*TINY, parts, "--peer=/nowhere/at/all", f"--out={out}"]) == 1
    found = json.loads(out.read_text())["parts"]
    assert "not done in" in found["decode"]["error"]
    assert not found["peer"]["ok"]
    assert found["memory"]["ok"]
    said = capsys.readouterr().out
    assert said.startswith("3 parts, planned for at most 1.7 minutes on a card")
    assert said.count("FAILED") == 2


def test_every_part_has_a_limit_and_they_are_eight_minutes():
    assert all(hasattr(card_session, f"part_{name}") for name in card_session.LIMITS)
    assert sum(card_session.LIMITS.values()) <= 8 * 60


def test_a_card_is_needed_or_named_and_parts_are_known(capsys):
    for flags, said in ([[], "--device_type=cpu --tiny"], [[*TINY, "--parts=dreams"], "unknown dreams"]):
        with pytest.raises(SystemExit):
            card_session.parse_arguments(flags)
        assert said in capsys.readouterr().err


# --- the table of cards ----------------------------------------------------------------------------------------------


def record(**more):
    step = {"depth": 4, "rows": 2, "vocab_size": 4096, "sequence_len": 512, "recipe": "small", "dtype": "float16"}
    found = {"device": "Tesla T4", "capability": "7.5", "memory_gib": 14.6, "torch": "2.14.0+cu126"}
    return found | {"matmul_tflops": {"float16": 21.0, "bfloat16": None}, "steps": [step | {"seconds": 0.5}]} | more


def test_the_planner_takes_what_was_measured_before_what_it_guesses(tmp_path):
    (tmp_path / "t4.json").write_text(json.dumps(record()))
    card = find_card("t4")
    own = measured_card("T4", tmp_path)
    assert own is not None
    assert measured_card("P100", tmp_path) is None
    plain, known = CardRoofline(card), CardRoofline(card, measured=own)
    assert (plain.matmul_tflops("float16"), known.matmul_tflops("float16")) == (42.0, 21.0)
    assert known.matmul_tflops("bfloat16") == plain.matmul_tflops("bfloat16")
    config = GPTConfig.from_depth(4, 4096, 512, **PRESETS["small"].switches)
    speed = tokens_per_second(known, config, 2, 512, 1, "float16", PRESETS["small"])
    assert speed == pytest.approx(2 * 512 / 0.5)  # of the very step that was measured


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "T4"}', json.dumps(record(matmul_tflops={"float16": "fast"}))])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "t4.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t4\.json: not the record of a card"):
        read_records(tmp_path)


def test_a_session_ends_with_a_record_that_can_be_read(tmp_path):
    parts = {"dtypes": record(), "steps": {"rows": [record()["steps"][0] | {"planned_gib": 1.0}, {"depth": 16}]}}
    path = tmp_path / "card.json"
    path.write_text(json.dumps(card_session.card_record(parts)))
    read = read_record(path)
    assert read.device == "Tesla T4"
    assert len(read.steps) == 1
    assert card_session.card_record({"dtypes": {"ok": False}}) is None
    assert "2,048 tokens/s" in card_table.line(read)[-2]
    assert len(card_table.line(read)) == len(card_table.HEAD)


def test_the_records_of_this_checkout_are_read():
    assert all(isinstance(found, CardRecord) for found in read_records())
