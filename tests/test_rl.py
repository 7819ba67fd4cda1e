"""Reinforcement learning: the loss is the policy gradient, rewards rise, and a killed run goes on exactly."""

import json
from dataclasses import replace

import pytest
import torch

from nanochat.checkpoint.writer import CheckpointWriter
from nanochat.checkpoint_manager import checkpoint_folder, load_checkpoint, save_checkpoint, saved_steps
from nanochat.common import get_base_dir, setup_compute
from nanochat.config import Runtime, parse_config
from nanochat.data.loader import Batch
from nanochat.engine import Engine, row_seed
from nanochat.scoring import pass_at_k
from nanochat.train.rl import RLConfig, RLTasks, evaluate_pass_at_k, policy_loss, reinforce
from nanochat.train.rollouts import (
    MAX_TRIES,
    FittingProblems,
    Rollout,
    RolloutConfig,
    RolloutLoader,
    attempt_problems,
    group_advantages,
    to_rows,
)
from nanochat.train.tracking import METRICS_FILE
from nanochat.train.trainer import Trainer
from scripts import chat_rl
from tasks.demo.wordsums import WORDINGS, DemoWordSums
from tasks.mixtures import rl_tasks
from tasks.registry import get_task

CPU = Runtime(device_type="cpu", dtype="float32")


class SayVowels:
    """Prompts whose right answers have a certain vowel: a random model hits it now and then."""

    name = "SayVowels"

    def __init__(self, size=20):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]}

    def reward(self, problem, completion):
        return float("e" in completion.split("<|assistant_end|>")[0])


TASKS = RLTasks(SayVowels(), SayVowels(8))
SMALL = {"examples_per_step": 1, "num_samples": 2, "max_new_tokens": 2, "eval_examples": 2, "eval_samples": 1}


def config(**changes):
    settings = {
        "runtime": CPU,
        "num_iterations": 5,
        "examples_per_step": 3,
        "num_samples": 4,
        "device_batch_size": 5,
        "max_new_tokens": 6,
        "eval_every": 0,
        "eval_examples": 6,
        "eval_samples": 4,
        "init_lr_frac": 0.2,
    }
    return RLConfig(**(settings | changes))


@pytest.fixture
def saved_sft(tiny_model, tiny_tokenizer):
    """The tiny model as an SFT checkpoint."""
    tiny_tokenizer.save(get_base_dir() / "tokenizer")
    meta = {"model_config": tiny_model.config.to_dict(), "tokenizer_hash": tiny_tokenizer.hash, "dtype": "float32"}
    save_checkpoint(checkpoint_folder("sft", "d2"), 1, tiny_model.state_dict(), None, meta | {"chat_data": "demo"})


def train(**changes):
    reinforce(config(**changes), lambda meta: TASKS)
    return load_checkpoint(checkpoint_folder("rl", "d2"))


def metrics(name):
    lines = (checkpoint_folder("rl", "d2") / METRICS_FILE).read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def make_loader(model, tokenizer, state=None, micro_batches=1, task=TASKS.train, ranks=(0, 1), **settings):
    compute = replace(setup_compute(CPU), rank=ranks[0], world_size=ranks[1])
    cfg = RolloutConfig(**({"examples_per_step": 3, "num_samples": 4, "max_new_tokens": 6} | settings))
    state = json.loads(json.dumps(state))
    return RolloutLoader(model, tokenizer, task, compute, cfg, micro_batches=micro_batches, state=state)


# --- the length -------------------------------------------------------------------------------------------------------


def test_no_more_epochs_than_asked_however_long_the_run(saved_sft, capsys):
    tasks = TASKS._replace(train=SayVowels(2))
    reinforce(config(num_iterations=None, hours=10.0, max_epochs=2.0, **SMALL), lambda meta: tasks)
    assert load_checkpoint(checkpoint_folder("rl", "d2")).meta["step"] == 4  # a problem per step, two problems
    assert "4 steps or 10h00m of training" in capsys.readouterr().out


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_advantages_are_rewards_without_the_group_mean():
    assert group_advantages([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], 3) == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0, 0, 0])


