"""Mistral: Llama with attention over a sliding window, if config.json has one."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config(values, sliding_window=values.get("sliding_window"))


MISTRAL = Family("mistral", _config)
