"""CORE: prompts, sampling and scores as specified, batches that change nothing, and no crash on small subsets."""

from __future__ import annotations

import json
import math
import random
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nanochat import core_eval
from nanochat.core_eval import (
    CoreResult,
    CoreTask,
    common_prefix_length,
    evaluate_core,
    evaluate_task,
    find_spans,
    get_bundle_folder,
    load_bundle,
    load_items,
    pick_fewshot,
    render_prompts,
)
from nanochat.data import core_bundle
from nanochat.files import ResumeLog
from nanochat.interop.hf_model import HuggingFaceModel, HuggingFaceTokenizer
from nanochat.scoring import (
    PASS_TOKENS,
    Span,
    TaskScore,
    batches_by_length,
    batches_of_examples,
    next_token_logits,
    score_groups,
    shared_length,
)

WORDS = (
    "sky",
    "blue",
    "rain",
    "river",
    "sea",
    "air",
    "light",
    "water",
    "mountain",
    "red",
    "fills",
    "from",
    "the",
    "to",
)


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


@pytest.fixture
def bundle_folder(tmp_path):
    """A bundle with the three kinds of tasks, one task without data, and awkward examples."""
    rng = random.Random(5)
    folder = tmp_path / "bundle"
    data = folder / "eval_data" / "kind"
    data.mkdir(parents=True)
    choice_items = [
        {"query": words(rng, 2, 6), "choices": [words(rng, 1, 5) for _ in range(3)], "gold": rng.randrange(3)}
        for _ in range(14)
    ]
    # One choice is the beginning of another; two are equal; one prompt is longer than the model's context.
    choice_items[3]["choices"] = ["the sea", "the sea and rain", "the"]
    choice_items[5]["choices"] = ["red", "red", "blue"]
    choice_items[7]["query"] = words(rng, 80, 80)
    schema_items = [
        {"context_options": [words(rng, 1, 6), words(rng, 1, 6)], "continuation": words(rng, 1, 3), "gold": i % 2}
        for i in range(9)
    ]
    schema_items[2]["context_options"] = ["same", "same"]
    lm_items = [{"context": words(rng, 1, 6) + " ", "continuation": words(rng, 1, 2)} for _ in range(9)]
    for name, items in (("choice", choice_items), ("schema", schema_items), ("lm", lm_items)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    tasks = [
        ("choice_zero", "multiple_choice", "choice", 0, {}),
        ("choice_few", "multiple_choice", "choice", 3, {"continuation_delimiter": "\nAnswer: "}),
        ("schema", "schema", "schema", 1, {}),
        ("lm", "language_modeling", "lm", 2, {"continuation_delimiter": "\nA: "}),
        ("gone", "language_modeling", "gone", 0, {}),
    ]
    config = [
        {"label": label, "dataset_uri": f"kind/{file}.jsonl", "num_fewshot": [shots], "icl_task_type": kind} | more
        for label, kind, file, shots, more in tasks
    ]
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": config}), encoding="utf-8")
    rows = ["Eval Task,Random baseline,Description"]
    rows += [f'{label},{33.3 if kind == "multiple_choice" else 0},"a, b"' for label, kind, *_ in tasks]
    (folder / "eval_meta_data.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


# --- an independent evaluation, one row at a time, straight from the specification ------------------------------------


@torch.no_grad()
def plain_scores(model, tokens: list[int], start: int, end: int) -> tuple[float, bool]:
    cut = max(0, len(tokens) - model.max_seq_len)
    tokens, start, end = tokens[cut:], max(1, start - cut), end - cut
    log_probs = model(torch.tensor([tokens]))[0].log_softmax(dim=-1)
    losses = [-float(log_probs[p - 1, tokens[p]]) for p in range(start, end)]
    greedy = all(int(log_probs[p - 1].argmax()) == tokens[p] for p in range(start, end))
    return sum(losses) / len(losses), greedy


def plain_core_example(model, tokenizer, task: CoreTask, items: list[dict], everything: list[dict], index: int) -> bool:
    pool = items if len(items) > task.num_fewshot else everything
    others = [i for i in range(len(pool)) if i != index]
    shots = [pool[i] for i in random.Random(1234 + index).sample(others, min(task.num_fewshot, len(others)))]
    item, d = items[index], task.delimiter
    bos = tokenizer.get_bos_token_id()

    def tokens(text: str) -> list[int]:
        return [bos, *tokenizer.encode(text)]

    if task.kind == "multiple_choice":
        shown = "".join(f"{s['query']}{d}{s['choices'][s['gold']]}\n\n" for s in shots)
        rows = [tokens(f"{shown}{item['query']}{d}{choice}") for choice in item["choices"]]
        start = 0
        while all(len(row) > start + 1 and row[start] == rows[0][start] for row in rows):
            start += 1
        losses = [plain_scores(model, row, start, len(row))[0] for row in rows]
        return min(range(len(rows)), key=lambda i: losses[i]) == item["gold"]
    if task.kind == "schema":
        shown = "".join(f"{s['context_options'][s['gold']]}{d}{s['continuation']}\n\n" for s in shots)
        rows = [tokens(f"{shown}{context}{d}{item['continuation']}") for context in item["context_options"]]
        same = 0
        while all(len(row) > same + 1 and row[-1 - same] == rows[0][-1 - same] for row in rows):
            same += 1
        losses = [plain_scores(model, row, len(row) - same, len(row))[0] for row in rows]
        return min(range(len(rows)), key=lambda i: losses[i]) == item["gold"]
    shown = "".join(f"{s['context'].strip()}{d}{s['continuation']}\n\n" for s in shots)
    without = tokens(f"{shown}{item['context'].strip()}{d}".strip())
    row = tokens(f"{shown}{item['context'].strip()}{d}{item['continuation']}")
    assert row[: len(without)] == without
    return plain_scores(model, row, len(without), len(row))[1]


@pytest.mark.parametrize(("max_per_task", "batch_tokens"), [(None, 300), (None, 100_000), (5, 1), (3, 300), (1, 300)])
def test_batched_choices_equal_one_at_a_time(bundle_folder, tiny_model, tiny_tokenizer, max_per_task, batch_tokens):
    for task in load_bundle(bundle_folder).tasks:
        everything = load_items(task)
        items = everything[:max_per_task]
        got = evaluate_task(tiny_model, tiny_tokenizer, task, items, everything, batch_tokens=batch_tokens)
        plain = [plain_core_example(tiny_model, tiny_tokenizer, task, items, everything, i) for i in range(len(items))]
        assert got == plain, task.label


def test_scores_of_a_batch_are_those_of_its_rows_alone(tiny_model):
    rng = random.Random(0)
    rows = [[rng.randrange(256) for _ in range(rng.randint(3, 100))] for _ in range(12)]
    spans = [Span(row, rng.randint(1, len(row) - 1), len(row)) for row in rows]
    together = score_groups(tiny_model, [[span] for span in spans])
    for span, score in zip(spans, together, strict=True):
        mean, greedy = plain_scores(tiny_model, list(span.tokens), span.start, span.end)
        assert score.mean_nats == pytest.approx(mean, abs=1e-5)
        assert score.greedy == greedy


def groups_with_shared_starts() -> list[list[Span]]:
    """Examples whose rows share none, some or much of their start, up to the whole context."""
    rng = random.Random(1)
    groups = []
    for shared, tails in ((40, (5, 9)), (0, (7, 3, 30)), (60, (1, 1, 20, 4)), (9, (70,)), (100, (28, 2)), (12, (3, 5))):
        start = [rng.randrange(256) for _ in range(shared)]
        rows = [start + [rng.randrange(256) for _ in range(n)] for n in tails]
        groups.append([Span(row, max(1, shared), len(row)) for row in rows])
    return groups


def tiny_llama() -> HuggingFaceModel:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    return HuggingFaceModel(transformers.LlamaForCausalLM(config))


@pytest.mark.parametrize("kind", ["ours", "hf"])
def test_shared_starts_computed_once_change_no_score(tiny_model, kind):
    model = tiny_model if kind == "ours" else tiny_llama()
    plain = model if kind == "ours" else lambda idx: model.model(idx).logits
    groups = groups_with_shared_starts()
    assert [shared_length(group) > 0 for group in groups] == [True, False, True, False, True, True]
    for batch in (groups, groups[:1], groups[3:], [groups[0], groups[2]], [groups[0], groups[5]]):
        scores = score_groups(model, batch)
        for span, score in zip([span for group in batch for span in group], scores, strict=True):
            with torch.no_grad():
                log_probs = plain(torch.tensor([span.tokens]))[0].log_softmax(dim=-1)
            rows = range(span.start, span.end)
            assert score.mean_nats == pytest.approx(
                sum(-float(log_probs[p - 1, span.tokens[p]]) for p in rows) / len(rows), abs=1e-4
            )
            assert score.greedy == all(int(log_probs[p - 1].argmax()) == span.tokens[p] for p in rows)


def test_an_interrupted_evaluation_goes_on_where_it_was(bundle_folder, tiny_model, tiny_tokenizer, tmp_path):
    task = load_bundle(bundle_folder).tasks[1]
    items = load_items(task)
    whole = evaluate_task(tiny_model, tiny_tokenizer, task, items, batch_tokens=200)
    calls: list[int] = []

    class Killed(Exception):
        pass

    def kill_after_two_batches(n: int) -> None:
        calls.append(n)
        if len(calls) == 4:  # the first call tells of what was there before
            raise Killed

    with pytest.raises(Killed):
        evaluate_task(
            tiny_model,
            tiny_tokenizer,
            task,
            items,
            batch_tokens=200,
            finished=ResumeLog(tmp_path / "log"),
            on_progress=kill_after_two_batches,
        )
    done = sum(calls)
    assert 0 < done < len(items)
    with open(tmp_path / "log" / "rank0.jsonl", "a") as f:
        f.write('\n{"task": "choice_f')  # torn by the kill
    counts: list[int] = []
    log = ResumeLog(tmp_path / "log")
    again = evaluate_task(
        tiny_model, tiny_tokenizer, task, items, batch_tokens=200, finished=log, on_progress=counts.append
    )
    assert again == whole
    assert counts[0] == done
    assert sum(counts) == len(items)
    assert len(ResumeLog(tmp_path / "log").records) == len(items)


@torch.no_grad()
def test_a_greedy_continuation_is_recognised(tiny_model):
    row = [5, 17, 99]
    for _ in range(4):
        row.append(int(tiny_model(torch.tensor([row]))[0, -1].argmax()))
    other = [*row[:-1], (row[-1] + 1) % 200]
    scores = score_groups(tiny_model, [[Span(row, 3, 7)], [Span(other, 3, 7)]])
    assert [score.greedy for score in scores] == [True, False]


@torch.no_grad()
def test_next_token_logits_are_those_of_each_prompt_alone(tiny_model):
    prompts = [[1, 2, 3], [4], list(range(50))]
    logits = next_token_logits(tiny_model, prompts, [7, 200])
    for prompt, row in zip(prompts, logits, strict=True):
        assert torch.allclose(row, tiny_model(torch.tensor([prompt]))[0, -1, [7, 200]], atol=1e-5)


# --- prompts and spans ------------------------------------------------------------------------------------------------


def make_task(kind: str, num_fewshot: int = 1, delimiter: str = " ") -> CoreTask:
    return CoreTask("t", kind, Path("t.jsonl"), num_fewshot, delimiter, 0.0)


def test_prompts_are_written_as_specified():
    shot = {"query": "Q1", "choices": ["no", "yes"], "gold": 1}
    item = {"query": "Q2", "choices": ["left", "right"], "gold": 0}
    assert render_prompts(make_task("multiple_choice", delimiter="\nAnswer: "), item, [shot]) == [
        "Q1\nAnswer: yes\n\nQ2\nAnswer: left",
        "Q1\nAnswer: yes\n\nQ2\nAnswer: right",
    ]
    shot = {"context_options": ["The cat", "The dog"], "continuation": "barks", "gold": 1}
    item = {"context_options": ["Tom", "Ann"], "continuation": "sings", "gold": 0}
    assert render_prompts(make_task("schema"), item, [shot]) == [
        "The dog barks\n\nTom sings",
        "The dog barks\n\nAnn sings",
    ]
    shot = {"context": " one plus one is ", "continuation": "two"}
    item = {"context": "two plus two is\n", "continuation": "four"}
    assert render_prompts(make_task("language_modeling"), item, [shot]) == [
        "one plus one is two\n\ntwo plus two is",
        "one plus one is two\n\ntwo plus two is four",
    ]
    assert render_prompts(make_task("language_modeling"), item, []) == ["two plus two is", "two plus two is four"]


def test_spans_cover_what_differs():
    assert find_spans("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]]) == [Span([9, 1, 2, 3], 2, 4), Span([9, 1, 4], 2, 3)]
    assert find_spans("schema", [[9, 1, 7, 8], [9, 2, 3, 7, 8]]) == [
        Span([9, 1, 7, 8], 2, 4),
        Span([9, 2, 3, 7, 8], 3, 5),
    ]
    assert find_spans("language_modeling", [[9, 1], [9, 1, 2, 3]]) == [Span([9, 1, 2, 3], 2, 4)]


rows_strategy = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=4)


@given(st.sampled_from(list(core_eval.COLUMNS)), rows_strategy, st.integers(2, 9))
def test_every_row_has_something_to_score_even_after_cropping(kind, rows, max_tokens):
    rows = [[9, *row] for row in rows]
    for span in (span.cropped(max_tokens) for span in find_spans(kind, rows)):
        assert 1 <= span.start < span.end <= len(span.tokens) <= max_tokens


@given(rows_strategy)
def test_common_prefix(rows):
    n = common_prefix_length(rows)
    assert all(row[:n] == rows[0][:n] for row in rows)
    assert n == min(map(len, rows)) or len({row[n] for row in rows}) > 1


@given(st.integers(1, 25), st.integers(0, 12), st.integers(1, 25), st.data())
def test_fewshot_never_shows_the_question_and_follows_the_specified_draw(total, count, limit, data):
    everything = [{"i": i} for i in range(total)]
    items = everything[:limit]
    index = data.draw(st.integers(0, len(items) - 1))
    shots = [shot["i"] for shot in pick_fewshot(index, items, everything, count)]
    assert index not in shots
    assert len(set(shots)) == len(shots) == min(count, total - 1)
    if len(items) > count:
        others = [i for i in range(len(items)) if i != index]
        assert shots == random.Random(1234 + index).sample(others, count)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths, max_tokens):
    batches = list(batches_by_length(lengths, max_tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= max_tokens


def example_of(shared: int, tails: tuple[int, ...]) -> list[Span]:
    """An example whose rows share their first `shared` tokens and nothing else."""
    return [Span([0] * shared + [row + 1] * n, max(1, shared), shared + n) for row, n in enumerate(tails)]


def cost_of(examples: list[list[Span]], batch: list[int]) -> tuple[int, int]:
    """(padded tokens, longest row) of a batch."""
    starts = max(shared_length(examples[i]) for i in batch)
    tail = max(len(span.tokens) - shared_length(examples[i]) for i in batch for span in examples[i])
    return starts * len(batch) + tail * sum(len(examples[i]) for i in batch), starts + tail


@given(
    st.lists(
        st.builds(example_of, st.integers(1, 60), st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)),
        max_size=12,
    ),
    st.integers(1, 600),
)
def test_examples_are_batched_once_within_budget_and_context_and_never_dearer_than_alone(examples, max_tokens):
    context = 100
    batches = batches_of_examples(examples, max_tokens, context)
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for batch in batches:
        size, longest = cost_of(examples, batch)
        kept = longest * sum(len(examples[i]) for i in batch)
        assert len(batch) == 1 or (size <= max_tokens and kept <= 2 * max_tokens and longest <= context)
        alone = sum(cost_of(examples, [i])[0] for i in batch)
        assert size <= alone + 2 * PASS_TOKENS * (len(batch) - 1)


def test_padding_is_weighed_against_passes():
    long, short = example_of(500, (2, 2)), example_of(20, (2, 2))
    assert batches_of_examples([short, long, short, long], 8192, 2048) == [[1, 3], [0, 2]]
    similar = [example_of(500 + i, (2, 2)) for i in range(4)]
    assert batches_of_examples(similar, 8192, 2048) == [[3, 2, 1, 0]]
    assert batches_of_examples(similar, 1100, 2048) == [[3, 2], [1, 0]]


# --- whole results ----------------------------------------------------------------------------------------------------


def test_core_is_the_mean_of_centered_and_partial_when_tasks_are_missing(bundle_folder, tiny_model, tiny_tokenizer):
    seen = []
    result = evaluate_core(
        tiny_model, tiny_tokenizer, load_bundle(bundle_folder), max_per_task=4, on_result=seen.append
    )
    assert seen == result.tasks
    assert [task.name for task in result.tasks] == ["choice_zero", "choice_few", "schema", "lm"]
    assert result.missing == ["gone"]
    assert result.partial
    assert result.core == pytest.approx(sum(task.centered for task in result.tasks) / 4)
    assert all(len(task.records) == 4 for task in result.tasks)


def score(name, passed, baseline):
    return TaskScore(name, [{"passed": p} for p in passed], baseline)


def test_centering_matches_published_numbers():
    # GPT-2: 10,042 HellaSwag items, .308504 -> .078006; 3,270 BoolQ items (guessing: 62 %), .552294 -> -.178175.
    hellaswag = score("hellaswag_zeroshot", [True] * 3098 + [False] * 6944, 0.25)
    boolq = score("boolq", [True] * 1806 + [False] * 1464, 0.62)
    assert hellaswag.centered == pytest.approx(0.078006, abs=1e-6)
    assert boolq.centered == pytest.approx(-0.178175, abs=1e-5)
    assert hellaswag.stderr == pytest.approx(math.sqrt(0.308504 * 0.691496 / 10042), rel=1e-5)


def test_csv_has_nanochats_columns():
    result = CoreResult([score("a", [True, False], 0.25), score("b", [True], 0.0)], [])
    rows = [[cell.strip() for cell in line.split(",")] for line in result.csv().splitlines()]
    assert rows == [
        ["Task", "Accuracy", "Centered"],
        ["a", "0.500000", "0.333333"],
        ["b", "1.000000", "1.000000"],
        ["CORE", "", "0.666667"],
    ]
    assert result.csv().splitlines()[1].index(",") == 35


def test_max_per_task_must_be_positive(bundle_folder, tiny_model, tiny_tokenizer):
    with pytest.raises(ValueError, match="max_per_task must be at least 1"):
        evaluate_core(tiny_model, tiny_tokenizer, load_bundle(bundle_folder), max_per_task=0)


# --- the bundle -------------------------------------------------------------------------------------------------------


def test_bundle_errors_name_the_file_and_the_remedy(bundle_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--eval_bundle .*no core\.yaml"):
        get_bundle_folder(tmp_path)
    with pytest.raises(ValueError, match=r"no CORE task nope .*choice_zero"):
        load_bundle(bundle_folder, ["nope"])
    path = bundle_folder / "eval_data" / "kind" / "lm.jsonl"
    path.write_text('{"context": "a"}\n', encoding="utf-8")
    (task,) = load_bundle(bundle_folder, ["lm"]).tasks
    with pytest.raises(ValueError, match=r"lm\.jsonl, example 1: lacks continuation"):
        load_items(task)
    path.write_text("{torn\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"lm\.jsonl, line 1: not valid JSON"):
        load_items(task)
    text = (bundle_folder / "core.yaml").read_text(encoding="utf-8")
    (bundle_folder / "core.yaml").write_text(text.replace("schema", "riddle"), encoding="utf-8")
    with pytest.raises(ValueError, match="unknown kind 'riddle'"):
        load_bundle(bundle_folder)
    (bundle_folder / "core.yaml").write_text("icl_tasks: [", encoding="utf-8")
    with pytest.raises(ValueError, match="malformed"):
        load_bundle(bundle_folder)


def test_only_leaves_the_others_missing(bundle_folder):
    bundle = load_bundle(bundle_folder, ["lm", "gone"])
    assert [task.label for task in bundle.tasks] == ["lm"]
    assert bundle.missing == ["choice_zero", "choice_few", "schema", "gone"]


def test_downloaded_zip_is_unpacked_whole_and_a_damaged_one_removed(bundle_folder, base_dir, monkeypatch):
    archive = base_dir / "eval_bundle.zip"
    monkeypatch.setattr(core_bundle, "download_file_with_lock", lambda url, name: archive)
    archive.write_bytes(b"not a zip")
    with pytest.raises(FileNotFoundError, match="removed, run again"):
        get_bundle_folder()
    assert not archive.exists()
    assert not (base_dir / "eval_bundle").exists()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("eval_bundle/core.yaml", "a: 1\n" * 10000)
    data = bytearray(archive.read_bytes())
    middle = data.index(b"core.yaml") + 40
    data[middle : middle + 15] = bytes(255 - byte for byte in data[middle : middle + 15])
    archive.write_bytes(data)
    with pytest.raises(FileNotFoundError, match="removed, run again"):
        get_bundle_folder()
    assert not archive.exists()
    with zipfile.ZipFile(archive, "w") as z:
        for path in bundle_folder.rglob("*"):
            if path.is_file():
                z.write(path, f"eval_bundle/{path.relative_to(bundle_folder)}")
    killed = base_dir / ".eval_bundle.0123abcd.tmp"  # what a killed run leaves of its unpacking
    (killed / "eval_data").mkdir(parents=True)
    assert load_bundle(get_bundle_folder()).missing == ["gone"]
    assert not killed.exists()


def test_no_network_says_how_to_go_on(base_dir, monkeypatch):
    def fail(url, name):
        raise RuntimeError("could not download")

    monkeypatch.setattr(core_bundle, "download_file_with_lock", fail)
    with pytest.raises(FileNotFoundError, match=r"is unavailable.*--eval_bundle PATH"):
        get_bundle_folder()


@pytest.mark.parametrize(
    ("specials", "bos", "start"),
    [
        (["<|endoftext|>", "<|im_start|>"], "<|im_start|>", "<|endoftext|>"),
        (["<s>", "<|bos|>"], "<s>", "<|bos|>"),
        (["<s>", "</s>"], "<s>", "<s>"),
        (["</s>"], None, "</s>"),
    ],
)
def test_texts_for_other_models_start_as_their_documents_did(specials, bos, start):
    """SmolLM2's chat model, for one, names <|im_start|> as bos, and answers worse after it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*specials, "a", "b"])}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = HuggingFaceTokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=specials[-1])
    )
    first = tokenizer.get_bos_token_id()
    assert first == specials.index(start)
    assert tokenizer.encode(["b a"], prepend=first) == [[first, len(specials) + 1, len(specials)]]
