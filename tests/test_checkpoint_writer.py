"""Checkpoints are written whole or not at all, in the background, every rank its part; the right ones are kept."""

import errno
import random
import shutil
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanochat import checkpoint_manager as cm
from nanochat.checkpoint import writer as cw
from nanochat.checkpoint.keep import Keep
from nanochat.files import sha256_file


def snapshot(step, value=0.0, val=None, complete=False, **ranks):
    meta = {"complete": complete, "state": {"val": val}}
    optimizer = None if complete else {"w.exp_avg": torch.ones(1000), "rng.torch": torch.get_rng_state()}
    return cw.Snapshot(step, {"w": torch.full((1000,), value)}, optimizer, meta, **ranks)


def write(folder, step, keep=Keep(), **kind):  # noqa: B008
    cw.write_snapshot(folder, snapshot(step, step, **kind), keep)


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_the_last_the_best_and_every_kth_stay(tmp_path):
    for step, val in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.6), (50, 2.7), (60, 2.8)):
        write(tmp_path, step, Keep(last=2, every=30), val=val)
    assert cm.saved_steps(tmp_path) == [20, 30, 50, 60]
    write(tmp_path, 70, Keep(last=2, every=30), val=2.9, complete=True)
    assert cm.saved_steps(tmp_path) == [20, 30, 60, 70]


def test_a_finished_run_whose_last_is_best_keeps_only_that(tmp_path):
    for step, val in ((1, 3.0), (2, 2.5)):
        write(tmp_path, step, val=val)
    write(tmp_path, 3, val=2.0, complete=True)
    assert cm.saved_steps(tmp_path) == [3]


@pytest.mark.parametrize("record", [{"val_goal": "highest"}, {"pass@1": 0.5}])
def test_of_shares_of_problems_solved_the_highest_is_the_best(tmp_path, record):
    for step, val in ((60, 0.10), (120, 0.55), (180, 0.30), (240, 0.20), (300, 0.25)):
        meta = {"complete": False, "state": {"val": val}, **record}
        cw.write_snapshot(tmp_path, cw.Snapshot(step, {"w": torch.zeros(1)}, {"o": torch.zeros(1)}, meta), Keep(2))
    assert cm.saved_steps(tmp_path) == [120, 240, 300]


def test_a_value_that_is_no_number_is_never_the_best(tmp_path):
    for step, val in ((1, float("nan")), (2, 2.0), (3, float("-inf")), (4, 3.0), (5, 3.0)):
        write(tmp_path, step, Keep(last=1), val=val)
    assert cm.saved_steps(tmp_path) == [2, 5]


