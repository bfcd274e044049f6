"""Pickled weights: rewritten as safetensors when a model is pulled; a pickle of anything else is not opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from motet.runtime.checkpoints.huggingface import read_weights
from motet.runtime.checkpoints.store import pull
from motet.runtime.errors import BundleError, NotFoundError, UnsupportedModelError
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOTET_HOME", str(tmp_path / "home"))


@pytest.fixture
def directory(tiny_model_dir, tmp_path):
    """A model directory without weights, and its tensors as a checkpoint stores them."""
    path = shutil.copytree(tiny_model_dir("gpt2"), tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    return path, tensors


def pulled(path):
    return pull(str(path), show_progress=False)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_is_rewritten(tiny_model_dir, directory, old):
    """Tied weights share their memory in it, as transformers wrote them."""
    path, tensors = directory
    tied = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    torch.save(tied, path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    target = pulled(path)
    assert not list(target.glob("*.bin"))
    expected, found = read_weights(tiny_model_dir("gpt2")), read_weights(target)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert pulled(path) == target, "it is not fetched again"


def test_shards_are_rewritten(tiny_model_dir, directory):
    path, tensors = directory
    names = sorted(tensors)
    places = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    expected, found = read_weights(tiny_model_dir("gpt2")), read_weights(pulled(path))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(NotFoundError, match="does not exist"):
        pulled(path)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_hostile_pickle_does_nothing(directory, tmp_path):
    path, tensors = directory
    for saved in (tensors | {"x": Hostile(tmp_path / "mark")}, tensors | {"x": 3}, [1, 2]):
        torch.save(saved, path / "pytorch_model.bin")
        with pytest.raises(UnsupportedModelError, match=r"more than tensors|tensors by name"):
            pulled(path)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "mark")))
    with pytest.raises(UnsupportedModelError, match="more than tensors"):
        pulled(path)
    assert not (tmp_path / "mark").exists()


def test_a_torn_pickle(directory):
    path, tensors = directory
    torch.save(tensors, path / "pytorch_model.bin")
    content = (path / "pytorch_model.bin").read_bytes()
    for kept in (len(content) // 2, 10, 0):
        (path / "pytorch_model.bin").write_bytes(content[:kept])
        with pytest.raises((BundleError, UnsupportedModelError)):
            pulled(path)
