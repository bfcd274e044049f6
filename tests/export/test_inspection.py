"""`motet inspect`: what it prints is what is stored."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
from motet.cli import main
from motet.export.bundle_writer import export_bundle
from motet.export.decoder_graph import export_decoder_graph
from motet.export.inspection import Weight, inspect
from motet.export.onnx_directory import write_onnx
from motet.export.quantisation.calibration import Calibration
from motet.export.quantisation.method import Target
from motet.runtime.checkpoints.huggingface import read_weights
from motet.runtime.errors import BundleError, NotFoundError, UnsupportedModelError
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


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_an_onnx_graph(tiny_model_dir, tmp_path, bits):
    """Of its directory, its file and a bundle of it: what onnx reads of it, tensors in the file beside it included."""
    source = Bundle.load(export_bundle(tiny_model_dir("llama"), tmp_path / "b", bits=bits, graphs=False))
    out = write_onnx(source, tmp_path / "o")
    graph, bundle = out / "model.onnx", export_decoder_graph(out / "model.onnx", tmp_path / "back")
    found = list(inspect(out))
    assert found == list(inspect(graph)) == list(inspect(bundle))
    tensors = {tensor.name: tensor for tensor in onnx.load(graph).graph.initializer}
    assert [weight.name for weight in found] == [*tensors]
    for weight in found:
        tensor = tensors[weight.name]
        assert weight.shape == tuple(tensor.dims)
        assert weight.digest == hashlib.sha256(tensor.raw_data).hexdigest()
        assert weight.num_bytes == len(tensor.raw_data) == -(-np.prod(tensor.dims, dtype=int) * weight.bits // 8)
    kinds = {(tensors[weight.name].data_type, weight.bits) for weight in found}
    assert (onnx.TensorProto.INT4, 4) in kinds or bits != 4
    assert (onnx.TensorProto.INT8, 8) in kinds or bits == 32


def small_graph(path, **tensor):
    """A graph of one initializer."""
    proto = onnx.TensorProto(**{"name": "w", "dims": [2, 3], "data_type": onnx.TensorProto.FLOAT} | tensor)
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3])
    nodes = [onnx.helper.make_node("Identity", ["w"], ["y"])]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [value], [proto])), path)
    return path


def test_values_in_fields_of_numbers(tmp_path):
    (weight,) = inspect(small_graph(tmp_path / "g.onnx", float_data=range(6)))
    assert weight == Weight(
        "w", (2, 3), 32, 0, 24, None, hashlib.sha256(np.arange(6, dtype="<f4").tobytes()).hexdigest()
    )
    nibbles = {"data_type": onnx.TensorProto.INT4, "dims": [3], "int32_data": [0x21, 0x03]}
    (weight,) = inspect(small_graph(tmp_path / "g.onnx", **nibbles))
    assert weight == Weight("w", (3,), 4, 0, 2, None, hashlib.sha256(b"\x21\x03").hexdigest())


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        ({"float_data": range(5)}, BundleError, "damaged"),
        ({"raw_data": bytes(20)}, BundleError, r"has 20 bytes, its shape \[2, 3\] takes 24"),
        ({"dims": [2**40, 2**40], "raw_data": b""}, BundleError, "has 0 bytes"),
        ({"dims": [1] * 65, "raw_data": bytes(4)}, BundleError, "has the shape"),
        ({"dims": [-1, -6], "raw_data": bytes(24)}, BundleError, r"has the shape \[-1, -6\]"),
        (
            {"data_type": onnx.TensorProto.STRING, "string_data": [b"x"] * 6},
            UnsupportedModelError,
            "type 8, which is no",
        ),
        ({"data_type": 99, "raw_data": bytes(24)}, UnsupportedModelError, "type 99"),
    ],
)
def test_damaged_initializers(tmp_path, tensor, error, message):
    with pytest.raises(error, match=message):
        list(inspect(small_graph(tmp_path / "g.onnx", **tensor)))


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ({"location": "data"}, BundleError, r"has 20 bytes, its shape \[2, 3\] takes 24"),
        ({"location": "data", "length": "16"}, BundleError, "has 16 bytes"),
        ({"location": "data", "offset": "8", "length": "24"}, BundleError, "is torn"),
        ({"location": "data", "offset": "x"}, BundleError, "is no number"),
        ({"location": "other"}, NotFoundError, "does not exist"),
        ({"location": "../data"}, UnsupportedModelError, "files beside it"),
    ],
)
def test_damaged_places(tmp_path, place, error, message):
    (tmp_path / "data").write_bytes(bytes(20))
    entries = [onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items()]
    outside = {"data_location": onnx.TensorProto.EXTERNAL, "external_data": entries}
    with pytest.raises(error, match=message):
        list(inspect(small_graph(tmp_path / "g.onnx", **outside)))


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
