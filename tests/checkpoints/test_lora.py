"""Adapters: the checkpoint, merging, and bundles that hold them merged or apart; on tiny random models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.compare import relative_error
from motet.export.bundle_writer import export_bundle
from motet.export.parity import HeldOut, read_parity
from motet.export.quantisation.calibration import Calibration
from motet.export.quantisation.groups import Quantised, dequantise
from motet.runtime.api.config import EngineConfig
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import checkpoint_digest, read_config, read_weights
from motet.runtime.checkpoints.members.adapter import (
    attach,
    merge,
    random_adapter,
    read_adapter,
    write_adapter,
)
from motet.runtime.errors import BundleError, ConfigError, InvalidEnsembleError, NotFoundError
from motet.runtime.model.bundle import Bundle
from safetensors.numpy import load_file

ROWS = torch.arange(40)[None]
LIMIT = 2e-5  # of logits in float64: what is left is W + B A rounded to float32
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def make_adapter(model_dir, out, targets=None, *, rank=4, seed=0):
    decoder = Decoder.from_dir(model_dir)
    adapter = random_adapter(decoder, targets, rank, seed=seed, scale=0.02)
    base = {"name": "tiny", "digest": checkpoint_digest(model_dir)}
    write_adapter(out, decoder.config, adapter, {"base": base})
    return out


def logits(config, weights):
    """In float64: what float32 adds is rounding that depends on the CPU."""
    with torch.no_grad():
        return Decoder.from_weights(config, weights).double()(ROWS)


def stored_weights(path, member):
    """A member's weights as a bundle holds them, adapters added, q/k/v and gate/up apart again: for the torch page."""
    bundle = Bundle.load(path)
    tensors = load_file(path / "model.safetensors")
    config, result = bundle.config, {}
    names = {n.removesuffix(".values") for n in tensors if not n.endswith((".scales", ".minima"))}
    for name in (n for n in names if not n.startswith(("members.", "rotary."))):
        weight = tensors.get(name)
        if weight is None:
            stored = Quantised(8, tensors[f"{name}.values"], tensors[f"{name}.scales"], None)
            weight = dequantise(stored)
        module = f"members.{member}.{name.removesuffix('.weight')}"
        if f"{module}.lora_a" in tensors:
            weight = weight + tensors[f"{module}.lora_b"] @ tensors[f"{module}.lora_a"]
        prefix, _, last = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        sizes = (config.q_size, config.kv_size) if last == "qkv_proj" else (config.intermediate_size,)
        for part, rows in zip(
            PARTS.get(last, (last,)), np.split(weight, np.cumsum(sizes)) if last in PARTS else [weight]
        ):
            result[f"{prefix}.{part}.{name.rpartition('.')[2]}"] = torch.from_numpy(np.ascontiguousarray(rows))
    return result


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_merged_is_unmerged(tiny_model_dir, tmp_path, family):
    model_dir = tiny_model_dir(family)
    _, adapter = read_adapter(make_adapter(model_dir, tmp_path / "a"), read_config(model_dir))
    base = read_weights(model_dir)
    with torch.no_grad():
        beside = attach(Decoder.from_dir(model_dir), adapter).double()(ROWS)
    merged = logits(read_config(model_dir), {**base, **merge(base, adapter)})
    assert relative_error(merged, beside) < LIMIT
    assert relative_error(logits(read_config(model_dir), base), merged) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("targets", [None, ("q_proj", "v_proj"), ("k_proj", "up_proj")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_adapters_in_a_bundle_are_the_merged_weights(tiny_model_dir, tmp_path, family, targets):
    """A bundle's adapters give the merged model's logits: exactly in 32 bits; in 8, equalised, as near as the merged bundle."""
    model_dir = tiny_model_dir(family)
    loras = {"x": make_adapter(model_dir, tmp_path / "x", targets)}
    base = read_weights(model_dir)
    expected = logits(
        read_config(model_dir), {**base, **merge(base, read_adapter(loras["x"], read_config(model_dir))[1])}
    )
    plain = export_bundle(model_dir, tmp_path / "plain", tails={"base": None}, loras=loras, bits=32)
    assert relative_error(logits(read_config(model_dir), stored_weights(plain, "x")), expected) < LIMIT
    calibration = Calibration([list(range(100))])
    eight = export_bundle(model_dir, tmp_path / "8", loras=loras, bits=8, calibration=calibration)
    difference = (logits(read_config(model_dir), stored_weights(eight, "x")) - expected).abs().mean()
    merged = export_bundle(model_dir, tmp_path / "m", loras=loras, merge=True, bits=8, calibration=calibration)
    rounded = (logits(read_config(model_dir), stored_weights(merged, "x")) - expected).abs().mean()
    assert difference < 1.3 * rounded + 1e-3  # the base's rounding, which the merged bundle has as well


def test_the_layout_of_a_bundle_with_adapters(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    loras = {
        n: make_adapter(model_dir, tmp_path / n, ("q_proj", "v_proj", "down_proj"), seed=i) for i, n in enumerate("ab")
    }
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "bundle", tails={"base": None}, loras=loras, bits=32))
    assert (bundle.members, bundle.kinds) == (("base", "a", "b"), ("base", "adapter", "adapter"))
    assert (bundle.split_layer, set(bundle.graphs.tails)) == (0, {"base", "a", "b"})
    tensors = load_file(bundle.path / "model.safetensors")
    shapes = {n.split("layers.3.")[1]: t.shape for n, t in tensors.items() if n.startswith("members.a.model.layers.3.")}
    assert shapes == {
        "self_attn.qkv_proj.lora_a": (8, 64),  # the ranks of q and v, stacked
        "self_attn.qkv_proj.lora_b": (128, 8),
        "mlp.down_proj.lora_a": (4, 128),
        "mlp.down_proj.lora_b": (64, 4),
    }
    b = tensors["members.a.model.layers.3.self_attn.qkv_proj.lora_b"]
    assert not b[:64, 4:].any() and not b[64:96].any() and not b[96:, :4].any()  # blocks; no adapter for k
    assert all(t.dtype == np.float32 for n, t in tensors.items() if n.startswith("members."))


def test_merged_adapters_are_served(tiny_model_dir, tmp_path, tokenizer):
    model_dir = tiny_model_dir("llama")
    adapter = make_adapter(model_dir, tmp_path / "x")
    chunks = [tokenizer.encode("a text of a few bytes, twice"), tokenizer.encode("and another one")]
    held_out = HeldOut(chunks, EngineConfig(backend="onnx", threads=2))  # its KV cache does not round
    path = export_bundle(
        model_dir, tmp_path / "b", tails={"base": None}, loras={"x": adapter}, merge=True, bits=32, held_out=held_out
    )
    assert all(abs(member.kl) < 1e-5 and member.top1 > 0.98 for member in read_parity(path).members)


def test_tails_and_adapters_in_one_bundle(tiny_model_dir, tmp_path):
    from motet.runtime.checkpoints.members.tail import write_tail

    model_dir = tiny_model_dir("llama")
    weights = {n: w * 1.1 for n, w in read_weights(model_dir).items() if ".layers.3." in n}
    digest = {"name": "tiny", "digest": checkpoint_digest(model_dir)}
    write_tail(tmp_path / "t", {"base": digest, "split_layer": 3}, weights)
    loras = {"x": make_adapter(model_dir, tmp_path / "x")}
    bundle = Bundle.load(export_bundle(model_dir, tmp_path / "b", tails={"t": tmp_path / "t"}, loras=loras))
    assert bundle.kinds == ("tail", "adapter")
    assert (bundle.split_layer, set(bundle.graphs.tails)) == (0, {"t", "x"})


def test_bad_adapters(tiny_model_dir, tmp_path):
    model_dir = tiny_model_dir("llama")
    path = make_adapter(model_dir, tmp_path / "x")
    with pytest.raises(InvalidEnsembleError, match="given twice"):
        export_bundle(model_dir, tmp_path / "b", tails={"x": None}, loras={"x": path})
    with pytest.raises(ConfigError, match="2 tail layers are too few: a member changes layers from 0 on"):
        export_bundle(model_dir, tmp_path / "b", loras={"x": path}, num_tail_layers=2)
    with pytest.raises(BundleError, match="was trained on a base"):
        export_bundle(tiny_model_dir("qwen2"), tmp_path / "b", loras={"x": path})
    with pytest.raises(NotFoundError, match="no member at"):
        export_bundle(model_dir, tmp_path / "b", loras={"x": tmp_path})
    with pytest.raises(ConfigError, match="is an adapter; give it with --lora"):
        export_bundle(model_dir, tmp_path / "b", tails={"x": path})
    manifest = json.loads((path / "adapter.json").read_text())
    (path / "adapter.json").write_text(json.dumps({**manifest, "format": 9}))
    with pytest.raises(BundleError, match="format 9"):
        read_adapter(path, read_config(model_dir))
    assert not (tmp_path / "b").exists()
