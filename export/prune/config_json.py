"""config.json of a pruned model. Every key that speaks of layers, heads, widths or tokens is rewritten. What comes out is read
again and compared with what was meant, so that a family whose config.json cannot say it is refused and never misdescribed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...runtime.errors import ConfigError, UnsupportedModelError
from ...runtime.model.config import DecoderConfig
from ...runtime.model.families import FAMILIES, decoder_config
from ...runtime.model.layout import decoder_layout
from .cut import Cut

# Family → its name of a key, where it is not Llama's.
_LAYERS = {"gpt2": "n_layer"}
_WIDTH = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}
_FIXED_HEADS = ("gpt2", "gpt_neox", "falcon")  # a head's size is that of the hidden state divided by their number
_DEFAULTS_OF_LAYERS = ("sliding_window_pattern", "_sliding_window_pattern")  # layer_types says it now


def pruned_config(values: Mapping[str, Any], config: DecoderConfig, cut: Cut) -> dict[str, Any]:
    """The new config.json. `values`, `config`: of the original. Token ids are not looked at (see `tokens`). Raises
    `UnsupportedModelError` if the family's config.json cannot describe what is kept."""
    family, meant = config.family, cut.config(config)
    check_describable(config, cut)
    new = {key: value for key, value in values.items() if key not in ("quantization_config", "compression_config")}
    new[_LAYERS.get(family, "num_hidden_layers")] = len(cut.layers)
    if len(cut.layers) < config.num_layers:
        new |= _per_layer(values, config, cut)
        if "layer_types" in new:
            new = {key: value for key, value in new.items() if key not in _DEFAULTS_OF_LAYERS}
    if cut.kv_heads:
        new |= {"num_attention_heads": meant.num_heads, "num_key_value_heads": meant.num_kv_heads}
        new["head_dim"] = meant.head_size
    if cut.channels:
        new[_WIDTH.get(family, "intermediate_size")] = meant.intermediate_size
        new.pop("ff_factor", None)  # Falcon: the same as a multiple of the hidden size
    if cut.tokens is not None:
        new["vocab_size"] = meant.vocab_size
    if _facts(decoder_config(new)) != _facts(meant):
        raise UnsupportedModelError(
            f"config.json of family '{family}' cannot describe what is kept of this model; prune other layers, or other parts"
        )
    return new


def check_describable(config: DecoderConfig, cut: Cut) -> None:
    """Raises `UnsupportedModelError` for heads or widths that the family's config.json cannot describe, and for a model with an
    encoder, whose weights would be left out."""
    family = config.family
    if FAMILIES[family].encoders:
        raise UnsupportedModelError(
            f"family '{family}' has an encoder beside its decoder, and only models of text are pruned"
        )
    if cut.kv_heads and family in _FIXED_HEADS:
        raise UnsupportedModelError(
            f"family '{family}' has no head_dim in config.json: with fewer heads each would be larger; prune layers or channels"
        )
    if cut.kv_heads and config.qk_norm == "projection":
        raise UnsupportedModelError(
            f"family '{family}' norms all heads of q and of k together, so no head can be removed without changing the others; "
            "prune layers or channels"
        )
    if cut.channels and config.num_experts:
        raise UnsupportedModelError(f"the width of experts (family '{family}') is not pruned; prune layers or heads")


def _per_layer(values: Mapping[str, Any], config: DecoderConfig, cut: Cut) -> dict[str, Any]:
    """The keys with a value for each layer, or that count layers."""
    found: dict[str, Any] = {}
    layers = decoder_layout(config).layers
    if values.get("layer_types") is not None or (config.window_layers is not None and config.sliding_window):
        windowed = [layers[index].window is not None for index in cut.layers]
        found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in windowed]
    if values.get("max_window_layers") is not None:
        found["max_window_layers"] = sum(layer < values["max_window_layers"] for layer in cut.layers)
    if config.family == "smollm3":
        found["no_rope_layers"] = [int(layer not in config.unrotated_layers) for layer in cut.layers]
    if config.family == "qwen3_moe":
        dense = [index for index, layer in enumerate(cut.layers) if layer in config.dense_layers]
        found |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return found


def _facts(config: DecoderConfig) -> tuple[Any, ...]:
    """What two configurations that compute the same have in common: which layers have windows may be said in several ways."""
    layers = tuple(
        (layer.window, layer.rotary, layer.router is None, layer.qkv.rows, layer.mlps[0].up.rows)
        for layer in decoder_layout(config).layers
    )
    plain = dataclasses.replace(config, sliding_window=None, window_layers=None, unrotated_layers=(), dense_layers=())
    theta = config.window_rope_theta if any(window is not None for window, *_ in layers) else None
    return layers, dataclasses.replace(plain, window_rope_theta=None), theta


def check_kept(cut: Cut, config: DecoderConfig) -> None:
    """Raises `ConfigError` if nothing is removed."""
    if len(cut.layers) == config.num_layers and not (cut.kv_heads or cut.channels) and cut.tokens is None:
        raise ConfigError("nothing is removed; say what: --layers, --share, --heads, --channels or --vocabulary")
