"""Read folders that were changed at random: no traceback, no hang, no memory spent on what a file only claims.

python -m dev.fuzz_folders --tries=2000

Folders of models (our exports, nanochat's checkpoints, other people's transformers folders) and evaluation bundles.
Each try changes one thing: a value of a JSON, YAML or CSV file, bytes of a file, a tensor, the index, the tokenizer.
Reading it must succeed or raise one sentence (ValueError or FileNotFoundError), in 10 seconds and 1 GB of further
memory.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from nanochat.config import run_script
from nanochat.core_eval import COLUMNS, load_bundle, load_items, pick_fewshot, render_prompts, right_choice
from nanochat.files import write_jsonl, write_text
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.foreign import WEIGHTS_FILE
from nanochat.interop.hf_format import OWN_FILE, load_nanochat_folder, write_hf_folder
from nanochat.interop.hf_model import load_hf_model
from nanochat.interop.nanochat_pt import read_classic
from nanochat.tokenizer import RustBPETokenizer

SECONDS, GROWTH_KB = 10, 1 << 20
VALUES: list[Any] = [10**9, 10**30, -1, 0, 1.5, 1e308, float("nan"), None, True, "x", "../../x", [], {}, [[[]]]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the fuzzer."""

    tries: int = 2000
    """Folders to change and read."""
    seed: int = 0
    """Of the changes."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def change_json(rng: random.Random, path: Path) -> None:
    """Replace or remove one value."""
    content = json.loads(path.read_text(encoding="utf-8"))
    *way, last = rng.choice(places(content)[1:])
    inner = content
    for key in way:
        inner = inner[key]
    if rng.random() < 0.2:
        del inner[last]
    else:
        inner[last] = rng.choice(VALUES)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_bytes(rng: random.Random, path: Path) -> None:
    """Cut the file, flip a bit, put noise into its head, or make it empty or deeply nested."""
    data = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[:8] = rng.randbytes(8)
    path.write_bytes(data if kind < 3 else b"" if kind == 3 else b"[" * 100_000)


def change_lines(rng: random.Random, path: Path) -> None:
    """Of a file of lines, replace a word by something hostile, double a line, or make one very long."""
    lines = path.read_text(encoding="utf-8").splitlines()
    place = rng.randrange(len(lines))
    hostile = [
        "../../../../etc/passwd",
        "/etc/passwd",
        str(10**30),
        "-1",
        "nan",
        "[[[[",
        "{}",
        "*a",
        "\0",
        "x" * 10**7,
        "",
    ]
    words = lines[place].split(" ")
    words[rng.randrange(len(words))] = rng.choice(hostile)
    lines[place] = rng.choice([" ".join(words), lines[place] + "\n" + lines[place], '{"query": ' + "[" * 10**5])
    path.write_text("\n".join(lines), encoding="utf-8")


def change_yaml(rng: random.Random, path: Path) -> None:
    """A few lines that stand for gigabytes, or for something without end."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    text = path.read_text(encoding="utf-8")
    where = rng.choice(["label", "dataset_uri", "icl_task_type", "num_fewshot", "continuation_delimiter"])
    if rng.random() < 0.5:
        text = bomb + "\n".join(f"  {where}: *a19" if where in line else line for line in text.splitlines())
    else:
        text = rng.choice([bomb, "&a [*a]", "[" * 5000, "!!python/object/apply:os.system [id]", "x: " * 1000, "- 1"])
    path.write_text(text, encoding="utf-8")


