"""Bundles: quantisation, graphs of every family against torch, what ONNX Runtime alone makes of them, damage."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from helpers.compare import relative_error
from helpers.models import FAMILIES
from motet.export.bundle_writer import export_bundle
from motet.export.quantisation.equalise import equalise, smoothing
from motet.export.quantisation.groups import dequantise, quantise
from motet.export.quantisation.statistics import channel_rms
from motet.runtime.api.config import EngineConfig
from motet.runtime.api.request import Request
from motet.runtime.api.sampling import SamplingParams
from motet.runtime.backends.onnx.backend import OnnxBackend
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.engine.engine import Engine
from motet.runtime.errors import BundleError, ConfigError, InvalidEnsembleError, NotFoundError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle
from motet.runtime.model.layout import decoder_layout
from motet.runtime.model.stored import stored_tensors

CONFIG = EngineConfig(backend="onnx", max_num_seqs=4, max_model_len=256, threads=2)


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 127), (4, 1 / 15)])
def test_quantisation_error_is_within_half_a_step(bits, step):
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((24, 128)) * 0.1 + 0.05).astype(np.float32)
    groups = weight.reshape(24, -1, 32)
    span = np.abs(groups).max(2) if bits == 8 else groups.max(2) - groups.min(2)
    error = np.abs(dequantise(quantise(weight, bits, 32)) - weight).reshape(24, -1, 32).max(2)
    assert (error <= span * step * 0.5 * 1.02).all()  # scales and minima are rounded to 11 bits


def test_a_four_bit_grid_is_kept():
    """Values on an affine 4-bit grid whose minimum is no whole number of steps."""
    rng = np.random.default_rng(1)
    steps = rng.integers(0, 16, (8, 2, 32))
    steps[:, :, 0], steps[:, :, 1] = 0, 15
    weight = (steps * 0.011 - 0.0773).reshape(8, 64).astype(np.float32)
    assert np.abs(dequantise(quantise(weight, 4, 32)) - weight).max() < 0.011 * 0.03


@pytest.mark.parametrize(("bits", "group", "message"), [(5, 32, "bits"), (8, 48, "group_size"), (8, 128, "divide")])
def test_impossible_quantisation(bits, group, message):
    with pytest.raises(ConfigError, match=message):
        quantise(np.ones((4, 96), np.float32), bits, group)


@pytest.mark.parametrize(
    ("changes", "bits", "message"),
    [
        (
            {"hidden_size": 80},
            8,
            r"qkv_proj.weight: group_size 32 does not divide its 80 columns; these fit: \[16\]",
        ),
        (
            {"intermediate_size": 100},
            4,
            "mlp.down_proj.weight: group_size 32 does not divide its 100 columns; none fits",
        ),
        ({"head_dim": 24}, 32, "the heads have 24 elements, and the graphs compute multiples of 16"),
    ],
)
def test_sizes_are_checked_before_weights_are_read(tiny_model_dir, tmp_path, changes, bits, message):
    """The directory has no weights."""
    values = json.loads((tiny_model_dir("llama") / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        export_bundle(tmp_path, tmp_path / "b", bits=bits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "limit"), [(32, 1e-4), (8, 0.15), (4, 0.8)])
def test_served_logits_are_torchs(tiny_model_dir, tmp_path, family, bits, limit):
    """Two members of one base with tails of two layers, against torch: exact in 32 bits, near in 8 and 4 (relative to
    the logits' spread)."""
    model_dir = tiny_model_dir(family)
    tails = {"a": None, "b": None}
    export_bundle(model_dir, tmp_path / "b", tails=tails, num_tail_layers=2, bits=bits)
    backend = OnnxBackend(Bundle.load(tmp_path / "b"), CONFIG)
    token_ids = np.random.default_rng(0).integers(0, 320, 70).tolist()
    with torch.no_grad():
        expected = Decoder.from_dir(model_dir).double()(torch.tensor([token_ids]))[0].numpy()
    found = backend.score(token_ids, 1)
    if bits == 32:
        assert relative_error(found, expected) < limit
    else:
        assert np.abs(found - expected).mean() / expected.std() < limit


@pytest.mark.parametrize("family", FAMILIES)
def test_equalisation_is_the_same_function(tiny_model_dir, family):
    model_dir = tiny_model_dir(family)
    config, weights = read_config(model_dir), read_weights(model_dir)
    rms = channel_rms(config, weights, [list(range(50))])
    scales = {name: smoothing(own, 32) for name, own in rms.items()}
    arrays = equalise(decoder_layout(config), {name: tensor.numpy() for name, tensor in weights.items()}, scales)
    changed = {name: torch.from_numpy(array) for name, array in arrays.items()}
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (Decoder.from_weights(config, own).double()(token_ids) for own in (weights, changed))
    assert relative_error(after, before) < 1e-5  # the equalised weights are rounded to float32
    name = "model.layers.0.mlp.up_proj.weight"  # a norm that attention reads too cannot be changed for the MLP
    assert np.array_equal(arrays[name], weights[name]) == config.shared_norm


def plain_session(path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # the backend made a pool for the whole process
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def greedy_with_onnxruntime(bundle: Bundle, member: str, prompt: list[int], count: int) -> list[int]:
    """Plain ONNX Runtime over the bundle's graphs: the prompt at once, then a token at a time, as the engine does."""

    def session(file: str) -> ort.InferenceSession:
        return plain_session(bundle.path / file)

    graphs = [session(bundle.graphs.trunk)] + ([session(bundle.graphs.tails[member])] if bundle.graphs.tails else [])
    head, config, tokens, done = session(bundle.graphs.head), bundle.config, list(prompt), 0
    empty = np.zeros((1, config.num_kv_heads, 0, config.head_size), np.float32)
    cache: dict[str, np.ndarray] = {}
    for _ in range(count):
        rows, positions = np.array([tokens[done:]], np.int64), np.arange(done, len(tokens))[None]
        for graph in graphs:
            feeds = {
                "position_ids": positions,
                "seqlens_k": np.array([len(tokens) - 1], np.int32),
                "total_sequence_length": np.array(len(tokens), np.int32),
            } | dict.fromkeys(("input_ids", "hidden_states"), rows)
            taken = {value.name: feeds.get(value.name, cache.get(value.name, empty)) for value in graph.get_inputs()}
            rows, *present = graph.run(None, taken)
            names = [value.name.replace("present", "past_key_values") for value in graph.get_outputs()[1:]]
            cache |= dict(zip(names, present, strict=True))
        done = len(tokens)
        tokens.append(int(head.run(None, {"hidden_states": rows[0, -1:]})[0][0].argmax()))
    return tokens[len(prompt) :]


def engine_greedy(path, prompt, count):
    with Engine.from_bundle(path, CONFIG) as engine:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        return engine.complete([Request("x", (tuple(prompt),), engine.model.default_ensemble, params)])[0][0].token_ids


def test_onnxruntime_alone_says_the_same(real_model_dir, tmp_path):
    """The first 32 greedy tokens of the real model, without any code of Motet's runtime. Weights have 32 bits: where activations
    are rounded, a value between two steps makes a visible difference of one in the last place."""
    path = export_bundle(real_model_dir, tmp_path / "b", bits=32)
    with Engine.from_bundle(path, CONFIG) as engine:
        prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "Explain what a hash table is."}])
    assert greedy_with_onnxruntime(Bundle.load(path), "base", prompt, 32) == engine_greedy(path, prompt, 32)


