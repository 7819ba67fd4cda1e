"""Evaluation of an assistant on tasks: letters by their logits, anything else by letting it write.

The functions behind scripts/chat_eval. They know of a task only what `EvalTask` says (see tasks/common.py). Ranks share
the problems and exchange their records at the end, so the result does not depend on how many there are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nanochat.engine import Engine, row_seed
from nanochat.env import get_dist_info
from nanochat.files import ResumeLog
from nanochat.generate.logprobs import answer_logprob
from nanochat.generate.sampling import Sampling
from nanochat.progress import progress
from nanochat.scoring import LanguageModel, Record, TaskScore, batches_by_length, next_token_logits, pad_rows
from nanochat.tokenizer import RustBPETokenizer

# Problems rendered and sorted by length together, per row of a batch.
BATCHES_PER_WINDOW = 16
GREEDY = Sampling(temperature=0.0, max_tokens=512)


class EvalTask(Protocol):
    """A task as evaluation sees it."""

    name: str
    eval_type: Any
    """ "categorical" or "generative"."""
    baseline: float

    def __len__(self) -> int:
        """The number of problems."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The conversation of a problem; its last message is the reference answer."""

    def evaluate(self, problem: dict[str, Any], completion: str) -> int | bool:
        """True if the completion is right."""


def evaluate_chat_task(
    task: EvalTask,
    model: LanguageModel,
    engine: Engine,
    tokenizer: RustBPETokenizer,
    *,
    max_problems: int | None = None,
    batch_size: int = 32,
    sampling: Sampling = GREEDY,
    num_samples: int = 1,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    finished: ResumeLog | None = None,
) -> TaskScore:
    """Evaluate the first `max_problems` problems of a task (all by default); every rank gets the whole result.

    Args:
        task: what to solve.
        model: in eval mode; answers categorical tasks.
        engine: generates the answers to the others.
        tokenizer: the model's.
        max_problems: at least 1, or None.
        batch_size: rows computed together.
        sampling: how to generate.
        num_samples: answers per problem; it counts as solved when any of them is right.
        autocast: makes the context to run the model in.
        finished: records of an interrupted evaluation with the same settings, and where new ones are kept.

    Raises:
        ValueError: there are no problems, or a setting is out of range.
    """
    if batch_size < 1 or (max_problems is not None and max_problems < 1):
        raise ValueError("the batch size and the number of problems must be at least 1")
    check_samples(num_samples, sampling)
    count = len(task) if max_problems is None else min(len(task), max_problems)
    if count == 0:
        raise ValueError(f"task {task.name} has no problems")
    _, rank, _, world_size = get_dist_info()
    mine = range(rank, count, world_size)
    before = {record["index"]: record for record in finished.records} if finished else {}
    todo = [i for i in mine if i not in before]
    records = [before[i] for i in mine if i in before]
    with progress(len(mine), task.name) as bar:
        bar.advance(len(records))

        def keep(more: list[Record]) -> None:
            records.extend(more)
            if finished is not None:
                finished.add(more)
            bar.advance(len(more))

        if task.eval_type == "categorical":
            with autocast():
                _evaluate_categorical(task, model, tokenizer, todo, batch_size, keep)
        else:
            per_batch = max(1, batch_size // num_samples)
            _evaluate_generative(task, engine, tokenizer, todo, per_batch, sampling, num_samples, keep)
    if world_size > 1 and dist.is_initialized():
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, records)
        records = [record for part in gathered for record in part]
    return TaskScore(task.name, sorted(records, key=lambda record: record["index"]), task.baseline)


