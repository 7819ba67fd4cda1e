"""Tasks: deterministic order, honest slices, answers judged right, clear errors."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import execution
from nanochat.execution import Isolation, IsolationError
from nanochat.generate.calculator import use_calculator
from tasks import sources, spellingbee
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence, render_mc, shuffled_indices
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, extract_answer, flexible_extract, split_tool_calls, strict_match
from tasks.humaneval import HumanEval, build_solution, extract_code
from tasks.mmlu import MMLU
from tasks.registry import CLASSIC_TASKS, get_task, load_available
from tasks.smoltalk import SmolTalk


class Numbers(Task):
    """Conversations that are numbers, to watch the order."""

    def __init__(self, count: int, first: int = 0, **slicing: int | None) -> None:
        super().__init__(**slicing)
        self.count, self.first = count, first

    def num_examples(self) -> int:
        return self.count

    def get_example(self, index: int) -> dict:
        return {"messages": [self.first + index]}


def numbers_of(task: Task) -> list[int]:
    return [conversation["messages"][0] for conversation in task]


def write_rows(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def task_files(tmp_path, monkeypatch):
    """A small NANOCHAT_TASK_DIR with every data set that has a local layout."""
    folder = tmp_path / "task_files"
    labels = ["1", "2", "3"]
    arc = [
        {"question": f"q{i}", "choices": {"text": ["x", "y", "z"], "label": labels}, "answerKey": labels[i % 3]}
        for i in range(7)
    ]
    for subset in ("ARC-Easy", "ARC-Challenge"):
        write_rows(folder / "arc" / subset / "test.jsonl", arc)
    mmlu = [{"question": f"m{i}", "subject": "maths", "choices": list("pqrs"), "answer": i % 4} for i in range(6)]
    write_rows(folder / "mmlu" / "test.jsonl", mmlu)
    write_rows(folder / "mmlu" / "auxiliary_train.jsonl", [{"train": row} for row in mmlu])
    answer = "He buys 2*3=<<2*3=6>>6 and gets 6+1000 = $<<6+1000=1006>>1006.\n#### 1,006"
    write_rows(folder / "gsm8k" / "test.jsonl", [{"question": f"g{i}", "answer": answer} for i in range(5)])
    humaneval = {
        "prompt": 'import math\n\ndef helper(x):\n    return x + 1\n\ndef f(x):\n    """Two more."""\n',
        "canonical_solution": "    return helper(helper(x))\n",
        "test": "def check(candidate):\n    assert candidate(3) == 5\n    assert helper(1) == 2\n",
        "entry_point": "f",
    }
    (folder / "humaneval").mkdir()
    with gzip.open(folder / "humaneval" / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(json.dumps(humaneval) + "\n")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    write_rows(folder / "smoltalk" / "train.jsonl", [{"messages": messages, "source": "x"}] * 3)
    (folder / "words").mkdir()
    (folder / "words" / "words_alpha.txt").write_text("apple\nbanana\nzoo\nstrawberry\n", encoding="utf-8")
    monkeypatch.setenv("NANOCHAT_TASK_DIR", str(folder))
    spellingbee.load_words.cache_clear()
    yield folder
    spellingbee.load_words.cache_clear()


# --- slices, sequences, mixtures --------------------------------------------------------------------------------------


@given(st.integers(0, 30), st.integers(0, 40), st.none() | st.integers(0, 40), st.integers(1, 7))
def test_slices_are_those_of_a_list(count, start, stop, step):
    if stop is not None and stop < start:
        with pytest.raises(ValueError, match="bad slice"):
            Numbers(count, start=start, stop=stop, step=step)
        return
    task = Numbers(count, start=start, stop=stop, step=step)
    expected = list(range(count))[start:stop:step]
    assert numbers_of(task) == expected
    assert len(task) == len(expected)
    if expected:
        assert task[-1]["messages"][0] == expected[-1]
    with pytest.raises(IndexError):
        task[len(expected)]


@given(st.lists(st.integers(0, 12), max_size=6))
def test_mixture_holds_every_example_once_and_sequence_keeps_the_order(sizes):
    tasks = [Numbers(size, first=100 * i) for i, size in enumerate(sizes)]
    laid_out = [100 * i + j for i, size in enumerate(sizes) for j in range(size)]
    assert numbers_of(TaskSequence(tasks)) == laid_out
    mixed = numbers_of(TaskMixture(tasks))
    assert sorted(mixed) == laid_out
    assert mixed == numbers_of(TaskMixture(tasks))  # deterministic


def test_mixture_weighs_by_size_and_repetition_and_can_be_sliced():
    mixture = TaskMixture([Numbers(300), Numbers(100, first=1000), Numbers(100, first=1000)])
    first_half = numbers_of(mixture)[:250]
    share = sum(n >= 1000 for n in first_half) / 250
    assert 0.3 < share < 0.5  # 200 of 500, well mixed
    assert Counter(numbers_of(mixture))[1007] == 2
    part = TaskMixture([Numbers(300)], start=10, stop=20)
    assert numbers_of(part) == numbers_of(TaskMixture([Numbers(300)]))[10:20]


def test_the_shuffle_is_pinned():
    # Training data order must not change between versions: a resumed run would see other examples.
    assert list(shuffled_indices(8)) == [3, 4, 6, 7, 2, 5, 0, 1]


def test_training_tasks_and_mixtures_say_that_they_have_no_judge():
    for task in (Numbers(1), TaskMixture([Numbers(1)])):
        with pytest.raises(NotImplementedError, match=task.name):
            task.evaluate({}, "x")


def test_multiple_choice_text_glues_letters_to_equals():
    text = render_mc("Why?", ("A", "B"), ["one", "two"])
    assert "- one=A\n- two=B\n" in text
    assert "Why?" in text
    with pytest.raises(ValueError, match="2 choices need 2 letters"):
        render_mc("Why?", ("A",), ["one", "two"])


# --- GSM8K ------------------------------------------------------------------------------------------------------------

RIGHT = [  # (what a model wrote, the number)
    ("#### 10", "10"),
    ("#### 10.", "10"),
    ("#### $10", "10"),
    ("#### $10.00", "10"),
    ("####10", "10"),
    ("####\n10", "10"),
    ("#### 1,000", "1000"),
    ("#### 1,234,567", "1234567"),
    ("#### $1,234.50", "1234.5"),
    ("#### 10 dollars", "10"),
    ("#### 10, because 5 + 5", "10"),
    ("#### 10%", "10"),
    ("#### **10**", "10"),
    ("#### = 10", "10"),
    ("#### : 10", "10"),
    ("#### -5", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### \u22125", "-5"),
    ("#### - 5", "-5"),
    ("#### +5", "5"),
    ("#### -0", "0"),
    ("#### 0.50", "0.5"),
    ("#### .5", "0.5"),
    ("#### 007", "7"),
    ("#### €10", "10"),
    ("first #### 3, no: #### 4", "4"),
    ("#### 18 ####", "18"),
    ("#### 18\n#### \n", "18"),
    ("5 + 5 = 10\n#### 10\n", "10"),
    ("#### 12345678901234567890", "12345678901234567890"),
    ("#### 10<|assistant_end|>", "10"),
    ("#### 5 - 10 = -5", "-5"),
    ("#### 20*5 = 100", "100"),
    ("#### x = 5", "5"),
    ("#### 5 000", "5000"),
    ("#### 12 345 678.5", "12345678.5"),
    ("#### 1'000", "1000"),
    ("#### 9{,}500", "9500"),
    ("#### 9\\,500", "9500"),
    ("#### $\\boxed{18}$", "18"),
    ("#### \\$18", "18"),
    ("#### 1e3", "1000"),
    ("#### 2.5E-1", "0.25"),
    ("#### 10 apples. He has 5 left", "10"),
    ("#### 10\n5 + 5 = 10", "10"),
    ("#### 10 m", "10"),
    ("#### $10/hour", "10"),
    ("#### `10`", "10"),
    ("#### 5%", "5"),
    ("#### 1.5e3", "1500"),
    ("#### \u20135", "-5"),  # an en dash
    ("#### ¥1,200", "1200"),
    ("#### ₹10", "10"),
    ("#### \\(10\\)", "10"),
    ("#### \\[10\\]", "10"),
    ("#### “10”", "10"),
    ('#### "10"', "10"),
    ("#### \u0664\u0662", "42"),  # Arabic digits
    ("#### \u0661\u066c\u0662\u0663\u0664\u066b\u0665", "1234.5"),
    ("#### \uff11\uff10", "10"),  # of full width
    ("#### 10, and that is all", "10"),
    ("#### 10, in dollars", "10"),
    ("#### 10 quarters", "10"),
    ("#### 10 square meters", "10"),
]
WRONG = ["", "10", "the answer is 10", "####", "#### ten", "### 10", "#### 1,2,3", "#### 10,50", "#### 3 #### none"]
WRONG += [
    f"#### {a}" for a in ("1/2", "12:30", "3 or 4", "5-10", "5 - 10", "3^2", "2*3", "2**3", "1.5 million", "2.5.3")
]
WRONG += [
    f"#### {a}" for a in ("3 1/2", "3½", "5k", "2 dozen", "3 and a half", "3, 4", "3; 4", "3 and 4", "\\frac{1}{2}")
]
WRONG += [f"#### {a}" for a in ("3, or 4", "3; or 4", "3, maybe 4", "3, possibly 4", "x = 5, y = 6", "10²", "2⁵", "3₂")]
WRONG += [f"#### {a}" for a in ("3 tenths", "1 fifth", "5 lakh", "2 crore", "10 mil", "5 squared", "10 and a quarter")]
WRONG += [f"#### {a}" for a in ("12 dozen", "between 3 and 4", "10–12", "10 to 12", "5 or so", "5 out of 6", "5 ± 1")]
WRONG += [f"#### {a}" for a in ("5 feet 3 inches", "0x10", "1,0000", "10 = ten", "5 2/3", "10^6", "1e3e4")]


@pytest.mark.parametrize(("text", "value"), RIGHT)
def test_gsm8k_reads_the_answer(text, value):
    assert extract_answer(text) == Decimal(value)


@pytest.mark.parametrize("text", WRONG)
def test_gsm8k_reads_no_answer_where_there_is_none(text):
    assert extract_answer(text) is None


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_gsm8k_reads_any_number_as_python_writes_it(value):
    assert extract_answer(f"so #### ${value:,}.") == value


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so #### 1,234", "1234", "1234"),
        ("#### 10 and not 12.", "10", "12"),
        ("#### $18.", None, "18"),  # the strict rule knows no dollar sign
        ("the answer is $1,018.00.", None, "1018.00"),
        ("#### 5\n#### 6", "5", "6"),
        ("it is -7", None, "-7"),
        ("nothing", None, None),
    ],
)
def test_gsm8k_by_the_rules_of_lm_evaluation_harness(text, strict, flexible):
    assert (strict_match(text), flexible_extract(text)) == (strict, flexible)


def test_gsm8k_calculator_notes_become_tool_calls(task_files):
    task = GSM8K("test")
    parts = task[0]["messages"][1]["content"]
    assert [part["type"] for part in parts] == [
        "text",
        "python",
        "python_output",
        "text",
        "python",
        "python_output",
        "text",
    ]
    assert parts[1]["text"] == "2*3"
    assert parts[2]["text"] == use_calculator(parts[1]["text"])
    assert "".join(part["text"] for part in parts if part["type"] == "text").startswith("He buys 2*3=6 and")
    assert task.evaluate(task[0], "thus #### $1006.")
    assert not task.evaluate(task[0], "thus #### 1007")
    assert task.reward(task[0], "#### 1006") == 1.0
    assert task.other_verdicts(task[0], "#### 1006, or 7") == {"strict-match": True, "flexible-extract": False}
    assert task.other_verdicts(task[0], "#### 1,006") == {"strict-match": True, "flexible-extract": True}


def test_gsm8k_teaches_what_the_calculator_says():
    for note, output in (("48/2=24", "24"), ("10/3=3.33", "3.33333333333"), (".5*4=2.00", "2"), ("3x=9", "9")):
        parts = split_tool_calls(f"so <<{note}>> it is")
        assert parts[2] == {"type": "python_output", "text": output}


def test_gsm8k_answers_without_notes_are_one_text():
    assert split_tool_calls("plain\n#### 1") == [{"type": "text", "text": "plain\n#### 1"}]


# --- multiple choice --------------------------------------------------------------------------------------------------


def test_arc_labels_become_letters_and_the_answer_is_judged(task_files):
    task = ARC("ARC-Easy", "test")
    assert (task.name, task.eval_type, task.baseline, len(task)) == ("ARC-Easy", "categorical", 0.25, 7)
    for problem in task:
        number = int(problem["messages"][0]["content"].split("q")[1][0])
        assert problem["letters"] == ("A", "B", "C")
        assert problem["messages"][1]["content"] == "ABC"[number % 3]
        assert [task.evaluate(problem, letter) for letter in "ABC"].count(True) == 1


def test_mmlu_test_and_the_wrapped_rows_of_auxiliary_train_are_alike(task_files):
    test, train = MMLU("all", "test"), MMLU("auxiliary_train", "train")
    assert list(test) == list(train)
    assert test[0]["subject"] == "maths"
    with pytest.raises(ValueError, match="not subset 'all', split 'train'"):
        MMLU("all", "train")


# --- code -------------------------------------------------------------------------------------------------------------

BODY = "    return helper(helper(x))\n"
CODE_RIGHT = [
    f"```python\ndef f(x):\n{BODY}```",
    f"Here it is:\n\n```\ndef f(x):\n{BODY}```\nand that is all.",
    f"def f(x):\n{BODY}",
    BODY,  # only the body: it continues the prompt
    f"```python\nimport os\ndef other(): pass\ndef f(x):\n{BODY}\n```\n```python\nraise SystemExit\n```",
]
CODE_WRONG = [
    "def f(x):\n    return x\n",
    "import sys\nsys.exit(0)\ndef f(x):\n    pass\n",
    "def f(x):\n    import os\n    os._exit(0)\n",
    "I don't know.",
    "",
    "def g(x):\n    return x + 2\n",
]


def test_humaneval_judges_by_running_the_tests(task_files):
    task = HumanEval(allow_weak_isolation=True)
    problem = task[0]
    assert task.evaluate(problem, problem["messages"][1]["content"])
    assert [task.evaluate(problem, code) for code in CODE_RIGHT] == [True] * len(CODE_RIGHT)
    assert [task.evaluate(problem, code) for code in CODE_WRONG] == [False] * len(CODE_WRONG)


def test_humaneval_program_keeps_the_imports_and_helpers_of_the_prompt():
    program = build_solution("import math\n\ndef f(x):\n    '''doc'''\n", "f", "def f(x):\n    return math.pi")
    assert program.count("import math") == 1
    assert program.count("def f(x)") == 1  # the prompt's own unfinished f is left out
    assert extract_code("a ```python\nx = 1\n``` b") == "x = 1"
    for fence in ("```", "```py", "```python3", "```Python", '```python title="x"', "~~~"):
        answer = f"So:\n{fence}\nx = 1\n  y = 2\n{fence[:3]}\nThis works.\n"
        assert extract_code(answer) == "x = 1\n  y = 2"
        assert extract_code(answer.replace("\n", "\r\n")) == "x = 1\n  y = 2"
    assert extract_code("1. So:\n   ```python\n   if x:\n       y\n   ```\n") == "if x:\n    y"
    assert extract_code("x = 1") == "x = 1"


def test_humaneval_joins_helpers_that_stand_in_blocks_of_their_own():
    def program(*blocks: str) -> str:
        return extract_code("\n".join(f"So:\n```python\n{block}\n```" for block in blocks), "f")

    helper, solution = "def inc(v):\n    return v + 1", "def f(x):\n    return inc(x)"
    assert program(helper, solution) == program(solution, helper) == f"{helper}\n{solution}"
    assert program("import math", solution, "print(f(1))") == f"import math\n{solution}"
    both = f"{helper}\n{solution}"
    for other in ("def inc(v):\n    return v", "pip install x", "x = f(1)", solution):  # a draft, a shell, a use
        assert program(both, other) == both


# --- spelling ---------------------------------------------------------------------------------------------------------


def test_spelling_tasks_are_reproducible_and_their_own_answers_are_right(task_files):
    for make in (spellingbee.SpellingBee, spellingbee.SimpleSpelling):
        task = make(size=60, split="test")
        assert len(task) == 60
        assert list(task) == list(make(size=60, split="test"))
        assert list(task) != list(make(size=60, split="train"))
        for problem in task:
            content = problem["messages"][-1]["content"]
            answer = content if isinstance(content, str) else "".join(part["text"] for part in content)
            assert task.evaluate(problem, answer)
            assert not task.evaluate(problem, answer[:-1])


def test_spellingbee_counts_by_hand_as_the_calculator_does(task_files):
    parts = spellingbee.count_answer("strawberry", "r")
    assert "s,t,r,a,w,b,e,r,r,y" in parts[0]["text"]
    assert "10:y\nBy hand the count is 3." in parts[0]["text"]
    assert use_calculator(parts[1]["text"]) == parts[2]["text"] == "3"
    assert parts[-1]["text"].endswith("#### 3")
    for problem in spellingbee.SpellingBee(size=50):
        assert "{" not in problem["messages"][0]["content"]


# --- where rows come from ---------------------------------------------------------------------------------------------


def test_rows_are_shuffled_by_a_fixed_seed_and_complete(task_files):
    rows = sources.load_rows("x/y", None, "test", "mmlu/test.jsonl", ("question",))
    assert [row["question"] for row in rows] == [f"m{i}" for i in shuffled_indices(6)]


def test_missing_file_names_data_set_path_and_remedy(task_files):
    with pytest.raises(FileNotFoundError, match=r"openai/gsm8k.*train\.jsonl.*unset NANOCHAT_TASK_DIR"):
        GSM8K("train")


def test_offline_without_files_names_data_set_and_remedy(monkeypatch):
    monkeypatch.setattr(sources, "_work_offline_if_unreachable", lambda: None)
    with pytest.raises(FileNotFoundError, match=r"allenai/ai2_arc.*NANOCHAT_TASK_DIR.*arc/ARC-Easy/test\.jsonl"):
        ARC("ARC-Easy", "test")


def test_bad_rows_name_file_and_line(task_files):
    path = task_files / "gsm8k" / "test.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\nnot json\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"test\.jsonl, line 3: not valid JSON"):
        GSM8K("test")
    path.write_text('{"question": "a"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks the columns \['answer'\]"):
        GSM8K("test")
    path.write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="has no rows"):
        GSM8K("test")


def test_smoltalk_keeps_messages_only(task_files):
    assert SmolTalk("train")[0] == {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    }
    with pytest.raises(ValueError, match="not 'dev'"):
        SmolTalk("dev")


def test_customjson_reads_lists_of_messages(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(messages) + "\n" + json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    task = CustomJSON(path)
    assert [conversation["messages"] for conversation in task] == [messages, messages]
    assert task.name == "mine"


def test_tasks_are_found_by_name_in_any_case(task_files):
    assert get_task("arc-easy").name == "ARC-Easy"
    with pytest.raises(ValueError, match=r"no task called 'nope'.*GSM8K"):
        get_task("nope")


def test_load_available_lists_what_is_missing(task_files):
    (task_files / "mmlu" / "test.jsonl").unlink()
    tasks, missing = load_available(list(CLASSIC_TASKS))
    assert list(tasks) == ["ARC-Easy", "ARC-Challenge", "GSM8K", "HumanEval", "SpellingBee"]
    assert "cais/mmlu" in missing["MMLU"]


def test_humaneval_asks_before_it_runs_code_that_is_not_shut_off(task_files, monkeypatch):
    monkeypatch.setattr(execution, "isolation", lambda: Isolation(False, "no namespaces here"))
    with pytest.raises(IsolationError, match=r"no namespaces here.*--allow_weak_isolation"):
        get_task("HumanEval")
    assert "no namespaces here" in load_available(["HumanEval"])[1]["HumanEval"]
    task = get_task("HumanEval", allow_weak_isolation=True)
    assert task.evaluate(task[0], task[0]["messages"][1]["content"])
