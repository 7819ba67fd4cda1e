"""Chat evaluation: batches that change nothing, honest counting, and the three evaluation scripts end to end."""

from __future__ import annotations

import itertools
import json
import math
import socket
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat import chat_eval as chat_evaluation
from nanochat.chat_eval import answer_shares, choose_sampling, evaluate_chat_task, risks_of_drawing
from nanochat.checkpoint_manager import checkpoint_folder, save_checkpoint
from nanochat.common import compute_cleanup
from nanochat.config import run_script
from nanochat.core_eval import CoreTask, evaluate_task
from nanochat.engine import Engine
from nanochat.files import ResumeLog, read_jsonl
from nanochat.generate.logprobs import answer_logprob
from nanochat.generate.sampling import Sampling
from nanochat.loss_eval import evaluate_bpb
from nanochat.scoring import TaskScore, mean_centered, pass_at_k
from nanochat.serve.batch_engine import BatchEngine, GenerationRequest
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_eval, base_loss, chat_eval
from tasks.common import Task, render_mc
from tasks.registry import demo_tasks


class Letters(Task):
    """Multiple choice problems of different lengths and numbers of choices."""

    name = "Letters"
    eval_type = "categorical"
    baseline = 0.25

    def num_examples(self) -> int:
        return 9

    def get_example(self, index: int) -> dict:
        letters = ("A", "B", "C", "D")[: 2 + index % 3]
        question = render_mc("why " * (index % 4), letters, [f"choice {i}" for i in range(len(letters))])
        return {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": letters[index % 2]}],
            "letters": letters,
        }

    def evaluate(self, problem: dict, completion: str) -> bool:
        assert completion in problem["letters"]
        return completion == problem["messages"][-1]["content"]


class Writing(Task):
    """Right when the answer has an even number of characters; one prompt does not fit the context."""

    name = "Writing"
    eval_type = "generative"

    def num_examples(self) -> int:
        return 7

    def get_example(self, index: int) -> dict:
        content = "word " * (200 if index == 3 else index)
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "?"}]}

    def evaluate(self, problem: dict, completion: str) -> bool:
        return len(completion) % 2 == 0


