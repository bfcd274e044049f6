"""The architectures of GGUF files that are read: how each names keys and tensors, and how it arranges them.

`general.architecture` names one of `ARCHITECTURES`. What a file leaves out has the value that llama.cpp takes for it
(src/models and src/llama-hparams.h there). What llama.cpp computes but a file does not say, its scale of attention scores or the
layers that do not rotate, is derived here as there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, UnsupportedModelError, shown
from .gguf_names import (
    FALCON_KEYS,
    FALCON_MODULES,
    FALCON_NORMS,
    GEMMA2_MODULES,
    GEMMA_MODULES,
    GPT2_KEYS,
    GPT2_MODULES,
    GRANITE_KEYS,
    LLAMA_KEYS,
    LLAMA_MODULES,
    MOE_MODULES,
    NEOX_KEYS,
    NEOX_MODULES,
    OLMO2_MODULES,
    OLMOE_KEYS,
    PHI3_MODULES,
    QWEN3_MOE_KEYS,
)

OPTIONAL = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")

_LAYERS_OF_27B = {
    "gemma2": 46,
    "gemma3": 62,
}  # whose scores are scaled by the width of a head if all had the hidden size
_LAYERS_OF_20B = 44  # of GPT-NeoX, whose GELU is the approximation
Values = dict[str, Any]


def _gemma2(file: File, config: Values, values: Values) -> None:
    config["attn_logit_softcapping"] = file.number("attn_logit_softcapping", 50.0)
    config["final_logit_softcapping"] = file.number("final_logit_softcapping", 30.0)
    window = file.count("attention.sliding_window", 4096)
    if window == 0:
        raise UnsupportedModelError(f"{file} has attention.sliding_window=0; gemma2 has layers with a window")
    config["sliding_window"] = window
    config["layer_types"] = file.layer_types(config["num_hidden_layers"], 2)
    theta = config["rope_parameters"]["rope_theta"]
    if file.number("rope.freq_base_swa", theta) != theta:
        raise UnsupportedModelError(f"{file} has another rope.freq_base_swa than rope.freq_base={theta}")
    _gemma_scale(config, "gemma2")


def _gemma3(file: File, config: Values, values: Values) -> None:
    cap = file.number("final_logit_softcapping", 0.0)
    config["final_logit_softcapping"] = cap or None
    window = file.count("attention.sliding_window", 0)
    config["sliding_window"] = window or 4096  # which no layer has then
    kinds = file.layer_types(config["num_hidden_layers"], 6)
    config["layer_types"] = kinds if window else ["full_attention"] * len(kinds)
    local = {"rope_type": "default", "rope_theta": file.number("rope.freq_base_swa", 10000.0)}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    _gemma_scale(config, "gemma3")


def _gemma_scale(config: Values, name: str) -> None:
    """Query_pre_attn_scalar, which no file has."""
    whole = config["hidden_size"] // config["num_attention_heads"]
    config["query_pre_attn_scalar"] = (
        whole if config["num_hidden_layers"] == _LAYERS_OF_27B[name] else config["head_dim"]
    )


def _phi3(file: File, config: Values, values: Values) -> None:
    config["sliding_window"] = file.count("attention.sliding_window", 0) or None
    config["original_max_position_embeddings"] = file.count(
        "rope.scaling.original_context_length", config["max_position_embeddings"]
    )
    part = file.part_that_rotates(config["head_dim"])
    if part != 1.0:
        config["rope_parameters"]["partial_rotary_factor"] = part
    factors = {kind: file.factors(f"rope_factors_{kind}.weight") for kind in ("short", "long")}
    scale = file.number("rope.scaling.attn_factor", 1.0)
    rope = config["rope_parameters"]
    if rope["rope_type"] == "linear":
        raise UnsupportedModelError(f"{file} has rope scaling of type 'linear'; phi3 has 'longrope'")
    if None in factors.values():
        if any(factors.values()) or scale != 1.0 or rope["rope_type"] == "longrope":
            raise DataError(
                f"{file} has a part of longrope; it needs rope_factors_short.weight and rope_factors_long.weight"
            )
        return
    rope |= {"rope_type": "longrope", "attention_factor": scale}
    rope |= {f"{kind}_factor": found for kind, found in factors.items()}


def _neox(file: File, config: Values, values: Values) -> None:
    if type(values.get("use_parallel_residual")) is not bool:
        raise DataError(
            f"{file} has use_parallel_residual={shown(values.get('use_parallel_residual'))}; it must be a bool"
        )
    config["use_parallel_residual"] = values.pop("use_parallel_residual")
    config["rotary_pct"] = file.part_that_rotates(config["hidden_size"] // config["num_attention_heads"])
    config["hidden_act"] = "gelu_fast" if config["num_hidden_layers"] == _LAYERS_OF_20B else "gelu"


def _falcon(file: File, config: Values, values: Values) -> None:
    if values.pop("tensor_data_layout", "jploski") != "jploski":
        raise UnsupportedModelError(f"{file} has another tensor_data_layout than 'jploski'")
    config.setdefault("num_kv_heads", config["num_attention_heads"])
    two = any(".attn_norm_2." in name for name in file.tensors)
    new = two or config["num_kv_heads"] != 1
    if new and not two and "rope_theta" not in config:
        raise UnsupportedModelError(
            f"{file} is a Falcon 2 without rope.freq_base, which llama.cpp's converter leaves out and which is not the usual "
            "one; pull the model's directory"
        )
    config |= {"new_decoder_architecture": new, "multi_query": not new, "activation": "gelu"}
    config["num_ln_in_parallel_attn"] = (2 if two else 1) if new else None
    config["bias"], config["alibi"], config["parallel_attn"] = False, False, True


@dataclass(frozen=True, slots=True)
class File:
    """What an architecture reads beside its plain keys. `values`: the architecture's keys, from which those that are used are
    taken; the others are then refused. `tensors`: its tensors by name; `read` makes values of one."""

    path: Path
    values: Values
    tensors: Mapping[str, Any]
    read: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"'{self.path}'"

    def number(self, key: str, default: float) -> float:
        """Raises `DataError` unless it is a finite number of at least 0."""
        value = self.values.pop(key, default)
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            raise DataError(f"{self} has {key}={shown(value)}; it must be a finite number of at least 0")
        return float(value)

    def count(self, key: str, default: int) -> int:
        """Raises `DataError` unless it is a whole number in 0…2³¹-1."""
        value = self.values.pop(key, default)
        if type(value) is not int or not 0 <= value < 2**31:
            raise DataError(f"{self} has {key}={shown(value)}; it must be a whole number of at least 0")
        return value

    def layer_types(self, layers: int, period: int) -> list[str]:
        """config.json's, by the pattern of the file: a period of which the last layer has no window, or a flag for each
        layer."""
        given = self.values.pop("attention.sliding_window_pattern", period)
        if type(given) is int and given >= 0:
            given = [given == 0 or index % given < given - 1 for index in range(layers)]
        if not isinstance(given, list) or len(given) != layers or not all(type(one) is bool for one in given):
            raise DataError(
                f"{self} has attention.sliding_window_pattern={shown(given)}; it must be a whole number, or a "
                f"bool for each of {layers} layers"
            )
        return ["sliding_attention" if has_window else "full_attention" for has_window in given]

    def part_that_rotates(self, head_size: int) -> float:
        """The fraction of the head's channels that rotate, so that its product with the head's size is their number."""
        size = self.count("rope.dimension_count", head_size)
        if not 0 < size <= head_size:
            raise DataError(f"{self} has rope.dimension_count={size}; a head has {head_size} channels")
        part = size / head_size
        return part if int(head_size * part) == size else (size + 0.5) / head_size

    def factors(self, name: str) -> list[float] | None:
        """Factors of the frequencies, from a tensor; None if there is none."""
        if name not in self.tensors:
            return None
        found = self.read(self.tensors[name])
        if found.ndim != 1 or not (found > 0).all():
            raise DataError(f"{self} has {name} of {found.shape}; it must be a row of numbers above 0")
        return [float(one) for one in found]


@dataclass(frozen=True, slots=True)
class Architecture:
    """`permuted`: rows of q and k are in the order of rotary pairs. `transposed`: config.json's family stores [in, out].
    `grouped`: config.json's family has q, k and v in one matrix by head of keys, the file one after the other.
    `norm_offset`: what the file has added to the family's stored norms. `fixed`: what config.json has beside the keys.
    `own` reads further keys of the architecture into config.json; `tensors`: those that it uses."""

    family: str
    name: str  # of config.json's `architectures`
    modules: Mapping[str, str]
    keys: Mapping[str, str]
    permuted: bool = False
    transposed: bool = False
    grouped: bool = False
    norm_offset: float = 0.0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    own: Callable[[File, Values, Values], None] | None = None
    tensors: Collection[str] = ()

    def modules_of(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """Names of the file → names of the family's checkpoints."""
        two = self.family == "falcon" and config.get("num_ln_in_parallel_attn") == 2
        return {**self.modules, **FALCON_NORMS} if two else self.modules


