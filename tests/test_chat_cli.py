"""The terminal chat: clean output in pipes, clear errors, a conversation that survives Ctrl-C and a full context."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import scripts.chat_cli as chat_cli
from nanochat.checkpoint_manager import checkpoint_folder, save_checkpoint
from nanochat.common import get_base_dir
from nanochat.config import parse_config, run_script
from nanochat.generate.sampling import Sampling
from nanochat.serve.answer_events import Event
from nanochat.serve.app import UI_FOLDER
from nanochat.serve.batch_engine import BatchEngine
from nanochat.serve.chat import Conversation
from nanochat.serve.chat_commands import ALIASES, HELP, Quit, is_command, run_command
from nanochat.serve.choose_model import choose_drawing
from nanochat.serve.plain_answer import plain_answer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def saved(tiny_model, tiny_tokenizer):
    """The tiny model saved as an SFT checkpoint."""
    tiny_tokenizer.save(get_base_dir() / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash}
    save_checkpoint(checkpoint_folder("sft", "d2"), 7, tiny_model.state_dict(), None, meta)


@pytest.fixture
def endless(tiny_model, tiny_tokenizer, saved):
    """The same, but it never ends an answer."""
    with torch.no_grad():
        for name in tiny_tokenizer.get_special_tokens():
            tiny_model.lm_head.weight[tiny_tokenizer.encode_special(name)] = 0.0  # never among the 50 likeliest
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash}
    save_checkpoint(checkpoint_folder("sft", "d2"), 8, tiny_model.state_dict(), None, meta)


@pytest.fixture
def conversation(tiny_model, tiny_tokenizer):
    settings = Sampling(temperature=0.0, top_k=0, max_tokens=12)
    with BatchEngine(tiny_model, tiny_tokenizer, max_batch_size=1) as engine:
        yield Conversation(engine, tiny_tokenizer, settings, chat_cli.say)


def parse(*argv):
    return parse_config(chat_cli.Config, list(argv))


def test_flags_of_the_classic_script():
    cfg = parse("-i", "mid", "-p", "hi", "-t", "0.1", "-k", "5", "-g", "d4", "-s", "3", "-d", "float32")
    assert (cfg.source, cfg.prompt, cfg.temperature, cfg.top_k) == ("mid", "hi", 0.1, 5)
    assert (cfg.model_tag, cfg.step, cfg.runtime.dtype) == ("d4", 3, "float32")
    cfg = parse("--device-type", "cpu")
    assert (cfg.source, cfg.prompt, cfg.temperature, cfg.top_k) == ("sft", None, None, None)
    assert cfg.runtime.device_type == "cpu"


@pytest.mark.parametrize(
    "argv", [["-t", "-1"], ["-k", "-1"], ["-m", "0"], ["-p", "  "], ["--top_p", "2"], ["-i", "x"], ["--no"]]
)
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
    assert b"d2 sft, step 7" in result.stderr


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


def test_a_base_model_goes_on_with_plain_text(saved, tiny_model, tiny_tokenizer, monkeypatch, capsys):
    asked = []
    submit = BatchEngine.submit
    monkeypatch.setattr(
        BatchEngine, "submit", lambda self, request: asked.append(request.tokens) or submit(self, request)
    )
    for source in ("base", "sft"):
        meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash}
        save_checkpoint(checkpoint_folder(source, "d2"), 7, tiny_model.state_dict(), None, meta)
        chat_cli.main(parse("-i", source, "-p", "Once upon", "-t", "0", "-m", "3", "--device-type=cpu"))
        assert ("as plain text" in capsys.readouterr().err) == (source == "base")
    bos = tiny_tokenizer.get_bos_token_id()
    assert asked[0] == [bos, *tiny_tokenizer.encode("Once upon")]
    assert tiny_tokenizer.encode_special("<|user_start|>") in asked[1]


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
    shown = []

    def interrupted(part):
        shown.append(part)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)
        return part

    conversation.settings = Sampling(temperature=2.0, max_tokens=100_000)
    conversation.engine._scheduler.tools.stop_tokens = set()
    monkeypatch.setattr(chat_cli, "printable", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with chat_cli.Interrupts(conversation):
        chat_cli.reply(conversation, "why", terminal=True)
    assert signal.getsignal(signal.SIGINT) is before
    out, err = capsys.readouterr()
    assert "(stopped)" in err
    assert "".join(shown[:3]) in out
    assert conversation.messages[-1]["role"] == "assistant"
    assert "".join(p["text"] for p in conversation.messages[-1]["content"] if p["type"] == "text") == "".join(shown)
    assert conversation.engine.stats()["cancelled"] == 1
    monkeypatch.undo()
    conversation.settings = Sampling(temperature=0.0, max_tokens=5)
    conversation.clear()
    conversation.stopped = False
    list(conversation.ask("and then?"))
    assert len(conversation.messages) == 2


def test_ctrl_c_while_a_message_is_read_interrupts_the_reading_only(conversation):
    with chat_cli.Interrupts(conversation) as interrupts:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupts.read(lambda: signal.raise_signal(signal.SIGINT))
            assert not conversation.stopped
        assert interrupts.read(lambda: "line") == "line"
        signal.raise_signal(signal.SIGINT)  # as early as possible: not lost
        conversation.settings = Sampling(temperature=2.0, max_tokens=100_000)
        conversation.engine._scheduler.tools.stop_tokens = set()
        list(conversation.ask("why"))
        assert conversation.engine.stats()["generated_tokens"] < 1000


def test_ctrl_c_ends_a_single_answer_and_the_program(conversation, monkeypatch):
    conversation.settings = Sampling(temperature=2.0, max_tokens=100_000)
    conversation.engine._scheduler.tools.stop_tokens = set()
    monkeypatch.setattr(chat_cli, "show", lambda parts, terminal: [signal.raise_signal(signal.SIGINT) for _ in parts])
    with chat_cli.Interrupts(conversation), pytest.raises(KeyboardInterrupt):
        chat_cli.answer_once(conversation, "why", input)
    assert conversation.engine.stats()["cancelled"] == 1


class Process:
    """The program in a process of its own; `said` is its standard output and error. Killed after 200 seconds."""

    def __init__(self, *flags):
        command = [sys.executable, "-u", "-m", "scripts.chat_cli", "-t", "2", "--device_type=cpu", *flags]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.said, self._ended, self._changed = "", False, threading.Condition()
        self._threads = [threading.Timer(200, self.process.kill), threading.Thread(target=self._collect)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.process.kill()
        self._threads[0].cancel()
        for thread in self._threads:
            thread.join()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def _collect(self):
        while data := self.process.stdout.read1(4096):
            with self._changed:
                self.said += data.decode("utf-8", "replace")
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, condition):
        """Wait until something was said."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._ended)
        assert condition(), f"the program has ended: {self.said[-1000:]}"


