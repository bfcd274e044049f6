"""ONNX decoders that another program exported: their answers are those of ONNX Runtime alone and of transformers, and what cannot
be served is refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from helpers.compare import relative_error
from helpers.decoder_graph import greedy_with_onnxruntime, greedy_with_transformers, write_decoder_graph
from motet.cli import app
from motet.export.bundle_writer import export_bundle
from motet.export.decoder_graph import export_decoder_graph, find_graph
from motet.export.standard_graph import write_standard_graph
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Ensemble, Member, Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.onnx import decoder_graph
from motet.runtime.backends.open import open_backend
from motet.runtime.engine.embedder import EmbedJob
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import (
    BundleError,
    ConfigError,
    MotetError,
    NotFoundError,
    UnimplementedError,
    UnsupportedModelError,
)
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.decoder_graph import GraphConfig
from typer.testing import CliRunner

CONFIG = EngineConfig(backend="onnx", max_num_seqs=4, max_model_len=256, prefill_chunk=16, threads=2)
COUNT = 24
PROMPTS = [np.random.default_rng(length).integers(0, 250, length).tolist() for length in (1, 5, 40, 90)]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir):
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def expected(model_dir):
    """The answers of transformers."""
    return [greedy_with_transformers(model_dir, prompt, COUNT) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def graph_dir(model_dir, tmp_path_factory):
    return write_decoder_graph(model_dir, tmp_path_factory.mktemp("graph") / "tiny")


@pytest.fixture(scope="module")
def bundle(graph_dir, tmp_path_factory):
    return export_decoder_graph(find_graph(graph_dir), tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def runs(monkeypatch):
    """(sequences, rows) of each run of a graph."""
    shapes, run = [], decoder_graph.GraphRunner._run

    def counted(self, past, token_ids, lengths):
        shapes.append(token_ids.shape)
        return run(self, past, token_ids, lengths)

    monkeypatch.setattr(decoder_graph.GraphRunner, "_run", counted)
    return shapes


def outputs(bundle, prompts=PROMPTS, **sampling):
    params = SamplingParams(max_tokens=COUNT, temperature=0.0, ignore_eos=True, **sampling)
    with Engine.from_bundle(bundle, CONFIG) as engine:
        ensemble = engine.model.default_ensemble
        requests = [Request(str(i), (tuple(prompt),), ensemble, params) for i, prompt in enumerate(prompts)]
        return [found[0] for found in engine.complete(requests)]


def answers(bundle, prompts=PROMPTS):
    return [list(output.token_ids) for output in outputs(bundle, prompts)]


def padding(bundle):
    return Bundle.load(bundle).decoder_graph.padding


# ---- what is served --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "padded", "largest"),
    [(("attention_mask", "position_ids"), "left", 3), (("attention_mask",), "none", 1), ((), "none", 1)],
)
def test_answers_are_onnxruntimes_and_transformers(model_dir, tmp_path, runs, expected, rows, padded, largest):
    """Without position_ids a graph counts the padding as positions, which is found out when it is exported."""
    graph = find_graph(write_decoder_graph(model_dir, tmp_path / "m", rows=rows, external=True))
    bundle = export_decoder_graph(graph, tmp_path / "b")
    assert sorted(file.name for file in bundle.glob("model.*")) == ["model.onnx", "model.onnx_data"]
    assert padding(bundle) == padded
    runs.clear()
    found = answers(bundle)
    assert found == [greedy_with_onnxruntime(graph, prompt, COUNT) for prompt in PROMPTS]
    assert found == expected
    assert max(count for count, _ in runs) >= min(largest, 2) and max(rows for _, rows in runs) == 16
    assert largest > 1 or {count for count, _ in runs} == {1}


@pytest.mark.slow
def test_alone_and_together_have_the_same_bits_without_padding(model_dir, tmp_path):
    bundle = export_decoder_graph(find_graph(write_decoder_graph(model_dir, tmp_path / "m", rows=())), tmp_path / "b")
    together = outputs(bundle, logprobs=2)
    alone = [outputs(bundle, [prompt], logprobs=2)[0] for prompt in PROMPTS]
    assert [output.logprobs for output in together] == [output.logprobs for output in alone]


@pytest.mark.slow
def test_half_precision(model_dir, tmp_path):
    graph = find_graph(write_decoder_graph(model_dir, tmp_path / "m", dtype=np.float16))
    bundle = export_decoder_graph(graph, tmp_path / "b")
    assert answers(bundle, PROMPTS[:2]) == [greedy_with_onnxruntime(graph, prompt, COUNT) for prompt in PROMPTS[:2]]
    backend = open_backend(Bundle.load(bundle), CONFIG)
    assert backend.kv_dtype == "float16"


@pytest.mark.slow
def test_the_layout_of_onnxruntime_genai(model_dir, tmp_path, runs, expected):
    """Grouped-query attention with the rotation in it, and logits of the last position alone; only a genai_config.json."""
    source = Bundle.load(export_bundle(model_dir, tmp_path / "s", bits=32))
    write_standard_graph(source, 0, tmp_path / "m")
    bundle = export_decoder_graph(find_graph(tmp_path / "m" / "model.onnx"), tmp_path / "b")
    assert padding(bundle) == "right"
    runs.clear()
    assert answers(bundle) == expected
    assert max(count for count, _ in runs) > 1
    backends = [open_backend(Bundle.load(path), CONFIG) for path in (bundle, tmp_path / "s")]
    scores = [backend.score(PROMPTS[2], 0) for backend in backends]
    assert scores[0].shape == (40, 320) and relative_error(*scores) < 1e-4


@pytest.mark.slow
def test_logits_of_a_prompt_are_bounded(bundle, runs, monkeypatch, expected):
    monkeypatch.setattr(decoder_graph, "_MOST_LOGITS", 320 * 7)
    assert answers(bundle, PROMPTS[2:]) == expected[2:]
    assert max(rows for _, rows in runs) == 7


def test_a_prompt_is_scored(bundle):
    scores = open_backend(Bundle.load(bundle), CONFIG).score(PROMPTS[2], 0)[:-1].astype(np.float64)
    scores -= scores.max(1, keepdims=True)
    expected = (scores - np.log(np.exp(scores).sum(1, keepdims=True)))[range(39), PROMPTS[2][1:]]
    (found,) = outputs(bundle, PROMPTS[2:3], prompt_logprobs=0)
    np.testing.assert_allclose(found.prompt_logprobs, expected, atol=1e-4)


def test_scores_and_mixes_with_itself(bundle):
    """Context-aware decoding: one member with two views; the mix is of logits."""
    backend = open_backend(Bundle.load(bundle), CONFIG)
    long, short = PROMPTS[3], PROMPTS[3][50:]
    with Engine.from_bundle(bundle, CONFIG) as engine:
        ensemble = Ensemble((Member("base", 1.5, 0), Member("base", -0.5, 1)))
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        found = engine.complete([Request("x", (tuple(long), tuple(short)), ensemble, params)])[0][0].token_ids
    expected = []
    for _ in range(6):
        mixed = 1.5 * backend.score([*long, *expected], 0)[-1] - 0.5 * backend.score([*short, *expected], 0)[-1]
        expected.append(int(mixed.argmax()))
    assert list(found) == expected


def test_the_command_finds_the_graph(graph_dir, tmp_path):
    hub = tmp_path / "hub"
    (hub / "onnx").mkdir(parents=True)
    for file in graph_dir.iterdir():
        shutil.copyfile(file, (hub / "onnx" if file.suffix == ".onnx" else hub) / file.name)
    for place in (graph_dir, graph_dir / "model.onnx", hub):
        result = CliRunner().invoke(app, ["export", str(place), str(tmp_path / "b")], catch_exceptions=False)
        assert result.stdout.strip() == str(tmp_path / "b") and padding(tmp_path / "b") == "left"
    assert (tmp_path / "b" / "config.json").is_file()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [["--bits", "8"], ["--no-graphs"], ["--parity"], ["--tail", "a"], ["--merge"]])
def test_options_that_a_graph_cannot_follow(graph_dir, tmp_path, option):
    with pytest.raises(ConfigError, match=f"leave out {option[0].replace('no-', '')}"):
        CliRunner().invoke(app, ["export", str(graph_dir), str(tmp_path / "b"), *option], catch_exceptions=False)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_other_backends_refuse_the_bundle(bundle, backend):
    with pytest.raises(ConfigError, match=f"which backend {backend} cannot run; use backend onnx"):
        open_backend(Bundle.load(bundle), EngineConfig(backend=backend))
    with pytest.raises(ConfigError, match="no weights that this could use"):
        _ = Bundle.load(bundle).config


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kv_dtype": "int8"}, "kv_dtype"), ({"onnx_provider": "cuda"}, "CPU only"), ({"block_size": 16}, "block_size")],
)
def test_settings_that_a_graph_cannot_follow(bundle, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_backend(Bundle.load(bundle), EngineConfig(backend="onnx", threads=2, **changes))


def test_there_are_no_embeddings(bundle):
    with Engine.from_bundle(bundle, CONFIG) as engine, pytest.raises(UnimplementedError, match="no hidden states"):
        engine.embedder.submit([EmbedJob((1, 2), engine.model.default_ensemble, print)])


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
        open_backend(Bundle.load(copy, verify=False), CONFIG)


def test_a_number_of_layers_that_no_graph_has():
    """Each layer has names; asked before they are made."""
    with pytest.raises(ConfigError, match="num_layers must be an integer in 1…4096, got 2147483647"):
        GraphConfig(10, 2**31 - 1, 1, 1, 8)
