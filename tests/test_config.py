"""The command line: every way to write a flag, and errors that name it."""

import dataclasses
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest

from nanochat.config import FIRST_FLAGS, MANY_FLAGS, Runtime, flag_names, parse_config, run_script, short


@dataclass(frozen=True, kw_only=True)
class Config:
    runtime: Runtime = field(default_factory=Runtime)
    depth: int = 4
    """Layers."""
    device_batch_size: int = 8
    """Rows."""
    prompt: Annotated[str, short("-p")] = ""
    """Question."""
    dry_run: bool = False
    """Plan only."""

    def __post_init__(self):
        if self.depth < 1:
            raise ValueError("--depth must be at least 1")


@pytest.mark.parametrize(
    "argv",
    [
        ["--depth=8", "--device_batch_size=16"],
        ["--depth", "8", "--device-batch-size", "16"],
        ["--device-batch-size=16", "--depth=8", "--device_type="],
    ],
)
def test_every_spelling_of_a_flag(argv):
    cfg = parse_config(Config, argv)
    assert (cfg.depth, cfg.device_batch_size) == (8, 16)


def test_nested_flags_have_no_prefix_and_short_flags_work():
    cfg = parse_config(Config, ["--dtype=float16", "-p", "hi", "--dry_run"])
    assert (cfg.runtime.dtype, cfg.prompt, cfg.dry_run) == ("float16", "hi", True)
    assert parse_config(Config, ["-d", "bfloat16"]).runtime.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--depht=8"], "--depht"),
        (["--depth=eight"], "--depth"),
        (["--depth=0"], "--depth must be at least 1"),
        (["--dtype=float8"], "--dtype"),
    ],
)
def test_bad_flags_exit_with_2_and_name_the_flag(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_errors_of_the_run_are_one_sentence_and_exit_with_1(capsys):
    def main(cfg):
        raise ValueError("the folder is empty: put text there")

    with pytest.raises(SystemExit) as stop:
        run_script(main, Config, [])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: the folder is empty: put text there\n"


def test_a_flag_that_only_nanochat_has_names_what_does_it_here(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--core-metric-every=200", "--resume_from_step", "3"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Unrecognized options: --core-metric-every=200")  # where boxes are ASCII too
    assert "scripts.base_eval" in line
    assert "--resume_from_step: an unfinished run goes on by itself" in line
    with pytest.raises(SystemExit):
        parse_config(Config, ["--nonsense=1"])
    assert "nanochat" not in capsys.readouterr().err


def test_usage_names_the_command_and_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "scripts.tok_eval", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # as `| head -0` does
        assert process.stderr.read() == ""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python -m scripts.tok_eval ")


SCRIPTS = ["base_train", "base_eval", "mid_train", "chat_sft", "chat_rl", "chat_eval", "chat_cli", "chat_web"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_what_is_needed_first_and_help_all_the_rest(name, capsys):
    config = importlib.import_module(f"scripts.{name}").Config
    flags = flag_names(config)

    def shown(option):
        with pytest.raises(SystemExit) as stop:
            parse_config(config, [option])
        assert not stop.value.code
        text = capsys.readouterr().out
        return text, [flag for flag in flags if re.search(rf"--(no_)?{flag}\b", text)]

    short_text, first = shown("--help")
    assert 5 <= len(first) <= 11
    assert f"{len(flags) - len(first)} more flags" in short_text
    assert "--help_all" in short_text
    long_text, everything = shown("--help_all")
    assert everything == flags
    assert "more flags" not in long_text


def test_every_first_flag_is_one_of_a_script():
    flags = {flag for name in SCRIPTS for flag in flag_names(importlib.import_module(f"scripts.{name}").Config)}
    assert flags >= FIRST_FLAGS


def test_help_of_many_flags_shows_those_that_must_be_given(capsys):
    flags = [(f"number_{i}", int, 0) for i in range(MANY_FLAGS)]
    config = dataclasses.make_dataclass("Many", [("folder", str), *flags], kw_only=True, frozen=True)
    config.__doc__ = "Many flags."
    with pytest.raises(SystemExit) as stop:
        parse_config(config, ["--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    assert "--folder" in text
    assert "number_1" not in text
    assert f"{MANY_FLAGS} more flags" in text


def test_a_script_with_few_flags_shows_them_all(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{flag}" in text for flag in flag_names(Config))