def test_ctrl_c_in_a_real_process_stops_the_answer_not_the_program(endless):
    """Signals in the middle of answers: the next message is answered, and the program ends well."""
    with Process("-m", "100000000") as chat:
        chat.wait(lambda: re.search(r"answers: .*\n", chat.said))  # the last line before it reads
        for i in range(40):
            before = len(chat.said)
            chat.process.stdin.write(f"hello {i}\n".encode())
            chat.process.stdin.flush()
            chat.wait(lambda: len(chat.said) > before)  # noqa: B023
            chat.process.send_signal(signal.SIGINT)
            chat.wait(lambda: "(stopped)\n" in chat.said[before:])  # noqa: B023
        chat.process.stdin.close()
        assert chat.process.wait() == 0
        assert "Traceback" not in chat.said


def test_ctrl_c_on_a_terminal(endless, monkeypatch):
    """The key stops an answer; at the prompt it says how to leave; Ctrl-D leaves."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody here answers where the cursor is
    argv = ["-m", "scripts.chat_cli", "-t", "2", "-m", "100000000", "--device_type=cpu"]
    with pexpect.spawn(sys.executable, argv, cwd=ROOT, timeout=100, encoding="utf-8", codec_errors="replace") as chat:
        chat.expect("You:")
        for _ in range(3):
            chat.send("hello\r")
            chat.expect("Assistant: ")
            chat.sendintr()
            chat.expect(r"\(stopped\)")
            chat.expect("You:")
        chat.sendintr()
        chat.expect(r"\(Ctrl-D")
        chat.expect("You:")
        chat.sendeof()
        chat.expect(pexpect.EOF)
    assert chat.exitstatus == 0


def test_tool_calls_show_only_on_a_terminal(capsys):
    parts = [Event("text", "It is "), Event("python", "6*7"), Event("python_output", "42"), Event("text", "42.")]
    chat_cli.show(iter(parts), terminal=False)
    assert capsys.readouterr().out == "It is 42.\n"
    chat_cli.show(iter(parts), terminal=True)
    assert capsys.readouterr().out == "It is \033[2m[6*7\033[0m\033[2m = 42]\033[0m42.\n"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("parts", "terminal", "plain"),
    [
        (
            [
                "Count n in ribbon: r0. Check: ",
                ("python", '"ribbon".count("n")'),
                ("python_output", "1"),
                "\n#### 1",
            ],
            '\033[2mCount n in ribbon: r0. Check: ["ribbon".count("n") = 1]\n\033[0m1\n',
            "1\n",
        ),
        (["Count me in!"], "Count me in!\n", None),
        (["Co"], "Co\n", None),
        (
            ['Count of "n" in "ribbon". ', ("python", "'ribbon'.count('n')"), ("python_output", "1"), "\n#### 1"],
            "\033[2mCount of \"n\" in \"ribbon\". ['ribbon'.count('n') = 1]\n\033[0m1\n",
            "1\n",
        ),
        (["3 and 4 are 7.\n#### 7"], "3 and 4 are 7.\n7\n", None),
        (["Yes.\n####"], "Yes.\n", None),
        (["#### Title\n\nx = 1  #### note"], "#### Title\n\nx = 1  #### note\n", None),
        ([], "\n", None),
    ],
)
def test_results_are_shown_without_their_marker(capsys, parts, terminal, plain, size):
    events = []
    for part in parts:  # however the text is cut into tokens
        if isinstance(part, tuple):
            events.append(Event(*part))
        else:
            events += [Event("text", part[i : i + size]) for i in range(0, len(part), size)]
    for on_terminal, expected in ((True, terminal), (False, plain or terminal)):
        chat_cli.show(events, on_terminal)
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "answer", ["Counting sheep helps.", "Countries have flags.", "Count me in!", "Count Basie played."]
)
def test_an_answer_that_begins_like_a_count_is_shown_as_it_comes(answer):
    shown = ""

    def pieces():
        for i, letter in enumerate(answer):
            assert i < 8 or len(shown) >= i - 1, shown  # nothing waits for the end
            yield Event("text", letter)

    for part in plain_answer(pieces()):
        shown += part.text
    assert shown == answer


def test_a_model_can_not_steer_the_terminal(capsys):
    chat_cli.show([Event("text", "a\033[2Jb\x07\n\tc\x9b1m")], terminal=True)
    assert capsys.readouterr().out == "a[2Jb\n\tc1m\n"


def test_an_answer_may_be_longer_than_the_context(conversation):
    conversation.settings = Sampling(temperature=1.5, top_k=0, max_tokens=400)
    conversation.engine._scheduler.tools.stop_tokens = set()
    conversation.system = "Be brief."
    list(conversation.ask("tell me a long story"))
    assert conversation.engine.stats()["generated_tokens"] == 400
    list(conversation.ask("go on"))
    assert len(conversation.messages) == 2  # the first answer is too long to be remembered whole


def test_the_model_sees_the_system_message_first(conversation, monkeypatch):
    seen = []
    submit = conversation.engine.submit
    monkeypatch.setattr(conversation.engine, "submit", lambda request: seen.append(request) or submit(request))
    conversation.system = "Answer in rhymes."
    list(conversation.ask("hello"))
    assert "Answer in rhymes." in conversation.tokenizer.decode(seen[0].tokens[: seen[0].keep])


class TestCommands:
    def run(self, conversation, line):
        said = []
        return run_command(line, conversation, said.append), "\n".join(said)

    def test_help_lists_every_command(self, conversation):
        _, said = self.run(conversation, "/help")
        assert len(said.splitlines()) == len(HELP)

    def test_settings_change(self, conversation):
        for line in ("/temperature 0.25", "/top_k 7", "/top_p 0.5", "/repetition_penalty 1.3", "/max_tokens 9"):
            self.run(conversation, line)
        expected = Sampling(temperature=0.25, top_k=7, max_tokens=9, top_p=0.5, repetition_penalty=1.3)
        assert conversation.settings == expected
        for line in ("/temperature -1", "/temperature", "/top_k x", "/top_p 0", "/max_tokens 0", "/nope", "/save"):
            with pytest.raises(ValueError, match=r"must|needs|no command"):
                self.run(conversation, line)
        assert conversation.settings == expected

    def test_retry_asks_again_and_undo_takes_back(self, conversation):
        with pytest.raises(ValueError, match="nothing was said"):
            self.run(conversation, "/undo")
        list(conversation.ask("one"))
        list(conversation.ask("two"))
        assert self.run(conversation, "/retry")[0] == "two"
        assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["one"]
        assert self.run(conversation, "/undo")[0] is None
        assert conversation.messages == []

    def test_save_writes_what_was_said(self, conversation, tmp_path):
        conversation.system = "Be kind."
        list(conversation.ask("naïve?"))
        self.run(conversation, f"/save {tmp_path / 'chat.json'}")
        messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant"]
        assert messages[1]["content"] == "naïve?"

    def test_quit_and_the_classic_words(self, conversation):
        for line in ("/quit", "/exit", "quit", "EXIT"):
            assert is_command(line)
            with pytest.raises(Quit):
                self.run(conversation, line)
        assert not is_command("quite right")
        assert not is_command("what is 1/2?")


def test_typing_with_history_and_several_lines(tmp_path):
    """Keys as a terminal sends them: Enter sends, Alt-Enter starts a line, the history is kept and private."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    path = tmp_path / "history"
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("two\x1b\rlines\r")
        assert chat_cli.prompt_reader(path)() == "two\nlines"
        keys.send_text("\x1b[A\r")  # arrow up, in another session
        assert chat_cli.prompt_reader(path)() == "two\nlines"
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            chat_cli.prompt_reader(path)()
    assert path.stat().st_mode & 0o077 == 0


