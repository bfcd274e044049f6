"""`motet inspect`: what it prints is what is stored."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.export.inspection import inspect
from motet.export.quantisation.calibration import Calibration
from motet.export.quantisation.method import Target
from motet.runtime.checkpoints.huggingface import read_weights
from motet.runtime.errors import NotFoundError
from motet.runtime.model.bundle import WEIGHTS, Bundle
from safetensors.numpy import load_file

TEXT = Calibration([np.random.default_rng(seed).integers(0, 320, 128).tolist() for seed in range(2)])


def test_a_bundle(tiny_model_dir, tmp_path):
    path = export_bundle(
        tiny_model_dir("llama"), tmp_path / "b", target=Target(bits=6.0), calibration=TEXT, graphs=False
    )
    found, tensors = {weight.name: weight for weight in inspect(path)}, load_file(path / WEIGHTS)
    assert sum(weight.num_bytes for weight in found.values()) == sum(array.nbytes for array in tensors.values())
    assert {name: weight.expected_kl for name, weight in found.items() if weight.expected_kl is not None} == (
        Bundle.load(path).quantisation["expected_kl"]
    )
    for name, weight in found.items():
        parts = [
            tensors[f"{name}{kind}"] for kind in ("", ".values", ".scales", ".minima") if f"{name}{kind}" in tensors
        ]
        assert weight.digest == hashlib.sha256(b"".join(array.tobytes() for array in parts)).hexdigest()
        if weight.group_size:
            assert weight.bits == (4 if f"{name}.minima" in tensors else 8)
            assert np.prod(weight.shape) == tensors[f"{name}.values"].size * 8 // weight.bits
            assert weight.shape[1] == tensors[f"{name}.scales"].shape[1] * weight.group_size


def test_a_models_directory(tiny_model_dir):
    weights = read_weights(tiny_model_dir("qwen3"))
    found = {weight.name: weight for weight in inspect(tiny_model_dir("qwen3"))}
    assert {name: weight.shape for name, weight in found.items()} == {
        name: tuple(w.shape) for name, w in weights.items()
    }
    for name, weight in weights.items():
        assert found[name].digest == hashlib.sha256(weight.numpy().tobytes()).hexdigest()


def test_the_command(tiny_model_dir, tmp_path, monkeypatch, capsys):
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", graphs=False)
    monkeypatch.setattr("sys.argv", ["motet", "inspect", str(path), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == [weight.name for weight in inspect(path)]
    monkeypatch.setattr("sys.argv", ["motet", "inspect", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "there is no model" in capsys.readouterr().err


def test_what_is_neither(tmp_path):
    with pytest.raises(NotFoundError, match="is no bundle"):
        list(inspect(tmp_path))
