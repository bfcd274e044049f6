"""Llama, whose tensor names are the canonical ones, and what families derived from it share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
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
        **(changes.pop("rotary", None) or rotary(values)),
    }
    return DecoderConfig(**(fields | changes))


def late_window(values: Json) -> dict[str, Any]:
    """The fields of a sliding window, if `use_sliding_window` is set: in the layers that `layer_types` says; without it, in
    those from `max_window_layers` on. Raises `UnsupportedModelError` for other kinds of layers."""
    window = values.get("sliding_window", DEFAULT_WINDOW) if values.get("use_sliding_window", False) else None
    first = values.get("max_window_layers", 28)  # the default of transformers
    windowed = layers_with_window(values, lambda index: bool(window) and index >= first)
    if windowed and not window:
        raise UnsupportedModelError(
            f"layer_types={values['layer_types']} is not supported without use_sliding_window and sliding_window"
        )
    return {"sliding_window": window, "window_layers": windowed} if windowed else {"sliding_window": None}


def layers_with_window(values: Json, is_windowed: Callable[[int], bool]) -> tuple[int, ...]:
    """Layers that attend over a sliding window: those of `layer_types`, or of `is_windowed` if there is none. Raises
    `UnsupportedModelError` for other kinds of layers."""
    count = values["num_hidden_layers"]
    kinds = values.get("layer_types")
    if kinds is None:
        return tuple(filter(is_windowed, range(count)))
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
        raise UnsupportedModelError(f"layer_types={kinds} is not supported; it must name {count} of {known}")
    return tuple(index for index, kind in enumerate(kinds) if kind == "sliding_attention")


def rotary(values: Json, allowed: Collection[str] = ()) -> dict[str, Any]:
    """The fields of rotary positions, read as transformers 5 (`rope_parameters`) or 4 writes them. `allowed`: further keys
    that the caller reads. Raises `UnsupportedModelError` for a kind of scaling, or a key of it, that is not computed."""
    parameters = rope_parameters(values)
    check_rope(parameters, allowed)
    theta: Any = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind in ("default", "dynamic"):  # a dynamic scaling begins behind the context
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = {k: v for k, v in parameters.items() if k not in ("rope_theta", *allowed) and v is not None}
    fields: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling}
    if kind in ("yarn", "longrope"):
        at = values.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        whole = values["max_position_embeddings"]
        scaling["original_max_position_embeddings"] = at or whole
        if kind == "longrope":
            return fields | _longrope(values, scaling)
        if at:  # it is how long texts are asked for; some write the length that comes of it, some the original one
            fields["max_position_embeddings"] = max(whole, int(scaling["factor"] * at))
    return fields


def rotating(head_size: int, part: Any) -> int | None:
    """`DecoderConfig.rotary_size` of a fraction of the channels. Raises `UnsupportedModelError` unless it is a number in 0…1."""
    if type(part) not in (int, float) or not 0 < part <= 1:
        raise UnsupportedModelError(
            f"the part of a head that rotates must be a number above 0 and at most 1, got {part!r}"
        )
    size = int(head_size * part)
    return None if size == head_size else size


def _longrope(values: Json, scaling: dict[str, Any]) -> dict[str, Any]:
    """Texts beyond the original context have other factors from their first token on, so the context ends there."""
    original, whole = scaling["original_max_position_embeddings"], values["max_position_embeddings"]
    ratio = scaling.get("factor") or whole / original
    factor = scaling.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    own = {"rope_type": "longrope", "short_factor": scaling["short_factor"], "attention_factor": factor}
    return {"rope_scaling": own, "max_position_embeddings": min(original, whole)}


def rope_parameters(values: Json) -> Json:
    """`rope_parameters` or `rope_scaling`; empty if there is neither. Raises `UnsupportedModelError` if both are there and
    differ."""
    given = [values[key] for key in ("rope_parameters", "rope_scaling") if values.get(key)]
    if len(given) == 2 and given[0] != given[1]:
        raise UnsupportedModelError(
            "config.json has both rope_parameters and rope_scaling, and they differ; remove one"
        )
    return given[0] if given else {}


LLAMA = Family("llama", KEYS | {"attention_bias", "mlp_bias"}, llama_config)