def test_one_copy_of_the_weights(tiny_model_dir, tmp_path):
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", tails={"a": None, "b": None}, num_tail_layers=2)
    names = stored_tensors(path / "model.safetensors")
    assert not [name for name in names if name.startswith("members.")]
    assert len([name for name in names if "embed_tokens" in name]) == 2  # values and scales, for embedding and head


def test_damage_is_refused(tiny_model_dir, tmp_path):
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b")
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.load(path)
    weights.unlink()
    with pytest.raises(BundleError, match="lacks"):
        Bundle.load(path)
    manifest = json.loads((path / "motet.json").read_text())
    for change in (
        {"format": 99},
        {"members": []},
        {"config": {"family": "llama"}},
        {"files": {"../x": ""}},
        {"eos_token_ids": [320]},
    ):
        (path / "motet.json").write_text(json.dumps(manifest | change))
        with pytest.raises(BundleError):
            Bundle.load(path)
    with pytest.raises(NotFoundError):
        Bundle.load(tmp_path / "nowhere")


def test_kinds_of_members(tiny_model_dir, tmp_path):
    """The manifest says what a member is."""
    path = export_bundle(tiny_model_dir("llama"), tmp_path / "b", name="b")
    manifest = json.loads((path / "motet.json").read_text())
    assert Bundle.load(path).kinds == ("base",)
    manifest["members"].append({"name": "lora", "kind": "adapter", "mix": 0.0, "provenance": {}})
    (path / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"the graphs' tails are \[\], the members with one \['base', 'lora'\]"):
        Bundle.load(path)
    manifest["members"][1]["kind"] = "expert"
    (path / "motet.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"one of .*'adapter'.*has 'expert'"):
        Bundle.load(path)


def test_bad_exports(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    with pytest.raises(InvalidEnsembleError, match="sums to"):
        export_bundle(model_dir, tmp_path / "b", tails={"a": None, "b": None}, mix={"a": 0.5, "b": 0.6})
    with pytest.raises(InvalidEnsembleError, match="members are"):
        export_bundle(model_dir, tmp_path / "b", mix={"zz": 1.0})
    with pytest.raises(ConfigError, match="0 to 4 layers"):
        export_bundle(model_dir, tmp_path / "b", num_tail_layers=9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ConfigError, match="not a bundle"):
        export_bundle(model_dir, tmp_path / "other")
    assert not (tmp_path / "b").exists()
