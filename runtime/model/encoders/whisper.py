"""Qwen2-Audio and Voxtral: the audio tower of config.json, and the feature extractor's file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ...errors import ConfigError, UnsupportedModelError, shown
from ..families.audio import text_values
from ..families.family import Json, require
from ..families.keys import check_keys_read
from .audio import AudioEncoder, AudioProcessor, WhisperConfig
from .checks import check_sizes
from .processor import processor_settings

_VOXTRAL_SECONDS = 2400.0  # as its authors say
# transformers gives the two towers other names for the same.
_NAMES = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_layerdrop": "layerdrop",
}
_DEFAULTS: Json = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "scale_embedding": False,
}
_WHISPER_SIZES = (
    *("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
    *("num_mel_bins", "max_source_positions"),
)
_OF_TRAINING = frozenset({"dropout", "activation_dropout", "layerdrop", "init_std", "vocab_size"})
_PROCESSOR: Json = {  # of transformers' WhisperFeatureExtractor
    "feature_size": 80,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 30,
    "n_fft": 400,
    "padding_value": 0.0,
    "padding_side": "right",
    "dither": 0.0,
    "do_normalize": False,
    "feature_extractor_type": "WhisperFeatureExtractor",
}
# They follow from the others, or are of the program that uses the features.
_NEUTRAL = frozenset(
    {"n_samples", "nb_max_frames", "mel_filters", "return_attention_mask", "processor_class", "_processor_class"}
)
_OF_THE_WHOLE = frozenset({"tokenizer", "chat_template", "auto_map"})
_QWEN2_TOKENS = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}

# Of a directory that brings no template for parts: transformers' processor has one of its own, whatever the tokenizer says.
QWEN2_AUDIO_TEMPLATE = (
    "{%- set heard = namespace(sounds=0) -%}{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'audio' -%}{%- set heard.sounds = heard.sounds + 1 -%}"
    "{{ 'Audio ' ~ heard.sounds ~ ': <|audio_bos|><|AUDIO|><|audio_eos|>\n' }}"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def qwen2_audio_encoder(config: Json, preprocessor: Json, processor: Json) -> AudioEncoder:
    """Raises `UnsupportedModelError`, and what a missing key or a wrong type raises (see `family_encoders`)."""
    tower, audio = _tower(config, preprocessor, processor, frozenset(_QWEN2_TOKENS))
    tokens = {name: processor.get(name) or default for name, default in _QWEN2_TOKENS.items()}
    given = [config[name] for name in ("audio_token_index", "audio_token_id") if config.get(name) is not None]
    if len(set(given)) > 1:
        raise UnsupportedModelError(
            f"config.json has audio_token_index and audio_token_id, which differ: {shown(given)}"
        )
    return AudioEncoder(
        tower=tower,
        processor=audio,
        pad="none",
        pooling="average",
        pool=2,
        projector="linear",
        projector_size=None,
        projector_bias=True,
        output_size=text_values(config)["hidden_size"],
        token=tokens.pop("audio_token"),
        token_id=given[0] if given else 151646,
        around=tuple(tokens.values()),
        max_seconds=2 * tower.max_positions * audio.hop_length / audio.sampling_rate,  # one piece
    )


def voxtral_encoder(config: Json, preprocessor: Json, processor: Json) -> AudioEncoder:
    """Raises what `qwen2_audio_encoder` raises."""
    tower, audio = _tower(config, preprocessor, processor, frozenset())
    require(config, "projector_hidden_act", ("gelu",))
    if tower.intermediate_size % tower.hidden_size:
        raise UnsupportedModelError(
            f"audio_config's intermediate_size ({tower.intermediate_size}), the width of stacked frames, is no multiple of its "
            f"hidden_size ({tower.hidden_size})"
        )
    hidden = text_values(config)["hidden_size"]
    return AudioEncoder(
        tower=tower,
        processor=audio,
        pad="piece",
        pooling="stack",
        pool=tower.intermediate_size // tower.hidden_size,
        projector="mlp",
        projector_size=hidden,
        projector_bias=False,
        output_size=hidden,
        token="[AUDIO]",
        token_id=config["audio_token_id"],
        around=("[BEGIN_AUDIO]",),
        max_seconds=_VOXTRAL_SECONDS,
    )


def whisper_tower(config: Json, preprocessor: Json, processor: Json) -> tuple[WhisperConfig, AudioProcessor]:
    """The encoder of Whisper itself. `config`: its config.json, of which the decoder's keys are not read. Raises
    `UnsupportedModelError` for an option that is not computed, `ConfigError` if a key is missing or has the wrong type."""
    try:
        sizes = {name: config[name] for name in _WHISPER_SIZES}
        options = {name: config.get(name) for name in ("activation_function", "scale_embedding")}
        return _tower({"audio_config": sizes | options}, preprocessor, processor, frozenset())
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the files of Whisper lack or misstate {error}") from error


def _tower(
    config: Json, preprocessor: Json, processor: Json, own_keys: frozenset[str]
) -> tuple[WhisperConfig, AudioProcessor]:
    """`own_keys`: further ones of processor_config.json, which the caller reads."""
    given = {_NAMES.get(key, key): value for key, value in config["audio_config"].items() if value is not None}
    audio = {**_DEFAULTS, **given}
    check_keys_read({"model_type": "audio_tower", **audio}, {*_DEFAULTS, *_OF_TRAINING})
    require(audio, "activation_function", ("gelu",))
    require(audio, "scale_embedding", (False,))
    values = _settings(preprocessor, processor, own_keys)
    if values["feature_size"] != audio["num_mel_bins"]:
        raise UnsupportedModelError(
            f"the feature extractor has feature_size {shown(values['feature_size'])}, and the tower num_mel_bins "
            f"{shown(audio['num_mel_bins'])}; use the extractor that the model was trained with"
        )
    given_sizes = SimpleNamespace(**values, max_source_positions=audio["max_source_positions"])
    check_sizes(
        given_sizes,
        ("max_source_positions", "chunk_length", "sampling_rate", "hop_length"),
        "the audio tower and its feature extractor",
    )
    positions, samples = audio["max_source_positions"], values["chunk_length"] * values["sampling_rate"]
    heard = 2 * positions * values["hop_length"]
    if samples != heard:
        raise UnsupportedModelError(
            f"the feature extractor has chunks of {shown(samples)} samples, and the tower hears {shown(heard)} "
            "(2 * max_source_positions * hop_length); use the extractor that the model was trained with"
        )
    tower = WhisperConfig(
        hidden_size=audio["hidden_size"],
        intermediate_size=audio["intermediate_size"],
        num_layers=audio["num_hidden_layers"],
        num_heads=audio["num_attention_heads"],
        mel_bins=audio["num_mel_bins"],
        max_positions=positions,
    )
    return tower, AudioProcessor(values["sampling_rate"], values["n_fft"], values["hop_length"])


def _settings(preprocessor: Json, processor: Json, own_keys: frozenset[str]) -> dict[str, Any]:
    whole = _OF_THE_WHOLE | own_keys
    found = processor_settings(preprocessor, processor, "feature_extractor", _PROCESSOR, _NEUTRAL, whole)
    for name in ("padding_value", "padding_side", "dither", "do_normalize", "feature_extractor_type"):
        require(found, name, (_PROCESSOR[name],))
    return found
