"""Conversations in the forms that people have: each is recognised by itself, and nothing in it is lost silently."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import chat_files, chat_people, chat_store, chats, json_stream
from nanochat.data.chat_exports import FILE_LEFT_OUT, OTHER_ANSWER, TO_TOOL
from nanochat.data.chat_forms import PREFERENCE
from nanochat.data.chat_templates import BEFORE_TURNS, THOUGHT_LEFT_OUT
from nanochat.data.chats import ChatSource, load_chats, look_at_chats, show_learned
from nanochat.data.inventory import Inventory, UnusableInputError
from nanochat.data.packed import LINK_INSIDE
from nanochat.data.text_walk import CONVERT, ReadOptions
from nanochat.pipeline.profiles import Settings, choose_profile
from nanochat.pipeline.run import Config as PipelineConfig
from nanochat.pipeline.run import main as run_pipeline
from nanochat.pipeline.stages import fingerprint, make_stages
from scripts import data_check

U, A = "user", "assistant"
PAIR = [{"role": U, "content": "Hi"}, {"role": A, "content": "Hello!"}]


def look(path: Path, **said: Any) -> tuple[list[str], Inventory]:
    """(each conversation as text with what is learned marked, inventory)."""
    loaded, inventory = load_chats(ChatSource(str(path), **said))
    return [show_learned(c) for c in loaded], inventory


def dump(path: Path, *records: Any) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


HI = "user: Hi\nassistant: «Hello!»"
TWO = HI + "\nuser: 2+2?\nassistant: «4»"
SYS = "system: Be brief\n"
HELLO_PARTS = [{"type": "text", "text": "Hello!"}]
CALLED = 'user: Hi\nassistant: «w({"c": 1})»[sun]«Hello!»'
ONE = {
    # OpenAI, Mistral, TRL, Axolotl, unsloth, LLaMA-Factory
    "messages": ({"messages": PAIR, "id": 3, "source": "x"}, HI),
    "list": (PAIR, HI),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, HI),
    "sharegpt, system beside": (
        {"system": "Be brief", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
        SYS + HI,
    ),
    "sharegpt in messages": ({"messages": [{"from": "user", "value": "Hi"}, {"from": "bot", "value": "Hello!"}]}, HI),
    "conversations with roles": ({"conversations": PAIR}, HI),
    "conversation with speakers": (
        {"conversation": [{"speaker": "User", "text": "Hi"}, {"speaker": "Assistant", "text": "Hello!"}]},
        HI,
    ),
    "dialogue": ({"dialogue": PAIR, "topic": "greeting"}, HI),
    "xtuner": ({"conversation": [{"system": "Be brief", "input": "Hi", "output": "Hello!"}]}, SYS + HI),
    "firefly": ({"conversation": [{"human": "Hi", "assistant": "Hello!"}, {"human": "2+2?", "assistant": "4"}]}, TWO),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello!"}, HI),
    "alpaca, input": (
        {"instruction": "Say", "input": "Hi", "output": "Hello!"},
        "user: Say\n\nHi\nassistant: «Hello!»",
    ),
    "alpaca, history": (
        {"instruction": "2+2?", "input": "", "output": "4", "system": "Be brief", "history": [["Hi", "Hello!"]]},
        SYS + TWO,
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann did it.", "response": "Ann", "category": "qa"},
        "user: Who?\n\nAnn did it.\nassistant: «Ann»",
    ),
    "openorca": ({"id": "1", "system_prompt": "Be brief", "question": "Hi", "response": "Hello!"}, SYS + HI),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "Be brief"}]},
            "contents": [{"role": U, "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Hello!"}]}],
        },
        SYS + HI,
    ),
    "prompt/completion": ({"prompt": "Hi", "completion": " Hello!"}, HI),
    "prompt/completion of messages": ({"prompt": PAIR[:1], "completion": PAIR[1:]}, HI),
    "prompt/response": ({"prompt": "Hi", "response": "Hello!"}, HI),
    "question/answer": ({"question": "Hi", "answer": "Hello!"}, HI),
    "Question/Answer": ({"Question": "Hi", "Answer": "Hello!"}, HI),
    "input/output": ({"input": "Hi", "output": "Hello!"}, HI),
    "query/response": ({"query": "Hi", "response": "Hello!"}, HI),
    "user/assistant": ({"user": "Hi", "assistant": "Hello!", "system": "Be brief"}, SYS + HI),
    "Frage/Antwort": ({"Frage": "Hi", "Antwort": "Hello!"}, HI),
    "问题/答案": ({"问题": "Hi", "答案": "Hello!"}, HI),
    "inputs/targets": ({"inputs": "Hi", "targets": "Hello!"}, HI),
    "problem/solution": ({"problem": "Hi", "solution": "Hello!"}, HI),
    "squad": (
        {"context": "Ann did it.", "question": "Who?", "answers": {"text": ["Ann", "she"], "answer_start": [0, 0]}},
        "user: Ann did it.\n\nWho?\nassistant: «Ann»",
    ),
    "number as answer": ({"instruction": "2+2?", "output": 4}, "user: 2+2?\nassistant: «4»"),
    "anthropic completion": ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Hello!"}, HI),
    "ultrachat": ({"id": "0", "data": ["Hi", "Hello!", "2+2?", "4"]}, TWO),
    "pairs": ({"conversation": [["Hi", "Hello!"], ["2+2?", "4"]]}, TWO),
    # preference data
    "dpo": ({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away"}, HI),
    "dpo of messages": ({"prompt": PAIR[:1], "chosen": PAIR[1:], "rejected": [{"role": A, "content": "Go"}]}, HI),
    "dpo, whole": ({"chosen": PAIR, "rejected": [PAIR[0], {"role": A, "content": "Go"}]}, HI),
    "dpo, both": ({"prompt": "Hi", "chosen": PAIR, "rejected": [PAIR[0], {"role": A, "content": "Go"}]}, HI),
    "orca dpo": ({"system": "Be brief", "question": "Hi", "chosen": "Hello!", "rejected": "Go"}, SYS + HI),
    "llama-factory dpo": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello!"},
            "rejected": {"from": "gpt", "value": "Go"},
        },
        HI,
    ),
    "alpaca dpo": ({"instruction": "Hi", "input": "", "chosen": "Hello!", "rejected": "Go"}, HI),
    "hh": ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}, HI),
    "openai preference": (
        {
            "input": {"messages": PAIR[:1]},
            "preferred_output": PAIR[1:],
            "non_preferred_output": [{"role": A, "content": "Go"}],
        },
        HI,
    ),
    "kto": ({"prompt": "Hi", "completion": "Hello!", "label": True}, HI),
    # text with marks
    "chatml": (
        {
            "text": "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nHello!<|im_end|>\n"
        },
        SYS + HI,
    ),
    "llama 3": (
        {
            "text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        },
        HI,
    ),
    "llama 2": (
        {"text": "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] 2+2? [/INST] 4 </s>"},
        SYS + TWO,
    ),
    "gemma": ({"text": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"}, HI),
    "zephyr": ({"text": "<|system|>\nBe brief</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>"}, SYS + HI),
    "phi": ({"text": "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>"}, HI),
    "guanaco": ({"text": "### Human: Hi### Assistant: Hello!### Human: 2+2?### Assistant: 4"}, TWO),
    "alpaca text": ({"text": "Below is an instruction.\n\n### Instruction:\nHi\n\n### Response:\nHello!"}, HI),
    "vicuna": ({"text": "A chat. USER: Hi ASSISTANT: Hello!</s>USER: 2+2? ASSISTANT: 4</s>"}, TWO),
    "role: text": ({"text": "User: Hi\nAssistant: Hello!\nUser: 2+2?\nAssistant: 4"}, TWO),
    "baize": ({"input": "The conversation\n[|Human|] Hi\n[|AI|] Hello!\n[|Human|] "}, HI + "\nuser: "),
    "code keeps its indentation": (
        {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n    return 1\n<|im_end|>"},
        "user: Hi\nassistant: «    return 1»",
    ),
    # what assistants export
    "chatgpt": (
        {
            "title": "t",
            "mapping": {
                "r": {"message": None, "parent": None, "children": ["s"]},
                "s": {
                    "message": {"author": {"role": "system"}, "content": {"content_type": "text", "parts": [""]}},
                    "parent": "r",
                },
                "u": {
                    "message": {"author": {"role": U}, "content": {"content_type": "text", "parts": ["Hi"]}},
                    "parent": "s",
                },
                "old": {
                    "message": {"author": {"role": A}, "content": {"content_type": "text", "parts": ["Other"]}},
                    "parent": "u",
                },
                "th": {
                    "message": {"author": {"role": A}, "content": {"content_type": "thoughts", "thoughts": []}},
                    "parent": "u",
                },
                "a": {
                    "message": {
                        "author": {"role": A},
                        "content": {"content_type": "multimodal_text", "parts": ["Hello!", {"x": 1}]},
                    },
                    "parent": "th",
                },
            },
            "current_node": "a",
        },
        HI,
    ),
    "claude": (
        {
            "uuid": "1",
            "name": "n",
            "chat_messages": [
                {"sender": "human", "text": "Hi", "content": [{"type": "text", "text": "Hi"}], "attachments": []},
                {"sender": A, "text": "", "content": [{"type": "text", "text": "Hello!"}], "files": []},
            ],
        },
        HI,
    ),
    "oasst tree": (
        {
            "message_tree_id": "t",
            "prompt": {
                "text": "Hi",
                "role": "prompter",
                "replies": [{"text": "Hello!", "role": A, "rank": 0, "replies": []}],
            },
        },
        HI,
    ),
    # marks
    "weight 0": (
        {"messages": [PAIR[0], {**PAIR[1], "weight": 0}, {"role": U, "content": "2+2?"}, {"role": A, "content": "4"}]},
        "user: Hi\nassistant: [Hello!]\nuser: 2+2?\nassistant: «4»",
    ),
    "train false": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello!", "train": False},
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4", "train": True},
            ]
        },
        "user: Hi\nassistant: [Hello!]\nuser: 2+2?\nassistant: «4»",
    ),
    "training false (axolotl)": (
        {
            "messages": [
                PAIR[0],
                {**PAIR[1], "training": False},
                {"role": U, "content": "2+2?"},
                {"role": A, "content": "4"},
            ]
        },
        "user: Hi\nassistant: [Hello!]\nuser: 2+2?\nassistant: «4»",
    ),
    "empty answer": (
        {
            "messages": [
                PAIR[0],
                {"role": A, "content": " "},
                {"role": U, "content": "2+2?"},
                {"role": A, "content": "4"},
            ]
        },
        "user: Hi\nassistant: [ ]\nuser: 2+2?\nassistant: «4»",
    ),
    "sharegpt with a tool": (
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "calculator", "arguments": {"expression": "2+2"}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4!"},
            ],
            "tools": "[]",
        },
        "user: 2+2?\nassistant: «2+2»[4]«4!»",
    ),
    # What chat_web --log_conversations writes
    "own log": (
        {
            "time": 1.0,
            "prompt": PAIR[:1],
            "answer": [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, *HELLO_PARTS],
            "finish_reason": "stop",
        },
        "user: Hi\nassistant: «1+1»[2]«Hello!»",
    ),
    "langfuse": ({"input": {"messages": PAIR[:1]}, "output": PAIR[1]}, HI),
    "answer beside the messages": ({"messages": PAIR[:1], "response": "Hello!"}, HI),
    "langgraph, with the question again": ({"input": {"messages": PAIR[:1]}, "output": {"messages": PAIR}}, HI),
    "the whole conversation beside its beginning": ({"messages": PAIR[:1], "output": PAIR}, HI),
    "no answer beside the messages": (
        {"messages": [*PAIR, PAIR[0]], "response": {"error": "timeout"}},
        HI + "\nuser: Hi",
    ),
    "claude's calls by langchain, in both places": (
        {
            "messages": [
                {"type": "human", "content": "Hi"},
                {
                    "type": "ai",
                    "content": [{"type": "tool_use", "id": "1", "name": "w", "input": {"c": 1}}],
                    "tool_calls": [{"id": "1", "name": "w", "args": {"c": 1}}],
                },
                {"type": "tool", "content": "sun", "tool_call_id": "1"},
                {"type": "ai", "content": "Hello!"},
            ]
        },
        CALLED,
    ),
    "answer as OpenAI sends it": ({"messages": PAIR[:1], "response": {"choices": [{"message": PAIR[1]}]}}, HI),
    "langchain": ({"messages": [{"type": "human", "content": "Hi"}, {"type": "ai", "content": "Hello!"}]}, HI),
    "langchain, older": (
        {"messages": [{"type": t, "data": {"content": c}} for t, c in (("human", "Hi"), ("ai", "Hello!"))]},
        HI,
    ),
    "langchain's calls": (
        {
            "messages": [
                {"type": "human", "content": "Hi"},
                {"type": "ai", "content": "", "tool_calls": [{"id": "1", "name": "w", "args": {"c": 1}}]},
                {"type": "tool", "content": "sun", "tool_call_id": "1"},
                {"type": "ai", "content": "Hello!"},
            ]
        },
        CALLED,
    ),
    "gemini's calls": (
        {
            "contents": [
                {"role": U, "parts": [{"text": "Hi"}]},
                {"role": "model", "parts": [{"text": "secret", "thought": True}]},
                {"role": "model", "parts": [{"functionCall": {"name": "w", "args": {"c": 1}}}]},
                {"role": "function", "parts": [{"functionResponse": {"name": "w", "response": "sun"}}]},
                {"role": "model", "parts": [{"text": "Hello!"}]},
            ]
        },
        CALLED,
    ),
    "ai sdk": (
        {
            "messages": [
                {"role": U, "parts": [{"type": "text", "text": "Hi"}]},
                {"role": A, "parts": [{"type": "step-start"}, {"type": "reasoning", "text": "secret"}, *HELLO_PARTS]},
            ]
        },
        HI,
    ),
    "ai sdk's calls": (
        {
            "messages": [
                PAIR[0],
                {"role": A, "content": [{"type": "tool-call", "toolCallId": "1", "toolName": "w", "input": {"c": 1}}]},
                {
                    "role": "tool",
                    "content": [{"type": "tool-result", "toolCallId": "1", "output": {"type": "text", "value": "sun"}}],
                },
                PAIR[1],
            ]
        },
        CALLED,
    ),
}


@pytest.mark.parametrize("name", ONE)
def test_every_form_is_read(name: str, tmp_path: Path) -> None:
    record, expected = ONE[name]
    texts, inventory = look(dump(tmp_path / "a.jsonl", record, record))
    assert texts == [expected] * 2
    assert inventory.num_read == 2
    assert not inventory.left_out
    texts, again = look(dump(tmp_path / "b.json", [record, record]))
    assert texts == [expected] * 2
    assert again.read == inventory.read


def test_what_the_servers_log_has_only_in_part_is_not_learned(tmp_path: Path) -> None:
    rows = [{"prompt": PAIR[:1], "answer": HELLO_PARTS, "finish_reason": reason} for reason in ("stop", None, "length")]
    rest = {"prompt": PAIR, "answer": HELLO_PARTS, "finish_reason": "stop"}
    texts, inventory = look(dump(tmp_path / "a.jsonl", rows[0], *rows, rest))
    assert texts == [HI] * 2
    said = "\n".join(inventory.lines())
    assert "1 conversation: with an answer that did not come to its end (the client left)" in said
    assert "1 conversation: with an answer that did not come to its end (it was too long)" in said
    assert "1 conversation: with the rest of an answer that the client had begun" in said


@pytest.mark.parametrize(
    ("record", "form"),
    [
        (ONE["sharegpt"][0], "sharegpt"),
        (ONE["alpaca"][0], "alpaca"),
        (ONE["dolly"][0], "dolly"),
        (ONE["gemini"][0], "gemini"),
        (ONE["messages"][0], "messages"),
        (ONE["ultrachat"][0], "ultrachat"),
        (ONE["dpo"][0], "preference"),
        (ONE["chatml"][0], "chatml"),
        (ONE["chatgpt"][0], "chatgpt export"),
        (ONE["claude"][0], "claude export"),
        (ONE["oasst tree"][0], "oasst"),
        (ONE["Question/Answer"][0], "question/answer"),
    ],
)
def test_the_form_is_named_and_counted(record: Any, form: str, tmp_path: Path) -> None:
    _, inventory = look(dump(tmp_path / "a.jsonl", *[record] * 3))
    assert inventory.read == {form: 3}
    assert f"3 {form}" in "\n".join(inventory.lines())


# --- containers -------------------------------------------------------------------------------------------------------

RECORDS = [{"messages": PAIR}, {"messages": [{"role": U, "content": "2+2? ü"}, {"role": A, "content": "4"}]}]
SAME = ["user: Hi\nassistant: «Hello!»", "user: 2+2? ü\nassistant: «4»"]
ROWS = [{"question": "Hi", "answer": "Hello!"}, {"question": "2+2? ü", "answer": "4"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
LAYOUTS = {
    "lines.jsonl": LINES,
    "lines without an end.jsonl": "\n\n" + LINES.strip(),
    "one line.json": json.dumps(RECORDS),
    "pretty.json": json.dumps(RECORDS, indent=2),
    "data.json": json.dumps({"version": 1, "data": RECORDS}),
    "pretty data.json": json.dumps({"tags": ["a"], "data": RECORDS, "n": {"a": []}}, indent=1),
    "list of lists.json": json.dumps([record["messages"] for record in RECORDS]),
    "lists.jsonl": "".join(json.dumps(record["messages"]) + "\n" for record in RECORDS),
    "pretty values.json": "\n".join(json.dumps(record, indent=4) for record in RECORDS),
    "array in lines.json": "[\n" + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]",
    "table.csv": 'question,answer\nHi,Hello!\n"2+2? ü",4\n',
    "excel.csv": "sep=;\nquestion;answer\nHi;Hello!\n2+2? ü;4\n",
    "excel without sep.csv": "\ufeffquestion;answer\r\nHi;Hello!\r\n2+2? ü;4\r\n",
    "table.tsv": "question\tanswer\nHi\tHello!\n2+2? ü\t4\n",
    "table with json.csv": 'messages,id\n"'
    + '",1\n"'.join(json.dumps(r["messages"]).replace('"', '""') for r in RECORDS)
    + '",2\n',
    "rows.csv": "conversation_id,role,content\n1,user,Hi\n1,assistant,Hello!\n2,user,2+2? ü\n2,assistant,4\n",
    "no suffix": LINES,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_and_packing(name: str, tmp_path: Path) -> None:
    data = LAYOUTS[name].encode("utf-8")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(f"folder/{name}", data)
        archive.writestr("__MACOSX/._x", b"\0")
    zstd = pa.BufferOutputStream()
    with pa.CompressedOutputStream(zstd, "zstd") as stream:
        stream.write(data)
    files = {
        name: data,
        f"{name}.gz": gzip.compress(data),
        f"{name}.bz2": bz2.compress(data),
        f"{name}.xz": lzma.compress(data),
        f"{name}.zst": zstd.getvalue().to_pybytes(),
        f"{name}.zip": packed.getvalue(),
    }
    for number, (file, content) in enumerate(files.items()):
        path = tmp_path / str(number) / file
        path.parent.mkdir()
        path.write_bytes(content)
        assert look(path)[0] == SAME, file


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_other_encodings(encoding: str, tmp_path: Path) -> None:
    lines = LINES + json.dumps({"prompt": "Größe?", "completion": "Über zwölf Fuß, schön!"}, ensure_ascii=False) * 3
    (tmp_path / "a.jsonl").write_bytes(lines.replace("}{", "}\n{").encode(encoding))
    assert look(tmp_path / "a.jsonl")[0] == [*SAME, *["user: Größe?\nassistant: «Über zwölf Fuß, schön!»"] * 3]


def test_parquet_and_folders_of_datasets(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    pq.write_table(table, tmp_path / "a.parquet")
    assert look(tmp_path / "a.parquet")[0] == SAME
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset(table)
    saved.save_to_disk(tmp_path / "saved")
    assert look(tmp_path / "saved")[0] == SAME
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "dict")
    texts, inventory = look(tmp_path / "dict")
    assert texts == SAME
    assert [entry.examples for entry in inventory.left_out.values()] == [["test"]]


def test_a_folder_of_many_forms(tmp_path: Path) -> None:
    dump(tmp_path / "a.jsonl", *RECORDS)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.csv").write_text(LAYOUTS["table.csv"], encoding="utf-8")
    dump(tmp_path / "test.jsonl", RECORDS[0])
    (tmp_path / "settings.json").write_text('{"id": 1, "email": "x"}')
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\0")
    texts, inventory = look(tmp_path)
    assert texts == SAME * 2
    assert inventory.read == {"messages": 2, "question/answer": 2}
    assert "test.jsonl" in next(e for reason, e in inventory.left_out.items() if "measuring" in reason).examples
    assert "no known form of a conversation (its keys: id, email)" in inventory.left_out_line()
    assert not inventory.stop


def test_the_export_of_chatgpt_as_it_comes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("conversations.json", json.dumps([ONE["chatgpt"][0]] * 2))
        archive.writestr("user.json", '{"id": "user-1", "email": "x@example.org"}')
        archive.writestr("message_feedback.json", "[]")
        archive.writestr("chat.html", "<html>")
    texts, inventory = look(tmp_path / "export.zip")
    assert texts == [HI] * 2
    assert inventory.read == {"chatgpt export": 2}


SEGMENTS = [{"label": False, "text": "<s>Hi "}, {"label": True, "text": "Hello!</s>"}]
MARKED = [
    {"label": False, "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nBad<|im_end|>\n"},
    {"label": False, "text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
    {"label": True, "text": "Hello!<|im_end|>"},
]


def test_segments_are_learned_where_they_are_labelled(tmp_path: Path) -> None:
    texts, inventory = look(dump(tmp_path / "a.jsonl", {"segments": SEGMENTS}, {"segments": MARKED}))
    assert texts == [HI, "user: Hi\nassistant: [Bad]\nuser: Hi\nassistant: «Hello!»"]
    assert inventory.read == {"segments": 2}


def test_a_text_with_the_header_of_a_table_is_a_table(tmp_path: Path) -> None:
    table = "question\tanswer\n" + "Wie geht’s?\tSchön, danke.\n" * 3
    for encoding in ("utf-8", "utf-16", "utf-8-sig"):
        (tmp_path / "table.txt").write_text(table, encoding=encoding)
        assert look(tmp_path / "table.txt")[0] == ["user: Wie geht’s?\nassistant: «Schön, danke.»"] * 3


def test_slack_has_the_names_of_its_people_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "general").mkdir()
    users = [{"id": "U1", "name": "ann"}, {"id": "U2", "name": "b", "profile": {"real_name": "Bob"}}]
    (tmp_path / "users.json").write_text(json.dumps(users))
    said = [("U1", "Hi <@U2>", "1704100000.0"), ("U2", "Hello <@U9>", "1704100050.0")]
    day = [{"type": "message", "user": who, "text": text, "ts": ts} for who, text, ts in said]
    (tmp_path / "general" / "2024-01-01.json").write_text(json.dumps(day))
    assert look(tmp_path, me="Bob")[0] == ["user: Hi @Bob\nassistant: «Hello @U9»"]


def test_signals_exported_chats_and_archives_in_archives(tmp_path: Path) -> None:
    (tmp_path / "Ann").mkdir()
    (tmp_path / "README.md").write_text("# no chat")
    lines = [f"[2024-01-01, 10:0{i}] {who}: {text}" for i, (who, text) in enumerate([("Ann", "Hi"), ("Me", "Hello!")])]
    (tmp_path / "Ann" / "chat.md").write_text("\n".join(lines))
    assert look(tmp_path, me="Me")[0] == [HI]
    dump(tmp_path / "a.jsonl", *RECORDS)
    for name, inner in (("inner.zip", "a.jsonl"), ("outer.zip", "inner.zip")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / inner, inner)
    assert look(tmp_path / "outer.zip")[0] == SAME


def test_letters_that_were_encoded_twice_are_mended_in_chats(tmp_path: Path) -> None:
    pair = [{"role": U, "content": "Wie schÃ¶n?"}, {"role": A, "content": "Sehr – größer."}]
    texts, inventory = look(dump(tmp_path / "a.jsonl", {"messages": pair}, {"messages": PAIR}))
    assert texts[0] == "user: Wie schön?\nassistant: «Sehr – größer.»"
    assert "1 × a letter that was encoded twice, mended" in inventory.notes
    doubtful = [
        {"role": U, "content": "CafÃ© – schÃ¶n?"},
        {"role": A, "content": "NÃO, größer."},
    ]  # a dash that is right
    texts, inventory = look(dump(tmp_path / "b.jsonl", {"messages": doubtful}, {"messages": PAIR}))
    assert texts[0] == "user: CafÃ© – schÃ¶n?\nassistant: «NÃO, größer.»"
    assert [note for note in inventory.notes if note.startswith("2 × a letter that looks encoded twice")]


def asked(*texts: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turns."""
    return [{"role": (U, A)[i % 2], "content": text} for i, text in enumerate(texts)]


