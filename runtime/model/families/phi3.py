"""Phi-3: Llama whose checkpoints store q, k and v as one matrix, gate and up as another, with attention over a sliding window."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config(values, sliding_window=values.get("sliding_window"))


# `original_max_position_embeddings` is for scalings of rotary positions that `check_rope` refuses.
PHI3 = Family("phi3", KEYS | {"sliding_window", "original_max_position_embeddings"}, _config)
