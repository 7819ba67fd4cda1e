"""The documents: every command runs, every link leads somewhere, every figure has a source, tables are up to date.

Commands run at a tiny size in one folder: `SIZES` has their flags, `DRY` those that are tested in another way. A
command that is in neither fails, so that no document can name one that is never run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import nanochat
import tasks
from dev import docs
from nanochat.config import parse_config

ROOT = docs.ROOT
BLOCKS = [block for path in docs.DOCUMENTS for block in docs.blocks(path)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
names = pytest.mark.parametrize("path", docs.DOCUMENTS, ids=docs.name_of)

TRAIN = {"device_type": "cpu", "num_iterations": 1, "hours": None, "eval_every": 0, "resume": "never"}
FINETUNE = {"device_batch_size": 2, "total_batch_size": 128, "eval_batches": 1, "chat_data": "demo"}
CHAT = {"device_type": "cpu"}
# The flags with which a module's command is run here; None removes a flag.
SIZES: dict[str, dict[str, object]] = {
    "tasks.demo": {"chars": 100_000},
    "scripts.tok_train": {"vocab_size": 600},
    "scripts.base_train": {
        **TRAIN,
        "depth": 1,
        "max_seq_len": 64,
        "device_batch_size": 2,
        "total_batch_size": 256,
        "num_iterations": 2,
        "eval_tokens": 256,
        "sample_every": 0,
    },
    "scripts.mid_train": {**TRAIN, **FINETUNE},
    "scripts.chat_sft": {**TRAIN, **FINETUNE},
    "scripts.chat_rl": {
        **TRAIN,
        "task": "DemoWordSums",
        "examples_per_step": 1,
        "num_samples": 2,
        "device_batch_size": 2,
        "max_new_tokens": 4,
        "eval_examples": 1,
        "eval_samples": 1,
    },
    "scripts.chat_eval": {**CHAT, "task_name": "DemoFacts", "max_problems": 2, "max_new_tokens": 4},
    "scripts.chat_cli": {**CHAT, "max_tokens": 4, "prompt": "Hi"},
    "scripts.export_hf": {},
    "nanochat.report": {},
    "dev.house": {},
    "dev.card_table": {},
}
# Commands that are tested in another way, and how.
DRY = {
    "scripts.chat_web": "its flags are parsed; tests/test_web*.py serve the page and ask it",
    "scripts.export_gguf": "tests/test_export_gguf.py runs it",
    "scripts.export_page": "tests/test_export_page.py runs it",
    "dev.check_runtimes": "tests/test_export_gguf.py uses it; it needs programs from npm",
    "http.server": "Python's own",
    "dev.docs": "`main` runs with --anchors; its output is compared below",
    "pydoc": "rendered below",
    "ruff": "run_tests.sh runs it",
    "pytest": "this is it; the file must exist",
}


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the words of a command."""
    words = shlex.split(command, comments=True)
    env = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, env[name] = words.pop(0).partition("=")
    return env, words


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Module and flags of a Python command; for torchrun those of the script."""
    if not words or words[0] not in ("python", ".venv/bin/python") or words[1] != "-m":
        return None
    if words[2] == "torch.distributed.run":
        words = words[words.index("--") - 1 :]
        return words[2], words[3:]
    return words[2], words[3:]


def resized(flags: list[str], sizes: dict[str, object]) -> list[str]:
    """The documented flags; `sizes` overrides them, and the demo's text replaces the web's."""
    flags = [flag.replace("--dataset=climbmix", "--dataset=demo") for flag in flags]
    flags = [flag.replace("=dev/", f"={ROOT}/dev/") for flag in flags]
    kept = [flag for flag in flags if flag.lstrip("-").partition("=")[0] not in sizes]
    return kept + [f"--{name}={value}" for name, value in sizes.items() if value is not None]


def run_module(name: str, flags: list[str]) -> None:
    """Run a script of this project in this process."""
    package = (docs.ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if package else name)
    module.main(parse_config(module.Config, flags))


COMMANDS = {command: block for block in SHELL for command in block.commands}
HERE = [command for command, block in COMMANDS.items() if block.mark not in ("needs internet", "needs Docker")]
INLINE = sorted(
    {
        code
        for path in docs.DOCUMENTS
        for code in re.findall(r"`((?:\.venv/bin/)?python -m [^`]+)`", path.read_text(encoding="utf-8"))
        if "MODULE" not in code
    }
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the result of a tiny run, as after `bash speedrun_p100.sh`: models of all stages."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "run-a"))
        patch.chdir(folder)
        for name in ("tasks.demo", "scripts.tok_train", "scripts.base_train", "scripts.mid_train", "scripts.chat_sft"):
            data = ["--dataset=climbmix"] if name in ("scripts.tok_train", "scripts.base_train") else []
            run_module(name, resized(data, SIZES[name]))
        run_module("scripts.chat_rl", resized([], SIZES["scripts.chat_rl"]))
    (folder / "run-b").symlink_to(folder / "run-a")
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("A text.\n")
    (folder / "chats.jsonl").write_text(
        '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]\n'
    )
    return folder


# --- commands --------------------------------------------------------------------------------------------------------


def bash(script: Path, flags: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script that must succeed."""
    command = ["bash", str(script), *flags]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)