PROGRAMS: dict[str, Any] = {
    "deepseek": {
        "mapping": {
            "root": {"parent": None, "children": ["1"], "message": None},
            "1": {
                "parent": "root",
                "children": ["2"],
                "message": {"fragments": [{"type": "REQUEST", "content": "Hi"}]},
            },
            "2": {
                "parent": "1",
                "children": [],
                "message": {
                    "fragments": [{"type": "THINK", "content": "hm"}, {"type": "RESPONSE", "content": "Hello!"}]
                },
            },
        }
    },
    "grok": {
        "conversations": [
            {
                "conversation": {"id": "x"},
                "responses": [
                    {"response": {"sender": who, "message": text}}
                    for who, text in (("human", "Hi"), ("ASSISTANT", "Hello!"))
                ],
            }
        ]
    },
    "typingmind": {"data": {"chats": [{"id": "1", "messages": asked("Hi", "Hello!")}], "folders": []}},
    "copilot": {
        "responderUsername": "GitHub Copilot",
        "requests": [{"message": {"text": "Hi"}, "response": [{"value": "Hel"}, {"kind": "ref"}, {"value": "lo!"}]}],
    },
    "librechat": {
        "endpoint": "openAI",
        "messages": [
            {"messageId": "1", "parentMessageId": "0", "text": "Hi", "sender": "User", "isCreatedByUser": True},
            {"messageId": "2", "parentMessageId": "1", "text": "No.", "sender": "GPT", "isCreatedByUser": False},
            {"messageId": "3", "parentMessageId": "1", "text": "Hello!", "sender": "GPT", "isCreatedByUser": False},
        ],
    },
    "arena": {"conversation_a": asked("Hi", "No."), "conversation_b": asked("Hi", "Hello!"), "winner": "model_b"},
    "stack": {"question": "Hi", "response_j": "Hello!", "response_k": "No."},
    "selfinstruct": {"instruction": "Hi", "instances": [{"input": "", "output": "Hello!"}]},
    "speakers": {"dialogue": ["Hi", "Hel", "lo!"], "speakers": ["Ann", "Eve", "Eve"]},
    "matrix": {
        "messages": [
            {"type": "m.room.member", "sender": "@ann:m.org", "content": {}, "origin_server_ts": 1},
            *(
                {
                    "type": "m.room.message",
                    "sender": f"@{who}:m.org",
                    "content": {"msgtype": kind, "body": text},
                    "origin_server_ts": 2,
                }
                for who, kind, text in (
                    ("ann", "m.text", "Hi"),
                    ("Bob", "m.text", "Hello!"),
                    ("ann", "m.image", "a.jpg"),
                )
            ),
        ]
    },
    "google": {
        "messages": [
            {"creator": {"name": who}, "created_date": f"Monday, January 1, 2024 at 10:0{i}:00 AM UTC", "text": text}
            for i, (who, text) in enumerate((("Ann", "Hi"), ("Bob", "Hello!")))
        ]
    },
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_exports_of_programs_and_sets_that_wrap_their_turns(name: str, tmp_path: Path) -> None:
    record = PROGRAMS[name]
    (tmp_path / "a.json").write_text(json.dumps([record] if name == "selfinstruct" else record))
    said = ["user: Hi\nassistant: «Hel\nlo!»"] if name == "speakers" else [HI]
    assert [text.replace("\n\n", "\n") for text in look(tmp_path / "a.json", me="Bob")[0]] == said


def test_jan_s_threads_and_mattermosts_posts(tmp_path: Path) -> None:
    rows = [{**m, "content": [{"type": "text", "text": {"value": m["content"]}}]} for m in asked("Hi", "Hello!")]
    assert look(dump(tmp_path / "jan.jsonl", *({**row, "thread_id": "t"} for row in rows)))[0] == [HI]
    posts = [
        {"team": "t", "channel": "c", "user": who, "message": text} for who, text in (("ann", "Hi"), ("Bob", "Hello!"))
    ]
    records = [{"type": "post", "post": {**post, "create_at": i}} for i, post in enumerate(posts)]
    assert look(dump(tmp_path / "mm.jsonl", {"type": "version", "version": 1}, *records), me="Bob")[0] == [HI]


def test_questions_without_answers_ties_and_tags_are_told(tmp_path: Path) -> None:
    turns = {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Shorten it."]}
    with pytest.raises(UnusableInputError, match="questions one after the other, without answers"):
        look(dump(tmp_path / "a.jsonl", turns, turns))
    tie = {"conversation_a": asked("q", "a"), "conversation_b": asked("q", "b"), "winner": "tie"}
    texts, inventory = look(dump(tmp_path / "b.jsonl", tie, *RECORDS))
    assert texts == SAME
    assert "1 × two answers of which neither is said to be the better, left out" in inventory.notes
    html = {"messages": asked("Hi", "<div class=prose><p>Hello <b>you</b></p><ul><li>one</li></ul></div>")}
    (warning,) = look(dump(tmp_path / "c.jsonl", html, html))[1].warnings
    assert warning.startswith("2 of 2 conversations looked at are full of HTML's tags")


def test_linked_folders_of_chats_are_followed_once(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "chats"
    (outside / "deep").mkdir(parents=True)
    folder.mkdir()
    dump(outside / "deep" / "a.jsonl", *RECORDS)
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(outside / "deep")
    (outside / "deep" / "loop").symlink_to(folder)
    (folder / "gone").symlink_to(tmp_path / "nothing")
    texts, inventory = look(folder)
    assert texts == SAME
    assert inventory.left_out["a link to what is read already"].kinds == {"folder": 2}
    assert inventory.left_out["a link to nothing"].examples == ["gone"]


def test_many_are_kept_on_disk_and_equal_ones_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_store, "IN_MEMORY_BYTES", 1000)
    records = [[{"role": U, "content": f"{i % 90}"}, {"role": A, "content": "x" * 40}] for i in range(100)]
    loaded, _ = load_chats(ChatSource(str(dump(tmp_path / "a.jsonl", *records))))
    assert loaded._file._rolled
    assert [c["messages"][0]["content"] for c in loaded] == [f"{i % 90}" for i in range(100)]
    assert loaded[-1] == loaded[99]
    assert len({loaded.digest(i) for i in range(100)}) == 90
    assert "repeated: 10" in "\n".join(look_at_chats(ChatSource(str(tmp_path / "a.jsonl"))).lines())


# --- chats of people --------------------------------------------------------------------------------------------------

WHATSAPP = """01/03/2025, 09:00 - Messages and calls are end-to-end encrypted.
13/03/2025, 10:08 - Ann: are you coming tonight?
13/03/2025, 11:36 - Bob: yes, at eight
and one more line
13/03/2025, 11:37 - Bob: see you
13/03/2025, 12:54 - Ann: <Media omitted>
13/03/2025, 12:55 - Ann: look: a bag
13/03/2025, 12:56 - Bob: nice <This message was edited>
14/03/2025, 10:31 - Bob: good morning
14/03/2025, 10:32 - Ann: hi
14/03/2025, 10:33 - Bob: IMG-20250314-WA0001.jpg (file attached)
14/03/2025, 10:34 - Bob: did you see it?
"""
ANN_AND_BOB = [
    "user: are you coming tonight?\nassistant: «yes, at eight\nand one more line\nsee you»\n"
    "user: look: a bag\nassistant: «nice»",
    "user: hi\nassistant: «did you see it?»",
]


def iphone(text: str) -> str:
    """The same chat as an iPhone exports it, in a country that writes the month first."""
    lines = []
    for line in text.splitlines():
        date, _, rest = line.partition(" - ")
        if not rest:
            lines.append(line)
            continue
        day, month, clock = date[:2], date[3:5], date[12:]
        hour = int(clock[:2])
        clock = f"{(hour - 1) % 12 + 1}:{clock[3:]}:07\u202f{'PM' if hour > 11 else 'AM'}"
        rest = rest.replace("<Media omitted>", "\u200eimage omitted")
        mark = "\u200e" if "\u200e" in rest else ""  # before what the program says, not before what people say
        lines.append(f"{mark}[{int(month)}/{int(day)}/25, {clock}] {rest}")
    return "\n".join(lines)


@pytest.mark.parametrize("text", [WHATSAPP, iphone(WHATSAPP)])
def test_whatsapp(text: str, tmp_path: Path) -> None:
    path = tmp_path / "WhatsApp Chat with Ann.txt"
    path.write_text(text, encoding="utf-8")
    texts, inventory = look(path, me="bob")
    assert texts == ANN_AND_BOB
    assert inventory.read == {"whatsapp": 2}
    assert "3 × a line of the system, or a photo" in "\n".join(inventory.lines())
    for me, complaint in [(None, "CHAT_ME"), ("Bert", "'Bert' has no messages there")]:
        with pytest.raises(UnusableInputError, match=complaint + r".*there are Bob \(\d\), Ann \(\d\)"):
            look(path, me=me)


def entry(day: int, hour: int, who: str, text: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "type": "message",
        "date": f"2025-03-{day}T{hour:02}:00:00",
        "from": who,
        "from_id": "u",
        "text": text,
    }


TELEGRAM = [
    {"id": 0, "type": "service", "date": "2025-03-13T09:00:00", "actor": "Ann", "action": "phone_call", "text": ""},
    entry(13, 10, "Ann", "are you coming tonight?"),
    entry(13, 11, "Bob", ["yes, at ", {"type": "bold", "text": "eight"}, "\nand one more line"]),
    entry(13, 11, "Bob", "see you"),
    {**entry(13, 12, "Ann", ""), "photo": "x.jpg"},
    entry(13, 12, "Ann", "look: a bag"),
    entry(13, 12, "Bob", "nice"),
    entry(14, 10, "Bob", "good morning"),
    entry(14, 10, "Ann", "hi"),
    entry(14, 11, "Bob", "did you see it?"),
]


def test_telegram_and_its_kin(tmp_path: Path) -> None:
    chat = {"name": "Ann", "type": "personal_chat", "id": 1, "messages": TELEGRAM}
    whole = {"about": "x", "chats": {"about": "y", "list": [chat, {**chat, "messages": []}]}}
    for number, value in enumerate((chat, whole)):
        for indent in (None, 1):
            path = tmp_path / f"{number}{indent}.json"
            path.write_text(json.dumps(value, indent=indent), encoding="utf-8")
            texts, inventory = look(path, me="Bob")
            assert texts == ANN_AND_BOB
            assert inventory.read == {"telegram": 2}
    said = [e for e in TELEGRAM if e["type"] == "message" and e["text"]]
    plain = ["".join(p if isinstance(p, str) else p["text"] for p in e["text"]) for e in said]
    discord = [
        {"id": "1", "type": "Default", "timestamp": e["date"] + "+00:00", "content": t, "author": {"name": e["from"]}}
        for e, t in zip(said, plain, strict=True)
    ]
    slack = [
        {"type": "message", "user": e["from"], "text": t, "ts": str(chats_hours(e["date"]) * 3600)}
        for e, t in zip(said, plain, strict=True)
    ]
    messenger = [
        {"sender_name": e["from"], "timestamp_ms": chats_hours(e["date"]) * 3600_000, "content": t, "type": "Generic"}
        for e, t in zip(said, plain, strict=True)
    ]
    exports = {
        "discord": {"guild": {"id": 1}, "messages": discord},
        "slack": slack,
        "messenger": {"participants": [{"name": "Ann"}], "messages": messenger[::-1]},
    }
    for program, value in exports.items():
        path = tmp_path / f"{program}.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        texts, inventory = look(path, me="Bob")
        assert inventory.read == {program: 2}
        assert sorted(texts) == sorted(ANN_AND_BOB), program


def chats_hours(date: str) -> float:
    from nanochat.data.chat_logs import read_entries

    found = read_entries({"date": date, "type": "message", "from": "x", "text": ""})
    assert found is not None
    (entry,) = found[1]
    assert entry.hours is not None
    return entry.hours


def test_in_a_group_the_names_stand_before_what_others_say(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    log = [
        entry(13, 10, "Ann", "hi"),
        entry(13, 10, "Cy", "hello"),
        entry(13, 10, "Cy", "all"),
        entry(13, 10, "Bob", "yo"),
    ]
    path.write_text(json.dumps({"name": "g", "messages": log}))
    assert look(path, me="Bob")[0] == ["user: Ann: hi\nCy: hello\nall\nassistant: «yo»"]


# --- trees ------------------------------------------------------------------------------------------------------------


def test_a_tree_is_read_along_every_branch_and_learned_once(tmp_path: Path) -> None:
    def row(name: str, parent: str | None, role: str, text: str, rank: int | None = None) -> dict[str, Any]:
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en"}

    rows = [
        row("c", "b", "prompter", "why?"),
        row("a", None, "prompter", "Hi"),
        row("b2", "a", A, "Go", 1),
        row("b", "a", A, "Hello!", 0),
        row("d", "c", A, "so", None),
        row("e", "c", A, "because", 0),
    ]
    texts, inventory = look(dump(tmp_path / "a.jsonl", *rows))
    assert texts == [
        "user: Hi\nassistant: «Hello!»\nuser: why?\nassistant: «because»",
        "user: Hi\nassistant: [Hello!]\nuser: why?\nassistant: «so»",
        "user: Hi\nassistant: «Go»",
    ]
    assert inventory.read == {"oasst": 3}


# --- what is left out, and what stops ---------------------------------------------------------------------------------


def test_a_folder_of_texts_is_refused_in_one_short_sentence(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"d{i:02}.txt").write_text(f"a text, number {i}")
    with pytest.raises(
        UnusableInputError, match=r"40 files: no conversations in it; the first: d00\.txt, the text: no known"
    ) as no:
        look(tmp_path)
    assert len(str(no.value)) < 800
    assert "d10.txt" not in str(no.value)


def test_everything_left_out_is_counted_under_its_own_reason(tmp_path: Path) -> None:
    bad = {"messages": PAIR, "label": False}
    nothing = {"messages": PAIR[:1]}
    empty = {"messages": [PAIR[0], {"role": A, "content": ""}]}
    null = {"messages": [{"role": U, "content": None}, PAIR[1]]}
    image = {"messages": [{"role": U, "content": [{"type": "image_url"}]}, PAIR[1]]}
    unweighted = {"messages": [PAIR[0], {**PAIR[1], "weight": 0}]}
    odd = {"messages": PAIR, "tools": [{"name": "w"}], "lang": "en"}
    records = [*RECORDS * 3, bad, {**bad, "label": -1}, nothing, empty, null, image, unweighted, odd]
    texts, inventory = look(dump(tmp_path / "a.jsonl", *records))
    assert len(texts) == 7
    assert {reason: entry.count for reason, entry in inventory.left_out.items()} == {
        chats.MARKED: 3,
        chats.NO_ANSWER: 2,
        chats.NO_PICTURES: 1,
        chats.UNUSABLE: 1,
    }
    said = "\n".join(inventory.lines())
    assert "1 × the key 'tools', which is not used" in said
    assert "lang" not in said
    assert "1 × an empty answer, which is not learned" in said
    assert "line 11: a message of the user without text" in said


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": "a"}\n' * 3, r"a\.jsonl, line 1: no known form of a conversation \(its keys: text\).*CHAT_COLUMNS"),
        ('{"foo": "a", "bar": "b"}\n' * 3, r"line 1: no known form.*its keys: foo, bar"),
        (LINES + '{"a": 1}\n' * 5, r"line 3: no known form.*5 of 7 conversations can't be used"),
        ('{"messages": [\n', r"item 1: not valid JSON.*is the file cut off"),
        ('[{"messages": [{"role": "user", "content": "Hi"', r"line 1: not valid JSON"),
        (json.dumps(RECORDS)[:-30], r"item 2: not valid JSON"),
        ("", "nothing is in it"),
        ("just a text", r"line 1: not valid JSON"),
        ("[" * 100_000, "nested too deeply|not valid JSON"),
        ("1\n2\n3\n", "line 1: expected an object or a list"),
    ],
)
def test_what_cannot_be_used_stops_with_place_keys_and_remedy(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        look(path)
    inventory = look_at_chats(ChatSource(str(path)))
    assert "a.jsonl" in inventory.stop
    assert not Path(tmp_path / "b").exists()


def test_a_large_file_of_something_else_is_given_up_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "TRIED", 5)
    seen = []
    monkeypatch.setattr(chats, "read_row", lambda record: seen.append(record))
    assert "no known form" in look_at_chats(ChatSource(str(dump(tmp_path / "a.jsonl", *[{"x": 1}] * 50)))).stop
    assert len(seen) == 5


def test_two_columns_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("nr,vraagje,weerwoord\n1,Hi,Hello!\n2,2+2? ü,4\n", encoding="utf-8")
    with pytest.raises(UnusableInputError, match="its keys: nr, vraagje, weerwoord"):
        look(path)
    texts, inventory = look(path, columns=("vraagje", "weerwoord"))
    assert texts == SAME
    assert inventory.read == {"vraagje/weerwoord": 2}
    with pytest.raises(UnusableInputError, match="has no 'x' and 'weerwoord'"):
        look(path, columns=("x", "weerwoord"))
    assert ChatSource.from_env("p", {"CHAT_COLUMNS": "a, b", "CHAT_ME": "Bob"}) == ChatSource("p", "Bob", ("a", "b"))
    with pytest.raises(ValueError, match="CHAT_COLUMNS=a: must be two names"):
        ChatSource.from_env("p", {"CHAT_COLUMNS": "a"})


def test_well_formed_lines_come_as_they_are(tmp_path: Path) -> None:
    """What could be read before is the same to the last character."""
    odd = [
        {"role": "system", "content": " s \n"},
        {"role": U, "content": "\n a\u2028b \ud83d"},
        {"role": A, "content": [{"type": "text", "text": " x "}, {"type": "python", "text": "1"}]},
        {"role": U, "content": ""},
        {"role": A, "content": " spaces "},
        {"role": U, "content": "open"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(odd) + "\n" + json.dumps({"messages": PAIR, "x": 1}) + "\n")
    loaded, inventory = load_chats(ChatSource(str(path)))
    assert list(loaded) == [{"messages": odd}, {"messages": PAIR}]
    assert [note for note in inventory.notes if "key" not in note] == [f"1 × {chats.NO_QUESTION}"]


# --- in the pipeline --------------------------------------------------------------------------------------------------


def test_the_pipeline_stops_before_its_first_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dump(tmp_path / "a.jsonl", {"foo": "a", "bar": "b"}, {"foo": "c", "bar": "d"})
    for name, value in {"PROFILE": "tiny", "CHAT_DATA": str(path), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}.items():
        monkeypatch.setenv(name, value)
    for given, complaint in [(path, "line 1: no known form"), (tmp_path / "missing.jsonl", "no such file or folder")]:
        monkeypatch.setenv("CHAT_DATA", str(given))
        with pytest.raises(SystemExit) as stopped:
            run_pipeline(PipelineConfig())
        assert stopped.value.code == 2
        said = capsys.readouterr()
        assert complaint in said.err
        assert "[1/" not in said.out  # no stage has begun
    assert "its keys: foo, bar" in look_at_chats(ChatSource(str(path))).stop


def test_stages_follow_from_the_chats_and_what_was_said_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dump(tmp_path / "a.jsonl", *RECORDS)

    def stages(chat_data: str) -> dict[str, Any]:
        settings = Settings.from_env({"PROFILE": "tiny", "CHAT_DATA": chat_data})
        return {s.name: s for s in make_stages(choose_profile(settings, 0), settings, tmp_path)}

    key = stages(str(path))["chat_sft"].key
    assert stages(str(path))["chat_sft"].key == key
    monkeypatch.setenv("CHAT_ME", "Bob")
    assert stages(str(path))["chat_sft"].key != key
    monkeypatch.delenv("CHAT_ME")
    dump(path, *RECORDS, RECORDS[0])
    assert stages(str(path))["chat_sft"].key != key
    without = stages("none")
    assert not {"mid_train", "chat_sft"} & without.keys()
    assert without["answer"].needs == ("base_train",)
    assert "base" in without["answer"].flags
    assert "--chat_data=hf:a/b" in stages("hf:a/b")["mid_train"].flags


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *args: ["test_sft", "train_sft"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append((args, more)) or RECORDS)
    loaded, inventory = load_chats(ChatSource("hf:owner/name:part"))
    assert [show_learned(c) for c in loaded] == SAME
    assert asked == [(("owner/name", "part"), {"split": "train_sft"})]
    assert inventory.read == {"messages": 2}

    def refuse(*args: Any) -> list[str]:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    assert "hf:owner/name can't be loaded" in look_at_chats(ChatSource("hf:owner/name")).stop


def test_data_check_tells_chats_from_texts(tmp_path: Path) -> None:
    """A chat of people is a text until somebody says whose side is learned; a folder of both is one of texts."""
    folder = tmp_path / "both"
    folder.mkdir()
    (folder / "a.txt").write_text("A story of some length. " * 50)
    dump(folder / "b.jsonl", *RECORDS)
    options = ReadOptions()
    assert data_check.look(str(dump(tmp_path / "c.jsonl", *RECORDS)), options).noun == "conversation"
    assert data_check.look(str(folder), options).noun != "conversation"
    (tmp_path / "WhatsApp Chat.txt").write_text(WHATSAPP)
    assert data_check.look(str(tmp_path / "WhatsApp Chat.txt"), options).noun != "conversation"


# --- what strangers bring ---------------------------------------------------------------------------------------------

ANN_HI, BOB_HI = "2024-01-02T10:00:00", "2024-01-02T10:01:00"
ME_OLD = "2024-01-01T03:00:00"
SAID = "user: Hi\nassistant: «Hello!»"


@pytest.mark.parametrize(
    "lines",
    [
        ["03/02/2024 à 21:03 - Ann: Hi", "03/02/2024 à 21:04 - Bob: Hello!", "03/02/2024 à 21:05 - Ann: <Médias omis>"],
        ["٣/٢/٢٠٢٤، ٩:٠٣ م - Ann: Hi", "٣/٢/٢٠٢٤، ٩:٠٤ م - Bob: Hello!"],
        ["2024/2/3 晚上9:03 - Ann: Hi", "2024/2/3 晚上9:04 - Bob: Hello!", "2024/2/4 上午9:04 - Bob: 此消息已删除"],
        ["2024. 2. 3. 오후 9:03 - Ann: Hi", "2024. 2. 3. 오후 9:04 - Bob: Hello!"],
        [
            "3/2/24, 9:03 p.\u00a0m. - Ann: Hi",
            "3/2/24, 9:04 p.\u00a0m. - Bob: Hello!",
            "3/2/24, 9:05 p.\u00a0m. - Ann: null",
        ],
        ["3.02.2024 21:03 - Ann: Hi", "3.02.2024 21:04 - Ann: Bu mesaj silindi", "3.02.2024 21:04 - Bob: Hello!"],
        ["2024년 1월 1일 오후 3:05, Ann : Hi", "2024년 1월 1일 오후 3:06, Bob : Hello!"],
        ["-- 2024년 1월 1일 월요일 --", "[Ann] [오후 3:05] Hi", "[Bob] [오후 3:06] Hello!", "[Ann] [오후 3:07] 사진"],
        ["[LINE] Chat history", "2024/01/01(Mon)", "10:00\tAnn\tHi", "10:01\tBob\tHello!", "10:02\tAnn\t[Sticker]"],
        ["=" * 62, "Guild: G", "", "[1/13/2024 12:34 PM] Ann", "Hi", "", "[1/13/2024 12:35 PM] Bob (pinned)", "Hello!"],
        ["[1/2/2024 10:15 AM] Ann", "Hi", "", "[1/2/2024 10:16 AM] Bob", "Hello!", "", "{Attachments}", "https://x.y"],
        ["Jan 01, 2024  9:41:05 AM (Read by you)", "Ann", "Hi", "", "Jan 01, 2024  9:42:10 AM", "Bob", "Hello!"],
        ["--- Log opened Mon Jan 01", "10:00 -!- Ann [a@h] has joined", "10:00 < Ann> Hi", "10:01 <@Bob> Hello!"],
        ["[23:59] <Ann> Hi", "[00:01] <Bob> Hello!", "[00:02]  * Ann waves"],
        [
            "2024-01-01 10:00:00\t-->\tAnn has joined",
            "2024-01-01 10:00:05\t+Ann\tHi",
            "2024-99-01 10:01:09\tBob\tHello!",
        ],
        ["10:01:05\t From  Ann : Hi", "10:01:15\t From Bob to Everyone:", "\tHello!"],
    ],
)
def test_chats_of_people_as_every_phone_and_program_writes_them(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert look(tmp_path / "chat.txt", me="Bob")[0] == [SAID]


def test_chats_of_people_in_tables_and_json(tmp_path: Path) -> None:
    rows = [(ANN_HI, "Ann", "Hi"), (BOB_HI, "Bob", "Hello!"), (ME_OLD, "Bob", "alone")]
    forms: dict[str, str] = {
        "discord.csv": "AuthorID,Author,Date,Content\n"
        + "".join(f"1,{who},{when}.0000000Z,{t}\n" for when, who, t in rows),
        "replika.csv": "Timestamp,From,Text,ID\n" + "".join(f"{when},{who},{text},1\n" for when, who, text in rows),
        "signal.json": "".join(json.dumps({"date": d, "sender": w, "body": t}) + "\n" for d, w, t in rows),
        "e2ee.json": json.dumps(
            {"messages": [{"senderName": w, "text": t, "timestamp": chats_hours(d) * 3.6e6} for d, w, t in rows]}
        ),
        "teams.json": json.dumps(
            {
                "conversations": [
                    {
                        "MessageList": [
                            {
                                "originalarrivaltime": d,
                                "messagetype": "RichText",
                                "content": f"<p>{t}</p>",
                                "from": f"8:{w}",
                            }
                            for d, w, t in rows
                        ]
                    }
                ]
            }
        ),
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
        texts, inventory = look(tmp_path / name, me="Bob")
        assert texts == [SAID], name
        assert inventory.left_out["in which nobody else writes"].count == 1
    two = "Date,Author,Channel,Content\n" + "".join(
        f"{when},{who},{channel},{text} {channel}\n" for when, who, text in rows[:2] for channel in "xy"
    )
    (tmp_path / "two.csv").write_text(two)  # chats that went on at the same time
    assert look(tmp_path / "two.csv", me="Bob")[0] == [f"user: Hi {c}\nassistant: «Hello! {c}»" for c in "xy"]


def test_signals_export_of_all_chats(tmp_path: Path) -> None:
    def said(chat: str, who: str, minute: int, text: str) -> dict[str, Any]:
        body = {"standardMessage": {"text": {"body": text}}}
        return {"chatItem": {"chatId": chat, "authorId": who, "dateSent": f"17000000{minute:02}000", **body}}

    people = [{"recipient": {"id": "1", "self": {}}}]
    people += [
        {"recipient": {"id": str(i), "contact": {"profileGivenName": name}}} for i, name in ((2, "Ann"), (3, "Cy"))
    ]
    messages = [said("5", "2", 1, "Hi"), said("6", "3", 2, "Yo"), said("5", "1", 3, "Hello!"), said("6", "1", 4, "Hey")]
    head = [{"version": "1", "backupTimeMs": "1"}, {"account": {"givenName": "Bob"}}, {"chat": {"id": "5"}}]
    path = dump(tmp_path / "main.jsonl", *head, *people, *messages)
    assert look(path, me="Bob")[0] == [SAID, "user: Yo\nassistant: «Hey»"]


TAVERN = [
    {"user_name": "You", "character_name": "Eve", "chat_metadata": {}},
    {"name": "You", "is_user": True, "mes": "Hi"},
    {"name": "System", "is_user": False, "is_system": True, "mes": "[a checkpoint]"},
    {"name": "Eve", "is_user": False, "mes": "Hello!", "swipes": ["Go", "Hello!"], "swipe_id": 1},
]
NODES = {
    "1": {"id": "1", "parentId": None, "role": U, "content": "Hi"},
    "2": {"id": "2", "parentId": "1", "role": A, "content": "Go"},
    "3": {"id": "3", "parentId": "1", "role": A, "content": '<details type="reasoning">secret</details>\nHello!'},
}
STUDIO = {
    "messages": [
        {"versions": [{"role": U, "content": [{"type": "text", "text": "Hi"}]}], "currentlySelected": 0},
        {
            "versions": [
                {"role": A, "content": [{"type": "text", "text": "Go"}]},
                {
                    "role": A,
                    "steps": [
                        {"style": {"type": "thinking"}, "content": [{"type": "text", "text": "secret"}]},
                        {"content": [{"type": "text", "text": "Hello!"}]},
                    ],
                },
            ],
            "currentlySelected": 1,
        },
    ]
}
EXPORTED = {
    "sillytavern": TAVERN,
    "open webui": [{"id": "x", "chat": {"history": {"messages": NODES, "currentId": "3"}, "messages": []}}],
    "lm studio": [STUDIO],
    "text-generation-webui": [{"internal": [["<|BEGIN-VISIBLE-CHAT|>", "Yes?"], ["Hi", "Hello!"]], "visible": []}],
    "character.ai": [
        {
            "histories": {
                "histories": [{"msgs": [{"src": {"is_human": h}, "text": t} for h, t in ((1, "Hi"), (0, "Hello!"))]}]
            }
        }
    ],
    "ai studio": [
        {
            "runSettings": {},
            "chunkedPrompt": {
                "chunks": [
                    {"role": U, "text": "Hi"},
                    {"role": "model", "text": "secret", "isThought": True},
                    {"role": "model", "text": "Hello!"},
                ]
            },
        }
    ],
    "question/answer": [{"title": "Prompted Hi", "safeHtmlItem": [{"html": "<p>Hello!</p>"}]}],  # Takeout of Gemini
    "messages": [{"request": {"messages": PAIR[:1]}, "response": {"choices": [{"message": PAIR[1]}]}}],
    "prompt/response": [{"id": 1, "fields": {"prompt": "Hi", "response": "Hello!"}, "metadata": {}}],  # Argilla
    "dialogue (role, content)": [{"id": 1, "data": {"dialogue": PAIR}, "annotations": []}],  # Label Studio
    "instruction/generation": [{"instruction": "Hi", "generation": "Hello!"}],  # distilabel
    "harmony": [
        {
            "text": "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>secret<|end|>"
            "<|start|>assistant<|channel|>final<|message|>Hello!<|return|>"
        }
    ],
}


@pytest.mark.parametrize("form", EXPORTED)
def test_what_programs_and_tools_export(form: str, tmp_path: Path) -> None:
    texts, inventory = look(dump(tmp_path / "a.json", *EXPORTED[form]))
    assert texts == [HI]
    assert inventory.read == {form: 1}


def test_several_conversations_in_one_record(tmp_path: Path) -> None:
    intents = {"intents": [{"tag": "x", "patterns": ["Hi", "Hey"], "responses": ["Hello!", "Yes?"]}]}
    assert look(dump(tmp_path / "a.json", intents))[0] == [HI, "user: Hey\nassistant: «Yes?»"]
    asked = [{"question": q, "answers": a} for q, a in (("Who?", [{"text": "Ann"}]), ("Why?", []))]
    squad = {"version": "2", "data": [{"title": "T", "paragraphs": [{"context": "Ann did it.", "qas": asked}]}]}
    texts, inventory = look(dump(tmp_path / "b.json", squad))
    assert texts == ["user: Ann did it.\n\nWho?\nassistant: «Ann»"]
    assert inventory.left_out[chats.NO_ANSWER].count == 1


WRITTEN = {
    "a.yaml": "- messages:\n  - {role: user, content: Hi}\n  - {role: assistant, content: Hello!}\n" * 2,
    "chatterbot.yml": "categories: [x]\nconversations:\n- - Hi\n  - Hello!\n- - Hi\n  - Hello!\n",
    "comments.json": '// my\n[{"q": "Hi", "a": "Hello!"}, // 1\n /* 2 */ {"question": "Hi", "answer": "Hello!"},\n]\n',
    "cut.jsonl": '{"question": "Hi", "answer": "Hello!"},\n{"question": "Hi", "answer": "Hello!"},\n',
    "glued.json": '{"question": "Hi", "answer": "Hello!"}{"question": "Hi", "answer": "Hello!"}',
    "python.jsonl": "{'question': 'Hi', 'answer': 'Hello!', 'id': None}\n" * 2,
    "capitals.jsonl": '{"Messages": [{"Role": "User", "Content": "Hi"}, {"Role": "Assistant", "Content": "Hello!"}]}\n'
    * 2,
    "faq.txt": "Q: Hi\nA: Hello!\n\nQ: Hi\nA: Hello!\n",
    "rules.txt": "User: Hi\nBot: Hello!\n\n---\n\nUser: Hi\nBot: Hello!\n",
    "headings.md": "## User\n\nHi\n\n## Assistant\n\nHello!\n\n---\n\n**You:** Hi\n\n**ChatGPT:** Hello!\n",
    "copied.txt": "You said:\nHi\nChatGPT said:\nHello!\n***\n用户：Hi\n助手：Hello!\n",
    "greek.csv": "Ερώτηση;Απάντηση\nHi;Hello!\nHi;Hello!\n",
    "turkish.csv": "Soru,Cevap\nHi,Hello!\nHi,Hello!\n",
    "vietnamese.tsv": "Câu hỏi\tCâu trả lời\nHi\tHello!\nHi\tHello!\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_people_write_by_hand(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(WRITTEN[name], encoding="utf-8")
    assert look(tmp_path / name)[0] == [HI, HI]


def test_toml_where_python_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[[conversations]]\nuser = "Hi"\nassistant = "Hello!"\n' * 2)
    if sys.version_info >= (3, 11):
        assert look(tmp_path / "a.toml")[0] == [HI, HI]
    else:
        assert "save it as JSON" in look_at_chats(ChatSource(str(tmp_path / "a.toml"))).stop


def test_a_table_without_a_header_by_number(tmp_path: Path) -> None:
    (tmp_path / "anki.txt").write_text("#separator:tab\nHi\tHello!\nHi\tHello!\n")
    (tmp_path / "a.csv").write_text("Hello!,Hi\nHello!,Hi\n")
    assert look(tmp_path / "anki.txt", columns=("1", "2"))[0] == [HI, HI]
    assert look(tmp_path / "a.csv", columns=("2", "1"))[0] == [HI, HI]
    assert "CHAT_COLUMNS=1,2 in a table without a header" in look_at_chats(ChatSource(str(tmp_path / "a.csv"))).stop


def test_what_a_model_can_not_learn_is_left_out_or_said(tmp_path: Path) -> None:
    image = {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]}
    thought = {"messages": [PAIR[0], {"role": A, "content": "<think>x</think>Hello!"}]}
    ended = {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "response": "Hello!<|im_end|>"}
    tags = {"question": "What does <video> do?", "answer": "It plays."}
    played = {**tags, "videos": ["a.mp4"]}
    assert look(dump(tmp_path / "b.jsonl", tags, played))[0] == ["user: What does <video> do?\nassistant: «It plays.»"]
    texts, inventory = look(dump(tmp_path / "a.jsonl", image, thought, ended, {"messages": PAIR}))
    assert texts == ["user: Hi\nassistant: «<think>x</think>Hello!»", HI, HI]
    assert inventory.left_out[chats.NO_PICTURES].count == 1
    assert "1 × an answer with <think> in it, learned as it is" in inventory.notes
    path = tmp_path / "table.csv"
    names = [f"c{i}" for i in range(98)]
    path.write_text(",".join(["question", *names, "answer"]) + "\n" + ",".join(["Hi", *["x"] * 98, "Hello!"]) + "\n")
    assert look(path)[1].notes == ["98 keys are not used: 'c0', 'c1', 'c2', 'c3', 'c4' and 93 more"]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "Which?", "choices": ["x", "y"], "answer": 1},
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "B"},
        {"question": "Which?", "A": "x", "B": "y", "answer": "B"},
        {"question": "Which?\nA. x\nB. y", "options": {"A": "x", "B": "y"}, "answer": "B"},
    ],
)
def test_the_options_of_a_question_are_read(record: dict[str, Any], tmp_path: Path) -> None:
    assert look(dump(tmp_path / "a.jsonl", record))[0] == ["user: Which?\nA. x\nB. y\nassistant: «B. y»"]


