"""The files of a model with an encoder of sounds: what is published is read, and any other setting is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
from helpers.sounds import extractor, sound_kind, write_sound_model
from motet.export.bundle_writer import export_bundle
from motet.runtime.api.config import EngineConfig
from motet.runtime.backends.onnx.sessions import open_session, pool_threads
from motet.runtime.checkpoints.encoders import encoder_pages, read_encoders
from motet.runtime.engine.engine import Engine
from motet.runtime.engine.open import bundle_tokenizer
from motet.runtime.errors import BundleError, ConfigError, NotFoundError, UnsupportedModelError
from motet.runtime.model.bundle import MANIFEST, Bundle
from motet.runtime.model.encoders import family_encoders
from motet.runtime.model.encoders.audio import AudioEncoder
from motet.runtime.model.families import decoder_config

QWEN2 = {
    "architectures": ["Qwen2AudioForConditionalGeneration"],
    "audio_config": {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 128,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layerdrop": 0.0,
        "d_model": 1280,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_function": "gelu",
        "activation_dropout": 0.0,
        "scale_embedding": False,
        "init_std": 0.02,
        "max_source_positions": 1500,
    },
    "audio_token_index": 151646,
    "ignore_index": -100,
    "model_type": "qwen2_audio",
    "text_config": {
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "intermediate_size": 11008,
        "max_position_embeddings": 8192,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
        "vocab_size": 156032,
    },
    "torch_dtype": "bfloat16",
    "vocab_size": 156032,
}
VOXTRAL = {
    "architectures": ["VoxtralForConditionalGeneration"],
    "audio_config": {
        "model_type": "voxtral_encoder",
        "vocab_size": 51866,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "num_key_value_heads": None,
        "scale_embedding": False,
        "activation_function": "gelu",
        "num_mel_bins": 128,
        "max_source_positions": 1500,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "dropout": 0.0,
        "layerdrop": 0.0,
        "activation_dropout": 0.0,
    },
    "audio_token_id": 24,
    "hidden_size": 3072,
    "model_type": "voxtral",
    "projector_hidden_act": "gelu",
    "text_config": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 30,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000000.0,
        "vocab_size": 131072,
    },
    "vocab_size": 131072,
}
EXTRACTOR = {
    "chunk_length": 30,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen2AudioProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def test_qwen2_audio_as_published():
    encoder, decoder = family_encoders(QWEN2, EXTRACTOR, {})["audio"], decoder_config(QWEN2)
    assert (decoder.family, decoder.hidden_size, decoder.num_layers, decoder.num_kv_heads) == (
        "qwen2_audio",
        4096,
        32,
        32,
    )
    assert (decoder.vocab_size, decoder.qkv_bias, decoder.out_bias, decoder.rope_theta) == (156032, True, False, 10000)
    assert (encoder.token, encoder.token_id, encoder.max_seconds) == ("<|AUDIO|>", 151646, 30)
    assert [encoder.rows(samples) for samples in (480_000, 16_000, 16_001, 640)] == [750, 25, 25, 1]
    assert (encoder.width, encoder.output_size) == (1280, 4096)
    assert AudioEncoder.from_dict(json.loads(json.dumps(encoder.to_dict()))) == encoder
    within = {"feature_extractor": EXTRACTOR, "processor_class": "Qwen2AudioProcessor"}
    assert family_encoders(QWEN2, {}, within) == family_encoders(QWEN2, EXTRACTOR, within) == {"audio": encoder}


def test_voxtral_as_published():
    encoder, decoder = family_encoders(VOXTRAL, EXTRACTOR, {})["audio"], decoder_config(VOXTRAL)
    assert (decoder.family, decoder.head_size, decoder.rope_theta, decoder.tied_head) == ("voxtral", 128, 1e8, False)
    assert [encoder.rows(samples) for samples in (1, 480_000, 480_001, 5 * 480_000)] == [375, 375, 750, 1875]
    assert (encoder.width, encoder.projector, encoder.projector_bias, encoder.token_id) == (5120, "mlp", False, 24)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("audio", {"activation_function": "relu"}, "activation_function='relu'"),
        ("audio", {"scale_embedding": True}, "scale_embedding"),
        ("audio", {"rotary": True}, "rotary=True"),
        ("audio", {"encoder_attention_heads": 7}, "multiple of num_heads"),
        ("audio", {"encoder_layers": 0}, "num_layers"),
        ("audio", {"d_model": "wide"}, "hidden_size"),
        ("audio", {"num_mel_bins": 80}, "feature_size 128, and the tower num_mel_bins 80"),
        ("audio", {"max_source_positions": 750}, "chunks of 480000 samples"),
        ("audio", {"max_source_positions": [1500]}, "must be an integer"),
        ("extractor", {"feature_size": 80}, "feature_size 80"),
        ("extractor", {"chunk_length": 60}, "chunks of 960000 samples"),
        ("extractor", {"chunk_length": "ab", "sampling_rate": 10**11}, "must be an integer"),
        ("extractor", {"dither": 0.1}, "dither=0.1"),
        ("extractor", {"padding_value": 1.0}, "padding_value"),
        ("extractor", {"padding_side": "left"}, "padding_side"),
        ("extractor", {"do_normalize": True}, "do_normalize"),
        ("extractor", {"n_fft": 100}, "n_fft must be"),
        ("extractor", {"sampling_rate": "fast"}, "lack or misstate|sampling_rate|chunks of"),
        ("extractor", {"mel_norm": "htk"}, r"\['mel_norm'\]"),
        ("extractor", {"feature_extractor_type": "SeamlessM4TFeatureExtractor"}, "feature_extractor_type"),
        ("processor", {"feature_extractor": EXTRACTOR | {"n_fft": 512}}, "differ"),
        ("processor", {"max_audio": 3}, r"\['max_audio'\]"),
        ("config", {"audio_token_id": 7}, "which differ"),
        ("config", {"audio_token_index": "<|AUDIO|>"}, "placeholder's id"),
    ],
)
def test_any_other_setting_is_refused(file, change, message):
    files = copy.deepcopy({"config": QWEN2, "extractor": EXTRACTOR, "processor": {}})
    files["audio"] = files["config"]["audio_config"]
    files[file].update(change)
    with pytest.raises((UnsupportedModelError, ConfigError), match=message):
        family_encoders(files["config"], files["extractor"], files["processor"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": QWEN2["text_config"] | {"model_type": "llama"}}, "the text model is a qwen2"),
        ({"text_config": QWEN2["text_config"] | {"use_mrope": True}}, "use_mrope"),
        ({"text_config": QWEN2["text_config"] | {"attention_scale": 2}}, "attention_scale"),
        ({"text_config": QWEN2["text_config"] | {"tie_word_embeddings": True}}, "tie_word_embeddings"),
        ({"vocab_size": 9}, "vocab_size"),
        ({"vision_config": {}}, "vision_config"),
    ],
)
def test_the_text_model_s_settings_are_refused_as_a_qwen2_s(change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_config(QWEN2 | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad": "30s"}, "pad must be one of"),
        ({"pooling": "max"}, "pooling must be"),
        ({"pool": 3}, "must divide"),
        ({"pool": 0}, "pool of the encoder"),
        ({"projector": "mlp"}, "projector_size is of a projector that is not linear"),
        ({"projector_size": 64}, "projector_size is of a projector that is not linear"),
        ({"projector_bias": 1}, "projector_bias"),
        ({"token": ""}, "must be a token"),
        ({"token_id": -1}, "must be a token id"),
        ({"around": "<a>"}, "around must be"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"max_seconds": 1e9}, "max_seconds"),
    ],
)
def test_encoders_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(sound_kind().encoder, **change)


@pytest.mark.slow
def test_weights_are_used_or_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    name = "audio_tower.layers.1.fc1.bias"
    cases = [
        (lambda t: t.pop(name), BundleError, "missing.*fc1.bias"),
        (lambda t: t.update({name: t[name][:7].clone()}), BundleError, "of other shapes.*fc1.bias"),
        (lambda t: t[name].fill_(float("nan")), BundleError, "NaN"),
        (lambda t: t.update({f"{name}2": t[name].clone()}), UnsupportedModelError, "does not use.*bias2"),
        (lambda t: t.update({name: t[name].int()}), UnsupportedModelError, "I32"),
        (lambda t: t.update({"multi_modal_projector.extra.weight": t[name].clone()}), UnsupportedModelError, "extra"),
    ]
    for number, (change, error, message) in enumerate(cases):
        path = write_sound_model(tmp_path / str(number))
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")
        with pytest.raises(error, match=message):
            export_bundle(path, tmp_path / "b", graphs=False)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"neither preprocessor_config\.json nor"):
        read_encoders(path)


@pytest.mark.slow
@pytest.mark.native
def test_the_bundle_has_the_encoder_or_is_refused(tmp_path):
    path = export_bundle(write_sound_model(tmp_path / "m"), tmp_path / "b", graphs=False)
    bundle = Bundle.load(path)
    assert bundle.encoders == read_encoders(tmp_path / "m")
    assert bundle.encoder_files == {"audio": ("encoder-audio.onnx", "encoder-audio.safetensors")}
    manifest = json.loads((path / MANIFEST).read_text())
    changes = [
        (lambda e: e.update(token_id=320), "placeholder of audio has the id 320"),
        (lambda e: e.update(speed=1), "unknown AudioEncoder key"),
        (lambda e: e["tower"].update(speed=1), "unknown WhisperConfig key"),
        (lambda e: e["processor"].pop("n_fft"), "n_fft"),
        (lambda e: e.update(graph="../x.onnx"), "plain file names"),
        (lambda e: e["tower"].update(mel_bins=17), "inputs and outputs of"),
        (lambda e: e.update(output_size=65), "inputs and outputs of"),
    ]
    for change, message in changes:
        changed = copy.deepcopy(manifest)
        change(changed["encoders"]["audio"])
        (path / MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(BundleError, match=message):
            Engine.from_bundle(path, EngineConfig(threads=1), verify=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
def test_the_graph_computes_what_the_page_computes(tmp_path, family):
    """Also for pieces of the largest and the smallest number of frames, and for frames that fill no row."""
    import numpy as np
    import torch

    model_dir = write_sound_model(tmp_path / "m", family)
    bundle = export_bundle(model_dir, tmp_path / "b", graphs=False)
    session = open_session(str(bundle / "encoder-audio.onnx"), pool_threads() or 1)
    page = encoder_pages(model_dir)["audio"]
    for frames in (4, 7, 99, 100):
        mel = np.random.default_rng(frames).uniform(-1, 1, (2, 16, 2 * frames + 1)).astype(np.float32)
        with torch.no_grad():
            expected = page(torch.from_numpy(mel)).numpy()
        [rows] = session.run(None, {"mel": mel})
        assert rows.shape == expected.shape == (2, frames // page.encoder.pool, 64)
        assert np.abs(rows - expected).max() < 1e-4


@pytest.mark.slow
def test_a_directory_without_a_template_gets_the_processor_s(tmp_path):
    """As transformers takes its own, whatever the tokenizer's settings have."""
    import transformers

    path = write_sound_model(tmp_path / "m")
    (path / "chat_template.jinja").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages[0].content }}"}))
    export_bundle(path, tmp_path / "b", graphs=False)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    theirs = transformers.Qwen2AudioProcessor(extractor(path), tokenizer)
    own = bundle_tokenizer(Bundle.load(tmp_path / "b"))
    sound, words = {"type": "audio"}, {"type": "text", "text": "What?\n"}
    for turns in (
        [{"role": "user", "content": [sound, words, sound]}],
        [{"role": "system", "content": "Listen."}, {"role": "user", "content": [words, sound]}],
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "so?"},
            {"role": "user", "content": [sound]},
        ],
    ):
        assert own.apply_chat_template(turns) == theirs.apply_chat_template(turns, add_generation_prompt=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_audio", "voxtral"])
def test_adapters_of_the_text_model_are_read_and_of_the_encoder_refused(tmp_path, family):
    """They are PEFT's own, which names modules as transformers runs the model, and not as it stores it."""
    import peft
    import transformers

    path = write_sound_model(tmp_path / "m", family)
    kind = {"qwen2_audio": "Qwen2AudioForConditionalGeneration", "voxtral": "VoxtralForConditionalGeneration"}[family]
    for name, modules in (("text", r".*language_model.*q_proj"), ("both", r".*(language_model|audio_tower).*q_proj")):
        model = getattr(transformers, kind).from_pretrained(path)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    export_bundle(path, tmp_path / "b", loras={"own": tmp_path / "text"}, graphs=False)
    assert Bundle.load(tmp_path / "b").members == ("own",)
    with pytest.raises(UnsupportedModelError, match="audio_tower"):
        export_bundle(path, tmp_path / "c", loras={"own": tmp_path / "both"}, graphs=False)