def test_the_gradient_is_that_of_reward_weighted_log_likelihood(tiny_model, tiny_tokenizer):
    answers = [Rollout([1, 2, 3, 4, 5], [0, 0, 1, 1, 1], 0.75), Rollout([1, 2, 9, 8], [0, 0, 1, 0], -0.25)]
    x, y, advantage = to_rows(answers, torch.device("cpu"))
    batch = Batch(x, y, None, {"advantage": advantage})
    policy_loss(tiny_model(x, y, loss_reduction="none"), batch).backward()
    got = {name: p.grad.clone() for name, p in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    for ids, mask, a, *_ in answers:  # one row at a time, without padding, by log_softmax
        logp = tiny_model(torch.tensor([ids[:-1]])).log_softmax(-1)
        chosen = [t for t in range(1, len(ids)) if mask[t]]
        (-a * sum(logp[0, t - 1, ids[t]] for t in chosen)).backward()
    for name, p in tiny_model.named_parameters():
        assert torch.allclose(got[name], p.grad, atol=1e-5), name


def test_forced_tokens_and_padding_are_not_learned():
    x, y, _ = to_rows([Rollout([7, 8, 9, 10], [0, 1, 0, 1], 1.0), Rollout([7, 8], [0, 1], 1.0)], torch.device("cpu"))
    assert x.tolist() == [[7, 8, 9], [7, 0, 0]]
    assert y.tolist() == [[8, -1, 10], [8, -1, -1]]


def test_clipping_and_penalty_are_zero_in_effect_at_the_start_and_bound_later():
    losses = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    y, advantage = torch.tensor([[5, 6, -1]]), torch.tensor([[0.5]])
    extras = {"advantage": advantage, "old": losses.detach(), "reference": losses.detach()}
    batch = Batch(y, y, None, extras)
    (plain,) = torch.autograd.grad(policy_loss(losses, batch), losses)
    (clipped,) = torch.autograd.grad(policy_loss(losses, batch, clip=0.2, kl=0.3), losses)
    assert torch.allclose(plain, clipped)
    moved = Batch(y, y, None, extras | {"old": losses.detach() + 1.0})  # e times as likely as before
    (bounded,) = torch.autograd.grad(policy_loss(losses, moved, clip=0.2), losses)
    assert bounded.abs().max() == 0
    assert policy_loss(losses + 0.5, batch, kl=1.0) > policy_loss(losses + 0.5, batch)


# --- rollouts ---------------------------------------------------------------------------------------------------------


def attempts(monkeypatch, engine, prompt, count):
    """Answers to a prompt of ids."""
    monkeypatch.setattr(engine.tokenizer, "render_for_completion", lambda problem: prompt)
    cfg = RolloutConfig(max_new_tokens=8)
    return attempt_problems(engine, engine.tokenizer, TASKS.train, [TASKS.train[0]], count, cfg, [3])[0]


def test_an_answer_ends_with_a_chosen_end_unless_it_was_cut(tiny_model, tiny_tokenizer, monkeypatch):
    engine = Engine(tiny_model, tiny_tokenizer)
    prompt = tiny_tokenizer.encode("hi", prepend="<|bos|>")
    answers = attempts(monkeypatch, engine, prompt, 40)
    assert len(answers) == 40
    for ids, mask, _, reward, length in answers:
        assert len(ids) == len(mask) == len(prompt) + length
        assert mask[: len(prompt)] == [0] * len(prompt)
        assert length == 8 or (ids[-1] == engine.assistant_end and mask[-1] == 1)
        assert reward == TASKS.train.reward({}, tiny_tokenizer.decode(ids[len(prompt) :]))
    assert attempts(monkeypatch, engine, [0] * engine.context_length, 40) == []  # no room for an answer


def test_an_answer_that_ends_with_bos_is_credited_for_bos(tiny_model, tiny_tokenizer, monkeypatch):
    """The gradient must reinforce the token that was sampled, not another one that would also end an answer."""
    bos = tiny_tokenizer.get_bos_token_id()
    with torch.no_grad():
        tiny_model.lm_head.weight.zero_()
        tiny_model.lm_head.weight[bos] = 100 * tiny_model.hidden(torch.tensor([[bos]]))[0, -1]
    (answer,) = attempts(monkeypatch, Engine(tiny_model, tiny_tokenizer), [bos], 1)
    assert (answer.ids, answer.mask) == ([bos, bos], [0, 1])


def test_batches_hold_every_useful_answer_once(tiny_model, tiny_tokenizer):
    one = next(make_loader(tiny_model, tiny_tokenizer, micro_batches=1))
    several = make_loader(tiny_model, tiny_tokenizer, micro_batches=5)
    parts = [next(several) for _ in range(5)]
    assert sum(int((y >= 0).sum()) for _, y, _, _ in parts) == int((one[1] >= 0).sum()) > 0
    total = sum(float((e["advantage"] * (y >= 0)).sum()) for _, y, _, e in parts)
    assert total == pytest.approx(float((one[3]["advantage"] * (one[1] >= 0)).sum()), abs=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_loader_goes_on_where_it_stopped(tiny_model, tiny_tokenizer, updates):
    first = make_loader(tiny_model, tiny_tokenizer, updates_per_rollout=updates)
    next(first)
    second = make_loader(tiny_model, tiny_tokenizer, first.state_dict(), updates_per_rollout=updates)
    for _ in range(3):
        a, b = next(first), next(second)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert torch.equal(a[3]["advantage"], b[3]["advantage"])


def test_an_epoch_shows_every_problem_once(tiny_model, tiny_tokenizer):
    loader = make_loader(tiny_model, tiny_tokenizer, examples_per_step=4)
    seen = []
    for rollout in range(5):
        loader._rollouts = rollout
        seen += [loader._problem(place, 0) for place in range(4)]
    assert sorted(seen) == list(range(20))


def answers_of(loader):
    """The answers of the next rollout as (tokens, learned, advantage), in some fixed order."""
    x, y, _, extras = next(loader)
    rows = zip(x.tolist(), y.tolist(), extras["advantage"].tolist(), strict=True)
    return sorted(([t for t in a if t], [t for t in b if t >= 0], c) for a, b, c in rows if max(b) >= 0)


def test_answers_do_not_depend_on_the_number_of_ranks(tiny_model, tiny_tokenizer):
    sizes = {"examples_per_step": 4, "num_samples": 9}
    alone = make_loader(tiny_model, tiny_tokenizer, **sizes)
    pair = [make_loader(tiny_model, tiny_tokenizer, ranks=(rank, 2), **sizes) for rank in range(2)]
    for _ in range(2):
        whole = answers_of(alone)
        assert whole == sorted(answers_of(pair[0]) + answers_of(pair[1]))
        assert len(whole) >= 9


class Judged(SayVowels):
    """Problems whose even ones fill a context of 128, judged by a rule for (number of the problem, answer)."""

    def __init__(self, rule):
        super().__init__(8)
        self.rule = rule

    def __getitem__(self, i):
        content = "word " * 80 if i % 2 == 0 else f"{i}"
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], "n": i}

    def reward(self, problem, completion):
        return float(self.rule(problem["n"], completion))


