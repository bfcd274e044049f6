"""Qwen2: Llama with biases on q, k and v."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import llama_config


def _config(values: Json) -> DecoderConfig:
    require(values, "use_sliding_window", (False,))
    return llama_config(values, qkv_bias=True, out_bias=False)


QWEN2 = Family("qwen2", _config)
