"""ONNX decoders, bundles of them and settings that are refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from helpers.decoder_graph import write_decoder_graph
from motet.export.decoder_graph import export_decoder_graph, find_graph
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.open import open_backend
from motet.runtime.errors import (
    BundleError,
    ConfigError,
    MotetError,
    NotFoundError,
    UnsupportedModelError,
)
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.decoder_graph import GraphConfig


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def graph_dir(model_dir, tmp_path_factory):
    return write_decoder_graph(model_dir, tmp_path_factory.mktemp("graph") / "tiny")


@pytest.fixture(scope="module")
def bundle(graph_dir, tmp_path_factory):
    return export_decoder_graph(find_graph(graph_dir), tmp_path_factory.mktemp("bundle") / "tiny")


def named(values, name):
    return next(value for value in values if value.name == name)


def shape_of(value):
    return value.type.tensor_type.shape.dim


def drop(values, name):
    values.remove(named(values, name))


def add_input(name, kind=onnx.TensorProto.FLOAT):
    return lambda model: model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, ["b", "s"]))


def without_past(model):
    for value in [v for v in model.graph.input if v.name.startswith("past")]:
        model.graph.input.remove(value)


def eight_bit_cache(model):
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8


def set_size(place, name, axis, size):
    def change(model):
        shape_of(named(getattr(model.graph, place), name))[axis].dim_value = size

    return change


def rename_domain(domain):
    def change(model):
        model.graph.node[5].domain = domain
        if domain != "com.microsoft":
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    return change


def store(location, **where):
    def change(model):
        tensor = model.graph.initializer[0]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **where}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def restarted_positions(model):
    """The positions of every run begin at 0: those of its ones, summed up."""
    drop(model.graph.input, "position_ids")
    for name, value in {"zero": 0, "one": 1}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    steps = [("Mul", ["input_ids", "zero"], "zeros"), ("Add", ["zeros", "one"], "ones")]
    steps += [("CumSum", ["ones", "one"], "position_ids")]
    for index, (kind, inputs, output) in enumerate(steps):
        model.graph.node.insert(index, onnx.helper.make_node(kind, inputs, [output]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: drop(m.graph.input, "past_key_values.2.value"), UnsupportedModelError, "past_key_values.2.value"),
        (lambda m: drop(m.graph.output, "present.1.key"), UnsupportedModelError, "no output present.1.key"),
        (lambda m: drop(m.graph.output, "logits"), UnsupportedModelError, "no output logits"),
        (without_past, UnsupportedModelError, "past_key_values"),
        (add_input("token_type_ids"), UnsupportedModelError, "the input 'token_type_ids': known are input_ids"),
        (add_input("use_cache_branch", onnx.TensorProto.BOOL), UnsupportedModelError, "two graphs merged .* export"),
        (add_input("encoder_hidden_states"), UnsupportedModelError, "attends to an encoder"),
        (add_input("past_key_values.0.encoder.key"), UnsupportedModelError, "attends to an encoder"),
        (add_input("past_key_values.4.key"), UnsupportedModelError, "config.json says 4 layers"),
        (set_size("input", "input_ids", 0, 1), UnsupportedModelError, "input_ids has the shape"),
        (set_size("input", "past_key_values.0.key", 2, 128), UnsupportedModelError, "past_key_values.0.key has the"),
        (rename_domain("acme.ops"), UnsupportedModelError, "operators that need a library .*acme.ops"),
        (rename_domain("com.microsoft"), UnsupportedModelError, "this ONNX Runtime cannot load"),
        (store("/etc/hostname"), UnsupportedModelError, "in files beside it, named without a folder"),
        (store("../config.json"), UnsupportedModelError, "in files beside it, named without a folder"),
        (store("*/_ORT_MEM_ADDR_/*"), UnsupportedModelError, "in files beside it, named without a folder"),
        (store("tokenizer.json"), UnsupportedModelError, "a file of another use"),
        (store("gone.data"), NotFoundError, "gone.data' does not exist"),
        (store("short.data", offset=4, length=100), BundleError, "torn: .* bytes 4 to 104 of 10"),
        (store("short.data", offset="x"), BundleError, "is no number"),
        (restarted_positions, UnsupportedModelError, "does not go on from its past"),
    ],
)
def test_graphs_that_are_refused(graph_dir, tmp_path, change, error, message):
    source = shutil.copytree(graph_dir, tmp_path / "m")
    (source / "short.data").write_bytes(b"0123456789")
    model = onnx.load(source / "model.onnx")
    change(model)
    (source / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(error, match=message):
        export_decoder_graph(find_graph(source), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_cache_of_eight_bits_is_refused(graph_dir, tmp_path):
    """ONNX Runtime would say that the types do not fit; the interface is asked first if it can be loaded."""
    from motet.runtime.backends.onnx.interface import GraphInterface
    from motet.runtime.model.decoder_graph import GraphConfig

    class Value:
        def __init__(self, name, kind, shape):
            self.name, self.type, self.shape = name, kind, shape

    inputs = [Value("input_ids", "tensor(int64)", ["b", "s"])]
    inputs += [Value(f"past_key_values.0.{kind}", "tensor(int8)", ["b", 2, "p", 16]) for kind in ("key", "value")]
    with pytest.raises(
        UnsupportedModelError, match=r"past_key_values.0.key is tensor\(int8\), known are tensor\(float\)"
    ):
        GraphInterface.of(inputs, [], GraphConfig(320, 1, 2, 16, 512))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_hidden_layers": 5}, UnsupportedModelError, "no input past_key_values.4.key, and config.json says 5"),
        ({"num_key_value_heads": 4}, UnsupportedModelError, r"needed is \['any', 4, 'any', 16\]"),
        ({"head_dim": 32}, UnsupportedModelError, "past_key_values.0.key has the shape"),
        ({"vocab_size": 321}, UnsupportedModelError, "logits has the shape .* 321"),
        ({"num_hidden_layers": "four"}, ConfigError, "num_layers must be an integer"),
        ({"max_position_embeddings": None}, UnsupportedModelError, "no max_position_embeddings or n_positions"),
        ({"vocab_size": 100}, BundleError, "100"),
        ({"is_encoder_decoder": True}, UnsupportedModelError, "decoders alone"),
        ({"head_dim": None, "num_attention_heads": 7}, UnsupportedModelError, "no head_dim"),
        ({"eos_token_id": 400}, BundleError, "eos_token_id 400"),
    ],
)
def test_configurations_that_are_refused(graph_dir, tmp_path, values, error, message):
    source = shutil.copytree(graph_dir, tmp_path / "m")
    config = json.loads((source / "config.json").read_text()) | values
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        export_decoder_graph(find_graph(source), tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: d["model"].update(vision={}), UnsupportedModelError, "settings in model .*vision"),
        (lambda d: d["model"]["decoder"].update(sliding_window={}), UnsupportedModelError, "sliding_window"),
        (lambda d: d["model"]["decoder"]["inputs"].update(past_key_names="k_%d"), UnsupportedModelError, "k_%d"),
        (lambda d: d["model"]["decoder"].update(filename="../model.onnx"), UnsupportedModelError, "a file beside it"),
        (lambda d: d["model"]["decoder"].update(filename="other.onnx"), NotFoundError, "other.onnx' does not exist"),
        (lambda d: d["model"].update(context_length=99), BundleError, "delete the wrong one"),
        (lambda d: d.pop("model"), BundleError, "no model with a decoder"),
    ],
)
def test_genai_configurations_that_are_refused(graph_dir, tmp_path, change, error, message):
    source = shutil.copytree(graph_dir, tmp_path / "m")
    decoder = {
        "filename": "model.onnx",
        "head_size": 16,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "inputs": {},
    }
    values = {"model": {"context_length": 512, "vocab_size": 320, "decoder": decoder, "eos_token_id": 257}}
    (source / "genai_config.json").write_text(json.dumps(values))
    fine = export_decoder_graph(find_graph(source), tmp_path / "b")
    assert set(Bundle.load(fine).eos_token_ids) == {257, 258}
    change(values)
    (source / "genai_config.json").write_text(json.dumps(values))
    with pytest.raises(error, match=message):
        export_decoder_graph(find_graph(source), tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x07", b"\xff" * 999])
def test_files_that_are_no_graph(graph_dir, tmp_path, content):
    source = shutil.copytree(graph_dir, tmp_path / "m")
    (source / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="is no ONNX graph"):
        export_decoder_graph(find_graph(source), tmp_path / "b")


def test_a_decoder_in_several_graphs_is_refused(graph_dir, tmp_path):
    source = shutil.copytree(graph_dir, tmp_path / "m")
    shutil.copyfile(source / "model.onnx", source / "decoder_with_past_model.onnx")
    with pytest.raises(ConfigError, match=r"several graphs: \['decoder_with_past_model.onnx', 'model.onnx'\]"):
        find_graph(source)
    with pytest.raises(NotFoundError, match="does not exist"):
        find_graph(source / "other.onnx")


# ---- the bundle ------------------------------------------------------------------------------------------------------


def change_manifest(bundle, change):
    path = bundle / "motet.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["graphs"].update(padding="both"),
        lambda m: m["graphs"].update(data=["other.data"]),
        lambda m: m["graphs"].update(whole="../model.onnx"),
        lambda m: m["graphs"].update(whole=[]),
        lambda m: m["graphs"].pop("data"),
        lambda m: m["config"].update(head_size=0),
        lambda m: m["config"].update(unknown=1),
        lambda m: m["members"].append({"name": "b", "kind": "base", "mix": 0.0, "provenance": {}}),
        lambda m: m.update(graphs=5),
    ],
)
def test_a_manifest_that_is_inconsistent(bundle, tmp_path, change):
    copy = shutil.copytree(bundle, tmp_path / "b")
    change_manifest(copy, change)
    with pytest.raises(BundleError):
        Bundle.load(copy)


def test_a_damaged_graph_is_found(bundle, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "b")
    content = bytearray((copy / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="is damaged: its SHA-256"):
        Bundle.load(copy)


@pytest.mark.parametrize("location", ["../outside.data", "{}/outside.data", "*/_ORT_MEM_ADDR_/*"])
def test_a_bundle_reads_nothing_outside_of_it(bundle, tmp_path, location):
    """A bundle that was made to: ONNX Runtime reads external data in the graph's directory alone."""
    copy = shutil.copytree(bundle, tmp_path / "b")
    model = onnx.load(copy / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    (tmp_path / "outside.data").write_bytes(tensor.raw_data)
    length = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location.format(tmp_path), "offset": "0", "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MotetError, match="ONNX Runtime cannot load"):
        open_backend(Bundle.load(copy, verify=False), EngineConfig(backend="onnx", threads=2))


def test_a_number_of_layers_that_no_graph_has():
    """Each layer has names; asked before they are made."""
    with pytest.raises(ConfigError, match="num_layers must be an integer in 1…4096, got 2147483647"):
        GraphConfig(10, 2**31 - 1, 1, 1, 8)
