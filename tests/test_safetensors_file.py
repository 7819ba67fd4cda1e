"""Our files are safetensors as the package reads them, and their hash is of what was to be written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanochat.checkpoint.safetensors_file import DTYPE_NAMES, size_in_bytes, write_safetensors
from nanochat.files import sha256_file

shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(DTYPE_NAMES)), shapes), max_size=6))
def test_the_package_reads_what_we_write(tmp_path_factory, kinds):
    tensors = {f"t.{i}": (torch.rand(shape) * 9).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    assert write_safetensors(path, tensors) == sha256_file(path)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    assert size_in_bytes(tensors) <= path.stat().st_size


def test_views_and_parameters_are_written_as_they_look(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write_safetensors(tmp_path / "a", {"transposed": whole.T, "parameter": torch.nn.Parameter(whole[1])})
    loaded = load_file(tmp_path / "a")
    assert torch.equal(loaded["transposed"], whole.T)
    assert torch.equal(loaded["parameter"], whole[1])


def test_a_folder_that_is_gone_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="gone"):
        write_safetensors(tmp_path / "gone" / "a", {"x": torch.ones(2)})
