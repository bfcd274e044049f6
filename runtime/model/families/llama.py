"""Llama, whose tensor names are the canonical ones, and what families derived from it share."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json, require, rotary

DEFAULT_WINDOW = 4096  # where config.json has no sliding_window: what transformers takes


def llama_config(values: Json, **changes: Any) -> DecoderConfig:
    """`DecoderConfig` from a config.json with Llama's keys. `changes`: the fields in which a family differs."""
    require(values, "hidden_act", ("silu",))
    heads = values["num_attention_heads"]
    fields: dict[str, Any] = {
        "family": values["model_type"],
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_size": values.get("head_dim") or values["hidden_size"] // heads,
        "max_position_embeddings": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "qkv_bias": bool(values.get("attention_bias", False)),
        "out_bias": bool(values.get("attention_bias", False)),
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "tied_head": bool(values.get("tie_word_embeddings", False)),
        **rotary(values),
    }
    return DecoderConfig(**(fields | changes))


def late_window(values: Json) -> dict[str, Any]:
    """The fields of a sliding window in the layers from `max_window_layers` on, if `use_sliding_window` is set.

    Raises `UnsupportedModelError` if `layer_types` does not agree with these.
    """
    window = values.get("sliding_window", DEFAULT_WINDOW) if values.get("use_sliding_window", False) else None
    first = values.get("max_window_layers", 28) if window else 0  # 28: the default of transformers
    count = values["num_hidden_layers"]
    derived = ["sliding_attention" if window and index >= first else "full_attention" for index in range(count)]
    if (values.get("layer_types") or derived) != derived:
        raise UnsupportedModelError(
            f"layer_types={values['layer_types']} is not supported; a window must be that of the layers from {first} on"
        )
    return {"sliding_window": window or None, "first_window_layer": first}


LLAMA = Family("llama", llama_config)
