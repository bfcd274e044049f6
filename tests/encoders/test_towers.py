"""Towers of other models: their values are those of the program that made them, and damaged files are refused."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
import torch
from helpers.colours import write_siglip
from helpers.towers import ctranslate2_bytes
from motet.finetune.projector_params import ProjectorParams
from motet.finetune.training.tune_projector import new_page
from motet.runtime.checkpoints.ctranslate2 import Variables
from motet.runtime.checkpoints.encoders.towers import read_source
from motet.runtime.errors import BundleError, ConfigError, MotetError, NotFoundError, UnsupportedModelError


def page_of(source, **changes):
    return new_page(read_source(source), source, ProjectorParams(**changes), "<m>", 5, 48, 0)


@torch.no_grad()
def test_siglip_is_transformers(tmp_path):
    import transformers

    write_siglip(tmp_path, edge=32)
    model = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()
    page = page_of(tmp_path, pool=1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = model(pixels).last_hidden_state
    assert torch.allclose(page.features(pixels), wanted, atol=1e-5 * float(wanted.abs().max()))
    pooled = page_of(tmp_path, pool=2).features(pixels)
    square = wanted.view(2, 2, 2, 2, 2, -1).transpose(2, 3).reshape(2, 4, -1)
    assert torch.allclose(pooled, square, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("file", "changes", "match"),
    [
        ("config.json", {"hidden_act": "gelu"}, "hidden_act"),
        ("config.json", {"more_heads": 3}, "more_heads"),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "squares of 24"),
        ("preprocessor_config.json", {"do_center_crop": True}, "do_center_crop"),
        ("preprocessor_config.json", {"do_tile": True}, "do_tile"),
    ],
)
def test_settings_that_are_not_computed_are_refused(tmp_path, file, changes, match):
    write_siglip(tmp_path)
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(values | changes))
    with pytest.raises(UnsupportedModelError, match=match):
        read_source(tmp_path)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """(directory, the model) of a tiny random Whisper."""
    import transformers

    path = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    sizes = {f"{kind}_{name}": value for kind in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.WhisperConfig(
        d_model=32, num_mel_bins=80, max_source_positions=1500, max_target_positions=20, vocab_size=60, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, **sizes,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    transformers.WhisperFeatureExtractor().save_pretrained(path)
    return path, model.model.encoder


def variables_of(encoder, dtype):
    """An encoder's weights as CTranslate2's converter stores them; matrices of linear layers in int8 with scales of their
    rows."""
    state = {name: tensor.detach().numpy() for name, tensor in encoder.state_dict().items()}
    zeros = np.zeros(32, np.float32)
    found = {"encoder/num_heads": np.array(4, np.int16), "decoder/alibi": np.array(0, np.int8)}

    def put(name, value, is_linear=False):
        value = np.ascontiguousarray(value, np.float32)
        if dtype == "int8" and is_linear:
            scale = 127 / np.abs(value).max(1)
            found[name] = np.rint(value * scale[:, None]).astype(np.int8)
            found[f"{name}_scale"] = scale.astype(np.float32)
        else:
            found[name] = value.astype("float16" if dtype == "float16" else "float32")

    put("encoder/position_encodings/encodings", state["embed_positions.weight"])
    for name in ("conv1", "conv2"):
        put(f"encoder/{name}/weight", state[f"{name}.weight"])
        put(f"encoder/{name}/bias", state[f"{name}.bias"])
    norms = {"layer_norm": "layer_norm"}
    for i in range(2):
        own, theirs = f"encoder/layer_{i}", f"layers.{i}"
        norms |= {f"layer_{i}/self_attention/layer_norm": f"{theirs}.self_attn_layer_norm"}
        norms |= {f"layer_{i}/ffn/layer_norm": f"{theirs}.final_layer_norm"}
        parts = [state[f"{theirs}.self_attn.{part}_proj.weight"] for part in "qkv"]
        biases = [state[f"{theirs}.self_attn.q_proj.bias"], zeros, state[f"{theirs}.self_attn.v_proj.bias"]]
        put(f"{own}/self_attention/linear_0/weight", np.concatenate(parts), True)
        put(f"{own}/self_attention/linear_0/bias", np.concatenate(biases))
        linears = (("self_attention/linear_1", "self_attn.out_proj"), ("ffn/linear_0", "fc1"), ("ffn/linear_1", "fc2"))
        for name, stored in linears:
            put(f"{own}/{name}/weight", state[f"{theirs}.{stored}.weight"], True)
            put(f"{own}/{name}/bias", state[f"{theirs}.{stored}.bias"])
    for name, stored in norms.items():
        put(f"encoder/{name}/gamma", state[f"{stored}.weight"])
        put(f"encoder/{name}/beta", state[f"{stored}.bias"])
    return found


def write_ctranslate2(path, content):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"suppress_ids": [], "lang_ids": []}))
    (path / "model.bin").write_bytes(content)
    return path


@torch.no_grad()
def check_frames(page, encoder, tolerance):
    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(1))
    wanted = encoder(mel).last_hidden_state
    found = page.tower.layer_norm(page.tower.frames(torch.cat([mel, torch.zeros(1, 80, 1)], 2)))
    assert float((found - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def test_whisper_is_transformers(whisper, tmp_path):
    import transformers

    path, encoder = whisper
    check_frames(page_of(path), encoder, 1e-5)
    bare = transformers.WhisperModel.from_pretrained(path)
    bare.save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    check_frames(page_of(tmp_path), encoder, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3), ("int8", 3e-2)])
def test_ctranslate2s_whisper_is_the_same(whisper, tmp_path, dtype, tolerance):
    """Up to what the types of its numbers leave."""
    content = ctranslate2_bytes(variables_of(whisper[1], dtype), {})
    page = page_of(write_ctranslate2(tmp_path / "ct2", content))
    check_frames(page, whisper[1], tolerance)
    assert page.encoder.tower.num_heads == 4 and page.encoder.tower.mel_bins == 80


def test_other_variables_are_refused(whisper, tmp_path):
    def refused(error, match, changes, **options):
        variables = variables_of(whisper[1], "float32") | changes
        content = ctranslate2_bytes({n: v for n, v in variables.items() if v is not None}, {}, **options)
        with pytest.raises(error, match=match):
            page_of(write_ctranslate2(tmp_path / "other", content))

    refused(UnsupportedModelError, "layer_0/gate", {"encoder/layer_0/gate": np.zeros(3, np.float32)})
    refused(
        UnsupportedModelError, "bias of k", {"encoder/layer_1/self_attention/linear_0/bias": np.ones(96, np.float32)}
    )
    refused(BundleError, "lacks a part", {"encoder/conv1/weight": None})
    refused(BundleError, "missing", {"encoder/layer_1/ffn/linear_1/bias": None})
    refused(BundleError, "NaN", {"encoder/conv1/bias": np.full(32, np.nan, np.float32)})
    refused(
        BundleError, "three parts", {"encoder/layer_0/self_attention/linear_0/weight": np.ones((95, 32), np.float32)}
    )
    refused(UnsupportedModelError, "version 5", {}, version=5)
    refused(UnsupportedModelError, "holds a 'TransformerSpec'", {}, specification="TransformerSpec")


def test_a_damaged_model_bin_is_refused_whatever_is_wrong_with_it(tmp_path):
    """Cut off anywhere, or with any byte of its header changed: a typed error, or another model, but no crash."""
    variables = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(4, np.int8),
        "b_scale": np.float32(2).reshape(()),
    }
    content = ctranslate2_bytes(variables, {"c": "a"})
    with Variables(write_ctranslate2(tmp_path, content), "WhisperSpec") as found:
        assert torch.equal(found["c"], torch.arange(6.0).view(2, 3))
        assert torch.equal(found["b"], torch.full((4,), 0.5))
        assert list(found) == ["a", "b", "b_scale", "c"]

    def opened(content):
        (tmp_path / "model.bin").write_bytes(content)
        with Variables(tmp_path, "WhisperSpec") as found:
            return dict(found)

    for length in range(len(content)):
        with pytest.raises(MotetError):
            opened(content[:length])
    with pytest.raises(BundleError, match="goes on"):
        opened(content + b"\0")
    numbers = random.Random(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] = numbers.randrange(256)
        try:
            opened(bytes(changed))
        except MotetError:
            continue
    huge = bytearray(content)
    at = content.index(b"a\0") + 3  # behind the rank: the first dimension
    huge[at : at + 4] = struct.pack("<I", 2**31)
    with pytest.raises(BundleError, match="has the shape"):
        opened(bytes(huge))


def test_what_is_no_encoder_is_refused(tmp_path, whisper):
    with pytest.raises(NotFoundError, match="no encoder"):
        read_source(tmp_path / "missing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedModelError, match="'bert'"):
        read_source(tmp_path)
    with pytest.raises(ConfigError, match="must divide"):
        page_of(whisper[0], pool=7)
