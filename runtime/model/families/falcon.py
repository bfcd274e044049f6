"""Falcon: layer norms, an MLP with GELU that runs beside attention, often on the same norm, few heads of keys and values, and
q, k and v stored in one matrix, by head of keys."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json, require
from .gpt_neox import GELUS
from .llama import rotary

KEYS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "ffn_hidden_size",
        "ff_factor",
        "num_hidden_layers",
        "num_attention_heads",
        "num_kv_heads",
        "max_position_embeddings",
        "layer_norm_epsilon",
        "activation",
        "alibi",
        "new_decoder_architecture",
        "multi_query",
        "parallel_attn",
        "num_ln_in_parallel_attn",
        "apply_residual_connection_post_layernorm",
        "bias",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "tie_word_embeddings",
    ]
)


def _config(values: Json) -> DecoderConfig:
    require(values, "activation", tuple(GELUS))
    require(values, "alibi", (False, None))
    require(values, "apply_residual_connection_post_layernorm", (False, None))
    for name in ("new_decoder_architecture", "multi_query", "parallel_attn", "bias"):
        require(values, name, (None, True, False))
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    new, parallel = values.get("new_decoder_architecture") or False, values.get("parallel_attn", True)
    norms, given = values.get("num_ln_in_parallel_attn"), values.get("num_kv_heads")
    if (new and not parallel) or norms not in (None, 1, 2) or (norms == 2 and not new):
        raise UnsupportedModelError(
            f"parallel_attn={parallel} with num_ln_in_parallel_attn={norms} and new_decoder_architecture={new} is not "
            "supported; no Falcon has it"
        )
    if new:
        kv_heads = heads if given is None else given
    elif values.get("multi_query", True):
        kv_heads = 1  # whatever num_kv_heads is: transformers writes the number of heads
    else:
        require(values, "num_kv_heads", (None, heads))
        kv_heads = heads
    inner = values.get("ffn_hidden_size") or 4 * hidden
    require(values, "ff_factor", (None, inner / hidden))
    bias: bool = values.get("bias") or False
    fields: dict[str, Any] = {
        "family": "falcon",
        "vocab_size": values["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_size": hidden // heads,
        "max_position_embeddings": values.get("max_position_embeddings", 2048),
        "norm": "layer",
        "norm_eps": values["layer_norm_epsilon"],
        "activation": GELUS[values.get("activation", "gelu")],
        "parallel_residual": parallel,
        "shared_norm": parallel and (norms == 1 or not new),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bias,
        "tied_head": values.get("tie_word_embeddings", True),
    }
    return DecoderConfig(**(fields | rotary({"max_position_embeddings": 2048, **values})))


FALCON = Family(
    "falcon",
    KEYS,
    _config,
    modules={
        "word_embeddings": "model.embed_tokens",
        "h.{}.input_layernorm": "model.layers.{}.input_layernorm",
        "h.{}.ln_attn": "model.layers.{}.input_layernorm",
        "h.{}.self_attention.query_key_value": "model.layers.{}.self_attn.qkv_proj",
        "h.{}.self_attention.dense": "model.layers.{}.self_attn.o_proj",
        "h.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
        "h.{}.ln_mlp": "model.layers.{}.post_attention_layernorm",
        "h.{}.mlp.dense_h_to_4h": "model.layers.{}.mlp.up_proj",
        "h.{}.mlp.dense_4h_to_h": "model.layers.{}.mlp.down_proj",
        "ln_f": "model.norm",
        "lm_head": "lm_head",
    },
    prefix="transformer.",
    grouped_qkv=True,
)
