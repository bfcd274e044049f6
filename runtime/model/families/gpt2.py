"""GPT-2: layer norms, learned positions, one up projection with GELU, and biases on all linear layers."""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family, Json, require

KEYS = frozenset(
    [
        "vocab_size",
        "n_embd",
        "n_head",
        "n_layer",
        "n_inner",
        "n_positions",
        "layer_norm_epsilon",
        "activation_function",
        "scale_attn_by_inverse_layer_idx",
        "scale_attn_weights",
        "tie_word_embeddings",
        "n_ctx",
    ]
)


def _config(values: Json) -> DecoderConfig:
    require(values, "activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    require(values, "scale_attn_by_inverse_layer_idx", (False,))
    require(values, "scale_attn_weights", (True,))
    require(values, "n_ctx", (values["n_positions"], None))
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
        tied_head=values.get("tie_word_embeddings", True),
    )


GPT2 = Family(
    "gpt2",
    KEYS,
    _config,
    modules={
        "wte": "model.embed_tokens",
        "wpe": "model.embed_positions",
        "h.{}.ln_1": "model.layers.{}.input_layernorm",
        "h.{}.attn.c_attn": "model.layers.{}.self_attn.qkv_proj",
        "h.{}.attn.c_proj": "model.layers.{}.self_attn.o_proj",
        "h.{}.ln_2": "model.layers.{}.post_attention_layernorm",
        "h.{}.mlp.c_fc": "model.layers.{}.mlp.up_proj",
        "h.{}.mlp.c_proj": "model.layers.{}.mlp.down_proj",
        "ln_f": "model.norm",
        "lm_head": "lm_head",
    },
    prefix="transformer.",
    transposed=True,
    buffers=(".attn.bias", ".attn.masked_bias"),
)