def verify(checkout: Path, flags: list[str]) -> str:
    """The output of the verification in a checkout that is not set up yet; the machine need not be ready."""
    (checkout / "bin").mkdir(parents=True, exist_ok=True)
    (checkout / "bin" / "curl").write_text("#!/bin/sh\nexit 0\n")  # the network answers
    (checkout / "bin" / "curl").chmod(0o755)
    for name in ("verify_p100_setup.sh", "setup_env.sh"):
        shutil.copy(ROOT / name, checkout)
    if not (checkout / "nanochat").exists():
        (checkout / "nanochat").symlink_to(ROOT / "nanochat")
    env = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(checkout / "verify_p100_setup.sh"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def shell_command(words: list[str], env: dict[str, str], folder: Path, monkeypatch, capsys) -> None:
    """One of the project's shell scripts: check what it starts, and run that dry."""
    script, *flags = words[1:]
    if script == "setup_env.sh":
        done = bash(ROOT / script, [*flags, "--print-torch"] if "--print-torch" not in flags else flags, env)
        assert done.stdout.startswith("torch")
    elif script in ("speedrun_p100.sh", "speedrun.sh"):
        ours = {
            "DATA_DIR": str(folder / "texts"),
            "CHAT_DATA": str(folder / "chats.jsonl"),
            "BASE": str(folder / "run-a" / "base_checkpoints" / "d1"),
        }
        env = {name: ours.get(name, value) for name, value in env.items()}
        checkout = folder / "checkout"
        (checkout / ".venv" / "bin").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, checkout)
        (checkout / "setup_env.sh").write_text("true\n")
        python = checkout / ".venv" / "bin" / "python"
        python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        python.chmod(0o755)
        done = bash(checkout / script, flags, env)
        if "-h" in flags:
            assert "NANOCHAT_BASE_DIR" in done.stdout
            return
        assert done.stdout.split()[:2] == ["-m", "nanochat.pipeline"]
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        run_module("nanochat.pipeline", ["--dry_run"])
        assert "base_train: " in capsys.readouterr().out
    elif script == "verify_p100_setup.sh":
        said = verify(folder / "look", flags)
        assert '"ready": ' in said if flags else re.search(r"ready: bash|problem\(s\)", said)
    else:
        # The first runs this test; tests/test_card_session.py rehearses the other.
        assert script in ("run_tests.sh", "dev/card_session.sh")
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("command", HERE)
def test_a_command_of_a_document_runs(command, workshop, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(workshop / "run-a"))
    monkeypatch.chdir(workshop)
    env, words = split(command)
    if words[0] == "bash":
        shell_command(words, env, workshop, monkeypatch, capsys)
        return
    found = module_of(words)
    assert found is not None, f"{COMMANDS[command].name}: how is `{command}` to be tested?"
    name, flags = found
    if name in SIZES:
        run_module(name, resized(flags, SIZES[name]))
    elif name == "scripts.chat_web":
        assert parse_config(importlib.import_module(name).Config, flags)
    elif name == "scripts.data_check":
        run_module(name, [str(ROOT / "docs") if flag.startswith("/your") else flag for flag in flags])
        assert "md" in capsys.readouterr().out
    elif name == "dev.docs":
        run_module(name, ["--anchors"])
        assert "nanochat/gpt.py:" in capsys.readouterr().out
    else:
        assert name in DRY, f"{COMMANDS[command].name}: how is `{command}` to be tested?"
        for flag in flags:
            if "/" in flag:
                assert (ROOT / flag).exists(), flag


@pytest.mark.parametrize("command", [*[c for c in COMMANDS if c not in HERE], *INLINE])
def test_the_flags_of_a_command_that_is_not_run_are_known(command):
    """Commands that need the internet or another machine, and those in the running text."""
    found = module_of(split(command)[1])
    if found is None or found[0] in DRY:
        return
    name, flags = found
    package = (docs.ROOT / name.replace(".", "/")).is_dir()
    module = importlib.import_module(f"{name}.__main__" if package else name)
    assert parse_config(module.Config, flags)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("NANOCHAT_FULL_DEMO" not in os.environ, reason="ten minutes or more: set NANOCHAT_FULL_DEMO=1")
