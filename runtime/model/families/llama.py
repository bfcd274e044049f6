"""Llama, whose tensor names are the canonical ones, and what families derived from it share."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json, require
from .keys import check_rope

DEFAULT_WINDOW = 4096  # where config.json has no sliding_window: what transformers takes


KEYS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "tie_word_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
    ]
)
WINDOW_KEYS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})


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
        "qkv_bias": values.get("attention_bias") or False,
        "out_bias": values.get("attention_bias") or False,
        "mlp_bias": values.get("mlp_bias") or False,
        "tied_head": values.get("tie_word_embeddings") or False,
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


def rotary(values: Json) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, read as transformers 5 (`rope_parameters`) or 4 writes them. Raises
    `UnsupportedModelError` for a kind of scaling, or a key of it, that is not computed."""
    given = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise UnsupportedModelError(
            "config.json has both rope_parameters and rope_scaling, and they differ; remove one"
        )
    parameters = given[0] if given else {}
    check_rope(parameters)
    theta: Any = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling = (
        None if kind == "default" else {k: v for k, v in parameters.items() if k != "rope_theta" and v is not None}
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


LLAMA = Family("llama", KEYS | {"attention_bias", "mlp_bias"}, llama_config)