def test_problems_that_do_not_fit_are_left_out_with_a_count(tiny_tokenizer, capsys):
    problems = FittingProblems(Judged(lambda n, text: n), tiny_tokenizer, 128)
    assert [problem["n"] for problem in problems] == [1, 3, 5, 7]
    assert problems.reward(problems[1], "") == 3.0
    assert "SayVowels: 4 of 8 problems do not fit into the model's context of 128 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no problem of SayVowels leaves room"):
        FittingProblems(SayVowels(), tiny_tokenizer, 3)
    with pytest.raises(ValueError, match="has no problems"):
        FittingProblems(SayVowels(0), tiny_tokenizer, 128)


def test_a_problem_that_does_not_fit_or_teaches_nothing_is_replaced(tiny_model, tiny_tokenizer):
    task = Judged(lambda n, text: n == 5 or (n in (3, 7) and len(text) % 2))  # the others never teach
    loader = make_loader(tiny_model, tiny_tokenizer, task=task, examples_per_step=1, num_samples=9)
    shares, redrawn = [], []
    for _ in range(8):
        answers = answers_of(loader)
        assert (not answers) == (loader.metrics["useful_share"] == 0)
        shares.append(loader.metrics["useful_share"])
        redrawn.append(loader.metrics["problems_redrawn"])
    assert 0 < sum(share > 0 for share in shares) < 8  # nothing is learned where all tries are in vain: no error
    assert max(redrawn) == MAX_TRIES - 1
    assert all(times == MAX_TRIES - 1 for share, times in zip(shares, redrawn, strict=True) if share == 0)


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_step_without_signal_moves_nothing_and_the_run_says_so(saved_sft, tiny_model, monkeypatch, capsys):
    """All answers have the same reward: the gradient is 0, and neither Muon's nor Adam's momentum is applied."""
    monkeypatch.setattr(SayVowels, "reward", lambda self, problem, completion: 0.0)
    checkpoint = train(num_iterations=11, **SMALL)
    assert metrics("grad_norm") == [0.0] * 11
    assert metrics("share_without_signal") == [1.0] * 11
    assert all(torch.equal(value, checkpoint.model[name]) for name, value in tiny_model.state_dict().items())
    assert "steps had nothing to learn from and were not made: choose an easier --task" in capsys.readouterr().out


