"""Idefics3 and SmolVLM: a Llama below `text_config`, with a vision tower beside it, which `encoders` reads."""

from __future__ import annotations

from dataclasses import replace

from ...errors import UnsupportedModelError, shown
from ..config import DecoderConfig
from .family import Family, Json, require
from .keys import check_keys_read
from .llama import LLAMA, llama_config

KEYS = frozenset(
    [
        "text_config",
        "vision_config",
        "image_token_id",
        "scale_factor",
        "tie_word_embeddings",
        "vocab_size",
        "hidden_size",
    ]
)
# The text model's settings of the programs that trained it: no layer of it reads them.
_OF_TRAINING = frozenset({"neftune_noise_alpha", "perceiver_config"})


def _config(values: Json) -> DecoderConfig:
    text = values["text_config"]
    family = text.get("model_type", "llama")
    if family != "llama":
        raise UnsupportedModelError(f"text_config has model_type {shown(family)}; the text model is a llama")
    for name in ("vocab_size", "hidden_size"):
        require({name: values[name]} if values.get(name) is not None else {}, name, (text[name],))
    require(text, "use_resampler", (False, None))
    require(text, "qk_layer_norms", (False, None))
    require(text, "pixel_shuffle_factor", (values.get("scale_factor", 2), None))
    read = {*LLAMA.keys, *_OF_TRAINING, "use_resampler", "qk_layer_norms", "pixel_shuffle_factor"}
    check_keys_read({**text, "model_type": family}, read)
    own = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **text, "model_type": family}
    config = llama_config({**own, "tie_word_embeddings": values.get("tie_word_embeddings", False)})
    return replace(config, family=values["model_type"])


_MODULES = {
    "model.text_model.embed_tokens": "model.embed_tokens",
    **{
        f"model.text_model.layers.{{}}.{name}": f"model.layers.{{}}.{name}"
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            *("input_layernorm", "post_attention_layernorm"),
        )
    },
    "model.text_model.norm": "model.norm",
    "lm_head": "lm_head",
}
_ENCODERS = {"model.vision_model.": "tower.", "model.connector.modality_projection.proj.": "projector."}
IDEFICS3, SMOLVLM = (
    Family(name, KEYS, _config, modules=_MODULES, encoders=_ENCODERS) for name in ("idefics3", "smolvlm")
)
