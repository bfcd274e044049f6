"""OLMo 2: norms of what attention and MLP add to the residual stream, none before them, and of all of q and of k."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config(values, norm_places="after", qk_norm="projection", mlp_bias=False)


OLMO2 = Family("olmo2", KEYS | {"attention_bias"}, _config)
