"""The GGUF file: what is in it, what is refused, and the same tokens as ours in llama.cpp itself."""

import json
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from portable_model import CALCULATION, TEXT, odd_histories, portable_model, portable_tokenizer, scripted_model

from dev.check_runtimes import LlamaCpp, answer_with_tools, missing_llama, node_folder
from nanochat.checkpoint.format import checkpoint_folder
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.config import run_script
from nanochat.engine import Engine
from nanochat.env import get_base_dir
from nanochat.interop.gguf_file import GGUFCard, check_exact, modelfile, tokenizer_fields, write_gguf
from nanochat.interop.hf_tokenizer import PLAIN_TEMPLATE
from nanochat.interop.qwen3 import fold
from nanochat.messages import normalise
from nanochat.tokenizer import TOKENIZER_FOLDER, RustBPETokenizer
from scripts import export_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")


@pytest.fixture(scope="module")
def tokenizer():
    return portable_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return portable_model(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


def written(folder, model, tokenizer, kind="f32", source="sft"):
    """The path of an exported file."""
    path = folder / f"{kind}-{source}.gguf"
    write_gguf(path, *fold(model), tokenizer, GGUFCard.of("tiny", model, source, "mit"), kind)
    return path


def save(model, tokenizer, source="sft"):
    """Put a model where scripts find it."""
    tokenizer.save(get_base_dir() / TOKENIZER_FOLDER)
    meta = {"complete": True, "model_config": model.config.to_dict(), "tokenizer_hash": tokenizer.hash}
    save_checkpoint(checkpoint_folder(source, "tiny"), 7, model.state_dict(), None, {**meta, "dtype": "float32"})


def field(reader, name):
    """The value of a key."""
    return reader.get_field(name).contents()


class TestFile:
    """What can be said without a runtime."""

    def test_facts(self, folder, model, tokenizer):
        reader = gguf.GGUFReader(written(folder, model, tokenizer))
        expected = {
            "general.architecture": "qwen3",
            "general.name": "tiny",
            "general.license": "mit",
            "qwen3.context_length": 128,
            "tokenizer.ggml.pre": "qwen35",
            "tokenizer.chat_template": PLAIN_TEMPLATE,
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.bos_token_id": tokenizer.get_bos_token_id(),
            "tokenizer.ggml.eos_token_id": tokenizer.encode_special("<|assistant_end|>"),
        }
        assert {name: field(reader, name) for name in expected} == expected
        types = field(reader, "tokenizer.ggml.token_type")
        assert [i for i, kind in enumerate(types) if kind == 3] == sorted(
            tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()
        )

    def test_a_base_model_gets_no_chat_template(self, folder, model, tokenizer):
        reader = gguf.GGUFReader(written(folder, model, tokenizer, source="base"))
        assert reader.get_field("tokenizer.chat_template") is None
        assert field(reader, "tokenizer.ggml.add_bos_token") is True
        assert "{{ .Prompt }}" in modelfile("x.gguf", GGUFCard.of("x", model, "base", "mit"), 128)

    def test_the_sampling_that_sft_recorded_is_passed_on(self, model):
        for recorded, lines in (
            (None, ("temperature 0.6", "top_k 50")),
            ({"temperature": 0.2, "top_k": 20}, ("temperature 0.2", "top_k 20")),
            ({"temperature": 0.0}, ("temperature 0.0", "top_k 50")),
        ):
            text = modelfile("x.gguf", GGUFCard.of("x", model, "sft", "mit", recorded), 128)
            assert all(f"PARAMETER {line}\n" in text for line in lines)

    @pytest.mark.parametrize(("kind", "worst"), [("f32", 0.0), ("bf16", 2**-8), ("q8_0", 2**-6), ("q4_0", 2**-2)])
    def test_weights_are_stored_as_told(self, folder, model, tokenizer, kind, worst):
        reader = gguf.GGUFReader(written(folder, model, tokenizer, kind))
        _, state = fold(model)
        assert len(reader.tensors) == len(state)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        for ours, theirs in {"mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q"}.items():
            expected = state[f"model.layers.1.{ours}.weight"].numpy()
            tensor = stored[f"blk.1.{theirs}.weight"]
            found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.abs(found - expected).max() <= worst * np.abs(expected).max()
        assert stored["blk.0.attn_norm.weight"].tensor_type.name == "F32"
        assert stored["output.weight"].tensor_type.name == {"q4_0": "Q8_0"}.get(kind, kind.upper())

    def test_bytes_that_two_ids_have_are_named_once(self):
        ranks = [bytes([i]) for i in range(256)] + [b"ab", b"bc", b"abc", b"abc"]
        fields = tokenizer_fields(RustBPETokenizer.from_ranks(ranks, portable_tokenizer(265).pattern))
        assert fields.tokens[258:260] == ["[unused 258]", "abc"]
        assert fields.types[258:260] == [5, 1]
        assert len(set(fields.tokens)) == len(fields.tokens)


class TestCommand:
    """python -m scripts.export_gguf."""

    def run(self, *arguments):
        run_script(export_gguf.main, export_gguf.Config, list(arguments))

    def refused(self, capsys, *arguments):
        with pytest.raises(SystemExit) as stopped:
            self.run(*arguments)
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert len(said.strip().splitlines()) == 1
        return said

    def test_writes_the_file_and_a_modelfile(self, tmp_path, model, tokenizer, capsys):
        save(model, tokenizer)
        self.run("-o", str(tmp_path / "mine.gguf"), "--type=q8_0", "--name=My model", "--license=apache-2.0")
        reader = gguf.GGUFReader(tmp_path / "mine.gguf")
        assert field(reader, "general.name") == "My model"
        recipe = (tmp_path / "mine.Modelfile").read_text(encoding="utf-8")
        assert recipe.startswith("FROM ./mine.gguf\n")
        for line in ('PARAMETER stop "<|assistant_end|>"', "PARAMETER temperature 0.6", "PARAMETER num_ctx 128"):
            assert line in recipe
        said = capsys.readouterr().out
        assert "llama-server -m" in said
        assert "ollama create" in said
        assert "not run" in said
        self.run("-o", str(tmp_path / "mine.gguf"))  # an export may be replaced
        assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.Modelfile", "mine.gguf"]

    def test_replaces_nothing_else(self, tmp_path, model, tokenizer, capsys):
        save(model, tokenizer)
        (tmp_path / "notes.gguf").write_text("mine")
        assert "is no GGUF file" in self.refused(capsys, "-o", str(tmp_path / "notes.gguf"))
        (tmp_path / "folder.gguf").mkdir()
        assert "is a folder" in self.refused(capsys, "-o", str(tmp_path / "folder.gguf"))
        assert "must end in .gguf" in self.refused(capsys, "-o", str(tmp_path / "model"))
        assert (tmp_path / "notes.gguf").read_text() == "mine"

    def test_says_how_to_get_gguf(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "gguf", None)  # before it looks for a model
        assert "pip install gguf" in self.refused(capsys, "-o", str(tmp_path / "a.gguf"))
        monkeypatch.setitem(sys.modules, "gguf", types.SimpleNamespace(GGUFWriter=object))
        assert "pip install --upgrade gguf" in self.refused(capsys, "-o", str(tmp_path / "a.gguf"))

    def test_says_what_programs_cannot_compute(self, tmp_path, tokenizer, capsys):
        save(portable_model(tokenizer, logit_softcap=15.0), tokenizer)
        assert "softcap" in self.refused(capsys, "-o", str(tmp_path / "a.gguf"))
        self.run("-o", str(tmp_path / "a.gguf"), "--approximate")
        assert "softcap" in capsys.readouterr().out
        save(portable_model(tokenizer, smear=True), tokenizer)
        assert "smear=True" in self.refused(capsys, "-o", str(tmp_path / "b.gguf"), "--approximate")
        assert not (tmp_path / "b.gguf").exists()

    def test_says_when_numbers_are_read_otherwise(self, model):
        classic = RustBPETokenizer.train_from_iterator(iter(TEXT), 400)
        with pytest.raises(ValueError, match="two digits"):
            check_exact(model, classic, False)
        assert tokenizer_fields(classic, nearest=True).pre == "bailingmoe"
        ranks = [bytes([i]) for i in range(256)]
        other = RustBPETokenizer(r"\s+|\S+", ranks, {"<|bos|>": 256}, encoder="tiktoken")
        with pytest.raises(ValueError, match="no runtime knows the pattern"):
            tokenizer_fields(other, nearest=True)


@pytest.fixture(scope="module")
def llama():
    """llama.cpp, with a float32 cache."""
    if reason := missing_llama():
        pytest.skip(reason)
    with LlamaCpp(128) as runtime:
        yield runtime


# With the template engine of node-llama-cpp and others, @huggingface/jinja.
RENDER = """
import { readFileSync } from "node:fs";
const { Template } = await import(process.argv[1]);
const { template, every } = JSON.parse(readFileSync(0, "utf8"));
const more = { bos_token: "<|bos|>", add_generation_prompt: true };
const render = (messages) => new Template(template).render({ messages, ...more });
process.stdout.write(JSON.stringify(every.map(render)));
"""


def texts(rng, count):
    """Strings of many scripts, of code, of what tokenizers trip over."""
    words = [word for text in TEXT for word in text.split(" ")]
    odd = [
        "\u0301",
        "\u200d",
        "\ufeff",
        "👩‍👩‍👧",
        "ﬁ",
        "İ",
        "ſ",
        "٣",
        "Ⅷ",
        "½",
        "\u3000",
        "\xa0",
        "\r",
        "\n\n",
        "\t",
        "'S",
        "''ll",
    ]
    odd += [
        "<|bos|>",
        "<|assistant_end|>",
        "ก็",
        "ন্দ",
        "한국어",
        "한",
        "ǅ",
        "a\u0308",
        "\x00",
        "\x1c",
        "\u2028",
        "😀",
        "𝒳",
        "1234567",
    ]
    return [
        "".join(rng.choice([rng.choice(words), rng.choice(odd), " "]) for _ in range(rng.randrange(1, 24)))
        for _ in range(count)
    ]


def conversations(rng, count):
    """With and without a system message, with several turns and with the calculator's parts."""
    made = []
    for text in texts(rng, count):
        first, *rest = text.split(" ") * 2
        call = [
            {"type": "text", "text": first},
            {"type": "python", "text": "6*7"},
            {"type": "python_output", "text": "42"},
        ]
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": rng.choice([" ".join(rest), call])},
        ]
        turns = turns * rng.randrange(3) + turns[:1]
        made.append([{"role": "system", "content": first}] * rng.randrange(2) + turns)
    return made


