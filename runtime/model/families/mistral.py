"""Mistral: Llama with attention over a sliding window, of which only models without the window are supported."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import llama_config


def _config(values: Json) -> DecoderConfig:
    require(values, "sliding_window", (None,))
    return llama_config(values)


MISTRAL = Family("mistral", _config)
