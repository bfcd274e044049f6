"""Qwen3: Llama with an RMS norm over each head of q and k, and optionally a sliding window as in Qwen2."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, WINDOW_KEYS, late_window, llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config({"head_dim": 128, **values}, qk_norm="head", **late_window(values))


QWEN3 = Family("qwen3", KEYS | WINDOW_KEYS | {"attention_bias"}, _config)
