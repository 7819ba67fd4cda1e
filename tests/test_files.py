"""Files appear whole or not at all."""

import pytest

from nanochat.files import atomic_folder, atomic_path, sha256_file, write_json, write_text


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail():
        with atomic_path(target) as tmp:
            tmp.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "step"
    for content in ("one", "two"):
        with atomic_folder(target) as tmp:
            (tmp / content).write_text(content)
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["step"]


def test_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "step"
    with atomic_folder(target) as tmp:
        (tmp / "good").write_text("good")

    def fail():
        with atomic_folder(target) as tmp:
            (tmp / "bad").write_text("bad")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (target / "good").exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_hash_is_sha256(tmp_path):
    write_json(tmp_path / "x.json", {"ü": 1})
    write_text(tmp_path / "empty", "")
    assert sha256_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
