"""Base, mid and SFT as their scripts run them, in float16: losses fall, everything is finite, the report says how."""

import json
import math

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_folder, load_checkpoint
from nanochat.common import get_base_dir
from nanochat.config import parse_config
from nanochat.train.tracking import METRICS_FILE

SIZE = ["--dtype=float16", "--device_type=cpu", "--device_batch_size=4", "--total_batch_size=256", "--eval_every=0"]
TEXTS = [
    "Rivers carry water to the sea, and rain fills the rivers again.",
    "The sky is blue because air scatters light.",
]


@pytest.fixture
def data(tmp_path):
    """Documents and conversations that a tiny model can learn."""
    (tmp_path / "texts").mkdir()
    for name, count in (("a.jsonl", 400), ("b.jsonl", 50)):
        lines = [json.dumps({"text": TEXTS[i % 2] + f" {name} {i}"}) for i in range(count)]
        (tmp_path / "texts" / name).write_text("\n".join(lines) + "\n")
    chat = [
        [{"role": "user", "content": f"Say {i % 5}."}, {"role": "assistant", "content": f"Here it is: {i % 5}"}]
        for i in range(200)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chat))
    return tmp_path


def run(module, *flags):
    module.main(parse_config(module.Config, list(flags)))


def check(source, tag, steps):
    folder = checkpoint_folder(source, tag)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.meta["dtype"] == "float16"
    assert checkpoint.meta["precision"]["scaler"]["scale"] >= 1
    for name, value in checkpoint.model.items():
        assert value.dtype == torch.float32, name  # master weights, the embedding included
        assert torch.isfinite(value).all(), name
    records = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == steps
    assert all(math.isfinite(loss) for loss in losses)
    assert all({"skipped", "scale"} <= set(record) for record in records if "loss" in record)
    return losses


def test_base_mid_and_sft_train_in_float16(data):
    from scripts import base_train, chat_sft, mid_train, tok_train

    texts, chat = f"--data_dir={data / 'texts'}", f"--chat_data={data / 'chat.jsonl'}"
    run(tok_train, texts, "--vocab_size=300", "--max_chars=20000")
    base = ["--depth=2", "--max_seq_len=64", "--eval_tokens=256", "--sample_every=0"]
    run(base_train, *SIZE, *base, texts, "--model_tag=t", "--num_iterations=12")
    losses = check("base", "t", 12)
    assert losses[-1] < 0.7 * losses[0]
    stage = ["--model_tag=t", chat, "--eval_batches=1", "--num_iterations=8"]
    run(mid_train, *SIZE, *stage)
    losses = check("mid", "t", 8)
    assert losses[-1] < losses[0]
    run(chat_sft, *SIZE, *stage, "--init_lr_frac=0.2")
    losses = check("sft", "t", 8)
    assert losses[-1] < losses[0]
    sections = "\n".join(path.read_text() for path in (get_base_dir() / "report").rglob("*.md"))
    for row in ("- dtype: float16", "- skipped steps: ", "- loss scale: "):
        assert sections.count(row) == 3, row
