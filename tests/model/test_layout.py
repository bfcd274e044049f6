"""The table of a decoder: complete, and what the checkpoints' and the bundles' readers need of it."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from helpers.compare import relative_error
from helpers.models import EXPERTS, FAMILIES
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.errors import BundleError, UnsupportedModelError
from motet.runtime.model.families import FAMILIES as KNOWN
from motet.runtime.model.layout import decoder_layout
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_the_torch_page_has_exactly_the_tensors_of_the_table(tiny_model_dir, family):
    config = read_config(tiny_model_dir(family))
    for changed in (
        config,
        dataclasses.replace(config, qk_norm=None if config.qk_norm else "head", mlp_bias=not config.mlp_bias),
    ):
        with torch.device("meta"):
            state = Decoder(changed).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in state.items()} == decoder_layout(
            changed
        ).checkpoint_shapes()


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_the_source_of_an_input_scales_its_channels(tiny_model_dir, family):
    """Halving channel j of a source and doubling column j of the layer that it feeds changes nothing."""
    config, weights = read_config(tiny_model_dir(family)), read_weights(tiny_model_dir(family))
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    sources = 0
    for linear in decoder_layout(config).linears:
        if linear.source is None:
            continue
        sources += 1
        for kind in ("weight", "bias"):
            if f"{linear.source}.{kind}" in changed:
                changed[f"{linear.source}.{kind}"][3] /= 2
        for part in linear.parts:
            changed[f"{part.name}.weight"][:, 3] *= 2
    expected = 0
    for layer in decoder_layout(config).layers:
        norms = 0 if config.shared_norm else 1
        expected += norms * (layer.attention_norm is not None)
        expected += norms * (layer.mlp_norm is not None and layer.router is None)
        expected += len(layer.mlps) * (config.activation not in ("gelu", "gelu_erf"))
    assert sources == expected
    token_ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (Decoder.from_weights(config, own).double()(token_ids) for own in (weights, changed))
    assert relative_error(after, before) < 1e-6


def test_a_checkpoint_may_store_the_parts_as_one(tiny_model_dir, tmp_path):
    """Fused as a bundle fuses them; q has more rows than k and v."""
    expected = read_weights(tiny_model_dir("llama"))
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    for linear in decoder_layout(read_config(tmp_path / "m")).linears:
        pieces = [tensors.pop(f"{part.name}.weight") for part in linear.parts]
        tensors[f"{linear.name}.weight"] = torch.cat(pieces)
    save_file(tensors, path)
    found = read_weights(tmp_path / "m")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    save_file({name: t[:-1] if "qkv" in name else t for name, t in tensors.items()}, path)
    with pytest.raises(BundleError, match="q_proj"):
        read_weights(tmp_path / "m")


def test_names_of_a_family():
    gpt2 = KNOWN["gpt2"]
    assert gpt2.canonical_name("transformer.h.11.attn.c_attn.weight") == "model.layers.11.self_attn.qkv_proj.weight"
    assert gpt2.canonical_name("wte.weight") == "model.embed_tokens.weight"
    assert gpt2.canonical_name("h.0.attn.bias") is None
    with pytest.raises(UnsupportedModelError, match="c_other"):
        gpt2.canonical_name("h.0.attn.c_other.weight")
    assert KNOWN["llama"].canonical_name("model.norm.weight") == "model.norm.weight"