def test_a_run_on_a_context_that_few_problems_fit_ends_well(saved_sft, capsys):
    tasks = RLTasks(Judged(lambda n, text: "e" in text), Judged(lambda n, text: "e" in text))
    reinforce(config(num_iterations=4, **SMALL), lambda meta: tasks)
    assert load_checkpoint(checkpoint_folder("rl", "d2")).meta["complete"]
    assert capsys.readouterr().out.count("4 of 8 problems do not fit") == 2  # training and held-out ones


def test_the_best_checkpoint_of_a_run_stays(saved_sft, monkeypatch):
    scores = iter([0.1, 0.2, 0.6, 0.3, 0.4, 0.1, 0.1])
    monkeypatch.setattr("nanochat.train.rl.evaluate_pass_at_k", lambda *_: {"pass@1": next(scores)})
    start = CheckpointWriter.start
    monkeypatch.setattr(CheckpointWriter, "start", lambda self, snapshot: (start(self, snapshot), self.wait()))
    train(num_iterations=6, eval_every=1, save_every=1, keep_last=1, **SMALL)
    assert saved_steps(checkpoint_folder("rl", "d2")) == [2, 6]
    meta = load_checkpoint(checkpoint_folder("rl", "d2")).meta
    assert (meta["val_goal"], meta["state"]["best_val"], meta["recipe"]) == ("highest", 0.6, "classic")


@pytest.mark.parametrize(("rows", "samples"), [(8, 8), (1, 4)])
def test_an_evaluation_does_not_depend_on_the_batch_or_the_ranks(
    tiny_model, tiny_tokenizer, monkeypatch, rows, samples
):
    cfg, compute = config(eval_examples=8, eval_samples=samples), setup_compute(CPU)
    expected = evaluate_pass_at_k(cfg, tiny_model, tiny_tokenizer, TASKS.val, compute)
    monkeypatch.setattr("nanochat.train.rl.EVAL_ROWS", rows)
    assert evaluate_pass_at_k(cfg, tiny_model, tiny_tokenizer, TASKS.val, compute) == expected
    parts = [replace(compute, rank=rank, world_size=2) for rank in range(2)]
    halves = [evaluate_pass_at_k(cfg, tiny_model, tiny_tokenizer, TASKS.val, part) for part in parts]
    assert {name: halves[0][name] + halves[1][name] for name in expected} == pytest.approx(expected)


def test_learning_rates_start_where_the_task_says_or_the_user(saved_sft, capsys):
    assert (rl_tasks("DemoWordSums", {}).lr_frac, TASKS.lr_frac) == (0.1, 0.05)
    norms = {}
    for given, task in ((None, 0.3), (0.3, 0.05), (None, 0.05)):
        reinforce(
            config(num_iterations=1, init_lr_frac=given, resume="never"), lambda meta, t=task: TASKS._replace(lr_frac=t)
        )
        assert f"learning rates from {given or task:g} of" in capsys.readouterr().out
        model = load_checkpoint(checkpoint_folder("rl", "d2")).model
        norms[given, task] = sum(value.double().square().sum().item() for value in model.values())
    assert norms[None, 0.3] == norms[0.3, 0.05] != norms[None, 0.05]


