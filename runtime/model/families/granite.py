"""Granite 3: Llama with factors of embeddings, attention scores, residual branches and logits."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json
from .llama import KEYS, llama_config


def _config(values: Json) -> DecoderConfig:
    return llama_config(
        values,
        embedding_scale=values.get("embedding_multiplier", 1.0),
        attention_scale=values.get("attention_multiplier", 1.0),
        residual_scale=values.get("residual_multiplier", 1.0),
        logit_scale=1 / values.get("logits_scaling", 1.0),
    )


_OWN_KEYS = frozenset({"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"})
GRANITE = Family("granite", KEYS | _OWN_KEYS | {"attention_bias", "mlp_bias"}, _config)
