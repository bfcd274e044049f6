"""A file of tensors that is written one by one is the library's."""

from __future__ import annotations

import numpy as np
import pytest
from motet.export.tensor_file import TensorFile
from motet.runtime.errors import BundleError, UnsupportedModelError
from motet.runtime.model.stored import read_tensor, stored_tensors
from safetensors.numpy import load_file


def test_it_is_read_by_the_library_and_by_motet(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "größe": rng.integers(0, 256, (2, 7, 1), dtype=np.uint8),
        "none": np.empty((0, 4), np.float32),
        "turned": rng.standard_normal((4, 6)).astype(np.float32).T,
    }
    path = tmp_path / "t.safetensors"
    with TensorFile(path, [*tensors, "not written"], {"format": "motet"}) as file:
        for name, values in tensors.items():
            file.add(name, values)
    found = load_file(path)
    assert set(found) == set(tensors)
    assert all(np.array_equal(found[name], values) for name, values in tensors.items())
    places = stored_tensors(path)
    with path.open("rb") as opened:
        for name, values in tensors.items():
            assert np.array_equal(read_tensor(opened, path, places[name]), values)
    shorter = path.read_bytes()[:-4]
    path.write_bytes(shorter)
    with path.open("rb") as opened, pytest.raises(BundleError, match="was changed while it was read"):
        read_tensor(opened, path, places["turned"])


def test_a_header_that_nobody_would_read_is_refused_before_any_work(tmp_path):
    names = [f"model.layers.{index}.weight" for index in range(600_000)]
    with pytest.raises(UnsupportedModelError, match="at most 100000000 are read"):
        TensorFile(tmp_path / "t.safetensors", names, {})
    assert not (tmp_path / "t.safetensors").exists()


def test_a_file_that_was_not_finished_is_none(tmp_path):
    path = tmp_path / "t.safetensors"

    def stopped():
        with TensorFile(path, ["a"], {}) as file:
            file.add("a", np.ones(4, np.float32))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stopped()
    with pytest.raises(BundleError, match="no safetensors file"):
        stored_tensors(path)
