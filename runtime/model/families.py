"""The table of model families: Hugging Face `config.json` → `DecoderConfig`, and checkpoint names → canonical names.

A new architecture is a row in `FAMILIES` and a parity test against transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from .config import DecoderConfig

Json = Mapping[str, Any]


def decoder_config(values: Json) -> DecoderConfig:
    """`DecoderConfig` of a parsed config.json. Raises `UnsupportedModelError` for a family or option it cannot say."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UnsupportedModelError(f"model family {family!r} is not supported; known are {sorted(FAMILIES)}")
    try:
        return FAMILIES[family](values)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"config.json of family '{family}' lacks or misstates {error}") from error


def _require(values: Json, option: str, allowed: tuple[object, ...]) -> None:
    if values.get(option, allowed[0]) not in allowed:
        raise UnsupportedModelError(f"{option}={values[option]!r} is not supported; allowed: {allowed}")


def _rotary(values: Json) -> dict[str, Any]:
    """Theta and scaling, as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) writes them."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta: Any = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling = None if kind == "default" else {k: v for k, v in parameters.items() if k != "rope_theta"}
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _llama_like(values: Json, **changes: Any) -> DecoderConfig:
    _require(values, "hidden_act", ("silu",))
    if values.get("sliding_window") and values.get("use_sliding_window", values["model_type"] == "mistral"):
        raise UnsupportedModelError(f"sliding_window={values['sliding_window']} is not supported; full attention only")
    heads = values["num_attention_heads"]
    fields: dict[str, Any] = {
        "family": "llama",
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "head_size": values.get("head_dim") or values["hidden_size"] // heads,
        "max_position_embeddings": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "qkv_bias": bool(values.get("attention_bias", False)),
        "out_bias": bool(values.get("attention_bias", False)),
        "mlp_bias": bool(values.get("mlp_bias", False)),
        "tied_head": bool(values.get("tie_word_embeddings", False)),
        **_rotary(values),
    }
    return DecoderConfig(**(fields | changes))


def _gpt2(values: Json) -> DecoderConfig:
    _require(values, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    _require(values, "scale_attn_by_inverse_layer_idx", (False,))
    _require(values, "scale_attn_weights", (True,))
    hidden, heads = values["n_embd"], values["n_head"]
    return DecoderConfig(
        family="gpt2",
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        intermediate_size=values.get("n_inner") or 4 * hidden,
        num_layers=values["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        max_position_embeddings=values["n_positions"],
        norm="layer",
        norm_eps=values["layer_norm_epsilon"],
        positions="learned",
        activation="gelu",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied_head=bool(values.get("tie_word_embeddings", True)),
    )


FAMILIES: Mapping[str, Callable[[Json], DecoderConfig]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": lambda values: _llama_like(values, family="qwen2", qkv_bias=True, out_bias=False),
    "qwen3": lambda values: _llama_like(values, family="qwen3", qk_norm=True),
    "gpt2": _gpt2,
}

_GPT2_LAYER = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.qkv_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_GPT2_TOP = {"wte": "model.embed_tokens", "wpe": "model.embed_positions", "ln_f": "model.norm"}


def canonical_name(family: str, name: str) -> str | None:
    """A checkpoint's tensor name as the canonical one; None for buffers that are not weights."""
    if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
        return None
    if family != "gpt2":
        return name
    if name.startswith("lm_head."):
        return name
    name = name.removeprefix("transformer.")
    module, _, kind = name.rpartition(".")
    if module in _GPT2_TOP:
        return f"{_GPT2_TOP[module]}.{kind}"
    match = re.fullmatch(r"h\.(\d+)\.(.+)", module)
    if match is None or match[2] not in _GPT2_LAYER:
        raise UnsupportedModelError(f"the checkpoint holds '{name}', which no gpt2 decoder has")
    return f"model.layers.{match[1]}.{_GPT2_LAYER[match[2]]}.{kind}"
