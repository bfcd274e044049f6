"""GPT-NeoX (Pythia): layer norms with biases, an MLP with GELU that runs beside attention, heads of which a part rotates,
and q, k and v stored head by head in one matrix."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError
from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import rope_parameters, rotary, rotating

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
    require(values, PARTIAL, (None,))  # it is rotary_pct here, or one of rope_parameters
    parameters = rope_parameters(values)
    for own, name in (("rotary_pct", PARTIAL), ("rotary_emb_base", "rope_theta")):
        if own in values and name in parameters and parameters[name] != values[own]:
            raise UnsupportedModelError(
                f"config.json has {own} and {name} in rope_parameters, and they differ; remove one"
            )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    bias: bool = values.get("attention_bias", True)
    fields: dict[str, Any] = {
        "family": "gpt_neox",
        "vocab_size": values["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_size": hidden // heads,
        "max_position_embeddings": values["max_position_embeddings"],
        "norm": "layer",
        "norm_eps": values["layer_norm_eps"],
        "activation": GELUS[values.get("hidden_act", "gelu")],
        "parallel_residual": values.get("use_parallel_residual", True),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": True,
        "tied_head": values.get("tie_word_embeddings") or False,
        "rotary_size": rotating(hidden // heads, parameters.get(PARTIAL, values.get("rotary_pct", 0.25))),
    }
    return DecoderConfig(
        **(fields | rotary({"rope_theta": values.get("rotary_emb_base", 10000.0), **values}, (PARTIAL,)))
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
        "lm_head": "lm_head",  # as transformers 5 calls it
    },
    prefix="gpt_neox.",
    grouped_qkv=True,
    buffers=(".attention.bias", ".attention.masked_bias"),
)