def render(template, every):
    """Node's end of rendering these lists of messages with llama.cpp's kind of template: what it wrote and said."""
    jinja = (node_folder() / "node_modules/@huggingface/jinja/dist/index.js").as_uri()
    run = ["node", "--input-type=module", "-e", RENDER, jinja]
    given = json.dumps({"template": template, "every": every})
    return subprocess.run(run, input=given, capture_output=True, text=True, check=False)


class TestLlamaCpp:
    """The same in llama.cpp: the npm package node-llama-cpp."""

    def test_tokens(self, llama, folder, model, tokenizer):
        every = [t for t in texts(random.Random(1), 400) if "\x00" not in t]  # C strings end there
        found = llama("tokenize", written(folder, model, tokenizer), texts=every, special=False)
        assert found == [tokenizer.encode(text) for text in every]

    def test_conversations(self, llama, folder, model, tokenizer):
        every = conversations(random.Random(2), 200)
        path = written(folder, model, tokenizer)
        rendered = json.loads(render(llama("template", path), every).stdout)
        # A special token that is written in a text is one to llama.cpp, and characters to us: not compared.
        plain = [i for i, messages in enumerate(every) if "<|" not in json.dumps(messages)]
        found = llama("tokenize", path, texts=[rendered[i] for i in plain], special=True)
        ours = [tokenizer.render_for_completion({"messages": messages}) for messages in every]
        assert rendered == [tokenizer.decode(ids) for ids in ours]
        assert len(plain) > 100
        assert found == [ours[i] for i in plain]

    def test_histories_with_tools(self, llama, tokenizer):
        user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
        every = [history for history in odd_histories(user, answer) if history[-1]["role"] == "user"]
        ours = [tokenizer.render_for_completion({"messages": normalise(history)[0]}) for history in every]
        assert json.loads(render(PLAIN_TEMPLATE, every).stdout) == [tokenizer.decode(ids) for ids in ours]
        for wrong in odd_histories(user, answer)[:3]:  # one result more than there are calls
            assert "must follow its call" in render(PLAIN_TEMPLATE, [[*wrong[:4], wrong[3], answer]]).stderr

    def test_logits_and_greedy_tokens(self, llama, folder, model, tokenizer):
        rng = random.Random(3)
        prompts = [[rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(1, 60))] for _ in range(50)]
        ours, _ = Engine(model, tokenizer).generate_prompts(prompts, max_tokens=8, keep_end=True)
        stops = [tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()]
        path = written(folder, model, tokenizer)
        for prompt, answer in zip(prompts, ours, strict=True):
            found = torch.tensor(llama("probabilities", path, tokens=prompt), dtype=torch.float64).log()
            with torch.no_grad():
                expected = model(torch.tensor([prompt]))[0, -1].double().log_softmax(-1)
            assert (found - expected).abs().max() < 1e-3
            assert llama.generate(path)(prompt, 8, stops) == answer[len(prompt) :]

    @pytest.mark.parametrize(("kind", "worst"), [("bf16", 0.05), ("q8_0", 0.1), ("q4_0", 1.0)])
    def test_smaller_types_are_near(self, llama, folder, model, tokenizer, kind, worst):
        prompt = tokenizer.encode(TEXT[0])
        found = torch.tensor(llama("probabilities", written(folder, model, tokenizer, kind), tokens=prompt)).log()
        with torch.no_grad():
            assert (found - model(torch.tensor([prompt]))[0, -1].log_softmax(-1)).abs().max() < worst

    def test_a_loop_around_it_runs_the_calculator(self, llama, tmp_path, tokenizer):
        script = scripted_model(tokenizer, *CALCULATION)
        prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "6*7?"}]})
        ours, _ = Engine(script, tokenizer).generate_prompts([prompt], keep_end=True)
        found = answer_with_tools(llama.generate(written(tmp_path, script, tokenizer)), tokenizer, prompt, 60)
        assert found == ours[0][len(prompt) :]
        assert "<|output_start|>42<|output_end|>" in tokenizer.decode(found)
