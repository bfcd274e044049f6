"""Qwen2-Audio and Voxtral: a Qwen2 or a Llama below `text_config`, with an audio tower beside it, which `encoders` reads."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedModelError, shown
from ..config import DecoderConfig
from .family import Family, Json, require
from .keys import check_keys_read
from .llama import LLAMA
from .qwen2 import QWEN2

KEYS = frozenset(
    [
        "text_config",
        "audio_config",
        "audio_token_id",
        "audio_token_index",
        "projector_hidden_act",
        "tie_word_embeddings",
        "vocab_size",
        "hidden_size",
    ]
)
_OF_TRAINING = frozenset({"ignore_index"})
# Of transformers, for keys that config.json leaves out.
_QWEN2_DEFAULTS: Json = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}
_VOXTRAL_DEFAULTS: Json = {
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000.0,
    "head_dim": 128,
}


def text_values(values: Json) -> Json:
    """`text_config`, with what it leaves out. Raises `KeyError`, `TypeError`."""
    _, defaults = _TEXT[values["model_type"]]
    given = {key: value for key, value in values["text_config"].items() if value is not None}
    own = {**defaults, **given}
    if given.get("rope_parameters"):
        own.pop("rope_theta", None)
    return own


def _config(values: Json) -> DecoderConfig:
    family, _ = _TEXT[values["model_type"]]
    text = text_values(values)
    if text.get("model_type", family.name) != family.name:
        raise UnsupportedModelError(
            f"text_config has model_type {shown(text['model_type'])}; the text model is a {family.name}"
        )
    for name in ("vocab_size", "hidden_size"):
        require({name: values[name]} if values.get(name) is not None else {}, name, (text[name],))
    tied = values.get("tie_word_embeddings", False)
    require(text, "tie_word_embeddings", (tied,))
    own = {**text, "model_type": family.name, "tie_word_embeddings": tied}
    check_keys_read(own, family.keys)
    return replace(family.config(own), family=values["model_type"])


_NAMES = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    *("input_layernorm", "post_attention_layernorm"),
)
# First as transformers names them when it runs the model (so are adapters), then as it stores them.
_MODULES = {
    f"{prefix}.{stored}": own
    for prefix in ("model.language_model", "language_model.model")
    for stored, own in {
        "embed_tokens": "model.embed_tokens",
        **{f"layers.{{}}.{name}": f"model.layers.{{}}.{name}" for name in _NAMES},
        "norm": "model.norm",
    }.items()
} | {"lm_head": "lm_head", "language_model.lm_head": "lm_head"}
_TEXT: dict[str, tuple[Family, Json]] = {
    "qwen2_audio": (QWEN2, _QWEN2_DEFAULTS),
    "voxtral": (LLAMA, _VOXTRAL_DEFAULTS),
}


def _family(name: str, projector: dict[str, str]) -> Family:
    """`projector`: its modules' names in the checkpoint → those of the page."""

    def own(prefix: str) -> dict[str, str]:
        return {
            f"{prefix}audio_tower.": "tower.",
            **{f"{prefix}multi_modal_projector.{stored}.": f"{page}." for stored, page in projector.items()},
        }

    return Family(name, KEYS | _OF_TRAINING, _config, modules=_MODULES, encoders=own("") | own("model."))


QWEN2_AUDIO = _family("qwen2_audio", {"linear": "projector"})
VOXTRAL = _family("voxtral", {"linear_1": "projector.0", "linear_2": "projector.2"})
