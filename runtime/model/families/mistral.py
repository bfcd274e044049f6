"""Mistral: Llama with attention over a sliding window, unless config.json says null."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import DEFAULT_WINDOW, KEYS, llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config(values, sliding_window=values.get("sliding_window", DEFAULT_WINDOW))


MISTRAL = Family("mistral", KEYS | {"sliding_window"}, _config)