def check_samples(num_samples: int, sampling: Sampling) -> None:
    """Raise ValueError for a number of answers per problem that makes no sense."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if num_samples > 1 and sampling.temperature == 0:
        raise ValueError("several samples at temperature 0 are all the same: set --temperature (-t) above 0")


def _evaluate_categorical(
    task: EvalTask,
    model: LanguageModel,
    tokenizer: RustBPETokenizer,
    indices: Sequence[int],
    batch_size: int,
    keep: Callable[[list[Record]], None],
) -> None:
    """The letter with the highest logit as the answer's first token; no other token may win."""
    window_size = batch_size * BATCHES_PER_WINDOW
    for offset in range(0, len(indices), window_size):
        window = indices[offset : offset + window_size]
        problems = [task[i] for i in window]
        # A prompt longer than the context loses its beginning: the choices and the instruction are at the end.
        prompts = [tokenizer.render_for_completion(problem)[-model.max_seq_len :] for problem in problems]
        lengths = [len(prompt) for prompt in prompts]
        # The batches are bounded by rows here: max_tokens is what batch_size rows of the longest prompt hold.
        for batch in batches_by_length(lengths, batch_size * max(lengths)):
            letters = sorted({letter for b in batch for letter in problems[b]["letters"]})
            ids = [_letter_id(tokenizer, letter) for letter in letters]
            logits = next_token_logits(model, [prompts[b] for b in batch], ids).tolist()
            records: list[Record] = []
            for b, row in zip(batch, logits, strict=True):
                of_letter = dict(zip(letters, row, strict=True))
                predicted = max(problems[b]["letters"], key=lambda letter: of_letter[letter])
                records.append(
                    _about(problems[b], window[b])
                    | {
                        "passed": bool(task.evaluate(problems[b], predicted)),
                        "predicted": predicted,
                        "logits": {letter: round(of_letter[letter], 4) for letter in problems[b]["letters"]},
                    }
                )
            keep(records)


def _letter_id(tokenizer: RustBPETokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"the choice {letter!r} is {len(ids)} tokens, but must be one to be judged by its logit")
    return ids[0]


def _evaluate_generative(
    task: EvalTask,
    engine: Engine,
    tokenizer: RustBPETokenizer,
    indices: Sequence[int],
    per_batch: int,
    sampling: Sampling,
    n: int,
    keep: Callable[[list[Record]], None],
) -> None:
    """Let the model write n answers to each problem, `per_batch` problems at a time, and have the task judge them."""
    prompts = {i: tokenizer.render_for_completion(task[i]) for i in indices}
    by_length = sorted(indices, key=lambda i: (len(prompts[i]), i))
    ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    # A prompt that fills the context leaves no room for an answer: the problem counts as failed.
    fitting = [i for i in by_length if len(prompts[i]) < engine.context_length]
    for i in by_length[len(fitting) :]:
        keep([_judge(task, i, []) | {"note": f"the prompt of {len(prompts[i])} tokens fills the context"}])
    for offset in range(0, len(fitting), per_batch):
        batch = fitting[offset : offset + per_batch]
        rows = [prompts[i] for i in batch for _ in range(n)]
        # By problem and answer: neither the batch nor the ranks nor an interruption may change what is drawn.
        seeds = [row_seed(f"{sampling.seed}/{i}", j) for i in batch for j in range(n)]
        sequences, masks = engine.generate_prompts(rows, seeds=seeds, keep_end=True, **vars(sampling))
        answers = [
            tokenizer.decode([token for token in sequence[len(row) :] if token not in ends])
            for sequence, row in zip(sequences, rows, strict=True)
        ]
        guesses = [""] * len(answers)
        if sampling.min_answer_p:  # as a server and a chat do
            shares = answer_shares(engine, tokenizer, sequences, masks)
            guesses = [a if p < sampling.min_answer_p else "" for a, p in zip(answers, shares, strict=True)]
            answers = [sampling.unsure if guess else a for a, guess in zip(answers, guesses, strict=True)]
        for j, i in enumerate(batch):
            withheld = [guess for guess in guesses[j * n : (j + 1) * n] if guess]
            keep([_judge(task, i, answers[j * n : (j + 1) * n]) | ({"withheld": withheld} if withheld else {})])