def change_tokenizer(rng: random.Random, path: Path) -> None:
    """Break what the parts of a tokenizer.json promise each other."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    model = stored["model"]
    kind = rng.randrange(6)
    if kind == 0:  # merges in a circle, and of what is no token
        model["merges"] = rng.choice(
            [[["a", "b"], ["b", "a"]], [["ab", "ab"]], [["zzz", "q"]], [["a"]], model["merges"] * 50]
        )
    elif kind == 1:
        model["vocab"] = {f"t{i}": i for i in range(300_000)}
    elif kind == 2:
        model["vocab"][rng.choice(sorted(model["vocab"]))] = rng.choice([10**9, -1, 2**40, None, "1"])
    elif kind == 3:
        stored["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$|(" * 50}, "behavior": "Isolated"}
    elif kind == 4:
        stored["added_tokens"] = [{"id": i, "content": "x" * 1000 + str(i)} for i in range(3000)]
    else:
        stored["model"] = {"type": rng.choice(["WordPiece", "Unigram", "x", None]), "vocab": []}
    path.write_text(json.dumps(stored), encoding="utf-8")


def change_tensor(rng: random.Random, path: Path) -> None:
    """Drop, reshape, fill or cast one tensor."""
    weights = load_file(path)
    name = rng.choice(sorted(weights))
    value = weights.pop(name)
    made = [
        None,
        value[:1],
        value.flatten(),
        value.new_full(value.shape, float("nan") if value.is_floating_point() else -1),
        value.long(),
        value.repeat(2, 1),
    ]
    change = rng.choice(made)
    if change is not None:
        weights[name] = change.contiguous().clone()
    save_file(weights, path)


def change_index(rng: random.Random, path: Path) -> None:
    """Add an index that points somewhere."""
    where = rng.choice(["../other.safetensors", "/etc/passwd", "gone.safetensors", 7, None, "config.json"])
    path.with_name(f"{WEIGHTS_FILE}.index.json").write_text(json.dumps({"weight_map": {"a": where}}))


def originals(folder: Path) -> list[Path]:
    """Small exports in every form, with our record and without it, and a checkpoint of nanochat itself."""
    tokenizer = RustBPETokenizer.train_from_iterator(["a few words to learn merges from, and a few more"] * 4, 280)
    shape = {"sequence_len": 32, "vocab_size": 280, "n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
    made = []
    for name, form, switches in (
        ("classic", "native", {}),
        ("modern", "native", {"smear": True, "value_embeddings": True, "residual_scalars": True, "recall": 40}),
        ("qwen3", "qwen3", {"logit_softcap": None, "residual_factors": True}),
    ):
        config = GPTConfig(**shape, **switches)
        model = GPT(config)
        model.init_weights()
        write_hf_folder(folder / name, model.state_dict(), config, tokenizer, "", form=form)  # type: ignore[arg-type]
        shutil.copytree(folder / name, folder / f"{name}_without")
        (folder / f"{name}_without" / OWN_FILE).unlink()
        made += [folder / name, folder / f"{name}_without"]
    (folder / "pt").mkdir()
    config = GPTConfig(**shape)
    model = GPT(config)
    torch.save(model.state_dict(), folder / "pt" / "model_000001.pt")
    record = {key: getattr(config, key) for key in shape}
    (folder / "pt" / "meta_000001.json").write_text(json.dumps({"model_config": record}))
    write_bundle(folder / "bundle")
    return [*made, folder / "pt", folder / "bundle", *transformers_folders(folder, folder / "classic")]


def write_bundle(folder: Path) -> None:
    """A small evaluation bundle with a task of each kind."""
    row: dict[str, Any] = {"query": "q", "choices": ["a", "b"], "context_options": ["a", "b"], "context": "c"}
    tasks = []
    for kind in COLUMNS:
        write_jsonl(
            folder / "eval_data" / f"{kind}.jsonl", [row | {"gold": i % 2, "continuation": "d"} for i in range(5)]
        )
        tasks += [
            "-",
            f"  label: {kind}",
            f"  dataset_uri: {kind}.jsonl",
            "  num_fewshot: [2]",
            f"  icl_task_type: {kind}",
        ]
        tasks.append('  continuation_delimiter: "\\nAnswer: "')
    write_text(folder / "core.yaml", "\n".join(["icl_tasks:", *tasks]))
    write_text(
        folder / "eval_meta_data.csv", "Eval Task,Random baseline\n" + "".join(f"{kind},25\n" for kind in COLUMNS)
    )


def transformers_folders(folder: Path, tokenizer: Path) -> list[Path]:
    """A Llama and a GPT-2 of transformers with random weights; none without that package."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    except ImportError:
        return []
    shape = {"vocab_size": 280, "max_position_embeddings": 64, "bos_token_id": 271, "eos_token_id": 271}
    llama = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **shape
    )
    made = []
    for name, model in (
        ("llama", LlamaForCausalLM(llama)),
        ("gpt2", GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **shape))),
    ):
        model.save_pretrained(folder / f"{name}_theirs")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, folder / f"{name}_theirs" / file)
        made.append(folder / f"{name}_theirs")
    return made