def test_a_prompt_from_standard_input_and_a_reader_that_leaves(saved):
    command = [sys.executable, "-m", "scripts.chat_cli", "-p", "-", "-t", "1", "-m", "3000", "--device_type=cpu"]
    shell = f"echo Why? | {' '.join(command)} | head -c 1"
    result = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, check=False)
    assert len(result.stdout) <= 1
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr


class TestWhatIsACommand:
    @pytest.mark.parametrize(
        "line",
        [
            "/path what is this?",
            "/etc/hosts",
            "/usr/bin/env python",
            "what is 1/2?",
            "//clear",
            "/",
            "/ 3",
            "quite right",
        ],
    )
    def test_questions_are_none(self, line):
        assert not is_command(line)

    @pytest.mark.parametrize("line", ["/help", "/temperature 0.5", "/TOPK 3", "/system Be brief.", "/new", "exit"])
    def test_known_words_are(self, line):
        assert is_command(line)

    @pytest.mark.parametrize("line", ["/temprature 0.5", "/nope", "/temprature -1", "/clear the table", "/help me"])
    def test_a_slip_is_not_said_to_the_model_and_harms_nothing(self, conversation, line):
        list(conversation.ask("one"))
        assert is_command(line)
        with pytest.raises(ValueError, match=f"write /{line}"):
            run_command(line, conversation, str)
        assert len(conversation.messages) == 2

    def test_two_slashes_say_what_one_would_do(self, conversation, capsys):
        lines = iter(["//clear the table", "// a comment", "/path what is this?"])
        chat_cli.converse(conversation, lambda: next(lines, None) or end_of_input(), terminal=False)
        said = [m["content"] for m in conversation.messages if m["role"] == "user"]
        assert said == ["/clear the table", "// a comment", "/path what is this?"]

    def test_the_page_knows_the_same(self):
        script = (UI_FOLDER / "commands.js").read_text(encoding="utf-8")
        listed = re.search(r"const HELP = \{(.*?)\};", script, re.DOTALL).group(1)
        assert re.findall(r'^  "(/[^"]+)":', listed, re.MULTILINE) == list(HELP)
        aliases = re.search(r"const ALIASES = \{(.*?)\};", script).group(1)
        assert dict(re.findall(r'"(/\w+)": "(/\w+)"', aliases)) == ALIASES