def _judge(task: EvalTask, index: int, completions: list[str]) -> Record:
    problem = task[index]
    passes = [bool(task.evaluate(problem, completion)) for completion in completions]
    # Only a task whose public judges differ has it (see tasks/common.py).
    other_verdicts: Callable[..., dict[str, bool]] = getattr(task, "other_verdicts", lambda *_: {})
    others = [other_verdicts(problem, completion) for completion in completions]
    return _about(problem, index) | {
        "passed": any(passes),
        "num_correct": sum(passes),
        "num_samples": len(passes),
        "completions": completions,
        **({"by_rule": {name: any(o[name] for o in others) for name in others[0]}} if others and others[0] else {}),
    }


def _about(problem: Mapping[str, Any], index: int) -> Record:
    question = [message["content"] for message in problem["messages"] if message["role"] == "user"][-1]
    record = {"index": index, "question": str(question), "answer": problem["messages"][-1]["content"]}
    return record | ({"group": problem["group"]} if "group" in problem else {})


# --- sampling that suits a model --------------------------------------------------------------------------------------

# Colder to warmer. A small model is often unsure which word is right, and then every draw is a risk.
TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
TOP_K = 50
TRIED_CONVERSATIONS = 256
TRIED_TOKENS = 64  # of an answer
RIGHT = 0.75  # the agreement from which on an answer says what the reference says, in a few other words at most
FEWEST_RIGHT = 20  # below it nothing can be said
# The mean risk that a drawn answer is another than the right one that is written without drawing. Of 40 right answers
# two or more then change in one of 57 rounds of questions, and not every change is for the worse.
TOLERANCE = 0.005
# How likely an answer must be to be given: the most of these that withholds no more than this share of the right ones.
# A wrong answer costs more trust than a missing one; but from a third on it takes two right ones to save one wrong one.
LEAST_LIKELY = (0.1, 0.2, 0.3)
MOST_WITHHELD = 0.05
RISK_TOKENS = 4096  # read at once


