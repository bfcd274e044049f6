"""Portable ONNX graphs: logits of every family, in every form of weights and opset, are those of the decoder in torch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import safetensors.torch
from helpers.compare import relative_error
from helpers.models import FAMILIES, make_adapter, make_tail, write_model
from helpers.portable_graph import Texts, bundle_decoder, exact_session, torch_logits
from motet.export.bundle_writer import export_bundle
from motet.export.flavours import WeightForm
from motet.export.onnx_directory import write_onnx
from motet.export.portable_graph import OPSETS
from motet.export.quantisation.calibration import Calibration
from motet.export.quantisation.method import Target
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.errors import UnsupportedModelError
from motet.runtime.model.bundle import WEIGHTS, Bundle
from motet.runtime.model.layout import EMBEDDING
from motet.runtime.model.stored import stored_tensors, stored_weight
from onnx.reference import ReferenceEvaluator

LIMIT = 1e-4  # of the logits' spread: activations are float32
TEXTS = [np.random.default_rng(length).integers(0, 320, length).tolist() for length in (70, 31, 5)]
IR_VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
TEXT = Calibration([np.random.default_rng(seed).integers(0, 320, 128).tolist() for seed in range(2)])


def check(graph):
    """By ONNX's own checker, which infers all shapes; and every operator is one of ONNX's standard."""
    onnx.checker.check_model(str(graph), full_check=True)
    inferred = graph.parent / "inferred.onnx"
    onnx.shape_inference.infer_shapes_path(str(graph), str(inferred), True, True, True)
    model = onnx.load(inferred, load_external_data=False)
    inferred.unlink()
    assert {node.domain for node in model.graph.node} == {""} == {opset.domain for opset in model.opset_import}
    shapes = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.output}
    assert shapes["logits"] == ["batch_size", "sequence_length", 320]
    assert shapes["present.0.key"][2] == "past_sequence_length + sequence_length"
    return model


def check_logits(graph, decoder):
    """Texts alone, together with padding, and a token at a time after what is cached: each against the whole text in torch."""
    session, expected = exact_session(graph), [torch_logits(decoder, text) for text in TEXTS]
    (alone,) = Texts(session).run(TEXTS[:1])
    assert relative_error(alone, expected[0]) < LIMIT
    together = Texts(session)
    begun = together.run([text[:-2] for text in TEXTS])
    steps = [together.run([[text[place]] for text in TEXTS]) for place in (-2, -1)]
    for index, wanted in enumerate(expected):
        found = np.concatenate([begun[index], steps[0][index], steps[1][index]])
        assert relative_error(found, wanted) < LIMIT, f"text of {len(wanted)} tokens"
    pieces = Texts(session)
    found = [pieces.run([TEXTS[0][first : first + 16]])[0] for first in range(0, 70, 16)]
    assert relative_error(np.concatenate(found), expected[0]) < LIMIT


def bundle_of(model_dir, path, **options):
    return Bundle.load(export_bundle(model_dir, path, graphs=False, **options))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_torchs(tiny_model_dir, tmp_path, family, bits):
    bundle = bundle_of(tiny_model_dir(family), tmp_path / "b", bits=bits)
    graph = write_onnx(bundle, tmp_path / "o") / "model.onnx"
    check(graph)
    check_logits(graph, bundle_decoder(bundle, "base"))


def test_the_reference_is_the_model(tiny_model_dir, tmp_path):
    """What these tests compare with is the checkpoint's function. And one family, for runs without the slow tests."""
    model_dir = tiny_model_dir("gemma2")
    bundle = bundle_of(model_dir, tmp_path / "b", bits=32)
    decoder = bundle_decoder(bundle, "base")
    expected = torch_logits(Decoder.from_dir(model_dir).double(), TEXTS[0])
    assert relative_error(torch_logits(decoder, TEXTS[0]), expected) < 1e-9
    graph = write_onnx(bundle, tmp_path / "o") / "model.onnx"
    check(graph)
    check_logits(graph, decoder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("opset", OPSETS)
def test_opsets(tiny_model_dir, tmp_path, family, bits, opset):
    bundle = bundle_of(tiny_model_dir(family), tmp_path / "b", bits=bits)
    graph = write_onnx(bundle, tmp_path / "o", opset=opset) / "model.onnx"
    model = check(graph)
    assert [found.version for found in model.opset_import] == [opset]
    assert model.ir_version == IR_VERSIONS[opset]
    check_logits(graph, bundle_decoder(bundle, "base"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-untied"])
@pytest.mark.parametrize("opset", [17, 21])
def test_an_embedding_of_four_bits(tiny_model_dir, tmp_path, family, opset):
    bundle = bundle_of(tiny_model_dir(family), tmp_path / "b", target=Target(bits=5.05), calibration=TEXT)
    assert stored_weight(stored_tensors(bundle.path / WEIGHTS), EMBEDDING).bits == 4
    graph = write_onnx(bundle, tmp_path / "o", opset=opset) / "model.onnx"
    check(graph)
    check_logits(graph, bundle_decoder(bundle, "base"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("form", [WeightForm.FLOAT32, WeightForm.FLOAT16])
def test_weights_in_floats(tiny_model_dir, tmp_path, family, bits, form):
    bundle = bundle_of(tiny_model_dir(family), tmp_path / "b", bits=bits)
    graph = write_onnx(bundle, tmp_path / "o", form=form) / "model.onnx"
    types = {tensor.data_type for tensor in check(graph).graph.initializer} - {onnx.TensorProto.INT64}
    halves = {onnx.TensorProto.FLOAT16} if form is WeightForm.FLOAT16 else set()
    assert types == {onnx.TensorProto.FLOAT} | halves
    check_logits(graph, bundle_decoder(bundle, "base", np.float16 if halves else np.float32))


def test_what_float16_cannot_hold(tiny_model_dir, tmp_path):
    model_dir = write_model(tmp_path / "m", "llama")
    weights = safetensors.torch.load_file(model_dir / WEIGHTS)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 70000.0
    safetensors.torch.save_file(weights, model_dir / WEIGHTS, {"format": "pt"})
    bundle = bundle_of(model_dir, tmp_path / "b", bits=32)
    with pytest.raises(UnsupportedModelError, match=r"layers.1.mlp.down_proj.weight' has the value 7e\+04, float16"):
        write_onnx(bundle, tmp_path / "o", form=WeightForm.FLOAT16)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
def test_members(tiny_model_dir, tmp_path, bits):
    """Each has the weights that it has in the ensemble; of the others nothing is written."""
    model_dir = tiny_model_dir("llama")
    tails = {"base": None, "code": make_tail(model_dir, tmp_path / "code", "code", 1, 0.4)}
    loras = {"docs": make_adapter(model_dir, tmp_path / "docs", 2, layers=2)}
    bundle = bundle_of(model_dir, tmp_path / "b", bits=bits, tails=tails, loras=loras)
    found, sizes = {}, {}
    for member in bundle.members:
        out = write_onnx(bundle, tmp_path / member / "o", member)
        check_logits(out / "model.onnx", bundle_decoder(bundle, member))
        found[member] = Texts(exact_session(out / "model.onnx")).run(TEXTS[:1])[0]
        sizes[member] = (out / "model.onnx_data").stat().st_size
    for member in ("code", "docs"):
        assert relative_error(found[member], found["base"]) > 0.05
    names = [t.name for t in onnx.load(tmp_path / "docs/o/model.onnx", load_external_data=False).graph.initializer]
    assert len([name for name in names if "lora" in name]) == 2 * 2 * 4
    assert sizes["docs"] < (bundle.path / WEIGHTS).stat().st_size + sizes["base"] / 2


def test_heads_of_any_size(tmp_path):
    """The graphs of a bundle have heads of a multiple of 16 elements; these have not."""
    model_dir = write_model(tmp_path / "m", "qwen3", head_dim=6)
    bundle = bundle_of(model_dir, tmp_path / "b", bits=32)
    graph = write_onnx(bundle, tmp_path / "o") / "model.onnx"
    check(graph)
    check_logits(graph, bundle_decoder(bundle, "base"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("opset", [17, 21, 23])
def test_onnxs_own_evaluator(tiny_model_dir, tmp_path, bits, opset):
    """The definition of the operators in numpy, without any runtime."""
    bundle = bundle_of(tiny_model_dir("gemma2"), tmp_path / "b", bits=bits)
    graph = write_onnx(bundle, tmp_path / "o", opset=opset) / "model.onnx"
    evaluator, ids = ReferenceEvaluator(str(graph)), np.array([TEXTS[1]], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(31)[None]}
    empty = np.zeros((1, bundle.config.num_kv_heads, 0, bundle.config.head_size), np.float32)
    feeds |= {name: empty for name in evaluator.input_names if name.startswith("past")}
    (found,) = evaluator.run(["logits"], feeds)
    assert relative_error(found[0], torch_logits(bundle_decoder(bundle, "base"), TEXTS[1])) < LIMIT
