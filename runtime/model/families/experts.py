"""OLMoE and Qwen3-MoE: mixtures of experts."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError, shown
from ..config import DecoderConfig
from .family import Family, Json, require
from .llama import KEYS, WINDOW_KEYS, llama_config

_TRAINING = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})  # not what is computed
_KEYS = KEYS | _TRAINING | {"num_experts", "num_experts_per_tok", "norm_topk_prob", "attention_bias"}


def _experts(values: Json, num_experts: int, size: int) -> dict[str, Any]:
    normalises = values.get("norm_topk_prob") or False
    return {
        "num_experts": num_experts,
        "experts_per_token": values["num_experts_per_tok"],
        "expert_size": size,
        "normalises_experts": normalises,
        "mlp_bias": False,
    }


def _olmoe(values: Json) -> DecoderConfig:
    require(values, "clip_qkv", (None,))
    own = _experts(values, values["num_experts"], values["intermediate_size"])
    return llama_config(values, qk_norm="projection", **own)


def _qwen3_moe(values: Json) -> DecoderConfig:
    require(values, "use_sliding_window", (False, None))
    given = {name: values[name] for name in ("num_experts", "num_local_experts") if values.get(name) is not None}
    if len(set(given.values())) != 1:
        raise UnsupportedModelError(f"config.json must have one number of experts, it has {given}")
    layers, step = values["num_hidden_layers"], values.get("decoder_sparse_step", 1)
    alone = values.get("mlp_only_layers") or []
    if type(step) is not int or step < 1:
        raise UnsupportedModelError(
            f"decoder_sparse_step={shown(step)} is not supported; it is an integer of at least 1"
        )
    dense = tuple(index for index in range(layers) if index in alone or (index + 1) % step)
    own = _experts(values, next(iter(given.values())), values["moe_intermediate_size"])
    return llama_config(values, qk_norm="head", dense_layers=dense, **own)


OLMOE = Family("olmoe", _KEYS | {"clip_qkv"}, _olmoe)
QWEN3_MOE = Family(
    "qwen3_moe",
    _KEYS | WINDOW_KEYS | {"num_local_experts", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers"},
    _qwen3_moe,
)