def choose_sampling(
    engine: Engine, tokenizer: RustBPETokenizer, conversations: Sequence[Mapping[str, Any]], unsure: str = ""
) -> dict[str, Any]:
    """The warmest setting that keeps (next to) all answers that are right without drawing, and how likely an answer is
    that is no guess.

    An answer is right when its words are those of the reference (F1 of at least RIGHT). The risk that drawing gives
    another one is computed, not tried: what happens to one answer in two hundred takes thousands of draws to see.

    Args:
        engine: writes the answers.
        tokenizer: its.
        conversations: held out of training; each ends with the assistant's reference answer.
        unsure: what the assistant has learned to say when it does not know; "": nothing, and all answers are given.

    Returns:
        temperature, top_k above temperature 0, min_answer_p and unsure: fields of `Sampling`. Empty when fewer than
        FEWEST_RIGHT answers are right: of open-ended ones nobody can say by a reference.
    """
    count = min(TRIED_CONVERSATIONS, len(conversations))
    if count < FEWEST_RIGHT:
        return {}
    prompts, references = [], []
    for i in range(count):
        *asked, answer = tokenizer.render_turns(conversations[i * len(conversations) // count])  # type: ignore[arg-type]
        prompt = [*(token for ids, _ in asked for token in ids), answer[0][0]]  # up to assistant_start
        if asked and len(prompt) + 8 <= engine.context_length:
            prompts.append(prompt)
            references.append(_claimed(tokenizer.decode(answer[0][:TRIED_TOKENS])))

    sequences, masks = engine.generate_prompts(prompts, TRIED_TOKENS, keep_end=True)
    right = [
        i
        for i, (prompt, sequence) in enumerate(zip(prompts, sequences, strict=True))
        if _f1(_claimed(tokenizer.decode(sequence[len(prompt) :])), references[i]) >= RIGHT
    ]
    if len(right) < FEWEST_RIGHT:
        return {}
    fitting = [sequences[i] for i in right], [masks[i] for i in right]
    risks = risks_of_drawing(engine, *fitting, TEMPERATURES)
    fine = [t for t, risk in zip(TEMPERATURES, risks, strict=True) if sum(risk) <= TOLERANCE * len(right)]
    drawing: dict[str, Any] = {"temperature": max(fine), "top_k": TOP_K} if fine else {"temperature": 0.0}
    # Wrong answers are mostly unlikely ones: a model that was taught one answer to each question doubts between several
    # where it has not understood. Source: selective prediction, arXiv 1705.08500.
    shares = answer_shares(engine, tokenizer, *fitting) if unsure else []
    kept = [p for p in LEAST_LIKELY if sum(share < p for share in shares) <= MOST_WITHHELD * len(right)]
    return drawing | ({"min_answer_p": max(kept, default=0.0), "unsure": unsure} if unsure else {})


def risks_of_drawing(
    engine: Engine, sequences: Sequence[list[int]], masks: Sequence[list[int]], temperatures: Sequence[float]
) -> list[list[float]]:
    """How likely a drawn answer differs from this one, at each temperature: 1 - the product of its tokens' shares.

    Without top_k, so that the true risk is a little lower.

    Args:
        engine: whose model gives the shares.
        sequences: prompts with the likeliest answer to each, its end included.
        masks: 1 where the model chose a token, as `Engine.generate_prompts` returns them.
        temperatures: above 0.

    Returns:
        For each temperature the risk of each sequence.
    """
    kept = [[1.0] * len(sequences) for _ in temperatures]  # the share that stays
    for b, logits, ids in _chosen_logits(engine, sequences, masks):
        for n, temperature in enumerate(temperatures):
            kept[n][b] = (-F.cross_entropy(logits / temperature, ids, reduction="sum")).double().exp().item()
    return [[1 - share for share in row] for row in kept]


def answer_shares(
    engine: Engine, tokenizer: RustBPETokenizer, sequences: Sequence[list[int]], masks: Sequence[list[int]]
) -> list[float]:
    """How likely the model finds what each answer claims (see `answer_logprob`); arguments as of `risks_of_drawing`."""
    shares = [1.0] * len(sequences)
    for b, logits, ids in _chosen_logits(engine, sequences, masks):
        logprobs = (-F.cross_entropy(logits, ids, reduction="none")).tolist()
        texts = [tokenizer.decode_bytes([token]) for token in ids.tolist()]
        shares[b] = math.exp(answer_logprob(zip(texts, logprobs, strict=True)))
    return shares


@torch.inference_mode()
def _chosen_logits(
    engine: Engine, sequences: Sequence[list[int]], masks: Sequence[list[int]]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(number of the sequence, logits (n, V), ids (n,)) at the n tokens that the model chose, where there are any."""
    model, device = engine.model, engine.model.get_device()
    with engine.precision.autocast() if engine.precision else nullcontext():
        for batch in batches_by_length([len(sequence) for sequence in sequences], RISK_TOKENS):
            hidden = model.hidden(pad_rows([sequences[b] for b in batch], device))  # (B, T, C)
            for row, b in zip(hidden, batch, strict=True):
                if chosen := [t for t, mask in enumerate(masks[b]) if mask]:
                    logits = model.logits_at(row[[t - 1 for t in chosen]])  # (n, V)
                    yield b, logits, torch.tensor([sequences[b][t] for t in chosen], device=device)


def _claimed(text: str) -> Counter[str]:
    """The words behind the last question mark, as `answer_logprob` has it; all words if there are none."""
    words = [re.findall(r"\w+", part) for part in re.sub(r"<\|\w+\|>", " ", text).lower().split("?")]
    return Counter(words[-1] or [word for part in words for word in part])


def _f1(answer: Counter[str], reference: Counter[str]) -> float:
    return 2 * (answer & reference).total() / max(1, answer.total() + reference.total())
