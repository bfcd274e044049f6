"""GPT-NeoX (Pythia, Dolly): layer norms with biases, an MLP with GELU that runs beside attention, heads of which a part rotates,
and q, k and v stored head by head in one matrix."""

from __future__ import annotations

from typing import Any

from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import rope_parameters, rotary

PARTIAL = "partial_rotary_factor"
GELUS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"}
KEYS = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "layer_norm_eps",
        "hidden_act",
        "rotary_pct",
        "rotary_emb_base",
        "rope_scaling",
        "rope_parameters",
        "use_parallel_residual",
        "attention_bias",
        "tie_word_embeddings",
        PARTIAL,
    ]
)


def _config(values: Json) -> DecoderConfig:
    require(values, "hidden_act", tuple(GELUS))
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    require(values, PARTIAL, (None,))  # it is rotary_pct here, or one of rope_parameters
    part: Any = rope_parameters(values).get(PARTIAL, values.get("rotary_pct", 0.25))
    size = int(hidden // heads * part)
    bias: bool = values.get("attention_bias", True)
    activation: Any = GELUS[values.get("hidden_act", "gelu")]
    return DecoderConfig(
        family="gpt_neox",
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        head_size=hidden // heads,
        max_position_embeddings=values["max_position_embeddings"],
        norm="layer",
        norm_eps=values["layer_norm_eps"],
        activation=activation,
        parallel_residual=values.get("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        tied_head=values.get("tie_word_embeddings") or False,
        rotary_size=None if size == hidden // heads else size,
        **rotary({"rope_theta": values.get("rotary_emb_base", 10000.0), **values}, (PARTIAL,)),
    )


GPT_NEOX = Family(
    "gpt_neox",
    KEYS,
    _config,
    modules={
        "embed_in": "model.embed_tokens",
        "layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
        "layers.{}.attention.query_key_value": "model.layers.{}.self_attn.qkv_proj",
        "layers.{}.attention.dense": "model.layers.{}.self_attn.o_proj",
        "layers.{}.post_attention_layernorm": "model.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.dense_h_to_4h": "model.layers.{}.mlp.up_proj",
        "layers.{}.mlp.dense_4h_to_h": "model.layers.{}.mlp.down_proj",
        "final_layer_norm": "model.norm",
        "embed_out": "lm_head",
    },
    prefix="gpt_neox.",
    grouped_qkv=True,
)
