"""The files of a model with an encoder: what is published is read, and any other setting is refused by name."""

from __future__ import annotations

import copy
import json

import pytest
from helpers.media import PREPROCESSOR, write_image_model
from motet.runtime.checkpoints.encoders import encoder_pages, read_encoders
from motet.runtime.errors import BundleError, ConfigError, MotetError, NotFoundError, UnsupportedModelError
from motet.runtime.model.encoders import family_encoders
from motet.runtime.model.encoders.image import ImageEncoder
from motet.runtime.model.families import decoder_config

TEXT = {
    "_flash_attn_2_enabled": True,
    "_name_or_path": "None",
    "architectures": ["VLlama3ForCausalLM"],
    "head_dim": 64,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "neftune_noise_alpha": 0.0,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "perceiver_config": {"_attn_implementation_autoset": False, "resampler_depth": 6},
    "pixel_shuffle_factor": 4,
    "qk_layer_norms": False,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "use_resampler": False,
    "vocab_size": 49280,
}
CONFIG = {
    "architectures": ["Idefics3ForConditionalGeneration"],
    "image_token_id": 49190,
    "model_type": "idefics3",
    "scale_factor": 4,
    "text_config": TEXT,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vision_config": {
        "hidden_size": 768,
        "image_size": 512,
        "max_image_size": {"longest_edge": 512},
        "model_type": "idefics3",
        "num_attention_heads": 12,
        "patch_size": 16,
        "size": {"longest_edge": 2048},
        "tie_word_embeddings": False,
        "use_base_siglip": False,
    },
    "vocab_size": 49280,
}
IMAGES = PREPROCESSOR | {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}
PROCESSOR = {"image_seq_len": 64, "processor_class": "Idefics3Processor"}


def test_smolvlm_as_published():
    encoder, decoder = family_encoders(CONFIG, IMAGES, PROCESSOR)["image"], decoder_config(CONFIG)
    assert (decoder.num_layers, decoder.rope_theta, decoder.tied_head, decoder.vocab_size) == (30, 100000, False, 49280)
    vision = encoder.vision
    assert (vision.hidden_size, vision.intermediate_size, vision.num_layers, vision.side) == (768, 3072, 12, 32)
    assert (encoder.rows_per_tile, encoder.token_id, encoder.processor.longest_edge) == (64, 49190, 2048)
    assert encoder.expansion(4, 4).count("<image>") == 17 * 64
    assert ImageEncoder.from_dict(json.loads(json.dumps(encoder.to_dict()))) == encoder
    within = {**PROCESSOR, "image_processor": IMAGES | {"image_processor_type": "Idefics3ImageProcessorFast"}}
    assert family_encoders(CONFIG, {}, within) == family_encoders(CONFIG, IMAGES, within) == {"image": encoder}


def test_other_families_have_no_encoder():
    assert family_encoders({"model_type": "llama"}, {}, {}) == {}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("vision", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("vision", {"num_channels": 1}, "num_channels"),
        ("vision", {"patch_dropout": 0.1}, "patch_dropout=0.1"),
        ("vision", {"num_attention_heads": 11}, "multiple of num_heads"),
        ("vision", {"patch_size": [16, 16]}, "patch_size"),
        ("vision", {"layer_norm_eps": "small"}, "norm_eps"),
        ("images", {"do_convert_rgb": False}, "do_convert_rgb=false"),
        ("images", {"do_resize": "yes"}, "do_resize"),
        ("images", {"do_center_crop": True}, r"\['do_center_crop'\]"),
        ("images", {"size": {"height": 8, "width": 8}}, "size="),
        ("images", {"size": {"longest_edge": 100_000}}, "longest_edge must be"),
        ("images", {"max_image_size": {"longest_edge": 500}}, "no multiple of 64"),
        ("images", {"max_image_size": 512}, "max_image_size=512"),
        ("images", {"do_resize": False}, "must have a longest_edge"),
        ("images", {"max_image_size": {"longest_edge": 64}}, "at most 16 tiles of 64 pixels"),
        ("images", {"resample": 9}, "resample"),
        ("images", {"image_std": [0.5, 0.0, 0.5]}, "std must be"),
        ("images", {"image_mean": [0.5]}, "mean must be three"),
        ("images", {"image_mean": 0.5}, "lack or misstate"),
        ("processor", {"image_seq_len": 81}, "image_seq_len 81"),
        ("processor", {"num_frames": 4}, "num_frames"),
        ("processor", {"image_processor": IMAGES | {"resample": 3}}, "differ"),
        ("config", {"image_token_id": "<image>"}, "placeholder's id"),
        ("config", {"scale_factor": 3}, "no multiple of 48|pixel_shuffle_factor"),
    ],
)
def test_any_other_setting_is_refused(file, change, message):
    files = copy.deepcopy({"config": CONFIG, "images": IMAGES, "processor": PROCESSOR})
    files["vision"] = files["config"]["vision_config"]
    files[file].update(change)
    with pytest.raises((UnsupportedModelError, ConfigError), match=message):
        family_encoders(files["config"], files["images"], files["processor"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral'"),
        ({"use_resampler": True}, "use_resampler"),
        ({"qk_layer_norms": True}, "qk_layer_norms"),
        ({"pixel_shuffle_factor": 2}, "pixel_shuffle_factor"),
        ({"attention_temperature": 2}, "attention_temperature=2"),
        ({"vocab_size": 100}, "vocab_size"),
    ],
)
def test_the_text_model_s_settings_are_refused_as_a_llama_s(change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_config(CONFIG | {"text_config": TEXT | change})


def edited(path, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.slow
def test_weights_are_used_or_refused(tmp_path):
    name = "model.vision_model.encoder.layers.1.mlp.fc1.bias"
    cases = [
        (lambda t: t.pop(name), BundleError, "missing.*fc1.bias"),
        (lambda t: t.update({name: t[name][:7].clone()}), BundleError, "of other shapes.*fc1.bias"),
        (lambda t: t[name].fill_(float("nan")), BundleError, "NaN"),
        (lambda t: t.update({f"{name}2": t[name].clone()}), UnsupportedModelError, "does not use.*bias2"),
        (lambda t: t.update({name: t[name].int()}), UnsupportedModelError, "I32"),
    ]
    for number, (change, error, message) in enumerate(cases):
        path = write_image_model(tmp_path / str(number))
        edited(path, change)
        with pytest.raises(error, match=message):
            encoder_pages(path)["image"]


@pytest.mark.slow
def test_a_model_without_its_processor_is_refused(tmp_path):
    path = write_image_model(tmp_path / "m")
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"neither preprocessor_config\.json nor"):
        read_encoders(path)
    (path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(MotetError, match="must hold a JSON object"):
        read_encoders(path)