def read_bundle(folder: Path) -> None:
    """Read every task and write its prompts."""
    for task in load_bundle(folder).tasks:
        items = load_items(task)
        for i, item in enumerate(items):
            render_prompts(task, item, pick_fewshot(i, items, items, task.num_fewshot))
            right_choice(task.kind, item)


def read(folder: Path) -> str:
    """Read a folder; "read", or the kind of the error that says in one sentence why not."""
    try:
        if folder.name == "pt":
            read_classic(folder)
        elif folder.name == "bundle":
            read_bundle(folder)
        elif folder.name.endswith("_theirs"):
            load_hf_model(str(folder), torch.device("cpu"))
        else:
            load_nanochat_folder(str(folder), torch.device("cpu"))
    except (ValueError, FileNotFoundError) as error:
        if "\n" in str(error) or not str(error):
            raise AssertionError(f"not one sentence: {error!r}") from error
        return type(error).__name__
    return "read"


def too_long(*_: Any) -> None:
    """Interrupt a read that computes for ever."""
    raise TimeoutError("it computes for ever")


def fuzz(tries: int, seed: int) -> Counter[str]:
    """Change and read `tries` folders; returns how many ended how.

    Raises:
        Exception: of a read that neither succeeded nor said why in one sentence; notes the try.
    """
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as tmp:
        made = originals(Path(tmp))
        for folder in made:
            if read(folder) != "read":
                raise AssertionError(f"{folder.name} can't be read unchanged")
        signal.signal(signal.SIGPROF, too_long)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(tries):
            rng = random.Random(f"{seed} {number}")
            folder = Path(tmp) / "changed" / rng.choice(made).name
            shutil.rmtree(folder.parent, ignore_errors=True)
            shutil.copytree(Path(tmp) / folder.name, folder)
            file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".md", ".py")))
            changes = [change_bytes]
            changes += [change_lines] * 3 if file.suffix in (".jsonl", ".yaml", ".csv") else []
            changes += [change_yaml] * 3 if file.suffix == ".yaml" else []
            changes += [change_tokenizer] * 4 if file.name == "tokenizer.json" else []
            changes += [change_json] * 4 if file.suffix == ".json" else []
            changes += [change_tensor, change_tensor, change_index] if file.suffix == ".safetensors" else []
            change = rng.choice(changes)
            change(rng, file)
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, 2 * SECONDS)  # of computing: a busy machine is no hang
            try:
                counts[read(folder)] += 1
            except BaseException:
                print(f"try {number}: {change.__name__} of {folder.name}/{file.name}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if time.process_time() - start > SECONDS:
                raise AssertionError(
                    f"try {number}, {change.__name__} of {folder.name}/{file.name}, took "
                    f"{time.process_time() - start:.0f} s"
                )
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > GROWTH_KB:
            raise AssertionError("reading took more than 1 GB")
    return counts


def main(cfg: Config) -> None:
    """Fuzz, then say how the tries ended."""
    print(", ".join(f"{kind}: {count}" for kind, count in sorted(fuzz(cfg.tries, cfg.seed).items())))


if __name__ == "__main__":
    run_script(main, Config)
