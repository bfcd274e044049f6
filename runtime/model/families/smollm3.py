"""SmolLM3: Llama, but in some layers, by default every fourth, queries and keys do not rotate."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, layers_with_window, llama_config

_INTERVAL = 4  # where config.json does not say
_THETA = 2_000_000.0


def _config(values: Json) -> DecoderConfig:
    count, every = values["num_hidden_layers"], values.get("no_rope_layer_interval", _INTERVAL)
    if type(every) is not int or every < 1:
        raise UnsupportedModelError(
            f"no_rope_layer_interval={every!r} is not supported; it is an integer of at least 1"
        )
    rotates = values.get("no_rope_layers")  # 1: the layer rotates
    if rotates is None:
        rotates = [int((index + 1) % every != 0) for index in range(count)]
    if not isinstance(rotates, list) or len(rotates) != count or any(value not in (0, 1) for value in rotates):
        raise UnsupportedModelError(f"no_rope_layers={rotates} is not supported; it has a 0 or 1 for each layer")
    unrotated = tuple(index for index, value in enumerate(rotates) if not value)
    tied = values.get("tie_word_embeddings", True)
    window = values.get("sliding_window") if values.get("use_sliding_window") else None
    windowed = layers_with_window(values, lambda index: bool(window) and index in unrotated)
    if windowed and not window:
        raise UnsupportedModelError("layer_types has windows without use_sliding_window and sliding_window")
    return llama_config(
        {"rope_theta": _THETA, **values},
        unrotated_layers=unrotated,
        tied_head=tied,
        sliding_window=window if windowed else None,
        window_layers=windowed,
    )


_OWN_KEYS = frozenset(
    {"no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"}
)
SMOLLM3 = Family("smollm3", KEYS | _OWN_KEYS | {"attention_bias", "mlp_bias"}, _config)
