"""Cached tokens are the tokens: the same batches, the same state, and never those of another tokenizer or shard."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from local_hub import write_shard

from nanochat.config import run_script
from nanochat.data import corpus as corpus_module
from nanochat.data.corpus import open_corpus
from nanochat.data.token_cache import TokenCache
from nanochat.dataloader import Mode, PretrainLoader
from nanochat.tokenizer import RustBPETokenizer
from scripts import tok_cache

BYTES = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)])
TEXTS = [[f"text {i}" * (i % 5) for i in range(40)], [], [None, "x" * 300], ["é", ""]]


class NoEncoder(TokenCache):
    """Fails where something is not cached."""

    def get(self, chunk, row, num_rows):
        found = super().get(chunk, row, num_rows)
        assert found is not None
        return found


@pytest.mark.parametrize("mode", ["stream", "bestfit"])
def test_batches_and_state_are_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    monkeypatch.setattr(corpus_module, "BLOCK_ROWS", 7)
    for name in "ab":
        write_shard(tmp_path / f"{name}.parquet", TEXTS)
    corpus = open_corpus(tmp_path)
    cache = NoEncoder(BYTES, tmp_path / "cache")
    cache.build(corpus)
    plain, cached = (PretrainLoader(corpus, BYTES, 2, 16, mode=mode, cache=c) for c in (None, cache))
    for _ in range(40):
        assert plain.state_dict() == cached.state_dict()
        for expected, got in zip(next(plain), next(cached), strict=True):
            assert torch.equal(expected, got)
    assert plain.epoch > 0
    going_on = PretrainLoader(corpus, BYTES, 2, 16, mode=mode, state=cached.state_dict())
    assert torch.equal(next(going_on)[0], next(plain)[0])


def test_another_tokenizer_or_shard_is_not_found(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(path, [["one", "two"]])
    corpus = open_corpus(path)
    tokens = TokenCache(BYTES, tmp_path / "cache").build(corpus)
    assert tokens == 6
    chunk = corpus.train[0]
    assert TokenCache(BYTES, tmp_path / "cache").get(chunk, 0, 1) is not None
    other = RustBPETokenizer.from_ranks([*(bytes([i]) for i in range(256)), b"on"])
    assert TokenCache(other, tmp_path / "cache").get(chunk, 0, 1) is None
    write_shard(path, [["two", "one"]])
    os.utime(path, ns=(1, 1))
    assert TokenCache(BYTES, tmp_path / "cache").get(chunk, 0, 1) is None


def test_empty_shards_and_large_vocabularies(tmp_path: Path) -> None:
    large = RustBPETokenizer.from_ranks([bytes([i]) for i in range(256)] + [b"%05d" % i for i in range(65530 - 256)])
    write_shard(tmp_path / "a.parquet", [["00001"]])
    write_shard(tmp_path / "b.parquet", [["", None]])
    corpus = open_corpus(tmp_path)
    cache = TokenCache(large, tmp_path / "cache")
    assert cache.build(corpus) == 5
    ids, offsets = cache.get(corpus.train[0], 0, 1) or (None, None)
    assert (ids.tolist(), offsets.tolist(), ids.dtype) == ([*b"00001"], [0, 5], np.uint32)
    ids, offsets = cache.get(corpus.val[0], 0, 2) or (None, None)
    assert (ids.tolist(), offsets.tolist()) == ([], [0, 0, 0])


def test_command_builds_once(tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BYTES.save(base_dir / "tokenizer")
    write_shard(tmp_path / "shard_00000.parquet", [["one", "two"]])
    run_script(tok_cache.main, tok_cache.Config, [f"--data_dir={tmp_path}"])
    assert "6 tokens" in capsys.readouterr().out
    ids = next((base_dir / "token_cache").rglob("ids.bin"))
    time = ids.stat().st_mtime_ns
    run_script(tok_cache.main, tok_cache.Config, [f"--data_dir={tmp_path}"])
    assert ids.stat().st_mtime_ns == time
    assert ids.read_bytes() == b"".join(bytes([b, 0]) for b in b"onetwo")
