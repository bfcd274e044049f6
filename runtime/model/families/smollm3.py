"""SmolLM3: Llama, but every fourth layer does not rotate its queries and keys."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import KEYS, llama_config

_INTERVAL = 4  # where config.json does not say
_THETA = 2_000_000.0


def _config(values: Json) -> DecoderConfig:
    require(values, "use_sliding_window", (False, None))
    count, every = values["num_hidden_layers"], values.get("no_rope_layer_interval", _INTERVAL)
    if type(every) is not int or every < 1:
        raise UnsupportedModelError(
            f"no_rope_layer_interval={every!r} is not supported; it is an integer of at least 1"
        )
    rotates = values.get("no_rope_layers")  # 1: the layer rotates
    if rotates is None:
        rotates = [int((index + 1) % every != 0) for index in range(count)]
    kinds = values.get("layer_types") or ["full_attention"] * count
    if kinds != ["full_attention"] * count:
        raise UnsupportedModelError(f"layer_types={kinds} is not supported; all layers have full attention")
    found = [period for period in (0, *range(1, count + 1)) if rotates == _pattern(period, count)]
    if not found:
        raise UnsupportedModelError(
            f"no_rope_layers={rotates} is not supported; all layers rotate, or one of every so many does not"
        )
    tied = values.get("tie_word_embeddings", True)
    return llama_config({"rope_theta": _THETA, **values}, unrotated_every=found[0], tied_head=tied)


def _pattern(period: int, count: int) -> list[int]:
    return [int(period == 0 or (index + 1) % period != 0) for index in range(count)]


OWN_KEYS = frozenset(
    {"no_rope_layers", "no_rope_layer_interval", "use_sliding_window", "sliding_window", "layer_types"}
)
SMOLLM3 = Family("smollm3", KEYS | OWN_KEYS | {"attention_bias", "mlp_bias"}, _config)