def end_of_input():
    raise EOFError


def test_save_takes_a_folder_and_says_what_it_replaces(conversation, tmp_path):
    list(conversation.ask("one"))
    said = []
    run_command(f"/save {tmp_path}", conversation, said.append)
    (file,) = tmp_path.iterdir()
    assert str(file) in said[0]
    assert len(json.loads(file.read_text())["messages"]) == 2
    for _ in range(3):  # within one second
        run_command(f"/save {tmp_path}/new/", conversation, said.append)
    assert len(list((tmp_path / "new").iterdir())) == 3
    run_command(f"/save {file}", conversation, said.append)
    assert "in place of" in said[-1]


def pipe(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data)), encoding="utf-8"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_a_question(conversation, monkeypatch, encoding):
    pipe(monkeypatch, "naïve?\n/undo\n".encode(encoding))
    asked = []
    monkeypatch.setattr(chat_cli, "reply", lambda conversation, question, terminal: asked.append(question))
    chat_cli.converse(conversation, lambda: chat_cli.from_pipe(input), terminal=False)
    assert asked == ["naïve?"]
    pipe(monkeypatch, "Zoë?\n".encode(encoding))
    list(conversation.ask("first"))
    chat_cli.answer_once(conversation, "-", lambda: chat_cli.from_pipe(sys.stdin.read))
    assert conversation.messages[-2]["content"].strip() == "Zoë?"