@pytest.fixture
def evaluate(tiny_model, tiny_tokenizer):
    """evaluate_chat_task with the tiny model."""
    engine = Engine(tiny_model, tiny_tokenizer)
    return lambda task, **options: evaluate_chat_task(task, tiny_model, engine, tiny_tokenizer, **options)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_letters_are_the_argmax_of_each_prompt_alone(evaluate, tiny_model, tiny_tokenizer, batch_size):
    task = Letters()
    score = evaluate(task, batch_size=batch_size)
    assert [record["index"] for record in score.records] == list(range(9))
    for problem, record in zip(task, score.records, strict=True):
        prompt = tiny_tokenizer.render_for_completion(problem)[-tiny_model.max_seq_len :]
        logits = tiny_model(torch.tensor([prompt]))[0, -1]
        of_letter = {letter: float(logits[tiny_tokenizer.encode(letter)[0]]) for letter in problem["letters"]}
        assert record["predicted"] == max(of_letter, key=lambda letter: of_letter[letter])
        assert record["passed"] == (record["predicted"] == record["answer"])
        assert record["logits"] == pytest.approx(of_letter, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_written_answers_are_those_of_each_prompt_alone(evaluate, tiny_model, tiny_tokenizer, batch_size):
    task = Writing()
    score = evaluate(task, batch_size=batch_size, sampling=Sampling(temperature=0.0, max_tokens=8))
    engine = Engine(tiny_model, tiny_tokenizer)
    for i, record in enumerate(score.records):
        if i == 3:
            continue
        prompt = tiny_tokenizer.render_for_completion(task[i])
        (sequence,), _ = engine.generate_batch(prompt, max_tokens=8, temperature=0.0)
        assert record["completions"] == [tiny_tokenizer.decode(sequence[len(prompt) :])]
        assert record["passed"] == task.evaluate(task[i], record["completions"][0])


def test_a_guess_is_judged_as_what_is_said_instead(evaluate):
    asked = {"temperature": 0.0, "max_tokens": 8, "unsure": "Who knows?"}
    plain, none, some = (
        [r["completions"] for r in evaluate(Writing(), sampling=Sampling(**asked, min_answer_p=p)).records]
        for p in (0.0, 1.0, 1e-30)
    )
    assert plain == some  # nothing is that unlikely
    assert none == [["Who knows?"] if texts else [] for texts in plain]


@pytest.mark.parametrize(
    ("shares", "least"),
    [([1.0] * 20, 0.3), ([0.25] + [1.0] * 19, 0.3), ([0.25] * 2 + [1.0] * 18, 0.2), ([0.05] * 20, 0.0)],
)
def test_few_right_answers_are_withheld(tiny_tokenizer, monkeypatch, shares, least):
    conversations = [
        {"messages": [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": f"So it is {i}"}]}
        for i in range(20)
    ]
    prompts = {tuple(tiny_tokenizer.render_for_completion(c)): c["messages"][1]["content"] for c in conversations}
    monkeypatch.setattr(chat_evaluation, "risks_of_drawing", lambda *args: [[0.0] * 20 for _ in args[3]])
    monkeypatch.setattr(chat_evaluation, "answer_shares", lambda *args: shares)
    chosen = choose_sampling(Unsure(prompts, 10, tiny_tokenizer), tiny_tokenizer, conversations, "Who knows?")
    assert chosen["min_answer_p"] == least


def test_a_prompt_that_fills_the_context_counts_as_failed(evaluate):
    record = evaluate(Writing(), sampling=Sampling(temperature=0.0, max_tokens=4)).records[3]
    assert not record["passed"]
    assert "fills the context" in record["note"]


def test_several_samples_pass_when_any_does(evaluate):
    sampling = Sampling(max_tokens=6)
    score = evaluate(Writing(), sampling=sampling, num_samples=5, batch_size=10)
    for record in score.records:
        if "note" not in record:
            right = [len(completion) % 2 == 0 for completion in record["completions"]]
            assert len(right) == 5
            assert record["num_correct"] == sum(right)
            assert record["passed"] == any(right)
    again = evaluate(Writing(), sampling=sampling, num_samples=5, batch_size=10)
    assert again.records == score.records


@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_sampled_answers_do_not_depend_on_the_batch_or_on_an_interruption(evaluate, tmp_path, batch_size):
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=8)
    whole = [r["completions"] for r in evaluate(Writing(), sampling=sampling, num_samples=2, batch_size=10).records]
    evaluate(Writing(), sampling=sampling, num_samples=2, max_problems=3, finished=ResumeLog(tmp_path))
    again = evaluate(Writing(), sampling=sampling, num_samples=2, batch_size=batch_size, finished=ResumeLog(tmp_path))
    assert [record["completions"] for record in again.records] == whole
    assert len({text for texts in whole for text in texts}) > 7


def test_pass_at_k_counts_a_prompt_that_fills_the_context_as_failed(evaluate):
    score = evaluate(Writing(), sampling=Sampling(temperature=1.0, max_tokens=8), num_samples=4)
    counts = [record["num_correct"] for record in score.records]
    assert score.records[3]["num_samples"] == 0
    assert score.pass_at(1) == pytest.approx(sum(counts) / 4 / 7)


def test_groups_are_scored_apart_and_finished_problems_are_not_asked_again(tiny_model, tiny_tokenizer, tmp_path):
    asked: list[int] = []

    class Grouped(Letters):
        def get_example(self, index: int) -> dict:
            asked.append(index)
            return super().get_example(index) | {"group": "even" if index % 2 == 0 else "odd"}

    def run(count: int):
        engine = Engine(tiny_model, tiny_tokenizer)
        log = ResumeLog(tmp_path / "log")
        return evaluate_chat_task(Grouped(), tiny_model, engine, tiny_tokenizer, max_problems=count, finished=log)

    first = run(4)
    asked.clear()
    whole = run(9)
    assert set(asked) == {4, 5, 6, 7, 8}
    assert whole.records[:4] == first.records
    assert {name: len(part.records) for name, part in whole.groups().items()} == {"even": 5, "odd": 4}
    right = sum(part.accuracy * len(part.records) for part in whole.groups().values())
    assert right == pytest.approx(whole.accuracy * 9)


def test_limits(evaluate):
    assert len(evaluate(Letters(), max_problems=4).records) == 4
    assert len(evaluate(Letters(), max_problems=400).records) == 9
    with pytest.raises(ValueError, match="at least 1"):
        evaluate(Letters(), max_problems=0)
    with pytest.raises(ValueError, match="Letters has no problems"):
        evaluate(Letters(start=9))
    with pytest.raises(ValueError, match="all the same"):
        evaluate(Writing(), num_samples=2)


def test_chat_core_and_standard_errors():
    def score(passed: int, total: int, baseline: float) -> TaskScore:
        return TaskScore("t", [{"passed": i < passed} for i in range(total)], baseline)

    one = score(50, 100, 0.25)
    assert one.accuracy == 0.5
    assert one.centered == pytest.approx(1 / 3)
    assert one.stderr == pytest.approx(0.05)
    mean, stderr = mean_centered([one, score(9, 10, 0.0)])
    assert mean == pytest.approx((1 / 3 + 0.9) / 2)
    assert stderr == pytest.approx(math.hypot(0.05 / 0.75, math.sqrt(0.09 / 10)) / 2)


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, c, k):
    if c > n or k > n:
        with pytest.raises(ValueError, match="need 0 < k"):
            pass_at_k(n, c, k)
        return
    subsets = list(itertools.combinations(range(n), k))
    share = Fraction(sum(any(i < c for i in subset) for subset in subsets), len(subsets))
    assert pass_at_k(n, c, k) == pytest.approx(float(share))


# --- ranks ------------------------------------------------------------------------------------------------------------


def core_problems() -> list[dict]:
    return [{"query": "rain " * (i % 4), "choices": ["sea", "sky and air"], "gold": i % 2} for i in range(7)]


def core_task() -> CoreTask:
    return CoreTask("t", "multiple_choice", Path("t"), 1, " ", 0.5)


def text_batches(vocab_size: int, parts: int, part: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(0, vocab_size, (8, 17), generator=torch.Generator().manual_seed(3))
    x, y = ids[:, :-1], ids[:, 1:]
    return [(x[part::parts], y[part::parts])]


def everything(model, tokenizer, parts: int = 1, part: int = 0) -> dict:
    """The results of all three evaluations, for one rank."""
    engine = Engine(model, tokenizer)
    token_bytes = torch.from_numpy(tokenizer.token_lengths())
    sampling = Sampling(temperature=0.0, max_tokens=4)
    return {
        "bpb": evaluate_bpb(model, text_batches(model.config.vocab_size, parts, part), 1, token_bytes),
        "core": evaluate_task(model, tokenizer, core_task(), core_problems()),
        "letters": evaluate_chat_task(Letters(), model, engine, tokenizer).records,
        "writing": evaluate_chat_task(Writing(), model, engine, tokenizer, sampling=sampling).records,
    }


def rank_main(rank: int, world_size: int, port: int, model, folder: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    result = everything(model, RustBPETokenizer.from_directory(folder), world_size, rank)
    compute_cleanup(barrier=True)
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as f:
        json.dump(result, f)


def test_two_ranks_give_the_results_of_one(tiny_model, tiny_tokenizer, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    tiny_tokenizer.save(tmp_path)
    torch.multiprocessing.spawn(rank_main, (2, port, tiny_model, str(tmp_path)), nprocs=2, join=True)
    alone = json.loads(json.dumps(everything(tiny_model, tiny_tokenizer)))
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["bpb"] == pytest.approx(alone["bpb"], rel=1e-6)
        assert result["core"] == alone["core"]
        assert result["writing"] == alone["writing"]
        for mine, one in zip(result["letters"], alone["letters"], strict=True):
            assert mine["logits"] == pytest.approx(one["logits"], abs=1e-3)
            assert mine | {"logits": None} == one | {"logits": None}


# --- scripts ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_model, tiny_tokenizer, base_dir, tmp_path, monkeypatch):
    """Checkpoints of base and SFT, a tokenizer, a corpus, and local task files."""
    tiny_tokenizer.save(base_dir / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash, "dtype": "float32"}
    for source in ("base", "sft"):
        save_checkpoint(checkpoint_folder(source, "d2"), 7, tiny_model.state_dict(), None, meta)
    text = [f"The sky is blue, said number {i}. Rivers carry water." for i in range(200)]
    (base_dir / "base_data").mkdir()
    for i in range(2):
        pq.write_table(pa.table({"text": text[i::2]}), base_dir / "base_data" / f"shard_{i:05d}.parquet")
    files = tmp_path / "task_files"
    arc = {"question": "Is it?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "B"}
    (files / "arc" / "ARC-Easy").mkdir(parents=True)
    (files / "arc" / "ARC-Easy" / "test.jsonl").write_text((json.dumps(arc) + "\n") * 5)
    (files / "gsm8k").mkdir()
    (files / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "#### 2"}) + "\n")
    monkeypatch.setenv("NANOCHAT_TASK_DIR", str(files))
    return meta


def section(base_dir, name: str) -> dict:
    return json.loads((base_dir / "report" / f"{name}.json").read_text(encoding="utf-8"))


def test_chat_eval_by_name(trained, base_dir, capsys):
    run_script(chat_eval.main, chat_eval.Config, ["-i", "sft", "-a", "GSM8K|ARC-Easy", "-x", "3", "-m", "5", "-b=2"])
    out = capsys.readouterr().out
    assert "GSM8K: 0.00% ± 0.00 (1 problems)" in out
    assert "ARC-Easy: " in out
    metrics = section(base_dir, "chat-evaluation-sft")["metrics"]
    assert set(metrics) == {"GSM8K", "ARC-Easy", "ChatCORE (partial)"}
    (log,) = (base_dir / "chat_eval").glob("*/arc-easy.jsonl")
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert log.parent.name == "sft_d2_000007"
    assert [record["index"] for record in records] == [0, 1, 2]
    assert all(record["answer"] == "B" for record in records)


def test_chat_eval_takes_the_tasks_there_are_and_lists_the_others(trained, base_dir, capsys):
    run_script(chat_eval.main, chat_eval.Config, ["-m", "3"])
    out = capsys.readouterr().out
    assert "MMLU is not evaluated: data set cais/mmlu" in out
    record = section(base_dir, "chat-evaluation-sft")
    assert set(record["metrics"]) == {"ARC-Easy", "GSM8K", "ChatCORE (partial)"}
    assert any("HumanEval not evaluated" in part for part in record["data"])


def test_a_part_of_an_evaluation_does_not_replace_the_whole(trained, base_dir):
    run_script(chat_eval.main, chat_eval.Config, ["-m", "3"])
    whole = section(base_dir, "chat-evaluation-sft")
    run_script(chat_eval.main, chat_eval.Config, ["-a", "ARC-Easy", "-x", "2"])
    assert section(base_dir, "chat-evaluation-sft") == whole
    assert set(section(base_dir, "chat-evaluation-sft-arc-easy")["metrics"]) == {"ARC-Easy", "ChatCORE (partial)"}


def test_chat_eval_without_any_data_says_so_and_exits_well(trained, base_dir, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("NANOCHAT_TASK_DIR", str(tmp_path / "nothing"))
    run_script(chat_eval.main, chat_eval.Config, [])
    assert "nothing was evaluated" in capsys.readouterr().out
    assert section(base_dir, "chat-evaluation-sft")["metrics"] == {}


def test_chat_eval_of_a_demo_model_takes_the_demo_tasks(monkeypatch):
    monkeypatch.setattr(chat_eval, "demo_tasks", lambda: {"Letters": Letters()})
    for meta in ({"chat_data": "demo"}, {"config": {"dataset": "demo"}}):
        tasks, missing = chat_eval.choose_tasks(None, meta)
        assert list(tasks) == ["Letters"]
        assert missing == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-a", "Nope"], "no task called 'Nope'"),
        (["-a", "MMLU"], "cais/mmlu"),
        (["-i", "mid"], "no mid checkpoint"),
        (["-g", "d9"], "d9"),
    ],
)
def test_chat_eval_errors_are_one_line(trained, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run_script(chat_eval.main, chat_eval.Config, arguments)
    assert error.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize("arguments", [["-x", "0"], ["-n", "2"], ["-b", "0"], ["-i", "base"], ["-t", "-1"]])
def test_chat_eval_bad_flags_exit_with_2(arguments):
    with pytest.raises(SystemExit) as error:
        run_script(chat_eval.main, chat_eval.Config, arguments)
    assert error.value.code == 2


def test_base_loss(trained, base_dir, capsys):
    run_script(base_loss.main, base_loss.Config, ["--device_batch_size=2", "--eval_tokens=1024"])
    out = capsys.readouterr().out
    assert "val bpb: " in out
    assert "The capital of France is" in out
    metrics = section(base_dir, "base-model-loss")["metrics"]
    assert 1 < metrics["val bpb"] < 20
    assert 1 < metrics["train bpb"] < 20


def test_base_loss_reads_the_same_text_whatever_the_batch_size(trained, base_dir):
    seen = []
    for batch_size in (1, 3, 8):
        run_script(base_loss.main, base_loss.Config, [f"--device_batch_size={batch_size}", "--eval_tokens=700"])
        seen.append(section(base_dir, "base-model-loss")["metrics"])
    for other in seen[1:]:
        assert other == pytest.approx(seen[0], rel=1e-5)


def test_base_loss_with_too_few_tokens_is_an_error(trained, capsys):
    with pytest.raises(SystemExit) as error:
        run_script(base_loss.main, base_loss.Config, ["--device_batch_size=2", "--eval_tokens=127"])
    assert error.value.code == 1
    assert "less than one sequence of 128 tokens" in capsys.readouterr().err


@pytest.fixture
def bundle(tmp_path):
    """An evaluation bundle with one task."""
    folder = tmp_path / "bundle"
    (folder / "eval_data").mkdir(parents=True)
    entry = "{label: t, dataset_uri: t.jsonl, num_fewshot: [10], icl_task_type: multiple_choice}"
    (folder / "core.yaml").write_text(f"icl_tasks:\n- {entry}\n")
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nt,50\n")
    (folder / "eval_data" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in core_problems()))
    return folder


def test_base_eval_with_fewer_examples_than_shots(trained, bundle, base_dir, capsys):
    run_script(base_eval.main, base_eval.Config, [f"--eval_bundle={bundle}", "--max_per_task=4"])
    assert "CORE " in capsys.readouterr().out
    assert set(section(base_dir, "base-model-evaluation")["metrics"]) == {"CORE"}
    (path,) = (base_dir / "base_eval").glob("*.csv")
    assert path.name == "base_d2_000007.csv"
    assert path.read_text().splitlines()[-1].startswith("CORE ")
    answers = read_jsonl(path.with_suffix(".jsonl"))
    assert [(answer["task"], answer["index"]) for answer in answers] == [("t", i) for i in range(4)]
    assert not path.with_suffix(".unfinished").exists()
    run_script(base_eval.main, base_eval.Config, [f"--eval_bundle={bundle}", "--max_per_task=4", "--tasks=t"])
    assert set(section(base_dir, "base-model-evaluation")["metrics"]) == {"CORE"}
    assert {path.name for path in path.parent.glob("*.csv")} == {path.name, "base_d2_000007_t.csv"}


def test_base_eval_without_a_bundle(trained, base_dir, monkeypatch, capsys):
    def offline(path):
        raise FileNotFoundError("the CORE evaluation bundle is unavailable")

    monkeypatch.setattr(base_eval, "get_bundle_folder", offline)
    run_script(base_eval.main, base_eval.Config, ["--skip_if_missing"])
    assert "CORE is skipped: the CORE evaluation bundle is unavailable" in capsys.readouterr().out
    assert section(base_dir, "base-model-evaluation")["metrics"] == {}
    with pytest.raises(SystemExit) as error:
        run_script(base_eval.main, base_eval.Config, [])
    assert error.value.code == 1
    for flag, said in (
        ("--model_tag=typo", "no base checkpoint with tag 'typo'"),
        ("--step=9", "no checkpoint of step 9"),
    ):
        with pytest.raises(SystemExit):  # the model is looked for before the bundle
            run_script(base_eval.main, base_eval.Config, [flag, "--skip_if_missing"])
        captured = capsys.readouterr()
        assert said in captured.out + captured.err


class Unsure:
    """An engine whose answers are the references, to some of the questions."""

    context_length = 128

    def __init__(self, references, known, tokenizer):
        self.references, self.known, self.tokenizer = references, known, tokenizer

    def generate_prompts(self, rows, max_tokens, keep_end):
        answers = []
        for row in rows:
            reference = self.references[tuple(row)]
            wrong = int(reference[-1]) % 10 >= self.known  # the last word tells which question it was
            answers.append(row + self.tokenizer.encode("something else entirely" if wrong else reference))
        return answers, answers


@pytest.mark.parametrize(
    ("warmest", "known", "chosen"),
    [(2.0, 10, {"temperature": 0.8, "top_k": 50}), (0.3, 10, {"temperature": 0.3, "top_k": 50}),
     (0.3, 6, {"temperature": 0.3, "top_k": 50}), (0.0, 10, {"temperature": 0.0}), (2.0, 0, {})],
)  # fmt: skip
def test_the_warmest_setting_that_changes_next_to_nothing_is_chosen(
    tiny_tokenizer, monkeypatch, warmest, known, chosen
):
    conversations = [
        {
            "messages": [
                {"role": "user", "content": f"Why {i}?"},
                {"role": "assistant", "content": f"It is so because {i}"},
            ]
        }
        for i in range(60)
    ]
    prompts = {tuple(tiny_tokenizer.render_for_completion(c)): c["messages"][1]["content"] for c in conversations}
    engine, judged = Unsure(prompts, known, tiny_tokenizer), []

    def risks(_, answers, __, temperatures):
        # One answer may change where it is too warm: in the mean a tenth more, or less, than is allowed.
        judged.append(len(answers))
        most = chat_evaluation.TOLERANCE * len(answers)
        return [[most * (1.1 if t > warmest else 0.9)] + [0.0] * (len(answers) - 1) for t in temperatures]

    monkeypatch.setattr(chat_evaluation, "risks_of_drawing", risks)
    monkeypatch.setattr(chat_evaluation, "answer_shares", lambda *args: [1.0] * len(args[2]))
    assert choose_sampling(engine, tiny_tokenizer, conversations) == chosen
    assert judged == [6 * known] * bool(known)  # right answers only
    sure = {"min_answer_p": 0.3, "unsure": "Who knows?"} if known else {}
    assert choose_sampling(engine, tiny_tokenizer, conversations, "Who knows?") == chosen | sure
    assert choose_sampling(engine, tiny_tokenizer, conversations[:5]) == {}  # too few to say


def test_the_risk_of_drawing_is_how_often_draws_differ(tiny_model, tiny_tokenizer):
    engine = Engine(tiny_model, tiny_tokenizer)
    prompts = [
        [tiny_tokenizer.get_bos_token_id(), *tiny_tokenizer.encode(text)] for text in ("one", "two two", "a b c")
    ]
    greedy, masks = engine.generate_prompts(prompts, 3, keep_end=True)
    heats = (1e-4, 0.1, 1.0)
    risks = risks_of_drawing(engine, greedy, masks, heats)
    for temperature, row in zip(heats, risks, strict=True):
        for prompt, answer, risk in zip(prompts, greedy, row, strict=True):
            drawn, _ = engine.generate_prompts([prompt] * 200, 3, keep_end=True, temperature=temperature)
            differing = sum(sequence != answer for sequence in drawn) / 200
            assert differing == pytest.approx(risk, abs=0.12), (temperature, risk)
    assert max(risks[0]) < 0.01 < min(risks[1])
    assert 0.2 < max(risks[1]) < 0.99


def test_the_share_of_an_answer_is_what_a_server_finds(tiny_model, tiny_tokenizer):
    prompts = [
        [tiny_tokenizer.get_bos_token_id(), *tiny_tokenizer.encode(text)] for text in ("one", "two two", "a b c?")
    ]
    sequences, masks = Engine(tiny_model, tiny_tokenizer).generate_prompts(prompts, 12, keep_end=True)
    shares = answer_shares(Engine(tiny_model, tiny_tokenizer), tiny_tokenizer, sequences, masks)
    with BatchEngine(tiny_model, tiny_tokenizer, max_batch_size=1) as engine:
        for prompt, share in zip(prompts, shares, strict=True):
            asked = Sampling(temperature=0.0, max_tokens=12, logprobs=0)
            known = engine.submit(GenerationRequest(tokens=prompt, sampling=asked)).events()
            logprob = answer_logprob((t.bytes, t.logprob) for event in known for t in event.logprobs)
            assert logprob == pytest.approx(math.log(share), abs=1e-3)


def test_blank_task_names_are_refused_and_repeated_ones_asked_once():
    with pytest.raises(ValueError, match="with a blank name"):
        chat_eval.choose_tasks("DemoWordSums|", {})
    tasks, _ = chat_eval.choose_tasks("DemoWordSums| demowordsums |DemoWordSums", {})
    assert list(tasks) == ["DemoWordSums"]


def test_several_tasks_of_the_demo_are_made_together(monkeypatch):
    made = []
    monkeypatch.setattr(chat_eval, "demo_tasks", lambda: made.append(1) or demo_tasks())
    tasks, missing = chat_eval.choose_tasks("DemoFacts|demochat|DemoWordSums|DemoIdentity", {})
    assert (list(tasks), missing, made) == (["DemoFacts", "DemoChat", "DemoWordSums", "DemoIdentity"], {}, [1])
    assert len(tasks["DemoFacts"]) == 300
