"""Qwen2: Llama with biases on q, k and v, and optionally a sliding window in the layers from `max_window_layers` on."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, WINDOW_KEYS, late_window, llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config(values, qkv_bias=True, out_bias=False, **late_window(values))


QWEN2 = Family("qwen2", KEYS | WINDOW_KEYS, _config)
