"""Checkpoints of bitsandbytes: what transformers saves is what we read; damage and other tools are said."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from motet.export.bundle_writer import export_bundle
from motet.runtime.checkpoints.decoder import Decoder
from motet.runtime.checkpoints.huggingface import read_config, read_weights
from motet.runtime.errors import BundleError, MissingPackageError, UnsupportedModelError
from motet.runtime.model.bundle import Bundle
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

KINDS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}
TOKENS = torch.arange(3, 35)[None]


def quantised(source: Path, out: Path, kind: str) -> Any:
    """Transformers' own quantised model of `source`, saved to `out`."""
    config = transformers.BitsAndBytesConfig(**KINDS[kind], bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(out)
    shutil.copy(source / "tokenizer.json", out)
    shutil.copy(source / "tokenizer_config.json", out)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_4_bits_have_transformers_own_logits(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str, kind: str
) -> None:
    model = quantised(tiny_model_dir(family), tmp_path, kind)
    # in evaluation mode bitsandbytes repacks a CPU's weights and computes in bfloat16
    for module in model.modules():
        module.training = hasattr(module, "quant_state")
    with torch.no_grad():
        ours = Decoder.from_weights(read_config(tmp_path), read_weights(tmp_path))(TOKENS)
        plain = Decoder.from_weights(read_config(tmp_path), read_weights(tiny_model_dir(family)))(TOKENS)
        theirs = model(TOKENS).logits
    assert (ours - theirs).abs().mean() < 1e-3 * (theirs - plain).abs().mean()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_8_bits_are_half_a_step_off_at_most(tiny_model_dir: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Not the logits: LLM.int8 rounds the activations too. A row's step is its largest magnitude / 127; bitsandbytes rounds
    the weight to float16 first, which moves it by 2⁻¹¹ of itself, 127 / 2048 of a step at most."""
    quantised(tiny_model_dir(family), tmp_path, "int8")
    ours, plain = read_weights(tmp_path), read_weights(tiny_model_dir(family))
    changed = 0
    for name, weight in plain.items():
        if weight.ndim == 2 and "_proj" in name:
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((ours[name] - weight).abs() <= (0.5 + 127 / 2048) * step).all(), name
            changed += not torch.equal(ours[name], weight)
        else:
            assert torch.equal(ours[name], weight), name
    assert changed >= 16


def test_weights_without_their_scales_are_refused(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    """What is left are integers, which have the right shape."""
    quantised(tiny_model_dir("llama"), tmp_path, "int8")
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.self_attn.q_proj."
    kept = {name: t for name, t in tensors.items() if not name.startswith(lost) or name == f"{lost}weight"}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="is I8; weights are"):
        read_weights(tmp_path)


def test_it_is_exported_like_a_plain_one(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    quantised(tiny_model_dir("llama"), tmp_path / "model", "nf4")
    export_bundle(tmp_path / "model", tmp_path / "bundle", bits=8)
    assert Bundle.load(tmp_path / "bundle").quantisation["bits"] == 8


def test_damage_is_said(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    quantised(tiny_model_dir("llama"), tmp_path, "nf4")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"

    save_file({**tensors, name: tensors[name][:-8]}, path)
    with pytest.raises(BundleError, match=r"up_proj\.weight' is damaged"):
        read_weights(tmp_path)

    save_file({key: value for key, value in tensors.items() if key != f"{name}.quant_map"}, path)
    with pytest.raises(BundleError, match=r"up_proj\.weight' is damaged"):
        read_weights(tmp_path)

    save_file({key: value for key, value in tensors.items() if key != name}, path)
    with pytest.raises(BundleError, match="is there without the weight"):
        read_weights(tmp_path)


def test_damaged_scales_of_8_bits(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> None:
    quantised(tiny_model_dir("llama"), tmp_path, "int8")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    scales = "model.layers.0.mlp.up_proj.SCB"
    save_file({**tensors, scales: tensors[scales][:-1].clone()}, path)
    with pytest.raises(BundleError, match="scales"):
        read_weights(tmp_path)


def test_without_the_library(
    tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised(tiny_model_dir("llama"), tmp_path, "nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        read_weights(tmp_path)