def test_nothing_is_dropped_while_records_cannot_be_read(tmp_path, monkeypatch):
    for step, val in ((1, 1.0), (2, 2.0), (3, 3.0)):
        write(tmp_path, step, Keep(None), val=val)

    def no_files(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr("nanochat.checkpoint.keep.read_meta", no_files)
    write(tmp_path, 4, Keep(1), val=4.0)
    assert cm.saved_steps(tmp_path) == [1, 2, 3, 4]


def test_an_error_of_the_system_is_not_taken_for_damage(tmp_path, monkeypatch, capsys):
    write(tmp_path, 1)
    write(tmp_path, 2)

    def no_permission(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(cm, "load_file", no_permission)
    with pytest.raises(PermissionError):
        cm.load_checkpoint(tmp_path)
    assert "damaged" not in capsys.readouterr().out


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 5, complete=True)
    assert cm.load_checkpoint(tmp_path).meta["complete"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]


# --- failing disks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def torn_writes(monkeypatch):
    """Let every file end with an error after so many bytes."""

    def tear(number, limit):
        import builtins

        real = open

        def torn_open(path, mode="r", *args, **kwargs):
            file = real(path, mode, *args, **kwargs)
            if "w" not in mode:
                return file
            write = file.write

            class Torn:
                def __getattr__(self, name):
                    return getattr(file, name)

                def __enter__(self):
                    return self

                def __exit__(self, *error):
                    file.close()

                def write(self, data):
                    done = write(data[: max(0, limit - file.tell())])
                    if done < len(data):
                        raise OSError(number, "torn")
                    return done

            return Torn()

        monkeypatch.setattr(builtins, "open", torn_open)

    return tear


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_torn_write_leaves_the_older_checkpoint_and_no_litter(tmp_path, torn_writes, monkeypatch, number):
    write(tmp_path, 1)
    before = sorted(tmp_path.rglob("*"))
    size = (tmp_path / "step_000001" / "optim_rank0.safetensors").stat().st_size
    for limit in (0, 1, *random.Random(number).sample(range(2, size), 4), size - 1):
        with monkeypatch.context():
            torn_writes(number, limit)
            with pytest.raises(OSError, match="torn"):
                write(tmp_path, 2)
        monkeypatch.undo()
        assert sorted(tmp_path.rglob("*")) == before
        assert cm.load_checkpoint(tmp_path, with_optimizer=True).meta["step"] == 1


def test_a_full_disk_is_seen_before_and_old_ones_make_room(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    needed = 5 << 20

    def usage(free):
        return lambda path: type("Usage", (), {"free": free(len(cm.saved_steps(tmp_path)))})()

    monkeypatch.setattr(shutil, "disk_usage", usage(lambda count: needed if count < 2 else 0))
    write(tmp_path, 3)
    assert cm.saved_steps(tmp_path) == [2, 3]
    monkeypatch.setattr(shutil, "disk_usage", usage(lambda count: 100))
    with pytest.raises(RuntimeError, match="step 4 needs"):
        write(tmp_path, 4)
    assert cm.saved_steps(tmp_path)[-1] == 3  # the newest always stays


def test_a_vanished_folder_is_made_again(tmp_path):
    write(tmp_path / "a" / "d1", 1)
    shutil.rmtree(tmp_path / "a")
    write(tmp_path / "a" / "d1", 2)
    assert cm.saved_steps(tmp_path / "a" / "d1") == [2]


def test_what_a_kill_left_is_cleaned_or_put_back(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "step_000005").rename(tmp_path / ".step_000005.3.old")  # killed between two renames
    (tmp_path / ".step_000006.4.tmp").mkdir()
    (tmp_path / ".step_000001.dropped").mkdir()
    cw.clean_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]
    assert cm.load_checkpoint(tmp_path).meta["step"] == 5


# --- several ranks ---------------------------------------------------------------------------------------------------


def part(rank, step=7):
    optimizer = {"w.exp_avg": torch.full((5,), float(rank)), "rng.torch": torch.tensor([rank])}
    if rank == 0:
        optimizer["w.step"] = torch.tensor(3.0)
    return cw.Snapshot(step, {"w": torch.ones(10)}, optimizer, {"complete": False}, rank, 2, attempt=1)


def test_the_parts_of_all_ranks_become_one_state(tmp_path, monkeypatch):
    other = threading.Timer(0.2, cw.write_snapshot, (tmp_path, part(1), Keep()))
    other.start()
    cw.write_snapshot(tmp_path, part(0), Keep())
    other.join()
    for rank in (0, 1, 2):  # a run with more ranks reads it too
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "3")
        state = cm.load_checkpoint(tmp_path, with_optimizer=True).optimizer
        assert state["w.exp_avg"].tolist() == [0.0] * 5 + [1.0] * 5
        assert state["w.step"] == 3
        assert state.get("rng.torch") == (torch.tensor([rank]) if rank < 2 else None)


def test_a_rank_that_fails_leaves_no_checkpoint(tmp_path):
    writer = cw.CheckpointWriter(tmp_path)
    writer.start(part(0))
    time.sleep(0.1)
    assert writer.busy
    writer.abandon()
    assert "rank1" in str(writer.error)
    assert cm.saved_steps(tmp_path) == []


# --- every byte ------------------------------------------------------------------------------------------------------


def test_any_flipped_byte_of_any_file_is_detected(tmp_path):
    tiny = cw.Snapshot(3, {"w": torch.ones(3)}, {"w.exp_avg": torch.ones(3)}, {"complete": False})
    cw.write_snapshot(tmp_path, tiny, Keep())
    rng = random.Random(0)
    for file in sorted((tmp_path / "step_000003").iterdir()):
        good = file.read_bytes()
        for at in range(len(good)):
            bad = bytearray(good)
            bad[at] ^= rng.choice([1, 0x20, 0x80, rng.randrange(1, 256)])
            file.write_bytes(bytes(bad))
            with pytest.raises(RuntimeError, match="damaged"):
                cm.load_checkpoint(tmp_path, with_optimizer=True)
        for cut in (good[:-1], good + b"\n", b""):
            file.write_bytes(cut)
            with pytest.raises(RuntimeError, match="damaged"):
                cm.load_checkpoint(tmp_path, with_optimizer=True)
        file.write_bytes(good)
    assert cm.load_checkpoint(tmp_path, with_optimizer=True).meta["step"] == 3


# --- one file --------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(cw.SAFETENSORS_DTYPES)), shapes), max_size=6))
def test_the_package_reads_what_we_write(tmp_path_factory, kinds):
    tensors = {f"t.{i}": (torch.rand(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    assert cw.write_safetensors(path, tensors) == sha256_file(path)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert cw.size_in_bytes(tensors) <= path.stat().st_size


def test_views_and_parameters_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    cw.write_safetensors(tmp_path / "a", {"transposed": whole.T, "parameter": torch.nn.Parameter(whole[1])})
    loaded = load_file(tmp_path / "a")
    assert torch.equal(loaded["transposed"], whole.T)
    assert torch.equal(loaded["parameter"], whole[1])


def test_a_folder_that_is_gone_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="gone"):
        cw.write_safetensors(tmp_path / "gone" / "a", {"x": torch.ones(2)})