def test_what_is_no_text_is_named(monkeypatch):
    pipe(monkeypatch, b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"not UTF-8 text.*iconv"):
        chat_cli.from_pipe(sys.stdin.read)


@pytest.mark.parametrize("text", ["Hello?\n", "Привет"])  # the second has no NUL
def test_utf_16_without_its_mark_is_refused(monkeypatch, text):
    pipe(monkeypatch, text.encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"UTF-16.*iconv.*tr -d"):
        chat_cli.from_pipe(sys.stdin.read)


def test_of_control_characters_those_of_texts_are_taken_and_the_remedy_removes_the_others(monkeypatch):
    pipe(monkeypatch, b"a\tb\f\x1b[1mc\x08\x7f\r\n")
    assert chat_cli.from_pipe(sys.stdin.read) == "a\tb\f\x1b[1mc\x08\x7f\n"
    every = bytes(range(128))
    pipe(monkeypatch, every)
    with pytest.raises(ValueError, match=r"U\+0000") as error:
        chat_cli.from_pipe(sys.stdin.read)
    remedy = re.search(r"tr -d '.*'", str(error.value)).group()
    pipe(monkeypatch, subprocess.run(["sh", "-c", remedy], input=every, capture_output=True, check=True).stdout)
    assert len(chat_cli.from_pipe(sys.stdin.read)) == 128 - 26


@pytest.mark.parametrize(("stream", "flags"), [("stdin", []), ("stdin", ["-p", "-"]), ("stdout", ["-p", "Hello"])])
def test_closed_streams_are_said(monkeypatch, capsys, stream, flags):
    monkeypatch.setattr(sys, stream, None)  # what Python makes of <&- and >&-
    with pytest.raises(SystemExit) as error:
        run_script(chat_cli.main, chat_cli.Config, ["--device_type=cpu", *flags])
    assert error.value.code == 1
    assert re.fullmatch(r"error: standard .* is closed, so .*\n", capsys.readouterr().err)


def test_answers_are_drawn_as_asked_for_else_as_the_checkpoint_says_else_as_usual():
    usual, meta = {"temperature": 0.6, "top_k": 50}, {"sampling": {"temperature": 0.2, "top_k": 20}}
    for known, asked, drawn, why in (
        (meta, (None, None), (0.2, 20), "SFT found"),
        (meta, (0.9, None), (0.9, 20), "SFT found"),
        (meta, (0.0, 0), (0.0, 0), "as asked for"),
        ({"sampling": {"temperature": 0.0}}, (None, None), (0.0, 50), "SFT found"),
        ({}, (None, None), (0.6, 50), "usual"),  # a checkpoint from before
    ):
        drawing, said = choose_drawing(known, *asked, usual)
        assert (drawing["temperature"], drawing["top_k"]) == drawn
        assert why in said
        assert f"temperature {drawn[0]:g}, top_k {drawn[1]}" in said
        assert (drawing["min_answer_p"], drawing["unsure"]) == (0.0, "")


def test_guesses_are_given_or_not_as_asked_for_else_as_the_checkpoint_says():
    usual, meta = {"temperature": 0.6, "top_k": 50}, {"sampling": {"min_answer_p": 0.4, "unsure": "Who knows?"}}
    for asked, least in ((None, 0.4), (0.0, 0.0), (0.9, 0.9)):
        drawing, said = choose_drawing(meta, None, None, usual, asked)
        assert (drawing["min_answer_p"], drawing["unsure"]) == (least, "Who knows?")
        assert ("'Who knows?'" in said) == bool(least)
    with pytest.raises(ValueError, match="does not record what to say instead"):
        choose_drawing({"sampling": {}}, None, None, usual, 0.4)