def test_what_programs_say_in_the_name_of_people_is_not_learned(tmp_path: Path) -> None:
    texts = ["Hi", "Ann sent an attachment.", "Liked a message", "Hello!", "Bob sent a photo.", "I just sent a photo."]
    rows = [
        {"sender_name": ("Ann Lee", "Bob")[i > 2], "timestamp_ms": 1_700_000_000_000 + i * 1000, "content": t}
        for i, t in enumerate(texts)
    ]
    path = tmp_path / "message_1.json"
    path.write_text(json.dumps({"participants": [], "messages": rows[::-1]}))
    assert look(path, me="Bob")[0] == ["user: Hi\nassistant: «Hello!\nI just sent a photo.»"]


def test_slack_as_an_archive_and_pages_of_telegram(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("users.json", json.dumps([{"id": "U2", "name": "b", "profile": {"real_name": "Bob"}}]))
        day = [
            {"type": "message", "user": f"U{i}", "text": t, "ts": f"170000000{i}"}
            for i, t in ((1, "Hi"), (2, "Hello!"))
        ]
        archive.writestr("general/2024-01-01.json", json.dumps(day))
    assert look(tmp_path / "export.zip", me="Bob")[0] == [HI]
    (tmp_path / "messages.html").write_text("<html>")
    assert "export the chat as JSON" in look_at_chats(ChatSource(str(tmp_path / "messages.html"))).stop


def test_data_check_says_what_is_wrong_with_chats(tmp_path: Path) -> None:
    path = dump(tmp_path / "a.jsonl", *[{"messages": [PAIR[0], {"role": A, "content": ""}]}] * 2)
    assert "2 conversations: without an answer to learn" in data_check.look(str(path), ReadOptions()).stop


def test_messages_row_by_row_and_files_that_are_no_files(tmp_path: Path) -> None:
    rows = [{"role": "system", "content": "Be brief"}, *PAIR] * 2
    assert look(dump(tmp_path / "a.jsonl", *rows))[0] == [SYS + HI] * 2
    (tmp_path / "a.csv").write_text("role,content\nuser,Hi\nassistant,Hello!\n")
    assert look(tmp_path / "a.csv")[0] == [HI]
    (tmp_path / "a.txt").write_bytes(b"PK\x03\x04" + bytes(90))
    assert "save it as JSON or CSV" in look_at_chats(ChatSource(str(tmp_path / "a.txt"))).stop
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnusableInputError, match="no ordinary file"):
        look(tmp_path / "pipe")
    assert "no ordinary file" in look(tmp_path)[1].left_out_line()


