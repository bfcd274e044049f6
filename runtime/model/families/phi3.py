"""Phi-3 and Phi-4-mini: Llama whose checkpoints store q, k and v as one matrix, gate and up as another, with attention over a
sliding window. In Phi-4-mini only a part of each head rotates."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, llama_config, rope_parameters, rotary, rotating

_PART = "partial_rotary_factor"
_LONGROPE = ("su", "yarn")  # older names


def _config(values: Json) -> DecoderConfig:
    parameters = dict(rope_parameters(values))
    for name in ("rope_type", "type"):
        if parameters.get(name) in _LONGROPE:
            parameters[name] = "longrope"
    own = {key: value for key, value in values.items() if key not in ("rope_parameters", "rope_scaling")}
    fields = rotary(own | {"rope_scaling": parameters}, (_PART,))
    if parameters.get("rope_type", parameters.get("type", "default")) not in ("default", "longrope"):
        raise UnsupportedModelError(f"rope scaling {parameters} is not supported; phi3 has longrope")
    config = llama_config(values, rotary=fields, sliding_window=values.get("sliding_window"))
    part: Any = parameters.get(_PART, values.get(_PART))
    if part is None:
        return config
    return dataclasses.replace(config, rotary_size=rotating(config.head_size, part))


PHI3 = Family("phi3", KEYS | {"sliding_window", "original_max_position_embeddings", _PART}, _config)
