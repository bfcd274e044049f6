"""Gemma, Gemma 2 and the texts of Gemma 3: scaled embeddings, norms whose stored weights are their distance from 1, a gate with
GELU. From Gemma 2 on there are norms of what is added to the residual stream, and windows in some layers."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import DEFAULT_WINDOW, KEYS, layers_with_window, llama_config, rope_parameters, rotary

_TANH = "gelu_pytorch_tanh"
_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0  # of Gemma 3, where config.json does not say
_PATTERN = 6  # of Gemma 3: one of so many layers attends to all positions


def _gemma(values: Json, **changes: Any) -> DecoderConfig:
    require(values, "use_bidirectional_attention", (None, False))
    own = {"head_dim": 256, "rms_norm_eps": 1e-6, **values, "hidden_act": "silu"}
    fields = {
        "activation": "geglu",
        "embedding_scale": values["hidden_size"] ** 0.5,
        "tied_head": values.get("tie_word_embeddings", True),
        "mlp_bias": False,
    }
    return llama_config(own, **(fields | changes))


def _gemma1(values: Json) -> DecoderConfig:
    require(values, "hidden_act", (None, _TANH, "gelu"))  # its `gelu` always meant the approximation
    require(values, "hidden_activation", (None, _TANH))
    return _gemma(values)


def _scaled(values: Json, layers: tuple[int, ...], softcap: float | None, **changes: Any) -> DecoderConfig:
    """From Gemma 2 on. `softcap`: of the logits, where config.json does not say."""
    require(values, "hidden_activation", (None, _TANH))  # `hidden_act` is not looked at
    scalar = values.get("query_pre_attn_scalar", 256)
    window = values.get("sliding_window", DEFAULT_WINDOW)
    if layers and window is None:
        raise UnsupportedModelError("sliding_window=null is not supported where layers have windows")
    require(values, "sliding_window_size", (None, window))
    return _gemma(
        values,
        norm_places="around",
        attention_scale=scalar**-0.5,
        logit_softcap=values.get("final_logit_softcapping", softcap),
        sliding_window=window if layers else None,
        window_layers=layers,
        **changes,
    )


def _gemma2(values: Json) -> DecoderConfig:
    layers = layers_with_window(values, lambda index: index % 2 == 0)
    return _scaled(values, layers, 30.0, attention_softcap=values.get("attn_logit_softcapping", 50.0))


def _gemma3(values: Json) -> DecoderConfig:
    if values.get("attn_logit_softcapping") is not None:
        raise UnsupportedModelError("attn_logit_softcapping is not supported; transformers ignores it in gemma3_text")
    pattern = values.get("sliding_window_pattern") or _PATTERN
    if not (values.get("layer_types") or values.get("sliding_window_pattern")):  # beside them it is not looked at
        require(values, "_sliding_window_pattern", (None, pattern))
    layers = layers_with_window(values, lambda index: (index + 1) % pattern != 0)
    nested = rope_parameters(values)
    if "full_attention" in nested:
        full, local = (nested.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
        theta = rotary({"rope_parameters": {"rope_theta": _LOCAL_THETA, **local}})
        if theta["rope_scaling"] is not None:
            raise UnsupportedModelError(f"rope scaling {local} is not supported in the layers with a window")
    else:
        if "type" in nested and "rope_type" not in nested:
            raise UnsupportedModelError("rope_scaling with `type` is not supported; gemma3_text reads `rope_type` only")
        full = {"rope_theta": values.get("rope_theta") or _GLOBAL_THETA, **nested}
        theta = {"rope_theta": values.get("rope_local_base_freq") or _LOCAL_THETA}
    own = {"max_position_embeddings": values["max_position_embeddings"]}
    fields = rotary(own | {"rope_parameters": {"rope_theta": _GLOBAL_THETA, **full}})
    return _scaled(
        values,
        layers,
        None,
        qk_norm="head",
        rotary=fields,
        window_rope_theta=theta["rope_theta"] if layers else None,
    )


_KEYS = KEYS | {"hidden_activation", "attention_bias", "use_bidirectional_attention"}
_SCALED = _KEYS | {
    *("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"),
    *("sliding_window", "sliding_window_size", "layer_types"),
}
GEMMA = Family("gemma", _KEYS, _gemma1, norm_offset=1.0)
GEMMA2 = Family("gemma2", _SCALED, _gemma2, norm_offset=1.0)
GEMMA3 = Family(
    "gemma3_text",
    _SCALED | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    _gemma3,
    norm_offset=1.0,
)
