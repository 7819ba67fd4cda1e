"""The terminal chat: clean output in pipes, clear errors, a conversation that survives Ctrl-C and a full context."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import scripts.chat_cli as chat_cli
from nanochat.chat import AnswerSettings, Part
from nanochat.checkpoint_manager import checkpoint_folder, save_checkpoint
from nanochat.common import get_base_dir
from nanochat.config import parse_config, run_script
from nanochat.engine import Engine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saved(tiny_model, tiny_tokenizer):
    """The tiny model saved as an SFT checkpoint."""
    tiny_tokenizer.save(get_base_dir() / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash}
    save_checkpoint(checkpoint_folder("sft", "d2"), 7, tiny_model.state_dict(), None, meta)


@pytest.fixture
def conversation(tiny_model, tiny_tokenizer):
    settings = AnswerSettings(temperature=0.0, top_k=0, max_tokens=12)
    return chat_cli.Conversation(Engine(tiny_model, tiny_tokenizer), tiny_tokenizer, settings)


def parse(*argv):
    return parse_config(chat_cli.Config, list(argv))


def test_flags_of_the_classic_script():
    cfg = parse("-i", "mid", "-p", "hi", "-t", "0.1", "-k", "5", "-g", "d4", "-s", "3", "-d", "float32")
    assert (cfg.source, cfg.prompt, cfg.temperature, cfg.top_k) == ("mid", "hi", 0.1, 5)
    assert (cfg.model_tag, cfg.step, cfg.runtime.dtype) == ("d4", 3, "float32")
    cfg = parse("--device-type", "cpu")
    assert (cfg.source, cfg.prompt, cfg.temperature, cfg.top_k) == ("sft", None, 0.6, 50)
    assert cfg.runtime.device_type == "cpu"


@pytest.mark.parametrize("argv", [["-t", "-1"], ["-k", "-1"], ["-m", "0"], ["-p", "  "], ["-i", "rlhf"], ["--nope"]])
def test_bad_flags_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*argv)
    assert error.value.code == 2
    assert capsys.readouterr().out == ""


def test_p_prints_only_the_answer(saved):
    command = [sys.executable, "-m", "scripts.chat_cli", "-p", "Why is the sky blue?", "-t", "0", "-m", "20"]
    result = subprocess.run([*command, "--device_type=cpu"], cwd=ROOT, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    answer = result.stdout.decode("utf-8")
    assert answer.endswith("\n")
    assert "<|" not in answer
    assert b"sft model d2, step 7" in result.stderr


def test_without_a_checkpoint_one_line_says_what_to_run(capsys):
    with pytest.raises(SystemExit) as error:
        run_script(chat_cli.main, chat_cli.Config, ["-p", "hi", "--device_type=cpu"])
    assert error.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "scripts.chat_sft" in err


def test_a_missing_tag_or_step_is_named(saved, capsys):
    for argv, named in ((["-g", "d99"], "d99"), (["-s", "5"], "step 5")):
        with pytest.raises(SystemExit):
            run_script(chat_cli.main, chat_cli.Config, ["-p", "hi", "--device_type=cpu", *argv])
        assert named in capsys.readouterr().err


def test_a_conversation_over_a_pipe(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nclear\nagain\nquit\nnever asked\n"))
    run_script(chat_cli.main, chat_cli.Config, ["-t", "0", "-m", "5", "--device_type=cpu"])
    out, err = capsys.readouterr()
    assert "You:" not in out
    assert "(new conversation)" in err
    assert "never" not in out


def test_the_conversation_is_remembered(conversation):
    list(conversation.ask("one"))
    list(conversation.ask("two"))
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    conversation.clear()
    assert conversation.messages == []


def test_a_full_context_forgets_the_oldest_messages(conversation, capsys):
    for i in range(12):
        list(conversation.ask(f"question {i} with quite a few words in it"))
    assert "oldest messages are forgotten" in capsys.readouterr().err
    assert conversation.messages[0]["role"] == "user"
    assert "question 11" in conversation.messages[-2]["content"]
    assert len(conversation.messages) < 12


def test_a_message_longer_than_the_context_is_refused_and_forgotten(conversation, capsys):
    chat_cli.reply(conversation, "word " * 200, terminal=False)
    assert "too long" in capsys.readouterr().err
    assert conversation.messages == []
    list(conversation.ask("short"))
    assert len(conversation.messages) == 2


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(conversation, monkeypatch, capsys):
    def interrupted(*args):
        yield Part("text", "The sky")
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_cli, "answer", interrupted)
    chat_cli.reply(conversation, "why", terminal=False)
    out, err = capsys.readouterr()
    assert out == "The sky"
    assert "(stopped)" in err
    assert conversation.messages[-1]["content"] == [{"type": "text", "text": "The sky"}]
    monkeypatch.undo()
    list(conversation.ask("and then?"))
    assert len(conversation.messages) == 4


def test_tool_calls_show_only_on_a_terminal(capsys):
    parts = [Part("text", "It is "), Part("python", "6*7"), Part("python_output", "42"), Part("text", "42.")]
    chat_cli.show(iter(parts), tools=False)
    assert capsys.readouterr().out == "It is 42.\n"
    chat_cli.show(iter(parts), tools=True)
    assert capsys.readouterr().out == "It is \033[2m[6*7\033[0m\033[2m = 42]\033[0m42.\n"


def test_history_is_kept_and_private(tmp_path):
    readline = pytest.importorskip("readline")
    path = tmp_path / "history"
    with chat_cli.line_history(path):
        readline.add_history("hello there")
    assert "hello" in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    with chat_cli.line_history(path):
        pass
    readline.clear_history()