def test_rewards_rise(saved_sft):
    checkpoint = train(num_iterations=20, num_samples=8, examples_per_step=4, init_lr_frac=1.0)
    before, after = metrics("pass@1")
    assert after > before + 0.3
    assert len(metrics("reward")) == 20
    assert checkpoint.meta["complete"]


def test_float16_is_finite(saved_sft):
    train(runtime=Runtime(device_type="cpu", dtype="float16"), num_iterations=2, eval_examples=2)
    assert all(loss == loss for loss in metrics("loss"))
    assert metrics("scale")[-1] > 1


@pytest.mark.parametrize("changes", [{}, {"updates_per_rollout": 2, "clip": 0.2, "kl": 0.1}, {"lora_rank": 2}])
def test_a_killed_run_ends_with_the_same_weights(saved_sft, monkeypatch, changes):
    whole, rewards = train(**changes).model, metrics("reward")
    original = Trainer.train_step

    def train_step(self):
        if self.state.step == 4:
            monkeypatch.setattr(Trainer, "train_step", original)
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(resume="never", save_every=3, **changes)
    part = train(save_every=3, **changes).model
    assert metrics("reward") == rewards
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_pass_at_k_agrees_with_sampling_by_hand(tiny_model, tiny_tokenizer):
    compute, cfg = setup_compute(CPU), config(eval_examples=8, eval_samples=8)
    scores = evaluate_pass_at_k(cfg, tiny_model, tiny_tokenizer, TASKS.val, compute)
    assert list(scores) == ["pass@1", "pass@2", "pass@4", "pass@8"]
    assert list(scores.values()) == sorted(scores.values())
    rows = [tiny_tokenizer.render_for_completion(p) for p in (TASKS.val[i] for i in range(8)) for _ in range(8)]
    engine = Engine(tiny_model, tiny_tokenizer)
    seeds = [row_seed(f"{CPU.seed}/{i}", n) for i in range(8) for n in range(8)]
    answers, _ = engine.generate_prompts(rows, 6, temperature=1.0, seeds=seeds, keep_end=True)
    right = [
        TASKS.val.reward({}, tiny_tokenizer.decode(ids[len(row) :])) for ids, row in zip(answers, rows, strict=True)
    ]
    expected = sum(pass_at_k(8, int(sum(right[i : i + 8])), 4) for i in range(0, 64, 8)) / 8
    assert scores["pass@4"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"updates_per_rollout": 2}, "--clip"),
        ({"clip": 2.0}, "clip"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_samples": 1}, "group baseline"),
        ({"eval_examples": 0}, "eval_examples"),
    ],
)
def test_impossible_settings_are_refused(saved_sft, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(**changes)


# --- the tasks --------------------------------------------------------------------------------------------------------


def test_word_sums_are_right_and_hold_out_their_numbers():
    train_task, test_task = DemoWordSums(300, "train"), DemoWordSums(300, "test")
    pairs = []
    for task in (train_task, test_task):
        numbers = set()
        for problem in task:
            call, output, _ = problem["messages"][1]["content"]
            assert [output["text"]] == [str(eval(call["text"]))] == problem["expected"]
            written = f"<|python_start|>{call['text']}<|python_end|>The answer is {problem['expected'][0]}."
            assert task.reward(problem, written) == 1.0
            assert task.reward(problem, f"The answer is {problem['expected'][0]}.") == 0.0
            assert task.reward(problem, written.replace("answer is ", "answer is 1")) == 0.0
            numbers.add(frozenset(call["text"].replace("-", "+").replace("*", "+").split("+")))
        pairs.append(numbers)
    assert not pairs[0] & pairs[1]
    assert {len(set(asks)) for asks in WORDINGS.values()} == {6, 7}


def test_the_task_follows_the_model():
    assert rl_tasks(None, {"chat_data": "demo"}).train.name == "DemoWordSums"
    assert get_task("demowordsums").name == "DemoWordSums"
    assert parse_config(chat_rl.Config, ["--task=GSM8K"]).task == "GSM8K"
    with pytest.raises(ValueError, match="SpellingBee"):
        chat_rl.Config(task="chess")