def test_exports_that_break_their_own_rules_are_told_by_place(tmp_path: Path) -> None:
    broken = [
        {"mapping": {"a": {"message": {"author": "x"}}}, "current_node": "a"},
        {"chat_messages": ["x"]},
        {"messages": [{"versions": [7]}]},
        {"intents": [{"patterns": 3}]},
        {"turns": [{"author": {}, "candidates": 4}]},
        {"request": {"messages": 1}, "response": {}},
    ]
    chat = {"chat": PAIR}  # a line with this key alone is no line of Signal's export
    texts, inventory = look(dump(tmp_path / "a.jsonl", *broken, *[chat] * 7))
    assert texts == [HI] * 7
    assert inventory.left_out[chats.UNUSABLE].count == len(broken)
    assert "line 1: malformed (AttributeError" in inventory.left_out_line() + "".join(
        inventory.left_out[chats.UNUSABLE].examples
    )


# --- nothing of an answer is changed or lost unsaid -------------------------------------------------------------------

ASKED = [{"role": U, "content": "Hi"}]
ARC = {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answer": "1"}
QUIZ = {"question": "Which?", "choices": [f"option {i}" for i in range(12)], "answer": 11}
PROMPT = "User: Hi\nAssistant:"
KEPT: dict[str, tuple[Any, str]] = {
    "labels of options": (ARC, "user: Which?\n1. x\n2. y\nassistant: «1. x»"),
    "options in another order": (
        {"question": "Which?", "options": {"B": "y", "A": "x"}, "answer": "B"},
        "user: Which?\nA. x\nB. y\nassistant: «B. y»",
    ),
    "capital Q and A": ({"Q": "Hi", "A": "Hello!"}, HI),
    "HTML in an answer": (
        {"prompt": PROMPT, "completion": "Use <s>old</s> new text."},
        "user: Hi\nassistant: «Use <s>old</s> new text.»",
    ),
    "HTML in a text": (
        {"text": "User: Hi\nAssistant: Use new text, <s>old</s>"},
        "user: Hi\nassistant: «Use new text, <s>old</s>»",
    ),
    "HTML and a mark at the end": (
        {"prompt": "[INST] Hi [/INST]", "completion": "Hello! <s>old</s></s>"},
        "user: Hi\nassistant: «Hello! <s>old</s>»",
    ),
    "another template's mark": (
        {"prompt": PROMPT, "completion": "It ends with <|im_end|> there."},
        "user: Hi\nassistant: «It ends with <|im_end|> there.»",
    ),
    "beside a wrapper": ({"system": "Be brief", "data": {"question": "Hi", "answer": "Hello!"}}, SYS + HI),
    "beside a wrapper with an empty one": (
        {"system": "Be brief", "answer": "Go", "data": {"question": "Hi", "answer": "Hello!", "system": ""}},
        SYS + HI,
    ),
    "two writings of a key": (
        {"Messages": [{"Role": "user", "Content": "Hi", "content": ""}, {"Role": A, "Content": "Hello!"}]},
        HI,
    ),
    "open webui's system": (
        {"history": {"messages": NODES, "currentId": "3"}, "params": {"system": "Be brief"}},
        SYS + HI,
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_stands_in_a_record_is_what_is_learned(name: str, tmp_path: Path) -> None:
    record, expected = KEPT[name]
    assert look(dump(tmp_path / "a.jsonl", record))[0] == [expected]


def test_twelve_options_are_all_read(tmp_path: Path) -> None:
    (text,), _ = look(dump(tmp_path / "a.jsonl", QUIZ))
    assert "\nL. option 11\nassistant: «L. option 11»" in text
    many = {**QUIZ, "choices": [f"option {i}" for i in range(27)], "answer": "none"}
    assert "1 × the key 'choices', which is not used" in look(dump(tmp_path / "a.jsonl", many))[1].notes


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.yaml", "- {question: Hi, input: null, answer: no}\n", "no"),
        ("a.yaml", "- {question: Hi, answer: 12:30}\n", "12:30"),
        ("a.yaml", "- {question: Hi, answer: 01234}\n", "01234"),
        ("a.md", "## User\n\nHi\n\n## Assistant\n\nOne\n\n---\n\nTwo\n\n---\n", "One\n\n---\n\nTwo"),
        ("a.txt", "You said:\nHi\nDeepSeek said:\nHello!\n", "Hello!"),
        ("a.json", '[{"question": "Hi", "answer": "Hello!"}] // end', "Hello!"),
    ],
)
def test_what_is_written_stays_as_it_is_written(name: str, content: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert look(tmp_path / name)[0] == [f"user: Hi\nassistant: «{expected}»"]


def test_a_comment_across_two_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "BLOCK", 7)
    text = '[\n{"a": 1}, // one, two, three\n/* four, five */ {"a": 2}\n] // the end'
    assert [value for _, value in json_stream.json_records(io.StringIO(text), lambda _: False)] == [{"a": 1}, {"a": 2}]


def test_only_settings_of_anki_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("#separator:tab\n#html:true\n#1 what\tone\nHi\tHello!\na\tb\tc\n")
    texts, inventory = look(path, columns=("1", "2"))
    assert texts == ["user: #1 what\nassistant: «one»", HI]
    assert "line 5: 3 fields" in inventory.left_out_line()


def test_quotation_marks_and_rules_of_people_stay(tmp_path: Path) -> None:
    line = ["2024/01/01(Mon)", "10:00\tAnn\tHi", '10:01\tBob\tSay "yes"', '10:02\tAnn\t"one', 'two"', "10:03\tBob\tOk"]
    (tmp_path / "line.txt").write_text("\n".join(line) + "\n")
    assert look(tmp_path / "line.txt", me="Bob")[0] == [
        'user: Hi\nassistant: «Say "yes"»\nuser: one\ntwo\nassistant: «Ok»'
    ]
    rule = "=" * 40
    times = ["[1/13/2024 12:34 PM] Ann", "Hi", "", "[1/13/2024 12:35 PM] Bob", f"Above\n{rule}\nbelow", ""]
    last = ["[1/13/2024 12:36 PM] Bob", "Bye", "", "", rule, "Exported 3 message(s)", rule]
    (tmp_path / "discord.txt").write_text("\n".join([*times, *last]) + "\n")
    assert look(tmp_path / "discord.txt", me="Bob")[0] == [f"user: Hi\nassistant: «Above\n{rule}\nbelow\nBye»"]


def test_rows_with_an_id_stay_together_and_rows_without_are_said(tmp_path: Path) -> None:
    rows = [*PAIR, {"role": "system", "content": "Be brief"}, *PAIR]
    with_id = [{"conversation_id": 7, **row} for row in rows]
    assert len(look(dump(tmp_path / "a.jsonl", *with_id))[0]) == 1
    texts, inventory = look(dump(tmp_path / "b.jsonl", *rows))
    assert texts == [HI, SYS + HI]
    assert f"5 × {chats.WITHOUT_ID}" in inventory.notes


def test_what_is_left_out_of_exports_is_counted(tmp_path: Path) -> None:
    def notes(*records: Any) -> str:
        return "\n".join(look(dump(tmp_path / "a.json", *records))[1].notes)

    thought, other = f"1 × {THOUGHT_LEFT_OUT}", f"1 × {OTHER_ANSWER}"
    for form in ("open webui", "lm studio", "ai studio", "harmony"):
        assert thought in notes(*EXPORTED[form]), form
    assert thought in notes(ONE["chatgpt"][0])
    for form in ("open webui", "lm studio", "sillytavern"):
        assert other in notes(*EXPORTED[form]), form
    assert other in notes(ONE["chatgpt"][0])
    choices = [{"message": PAIR[1]}, {"message": {"role": A, "content": "Go"}}]
    assert other in notes({"request": {"messages": ASKED}, "response": {"choices": choices}})
    assert other in notes({"intents": [{"patterns": ["Hi"], "responses": ["Hello!", "Go"]}]})
    assert "the key 'turn_2', which is not used" in notes({"question": "Hi", "answer": "Hello!", "turn_2": "And?"})
    people = [{"sender_name": "AB"[i], "timestamp_ms": i, "content": text} for i, text in enumerate(("Hi", "Hello!"))]
    two = dump(tmp_path / "b.jsonl", {"messages": [*people, {"odd": 1}]}, {"messages": people})
    assert f"1 × {chats.UNREADABLE}" in look(two, me="B")[1].notes


def test_a_written_text_is_looked_at_like_a_record(tmp_path: Path) -> None:
    pictures = "User: <image> What is it?\nBot: A cat."
    (tmp_path / "a.txt").write_text(f"My chats\nUser: Hi\nBot: <think>x</think>Hello!\n---\n{pictures}\n")
    texts, inventory = look(tmp_path / "a.txt")
    assert texts == ["user: Hi\nassistant: «<think>x</think>Hello!»"]
    assert inventory.left_out[chats.NO_PICTURES].count == 1
    assert "1 × an answer with <think> in it, learned as it is" in inventory.notes
    assert f"1 × {BEFORE_TURNS}" in inventory.notes


# --- what looks like something else -----------------------------------------------------------------------------------


ANSWERED = {"instruction": "Hi", "output": "Hello!"}
NOT_OF_A_LOG: dict[str, tuple[dict[str, Any], str]] = {
    "a list as the type": ({"type": ["math"], **ANSWERED}, HI),
    "a user's line": ({"type": "user", "user": "Hi", "bot": "Hello!"}, HI),
    "who made a conversation": ({"creator": {"name": "x"}, "created_date": "2024-01-01", "messages": PAIR}, HI),
    "a definition": ({"question": "Hi", "answer": "Hello!", "definition": "It is Hello"}, HI),
    "the definition of a task": ({"definition": ["Be brief"], "input": "Hi", "output": ["Hello!"]}, SYS + HI),
    "a row of a task": ({"definition": "Be brief", "inputs": "Hi", "targets": "Hello!"}, SYS + HI),
    "another row of a task": ({"definition": "Be brief", "input": "Hi", "output": "Hello!"}, SYS + HI),
    "a system prompt": ({"system_prompt": "Be brief", "definition": ["a word"], **ANSWERED}, SYS + HI),
    "a whole task": (
        {
            "Definition": ["Be brief"],
            "Categories": ["x"],
            "Instances": [{"id": "1", "input": "Hi", "output": ["Hello!"]}],
        },
        SYS + HI,
    ),
    "who takes part": ({"speakers": ["Ann", "Bob"], "dialogue": ["Hi", "Hello!", "2+2?", "4"]}, TWO),
    "no speakers": ({"speakers": [], "dialogue": ["Hi", "Hello!"]}, HI),
    "turns with a number": ({"question_id": 1, "turns": ["Hi", "Hello!"]}, HI),
}


@pytest.mark.parametrize("name", NOT_OF_A_LOG)
def test_a_key_of_another_form_does_not_take_a_record_away(name: str, tmp_path: Path) -> None:
    record, expected = NOT_OF_A_LOG[name]
    assert look(dump(tmp_path / "a.jsonl", *[record] * 3))[0] == [expected] * 3


def test_odd_messages_in_a_list_and_in_depth_end_with_a_sentence(tmp_path: Path) -> None:
    odd = [{**PAIR[0], "type": ["x"]}, PAIR[1]]
    (tmp_path / "a.json").write_text(json.dumps(odd))
    assert look(tmp_path / "a.json")[0] == [HI]
    (tmp_path / "b.json").write_text(
        json.dumps([{**PAIR[0], "ts": 1, "type": "message", "user_profile": "x"}, PAIR[1]])
    )
    assert look(tmp_path / "b.json")[0] == [HI]
    for depth in (400, 440, 480, 5000):  # how deep Python goes differs by version
        (tmp_path / "c.json").write_text('{"chats": [' * depth + json.dumps({"messages": PAIR}) + "]}" * depth)
        inventory = look_at_chats(ChatSource(str(tmp_path / "c.json")))
        assert inventory.num_read or "RecursionError" in inventory.stop or "nested too deeply" in inventory.stop


def test_a_channel_of_people_and_mattermosts_threads(tmp_path: Path) -> None:
    rows = [
        {"type": "channel", "channel": "general", "sender": who, "text": text, "date": f"2024-01-01T10:0{i}:00"}
        for i, (who, text) in enumerate((("Ann", "Hi"), ("Bob", "Hello!")))
    ]
    assert look(dump(tmp_path / "a.jsonl", *rows), me="Bob")[0] == [HI]
    reply = {"user": "Bob", "message": "Hello!", "create_at": 2}
    post = {"user": "ann", "message": "Hi", "create_at": 1, "replies": [reply, "x"]}
    head = {"type": "version", "version": 1, "info": {"generator": "mattermost"}}
    channel = {"type": "post", "post": {"team": "t", "channel": "c", **post}}
    direct = {"type": "direct_post", "direct_post": {"channel_members": ["ann", "Bob"], **post}}
    assert look(dump(tmp_path / "b.jsonl", head, channel, direct), me="Bob")[0] == [HI, HI]


def test_edits_replies_and_servers_of_matrix(tmp_path: Path) -> None:
    def said(i: int, who: str, text: str, **more: Any) -> dict[str, Any]:
        content = {"msgtype": "m.text", "body": text, **more}
        row = {"type": "m.room.message", "sender": who, "content": content}
        return {**row, "event_id": f"${i}", "origin_server_ts": i}

    edit = {"m.relates_to": {"rel_type": "m.replace", "event_id": "$2"}}
    new = {"m.new_content": {"msgtype": "m.text", "body": "Hello!"}}
    reply = {"m.relates_to": {"m.in_reply_to": {"event_id": "$1"}}}
    rows = [
        said(1, "@ann:a", "Hi"),
        said(2, "@bob:a", "Helo"),
        said(3, "@bob:a", "* Hello!", **edit, **new),
        said(4, "@ann:a", "> <@bob:a> Hello!\n> you\n\n2+2?", **reply),
        said(5, "@bob:a", "4"),
    ]
    (tmp_path / "a.json").write_text(json.dumps({"messages": rows}))
    assert look(tmp_path / "a.json", me="bob")[0] == [TWO]
    odd = [said(1, "@ann:a", "Hi", **{"m.relates_to": "$0"}), said(2, "@bob:a", "Hello!")]
    assert look(dump(tmp_path / "c.jsonl", *odd), me="bob")[0] == [HI]
    two = [said(1, "@bob:b", "Hi"), said(2, "@bob:a", "Hello!")]
    assert look(dump(tmp_path / "b.jsonl", *two), me="bob:a")[0] == [HI]


def test_the_branch_that_was_kept_and_what_stands_beside_it(tmp_path: Path) -> None:
    def notes(record: Any) -> str:
        (tmp_path / "a.json").write_text(json.dumps(record))
        texts, inventory = look(tmp_path / "a.json")
        assert texts == [HI]
        return "\n".join(inventory.notes)

    thought, other, file, tool = (f"1 × {what}" for what in (THOUGHT_LEFT_OUT, OTHER_ANSWER, FILE_LEFT_OUT, TO_TOOL))
    answers = [{"value": "Hel"}, {"kind": "thinking", "value": "secret"}, {"value": "lo!"}, {"kind": "textEditGroup"}]
    asked = {"message": "Hi", "response": [*answers, {"kind": "toolInvocationSerialized"}]}
    found = notes({"responderUsername": "GitHub Copilot", "requests": [asked]})
    assert all(what in found for what in (thought, file, tool))
    linked = {"kind": "inlineReference", "inlineReference": {"path": "/src/a.py", "scheme": "file"}}
    path = dump(tmp_path / "b.json", {"responderUsername": "x", "requests": [{**asked, "response": [linked]}]})
    assert look(path)[0] == ["user: Hi\nassistant: «`a.py`»"]
    rows = (("1", "human", "Hi", None), ("2", "ASSISTANT", "Old", "1"), ("3", "ASSISTANT", "Hello!", "1"))
    said = [{"_id": i, "sender": who, "message": text, "parent_response_id": up} for i, who, text, up in rows]
    assert other in notes({"conversation": {"id": "x"}, "responses": [{"response": one} for one in said]})
    seek = json.loads(json.dumps(PROGRAMS["deepseek"]))
    old = {"fragments": [{"type": "RESPONSE", "content": "Old"}]}
    seek["mapping"] = {"old": {"parent": "1", "children": [], "message": old}, **seek["mapping"]}
    seek["mapping"]["1"]["message"]["files"] = [{"name": "a.pdf"}]
    found = notes(seek)
    assert other in found
    assert file in found
    ids = {"messageId": "2", "parentMessageId": "1", "isCreatedByUser": False, "sender": "GPT-4", "createdAt": ANN_HI}
    parts = [{"type": "think", "think": "secret"}, {"type": "text", "text": "Hello!"}]
    first = {**ids, "messageId": "1", "parentMessageId": "0", "isCreatedByUser": True, "sender": "User", "text": "Hi"}
    for answer in ({**ids, "content": parts}, {**ids, "text": "", "content": parts}):
        assert thought in notes({"messages": [first, answer]})
    notes({"messages": [first, {**ids, "content": "Hello!"}]})
    rows = (("1", "system", "Be brief", None), ("2", "human", "Hi", "1"), ("3", "grok-3", "Hello!", "2"))
    said = [{"_id": i, "sender": who, "message": text, "parent_response_id": up} for i, who, text, up in rows]
    path = dump(tmp_path / "c.json", {"conversation": {"id": "x"}, "responses": [{"response": one} for one in said]})
    assert look(path)[0] == [SYS + HI]


@pytest.mark.parametrize(
    ("lines", "answer"),
    [
        (["[2024-01-01 10:00:00] <Ann> Hi", "[2024-01-01 10:01:00] <Bob> Hello!"], "Hello!"),
        (
            ["10:01:05\t From  Ann : Hi", "10:01:15\t From Bob to Everyone:", "\tx:", "\t    12:30 y", "\t---", "\tz"],
            "x:\n    12:30 y\n---\nz",
        ),
        (["[10:00] <Ann> Hi", "[10:01] <Bob> Hello!", "[10:02] carl (~c@host) joined #chan."], "Hello!"),
        (["10:00:00 From Ann to All: Hi", f"10:01:00 From Bob to {'Ann Smith (Company), ' * 9}Eva: Hello!"], "Hello!"),
        (["10:00 <Ann> Hi", "10:01 <Bob> Hello!", "12:30 is when we meet", "10:02 -!- Cy [c@h] has joined"], None),
        (["10:00 <Ann> Hi", "10:01 <Bob> Hello!", "--- Day changed Tue Jan 02 2024", "20:00 <Bob> Yo"], "Hello!"),
    ],
)
def test_lines_of_a_message_and_days_of_a_log_with_clocks(lines: list[str], answer: str | None, tmp_path: Path) -> None:
    (tmp_path / "chat.txt").write_text("\n".join(lines) + "\n")
    expected = answer or "Hello!\n12:30 is when we meet"
    assert look(tmp_path / "chat.txt", me="Bob")[0] == [f"user: Hi\nassistant: «{expected}»"]


def test_a_line_that_is_almost_one_of_zoom_costs_no_time() -> None:
    begun = time.process_time()
    for filler in ("a to ", " "):
        assert chat_people.read_log("10:00 From " + filler * 20_000) is None
    assert time.process_time() - begun < 2


def test_files_that_stand_in_the_way_of_chats_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.md").write_text("User: Hi\nBot: Hello!\n")
    (folder / "a.txt").symlink_to("a.md")
    (folder / "b.jsonl.part").write_text("{")
    before = fingerprint(folder)
    (folder / "a.md").write_text("User: Hi\nBot: Hello!\n\n")
    assert fingerprint(folder) != before
    texts, inventory = look(folder)
    assert texts == [HI]
    assert inventory.left_out[CONVERT[".part"]].examples == ["b.jsonl.part"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("c.jsonl", "c.jsonl~"):
            archive.writestr(name, json.dumps({"messages": PAIR}))
    texts, inventory = look(tmp_path / "a.zip")
    assert texts == [HI]
    assert inventory.left_out["an editor's copy of a file"].examples == ["c.jsonl~"]


def test_a_first_column_without_a_name_is_an_index(tmp_path: Path) -> None:
    told = ["a.csv: the first column has no name: taken for an index, not learned"]
    same = ["user: q\nassistant: «a»", "user: r\nassistant: «b»"]
    for mark in ",;\t":
        rows = (["", "question", "answer", ""], ["0", "q", "a", ""], ["1", "r", "b", ""])  # as pandas' to_csv writes it
        (tmp_path / "a.csv").write_text("".join(f"{mark.join(row)}\n" for row in rows))
        texts, inventory = look(tmp_path / "a.csv")
        assert (texts, inventory.notes) == (same, [f"{tmp_path}/{told[0]}"])
    rows = ('"","role","content"', '"1","user","Hi"', '"2","assistant","Hello!"')  # R's write.csv
    (tmp_path / "a.csv").write_text("\n".join(rows))
    assert look(tmp_path / "a.csv")[0] == [HI]


def test_tables_that_pandas_wrote_as_json(tmp_path: Path) -> None:
    split = {"columns": ["answer", "question"], "index": [0, 1], "data": [["a", "q"], ["b", "r"]]}
    columns = {"question": {"0": "q", "1": "r"}, "answer": {"0": "a", "1": "b"}}
    index = {"0": {"question": "q", "answer": "a"}, "1": {"question": "r", "answer": "b"}}
    late = {"data": split["data"], "meta": [{"name": "answer"}, {"name": "question"}]}
    rows = [["answer", "question"], ["a", "q"], ["b", "r"]]
    lists = {"question": ["q", "r"], "answer": ["a", "b"]}  # as Dataset.to_dict writes it
    deep = {"status": "ok", "result": {"page": 1, "found": list(index.values())}}
    for table in (split, columns, index, late, rows, lists, deep, {"headers": rows[0], "rows": rows[1:]}):
        (tmp_path / "a.json").write_text(json.dumps(table))
        texts, inventory = look(tmp_path / "a.json")
        assert (texts, inventory.notes) == (["user: q\nassistant: «a»", "user: r\nassistant: «b»"], [])
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(lists)}\n" * 2)  # a conversation a line, turn by turn
    assert look(tmp_path / "a.jsonl")[0] == ["user: q\nassistant: «a»\nuser: r\nassistant: «b»"] * 2


def test_marks_and_keys_that_may_change_the_meaning(tmp_path: Path) -> None:
    for mark in ("weight", "train", "trainable", "loss", "learn", "label"):
        messages = [*asked("q", "a"), *asked("r", "b")]
        messages[1][mark] = False
        texts, _ = look(dump(tmp_path / "a.jsonl", {"messages": messages}))
        assert texts == ["user: q\nassistant: [a]\nuser: r\nassistant: «b»"]
    for key in ("quality", "split", "is_impossible", "rating", "score", "deleted"):
        notes = look(dump(tmp_path / "a.jsonl", {"question": "q", "answer": "a", key: "low"}))[1].notes
        assert notes == [f"1 × the key {key!r}, which is not used"]
    columns = {"role": ["user", "assistant"], "content": ["Hi", "Hello!"]}
    assert look(dump(tmp_path / "a.jsonl", {"messages": columns}))[0] == [HI]
    solved = {"problem": "q", "solution": "3 + 4 = 7", "answer": "7"}  # how, and not only what comes of it
    for more in ({}, {"answer": "3 + 4 = 7", "solution": "B"}, {"answer": "3 + 4 = 7", "solution": ""}):
        assert look(dump(tmp_path / "a.jsonl", solved | more))[0] == ["user: q\nassistant: «3 + 4 = 7»"]
    odd = look(dump(tmp_path / "a.jsonl", {"messages": [asked("q", "a")[0], {**asked("q", "a")[1], "loss": 0.5}]}))
    assert odd[1].notes == ["1 × a weight other than 0 and 1, taken for 1"]


def test_a_file_that_is_one_conversation_stays_one(tmp_path: Path) -> None:
    turns = [{"prompt": "q", "response": "a"}, {"prompt": "r", "response": "b"}]
    for key in ("turns", "history", "chat", "thread"):
        for whole in ({"system": "S", key: turns}, {key: turns}):
            (tmp_path / "a.json").write_text(json.dumps(whole))
            texts, _ = look(tmp_path / "a.json")
            said = "system: S\n" if "system" in whole else ""
            assert texts == [f"{said}user: q\nassistant: «a»\nuser: r\nassistant: «b»"], whole
    (tmp_path / "a.json").write_text(json.dumps({"data": {"question": ["q", "r"], "answer": ["a", "b"]}}))
    assert look(tmp_path / "a.json")[0] == ["user: q\nassistant: «a»", "user: r\nassistant: «b»"]
    (tmp_path / "a.json").write_text(json.dumps({"system": "S", "set": {"items": turns}}))
    with pytest.raises(UnusableInputError):  # the system message is for all of them, and would be lost
        look(tmp_path / "a.json")


def test_a_split_for_judging_is_named(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(9)]
    (tmp_path / "a.json").write_text(json.dumps({"test": rows[:3], "train": rows}))
    texts, inventory = look(tmp_path / "a.json")
    assert len(texts) == 9
    assert inventory.notes == [f"{tmp_path / 'a.json'}: 3 records under 'test', not read"]
    assert not inventory.left_out
    (tmp_path / "a.json").write_text(json.dumps({"data": rows[:1], "test": rows[:1], "dev": [], "eval": [0.1]}))
    assert len(look(tmp_path / "a.json")[0]) == 1  # no reason to stop


def test_tables_of_messages_and_rows_of_another_length(tmp_path: Path) -> None:
    turns = {"role": {"0": U, "1": A}, "content": {"0": "Hi", "1": "Hello!"}}
    (tmp_path / "a.json").write_text(json.dumps(turns))
    texts, inventory = look(tmp_path / "a.json")
    assert (texts, inventory.read) == ([HI], {"rows of messages": 1})
    columns = {"columns": ["answer", "question"]}
    data = {"data": [["a", "q"], ["b", "r"], ["c", "s", "t"]]}
    for table in (json.dumps({**columns, **data}), json.dumps({**data, **columns}), json.dumps([{**data, **columns}])):
        (tmp_path / "a.json").write_text(table)
        texts, inventory = look(tmp_path / "a.json")
        assert texts == ["user: q\nassistant: «a»", "user: r\nassistant: «b»"]
        assert "3 values, but the table has 2 columns" in inventory.left_out[chats.UNUSABLE].examples[0]
    about = {"question": "q", "answer": "a", "header": ["x", "y"], "rows": [["1", "2"]]}
    assert look(dump(tmp_path / "a.jsonl", about, about))[0] == ["user: q\nassistant: «a»"] * 2


def test_conversations_by_their_names_and_links_in_archives(tmp_path: Path) -> None:
    for named in ({"one": PAIR, "two": PAIR}, {"one": {"messages": PAIR}, "two": {"messages": PAIR, "id": 2}}):
        (tmp_path / "a.json").write_text(json.dumps(named))
        assert look(tmp_path / "a.json")[0] == [HI, HI]
    link = tarfile.TarInfo("b.json")
    link.type, link.linkname = tarfile.LNKTYPE, "a.json"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.json", "a.json")
        tar.addfile(link)
    texts, inventory = look(tmp_path / "a.tar")
    assert texts == [HI, HI]
    assert inventory.left_out[LINK_INSIDE].examples == ["b.json"]


def test_several_documents_of_yaml_and_utterances(tmp_path: Path) -> None:
    said = "messages:\n- {role: user, content: Hi}\n- {role: assistant, content: Hello!}\n"
    (tmp_path / "a.yaml").write_text(f"{said}---\n{said}")
    assert look(tmp_path / "a.yaml")[0] == [HI, HI]
    (tmp_path / "a.yaml").write_text(
        "- {question: q, answer: a}\n- {question: r, answer: b}\n---\n- {question: s, answer: c}\n---\n"
    )
    texts, inventory = look(tmp_path / "a.yaml")
    assert (len(texts), inventory.left_out) == (3, {})
    turns = [
        {"index": i, "speaker": who, "text": text}
        for i, (who, text) in enumerate((("USER", "Hi"), ("ASSISTANT", "Hello!")))
    ]
    assert look(dump(tmp_path / "b.jsonl", *[{"dialog_acts": "x", "utterances": turns}] * 2))[0] == [HI, HI]


def test_of_two_sides_without_known_names_none_is_learned(tmp_path: Path) -> None:
    sides = {"accepted": PAIR, "rejected": [PAIR[0], {"role": A, "content": "Go away."}]}
    texts, inventory = look(dump(tmp_path / "a.jsonl", sides, {"messages": PAIR}, {"messages": PAIR}))
    assert texts == [HI, HI]
    assert inventory.left_out[chats.UNUSABLE].count == 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "image", "source": {"type": "base64", "data": "x"}},
        {"inlineData": {"mimeType": "image/png", "data": "x"}},
        {"image": "x.png"},
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]},
    ],
)
def test_conversations_with_parts_that_are_no_text_are_left_out(tmp_path: Path, part: dict[str, Any]) -> None:
    text = {"type": "text", "text": "Hi", "image_url": None}
    records = [{"messages": [{"role": U, "content": content}, PAIR[1]]} for content in ([text], [text, part])]
    texts, inventory = look(dump(tmp_path / "a.jsonl", *records))
    assert texts == [HI]
    assert {reason: entry.count for reason, entry in inventory.left_out.items()} == {chats.NO_PICTURES: 1}