_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", LLAMA_MODULES, LLAMA_KEYS, permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", LLAMA_MODULES, LLAMA_KEYS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", LLAMA_MODULES, LLAMA_KEYS),
    "granite": Architecture("granite", "GraniteForCausalLM", LLAMA_MODULES, GRANITE_KEYS, permuted=True),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM", OLMO2_MODULES, LLAMA_KEYS),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", LLAMA_MODULES, LLAMA_KEYS, permuted=True),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", MOE_MODULES, QWEN3_MOE_KEYS, fixed={"norm_topk_prob": True}
    ),
    "olmoe": Architecture("olmoe", "OlmoeForCausalLM", MOE_MODULES, OLMOE_KEYS, fixed={"norm_topk_prob": False}),
    "gpt2": Architecture("gpt2", "GPT2LMHeadModel", GPT2_MODULES, GPT2_KEYS, transposed=True),
    "gemma": Architecture(
        "gemma",
        "GemmaForCausalLM",
        GEMMA_MODULES,
        LLAMA_KEYS,
        norm_offset=1.0,
        fixed=_GELU,
    ),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", GEMMA2_MODULES, LLAMA_KEYS, norm_offset=1.0, fixed=_GELU, own=_gemma2
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**GEMMA2_MODULES, "output": "lm_head"},
        LLAMA_KEYS,
        norm_offset=1.0,
        fixed=_GELU,
        own=_gemma3,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        PHI3_MODULES,
        LLAMA_KEYS,
        own=_phi3,
        tensors=("rope_factors_short.weight", "rope_factors_long.weight"),
    ),
    "gptneox": Architecture("gpt_neox", "GPTNeoXForCausalLM", NEOX_MODULES, NEOX_KEYS, grouped=True, own=_neox),
    "falcon": Architecture("falcon", "FalconForCausalLM", FALCON_MODULES, FALCON_KEYS, grouped=True, own=_falcon),
}
