"""Qwen3: Llama with an RMS norm over each head of q and k."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import llama_config


def _config(values: Json) -> DecoderConfig:
    require(values, "use_sliding_window", (False,))
    return llama_config(values, qk_norm=True)


QWEN3 = Family("qwen3", _config)