def test_empty_questions_are_counted(tmp_path: Path) -> None:
    texts, inventory = look(dump(tmp_path / "a.jsonl", {"question": " ", "answer": "a"}, {"messages": PAIR}))
    assert texts == ["user: \nassistant: «a»", HI]
    assert inventory.notes == [f"1 × {chats.NO_QUESTION}"]


def test_names_in_capitals_and_empty_ones(tmp_path: Path) -> None:
    records = [{"Question": "", "question": "q", "Answer": "a"}, {"": 0, "Prompt": "r", "chosen": "b", "rejected": "c"}]
    texts, inventory = look(dump(tmp_path / "b.jsonl", *records))
    assert texts == ["user: q\nassistant: «a»", "user: r\nassistant: «b»"]
    assert inventory.notes == [f"1 × {PREFERENCE}", "1 × the key '', which is not used"]


def test_an_attempt_that_fails_leaves_no_notes(tmp_path: Path) -> None:
    odd = [{"question": "q", "answer": ["a", "b"]}, {"other": 1}]
    robot = {"messages": [{"role": "robot", "content": "Hi", "mood": 1}], "weather": "fine"}
    good = [{"messages": PAIR}] * 4
    texts, inventory = look(dump(tmp_path / "a.jsonl", {"data": odd}, odd, robot, *good))
    assert (texts, inventory.notes) == ([HI] * 4, [])
    assert inventory.left_out[chats.UNUSABLE].count == 3


def test_folders_of_tools_in_archives_and_links_to_what_is_kept_apart(tmp_path: Path) -> None:
    dump(tmp_path / "val.jsonl", {"messages": PAIR})
    (tmp_path / "a.jsonl").symlink_to("val.jsonl")
    texts, inventory = look(tmp_path)
    assert texts == [HI]
    assert inventory.left_out[chat_files.KEPT_BACK_REASON].examples == ["val.jsonl"]
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        for name in ("c.jsonl", "node_modules/d.jsonl", "__pycache__/e.jsonl", "#f.jsonl#", ".g.jsonl"):
            archive.write(tmp_path / "val.jsonl", name)
    texts, inventory = look(tmp_path / "b.zip")
    assert texts == [HI]
    assert {reason: entry.count for reason, entry in inventory.left_out.items()} == {
        "of a tool, no texts": 2,
        "an editor's copy of a file": 1,
        "hidden": 1,
    }