def test_the_demo_answers_as_the_documents_say(tmp_path, base_dir):
    """Do what `bash speedrun_p100.sh` does after the set-up if there is no card."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PROFILE": "demo"}
    subprocess.run([sys.executable, "-m", "nanochat.pipeline"], cwd=tmp_path, env=env, check=True)
    assert "scatters blue light" in (base_dir / "pipeline" / "answer.log").read_text()
    assert (tmp_path / "report.md").is_file()


def test_every_block_says_in_which_language_it_is():
    for block in BLOCKS:
        assert block.language in ("bash", "python", "text", "json"), block.name


def test_python_blocks_run(workshop, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(workshop / "run-a"))
    monkeypatch.chdir(workshop)
    python = [block for block in BLOCKS if block.language == "python"]
    assert python
    for block in python:
        exec(compile(block.text, block.name, "exec"), {})
    assert capsys.readouterr().out


# --- tables, links, figures, places ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "command", "text"),
    [(path, command, text) for path in docs.DOCUMENTS for command, text in docs.generated(path)],
    ids=lambda value: value if isinstance(value, str) and value.startswith("python") else "",
)
def test_a_generated_block_is_what_its_command_prints(path, command, text):
    assert text == docs.generate(command), f"{path.name}: run `python -m dev.docs`"


@names
def test_links_lead_to_what_is_there(path):
    assert docs.broken_links(path) == []


def test_the_lab_book_links_to_what_is_there():
    assert docs.broken_links(docs.LOG) == []


@names
def test_every_figure_has_its_source(path):
    assert docs.unsourced(path) == []


def test_a_figure_without_a_source_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    path = tmp_path / "a.md"
    path.write_text(
        "# 5 hours\n\nIt makes 38 thousand tokens/s.\n\n- 12 % (data sheet)\n- 3 × as fast\n\n"
        "See [x](dev/LOG.md#x):\n\n| a |\n|---|\n| 7 GB |\n\n"
        "Set `--hours=8`. It is 2 × 8 = 16 hours.\n\n| b |\n|---|\n| 9 hours |\n"
    )
    assert docs.unsourced(path) == ["a.md:3: 38 thousand tokens/s", "a.md:6: 3 ×"]
    path.write_text("Text.\n\n| b | source |\n|---|---|\n| 9 hours | |\n")
    assert docs.unsourced(path) == ["a.md:5: 9 hours"]


def test_sums_in_documents_are_right():
    """To the digits that are written, at least two."""
    shown = [(path.name, *found) for path in docs.DOCUMENTS for found in docs.sums(path)]
    assert len(shown) >= 10
    for document, left, value, written in shown:
        assert value == pytest.approx(written, rel=0.02), f"{document}: {left}"


@names
def test_no_document_names_a_place_on_somebodys_machine(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.~/])/(?:work|tmp|home|root|Users)/\w", text)


def test_places_in_the_code_that_the_tour_names_are_there():
    places = docs.anchors(ROOT / "docs" / "tour.md")
    assert len(places) > 50
    for place in places:
        assert docs.symbol_line(place) > 0
    for path in docs.DOCUMENTS:
        for file in re.findall(
            r"`((?:nanochat|scripts|tasks|tests|dev)/[\w/]+\.\w+)`", path.read_text(encoding="utf-8")
        ):
            assert (ROOT / file).is_file(), f"{path.name}: {file}"


def test_a_place_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"nanochat/gpt\.py:GPT\.backwards: there is no backwards"):
        docs.symbol_line("nanochat/gpt.py:GPT.backwards")
    with pytest.raises(ValueError, match="there is no file"):
        docs.symbol_line("nanochat/gtp.py:GPT")


# --- docstrings ------------------------------------------------------------------------------------------------------


def modules(package) -> list[str]:
    """All modules of a package, except those that are copied into exported folders and follow transformers' style."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [info.name for info in found if ".hf_code" not in info.name and not info.name.endswith("__main__")]


def undocumented(module) -> list[str]:
    """Public names without a docstring. A method may have its own from the class it overrides, or from a Protocol."""
    ours = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    classes = [value for value in ours if inspect.isclass(value) and not value.__name__.startswith("_")]
    functions = [value for value in ours if inspect.isfunction(value) and not value.__name__.startswith("_")]
    promised = {
        key for c in classes if getattr(c, "_is_protocol", False) for key in vars(c) if inspect.getdoc(vars(c)[key])
    }
    missing = [] if module.__doc__ else ["the module"]
    missing += [value.__name__ for value in (*classes, *functions) if not value.__doc__]
    for c in classes:
        for key, member in vars(c).items():
            method = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
            if method and not key.startswith("_") and key not in promised and not inspect.getdoc(getattr(c, key)):
                missing.append(f"{c.__name__}.{key}")
    return missing


@pytest.mark.parametrize("name", [*modules(nanochat), *modules(tasks)])
def test_public_names_have_docstrings(name):
    assert undocumented(importlib.import_module(name)) == []


def test_a_missing_docstring_is_found():
    module = types.ModuleType("m", "About.")
    code = "class A:\n    'A.'\n    def f(self): pass\n    def _g(self): pass\nclass B(A):\n    'B.'\ndef h(): pass\n"
    exec(code, vars(module) | {"__name__": "m"}, vars(module))
    for value in (module.A, module.B, module.h, module.A.f):
        value.__module__ = "m"
    assert undocumented(module) == ["h", "A.f"]


def test_pydoc_of_the_model_reads_well():
    text = pydoc.render_doc("nanochat.gpt", renderer=pydoc.plaintext)
    for words in (
        "class GPT",
        "Logits of tokens `idx`",
        "normalised hidden states",
        "float32 logits (B, T, V)",
    ):
        assert words in text
